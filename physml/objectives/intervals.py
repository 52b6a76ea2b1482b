"""Rollouts whose step is one of several intervals, drawn anew for every sample."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from physml.coding import tagged
from physml.errors import ConfigError, SpecError
from physml.fields import Window
from physml.metrics.losses import LOSSES, MSE, Loss
from physml.normalize import check_intervals
from physml.objectives.noise import Noisy
from physml.objectives.pairs import pick
from physml.objectives.scoring import Prediction, Space, check_window, predict, score, settle
from physml.objectives.unrolled import Rollout, Scored
from physml.steppers.intervals import averaged


@dataclass(frozen=True)
class RandomInterval(Rollout):
    """The error of a rollout with one interval per sample, the same at all of its steps: randomized dynamics.

    Nguyen et al. 2023, arXiv:2312.03876 (Stormer), section 3. The interval of a sample is drawn uniformly at every
    update; the network is told it, and increments are in units of their own scale for that interval. For
    `IntervalConfig`, with averaging on or off: what is trained is always the single step. Windows are as long as the
    longest interval needs.

    Attributes:
        intervals: in frames, rising, each one of the stepper's.
        steps: of each rollout.
        space: "increment" compares the changes since the last true frame in units of the interval's increments, the
            others as `OneStep`.
        remat: recompute each step in the backward pass, as `Unrolled`.
    """

    intervals: tuple[int, ...] = (1, 2, 4)
    steps: int = 1
    loss: Loss = tagged(LOSSES, default=MSE())
    space: Space = "increment"
    remat: bool = False

    def __post_init__(self):
        settle(self)
        if not check_intervals(self.intervals):
            raise ConfigError("intervals are empty, but a rollout needs one. Give some, such as (1, 2, 4).")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, but a rollout has at least 1.")

    def frames(self, history: int) -> int:
        return history + self.steps * max(self.intervals)

    def draw(self, stepper, window: Window, key) -> tuple[Window, Any]:
        """Of every sample the frames that lie its interval apart.

        Raises SpecError for another stepper than `Interval`, for intervals that it does not have, and for a short
        window; ConfigError without a key.
        """
        stepper = self._single(stepper)
        check_window(window, self.frames(stepper.history), f"the {self.frames(stepper.history)} of RandomInterval")
        if key is None:
            raise ConfigError("RandomInterval draws an interval for every sample, but got no key. Give one.")
        draw, noise = jax.random.split(key)
        chosen = jax.random.randint(draw, (window.frames.shape[0],), 0, len(self.intervals))
        steps = jnp.asarray(self.intervals)[chosen][:, None] * jnp.arange(self.steps + 1)
        return pick(window, steps[:, None]), noise

    def predict(self, stepper, window: Window, key) -> Prediction:
        return predict(self._single(stepper), window, key, self.steps, remat=self.remat)

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        scale = self._single(stepper).scale(window.context(0, 1).lead)
        scale = scale.reshape(scale.shape[0], *[1] * (window.frames.ndim - 2), scale.shape[1])
        leads, units = jnp.ones(self.steps), lambda increment: increment / scale
        return score(self, stepper, window, prediction.frames, leads, normalize_increment=units)

    def _single(self, stepper):
        config = getattr(stepper, "config", None)
        intervals = getattr(config, "intervals", None)
        if intervals is None:
            raise SpecError(
                "RandomInterval needs a stepper with a scale of increments for every interval, but got that of "
                f"{config or type(stepper).__name__}. Use IntervalConfig(intervals={self.intervals})."
            )
        if missing := [interval for interval in self.intervals if interval not in intervals]:
            raise SpecError(
                f"RandomInterval draws the intervals {missing}, but the stepper has {intervals}. "
                f"Use IntervalConfig(intervals={self.intervals}), or draw from those only."
            )
        if not stepper.config.average:
            return stepper
        if isinstance(stepper, Noisy):
            return stepper.around(self._single(stepper.stepper))
        return averaged(stepper, False)
