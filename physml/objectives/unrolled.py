"""The error of one step or of a rollout, from true frames."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.coding import tagged
from physml.errors import ConfigError
from physml.fields import ArrayLike, Window
from physml.metrics.losses import LOSSES, MSE, Loss
from physml.objectives.scoring import Prediction, Space, check_window, predict, score, settle

WARM_UP = 2**31 - 1
Scored = tuple[Float[ArrayLike, ""], dict[str, jax.Array]]


class Rollout:
    """An objective in parts, for those that put something between or beside them: `draw`, `predict`, then `score`."""

    def __call__(self, stepper, window: Window, key) -> Scored:
        """The loss, and {"channel": (channels,), "lead": (scored leads,)} errors; with a mask also "present", see
        `physml.objectives.scoring.averages`. Raises SpecError for a short window.
        """
        window, key = self.draw(stepper, window, key)
        return self.score(stepper, window, self.predict(stepper, window, key))

    def draw(self, stepper, window: Window, key) -> tuple[Window, Any]:
        """The frames that are rolled out, to the last one that is scored, and the random numbers of the steps."""
        history, wanted = stepper.history, self.frames(stepper.history)
        check_window(window, wanted, f"{history} (history) + {wanted - history} (steps)")
        return window.slice(0, wanted), key


class Around(Rollout):
    """An objective round another one, its attribute `objective`, whose loss, windows and frames are its own.

    Validation is that of the inner one alone.
    """

    @property
    def innermost(self):
        return getattr(self.objective, "innermost", self.objective)

    @property
    def loss(self):
        return getattr(self.objective, "loss", None)

    @property
    def validation(self):
        return getattr(self.objective, "validation", self.objective)

    def frames(self, history: int) -> int:
        return self.objective.frames(history)

    def draw(self, stepper, window: Window, key) -> tuple[Window, Any]:
        return self.objective.draw(stepper, window, key)

    def predict(self, stepper, window: Window, key) -> Prediction:
        return self.objective.predict(stepper, window, key)

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        return self.objective.score(stepper, window, prediction)


@dataclass(frozen=True)
class OneStep(Rollout):
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

    def predict(self, stepper, window: Window, key) -> Prediction:
        return predict(stepper, window, key, steps=1)

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        value, aux = score(self, stepper, window, prediction.frames, leads=jnp.ones(1))
        return value, {name: part for name, part in aux.items() if name != "lead"}


@dataclass(frozen=True)
class Unrolled(Rollout):
    """The error of a rollout from true frames, scored at every lead through which gradients flow.

    Attributes:
        steps: steps to roll out.
        differentiate: gradients flow through the last so many steps, and those are scored; None: through all. The
            steps before are a warm-up of fixed length (of random length: `Pushforward`).
        truncate: among the scored steps gradients flow back through groups of so many only, from the error of each
            lead to the beginning of its group; None: one group.
        discount: weight of a scored lead relative to the one before it.
        weights: weight of each scored lead, instead of `discount`.
        remat: recompute each step in the backward pass: memory for one step's activations instead of all, for about a
            third more time.
    """

    steps: int = 2
    differentiate: int | None = None
    truncate: int | None = None
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
        if self.truncate is not None and self.truncate < 1:
            raise ConfigError(f"truncate is {self.truncate}, but gradients flow through groups of at least 1 step.")
        if self.weights and self.discount != 1:
            raise ConfigError("Give either `weights` of the leads or a `discount`, not both.")
        proper = not self.weights or (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf)
        if len(self.weights) not in (0, self.scored) or not proper:
            raise ConfigError(
                f"weights are {self.weights}, but {self.scored} leads are scored: give {self.scored} numbers, "
                "0 or more, finite and not all 0."
            )
        if not 0 < self.discount < math.inf:
            raise ConfigError(f"discount is {self.discount}, but it must be a finite number above 0.")

    @property
    def scored(self) -> int:
        """Leads in the loss: the last `differentiate` steps."""
        return self.steps if self.differentiate is None else self.differentiate

    def frames(self, history: int) -> int:
        return history + self.steps

    def predict(self, stepper, window: Window, key) -> Prediction:
        skip = self.steps - self.scored
        return predict(stepper, window, key, self.steps, skip, self.remat, truncate=self.truncate)

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        leads = jnp.asarray(self.weights or [self.discount**i for i in range(self.scored)], jnp.float32)
        return score(self, stepper, window, prediction.frames, leads)


@dataclass(frozen=True)
class Pushforward(Rollout):
    """The error after a warm-up of random length, through which no gradients flow.

    The stepper learns to correct a state that carries its own error, but is not blamed for having made it. Every batch
    draws its warm-up uniformly from 0 .. `steps` steps, so that states near the data and far from it are seen.
    Brandstetter et al. 2022, arXiv:2202.03376, section 3.1. The frames that are scored are always the last of the
    window. Without a key, and in validation, the warm-up is the longest.

    Attributes:
        steps: longest warm-up. With a stepper that predicts several frames at once, a multiple of their number; so are
            the lengths that are drawn.
        differentiate: steps after the warm-up, all of them scored.
    """

    steps: int = 1
    differentiate: int = 1
    loss: Loss = tagged(LOSSES, default=MSE())
    space: Space = "normalized"

    def __post_init__(self):
        settle(self)
        for name in ("steps", "differentiate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but a pushforward has at least 1.")

    @property
    def validation(self) -> Unrolled:
        return Unrolled(self.steps + self.differentiate, self.differentiate, loss=self.loss, space=self.space)

    def frames(self, history: int) -> int:
        return history + self.steps + self.differentiate

    def predict(self, stepper, window: Window, key) -> Prediction:
        unit, start = getattr(stepper, "bundle", 1), 0
        if key is not None:
            # A number of its own beside those of the steps, which the stepper's keys are folded with.
            drawn = jax.random.fold_in(key, WARM_UP)
            start = unit * jax.random.randint(drawn, (), 0, self.steps // unit + 1)
        return predict(stepper, window, key, self.steps + self.differentiate, self.steps, start=start)

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        stop = self.frames(stepper.history)
        return score(self, stepper, window, prediction.frames, jnp.ones(self.differentiate), stop)
