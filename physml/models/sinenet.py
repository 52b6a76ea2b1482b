"""SineNet: a chain of light U-Nets (waves), each moving features a little, so that encoder and decoder stay aligned.

Zhang et al. 2024, arXiv:2403.19507. Layers, defaults and initialization follow the authors' code (AIRS, OpenPDE), whose
weights `physml.convert` reads; conditioning on time and parameters as there.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Grid, Signature
from physml.layers.convolution import Convolution, resolve_boundaries
from physml.layers.dense import Dense
from physml.layers.group_norm import GroupNorm, modulate, per_sample
from physml.layers.interpolation import average_pool, double, max_pool
from physml.layers.pointwise import activation
from physml.layers.scalar_embedding import ScalarEmbedding
from physml.layers.stack import Stack

LEVELS = 4  # of every wave, each half as fine as the one before
POOLS = {"average": average_pool, "max": max_pool}


@dataclass(frozen=True)
class SineNetConfig:
    """Choices of a SineNet. Networks with scalars embed each one; those without are the unconditioned variant.

    Attributes:
        width: channels on the finest level.
        growth: channels of a level over those of the next finer one; level i has int(width * growth**i).
        waves: U-Nets in a row.
        blocks: pairs of convolutions on each level and way. One wave of as many blocks as there were waves is the
            authors' control.
        disentangled: every level also reads the wave's input, pooled (their dual path); off is their tangled variant.
        residual: connection round each pair of convolutions.
        wave_residual: connection round each wave.
        norm: group norm, with one group, after each convolution.
        activation: after each norm.
        pool: on the way to coarser levels.
        interpolation: on the way back: "bicubic", "bilinear" or "nearest".
        boundary: of convolutions and interpolation on every axis; "auto": periodic axes wrap round, zero beyond others.
        modulation: how scalars act between the two convolutions of a pair: "add", or "scale_shift".
        remat: recompute each wave in the backward pass.
        dtype: of the hidden fields; parameters and statistics stay float32.
    """

    width: int = 64
    growth: float = 1.425
    waves: int = 8
    blocks: int = 1
    disentangled: bool = True
    residual: bool = True
    wave_residual: bool = True
    norm: bool = True
    activation: str = "gelu"
    pool: Literal["average", "max"] = "average"
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    boundary: Literal["auto", "periodic", "zero", "replicate", "reflect"] = "auto"
    modulation: Literal["add", "scale_shift"] = "add"
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, self.waves, self.blocks) < 1 or min(self.widths) < 1:
            raise ConfigError(
                f"width, waves and blocks must be positive and growth must leave a channel on each level, but {self} "
                f"has {self.widths} channels."
            )
        activation(self.activation)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(self.width * self.growth**level) for level in range(LEVELS + 1))

    def boundaries(self, grid: Grid) -> tuple[str, ...]:
        """Of every axis."""
        return resolve_boundaries(self.boundary, grid.periodic, beyond="zero")

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "SineNet":
        """The model for a grid. Raises ConfigError for a grid that cannot be halved four times."""
        return SineNet(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        taps, widths, scalars = 3**signature.grid.ndim, self.widths, signature.scalars
        embedding = 4 * self.width
        each_scalar = (self.width + 1) * embedding + (embedding + 1) * embedding

        def pair(inputs, outputs):
            factors = (embedding + 1) * outputs * (2 if self.modulation == "scale_shift" else 1) if scalars else 0
            return (taps * (inputs + outputs) + 2) * outputs + 4 * outputs * self.norm + factors

        wave = 0
        for level in range(LEVELS):
            fine, coarse = widths[level : level + 2]
            wave += pair(fine + self.width * (level > 0 and self.disentangled), coarse) + pair(coarse + fine, fine)
            wave += (self.blocks - 1) * (pair(coarse, coarse) + pair(fine, fine))
            wave += ((fine + 1) * coarse + (coarse + 1) * fine) * self.residual
        ends = (taps * signature.inputs + 1) * self.width + (taps * self.width + 1) * signature.outputs
        return ends + self.waves * wave + scalars * each_scalar


class SineNet(nnx.Module):
    """Convolution, waves, convolution. Applies to every grid that can be halved four times.

    Attributes:
        waves: every `Wave`, stacked.
    """

    def __init__(self, config: SineNetConfig, signature: Signature, *, rngs: nnx.Rngs):
        grid, width = signature.grid, config.width
        if not 1 <= grid.ndim <= 3:
            raise ConfigError(f"sinenet needs one to three spatial axes, but the grid has {grid.ndim}.")
        self.config, self.signature = config, signature
        self.boundaries = config.boundaries(grid)
        self.check(grid.shape)
        activate, conditioned = activation(config.activation), bool(signature.scalars)
        self.embedding = (
            ScalarEmbedding(signature.scalars, width, activate=activate, rngs=rngs) if conditioned else None
        )
        self.first = Convolution(signature.inputs, width, 3, self.boundaries, rngs=rngs)
        self.waves = Stack(lambda rngs: Wave(config, self.boundaries, conditioned, rngs=rngs), config.waves, rngs=rngs)
        self.last = Convolution(width, signature.outputs, 3, self.boundaries, rngs=rngs)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        self.check(fields.shape[1:-1])
        embedding = self.embed(scalars)
        x = self.waves(self.lift(fields), lambda wave, x, *_: wave(x, embedding), (None,), remat=self.config.remat)
        return self.last(x).astype(fields.dtype)

    def embed(self, scalars) -> Float[Array, "batch embedding"] | None:
        """What conditions every block."""
        return None if self.embedding is None else self.embedding(jnp.asarray(scalars))

    def lift(self, fields) -> Float[Array, "batch *space width"]:
        """Inputs -> hidden fields."""
        wide = jnp.promote_types(fields.dtype, jnp.float32)
        return self.first(jnp.asarray(fields, wide if self.config.dtype == "float32" else jnp.bfloat16))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ConfigError when a grid does not fit."""
        coarsest = 2**LEVELS
        wraps = [boundary in ("periodic", "reflect") for boundary in self.boundaries]
        smallest = [2 * coarsest if wrap else coarsest for wrap in wraps]
        if any(n % coarsest or n < least for n, least in zip(shape, smallest, strict=True)):
            raise ConfigError(
                f"sinenet halves the grid {LEVELS} times, but it has {tuple(shape)} points: every axis needs a "
                f"multiple of {coarsest} (at least {tuple(smallest)} here; axes that wrap round keep two cells). "
                "Crop, pad or resample the data."
            )


class Wave(nnx.Module):
    """A light U-Net that keeps the shape of its input."""

    def __init__(self, config: SineNetConfig, boundaries: tuple[str, ...], conditioned: bool, *, rngs: nnx.Rngs):
        self.residual, self.disentangled = config.wave_residual, config.disentangled
        self.pool = POOLS[config.pool]
        options = {"boundaries": boundaries, "conditioned": conditioned, "rngs": rngs}
        widths = config.widths
        steps = list(zip(widths, widths[1:]))
        self.downs = nnx.List(
            [
                Blocks(config, fine, config.width * (level > 0 and config.disentangled), coarse, **options)
                for level, (fine, coarse) in enumerate(steps)
            ]
        )
        self.ups = nnx.List([Blocks(config, coarse, fine, fine, **options) for fine, coarse in reversed(steps)])
        self.interpolation, self.boundaries = config.interpolation, boundaries

    def __call__(self, x, embedding):
        skips, own = [x], x
        for level in range(LEVELS):
            own, hidden = self.down(level, own, skips[-1], embedding)
            skips.append(hidden)
        hidden = skips.pop()
        for level in range(LEVELS):
            hidden = self.up(level, hidden, skips.pop(), embedding)
        return x + hidden if self.residual else hidden

    def down(self, level: int, own, hidden, embedding):
        """The wave's input and its features, both on the next coarser level."""
        hidden = self.pool(hidden)
        if not self.disentangled:
            return own, self.downs[level](hidden, hidden, embedding)
        own = self.pool(own)
        inputs = hidden if level == 0 else jnp.concatenate([hidden, own], axis=-1)
        return own, self.downs[level](inputs, hidden, embedding)

    def up(self, level: int, hidden, skip, embedding):
        """Features on the next finer level, from these and what the way down left there."""
        hidden = double(hidden, self.interpolation, self.boundaries)
        return self.ups[level](jnp.concatenate([skip, hidden], axis=-1), hidden, embedding)


class Blocks(nnx.Module):
    """Pairs of convolutions with connections round each; that of the first passes by the `beside` channels.

    Attributes:
        rest: the pairs after the first, or None.
    """

    def __init__(
        self, config: SineNetConfig, inputs: int, beside: int, outputs: int, *, boundaries, conditioned, rngs: nnx.Rngs
    ):
        self.residual = config.residual
        options = {"boundaries": boundaries, "conditioned": conditioned}
        self.pair = Pair(config, inputs + beside, outputs, **options, rngs=rngs)
        self.shortcut = Dense(inputs, outputs, rngs=rngs) if config.residual else None
        inner = {**options, "inner_residual": config.residual}
        self.rest = (
            Stack(lambda rngs: Pair(config, outputs, outputs, **inner, rngs=rngs), config.blocks - 1, rngs=rngs)
            if config.blocks > 1
            else None
        )

    def __call__(self, x, base, embedding):
        """`x` are all channels, `base` those that the connection reads."""
        x = self.pair(x, embedding)
        x = x if self.shortcut is None else x + self.shortcut(base)
        return x if self.rest is None else self.rest(x, lambda pair, x, *_: pair(x, embedding), (None,))


class Pair(nnx.Module):
    """`act(norm(conv(modulate(act(norm(conv(x)))))))`, and `x` added where `inner_residual` is set."""

    def __init__(
        self, config: SineNetConfig, inputs: int, outputs: int, *, boundaries, conditioned: bool,
        inner_residual: bool = False, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.activate, self.scaled, self.residual = (
            activation(config.activation), config.modulation == "scale_shift", inner_residual
        )  # fmt: skip
        self.first = Convolution(inputs, outputs, 3, boundaries, rngs=rngs)
        self.second = Convolution(outputs, outputs, 3, boundaries, rngs=rngs)
        self.norms = nnx.List([GroupNorm(outputs) if config.norm else None for _ in range(2)])
        factors = outputs * (2 if self.scaled else 1)
        self.condition = Dense(4 * config.width, factors, rngs=rngs) if conditioned else None

    def __call__(self, x, embedding):
        h = self.activate(self.normalize(0, self.first(x)))
        if self.condition is not None:
            factors = self.condition(embedding)
            h = modulate(h, factors) if self.scaled else h + per_sample(factors, h)
        h = self.activate(self.normalize(1, self.second(h)))
        return x + h if self.residual else h

    def normalize(self, index: int, x):
        norm = self.norms[index]
        return x if norm is None else norm(x)
