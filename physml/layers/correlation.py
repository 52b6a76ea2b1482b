"""Cross-correlation, differentiated to any order, forward and backward, as fast as itself.

`sum y[o] x[stride o + dilation k - before] w[k]` is linear in the field x, the kernel w and the result y; see
`trilinear`. Each platform computes its contractions in its own way:

- GPUs and TPUs by XLA's convolution and what jax derives from it.
- CPUs by convolutions with batch first and channels last: XLA rewrites others into that order only outside loops, and
  inside a `lax.scan` they ran 37 times slower (86 times with stride 2). Convolutions in groups, which XLA computes
  there one number at a time, are one convolution for each group, or where every channel is its own group a sum over
  shifted fields; narrow ones along one axis are products of matrices (see `products`). So are those that `jax.vmap`
  makes of several kernels: one for each.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.layers import products
from physml.layers.trilinear import Trilinear

MAXIMAL_TAPS = 128  # of a depthwise kernel that is unrolled


@dataclass(frozen=True)
class Moves:
    """How a kernel moves over a field.

    Attributes:
        padding: cells before and after every axis: of the other end where it `wraps`, zeros otherwise.
        stride: cells between results, of every axis.
        dilation: cells between kernel points, of every axis.
        groups: parts of the channels that do not see each other.
        product: CPUs compute products of matrices (one axis, one group).
        wraps: the field is periodic (products only).
    """

    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    product: bool = False
    wraps: bool = False


def correlate(
    field: Float[Array, "batch *space inputs"], kernel: Float[Array, "*taps part outputs"], moves: Moves
) -> Float[Array, "batch *places outputs"]:
    """Cross-correlation; see the module."""
    return CORRELATION("result", field, kernel, moves)


# --- XLA's convolution, everywhere but on CPUs ---


def _plain(field, kernel, moves: Moves, spread: tuple[int, ...] | None = None):
    """`spread` puts zeros between the cells of the field."""
    padding = moves.padding
    if moves.wraps:
        field, padding = jnp.pad(field, [(0, 0), *padding, (0, 0)], mode="wrap"), [(0, 0)] * len(padding)
    space = "DHW"[3 - len(padding) :]
    return jax.lax.conv_general_dilated(
        field, kernel, moves.stride, padding, lhs_dilation=spread, rhs_dilation=moves.dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"), feature_group_count=moves.groups,
    )  # fmt: skip


def _native(wanted: str, a, b, moves: Moves, space):
    if wanted == "result":
        return _plain(a, b, moves)
    if wanted == "field":
        linear, shape = lambda field: _plain(field, a, moves), (b.shape[0], *space, moves.groups * a.shape[-2])
    else:
        linear, shape = lambda kernel: _plain(a, kernel, moves), (*space, a.shape[-1] // moves.groups, b.shape[-1])
    return jax.linear_transpose(linear, jax.ShapeDtypeStruct(shape, a.dtype))(b)[0]


# --- on CPUs ---


def _on_cpu(wanted: str, a, b, moves: Moves, space):
    if moves.product:
        along = products.Along(*moves.padding, moves.wraps, *moves.dilation, *moves.stride)
        return products.CONTRACTIONS[wanted](a, b, along, *space)
    if moves.groups == 1:
        return _canonical(wanted, a, b, moves, space)
    taps = space if wanted == "kernel" else (b if wanted == "result" else a).shape[:-2]
    inputs = a.shape[-1] if wanted != "field" else moves.groups * a.shape[-2]
    outputs = b.shape[-1]
    own = inputs == outputs == moves.groups  # every channel has a kernel of its own
    if own and set(moves.stride) == {1} and math.prod(taps) <= MAXIMAL_TAPS:
        return _depthwise(wanted, a, b, moves, taps)
    parts = zip(*(jnp.split(array, moves.groups, axis=-1) for array in (a, b)), strict=True)
    alone = [_canonical(wanted, *part, replace(moves, groups=1), space) for part in parts]
    return jnp.concatenate(alone, axis=-1)


def _canonical(wanted: str, a, b, moves: Moves, space):
    """One convolution in the order batch, space, channel."""
    if wanted == "result":
        return _plain(a, b, moves)
    ndim, ends = len(space), []
    each = (moves.padding, moves.stride, moves.dilation, b.shape[1:-1])
    if wanted == "field":  # the result, correlated with the flipped kernel
        for points, taps, (before, _), stride, dilation, places in zip(space, a.shape[:-2], *each, strict=True):
            reach, last = dilation * (taps - 1), (places - 1) * stride
            ends.append((reach - before, points - 1 - last + before))
        flipped = jnp.flip(a, tuple(range(ndim))).swapaxes(-1, -2)
        return _plain(b, flipped, replace(moves, padding=ends, stride=(1,) * ndim), spread=moves.stride)
    # the field, correlated with the result, batch and channels in each other's place
    for points, taps, (before, _), stride, dilation, places in zip(a.shape[1:-1], space, *each, strict=True):
        ends.append((before, dilation * (taps - 1) + (places - 1) * stride + 1 - points - before))
    turned = replace(moves, padding=ends, stride=moves.dilation, dilation=moves.stride)
    return jnp.moveaxis(_plain(jnp.swapaxes(a, 0, -1), jnp.moveaxis(b, 0, -2), turned), 0, -2)


def _depthwise(wanted: str, a, b, moves: Moves, taps):
    """Every channel with a kernel of its own."""
    shifts = [tuple(d * i for d, i in zip(moves.dilation, index, strict=True)) for index in np.ndindex(*taps)]
    if wanted == "result":
        return _shifted_sum(a, b, shifts, moves.padding)
    if wanted == "field":
        reach = [d * (points - 1) for d, points in zip(moves.dilation, taps, strict=True)]
        opposite = [(all_ - low, all_ - high) for all_, (low, high) in zip(reach, moves.padding, strict=True)]
        return _shifted_sum(b, jnp.flip(a, tuple(range(len(taps)))), shifts, opposite)
    padded = _zeros_around(a, moves.padding)
    wide = jnp.promote_types(a.dtype, jnp.float32)

    def tap(_, shift):
        start = (0, *shift, 0)
        moved = jax.lax.dynamic_slice(padded, [jnp.asarray(i, jnp.int32) for i in start], b.shape)
        return None, (moved.astype(wide) * b.astype(wide)).sum(tuple(range(1, b.ndim - 1)))

    # One tap after the other: together, XLA would read both fields once for each number it sums up. The sum over the
    # batch waits until the end, so that a batch split over devices is summed once.
    each = jax.lax.scan(tap, None, np.asarray(shifts, np.int32))[1]
    return each.sum(1).reshape(*taps, 1, -1).astype(a.dtype)


def _shifted_sum(x, kernel, shifts, padding):
    """A sum over shifted fields, which XLA fuses into one pass; sums are float32."""
    x = _zeros_around(x, padding)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    places = [points - lost for points, lost in zip(x.shape[1:-1], shifts[-1], strict=True)]
    total = 0.0
    for shift, factors in zip(shifts, kernel.astype(wide).reshape(-1, kernel.shape[-1]), strict=True):
        total += x[:, *map(slice, shift, map(sum, zip(shift, places)))].astype(wide) * factors
    return total.astype(x.dtype)


def _zeros_around(x, padding):
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])


def _space(operand: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-2] if operand == "kernel" else shape[1:-1]


CORRELATION = Trilinear(
    "correlation", ("field", "kernel", "result"), _native, on_cpu=_on_cpu, keep=_space, shared="kernel"
)
