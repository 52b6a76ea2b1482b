"""The Gray-Scott model against an independent trajectory, its steady states, and the range of concentrations."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError
from physml.solvers import GrayScott, make_solver
from physml.solvers.ensemble import Ensemble, precision
from physml.solvers.reaction import PATTERNS

REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


def test_gray_scott_follows_the_reference(float64):
    with np.load(REFERENCE / "gray_scott.npz") as data:
        initial, frames = data["initial"].astype(np.float64), data["frames"]
    solver = GrayScott(pattern="maze", time_step=200.0, substeps=400, points=48)
    state = initial
    for frame in frames:
        state = jax.jit(solver.stepper())(state)
        assert relative(solver.observe(state), frame) < 5e-8  # initial state and frames are float32


def test_uniform_states_react_only(float64):
    """Without gradients the model is a pair of ordinary equations: (1, 0) stays, and so does the other steady state."""
    solver = GrayScott(solver_points=16, points=16, feed_rate=0.03, kill_rate=0.05, initial_modes=4)
    share = 0.03 / (0.03 + 0.05)
    root = (share + np.sqrt(share**2 - 4 * 0.03)) / 2
    for a, b in ((1.0, 0.0), ((0.03 + 0.05) / root, root)):
        state = jnp.broadcast_to(jnp.array([a, b]), (16, 16, 2))
        assert_allclose(jax.jit(solver.stepper())(state), state, atol=1e-12)


def test_diffusion_is_that_of_each_substance(float64):
    """A small wave of a on (1, 0) decays as exp(-(diffusivity_a k^2 + feed_rate) t); b feels only its own numbers."""
    solver = GrayScott(solver_points=32, points=32, time_step=10.0, substeps=20, initial_modes=4)
    wave = 1e-6 * np.cos(2 * np.pi * np.arange(32) / 32) * np.ones((32, 1))
    state = jnp.stack([1 + wave, wave], axis=-1)
    after = jax.jit(solver.stepper())(state)
    k = (2 * np.pi) ** 2
    decay = np.exp(-10 * np.array([2e-5 * k + 0.029, 1e-5 * k + 0.029 + 0.057]))
    assert_allclose(after - jnp.array([1.0, 0.0]), wave[..., None] * decay, atol=1e-11)  # b^2 is 1e-12


def test_concentrations_stay_in_their_range_on_the_usual_grid(float64):
    """The undershoot of the spectral method, after the sharpest fronts have formed; a coarse grid fails the limit."""
    fine = GrayScott(pattern="worms", time_step=100.0, substeps=100)
    coarse = GrayScott(pattern="worms", time_step=100.0, substeps=100, solver_points=64, points=64)
    after = [jax.jit(s.stepper())(s.initial(jax.random.key(0))) for s in (fine, coarse)]
    assert -3e-4 < after[0].min() < after[0].max() < 1 + 3e-4
    assert after[1].min() < -1e-3


def test_patterns_go_around(float64):
    solver = GrayScott(pattern="all", solver_points=16, points=16, initial_modes=4)
    with precision(solver):
        _, drawn, _ = Ensemble(solver, 0, 8).start(0)
    pairs = list(zip(drawn["feed_rate"].tolist(), drawn["kill_rate"].tolist(), strict=True))
    assert pairs[:6] == [(p["feed_rate"], p["kill_rate"]) for p in PATTERNS.values()]
    assert pairs[6:] == pairs[:2]
    maze = make_solver("gray_scott", pattern="maze")
    assert (maze.feed_rate, maze.kill_rate, maze.drawn) == (0.029, 0.057, ())


def test_seeds_cover_their_share(float64):
    solver = GrayScott(initial_share=0.3, initial_modes=16)
    states = jax.vmap(solver.initial)(jax.random.split(jax.random.key(1), 4))
    assert_allclose((states[..., 1] > 0.2).mean(), 0.3, atol=0.04)
    assert states.min() >= 0
    assert states.max() <= 1


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"pattern": "mazes"}, ["mazes", "maze"]),
        ({"pattern": "maze", "feed_rate": 0.05}, ["pattern='maze'", "feed_rate=0.05"]),
        ({"initial_share": 1.5}, ["initial_share is 1.5"]),
        ({"kill_rate": -0.1}, ["kill_rate is -0.1"]),
    ],
)
def test_a_mistake_is_named(fields, parts):
    with pytest.raises(ConfigError) as caught:
        make_solver("gray_scott", **fields)
    assert all(part in str(caught.value) for part in parts), caught.value
