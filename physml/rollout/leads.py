"""Forecasts by steps of other lengths than the time step of the data."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from physml.errors import ConfigError, SpecError
from physml.fields import Window
from physml.rollout.scan import check_kind, check_reach, rollout, run_compiled, without_frames


def direct_leads(stepper, window: Window, leads: Sequence[float], key=None):
    """Frames at several leads, each predicted in a single step from the last frame of the history.

    Args:
        leads: in time steps of the data, up to the `longest_lead` of the stepper: also zero where that is above 1, also
            fractions where nothing depends on the calendar or on forcing. Of a stepper of intervals: some of these.
        key: typed PRNG key of a stochastic stepper; lead i sees `fold_in(key, i)`.

    Returns what `stepper.decode` returns with axes `(batch, lead, ...)`. Pure, jittable and differentiable. Raises
    SpecError for a stepper that does not know the lead and for forcing or calendar that end before, ConfigError for a
    lead that it was not trained for.
    """
    check_kind(window)
    leads = [float(lead) for lead in leads]
    if not leads:
        raise ConfigError("leads are empty: give at least one, in time steps of the data.")
    for lead in leads:
        check_lead(stepper, lead)
    spec, history = window.spec, stepper.history
    fractions = [lead for lead in leads if not lead.is_integer()]
    if fractions and (spec.forcing or stepper.config.calendar):
        raise ConfigError(
            f"Between frames, at lead {fractions[0]:g}, neither forcing nor calendar is known. Ask for whole leads."
        )
    longest = int(np.ceil(max(leads)))
    check_reach(stepper, window, history + longest, f"{history} of history and the longest lead, {longest}")
    start = window.context(0, history, key)
    state = stepper.encode(jnp.asarray(window.frames)[:, :history], start)
    frames = run_compiled(_single_steps, (), stepper, state, without_frames(window), key, jnp.asarray(leads))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), frames)


def _single_steps():
    def frames(stepper, state, window: Window, key, leads):
        history, now = stepper.history, jnp.asarray(window.times)[:, stepper.history - 1]

        def predict(numbers):
            number, lead = numbers
            context = window.context(jnp.round(lead).astype(jnp.int32) - 1, history)
            length = jnp.full_like(now, window.spec.time_step) * lead.astype(now.dtype)
            own = None if key is None else jax.random.fold_in(key, number)
            context = dataclasses.replace(context, time=now + length, lead=length, key=own)
            return stepper.decode(stepper.advance(state, context))

        return jax.lax.map(predict, (jnp.arange(len(leads)), leads))

    return frames


def rollout_stride(stepper, window: Window, steps: int, stride: int, key=None, *, remat: bool | str = "none"):
    """`rollout` by steps of `stride` frames: what it predicts are the frames at stride, 2 stride, ... .

    Raises ConfigError for a stride that the stepper was not trained for, SpecError for a stepper that is not told the
    length of a step or takes several frames, which lie one frame apart, and for forcing or calendar that end before.
    """
    check_kind(window)
    history = stepper.history
    if not float(stride).is_integer() or stride < 1:
        raise ConfigError(f"stride is {stride}, but it counts frames: a whole number, 1 or more.")
    stride = int(stride)
    if stride != 1:
        check_lead(stepper, stride)
        if history > 1:
            raise SpecError(
                f"The stepper takes {history} frames, one time step apart, but steps of {stride} make them {stride} "
                "apart. Use history=1, or stride=1."
            )
    wanted = history - 1 + stride * np.arange(1, steps + 1)
    if steps:
        check_reach(stepper, window, int(wanted[-1]) + 1, f"{history} of history and {steps} steps of {stride}")
    index = np.concatenate([np.arange(history), wanted])

    def thin(array):
        return jnp.asarray(array)[:, np.minimum(index, array.shape[1] - 1)]

    moving = {name: thin(getattr(window, name)) for name in ("times", "calendar", "forcing")}
    beyond = np.maximum(index - (window.times.shape[1] - 1), 0) * window.spec.time_step
    moving["times"] = moving["times"] + jnp.asarray(beyond, moving["times"].dtype)
    thinned = dataclasses.replace(window, frames=window.frames[:, :history], **moving)
    return rollout(stepper, thinned, steps, key, remat=remat)


def check_lead(stepper, lead: float) -> None:
    """Raises SpecError for a stepper that is not told the length of a step, ConfigError for one that it never saw."""
    config = getattr(stepper, "config", None)
    intervals = getattr(config, "intervals", None)
    if not getattr(config, "lead", False) or stepper.history == 0:
        raise SpecError(
            f"{type(stepper).__name__} does not tell its network the length of a step: it only takes steps of one "
            "frame. Train DirectConfig(lead=True, longest_lead=...) with AllToAll, or use `rollout`."
        )
    if intervals is None:
        longest = getattr(config, "longest_lead", 1)
        if longest == 1 and lead != 1:
            raise ConfigError(
                f"A lead of {lead:g} time steps was asked for, but the stepper is trained for steps of 1 only. Reach "
                "it by several of them (`rollout`), or train DirectConfig(lead=True, longest_lead=...) with AllToAll."
            )
        if not 0 <= lead <= longest:
            raise ConfigError(
                f"A lead of {lead:g} time steps was asked for, but the stepper is trained for 0 to {longest}. Reach it "
                "by several steps (`rollout`, `rollout_stride`), or train with a larger longest_lead."
            )
        return
    if config.average:
        raise ConfigError(
            "The stepper averages over its intervals, which only `rollout` does. Switch that off first: "
            "physml.steppers.averaged(stepper, False)."
        )
    if lead not in intervals:
        raise ConfigError(
            f"A step of {lead:g} frames was asked for, but the stepper is trained for the intervals {intervals}. Use "
            "one of them."
        )
