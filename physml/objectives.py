"""Training strategies: a loss from a stepper and a window of data.

An objective knows the stepper's contract only (`history`, `encode`, `advance`, `decode`, `normalizer`). It is a pure
function of arrays: usable in a notebook, inside jit, and under any sharding.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from physml.coding import tagged
from physml.errors import ConfigError, SpecError
from physml.fields import ArrayLike, Window
from physml.metrics.losses import LOSSES, MSE, Loss, resolve

SPACES = ("normalized", "physical", "increment")


@dataclass(frozen=True)
class OneStep:
    """The error of one step from true frames.

    Attributes:
        loss: how frames are compared: one of `physml.metrics.losses.LOSSES` or its name.
        space: "normalized" compares in units of each channel's own scale, "physical" in the units of the data,
            "increment" compares the changes since the last true frame in units of the increments' scale.
    """

    loss: Loss = tagged(LOSSES, default=MSE())
    space: Literal["normalized", "physical", "increment"] = "normalized"

    def __post_init__(self):
        object.__setattr__(self, "loss", resolve(self.loss))
        if self.space not in SPACES:
            raise ConfigError(f"space is {self.space!r}, but it must be one of {SPACES}.")

    def frames(self, history: int) -> int:
        return history + 1

    def __call__(self, stepper, window: Window, key) -> tuple[Float[ArrayLike, ""], dict[str, jax.Array]]:
        """The loss and {"channel": (channels,) errors}. Raises SpecError when the window is too short."""
        predicted = _unroll(stepper, window, key, steps=1)
        value, aux = _score(self, stepper, window, predicted, leads=jnp.ones(1))
        return value, {"channel": aux["channel"]}


@dataclass(frozen=True)
class Unrolled:
    """The error of a rollout from true frames, scored at every lead through which gradients flow.

    `differentiate=1` is the pushforward trick of Brandstetter et al. 2022, arXiv:2202.03376, section 3.1: the stepper
    learns to correct a state that carries its own error, but is not blamed for having made it.

    Attributes:
        steps: steps to roll out.
        differentiate: gradients flow through the last so many steps, and those are scored; None: through all.
        discount: weight of a scored lead relative to the one before it.
        weights: weight of each scored lead, instead of `discount`.
        remat: recompute each step in the backward pass: memory for one step's activations instead of all, for about a
            third more time.
    """

    steps: int = 2
    differentiate: int | None = None
    loss: Loss = tagged(LOSSES, default=MSE())
    space: Literal["normalized", "physical", "increment"] = "normalized"
    discount: float = 1.0
    weights: tuple[float, ...] = ()
    remat: bool = False

    def __post_init__(self):
        object.__setattr__(self, "loss", resolve(self.loss))
        if self.space not in SPACES:
            raise ConfigError(f"space is {self.space!r}, but it must be one of {SPACES}.")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, but a rollout has at least 1.")
        if self.differentiate is not None and not 1 <= self.differentiate <= self.steps:
            raise ConfigError(
                f"differentiate is {self.differentiate}, but gradients flow through 1 to steps={self.steps} steps."
            )
        if self.weights and self.discount != 1:
            raise ConfigError("Give either `weights` of the leads or a `discount`, not both.")
        if self.weights and (len(self.weights) != self.scored or min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ConfigError(
                f"weights are {self.weights}, but {self.scored} leads are scored: give {self.scored} numbers, "
                "0 or more and not all 0."
            )
        if self.discount <= 0:
            raise ConfigError(f"discount is {self.discount}, but it must be positive.")

    @property
    def scored(self) -> int:
        """Leads in the loss: the last `differentiate` steps."""
        return self.steps if self.differentiate is None else self.differentiate

    def frames(self, history: int) -> int:
        return history + self.steps

    def __call__(self, stepper, window: Window, key) -> tuple[Float[ArrayLike, ""], dict[str, jax.Array]]:
        """The loss, and {"channel": (channels,), "lead": (scored leads,)} errors. Raises SpecError: short window."""
        predicted = _unroll(stepper, window, key, self.steps, self.steps - self.scored, self.remat)
        leads = jnp.asarray(self.weights or [self.discount**i for i in range(self.scored)], jnp.float32)
        return _score(self, stepper, window, predicted, leads)


OBJECTIVES = {"one_step": OneStep, "unrolled": Unrolled}


def _unroll(stepper, window: Window, key, steps: int, skip: int = 0, remat: bool = False):
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


def _score(objective, stepper, window: Window, predicted, leads):
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
