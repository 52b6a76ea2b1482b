"""The tensor basis closure: isotropy, Pope's formulas, and the linear eddy viscosity inside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError, SpecError
from physml.layers.tensor_basis import (
    TensorBasis,
    invariants,
    strain_and_rotation,
    tensor_basis,
    velocity_gradient,
)


def gradients(dims: int, count: int = 50) -> np.ndarray:
    """Random gradients of flows without divergence."""
    found = np.random.default_rng(dims).normal(size=(count, dims, dims))
    return (found - np.trace(found, axis1=1, axis2=2)[:, None, None] / dims * np.eye(dims)).astype(np.float32)


def orthogonal(dims: int, seed: int) -> np.ndarray:
    """A random rotation or, for odd seeds, a rotation and a mirror."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(dims, dims)))[0]
    turn[0] *= np.sign(np.linalg.det(turn)) * (-1) ** seed
    return turn


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_turns_with_the_frame_of_reference(dims, seed):
    layer, turn = TensorBasis(dims, rngs=nnx.Rngs(0)), orthogonal(dims, seed)
    gradient = gradients(dims)
    expected = turn @ np.asarray(layer(gradient), np.float64) @ turn.T
    found = layer((turn @ gradient @ turn.T).astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())  # products of ten float32 numbers
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("dims", [2, 3])
def test_is_symmetric_and_traceless_and_varies(dims):
    found = np.asarray(TensorBasis(dims, rngs=nnx.Rngs(0))(gradients(dims)))
    np.testing.assert_allclose(found, np.swapaxes(found, 1, 2), atol=1e-7)
    np.testing.assert_allclose(np.trace(found, axis1=1, axis2=2), 0, atol=1e-6)
    assert found.std(0).min() > 1e-3


def test_basis_is_that_of_pope():
    strain, rotation = (np.asarray(a, np.float64) for a in strain_and_rotation(gradients(3, 4)))
    found = np.asarray(tensor_basis(jnp.asarray(strain, jnp.float32), jnp.asarray(rotation, jnp.float32)))
    s, r, eye = strain, rotation, np.eye(3)

    def trace(a):
        return np.trace(a, axis1=1, axis2=2)[:, None, None]

    expected = [
        s,
        s @ r - r @ s,
        s @ s - trace(s @ s) * eye / 3,
        r @ r - trace(r @ r) * eye / 3,
        r @ s @ s - s @ s @ r,
        r @ r @ s + s @ r @ r - 2 * trace(s @ r @ r) * eye / 3,
        r @ s @ r @ r - r @ r @ s @ r,
        s @ r @ s @ s - s @ s @ r @ s,
        r @ r @ s @ s + s @ s @ r @ r - 2 * trace(s @ s @ r @ r) * eye / 3,
        r @ s @ s @ r @ r - r @ r @ s @ s @ r,
    ]
    for number, tensor in enumerate(expected):
        np.testing.assert_allclose(found[:, number], tensor, atol=2e-6 * np.abs(tensor).max(), err_msg=f"T{number + 1}")
    traces = [s @ s, r @ r, s @ s @ s, r @ r @ s, r @ r @ s @ s]
    expected = np.stack([trace(a)[:, 0, 0] for a in traces], -1)
    found = invariants(jnp.asarray(s, jnp.float32), jnp.asarray(r, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_two_dimensions_need_two_tensors():
    """Of plane flow the other eight are multiples of the first two, or of a tensor that pressure absorbs."""
    plane = np.zeros((20, 3, 3), np.float32)
    plane[:, :2, :2] = gradients(2, 20)
    s, r = strain_and_rotation(jnp.asarray(plane))
    basis = np.asarray(tensor_basis(s, r))[:, :, :2, :2]
    basis = basis - np.trace(basis, axis1=2, axis2=3)[..., None, None] / 2 * np.eye(2)
    for sample in basis:
        sample = sample.reshape(10, 4)
        sample = sample / np.maximum(np.linalg.norm(sample, axis=1, keepdims=True), 1e-3)
        assert np.linalg.matrix_rank(sample, tol=1e-3) == 2


@pytest.mark.parametrize("dims", [2, 3])
def test_linear_eddy_viscosity_is_a_special_case(dims):
    """g_1 = -C_mu and no others: b = -C_mu (k / epsilon) S, the k-epsilon model."""
    layer = TensorBasis(dims, depth=1, rngs=nnx.Rngs(0))
    last = layer.coefficients.maps[-1]
    last.weight[...] = jnp.zeros_like(last.weight[...])
    last.bias[...] = jnp.zeros_like(last.bias[...]).at[0].set(-0.09)
    gradient, time_scale = gradients(dims), np.linspace(0.5, 2, 50, dtype=np.float32)
    strain = (gradient + np.swapaxes(gradient, 1, 2)) / 2
    expected = -0.09 * time_scale[:, None, None] * strain
    np.testing.assert_allclose(layer(gradient, time_scale), expected, rtol=1e-5, atol=1e-7)


def test_own_time_scale_makes_it_independent_of_units_and_safe_at_rest():
    layer = TensorBasis(2, rngs=nnx.Rngs(0))
    gradient = gradients(2)
    np.testing.assert_allclose(layer(7.3 * gradient), layer(gradient), rtol=1e-5, atol=1e-6)
    rest = jnp.zeros((3, 2, 2))
    assert not np.any(layer(rest))
    assert np.isfinite(jax.grad(lambda g: jnp.sum(layer(g) ** 2))(rest)).all()


def test_gradients_vmap_and_jit():
    layer = TensorBasis(3, rngs=nnx.Rngs(0))
    gradient = gradients(3, 6)
    np.testing.assert_allclose(jax.vmap(layer)(gradient), layer(gradient), atol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda m, g: m(g))(layer, gradient), layer(gradient), atol=1e-6)
    slopes = nnx.grad(lambda m: jnp.sum(m(gradient) ** 2))(layer)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(slopes))


def test_velocity_gradient_of_a_wave():
    n = 64
    y, x = np.meshgrid(*[2 * np.pi * np.arange(n) / n] * 2, indexing="ij")
    velocity = np.stack([np.sin(x + 2 * y), np.cos(3 * x)], -1)[None].astype(np.float32)
    found = velocity_gradient(velocity, (2 * np.pi / n,) * 2, axes=(1, 0))[0]
    zero = np.zeros_like(x)
    expected = [[np.cos(x + 2 * y), 2 * np.cos(x + 2 * y)], [-3 * np.sin(3 * x), zero]]
    for i in range(2):
        for j in range(2):
            np.testing.assert_allclose(found[..., i, j], expected[i][j], atol=0.05)  # (k h)^2 / 6 of 3 at k = 3


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="2 and 3 dimensions"):
        TensorBasis(1, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="width"):
        TensorBasis(2, width=0, rngs=nnx.Rngs(0))
    with pytest.raises(SpecError, match="gradient has shape"):
        TensorBasis(3, rngs=nnx.Rngs(0))(jnp.zeros((4, 2, 2)))
    with pytest.raises(SpecError, match="spacings"):
        velocity_gradient(jnp.zeros((1, 8, 8, 2)), (1.0,))
