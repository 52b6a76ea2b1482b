"""Scores of uncertainty, cell by cell: of normal distributions and of ensembles; numpy or jax arrays.

A Gaussian is `mean (...)` and `variance (...)` above 0, an ensemble `(member, ...)`, and `truth (...)`. Whether the
probabilities are right is told by central intervals: a share L of the truths should lie in the interval that is said to
hold them with probability L. `central_level` gives the narrowest such interval of every cell, `calibration_curve` the
shares that lie within given ones.
"""

import math

import numpy as np

from physml.errors import ConfigError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def log_likelihood(mean, variance, truth):
    """Logarithm of the normal density at the truth, per unit of the field; higher is better."""
    xp = _namespace(truth)
    return -((truth - mean) ** 2 / variance + xp.log(2 * math.pi * variance)) / 2


def gaussian_mixture(means, variances):
    """Mean and variance of an equal mixture of Gaussians over the first axis, each `(...)` of `(draw, ...)`.

    The variance is the mean of the variances plus the unbiased variance of the means; with one draw just the former.
    """
    draws = len(means)
    mean = means.mean(0)
    between = ((means - mean) ** 2).sum(0) / max(draws - 1, 1)
    return mean, variances.mean(0) + between


def gaussian_crps(mean, variance, truth):
    """Continuous ranked probability score, in the unit of the field; lower is better, |mean - truth| without variance.

    Gneiting et al. 2005, doi:10.1175/MWR2904.1, eq. 5.
    """
    xp = _namespace(truth)
    std = xp.sqrt(variance)
    safe = xp.where(std > 0, std, 1)
    z = (truth - mean) / safe
    density = xp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    score = std * (z * _erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return xp.where(std > 0, score, xp.abs(truth - mean))


def central_level(mean, variance, truth):
    """Probability of the narrowest central interval that holds the truth, 0 at the mean to 1; NaN where one is NaN.

    Uniform over cells where the distributions are right. Without variance 0 at the mean and 1 elsewhere.
    """
    xp = _namespace(truth)
    std, error = xp.sqrt(variance), xp.abs(truth - mean)
    level = _erf(error / (xp.where(std > 0, std, 1) * math.sqrt(2)))
    return xp.where(std > 0, level, xp.where(error > 0, 1 + 0 * error, error))


def ensemble_central_level(ensemble, truth):
    """As `central_level`, with the truth as one more draw: each of the M + 1 gaps between M sorted members, and beyond
    them, holds it with the same probability, spread evenly over the gap. 1 outside all members."""
    xp = _namespace(truth)
    members = len(ensemble)
    ordered = xp.sort(ensemble, axis=0)
    rank = (ensemble < truth).sum(0)
    low = xp.take_along_axis(ordered, xp.clip(rank - 1, 0, members - 1)[None], axis=0)[0]
    high = xp.take_along_axis(ordered, xp.clip(rank, 0, members - 1)[None], axis=0)[0]
    gap = high - low
    part = xp.where(gap > 0, (truth - low) / xp.where(gap > 0, gap, 1), 0)
    # Of several members that equal the truth, the one nearest the median counts.
    last = (ensemble <= truth).sum(0)
    place = xp.where(last > rank, xp.clip((members + 1) / 2 + 0 * truth, rank + 1, last), rank + part)
    level = xp.abs(2 * place / (members + 1) - 1)
    outside = (last == 0) | (rank == members)
    return xp.where(xp.isnan(ensemble).any(0) | xp.isnan(truth), xp.nan, xp.where(outside, 1, level))


def calibration_curve(levels_of_cells, levels=LEVELS, weights=None) -> np.ndarray:
    """Observed share of the truths within the central interval of each nominal level: equal to it where calibrated,
    below it for too little spread (Kuleshov et al. 2018, arXiv:1807.00263).

    Args:
        levels_of_cells: what `central_level` or `ensemble_central_level` gives; NaN do not count.
        weights: of the cells, e.g. areas, broadcastable to them.

    Raises ConfigError for levels outside (0, 1).
    """
    nominal = check_levels(levels)
    cells = np.asarray(levels_of_cells, np.float64)
    weights = np.where(np.isnan(cells), 0, np.broadcast_to(1.0 if weights is None else weights, cells.shape))
    inside = [np.sum(weights * (cells <= level)) for level in nominal]
    total = weights.sum()
    return np.asarray(inside) / total if total > 0 else np.full(len(nominal), np.nan)


def calibration_error(observed, levels=LEVELS) -> float:
    """Mean over levels of |observed - nominal| share."""
    return float(np.mean(np.abs(np.asarray(observed) - check_levels(levels))))


def coverage(mean, variance, truth, level: float = 0.9, weights=None) -> float:
    """Share of the truths within the central interval of one level; of an ensemble see `calibration_curve`."""
    return float(calibration_curve(central_level(mean, variance, truth), (level,), weights)[0])


def coverage_from_ranks(ranks, level: float):
    """Coverage `(...)` of the central interval from rank shares `(..., member + 1)` of `ensemble.rank_shares`.

    Members k and M + 1 - k from below bound the interval of level 1 - 2 k / (M + 1); between such levels, and beyond
    the outermost, the share is interpolated.
    """
    members = ranks.shape[-1] - 1
    depth = np.arange(members // 2, -1, -1)  # ranks left out at each end, most first
    nominal = 1 - 2 * depth / (members + 1)
    observed = np.stack([ranks[..., k : members + 1 - k].sum(-1) for k in depth], -1)
    if nominal[0] > 0:  # an even number of members: the middle rank has a width
        nominal, observed = np.append(0.0, nominal), np.concatenate([0 * observed[..., :1], observed], -1)
    right = int(np.clip(np.searchsorted(nominal, level), 1, len(nominal) - 1))
    share = (level - nominal[right - 1]) / (nominal[right] - nominal[right - 1])
    return observed[..., right - 1] * (1 - share) + observed[..., right] * share


def check_levels(levels) -> np.ndarray:
    """The levels as numbers. Raises ConfigError unless all lie between 0 and 1."""
    nominal = np.asarray(levels, np.float64)
    if nominal.ndim != 1 or not len(nominal) or not ((nominal > 0) & (nominal < 1)).all():
        raise ConfigError(f"levels are {levels}, but probabilities between 0 and 1 were expected, such as (0.5, 0.9).")
    return nominal


def _namespace(array):
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else np


def _erf(values):
    if isinstance(values, np.ndarray | np.generic):
        from scipy.special import erf  # jax would make float64 float32
    else:
        from jax.scipy.special import erf
    return erf(values)
