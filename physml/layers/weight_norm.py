"""Linear maps whose weights are stored as length and direction."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.layers.pointwise import Linear, per_channel, uniform


class WeightNormLinear(nnx.Module):
    """A linear map over the channel axis whose rows are `g v / |v|`: `(inputs, batch, *space)` -> `(outputs, ...)`.

    Salimans & Kingma 2016, arXiv:1602.07868. Computes in the dtype of its input; parameters stay float32.

    Attributes:
        direction: v, `(outputs, inputs)`.
        length: g, `(outputs,)`.
        bias: `(outputs,)`.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        """Starts as the linear map that `Linear` starts as."""
        direction = uniform(rngs, (outputs, inputs), inputs)
        self.direction = nnx.Param(direction)
        self.length = nnx.Param(jnp.sqrt(jnp.sum(direction**2, axis=1)))
        self.bias = nnx.Param(uniform(rngs, (outputs,), inputs))

    def __call__(self, x: Float[Array, "inputs batch *space"]) -> Float[Array, "outputs batch *space"]:
        v = self.direction[...]
        weight = v * (self.length[...] * jax.lax.rsqrt(jnp.sum(v**2, axis=1)))[:, None]
        y = (weight.astype(x.dtype) @ x.reshape(x.shape[0], -1)).reshape(-1, *x.shape[1:])
        return y + per_channel(self.bias[...], y)


def linear(inputs: int, outputs: int, *, weight_norm: bool, rngs: nnx.Rngs) -> nnx.Module:
    """A `WeightNormLinear`, or a `Linear`."""
    return (WeightNormLinear if weight_norm else Linear)(inputs, outputs, rngs=rngs)
