"""Residual convolutional network that keeps the grid, with dilations: the local counterpart of `fno`.

Residual blocks: He et al. 2016, arXiv:1603.05027 (pre-activation order), or He et al. 2015, arXiv:1512.03385
(activation after the sum), as APEBench has them (Koehler et al. 2024, arXiv:2411.00180). Dilated for fluid flow:
Stachenfeld et al. 2022, arXiv:2112.15275.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.conditioning import append_positions, append_scalars
from physml.layers.convolution import Convolution
from physml.layers.pointwise import GroupNorm, activation


@dataclass(frozen=True)
class ResNetConfig:
    """Choices of a residual network.

    Attributes:
        width: channels of the hidden fields.
        depth: residual blocks, two convolutions each; one convolution before and one after them.
        kernel: points of a kernel along each axis, odd.
        dilations: spacing of the kernel points in cells, block by block; shorter lists repeat.
        boundary: beyond the edges of axes that are not periodic (periodic axes of the grid wrap round).
        activation: inside the blocks.
        norm: "group_norm" standardizes each sample at the start of a block.
        preactivation: activations come before the convolutions of a block and before the last convolution; otherwise
            after the first convolution and after the sum.
        pointwise_ends: the first and the last convolution have kernels of one point.
        positions: append the coordinates of every point, in [0, 1), to the input.
        dropout: share of the channels that a block leaves out of its sum in training, drawn for each sample (Tompson et
            al. 2015, arXiv:1411.4280).
        remat: recompute each block in the backward pass.
        dtype: of the hidden fields; parameters stay float32.
    """

    width: int = 64
    depth: int = 4
    kernel: int = 3
    dilations: tuple[int, ...] = (1,)
    boundary: Literal["zero", "replicate", "reflect"] = "replicate"
    activation: str = "gelu"
    norm: Literal["none", "group_norm"] = "none"
    preactivation: bool = True
    pointwise_ends: bool = False
    positions: bool = False
    dropout: float = 0.0
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, self.depth, *self.dilations, len(self.dilations)) < 1:
            raise ConfigError(f"Sizes must be positive, but {self} was given.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, but it is a share of the channels: 0 or more and below 1.")

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "ResNet":
        return ResNet(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        taps, width = self.kernel**signature.grid.ndim, self.width
        inputs = signature.inputs + signature.scalars + signature.grid.ndim * self.positions
        block = 2 * (taps * width + 1) * width + 2 * width * (self.norm == "group_norm")
        ends = 1 if self.pointwise_ends else taps
        return (ends * inputs + 1) * width + self.depth * block + (ends * width + 1) * signature.outputs


class ResNet(nnx.Module):
    """Residual network. Applies to fields on any grid of the same number of axes.

    Input channels in order: fields, scalars (constant in space), positions.
    """

    def __init__(self, config: ResNetConfig, signature: Signature, *, rngs: nnx.Rngs):
        ndim = signature.grid.ndim
        if not 1 <= ndim <= 3:
            raise ConfigError(f"resnet needs one to three spatial axes, but the grid has {ndim}.")
        self.config, self.signature = config, signature
        self.dropout, self.deterministic = config.dropout, True  # `train()` and `eval()` switch `deterministic`
        boundaries = ["periodic" if periodic else config.boundary for periodic in signature.grid.periodic]
        inputs = signature.inputs + signature.scalars + ndim * config.positions
        ends = 1 if config.pointwise_ends else config.kernel
        self.first = Convolution(inputs, config.width, ends, boundaries, rngs=rngs)
        spacings = [config.dilations[i % len(config.dilations)] for i in range(config.depth)]
        self.blocks = nnx.List([ResidualBlock(config, boundaries, spacing, rngs=rngs) for spacing in spacings])
        self.activate = activation(config.activation)
        self.last = Convolution(config.width, signature.outputs, ends, boundaries, rngs=rngs)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"], key=None
    ) -> Float[Array, "batch *space outputs"]:
        """`key`, a typed PRNG key, draws what is dropped; without one, or after `eval()`, nothing is."""
        inputs = append_scalars(fields, scalars)
        if self.config.positions:
            inputs = append_positions(inputs)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        x = self.first(inputs.astype(wide if self.config.dtype == "float32" else jnp.bfloat16))
        apply = nnx.remat(ResidualBlock.__call__) if self.config.remat else ResidualBlock.__call__
        for i, block in enumerate(self.blocks):
            x = apply(block, x, self._kept(x, key, i))
        return self.last(self.activate(x) if self.config.preactivation else x).astype(fields.dtype)

    def _kept(self, x, key, block: int):
        """Factors `(batch, 1, ..., channel)` of a block's channels, mean one; None where all are kept."""
        if key is None or self.deterministic or not self.dropout:
            return None
        shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        kept = jax.random.bernoulli(jax.random.fold_in(key, block), 1 - self.dropout, shape)
        return kept.astype(x.dtype) / (1 - self.dropout)


class ResidualBlock(nnx.Module):
    """`x + kept * conv(act(conv(act(norm(x)))))`, or `act(x + kept * conv(act(conv(norm(x)))))`."""

    def __init__(self, config: ResNetConfig, boundaries: list[str], dilation: int, *, rngs: nnx.Rngs):
        self.activate, self.preactivation = activation(config.activation), config.preactivation
        self.norm = GroupNorm(config.width) if config.norm == "group_norm" else None
        self.first, self.second = (
            Convolution(config.width, config.width, config.kernel, boundaries, dilation=dilation, rngs=rngs)
            for _ in range(2)
        )

    def __call__(self, x: Float[Array, "batch *space width"], kept=None) -> Float[Array, "batch *space width"]:
        h = x if self.norm is None else jnp.moveaxis(self.norm(jnp.moveaxis(x, -1, 0)), 0, -1)
        change = self.second(self.activate(self.first(self.activate(h) if self.preactivation else h)))
        y = x + (change if kept is None else kept * change)
        return y if self.preactivation else self.activate(y)
