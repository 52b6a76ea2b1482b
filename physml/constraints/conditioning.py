"""A Gaussian conditioned on linear constraints G u = b: ProbConserv.

Hansen, Maddix, Alizadeh, Gupta & Mahoney 2023, "Learning physical models that can respect conservation laws",
arXiv:2302.11002, equations 4 and 5:

    mu' = mu - S G^T (G S G^T + sigma^2 I)^-1 (G mu - b),    S' = S - S G^T (G S G^T + sigma^2 I)^-1 G S
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from physml.constraints.sums import total
from physml.errors import ConfigError, DataError, SpecError, suggest

PRECISIONS = ("float32", "float64")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["diagonal", "factor"], meta_fields=[])
@dataclass(frozen=True)
class LowRank:
    """The covariance diag(`diagonal`) + `factor` `factor`^T.

    Attributes:
        diagonal: `(batch, n)`, not negative.
        factor: `(batch, n, rank)`.
    """

    diagonal: Any
    factor: Any


def condition(
    mean: Any,
    covariance: Any,
    operator: Any,
    target: Any,
    tolerance: Any = 0.0,
    *,
    return_diagonal: bool = False,
    precision: Literal["float32", "float64"] = "float64",
) -> tuple[jax.Array, jax.Array]:
    """The Gaussian N(mean, covariance), given that `operator @ u` is `target` up to noise of size `tolerance`.

    Args:
        mean: `(batch, n)`. The result has its dtype, at least float32.
        covariance: variances `(batch, n)`, a full matrix `(batch, n, n)`, or `LowRank`.
        operator: `(m, n)` or `(batch, m, n)`: one constraint per row.
        target: `(batch, m)`.
        tolerance: standard deviation of the noise of the constraints, sigma_G of the paper: one number, `(m,)` or
            `(batch, m)`. 0: they hold exactly; infinite: nothing changes.
        return_diagonal: give the variances `(batch, n)` of the posterior, without ever forming n x n numbers.
        precision: of the arithmetic. "float64" works inside float32 programs, under jit too; derivatives have the
            precision of the program. "float32" is for devices without it; `operator @ mean` is exact to rounding still.

    Returns the posterior mean `(batch, n)` and covariance `(batch, n, n)`, or its diagonal. From a diagonal covariance
    to a diagonal one it takes O(n m^2) operations and O(n m) memory per sample.

    Redundant rows change nothing. Constraints that contradict each other or that no variance is left to fulfil raise
    ConfigError and DataError where the values are known. Under jit they are met in the sense of least squares: rows are
    scaled to prior variance one, directions without variance stay as they are, and negative variances count as zero.
    Shapes that do not fit raise SpecError, numbers that are not finite DataError.
    """
    mean, covariance, operator, target, tolerance = _checked(mean, covariance, operator, target, tolerance, precision)
    mode = "diagonal" if return_diagonal else "full"
    result = posterior(mode, precision, mean, covariance, operator, target, tolerance)
    if concrete(*jax.tree.leaves((result, covariance, operator, target, tolerance))):
        check_met(result[0], covariance, operator, target, tolerance)
    return result


def project_linear(
    values: Any,
    operator: Any,
    target: Any,
    variance: Any = None,
    *,
    precision: Literal["float32", "float64"] = "float64",
) -> jax.Array:
    """The nearest values `(batch, n)` for which `operator @ values` is `target`: an oblique projection.

    Nearest in the sense of least squares, each square divided by the `variance (batch, n)`; without one, or with equal
    ones, the projection is orthogonal (HardC of the paper). Other arguments, errors and fallbacks as in `condition`.
    """
    covariance = np.ones(np.shape(values), np.float32) if variance is None else variance
    values, covariance, operator, target, tolerance = _checked(values, covariance, operator, target, 0.0, precision)
    result = posterior("mean", precision, values, covariance, operator, target, tolerance)[0]
    if concrete(result, covariance, operator, target):
        check_met(result, covariance, operator, target, tolerance)
    return result


def posterior(mode: str, precision: str, mean, covariance, operator, target, tolerance):
    """`condition` without checks. `mode` says which covariance comes back: "full", "diagonal" or, with "mean", None."""
    operator = operator if operator.ndim == 3 else operator[None]
    given = (mean, covariance, operator, target, jnp.broadcast_to(tolerance, target.shape))
    dtype = jnp.promote_types(jax.dtypes.result_type(mean), jnp.float32)
    if precision == "float32" or bool(jax.config.jax_enable_x64):
        return _cast(_update(mode, *_cast(given, dtype if precision == "float32" else precision)), dtype)
    if concrete(*jax.tree.leaves(given)):  # numpy arrays keep their float64
        with jax.enable_x64(True):
            result = _update_wide(mode, np.promote_types(mean.dtype, np.float32).name, given)
        # Constants of a program that is being traced: it knows no float64.
        return result if concrete(*jax.tree.leaves(result)) else _cast(result, dtype)
    return _cast(_differentiable(mode, *_cast(given, jnp.float32)), dtype)


# float64 inside a float32 program: operations are traced in a context that allows it, and whatever transforms them
# later would have to run in one too. Tangents are float32 therefore, and the rule for vmap traces anew.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(mode: str, *given):
    return _batched(mode)(*given)


@_differentiable.defjvp
def _(mode, given, tangents):
    return _differentiable(mode, *given), jax.jvp(functools.partial(_update, mode), given, tangents)[1]


@functools.cache
def _batched(mode: str):
    @jax.custom_batching.custom_vmap
    def update(*given):
        with jax.enable_x64(True):
            return _update_wide(mode, "float32", given)

    @update.def_vmap
    def _(size, mapped, *given):
        def joined(array, is_mapped):
            if not is_mapped and array.shape[0] == 1:  # an operator for all samples
                return array
            array = array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))
            if array.shape[1] != batch:
                array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
            return array.reshape(size * batch, *array.shape[2:])

        batch = given[0].shape[1 if mapped[0] else 0]
        result = update(*jax.tree.map(joined, given, tuple(mapped)))
        result = jax.tree.map(lambda array: array.reshape(size, batch, *array.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return update


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update_wide(mode: str, dtype: str, given):
    return _cast(_update(mode, *_cast(given, jnp.float64)), dtype)


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), tree)


@functools.partial(jax.jit, static_argnums=0)
def _update(mode: str, mean, covariance, operator, target, tolerance):
    """All of one dtype; operator `(1 or batch, m, n)`, tolerance `(batch, m)`."""
    # Squares of small units would underflow.
    unit = jax.lax.stop_gradient(_diagonal(covariance).max(-1, keepdims=True))
    unit = jnp.where(unit > 0, unit, 1)
    covariance = _divided(covariance, unit)
    noise = jnp.square(tolerance) / unit
    spread = _spread(covariance, operator)  # G S
    size = jnp.sum(spread * operator, -1) + noise
    # Infinite noise: a row that says nothing.
    counts = (size > 0) & jnp.isfinite(size)
    scale = jax.lax.stop_gradient(jnp.where(counts, jax.lax.rsqrt(jnp.where(counts, size, 1)), 0))
    noise = jnp.where(counts, noise, 0)
    m = operator.shape[1]
    gram = _products("bmn,bkn->bmk", spread, operator) * scale[..., None] * scale[:, None, :]
    gram = gram + jnp.eye(m, dtype=gram.dtype) * (noise * scale**2 + (scale == 0))[..., None]
    inverse = pseudo_inverse(jax.lax.stop_gradient(gram))

    def solve(right):  # (batch, m, k); implicit derivatives exist where those of the pseudo-inverse do not
        return jax.lax.custom_linear_solve(
            lambda x: _products("bmk,bkj->bmj", gram, x), right,
            lambda _, x: _products("bmk,bkj->bmj", inverse, x), symmetric=True,
        )  # fmt: skip

    def corrected(mean, excess):
        multiplier = scale * solve((scale * excess)[..., None])[..., 0]
        return mean - _products("bm,bmn->bn", multiplier, spread), multiplier

    moved, multiplier = corrected(mean, _applied(operator, mean) - target)
    # What rounding left over, once more. Its derivative is zero.
    rest = _applied(operator, moved) - target - noise * multiplier
    mean = moved + jax.lax.stop_gradient(corrected(moved, rest)[0] - moved)
    if mode == "mean":
        return mean, None
    scaled = spread * scale[..., None]
    if mode == "diagonal":
        variance = _diagonal(covariance) - jnp.sum(scaled * solve(scaled), -2)
        return mean, jnp.maximum(variance, 0) * unit
    return mean, (_full(covariance) - _products("bmi,bmj->bij", scaled, solve(scaled))) * unit[..., None]


_products = functools.partial(jnp.einsum, precision="highest")


def _applied(operator, mean):
    """G mu `(batch, m)`; without loss where the precision is short."""
    if mean.dtype == jnp.float64:
        return jnp.sum(operator * mean[:, None], -1)
    return total(operator * mean[:, None])


def _spread(covariance, operator):
    """G S `(batch, m, n)`."""
    if isinstance(covariance, LowRank):
        inner = _products("bmn,bnr->bmr", operator, covariance.factor)
        return _spread(covariance.diagonal, operator) + _products("bmr,bnr->bmn", inner, covariance.factor)
    if covariance.ndim == 3:
        return _products("bmn,bnk->bmk", operator, covariance)
    return operator * jnp.maximum(covariance, 0)[:, None]


def _diagonal(covariance):
    if isinstance(covariance, LowRank):
        return jnp.maximum(covariance.diagonal, 0) + jnp.sum(jnp.square(covariance.factor), -1)
    if covariance.ndim == 3:
        return jnp.sum(covariance * jnp.eye(covariance.shape[-1], dtype=covariance.dtype), -1)
    return jnp.maximum(covariance, 0)


def _divided(covariance, unit):
    if isinstance(covariance, LowRank):
        return LowRank(covariance.diagonal / unit, covariance.factor / jnp.sqrt(unit)[..., None])
    return covariance / (unit if covariance.ndim == 2 else unit[..., None])


def _full(covariance):
    if isinstance(covariance, LowRank):
        return _full(covariance.diagonal) + _products("bir,bjr->bij", covariance.factor, covariance.factor)
    if covariance.ndim == 3:
        return covariance
    return jnp.maximum(covariance, 0)[..., None] * jnp.eye(covariance.shape[-1], dtype=covariance.dtype)


def pseudo_inverse(gram):
    """Of symmetric matrices `(batch, m, m)` of unit diagonal, without negative eigenvalues.

    By Cholesky factors where all pivots stand clear of rounding; otherwise eigenvalues that do not are left out.
    """
    m = gram.shape[-1]
    eye = jnp.eye(m, dtype=gram.dtype)
    if m == 1:
        return jnp.ones_like(gram)
    rounding = 30 * m * float(jnp.finfo(gram.dtype).eps)

    def direct(gram):
        lower = jnp.linalg.cholesky(gram)
        half = jax.lax.linalg.triangular_solve(lower, jnp.zeros_like(gram) + eye, left_side=True, lower=True)
        return _products("bki,bkj->bij", half, half)

    def spectral(gram):
        values, vectors = jnp.linalg.eigh(gram)
        kept = values > rounding * jnp.max(values, -1, keepdims=True)
        return _products("bij,bj,bkj->bik", vectors, jnp.where(kept, 1 / jnp.where(kept, values, 1), 0), vectors)

    lifted = jnp.linalg.cholesky(gram + rounding * eye)  # exists for singular matrices too
    pivots = jnp.square(jnp.sum(lifted * eye, -1))
    return jax.lax.cond(jnp.all(pivots > 10 * rounding), direct, spectral, gram)


# --- what can be seen before jit --------------------------------------------------------------------------------------


def concrete(*arrays) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def _checked(mean, covariance, operator, target, tolerance, precision):
    """The arguments as arrays. Raises as `condition` says."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}, which it cannot be.{suggest(precision, PRECISIONS)}")
    mean, operator, target, tolerance = map(_array, (mean, operator, target, tolerance))
    if mean.ndim != 2:
        raise SpecError(f"mean has shape {mean.shape}, but (batch, n) was expected. Add or flatten axes.")
    batch, n = mean.shape
    if isinstance(covariance, LowRank):
        covariance = LowRank(_array(covariance.diagonal), _array(covariance.factor))
        shape = covariance.diagonal.shape, covariance.factor.shape[:-1]
        fits = shape == ((batch, n), (batch, n)) and covariance.factor.ndim == 3
        shape = f"{covariance.diagonal.shape} and factor {covariance.factor.shape}"
    else:
        covariance = _array(covariance)
        shape, fits = covariance.shape, covariance.shape in ((batch, n), (batch, n, n))
    if not fits:
        raise SpecError(
            f"covariance has shape {shape}, but ({batch}, {n}) or ({batch}, {n}, {n}), or LowRank with a diagonal "
            f"({batch}, {n}) and a factor ({batch}, {n}, rank) was expected from mean {mean.shape}. Give one of them."
        )
    if operator.ndim not in (2, 3) or operator.shape[-1] != n or (operator.ndim == 3 and operator.shape[0] != batch):
        raise SpecError(
            f"operator has shape {operator.shape}, but (m, {n}) or ({batch}, m, {n}) was expected from mean "
            f"{mean.shape}. Give one row of {n} numbers per constraint."
        )
    m = operator.shape[-2]
    if target.shape != (batch, m):
        raise SpecError(
            f"target has shape {target.shape}, but ({batch}, {m}) was expected: one number per sample and row of the "
            f"operator {operator.shape}. Reshape or broadcast it."
        )
    if tolerance.shape not in ((), (m,), (batch, m)):
        raise SpecError(
            f"tolerance has shape {tolerance.shape}, but one number, ({m},) or ({batch}, {m}) was expected. Reshape it."
        )
    named = {"mean": mean, "operator": operator, "target": target}
    parts = {"covariance": covariance}
    if isinstance(covariance, LowRank):
        parts = {"covariance.diagonal": covariance.diagonal, "covariance.factor": covariance.factor}
    for name, array in {**named, **parts}.items():
        if concrete(array) and not np.isfinite(array).all():
            raise DataError(f"{name} holds NaN or infinite numbers. Leave those samples out, or fill them.")
    if concrete(tolerance) and not bool((np.asarray(tolerance) >= 0).all()):
        raise ConfigError(f"tolerance is {np.asarray(tolerance)}, but a standard deviation is 0 or more. Correct it.")
    _check_variances(covariance)
    return mean, covariance, operator, target, tolerance


def _array(value):
    if not hasattr(value, "dtype"):
        value = np.asarray(value, np.float32)
    elif not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(np.float32)
    return value


def _check_variances(covariance):
    array = covariance.diagonal if isinstance(covariance, LowRank) else covariance
    if not concrete(array):
        return
    array = np.asarray(array)
    variances = np.diagonal(array, axis1=-2, axis2=-1) if array.ndim == 3 else array
    if variances.size and variances.min() < 0:
        index = tuple(map(int, np.unravel_index(variances.argmin(), variances.shape)))
        raise DataError(
            f"covariance holds the negative variance {variances.min():g} at (sample, point) {index}. Pass variances, "
            "not logarithms, and clip what rounding made negative."
        )
    if array.ndim == 3:
        size = np.abs(array).max(initial=0)
        if np.abs(array - array.swapaxes(-1, -2)).max(initial=0) > 1e-4 * size:
            raise DataError("covariance is not symmetric. Pass the mean of it and its transpose, if that is meant.")


def check_met(mean, covariance, operator, target, tolerance):
    """Raises where exact constraints are not met by a conditioned mean; all arrays are known."""
    mean, operator, target = (np.asarray(array, np.float64) for array in (mean, operator, target))
    operator = np.broadcast_to(operator, (mean.shape[0], *operator.shape[-2:]))
    exact = np.broadcast_to(np.asarray(tolerance), target.shape) == 0
    error = np.abs(np.einsum("bmn,bn->bm", operator, mean) - target)
    size = np.einsum("bmn,bn->bm", np.abs(operator), np.abs(mean)) + np.abs(target)
    broken = exact & ~(error <= 1e-4 * size)
    if not broken.any():
        return
    sample, row = (int(i[0]) for i in np.nonzero(broken))
    value = error[sample, row]
    if not operator[sample, row].any():
        raise ConfigError(
            f"Row {row} of the operator is zero, but its target in sample {sample} is {target[sample, row]:g}. "
            "Leave the row out, or correct it."
        )
    one = jax.tree.map(lambda array: np.asarray(array[sample : sample + 1], np.float64), covariance)
    with jax.enable_x64(True):
        spread = float(jnp.abs(_spread(one, operator[sample : sample + 1, row : row + 1])).max())
    if spread == 0:
        raise DataError(
            f"The variance is zero wherever row {row} of the operator acts, but sample {sample} misses its target by "
            f"{value:g}. Give those points a variance, or the constraint a tolerance."
        )
    raise ConfigError(
        f"The constraints contradict each other: with all of them, row {row} misses its target by {value:g} in sample "
        f"{sample}. Leave out rows that depend on others, make their targets agree, or give them a tolerance."
    )
