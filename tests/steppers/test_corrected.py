"""Corrected: the coarse solver is what a silent network leaves, gradients flow through it, misfits are refused."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import saving
from physml.errors import ConfigError, SpecError
from physml.fields import Channel, Grid, Spec, Window
from physml.models import FNOConfig, ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import Unrolled
from physml.parallel.mesh import Layout
from physml.rollout import rollout
from physml.solvers import SOLVERS, make_solver
from physml.steppers import ClosureConfig, CorrectedConfig
from physml.steppers.corrected import check_resumable, shared_parameters
from physml.steppers.describe import build_stepper

BURGERS = make_solver("burgers", points=32, solver_points=32, viscosity=0.05, time_step=0.05, substeps=4)
STARTING = {  # solvers whose frames hold all of the state
    "burgers": {"points": 32, "solver_points": 32},
    "euler": {"points": 16, "solver_points": 16, "substeps": 8, "time_step": 0.02},
    "kolmogorov": {"points": 32, "solver_points": 32, "store": "velocity", "initial_modes": 4, "substeps": 4},
    "lorenz63": {},
    "shallow_water": {"points": 16, "solver_points": 16, "initial_modes": 3, "substeps": 4},
    "staggered_flow": {"points": 16, "initial_modes": 3, "forcing_mode": 2, "substeps": 4},
    "wave": {"points": 32, "solver_points": 32},
}


def small(config, spec, model=None, normalizer=None):
    model = model or FNOConfig(width=6, modes=(4,) * max(spec.grid.ndim, 1), depth=1)
    return build_stepper(config, model, spec, normalizer or Normalizer.identity(spec))


@pytest.mark.parametrize("name", STARTING)
def test_a_frame_holds_the_state(name):
    """Observing what was resumed from a frame gives that frame, and the solver goes on as if nothing had happened."""
    solver = make_solver(name, **STARTING[name])
    check_resumable(solver, whole=True)
    with jax.enable_x64(True):

        @jax.jit
        def run():
            step = solver.stepper()
            state = step(solver.initial(jax.random.key(0)))
            frame = solver.observe(state)
            again = solver.resume(frame)
            return frame, solver.observe(again), solver.observe(step(state)), solver.observe(step(again))

        frame, again, there, back = run()
        assert_allclose(again, frame, atol=1e-12 * abs(frame).max())
        assert_allclose(back, there, atol=1e-10 * abs(there).max())


def test_numbers_of_the_solver_are_found_by_name():
    spec = Spec(Grid(()), (Channel("u"),), parameters=(Channel("other"), Channel("rate"), Channel("speed")))
    window = Window.of(np.zeros((2, 2, 1), "f4"), spec, parameters=np.array([[1, 2, 3], [4, 5, 6]], "f4"))
    solver = SimpleNamespace(parameters=("speed", "unknown", "rate"))
    found = shared_parameters(solver, window.context(0, 1))
    assert {name: values.tolist() for name, values in found.items()} == {"speed": [3, 6], "rate": [2, 5]}


def test_a_silent_network_leaves_the_solver(hybrid):
    frames = hybrid.frames_of(BURGERS, 5)
    spec = hybrid.spec_of(BURGERS)
    stepper = hybrid.silent(small(CorrectedConfig(BURGERS), spec))
    assert_allclose(hybrid.roll(stepper, Window.of(frames[:, :1], spec), 5), frames[:, 1:], atol=1e-5)


@pytest.mark.parametrize("config", [CorrectedConfig, ClosureConfig])
def test_frames_of_half_precision_are_widened(hybrid, config):
    spec, frames = hybrid.spec_of(BURGERS), hybrid.frames_of(BURGERS, 1).astype(jnp.bfloat16)
    stepper = small(config(BURGERS), spec)
    found = rollout(stepper, Window.of(frames, spec), 2)
    assert found.dtype == jnp.float32
    assert_allclose(found, rollout(stepper, Window.of(frames.astype("f4"), spec), 2), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("euler", "kolmogorov")))
        for name in STARTING
        if name != "lorenz63"
    ],
)
def test_a_solver_may_meet_several_devices_first(hybrid, name):
    """No step was taken with this solver before, so that its coefficients are formed where the batch is split."""
    solver = dataclasses.replace(make_solver(name, **STARTING[name]), time_step=0.0101)
    frames, spec = hybrid.frames_of(solver, 2, batch=4), hybrid.spec_of(solver)
    stepper = hybrid.silent(small(CorrectedConfig(solver), spec))
    layout = Layout(data=4)
    with layout.use():
        found = hybrid.roll(stepper, layout.place(Window.of(frames[:, :1], spec)), 2)
    assert_allclose(found, frames[:, 1:], atol=1e-4 * abs(frames).max())


def test_a_velocity_is_solved_as_vorticity(hybrid):
    solver = make_solver("kolmogorov", **STARTING["kolmogorov"])
    frames, spec = hybrid.frames_of(solver, 2), hybrid.spec_of(solver)
    stepper = hybrid.silent(small(CorrectedConfig(solver), spec))
    assert_allclose(hybrid.roll(stepper, Window.of(frames[:, :1], spec), 2), frames[:, 1:], atol=1e-4)


def test_parameters_of_the_data_reach_the_solver(hybrid):
    frames = jnp.concatenate([hybrid.frames_of(BURGERS, 2, 1, viscosity=v) for v in (0.02, 0.2)])
    spec = hybrid.spec_of(BURGERS, "viscosity")
    stepper = hybrid.silent(small(CorrectedConfig(dataclasses.replace(BURGERS, viscosity=(0.01, 0.3))), spec))
    window = Window.of(frames[:, :1], spec, parameters=jnp.asarray([[0.02], [0.2]]))
    assert_allclose(rollout(stepper, window, 2), frames[:, 1:], atol=1e-5)
    assert abs(frames[0] - frames[1]).max() > 1e-2


def test_the_network_says_increments(hybrid):
    """One from the network is `scale` times the scale of the increments, on top of the solver's frame."""
    frames, spec = hybrid.frames_of(BURGERS, 1), hybrid.spec_of(BURGERS)

    class One(nnx.Module):
        def __call__(self, fields, scalars):
            assert fields.shape[1:] == (32, 3)  # two frames and the solver's
            return jnp.ones_like(fields[..., :1])

    config = CorrectedConfig(BURGERS, history=2, scale=0.5)
    stepper = config.build(spec, One(), Normalizer(spec, [0.0], [1.0], [0.2]))
    predicted = hybrid.roll(stepper, Window.of(frames, spec), 1)
    solved = jax.vmap(BURGERS.stepper())(frames[:, 1])
    assert_allclose(predicted[:, 0], solved + 0.5 * 0.2, atol=1e-6)


def test_gradients_through_the_solver(hybrid):
    """The slope of a two-step rollout in the first frame, against a difference quotient."""
    with jax.enable_x64(True):
        frames, spec = hybrid.frames_of(BURGERS, 2, 1, jnp.float64), hybrid.spec_of(BURGERS)
        stepper = small(CorrectedConfig(BURGERS, scale=0.5), spec)
        direction = jnp.cos(3 * jnp.asarray(BURGERS.grid.axes[0].centers))[:, None]

        @jax.jit
        def score(t):
            window = Window.of(frames[:, :1] + t * direction, spec)
            return jnp.sum(rollout(stepper, window, 2)[:, -1] * jnp.sin(direction))

        assert_allclose(jax.grad(score)(0.0), (score(1e-4) - score(-1e-4)) / 2e-4, rtol=1e-5)


def test_training_finds_missing_viscosity(hybrid):
    """A solver with too little viscosity, corrected from data with more."""
    frames = hybrid.frames_of(dataclasses.replace(BURGERS, viscosity=0.15), 4, 4)
    spec = hybrid.spec_of(BURGERS)
    normalizer = Normalizer(spec, [0.0], [float(frames.std())], [float(jnp.diff(frames, axis=1).std())])
    stepper = small(CorrectedConfig(BURGERS, scale=0.5), spec, ResNetConfig(width=8, depth=1), normalizer)
    losses = hybrid.train(stepper, Window.of(frames, spec), Unrolled(steps=2), 60, 1e-2)
    assert losses[-1] < 0.3 * losses[0]


def test_saved_and_loaded(hybrid, tmp_path):
    frames, spec = hybrid.frames_of(BURGERS, 1), hybrid.spec_of(BURGERS)
    stepper = small(CorrectedConfig(BURGERS, history=2, scale=0.3), spec)
    window = Window.of(frames, spec)
    loaded = saving.load(saving.save(stepper, tmp_path / "model"))
    assert loaded.config == stepper.config
    assert_array_equal(hybrid.roll(loaded, window, 2), hybrid.roll(stepper, window, 2))
    assert stepper.on_grid(spec.grid) is stepper
    with pytest.raises(SpecError, match="cannot move to"):
        stepper.on_grid(dataclasses.replace(BURGERS, points=16).grid)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("smoke", {}, "cannot start from stored frames"),
        ("darcy_flow", {}, "cannot start from stored frames"),
        ("acoustic", {}, "cannot start from stored frames"),
        ("euler", {}, "Set substeps"),
        ("euler", {"points": 16, "solver_points": 32, "substeps": 8}, "Set solver_points=16"),
    ],
)
def test_solvers_that_cannot_be_corrected(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        CorrectedConfig(make_solver(name, **fields))


def test_misfits_of_solver_and_data(hybrid):
    spec = hybrid.spec_of(BURGERS)
    for change, message in (
        ({"grid": make_solver("burgers", points=16, solver_points=32).grid}, "grid of"),
        ({"time_step": 0.1}, "steps 0.05"),
        ({"channels": (Channel("h"),)}, "channels"),
    ):
        with pytest.raises(SpecError, match=message):
            CorrectedConfig(BURGERS).signature(dataclasses.replace(spec, **change))
    with pytest.raises(ConfigError, match="Give viscosity as a number"):
        CorrectedConfig(dataclasses.replace(BURGERS, viscosity=(0.1, 0.2))).signature(spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": -1}, "scale is -1"),
        ({"scale": "small"}, "scale is 'small'"),
        ({"history": 0}, "history is 0"),
        ({"history": 1.5}, r"history is 1.5 \(float\), but an integer"),
        ({"history": True}, "history is True"),
        ({"history": "2"}, "history is '2'"),
    ],
)
def test_numbers_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        CorrectedConfig(BURGERS, **fields)


def test_units_of_solver_and_data():
    """A parameter is handed to the solver as it is, and steps are counted in its unit of time."""
    solver = make_solver("quasigeostrophic", points=16, initial_modes=2)
    for unit in ("m s-1", ""):
        CorrectedConfig(solver).signature(quasigeostrophic(solver, unit))
    CorrectedConfig(solver).signature(quasigeostrophic(solver, "m s-1", time_unit=""))
    CorrectedConfig(solver).signature(quasigeostrophic(solver, "1", "thickness_ratio"))  # the solver names no unit
    CorrectedConfig(solver).signature(quasigeostrophic(solver, "K", "temperature"))  # which the solver does not have
    with pytest.raises(SpecError, match="'shear' is in 'm s-1' in the solver, but in 'km h-1' in the data"):
        CorrectedConfig(solver).signature(quasigeostrophic(solver, "km h-1"))
    with pytest.raises(SpecError, match="Time is in 's' in the solver, but in 'h' in the data"):
        CorrectedConfig(solver).signature(quasigeostrophic(solver, "m s-1", time_unit="h"))


def quasigeostrophic(solver, unit, name="shear", time_unit="s"):
    parameters = (Channel(name, unit),)
    return Spec(solver.grid, solver.channels, (), (), parameters, solver.time_step, time_unit)


def test_boundaries_of_solver_and_data(hybrid):
    options = {"points": 8, "solver_points": 8, "substeps": 16, "time_step": 0.05}
    walls = make_solver("euler", boundary="wall", **options)
    periodic = make_solver("euler", **options)
    for kind in (CorrectedConfig, ClosureConfig):
        kind(walls).signature(hybrid.spec_of(walls))
        with pytest.raises(SpecError, match="Axis 'y' is periodic in the solver, but not in the data.*boundary"):
            kind(periodic).signature(hybrid.spec_of(walls))
        with pytest.raises(SpecError, match="'y' is not periodic in the solver, but it is in the data"):
            kind(walls).signature(hybrid.spec_of(periodic))
    grid = Grid(tuple(dataclasses.replace(axis, periodic=False) for axis in BURGERS.grid.axes))
    with pytest.raises(SpecError, match=r"DataConfig\(periodic=\('x',\)\)"):
        CorrectedConfig(BURGERS).signature(hybrid.spec_of(BURGERS).on(grid))


@pytest.mark.parametrize("config", [CorrectedConfig, ClosureConfig])
@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("burgers", r"solver is 'burgers' \(str\).*make_solver\('burgers', ...\)"),
        (SOLVERS["euler"], r"solver is .*\(type\).*make_solver\('euler', ...\)"),
        (None, r"solver is None \(NoneType\).*make_solver"),
    ],
)
def test_what_is_no_solver(config, solver, message):
    with pytest.raises(ConfigError, match=message):
        config(solver)
