"""Temporal stencil modeling: learned interpolation from the past of every cell, not from the moment alone.

Sun et al. 2023, arXiv:2302.05925. The past is summarized by HiPPO (Gu et al. 2020, arXiv:2008.07669): its projection on
Legendre polynomials, from slow to fast.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from physml.errors import ConfigError
from physml.fields import Spec
from physml.normalize import Normalizer
from physml.steppers.learned_interpolation import LearnedInterpolation, LearnedInterpolationConfig
from physml.steppers.plain import check_fits


@dataclass(frozen=True)
class TemporalStencilConfig(LearnedInterpolationConfig):
    """`LearnedInterpolationConfig`, whose network also reads features of the last frames.

    Attributes:
        history: frames that go in.
        size: features of every component of the velocity; as many as frames keep all that they say.
    """

    history: int = 8
    size: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.history < 2 or not 1 <= self.size <= 2 * self.history:
            raise ConfigError(
                f"history is {self.history} and size is {self.size}, but a past has at least 2 frames, and features "
                "number from 1 to twice the frames."
            )
        if self.calls != 1:
            raise ConfigError(f"calls is {self.calls}, but the past consists of whole steps: leave it at 1.")

    def features(self, spec: Spec) -> int:
        return self.size * len(spec.channels)

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "TemporalStencil":
        """Raises SpecError where model, normalizer or solver do not fit `spec`, ConfigError without the first two."""
        check_fits(self, spec, model, normalizer)
        return TemporalStencil(self, spec, model, normalizer, constraints)


class TemporalStencil(LearnedInterpolation):
    """`LearnedInterpolation` with features of the history.

    The first feature is the mean over the past in units of the fields' scale; the others, which only tell of changes,
    are in units of the increments' scale.
    """

    def past(self, faces) -> tuple:
        weights = jnp.asarray(legendre_memory(self.config.history, self.config.size), faces.dtype)
        mean = jnp.tensordot(self.normalizer.normalize(faces), weights[0], [[1], [0]])
        changes = jnp.tensordot(self.normalizer.normalize_increment(faces - faces[:, -1:]), weights[1:], [[1], [1]])
        return mean, changes.reshape(*changes.shape[:3], -1)


def legendre_memory(frames: int, size: int) -> np.ndarray:
    """Matrix `(size, frames)` from a history, oldest first, to its coefficients: HiPPO with uniform weight (LegS).

    Coefficient n is the integral of f(s) sqrt(2 n + 1) P_n(2 s - 1) over s from 0 to 1, where f is the history as a
    step function on equal intervals: where the HiPPO-LegS equation c' = (B f - A c) / t has come to at its end.
    """
    edges = np.linspace(-1, 1, frames + 1)
    previous, polynomials = np.zeros_like(edges), [np.ones_like(edges)]
    for n in range(size):
        following = ((2 * n + 1) * edges * polynomials[-1] - n * previous) / (n + 1)
        previous = polynomials[-1]
        polynomials.append(following)
    integrals = [edges / 2]  # of P_n / 2: (P_{n+1} - P_{n-1}) / (2 (2 n + 1))
    for n in range(1, size):
        integrals.append((polynomials[n + 1] - polynomials[n - 1]) / (2 * (2 * n + 1)))
    return np.stack([np.sqrt(2 * n + 1) * np.diff(integral) for n, integral in enumerate(integrals)])
