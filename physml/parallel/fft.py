"""The only place where physml calls an FFT.

XLA replicates the operand of an FFT before it runs it: under a mesh, a plain `jnp.fft.rfftn` of a batch that is split
over devices gathers the whole batch on every device (jax-ml/jax#13081, #15680). Here the transform runs inside
`shard_map`, so every device transforms its own samples and nothing is sent, forward and backward.

The mesh is the one that `jax.set_mesh` (or `Layout.use()`) put in place; without one, or where the batch does not
divide over its "data" axis, these are the plain transforms.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from physml.errors import ConfigError

BATCH_AXIS = "data"  # the mesh axis over which `Layout` splits batches
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
    mesh = jax.sharding.get_abstract_mesh()
    if batch_axis is None or mesh.empty or BATCH_AXIS not in mesh.axis_names:
        return transform(x)
    batch_axis %= x.ndim
    devices = mesh.shape[BATCH_AXIS]
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # A manual axis: we are inside somebody's shard_map over it already, and `x` is the local part.
    if devices == 1 or types[BATCH_AXIS] == AxisType.Manual or x.shape[batch_axis] % devices:
        return transform(x)
    split = PartitionSpec(*(None,) * batch_axis, BATCH_AXIS)
    others = {name for name in mesh.axis_names if types[name] != AxisType.Manual}
    return jax.shard_map(transform, in_specs=split, out_specs=split, axis_names=others)(x)
