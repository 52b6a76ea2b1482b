"""Training of predictions with their uncertainty: proper scores of Gaussian steppers."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import Window
from physml.metrics.calibration import gaussian_crps, log_likelihood
from physml.metrics.losses import MSE
from physml.objectives import scoring
from physml.objectives.unrolled import Rollout, Scored
from physml.steppers.gaussian import Distribution

LEAST = 1e-12  # normalized variance: what float32 resolves of a field of order one


class GaussianPrediction(NamedTuple):
    """A `scoring.Prediction`, whose frames are means, and their `variance (batch, lead, *space, channel)`."""

    frames: Any
    previous: Any
    variance: Any


@dataclass(frozen=True)
class Likelihood(Rollout):
    """The negative log likelihood of true frames under a Gaussian stepper's mean and variance, per cell and channel.

    In normalized units, weighted by area and mask, the mean over channels and leads. Constraints take part: what is
    scored is the conditioned distribution. Variances of a rollout add up, so that more steps teach how errors grow.

    Attributes:
        steps: steps to roll out, all scored.
        rule: "log_likelihood", or "crps", the continuous ranked probability score in closed form, which is less
            sensitive to outliers.
        beta: the log likelihood of every cell counts by its variance to this power, taken as constant: 0.5 keeps cells
            of large variance from being given up (beta-NLL, Seitzer et al. 2022, arXiv:2203.09168, eq. 5). Validation
            is without it.
        remat: recompute each step in the backward pass.
    """

    steps: int = 1
    rule: Literal["log_likelihood", "crps"] = "log_likelihood"
    beta: float = 0.0
    remat: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, but a rollout has at least 1.")
        if not 0 <= self.beta <= 1 or (self.beta and self.rule != "log_likelihood"):
            raise ConfigError(
                f"beta is {self.beta} with rule={self.rule!r}, but it is a power from 0 to 1 of the log likelihood."
            )

    @property
    def validation(self) -> "Likelihood":
        return dataclasses.replace(self, beta=0.0)

    def frames(self, history: int) -> int:
        return history + self.steps

    def predict(self, stepper, window: Window, key) -> GaussianPrediction:
        """Raises ConfigError for a stepper without variance, SpecError for a window that is too short."""
        found = scoring.predict(Distribution(stepper), window, key, self.steps, remat=self.remat)
        return GaussianPrediction(found.frames.mean, found.previous.mean, found.frames.variance)

    def score(self, stepper, window: Window, prediction: GaussianPrediction) -> Scored:
        """The loss; its parts {"part"} are the log likelihood, the mean square error and the mean variance (equal where
        calibrated), all of normalized numbers."""
        start, scale = stepper.history, stepper.normalizer.frames.scale[...]
        truth = jnp.asarray(window.frames)[:, start : start + self.steps]
        error = (truth - prediction.frames) / scale
        variance = jnp.maximum(prediction.variance / scale**2, LEAST)
        zero = jnp.zeros_like(error)
        surprise = -log_likelihood(zero, variance, error)
        if self.rule == "crps":
            values = gaussian_crps(zero, variance, error)
        else:
            values = surprise * jax.lax.stop_gradient(variance) ** self.beta if self.beta else surprise
        mean, spec, mask = _Mean(), window.spec, window.mask

        def average(values):
            errors = mean.errors(values, zero, spec, mask)
            return mean.reduce(errors, spec, mask), errors

        loss, errors = average(values)
        parts = {"log_likelihood": -surprise, "square_error": error**2, "variance": variance}
        parts = {name: jax.lax.stop_gradient(average(part)[0]) for name, part in parts.items()}
        averages = scoring.averages(errors, mask)
        weight = {"weight": averages["present"].sum()} if "present" in averages else {}
        return loss, {**averages, **weight, "part": parts}


@dataclass(frozen=True)
class _Mean(MSE):
    """The mean over cells of numbers that are errors already."""

    def pointwise(self, difference):
        return difference
