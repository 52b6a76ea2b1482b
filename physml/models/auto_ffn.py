"""Autoregressive fully connected network: reads a whole frame and a position, and gives the next frame there.

Auto-FFN of Luo et al. 2023 (CFDBench), arXiv:2310.05963, section 4.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.dense import Dense
from physml.layers.increment import add_and_mask, check_frame_and_mask
from physml.layers.lattice import check_grid, indices
from physml.layers.perceptron import Activation, Perceptron, dense_parameters
from physml.layers.pointwise import activation


@dataclass(frozen=True)
class AutoFFNConfig:
    """Choices of an autoregressive fully connected network.

    Attributes:
        width: channels of the hidden layers.
        depth: hidden layers.
        activation: behind each of them.
        standardize: activations act in units of the spread of each point's hidden numbers.
        mix_batch: reproduce the published code, which pairs point k of sample b with sample (b K + k) mod B of a batch
            of B samples on K points. Off, every sample reads itself; for B = 1 both are equal.
        frame: input channel where the frame starts that the result is added to: (h - 1) * C for a history of h frames
            of C channels. None: added to nothing.
        mask: input channel that outputs are multiplied by; None: no mask.
        remat: recompute the hidden layers in the backward pass.
        dtype: of the hidden numbers; parameters stay float32.
    """

    width: int = 100
    depth: int = 8
    activation: str = "relu"
    standardize: bool = False
    mix_batch: bool = False
    frame: int | None = 0
    mask: int | None = None
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, self.depth) < 1 or (self.standardize and self.width < 2):
            raise ConfigError(f"Sizes must be positive, and width 2 to standardize, but {self} was given.")
        activation(self.activation)

    def widths(self, signature: Signature) -> list[int]:
        """Of all layers."""
        field = math.prod(signature.grid.shape) * signature.inputs
        inputs = field + signature.scalars + signature.grid.ndim
        return [inputs, *[self.width] * self.depth, signature.outputs]

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "AutoFFN":
        """The model for a grid. Raises ConfigError when frame or mask do not fit the inputs."""
        return AutoFFN(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        return dense_parameters(self.widths(signature))


class AutoFFN(nnx.Module):
    """Reads every point of the grid it was built for, and applies to that grid alone.

    Input numbers in order: the field point after point (channels inside), the scalars, the index along each axis.
    """

    def __init__(self, config: AutoFFNConfig, signature: Signature, *, rngs: nnx.Rngs):
        if not 1 <= signature.grid.ndim <= 3:
            raise ConfigError(f"auto_ffn needs one to three spatial axes, but the grid has {signature.grid.ndim}.")
        check_frame_and_mask(config.frame, config.mask, signature)
        self.config, self.signature = config, signature
        first, *others = config.widths(signature)
        self.activate = Activation(config.activation, standardize=config.standardize)
        self.entry = Dense(first, others[0], rngs=rngs)
        self.rest = Perceptron(others, self.activate, rngs=rngs)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        """Raises ConfigError when the fields are on another grid."""
        fields = jnp.asarray(fields)
        change = self.change(fields, scalars).astype(fields.dtype).reshape(*fields.shape[:-1], -1)
        return add_and_mask(change, fields, self.config.frame, self.config.mask)

    def change(self, fields, scalars) -> Float[Array, "batch point outputs"]:
        """What is added to the frame."""
        shape = self.signature.grid.shape
        check_grid("auto_ffn", shape, fields)
        wide = jnp.promote_types(fields.dtype, jnp.float32)
        dtype = wide if self.config.dtype == "float32" else jnp.bfloat16
        sample = jnp.concatenate([fields.reshape(fields.shape[0], -1), scalars], axis=-1).astype(dtype)
        weight, bias = (parameter[...].astype(dtype) for parameter in (self.entry.weight, self.entry.bias))
        # The first layer is linear: the field is read once per sample, not once per point.
        by_sample = sample @ weight[: sample.shape[-1]] + bias
        by_point = jnp.asarray(indices(shape), dtype) @ weight[sample.shape[-1] :]
        if self.config.mix_batch:
            batch, points = fields.shape[0], by_point.shape[0]
            by_sample = by_sample[jnp.arange(batch * points).reshape(batch, points) % batch]
        else:
            by_sample = by_sample[:, None]

        def rest(hidden):
            return self.rest(self.activate(hidden))

        return (jax.checkpoint(rest) if self.config.remat else rest)(by_sample + by_point)
