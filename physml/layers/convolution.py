"""Convolution with a stated boundary per axis. Fields here have the channel axis last, `(batch, *space, channel)`."""

import functools
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
            x, padding = pad_boundary(x, width, self.boundaries), [(0, 0)] * ndim
        y = convolve(x, self.weight[...].astype(x.dtype), tuple(padding), self.dilation)
        return y + self.bias[...].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "batch *space inputs"],
    weight: Float[Array, "*kernel inputs outputs"],
    padding: tuple[tuple[int, int], ...],
    dilation: int,
) -> Float[Array, "batch *places outputs"]:
    """Cross-correlation with zero padding; kernel points `dilation` cells apart.

    On CPUs the gradients are written as convolutions with batch first and channels last: XLA rewrites others into that
    order only outside loops, and inside a `lax.scan` they ran 37 times slower.
    """
    return _convolve(x, weight, padding, rhs_dilation=dilation)


def _convolve(x, weight, padding, *, strides: int = 1, rhs_dilation: int = 1):
    ndim = x.ndim - 2
    space = "DHW"[3 - ndim :]
    return jax.lax.conv_general_dilated(
        x, weight, (strides,) * ndim, padding, rhs_dilation=(rhs_dilation,) * ndim,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )  # fmt: skip


def _convolve_forward(x, weight, padding, dilation):
    return convolve(x, weight, padding, dilation), (x, weight)


def _convolve_backward(padding, dilation, saved, gradient):
    def canonical(x, weight, gradient):
        spatial = tuple(range(x.ndim - 2))
        reach = [dilation * (points - 1) for points in weight.shape[:-2]]
        opposite = [(all_ - low, all_ - high) for all_, (low, high) in zip(reach, padding, strict=True)]
        flipped = jnp.flip(weight, spatial).swapaxes(-1, -2)
        of_x = _convolve(gradient, flipped, opposite, rhs_dilation=dilation)
        # The weight's gradient correlates input with gradient, batch and channels in each other's place.
        by_channel = jnp.swapaxes(x, 0, -1)
        kernel = jnp.moveaxis(gradient, 0, -2)
        of_weight = jnp.moveaxis(_convolve(by_channel, kernel, padding, strides=dilation), 0, -2)
        return of_x, of_weight

    def native(x, weight, gradient):
        return jax.vjp(lambda x, w: _convolve(x, w, padding, rhs_dilation=dilation), x, weight)[1](gradient)

    return jax.lax.platform_dependent(*saved, gradient, cpu=canonical, default=native)


convolve.defvjp(_convolve_forward, _convolve_backward)
