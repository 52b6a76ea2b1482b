"""Learned interpolation and temporal stencils: what no network can spoil, what the base scheme does, HiPPO features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import saving
from physml.constraints import MassFixer, Positivity
from physml.errors import ConfigError, SpecError
from physml.fields import Grid, Window
from physml.models import ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import Unrolled
from physml.rollout import rollout
from physml.solvers import make_solver, resample, velocity_of, vorticity_of
from physml.solvers.staggered import momentum_rates, outflow, project, to_faces, to_points
from physml.steppers import CorrectedConfig, LearnedInterpolationConfig, TemporalStencilConfig
from physml.steppers.describe import build_stepper
from physml.steppers.temporal_stencil import legendre_memory

FLOW = make_solver("staggered_flow", points=16, forcing_mode=2, initial_modes=3, substeps=4)
NET = ResNetConfig(width=6, depth=1)
KINDS = {
    "learned_interpolation": LearnedInterpolationConfig(FLOW, scale=0.3),
    "two_calls": LearnedInterpolationConfig(FLOW, calls=2, taps=6, scale=0.3),
    "temporal_stencil": TemporalStencilConfig(FLOW, history=3, size=3, scale=0.3),
}


def build(config, spec, seed=0):
    return build_stepper(config, NET, spec, Normalizer(spec, [0.0, 0.0], [1.0, 1.0], [0.3, 0.3]), seed=seed)


@pytest.mark.parametrize("kind", ["learned_interpolation", "temporal_stencil"])
def test_no_network_spoils_mass_momentum_or_a_uniform_flow(hybrid, kind):
    """Without force and drag. A fresh network with outputs of order one deviates, but what is conserved stays."""
    solver = dataclasses.replace(FLOW, forcing_scale=0.0, drag=0.0, viscosity=1e-3)
    config, spec = dataclasses.replace(KINDS[kind], solver=solver), hybrid.spec_of(solver)
    stepper, silent = build(config, spec), hybrid.silent(build(config, spec))
    frames = hybrid.frames_of(solver, 2) + jnp.asarray([0.3, -0.2])
    uniform = jnp.broadcast_to(jnp.asarray([0.7, -0.4]), frames.shape)

    @jax.jit
    def run(frames):
        window = Window.of(frames, spec)
        state = stepper.encode(window.frames[:, : stepper.history], window.context(0, stepper.history))
        moved = stepper.advance(state, window.context(0, stepper.history))[:, -1]
        deviation = moved - silent.advance(state, window.context(0, stepper.history))[:, -1]
        net = jax.vmap(lambda frame: outflow(to_faces(frame), solver.length / solver.points))(moved)
        return moved, deviation, net

    moved, deviation, net = run(frames)
    assert abs(deviation).max() > 1e-3
    assert abs(net).max() < 1e-5  # float32: rounding of 1 by a spacing of 0.4
    assert_allclose(moved.mean((1, 2)), [[0.3, -0.2]] * 2, atol=1e-6)
    assert_allclose(run(uniform)[0], uniform[:, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["two_calls"])
def test_a_silent_network_leaves_the_solver(hybrid, kind):
    config, spec = KINDS[kind], hybrid.spec_of(FLOW)
    frames = hybrid.frames_of(FLOW, 4)
    stepper = hybrid.silent(build(config, spec))
    history = stepper.history
    predicted = hybrid.roll(stepper, Window.of(frames[:, :history], spec), 2)
    assert_allclose(predicted, frames[:, history : history + 2], atol=3e-5)


def test_parameters_of_the_data_reach_the_solver(hybrid):
    viscosities = (0.005, 0.1)
    frames = jnp.concatenate([hybrid.frames_of(FLOW, 1, 1, viscosity=v) for v in viscosities])
    spec, solver = hybrid.spec_of(FLOW, "viscosity"), dataclasses.replace(FLOW, viscosity=(0.001, 0.2))
    stepper = hybrid.silent(build(LearnedInterpolationConfig(solver), spec))
    window = Window.of(frames[:, :1], spec, parameters=jnp.asarray(viscosities)[:, None])
    assert_allclose(hybrid.roll(stepper, window, 1), frames[:, 1:], atol=3e-5)
    assert abs(frames[0, 1] - frames[1, 1]).max() > 1e-2


@pytest.mark.parametrize(
    "stepper_config", [KINDS["temporal_stencil"], CorrectedConfig(FLOW)], ids=["temporal_stencil", "corrected"]
)
def test_axes_in_another_order(hybrid, stepper_config):
    """Data as (x, y), as files are read: force, velocity and coefficients turn with it."""
    spec, frames = hybrid.spec_of(FLOW), hybrid.frames_of(FLOW, 4)
    turned = spec.on(Grid(spec.grid.axes[::-1]))
    stepper = hybrid.silent(build(stepper_config, turned))
    window = Window.of(frames[:, : stepper.history].swapaxes(2, 3), turned)
    predicted = hybrid.roll(stepper, window, 2).swapaxes(2, 3)
    assert_allclose(predicted, frames[:, stepper.history : stepper.history + 2], atol=3e-5)


def test_the_base_scheme_converges():
    """Second order, against the spectral solver of the same forced flow."""
    with jax.enable_x64(True):
        fields = {"viscosity": 0.02, "time_step": 0.5, "initial_modes": 3}
        truth = make_solver("kolmogorov", points=64, solver_points=64, substeps=80, **fields)

        @jax.jit
        def run():
            start = truth.initial(jax.random.key(0))
            end, errors = velocity_of(truth.stepper()(start)), []
            for points in (16, 32, 64):
                solver = make_solver("staggered_flow", points=points, substeps=points // 2, **fields)
                moved = solver.stepper()(project(to_faces(resample(velocity_of(start), points))))
                exact = resample(end, points) if points < 64 else end
                errors.append(jnp.linalg.norm(solver.observe(moved) - exact) / jnp.linalg.norm(exact))
            return jnp.stack(errors)

        errors = run()
    assert errors[2] < 1e-2
    assert np.log2(errors[:-1] / errors[1:]).min() > 1.6  # the limiter acts at extrema


def test_faces_and_points():
    """Exact for series, and without divergence on both sides."""
    with jax.enable_x64(True):
        x = 2 * jnp.pi * jnp.arange(16) / 16
        y, h = x[:, None], 2 * jnp.pi / 16
        points = jnp.stack([jnp.sin(2 * x + 3 * y), -2 / 3 * jnp.sin(2 * x + 3 * y)], axis=-1)
        faces = to_faces(points)
        mean = (jnp.cos(2 * (x + h / 2) + 3 * (y - h / 2)) - jnp.cos(2 * (x + h / 2) + 3 * (y + h / 2))) / (3 * h)
        assert_allclose(faces[..., 0], mean, atol=1e-12)
        assert_allclose(outflow(faces, h), 0, atol=1e-12)
        assert_allclose(to_points(faces), points, atol=1e-12)
        assert_allclose(velocity_of(vorticity_of(points)), points, atol=1e-12)


def test_deviations_are_added_to_the_right_neighbors():
    """Deviations that turn the upwind value into the next cell's, by hand, for each flux."""
    random = np.random.default_rng(0)
    faces = jnp.asarray(random.normal(size=(8, 8, 2)), jnp.float32)
    h = 0.5
    for flux, (component, axis) in enumerate([(0, 1), (0, 0), (1, 1), (1, 0)]):
        deviations = jnp.zeros((8, 8, 4, 4)).at[:, :, flux].set(jnp.asarray([0.0, -1.0, 1.0, 0.0]))
        change = momentum_rates(faces, h, deviations) - momentum_rates(faces, h)
        field, along = faces[..., component], faces[..., 1 - axis]
        speed = (along + jnp.roll(along, -1, 1 if component == 0 else 0)) / 2
        extra = speed * (jnp.roll(field, -1, axis) - field)
        assert_allclose(change[..., component], -(extra - jnp.roll(extra, 1, axis)) / h, atol=1e-5)
        assert_allclose(change[..., 1 - component], 0, atol=1e-6)


def test_memory_is_where_the_hippo_equation_ends():
    """The LegS equation c' = (B f - A c) / t of Gu et al. 2020, solved exactly for a history of steps."""
    from scipy.linalg import expm, solve

    frames, size = 8, 6
    n = np.arange(size)
    lower = np.sqrt(np.outer(2 * n + 1, 2 * n + 1)) * (n[:, None] > n) + np.diag(n + 1.0)
    gain = solve(lower, np.sqrt(2.0 * n + 1))
    history = np.random.default_rng(0).normal(size=frames)
    state = gain * history[0]
    for k in range(1, frames):
        state = gain * history[k] + expm(-lower * np.log((k + 1) / k)) @ (state - gain * history[k])
    assert_allclose(legendre_memory(frames, size) @ history, state, atol=1e-10)


def test_memory_is_a_projection():
    """Coefficients of a parabola sampled finely, and as many features as frames keep every frame."""
    s = (np.arange(4000) + 0.5) / 4000
    assert_allclose(legendre_memory(4000, 4) @ s**2, [1 / 3, np.sqrt(3) / 6, np.sqrt(5) / 30, 0], atol=1e-6)
    assert np.linalg.matrix_rank(legendre_memory(8, 8)) == 8


def test_features_of_the_past(hybrid):
    """By hand: the mean in units of the fields, changes (which constants do not touch) in those of the increments."""
    spec, config = hybrid.spec_of(FLOW), KINDS["temporal_stencil"]
    normalizer = Normalizer(spec, [0.5, -1.0], [2.0, 4.0], [0.1, 0.3])
    stepper = build_stepper(config, NET, spec, normalizer)
    faces = np.random.default_rng(0).normal(size=(2, 3, 16, 16, 2)).astype("f4")
    mean, changes = stepper.past(jnp.asarray(faces))
    assert_allclose(mean, (faces.mean(1) - [0.5, -1.0]) / [2.0, 4.0], atol=1e-5)
    by_hand = np.einsum("nt,btyxc->byxcn", legendre_memory(3, 3)[1:], faces / [0.1, 0.3])
    assert_allclose(changes, by_hand.reshape(2, 16, 16, 4), atol=1e-4)  # float32 numbers up to 30


def test_every_frame_matters(hybrid):
    config, spec = dataclasses.replace(KINDS["temporal_stencil"], scale=3.0), hybrid.spec_of(FLOW)
    stepper = build(config, spec)
    frames = np.asarray(hybrid.frames_of(FLOW, 2, 1))
    moved = np.concatenate([frames, *(frames.copy() for _ in range(3))])
    for frame in range(3):
        moved[1 + frame, frame] += 0.1 * np.sin(np.arange(16))[:, None]
    predicted = hybrid.roll(stepper, Window.of(moved, spec), 1)
    assert (abs(predicted[1:] - predicted[:1]).max((1, 2, 3, 4)) > 1e-4).all()


def test_gradients_through_the_solver(hybrid):
    """In the weights, over two steps."""
    with jax.enable_x64(True):
        spec = hybrid.spec_of(FLOW)
        frames = hybrid.frames_of(FLOW, 2, 1, jnp.float64)
        graph, weights, rest = nnx.split(build(KINDS["temporal_stencil"], spec), nnx.Param, ...)

        @jax.jit
        def score(t):
            stepper = nnx.merge(graph, jax.tree.map(lambda w: (1 + t) * w.astype(float), weights), rest)
            return jnp.sum(rollout(stepper, Window.of(frames, spec), 2)[:, -1] ** 3)

        assert_allclose(jax.grad(score)(0.0), (score(1e-5) - score(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_keep_mask_and_constraints(hybrid, kind):
    """Though the solver goes on from them without their divergence: every emitted frame holds what was promised."""
    spec, config = hybrid.spec_of(FLOW), dataclasses.replace(KINDS[kind], scale=1.0)
    frames = hybrid.frames_of(FLOW, 2) + jnp.asarray([0.3, -0.2])
    mask = jnp.ones((2, 16, 16, 2)).at[:, 4:8, 4:8].set(0)
    cases = (((MassFixer(("u", "v")),), mask), ((Positivity("u"),), None))
    for constraints, mask in cases:
        normalizer = Normalizer(spec, [0.0, 0.0], [1.0, 1.0], [0.3, 0.3], masked=mask is not None)
        stepper = build_stepper(config, NET, spec, normalizer, constraints)
        start = frames[:, : stepper.history] * (1 if mask is None else mask[:, None])
        window = Window.of(start, spec, mask=mask)
        predicted = hybrid.roll(stepper, window, 3)
        assert jnp.isfinite(predicted).all()
        if mask is not None:
            assert not predicted[:, :, 4:8, 4:8].any()
        every = jnp.concatenate([start[:, -1:], predicted], axis=1)
        for step in range(3):
            for constraint in stepper.constraints:
                broken = constraint.violation(every[:, step + 1], every[:, step], window.context(0, stepper.history))
                assert_allclose(broken, 0, atol=1e-6)  # float32: rounding of a mean of order one


@pytest.mark.slow
def test_training_sharpens_the_scheme(hybrid):
    """Towards a spectral flow, which is less damped."""
    truth = make_solver("kolmogorov", points=16, solver_points=32, store="velocity", initial_modes=3, forcing_mode=2,
                        viscosity=1e-2, time_step=0.1, substeps=10)  # fmt: skip
    frames, spec = hybrid.frames_of(truth, 4, 4), hybrid.spec_of(FLOW)
    stepper = build(dataclasses.replace(KINDS["temporal_stencil"], history=2, size=2), spec)
    losses = hybrid.train(stepper, Window.of(frames, spec), Unrolled(steps=2), 40, 3e-3)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(hybrid, tmp_path, kind):
    frames, spec = hybrid.frames_of(FLOW, 2), hybrid.spec_of(FLOW)
    stepper = build(KINDS[kind], spec)
    loaded = saving.load(saving.save(stepper, tmp_path / "model"))
    assert loaded.config == KINDS[kind]
    window = Window.of(frames, spec)
    if kind == "temporal_stencil":
        assert_array_equal(hybrid.roll(loaded, window, 1), hybrid.roll(stepper, window, 1))
    with pytest.raises(SpecError, match="cannot move to"):
        stepper.on_grid(make_solver("staggered_flow", points=32).grid)


def test_refusals(hybrid):
    with pytest.raises(ConfigError, match="finite-volume"):
        LearnedInterpolationConfig(make_solver("kolmogorov"))
    with pytest.raises(ConfigError, match="taps is 3"):
        LearnedInterpolationConfig(FLOW, taps=3)
    with pytest.raises(ConfigError, match=r"taps is 4.0 \(float\), but an integer"):
        LearnedInterpolationConfig(FLOW, taps=4.0)
    with pytest.raises(ConfigError, match="calls is 0.5"):
        LearnedInterpolationConfig(FLOW, calls=0.5)
    with pytest.raises(ConfigError, match="size is 2.5"):
        TemporalStencilConfig(FLOW, size=2.5)
    with pytest.raises(ConfigError, match=r"solver is str. Use make_solver\('staggered_flow', ...\)"):
        LearnedInterpolationConfig("staggered_flow")
    grid = Grid(tuple(dataclasses.replace(axis, periodic=False) for axis in FLOW.grid.axes))
    with pytest.raises(SpecError, match="is periodic in the solver, but not in the data"):
        LearnedInterpolationConfig(FLOW).signature(hybrid.spec_of(FLOW).on(grid))
    with pytest.raises(ConfigError, match="calls is 3"):
        LearnedInterpolationConfig(FLOW, calls=3)
    with pytest.raises(ConfigError, match="history is 1"):
        TemporalStencilConfig(FLOW, history=1)
    with pytest.raises(ConfigError, match="leave it at 1"):
        TemporalStencilConfig(FLOW, calls=2)
    with pytest.raises(SpecError, match="grid of"):
        LearnedInterpolationConfig(FLOW).signature(hybrid.spec_of(make_solver("staggered_flow", points=32)))
