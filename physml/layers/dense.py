"""Linear maps over the last axis, for hidden fields `(batch, *space, channel)`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.layers.pointwise import gelu, uniform


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> Array:
    """Normal numbers of mean zero and that deviation.

    Drawn in powers of two and cut, so that a network of a hundred shapes compiles a handful of draws; outside of a
    trace the rest is done on the host. The numbers are the same there and in a trace.
    """
    count = math.prod(shape)
    drawn = jax.random.normal(rngs.params(), (max(2 ** (count - 1).bit_length(), 4096),))
    drawn = drawn if isinstance(drawn, jax.core.Tracer) else np.asarray(drawn)
    return jnp.asarray(drawn[:count].reshape(shape) * np.float32(deviation))


def constant(shape: int | tuple[int, ...], value: float = 0.0) -> Array:
    """An array of one number, made without a compilation."""
    return jnp.asarray(np.full(shape, value, np.float32))


class Dense(nnx.Module):
    """`x @ weight + bias` over the last axis: `(..., inputs)` -> `(..., outputs)`.

    Computes in the dtype of its input; parameters stay float32.

    Attributes:
        weight: `(inputs, outputs)`.
        bias: `(outputs,)`, or None.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, deviation: float | None = None, rngs: nnx.Rngs):
        """Weights start from the normal distribution of that `deviation` and biases from 0, or both as in PyTorch."""
        self.weight = nnx.Param(
            uniform(rngs, (inputs, outputs), inputs)
            if deviation is None
            else normal(rngs, (inputs, outputs), deviation)
        )
        if not bias:
            self.bias = None
        else:
            self.bias = nnx.Param(uniform(rngs, (outputs,), inputs) if deviation is None else constant(outputs))

    def __call__(self, x: Float[Array, "*any inputs"]) -> Float[Array, "*any outputs"]:
        # One flat product: both of its gradients are plain matrix products too.
        y = (x.reshape(-1, x.shape[-1]) @ self.weight[...].astype(x.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """Two linear maps over the last axis with an activation between."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        activate: Callable = gelu,
        last_bias: bool = True,
        deviation: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.activate = activate
        self.first = Dense(inputs, hidden, deviation=deviation, rngs=rngs)
        self.second = Dense(hidden, outputs, bias=last_bias, deviation=deviation, rngs=rngs)

    def __call__(self, x: Float[Array, "*any inputs"]) -> Float[Array, "*any outputs"]:
        return self.second(self.activate(self.first(x)))
