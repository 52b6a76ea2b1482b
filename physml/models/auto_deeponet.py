"""Autoregressive DeepONet: the next frame as a sum of learned functions of position with coefficients from this frame.

DeepONet: Lu et al. 2021, arXiv:1910.03193; enhanced by a branch for each input function: Tan & Chen 2022,
arXiv:2202.08942. Autoregressive form: Luo et al. 2023 (CFDBench), arXiv:2310.05963, section 4.
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
from physml.layers.increment import add_and_mask, check_frame_and_mask
from physml.layers.lattice import check_grid, indices
from physml.layers.perceptron import Activation, Perceptron, dense_parameters
from physml.layers.pointwise import activation


@dataclass(frozen=True)
class AutoDeepONetConfig:
    """Choices of an autoregressive DeepONet.

    Attributes:
        width: channels of every layer, and functions in the sum.
        branch_depth, trunk_depth: linear maps of the networks for coefficients and functions.
        branches: "joint": one network reads field and scalars; "separate": one reads the field, one the scalars, and
            what they give is multiplied (Auto-EDeepONet).
        activation: between the maps.
        standardize: activations act in units of the spread of each sample's (or point's) hidden numbers.
        activate_output: activation behind the last map of the branches.
        frame: input channel where the frame starts that the sum is added to: (h - 1) * C for a history of h frames of C
            channels. None: added to nothing.
        mask: input channel that outputs are multiplied by; None: no mask.
        remat: recompute the networks in the backward pass.
        dtype: of the hidden numbers; parameters stay float32.
    """

    width: int = 100
    branch_depth: int = 4
    trunk_depth: int = 4
    branches: Literal["joint", "separate"] = "joint"
    activation: str = "relu"
    standardize: bool = False
    activate_output: bool = False
    frame: int | None = 0
    mask: int | None = None
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, self.branch_depth, self.trunk_depth) < 1 or (self.standardize and self.width < 2):
            raise ConfigError(f"Sizes must be positive, and width 2 to standardize, but {self} was given.")
        activation(self.activation)

    def widths(self, signature: Signature) -> dict[str, list[int]]:
        """Of the layers of every network."""
        field, depth = math.prod(signature.grid.shape) * signature.inputs, self.branch_depth
        inner, last = [self.width] * (depth - 1), self.width * signature.outputs
        trunk = [signature.grid.ndim, *[self.width] * self.trunk_depth]
        if self.branches == "joint":
            return {"branch": [field + signature.scalars, *inner, last], "trunk": trunk}
        if not signature.scalars:
            raise ConfigError("branches='separate' needs scalars to read, but there are none. Use branches='joint'.")
        return {"branch": [field, *inner, last], "conditions": [signature.scalars, *inner, last], "trunk": trunk}

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "AutoDeepONet":
        """The model for a grid. Raises ConfigError when scalars, frame or mask do not fit."""
        return AutoDeepONet(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        return sum(map(dense_parameters, self.widths(signature).values())) + signature.outputs


class AutoDeepONet(nnx.Module):
    """Reads every point of the grid it was built for, and applies to that grid alone.

    The branch reads the field point after point (channels inside), then the scalars; each output has coefficients and a
    bias of its own. The trunk reads (i - 50) / 100 for the index i along each axis, whatever the grid.
    """

    def __init__(self, config: AutoDeepONetConfig, signature: Signature, *, rngs: nnx.Rngs):
        if not 1 <= signature.grid.ndim <= 3:
            raise ConfigError(f"auto_deeponet needs one to three spatial axes, but the grid has {signature.grid.ndim}.")
        check_frame_and_mask(config.frame, config.mask, signature)
        self.config, self.signature = config, signature
        widths, activate = config.widths(signature), Activation(config.activation, standardize=config.standardize)
        self.branch, self.conditions = (
            Perceptron(widths[name], activate, activate_output=config.activate_output, rngs=rngs)
            if name in widths
            else None
            for name in ("branch", "conditions")
        )
        self.trunk = Perceptron(widths["trunk"], activate, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(signature.outputs, jnp.float32))

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        """Raises ConfigError when the fields are on another grid."""
        fields = jnp.asarray(fields)
        coefficients, functions = self.coefficients(fields, scalars), self.functions(fields.dtype)
        outputs = coefficients.shape[-1] // self.config.width
        sums = coefficients.reshape(fields.shape[0], outputs, -1) @ functions.T
        result = jnp.moveaxis(sums, 1, -1).astype(fields.dtype) + self.bias[...].astype(fields.dtype)
        return add_and_mask(result.reshape(*fields.shape[:-1], outputs), fields, self.config.frame, self.config.mask)

    def coefficients(self, fields, scalars) -> Float[Array, "batch coefficients"]:
        """What multiplies the functions, output after output."""
        check_grid("auto_deeponet", self.signature.grid.shape, fields)
        flat, scalars = (self._hidden(x) for x in (jnp.asarray(fields).reshape(fields.shape[0], -1), scalars))
        if self.conditions is None:
            return self._run(self.branch, jnp.concatenate([flat, scalars], axis=-1))
        return self._run(self.branch, flat) * self._run(self.conditions, scalars)

    def functions(self, dtype) -> Float[Array, "point width"]:
        """The learned functions at every point, row-major."""
        return self._run(self.trunk, self._hidden((indices(self.signature.grid.shape) - 50) / 100, dtype))

    def _hidden(self, x, dtype=None):
        wide = jnp.promote_types(dtype or x.dtype, jnp.float32)
        return jnp.asarray(x, wide if self.config.dtype == "float32" else jnp.bfloat16)

    def _run(self, network: Perceptron, x):
        return (jax.checkpoint(lambda x: network(x)) if self.config.remat else network)(x)
