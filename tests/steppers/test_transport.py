"""Centered tracers and prescribed sources: what the network sees, what it need not learn, and budgets that close."""

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
from physml.objectives import OneStep
from physml.rollout import rollout
from physml.steppers import ResidualConfig, TransportConfig
from physml.steppers.describe import build_stepper

LATITUDES = tuple(np.linspace(-78.75, 78.75, 8))
GRID = Grid((Axis("latitude", LATITUDES, tuple(np.cos(np.deg2rad(LATITUDES)))), Axis.uniform("longitude", 12, 360.0)))
SPEC = Spec(
    GRID, (Channel("air"), Channel("co2"), Channel("ch4")), (Channel("leak"), Channel("source")), time_step=0.5
)  # fmt: skip
GROUP = np.zeros(2), np.ones(2)
NORMALIZER = Normalizer(SPEC, [1.0, 400.0, 1.8], [0.2, 3.0, 0.1], [0.1, 0.2, 0.01], forcing=GROUP)
NETWORK = ConvNetConfig(width=6, depth=1)


class Silent(nnx.Module):
    """Says zero; calls `tell` with what it is given."""

    def __init__(self, tell=lambda fields: None):
        self.tell = tell

    def __call__(self, fields, scalars):
        self.tell(fields)
        return jnp.zeros((*fields.shape[:-1], 3), fields.dtype)


def data(frames=6, mask=None):
    random = np.random.default_rng(0)
    values = random.random((2, frames, *GRID.shape, 3)) * [0.5, 8.0, 0.3] + [1.0, 396.0, 1.7]
    forcing = random.normal(size=(2, frames, *GRID.shape, 2))
    return Window.of(values.astype(np.float32), SPEC, forcing=forcing.astype(np.float32), mask=mask)


def test_without_options_it_is_residual():
    for history in (1, 2):
        plain = build_stepper(ResidualConfig(history=history), NETWORK, SPEC, NORMALIZER)
        other = build_stepper(TransportConfig(history=history), NETWORK, SPEC, NORMALIZER)
        assert_array_equal(rollout(other, data(), 4), rollout(plain, data(), 4))


@pytest.mark.parametrize("masked", [False, True])
def test_the_network_sees_differences_to_the_weighted_mean_of_the_last_frame(masked):
    mask = None
    if masked:
        mask = np.random.default_rng(1).random((2, *GRID.shape, 1)) > 0.3
        mask = np.broadcast_to(mask, (2, *GRID.shape, 3)).astype(np.float32)
    window = data(mask=mask)
    told = []
    stepper = TransportConfig(history=2, center=("co2",)).build(SPEC, Silent(told.append), NORMALIZER)
    stepper.advance(jnp.asarray(window.frames[:, :2]), window.context(0, 2))
    weights = GRID.weights() * (np.ones((2, *GRID.shape)) if mask is None else mask[..., 1])
    frames, exists = window.frames[:, :2].astype(np.float64), 1 if mask is None else mask[..., 1]
    mean = (weights * frames[:, 1, ..., 1]).sum((1, 2)) / weights.sum((1, 2))
    seen = told[-1]
    for frame in range(2):
        expected = (frames[:, frame, ..., 1] - mean[:, None, None]) / 3 * exists
        assert_allclose(seen[..., 3 * frame + 1], expected, atol=1e-4)  # numbers of 400 in float32
        air = (frames[:, frame, ..., 0] - 1) / 0.2 * exists
        assert_allclose(seen[..., 3 * frame], air, atol=1e-5)
    assert_allclose(seen[..., 6:], window.forcing[:, 2])


def test_a_higher_background_changes_nothing_but_itself():
    window = data()
    higher = Window.of(window.frames + np.float32([0, 64, 0]), SPEC, forcing=window.forcing)
    for center, same in ((("co2",), True), ((), False)):
        stepper = build_stepper(TransportConfig(center=center), NETWORK, SPEC, NORMALIZER)
        difference = np.asarray(rollout(stepper, higher, 5) - rollout(stepper, window, 5))[..., 1] - 64
        assert (np.abs(difference).max() < 1e-2) == same


def test_sources_are_added_over_the_length_of_the_step():
    window = data()
    config = TransportConfig(center="co2", sources=("source", "leak"), into=("co2", "co2"))
    frames = rollout(config.build(SPEC, Silent(), NORMALIZER), window, 3)
    expected = np.asarray(window.frames[:, 0]).astype(np.float64)
    for step in range(3):
        expected[..., 1] += 0.5 * window.forcing[:, step + 1].sum(-1)
        assert_allclose(frames[:, step], expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["additive", "multiplicative"])
def test_with_the_fixer_the_budget_closes(method):
    """Sum of what sources brought, within 1e-6 of the total over 400 steps of an untrained network."""
    config = TransportConfig(center="co2", sources="source")
    stepper = build_stepper(config, NETWORK, SPEC, NORMALIZER)
    fixed = physml.constrain(stepper, physml.MassFixer("co2", method, sources="source"))
    random = np.random.default_rng(0)
    forcing = random.normal(0.3, 1, (2, 401, *GRID.shape, 2)).astype(np.float32)
    window = Window.of(data().frames[:, :1], SPEC, forcing=forcing, times=np.arange(401, dtype=np.float32)[None] * 0.5)
    window = Window.of(window.frames, SPEC, forcing=forcing, times=np.repeat(window.times, 2, 0))
    weights = GRID.weights().astype(np.float64)
    brought = 0.5 * (weights * forcing[:, 1:, ..., 1].astype(np.float64)).mean((2, 3)).cumsum(1)
    target = (weights * window.frames[:, :1, ..., 1].astype(np.float64)).mean((2, 3)) + brought

    def drift(stepper):
        frames = np.asarray(jax.jit(lambda w: rollout(stepper, w, 400))(window), np.float64)
        return np.abs((weights * frames[..., 1]).mean((2, 3)) / target - 1).max()

    assert drift(stepper) > 1e-4
    assert drift(fixed) <= 1e-6


def test_saved_moved_and_trained(tmp_path):
    config = TransportConfig(history=2, center=("co2", "ch4"), sources=("source", "leak"))
    stepper = build_stepper(config, NETWORK, SPEC, NORMALIZER)
    window = data()
    loaded = saving.load(saving.save(stepper, tmp_path / "model"))
    assert loaded.config == config
    assert_array_equal(rollout(loaded, window, 3), rollout(stepper, window, 3))
    assert type(loaded.on_grid(GRID)) is type(stepper)
    slope = nnx.jit(nnx.grad(lambda s: OneStep()(s, window, None)[0]))(stepper)
    for path, leaf in nnx.to_flat_state(nnx.state(slope, nnx.Param)):
        assert np.abs(leaf[...]).max() > 0, path


def test_what_cannot_work_is_refused():
    with pytest.raises(SpecError, match="co2"):
        TransportConfig(center="co").signature(SPEC)
    with pytest.raises(SpecError, match="no forcing field 'sources'"):
        TransportConfig(center="co2", sources="sources").signature(SPEC)
    for wrong in ({"sources": "source"}, {"center": ("co2", "ch4"), "sources": "source"}, {"into": "co2"}):
        with pytest.raises(ConfigError, match="into"):
            TransportConfig(**wrong)
