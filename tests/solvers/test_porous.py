"""Heat, porous media and melting fronts against their closed forms, and their mass against what entered."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError, DivergedError
from physml.solvers import Heat, PorousMedium, Stefan, porous
from physml.solvers.ensemble import Ensemble, precision


@pytest.fixture(scope="module")
def exact():
    with np.load(pathlib.Path(__file__).parent / "reference" / "gpme_exact.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(solver, steps, **parameters):
    """The states after each of `steps` stored steps."""
    step = solver.stepper(**parameters)
    start = solver.initial(jax.random.key(0), **{k: v for k, v in parameters.items() if k in solver.parameters})
    return jax.jit(lambda start: jax.lax.scan(lambda state, _: (step(state),) * 2, start, None, steps)[1])(start)


def cell_means(points, fine, of):
    """Means over the cells of [0, 1] of a function, by `fine` points in each."""
    return np.asarray(of((np.arange(points * fine) + 0.5) / points / fine)).reshape(points, fine).mean(axis=1)


def orders(errors):
    return np.log2(np.asarray(errors[:-1]) / errors[1:])


def test_closed_forms(exact):
    for i, m in enumerate(exact["m_p"]):
        for j, t in enumerate(exact["time_p"]):
            found = porous.porous_medium_front(exact["x_p"], t, float(m))
            assert_allclose(found, exact["pme_front"][i, j], atol=1e-14)
            assert_allclose(porous.porous_medium_mass(t, float(m)), exact["pme_mass"][i, j], rtol=1e-14)
    assert_allclose(porous.stefan_speed(exact["ustar"]), exact["stefan_alpha"], rtol=1e-12)
    for i, threshold in enumerate(exact["ustar"]):
        for j, t in enumerate(exact["time_s"]):
            assert_allclose(porous.stefan_front(exact["x_p"], t, threshold), exact["stefan"][i, j], atol=1e-13)
            assert_allclose(porous.stefan_mass(t, threshold), exact["stefan_mass"][i, j], rtol=1e-13)


def test_the_speed_of_melting_has_the_slope_of_its_equation():
    slope = jax.grad(porous.stefan_speed)(0.6)
    assert_allclose(slope, (porous.stefan_speed(0.6 + 1e-5) - porous.stefan_speed(0.6 - 1e-5)) / 2e-5, rtol=1e-8)


def test_heat_decays_as_it_should():
    errors = []
    for points in (32, 64, 128):
        u = run(Heat(points=points, solver_points=points), 50, diffusivity=2.0)["u"][-1]
        mean = np.sinc(1 / points) * np.sin((np.arange(points) + 0.5) * 2 * np.pi / points)
        errors.append(abs(u - np.exp(-2) * mean).max())
    assert errors[-1] < 8e-5
    assert orders(errors)[-1] > 1.98


@pytest.mark.parametrize(("exponent", "error", "order"), [(1.0, 2.8e-5, 1.8), (3.0, 2.4e-4, 1.2), (6.0, 4.1e-4, 1.1)])
def test_a_porous_front(exact, exponent, error, order):
    """The error per length: second order only where the solution has a slope (exponent 1)."""
    errors = []
    for points in (50, 100, 200):
        state = run(PorousMedium(points=points, solver_points=points), 25, exponent=exponent)
        edge = 0.5 - np.arange(points + 1) / points
        integral = -(np.maximum(exponent * edge, 0) ** (1 / exponent + 1)) / (exponent + 1)
        errors.append(abs(state["u"][-1] - points * np.diff(integral)).mean())
        assert_allclose(state["u"].mean(axis=1), state["inflow"], rtol=0, atol=1e-12)
        assert state["u"].min() >= 0
        mass = exact["pme_mass"][list(exact["m_p"]).index(exponent), 1]
        assert_allclose(state["inflow"][-1], mass, rtol=0, atol=0.33 / points**2)
        front = np.flatnonzero(state["u"][-1] > 1e-3)[-1] + 1
        assert abs(front / points - 0.5) <= 1.001 / points
    assert errors[1] < error
    assert min(orders(errors)) > order


@pytest.mark.parametrize("threshold", [0.55, 0.6, 0.7])
def test_a_melting_front(exact, threshold):
    which = list(exact["ustar"]).index(threshold)
    errors = []
    for points in (50, 200):
        state = run(Stefan(points=points, solver_points=points), 50, threshold=threshold)
        expected = cell_means(points, 40, lambda x: porous.stefan_front(x, 0.1, threshold))
        errors.append(abs(state["u"][-1] - expected).mean())
        assert_allclose(state["u"].mean(axis=1), state["inflow"], rtol=0, atol=1e-12)
        for number, time in ((25, 1), (40, 2), (50, 3)):  # 0.05, 0.08, 0.1
            assert_allclose(state["inflow"][number - 1], exact["stefan_mass"][which, time], rtol=3 / points**2)
        assert state["u"].min() >= 0
        assert state["u"].max() <= 1
    assert errors[0] < 1e-3
    assert errors[1] < errors[0] / 2


class Spreading(PorousMedium):
    """Nothing enters: what Barenblatt's solution needs, in units of its length 8 and from any state."""

    length = 8.0

    def ends(self, time, parameter):
        return jnp.zeros_like(time), jnp.zeros_like(time)


@pytest.mark.parametrize("exponent", [2, 3, 4])
def test_barenblatt(exact, exponent):
    """u_t = (u^m)_xx is our equation with exponent m - 1 and time m t; the closed form is at the 400 centers."""
    profiles = exact["barenblatt"][exponent - 2]
    solver = Spreading(points=400, solver_points=400)
    zero = jnp.zeros(())
    state = {"u": jnp.asarray(profiles[0]), "time": zero, "inflow": zero}
    before = 0.5
    for time, profile in zip(exact["time_b"][1:], profiles[1:], strict=True):
        state = jax.jit(solver.stepper(exponent=exponent - 1.0, time_step=exponent * (time - before)))(state)
        before = time
        assert abs(state["u"] - profile).sum() * 0.02 < 2e-3 * profile.sum() * 0.02
        assert_allclose(state["u"].sum(), profiles[0].sum(), rtol=1e-12)
        assert state["inflow"] == 0


def test_fixed_substeps_have_gradients_and_refuse_too_long_steps():
    solver = PorousMedium(points=20, solver_points=20, substeps=4)
    state = run(solver, 10, exponent=2.0)

    def mass(exponent):
        return run(solver, 10, exponent=exponent)["inflow"][-1]

    slope = jax.grad(mass)(2.0)
    assert_allclose(slope, (mass(2.0 + 1e-5) - mass(2.0 - 1e-5)) / 2e-5, rtol=1e-6)
    assert_allclose(slope, jax.jvp(mass, (2.0,), (1.0,))[1], rtol=1e-9)
    assert np.isfinite(state["u"]).all()
    long = PorousMedium(points=100, solver_points=100, exponent=6.0, substeps=1)
    with precision(long), pytest.raises(DivergedError, match=r"PorousMedium.*not finite at time 0.02.*Leave substeps"):
        Ensemble(long, 5, 1).run(0)


def test_impossible_configs():
    with pytest.raises(ConfigError, match="threshold is 1.5, but it must be above 0 and below 1"):
        Stefan(threshold=1.5)
    with pytest.raises(ConfigError, match="exponent is .*increasing pair"):
        PorousMedium(exponent=(3.0, 2.0))
    with pytest.raises(ConfigError, match="stored cells are whole numbers of the solver's 100. Use solver_points=128"):
        Heat(points=64, solver_points=100)
    with pytest.raises(ConfigError, match="substeps is 0"):
        Heat(substeps=0)
