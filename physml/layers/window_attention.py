"""Attention within windows of a grid, shifted from block to block (Swin Transformer V2).

Liu et al. 2021, arXiv:2103.14030, section 3.2 (shifted windows); Liu et al. 2022, arXiv:2111.09883, sections 3.2-3.3
(cosine attention, continuous position bias). Fields are `(batch, rows, columns, channel)`.

Everything that depends on the geometry alone is numpy, computed once per trace.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError
from physml.layers.dense import MLP, Dense, constant
from physml.layers.trilinear import Trilinear

HIDDEN_PAIR = -200.0  # added to the score of two tokens that only the cyclic shift made neighbors
LARGEST_SCALE = math.log(100.0)
SMALLEST_NORM = 1e-12
BIAS_HIDDEN = 512  # hidden channels of the position bias


@dataclass(frozen=True)
class Windows:
    """How a grid of tokens is cut into windows.

    Attributes:
        shape: tokens of the grid, rows and columns.
        size: tokens of a window.
        shift: tokens by which the cuts are moved; 0 does not move them.
        wrap: axes along which windows join the two ends of the grid: tokens there see each other as neighbors. Only
            where the windows divide the axis.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    wrap: tuple[bool, bool] = (False, False)

    @property
    def padded(self) -> tuple[int, int]:
        """The grid filled up to whole windows, behind its end."""
        return tuple(-(-points // size) * size for points, size in zip(self.shape, self.size, strict=True))

    @property
    def count(self) -> tuple[int, int]:
        return tuple(points // size for points, size in zip(self.padded, self.size, strict=True))

    def mask(self) -> np.ndarray | None:
        """`(windows, tokens, tokens)`: 0, or `HIDDEN_PAIR` for tokens from different ends of the grid.

        None where no pair is hidden.
        """
        return _mask(self)

    def partition(self, x: Float[Array, "batch rows columns channel"]) -> Float[Array, "batch windows tokens channel"]:
        """The tokens of each window; places behind the end of the grid are 0."""
        (rows, columns), (height, width) = self.count, self.size
        pads = [(0, all_ - there) for all_, there in zip(self.padded, self.shape, strict=True)]
        if any(after for _, after in pads):
            x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
        if any(self.shift):
            x = jnp.roll(x, [-shift for shift in self.shift], (1, 2))
        if rows * columns > 1:
            x = jnp.swapaxes(x.reshape(x.shape[0], rows, height, columns, width, -1), 2, 3)
        return x.reshape(x.shape[0], rows * columns, height * width, -1)

    def join(self, x: Float[Array, "batch windows tokens channel"]) -> Float[Array, "batch rows columns channel"]:
        """Undoes `partition`."""
        (rows, columns), (height, width) = self.count, self.size
        if rows * columns > 1:
            x = jnp.swapaxes(x.reshape(x.shape[0], rows, columns, height, width, -1), 2, 3)
        x = x.reshape(x.shape[0], *self.padded, -1)
        if any(self.shift):
            x = jnp.roll(x, self.shift, (1, 2))
        return x[:, : self.shape[0], : self.shape[1]]


@functools.lru_cache(maxsize=256)
def _mask(windows: Windows) -> np.ndarray | None:
    lines = []
    for points, padded, size, shift, wrap in zip(
        windows.shape, windows.padded, windows.size, windows.shift, windows.wrap, strict=True
    ):
        places = np.arange(padded)
        region = (places >= padded - size).astype(int) + (places >= padded - shift) if shift else 0 * places
        lines.append(0 * places if wrap and points == padded else region)
    labels = 3 * lines[0][:, None] + lines[1][None]
    (rows, columns), (height, width) = windows.count, windows.size
    labels = labels.reshape(rows, height, columns, width).swapaxes(1, 2).reshape(rows * columns, -1)
    mask = np.where(labels[:, :, None] == labels[:, None], 0, HIDDEN_PAIR).astype(np.float32)
    mask.flags.writeable = False
    return mask if mask.any() else None


@functools.lru_cache(maxsize=64)
def _offsets(size: tuple[int, int]) -> np.ndarray:
    """`(2 rows - 1, 2 columns - 1, 2)`: offsets from the largest down, at most 8, on a logarithmic scale."""
    lines = [np.arange(points - 1, -points, -1) * 8 / max(points - 1, 1) for points in size]
    grid = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)
    return (np.sign(grid) * np.log2(np.abs(grid) + 1) / np.log2(8)).astype(np.float32)


def _by_pair(line: Float[Array, "*any offsets"], points: int) -> Float[Array, "*any query key"]:
    """Of values by offset, from points - 1 down to 1 - points, the value of each pair: offset query - key.

    Without a gather, whose gradient would be a scatter: row p of the result is the line from points - 1 - p on, and
    repeating the line puts these rows one after another, each one place shorter than the line.
    """
    if points == 1:
        return line[..., None]
    repeated = jnp.broadcast_to(line[..., None, :], (*line.shape[:-1], points, 2 * points - 1))
    repeated = repeated.reshape(*line.shape[:-1], -1)[..., points - 1 : -1]
    return repeated.reshape(*line.shape[:-1], points, 2 * points - 2)[..., :points]


class PositionBias(nnx.Module):
    """What is added to the score of two tokens because of where they stand: `16 sigmoid(mlp(offset))` for each head.

    Liu et al. 2022, arXiv:2111.09883, section 3.3.
    """

    def __init__(self, heads: int, size: tuple[int, int], *, deviation: float | None = None, rngs: nnx.Rngs):
        self.size = size
        self.mlp = MLP(
            2, BIAS_HIDDEN, heads, activate=jax.nn.relu, last_bias=False, deviation=deviation, rngs=rngs
        )  # fmt: skip

    def __call__(self) -> Float[Array, "heads tokens tokens"]:
        height, width = self.size
        table = 16 * jax.nn.sigmoid(jnp.moveaxis(self.mlp(jnp.asarray(_offsets(self.size))), -1, 0))
        by_column = jnp.moveaxis(_by_pair(table, width), 1, -1)  # (head, column, column', row offset)
        pairs = jnp.transpose(_by_pair(by_column, height), (0, 3, 1, 4, 2))
        return pairs.reshape(-1, height * width, height * width)


class WindowAttention(nnx.Module):
    """Cosine attention within each window: `(batch, windows, tokens, channel)` -> same.

    Scores are `cos(q, k) exp(min(scale, ln 100)) + position bias + mask`. Liu et al. 2022, arXiv:2111.09883, eq. 2.

    Attributes:
        qkv: weights of queries, keys and values side by side, `(channel, 3 channel)`; keys have no bias.
        query_bias, value_bias: `(channel,)`, or None.
        logit_scale: `(heads,)`, the logarithm of the factor of the cosines.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        size: tuple[int, int],
        *,
        bias: bool = True,
        deviation: float | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or channels % heads:
            raise ConfigError(
                f"Attention over {channels} channels cannot have {heads} heads: give a number of heads that divides "
                "the channels of its stage."
            )
        self.heads = heads
        self.qkv = Dense(channels, 3 * channels, bias=False, deviation=deviation, rngs=rngs)
        self.query_bias = nnx.Param(constant(channels)) if bias else None
        self.value_bias = nnx.Param(constant(channels)) if bias else None
        self.logit_scale = nnx.Param(constant(heads, math.log(10.0)))
        self.position_bias = PositionBias(heads, size, deviation=deviation, rngs=rngs)
        self.output = Dense(channels, channels, deviation=deviation, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch windows tokens channel"],
        mask: np.ndarray | None = None,
        dropped: Float[Array, "batch windows heads tokens tokens"] | None = None,
    ) -> Float[Array, "batch windows tokens channel"]:
        """`mask (windows, tokens, tokens)` is added to the scores; `dropped` multiplies the attention weights."""
        batch, windows, tokens, channels = x.shape
        y = self.qkv(x)
        if self.query_bias is not None:
            query, value = self.query_bias[...], self.value_bias[...]
            y = y + jnp.concatenate([query, jnp.zeros_like(query), value]).astype(y.dtype)
        y = jnp.moveaxis(y.reshape(batch, windows, tokens, 3 * self.heads, -1), 3, 2)
        query, key, value = jnp.split(y, 3, axis=2)
        scale = jnp.exp(jnp.minimum(self.logit_scale[...], LARGEST_SCALE))[:, None, None]
        query, key = _unit(query).astype(x.dtype), _unit(key).astype(x.dtype)
        y = attend(query, key, value, scale, self.position_bias(), mask, dropped)
        return self.output(jnp.moveaxis(y, 2, 3).reshape(batch, windows, tokens, channels))


def attend(
    query: Float[Array, "batch windows heads tokens channel"],
    key: Float[Array, "batch windows heads tokens channel"],
    value: Float[Array, "batch windows heads tokens channel"],
    scale: Float[Array, "heads 1 1"],
    bias: Float[Array, "heads tokens tokens"],
    mask: np.ndarray | None,
    dropped: Float[Array, "batch windows heads tokens tokens"] | None = None,
) -> Float[Array, "batch windows heads tokens channel"]:
    """`softmax(scale query @ key.T + bias + mask) @ value`; weights are float32 or better until the last product.

    The tangent is written out so that its transpose, the gradient, is fast on CPUs, in a third of the time of the
    derived one: every product takes the large matrices of weights as they lie in memory, turning the small ones
    instead, the sum for the bias over all windows is a product too, and the one for `scale` is taken of queries.
    """
    scale, bias = scale.astype(_wide(value)), bias.astype(_wide(value))
    if dropped is not None:
        weights, total = _weights(query, key, scale, bias, mask)
        return ((weights / total * dropped).astype(value.dtype) @ value).astype(value.dtype)

    @jax.custom_jvp
    def apply(query, key, value, scale, bias):
        return means(query, key, value, scale, bias)[0].astype(value.dtype)

    def means(query, key, value, scale, bias):
        weights, total = _weights(query, key, scale, bias, mask)
        weights = weights.astype(value.dtype)
        return jnp.matmul(weights, value, preferred_element_type=total.dtype) / total, weights, total

    @apply.defjvp
    def tangent(primals, tangents):
        query, key, value, scale, bias = primals
        of_query, of_key, of_value, of_scale, of_bias = tangents
        y, weights, total = means(*primals)
        of_scaled = of_query * scale.astype(query.dtype) + query * of_scale.astype(query.dtype)
        scaled = query * scale.astype(query.dtype)
        of_scores = PRODUCT("weights", of_scaled, key) + PRODUCT("weights", scaled, of_key)
        each = jnp.ones((query.shape[0] * query.shape[1], 1), bias.dtype) @ of_bias.reshape(1, -1)
        of_weights = weights * (of_scores.astype(bias.dtype) + each.reshape(of_scores.shape))
        of_sums = PRODUCT("rows", of_weights.astype(value.dtype), value) + PRODUCT("rows", weights, of_value)
        of_y = (of_sums.astype(total.dtype) - y * of_weights.sum(axis=-1, keepdims=True)) / total
        return y.astype(value.dtype), of_y.astype(value.dtype)

    return apply(query, key, value, scale, bias)


def _weights(query, key, scale, bias, mask):
    """Attention weights that are not divided by their total yet, and that total."""
    # The mask joins the bias first: by itself XLA would spread it over the whole batch.
    shift = bias if mask is None else bias + mask[:, None].astype(bias.dtype)
    # Scaled after the product: cosines times 100 are where float32 loses most.
    scores = jnp.matmul(query, _turned(key), preferred_element_type=_wide(query)) * scale + shift
    # Any shift gives the same softmax; differentiated, the largest would be looked for among scores computed anew.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return weights, weights.sum(axis=-1, keepdims=True)


def _product(wanted: str, a, b, how=None, kept=()):
    """Of `sum weights (rows columns.T)`; the large weights are never turned."""
    if wanted == "weights":
        return a @ _turned(b)
    if wanted == "rows":
        return a @ b
    return _turned(jax.lax.optimization_barrier(_turned(b) @ a))  # the barrier keeps XLA from undoing that


PRODUCT = Trilinear("attention_product", ("weights", "rows", "columns"), _product)


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _unit(x):
    """`x` in float32 or better, divided by its length over the last axis; zero stays zero."""
    x = x.astype(_wide(x))
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), SMALLEST_NORM**2))
