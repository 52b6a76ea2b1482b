"""Chaotic equations against independent trajectories, conserved quantities and Lyapunov exponents."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.data import open_dataset, spec_of
from physml.data.dataset import XarrayDataset
from physml.data.generate import generate
from physml.errors import ConfigError
from physml.solvers import Chen, HenonHeiles, Lorenz63, Lorenz84, Lorenz96, Rossler, Thomas, make_solver
from physml.solvers.chaos import henon_heiles_potential

REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return file["states"]


def follow(solver, state, steps):
    step = solver.stepper()

    def advance(state, _):
        state = step(state)
        return state, state

    return np.asarray(jax.jit(lambda s: jax.lax.scan(advance, s, None, length=steps)[1])(state))


def test_lorenz63_follows_the_reference(float64):
    exact = reference("lorenz63")  # every 0.1; rounding grows by exp(0.906 t)
    states = follow(Lorenz63(time_step=0.1, substeps=100), exact[0], 150)
    assert abs(states[:50] - exact[1:51]).max() < 1e-7
    assert abs(states - exact[1:]).max() < 2e-5


def test_lorenz96_follows_the_reference(float64):
    exact = reference("lorenz96")  # every 0.2
    states = follow(Lorenz96(time_step=0.2, substeps=200), exact[0][:, None], 25)[..., 0]
    assert abs(states[4] - exact[5]).max() < 5e-7
    assert abs(states - exact[1:]).max() < 1e-3  # errors grow by exp(1.67 t)


@pytest.mark.parametrize("solver", [Lorenz63, Lorenz84, Rossler, Chen, Thomas, HenonHeiles, Lorenz96])
def test_of_fourth_order(float64, solver):
    start = solver(warmup=0.0).initial(jax.random.key(0))
    runs = [
        jax.jit(solver(time_step=0.08, substeps=count).stepper())(start) for count in (8, 16, 32)
    ]  # steps of 0.01 and less
    coarse, fine = (np.linalg.norm(runs[i] - runs[i + 1]) for i in range(2))
    assert 3.7 < np.log2(coarse / fine) < 4.3


def test_henon_heiles_keeps_its_energy(float64):
    """Also of the drawn one: every start has the energy asked for, within the well."""
    solver = HenonHeiles(energy=(0.05, 1 / 6))
    energies = jnp.linspace(0.05, 1 / 6, 16)
    starts = jax.vmap(lambda key, e: solver.initial(key, energy=e))(jax.random.split(jax.random.key(0), 16), energies)

    def energy(state):
        x, y, u, v = np.moveaxis(np.asarray(state), -1, 0)
        return (u**2 + v**2) / 2 + henon_heiles_potential(x, y)

    assert_allclose(energy(starts), energies, rtol=1e-12)
    step = jax.jit(jax.vmap(lambda s: solver.stepper(energy=0.1)(s)))
    states = starts
    for _ in range(40):
        states = step(states)
    assert_allclose(energy(states), energies, rtol=1e-7)


@pytest.mark.parametrize(
    ("solver", "shrinking"),
    [(Lorenz63(), -(10 + 1 + 8 / 3)), (Chen(), -(35 + 3 - 28)), (Thomas(), -3 * 0.18), (HenonHeiles(), 0.0)],
)
def test_volumes_shrink_as_the_divergence_says(float64, solver, shrinking):
    """These have the same divergence everywhere, so the determinant of a step's Jacobian is exp(divergence t)."""
    state = solver.initial(jax.random.key(2))
    _, logarithm = np.linalg.slogdet(jax.jit(jax.jacfwd(solver.stepper()))(state))
    assert_allclose(logarithm, shrinking * solver.time_step, atol=1e-6)


def test_fixed_points_stay(float64):
    """Of Lorenz 63 the center of a wing, of Lorenz 96 all sites at the forcing, of Rossler the inner one."""
    c = np.sqrt(8 / 3 * 27)
    a, b, d = 0.2, 0.2, 5.7
    z = (d - np.sqrt(d**2 - 4 * a * b)) / (2 * a)
    cases = (
        (Lorenz63(), np.array([c, c, 27.0])),
        (Lorenz96(), np.full((40, 1), 8.0)),
        (Rossler(), np.array([a * z, -z, z])),
    )
    for solver, state in cases:
        assert_allclose(jax.jit(solver.stepper())(state), state, atol=1e-10)


def exponent(solver, steps, starts):
    """The leading Lyapunov exponent: mean growth of a small difference, over trajectories and time."""
    step = solver.stepper()

    def run(key):
        state = solver.initial(key)
        state = jax.lax.fori_loop(0, round(solver.warmup / solver.time_step), lambda _, s: step(s), state)
        other = jax.random.normal(jax.random.fold_in(key, 1), state.shape)

        def grow(carry, _):
            state, other = jax.jvp(step, *((x,) for x in carry))
            size = jnp.linalg.norm(other)
            return (state, other / size), jnp.log(size)

        return jax.lax.scan(grow, (state, other), None, length=steps)[1][50:].mean()

    return float(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), starts)).mean() / solver.time_step)


def test_the_leading_exponents(float64):
    assert exponent(Lorenz63(), 2000, 16) == pytest.approx(0.906, abs=0.03)
    assert exponent(Rossler(), 1000, 32) == pytest.approx(0.0714, abs=0.007)


@pytest.mark.slow
def test_the_leading_exponents_of_the_larger_ones(float64):
    # Its standard error is 0.005; rounding decides which trajectories these are.
    assert exponent(Lorenz96(), 2000, 256) == pytest.approx(1.67, abs=0.03)
    assert exponent(Chen(), 4000, 32) == pytest.approx(2.03, abs=0.05)


def test_a_file_without_space_is_a_dataset(tmp_path):
    """Channels named, or found: all that changes with time."""
    path = generate(Lorenz63(warmup=1.0, rho=(27.0, 28.0)), tmp_path / "a.nc", 3, steps=20)
    data = open_dataset(path)
    assert dict(data.x.sizes) == {"trajectory": 3, "time": 21}
    spec = spec_of(data, ["x", "y", "z"], parameters=["rho"])
    assert spec.grid.shape == ()
    dataset = XarrayDataset(data, spec)
    window = dataset.read(1, range(2, 6))
    assert window.frames.shape == (4, 3)
    assert_allclose(window.frames[:, 2], data.z.values[1, 2:6])
    zarr = open_dataset(generate(Lorenz63(warmup=1.0, rho=(27.0, 28.0)), tmp_path / "a.zarr", 3, steps=20))
    assert_allclose(zarr.z.values, data.z.values)


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("lorenz63", {"sigma": (11.0, 10.0)}, ["sigma", "increasing"]),
        ("lorenz63", {"substeps": 0}, ["substeps is 0"]),
        ("lorenz63", {"initial_spread": 0.0}, ["initial_spread is 0.0"]),
        ("lorenz96", {"points": 3}, ["points is 3", "at least 4"]),
        ("henon_heiles", {"energy": 0.2}, ["energy is 0.2", "1/6"]),
    ],
)
def test_a_mistake_is_named(name, fields, parts):
    with pytest.raises(ConfigError) as caught:
        make_solver(name, **fields)
    assert all(part in str(caught.value) for part in parts), caught.value
