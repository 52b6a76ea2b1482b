"""Weighted means over cells that lose nothing to rounding, and corrections that arrive whole.

A float32 sum of many cells is rounded at every addition, and a correction below half a unit in the last place vanishes
when it is added. Conservation over thousands of steps needs neither to happen.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.fields import ArrayLike, Context

FEW = 64  # values that are summed one by one


def valid_cells(context: Context, channels: list[int], frame: Any) -> tuple[Array, Array]:
    """Relative sizes of the cells in which channels exist, and whether they do, both `(batch, *space, channels)`.

    Sizes have mean one over the grid, and are 0 where the mask is. Without a mask the batch has size 1: what is made of
    cells alone is then made once.
    """
    shape = (1 if context.mask is None else frame.shape[0], *frame.shape[1:-1], len(channels))
    dtype = jnp.promote_types(frame.dtype, jnp.float32)
    cells = jnp.broadcast_to(jnp.asarray(context.spec.grid.weights(), dtype)[None, ..., None], shape)
    if context.mask is not None:
        cells = jnp.where(jnp.asarray(context.mask)[..., jnp.asarray(channels)] > 0, cells, 0)
    return cells, cells > 0


@jax.custom_jvp
def total(values: Float[ArrayLike, "... n"]) -> Float[Array, "..."]:
    """The sum over the last axis as if it were made with twice the digits, then rounded once.

    Halves are added pairwise, and what each addition rounds off is summed beside (two-sum; Ogita, Rump & Oishi 2005,
    algorithms 3.1 and 4.4). 16-bit floats are summed in float32.
    """
    values = jnp.asarray(values)
    if values.dtype.itemsize < 4:
        values = values.astype(jnp.float32)
    # Else a compiler may join the product that made a value with the first addition, in one place and not in another,
    # and equal fields have different sums. On the CPU this does not hold it back: see `over_space`.
    values = jax.lax.optimization_barrier(values)
    lost = jnp.zeros_like(values)
    while values.shape[-1] > FEW:
        if values.shape[-1] % 2:
            pad = [(0, 0)] * (values.ndim - 1) + [(0, 1)]
            values, lost = jnp.pad(values, pad), jnp.pad(lost, pad)
        half = values.shape[-1] // 2
        values, lost = _two_sum((values[..., :half], lost[..., :half]), (values[..., half:], lost[..., half:]))
    # One operation for the rest: compilers would make a chain of additions anew wherever the sum is read.
    zero = jnp.zeros((), values.dtype)
    values, lost = jax.lax.reduce((values, lost), (zero, zero), _two_sum, (values.ndim - 1,))
    return values + lost


def _two_sum(first, second):
    """Of two pairs (rounded sum, what rounding took)."""
    (first, first_lost), (second, second_lost) = first, second
    values = first + second
    grown = values - first
    return values, first_lost + second_lost + ((first - (values - grown)) + (second - grown))


@total.defjvp
def _total_jvp(primals, tangents):
    (values,), (tangent,) = primals, tangents
    result = total(values)
    return result, jnp.sum(jnp.asarray(tangent, result.dtype), -1)


def over_space(
    *terms: Float[ArrayLike, "batch *space channels"], keep: tuple[int, ...] = (), together: bool = False
) -> Float[Array, "batch ... channels"]:
    """The sum of all terms over the space axes, rounded once (`total`); summed axes stay with size 1.

    What two sums differ by is the sum over the terms of one and those of the other with a minus: rounded before they
    are subtracted, they would let a rollout drift.

    Args:
        terms: broadcast to each other.
        keep: numbers of space axes (0 is the first) that are not summed over.
        together: sum over channels too.
    """
    terms = jnp.broadcast_arrays(*terms)
    shape = terms[0].shape
    summed = _summed(len(shape), keep, together)
    if not summed:
        return sum(terms)
    kept = [axis for axis in range(len(shape)) if axis not in summed]
    flat = [jnp.transpose(term, kept + summed).reshape(*(shape[axis] for axis in kept), -1) for term in terms]
    # Joined, because what is joined is first written to memory. In place of it, on the CPU, the products of one term
    # would be added unrounded to those of the other, and equal fields would differ.
    return total(jnp.concatenate(flat, -1)).reshape([1 if axis in summed else n for axis, n in enumerate(shape)])


def gain(
    weights: Any,
    variance: Float[ArrayLike, "batch *space channels"],
    keep: tuple[int, ...] = (),
    together: bool = False,
) -> tuple[Float[Array, "batch *space channels"], Array]:
    """The gain k = S w / (w' S w) of conditioning on a weighted sum, for variances S, and whether any variance is left.

    `values - k * excess` has the wanted sum, and `variance * (1 - weights * k)` is what conditioning leaves
    (ProbConserv, Hansen et al. 2023, arXiv:2302.11002, for one row). `keep` and `together` as in `over_space`.
    """
    variance = jnp.asarray(variance)
    axes = _summed(variance.ndim, keep, together)
    largest = jnp.max(variance, axis=tuple(axes), keepdims=True, initial=0) if axes else variance
    largest = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))  # squares of small units would underflow
    moved = weights * (variance / largest)
    room = over_space(weights * moved, keep=keep, together=together)
    return moved / jnp.where(room > 0, room, 1), room > 0


def _summed(ndim: int, keep: tuple[int, ...], together: bool) -> list[int]:
    return [1 + axis for axis in range(ndim - 2) if axis not in keep] + [ndim - 1] * together


def settle(
    values: Float[ArrayLike, "batch *space channels"], missing: Any, weights: Any, keep: tuple[int, ...] = ()
) -> Float[Array, "batch *space channels"]:
    """Moves evenly spread cells by one unit in the last place until `missing` of the weighted sum is made up.

    Args:
        values: after a correction, whose additions were rounded.
        missing: what `sum(weights * values)` still lacks, with size 1 along the summed axes.
        weights: of the sum, broadcastable to `values`; cells of weight 0 stay as they are, and so do cells that are 0.

    At most one unit per cell, which is what rounding can have taken. Constant under differentiation.
    """
    values = jnp.asarray(values)

    def moved(values, missing, weights):
        free = (values != 0) & (weights != 0)
        unit = jnp.where(free, jnp.nextafter(jnp.abs(values), jnp.inf) - jnp.abs(values), 0)
        room = jnp.sum(weights * unit, tuple(_summed(values.ndim, keep, False)), keepdims=True)  # a rough one is enough
        share = jnp.clip(jnp.where(room > 0, jnp.abs(missing) / jnp.where(room > 0, room, 1), 0), 0, 1)
        place = _numbers(values.shape, keep)
        chosen = jnp.floor(share * (place + 1) + 0.5) - jnp.floor(share * place + 0.5)
        return jnp.sign(missing) * chosen * unit

    change = moved(*(jax.lax.stop_gradient(jnp.asarray(a)) for a in (values, missing, weights)))
    return values + jax.lax.stop_gradient(change).astype(values.dtype)


def _numbers(shape: tuple[int, ...], keep: tuple[int, ...]) -> Array:
    """0, 1, 2, ... over the summed space axes, with size 1 along the others."""
    inner = [size if 0 < axis < len(shape) - 1 and axis - 1 not in keep else 1 for axis, size in enumerate(shape)]
    count = 1
    for size in inner:
        count *= size
    return jnp.arange(count, dtype=jnp.float32).reshape(inner)
