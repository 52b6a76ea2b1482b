"""The residual network of CFDBench: large kernels, few channels between blocks and many inside.

Luo et al. 2023, arXiv:2310.05963. Its weights load into it; `resnet` is the network to train from scratch.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Grid, Signature
from physml.layers.conditioning import append_scalars
from physml.layers.convolution import Convolution, resolve_boundaries
from physml.layers.dropout import drop
from physml.layers.increment import add_and_mask, check_frame_and_mask
from physml.layers.pointwise import gelu


@dataclass(frozen=True)
class CFDBenchResNetConfig:
    """Choices of the residual network of CFDBench.

    Attributes:
        width: channels between blocks.
        inner: channels inside blocks.
        depth: blocks that keep `width`; one before and one after them change the number of channels.
        kernel: points of a kernel along each axis, odd.
        dropout: share of the numbers inside each block that is left out in training.
        boundary: on every axis; "auto": periodic axes wrap round, others repeat the edge cell.
        frame: input channel where the frame starts that the result is added to: (h - 1) * C for a history of h frames
            of C channels. None: added to nothing.
        mask: input channel that outputs are multiplied by; None: no mask.
        remat: recompute each block in the backward pass.
        dtype: of the hidden fields; parameters stay float32.
    """

    width: int = 16
    inner: int = 64
    depth: int = 4
    kernel: int = 7
    dropout: float = 0.2
    boundary: Literal["auto", "periodic", "zero", "replicate", "reflect"] = "auto"
    frame: int | None = 0
    mask: int | None = None
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, self.inner, self.kernel) < 1 or self.depth < 0:
            raise ConfigError(f"Sizes must be positive (depth may be 0), but {self} was given.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, but it is a share: 0 or more and below 1.")

    def boundaries(self, grid: Grid) -> tuple[str, ...]:
        """Of every axis."""
        return resolve_boundaries(self.boundary, grid.periodic, beyond="replicate")

    def channels(self, signature: Signature) -> list[int]:
        """Before and after every block."""
        return [signature.inputs + signature.scalars, *[self.width] * (self.depth + 1), signature.outputs]

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "CFDBenchResNet":
        """The model for a grid. Raises ConfigError when frame or mask do not fit the inputs."""
        return CFDBenchResNet(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        taps, channels = self.kernel**signature.grid.ndim, self.channels(signature)
        pairs = list(zip(channels, channels[1:]))
        inside = sum((taps * a + 1) * self.inner + (taps * self.inner + 1) * b for a, b in pairs)
        return inside + sum((a + 1) * b for a, b in (pairs[0], pairs[-1]))


class CFDBenchResNet(nnx.Module):
    """Applies to any grid of the same number of axes. Input channels in order: fields, scalars (constant in space)."""

    def __init__(self, config: CFDBenchResNetConfig, signature: Signature, *, rngs: nnx.Rngs):
        if not 1 <= signature.grid.ndim <= 3:
            raise ConfigError(f"cfdbench_resnet needs one to three axes, but the grid has {signature.grid.ndim}.")
        check_frame_and_mask(config.frame, config.mask, signature)
        self.config, self.signature = config, signature
        self.dropout, self.deterministic = config.dropout, True  # `train()` and `eval()` switch `deterministic`
        channels, boundaries = config.channels(signature), config.boundaries(signature.grid)
        last = len(channels) - 2
        self.blocks = nnx.List(
            [
                WideBlock(a, b, config, boundaries, shortcut=i in (0, last), rngs=rngs)
                for i, (a, b) in enumerate(zip(channels, channels[1:]))
            ]
        )

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"], key=None
    ) -> Float[Array, "batch *space outputs"]:
        """`key`, a typed PRNG key, draws what is left out; without one, or after `eval()`, nothing is."""
        x = self.run(fields, scalars, key)[-1]
        return add_and_mask(x.astype(fields.dtype), jnp.asarray(fields), self.config.frame, self.config.mask)

    def run(self, fields, scalars, key=None) -> list[Float[Array, "batch *space channel"]]:
        """What each block gives."""
        inputs = append_scalars(fields, scalars)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        x = inputs.astype(wide if self.config.dtype == "float32" else jnp.bfloat16)
        key = None if self.deterministic else key
        apply = nnx.remat(WideBlock.__call__) if self.config.remat else WideBlock.__call__
        states = []
        for i, block in enumerate(self.blocks):
            x = apply(block, x, None if key is None else jax.random.fold_in(key, i))
            states.append(x)
        return states


class WideBlock(nnx.Module):
    """`shortcut(x) + conv(gelu(drop(conv(x))))`; the shortcut is a linear map, or `x` itself."""

    def __init__(
        self, inputs: int, outputs: int, config: CFDBenchResNetConfig, boundaries, *, shortcut: bool, rngs: nnx.Rngs
    ):
        inner, kernel, self.dropout = config.inner, config.kernel, config.dropout
        self.first = Convolution(inputs, inner, kernel, boundaries, rngs=rngs)
        self.second = Convolution(inner, outputs, kernel, boundaries, rngs=rngs)
        self.shortcut = Convolution(inputs, outputs, 1, boundaries, rngs=rngs) if shortcut else None

    def __call__(self, x: Float[Array, "batch *space inputs"], key=None) -> Float[Array, "batch *space outputs"]:
        change = self.second(gelu(drop(self.first(x), self.dropout, key)))
        return change + (x if self.shortcut is None else self.shortcut(x))
