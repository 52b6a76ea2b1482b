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

from physml.layers.trilinear import Trilinear

# Measured on one and two cores, gradients included: 1.2 to 5 times faster within these bounds, except that networks
# with norms gain little. Larger columns leave the caches.
FEW_CHANNELS, MANY_CHANNELS, LARGEST_COLUMNS = 24, 48, 5 * 2**19


class Along(NamedTuple):
    """How a kernel moves along its axis; see `correlation.Moves`."""

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


def result(
    field: Float[Array, "batch points inputs"],
    kernel: Float[Array, "taps inputs outputs"],
    along: Along,
) -> Float[Array, "batch places outputs"]:
    """Cross-correlation along one axis."""
    columns = _columns(jnp.moveaxis(field, -1, 0), len(kernel), along)
    y = kernel.reshape(-1, kernel.shape[-1]).T @ _flat(columns)
    return jnp.moveaxis(y.reshape(len(y), *columns.shape[1:]), 0, -1)


def field(
    kernel: Float[Array, "taps inputs outputs"],
    result: Float[Array, "batch places outputs"],
    along: Along,
    points: int,
) -> Float[Array, "batch points inputs"]:
    """The derivative of `sum(result * correlation)` by the field."""
    taps, inputs, outputs = kernel.shape
    batch, places, reach = *result.shape[:2], along.dilation * (taps - 1)
    flat = jnp.moveaxis(result, -1, 0)
    if along.stride == 1 and places and (not along.wraps or sum(along.padding) == reach):
        # The result, convolved with the flipped kernel: adding up the gradients of columns would read them all again.
        before, after = along.padding
        around = _columns(flat, taps, along._replace(padding=(reach - before, reach - after)))
        rows = jnp.flip(kernel, 0).transpose(1, 0, 2).reshape(inputs, -1) @ _flat(around)
    else:
        columns = (kernel.reshape(-1, outputs) @ _flat(flat)).reshape(taps * inputs, batch, places)
        rows = jax.ShapeDtypeStruct((inputs, batch, points), kernel.dtype)
        (rows,) = jax.linear_transpose(lambda rows: _columns(rows, taps, along), rows)(columns)
    return jnp.moveaxis(rows.reshape(inputs, batch, points), 0, -1)


def kernel(
    field: Float[Array, "batch points inputs"],
    result: Float[Array, "batch places outputs"],
    along: Along,
    taps: int,
) -> Float[Array, "taps inputs outputs"]:
    """The derivative of `sum(result * correlation)` by the kernel."""
    columns, flat = _columns(jnp.moveaxis(field, -1, 0), taps, along), jnp.moveaxis(result, -1, 0)
    product = jax.lax.dot_general(_flat(columns), _flat(flat), (((1,), (1,)), ((), ())))
    return product.reshape(taps, field.shape[-1], result.shape[-1])


CONTRACTIONS = {"result": result, "field": field, "kernel": kernel}


def spread(
    bias: Float[Array, " outputs"], result: Float[Array, "batch places outputs"]
) -> Float[Array, "batch places outputs"]:
    """The bias at every place of a result. Its gradient on CPUs, the sum over all places, is a product with ones too:
    for a sum XLA would put the channels last again."""
    return BIAS("result", jnp.ones(result.shape[:2], bias.dtype), bias)


def _spread(wanted: str, a, b, how=None, kept=()):
    if wanted == "result":
        return a[..., None] * b
    return (a[..., None] * b).sum((0, 1)) if wanted == "bias" else (b * a).sum(-1)


def _spread_on_cpu(wanted: str, a, b, how=None, kept=()):
    return _flat(jnp.moveaxis(b, -1, 0)) @ a.reshape(-1) if wanted == "bias" else _spread(wanted, a, b)


BIAS = Trilinear("bias", ("ones", "bias", "result"), _spread, on_cpu=_spread_on_cpu)


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
