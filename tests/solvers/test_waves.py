"""Waves against d'Alembert's solution, standing waves, an independent trajectory, and their energy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError
from physml.solvers import Acoustic, Wave, make_solver

REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_wave_follows_the_reference(float64):
    with np.load(REFERENCE / "wave.npz") as data:
        state, steps, frames = data["initial"].astype(np.float64), data["steps"], data["frames"]
    solver = Wave(points=32, solver_points=128, time_step=0.4, downsampling="stride")
    step, done = jax.jit(solver.stepper()), 0
    for number, frame in zip(steps, frames, strict=True):
        for _ in range(number - done):
            state = step(state)
        done = number
        assert np.linalg.norm(solver.observe(state) - frame) < 1e-6 * np.linalg.norm(frame)  # initial state is float32


@pytest.mark.parametrize("points", [64, 65])
def test_wave_is_dalembert(float64, points):
    """u = (f(x - c t) + f(x + c t)) / 2 from rest, and a mean velocity moves the mean."""
    solver = Wave(points=points, solver_points=points, length=3.0, speed=0.7, time_step=0.9)
    x = np.arange(points) * 3.0 / points

    def f(x):
        return np.exp(np.sin(2 * np.pi * x / 3)) * np.ones((points, 1))

    after = jax.jit(solver.stepper())(np.stack([f(x), np.full((points, points), 0.5)], -1))
    assert_allclose(after[..., 0], (f(x - 0.63) + f(x + 0.63)) / 2 + 0.45, atol=1e-13)
    slope = (f(x + 0.63 + 1e-6) - f(x + 0.63 - 1e-6) - f(x - 0.63 + 1e-6) + f(x - 0.63 - 1e-6)) / 4e-6
    assert_allclose(after[..., 1], 0.7 * slope + 0.5, atol=1e-8)


def test_wave_keeps_its_energy(float64):
    solver = Wave(speed=1.3)
    state = solver.initial(jax.random.key(0)) + jnp.array([0.0, 0.1])
    k = np.hypot(np.fft.fftfreq(64, 1 / 64)[:, None], np.fft.fftfreq(64, 1 / 64))

    def energy(state):
        spectrum = np.fft.fft2(state, axes=(0, 1))
        return (abs(spectrum[..., 1]) ** 2 + 1.3**2 * k**2 * abs(spectrum[..., 0]) ** 2).sum()

    after = jax.lax.fori_loop(0, 50, lambda _, s: solver.stepper()(s), state)
    assert_allclose(energy(after), energy(state), rtol=1e-12)
    assert np.linalg.norm(after - state) > 0.5 * np.linalg.norm(state)


@pytest.mark.parametrize(("boundary", "wavenumber"), [("reflecting", np.pi), ("periodic", 2 * np.pi)])
def test_acoustic_is_of_second_order(float64, boundary, wavenumber):
    """The standing wave cos(2 k x) cos(k y) cos(sqrt(5) k t), k = pi between walls: errors fall fourfold."""
    errors = []
    for points in (16, 32, 64):
        solver = Acoustic(points=points, refinement=1, contrast=0.0, boundary_condition=boundary, speed=0.8,
                          time_step=0.5, substeps=points)  # fmt: skip
        x = (np.arange(points) + 0.5) / points
        pressure = np.cos(2 * wavenumber * x) * np.cos(wavenumber * x)[:, None]
        none = np.zeros_like(pressure)
        state = {"pressure": pressure, "u": none, "v": none, "sound_speed": none + 0.8}
        after = jax.jit(solver.stepper())(state)
        errors.append(abs(after["pressure"] - np.cos(np.sqrt(5) * wavenumber * 0.8 * 0.5) * pressure).max())
    assert errors[-1] < 5e-3
    assert np.log2(errors[-2] / errors[-1]) > 1.9


@pytest.mark.parametrize("boundary", ["reflecting", "periodic"])
def test_acoustic_keeps_its_energy(float64, boundary):
    """That of leapfrog exactly, and the plain one up to second order; in a medium of strong contrast."""
    solver = Acoustic(points=24, refinement=2, contrast=0.7, boundary_condition=boundary, substeps=8)
    step = solver.time_step / solver.substeps
    inner = np.arange(48) < 48 - (boundary == "reflecting")

    def energies(state):
        p = np.asarray(state["pressure"])
        pushes = inner * (np.roll(p, -1, 1) - p) * 48, inner[:, None] * (np.roll(p, -1, 0) - p) * 48
        plain = np.mean(p**2 / state["sound_speed"] ** 2 + state["u"] ** 2 + state["v"] ** 2)
        return plain - step**2 / 4 * np.mean(pushes[0] ** 2 + pushes[1] ** 2), plain

    start = solver.initial(jax.random.key(3))
    end = jax.jit(lambda s: jax.lax.fori_loop(0, 50, lambda _, s: solver.stepper()(s), s))(start)
    exact, plain = np.array([energies(start), energies(end)]).T
    assert_allclose(exact[1], exact[0], rtol=1e-12)
    assert_allclose(plain[1], plain[0], rtol=2e-2)
    assert abs(np.asarray(end["u"])).max() > 0.1
    if boundary == "reflecting":
        assert abs(np.asarray(end["u"][:, -1])).max() == abs(np.asarray(end["v"][-1])).max() == 0


def test_sound_takes_the_time_that_the_medium_says(float64):
    """A front that crosses layers of speed 1 and 1/2 arrives after the sum of its times, not of the mean speed."""
    n = 256
    solver = Acoustic(points=n, refinement=1, length=2.0, boundary_condition="reflecting", contrast=0.0, substeps=256,
                      time_step=1.0)  # fmt: skip
    x = (np.arange(n) + 0.5) * 2.0 / n
    pressure = np.exp(-(((x - 0.5) / 0.1) ** 2)) * np.ones((n, 1))
    medium = np.where(x < 1.0, 1.0, 0.5) * np.ones((n, 1))
    none = np.zeros((n, n))
    state = {"pressure": pressure, "u": none, "v": none, "sound_speed": medium}
    after = jax.jit(solver.stepper())(state)
    transmitted = np.asarray(after["pressure"])[0, n // 2 :]
    assert x[n // 2 :][transmitted.argmax()] == pytest.approx(1.0 + 0.5 * 0.5, abs=0.01)
    assert transmitted.max() == pytest.approx(0.5 * 2 * 0.5 / 1.5, rel=0.02)  # half of the pulse, 2 c2 / (c1 + c2)


def test_the_medium_and_its_seeds(float64):
    solver = Acoustic(points=16, refinement=2, speed=2.0, time_step=0.01, contrast=0.4)
    state = solver.initial(jax.random.key(0))
    static = solver.observe_static(state)
    assert static.shape == (16, 16, 1)
    assert 2.0 * 0.6 < static.min() < 1.8 < 2.2 < static.max() < 2.0 * 1.4
    other = solver.initial(jax.random.key(1))
    assert np.linalg.norm(other["sound_speed"] - state["sound_speed"]) > 1
    finer = Acoustic(points=16, refinement=4, speed=2.0, time_step=0.01, contrast=0.4)
    assert_allclose(finer.observe(finer.initial(jax.random.key(0)))[..., 0], solver.observe(state)[..., 0], atol=0.05)


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("acoustic", {"contrast": 1.0}, ["contrast is 1.0", "below 1"]),
        ("acoustic", {"substeps": 2}, ["substeps is 2", "at least 11"]),
        ("acoustic", {"boundary_condition": "open"}, ["open", "reflecting"]),
        ("acoustic", {"speed": 0.0}, ["speed is 0.0", "positive"]),
        ("wave", {"initial_amplitude": 0.0}, ["initial_amplitude is 0.0"]),
    ],
)
def test_a_mistake_is_named(name, fields, parts):
    with pytest.raises(ConfigError) as caught:
        make_solver(name, **fields)
    assert all(part in str(caught.value) for part in parts), caught.value
