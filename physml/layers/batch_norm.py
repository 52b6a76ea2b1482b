"""Batch normalization: each channel is standardized with the statistics of the batch, and of many batches when used.

Ioffe & Szegedy 2015, arXiv:1502.03167. Fields here have the channel axis last.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError
from physml.layers.pointwise import EPSILON


class BatchNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + 1e-5) * weight + bias`, channel by channel: `(batch, *space, channel)` -> same.

    After `train()` mean and variance are those of the batch at hand, and move the running ones by `momentum`; otherwise
    the running ones are applied. A batch that is split over devices counts as one. Statistics are float32 whatever the
    fields are.

    Attributes:
        weight, bias: `(channel,)`, learned.
        mean, variance: `(channel,)`, running; the variance is the unbiased one.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1):
        self.momentum = momentum
        self.use_running_average = True  # `train()` and `eval()` switch it
        self.weight = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Float[Array, "batch *space channel"]) -> Float[Array, "batch *space channel"]:
        """Raises ConfigError in training when a channel holds a single number, which has no variance."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, variance = (self.mean[...], self.variance[...]) if self.use_running_average else self._of_batch(wide)
        scale = jax.lax.rsqrt(variance.astype(wide.dtype) + EPSILON) * self.weight[...].astype(wide.dtype)
        return ((wide - mean.astype(wide.dtype)) * scale + self.bias[...].astype(wide.dtype)).astype(x.dtype)

    def _of_batch(self, x):
        """Mean and biased variance of the batch; moves the running ones."""
        count, axes = math.prod(x.shape[:-1]), tuple(range(x.ndim - 1))
        if count < 2:
            raise ConfigError(
                f"Batch normalization in training needs several numbers per channel, but fields of shape {x.shape} "
                "have one. Use larger batches or a finer grid."
            )
        mean = x.mean(axes)
        variance = jnp.square(x - mean).mean(axes)
        for running, new in ((self.mean, mean), (self.variance, variance * (count / (count - 1)))):
            old = running[...]
            running[...] = old + self.momentum * (jax.lax.stop_gradient(new).astype(old.dtype) - old)
        return mean, variance
