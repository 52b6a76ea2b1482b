"""Convolution with a stated boundary per axis. Fields here have the channel axis last, `(batch, *space, channel)`.

Pooling and interpolation are in `interpolation`.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, suggest
from physml.layers import products
from physml.layers.correlation import Moves, correlate
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
            y = correlate(x, weight, Moves(padding, self.stride, (self.dilation,), product=True, wraps=wraps))
            return y if bias is None else y + products.spread(bias, y)
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
    """Cross-correlation with zero padding; kernel points `dilation` cells apart, results `stride` cells apart."""
    ndim = x.ndim - 2
    stride = per_axis(stride, ndim)
    if groups == 1 and set(weight.shape[:-2]) == set(stride) == {1} and not any(map(any, padding)):
        return jnp.matmul(x, weight.reshape(weight.shape[-2:]))
    return correlate(x, weight, Moves(tuple(map(tuple, padding)), stride, (dilation,) * ndim, groups))
