"""Errors cell by cell, averaged with cell areas.

Notation: p prediction, t truth, <x> the area-weighted mean of x over the cells of one frame (where the mask is 1).
Every function takes `(batch, lead, *space, channel)` and a `Measure` and returns parts `(batch, lead, channel)`, see
`metric.Metric`.
"""

import jax.numpy as jnp

from physml.metrics.losses import derivative
from physml.metrics.metric import Measure


def square_error(prediction, truth, measure: Measure):
    """<(p - t)^2>. Its mean over pairs, then the root, is RMSE: sqrt(mean over all pairs and cells)."""
    return (measure.mean((prediction - truth) ** 2),)


def absolute_error(prediction, truth, measure: Measure):
    """<|p - t|>, MAE."""
    return (measure.mean(jnp.abs(prediction - truth)),)


def difference(prediction, truth, measure: Measure):
    """<p - t>, bias: positive where the prediction is too high."""
    return (measure.mean(prediction - truth),)


def relative_error(prediction, truth, measure: Measure):
    """sqrt(<(p - t)^2> / <t^2>) of each frame, then the mean over pairs.

    The relative L2 error of operator learning (Li et al. 2021, arXiv:2010.08895), and, per time step and channel,
    exactly the nRMSE of PDEBench (Takamoto et al. 2022, arXiv:2210.07182, `err_nRMSE`) and the `mean_nRMSE` of APEBench
    (Koehler et al. 2024, arXiv:2411.00180). Not defined for a truth that is zero everywhere.
    """
    return (jnp.sqrt(measure.mean((prediction - truth) ** 2) / measure.mean(truth**2)),)


def pooled_squares(prediction, truth, measure: Measure):
    """(<(p - t)^2>, <t^2>): sqrt(mean / mean) is the nRMSE with one normalization for all pairs (global Frobenius)."""
    return measure.mean((prediction - truth) ** 2), measure.mean(truth**2)


def variance_scaled_error(prediction, truth, measure: Measure):
    """VRMSE = sqrt(<(p - t)^2> / Var(t)) of each frame, then the mean over pairs; 1 is the error of the spatial mean.

    The Well (Ohana et al. 2024, arXiv:2412.00568): Var is the unbiased variance over the cells of that frame and
    channel. The constant 1e-7 that they add to Var is left out, because it has a unit; the score of a constant truth is
    infinite.
    """
    cells = (measure.weights > 0).sum(tuple(range(2, truth.ndim - 1)))
    variance = measure.mean(centered(truth, measure) ** 2) * cells / (cells - 1)
    return (jnp.sqrt(measure.mean((prediction - truth) ** 2) / variance),)


def pearson(prediction, truth, measure: Measure):
    """Pearson correlation over the cells of each frame, then the mean over pairs; zero where a frame is constant.

    corr = <(p - <p>)(t - <t>)> / sqrt(<(p - <p>)^2> <(t - <t>)^2>), as for the high-correlation time of PDE-Refiner
    (Lippe et al. 2023, arXiv:2308.05732).
    """
    return (cosine(centered(prediction, measure), centered(truth, measure), measure),)


def centered(frames, measure: Measure):
    """x - <x>, and zero where a frame is constant: there the difference is rounding of <x> alone."""
    anomaly = frames - expand(measure.mean(frames), frames)
    still = measure.mean(anomaly**2) < rounding(measure.mean(frames**2))
    return jnp.where(expand(still, frames), 0.0, anomaly)


def rounding(square):
    """The mean square below which deviations from a mean are rounding, for numbers of the mean square `square`."""
    return (8 * jnp.finfo(square.dtype).eps) ** 2 * square


def cosine(p, t, measure: Measure):
    """<p t> / sqrt(<p^2> <t^2>), in [-1, 1]; zero where one of them vanishes, NaN where one is not finite."""
    # Roots before the product: squares of squares leave the range of float32.
    norm = jnp.sqrt(measure.mean(p**2)) * jnp.sqrt(measure.mean(t**2))
    return jnp.where(norm == 0, 0.0, measure.mean(p * t) / jnp.where(norm == 0, 1.0, norm))


def sobolev_error(prediction, truth, measure: Measure, periodic: bool | None = None):
    """Relative H1 error: sqrt((|e|^2 + |grad e|^2) / (|t|^2 + |grad t|^2)), e = p - t, |x|^2 = <x^2>; mean over pairs.

    Finite differences as in `losses.derivative`, on axes of length one, so that the score does not depend on the unit
    of length. `periodic` overrules the axes: True is the default H1 of neuraloperator, whatever the domain. Masked
    cells enter the differences of their neighbors as zero.
    """
    exists = measure.weights > 0
    error, truth = jnp.where(exists, prediction - truth, 0), jnp.where(exists, truth, 0)

    def square(field):
        total = field**2
        for i, axis in enumerate(measure.grid.axes):
            around = axis.periodic if periodic is None else periodic
            if len(axis) > 1 and (around or len(axis) >= 4):  # too short for one-sided differences: no derivative
                total = total + derivative(field, 2 + i, 1.0 / len(axis), around) ** 2
        return measure.mean(total)

    return (jnp.sqrt(square(error) / square(truth)),)


def expand(means, like):
    """`(batch, lead, channel)` -> `(batch, lead, 1..., channel)`, to be subtracted from `like`."""
    return means.reshape(*means.shape[:2], *(1,) * (like.ndim - 3), means.shape[-1])
