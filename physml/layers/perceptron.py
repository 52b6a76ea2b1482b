"""Fully connected networks over the last axis."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.layers.dense import Dense
from physml.layers.pointwise import activation


class Activation(nnx.Module):
    """An activation function, alone or in units of its input's own spread.

    `standardize`: `act((x - m) / s) s + m` with mean m and (unbiased) standard deviation s over the last axis, so that
    the function does not depend on the scale of its input.
    """

    def __init__(self, name: str, *, standardize: bool = False):
        self.function, self.standardize = activation(name), standardize

    def __call__(self, x: Float[Array, "*any channel"]) -> Float[Array, "*any channel"]:
        if not self.standardize:
            return self.function(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = wide.mean(-1, keepdims=True)
        variance = jnp.square(wide - mean).sum(-1, keepdims=True) / (x.shape[-1] - 1)
        spread = jnp.sqrt(jnp.where(variance > 0, variance, 1))  # equal numbers stay as they are
        return (self.function((wide - mean) / spread) * spread + mean).astype(x.dtype)


class Perceptron(nnx.Module):
    """Linear maps of the given `widths` with an activation between, and behind if `activate_output`."""

    def __init__(self, widths: Sequence[int], activate: Activation, *, activate_output: bool = False, rngs: nnx.Rngs):
        self.activate, self.activate_output = activate, activate_output
        self.maps = nnx.List([Dense(a, b, rngs=rngs) for a, b in zip(widths, widths[1:])])

    def __call__(self, x: Float[Array, "*any inputs"]) -> Float[Array, "*any outputs"]:
        for i, map_ in enumerate(self.maps):
            x = map_(x)
            x = self.activate(x) if i < len(self.maps) - 1 or self.activate_output else x
        return x


def dense_parameters(widths: Sequence[int]) -> int:
    """Trained numbers of a `Perceptron`."""
    return sum((a + 1) * b for a, b in zip(widths, widths[1:]))
