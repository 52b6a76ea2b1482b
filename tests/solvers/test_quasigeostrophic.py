"""Two-layer quasi-geostrophic flow against linear theory, an independent trajectory, and its statistics."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError, DependencyError
from physml.solvers import Quasigeostrophic, make_solver

REFERENCE = pathlib.Path(__file__).parent / "reference"
DAY = 86400.0


@pytest.fixture
def float64():
    pytest.importorskip("pyqg_jax", reason="the extra `qg` is not installed")
    with jax.enable_x64(True):
        yield


def growing_mode(solver, mode):
    """Growth rate in 1/s and potential vorticity (2,) of the fastest wave exp(i k x) without drag (Phillips 1954)."""
    k, delta, shear = 2 * np.pi * mode / solver.length, solver.thickness_ratio, solver.shear
    first = solver.deformation_radius**-2 / (1 + delta)
    second = delta * first
    invert = np.linalg.inv([[-(k**2) - first, first], [second, -(k**2) - second]])
    slopes = np.diag([solver.beta + first * shear, solver.beta - second * shear])
    rates, modes = np.linalg.eig(-1j * k * (np.diag([shear, 0.0]) + slopes @ invert))
    fastest = rates.real.argmax()
    return rates[fastest], modes[:, fastest]


@pytest.mark.parametrize(("configuration", "mode"), [("eddy", 6), ("jet", 8)])
def test_the_phillips_instability_grows_at_its_rate(float64, configuration, mode):
    solver = Quasigeostrophic(configuration=configuration, points=32, initial_modes=4, substeps=48)
    rate, shape = growing_mode(solver, mode)
    if configuration == "eddy":
        assert rate.real * DAY == pytest.approx(0.0137105517, rel=1e-8)
    x = (np.arange(32) + 0.5) / 32
    wave = np.exp(2j * np.pi * mode * x)

    def field(time):
        return np.broadcast_to(1e-6 * (np.exp(rate * time) * wave[:, None] * shape).real, (32, 32, 2))

    after = jax.jit(solver.stepper(**{**parameters(solver), "drag": 0.0}))(field(0))
    assert_allclose(after, field(DAY), atol=1e-12 * abs(field(0)).max() + 1e-16)


def parameters(solver):
    return {name: getattr(solver, name) for name in solver.parameters}


def test_quasigeostrophic_follows_the_reference(float64):
    """Half a day and two days from a stationary state. The reference starts with an Euler step, which is why it is only
    met to 3e-4; more steps change nothing, because the filter acts once an hour whatever the step.
    """
    with np.load(REFERENCE / "quasigeostrophic.npz") as data:
        initial, frames, energy = data["initial"], data["frames"], data["kinetic_energy"]
    solver = Quasigeostrophic(time_step=DAY / 2, substeps=12)
    step = jax.jit(solver.stepper())
    state = step(initial)
    assert np.linalg.norm(state - frames[0]) < 4e-4 * np.linalg.norm(frames[0])
    twice = jax.jit(Quasigeostrophic(time_step=DAY / 2, substeps=24).stepper())(initial)
    assert np.linalg.norm(state - twice) < 6e-4 * np.linalg.norm(frames[0])
    for _ in range(3):
        state = step(state)
    assert np.linalg.norm(state - frames[1]) < 2e-3 * np.linalg.norm(frames[1])
    assert solver.kinetic_energy(state) == pytest.approx(energy[4], rel=1e-3)


@pytest.mark.slow
def test_potential_vorticity_keeps_its_mean_and_drag_takes_energy(float64):
    solver = Quasigeostrophic(
        points=32, initial_modes=4, shear=0.0, beta=0.0, drag=1e-6, time_step=5 * DAY, substeps=60
    )
    state = solver.initial(jax.random.key(0))
    calm = jax.jit(solver.stepper())(state)
    free = jax.jit(solver.stepper(**{**parameters(solver), "drag": 0.0}))(state)
    energies = [float(solver.kinetic_energy(s)) for s in (state, calm, free)]
    assert energies[0] == pytest.approx(0.02**2 / 2, rel=1e-3)
    assert_allclose(calm.mean((0, 1)), 0, atol=1e-18)
    assert energies[1] < 0.9 * energies[0]
    assert energies[2] == pytest.approx(energies[0], rel=0.02)  # the filter takes little from large eddies


@pytest.mark.slow
def test_turbulence_becomes_stationary(float64):
    """After the usual warm-up, energy and potential vorticity stay near those of an independent run."""
    with np.load(REFERENCE / "quasigeostrophic.npz") as data:
        initial, energy = data["initial"], data["kinetic_energy"]
    solver = Quasigeostrophic(time_step=30 * DAY, substeps=360)
    step = jax.jit(solver.stepper())
    state, energies, variances = solver.initial(jax.random.key(0)), [], []
    for number in range(84):
        state = step(state)
        if number >= 60:
            energies.append(float(solver.kinetic_energy(state)))
            variances.append(np.asarray(state).std((0, 1)))
    assert np.mean(energies) == pytest.approx(energy.mean(), rel=0.15)
    assert np.mean(energies[:12]) == pytest.approx(np.mean(energies[12:]), rel=0.15)
    assert_allclose(np.mean(variances, 0), initial.std((0, 1)), rtol=0.1)


def test_configurations():
    jet = make_solver("quasigeostrophic", configuration="jet")
    assert (jet.drag, jet.thickness_ratio, jet.beta) == (7e-8, 0.1, 1e-11)
    assert make_solver("quasigeostrophic", configuration="eddy").drag == Quasigeostrophic().drag


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"configuration": "jets"}, ["jets", "jet"]),
        ({"configuration": "jet", "drag": 1e-6}, ["configuration='jet'", "drag=1e-06"]),
        ({"points": 63}, ["points is 63", "even"]),
        ({"points": 16}, ["initial_modes is 12", "points / 3 = 5"]),
        ({"thickness_ratio": 0.0}, ["thickness_ratio is 0.0", "positive"]),
    ],
)
def test_a_mistake_is_named(fields, parts):
    with pytest.raises(ConfigError) as caught:
        make_solver("quasigeostrophic", **fields)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyqg_jax.qg_model", None)
    solver = Quasigeostrophic(points=16, initial_modes=4)
    with pytest.raises(DependencyError, match=r"pyqg_jax is not installed. Run `pip install 'physml\[qg\]'`"):
        solver.stepper()(solver.initial(jax.random.key(0)))
    assert jnp.isfinite(solver.initial(jax.random.key(0))).all()
