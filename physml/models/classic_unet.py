"""The classic U-Net: down a pyramid of coarser grids and up again, with the fields of the way down beside.

Ronneberger et al. 2015, arXiv:1505.04597, with batch normalization and boundaries that keep the grid, as CFDBench
trains it (Luo et al. 2023, arXiv:2310.05963); its weights load into it. With group normalization and strided
convolutions it is the network of APEBench (Koehler et al. 2024, arXiv:2411.00180).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Grid, Signature
from physml.layers.batch_norm import BatchNorm
from physml.layers.conditioning import append_scalars
from physml.layers.convolution import Convolution, TransposedConvolution, pad_boundary, resolve_boundaries
from physml.layers.dense import Dense
from physml.layers.group_norm import GroupNorm
from physml.layers.increment import add_and_mask, check_frame_and_mask
from physml.layers.interpolation import interpolate_corners, max_pool


@dataclass(frozen=True)
class ClassicUNetConfig:
    """Choices of a classic U-Net.

    Attributes:
        width: channels on the finest grid; each coarser one has twice as many.
        levels: coarser grids, each with half the points of the one before.
        conditioning: where scalars enter: as constant "input" channels, or through a linear map on the coarsest grid
            ("hidden").
        norm: of each convolution: by the "batch", or of each sample over channels and points ("group").
        downsampling: the largest of two points ("max"; half the points, rounded down), or a convolution of three points
            with stride two ("strided"; rounded up).
        upsampling: by a transposed convolution of two points ("transposed") or three ("overlapping"), or by linear
            interpolation between the corner points ("bilinear"), which has half as many channels on the coarse grids.
        boundary: of convolutions on every axis; "auto": periodic axes wrap round, others repeat the edge cell.
        frame: input channel where the frame starts that the result is added to: (h - 1) * C for a history of h frames
            of C channels. None: added to nothing.
        mask: input channel that outputs are multiplied by; None: no mask.
        remat: recompute each pair of convolutions in the backward pass.
        dtype: of the hidden fields; parameters and statistics stay float32.
    """

    width: int = 12
    levels: int = 4
    conditioning: Literal["input", "hidden"] = "input"
    norm: Literal["batch", "group"] = "batch"
    downsampling: Literal["max", "strided"] = "max"
    upsampling: Literal["transposed", "overlapping", "bilinear"] = "transposed"
    boundary: Literal["auto", "periodic", "zero", "replicate", "reflect"] = "auto"
    frame: int | None = 0
    mask: int | None = None
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        if min(self.width, self.levels) < 1:
            raise ConfigError(f"Sizes must be positive, but {self} was given.")

    def boundaries(self, grid: Grid) -> tuple[str, ...]:
        """Of every axis."""
        return resolve_boundaries(self.boundary, grid.periodic, beyond="replicate")

    def down(self, inputs: int) -> list[tuple[int, int]]:
        """Channels in and out of the convolutions on each grid on the way down, the finest first."""
        widths = [self.width * 2**level for level in range(self.levels + 1)]
        widths[-1] //= self._halved
        return list(zip([inputs, *widths], widths))

    def up(self) -> list[tuple[int, int, int]]:
        """Channels in, between and out of the convolutions on the way up, the coarsest of them first."""
        result = []
        for level in reversed(range(self.levels)):
            inputs, outputs = self.width * 2 ** (level + 1), self.width * 2**level
            outputs = outputs // self._halved if level else outputs
            result.append((inputs, inputs // 2 if self.upsampling == "bilinear" else outputs, outputs))
        return result

    @property
    def _halved(self) -> int:
        return 2 if self.upsampling == "bilinear" else 1

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "ClassicUNet":
        """The model for a grid. Raises ConfigError for a grid that cannot be halved `levels` times."""
        return ClassicUNet(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        ndim = signature.grid.ndim
        at_input = signature.scalars if self.conditioning == "input" else 0

        def pair(inputs, inner, outputs):
            return (3**ndim * inputs + 3) * inner + (3**ndim * inner + 3) * outputs

        down = self.down(signature.inputs + at_input)
        count = sum(pair(a, b, b) for a, b in down) + sum(pair(*channels) for channels in self.up())
        if self.upsampling != "bilinear":
            taps = (3 if self.upsampling == "overlapping" else 2) ** ndim
            count += sum((taps * inputs + 1) * (inputs // 2) for inputs, *_ in self.up())
        if self.downsampling == "strided":
            count += sum((3**ndim * outputs + 1) * outputs for _, outputs in down[:-1])
        if self.conditioning == "hidden" and signature.scalars:
            count += (signature.scalars + 1) * down[-1][1]
        return count + (self.width + 1) * signature.outputs


class ClassicUNet(nnx.Module):
    """Applies to any grid of the same number of axes that can be halved `levels` times.

    Input channels in order: fields, scalars (constant in space).
    """

    def __init__(self, config: ClassicUNetConfig, signature: Signature, *, rngs: nnx.Rngs):
        ndim = signature.grid.ndim
        if not 1 <= ndim <= 3:
            raise ConfigError(f"classic_unet needs one to three spatial axes, but the grid has {ndim}.")
        check_halves(config.levels, signature.grid.shape)
        check_frame_and_mask(config.frame, config.mask, signature)
        self.config, self.signature = config, signature
        boundaries = config.boundaries(signature.grid)
        hidden = config.conditioning == "hidden"
        down = config.down(signature.inputs + (0 if hidden else signature.scalars))
        self.down = nnx.List([ConvolutionPair(a, b, b, boundaries, config.norm, rngs=rngs) for a, b in down])
        strided = config.downsampling == "strided"
        self.shrink = (
            nnx.List([Convolution(b, b, 3, boundaries, stride=2, rngs=rngs) for _, b in down[:-1]]) if strided else None
        )
        coarsest = down[-1][1]
        self.conditions = Dense(signature.scalars, coarsest, rngs=rngs) if hidden and signature.scalars else None
        self.up = nnx.List(
            [UpwardStep(*channels, config.upsampling, boundaries, config.norm, rngs=rngs) for channels in config.up()]
        )
        self.readout = Convolution(config.width, signature.outputs, 1, boundaries, rngs=rngs)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        """Raises ConfigError for a grid that cannot be halved often enough."""
        *finer, x = self.descend(fields, scalars)
        outputs = self.readout(self.ascend(x, finer)[-1]).astype(fields.dtype)
        return add_and_mask(outputs, jnp.asarray(fields), self.config.frame, self.config.mask)

    def descend(self, fields, scalars) -> list[Float[Array, "batch *coarser channel"]]:
        """Hidden fields on every grid, finest first; scalars are in the last."""
        check_halves(self.config.levels, fields.shape[1:-1])
        inputs = append_scalars(fields, scalars) if self.config.conditioning == "input" else jnp.asarray(fields)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        x = inputs.astype(wide if self.config.dtype == "float32" else jnp.bfloat16)
        states = []
        for i, pair in enumerate(self.down):
            if i:
                x = max_pool(x) if self.shrink is None else self.shrink[i - 1](x)
            x = self._apply(pair, x)
            states.append(x)
        if self.conditions is not None:
            shift = self.conditions(jnp.asarray(scalars).astype(x.dtype))
            states[-1] = x + shift.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)
        return states

    def ascend(self, x, finer) -> list[Float[Array, "batch *finer channel"]]:
        """Hidden fields on the way up, coarsest first: each from the one before and that of the way down."""
        states = [x]
        for step, beside in zip(self.up, reversed(finer), strict=True):
            states.append(self._apply(step, states[-1], beside))
        return states[1:]

    def _apply(self, block, *inputs):
        call = type(block).__call__
        return (nnx.remat(call) if self.config.remat else call)(block, *inputs)


def check_halves(levels: int, shape: tuple[int, ...]) -> None:
    """Raises ConfigError when an axis runs out of points on the way down."""
    if min(shape) < 2**levels:
        raise ConfigError(
            f"A classic_unet of {levels} levels halves every axis {levels} times, but the grid has {tuple(shape)} "
            f"points and each axis needs {2**levels}. Lower levels to at most {max(min(shape).bit_length() - 1, 0)}, "
            "or use a finer grid."
        )


class ConvolutionPair(nnx.Module):
    """`relu(norm(conv(relu(norm(conv(x))))))` with kernels of three points."""

    def __init__(self, inputs: int, inner: int, outputs: int, boundaries, norm: str, *, rngs: nnx.Rngs):
        self.first = Convolution(inputs, inner, 3, boundaries, rngs=rngs)
        self.second = Convolution(inner, outputs, 3, boundaries, rngs=rngs)
        normalize = BatchNorm if norm == "batch" else GroupNorm
        self.norms = nnx.List([normalize(inner), normalize(outputs)])

    def __call__(self, x: Float[Array, "batch *space inputs"]) -> Float[Array, "batch *space outputs"]:
        for convolution, norm in zip((self.first, self.second), self.norms, strict=True):
            x = jax.nn.relu(norm(convolution(x)))
        return x


class UpwardStep(nnx.Module):
    """From a coarse grid to the next finer one, whose field from the way down is put beside."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, upsampling: str, boundaries, norm: str, *, rngs: nnx.Rngs
    ):
        taps, ndim = {"transposed": 2, "overlapping": 3, "bilinear": 0}[upsampling], len(boundaries)
        self.grow = TransposedConvolution(inputs, inputs // 2, taps, 2, taps - 2, ndim, rngs=rngs) if taps else None
        self.beyond = tuple(boundaries) if taps == 3 else None  # three points reach one cell beyond the edge
        self.pair = ConvolutionPair(inputs, inner, outputs, boundaries, norm, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch *coarse channel"], beside: Float[Array, "batch *space other"]
    ) -> Float[Array, "batch *space outputs"]:
        space = beside.shape[1:-1]
        if self.grow is None:
            x = interpolate_corners(x, [2 * points for points in x.shape[1:-1]])
        else:
            x = self.grow(x if self.beyond is None else pad_boundary(x, [(0, 1)] * len(space), self.beyond))
        x = x[:, *map(slice, space)]
        # Where halving had left out a point there is one too few: zeros, half of them before.
        missing = [n - m for n, m in zip(space, x.shape[1:-1], strict=True)]
        x = jnp.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)]) if any(missing) else x
        return self.pair(jnp.concatenate([beside, x], axis=-1))
