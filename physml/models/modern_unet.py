"""Modern U-Net: residual blocks with group norm, strided and transposed convolutions, attention where it is wanted.

Gupta & Brandstetter 2022, arXiv:2209.15616. Layers, defaults and initialization follow pdearena, plain and conditioned,
in one to three dimensions; with scalars it is the network of PDE-Refiner (Lippe et al. 2023, arXiv:2308.05732).
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Grid, Signature
from physml.layers.attention import SpatialAttention
from physml.layers.convolution import Convolution, TransposedConvolution, resolve_boundaries
from physml.layers.dense import Dense
from physml.layers.group_norm import GroupNorm, modulate, per_sample
from physml.layers.pointwise import activation
from physml.layers.scalar_embedding import ScalarEmbedding

LAST_GROUPS = 8  # of the norm before the last convolution; the others have one


@dataclass(frozen=True)
class ModernUNetConfig:
    """Choices of a modern U-Net. Networks with scalars embed each one; those without are the unconditioned variant.

    Attributes:
        width: channels after the first convolution, a multiple of 8 with `norm`.
        multipliers: factors by which channels grow from level to level, cumulatively: (1, 2, 2, 4) and width 64 make
            64, 128, 256, 1024. As many levels, each but the first half as fine as the one before.
        blocks: residual blocks of a level on the way down (on the way up one more).
        attention: whether the blocks of each level end with attention; empty: none do.
        middle_attention: attention between the two blocks of the coarsest level.
        heads, head_width: of attention; width 0: as many channels as the field has.
        norm: group norm before the convolutions.
        pointwise_ends: first and last convolution have kernels of one point.
        activation: after the norms.
        boundary: of convolutions on every axis; "auto": periodic axes wrap round, zero beyond others. Transposed
            convolutions always take zero, as the authors' do.
        modulation: how scalars act inside a block: "add", or "scale_shift" after the second norm.
        remat: recompute each block in the backward pass.
        dtype: of the hidden fields; parameters and statistics stay float32.
    """

    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[bool, ...] = ()
    middle_attention: bool = False
    heads: int = 1
    head_width: int = 0
    norm: bool = True
    pointwise_ends: bool = False
    activation: str = "gelu"
    boundary: Literal["auto", "periodic", "zero", "replicate", "reflect"] = "auto"
    modulation: Literal["add", "scale_shift"] = "add"
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if (
            min(self.width, self.blocks, self.heads, len(self.multipliers), *self.multipliers) < 1
            or self.head_width < 0
        ):
            raise ConfigError(f"Sizes must be positive and multipliers must not be empty, but {self} was given.")
        if self.norm and self.width % LAST_GROUPS:
            raise ConfigError(
                f"width is {self.width}, but the last norm has {LAST_GROUPS} groups: use a multiple of {LAST_GROUPS}, "
                "or norm=False."
            )
        if len(self.attention) not in (0, len(self.multipliers)):
            raise ConfigError(
                f"attention={self.attention} has {len(self.attention)} entries for {len(self.multipliers)} levels: "
                "give one per level, or none."
            )
        activation(self.activation)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.width * math.prod(self.multipliers[: level + 1]) for level in range(len(self.multipliers)))

    def attends(self, level: int) -> bool:
        return bool(self.attention and self.attention[level])

    def boundaries(self, grid: Grid) -> tuple[str, ...]:
        """Of every axis."""
        return resolve_boundaries(self.boundary, grid.periodic, beyond="zero")

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "ModernUNet":
        """The model for a grid. Raises ConfigError for a grid that cannot be halved often enough."""
        return ModernUNet(self, signature, rngs=rngs)

    def plan(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Blocks of the way down and up in order: (level, inputs, outputs). On the way up inputs include the skip."""
        widths, downs, ups = (self.width, *self.widths), [], []
        for level in range(len(self.multipliers)):
            fine, own = widths[level], widths[level + 1]
            downs += [(level, fine if block == 0 else own, own) for block in range(self.blocks)]
        for level in reversed(range(len(self.multipliers))):
            fine, own = widths[level], widths[level + 1]
            ups += [(level, 2 * own, own)] * self.blocks + [(level, own + fine, fine)]
        return downs, ups

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        ndim, scalars, embedding = signature.grid.ndim, signature.scalars, 4 * self.width
        taps, end_taps, widths = 3**ndim, 1 if self.pointwise_ends else 3**ndim, (self.width, *self.widths)

        def block(inputs, outputs, attends):
            numbers = (taps * inputs + 1) * outputs + (taps * outputs + 1) * outputs
            numbers += 2 * (inputs + outputs) * self.norm + (inputs + 1) * outputs * (inputs != outputs)
            if scalars:
                numbers += (embedding + 1) * outputs * (2 if self.modulation == "scale_shift" else 1)
            mixed = self.heads * (self.head_width or outputs)
            return numbers + (((outputs + 1) * 3 + outputs) * mixed + outputs if attends else 0)

        downs, ups = self.plan()
        total = sum(block(inputs, outputs, self.attends(level)) for level, inputs, outputs in downs + ups)
        total += block(widths[-1], widths[-1], self.middle_attention) + block(widths[-1], widths[-1], False)
        total += sum((taps * own + 1 + 4**ndim * own + 1) * own for own in widths[1:-1])
        total += scalars * ((self.width + 1) * embedding + (embedding + 1) * embedding) + 2 * self.width * self.norm
        ends = (end_taps * signature.inputs + 1) * self.width + (end_taps * self.width + 1) * signature.outputs
        return total + ends


class ModernUNet(nnx.Module):
    """Modern U-Net. Applies to every grid that can be halved as often as it has levels below the first.

    A conditioned network starts as the zero function, as published: its last convolution and the second one of every
    block are zero.
    """

    def __init__(self, config: ModernUNetConfig, signature: Signature, *, rngs: nnx.Rngs):
        grid, widths = signature.grid, (config.width, *config.widths)
        if not 1 <= grid.ndim <= 3:
            raise ConfigError(f"modern_unet needs one to three spatial axes, but the grid has {grid.ndim}.")
        self.config, self.signature = config, signature
        self.check(grid.shape)
        boundaries, conditioned = config.boundaries(grid), bool(signature.scalars)
        self.activate, end = activation(config.activation), 1 if config.pointwise_ends else 3

        def block(inputs, outputs, attends):
            return Block(config, inputs, outputs, boundaries, conditioned, attends, rngs=rngs)

        self.embedding = (
            ScalarEmbedding(signature.scalars, config.width, activate=self.activate, rngs=rngs) if conditioned else None
        )
        self.first = Convolution(signature.inputs, config.width, end, boundaries, rngs=rngs)
        downs, ups = config.plan()
        self.downs = nnx.List([block(i, o, config.attends(level)) for level, i, o in downs])
        self.coarsen = nnx.List([Convolution(own, own, 3, boundaries, stride=2, rngs=rngs) for own in widths[1:-1]])
        self.middle = nnx.List(
            [block(widths[-1], widths[-1], config.middle_attention), block(widths[-1], widths[-1], False)]
        )
        self.ups = nnx.List([block(i, o, config.attends(level)) for level, i, o in ups])
        self.refine = nnx.List([TransposedConvolution(own, own, 4, 2, 1, grid.ndim, rngs=rngs) for own in widths[1:-1]])
        self.norm = GroupNorm(config.width, LAST_GROUPS) if config.norm else None
        self.last = Convolution(config.width, signature.outputs, end, boundaries, rngs=rngs)
        if conditioned:
            _silence(self.last)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        self.check(fields.shape[1:-1])
        embedding = self.embed(scalars)
        hidden, skips = self.descend(self.lift(fields), embedding)
        hidden = self.ascend(self.turn(hidden, embedding), skips, embedding)
        return self.last(self.activate(self.normalize(hidden))).astype(fields.dtype)

    def embed(self, scalars) -> Float[Array, "batch embedding"] | None:
        """What conditions every block."""
        return None if self.embedding is None else self.embedding(jnp.asarray(scalars))

    def lift(self, fields) -> Float[Array, "batch *space width"]:
        """Inputs -> hidden fields."""
        wide = jnp.promote_types(fields.dtype, jnp.float32)
        return self.first(jnp.asarray(fields, wide if self.config.dtype == "float32" else jnp.bfloat16))

    def descend(self, x, embedding):
        """The coarsest fields, and everything on the way to them, which the way up reads backwards."""
        skips, blocks = [x], self.config.blocks
        for i, block in enumerate(self.downs):
            x = self.apply(block, x, embedding)
            skips.append(x)
            level, last = divmod(i, blocks)
            if last == blocks - 1 and level < len(self.coarsen):
                x = self.coarsen[level](x)
                skips.append(x)
        return x, skips

    def turn(self, x, embedding):
        """The two blocks on the coarsest level."""
        for block in self.middle:
            x = self.apply(block, x, embedding)
        return x

    def ascend(self, x, skips, embedding):
        """Back to the finest level."""
        each, skips = self.config.blocks + 1, list(skips)
        for i, block in enumerate(self.ups):
            x = self.apply(block, jnp.concatenate([x, skips.pop()], axis=-1), embedding)
            step, last = divmod(i, each)
            if last == each - 1 and step < len(self.refine):
                x = self.refine[len(self.refine) - 1 - step](x)
        return x

    def normalize(self, x):
        """What the last convolution reads, before the activation."""
        return x if self.norm is None else self.norm(x)

    def apply(self, block, x, embedding):
        return (nnx.remat(Block.__call__) if self.config.remat else Block.__call__)(block, x, embedding)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ConfigError when a grid does not fit."""
        cells = 2 ** (len(self.config.multipliers) - 1)
        if any(n % cells for n in shape):
            raise ConfigError(
                f"modern_unet with {len(self.config.multipliers)} levels needs a multiple of {cells} points along "
                f"every axis, but the grid has {tuple(shape)}. Crop, pad or resample the data, or give fewer "
                "multipliers."
            )


class Block(nnx.Module):
    """`shortcut(x) + conv(act(norm(h)))` with `h = conv(act(norm(x)))`, modulated by the embedding; then attention."""

    def __init__(
        self, config: ModernUNetConfig, inputs: int, outputs: int, boundaries, conditioned: bool, attends: bool,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.activate, self.scaled = activation(config.activation), config.modulation == "scale_shift"
        self.norms = nnx.List([GroupNorm(width) if config.norm else None for width in (inputs, outputs)])
        self.first = Convolution(inputs, outputs, 3, boundaries, rngs=rngs)
        self.second = Convolution(outputs, outputs, 3, boundaries, rngs=rngs)
        self.shortcut = Dense(inputs, outputs, rngs=rngs) if inputs != outputs else None
        factors = outputs * (2 if self.scaled else 1)
        self.condition = Dense(4 * config.width, factors, rngs=rngs) if conditioned else None
        self.attention = SpatialAttention(outputs, config.heads, config.head_width, rngs=rngs) if attends else None
        if conditioned:
            _silence(self.second)

    def __call__(self, x, embedding):
        h = self.first(self.activate(self.normalize(0, x)))
        factors = None if self.condition is None else self.condition(embedding)
        if factors is not None and not self.scaled:
            h = h + per_sample(factors, h)
        h = self.normalize(1, h)
        if factors is not None and self.scaled:
            h = modulate(h, factors)
        h = self.second(self.activate(h)) + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attention is None else self.attention(h)

    def normalize(self, index: int, x):
        norm = self.norms[index]
        return x if norm is None else norm(x)


def _silence(layer: Convolution) -> None:
    """Starts a convolution from zero."""
    for parameter in (layer.weight, layer.bias):
        parameter[...] = jnp.zeros_like(parameter[...])
