"""Until when a forecast of a chaotic flow is of use."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from physml.errors import ConfigError
from physml.fields import ArrayLike

THRESHOLDS = (0.8, 0.9, 0.95)


def checked_thresholds(thresholds: float | Sequence[float]) -> tuple[float, ...]:
    """Thresholds, or one, as a tuple. Raises ConfigError for what are no numbers."""
    found = np.atleast_1d(np.asarray(thresholds))
    if found.ndim > 1 or not found.size or found.dtype.kind not in "iuf" or not (abs(found) <= 1).all():
        raise ConfigError(f"thresholds are {thresholds!r}, but correlations were expected, e.g. {THRESHOLDS}.")
    return tuple(found.tolist())


def high_correlation_time(
    correlation: Float[ArrayLike, "*batch lead"],
    times: Float[ArrayLike, " time"],  # as many as leads; checked below, with a message
    thresholds: float | tuple[float, ...] = THRESHOLDS,
    *,
    interpolate: bool = False,
) -> tuple[Float[np.ndarray, "*batch threshold"], Bool[np.ndarray, "*batch threshold"]]:
    """Time of the first lead at which the correlation is below each threshold (Lippe et al. 2023, arXiv:2308.05732).

    `times` are the lead times, ascending, without lead zero. A NaN counts as below. Without `interpolate` the answer is
    one of `times`: the resolution is one time step, and a forecast that fails at once scores one step. With it, the
    crossing is placed linearly between the last lead above and the first below, the correlation being 1 at time zero.

    Returns the times and a flag that is true where the correlation never fell below: there the time is the last one, a
    lower bound.
    """
    correlation, times = np.asarray(correlation, np.float64), np.asarray(times, np.float64)
    if correlation.shape[-1] != len(times) or np.any(np.diff(times) <= 0) or np.any(times[:1] <= 0):
        raise ConfigError(
            f"high_correlation_time got {correlation.shape[-1]} correlations and {len(times)} lead times "
            f"{times[:3]}...: one ascending, positive time for each lead is needed."
        )
    found, capped = [], []
    for threshold in checked_thresholds(thresholds):
        below = ~(correlation >= threshold)
        never = ~below.any(-1)
        first = np.where(never, len(times) - 1, below.argmax(-1))
        time = times[first]
        if interpolate:
            time = np.where(never, time, _crossing(correlation, times, first, threshold))
        found.append(time)
        capped.append(never)
    return np.stack(found, -1), np.stack(capped, -1)


def _crossing(correlation, times, first, threshold):
    padded = np.concatenate([np.ones_like(correlation[..., :1]), correlation], -1)
    above = np.take_along_axis(padded, first[..., None], -1)[..., 0]
    below = np.take_along_axis(padded, first[..., None] + 1, -1)[..., 0]
    start, end = np.concatenate([[0.0], times])[first], times[first]
    share = (above - threshold) / np.where(above > below, above - below, 1.0)
    # A forecast that turned NaN has no slope: it counts until the last finite lead.
    return start + np.where(np.isfinite(below), share, 0.0) * (end - start)
