"""Patches of a grid as tokens: embedding and recovery, merging four tokens into one and undoing it.

Dosovitskiy et al. 2021, arXiv:2010.11929 (embedding); Liu et al. 2021, arXiv:2103.14030, section 3.1 (merging); Herde
et al. 2024, arXiv:2405.19101, appendix (un-merging, recovery). Fields are `(batch, rows, columns, channel)`.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.fields import ArrayLike
from physml.layers.conditioning import LayerNorm
from physml.layers.convolution import Convolution
from physml.layers.dense import Dense, constant, normal
from physml.layers.pointwise import uniform


class PatchEmbedding(nnx.Module):
    """Each patch of `patch` x `patch` points becomes a token: a linear map of its values.

    Attributes:
        weight: `(patch, patch, inputs, channel)`.
        bias: `(channel,)`.
    """

    def __init__(self, inputs: int, channels: int, patch: int, *, deviation: float | None = None, rngs: nnx.Rngs):
        shape, fan_in = (patch, patch, inputs, channels), patch * patch * inputs
        given = deviation is not None
        self.patch = patch
        self.weight = nnx.Param(normal(rngs, shape, deviation) if given else uniform(rngs, shape, fan_in))
        self.bias = nnx.Param(constant(channels) if given else uniform(rngs, (channels,), fan_in))

    def __call__(self, x: Float[Array, "batch rows columns inputs"]) -> Float[Array, "batch height width channel"]:
        """`patch` divides rows and columns."""
        batch, rows, columns, inputs = x.shape
        patch = self.patch
        x = x.reshape(batch, rows // patch, patch, columns // patch, patch, inputs)
        x = jnp.swapaxes(x, 2, 3).reshape(-1, patch * patch * inputs)
        weight = self.weight[...].astype(x.dtype)
        y = x @ weight.reshape(-1, weight.shape[-1]) + self.bias[...].astype(x.dtype)
        return y.reshape(batch, rows // patch, columns // patch, -1)


class PatchRecovery(nnx.Module):
    """Each token becomes a patch of points again; a convolution of 5 x 5 points then smooths the seams.

    Attributes:
        weight: `(channel, patch, patch, outputs)`.
        bias: `(outputs,)`.
        mixing: the convolution, without bias.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        patch: int,
        boundaries: list[str],
        *,
        deviation: float | None = None,
        rngs: nnx.Rngs,
    ):
        # PyTorch takes the outputs of a transposed convolution for its fan-in.
        shape, fan_in = (channels, patch, patch, outputs), outputs * patch * patch
        self.patch = patch
        self.weight = nnx.Param(uniform(rngs, shape, fan_in))
        self.bias = nnx.Param(uniform(rngs, (outputs,), fan_in))
        self.mixing = Convolution(outputs, outputs, 5, boundaries, bias=False, rngs=rngs)
        if deviation is not None:
            kernel = self.mixing.weight
            kernel[...] = normal(rngs, kernel.shape, deviation)

    def __call__(self, x: Float[Array, "batch height width channel"]) -> Float[Array, "batch rows columns outputs"]:
        batch, height, width, channels = x.shape
        patch = self.patch
        y = x.reshape(-1, channels) @ self.weight[...].astype(x.dtype).reshape(channels, -1)
        y = jnp.swapaxes(y.reshape(batch, height, width, patch, patch, -1), 2, 3)
        y = y.reshape(batch, height * patch, width * patch, -1) + self.bias[...].astype(x.dtype)
        return self.mixing(y)


class PatchMerging(nnx.Module):
    """Four neighbors become one token of twice the channels; grids of odd length are filled up with a row of zeros."""

    def __init__(self, channels: int, scalars: int = 0, *, deviation: float | None = None, rngs: nnx.Rngs, **norm):
        """`norm`: further arguments of `LayerNorm`."""
        self.reduction = Dense(4 * channels, 2 * channels, bias=False, deviation=deviation, rngs=rngs)
        self.norm = LayerNorm(2 * channels, scalars, rngs=rngs, **norm)

    def __call__(
        self, x: Float[Array, "batch rows columns channel"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch height width channels"]:
        batch, rows, columns, channels = x.shape
        if rows % 2 or columns % 2:
            x = jnp.pad(x, [(0, 0), (0, rows % 2), (0, columns % 2), (0, 0)])
        height, width = math.ceil(rows / 2), math.ceil(columns / 2)
        x = x.reshape(batch, height, 2, width, 2, channels)
        # Order of the four: even row and column, odd row, odd column, both odd.
        x = jnp.transpose(x, (0, 1, 3, 4, 2, 5)).reshape(batch, height, width, 4 * channels)
        return self.norm(self.reduction(x), scalars)


class PatchUnmerging(nnx.Module):
    """A token becomes four neighbors of half its channels."""

    def __init__(self, channels: int, scalars: int = 0, *, deviation: float | None = None, rngs: nnx.Rngs, **norm):
        """`norm`: further arguments of `LayerNorm`."""
        half = channels // 2
        self.expansion = Dense(channels, 2 * channels, bias=False, deviation=deviation, rngs=rngs)
        self.norm = LayerNorm(half, scalars, rngs=rngs, **norm)
        self.mixing = Dense(half, half, bias=False, deviation=deviation, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch height width channel"],
        scalars: Float[ArrayLike, "batch scalars"],
        shape: tuple[int, int],
    ) -> Float[Array, "batch rows columns half"]:
        """`shape`: rows and columns to keep; what lies behind them is cut off."""
        batch, height, width, channels = x.shape
        y = self.expansion(x).reshape(batch, height, width, 2, 2, channels // 2)
        y = jnp.swapaxes(y, 2, 3).reshape(batch, 2 * height, 2 * width, channels // 2)
        return self.mixing(self.norm(y[:, : shape[0], : shape[1]], scalars))
