"""Scores against a climatology, for geophysical fields.

a_p = p - c and a_t = t - c are anomalies from the climatology c at the valid time; <x> is the area-weighted mean over a
frame.
"""

import numpy as np

from physml.metrics.metric import Measure
from physml.metrics.pointwise import cosine


def anomaly_correlation(prediction, truth, measure: Measure):
    """ACC = <a_p a_t> / sqrt(<a_p^2> <a_t^2>) of each frame, then the mean over start dates.

    Uncentered (the mean anomaly is not removed), as in WeatherBench 2 (Rasp et al. 2024, arXiv:2308.15560, eq. 6). A
    frame without anomaly, such as a forecast of climatology itself, scores 0.
    """
    return (cosine(measure.anomaly(prediction), measure.anomaly(truth), measure),)


def anomaly_products(prediction, truth, measure: Measure):
    """(<a_p a_t>, <a_p^2>, <a_t^2>): the ACC over all start dates and cells at once is mean / sqrt(mean mean)."""
    p, t = measure.anomaly(prediction), measure.anomaly(truth)
    return measure.mean(p * t), measure.mean(p**2), measure.mean(t**2)


def climatology_squares(prediction, truth, measure: Measure):
    """(<(p - t)^2>, <a_t^2>): 1 - mean / mean is the mean square skill score against climatology (Murphy 1988)."""
    return measure.mean((prediction - truth) ** 2), measure.mean(measure.anomaly(truth) ** 2)


DRY = 0.25e-3  # m of precipitation in the accumulation period
SEEPS_RANGE = (0.1, 0.85)  # of the dry fraction: elsewhere the score is not defined


def seeps(prediction, truth, threshold, dry_fraction):
    """Stable equitable error in probability space of precipitation (m), cell by cell; 0 is perfect.

    Categories: dry below 0.25 mm, light, and heavy from `threshold` on, the climatological 2/3 quantile of wet amounts
    at that date. `dry_fraction` is the climatological probability of dry, p1. NaN where it is outside 0.1..0.85 and
    where a field or the threshold is missing. Rodwell et al. 2010, doi:10.1002/qj.656, eq. 15; limits as in
    WeatherBench 2 (Rasp et al. 2024, arXiv:2308.15560).
    """
    p1 = np.asarray(dry_fraction, np.float64)
    defined = (p1 > SEEPS_RANGE[0]) & (p1 < SEEPS_RANGE[1])
    p1 = np.where(defined, p1, 0.5)
    zero = np.zeros_like(p1)
    error = np.stack([
        np.stack([zero, 1 / (1 - p1), 4 / (1 - p1)]),
        np.stack([1 / p1, zero, 3 / (1 - p1)]),
        np.stack([1 / p1 + 3 / (2 + p1), 3 / (2 + p1), zero]),
    ])  # (forecast, observed, ...)  # fmt: skip
    forecast, observed = (_category(amount, threshold) for amount in (prediction, truth))
    score = np.zeros(np.broadcast_shapes(forecast.shape, p1.shape))
    for i in range(3):
        for j in range(3):
            score = score + error[i, j] / 2 * ((forecast == i) & (observed == j))
    missing = np.isnan(prediction) | np.isnan(truth) | np.isnan(threshold)
    return np.where(defined & ~missing, score, np.nan)


def _category(amount, threshold):
    return np.where(amount < DRY, 0, np.where(amount < threshold, 1, 2))
