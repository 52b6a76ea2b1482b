"""Scalars of a sample (time, lead, parameters of the equation) as one vector that conditions a network."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.layers.dense import MLP
from physml.layers.pointwise import gelu

LONGEST = 10000.0  # period of the slowest wave over 2 pi


def sinusoidal(values: Float[Array, " batch"], channels: int) -> Float[Array, " batch channels"]:
    """`[cos(f_j value), sin(f_j value)]` with `f_j = 10000^(-j / half)`, j = 0 .. half - 1, half = channels // 2.

    float32; an odd number of channels ends with a zero. Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in the
    order of Ho et al. 2020, arXiv:2006.11239.
    """
    half = channels // 2
    # Formed in float32 as the published networks do: at a value of 1000 a last digit of f is 6e-5 of an angle.
    exponents = np.float32(-np.log(LONGEST)) * np.arange(half, dtype=np.float32) / np.float32(max(half, 1))
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = values.astype(jnp.float32)[:, None] * frequencies
    zero = [jnp.zeros((values.shape[0], 1), jnp.float32)] if channels % 2 else []
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), *zero], axis=-1)


class ScalarEmbedding(nnx.Module):
    """Sum over the scalars of a perceptron of each one's waves: `(batch, scalars)` -> `(batch, 4 channels)`."""

    def __init__(self, scalars: int, channels: int, *, activate: Callable = gelu, rngs: nnx.Rngs):
        self.channels = channels
        self.perceptrons = nnx.List(
            [MLP(channels, 4 * channels, 4 * channels, activate=activate, rngs=rngs) for _ in range(scalars)]
        )

    def __call__(self, scalars: Float[Array, "batch scalars"]) -> Float[Array, "batch embedding"]:
        parts = [perceptron(sinusoidal(scalars[:, i], self.channels)) for i, perceptron in enumerate(self.perceptrons)]
        return sum(parts[1:], start=parts[0])
