"""Transport on the sphere: budgets, bounds, and flows after which the tracer is back where it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError, DivergedError
from physml.solvers import TracerSphere, tracer
from physml.solvers.ensemble import Ensemble, precision

DAY = 86400.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def positions(rows):
    """Unit vectors at the corners and at the centers of the cells."""
    sphere = tracer.Sphere(rows)
    return [tracer._positions(*axes) for axes in (sphere.corners, sphere.centers)]


def bell(center, rows, radius=1 / 3, height=1.0):
    """A cosine bell around a unit vector."""
    angle = np.arccos(np.clip(positions(rows)[1] @ np.asarray(center), -1, 1))
    return np.where(angle < radius, height / 2 * (1 + np.cos(np.pi * angle / radius)), 0)


def solve(rows, start, stream, days, period=None, parts=1):
    """The tracer after each of `parts` equal parts of `days`."""
    solver = TracerSphere(points=rows, solver_points=rows, time_step=days * DAY / parts, period=period)
    state = tracer.Transport(jnp.asarray(start), tracer.face_fluxes(stream), jnp.zeros(()))
    step, states = jax.jit(solver.stepper()), []
    for _ in range(parts):
        state = step(state)
        states.append(np.asarray(state.tracer))
    return states


def norms(found, expected):
    """Relative l1, l2 and largest differences, weighted by area."""
    area = tracer.Sphere(len(found)).areas
    difference = abs(found - expected)
    l2 = np.sqrt((area * difference**2).sum() / (area * expected**2).sum())
    return (area * difference).sum() / (area * abs(expected)).sum(), l2, difference.max() / abs(expected).max()


@pytest.mark.parametrize(("angle", "bound"), [(0.0, 0.46), (np.pi / 2, 0.58)])
def test_a_bell_goes_round(angle, bound):
    """Williamson's case 1 along the equator and over both poles: back after 12 days; a bell of 7 cells."""
    rows = 32
    speed = 2 * np.pi * tracer.RADIUS / (12 * DAY)
    start = bell((0.0, -1.0, 0.0), rows)
    stream = tracer.rotation_stream(positions(rows)[0], speed, angle)
    end = solve(rows, start, stream, 12)[0]
    area = tracer.Sphere(rows).areas
    assert_allclose((area * end).sum(), (area * start).sum(), rtol=1e-12)
    assert end.min() > -1e-15
    assert end.max() <= start.max()
    assert norms(end, start)[1] < bound


@pytest.mark.slow
@pytest.mark.parametrize("angle", [0.0, np.pi / 2])
def test_the_bell_converges(angle):
    errors = []
    for rows in (32, 64):
        stream = tracer.rotation_stream(positions(rows)[0], 2 * np.pi * tracer.RADIUS / (12 * DAY), angle)
        start = bell((0.0, -1.0, 0.0), rows)
        errors.append(norms(solve(rows, start, stream, 12)[0], start)[1])
    assert errors[1] < (0.25 if angle else 0.17)
    assert np.log2(errors[0] / errors[1]) > 1.2


@pytest.mark.parametrize(("rows", "bound"), [(24, 0.55), pytest.param(64, 0.33, marks=pytest.mark.slow)])
def test_a_deformed_tracer_returns(rows, bound):
    """Nair and Lauritzen's case 2: two bells are drawn into filaments and back after 12 days."""
    pair = [(np.cos(a), np.sin(a), 0.0) for a in (5 * np.pi / 6, 7 * np.pi / 6)]
    start = 0.1 + 0.9 * sum(bell(center, rows, 0.5) for center in pair)
    stream = tracer.deformation_stream(positions(rows)[0], 2 * tracer.RADIUS * 5 / (12 * DAY))
    middle, end = solve(rows, start, stream, 12, 12 * DAY, parts=2)
    area = tracer.Sphere(rows).areas
    for state in (middle, end):
        assert_allclose((area * state).sum(), (area * start).sum(), rtol=1e-12)
        assert state.min() >= 0.1 - 1e-12
        assert state.max() <= 1 + 1e-12
    assert norms(middle, start)[1] > 1.5 * norms(end, start)[1]
    assert norms(end, start)[1] < bound


def test_a_constant_stays_constant_and_mass_is_exact():
    """In random winds over the poles, for 100 days; the extrema of blobs only shrink."""
    solver = TracerSphere(points=16, solver_points=16, time_step=10 * DAY, jet=20.0, eddies=15.0)
    state = solver.initial(jax.random.key(0))
    step = jax.jit(solver.stepper())
    area = tracer.Sphere(16).areas
    constant, moved = state._replace(tracer=jnp.full((16, 32), 400.0)), state
    for _ in range(10):
        previous, constant, moved = moved, step(constant), step(moved)
        assert moved.tracer.max() <= previous.tracer.max() * (1 + 1e-13)
        assert moved.tracer.min() >= previous.tracer.min() * (1 - 1e-12)
    assert_allclose(constant.tracer, 400.0, rtol=1e-12)
    assert_allclose((area * moved.tracer).sum(), (area * state.tracer).sum(), rtol=1e-12)
    assert np.ptp(moved.tracer) < 0.5 * np.ptp(state.tracer)


def test_winds_are_those_of_the_stream_function():
    rows, speed = 64, 30.0
    stream = tracer.rotation_stream(positions(rows)[0], speed, 0.0)
    winds = tracer.face_fluxes(stream)
    u, v = tracer.cell_winds(winds)
    latitude = tracer.Sphere(rows).centers[0][:, None]
    assert_allclose(u, np.broadcast_to(speed * np.cos(latitude), u.shape), rtol=2e-4)
    assert_allclose(v, 0, atol=1e-9)
    over = tracer.cell_winds(tracer.face_fluxes(tracer.rotation_stream(positions(rows)[0], speed, np.pi / 2)))
    longitude = tracer.Sphere(rows).centers[1]
    assert_allclose(over[1], np.broadcast_to(-speed * np.sin(longitude), v.shape), atol=0.1)
    divergence = np.diff(winds.meridional, axis=0) + np.roll(winds.zonal, -1, axis=1) - winds.zonal
    assert abs(divergence).max() < 1e-12 * abs(winds.zonal).max() * rows


def test_eddies_have_their_speed():
    rows = 24
    corner, area = positions(rows)[0], tracer.Sphere(rows).areas

    def energy(key):
        u, v = tracer.cell_winds(tracer.face_fluxes(tracer.eddy_stream(key, corner, 10.0)))
        return (area * (u**2 + v**2)).sum() / (area.sum() * 2 * rows)

    found = jax.vmap(energy)(jax.random.split(jax.random.key(0), 200)).mean()
    assert_allclose(np.sqrt(found), 10, rtol=0.08)


def test_sources_and_divergent_winds_close_the_budget():
    """Convergent air takes its tracer along: the mass of air and of tracer are exact, with a source on top."""
    rows = 12
    rng = np.random.default_rng(0)
    mass = jnp.asarray(tracer.Sphere(rows).areas * rng.uniform(0.9, 1.1, (rows, 2 * rows)))
    polar = np.pad(np.ones((rows - 1, 1)), ((1, 1), (0, 0)))
    least = float(mass.min())
    moved = tracer.Winds(
        jnp.asarray(0.2 * least * rng.uniform(-1, 1, (rows, 2 * rows))),
        jnp.asarray(0.2 * least * polar * rng.uniform(-1, 1, (rows + 1, 2 * rows))),
    )
    start, source = (jnp.asarray(rng.uniform(0, 1, (rows, 2 * rows))) for _ in range(2))
    end, after = jax.jit(tracer.transport)(start, mass, moved, source)
    assert_allclose(after.sum(), mass.sum(), rtol=1e-14)
    assert abs(after - mass).max() > 1e-3 * least
    assert_allclose((after * end).sum() - (mass * start).sum(), ((mass + after) / 2 * source).sum(), rtol=1e-12)
    constant, _ = tracer.transport(jnp.full_like(start, 3.0), mass, moved)
    assert_allclose(constant, 3.0, rtol=1e-13)


def test_the_stored_mean_weights_by_area():
    solver = TracerSphere(points=8, solver_points=16)
    state = solver.initial(jax.random.key(1))
    coarse, fine = tracer.Sphere(8).areas, tracer.Sphere(16).areas
    assert_allclose((coarse * solver.observe(state)[..., 0]).sum(), (fine * state.tracer).sum(), rtol=1e-12)
    assert_allclose(solver.grid.weights()[:, 0], coarse[:, 0] / coarse.mean(), rtol=1e-6)


@pytest.mark.slow
def test_fixed_substeps_have_gradients_and_refuse_too_long_steps():
    solver = TracerSphere(points=8, solver_points=8, substeps=2, time_step=3600.0)
    state = solver.initial(jax.random.key(0))
    target = jnp.asarray(np.random.default_rng(1).uniform(size=(8, 16)))

    def score(factor):
        winds = jax.tree.map(lambda wind: factor * wind, state.winds)
        return jnp.sum(target * solver.stepper()(state._replace(winds=winds)).tracer)

    slope = jax.jit(jax.grad(score))(1.0)
    assert_allclose(slope, (score(1 + 1e-5) - score(1 - 1e-5)) / 2e-5, rtol=1e-5)
    long = TracerSphere(points=16, solver_points=16, substeps=1, time_step=20 * DAY)
    with precision(long), pytest.raises(DivergedError, match=r"TracerSphere: trajectory 0.*Leave substeps out"):
        Ensemble(long, 1, 1).run(0)


def test_impossible_configs():
    with pytest.raises(ConfigError, match="'deformation' turn round, so they need a period"):
        TracerSphere(wind="deformation")
    with pytest.raises(ConfigError, match="jet is -1.0"):
        TracerSphere(jet=-1.0)
    with pytest.raises(ConfigError, match="blobs is 0"):
        TracerSphere(blobs=0)
