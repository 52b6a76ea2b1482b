"""Convolution with a stated boundary per axis. Fields here have the channel axis last, `(batch, *space, channel)`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, suggest
from physml.layers.pointwise import uniform

# What a field is taken to be beyond its edge, and the numpy name of the padding.
BOUNDARIES = {"periodic": "wrap", "zero": "constant", "replicate": "edge", "reflect": "reflect"}


def pad_boundary(x: Float[Array, "batch *space channel"], width: int, boundaries: Sequence[str]):
    """Adds `width` cells at both ends of every spatial axis, as `boundaries` say, axis by axis.

    "periodic" wraps round, "replicate" repeats the edge cell, "reflect" mirrors about the edge cell, "zero" is zero.
    Wraps more than once on axes shorter than `width`.
    """
    for axis, boundary in enumerate(boundaries, start=1):
        pads = [(0, 0)] * x.ndim
        pads[axis] = (width, width)
        x = jnp.pad(x, pads, mode=BOUNDARIES[boundary]) if width else x
    return x


class Convolution(nnx.Module):
    """Convolution that keeps the grid: `(batch, *space, inputs)` -> `(batch, *space, outputs)`, one to three axes.

    Attributes:
        weight: `(*kernel, inputs, outputs)`.
        bias: `(outputs,)`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        boundaries: Sequence[str],
        *,
        dilation: int = 1,
        rngs: nnx.Rngs,
    ):
        """An odd `kernel` per axis, its points `dilation` cells apart; one boundary (see `BOUNDARIES`) per axis."""
        for boundary in boundaries:
            if boundary not in BOUNDARIES:
                raise ConfigError(f"There is no boundary {boundary!r}." + suggest(boundary, BOUNDARIES))
        if kernel % 2 == 0 or kernel < 1 or dilation < 1:
            raise ConfigError(
                "A convolution that keeps the grid needs an odd kernel and a positive dilation, but "
                f"kernel={kernel} and dilation={dilation} were given. Use kernel {max(kernel - 1, 1)} or {kernel + 1}."
            )
        ndim = len(boundaries)
        fan_in = inputs * kernel**ndim
        self.kernel, self.dilation, self.boundaries = kernel, dilation, tuple(boundaries)
        self.weight = nnx.Param(uniform(rngs, (*(kernel,) * ndim, inputs, outputs), fan_in))
        self.bias = nnx.Param(uniform(rngs, (outputs,), fan_in))

    def __call__(self, x: Float[Array, "batch *space inputs"]) -> Float[Array, "batch *space outputs"]:
        width = self.dilation * (self.kernel // 2)
        ndim = len(self.boundaries)
        if all(boundary == "zero" for boundary in self.boundaries):
            padding = [(width, width)] * ndim
        else:
            x, padding = pad_boundary(x, width, self.boundaries), "VALID"
        space = "DHW"[3 - ndim :]
        y = jax.lax.conv_general_dilated(
            x, self.weight[...].astype(x.dtype), (1,) * ndim, padding, rhs_dilation=(self.dilation,) * ndim,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        )  # fmt: skip
        return y + self.bias[...].astype(y.dtype)
