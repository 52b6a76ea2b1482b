"""Many steps of any stepper in one `lax.scan`."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError, SpecError
from physml.fields import Window

REMAT = ("none", "step", "sqrt")


def rollout(stepper, window: Window, steps: int, key=None, *, remat: bool | str = "none"):
    """Predicts `steps` frames after the first `stepper.history` frames of `window`.

    Returns what `stepper.decode` returns with axes `(batch, lead, ...)`. Pure, jittable and differentiable. Outside of
    jit the loop is compiled once for steppers of one structure.

    Args:
        key: typed PRNG key of a stochastic stepper; step i sees `fold_in(key, i)`.
        remat: what the gradient keeps of the forward pass: "none" keeps everything, "step" (or True) the state of every
            step, "sqrt" about 2 sqrt(steps) states at the price of computing them once more.

    Raises SpecError when the window has fewer frames than the history, or when its forcing, or a calendar that the
    stepper reads, ends before the rollout does; ConfigError for what is no Window and for another `remat`.
    """
    check_window(stepper, window, steps)

    history = stepper.history
    state = stepper.encode(window.frames[:, :history], window.context(0, history, key))
    options = (steps, "step" if remat is True else remat or "none")
    frames = run_compiled(_scanned, options, stepper, state, without_frames(window), key)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), frames)


def _scanned(steps: int, remat: str):
    def frames(stepper, state, window: Window, key):
        def body(state, step):
            step_key = None if key is None else jax.random.fold_in(key, step)
            state = stepper.advance(state, window.context(step, stepper.history, step_key))
            return state, stepper.decode(state)

        return _scan(body, state, steps, remat)

    return frames


def without_frames(window: Window) -> Window:
    """For the steps after `encode`, which see its clock and fields only: any number of frames is one trace."""
    return replace(window, frames=window.frames[:, :0])


def run_compiled(make, options: tuple, stepper, *arguments):
    """`make(*options)(stepper, *arguments)`, compiled once for all numbers where nothing is traced already."""
    graph, numbers = nnx.split(stepper) if isinstance(stepper, nnx.Module) else (None, stepper)
    if graph is None or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((numbers, arguments))):
        return make(*options)(stepper, *arguments)
    return _jitted(make, options, graph)(numbers, *arguments)


def remembered(make):
    """`make`, which gives a jitted function, with the last results kept: another function would be compiled again.

    Made anew where an argument cannot be hashed, as steppers of one's own that hold a list.
    """
    cached = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def find(*arguments):
        try:
            hash(arguments)
        except TypeError:
            return make(*arguments)
        return cached(*arguments)

    return find


@remembered
def _jitted(make, options: tuple, graph):
    run = make(*options)
    return jax.jit(lambda numbers, *arguments: run(nnx.merge(graph, numbers), *arguments))


def check_window(stepper, window: Window, steps: int, *, forcing: bool = True) -> None:
    """Raises SpecError when a window cannot start a rollout of `steps`; `forcing=False`: it comes from elsewhere."""
    check_kind(window)
    history = stepper.history
    if window.frames.shape[1] < history:
        raise SpecError(
            f"The stepper needs {history} frames of history, but the window holds {window.frames.shape[1]}. "
            f"Give the last {history} frames before the first one to be predicted."
        )
    check_reach(stepper, window, history + steps, f"{history} of history and {steps} steps", forcing=forcing)


def check_reach(stepper, window: Window, frames: int, what: str, *, forcing: bool = True) -> None:
    """Raises SpecError where forcing, or a calendar that the stepper reads, is given for less than `frames` frames;
    `what` are these. `forcing=False`: it comes from elsewhere."""
    names = [channel.name for channel in window.spec.forcing]
    if forcing and names and window.forcing.shape[1] < frames:
        raise SpecError(
            f"Forcing {names} is given for {window.forcing.shape[1]} frames, but {frames} are needed: {what}. Give "
            "more, or take fewer steps."
        )
    if reads_calendar(stepper) and window.calendar.shape[1] < frames:
        raise SpecError(
            f"The stepper reads the calendar, which is given for {window.calendar.shape[1]} frames, but {frames} are "
            f"needed: {what}. Give the dates of what is predicted too, Window.of(..., times=, calendar=), or use "
            "physml.forecast, which knows them."
        )


def reads_calendar(stepper) -> bool:
    """Whether it asks for the time of the year or of the day: by its config, or by slots of a climatology."""
    for wrapped in ("stepper", "members"):  # of a `Distribution`, and of an ensemble that is `Apart`
        stepper = getattr(stepper, wrapped, stepper)
    config = getattr(stepper, "config", None)
    climatology = getattr(config, "climatology", config)  # of a linear inverse model, or the stepper's own
    slots = (getattr(climatology, "days", None) or 1) * (getattr(climatology, "hours", None) or 1)
    return bool(getattr(config, "calendar", False)) or slots > 1


def check_kind(window) -> None:
    """Raises ConfigError for what is no window."""
    if not isinstance(window, Window):
        raise ConfigError(
            f"A {type(window).__name__} was given, but a Window was expected. Make one of a dataset with "
            "physml.data.to_window(dataset, stepper.spec), or use physml.forecast, which takes datasets."
        )


def _scan(body, state, steps: int, remat: str):
    if remat not in REMAT:
        raise ConfigError(f"remat is {remat!r}, but one of {', '.join(REMAT)} was expected.")
    if remat != "none":
        body = jax.checkpoint(body)
    if remat != "sqrt" or steps < 4:
        return jax.lax.scan(body, state, jnp.arange(steps))[1]
    inner = math.isqrt(steps)
    outer = steps // inner

    @jax.checkpoint
    def block(state, first):
        return jax.lax.scan(body, state, first + jnp.arange(inner))

    state, frames = jax.lax.scan(block, state, jnp.arange(outer) * inner)
    frames = jax.tree.map(lambda a: a.reshape(outer * inner, *a.shape[2:]), frames)
    if outer * inner == steps:
        return frames
    _, rest = jax.lax.scan(body, state, jnp.arange(outer * inner, steps))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), frames, rest)
