"""What objectives share: steps through which gradients flow, and the comparison of frames with the truth."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError, SpecError
from physml.fields import Window
from physml.metrics.losses import resolve
from physml.steppers.bundled import scan_bundles

Space = Literal["normalized", "physical", "increment"]


class Prediction(NamedTuple):
    """Frames of a rollout and the frame that each was stepped from, `(batch, lead, *space, channel)`."""

    frames: Float[Array, "batch lead *space channel"]
    previous: Float[Array, "batch lead *space channel"]


def inner_objectives() -> Mapping[str, type]:
    """Objectives that another one may hold: all but schedules of objectives."""
    from physml.objectives import OBJECTIVES

    return {name: cls for name, cls in OBJECTIVES.items() if not hasattr(cls, "stages")}


def check_inner(objective, owner: str) -> None:
    """Raises ConfigError where `owner` cannot hold this objective."""
    if hasattr(objective, "stages"):
        kind = type(objective).__name__
        advice = "Give it one objective." if kind == owner else f"Put the {owner} into the {kind}."
        raise ConfigError(f"{owner} cannot hold a {kind}, which changes while training goes on. {advice}")
    check_objective(objective, owner)


def check_objective(objective, owner: str) -> None:
    """Raises ConfigError for what is no objective."""
    if isinstance(objective, type):
        raise ConfigError(f"{owner} was given the class {objective.__name__}: write {objective.__name__}().")
    if not callable(objective) or not hasattr(objective, "frames"):
        raise ConfigError(
            f"{owner} was given {objective!r}, which is no objective. Use one of {sorted(inner_objectives())} of "
            "physml.objectives."
        )


def settle(objective) -> None:
    """Finds a loss that was given by name. Raises ConfigError for an unknown loss and values of another kind."""
    object.__setattr__(objective, "loss", resolve(objective.loss))
    check_fields(objective)


def check_window(window: Window, wanted: int, what: str) -> None:
    """Raises SpecError for a window without a batch axis, or with less than the `wanted` frames; `what` are these."""
    if window.frames.ndim != len(window.spec.grid.axes) + 3:
        raise SpecError(
            f"The window's frames are {window.frames.shape}, but (batch, time, *space, channel) was expected. Put "
            "single windows together with physml.fields.stack([window])."
        )
    if window.length < wanted:
        raise SpecError(
            f"The window holds {window.length} frames, but {what} are needed. "
            "Cut windows of `objective.frames(stepper.history)` frames."
        )
    if window.spec.forcing and window.forcing.shape[1] < wanted:
        raise SpecError(
            f"Forcing {[c.name for c in window.spec.forcing]} is given for {window.forcing.shape[1]} frames, but "
            f"{what} are needed. Give it for every frame of the window."
        )


def predict(
    stepper,
    window: Window,
    key,
    steps: int,
    skip: int = 0,
    remat: bool = False,
    *,
    truncate: int | None = None,
    start=0,
) -> Prediction:
    """Frames of a rollout after the first `skip` steps, which carry no gradient, and where each came from.

    Args:
        truncate: gradients do not flow from one group of so many scored steps into the group before; None: one group.
        start: frames to leave out at the beginning, at most `skip`; may be traced.

    Raises SpecError for a window that is too short, ConfigError where steps do not fit a stepper that predicts several
    frames at once.
    """
    history = stepper.history
    check_window(window, history + steps, f"{history} (history) + {steps} (steps)")
    bundle = getattr(stepper, "bundle", 1)
    _check_bundle(bundle, steps - skip, skip, truncate)
    graphdef, running, variables = nnx.split(stepper, nnx.BatchStat, ...)

    def body(variables, **options):
        def advance(carry, step):
            state, running = carry
            current = nnx.merge(graphdef, running, variables)
            step_key = None if key is None else jax.random.fold_in(key, step)
            state = current.advance(state, window.context(step, history, step_key), **options)
            return (state, nnx.state(current, nnx.BatchStat)), current.decode(state)

        # A scan needs no barrier against common subexpressions: its passes are two loops already.
        return jax.checkpoint(advance, prevent_cse=False) if remat else advance

    def encode(variables):
        frames = jax.lax.dynamic_slice_in_dim(jnp.asarray(window.frames), start, history, axis=1)
        return nnx.merge(graphdef, running, variables).encode(frames, window.context(start, history, key))

    def cut(carry, step):
        state, running = carry
        kept = (step - skip) % truncate != 0
        return jax.tree.map(lambda leaf: jnp.where(kept, leaf, jax.lax.stop_gradient(leaf)), state), running

    if skip:
        # Frozen parameters, not a cut state: a cut comes after the backward pass has stored what it then throws away.
        frozen = jax.lax.stop_gradient(variables)
        warm = body(frozen)
        carry = encode(frozen), running
        carry = jax.lax.fori_loop(start, skip, lambda step, carry: warm(carry, step)[0], carry)
    else:
        carry = encode(variables), running
    first = nnx.merge(graphdef, running, frozen if skip else variables).decode(carry[0])
    groups = truncate is not None and truncate < steps - skip

    def scored(**options):
        advance = body(variables, **options)
        return (lambda carry, step: advance(cut(carry, step), step)) if groups else advance

    numbers = jnp.arange(skip, steps)
    scan = jax.lax.scan(scored(), carry, numbers) if bundle == 1 else scan_bundles(scored, carry, numbers, bundle)
    (_, running), frames = scan
    if jax.tree.leaves(running):
        nnx.update(stepper, running)  # batch normalization in training mode has moved them
    previous = jax.tree.map(lambda a, later: jnp.concatenate([jnp.asarray(a)[None], later[:-1]]), first, frames)
    if groups:  # the frame that a group starts from belongs to the group before
        previous = jax.tree.map(lambda a: a.at[::truncate].set(jax.lax.stop_gradient(a[::truncate])), previous)
    return Prediction(*jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), (frames, previous)))


def _check_bundle(bundle: int, scored: int, skip: int, truncate: int | None) -> None:
    if bundle == 1:
        return
    if scored < bundle:
        raise ConfigError(
            f"The last {scored} of the steps are scored, but the stepper predicts {bundle} frames at once: the others "
            f"would never be learned. Use Unrolled(steps={bundle}) or more."
        )
    if skip % bundle or (truncate or bundle) % bundle:
        raise ConfigError(
            f"Gradients are cut after {skip} steps{f' and then every {truncate}' if truncate else ''}, but the stepper "
            f"predicts {bundle} frames at once. Cut at multiples of {bundle}."
        )


def score(objective, stepper, window: Window, predicted, leads, stop: int | None = None, normalize_increment=None):
    """The loss of `predicted (batch, lead, *space, channel)`, and its parts, see `averages`.

    With a mask they hold "weight" () for a loss that is a mean over channels: how many of them a sample has, each
    counted by its own weight. The last lead is frame `stop - 1` of the window; None: the one after the history, or
    after `objective.steps` steps. `normalize_increment` stands in for the normalizer's own, where a step is not of one
    frame.
    """
    if stop is None:
        stop = stepper.history + (objective.steps if hasattr(objective, "steps") else 1)
    start = stop - predicted.shape[1]
    truth = jnp.asarray(window.frames)[:, start:stop]
    normalizer = stepper.normalizer
    if objective.space == "normalized":
        predicted, truth = normalizer.normalize(predicted), normalizer.normalize(truth)
    elif objective.space == "increment":
        if start == 0:
            raise ConfigError('space="increment" needs a frame to start from, but this stepper has history 0.')
        before = jnp.asarray(window.frames)[:, start - 1 : stop - 1]
        normalize = normalize_increment or normalizer.normalize_increment
        predicted, truth = normalize(predicted - before), normalize(truth - before)
    loss, spec = objective.loss, window.spec
    errors = loss.errors(predicted, truth, spec, window.mask)
    value = loss.reduce(errors, spec, window.mask, leads)
    # The slices of a joint loss are no channels, or ratios over the whole batch already.
    parts = averages(errors, None if getattr(loss, "joint", False) else window.mask)
    if "present" in parts and getattr(loss, "reduction", "mean") == "mean":
        parts["weight"] = jnp.sum(parts["present"] * jnp.asarray(getattr(loss, "channels", ()) or 1.0))
    return value, parts


def averages(errors: Float[Array, "batch lead channel"], mask=None) -> dict[str, Array]:
    """{"channel": (channels,), "lead": (leads,)}: mean errors, without gradient.

    With a mask `(batch, *space, channel)` the mean is over samples that have the channel (0 where none has), and
    "present" (channels,) is their share: where a dataset of a mixture lacks a channel, its error is not 0, but unknown.
    """
    errors = jax.lax.stop_gradient(errors)
    if mask is None:
        return {"channel": errors.mean((0, 1)), "lead": errors.mean((0, 2))}
    exists = (jnp.asarray(mask) > 0).any(tuple(range(1, mask.ndim - 1))).astype(errors.dtype)
    errors, present = errors * exists[:, None], exists.mean(0)

    def over(mean, share):
        return mean / jnp.where(share > 0, share, 1)

    return {
        "channel": over(errors.mean((0, 1)), present),
        "lead": over(errors.mean((0, 2)), present.mean()),
        "present": present,
    }
