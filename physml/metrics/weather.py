"""Scores against a climatology, for geophysical fields.

a_p = p - c and a_t = t - c are anomalies from the climatology c at the valid time; <x> is the area-weighted mean over a
frame.
"""

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
