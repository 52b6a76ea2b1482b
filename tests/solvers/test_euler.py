"""The compressible Euler equations against exact Riemann problems, a travelling vortex, balances and symmetries."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError, DivergedError
from physml.solvers import Euler, euler
from physml.solvers.ensemble import Ensemble, precision

PROBLEMS = {  # left and right density, velocity, pressure; where they meet; time (Toro 2009, section 10.8)
    "sod": ((1.0, 0.0, 1.0), (0.125, 0.0, 0.1), 0.5, 0.2),
    "toro1_modsod": ((1.0, 0.75, 1.0), (0.125, 0.0, 0.1), 0.3, 0.2),
    "toro2_123": ((1.0, -2.0, 0.4), (1.0, 2.0, 0.4), 0.5, 0.15),
    "toro3_blast": ((1.0, 0.0, 1000.0), (1.0, 0.0, 0.01), 0.5, 0.012),
}


@pytest.fixture(scope="module")
def exact():
    with np.load(pathlib.Path(__file__).parent / "reference" / "riemann1d_exact.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tube(problem, points, axis):
    """Density, normal velocity and pressure of a Riemann problem in a strip of four cells, along `axis`."""
    left, right, middle, time = PROBLEMS[problem]
    inside = (np.arange(points) + 0.5) / points < middle
    density, normal, pressure = (
        np.broadcast_to(np.where(inside, a, b), (4, points)) for a, b in zip(left, right, strict=True)
    )
    zero = np.zeros((4, points))
    fields = (density, normal, zero, pressure) if axis else (density.T, zero.T, normal.T, pressure.T)
    solver = Euler(points=points, solver_points=points, boundary="outflow", time_step=time)
    state = jax.jit(solver.stepper())(euler.conserved(euler.Primitive(*map(jnp.asarray, fields)), 1.4))
    gas = euler.primitive(state)
    tangential = gas.v if axis else gas.u
    assert abs(tangential).max() == 0
    found = (gas.density, gas.u, gas.pressure) if axis else (gas.density.T, gas.v.T, gas.pressure.T)
    assert_allclose(np.ptp(np.asarray(found), axis=1), 0, atol=1e-11)
    return [np.asarray(field[0]) for field in found]


def distance(exact, problem, points, axis):
    """Mean absolute errors of density, velocity and pressure."""
    found = tube(problem, points, axis)
    names = (f"{problem}_{name}" for name in ("rho", "u", "p"))
    return [abs(a - exact[n].reshape(points, -1).mean(axis=1)).mean() for a, n in zip(found, names, strict=True)]


def test_sod_along_both_axes(exact):
    errors = [distance(exact, "sod", points, 1)[0] for points in (100, 200)]
    assert errors[0] < 4.5e-3
    assert errors[1] < 2.82e-3  # 2.81e-3 measured
    assert_allclose(distance(exact, "sod", 100, 0)[0], errors[0], rtol=1e-9)


def test_the_star_state_of_sod():
    density, velocity, pressure = tube("sod", 200, 1)
    star = slice(145, 165)  # between the contact at 0.685 and the shock at 0.850
    assert_allclose(pressure[star], 0.30313018, rtol=2e-3)
    assert_allclose(velocity[star], 0.92745262, rtol=2e-3)
    assert_allclose(density[star], 0.26557371, rtol=5e-3)


@pytest.mark.parametrize(
    ("problem", "bounds"),
    [("toro1_modsod", (6e-3, 1.2e-2, 4e-3)), ("toro2_123", (8e-3, 2.6e-2, 5e-3)), ("toro3_blast", (0.13, 0.42, 7.6))],
)
def test_harder_tubes(exact, problem, bounds):
    """A sonic rarefaction, a near vacuum, and a jump of 10^5 in pressure, which need the floor and the wave speeds."""
    assert all(error < bound for error, bound in zip(distance(exact, problem, 100, 1), bounds, strict=True))


def vortex(points, time, drift=1.0, strength=5.0):
    """The isentropic vortex of Shu 1998 on [0, 10)^2; its means over cells by 16 points in each."""
    fine = 4 * points
    axis = (np.arange(fine) + 0.5) * 10 / fine - drift * time - 5
    axis = (axis + 5) % 10 - 5
    y, x = axis[:, None], axis[None, :]
    swirl = strength / (2 * np.pi) * np.exp((1 - x**2 - y**2) / 2)
    density = (1 - 0.4 * swirl**2 / 2.8) ** 2.5
    gas = euler.Primitive(density, drift - swirl * y, drift + swirl * x, density**1.4)
    state = euler.conserved(gas, 1.4)
    means = [np.asarray(field).reshape(points, 4, points, 4).mean(axis=(1, 3)) for field in state[:4]]
    return euler.Conserved(*map(jnp.asarray, means), jnp.asarray(1.4))


@pytest.mark.slow
def test_the_vortex_converges_at_second_order():
    errors = []
    for points in (32, 64, 128):
        solver = Euler(points=points, solver_points=points, length=10.0, time_step=2.0)
        state = jax.jit(solver.stepper())(vortex(points, 0.0))
        errors.append(float(abs(state.density - vortex(points, 2.0).density).mean()))
    assert errors[-1] < 3e-4
    assert np.log2(errors[1] / errors[2]) > 1.9


@pytest.mark.parametrize("family", ["gauss", "kelvin_helmholtz", "riemann"])
def test_a_periodic_box_keeps_mass_momentum_and_energy(family):
    solver = Euler(points=32, solver_points=32, initial_state=family, time_step=0.2)
    state = solver.initial(jax.random.key(2))
    after = jax.jit(solver.stepper())(state)
    scale = [float(abs(field).mean()) + 1e-3 for field in state[:4]]
    for a, b, size in zip(after[:4], state[:4], scale, strict=True):
        assert abs(float(a.mean() - b.mean())) < 1e-12 * size
    assert after.gamma == state.gamma

    def entropy(state):
        gas = euler.primitive(state)
        return float((gas.density * jnp.log(gas.pressure / gas.density**1.4)).mean())

    assert entropy(after) > entropy(state)


def test_walls_keep_mass_and_energy_and_reflect():
    """A pulse off the center: nothing leaves, and the mirrored state gives the mirrored result."""
    solver = Euler(points=24, solver_points=24, boundary="wall", time_step=0.3)
    x = (np.arange(24) + 0.5) / 24
    pulse = jnp.asarray(1 + np.exp(-50 * ((x - 0.3) ** 2 + (x[:, None] - 0.6) ** 2)))
    zero = jnp.zeros((24, 24))
    state = euler.conserved(euler.Primitive(pulse, 0.3 + zero, -0.2 + zero, pulse), 1.4)
    step = jax.jit(solver.stepper())
    after = step(state)
    assert_allclose(after.density.mean(), state.density.mean(), rtol=1e-13)
    assert_allclose(after.energy.mean(), state.energy.mean(), rtol=1e-13)
    assert abs(after.momentum_x.mean() - state.momentum_x.mean()) > 1e-3

    def mirrored(state):
        flipped = jax.tree.map(lambda field: field[:, ::-1] if field.ndim else field, state)
        return flipped._replace(momentum_x=-flipped.momentum_x)

    def turned(state):
        flipped = jax.tree.map(lambda field: field.T, state)
        return flipped._replace(momentum_x=flipped.momentum_y, momentum_y=flipped.momentum_x)

    for change in (mirrored, turned):
        for a, b in zip(step(change(state)), change(after), strict=True):
            assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_uniform_flow_stays():
    one = jnp.ones((8, 8))
    state = euler.conserved(euler.Primitive(one, 0.7 * one, -0.4 * one, 2 * one), 1.4)
    for boundary in ("periodic", "outflow"):
        after = Euler(points=8, solver_points=8, boundary=boundary).stepper()(state)
        for a, b in zip(after, state, strict=True):
            assert_allclose(a, b, rtol=1e-14)


def test_stored_cells_hold_the_mass_of_the_solver():
    solver = Euler(points=8, solver_points=32)
    state = solver.initial(jax.random.key(0))
    frame = np.asarray(solver.observe(state))
    assert frame.shape == (8, 8, 4)
    assert_allclose(frame[..., 0].mean(), state.density.mean(), rtol=1e-14)
    assert_allclose((frame[..., 0] * frame[..., 1]).mean(), state.momentum_x.mean(), rtol=1e-12)
    energy = frame[..., 3] / 0.4 + frame[..., 0] * (frame[..., 1:3] ** 2).sum(axis=-1) / 2
    assert_allclose(energy.mean(), state.energy.mean(), rtol=1e-13)


@pytest.mark.slow
def test_fixed_substeps_have_gradients_and_refuse_too_long_steps():
    solver = Euler(points=8, solver_points=8, initial_state="gauss", substeps=2, time_step=0.005)
    state = solver.initial(jax.random.key(0))

    def score(gamma):
        return jnp.sum(solver.stepper(gamma=gamma)(state).energy ** 2)

    slope = jax.jit(jax.grad(score))(1.4)
    assert_allclose(slope, (score(1.4 + 1e-5) - score(1.4 - 1e-5)) / 2e-5, rtol=1e-5)
    long = Euler(points=8, solver_points=8, substeps=1, time_step=0.5)
    with precision(long), pytest.raises(DivergedError, match=r"Euler: trajectory 0 is not finite.*Leave substeps out"):
        Ensemble(long, 1, 1).run(0)


def test_impossible_configs():
    with pytest.raises(ConfigError, match="courant is 0.9"):
        Euler(courant=0.9)
    with pytest.raises(ConfigError, match="gamma is 1.0, but it must be above 1"):
        Euler(gamma=1.0)
    with pytest.raises(ConfigError, match="length is 0"):
        Euler(length=0.0)
