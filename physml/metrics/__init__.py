"""Metrics: pure functions of `(batch, lead, *space, channel)` arrays, averaged as each declares.

`METRICS[name](prediction, truth, Measure.of(spec))` is one score per lead and channel; `METRICS[name].statistic` gives
its parts per pair, to be averaged over many batches (`aggregate.Sums`).
"""

import functools

import jax.numpy as jnp

from physml.metrics import moments, pointwise, predictability, spectra, weather
from physml.metrics.calibration import (
    calibration_curve,
    central_level,
    ensemble_central_level,
    gaussian_crps,
    gaussian_mixture,
)
from physml.metrics.chaos import THRESHOLDS, high_correlation_time
from physml.metrics.efficiency import EfficiencyGain, efficiency_gain
from physml.metrics.ensemble import crps
from physml.metrics.metric import Measure, Metric
from physml.metrics.moments import MomentMetric
from physml.metrics.spectra import energy_spectrum


def _ratio(error, truth):
    return jnp.sqrt(error / truth)


def _pooled_correlation(product, prediction, truth):
    norm = jnp.sqrt(prediction) * jnp.sqrt(truth)
    return jnp.where(norm == 0, 0.0, product / jnp.where(norm == 0, 1.0, norm))


def _skill(error, climatology):
    return 1 - error / climatology


METRICS: dict[str, Metric] = {
    "acc": Metric(weather.anomaly_correlation, ideal=1.0, climatology=True),
    "acc_pooled": Metric(weather.anomaly_products, _pooled_correlation, ideal=1.0, climatology=True),
    "bias": Metric(pointwise.difference, dimensional=True),
    "correlation": Metric(pointwise.pearson, ideal=1.0),
    "h1": Metric(pointwise.sobolev_error),
    "h1_periodic": Metric(functools.partial(pointwise.sobolev_error, periodic=True)),
    "log_spectral_error": Metric(spectra.resolved_spectra, spectra.log_spectral_error),
    "mae": Metric(pointwise.absolute_error, dimensional=True),
    "nrmse": Metric(pointwise.relative_error),
    "nrmse_pooled": Metric(pointwise.pooled_squares, _ratio),
    "relative_l2": Metric(pointwise.relative_error),
    "rmse": Metric(pointwise.square_error, jnp.sqrt, dimensional=True),
    "skill": Metric(weather.climatology_squares, _skill, ideal=1.0, climatology=True),
    "vrmse": Metric(pointwise.variance_scaled_error),
}

# What labelled forecasts can be scored by from sums over cells, chunk by chunk.
FORECAST_METRICS: dict[str, MomentMetric] = {
    **{
        name: MomentMetric(
            parts, METRICS[name].finish, METRICS[name].ideal, METRICS[name].dimensional,
            "climatology" if METRICS[name].climatology else "",
        )
        for name, parts in moments.PARTS.items()
    },
    **moments.ENSEMBLE_METRICS,
    **moments.SEEPS_METRICS,
    **moments.UNCERTAINTY_METRICS,
}  # fmt: skip

__all__ = [
    "EfficiencyGain",
    "FORECAST_METRICS",
    "METRICS",
    "THRESHOLDS",
    "Measure",
    "Metric",
    "MomentMetric",
    "calibration_curve",
    "central_level",
    "crps",
    "efficiency_gain",
    "energy_spectrum",
    "ensemble_central_level",
    "gaussian_crps",
    "gaussian_mixture",
    "high_correlation_time",
    "predictability",
]
