"""Closure: order of the splitting, conservation, gradients, and the solver itself where the network is silent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import saving
from physml.errors import ConfigError, SpecError
from physml.fields import Window
from physml.models import ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import Unrolled
from physml.rollout import rollout
from physml.solvers import make_solver
from physml.steppers import ClosureConfig
from physml.steppers.describe import build_stepper

BURGERS = make_solver("burgers", points=32, solver_points=32, viscosity=0.05, time_step=0.05, substeps=4)
FLOWS = {
    "burgers": (BURGERS, 2),
    "kuramoto_sivashinsky": (
        make_solver(
            "kuramoto_sivashinsky", points=32, solver_points=32, length=16.0, initial_modes=4, substeps=4, warmup=0.0
        ),
        2,
    ),
    "decaying_navier_stokes": (
        make_solver("decaying_navier_stokes", points=16, solver_points=16, initial_modes=4, substeps=4),
        1,
    ),
    "staggered_flow": (make_solver("staggered_flow", points=16, initial_modes=3, forcing_mode=2, substeps=4), 1),
}
SLOW = ("kuramoto_sivashinsky", "decaying_navier_stokes")  # `burgers` stands for them


class Reaction(nnx.Module):
    """-(1 + u) u at every point: does not commute with transport."""

    def __call__(self, fields, scalars):
        return -(1 + fields) * fields


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FLOWS])
def test_a_silent_network_leaves_the_solver(hybrid, name):
    solver, turns = FLOWS[name]
    frames, spec = hybrid.frames_of(solver, 2), hybrid.spec_of(solver)
    stepper = build_stepper(
        ClosureConfig(solver, turns), ResNetConfig(width=4, depth=1), spec, Normalizer.identity(spec)
    )
    predicted = hybrid.roll(hybrid.silent(stepper), Window.of(frames[:, :1], spec), 2)
    assert_allclose(predicted, frames[:, 1:], atol=3e-5 * float(abs(frames).max()))


def closed(solver, spec, substeps, **fields):
    """Burgers with the reaction -(1 + u) u: `scale` makes it one per unit of time."""
    solver = dataclasses.replace(solver, substeps=substeps)
    return ClosureConfig(solver, scale=solver.time_step, **fields).build(spec, Reaction(), Normalizer.identity(spec))


@pytest.mark.parametrize(("splitting", "order"), [("lie", 1), ("strang", 2)])
def test_order_of_the_splitting(hybrid, splitting, order):
    with jax.enable_x64(True):
        solver = dataclasses.replace(BURGERS, time_step=0.4)
        window = Window.of(hybrid.frames_of(solver, 0, 1, jnp.float64), hybrid.spec_of(solver))

        def end(turns, splitting):
            return hybrid.roll(closed(solver, window.spec, 256, turns=turns, splitting=splitting), window, 1)

        exact = end(64, "strang")
        errors = [np.linalg.norm(end(turns, splitting) - exact) for turns in (4, 8)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.2
    assert errors[1] < 3e-2 * np.linalg.norm(exact)


def test_fluxes_keep_the_sum(hybrid):
    """A network that says fluxes cannot change the mean, which Burgers' equation keeps; a source can."""
    frames, spec = hybrid.frames_of(BURGERS, 0), hybrid.spec_of(BURGERS)
    window = Window.of(frames, spec)
    drift = {}
    for form in ("flux", "source"):
        config = ClosureConfig(BURGERS, form=form, scale=1.0)
        stepper = build_stepper(config, ResNetConfig(width=8, depth=1), spec, Normalizer.identity(spec), seed=1)
        predicted = hybrid.roll(stepper, window, 4)
        drift[form] = float(abs(predicted.mean((2, 3)) - frames.mean((2, 3))).max())
    assert drift["flux"] < 1e-6  # float32 means of 32 points
    assert drift["source"] > 1e-3


def test_a_flux_is_a_divergence(hybrid):
    """In two dimensions the first outputs flow along the first axis: sin(y) gives -cos(y), up to the difference."""
    solver = make_solver("staggered_flow", points=16, forcing_mode=2, initial_modes=3, substeps=2)
    spec = hybrid.spec_of(solver)
    y = jnp.asarray(spec.grid.axes[0].centers)[:, None]

    class Flux(nnx.Module):
        def __call__(self, fields, scalars):
            zero = jnp.zeros((len(fields), 16, 16))
            return jnp.stack([zero + jnp.sin(y), zero, zero, zero], axis=-1)

    stepper = ClosureConfig(solver, form="flux").build(spec, Flux(), Normalizer(spec, [0, 0], [1, 1], [2.0, 2.0]))
    window = Window.of(jnp.zeros((1, 1, 16, 16, 2)), spec)
    tendency = stepper.tendency(window.frames[:, 0], window.context(0, 1))
    h = 2 * jnp.pi / 16
    assert_allclose(tendency[0, ..., 0], jnp.broadcast_to(-2 * jnp.cos(y) * jnp.sin(h), (16, 16)), atol=1e-6)
    assert_allclose(tendency[0, ..., 1], 0, atol=1e-6)


def test_gradients_through_the_solver(hybrid):
    with jax.enable_x64(True):
        frames, spec = hybrid.frames_of(BURGERS, 0, 1, jnp.float64), hybrid.spec_of(BURGERS)
        graph, weights = nnx.split(
            build_stepper(ClosureConfig(BURGERS, 2), ResNetConfig(width=4, depth=1), spec, Normalizer.identity(spec))
        )

        @jax.jit
        def score(t):
            stepper = nnx.merge(graph, jax.tree.map(lambda w: (1 + t) * w.astype(float), weights))
            return jnp.sum(rollout(stepper, Window.of(frames, spec), 2)[:, -1] ** 2)

        assert_allclose(jax.grad(score)(0.0), (score(1e-4) - score(-1e-4)) / 2e-4, rtol=1e-5)


@pytest.mark.slow
def test_training_finds_missing_viscosity(hybrid):
    frames = hybrid.frames_of(dataclasses.replace(BURGERS, viscosity=0.15), 3, 4)
    spec = hybrid.spec_of(BURGERS)
    normalizer = Normalizer(spec, [0.0], [float(frames.std())], [float(jnp.diff(frames, axis=1).std())])
    config = ClosureConfig(BURGERS, form="flux", scale=0.5)
    stepper = build_stepper(config, ResNetConfig(width=8, depth=1), spec, normalizer)
    losses = hybrid.train(stepper, Window.of(frames, spec), Unrolled(steps=2), 60, 1e-2)
    assert losses[-1] < 0.3 * losses[0]


def test_saved_and_loaded(hybrid, tmp_path):
    frames, spec = hybrid.frames_of(BURGERS, 1), hybrid.spec_of(BURGERS)
    config = ClosureConfig(BURGERS, 2, "lie", "flux", 0.3)
    stepper = build_stepper(config, ResNetConfig(width=4, depth=1), spec, Normalizer.identity(spec))
    loaded = saving.load(saving.save(stepper, tmp_path / "model"))
    assert loaded.config == config
    assert_array_equal(
        hybrid.roll(loaded, Window.of(frames, spec), 1), hybrid.roll(stepper, Window.of(frames, spec), 1)
    )
    with pytest.raises(SpecError, match="cannot move to"):
        stepper.on_grid(make_solver("burgers", points=16).grid)


def test_refusals(hybrid):
    with pytest.raises(ConfigError, match="multiple of 6"):
        ClosureConfig(BURGERS, turns=3)
    with pytest.raises(ConfigError, match="Set solver_points=32"):
        ClosureConfig(dataclasses.replace(BURGERS, solver_points=64))
    with pytest.raises(ConfigError, match="splitting is 'Strang'"):
        ClosureConfig(BURGERS, splitting="Strang")
    with pytest.raises(ConfigError, match="turns is 0"):
        ClosureConfig(BURGERS, turns=0)
    with pytest.raises(ConfigError, match=r"turns is 0.5 \(float\), but an integer"):
        ClosureConfig(BURGERS, turns=0.5)
    with pytest.raises(ConfigError, match="cannot start"):
        ClosureConfig(make_solver("smoke"))
    lorenz = make_solver("lorenz63")
    with pytest.raises(SpecError, match="periodic axes"):
        ClosureConfig(lorenz, form="flux").signature(hybrid.spec_of(lorenz))
