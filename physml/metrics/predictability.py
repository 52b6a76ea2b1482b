"""What an ensemble says about its own forecast: until when its members agree, and whether its spread tells the error.

Members `(member, batch, lead, *space, channel)` are what `physml.rollout.ensemble` gives, for instance samples of a
refiner. Their mean and spread are `members.mean(0)` and the root of `metrics.ensemble.variance(members)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Spec
from physml.metrics.chaos import high_correlation_time
from physml.metrics.ensemble import variance
from physml.metrics.metric import Measure, check_pair
from physml.metrics.pointwise import centered, expand, rounding

FEWEST_SAMPLES = 3  # two points always lie on a line


def member_correlation(
    members: Float[ArrayLike, "member batch lead *space channel"], spec: Spec, mask=None
) -> Float[Array, "batch lead channel"]:
    """Pearson correlation over cells, averaged over all pairs of different members. Jittable.

    A member that is constant in space correlates with none; NaN where a member is not finite.
    Raises ConfigError for less than two members, SpecError for a shape that does not fit `spec`.
    """
    members, measure, count = _check(members, spec), Measure.of(spec, mask), len(members)
    directions = jnp.stack([_direction(member, measure) for member in members])
    # Of all pairs together: |sum of z|^2 holds each pair twice, and every member with itself.
    own = sum(measure.mean(direction**2) for direction in directions)
    return (measure.mean(directions.sum(0) ** 2) - own) / (count * (count - 1))


def _direction(frames, measure: Measure):
    """Anomalies about the spatial mean, of unit mean square; zero for a constant frame."""
    anomaly = centered(frames, measure)
    size = expand(jnp.sqrt(measure.mean(anomaly**2)), frames)
    return jnp.where(size == 0, 0.0, anomaly / jnp.where(size == 0, 1.0, size))


def decorrelation_time(
    members: Float[ArrayLike, "member batch lead *space channel"],
    spec: Spec,
    threshold: float = 0.8,
    *,
    mask=None,
    interpolate: bool = False,
) -> tuple[Float[np.ndarray, "batch channel"], Bool[np.ndarray, "batch channel"]]:
    """From when on a forecast is likely inaccurate: the time at which its members stop to agree, without any truth.

    The first lead at which `member_correlation` is below the threshold, in units of `spec.time_step`, as
    `high_correlation_time` finds it. Where members are as far from the truth as from each other, this estimates when
    their correlation with the truth falls below it. Lippe et al. 2023, arXiv:2308.05732.

    Returns the times and a flag that is true where members agree to the end: there the time is a lower bound.
    """
    correlation = np.moveaxis(np.asarray(member_correlation(members, spec, mask)), 1, -1)
    times = np.arange(1, correlation.shape[-1] + 1) * spec.time_step
    found, capped = high_correlation_time(correlation, times, (threshold,), interpolate=interpolate)
    return found[..., 0], capped[..., 0]


class SpreadError(NamedTuple):
    """Spread and error side by side.

    Attributes:
        spread: root of the mean over cells of the unbiased variance over members.
        error: root mean square error over cells of the mean over members.
        correlation: of the two over the samples of the batch: 1 where the spread tells which forecasts fail.
    """

    spread: Float[Array, "batch lead channel"]
    error: Float[Array, "batch lead channel"]
    correlation: Float[Array, "lead channel"]


def spread_error(
    members: Float[ArrayLike, "member batch lead *space channel"],
    truth: Float[ArrayLike, "batch lead *space channel"],
    spec: Spec,
    mask=None,
) -> SpreadError:
    """Whether the spread of the members tells the error of their mean, sample by sample. Jittable.

    The correlation is that of Whitaker & Loughe 1998, doi:10.1175/1520-0493(1998)126<3292:TRBESA>2.0.CO;2; zero where
    one of the two is the same in all samples, up to rounding. Raises ConfigError for less than two members or three
    samples, SpecError for shapes that do not fit.
    """
    members, truth = _check(members, spec), jnp.asarray(truth)
    check_pair(members[0], truth, spec)
    if len(truth) < FEWEST_SAMPLES:
        raise ConfigError(
            f"Spread and error of {len(truth)} samples were given, but a correlation needs {FEWEST_SAMPLES}. "
            "Start forecasts from more states."
        )
    measure = Measure.of(spec, mask)
    spread = jnp.sqrt(measure.mean(variance(members)))
    error = jnp.sqrt(measure.mean((members.mean(0) - truth) ** 2))
    a, b = _deviation(spread), _deviation(error)
    size = jnp.sqrt((a**2).sum(0) * (b**2).sum(0))
    return SpreadError(spread, error, jnp.where(size == 0, 0.0, (a * b).sum(0) / jnp.where(size == 0, 1.0, size)))


def _deviation(numbers):
    """From the mean over samples; zero where all are the same, up to rounding."""
    deviation = numbers - numbers.mean(0)
    return jnp.where((deviation**2).mean(0) <= rounding((numbers**2).mean(0)), 0.0, deviation)


def _check(members, spec: Spec) -> Array:
    if hasattr(members, "data_vars"):
        raise ConfigError(
            "An xarray Dataset was given, but an array (member, batch, lead, *space, channel) was expected. Of a "
            "forecast with members take physml.predictability(forecast)."
        )
    if len(members) < 2:
        raise ConfigError(f"{len(members)} member was given, but members are compared with each other: give 2 or more.")
    check_pair(members[0], members[1], spec)
    return jnp.asarray(members)
