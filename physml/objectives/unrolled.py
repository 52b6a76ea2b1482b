"""The error of one step or of a rollout, from true frames."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.coding import tagged
from physml.errors import ConfigError
from physml.fields import ArrayLike, Window
from physml.metrics.losses import LOSSES, MSE, Loss
from physml.objectives.scoring import Space, score, settle, unroll


@dataclass(frozen=True)
class OneStep:
    """The error of one step from true frames.

    Attributes:
        loss: how frames are compared: one of `physml.metrics.losses.LOSSES` or its name.
        space: "normalized" compares in units of each channel's own scale, "physical" in the units of the data,
            "increment" compares the changes since the last true frame in units of the increments' scale.
    """

    loss: Loss = tagged(LOSSES, default=MSE())
    space: Space = "normalized"

    def __post_init__(self):
        settle(self)

    def frames(self, history: int) -> int:
        return history + 1

    def __call__(self, stepper, window: Window, key) -> tuple[Float[ArrayLike, ""], dict[str, jax.Array]]:
        """The loss and {"channel": (channels,) errors}. Raises SpecError when the window is too short."""
        predicted = unroll(stepper, window, key, steps=1)
        value, aux = score(self, stepper, window, predicted, leads=jnp.ones(1))
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
    space: Space = "normalized"
    discount: float = 1.0
    weights: tuple[float, ...] = ()
    remat: bool = False

    def __post_init__(self):
        settle(self)
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
        predicted = unroll(stepper, window, key, self.steps, self.steps - self.scored, self.remat)
        leads = jnp.asarray(self.weights or [self.discount**i for i in range(self.scored)], jnp.float32)
        return score(self, stepper, window, predicted, leads)
