"""Convolution with a stated boundary per axis. Fields here have the channel axis last, `(batch, *space, channel)`.

Pooling and interpolation are in `interpolation`.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, suggest
from physml.layers import products
from physml.layers.pointwise import uniform

# What a field is taken to be beyond its edge, and the numpy name of the padding.
BOUNDARIES = {"periodic": "wrap", "zero": "constant", "replicate": "edge", "reflect": "reflect"}


def resolve_boundaries(boundary: str, periodic: Sequence[bool], beyond: str) -> tuple[str, ...]:
    """Of every axis: `boundary`, or for "auto" what the axis is: "periodic", or `beyond` where it is not."""
    if boundary == "auto":
        return tuple("periodic" if wraps else beyond for wraps in periodic)
    return (boundary,) * len(periodic)


def pad_boundary(
    x: Float[Array, "batch *space channel"], width: int | Sequence[tuple[int, int]], boundaries: Sequence[str]
) -> Float[Array, "batch *padded channel"]:
    """Adds `width` cells at both ends of every spatial axis, as `boundaries` say, axis by axis.

    "periodic" wraps round, "replicate" repeats the edge cell, "reflect" mirrors about the edge cell, "zero" is zero.
    Wraps more than once on axes shorter than `width`. One pair (before, after) per axis may be given instead.
    """
    widths = [(width, width)] * len(boundaries) if isinstance(width, int) else width
    for axis, (boundary, pair) in enumerate(zip(boundaries, widths, strict=True), start=1):
        pads = [(0, 0)] * x.ndim
        pads[axis] = tuple(pair)
        x = jnp.pad(x, pads, mode=BOUNDARIES[boundary]) if any(pair) else x
    return x


def per_axis(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """One number for each axis: `value` itself, or `value` everywhere. Raises ConfigError for another count."""
    values = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(values) != ndim:
        raise ConfigError(f"{values} has {len(values)} numbers for {ndim} axes: give one number, or one per axis.")
    return values


class Convolution(nnx.Module):
    """Cross-correlation: `(batch, *space, inputs)` -> `(batch, *places, outputs)`, one to three axes.

    With stride 1 and no `padding` given it keeps the grid. Computes in the dtype of its input.

    Attributes:
        weight: `(*kernel, inputs // groups, outputs)`.
        bias: `(outputs,)`, or None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Sequence[int],
        boundaries: Sequence[str],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        """One boundary (see `BOUNDARIES`) per axis; kernel points are `dilation` cells apart.

        `padding` cells are added at both ends; None adds dilation * (kernel // 2), for odd kernels only. Each of
        `groups` equal parts of the outputs reads its own part of the inputs. Starts as PyTorch's layers do.
        """
        for boundary in boundaries:
            if boundary not in BOUNDARIES:
                raise ConfigError(f"There is no boundary {boundary!r}." + suggest(boundary, BOUNDARIES))
        ndim = len(boundaries)
        kernel, stride = per_axis(kernel, ndim), per_axis(stride, ndim)
        if min(*kernel, *stride, dilation, groups) < 1:
            raise ConfigError(
                "kernel, stride, dilation and groups of a convolution must be positive, but "
                f"kernel={kernel}, stride={stride}, dilation={dilation} and groups={groups} were given."
            )
        if inputs % groups or outputs % groups:
            raise ConfigError(
                f"groups={groups} must divide the {inputs} inputs and the {outputs} outputs of a convolution."
            )
        if padding is None:
            even = next((points for points in kernel if points % 2 == 0), None)
            if even:
                raise ConfigError(
                    f"A convolution that keeps the grid needs an odd kernel, but kernel={kernel} was given. "
                    f"Use kernel {max(even - 1, 1)} or {even + 1}, or give `padding`."
                )
            padding = [dilation * (points // 2) for points in kernel]
        self.padding = tuple((cells, cells) for cells in per_axis(padding, ndim))
        self.kernel, self.stride, self.dilation, self.groups = kernel, stride, dilation, groups
        self.boundaries = tuple(boundaries)
        fan_in = inputs // groups * math.prod(kernel)
        self.weight = nnx.Param(uniform(rngs, (*kernel, inputs // groups, outputs), fan_in))
        self.bias = nnx.Param(uniform(rngs, (outputs,), fan_in)) if bias else None

    def __call__(self, x: Float[Array, "batch *space inputs"]) -> Float[Array, "batch *places outputs"]:
        weight = self.weight[...].astype(x.dtype)
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        padding, product = self.padding, self.groups == 1 and products.suits(x, weight)
        wraps = product and self.boundaries == ("periodic",)
        if not wraps and any(boundary != "zero" for boundary in self.boundaries):
            x, padding = pad_boundary(x, padding, self.boundaries), ((0, 0),) * len(padding)
        if product:
            bias = jnp.zeros(weight.shape[-1], x.dtype) if bias is None else bias
            return _along_axis(x, weight, bias, products.Along(*padding, wraps, self.dilation, *self.stride))
        y = convolve(x, weight, padding, self.dilation, self.stride, self.groups)
        return y if bias is None else y + bias


class TransposedConvolution(nnx.Module):
    """`y[stride o + k - padding] += x[o] w[k]`: `(batch, *space, inputs)` -> `(batch, *finer, outputs)`, zero beyond.

    The adjoint of a strided convolution, with the kernel as PyTorch has it: not flipped. An axis of n points becomes
    one of (n - 1) stride + kernel - 2 padding.

    Attributes:
        weight: `(*kernel, inputs, outputs)`.
        bias: `(outputs,)`, or None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        ndim: int,
        *,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.kernel, self.stride, self.padding = (per_axis(value, ndim) for value in (kernel, stride, padding))
        if min(*self.kernel, *self.stride) < 1 or min(self.padding) < 0:
            raise ConfigError(
                "A transposed convolution needs a positive kernel and stride and a padding that is not negative, but "
                f"kernel={self.kernel}, stride={self.stride} and padding={self.padding} were given."
            )
        fan_in = outputs * math.prod(self.kernel)  # PyTorch counts the outputs here
        self.weight = nnx.Param(uniform(rngs, (*self.kernel, inputs, outputs), fan_in))
        self.bias = nnx.Param(uniform(rngs, (outputs,), fan_in)) if bias else None

    def __call__(self, x: Float[Array, "batch *space inputs"]) -> Float[Array, "batch *finer outputs"]:
        y = convolve_transposed(x, self.weight[...].astype(x.dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def convolve_transposed(
    x: Float[Array, "batch *space inputs"],
    weight: Float[Array, "*kernel inputs outputs"],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Float[Array, "batch *finer outputs"]:
    """See `TransposedConvolution`. One plain convolution computes all `stride` interleaved parts of the result.

    Part r of an axis is reached by the taps k = r, r + stride, ... only; filling the input with zeros, as the
    definition suggests, would multiply by zero prod(stride) times as often.
    """
    kernel, (inputs, outputs), ndim = weight.shape[:-2], weight.shape[-2:], x.ndim - 2
    taps = [-(-points // step) for points, step in zip(kernel, stride, strict=True)]
    excess = [(0, count * step - points) for count, step, points in zip(taps, stride, kernel, strict=True)]
    weight = jnp.pad(weight, [*excess, (0, 0), (0, 0)])
    weight = weight.reshape(*itertools.chain.from_iterable(zip(taps, stride, strict=True)), inputs, outputs)
    even, odd = range(0, 2 * ndim, 2), range(1, 2 * ndim, 2)
    weight = jnp.flip(weight, tuple(even)).transpose(*even, 2 * ndim, *odd, 2 * ndim + 1)
    parts = convolve(x, weight.reshape(*taps, inputs, -1), tuple((count - 1, count - 1) for count in taps))
    places = parts.shape[1:-1]
    parts = parts.reshape(x.shape[0], *places, *stride, outputs)
    order = itertools.chain.from_iterable(zip(range(1, ndim + 1), range(ndim + 1, 2 * ndim + 1), strict=True))
    fine = [count * step for count, step in zip(places, stride, strict=True)]
    y = parts.transpose(0, *order, 2 * ndim + 1).reshape(x.shape[0], *fine, outputs)
    for axis in range(ndim):
        stop = (x.shape[axis + 1] - 1) * stride[axis] + kernel[axis] - padding[axis]
        y = jax.lax.slice_in_dim(y, padding[axis], stop, axis=axis + 1)
    return y


def convolve(
    x: Float[Array, "batch *space inputs"],
    weight: Float[Array, "*kernel part outputs"],
    padding: Sequence[tuple[int, int]],
    dilation: int = 1,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "batch *places outputs"]:
    """Cross-correlation with zero padding; kernel points `dilation` cells apart, results `stride` cells apart.

    On CPUs the gradients are written as convolutions with batch first and channels last: XLA rewrites others into that
    order only outside loops, and inside a `lax.scan` they ran 37 times slower (86 times with stride 2). Convolutions in
    groups, which XLA computes there one number at a time, are one convolution for each group, or where every channel
    is its own group a sum over shifted fields. So are those that `jax.vmap` makes of several kernels: one for each.
    """
    ndim = x.ndim - 2
    stride = per_axis(stride, ndim)
    if groups == 1 and set(weight.shape[:-2]) == set(stride) == {1} and not any(map(any, padding)):
        return jnp.matmul(x, weight.reshape(weight.shape[-2:]))
    return _with_gradients(x, weight, tuple(map(tuple, padding)), dilation, stride, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _with_gradients(x, weight, padding, dilation, stride, groups):
    plain = functools.partial(_plain, padding=padding, dilation=dilation, stride=stride, groups=groups)
    if _is_depthwise(weight, stride, groups):
        parts = functools.partial(_shifted_sum, padding=padding, dilation=dilation)
    else:
        one = _by_member(functools.partial(_plain, padding=padding, dilation=dilation, stride=stride))
        parts = one if groups == 1 else functools.partial(_by_group, groups, one)
    return jax.lax.platform_dependent(x, weight, cpu=parts, default=plain)


def _forward(x, weight, *options):
    return _with_gradients(x, weight, *options), (x, weight)


def _backward(padding, dilation, stride, groups, saved, gradient):
    def native(x, weight, gradient):
        plain = functools.partial(_plain, padding=padding, dilation=dilation, stride=stride, groups=groups)
        return jax.vjp(plain, x, weight)[1](gradient)

    def canonical(x, weight, gradient):
        if _is_depthwise(weight, stride, groups):
            return _depthwise_gradients(x, weight, gradient, padding, dilation)
        one = _by_member(functools.partial(_canonical_gradients, padding=padding, dilation=dilation, stride=stride))
        return one(x, weight, gradient) if groups == 1 else _by_group(groups, one, x, weight, gradient)

    return jax.lax.platform_dependent(*saved, gradient, cpu=canonical, default=native)


_with_gradients.defvjp(_forward, _backward)


def _plain(x, weight, *, padding, dilation=1, stride=1, groups=1, spread=1):
    """`spread` puts zeros between the cells of `x`."""
    ndim = x.ndim - 2
    space = "DHW"[3 - ndim :]
    return jax.lax.conv_general_dilated(
        x, weight, per_axis(stride, ndim), padding, lhs_dilation=per_axis(spread, ndim),
        rhs_dilation=per_axis(dilation, ndim), dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _along_axis(x, weight, bias, along: products.Along):
    """Along one axis, with a bias: products of matrices on CPUs (see `products`), a convolution elsewhere."""
    parts = _by_member(functools.partial(products.convolve_product, along=along))
    return jax.lax.platform_dependent(x, weight, bias, cpu=parts, default=functools.partial(_padded, along=along))


def _along_axis_forward(x, weight, bias, along):
    return _along_axis(x, weight, bias, along), (x, weight)


def _along_axis_backward(along, saved, gradient):
    def native(x, weight, gradient):
        bias = jnp.zeros(weight.shape[-1], weight.dtype)
        return jax.vjp(functools.partial(_padded, along=along), x, weight, bias)[1](gradient)

    parts = _by_member(functools.partial(products.product_gradients, along=along))
    return jax.lax.platform_dependent(*saved, gradient, cpu=parts, default=native)


_along_axis.defvjp(_along_axis_forward, _along_axis_backward)


def _padded(x, weight, bias, *, along: products.Along):
    padding = along.padding
    if along.wraps:
        x, padding = pad_boundary(x, [padding], ["periodic"]), (0, 0)
    return _plain(x, weight, padding=(padding,), dilation=along.dilation, stride=along.stride) + bias


def _by_member(function):
    """`function` of fields, a kernel and more, mapped by `jax.vmap` one member after the other.

    Where members differ in their fields alone, they are one batch.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def of_members(size: int, batched: list[bool], *arrays):
        if batched[0] and not any(batched[1:]):
            fields, *others = arrays
            together = mapped(fields.reshape(-1, *fields.shape[2:]), *others)
            return together.reshape(size, -1, *together.shape[1:]), True
        members = [mapped(*(a[i] if b else a for a, b in zip(arrays, batched, strict=True))) for i in range(size)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        return stacked, jax.tree.map(lambda _: True, stacked)

    return mapped


def _by_group(groups: int, function, *arrays):
    """`function` of each part of the channels (outputs, for weights); the parts of its results put together."""
    parts = zip(*(jnp.split(array, groups, axis=-1) for array in arrays), strict=True)
    results = [function(*part) for part in parts]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *results)


def _canonical_gradients(x, weight, gradient, *, padding, dilation, stride):
    """Gradients of x and weight, both by convolutions in the order batch, space, channel."""
    ends_x, ends_weight = [], []
    sizes = zip(x.shape[1:-1], gradient.shape[1:-1], weight.shape[:-2], padding, stride, strict=True)
    for points, places, taps, (low, _), step in sizes:
        reach, last = dilation * (taps - 1), (places - 1) * step
        ends_x.append((reach - low, points - 1 - last + low))
        ends_weight.append((low, reach + last + 1 - points - low))
    flipped = jnp.flip(weight, tuple(range(x.ndim - 2))).swapaxes(-1, -2)
    of_x = _plain(gradient, flipped, padding=ends_x, dilation=dilation, spread=stride)
    # The weight's gradient correlates input with gradient, batch and channels in each other's place.
    by_channel, kernel = jnp.swapaxes(x, 0, -1), jnp.moveaxis(gradient, 0, -2)
    of_weight = _plain(by_channel, kernel, padding=ends_weight, dilation=stride, stride=dilation)
    return of_x, jnp.moveaxis(of_weight, 0, -2)


MAXIMAL_TAPS = 128  # of a depthwise kernel that is unrolled


def _is_depthwise(weight, stride, groups: int) -> bool:
    """Whether every channel has a kernel of its own, of a size that can be unrolled."""
    taps = math.prod(weight.shape[:-2])
    return groups > 1 and weight.shape[-2:] == (1, groups) and set(stride) == {1} and taps <= MAXIMAL_TAPS


def _shifts(weight, dilation: int) -> list[tuple[int, ...]]:
    """Where each kernel point lies, in cells, in the order of a flattened kernel."""
    return [tuple(dilation * i for i in index) for index in np.ndindex(*weight.shape[:-2])]


def _shifted_sum(x, weight, padding, dilation):
    """Depthwise convolution as a sum over shifted fields, which XLA fuses into one pass; sums are float32."""
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kernel = weight.astype(wide).reshape(-1, weight.shape[-1])
    reach = [dilation * (taps - 1) for taps in weight.shape[:-2]]
    places = [points - lost for points, lost in zip(x.shape[1:-1], reach, strict=True)]
    total = 0.0
    for shift, factors in zip(_shifts(weight, dilation), kernel, strict=True):
        total += x[:, *map(slice, shift, map(sum, zip(shift, places)))].astype(wide) * factors
    return total.astype(x.dtype)


def _depthwise_gradients(x, weight, gradient, padding, dilation):
    reach = [dilation * (taps - 1) for taps in weight.shape[:-2]]
    opposite = [(all_ - low, all_ - high) for all_, (low, high) in zip(reach, padding, strict=True)]
    flipped = jnp.flip(weight, tuple(range(x.ndim - 2)))
    of_x = _shifted_sum(gradient, flipped, opposite, dilation)
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    space, wide = tuple(range(1, x.ndim - 1)), jnp.promote_types(x.dtype, jnp.float32)

    def tap(_, shift):
        start = (0, *shift, 0)
        moved = jax.lax.dynamic_slice(padded, [jnp.asarray(i, jnp.int32) for i in start], gradient.shape)
        return None, (moved.astype(wide) * gradient.astype(wide)).sum(space)

    # One tap after the other: together, XLA would read both fields once for each number it sums up. The sum over the
    # batch waits until the end, so that a batch split over devices is summed once.
    each = jax.lax.scan(tap, None, np.asarray(_shifts(weight, dilation), np.int32))[1]
    return of_x, each.sum(1).reshape(weight.shape).astype(weight.dtype)
