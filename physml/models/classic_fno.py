"""The Fourier neural operator of the 2021 paper's code, in one to three dimensions.

Li et al. 2021, arXiv:2010.08895; two-dimensional checkpoints of CFDBench (Luo et al. 2023, arXiv:2310.05963) load into
it. It differs from `fno` in the block, `GELU(spectral(x) + linear(x))` throughout, in weights for modes -m .. m-1, and
in positions that include the end point. Without positions and with `projection=0` it is the network of APEBench
(Koehler et al. 2024, arXiv:2411.00180).
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.conditioning import append_positions, append_scalars
from physml.layers.pointwise import ChannelMLP, Linear, activation
from physml.layers.sequence import apply_in_turn
from physml.layers.spectral import SpectralConvolution


@dataclass(frozen=True)
class ClassicFNOConfig:
    """Choices of the 2021 Fourier neural operator.

    Attributes:
        width: channels of the hidden fields.
        modes: wavenumbers kept of either sign: m keeps -m .. m-1 (0 .. m-1 along the last axis). One number serves
            every axis.
        depth: Fourier blocks.
        projection: hidden channels of the readout; 0: one linear map.
        positions: append the coordinates of every point, in [0, 1] with both ends, to the input.
        activation: after each block; that of the readout is GELU.
        small_start: spectral weights start with a standard deviation of sqrt(2) / width^2, near that of the 2021 code,
            instead of 1 / sqrt(width).
        padding: zeros appended to the end of every axis, for fields that are not periodic.
        spectral: path of the transform; "auto" takes the cheaper one on each grid.
        allow_excess_modes: accept 2m > n: the block of negative wavenumbers then wins, as in the 2021 code.
        remat: recompute each block in the backward pass.
        dtype: of the hidden fields; parameters and transforms stay float32.
    """

    width: int = 32
    modes: tuple[int, ...] = (12,)
    depth: int = 4
    projection: int = 128
    positions: bool = True
    activation: str = "gelu"
    small_start: bool = False
    padding: int = 0
    spectral: Literal["auto", "fft", "matmul"] = "auto"
    allow_excess_modes: bool = False
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        numbers = (self.width, self.depth, len(self.modes), *self.modes)
        if min(numbers) < 1 or min(self.projection, self.padding) < 0:
            raise ConfigError(f"Sizes must be positive (projection and padding may be 0), but {self} was given.")
        activation(self.activation)

    def kept(self, ndim: int) -> tuple[int, ...]:
        """Frequencies kept along each of `ndim` axes."""
        if len(self.modes) not in (1, ndim):
            raise ConfigError(f"modes={self.modes} has {len(self.modes)} numbers, but the grid has {ndim} axes.")
        modes = self.modes * (ndim if len(self.modes) == 1 else 1)
        return (*(2 * m for m in modes[:-1]), modes[-1])

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "ClassicFNO":
        """The model for a grid. Raises ConfigError when the modes do not fit the grid."""
        return ClassicFNO(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model, complex ones counted twice."""
        ndim, width = signature.grid.ndim, self.width
        inputs = signature.inputs + signature.scalars + ndim * self.positions
        block = 2 * width**2 * math.prod(self.kept(ndim)) + (width + 1) * width
        hidden, outputs = self.projection, signature.outputs
        readout = (width + 1) * hidden + (hidden + 1) * outputs if hidden else (width + 1) * outputs
        return (inputs + 1) * width + self.depth * block + readout


class ClassicFNO(nnx.Module):
    """Applies to fields on any grid of the same number of axes. Input channels in order: fields, positions, scalars."""

    def __init__(self, config: ClassicFNOConfig, signature: Signature, *, rngs: nnx.Rngs):
        self.config, self.signature = config, signature
        ndim = signature.grid.ndim
        if not 1 <= ndim <= 3:
            raise ConfigError(f"classic_fno needs one to three spatial axes, but the grid has {ndim}.")
        _check_modes(config, tuple(n + config.padding for n in signature.grid.shape))
        inputs = signature.inputs + signature.scalars + ndim * config.positions
        self.lifting = Linear(inputs, config.width, rngs=rngs)
        self.blocks = nnx.List([ClassicBlock(config, ndim, rngs=rngs) for _ in range(config.depth)])
        self.projection = ChannelMLP(config.width, config.projection, signature.outputs, rngs=rngs)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        hidden = apply_in_turn(self.blocks, self.pad(self.lift(fields, scalars)), remat=self.config.remat)
        return self.project(self.crop(hidden, fields.shape[1:-1])).astype(fields.dtype)

    def lift(self, fields, scalars):
        """Inputs -> hidden fields `(width, batch, *space)`."""
        inputs = append_scalars(append_positions(fields, endpoint=True) if self.config.positions else fields, scalars)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        dtype = wide if self.config.dtype == "float32" else jnp.bfloat16
        return self.lifting(jnp.moveaxis(inputs, -1, 0).astype(dtype))

    def pad(self, hidden):
        """Appends `padding` zeros to the end of every axis."""
        cells = self.config.padding
        return jnp.pad(hidden, [(0, 0), (0, 0), *(((0, cells),) * (hidden.ndim - 2))]) if cells else hidden

    def crop(self, hidden, shape: tuple[int, ...]):
        """Removes what `pad` appended."""
        return hidden[:, :, *(slice(n) for n in shape)] if self.config.padding else hidden

    def project(self, hidden):
        """Hidden fields -> `(batch, *space, outputs)`."""
        return jnp.moveaxis(self.projection(hidden), 0, -1)


def _check_modes(config: ClassicFNOConfig, shape: tuple[int, ...]) -> None:
    modes = config.modes * (len(shape) if len(config.modes) == 1 else 1)
    config.kept(len(shape))  # raises when the number of modes does not fit the axes
    most = (*(n // 2 for n in shape[:-1]), shape[-1] // 2 + 1)
    if not config.allow_excess_modes and any(m > n for m, n in zip(modes, most, strict=True)):
        raise ConfigError(
            f"classic_fno keeps modes={modes} of either sign, but the grid (with padding) has {shape} points, which "
            f"carry at most {most}. Lower modes to at most {tuple(map(min, modes, most))}, use a finer grid, or set "
            "allow_excess_modes."
        )


class ClassicBlock(nnx.Module):
    """`act(spectral(x) + linear(x))`."""

    def __init__(self, config: ClassicFNOConfig, ndim: int, *, rngs: nnx.Rngs):
        self.convolution = SpectralConvolution(
            config.width, config.width, config.kept(ndim), bias=False, path=config.spectral, excess="end",
            scale=math.sqrt(2) / config.width**2 if config.small_start else None, rngs=rngs,
        )  # fmt: skip
        self.linear = Linear(config.width, config.width, rngs=rngs)
        self.activate = activation(config.activation)

    def __call__(self, x: Float[Array, "width batch *space"]) -> Float[Array, "width batch *space"]:
        return self.activate(self.convolution(x) + self.linear(x))
