"""Coarser and finer grids without weights: pooling and interpolation. Channels last, `(batch, *space, channel)`."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.errors import ConfigError, suggest
from physml.layers.convolution import per_axis

# Weights of the cells i-2 .. i+2 for the first half of cell i, whose center lies a quarter of a cell before that of i;
# the second half mirrors them. Bicubic: Keys 1981 (doi:10.1109/TASSP.1981.1163711) with a = -0.75, as PyTorch has it.
TAPS = {
    "bicubic": (-0.03515625, 0.26171875, 0.87890625, -0.10546875, 0.0),
    "bilinear": (0.0, 0.25, 0.75, 0.0, 0.0),
    "nearest": (0.0, 0.0, 1.0, 0.0, 0.0),
}


def average_pool(
    x: Float[Array, "batch *space channel"], window: int | Sequence[int] = 2
) -> Float[Array, "batch *coarser channel"]:
    """Mean over boxes of `window` cells per axis, side by side; cells that fill no box are left out."""
    boxes, inner = _boxes(x, window)
    return boxes.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(inner).astype(x.dtype)


def max_pool(
    x: Float[Array, "batch *space channel"], window: int | Sequence[int] = 2
) -> Float[Array, "batch *coarser channel"]:
    """Maximum over boxes as in `average_pool`; equal maxima share the gradient.

    Of two values at a time: the derivative of `max` over an axis looks for the values that equal the result, and is
    0 / 0 where a compiler computes them twice with another rounding.
    """
    boxes, inner = _boxes(x, window)
    for axis in reversed(inner):
        parts = [jax.lax.index_in_dim(boxes, i, axis, keepdims=False) for i in range(boxes.shape[axis])]
        boxes = functools.reduce(jnp.maximum, parts)
    return boxes


def _boxes(x, window):
    """`(batch, n1, w1, n2, w2, ..., channel)` and the axes inside the boxes."""
    ndim = x.ndim - 2
    shape = [x.shape[0]]
    for axis, cells in enumerate(per_axis(window, ndim), start=1):
        x = jax.lax.slice_in_dim(x, 0, x.shape[axis] // cells * cells, axis=axis)
        shape += [x.shape[axis] // cells, cells]
    return x.reshape(*shape, x.shape[-1]), tuple(range(2, 2 * ndim + 1, 2))


def double(
    x: Float[Array, "batch *space channel"], method: str = "bicubic", boundaries: Sequence[str] = ()
) -> Float[Array, "batch *finer channel"]:
    """Interpolation to twice as many cells along every axis; a fine cell is half a coarse one.

    Beyond the edge a field is what `boundaries` say: "periodic" wraps round, everything else repeats the edge cell
    (none given: all repeat).
    """
    if method not in TAPS:
        raise ConfigError(f"There is no interpolation {method!r}." + suggest(method, TAPS))
    for axis, boundary in enumerate(boundaries or ["zero"] * (x.ndim - 2), start=1):
        x = _along(x, _halving_weights(x.shape[axis], method, boundary == "periodic"), axis)
    return x


def interpolate_corners(
    x: Float[Array, "batch *space channel"], shape: Sequence[int]
) -> Float[Array, "batch *shape channel"]:
    """Linear interpolation along every axis to a grid of `shape` whose corner points are those of `x`."""
    for axis, points in enumerate(shape, start=1):
        x = x if points == x.shape[axis] else _along(x, _corner_weights(x.shape[axis], points), axis)
    return x


def _along(x, weights: np.ndarray, axis: int):
    """`weights (new, old)` applied along one axis.

    As a product with a matrix, because the gradient of one is another: the gradients of shifted and padded fields took
    twice (at an edge eight times) as long on CPUs at 32 points.
    """
    parts = x.reshape(x.shape[0], math.prod(x.shape[1:axis]), x.shape[axis], -1)
    # Interpolation in TF32 would lose half the digits of the field. The bicubic weights are exact also in bfloat16.
    y = jnp.einsum(
        "oi,bpiq->bpoq", jnp.asarray(weights, x.dtype), parts, precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )  # fmt: skip
    return y.astype(x.dtype).reshape(*x.shape[:axis], len(weights), *x.shape[axis + 1 :])


@functools.lru_cache(maxsize=256)
def _halving_weights(points: int, method: str, periodic: bool) -> np.ndarray:
    weights = np.zeros((2 * points, points))
    for half, taps in enumerate((TAPS[method], TAPS[method][::-1])):
        for i, weight in enumerate(taps):
            cell = np.arange(points) + i - 2
            cell = cell % points if periodic else np.clip(cell, 0, points - 1)
            np.add.at(weights, (2 * np.arange(points) + half, cell), weight)
    return weights


@functools.lru_cache(maxsize=256)
def _corner_weights(old: int, new: int) -> np.ndarray:
    """Point i of `new` lies at i (old - 1) / (new - 1)."""
    place = np.arange(new) * ((old - 1) / max(new - 1, 1))
    return np.maximum(1 - np.abs(place[:, None] - np.arange(old)), 0)
