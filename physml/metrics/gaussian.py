"""Scores of Gaussian predictions as in ProbConserv (Hansen et al. 2023, arXiv:2302.11002, section 5.1).

Arrays are `(..., n)`, numpy or jax, and scores are means over the n points, one per sample; average those last.
"""

from physml.metrics import calibration


def log_likelihood(mean, variance, truth):
    """Mean over points of the log density of the truth under independent Gaussians, `(...)`; higher is better.

    -inf where a variance is not positive: such a prediction excludes every other value.
    """
    xp = mean.__array_namespace__()
    possible = variance > 0
    density = calibration.log_likelihood(mean, xp.where(possible, variance, 1), truth)
    return xp.where(possible, density, -xp.inf).mean(-1)


def conservation_error(mean, operator, target):
    """What linear constraints are missed by, `operator @ mean - target`, `(..., m)`, with sign, in their own unit.

    `operator (m, n)`, e.g. `physml.constraints.trapezoid(points)`, and `target (..., m)`, e.g. the exact total.
    """
    return mean @ operator.T - target


def square_error(mean, truth):
    """Mean over points of the squared error, `(...)`."""
    return ((mean - truth) ** 2).mean(-1)


def mixture(means, variances):
    """Mean and variance of an equal mixture of Gaussians over the first axis, each `(...)` of `(draw, ...)`.

    The variance is the mean of the variances plus the unbiased variance of the means; with one draw just the former.
    """
    draws = len(means)
    mean = means.mean(0)
    between = ((means - mean) ** 2).sum(0) / max(draws - 1, 1)
    return mean, variances.mean(0) + between
