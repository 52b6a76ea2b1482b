"""Factorized Fourier neural operator: many thin layers, each of which mixes frequencies along one axis at a time.

Tran et al. 2023, arXiv:2111.13802, in one to three dimensions. The order of operations is that of the authors' code as
it is used for PDE benchmarks, where the network predicts the next frame.
"""

import math
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
from physml.layers.conditioning import LayerNorm, append_scalars, grid_positions
from physml.layers.dropout import drop
from physml.layers.spectral import SpectralConvolution, low_pass
from physml.layers.stack import Stack
from physml.layers.weight_norm import linear
from physml.normalize import Scaling


@dataclass(frozen=True)
class FFNOConfig:
    """Choices of a factorized Fourier neural operator.

    Attributes:
        width: channels of the hidden fields.
        modes: frequencies 0 .. m-1 kept along each axis; an axis of n points carries n // 2 + 1. One number serves
            every axis.
        depth: layers.
        expansion: hidden width of the feed-forward part of a layer over `width`.
        feedforward_layers: linear maps of that part, ReLU between.
        mixing: "full" multiplies the kept frequencies by weights, "low-pass" only keeps them, "none" leaves the field.
        share_fourier: one set of Fourier weights for all layers.
        share_feedforward: one feed-forward part for all layers.
        gain: of the initial Fourier weights where they are shared.
        weight_norm: store every linear map as lengths and directions.
        layer_norm: normalize the channels at the end of each feed-forward part.
        projection: hidden channels of the readout.
        positions: append the position of every point along each axis, with mean 0 and variance 1, to the input.
        noise: standard deviation of what is added to all inputs, positions included, in training.
        dropout: share of the numbers after each linear map of a layer that is left out in training.
        input_dropout: the same for the hidden fields that enter the first layer.
        normalize: keep mean and deviation of the inputs and outputs with the model and apply them. For weights that
            were trained so; a stepper normalizes by itself.
        spectral: path of the transforms; "auto" takes the cheaper one on each grid.
        remat: recompute each layer in the backward pass.
        dtype: of the hidden fields; parameters, transforms and statistics stay float32.
    """

    width: int = 64
    modes: tuple[int, ...] = (16,)
    depth: int = 24
    expansion: int = 4
    feedforward_layers: int = 2
    mixing: Literal["full", "low-pass", "none"] = "full"
    share_fourier: bool = False
    share_feedforward: bool = False
    gain: float = 0.1
    weight_norm: bool = True
    layer_norm: bool = False
    projection: int = 128
    positions: bool = True
    noise: float = 0.0
    dropout: float = 0.0
    input_dropout: float = 0.0
    normalize: bool = False
    spectral: Literal["auto", "fft", "matmul"] = "auto"
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        numbers = (self.width, self.depth, self.expansion, self.feedforward_layers, self.projection, *self.modes)
        if min(*numbers, len(self.modes)) < 1:
            raise ConfigError(f"Sizes must be positive, but {self} was given.")
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it is a share: 0 or more and below 1.")
        if self.noise < 0:
            raise ConfigError(f"noise is {self.noise}, but a standard deviation is not negative.")

    def modes_on(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Frequencies kept along each axis of a grid. Raises ConfigError when they do not fit it."""
        if len(self.modes) not in (1, len(shape)):
            raise ConfigError(f"modes={self.modes} has {len(self.modes)} numbers, but the grid has {len(shape)} axes.")
        modes = self.modes * (len(shape) if len(self.modes) == 1 else 1)
        most = tuple(n // 2 + 1 for n in shape)
        if self.mixing != "none" and any(m > n for m, n in zip(modes, most, strict=True)):
            raise ConfigError(
                f"ffno keeps modes={modes}, but a grid of {shape} points carries {most}. Lower modes to at most "
                f"{tuple(map(min, modes, most))}, or use a finer grid."
            )
        return modes

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "FFNO":
        """The model for a grid. Raises ConfigError when the modes do not fit the grid."""
        return FFNO(self, signature, rngs=rngs)

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model, complex ones counted twice."""
        width, hidden, last = self.width, self.width * self.expansion, self.feedforward_layers - 1

        def map_(inputs, outputs):
            return (inputs + 1 + self.weight_norm) * outputs

        widths = [width, *[hidden] * last, width]
        feedforward = sum(map_(a, b) for a, b in zip(widths, widths[1:])) + 2 * width * self.layer_norm
        fourier = 2 * width**2 * sum(self.modes_on(signature.grid.shape)) * (self.mixing == "full")
        layers = fourier * (1 if self.share_fourier else self.depth)
        layers += feedforward * (1 if self.share_feedforward else self.depth)
        inputs = signature.inputs + signature.scalars + signature.grid.ndim * self.positions
        return map_(inputs, width) + layers + map_(width, self.projection) + map_(self.projection, signature.outputs)


class FFNO(nnx.Module):
    """Applies to fields on any grid of the same number of axes that carries its modes.

    Input channels in order: fields, scalars (constant in space), positions.
    """

    def __init__(self, config: FFNOConfig, signature: Signature, *, rngs: nnx.Rngs):
        ndim = signature.grid.ndim
        if not 1 <= ndim <= 3:
            raise ConfigError(f"ffno needs one to three spatial axes, but the grid has {ndim}.")
        modes = config.modes_on(signature.grid.shape)
        self.config, self.signature = config, signature
        # Whatever is drawn in training needs the key that models with `dropout` are given.
        self.dropout, self.deterministic = max(config.dropout, config.input_dropout, config.noise), True
        self.entering, self.leaving = (
            Scaling(np.zeros(n), np.ones(n)) if config.normalize else None
            for n in (signature.inputs, signature.outputs)
        )
        inputs = signature.inputs + signature.scalars + ndim * config.positions
        self.lifting = linear(inputs, config.width, weight_norm=config.weight_norm, rngs=rngs)
        full = config.mixing == "full"
        self.fourier = FourierMixing(config, modes, rngs=rngs) if full and config.share_fourier else None
        self.feedforward = FeedForward(config, rngs=rngs) if config.share_feedforward else None
        self.layers = Stack(lambda rngs: Layer(config, modes, rngs=rngs), config.depth, rngs=rngs)
        self.projection, self.readout = (
            linear(a, b, weight_norm=config.weight_norm, rngs=rngs)
            for a, b in ((config.width, config.projection), (config.projection, signature.outputs))
        )

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"], key=None
    ) -> Float[Array, "batch *space outputs"]:
        """`key`, a typed PRNG key, draws noise and what is dropped; without one, or after `eval()`, there is none."""
        key = None if self.deterministic or not self.dropout else key
        return self.project(self.run(self.lift(fields, scalars, key), key)).astype(fields.dtype)

    def lift(self, fields, scalars, key=None) -> Float[Array, "width batch *space"]:
        """Inputs -> hidden fields."""
        self.config.modes_on(tuple(fields.shape[1:-1]))
        fields = jnp.asarray(fields)
        inputs = append_scalars(fields if self.entering is None else self.entering(fields), scalars)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        if self.config.positions:
            positions = jnp.asarray(standard_positions(inputs.shape[1:-1]), wide)
            positions = jnp.broadcast_to(positions, (*inputs.shape[:-1], positions.shape[-1]))
            inputs = jnp.concatenate([inputs.astype(wide), positions], axis=-1)
        if key is not None and self.config.noise:
            inputs = inputs + self.config.noise * jax.random.normal(jax.random.fold_in(key, 0), inputs.shape)
        dtype = wide if self.config.dtype == "float32" else jnp.bfloat16
        hidden = self.lifting(jnp.moveaxis(inputs, -1, 0).astype(dtype))
        return drop(hidden, self.config.input_dropout, None if key is None else jax.random.fold_in(key, 1))

    def run(self, hidden: Float[Array, "width batch *space"], key=None, visit=None):
        """What the last layer adds to its input; the readout reads that alone. `visit(i, (x, added))` sees all."""

        def apply(layer, state, _, number):
            x, _ = state
            own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, 2), number)
            mixed = self.mix(layer, x)
            added = (layer.feedforward or self.feedforward)(mixed, own)
            return x + added, added

        numbers = jnp.arange(self.config.depth)
        return self.layers((hidden, hidden), apply, [None], numbers, remat=self.config.remat, visit=visit)[1]

    def mix(self, layer: "Layer", x):
        """The Fourier part of a layer."""
        if self.config.mixing == "full":
            return (layer.fourier or self.fourier)(x)
        if self.config.mixing == "none":
            return x
        modes = self.config.modes_on(x.shape[2:])
        path = self.config.spectral
        return sum(by_axis(x, i, lambda y, m=m: low_pass(y, (m,), path=path)) for i, m in enumerate(modes))

    def project(self, added: Float[Array, "width batch *space"]) -> Float[Array, "batch *space outputs"]:
        """What the last layer added -> outputs. No activation between the two maps."""
        outputs = jnp.moveaxis(self.readout(self.projection(added)), 0, -1)
        return outputs if self.leaving is None else self.leaving.invert(outputs)


class Layer(nnx.Module):
    """Weights that belong to one layer only; None where they are shared or there are none."""

    def __init__(self, config: FFNOConfig, modes: tuple[int, ...], *, rngs: nnx.Rngs):
        own = config.mixing == "full" and not config.share_fourier
        self.fourier = FourierMixing(config, modes, rngs=rngs) if own else None
        self.feedforward = None if config.share_feedforward else FeedForward(config, rngs=rngs)


class FourierMixing(nnx.Module):
    """The sum of spectral convolutions along each axis alone. No bias."""

    def __init__(self, config: FFNOConfig, modes: tuple[int, ...], *, rngs: nnx.Rngs):
        width, gain = config.width, config.gain if config.share_fourier else 1.0
        self.axes = nnx.List(
            [SpectralConvolution(width, width, (m,), bias=False, path=config.spectral, rngs=rngs) for m in modes]
        )
        for axis, m in zip(self.axes, modes, strict=True):
            # The normal distribution of Glorot & Bengio 2010 for a real array (in, out, modes, 2).
            deviation = gain * math.sqrt(2 / (2 * m * 2 * width))
            shape = axis.weight[...].shape
            axis.weight[...] = deviation * jax.random.normal(rngs.params(), shape)

    def __call__(self, x: Float[Array, "width batch *space"]) -> Float[Array, "width batch *space"]:
        return sum(by_axis(x, i, axis) for i, axis in enumerate(self.axes))


def by_axis(x: Float[Array, "channel batch *space"], axis: int, function) -> Float[Array, "channel batch *space"]:
    """`function`, which takes `(channel, batch, points)`, along one spatial axis, all others counted as batch."""
    moved = jnp.moveaxis(x, axis + 2, -1)
    y = function(moved.reshape(moved.shape[0], -1, moved.shape[-1]))
    return jnp.moveaxis(y.reshape(moved.shape), -1, axis + 2)


class FeedForward(nnx.Module):
    """Linear maps at every point, with ReLU between and, if wanted, a norm over channels at the end."""

    def __init__(self, config: FFNOConfig, *, rngs: nnx.Rngs):
        self.dropout = config.dropout
        inner = [config.width * config.expansion] * (config.feedforward_layers - 1)
        widths = [config.width, *inner, config.width]
        self.maps = nnx.List(
            [linear(a, b, weight_norm=config.weight_norm, rngs=rngs) for a, b in zip(widths, widths[1:])]
        )
        self.norm = LayerNorm(config.width, rngs=rngs) if config.layer_norm else None

    def __call__(self, x: Float[Array, "width batch *space"], key=None) -> Float[Array, "width batch *space"]:
        for i, map_ in enumerate(self.maps):
            x = drop(map_(x), self.dropout, None if key is None else jax.random.fold_in(key, i))
            x = x if i == len(self.maps) - 1 else jax.nn.relu(x)
        return x if self.norm is None else jnp.moveaxis(self.norm(jnp.moveaxis(x, 0, -1)), -1, 0)


def standard_positions(shape: tuple[int, ...]) -> np.ndarray:
    """Index of every point along each axis, with mean 0 and (unbiased) variance 1 over the grid: `(*shape, axis)`."""
    positions = grid_positions(shape, endpoint=True)
    flat = positions.reshape(-1, len(shape))
    deviation = flat.std(axis=0, ddof=min(1, len(flat) - 1))
    return (positions - flat.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
