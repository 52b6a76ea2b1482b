"""A velocity that cannot diverge, by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.constraints import DivergenceFree
from physml.constraints.differences import Differences
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models.fno import FNOConfig
from physml.normalize import Normalizer
from physml.objectives import OneStep
from physml.rollout import rollout
from physml.steppers import StreamFunctionConfig
from physml.steppers.describe import build_stepper
from physml.steppers.stream_function import unit_curl

PERIODIC = Grid((Axis.uniform("y", 12, 3.0), Axis.uniform("x", 16, 2.0)))
ODD = Grid((Axis.uniform("x", 9), Axis.uniform("y", 15)))
WALLS = Grid((Axis.cells("x", 12), Axis.cells("y", 10)))
TUBE = Grid((Axis.cells("y", 10), Axis.cells("x", 12, 4.0, periodic=True)))
GRIDS = {"periodic": PERIODIC, "odd": ODD, "walls": WALLS, "tube": TUBE}
NAMES = ("tracer", "v", "u")


def spec_on(grid):
    return Spec(grid, tuple(map(Channel, NAMES)), time_step=0.1)


def build(grid, **options):
    normalizer = Normalizer(spec_on(grid), [0.0] * 3, [1.0] * 3, [0.5, 0.03, 0.04])
    model = FNOConfig(modes=(3, 3), width=8, depth=1)
    return build_stepper(StreamFunctionConfig(**options), model, spec_on(grid), normalizer)


def smooth(grid, frames=3):
    """Frames whose velocity has no divergence."""
    random = np.random.default_rng(0).normal(size=(2, frames, *grid.shape, 3)).astype(np.float32)
    window = Window.of(random, spec_on(grid))
    law = DivergenceFree().build(window.spec)
    fixed = jax.jit(jax.vmap(lambda frame: law.project(frame, frame, window.context(0, 1)), 1, 1))(random)
    return Window.of(np.asarray(fixed), window.spec)


@pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))
def test_no_step_makes_divergence(grid):
    """On periodic and walled axes: the divergence is the one that the constraint takes off."""
    stepper, window = build(grid), smooth(grid)
    assert stepper.config.signature(stepper.spec).outputs == 2
    start = window.slice(0, 1)
    law = DivergenceFree().build(window.spec)

    @nnx.jit
    def run(stepper, start):
        frames = rollout(stepper, start, 20)
        return frames, [law.violation(frames[:, i], frames[:, i], start.context(0, 1)).max() for i in (0, 19)]

    frames, violations = run(stepper, start)
    assert max(map(float, violations)) <= 1e-6
    change = np.asarray(frames[:, 0] - window.frames[:, 0])
    assert (np.abs(change).max((0, 1, 2)) > 1e-4).all()  # every channel moves
    if all(grid.periodic):
        assert_allclose(change[..., 1:].mean((1, 2)), 0, atol=1e-7)  # the mean flow stays


def test_the_increment_is_the_curl():
    """psi = cos(2 pi x / 2) cos(2 pi y / 3) in units in which its flow is of the size of psi."""
    y, x = np.meshgrid(*[np.asarray(axis.centers) for axis in PERIODIC.axes], indexing="ij")
    kx, ky = 2 * np.pi / 2, 2 * np.pi / 3
    size = np.hypot(kx, ky)
    psi = jnp.asarray(np.cos(kx * x) * np.cos(ky * y), jnp.float32)[None]
    u, v = unit_curl(psi, StreamFunctionConfig().differences(spec_on(PERIODIC)))[0]
    assert_allclose(u, -ky / size * np.cos(kx * x) * np.sin(ky * y), atol=1e-6)
    assert_allclose(v, kx / size * np.sin(kx * x) * np.cos(ky * y), atol=1e-6)


@pytest.mark.parametrize("grid", [ODD, WALLS, TUBE])
def test_outputs_of_order_one_are_increments_of_the_datas_size(grid):
    """White or smooth: each wave of the stream function makes a flow of its own size."""
    random = np.random.default_rng(0).normal(size=(64, *grid.shape)).astype(np.float32)
    differences = Differences(grid, tuple([a.name for a in grid.axes].index(name) for name in "xy"))
    flow = unit_curl(jnp.asarray(random), differences)
    assert_allclose(np.square(flow).sum(1).mean(), 1, rtol=0.15)  # but for alternations that no difference sees
    context = Window.of(np.zeros((64, 2, *grid.shape, 3), np.float32), spec_on(grid)).context(0, 1)
    previous = np.zeros((64, *grid.shape, 3), np.float32)
    frame = build(grid).predict(previous, jnp.stack([random, random], -1), context)
    assert_allclose(frame[..., 0], 0.5 * random, rtol=1e-6)
    assert_allclose(np.square(frame[..., 1:]).sum(-1).mean(), 0.03**2 + 0.04**2, rtol=0.15)
    assert_allclose(frame[..., 2], 0.05 * flow[:, 0], rtol=1e-4, atol=1e-7)


def test_gradients_reach_every_parameter():
    """Of the last bias, those of other channels: the height of a stream function says nothing on periodic axes."""
    window, stepper = smooth(PERIODIC), build(PERIODIC)
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)
    slopes = jax.jit(jax.grad(lambda p: OneStep()(nnx.merge(graph, p, rest), window.slice(0, 2), None)[0]))(params)
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert bool(jnp.isfinite(slope).all()), path
        assert bool((slope != 0).any()), path


def test_training_lowers_the_loss(hybrid):
    """What moves a vortex along is within reach of a stream function."""
    at = np.meshgrid(*[2 * np.pi * np.asarray(a.centers) / a.length for a in PERIODIC.axes], indexing="ij")
    frames = []
    for step in range(3):
        phase = at[1] - 0.3 * step
        v, u = 3 * np.sin(phase) * np.cos(at[0]), -2 * np.cos(phase) * np.sin(at[0])
        frames.append(np.stack([np.cos(phase), v, u], -1))
    window = Window.of(np.stack(frames)[None].astype(np.float32), spec_on(PERIODIC))
    normalizer = Normalizer.fit([jax.tree.map(lambda x: x[0], window)])
    model = FNOConfig(modes=(2, 2), width=8, depth=1)
    stepper = build_stepper(StreamFunctionConfig(), model, window.spec, normalizer)
    losses = hybrid.train(stepper, window, OneStep(space="increment"), 60, rate=1e-2)
    assert losses[-1] < 0.1 * losses[0]


def test_saved_and_loaded(tmp_path):
    stepper, start = build(PERIODIC, velocity=("u", "v"), history=1), smooth(PERIODIC).slice(0, 1)
    physml.save(stepper, tmp_path / "model")
    loaded = physml.load(tmp_path / "model")
    assert loaded.config == stepper.config
    assert_array_equal(rollout(loaded, start, 3), rollout(stepper, start, 3))


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"velocity": ("u", "w")}, PERIODIC, "no channel 'w'"),
        ({}, Grid((Axis.uniform("a", 8), Axis.uniform("b", 8))), "lacks"),
        ({}, Grid((Axis("x", tuple(range(8)), tuple(range(1, 9))), Axis.uniform("y", 8))), "equal size"),
    ],
)
def test_data_that_do_not_fit(options, grid, message):
    with pytest.raises(SpecError, match=message):
        StreamFunctionConfig(**options).signature(spec_on(grid))


def test_masks_and_single_components_are_refused():
    with pytest.raises(ConfigError, match="2 different channels"):
        StreamFunctionConfig(velocity=("u",))
    window = smooth(WALLS)
    mask = np.ones((2, *WALLS.shape, 3), np.float32)
    with pytest.raises(SpecError, match="masked cells"):
        rollout(build(WALLS), Window.of(window.frames, window.spec, mask=mask).slice(0, 1), 1)
