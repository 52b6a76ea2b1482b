"""Fourier neural operator in one to three dimensions, with dense or Tucker-factorized spectral weights.

Li et al. 2021, arXiv:2010.08895; Kossaifi et al. 2023, arXiv:2310.00120 (TFNO). Block order, defaults and
initialization follow the neuraloperator library (release 2.0.0), whose checkpoints `physml.convert` reads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.conditioning import append_positions, append_scalars
from physml.layers.pointwise import ChannelMLP, activation, gelu, normalization, skip_connection
from physml.layers.sequence import apply_in_turn
from physml.layers.spectral import SpectralConvolution, kept_modes, tucker_ranks

Skip = Literal["linear", "identity", "soft-gating", "none"]


@dataclass(frozen=True)
class FNOConfig:
    """Choices of a Fourier neural operator.

    Attributes:
        width: channels of the hidden fields.
        modes: frequencies kept along each axis, counting both signs: m keeps -m/2 .. m/2 - 1 (0 .. m/2 along the last
            axis). An axis of n points carries n. One number serves every axis.
        depth: Fourier blocks.
        lifting_ratio, projection_ratio: hidden width of the first and last perceptron over `width`; lifting 0 is one
            linear map.
        activation: of blocks, lifting and projection (the perceptron inside a block always uses GELU).
        norm: after each spectral convolution and each block.
        skip: connection round the spectral convolution.
        channel_mlp_expansion: hidden width of the perceptron at the end of a block over `width`; 0: no perceptron.
        channel_mlp_skip: connection round that perceptron.
        preactivation: activation and norm come first in a block.
        stabilizer: "tanh" bounds what enters the spectral convolution.
        domain_padding: zeros added at both ends of each axis, as a fraction of its length; for fields that are not
            periodic. One number serves every axis; empty: none.
        positions: append the coordinates of every point, in [0, 1), to the input.
        factorization: "tucker" stores the spectral weights as a core and factors.
        rank: fraction of the dense parameters that the factorization keeps, or its ranks (inputs, outputs, each axis).
        spectral: path of the transform; "auto" takes the cheaper one on each grid.
        legacy_shift: reproduce neuraloperator 2.0.0 on axes of odd length, whose spectrum came back displaced by one
            frequency.
        allow_excess_modes: accept more modes than the grid carries; the weights of the others stay unused.
        remat: recompute each block in the backward pass: less memory, more time.
        dtype: of the hidden fields; parameters, transforms and statistics stay float32.
    """

    width: int = 32
    modes: tuple[int, ...] = (16,)
    depth: int = 4
    lifting_ratio: float = 2.0
    projection_ratio: float = 2.0
    activation: str = "gelu"
    norm: Literal["none", "group_norm", "instance_norm"] = "none"
    skip: Skip = "linear"
    channel_mlp_expansion: float = 0.5
    channel_mlp_skip: Skip = "soft-gating"
    preactivation: bool = False
    stabilizer: Literal["none", "tanh"] = "none"
    domain_padding: tuple[float, ...] = ()
    positions: bool = True
    factorization: Literal["dense", "tucker"] = "dense"
    rank: float | tuple[int, ...] = 0.1
    spectral: Literal["auto", "fft", "matmul"] = "auto"
    legacy_shift: bool = False
    allow_excess_modes: bool = False
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if self.width < 1 or self.depth < 1 or not self.modes or min(self.modes) < 1:
            raise ConfigError(
                f"FNO needs positive width, depth and modes, but width={self.width}, depth={self.depth} and "
                f"modes={self.modes} were given."
            )
        if self.projection_channels < 1:
            raise ConfigError(
                f"projection_ratio={self.projection_ratio} leaves no channel at width {self.width}: raise it."
            )
        if any(fraction < 0 for fraction in self.domain_padding):
            raise ConfigError(f"domain_padding={self.domain_padding} must not be negative.")

    @property
    def lifting_channels(self) -> int:
        return int(self.lifting_ratio * self.width)

    @property
    def projection_channels(self) -> int:
        return int(self.projection_ratio * self.width)

    @property
    def mlp_channels(self) -> int:
        return round(self.width * self.channel_mlp_expansion)

    def modes_on(self, ndim: int) -> tuple[int, ...]:
        """`modes` for every one of `ndim` axes."""
        return per_axis("modes", self.modes, ndim)

    def padding(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Cells added at each end of each axis."""
        if not self.domain_padding:
            return (0,) * len(shape)
        fractions = per_axis("domain_padding", self.domain_padding, len(shape))
        return tuple(round(fraction * points) for fraction, points in zip(fractions, shape, strict=True))

    def ranks(self, ndim: int) -> tuple[int, ...] | None:
        """Tucker ranks (inputs, outputs, each axis), or None where weights are dense."""
        if self.factorization == "dense":
            return None
        sizes = (self.width, self.width, *kept_modes(self.modes_on(ndim)))
        if isinstance(self.rank, tuple):
            if len(self.rank) != len(sizes):
                raise ConfigError(
                    f"rank={self.rank} has {len(self.rank)} numbers, but the weights have {len(sizes)} axes."
                )
            return self.rank
        return tucker_ranks(sizes, self.rank)

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "FNO":
        """The model for a grid. Raises ConfigError when the modes do not fit the grid."""
        return FNO(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model, complex ones counted twice."""

        def mlp(inputs, hidden, outputs):
            return (inputs + 1) * hidden + (hidden + 1) * outputs if hidden else (inputs + 1) * outputs

        ndim, width, ranks = signature.grid.ndim, self.width, self.ranks(signature.grid.ndim)
        sizes = (width, width, *kept_modes(self.modes_on(ndim)))
        weight = math.prod(sizes) if ranks is None else math.prod(ranks) + sum(a * b for a, b in zip(sizes, ranks))
        skips = {"linear": width**2, "soft-gating": width, "identity": 0, "none": 0}
        block = 2 * weight + width + skips[self.skip]
        if self.mlp_channels:
            block += mlp(width, self.mlp_channels, width) + skips[self.channel_mlp_skip]
        block += 4 * width if self.norm == "group_norm" else 0
        inputs = signature.inputs + signature.scalars + ndim * self.positions
        ends = mlp(inputs, self.lifting_channels, width) + mlp(width, self.projection_channels, signature.outputs)
        return ends + self.depth * block


def per_axis(name: str, values: tuple, ndim: int) -> tuple:
    """One value for each of `ndim` axes; a single one serves all. Raises ConfigError for any other number of values."""
    if len(values) not in (1, ndim):
        count = "one axis: give one" if ndim == 1 else f"{ndim} axes: give one, or {ndim}"
        raise ConfigError(f"{name}={values} has {len(values)} numbers, but the grid has {count}.")
    return tuple(values) * (ndim if len(values) == 1 else 1)


class FNO(nnx.Module):
    """Fourier neural operator. Built for one grid, it applies to fields on any grid of the same number of axes.

    Input channels in order: fields, scalars (constant in space), positions.
    """

    def __init__(self, config: FNOConfig, signature: Signature, *, rngs: nnx.Rngs):
        grid = signature.grid
        if not 1 <= grid.ndim <= 3:
            raise ConfigError(f"FNO needs one to three spatial axes, but the grid has {grid.ndim}: {grid.shape}.")
        self.config, self.signature = config, signature
        modes = config.modes_on(grid.ndim)
        padded = tuple(n + 2 * p for n, p in zip(grid.shape, config.padding(grid.shape), strict=True))
        if not config.allow_excess_modes:
            check_modes("FNO", modes, padded)
        activate = activation(config.activation)
        inputs = signature.inputs + signature.scalars + grid.ndim * config.positions
        self.lifting = ChannelMLP(inputs, config.lifting_channels, config.width, activate=activate, rngs=rngs)
        self.blocks = nnx.List(
            [FourierBlock(config, grid.ndim, last=i == config.depth - 1, rngs=rngs) for i in range(config.depth)]
        )
        self.projection = ChannelMLP(
            config.width, config.projection_channels, signature.outputs, activate=activate, rngs=rngs
        )

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        hidden = apply_in_turn(self.blocks, self.pad(self.lift(fields, scalars)), remat=self.config.remat)
        return self.project(self.crop(hidden, fields.shape[1:-1])).astype(fields.dtype)

    def lift(self, fields, scalars):
        """Inputs -> hidden fields `(width, batch, *space)`."""
        inputs = append_scalars(fields, scalars)
        if self.config.positions:
            inputs = append_positions(inputs)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        dtype = wide if self.config.dtype == "float32" else jnp.bfloat16
        return self.lifting(jnp.moveaxis(inputs, -1, 0).astype(dtype))

    def pad(self, hidden):
        """Adds `domain_padding` zeros round the domain."""
        cells = self.config.padding(hidden.shape[2:])
        return jnp.pad(hidden, [(0, 0), (0, 0), *((n, n) for n in cells)]) if any(cells) else hidden

    def crop(self, hidden, shape: tuple[int, ...]):
        """Takes the domain of `shape` points out of the padded one."""
        cells = self.config.padding(shape)
        inside = tuple(slice(pad, pad + n) for pad, n in zip(cells, shape, strict=True))
        return hidden[:, :, *inside] if any(cells) else hidden

    def project(self, hidden):
        """Hidden fields -> `(batch, *space, outputs)`."""
        return jnp.moveaxis(self.projection(hidden), 0, -1)


def check_modes(name: str, modes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ConfigError when an axis has fewer points than modes."""
    if any(m > n for m, n in zip(modes, shape, strict=True)):
        raise ConfigError(
            f"{name} keeps modes={modes}, but the grid (with padding) has {shape} points and n points carry at most n "
            f"modes. Lower modes to at most {tuple(min(m, n) for m, n in zip(modes, shape))}, use a finer grid, or set "
            "allow_excess_modes to leave the other weights unused."
        )


class FourierBlock(nnx.Module):
    """Spectral convolution beside a pointwise skip, then a perceptron over channels beside a second skip."""

    def __init__(self, config: FNOConfig, ndim: int, *, last: bool, rngs: nnx.Rngs):
        width = config.width
        self.preactivation, self.stabilizer, self.last = config.preactivation, config.stabilizer, last
        self.activate = activation(config.activation)
        self.convolution = SpectralConvolution(
            width, width, kept_modes(config.modes_on(ndim)), ranks=config.ranks(ndim), path=config.spectral,
            legacy_shift=config.legacy_shift, rngs=rngs,
        )  # fmt: skip
        self.skip = skip_connection(config.skip, width, rngs=rngs)
        hidden = config.mlp_channels
        self.mlp = ChannelMLP(width, hidden, width, activate=gelu, rngs=rngs) if hidden else None
        self.mlp_skip = skip_connection(config.channel_mlp_skip, width, rngs=rngs) if hidden else None
        self.norms = nnx.List([normalization(config.norm, width) for _ in range(2)])

    def __call__(self, x: Float[Array, "width batch *space"]) -> Float[Array, "width batch *space"]:
        x = self.enter(x)
        h = self.convolution(self.stabilize(x))
        if not self.preactivation:
            h = self.normalize(0, h)
        h = h if self.skip is None else h + self.skip(x)
        h = h if self.last else self.activate(h)
        if self.preactivation:
            h = self.normalize(1, h)
        if self.mlp is not None:
            h = self.mlp(h)
            h = h if self.mlp_skip is None else h + self.mlp_skip(x)
        if self.preactivation:
            return h
        h = self.normalize(1, h)
        return h if self.last else self.activate(h)

    def enter(self, x):
        """What both skips read: the input, after activation and norm where these come first."""
        return self.normalize(0, self.activate(x)) if self.preactivation else x

    def stabilize(self, x):
        """What the spectral convolution reads."""
        return jnp.tanh(x) if self.stabilizer == "tanh" else x

    def normalize(self, index: int, x):
        norm = self.norms[index]
        return x if norm is None else norm(x)
