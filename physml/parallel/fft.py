"""The only place where physml calls an FFT of a batch. Solvers call those of one trajectory, inside `over_batch`.

XLA replicates the operand of an FFT before it runs it: under a mesh, a plain `jnp.fft.rfftn` of a batch that is split
over devices gathers the whole batch on every device (jax-ml/jax#13081, #15680). Here the transform runs inside
`shard_map`, so every device transforms its own samples and nothing is sent, forward and backward.

The mesh is the one that `jax.set_mesh` (or `Layout.use()`) put in place; without one, or where the batch does not
divide over its "data" axis, these are the plain transforms.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from physml.errors import ConfigError
from physml.parallel.mesh import over_batch

NORMS = ("backward", "ortho", "forward")


def rfftn(x, axes: Sequence[int], *, norm: str = "backward", batch_axis: int | None = 0) -> Array:
    """Real-to-complex FFT of `x` over one to three `axes`, the last of them halved to n // 2 + 1 bins.

    `batch_axis` is the axis of `x` that may be split over devices (None: no such axis). float16 and bfloat16 are
    transformed in float32 (complex64 comes out), as no FFT exists below that. Raises ConfigError for an unknown norm or
    bad axes.
    """
    x = _at_least_float32(jnp.asarray(x))
    axes = _check(x.ndim, axes, norm, batch_axis)
    return _per_device(lambda part: jnp.fft.rfftn(part, axes=axes, norm=norm), x, batch_axis)


def irfftn(
    x, shape: Sequence[int], axes: Sequence[int], *, norm: str = "backward", batch_axis: int | None = 0
) -> Array:
    """Inverse of `rfftn`: real output with `shape` points along `axes`.

    As usual for complex-to-real transforms, the imaginary part of the zero bin (and, for an even length, of the last
    bin) of the last axis is ignored.
    """
    x = jnp.asarray(x)
    axes = _check(x.ndim, axes, norm, batch_axis)
    return _per_device(lambda part: jnp.fft.irfftn(part, s=tuple(shape), axes=axes, norm=norm), x, batch_axis)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def _check(ndim: int, axes: Sequence[int], norm: str, batch_axis: int | None) -> tuple[int, ...]:
    if norm not in NORMS:
        raise ConfigError(f"FFT norm is {norm!r}, but it must be one of {NORMS}.")
    positive = tuple(axis % ndim for axis in axes)
    if not 1 <= len(positive) <= 3 or len(set(positive)) != len(positive):
        raise ConfigError(f"An FFT runs over one to three different axes, but axes={tuple(axes)} were given.")
    if batch_axis is not None and batch_axis % ndim in positive:
        raise ConfigError(f"The batch axis {batch_axis} is among the transformed axes {tuple(axes)}.")
    return positive


def _per_device(transform: Callable[[Array], Array], x: Array, batch_axis: int | None) -> Array:
    """`transform(x)`, each device on its own slice of `batch_axis` where a mesh splits it."""
    return transform(x) if batch_axis is None else over_batch(transform, batch_axis % x.ndim)(x)
