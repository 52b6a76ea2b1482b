"""Group normalization of fields `(batch, *space, channel)`, and its modulation by scalars of the sample."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError
from physml.layers.pointwise import EPSILON


class GroupNorm(nnx.Module):
    """Zero mean and unit variance of each sample over points and the channels of a group, then a scale and a shift.

    Wu & He 2018, arXiv:1803.08494. Statistics are float32 also for bfloat16 fields.

    Attributes:
        weight, bias: `(channel,)`.
    """

    def __init__(self, channels: int, groups: int = 1):
        """`groups` of neighboring channels, equally large."""
        if channels % groups:
            raise ConfigError(
                f"{channels} channels cannot be normalized in {groups} equal groups: make the width a multiple of it."
            )
        self.groups = groups
        self.weight = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space channel"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.groups > 1:
            wide = wide.reshape(*x.shape[:-1], self.groups, -1)
        axes = (*range(1, x.ndim - 1), wide.ndim - 1)
        mean = wide.mean(axes, keepdims=True)
        variance = jnp.square(wide - mean).mean(axes, keepdims=True)
        y = ((wide - mean) * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)
        return (y * self.weight[...].astype(y.dtype) + self.bias[...].astype(y.dtype)).astype(x.dtype)


def modulate(
    x: Float[Array, "batch *space channel"], factors: Float[Array, "batch channel2"]
) -> Float[Array, "batch *space channel"]:
    """`x (1 + scale) + shift`, where `factors` hold the scale of every channel, then the shift.

    After a group norm: AdaGN of Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """
    scale, shift = jnp.split(per_sample(factors, x), 2, axis=-1)
    return x * (1 + scale) + shift


def per_sample(vectors: Float[Array, "batch number"], like: Float[Array, "batch *space channel"]):
    """`vectors` with axes of length one for space, in the dtype of `like`."""
    return vectors.astype(like.dtype).reshape(vectors.shape[0], *(1,) * (like.ndim - 2), -1)
