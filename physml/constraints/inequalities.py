"""What may follow a linear projection: values made nonnegative or monotone, with the total they had.

Both are nearest points in the norm that the weights of the total define, and change means only: variances that came
with them stay.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.constraints.conditioning import concrete
from physml.constraints.sums import settle, total
from physml.errors import ConfigError, DataError, SpecError


def nonnegative(values: Any, operator: Any = None, target: Any = None, variance: Any = None) -> Float[Array, "batch n"]:
    """The nearest values that are nowhere negative and whose total is `target`.

    One shift is taken from all values, as large as makes up for the negative ones that become zero; with `variance` it
    is in proportion to that times the weight, the nearest point in the metric of a diagonal covariance. Found exactly,
    by Newton's method on the set of positive values (Michelot 1986, doi:10.1007/BF00938486).

    Args:
        values: `(batch, n)`.
        operator: the weights of the total, one row `(1, n)` that is nowhere negative, e.g. `trapezoid(points)`. None:
            no total; negative values become zero, others stay.
        target: `(batch, 1)`; None: the total that the values have.
        variance: `(batch, n)`; values of variance zero stay, unless negative.

    The total is kept to rounding wherever it is not negative. Where it is, both cannot be had: DataError if the values
    are known, zeros under jit. Zeros too where values of positive weight have none of the variance that it takes.
    Raises SpecError for other shapes, ConfigError for negative weights.
    """
    values = _floats(values)
    if operator is None:
        if target is not None or variance is not None:
            raise ConfigError("target and variance need the weights of the total. Give an operator, or leave them out.")
        return jnp.maximum(values, 0)
    weight = _weights(operator, values)
    had = total(weight * values)[:, None]
    for name, given, shape in (("target", target, had.shape), ("variance", variance, values.shape)):
        if given is not None and np.shape(given) != shape:
            raise SpecError(f"{name} has shape {np.shape(given)}, but {shape} was expected. Reshape it.")
    target = had if target is None else target
    if concrete(target) and (np.asarray(target) < 0).any():
        raise DataError(
            f"A total is {np.min(target):g}, which values that are nowhere negative cannot have. Correct the target, "
            "or leave negative values."
        )
    target = jnp.asarray(target, values.dtype)
    step = jnp.ones_like(values) if variance is None else jnp.maximum(jnp.asarray(variance, values.dtype), 0) * weight
    return _shifted(values, weight, target[:, 0], step)


@jax.jit
def _shifted(values, weight, target, step):
    def shift(positive):
        room = jnp.sum(jnp.where(positive, weight * step, 0), -1)
        excess = total(jnp.where(positive, weight * values, 0)) - target
        return (jnp.where(room > 0, excess / jnp.where(room > 0, room, 1), 0)[:, None]) * step

    def fewer(state):
        positive, _ = state
        kept = positive & (values - shift(positive) > 0)
        return kept, jnp.any(kept != positive)

    # Where all stay the shift is at its least; it only grows, so that what left never comes back.
    start = jnp.ones_like(values, bool) & ((values > 0) | (step > 0))
    positive, _ = jax.lax.stop_gradient(jax.lax.while_loop(lambda state: state[1], fewer, (start, jnp.asarray(True))))
    moved = jnp.where(positive, values - shift(positive), 0)
    missing = jnp.where(jnp.any(positive & (step > 0), -1), target - total(weight * moved), 0)
    return settle(moved[..., None], missing[:, None, None], (weight * (step > 0))[..., None])[..., 0]


def monotone(values: Any, operator: Any = None, increasing: bool = False) -> Float[Array, "batch n"]:
    """The nearest values that nowhere increase (or decrease) along the axis: isotonic regression.

    Runs that go the wrong way become their weighted mean, by pooling adjacent violators (Barlow et al. 1972), so the
    total is kept to rounding, and signs are where all values share one. Sequential: 2 n short steps, all samples alike.

    Args:
        values: `(batch, n)`, along one axis.
        operator: the weights of the total that is kept, one row `(1, n)` that is nowhere negative; None: equal ones.
        increasing: rather than decreasing.

    Raises SpecError for other shapes, ConfigError for negative weights.
    """
    values = _floats(values)
    weight = jnp.ones_like(values) if operator is None else _weights(operator, values)
    # A value without weight may be anything that fits: it weighs less than rounding.
    weight = jnp.maximum(weight, jnp.finfo(values.dtype).eps * weight.max(-1, keepdims=True))
    sign = 1 if increasing else -1
    return sign * _isotonic(sign * values, weight)


@jax.jit
@jax.vmap
def _isotonic(values, weight):
    n = values.shape[0]
    fixed, weights = jax.lax.stop_gradient((values, weight))

    def wrong(state):
        _, top, mean, _, _ = state
        return (top > 0) & (mean[jnp.maximum(top - 1, 0)] >= mean[top])

    def proceed(state):
        following, top, mean, mass, first = state
        pooled = wrong(state)
        at = jnp.where(pooled, top - 1, top + 1)
        below, above = jnp.maximum(top - 1, 0), jnp.maximum(top, 0)
        sum_mass = mass[below] + mass[above]
        joined = (mean[below] * mass[below] + mean[above] * mass[above]) / sum_mass
        mean = mean.at[at].set(jnp.where(pooled, joined, fixed[following]))
        mass = mass.at[at].set(jnp.where(pooled, sum_mass, weights[following]))
        first = first.at[at].set(jnp.where(pooled, first[at], following))
        return following + jnp.where(pooled, 0, 1), at, mean, mass, first

    start = (jnp.asarray(1), jnp.asarray(0), fixed, weights, jnp.zeros(n, int))
    _, top, _, _, first = jax.lax.while_loop(lambda state: (state[0] < n) | wrong(state), proceed, start)
    begins = jnp.zeros(n, int).at[jnp.where(jnp.arange(n) <= top, first, n)].set(1, mode="drop")
    block = jnp.cumsum(begins) - 1
    sums = jax.ops.segment_sum(jnp.stack([weight * values, weight], -1), block, n)
    return (sums[:, 0] / jnp.where(sums[:, 1] > 0, sums[:, 1], 1))[block]


def _floats(values):
    if np.ndim(values) != 2:
        raise SpecError(f"values have shape {np.shape(values)}, but (batch, n) was expected. Add or flatten axes.")
    if concrete(values) and not np.isfinite(values).all():
        raise DataError("values hold NaN or infinite numbers. Leave those samples out, or fill them.")
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _weights(operator, values):
    batch, n = values.shape
    if np.shape(operator) not in ((1, n), (batch, 1, n)):
        raise SpecError(
            f"operator has shape {np.shape(operator)}, but one row (1, {n}) or ({batch}, 1, {n}) was expected: the "
            "weights of one total. Give that row alone."
        )
    if concrete(operator) and (np.asarray(operator) < 0).any():
        raise ConfigError("operator holds negative weights, so its total is none that signs or order could keep.")
    return jnp.broadcast_to(jnp.asarray(operator, values.dtype).reshape(-1, n), values.shape)
