"""Attention factorized over the axes of a grid: one small kernel per axis, each applied to the whole field.

Li et al. 2023, arXiv:2305.17560 (factorized kernels); parallel form: Yang et al. 2024, arXiv:2412.18840. Fields here
have the channel axis last, `(batch, *space, channel)`. For n points along an axis the kernel costs n^2 and its
application n per point of the grid, where attention over all points would cost the number of points.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.fields import Axis
from physml.layers.conditioning import LayerNorm
from physml.layers.dense import Dense
from physml.layers.pointwise import EPSILON, gelu, uniform

ROTARY_BASE, ROTARY_UNIT = 10000.0, 64.0  # angle = 64 coordinate / 10000^(2 j / width)


class Frozen(nnx.Variable):
    """Numbers drawn once: saved with the model, never trained."""


def turns(coordinates: np.ndarray, frequencies: Float[Array, " wave"]) -> Float[Array, "point wave"]:
    """`coordinates * frequencies` less its nearest integer: the phase of a wave, in [-1/2, 1/2].

    `coordinates` (float64) are known when the program is traced. Right to 1e-6 also for a million turns, while a
    float32 product of a thousand is off by 1e-4: both factors are cut into pieces of 12 bits, whose products are exact,
    and each loses its whole turns before they are added.
    """
    frequencies = frequencies.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(frequencies, jnp.uint32) & np.uint32(0xFFFFF000)
    leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
    total = jnp.zeros((len(coordinates), frequencies.shape[0]), jnp.float32)
    for piece in _pieces(np.asarray(coordinates, np.float64)):
        for part in (leading, frequencies - leading):
            product = piece[:, None] * part
            total = total + (product - jnp.round(product))
    return total - jnp.round(total)


def _pieces(numbers: np.ndarray) -> list[np.ndarray]:
    """Float32 arrays of 12 significant bits each that add up to `numbers` to 48 bits."""
    pieces = []
    for _ in range(4):
        fraction, exponent = np.frexp(numbers)
        pieces.append(np.ldexp(np.trunc(np.ldexp(fraction, 12)), exponent - 12))
        numbers = numbers - pieces[-1]
    return [piece.astype(np.float32) for piece in pieces]


def _phases(axis: Axis, frequencies, *, unit: float, whole: bool):
    """`(points, wave)`: phases, in turns, of waves `unit * frequencies` (per length) at the centers of an axis.

    `whole` moves each frequency to the next whole number of waves in the period of the axis.
    """
    centers = np.asarray(axis.centers, np.float64)
    if not whole:
        return turns(centers * unit, frequencies)
    return turns(centers / axis.length, jnp.round(frequencies * np.float32(unit * axis.length)))


class FourierPositions(nnx.Module):
    """Gaussian Fourier features of every point, through a linear map: `(1, *space, width)`.

    Tancik et al. 2020, arXiv:2006.10739: `[sin 2 pi B x, cos 2 pi B x]` with x in the units of the grid.

    Attributes:
        waves: B, `(axis, width // 2)`, frozen.
    """

    def __init__(self, ndim: int, width: int, *, scale: float = 8.0, rngs: nnx.Rngs):
        """B starts as `scale` times standard normal numbers. `width` is even."""
        self.waves = Frozen(scale * jax.random.normal(rngs.params(), (ndim, width // 2)))
        self.linear = Dense(width, width, rngs=rngs)

    def __call__(self, axes: Sequence[Axis], whole: Sequence[bool]) -> Float[Array, "1 *space width"]:
        """`whole` says along which axes only whole waves per period are used."""
        phase = 0.0
        for i, axis in enumerate(axes):
            along = _phases(axis, self.waves[i], unit=1.0, whole=whole[i])
            phase = phase + along.reshape(-1, *(1,) * (len(axes) - 1 - i), along.shape[-1])
        angle = 2 * np.pi * phase
        return self.linear(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[None])


def rotary(axis: Axis, inverse: Float[Array, " half"], *, whole: bool) -> tuple[Array, Array]:
    """Cosine and sine `(points, 2 half)` of the angles `64 coordinate * inverse`, each twice."""
    angle = 2 * np.pi * _phases(axis, inverse, unit=ROTARY_UNIT / (2 * np.pi), whole=whole)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "batch point head width"], table: tuple[Array, Array]):
    """Turns the pairs `(x[j], x[j + width / 2])` by the angles of their point (Su et al. 2021, arXiv:2104.09864)."""
    cosine, sine = (part[:, None] for part in table)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cosine + jnp.concatenate([-second, first], axis=-1) * sine


class AxisKernel(nnx.Module):
    """The kernel `q k^T` of one axis, from fields averaged over the other axes. No softmax.

    Attributes:
        inverse: inverse wavelengths of the rotary embedding, `(width // 2,)`, frozen; None without it.
    """

    def __init__(self, channels: int, heads: int, width: int, *, rotary: bool, scale: float, rngs: nnx.Rngs):
        """`width` channels of queries and keys per head; the kernel is multiplied by `scale`."""
        self.heads, self.scale = heads, scale
        self.pool = Dense(channels, channels, bias=False, rngs=rngs)
        self.norm = LayerNorm(channels, rngs=rngs)
        self.gated = Dense(channels, 2 * channels, rngs=rngs)
        self.mixed = Dense(channels, channels, rngs=rngs)
        self.query, self.key = (Dense(channels, heads * width, bias=False, rngs=rngs) for _ in range(2))
        # Kernels start near zero: fifty times below the usual uniform distribution of Glorot & Bengio 2010.
        bound = 0.02 * math.sqrt(6 / (channels + heads * width))
        for linear in (self.query, self.key):
            shape = linear.weight[...].shape
            linear.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        self.inverse = Frozen(jnp.asarray(1 / np.float32(ROTARY_BASE) ** exponents)) if rotary else None

    def table(self, axis: Axis, *, whole: bool):
        """What `__call__` wants to know of the points of an axis."""
        return None if self.inverse is None else rotary(axis, self.inverse[...], whole=whole)

    def __call__(self, mean: Float[Array, "batch point channel"], table) -> Float[Array, "batch head point point"]:
        """`mean`: the field averaged over all other axes."""
        first, second = jnp.split(self.gated(self.norm(self.pool(mean))), 2, axis=-1)
        hidden = self.mixed(gelu(first) * second)
        query, key = (linear(hidden).reshape(*hidden.shape[:-1], self.heads, -1) for linear in (self.query, self.key))
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        return self.scale * jnp.einsum("bihc,bjhc->bhij", query, key)


class FactorizedAttention(nnx.Module):
    """`mlp(instance_norm(kernels applied to v))`, all from the normalized field: keeps shape and dtype.

    "parallel": every axis's kernel is applied to v and the results are concatenated; "chained": one kernel after the
    other. v has `heads * width` channels.

    Attributes:
        value: `(heads * width, channels)`.
        mix: `(parts, channels, heads * width)`, one part per axis where parallel.
    """

    def __init__(
        self,
        ndim: int,
        channels: int,
        heads: int,
        width: int,
        *,
        form: Literal["parallel", "chained"],
        kernel_width: int,
        rotary: bool = True,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.form, self.heads = form, heads
        self.norm = LayerNorm(channels, rngs=rngs)
        self.value = nnx.Param(uniform(rngs, (heads * width, channels), channels))
        self.entry = Dense(channels, channels, bias=False, rngs=rngs)
        self.kernels = nnx.List(
            [AxisKernel(channels, heads, kernel_width, rotary=rotary, scale=scale, rngs=rngs) for _ in range(ndim)]
        )
        parts = ndim if form == "parallel" else 1
        self.mix = nnx.Param(uniform(rngs, (parts, channels, heads * width), parts * heads * width))
        self.last = Dense(channels, channels, bias=False, rngs=rngs)

    def tables(self, axes: Sequence[Axis], whole: Sequence[bool]) -> tuple:
        """What `__call__` wants to know of the grid; the same for every call on it."""
        return tuple(
            kernel.table(axis, whole=flag) for kernel, axis, flag in zip(self.kernels, axes, whole, strict=True)
        )

    def of_axes(
        self, field: Float[Array, "batch *space channel"], tables
    ) -> list[Float[Array, "batch head point point"]]:
        """The kernel of every axis, float32, from the normalized field."""
        # The mean comes before the linear map: they commute, and the mean is a line of points, not a grid.
        wide = field.astype(jnp.promote_types(field.dtype, jnp.float32))
        space = range(1, field.ndim - 1)
        means = [self.entry(wide.mean(tuple(a for a in space if a != axis))) for axis in space]
        return [kernel(mean, table) for kernel, mean, table in zip(self.kernels, means, tables, strict=True)]

    def __call__(self, u: Float[Array, "batch *space channel"], tables) -> Float[Array, "batch *space channel"]:
        field = self.norm(u)
        kernels = [kernel.astype(u.dtype) for kernel in self.of_axes(field, tables)]
        combine = self._parallel if self.form == "parallel" else self._chained
        return self.last(gelu(jnp.moveaxis(combine(jnp.moveaxis(field, -1, 1), kernels), 1, -1)))

    # Below, fields are `(batch, channel, ..., points)`: with the kernel's axis last, values, kernels and mixing are
    # plain products of matrices as they lie in memory. So it is the input, which has few channels, that is transposed
    # for every axis and not the values, which have many: 0.6 of the time of contractions in place on CPU.

    def _parallel(self, field, kernels):
        total = 0.0
        for i, kernel in enumerate(kernels):
            moved = jnp.moveaxis(field, i + 2, -1)
            phi = _along_last(self._values(moved), kernel)
            total = total + jnp.moveaxis(_mix_normalized(self.mix[i], phi), -1, i + 2)
        return total

    def _chained(self, field, kernels):
        phi = self._values(jnp.moveaxis(field, 2, -1))
        for i, kernel in enumerate(kernels):
            phi = _along_last(phi if i == 0 else jnp.moveaxis(phi, 2, -1), kernel)
        return _mix_normalized(self.mix[0], phi)

    def _values(self, field):
        return _per_sample(self.value[...], field)


def _per_sample(weight, field):
    """`weight (out, in)` or `(batch, out, in)` times `field (batch, in, *space)`."""
    weight = jnp.broadcast_to(weight.astype(field.dtype), (field.shape[0], *weight.shape[-2:]))
    return (weight @ field.reshape(*field.shape[:2], -1)).reshape(field.shape[0], -1, *field.shape[2:])


def _along_last(field, kernel):
    """`sum_j kernel[b, h, i, j] field[b, (h, c), ..., j]`."""
    batch, heads, points = kernel.shape[:3]
    rows = field.reshape(batch, heads, -1, points) @ jnp.swapaxes(kernel, -1, -2)
    return rows.reshape(field.shape)


def _mix_normalized(weight: Float[Array, "out channel"], field):
    """`weight` times the instance norm of `field (batch, channel, *space)`: the norm is folded into the weight.

    Each channel of each sample is standardized over its points (biased variance), which a weight of its own for each
    sample does without another pass over the field.
    """
    flat = field.reshape(*field.shape[:2], -1)
    wide = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    variance = _variance(wide)
    scaled = weight.astype(wide.dtype) * jax.lax.rsqrt(variance + EPSILON)[:, None]
    mixed = _per_sample(scaled, flat).astype(wide.dtype) - scaled @ mean
    return mixed.astype(field.dtype).reshape(field.shape[0], -1, *field.shape[2:])


@jax.custom_jvp
def _variance(x):
    """Of the numbers along the last axis."""
    return jnp.square(x - x.mean(-1, keepdims=True)).mean(-1)


@_variance.defjvp
def _variance_jvp(primals, tangents):
    # Moving the center does not change the variance to first order; told so, a gradient makes two passes less.
    (x,), (t,) = primals, tangents
    centered = x - x.mean(-1, keepdims=True)
    return jnp.square(centered).mean(-1), 2 * (centered * t).mean(-1)
