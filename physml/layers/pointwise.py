"""Layers that act on every point alike: linear maps over channels, small perceptrons, gates and normalization.

Hidden fields in this file and in `spectral` have the channel axis first, `(channel, batch, *space)`. A linear map is
then one large matrix product `(out, in) @ (in, batch * points)`, its two gradients are two more, and a Fourier
transform finds its axes last: no transposes in between. XLA lays out GPU and TPU arrays itself, so nothing is lost
there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, suggest


@jax.custom_jvp
def gelu(x):
    """Exact GELU, x Phi(x) with the normal distribution Phi (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    The derivative Phi(x) + x phi(x) is formed beside the value, where the error function is at hand already;
    differentiating `jax.nn.gelu(approximate=False)` evaluates `erfc`, which costs more than twice as much on CPUs.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5)).astype(x.dtype)))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5)).astype(x.dtype)))
    density = jnp.exp(-0.5 * x * x) * np.float32(1 / np.sqrt(2 * np.pi)).astype(x.dtype)
    return x * cdf, (cdf + x * density) * t


ACTIVATIONS: dict[str, Callable] = {
    "elu": jax.nn.elu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,  # the approximation by a hyperbolic tangent
    "leaky_relu": jax.nn.leaky_relu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable:
    """The activation function of that name. Raises ConfigError with the nearest name."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"There is no activation {name!r}." + suggest(name, ACTIVATIONS))
    return ACTIVATIONS[name]


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> Array:
    """U(-b, b) with b = 1 / sqrt(fan_in): the Kaiming rule with a = sqrt(5) that PyTorch's layers start from."""
    bound = 1 / np.sqrt(max(fan_in, 1))
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


class Linear(nnx.Module):
    """A linear map over the channel axis: `(inputs, batch, *space)` -> `(outputs, batch, *space)`.

    Computes in the dtype of its input; parameters stay float32.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.weight = nnx.Param(uniform(rngs, (outputs, inputs), inputs))
        self.bias = nnx.Param(uniform(rngs, (outputs,), inputs)) if bias else None

    def __call__(self, x: Float[Array, "inputs batch *space"]) -> Float[Array, "outputs batch *space"]:
        # With points flattened both gradients are plain matrix products too; a contraction over (batch, *space) makes
        # XLA transpose whole fields first, which doubled the time of a backward pass on CPU.
        y = (self.weight[...].astype(x.dtype) @ x.reshape(x.shape[0], -1)).reshape(-1, *x.shape[1:])
        return y if self.bias is None else y + per_channel(self.bias[...], y)


def per_channel(vector, like):
    """`vector (channel,)` shaped to broadcast against `like (channel, batch, *space)`, in its dtype."""
    return vector.astype(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


class ChannelMLP(nnx.Module):
    """Two linear maps with an activation between, at every point. `hidden=0`: one linear map."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, activate: Callable = gelu, rngs: nnx.Rngs):
        self.activate = activate
        self.first = Linear(inputs, hidden or outputs, rngs=rngs)
        self.second = Linear(hidden, outputs, rngs=rngs) if hidden else None

    def __call__(self, x: Float[Array, "inputs batch *space"]) -> Float[Array, "outputs batch *space"]:
        x = self.first(x)
        return x if self.second is None else self.second(self.activate(x))


class SoftGate(nnx.Module):
    """Multiplies every channel by a learned number, at first 1."""

    def __init__(self, channels: int):
        self.weight = nnx.Param(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Float[Array, "channel batch *space"]) -> Float[Array, "channel batch *space"]:
        return x * per_channel(self.weight[...], x)


class Identity(nnx.Module):
    """Passes its input on: the parameter-free skip connection."""

    def __call__(self, x):
        return x


SKIPS = ("linear", "identity", "soft-gating", "none")


def skip_connection(kind: str, channels: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """One of `SKIPS`: a linear map without bias, the input itself, a soft gate, or None."""
    if kind not in SKIPS:
        raise ConfigError(f"There is no skip connection {kind!r}." + suggest(kind, SKIPS))
    if kind == "linear":
        return Linear(channels, channels, bias=False, rngs=rngs)
    return {"identity": Identity, "soft-gating": lambda: SoftGate(channels), "none": lambda: None}[kind]()


NORMS = ("none", "group_norm", "instance_norm")
EPSILON = 1e-5  # added to the variance, as in PyTorch


class GroupNorm(nnx.Module):
    """Zero mean and unit variance of each sample over channels and points (one group), then a learned scale and shift.

    Wu & He 2018, arXiv:1803.08494.
    """

    def __init__(self, channels: int):
        self.weight = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, "channel batch *space"]) -> Float[Array, "channel batch *space"]:
        y = _standardize(x, (0, *range(2, x.ndim)))
        return y * per_channel(self.weight[...], x) + per_channel(self.bias[...], x)


class InstanceNorm(nnx.Module):
    """Zero mean and unit variance of each channel of each sample over its points. No parameters."""

    def __call__(self, x: Float[Array, "channel batch *space"]) -> Float[Array, "channel batch *space"]:
        return _standardize(x, tuple(range(2, x.ndim)))


def _standardize(x, axes):
    # Statistics in float32 also for bfloat16 fields: sums of thousands of points lose all digits there.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axes, keepdims=True)
    variance = jnp.square(wide - mean).mean(axes, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + EPSILON)).astype(x.dtype)


def normalization(kind: str, channels: int) -> nnx.Module | None:
    """One of `NORMS`; None for "none"."""
    if kind not in NORMS:
        raise ConfigError(f"There is no normalization layer {kind!r}." + suggest(kind, NORMS))
    return {"none": lambda: None, "group_norm": lambda: GroupNorm(channels), "instance_norm": InstanceNorm}[kind]()
