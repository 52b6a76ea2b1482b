"""Closures that see no frame of reference: a symmetric tensor as an isotropic function of the velocity gradient.

Pope 1975, doi:10.1017/S0022112075003382: every isotropic function b of a traceless strain s and a rotation r is
b = sum_n g_n(invariants) T_n(s, r). Ling, Kurzawski & Templeton 2016, doi:10.1017/jfm.2016.615: a network gives g.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, SpecError
from physml.fields import ArrayLike
from physml.layers.perceptron import Activation, Perceptron

BASIS_SIZE = {2: 2, 3: 10}
INVARIANTS = {2: 2, 3: 5}


class TensorBasis(nnx.Module):
    """A network of the invariants of strain and rotation, times the tensors that they make.

    Sees neither the velocity of the frame (gradients only), nor its axes or handedness (invariants only), nor units
    (gradients times a time). The trace of the gradient does not enter: incompressible flow is meant.

    Attributes:
        coefficients: the perceptron that gives `g`.
    """

    def __init__(self, dims: int, width: int = 32, depth: int = 2, *, activation: str = "silu", rngs: nnx.Rngs):
        """`width` units in each of `depth` hidden layers. Raises ConfigError unless `dims` is 2 or 3."""
        if dims not in BASIS_SIZE:
            raise ConfigError(f"dims is {dims}, but a tensor basis is known in 2 and 3 dimensions. Use one of these.")
        if width < 1 or depth < 0:
            raise ConfigError(f"width is {width} and depth {depth}, but they count: at least 1 and 0.")
        self.dims = dims
        widths = (INVARIANTS[dims], *[width] * depth, BASIS_SIZE[dims])
        self.coefficients = Perceptron(widths, Activation(activation), rngs=rngs)

    def __call__(
        self, gradient: Float[Array, "*any d d"], time_scale: Float[ArrayLike, "*any"] | float | None = None
    ) -> Float[Array, "*any d d"]:
        """The anisotropy b, symmetric and traceless, without unit.

        Args:
            gradient: `[..., i, j]` = d u_i / d x_j.
            time_scale: of the turbulence, e.g. k / epsilon, to make gradients dimensionless. None: the inverse of the
                gradient's own size (strain and rotation together), with b = 0 where there is none.

        Raises SpecError for a gradient of another number of dimensions.
        """
        if gradient.ndim < 2 or gradient.shape[-2:] != (self.dims, self.dims):
            raise SpecError(
                f"The gradient has shape {gradient.shape}, but (..., {self.dims}, {self.dims}) was expected: velocity "
                "components, then directions of differentiation."
            )
        if time_scale is None:
            squared = jnp.sum(jnp.square(gradient), (-2, -1))
            moving = squared > 0
            time_scale = jnp.where(moving, jax.lax.rsqrt(jnp.where(moving, squared, 1)), 0)
        scaled = gradient * jnp.asarray(time_scale, gradient.dtype)[..., None, None]
        strain, rotation = strain_and_rotation(scaled)
        weights = self.coefficients(invariants(strain, rotation))
        return jnp.einsum("...n,...nij->...ij", weights, tensor_basis(strain, rotation), precision="highest")


def velocity_gradient(
    velocity: Float[ArrayLike, "batch *space d"], spacing: tuple[float, ...], axes: tuple[int, ...] | None = None
) -> Float[Array, "batch *space d d"]:
    """`[..., i, j]` = d u_i / d x_j by central differences on a periodic grid, of second order.

    Args:
        spacing: distance of neighboring points along x_j, for each component's direction j.
        axes: number of the space axis that is direction j; for u, v stored on (y, x): (1, 0). Default 0, 1, ...

    Raises SpecError where there are not as many of these as components.
    """
    velocity = jnp.asarray(velocity)
    dims = velocity.shape[-1]
    axes = tuple(range(dims)) if axes is None else axes
    if not len(axes) == len(spacing) == dims == velocity.ndim - 2 or sorted(axes) != list(range(dims)):
        raise SpecError(
            f"A velocity of shape {velocity.shape} needs {dims} spacings and the numbers of {dims} space axes, but "
            f"got spacing={spacing} and axes={axes}. Give one of each per component."
        )
    slopes = [
        (jnp.roll(velocity, -1, 1 + axis) - jnp.roll(velocity, 1, 1 + axis)) / (2 * distance)
        for axis, distance in zip(axes, spacing)
    ]
    return jnp.stack(slopes, axis=-1)


def strain_and_rotation(gradient: Float[Array, "*any d d"]) -> tuple[Array, Array]:
    """The symmetric traceless and the antisymmetric part of a velocity gradient."""
    transposed = jnp.swapaxes(gradient, -1, -2)
    return _deviator((gradient + transposed) / 2), (gradient - transposed) / 2


def invariants(strain: Float[Array, "*any d d"], rotation: Float[Array, "*any d d"]) -> Float[Array, "*any n"]:
    """The independent traces: of s2, r2 in two dimensions; of s2, r2, s3, r2 s, r2 s2 in three (Pope 1975)."""
    s2, r2 = _product(strain, strain), _product(rotation, rotation)
    found = [_trace(s2), _trace(r2)]
    if strain.shape[-1] == 3:
        found += [_trace(_product(s2, strain)), _trace(_product(r2, strain)), _trace(_product(r2, s2))]
    return jnp.stack(found, axis=-1)


def tensor_basis(strain: Float[Array, "*any d d"], rotation: Float[Array, "*any d d"]) -> Float[Array, "*any n d d"]:
    """The symmetric traceless tensors T_1 = s, T_2 = s r - r s, ...: two in two dimensions, Pope's ten in three."""
    s, r = strain, rotation
    sr = _product(s, r)
    # r is antisymmetric: the transpose of s r is -r s, and so on below.
    basis = [s, sr + _transposed(sr)]
    if strain.shape[-1] == 3:
        s2, r2 = _product(s, s), _product(r, r)
        s2r, sr2, s2r2 = _product(s2, r), _product(s, r2), _product(s2, r2)
        rsr2, srs2, rs2r2 = _product(r, sr2), _product(sr, s2), _product(r, s2r2)
        basis += [
            _deviator(s2),
            _deviator(r2),
            -(s2r + _transposed(s2r)),
            _deviator(sr2 + _transposed(sr2)),
            rsr2 + _transposed(rsr2),
            srs2 + _transposed(srs2),
            _deviator(s2r2 + _transposed(s2r2)),
            rs2r2 + _transposed(rs2r2),
        ]
    return jnp.stack(basis, axis=-3)


def _product(a, b):
    # Products in tensor-float format would spoil the seven digits to which results must not turn with the frame.
    return jnp.matmul(a, b, precision="highest")


def _transposed(a):
    return jnp.swapaxes(a, -1, -2)


def _trace(a):
    return jnp.trace(a, axis1=-2, axis2=-1)


def _deviator(a):
    return a - _trace(a)[..., None, None] / a.shape[-1] * jnp.eye(a.shape[-1], dtype=a.dtype)
