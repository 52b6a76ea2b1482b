"""What is appended to a model's input: scalars that condition a sample, and the position of every point."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.fields import ArrayLike


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
