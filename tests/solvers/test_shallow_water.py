"""Shallow water against steady flows, linear waves, an independent trajectory, and what it keeps."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError, DependencyError
from physml.solvers import ShallowWater, ShallowWaterSphere, make_solver
from physml.solvers import shallow_water as module

REFERENCE = pathlib.Path(__file__).parent / "reference"
SMALL = {"points": 32, "solver_points": 32, "initial_modes": 4}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def sphere(float64):
    pytest.importorskip("dinosaur", reason="the extra `sphere` is not installed")


def energy(state, gravity):
    height, u, v = np.moveaxis(np.asarray(state), -1, 0)
    return np.mean(height * (u**2 + v**2) + gravity * height**2) / 2


# --- the plane ---


def test_mass_and_energy_are_kept(float64):
    solver = ShallowWater(
        points=48, solver_points=48, initial_modes=4, initial_speed=0.1, viscosity=1e-9, time_step=2.5, substeps=125
    )
    start = solver.initial(jax.random.key(0))
    after = jax.jit(solver.stepper())(start)
    assert_allclose(after[..., 0].mean(), start[..., 0].mean(), rtol=1e-13)
    assert start[..., 0].mean() == pytest.approx(1.0, abs=1e-12)
    assert energy(after, 1.0) == pytest.approx(energy(start, 1.0), rel=1e-6)
    assert np.linalg.norm(after - start) > 0.05 * np.linalg.norm(start - start.mean((0, 1)))


def test_viscosity_takes_the_energy_it_should(float64):
    """dE/dt = viscosity <height velocity . laplace(velocity)>."""
    solver = ShallowWater(**SMALL, viscosity=0.02, time_step=0.02, substeps=4)
    state = solver.initial(jax.random.key(1))
    step = jax.jit(solver.stepper())
    states = [state := step(state) for _ in range(5)]
    rate = (energy(states[3], 1.0) - energy(states[1], 1.0)) / 0.04
    height, *velocity = np.moveaxis(np.asarray(states[2]), -1, 0)
    k2 = np.fft.fftfreq(32, 1 / 32)[:, None] ** 2 + np.fft.fftfreq(32, 1 / 32) ** 2
    loss = sum(np.mean(height * w * np.fft.ifft2(-k2 * np.fft.fft2(w)).real) for w in velocity)
    assert rate == pytest.approx(0.02 * loss, rel=1e-3)


@pytest.mark.parametrize(("mode", "coriolis"), [((1, 0), 0.0), ((2, 1), 1.5)])
def test_inertia_gravity_waves_have_their_frequency(float64, mode, coriolis):
    """omega^2 = coriolis^2 + gravity depth |k|^2 for small waves; after a period they are where they were."""
    solver = ShallowWater(**SMALL, length=5.0, depth=0.8, gravity=1.7, coriolis=coriolis, viscosity=1e-12)
    k, m = 2 * np.pi * np.array(mode) / 5.0
    omega = np.sqrt(coriolis**2 + 1.7 * 0.8 * (k**2 + m**2))
    x = np.arange(32) * 5.0 / 32
    phase = k * x + m * x[:, None]

    def wave(time):
        p, a = phase - omega * time, 1e-6
        u = a / 0.8 * (omega * k * np.cos(p) - coriolis * m * np.sin(p)) / (k**2 + m**2)
        v = a / 0.8 * (omega * m * np.cos(p) + coriolis * k * np.sin(p)) / (k**2 + m**2)
        return np.stack([0.8 + a * np.cos(p), u, v], axis=-1)

    given = {"depth": 0.8, "gravity": 1.7, "coriolis": coriolis, "beta": 0.0, "viscosity": 1e-12}
    after = jax.jit(solver.stepper(**given, time_step=0.3))(wave(0.0))
    assert_allclose(after, wave(0.3), atol=1e-10)  # waves of 1e-6 interact at 1e-12


def test_the_balanced_start_is_nearly_steady(float64):
    """The divergence of the start does not grow at first; without the height it would."""
    solver = ShallowWater(**SMALL, initial_waves=0.0, beta=0.4, time_step=0.01, substeps=1)
    start = solver.initial(jax.random.key(0))
    flat = start.at[..., 0].set(1.0)

    def divergence(state):
        k = 1j * np.fft.fftfreq(32, 1 / 32)
        k[16] = 0
        u, v = (np.fft.fft2(state[..., i]) for i in (1, 2))
        return np.linalg.norm(np.fft.ifft2(k * u + k[:, None] * v))

    step = jax.jit(solver.stepper())
    assert divergence(start) < 1e-12
    assert divergence(step(start)) < 0.02 * divergence(step(flat))


def test_of_fourth_order(float64):
    runs = []
    for count in (10, 20, 40):
        solver = ShallowWater(**SMALL, time_step=0.5, substeps=count)
        runs.append(jax.jit(solver.stepper())(solver.initial(jax.random.key(0))))
    coarse, fine = (np.linalg.norm(runs[i] - runs[i + 1]) for i in range(2))
    assert 3.8 < np.log2(coarse / fine) < 4.2


# --- the sphere ---


def zonal(solver, speed):
    """Winds along the latitudes (longitude, latitude) of solid rotation."""
    latitude = np.radians(solver.grid.axes[0].centers)
    return np.broadcast_to(speed * np.cos(latitude), (2 * solver.points, solver.points)), latitude


def test_solid_rotation_is_steady(sphere):
    """Williamson et al. 1992, doi:10.1016/S0021-9991(05)80016-6, case 2: five days, in both precisions."""
    speed = 2 * np.pi * module.RADIUS / (12 * 86400)
    solver = ShallowWaterSphere(points=16, modes=4, viscosity=0.0, time_step=86400.0, substeps=72)
    wind, latitude = zonal(solver, speed)
    start = solver.balanced(solver.curl(wind), 3000.0)
    slope = (module.RADIUS * module.OMEGA * speed + speed**2 / 2) / module.GRAVITY
    exact = np.stack([3000 - slope * (np.sin(latitude) ** 2 - 1 / 3), speed * np.cos(latitude), 0 * latitude], axis=-1)
    assert_allclose(solver.observe(start), np.broadcast_to(exact[:, None], (16, 32, 3)), atol=1e-9)
    step = jax.jit(
        lambda s: jax.lax.fori_loop(0, 5, lambda _, s: solver.stepper(depth=3000.0, speed=1.0, viscosity=0.0)(s), s)
    )
    after = solver.observe(step(start))
    assert np.linalg.norm(after[..., 0] - exact[:, None, 0]) < 1e-12 * np.linalg.norm(after[..., 0])
    with jax.enable_x64(False):
        single = solver.observe(step(np.asarray(start, np.float32)))
    assert single.dtype == np.float32
    assert np.linalg.norm(single[..., 0] - exact[:, None, 0]) < 2e-6 * np.linalg.norm(after[..., 0])


def test_the_sphere_keeps_mass_and_follows_its_seeds(sphere):
    solver = ShallowWaterSphere(points=32, family="eddies", speed=20.0, time_step=21600.0)
    start = solver.initial(jax.random.key(0))
    after = jax.jit(solver.stepper())(start)
    weights = np.polynomial.legendre.leggauss(32)[1]
    fields = [np.asarray(solver.observe(s)) for s in (start, after)]
    masses = [np.average(f[..., 0].mean(1), weights=weights) for f in fields]
    assert masses[0] == pytest.approx(1e4, rel=1e-12)
    assert masses[1] == pytest.approx(masses[0], rel=1e-12)
    speed = np.sqrt(np.average((fields[0][..., 1:] ** 2).sum(-1).mean(1), weights=weights))
    assert speed == pytest.approx(20.0, rel=1e-6)
    assert np.linalg.norm(fields[1] - fields[0]) > 0.01 * np.linalg.norm(fields[0][..., 1:])
    other = solver.initial(jax.random.key(1))
    assert np.linalg.norm(other[0] - start[0]) > np.linalg.norm(start[0])


def test_the_jet_has_a_bump_at_a_random_place(sphere):
    solver = ShallowWaterSphere(points=32)
    fields = [np.asarray(solver.observe(solver.initial(jax.random.key(seed)))) for seed in range(3)]
    for field in fields:
        assert 70 < field[..., 1].max() < 82
        bump = field[..., 0] - np.median(field[..., 0], axis=1, keepdims=True)
        at = np.unravel_index(bump.argmax(), bump.shape)
        assert 25 < solver.grid.axes[0].centers[at[0]] < 65
        assert 50 < bump.max() < 125
    assert abs(fields[0] - fields[1]).max() > 50


def test_what_is_stored_belongs_together(sphere):
    """Velocities of the one form have the vorticity of the other."""
    flow, curl = (ShallowWaterSphere(points=32, family="eddies", store=store) for store in ("velocity", "vorticity"))
    state = jax.jit(flow.stepper())(flow.initial(jax.random.key(0)))
    _, u, v = np.moveaxis(np.asarray(flow.observe(state)), -1, 0)
    latitude = np.radians(flow.grid.axes[0].centers)
    k = 1j * np.fft.fftfreq(64, 1 / 64)
    k[32] = 0
    east = np.fft.ifft(k * np.fft.fft(v, axis=1), axis=1).real
    north = np.gradient(u * np.cos(latitude)[:, None], latitude, axis=0)
    vorticity = (east - north) / (module.RADIUS * np.cos(latitude)[:, None])
    stored = np.asarray(curl.observe(state))[..., 1]
    inner = slice(6, -6)  # away from the poles, where differences of second order serve
    assert np.linalg.norm((vorticity - stored)[inner]) < 0.1 * np.linalg.norm(stored[inner])


@pytest.mark.slow
def test_the_sphere_follows_the_reference(sphere):
    """Twelve hours of the barotropic instability at T85."""
    with np.load(REFERENCE / "shallow_water_sphere.npz") as data:
        frames = data["frames"].astype(float)
    solver = ShallowWaterSphere(points=128, time_step=43200.0, substeps=144, store="vorticity")
    latitude = jnp.radians(jnp.asarray(solver.grid.axes[0].centers))
    jet = jnp.broadcast_to(80.0 * module._jet(latitude), (256, 128))
    start = solver.add_bump(solver.balanced(solver.curl(jet), 1e4), 0.0, 45.0)
    for state, frame, limit in ((start, frames[0], 1e-4), (jax.jit(solver.stepper())(start), frames[1], 5e-5)):
        observed = np.asarray(solver.observe(state))[::2, ::2]
        assert np.linalg.norm(observed[..., 0] - frame[..., 0]) < 2e-6 * np.linalg.norm(frame[..., 0] - 1e4)
        assert np.linalg.norm(observed[..., 1] - frame[..., 1]) < limit * np.linalg.norm(frame[..., 1])


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("shallow_water", {"gravity": 0.0}, ["gravity is 0.0", "positive"]),
        ("shallow_water", {"initial_waves": 0.5}, ["initial_waves is 0.5"]),
        ("shallow_water_sphere", {"points": 33}, ["points is 33", "even"]),
        ("shallow_water_sphere", {"modes": 90}, ["modes is 90", "63"]),
        ("shallow_water_sphere", {"family": "jets"}, ["jets", "jet"]),
    ],
)
def test_a_mistake_is_named(name, fields, parts):
    with pytest.raises(ConfigError) as caught:
        make_solver(name, **fields)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dinosaur.spherical_harmonic", None)
    module._build_sphere.cache_clear()
    with pytest.raises(DependencyError, match=r"dinosaur is not installed. Run `pip install 'physml\[sphere\]'`"):
        ShallowWaterSphere(points=16, modes=4).initial(jax.random.key(0))
