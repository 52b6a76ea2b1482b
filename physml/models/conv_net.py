"""Convolutions and activations in turn: the plainest local network, whose receptive field is easy to state.

The feed-forward network of APEBench (Koehler et al. 2024, arXiv:2411.00180, appendix D), in one to three dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.conditioning import append_scalars
from physml.layers.convolution import Convolution
from physml.layers.pointwise import activation


@dataclass(frozen=True)
class ConvNetConfig:
    """Choices of a plain convolutional network.

    Attributes:
        width: channels of the hidden fields.
        depth: hidden fields; one convolution more than that. 0: a single convolution, linear in its input.
        kernel: points of a kernel along each axis, odd.
        dilations: spacing of the kernel points in cells, convolution by convolution; shorter lists repeat.
        boundary: beyond the edges of axes that are not periodic (periodic axes of the grid wrap round).
        activation: of the hidden fields.
        remat: recompute each hidden field in the backward pass.
        dtype: of the hidden fields; parameters stay float32.
    """

    width: int = 34
    depth: int = 10
    kernel: int = 3
    dilations: tuple[int, ...] = (1,)
    boundary: Literal["zero", "replicate", "reflect"] = "replicate"
    activation: str = "relu"
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, *self.dilations, len(self.dilations)) < 1 or self.depth < 0:
            raise ConfigError(f"Sizes must be positive (depth may be 0), but {self} was given.")
        activation(self.activation)

    @property
    def reach(self) -> int:
        """Cells on either side that a value is computed from: its receptive field without the cell itself."""
        return sum(self.spacing(i) * (self.kernel // 2) for i in range(self.depth + 1))

    def spacing(self, number: int) -> int:
        """Distance of the kernel points of one convolution."""
        return self.dilations[number % len(self.dilations)]

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "ConvNet":
        return ConvNet(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        widths = _widths(self, signature)
        return sum((self.kernel**signature.grid.ndim * a + 1) * b for a, b in zip(widths, widths[1:]))


class ConvNet(nnx.Module):
    """Applies to fields on any grid of the same number of axes. Input channels in order: fields, scalars (constant)."""

    def __init__(self, config: ConvNetConfig, signature: Signature, *, rngs: nnx.Rngs):
        ndim = signature.grid.ndim
        if not 1 <= ndim <= 3:
            raise ConfigError(f"conv_net needs one to three spatial axes, but the grid has {ndim}.")
        self.config, self.signature = config, signature
        boundaries = ["periodic" if periodic else config.boundary for periodic in signature.grid.periodic]
        widths = _widths(config, signature)
        self.convolutions = nnx.List(
            [
                Convolution(a, b, config.kernel, boundaries, dilation=config.spacing(i), rngs=rngs)
                for i, (a, b) in enumerate(zip(widths, widths[1:]))
            ]
        )
        self.activate = activation(config.activation)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        inputs = append_scalars(fields, scalars)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        x = inputs.astype(wide if self.config.dtype == "float32" else jnp.bfloat16)

        def hidden(convolution, x):
            return self.activate(convolution(x))

        apply = nnx.remat(hidden) if self.config.remat else hidden
        *first, last = self.convolutions
        for convolution in first:
            x = apply(convolution, x)
        return last(x).astype(fields.dtype)


def _widths(config: ConvNetConfig, signature: Signature) -> list[int]:
    return [signature.inputs + signature.scalars, *[config.width] * config.depth, signature.outputs]
