"""Spectral convolution: channels mixed frequency by frequency, in one, two or three dimensions.

Li et al. 2021, arXiv:2010.08895, section 4; Tucker-factorized weights: Kossaifi et al. 2023, arXiv:2310.00120.

A field goes to its kept frequencies by one of two paths with equal results. The FFT computes every frequency and drops
most of them; the truncated transform is a product with a small matrix per axis and computes only what is kept, which
wins where few modes are kept and where matrix units are fast. `prefers_matmul` chooses by cost.

Fields are `(channel, batch, *space)`, see `pointwise`. Kept frequencies are real arrays with a part axis (real,
imaginary); complex weights are stored with a trailing axis of 2, so that optimizers never meet a complex number.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, suggest
from physml.layers.pointwise import per_channel
from physml.parallel import fft

PATHS = ("auto", "fft", "matmul")
EXCESS = ("center", "end")
EXACT = jax.lax.Precision.HIGHEST  # a transform in TF32 or bfloat16 would lose half the digits of the field


class ComplexParam(nnx.Param):
    """A complex parameter as a real array with a trailing axis of 2: real and imaginary part."""


class Band(NamedTuple):
    """What one axis keeps of its spectrum.

    Attributes:
        points: length of the axis.
        first: lowest kept frequency.
        count: kept frequencies `first, first + 1, ...`, modulo `points`.
        offset: position in the weight of the lowest kept frequency.
        shift: added to every frequency on the way back (0 unless an old library's numbers are to be reproduced).
    """

    points: int
    first: int
    count: int
    offset: int
    shift: int


def kept_modes(modes: Sequence[int]) -> tuple[int, ...]:
    """Frequencies that `modes` keep: as many, but modes // 2 + 1 along the last axis (a real field's are symmetric)."""
    return (*modes[:-1], modes[-1] // 2 + 1)


def bands(
    shape: Sequence[int], kept: Sequence[int], *, excess: str = "center", legacy_shift: bool = False
) -> tuple[Band, ...]:
    """The kept part of the spectrum of a field of `shape` under a weight of `kept` frequencies per axis.

    All axes but the last keep -(kept // 2), ..., so that the weight at
    index kept // 2 meets frequency zero; the last keeps 0, 1, and so on. Where the weight holds more frequencies than
    the grid has, the weight is cut: on both sides ("center", neuraloperator's rule) or behind ("end", where the second
    of two overlapping blocks overwrites the first, the rule of the 2021 code).
    """
    result = []
    for points, modes in zip(shape[:-1], kept[:-1], strict=True):
        count = min(points, modes)
        if excess == "center":
            first, cut = -(count // 2), (modes - count) // 2
        else:
            first = -min(points, modes // 2)
            cut = modes // 2 + first
        result.append(Band(points, first, count, cut, -1 if legacy_shift and points % 2 else 0))
    points = shape[-1]
    return (*result, Band(points, 0, min(points // 2 + 1, kept[-1]), 0, 0))


class SpectralConvolution(nnx.Module):
    """`y = F^-1 W(k) F x + bias` over the kept frequencies k: `(inputs, batch, *space)` -> `(outputs, batch, *space)`.

    Applies to any grid: frequencies that a grid lacks are left out, new ones are zero.

    Attributes:
        weight: `(*kept, inputs, outputs, 2)` where dense.
        core, factors: `(rank_in, rank_out, *rank_modes, 2)` and one `(size, rank, 2)` for inputs, outputs and each
            axis, where Tucker-factorized (the layout of tltorch).
        bias: `(outputs,)`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kept: Sequence[int],
        *,
        ranks: Sequence[int] | None = None,
        bias: bool = True,
        path: str = "auto",
        excess: str = "center",
        legacy_shift: bool = False,
        scale: float | None = None,
        rngs: nnx.Rngs,
    ):
        """`kept` frequencies per axis (see `kept_modes`); `ranks` of the factorization (see `tucker_ranks`) or None.

        Weights start with the standard deviation `scale`; None: sqrt(2 / (inputs + outputs)).
        """
        for name, value, valid in (("path", path, PATHS), ("excess", excess, EXCESS)):
            if value not in valid:
                raise ConfigError(f"There is no spectral {name} {value!r}." + suggest(value, valid))
        self.inputs, self.outputs, self.kept = inputs, outputs, tuple(kept)
        self.path, self.excess, self.legacy_shift = path, excess, legacy_shift
        scale = math.sqrt(2 / (inputs + outputs)) if scale is None else scale
        if ranks is None:
            self.weight = ComplexParam(_complex_normal(rngs, (*self.kept, inputs, outputs), scale))
            self.core, self.factors = None, None
        else:
            # So that the reconstructed weight has standard deviation `scale`, as in tltorch.
            each = (scale / math.sqrt(math.prod(ranks))) ** (1 / (len(ranks) + 1))
            sizes = (inputs, outputs, *self.kept)
            self.weight = None
            self.core = ComplexParam(_complex_normal(rngs, tuple(ranks), each))
            self.factors = nnx.List([ComplexParam(_complex_normal(rngs, pair, each)) for pair in zip(sizes, ranks)])
        self.bias = nnx.Param(scale * jax.random.normal(rngs.params(), (outputs,))) if bias else None

    def __call__(self, x: Float[Array, "inputs batch *space"]) -> Float[Array, "outputs batch *space"]:
        shape = x.shape[2:]
        if len(shape) != len(self.kept):
            raise ConfigError(
                f"This spectral convolution is {len(self.kept)}-dimensional, but the field has {len(shape)} axes."
            )
        plan = bands(shape, self.kept, excess=self.excess, legacy_shift=self.legacy_shift)
        y = _between(x, plan, self.path, lambda modes: self.mix(modes, plan))
        return y if self.bias is None else y + per_channel(self.bias[...], y)

    def mix(self, modes: Float[Array, "*modes batch inputs2"], plan) -> Float[Array, "*modes batch outputs2"]:
        """The channel vector of each kept frequency, `[real, imaginary]` in the last axis, times the weight there."""
        cut = [slice(band.offset, band.offset + band.count) for band in plan]
        if self.weight is not None:
            return modes @ _real_block(self.weight[...][tuple(cut)].astype(modes.dtype))
        core, (first, last, *axes) = self.core[...], [factor[...] for factor in self.factors]
        weight = jax.lax.complex(core[..., 0], core[..., 1])
        for factor, part in zip(axes, cut):
            # The axis that is contracted is always the first of the remaining mode axes; its result goes last.
            weight = jnp.tensordot(weight, jax.lax.complex(factor[part][..., 0], factor[part][..., 1]), axes=(2, 1))
        weight = jnp.moveaxis(weight, (0, 1), (-2, -1))
        weight = jnp.stack([weight.real, weight.imag], axis=-1).astype(modes.dtype)
        first, last = first.astype(modes.dtype), jnp.swapaxes(last, 0, 1).astype(modes.dtype)
        return ((modes @ _real_block(first)) @ _real_block(weight)) @ _real_block(last)


def low_pass(
    x: Float[Array, "channel batch *space"], kept: Sequence[int], *, path: str = "auto"
) -> Float[Array, "channel batch *space"]:
    """The part of a field in the kept frequencies."""
    return _between(x, bands(x.shape[2:], kept), path, lambda modes: modes)


def _between(x, plan: Sequence[Band], path: str, change):
    """`change` of the kept frequencies of `x`, which are transformed in float32 at least, back in the dtype of `x`."""
    matmul = prefers_matmul(plan) if path == "auto" else path == "matmul"
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    modes = change((forward_matmul if matmul else forward_fft)(wide, plan))
    return (inverse_matmul if matmul else inverse_fft)(modes, plan).astype(x.dtype)


def _complex_normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> Array:
    """Complex normal numbers of standard deviation `scale`, as `(*shape, 2)`."""
    return scale / math.sqrt(2) * jax.random.normal(rngs.params(), (*shape, 2))


def _real_block(weight):
    """Complex `(..., inputs, outputs, 2)` as real `(..., 2 inputs, 2 outputs)` for row vectors `[real, imaginary]`."""
    real, imaginary = weight[..., 0], weight[..., 1]
    return jnp.concatenate(
        [jnp.concatenate([real, imaginary], axis=-1), jnp.concatenate([-imaginary, real], axis=-1)], axis=-2
    )


def tucker_ranks(sizes: Sequence[int], rank: float) -> tuple[int, ...]:
    """Ranks c * sizes, rounded, so that the factorization holds the fraction `rank` of the dense parameters.

    c solves c^N prod(sizes) + c sum(sizes^2) = rank prod(sizes), the rule of tensorly.
    """
    dense, squares, order = math.prod(sizes), sum(size**2 for size in sizes), len(sizes)
    low, high = 0.0, max(rank, 1.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle**order * dense + middle * squares < rank * dense else (low, middle)
    return tuple(max(int(np.round(size * high)), 1) for size in sizes)


FFT_OPERATION, MOVED_NUMBER = 12.0, 35.0  # costs in units of one operation of a matrix product, see `prefers_matmul`


def prefers_matmul(plan: Sequence[Band]) -> bool:
    """Whether the truncated transform as matrix products is the cheaper path for a grid.

    Products run near the peak of a processor; an operation of an FFT costs `FFT_OPERATION` times as much, and each
    number that goes in or out of a product (which may transpose it) `MOVED_NUMBER` times. The factors are fitted to
    twelve grids in one to three dimensions on an AVX-512 CPU, whose winner they all predict; matrix units of GPU and
    TPU favor products more.
    """
    points = math.prod(band.points for band in plan)
    size, products, moved = points, 0, 0
    for i, band in enumerate(reversed(plan)):
        left = size // band.points * band.count
        # The first product makes real numbers complex; the others are complex, as two real products and their sums.
        products += (4 if i == 0 else 8) * size * band.count
        moved += size + 2 * left if i == 0 else 2 * size + 4 * left
        size = left
    transform = 2.5 * points * math.log2(max(points, 2))
    return products + MOVED_NUMBER * moved < FFT_OPERATION * transform


def forward_matmul(
    x: Float[Array, "channel batch *space"], plan: Sequence[Band]
) -> Float[Array, "*modes batch channel2"]:
    """The kept frequencies of a real field, scaled by 1 / points; channels of the real, then of the imaginary parts."""
    # Both operands of every product below are laid out as it reads them; otherwise XLA transposes whole fields first.
    z = jnp.matmul(x, _constant(_real_forward(plan[-1]), x), precision=EXACT)
    z = jnp.moveaxis(z.reshape(*z.shape[:-1], 2, -1), (-2, -1), (0, 1))
    for band in reversed(plan[:-1]):  # z: (part, *modes so far, channel, batch, *space that is left)
        both = jnp.matmul(z, _constant(_complex_forward(band), x), precision=EXACT)
        cosine, sine = both[..., : band.count], both[..., band.count :]
        z = jnp.moveaxis(jnp.stack([cosine[0] + sine[1], cosine[1] - sine[0]]), -1, 1)
    return _modes_first(z)


def inverse_matmul(
    modes: Float[Array, "*modes batch channel2"], plan: Sequence[Band]
) -> Float[Array, "channel batch *space"]:
    """The real field of the given frequencies; undoes the scaling of `forward_matmul`."""
    z = _modes_last(modes)
    for band in plan[:-1]:  # z: (part, *modes left, channel, batch, *space so far)
        real, imaginary = jnp.moveaxis(z, 1, -1)
        parts = jnp.stack([jnp.concatenate([real, imaginary], axis=-1), jnp.concatenate([imaginary, -real], axis=-1)])
        z = jnp.matmul(parts, _constant(_complex_inverse(band), modes), precision=EXACT)
    z = jnp.moveaxis(z, (0, 1), (-2, -1))
    return jnp.matmul(z.reshape(*z.shape[:-2], -1), _constant(_real_inverse(plan[-1]), modes), precision=EXACT)


def forward_fft(x: Float[Array, "channel batch *space"], plan: Sequence[Band]) -> Float[Array, "*modes batch channel2"]:
    """`forward_matmul` by FFT."""
    spectrum = fft.rfftn(x, tuple(range(2, x.ndim)), norm="forward", batch_axis=1)
    for axis, band in enumerate(plan, start=2):
        negative = min(max(-band.first, 0), band.count)
        spectrum = (
            jnp.concatenate(
                [
                    jax.lax.slice_in_dim(
                        spectrum, band.points + band.first, band.points + band.first + negative, axis=axis
                    ),
                    jax.lax.slice_in_dim(spectrum, 0, band.count - negative, axis=axis),
                ],
                axis=axis,
            )
            if negative
            else jax.lax.slice_in_dim(spectrum, 0, band.count, axis=axis)
        )
    z = jnp.stack([spectrum.real, spectrum.imag])
    return _modes_first(jnp.moveaxis(z, (1, 2), (-2, -1)))


def inverse_fft(
    modes: Float[Array, "*modes batch channel2"], plan: Sequence[Band]
) -> Float[Array, "channel batch *space"]:
    """`inverse_matmul` by FFT."""
    z = jnp.moveaxis(_modes_last(modes), (-2, -1), (1, 2))
    spectrum = jax.lax.complex(z[0], z[1])
    bins = [band.points for band in plan[:-1]] + [plan[-1].points // 2 + 1]
    spectrum = jnp.pad(spectrum, [(0, 0), (0, 0), *((0, n - band.count) for n, band in zip(bins, plan, strict=True))])
    for axis, band in enumerate(plan[:-1], start=2):
        spectrum = jnp.roll(spectrum, band.first + band.shift, axis=axis)
    axes = tuple(range(2, spectrum.ndim))
    return fft.irfftn(spectrum, [band.points for band in plan], axes, norm="forward", batch_axis=1)


def _modes_first(z):
    """(part, *modes, channel, batch) -> (*modes, batch, part * channel)."""
    rank = z.ndim - 3
    z = jnp.transpose(z, (*range(1, rank + 1), rank + 2, 0, rank + 1))
    return z.reshape(*z.shape[:-2], -1)


def _modes_last(modes):
    """(*modes, batch, part * channel) -> (part, *modes, channel, batch)."""
    rank = modes.ndim - 2
    z = modes.reshape(*modes.shape[:-1], 2, -1)
    return jnp.transpose(z, (rank + 1, *range(rank), rank + 2, rank))


def _constant(matrix: np.ndarray, like) -> Array:
    return jnp.asarray(matrix, like.dtype)


def _angles(band: Band, shift: int) -> np.ndarray:
    """`(points, count)`: 2 pi k x / n, reduced modulo the period in integers so that no digit is lost."""
    phase = np.outer(np.arange(band.points), band.first + shift + np.arange(band.count)) % band.points
    return 2 * np.pi * phase / band.points


@functools.lru_cache(maxsize=256)
def _real_forward(band: Band) -> np.ndarray:
    angles = _angles(band, 0)
    return np.concatenate([np.cos(angles), -np.sin(angles)], axis=1) / band.points


@functools.lru_cache(maxsize=256)
def _complex_forward(band: Band) -> np.ndarray:
    angles = _angles(band, 0)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / band.points


@functools.lru_cache(maxsize=256)
def _complex_inverse(band: Band) -> np.ndarray:
    angles = _angles(band, band.shift).T
    return np.concatenate([np.cos(angles), -np.sin(angles)])


@functools.lru_cache(maxsize=256)
def _real_inverse(band: Band) -> np.ndarray:
    # Frequencies other than zero and the last of an even axis stand for themselves and for their mirror image.
    frequencies = np.arange(band.count)
    twice = np.where((frequencies == 0) | (2 * frequencies == band.points), 1.0, 2.0)[:, None]
    angles = _angles(band, 0).T
    return np.concatenate([twice * np.cos(angles), -twice * np.sin(angles)])
