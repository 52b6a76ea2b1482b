"""IFactFormer: attention factorized over the axes, iterated with shared weights like a step of an implicit solver.

Yang et al. 2024, arXiv:2412.18840: IFactFormer-m applies the kernels of all axes in parallel, IFactFormer-o one after
the other. Made for wall-bounded turbulence: kernels and position features see the coordinates of the grid, so axes need
not be uniform.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.conditioning import append_scalars
from physml.layers.dense import Dense
from physml.layers.factorized_attention import FactorizedAttention, FourierPositions
from physml.layers.pointwise import gelu, uniform


@dataclass(frozen=True)
class IFactFormerConfig:
    """Choices of an IFactFormer. The defaults are those of the paper's channel flow.

    Attributes:
        width: channels of the hidden fields, even.
        heads, head_width: of the values that the kernels act on.
        depth: layers with weights of their own.
        iterations: times that each layer is applied, each with 1 / iterations of its output.
        form: "parallel" (IFactFormer-m) or "chained" (IFactFormer-o).
        kernel_multiplier: channels of queries and keys per head over `head_width`.
        kernel_scale: factor of every kernel; above a multiplier of 4 it is 1 / sqrt(channels) instead, as in the
            authors' code.
        rotary: turn queries and keys by angles that grow with the coordinate.
        history: frames that go in. Inputs are packed frame after frame, oldest first: channel t * C + c.
        frame_channels: channels C of a frame, where inputs follow the frames that belong to none (forcing, static
            fields): these, and the scalars, join every frame alike. 0: inputs are frames only.
        whole_waves: on periodic axes, move every frequency of the rotary embedding and of the position features to the
            next whole number of waves per period, so that the two ends meet. The authors' code does not.
        remat: recompute each iteration in the backward pass.
        dtype: of the hidden fields; parameters, kernels and statistics stay float32.
    """

    width: int = 96
    heads: int = 5
    head_width: int = 96
    depth: int = 1
    iterations: int = 10
    form: Literal["parallel", "chained"] = "parallel"
    kernel_multiplier: int = 3
    kernel_scale: float = 1.0
    rotary: bool = True
    history: int = 1
    frame_channels: int = 0
    whole_waves: bool = False
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        numbers = (self.width, self.heads, self.head_width, self.depth, self.iterations, self.kernel_multiplier)
        if min(*numbers, self.history) < 1 or self.frame_channels < 0:
            raise ConfigError(f"Sizes must be positive (frame_channels may be 0), but {self} was given.")
        if self.width % 2:
            raise ConfigError(f"width is {self.width}, but half of it are sines and half cosines: it must be even.")
        if self.rotary and self.kernel_width % 2:
            raise ConfigError(
                f"kernel_multiplier * head_width = {self.kernel_width} channels cannot be turned in pairs: make it "
                "even, or set rotary=False."
            )

    @property
    def kernel_width(self) -> int:
        """Channels of queries and keys per head."""
        return self.kernel_multiplier * self.head_width

    @property
    def scale(self) -> float:
        """What kernels are multiplied by."""
        return self.kernel_width**-0.5 if self.kernel_multiplier > 4 else self.kernel_scale

    def slot(self, signature: Signature) -> tuple[int, int]:
        """Channels of one frame, and channels and scalars that join every frame. Raises ConfigError."""
        each = self.frame_channels or signature.inputs // self.history
        rest = signature.inputs - self.history * each
        if rest < 0 or (rest and not self.frame_channels):
            raise ConfigError(
                f"{signature.inputs} inputs are not history={self.history} frames of "
                f"{self.frame_channels or 'equally many'} channels. Set history to that of the stepper, and "
                "frame_channels to the channels of a frame where forcing or static fields follow."
            )
        return each, rest + signature.scalars

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "IFactFormer":
        """The model for a grid. Raises ConfigError when the inputs do not fit history and width."""
        return IFactFormer(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        width, half, ndim = self.width, self.width // 2, signature.grid.ndim
        values = self.heads * self.head_width
        kernel = width**2 + 2 * width + (width + 1) * 3 * width + 2 * width * self.heads * self.kernel_width
        mixed = ndim if self.form == "parallel" else 1
        block = 2 * width + (1 + mixed) * width * values + 2 * width**2 + ndim * kernel
        ends = 2 * half + self.history * half * width + width * half + (half + 1) * signature.outputs
        return ends + self.depth * ((width + 1) * width + block)


class IFactFormer(nnx.Module):
    """Predicts from the coordinates of the grid it was built for, so its fields must lie on that grid.

    Parameters fit every grid of as many axes: the model is rebuilt for another one.
    """

    def __init__(self, config: IFactFormerConfig, signature: Signature, *, rngs: nnx.Rngs):
        ndim, width, half = signature.grid.ndim, config.width, config.width // 2
        if not 1 <= ndim <= 3:
            raise ConfigError(f"ifactformer needs one to three spatial axes, but the grid has {ndim}.")
        if sum(config.slot(signature)) > half:
            raise ConfigError(
                f"{sum(config.slot(signature))} channels and scalars enter with each frame, but width {width} gives "
                f"them {half} hidden channels to share. Set width to at least {2 * sum(config.slot(signature))}."
            )
        self.config, self.signature = config, signature
        # One input channel feeds each hidden channel; the same weights for every frame.
        self.entry_weight = nnx.Param(uniform(rngs, (half,), 1))
        self.entry_bias = nnx.Param(uniform(rngs, (half,), 1))
        self.entry = Dense(config.history * half, width, bias=False, rngs=rngs)
        self.layers = nnx.List([ImplicitLayer(config, ndim, rngs=rngs) for _ in range(config.depth)])
        self.narrow = Dense(width, half, bias=False, rngs=rngs)
        self.readout = Dense(half, signature.outputs, rngs=rngs)

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[Array, "batch *space outputs"]:
        """Raises ConfigError when the fields are on another grid."""
        u = self.lift(fields, scalars)
        axes, whole = self.signature.grid.axes, self.whole
        for layer in self.layers:
            u = layer.iterate(layer.place(u, axes, whole), layer.attention.tables(axes, whole))
        return self.project(u).astype(fields.dtype)

    @property
    def whole(self) -> tuple[bool, ...]:
        """Axes along which positions are whole waves."""
        return tuple(self.config.whole_waves and periodic for periodic in self.signature.grid.periodic)

    def lift(self, fields, scalars) -> Float[Array, "batch *space width"]:
        """Inputs -> hidden fields."""
        shape = self.signature.grid.shape
        if tuple(fields.shape[1:-1]) != shape:
            raise ConfigError(
                f"This ifactformer knows the coordinates of a grid of {shape} points, but the fields have "
                f"{tuple(fields.shape[1:-1])}. Build it for that grid: its parameters fit any."
            )
        config = self.config
        each, joined = config.slot(self.signature)
        inputs = append_scalars(fields, scalars)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        inputs = inputs.astype(wide if self.config.dtype == "float32" else jnp.bfloat16)
        # As a product with a matrix of one number per column: gradients of a gather are slow.
        half = self.entry_weight.shape[0]
        channel = np.arange(half) * (each + joined) // half  # the input of each hidden channel
        matrix = (np.arange(each + joined)[:, None] == channel) * self.entry_weight[...]
        frames = jnp.split(inputs[..., : config.history * each], config.history, axis=-1)
        others = inputs[..., config.history * each :]
        hidden = [self._enter(jnp.concatenate([frame, others], axis=-1), matrix) for frame in frames]
        return self.entry(jnp.concatenate(hidden, axis=-1))

    def _enter(self, frame, matrix):
        y = jnp.matmul(frame, matrix.astype(frame.dtype), precision=jax.lax.Precision.HIGHEST)
        return gelu(y + self.entry_bias[...].astype(y.dtype))

    def project(self, u: Float[Array, "batch *space width"]) -> Float[Array, "batch *space outputs"]:
        """Hidden fields -> outputs."""
        return self.readout(gelu(self.narrow(u)))


class ImplicitLayer(nnx.Module):
    """Position features, added once, and an attention block, applied again and again."""

    def __init__(self, config: IFactFormerConfig, ndim: int, *, rngs: nnx.Rngs):
        self.iterations, self.remat = config.iterations, config.remat
        self.positions = FourierPositions(ndim, config.width, rngs=rngs)
        self.attention = FactorizedAttention(
            ndim, config.width, config.heads, config.head_width, form=config.form, kernel_width=config.kernel_width,
            rotary=config.rotary, scale=config.scale, rngs=rngs,
        )  # fmt: skip

    def place(self, u: Float[Array, "batch *space width"], axes, whole) -> Float[Array, "batch *space width"]:
        """Adds the position features."""
        return u + self.positions(axes, whole).astype(u.dtype)

    def iterate(self, u: Float[Array, "batch *space width"], tables) -> Float[Array, "batch *space width"]:
        """`u + attention(u) / iterations`, `iterations` times."""
        graph, state = nnx.split(self.attention)

        def step(u, _):
            return u + nnx.merge(graph, state)(u, tables) / self.iterations, None

        return jax.lax.scan(jax.checkpoint(step) if self.remat else step, u, length=self.iterations)[0]
