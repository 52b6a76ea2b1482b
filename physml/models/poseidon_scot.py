"""scOT, the network of Poseidon: a multiscale U-shaped operator of shifted windows, conditioned on the lead time.

Herde et al. 2024, arXiv:2405.19101, section 2 and appendix A. Blocks: Liu et al. 2022, arXiv:2111.09883 (Swin V2); skip
blocks: Liu et al. 2022, arXiv:2201.03545 (ConvNeXt) or He et al. 2016, arXiv:1512.03385 (ResNet).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Signature
from physml.layers.batch_norm import BatchNorm
from physml.layers.conditioning import LayerNorm
from physml.layers.convolution import Convolution, resolve_boundaries
from physml.layers.dense import MLP, constant, normal
from physml.layers.fourier import fourier_resample
from physml.layers.patches import PatchEmbedding, PatchMerging, PatchRecovery, PatchUnmerging
from physml.layers.pointwise import EPSILON, activation
from physml.layers.stack import Stack
from physml.layers.window_attention import BIAS_HIDDEN, WindowAttention, Windows

LAYER_SCALE = 1e-6  # of a ConvNeXt block at first


@dataclass(frozen=True)
class ScOTConfig:
    """Choices of a scOT. The defaults are Poseidon-T.

    Attributes:
        width: channels of the first stage; every stage has twice those of the one before.
        depths: transformer blocks of each stage, in the encoder and again in the decoder.
        heads: attention heads of each stage.
        skip_blocks: blocks on the connection from encoder to decoder of each stage; 0 connects them directly.
        patch: points of a patch along each axis.
        window: tokens of an attention window along each axis; fewer where the grid of a stage has fewer.
        mlp_ratio: hidden channels of the pointwise perceptrons, relative to their input.
        skip: kind of the skip blocks. "resnet" has batch normalization and is not conditioned.
        attention_bias: whether queries and values have a bias.
        activation: inside the transformer blocks.
        residual: adds the first `outputs` input channels to the output.
        position_embedding: adds a learned vector to every token; the grid is then fixed.
        mask_token: learns a vector that takes the place of masked tokens (`masked` of the call).
        boundary: beyond the edges, for convolutions and shifted windows. "auto" wraps the periodic axes of the grid and
            takes zeros on others, "zero" is the authors' choice for every axis, "periodic" wraps every axis.
        image_size: grid `(rows, columns)` on which the network works; empty: that of the signature. Fields on other
            grids are resampled by their Fourier series, and the output back.
        dropout: share of the hidden numbers after the embedding and after each perceptron that is left out in training.
        attention_dropout: the same for attention weights and attention outputs.
        drop_path: share of the samples for which the last block is left out in training; rises linearly from 0 at the
            first block (Huang et al. 2016, arXiv:1603.09382).
        deviation: of the normal distribution from which weights start.
        scale_start: scale of every conditional norm at first, where all scalars are 0. The authors start from 0, which
            lets nothing of the input pass at lead time 0 before training.
        epsilon: added to the variance in the norms of the blocks.
        remat: recompute each block in the backward pass.
        dtype: of the hidden fields; parameters stay float32.
    """

    width: int = 48
    depths: tuple[int, ...] = (4, 4, 4, 4)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    skip_blocks: tuple[int, ...] = (2, 2, 2, 0)
    patch: int = 4
    window: int = 16
    mlp_ratio: float = 4.0
    skip: Literal["convnext", "resnet"] = "convnext"
    attention_bias: bool = True
    activation: str = "gelu"
    residual: bool = False
    position_embedding: bool = False
    mask_token: bool = False
    boundary: Literal["auto", "periodic", "zero"] = "auto"
    image_size: tuple[int, ...] = ()
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    deviation: float = 0.02
    scale_start: float = 1.0
    epsilon: float = EPSILON
    remat: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields(self)
        stages = len(self.depths)
        if not stages or len(self.heads) != stages or len(self.skip_blocks) != stages:
            raise ConfigError(
                f"depths={self.depths}, heads={self.heads} and skip_blocks={self.skip_blocks} must have one entry for "
                "each stage."
            )
        least = (self.width, *self.depths, *self.heads, self.patch, self.window, int(self.mlp_ratio * self.width))
        if min(least) < 1 or min(self.skip_blocks) < 0:
            raise ConfigError(f"Sizes must be positive (skip_blocks may be 0), but {self} was given.")
        for stage, heads in enumerate(self.heads):
            if self.channels(stage) % heads:
                raise ConfigError(
                    f"Stage {stage} has {self.channels(stage)} channels, which heads={self.heads} does not divide. "
                    "Give every stage a number of heads that divides width * 2**stage."
                )
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ConfigError(f"image_size is {self.image_size}, but it must be (rows, columns), or empty.")
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it is a share: 0 or more and below 1.")
        if not (self.deviation > 0 and self.epsilon > 0):
            raise ConfigError(f"deviation={self.deviation} and epsilon={self.epsilon} must be positive.")
        activation(self.activation)

    def channels(self, stage: int) -> int:
        return self.width * 2**stage

    def build(self, signature: Signature, rngs: nnx.Rngs) -> "ScOT":
        return ScOT(self, signature, rngs=rngs)

    def grid(self, signature: Signature) -> tuple[int, int]:
        """Points on which the network works. Raises ConfigError where it cannot."""
        if signature.grid.ndim != 2:
            raise ConfigError(f"poseidon_scot needs two spatial axes, but the grid has {signature.grid.ndim}.")
        shape, stages = tuple(self.image_size or signature.grid.shape), len(self.depths)
        unit = self.patch * 2 ** (stages - 1)
        fitting = tuple(max(-(-points // self.patch) * self.patch, unit) for points in shape)
        if any(points % self.patch for points in shape):
            raise ConfigError(
                f"patch={self.patch} does not divide the grid {shape}. Set image_size={fitting}, to which fields are "
                "resampled by their Fourier series, or choose another patch."
            )
        if min(shape) < unit:
            raise ConfigError(
                f"{stages} stages with patch={self.patch} need at least {unit} points along each axis, but the grid is "
                f"{shape}. Use fewer stages or a smaller patch, or set image_size={fitting}."
            )
        return shape

    def parameters(self, signature: Signature) -> int:
        """Trained numbers of the model."""
        grid, scalars, bias = self.grid(signature), signature.scalars, self.attention_bias
        tokens = math.prod(points // self.patch for points in grid)

        def norm(channels: int) -> int:
            return 2 * (1 + scalars) * channels

        def block(channels: int, heads: int) -> int:
            attention = 4 * channels**2 + channels + 2 * channels * bias + heads + (3 + heads) * BIAS_HIDDEN
            hidden = int(self.mlp_ratio * channels)
            return attention + (2 * channels + 1) * hidden + channels + 2 * norm(channels)

        def skip(channels: int) -> int:
            if self.skip == "resnet":
                return 2 * ((9 * channels + 1) * channels + 2 * channels)
            return 50 * channels + norm(channels) + 8 * channels**2 + 5 * channels + channels

        points, outputs = self.patch**2, signature.outputs
        total = (points * signature.inputs + 1) * self.width + norm(self.width)
        total += self.mask_token * self.width + self.position_embedding * tokens * self.width
        total += self.width * points * outputs + outputs + 25 * outputs**2
        for stage, (depth, heads, skips) in enumerate(zip(self.depths, self.heads, self.skip_blocks, strict=True)):
            channels = self.channels(stage)
            total += 2 * depth * block(channels, heads) + skips * skip(channels)
            if stage:
                half = channels // 2
                total += 4 * half * channels + norm(channels) + 2 * channels**2 + norm(half) + half**2
        return total


class ScOT(nnx.Module):
    """Encoder and decoder of transformer blocks on ever coarser grids of tokens, connected stage by stage.

    Without scalars in the signature every norm is an ordinary one; with them scale and shift of every norm are linear
    in the scalars (the first is the lead time). Applies to fields on any grid, which it resamples to its own.

    Attributes:
        grid: points on which the network works.
        embedding, recovery: from patches of points to tokens and back: all that depends on the number of channels.
        encoder, decoder: one `Stage` each, the decoder's from the coarsest to the finest.
        merging, unmerging: between the stages.
        skips: blocks on the connections, stage by stage.
    """

    def __init__(self, config: ScOTConfig, signature: Signature, *, rngs: nnx.Rngs):
        self.config, self.signature, self.grid = config, signature, config.grid(signature)
        self.dropout = max(config.dropout, config.attention_dropout, config.drop_path)
        self.deterministic = True  # `train()` and `eval()` switch it
        if config.residual and signature.outputs > signature.inputs:
            raise ConfigError(
                f"residual=True adds the first {signature.outputs} of the inputs to the outputs, but there are only "
                f"{signature.inputs} inputs. Set residual=False."
            )
        boundaries = resolve_boundaries(config.boundary, signature.grid.periodic, beyond="zero")
        wraps = [boundary == "periodic" for boundary in boundaries]
        stages, scalars = range(len(config.depths)), signature.scalars
        options = {"deviation": config.deviation, "start": config.scale_start, "rngs": rngs}
        tokens = tuple(points // config.patch for points in self.grid)
        shapes = [tuple(-(-points // 2**stage) for points in tokens) for stage in stages]
        windows = [stage_windows(config.window, tokens, stage, wraps) for stage in stages]
        self.embedding = Embedding(config, signature, tokens, rngs=rngs)
        self.encoder = nnx.List([Stage(config, scalars, stage, windows[stage], rngs=rngs) for stage in stages])
        self.merging = nnx.List([PatchMerging(config.channels(stage), scalars, **options) for stage in stages[:-1]])
        self.skips = nnx.List(
            [
                nnx.List(
                    [
                        SKIPS[config.skip](config, config.channels(stage), scalars, boundaries, rngs=rngs)
                        for _ in range(config.skip_blocks[stage])
                    ]
                )
                for stage in stages
            ]
        )
        self.decoder = nnx.List(
            [Stage(config, scalars, stage, windows[stage], backward=True, rngs=rngs) for stage in reversed(stages)]
        )
        self.unmerging = nnx.List(
            [PatchUnmerging(config.channels(stage), scalars, **options) for stage in reversed(stages[1:])]
        )
        self.recovery = PatchRecovery(
            config.width, signature.outputs, config.patch, boundaries, deviation=config.deviation, rngs=rngs
        )
        self.shapes = tuple(shapes)

    def __call__(
        self,
        fields: Float[ArrayLike, "batch rows columns inputs"],
        scalars: Float[ArrayLike, "batch scalars"],
        key=None,
        *,
        masked: Bool[ArrayLike, "batch height width"] | None = None,
        visit: Callable[[str, Array], None] | None = None,
    ) -> Float[Array, "batch rows columns outputs"]:
        """`key`, a typed PRNG key, draws what is dropped; without one, or after `eval()`, nothing is.

        `masked` tokens are replaced by the learned mask token. `visit(name, x)` sees hidden fields on the way:
        "embedding", "encoder.STAGE.block.NUMBER", "encoder.STAGE", "merging.STAGE", "skip.STAGE", "decoder.NUMBER"
        (after un-merging).
        """
        fields = jnp.asarray(fields)
        here = fourier_resample(fields, self.grid)
        wide = jnp.promote_types(here.dtype, jnp.float32)
        x = here.astype(wide if self.config.dtype == "float32" else jnp.bfloat16)
        y = self._hidden(x, scalars, None if self.deterministic or not self.dropout else key, masked, visit)
        y = self.recovery(y)
        if self.config.residual:
            y = y + x[..., : y.shape[-1]]
        return fourier_resample(y.astype(fields.dtype), fields.shape[1:-1])

    def _hidden(self, x, scalars, key, masked, visit):
        """The tokens of the finest stage that are recovered."""
        seen, keys = visit or (lambda name, x: None), iter(_keys(key, 2 * len(self.encoder) + 1))
        x = self.embedding(x, scalars, next(keys), masked)
        seen("embedding", x)
        skips, last = [], len(self.encoder) - 1
        for i, stage in enumerate(self.encoder):
            y = stage(x, scalars, next(keys), visit and (lambda j, x, i=i: visit(f"encoder.{i}.block.{j}", x)))
            seen(f"encoder.{i}", y)
            skips.append(y)
            if i < last:
                x = self.merging[i](y + x, scalars)
                seen(f"merging.{i}", x)
        apply = nnx.remat(_apply) if self.config.remat else _apply
        for i, blocks in enumerate(self.skips):
            for block in blocks:
                skips[i] = apply(block, skips[i], scalars)
            seen(f"skip.{i}", skips[i])
        x = skips.pop()
        for i, stage in enumerate(self.decoder):
            x = stage(x + skips.pop() if i else x, scalars, next(keys))
            if i < last:
                x = self.unmerging[i](x, scalars, self.shapes[last - i - 1])
            seen(f"decoder.{i}", x)
        return x


def with_channels(model: ScOT, signature: Signature, *, rngs: nnx.Rngs, **options) -> ScOT:
    """A trained model for other channels or another grid, to be fine-tuned; `model` stays as it is.

    Fresh are the weights that depend on the number of inputs (of the embedding) or outputs (the recovery), where that
    number changes; all others are kept. `options` replace fields of the config: `remat=True`, `dtype="bfloat16"`,
    `drop_path=0.1`. Raises ConfigError when the scalars differ, on which every norm depends, or when an option changes
    the shape of a kept parameter.
    """
    if signature.scalars != model.signature.scalars:
        raise ConfigError(
            f"The model is conditioned on {model.signature.scalars} scalars, but {signature.scalars} are wanted: every "
            "norm depends on their number. Keep it, e.g. with a lead time of 1 for steady problems."
        )
    options = {"image_size": model.grid, **options}
    fresh = dataclasses.replace(model.config, **options).build(signature, rngs)
    kept = dict(nnx.to_flat_state(nnx.state(model)))
    renewed = {"embedding.patches.weight"} if signature.inputs != model.signature.inputs else set()
    renewed |= {"recovery"} if signature.outputs != model.signature.outputs else set()
    state, rows = nnx.state(fresh), []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if any(name == start or name.startswith(f"{start}.") for start in renewed):
            continue
        if path not in kept or kept[path].shape != variable.shape:
            rows.append(f"{name} {variable.shape}")
        else:
            variable[...] = kept[path][...]
    if rows:
        raise ConfigError(
            f"With {options} the trained weights do not fit: {', '.join(rows[:5])}. Leave depths, widths, windows "
            "skips and the image size as they are."
        )
    nnx.update(fresh, state)
    return fresh


def _apply(block, x, scalars):
    return block(x, scalars)


def _keys(key, count: int):
    return [None] * count if key is None else [jax.random.fold_in(key, i) for i in range(count)]


def stage_windows(window: int, tokens: tuple[int, int], stage: int, wraps) -> tuple[Windows, Windows]:
    """Plain and shifted windows of a stage.

    Their size follows from the halved grid rounded down, though the tokens are as many as rounding up gives.
    """
    floors = [points // 2**stage for points in tokens]
    size = tuple(min(window, points) for points in floors)
    shift = tuple(window // 2 if points > window else 0 for points in floors)
    shape = tuple(-(-points // 2**stage) for points in tokens)
    return Windows(shape, size, wrap=tuple(wraps)), Windows(shape, size, shift, tuple(wraps))


class Embedding(nnx.Module):
    """Patches as normalized tokens, masked and with positions where wanted."""

    def __init__(self, config: ScOTConfig, signature: Signature, tokens: tuple[int, int], *, rngs: nnx.Rngs):
        width = config.width
        self.rate = config.dropout
        self.patches = PatchEmbedding(signature.inputs, width, config.patch, deviation=config.deviation, rngs=rngs)
        self.norm = LayerNorm(
            width, signature.scalars, start=config.scale_start, deviation=config.deviation, rngs=rngs
        )  # fmt: skip
        self.mask_token = nnx.Param(constant(width)) if config.mask_token else None
        self.positions = nnx.Param(constant((*tokens, width))) if config.position_embedding else None

    def __call__(self, x: Float[Array, "batch rows columns inputs"], scalars, key=None, masked=None):
        x = self.norm(self.patches(x), scalars)
        if masked is not None:
            if self.mask_token is None:
                raise ConfigError("`masked` was given, but this model has no mask token: set mask_token=True.")
            x = jnp.where(jnp.asarray(masked, bool)[..., None], self.mask_token[...].astype(x.dtype), x)
        if self.positions is not None:
            x = x + self.positions[...].astype(x.dtype)
        return drop(x, key, self.rate)


class Stage(nnx.Module):
    """Transformer blocks on one grid of tokens; every second one has shifted windows, the last of a decoder never."""

    def __init__(
        self,
        config: ScOTConfig,
        scalars: int,
        stage: int,
        windows: tuple[Windows, Windows],
        *,
        backward: bool = False,
        rngs: nnx.Rngs,
    ):
        depth, channels = config.depths[stage], config.channels(stage)
        self.remat = config.remat
        order = (windows[1], windows[0]) if backward and depth % 2 == 0 else windows
        self.windows = order if windows[0] != windows[1] else windows[:1]
        rates = np.linspace(0, config.drop_path, 2 * sum(config.depths), dtype=np.float32)
        first = sum(config.depths) + sum(config.depths[stage + 1 :]) if backward else sum(config.depths[:stage])
        self.rates = tuple(rates[first : first + depth].tolist())
        self.blocks = Stack(
            lambda rngs: Block(config, channels, config.heads[stage], scalars, windows[0].size, rngs=rngs),
            depth, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Float[Array, "batch height width channel"], scalars, key=None, visit=None):
        numbers = (np.asarray(self.rates, np.float32), np.arange(len(self.rates), dtype=np.uint32))

        def apply(block, x, windows, numbers):
            rate, number = numbers
            return block(x, scalars, windows, None if key is None else jax.random.fold_in(key, number), rate)

        return self.blocks(x, apply, self.windows, numbers, remat=self.remat, visit=visit)


class Block(nnx.Module):
    """`x + norm(attention(x))`, then `x + norm(mlp(x))`: the norms come last, on the branches."""

    def __init__(self, config: ScOTConfig, channels: int, heads: int, scalars: int, size, *, rngs: nnx.Rngs):
        options = {"deviation": config.deviation, "rngs": rngs}
        norm = {"start": config.scale_start, "epsilon": config.epsilon, **options}
        self.attention_rate, self.mlp_rate, self.drops_paths = (
            config.attention_dropout, config.dropout, config.drop_path > 0,
        )  # fmt: skip
        self.attention = WindowAttention(channels, heads, size, bias=config.attention_bias, **options)
        self.attention_norm = LayerNorm(channels, scalars, **norm)
        self.mlp = MLP(
            channels, int(config.mlp_ratio * channels), channels, activate=activation(config.activation), **options
        )  # fmt: skip
        self.mlp_norm = LayerNorm(channels, scalars, **norm)

    def __call__(self, x: Float[Array, "batch height width channel"], scalars, windows: Windows, key=None, rate=0.0):
        """`rate`: share of the samples for which a branch is left out."""
        keys = _keys(key, 5)
        dropped = None
        if key is not None and self.attention_rate:
            count, tokens = math.prod(windows.count), math.prod(windows.size)
            ones = jnp.ones((x.shape[0], count, self.attention.heads, tokens, tokens), x.dtype)
            dropped = drop(ones, keys[0], self.attention_rate)
        y = windows.join(self.attention(windows.partition(x), windows.mask(), dropped))
        x = x + self._kept(self.attention_norm(drop(y, keys[1], self.attention_rate), scalars), keys[2], rate)
        y = drop(self.mlp(x), keys[3], self.mlp_rate)
        return x + self._kept(self.mlp_norm(y, scalars), keys[4], rate)

    def _kept(self, branch, key, rate):
        return drop(branch, key, rate, shared=True) if self.drops_paths else branch


def drop(x, key, rate, *, shared: bool = False):
    """`x` with a share `rate` of its numbers (`shared`: of its samples) set to 0, the others grown to keep the mean.

    Nothing is dropped without a key.
    """
    if key is None or (isinstance(rate, float) and not rate):
        return x
    shape = (x.shape[0], *(1,) * (x.ndim - 1)) if shared else x.shape
    return x * (jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)).astype(x.dtype)


class ConvNeXtBlock(nnx.Module):
    """`x + scale * mlp(norm(depthwise 7 x 7 convolution of x))`."""

    def __init__(self, config: ScOTConfig, channels: int, scalars: int, boundaries: list[str], *, rngs: nnx.Rngs):
        self.convolution = _convolution(config, channels, 7, boundaries, channels, rngs)
        self.norm = LayerNorm(
            channels, scalars, start=config.scale_start, deviation=config.deviation, epsilon=config.epsilon, rngs=rngs
        )  # fmt: skip
        self.mlp = MLP(channels, 4 * channels, channels, deviation=config.deviation, rngs=rngs)
        self.layer_scale = nnx.Param(constant(channels, LAYER_SCALE))

    def __call__(self, x: Float[Array, "batch height width channel"], scalars):
        y = self.mlp(self.norm(self.convolution(x), scalars))
        return x + self.layer_scale[...].astype(x.dtype) * y


class ResNetBlock(nnx.Module):
    """`x + norm(conv(leaky_relu(norm(conv(x)))))` with 3 x 3 convolutions and batch normalization."""

    def __init__(self, config: ScOTConfig, channels: int, scalars: int, boundaries: list[str], *, rngs: nnx.Rngs):
        self.first, self.second = (_convolution(config, channels, 3, boundaries, 1, rngs) for _ in range(2))
        self.first_norm, self.second_norm = BatchNorm(channels), BatchNorm(channels)

    def __call__(self, x: Float[Array, "batch height width channel"], scalars):
        y = jax.nn.leaky_relu(self.first_norm(self.first(x)), 0.01)
        return x + self.second_norm(self.second(y))


def _convolution(config: ScOTConfig, channels: int, kernel: int, boundaries, groups: int, rngs) -> Convolution:
    layer = Convolution(channels, channels, kernel, boundaries, groups=groups, rngs=rngs)
    layer.weight[...] = normal(rngs, layer.weight.shape, config.deviation)
    layer.bias[...] = constant(channels)
    return layer


SKIPS = {"convnext": ConvNeXtBlock, "resnet": ResNetBlock}
