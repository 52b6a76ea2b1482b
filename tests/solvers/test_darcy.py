"""Darcy flow against exact solutions, and the matrix and the random media against what they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.data.generate import generate
from physml.errors import ConfigError, DivergedError
from physml.solvers import DarcyFlow, darcy


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def centers(points):
    return (np.arange(points) + 0.5) / points


def test_sines_at_second_order():
    errors = []
    for points in (16, 32, 64):
        product = np.sin(np.pi * centers(points))[:, None] * np.sin(np.pi * centers(points))
        solved = darcy.solve(np.ones((points, points)), 2 * np.pi**2 * product)
        errors.append(abs(solved - product).max())
    assert_allclose(errors[-1], 2.0e-4, rtol=0.05)
    assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 2, atol=0.05)


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_are_exact(axis):
    """A source in one cell: the solution is linear in the resistance of the layers, on both sides of it.

    One row of cells loses 4 k u through its two edges; the source makes up for that.
    """
    points, at = 32, 20
    k = np.where(centers(points) < 0.5, 1.0, 100.0)
    resistance = np.interp(centers(points), [0, 0.5, 1], [0, 0.5, 0.505])
    expected = np.minimum(resistance, resistance[at]) * (0.505 - np.maximum(resistance, resistance[at])) / 0.505
    source = 4 * k * expected
    source[at] += points
    shape = (1, points) if axis else (points, 1)
    solved = darcy.solve(k.reshape(shape), source.reshape(shape))
    assert_allclose(solved.ravel(), expected, rtol=1e-8)


def test_the_matrix_is_symmetric_and_positive():
    coefficient = np.exp(2 * np.random.default_rng(0).standard_normal((6, 5)))
    apply = jax.vmap(darcy.conductance(jnp.asarray(coefficient)))
    matrix = np.asarray(apply(jnp.eye(30).reshape(30, 6, 5))).reshape(30, 30)
    assert_allclose(matrix, matrix.T, rtol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > 0
    solved = np.asarray(darcy.solve(coefficient, np.ones((6, 5))))
    assert_allclose(matrix @ solved.ravel(), 1, rtol=1e-8)
    assert solved.min() > 0


@pytest.mark.parametrize("medium", ["binary", "lognormal"])
def test_random_media(medium):
    states = jax.vmap(DarcyFlow(points=32, medium=medium).initial)(jax.random.split(jax.random.key(0), 24))
    coefficient, solution = np.asarray(states["coefficient"]), np.asarray(states["solution"])
    if medium == "binary":
        assert set(np.unique(coefficient)) == {3.0, 12.0}
        assert 0.4 < (coefficient == 12).mean() < 0.6
    else:
        assert_allclose(np.log(coefficient).std(), 1, atol=0.15)
    assert (solution > 0).all()
    residual = [
        darcy.conductance(jnp.asarray(c))(jnp.asarray(u)) - 1 for c, u in zip(coefficient, solution, strict=True)
    ]
    assert np.abs(residual).max() < 1e-8


def test_the_field_is_the_same_at_every_resolution():
    """Twice as many cells: the means of four cells approach the values of the coarse ones."""
    key = jax.random.key(3)
    coarse, fine = (np.asarray(darcy.gaussian_field(key, points, 8)) for points in (64, 128))
    assert_allclose(fine.reshape(64, 2, 64, 2).mean(axis=(1, 3)), coarse, atol=6e-3)
    variance = np.mean([darcy.gaussian_field(jax.random.key(i), 32, 8) ** 2 for i in range(200)])
    assert_allclose(variance, 1, atol=0.15)


def test_the_gradient_of_the_solution():
    key = jax.random.key(1)
    coefficient = jnp.exp(jax.random.normal(key, (8, 8)))
    direction = jax.random.normal(jax.random.key(2), (8, 8))

    def mean(coefficient):
        return darcy.solve(coefficient, jnp.ones((8, 8))).mean()

    slope = jnp.vdot(jax.grad(mean)(coefficient), direction)
    quotient = (mean(coefficient + 1e-5 * direction) - mean(coefficient - 1e-5 * direction)) / 2e-5
    assert_allclose(slope, quotient, rtol=1e-6)


def test_too_few_iterations_are_reported(tmp_path):
    with pytest.raises(DivergedError, match=r"DarcyFlow: trajectory 0 is not finite.*raise iterations"):
        generate(DarcyFlow(points=16, iterations=2), tmp_path / "a.nc", 1)
    assert not (tmp_path / "a.nc").exists()


def test_impossible_configs():
    with pytest.raises(ConfigError, match="low is 0.0, but it must be positive"):
        DarcyFlow(low=0.0)
    with pytest.raises(ConfigError, match="iterations is 0"):
        DarcyFlow(iterations=0)
