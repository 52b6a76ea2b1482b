"""Leaving numbers out in training (Srivastava et al. 2014)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Key = jax.Array


def drop(x: Float[Array, "*any"], share: float, key: Key | None) -> Float[Array, "*any"]:
    """`x` with a `share` of its numbers zero and the others larger, so that the mean stays; `x` without a key."""
    if key is None or not share:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0)
