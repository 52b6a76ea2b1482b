"""Convolutions along one axis as products of matrices, for CPUs: fields with the channel axis first, all taps at once.

XLA's convolutions are slow there with few channels, and with numbers of channels that 8 does not divide. The callers'
fields have the channel axis last; XLA moves the transposes through what stands between two convolutions, but not
through norms.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Measured on one and two cores, gradients included: 1.2 to 5 times faster within these bounds, except that networks
# with norms gain little. Larger columns leave the caches.
FEW_CHANNELS, MANY_CHANNELS, LARGEST_COLUMNS = 24, 48, 5 * 2**19


class Along(NamedTuple):
    """How a kernel moves along its axis."""

    padding: tuple[int, int]  # cells before and after: of the other end where it wraps, zeros otherwise
    wraps: bool
    dilation: int  # cells between its taps
    stride: int  # cells between its places


def suits(x, weight) -> bool:
    """Whether `x` `(batch, *space, inputs)` is convolved faster so with `weight` `(*kernel, inputs, outputs)`."""
    if x.ndim != 3 or x.dtype != jnp.float32 or weight.shape[0] == 1:
        return False
    wider = max(weight.shape[1:])
    if wider > FEW_CHANNELS and (wider > MANY_CHANNELS or wider % 8 == 0):
        return False
    # A program exported for batches of any size is the one for small ones.
    return not isinstance(x.shape[0], int) or 4 * weight.shape[0] * math.prod(x.shape) <= LARGEST_COLUMNS


def convolve_product(
    x: Float[Array, "batch points inputs"],
    weight: Float[Array, "taps inputs outputs"],
    bias: Float[Array, " outputs"],
    *,
    along: Along,
) -> Float[Array, "batch places outputs"]:
    """Cross-correlation, as `Convolution` but for boundaries other than wrapping and zero."""
    columns = _columns(jnp.moveaxis(x, -1, 0), len(weight), along)
    y = weight.reshape(-1, weight.shape[-1]).T @ _flat(columns) + bias[:, None]
    return jnp.moveaxis(y.reshape(len(y), *columns.shape[1:]), 0, -1)


def product_gradients(
    x: Float[Array, "batch points inputs"],
    weight: Float[Array, "taps inputs outputs"],
    gradient: Float[Array, "batch places outputs"],
    *,
    along: Along,
) -> tuple[Array, Array, Array]:
    """Of `x`, `weight` and the bias, from that of the result of `convolve_product`."""
    taps, inputs, outputs = weight.shape
    rows, gradient = jnp.moveaxis(x, -1, 0), jnp.moveaxis(gradient, -1, 0)
    columns, transpose = jax.vjp(lambda rows: _columns(rows, taps, along), rows)
    flat, reach = _flat(gradient), along.dilation * (taps - 1)
    if along.stride == 1 and columns.shape[-1] and (not along.wraps or sum(along.padding) == reach):
        # The gradient, convolved with the flipped kernel: adding up the columns' gradients would read them all again.
        before, after = along.padding
        around = _columns(gradient, taps, along._replace(padding=(reach - before, reach - after)))
        of_rows = jnp.flip(weight, 0).transpose(1, 0, 2).reshape(inputs, -1) @ _flat(around)
    else:
        (of_rows,) = transpose((weight.reshape(-1, outputs) @ flat).reshape(columns.shape))
    of_weight = jax.lax.dot_general(_flat(columns), flat, (((1,), (1,)), ((), ())))
    of_bias = flat @ jnp.ones(flat.shape[1], flat.dtype)  # a sum would make XLA put the channels last again
    return jnp.moveaxis(of_rows.reshape(rows.shape), 0, -1), of_weight.reshape(weight.shape), of_bias


def _flat(columns):
    return columns.reshape(len(columns), -1)


def _columns(rows, taps: int, along: Along):
    """`(channel, batch, points)` -> `(taps channel, batch, places)`: all that each place reads."""
    _, _, dilation, stride = along
    rows = _pad(rows, *along.padding, along.wraps)
    places = max((rows.shape[-1] - dilation * (taps - 1) - 1) // stride + 1, 0)
    parts = [rows[..., first : first + places * stride : stride] for first in range(0, dilation * taps, dilation)]
    return jnp.concatenate(parts)


def _pad(rows, before: int, after: int, wraps: bool):
    """As `pad_boundary`, of the last axis; in one copy where it wraps (`jnp.pad` makes two)."""
    points = rows.shape[-1]
    if not wraps:
        return jax.lax.pad(rows, jnp.zeros((), rows.dtype), [(0, 0, 0), (0, 0, 0), (before, after, 0)])
    if max(before, after) > points:
        return jnp.pad(rows, [(0, 0), (0, 0), (before, after)], mode="wrap")
    return jnp.concatenate([rows[..., points - before :], rows, rows[..., :after]], axis=-1)
