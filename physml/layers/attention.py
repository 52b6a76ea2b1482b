"""Attention between all points of a field `(batch, *space, channel)`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.layers.dense import Dense


class SpatialAttention(nnx.Module):
    """`x + output(sum_j a_ij v_j)` with `a = softmax_i(q_i . k_j / sqrt(d))`, over all points i, j of a sample.

    The weights of each key j, not those of each query i, add up to one: as in the U-Nets of pdearena, whose trained
    weights need it so. Cost and memory grow with the square of the number of points.

    Attributes:
        projection: to queries, keys and values, head by head.
        output: back to channels.
    """

    def __init__(self, channels: int, heads: int = 1, head_width: int = 0, *, rngs: nnx.Rngs):
        """`head_width` channels for each head; 0: as many as the field has."""
        self.heads, self.head_width = heads, head_width or channels
        self.projection = Dense(channels, 3 * heads * self.head_width, rngs=rngs)
        self.output = Dense(heads * self.head_width, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space channel"]:
        batch, points = x.shape[0], math.prod(x.shape[1:-1])
        together = self.projection(x).reshape(batch, points, self.heads, 3 * self.head_width)
        query, key, value = jnp.split(together, 3, axis=-1)
        logits = jnp.einsum(
            "bihd,bjhd->bhij", query, key, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
        )
        weights = jax.nn.softmax(logits * self.head_width**-0.5, axis=-2).astype(x.dtype)
        mixed = jnp.einsum("bhij,bjhd->bihd", weights, value).reshape(*x.shape[:-1], self.heads * self.head_width)
        return x + self.output(mixed)
