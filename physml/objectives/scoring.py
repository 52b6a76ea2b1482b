"""What objectives share: steps through which gradients flow, and the comparison of frames with the truth."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError, SpecError
from physml.fields import Window
from physml.metrics.losses import resolve

Space = Literal["normalized", "physical", "increment"]


def settle(objective) -> None:
    """Finds a loss that was given by name. Raises ConfigError for an unknown loss or space."""
    object.__setattr__(objective, "loss", resolve(objective.loss))
    if objective.space not in get_args(Space):
        raise ConfigError(f"space is {objective.space!r}, but it must be one of {get_args(Space)}.")


def unroll(stepper, window: Window, key, steps: int, skip: int = 0, remat: bool = False):
    """Frames `(batch, steps - skip, *space, channel)` after the first `skip` steps, which carry no gradient."""
    history = stepper.history
    if window.length < history + steps:
        raise SpecError(
            f"The window holds {window.length} frames, but {history} (history) + {steps} (steps) are needed. "
            "Cut windows of `objective.frames(stepper.history)` frames."
        )

    graphdef, running, variables = nnx.split(stepper, nnx.BatchStat, ...)

    def body(variables):
        def advance(carry, step):
            state, running = carry
            current = nnx.merge(graphdef, running, variables)
            step_key = None if key is None else jax.random.fold_in(key, step)
            state = current.advance(state, window.context(step, history, step_key))
            return (state, nnx.state(current, nnx.BatchStat)), current.decode(state)

        return jax.checkpoint(advance) if remat else advance

    def encode(variables):
        return nnx.merge(graphdef, running, variables).encode(window.frames[:, :history], start)

    start = window.context(0, history, key)
    if skip:
        # Frozen parameters, not a cut state: a cut comes after the backward pass has stored what it then throws away.
        frozen = jax.lax.stop_gradient(variables)
        advance = body(frozen)
        carry = encode(frozen), running
        carry, _ = jax.lax.scan(lambda carry, step: (advance(carry, step)[0], None), carry, jnp.arange(skip))
    else:
        carry = encode(variables), running
    (_, running), frames = jax.lax.scan(body(variables), carry, jnp.arange(skip, steps))
    if jax.tree.leaves(running):
        nnx.update(stepper, running)  # batch normalization in training mode has moved them
    return jnp.moveaxis(frames, 0, 1)


def score(objective, stepper, window: Window, predicted, leads):
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
        predicted, truth = (normalizer.normalize_increment(frames - before) for frames in (predicted, truth))
    loss, spec = objective.loss, window.spec
    errors = loss.errors(predicted, truth, spec, window.mask)
    value = loss.reduce(errors, spec, window.mask, leads)
    errors = jax.lax.stop_gradient(errors)
    return value, {"channel": errors.mean((0, 1)), "lead": errors.mean((0, 2))}
