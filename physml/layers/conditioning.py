"""How scalars condition a sample, as channels of the input or through norms, and the position of every point."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.fields import ArrayLike
from physml.layers.dense import constant, normal
from physml.layers.pointwise import EPSILON


def append_scalars(
    fields: Float[ArrayLike, "batch *space channel"], scalars: Float[ArrayLike, "batch scalars"]
) -> Float[Array, "batch *space inputs"]:
    """`scalars` as constant fields after the channels of `fields`."""
    fields = jnp.asarray(fields)
    if scalars.shape[-1] == 0:
        return fields
    space = fields.shape[1:-1]
    constant = jnp.reshape(scalars, (scalars.shape[0], *(1,) * len(space), -1)).astype(fields.dtype)
    constant = jnp.broadcast_to(constant, (fields.shape[0], *space, scalars.shape[-1]))
    return jnp.concatenate([fields, constant], axis=-1)


def append_positions(
    fields: Float[ArrayLike, "batch *space channel"], *, endpoint: bool = False
) -> Float[Array, "batch *space inputs"]:
    """`grid_positions` as channels after those of `fields`."""
    fields = jnp.asarray(fields)
    positions = jnp.asarray(grid_positions(fields.shape[1:-1], endpoint=endpoint), fields.dtype)
    positions = jnp.broadcast_to(positions, (*fields.shape[:-1], positions.shape[-1]))
    return jnp.concatenate([fields, positions], axis=-1)


def grid_positions(shape: Sequence[int], *, endpoint: bool = False) -> Float[np.ndarray, "*space axis"]:
    """Index of every point along each axis, scaled to [0, 1): i / n, or to [0, 1] with `endpoint`: i / (n - 1).

    float64 numpy; one channel per axis, in axis order. Independent of units, so it carries over to other resolutions.
    """
    lines = [np.linspace(0.0, 1.0, points, endpoint=endpoint) for points in shape]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the channels of each point, then a scale and a shift per channel.

    Scale and shift are learned, and linear in the scalars of the sample where there are any:
    `scale + scalars @ scale_by`. Ba et al. 2016, arXiv:1607.06450; conditioned on time as in Herde et al. 2024,
    arXiv:2405.19101, section 2. Statistics are float32 also for bfloat16 fields.

    Attributes:
        scale, shift: `(channel,)`.
        scale_by, shift_by: `(scalars, channel)`, or None without scalars.
    """

    def __init__(
        self,
        channels: int,
        scalars: int = 0,
        *,
        start: float = 1.0,
        deviation: float = 0.02,
        epsilon: float = EPSILON,
        rngs: nnx.Rngs,
    ):
        """`scale` starts from `start`; what multiplies scalars from a normal distribution of that `deviation`."""
        self.epsilon = epsilon
        self.scale = nnx.Param(constant(channels, start))
        self.shift = nnx.Param(constant(channels))
        self.scale_by, self.shift_by = (
            nnx.Param(normal(rngs, (scalars, channels), deviation)) if scalars else None for _ in range(2)
        )

    def __call__(
        self, x: Float[Array, "batch *space channel"], scalars: Float[ArrayLike, "batch scalars"] | None = None
    ) -> Float[Array, "batch *space channel"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = wide.mean(-1, keepdims=True)
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
        scale, shift = self.scale[...], self.shift[...]
        if self.scale_by is not None:
            each = (x.shape[0], *(1,) * (x.ndim - 2), -1)
            scalars = jnp.asarray(scalars, scale.dtype)
            scale = (scale + scalars @ self.scale_by[...]).reshape(each)
            shift = (shift + scalars @ self.shift_by[...]).reshape(each)
        return ((wide - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + shift).astype(x.dtype)
