"""Flux form: exact totals on every kind of grid, values that stay where they may be, and steps known by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml import saving
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models import ConvNetConfig
from physml.normalize import Normalizer
from physml.objectives import OneStep, Unrolled
from physml.rollout import rollout
from physml.steppers import FluxConfig
from physml.steppers.describe import build_stepper

LATITUDES = tuple(np.linspace(-84.375, 84.375, 16))
GRIDS = {
    "periodic": Grid((Axis.uniform("x", 16), Axis.uniform("y", 12))),
    "walls": Grid((Axis.cells("x", 16), Axis.cells("y", 12))),
    "line": Grid((Axis.cells("x", 32, periodic=True),)),
    "stretched": Grid((Axis("x", tuple(np.arange(9.0) ** 2), tuple(np.arange(1.0, 10))), Axis.cells("y", 8))),
    "sphere": Grid(
        (Axis("latitude", LATITUDES, tuple(np.cos(np.deg2rad(LATITUDES)))), Axis.uniform("longitude", 32, 360.0))
    ),
}


class Noise(nnx.Module):
    """Other random outputs of the given size in every step."""

    def __init__(self, outputs, size):
        self.outputs, self.size, self.dropout = outputs, size, 1.0

    def __call__(self, fields, scalars, key=None):
        key = jax.random.key(7) if key is None else key
        return self.size * jax.random.normal(key, (*fields.shape[:-1], self.outputs), jnp.float32)


class Given(nnx.Module):
    """Always the same outputs."""

    def __init__(self, outputs):
        self.outputs = nnx.Param(jnp.asarray(outputs, jnp.float32))

    def __call__(self, fields, scalars):
        return jnp.broadcast_to(self.outputs[...], (*fields.shape[:-1], self.outputs[...].shape[-1]))


class Greedy(nnx.Module):
    """An adversary: everything goes from low to high values, as fast as it can; for -1 the other way."""

    def __init__(self, direction=1):
        self.direction = direction

    def __call__(self, fields, scalars):
        u = fields[..., :1]
        return jnp.concatenate(
            [self.direction * 1e3 * jnp.sign(jnp.roll(u, -1, 1 + a) - u) for a in range(u.ndim - 2)], -1
        )


def spec_of(grid, *names):
    return Spec(grid, tuple(map(Channel, names or ("u",))), time_step=0.5)


def build(grid, model=None, size=1.0, names=("u",), scale=0.05, **options):
    spec, n = spec_of(grid, *names), len(names)
    config = FluxConfig(**options)
    model = model or Noise(config.signature(spec).outputs, size)
    return config.build(spec, model, Normalizer(spec, np.ones(n), np.full(n, 0.5), np.full(n, scale)))


def box(grid, mask=False):
    """A box of ones in a field of zeros, twice: the second one is twice as high."""
    frame = np.zeros((2, 1, *grid.shape, 1), np.float32)
    frame[(slice(None), 0, *[slice(n // 4, n // 2) for n in grid.shape])] = 1
    frame[1] *= 2
    exists = None
    if mask:
        exists = (np.random.default_rng(0).random((1, *grid.shape, 1)) > 0.3).astype(np.float32).repeat(2, 0)
        frame *= exists[:, None]
    return Window.of(frame, spec_of(grid), mask=exists)


def roll(stepper, window, steps):
    return np.asarray(jax.jit(lambda w: rollout(stepper, w, steps, jax.random.key(1)))(window), np.float64)


def drift(frames, window):
    """Largest change of the total, relative to the mean size of the values."""
    weights = np.asarray(window.spec.grid.weights(), np.float64)[..., None]
    space = tuple(range(2, frames.ndim - 1))
    before = (weights * np.asarray(window.frames[:, :1], np.float64)).mean(space)
    size = np.maximum((weights * np.abs(frames)).mean(space), np.abs(before))
    return (np.abs((weights * frames).mean(space) - before) / size).max()


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("mask", [False, True])
def test_totals_stay_over_2000_steps(grid, mask):
    window = box(GRIDS[grid], mask)
    options = {"upwind": True, "positive": ("u",)} if mask and grid == "sphere" else {}
    frames = roll(build(GRIDS[grid], **options), window, 2000)
    assert np.abs(frames[:, -1] - frames[:, 0]).max() > 0.1  # something moved
    assert drift(frames, window) <= 1e-6
    if mask:
        assert np.all(frames[np.broadcast_to(np.asarray(window.mask)[:, None] == 0, frames.shape)] == 0)


@pytest.mark.parametrize(
    ("grid", "upwind", "adversary"),
    [("walls", False, True), ("line", True, True), ("sphere", False, False), ("sphere", True, True)],
)
def test_shocks_stay_bounded(grid, upwind, adversary):
    """The unlimited network leaves the bounds at once."""
    window, grid = box(GRIDS[grid]), GRIDS[grid]
    # Upwind of a wall of ones lies nothing: there the other way does harm.
    model = (lambda: Greedy(-1 if upwind else 1)) if adversary else (lambda: None)
    free = roll(build(grid, model(), size=100.0, upwind=upwind), window, 2)
    assert np.nanmin(free) < -0.1
    limited = {"size": 100.0, "upwind": upwind}
    positive = roll(build(grid, model(), positive="u", **limited), window, 300)
    assert positive.min() >= 0
    assert drift(positive, window) <= 1e-6
    bounded = roll(build(grid, model(), bounded="u", **limited), window, 300)
    assert bounded.min() >= 0
    assert bounded[0].max() <= 1
    assert bounded[1].max() <= 2
    assert drift(bounded, window) <= 1e-6


def test_a_uniform_wind_carries_a_shock_through_empty_cells_and_full_ones():
    """Two cells per step: more than a limiter could let through that counts only what a cell has."""
    grid = Grid((Axis.uniform("x", 16),))
    frame = np.zeros((1, 1, 16, 1), np.float32)
    frame[0, 0, 4:9] = 1

    class Shift(nnx.Module):
        def __call__(self, fields, scalars):
            return fields + jnp.roll(fields, 1, 1)  # what passes a face if all moves by two cells

    spec = spec_of(grid)
    for limits in ({}, {"positive": ("u",)}, {"bounded": ("u",)}):
        stepper = FluxConfig(**limits).build(spec, Shift(), Normalizer.identity(spec))
        frames = roll(stepper, Window.of(frame, spec), 3)
        for step in range(3):
            assert_allclose(frames[0, step, :, 0], np.roll(frame[0, 0, :, 0], 2 * step + 2), atol=2e-5)


def test_steps_by_hand():
    """Faces of one axis with walls: u_i changes by what passes its lower face less what passes its upper one."""
    grid = Grid((Axis("x", (0.5, 2.0, 4.5), (1.0, 2.0, 3.0)),))
    spec = Spec(grid, (Channel("u"), Channel("v")), time_step=0.5)
    normalizer = Normalizer(spec, [3.0, 0.0], [4.0, 1.0], [0.1, 10.0])
    frame = np.array([[[[1.0, 2.0], [5.0, 3.0], [7.0, 4.0]]]], np.float32)
    outputs = np.array([[2.0, 1.0], [-3.0, 2.0], [9.0, 3.0]])  # flux of u, increment of v
    for upwind in (False, True):
        stepper = FluxConfig(channels="u", upwind=upwind).build(spec, Given(outputs), normalizer)
        lead = rollout(stepper, Window.of(frame, spec, times=np.array([[0.0, 1.0]], np.float32)), 1)  # two steps long
        passing = np.array([2.0 * 1.0, -3.0 * 7.0]) / 5 if upwind else np.array([2.0, -3.0])
        first, second = 2 * 0.1 * passing * [1.0, 2.0]  # sizes of the smaller cells
        expected = [1 - first / 1, 5 + (first - second) / 2, 7 + second / 3]
        assert_allclose(lead[0, 0, :, 0], expected, rtol=1e-6)
        assert_allclose(lead[0, 0, :, 1], [2 + 10, 3 + 20, 4 + 30], rtol=1e-6)


def test_masked_cells_may_hold_anything():
    """No flux enters them, whatever the network says there, and gradients stay finite."""
    grid = GRIDS["periodic"]
    window = box(grid, mask=True)

    @nnx.jit
    @functools.partial(nnx.grad, has_aux=True)
    def run(stepper, window):
        frames = rollout(stepper, window, 3)
        return jnp.sum(frames**2), frames

    for options in ({}, {"upwind": True, "bounded": ("u",)}):
        outputs = np.ones((*grid.shape, 2))
        outputs[np.asarray(window.mask)[0, ..., 0] == 0] = np.nan
        stepper = build(grid, Given(outputs), **options)
        finite = build(grid, Given(np.ones((*grid.shape, 2))), **options)
        nowhere = Window.of(window.frames * 0, window.spec, mask=window.mask * 0)
        assert np.isfinite(run(stepper, window)[1]).all()
        slope, frames = run(finite, nowhere)
        assert np.isfinite(slope["model"]["outputs"][...]).all()
        assert np.all(frames == 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"upwind": True, "positive": ("u", "v"), "bounded": ("u",)}, marks=pytest.mark.slow),
        {"channels": "v"},
    ],
)
def test_gradients_reach_every_parameter(options):
    grid = GRIDS["walls"]
    spec = spec_of(grid, "u", "v")
    normalizer = Normalizer(spec, [1.0, 0.0], [0.5, 0.5], [0.1, 0.1])
    stepper = build_stepper(FluxConfig(**options), ConvNetConfig(width=6, depth=1, activation="gelu"), spec, normalizer)
    frames = np.random.default_rng(0).random((2, 4, *grid.shape, 2)).astype(np.float32)
    objective = Unrolled(2) if "upwind" in options else OneStep()
    slope = nnx.jit(nnx.grad(lambda s, w: objective(s, w, None)[0]))(stepper, Window.of(frames, spec))
    for path, leaf in nnx.to_flat_state(nnx.state(slope, nnx.Param)):
        assert np.isfinite(leaf[...]).all(), path
        assert np.all(np.abs(leaf[...]).max(axis=tuple(range(leaf[...].ndim - 1))) > 0), path


def test_training_learns_a_conserving_step():
    """Upwind advection on a line, which fluxes of the frame itself can state exactly."""
    import optax

    grid = GRIDS["line"]
    spec = spec_of(grid)
    frames = [np.random.default_rng(0).random((8, *grid.shape, 1)).astype(np.float32)]
    for _ in range(2):
        frames.append(frames[-1] + 0.3 * (np.roll(frames[-1], 1, 1) - frames[-1]))
    window = Window.of(np.stack(frames, 1), spec)
    normalizer = Normalizer(spec, [0.5], [0.3], [0.1])
    stepper = build_stepper(FluxConfig(), ConvNetConfig(width=8, depth=0), spec, normalizer)
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)
    rule = optax.adam(3e-2)

    @jax.jit
    def update(params, state):
        value, slope = jax.value_and_grad(lambda p: Unrolled(2)(nnx.merge(graph, p, rest), window, None)[0])(params)
        change, state = rule.update(slope, state)
        return optax.apply_updates(params, change), state, value

    state, losses = rule.init(params), []
    for _ in range(300):
        params, state, value = update(params, state)
        losses.append(float(value))
    assert losses[-1] < 1e-4 * losses[0]


def test_float64_and_jit_and_vmap():
    grid = GRIDS["sphere"]
    stepper, window = build(grid, Given(np.ones((*grid.shape, 2))), positive=("u",)), box(grid)
    whole = roll(stepper, window, 5)
    each = jax.jit(jax.vmap(lambda frames: rollout(stepper, Window.of(frames[None], window.spec), 5)[0]))(window.frames)
    assert_allclose(each, whole, atol=1e-6)
    with jax.enable_x64(True):
        double = Window.of(np.asarray(window.frames, np.float64), window.spec)
        frames = jax.jit(lambda w: rollout(stepper, w, 5))(double)
        assert frames.dtype == jnp.float64
        assert_allclose(frames, whole, atol=1e-5)


def test_saved_moved_and_constrained(tmp_path):
    grid = GRIDS["walls"]
    spec = spec_of(grid, "u", "v")
    normalizer = Normalizer(spec, [1.0, 0.0], [0.5, 0.5], [0.1, 0.1])
    config = FluxConfig(history=2, channels="v", upwind=True, positive="v")
    stepper = build_stepper(config, ConvNetConfig(width=6, depth=1, activation="gelu"), spec, normalizer)
    window = Window.of(np.random.default_rng(0).random((2, 3, *grid.shape, 2)).astype(np.float32), spec)
    loaded = saving.load(saving.save(stepper, tmp_path / "model"))
    assert loaded.config == config
    assert_array_equal(roll(loaded, window, 4), roll(stepper, window, 4))
    finer = Grid((Axis.cells("x", 32), Axis.cells("y", 24)))
    wide = Window.of(np.ones((1, 2, 32, 24, 2), np.float32), spec.on(finer))
    assert np.isfinite(roll(loaded.on_grid(finer), wide, 2)).all()
    fixed = physml.constrain(loaded, physml.MassFixer("u"))
    totals = roll(fixed, window, 4)[..., 0].mean((2, 3))
    assert_allclose(
        totals, np.repeat(np.asarray(window.frames, np.float64)[:, 1:2, ..., 0].mean((2, 3)), 4, 1), rtol=1e-6
    )


def test_what_cannot_work_is_refused():
    spec = spec_of(GRIDS["line"], "rho", "v")
    with pytest.raises(SpecError, match="rho"):
        FluxConfig(channels="roh").signature(spec)
    with pytest.raises(SpecError, match="no channel 'u'"):
        FluxConfig(positive="u").signature(spec)
    with pytest.raises(SpecError, match="no spatial axis"):
        FluxConfig().signature(spec_of(Grid(())))
    with pytest.raises(ConfigError, match="Add it"):
        FluxConfig(channels="rho", bounded="v")
    with pytest.raises(ConfigError, match="history"):
        FluxConfig(history=0)
    assert FluxConfig(channels="rho").signature(spec_of(GRIDS["walls"], "rho", "v")).outputs == 3
