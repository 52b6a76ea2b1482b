"""What a metric is: a statistic of each pair of fields, a declared mean over pairs, and a last formula.

Averages are never hidden. RMSE is the root of the mean over all pairs (`finish` after the mean); VRMSE is the mean of
one root per pair (`finish` before it, inside the statistic). Both are written down in one place, `METRICS`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.errors import SpecError
from physml.fields import ArrayLike, Axis, Grid, Spec

UNEVEN = 0.05  # by how much of their spacing points may differ: rounded coordinates and Gaussian latitudes do


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights", "climatology"], meta_fields=["grid", "masked"]
)
@dataclass(frozen=True)
class Measure:
    """How space is averaged, and what a pair is compared with.

    Attributes:
        weights: `(1 or batch, 1, *space, channel)`, cell area times mask; need not sum to one.
        climatology: `(batch, lead, *space, channel)` valid at the times of the truth, or None.
        grid: spatial axes (spacing and periodicity, for derivatives and spectra).
        masked: whether some cells do not exist (spectra are undefined then).
    """

    weights: Any
    climatology: Any
    grid: Grid
    masked: bool = False

    @classmethod
    def of(cls, spec: Spec, mask=None, climatology=None) -> "Measure":
        """Cell areas of the grid; `mask (*space, channel)` or `(batch, *space, channel)` is 1 where the field
        exists."""
        area = jnp.asarray(spec.grid.weights())[..., None] * jnp.ones(len(spec.channels), jnp.float32)
        weights = area[None, None] if mask is None else area * jnp.asarray(mask, jnp.float32)
        if mask is not None:
            weights = weights[None, None] if weights.ndim == area.ndim else weights[:, None]
        return cls(weights, climatology, spec.grid, mask is not None)

    def mean(self, values: Float[ArrayLike, "batch lead *space channel"]) -> Float[ArrayLike, "batch lead channel"]:
        """Mean over space. Cells of weight zero do not count, whatever they hold (NaN over land too)."""
        space = tuple(range(2, values.ndim - 1))
        inside = jnp.where(self.weights > 0, values, 0) * self.weights
        return inside.sum(space) / self.weights.sum(space)

    def anomaly(self, values):
        """`values` minus the climatology. Raises SpecError when there is none."""
        if self.climatology is None:
            raise SpecError("This metric compares with a climatology, but none is given: pass `climatology=`.")
        return values - self.climatology


def identity(mean):
    """The mean itself is the score."""
    return mean


@dataclass(frozen=True)
class Metric:
    """A score of predictions `(batch, lead, *space, channel)` against the truth.

    Attributes:
        statistic: `(prediction, truth, measure)` -> tuple of parts `(batch, lead, channel)` (a part may have further
            axes, such as wavenumbers). The parts are averaged over pairs, with equal weight per pair.
        finish: means of the parts -> score `(lead, channel)`.
        ideal: score of a perfect prediction.
        dimensional: whether the score has the unit of its channel.
        climatology: whether the statistic needs one.
    """

    statistic: Callable[[Any, Any, Measure], tuple]
    finish: Callable[..., Any] = identity
    ideal: float = 0.0
    dimensional: bool = False
    climatology: bool = False

    @property
    def needs(self) -> str:
        """As of `moments.MomentMetric`."""
        return "climatology" if self.climatology else ""

    def __call__(self, prediction, truth, measure: Measure) -> Float[ArrayLike, "lead channel"]:
        """The score over one batch of pairs. Jittable."""
        parts = self.statistic(prediction, truth, measure)
        return self.finish(*(part.mean(0) for part in parts))

    def per_pair(self, parts: tuple) -> Float[ArrayLike, "batch lead channel"]:
        """The score of each pair by itself, as if it were the only one: its spread says how much pairs differ."""
        return self.finish(*parts)


def check_pair(prediction: np.ndarray, truth: np.ndarray, spec: Spec) -> None:
    """Raises SpecError unless both are `(batch, lead, *space, channel)` on the grid of `spec`."""
    expected = (*spec.grid.shape, len(spec.channels))
    for name, array in (("The prediction", prediction), ("The truth", truth)):
        if array.ndim != 2 + len(expected) or tuple(array.shape[2:]) != expected:
            raise SpecError(
                f"{name} has shape {tuple(array.shape)}, but (batch, lead, {', '.join(map(str, expected))}) was "
                f"expected: axes {[axis.name for axis in spec.grid.axes]}, then channels {list(spec.names)}."
            )
    if prediction.shape != truth.shape:
        raise SpecError(
            f"The prediction holds {prediction.shape[:2]} (batch, lead) frames, but the truth holds {truth.shape[:2]}."
        )


def check_even(axis: Axis, what: str, otherwise: str) -> None:
    """Raises SpecError, about `what` needs it and what to do `otherwise`, unless the points are evenly spaced."""
    gaps = np.abs(np.diff(axis.centers))
    if len(gaps) and np.ptp(gaps) > UNEVEN * gaps.mean():
        raise SpecError(
            f"{what} needs evenly spaced points, but those along {axis.name!r} are {gaps.min():g} to {gaps.max():g} "
            f"apart. Interpolate the data to an even grid, or {otherwise}."
        )
