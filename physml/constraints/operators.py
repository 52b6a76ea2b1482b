"""Rows of linear constraints: quadrature rules, second differences, and the smoothing of ProbConserv made of them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from physml.constraints.conditioning import concrete, condition
from physml.errors import ConfigError, SpecError


def trapezoid(points: Any) -> Any:
    """The trapezoid rule on ascending `points (n,)` as an operator `(1, n)`: half the distance of both neighbors.

    numpy in, numpy out; jax likewise. Raises SpecError for points that are not at least two, ascending.
    """
    xp, gaps = _gaps(points)
    nothing = xp.zeros_like(gaps[:1])
    return (xp.concatenate([gaps, nothing]) / 2 + xp.concatenate([nothing, gaps]) / 2)[None]


def right_rule(points: Any) -> Any:
    """The right rule on ascending `points (n,)` as an operator `(1, n)`: the distance to the point before, first 0.

    numpy in, numpy out; jax likewise. Raises SpecError for points that are not at least two, ascending.
    """
    xp, gaps = _gaps(points)
    return xp.concatenate([xp.zeros_like(gaps[:1]), gaps])[None]


def _gaps(points):
    points = points if hasattr(points, "dtype") else np.asarray(points, float)
    if points.ndim != 1 or len(points) < 2:
        raise SpecError(f"points have shape {points.shape}, but (n,) with n of 2 or more was expected. Give one axis.")
    xp = jnp if isinstance(points, jax.Array) else np
    if concrete(points) and not (np.diff(points) > 0).all():
        raise SpecError("points do not ascend, so intervals between them are no quadrature. Sort them.")
    return xp, points[1:] - points[:-1]


def second_difference(n: int) -> np.ndarray:
    """u[i-1] - 2 u[i] + u[i+1] at the inner points, `(n - 2, n)`. Raises SpecError for fewer than three points."""
    if n < 3:
        raise SpecError(f"There are {n} points, but a second difference takes three. Use a finer grid.")
    eye = np.eye(n)
    return eye[:-2] - 2 * eye[1:-1] + eye[2:]


def smooth(
    mean: Any,
    variance: Any,
    correlation: float = 0.9,
    *,
    return_diagonal: bool = False,
    precision: Literal["float32", "float64"] = "float64",
) -> tuple[jax.Array, jax.Array]:
    """Conditions on second differences being as small as neighbors correlate: "w/diff" of ProbConserv.

    The target of every second difference is zero; its noise is the variance that it would have if neighbors one and
    two points apart correlated by `correlation` and its square (0.9 in the paper). Condition the result, with its full
    covariance, on the conserved total: the last update is the one that holds exactly.

    Args:
        mean: `(batch, n)`, values at points along one axis.
        variance: `(batch, n)`.
        correlation: between neighbors, from 0 to 1.
        return_diagonal, precision: as in `condition`.

    Returns mean and covariance as `condition` does. There are as many constraints as points, so it takes O(n^3).
    Raises ConfigError, SpecError and DataError as `condition` does, and for a correlation out of range.
    """
    if not 0 <= correlation <= 1:
        raise ConfigError(f"correlation is {correlation}, but it must be from 0 to 1. The paper takes 0.9.")
    shape = getattr(variance, "shape", np.shape(variance))
    if len(shape) != 2 or tuple(np.shape(mean)) != tuple(shape):
        raise SpecError(
            f"mean has shape {np.shape(mean)} and variance {shape}, but both (batch, n) were expected. Flatten or "
            "broadcast them."
        )
    xp = jnp if isinstance(variance, jax.Array) else np
    variance = xp.asarray(variance)
    # Concrete negative variances are refused by `condition`, others count as zero there.
    left, center, right = (xp.maximum(part, 0) for part in (variance[:, :-2], variance[:, 1:-1], variance[:, 2:]))
    noise = left + 4 * center + right
    noise = noise - 4 * correlation * (_mean_of(xp, left, center) + _mean_of(xp, center, right))
    noise = noise + 2 * correlation**2 * _mean_of(xp, left, right)
    operator = second_difference(shape[1])
    target = np.zeros((shape[0], shape[1] - 2), np.float32)
    tolerance = _root(xp, noise)
    return condition(
        mean, variance, operator, target, tolerance, return_diagonal=return_diagonal, precision=precision
    )  # fmt: skip


def _mean_of(xp, a, b):
    """Geometric mean."""
    return _root(xp, a * b)


def _root(xp, square):
    """Of what may be zero, or less by rounding: then zero, and so is the derivative."""
    positive = square > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, square, 1)), 0)
