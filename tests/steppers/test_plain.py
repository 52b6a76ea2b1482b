"""Direct and Residual: what they compute, what they refuse, and that everything reaches the network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.constraints import MassFixer
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Grid, Window
from physml.normalize import Normalizer
from physml.objectives import Unrolled
from physml.rollout import rollout
from physml.steppers.packing import count
from physml.steppers.plain import DirectConfig, ResidualConfig


class Constant(nnx.Module):
    """Gives the same numbers for every input; `outputs` per channel."""

    def __init__(self, outputs):
        self.bias = nnx.Param(jnp.asarray(outputs, jnp.float32))

    def __call__(self, fields, scalars):
        return jnp.broadcast_to(self.bias[...], (*fields.shape[:-1], len(self.bias[...])))


def scaled(spec):
    return Normalizer(spec, [1.0, -2.0], [2.0, 3.0], [0.5, 0.25])


def test_direct_is_the_denormalized_output(spec, window):
    stepper = DirectConfig().build(spec, Constant([1.0, 2.0]), scaled(spec))
    frames = rollout(stepper, window, 3)
    assert frames.shape == (3, 3, 8, 6, 2)
    assert_allclose(frames[..., 0], 1 * 2 + 1, rtol=1e-6)
    assert_allclose(frames[..., 1], 2 * 3 - 2, rtol=1e-6)


def test_residual_adds_increments_in_their_own_scale(spec, window):
    stepper = ResidualConfig(history=2).build(spec, Constant([1.0, 2.0]), scaled(spec))
    frames = rollout(stepper, window, 3)
    for step in range(3):  # three float32 additions
        expected = window.frames[:, 1] + (step + 1) * np.array([0.5, 0.5], np.float32)
        assert_allclose(frames[:, step], expected, atol=1e-6)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_every_frame_of_the_history_matters(tiny, spec, window, history):
    config = ResidualConfig(history=history)
    signature = config.signature(spec)
    stepper = config.build(spec, tiny.model(signature.inputs, signature.outputs), scaled(spec))
    first = lambda frames: rollout(stepper, dataclasses.replace(window, frames=frames), 1).sum()  # noqa: E731
    gradient = jax.grad(first)(jnp.asarray(window.frames))
    used = np.abs(np.asarray(gradient)).max(axis=(0, 2, 3, 4)) > 0
    assert_array_equal(used, np.arange(4) < history)


def test_operator_learning_reads_static_fields_only(tiny):
    spec = tiny.spec(channels=("u",), static=("a",))
    window = tiny.window(spec, static=np.random.default_rng(0).random((3, 8, 6, 1)).astype(np.float32))
    config = DirectConfig(history=0)
    signature = config.signature(spec)
    assert (signature.inputs, signature.scalars, signature.outputs) == (1, 0, 1)
    stepper = config.build(spec, tiny.model(1, 1), Normalizer.identity(spec))
    before = rollout(stepper, window, 1)
    blind = dataclasses.replace(window, frames=window.frames * 0 + 7)
    assert_array_equal(rollout(stepper, blind, 1), before)
    other = dataclasses.replace(window, static=window.static + 1)
    assert np.abs(np.asarray(rollout(stepper, other, 1) - before)).max() > 1e-4


def test_conditions_reach_the_network(tiny):
    spec = tiny.spec(channels=("u",), forcing=("sun",), static=("land",), parameters=("viscosity",))
    config = ResidualConfig(history=2, calendar=True, lead=True)
    signature = config.signature(spec)
    assert (signature.inputs, signature.scalars) == (4, 6) == count(spec, 2, True, True)
    random = np.random.default_rng(0)
    fields = {
        "forcing": random.random((3, 4, 8, 6, 1)).astype(np.float32),
        "static": random.random((3, 8, 6, 1)).astype(np.float32),
        "parameters": random.random((3, 1)).astype(np.float32),
        "calendar": random.random((3, 4, 2)).astype(np.float32),
    }
    window = tiny.window(spec, **fields)
    stepper = config.build(spec, tiny.model(10, 1), Normalizer.identity(spec))
    before = np.asarray(rollout(stepper, window, 2))
    for name, values in fields.items():
        changed = dataclasses.replace(window, **{name: values + 0.3})
        assert np.abs(np.asarray(rollout(stepper, changed, 2)) - before).max() > 1e-5, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("config", [DirectConfig(), ResidualConfig(history=2)])
def test_frames_keep_their_type_over_many_steps(tiny, spec, window, config, dtype):
    """Numbers of the normalizer and of the network are float32; an objective runs the same loop."""
    stepper = config.build(spec, tiny.model(2 * config.history, 2), Normalizer.identity(spec))
    short = dataclasses.replace(window, frames=jnp.asarray(window.frames, dtype))
    frames = rollout(stepper, short, 2)
    assert frames.dtype == dtype
    assert_allclose(frames.astype("f4"), rollout(stepper, window, 2), atol=0.1)  # 8 bits of numbers up to 4, twice
    assert np.isfinite(Unrolled(2)(stepper, short, None)[0])


def test_whole_numbers_are_no_frames(spec, window):
    with pytest.raises(SpecError, match="frames are int32, but floating-point"):
        Window.of(window.frames.astype("i4"), spec)


def test_masked_cells_stay_zero_even_when_the_network_says_nan(spec, window):
    mask = np.ones((3, 8, 6, 2), np.float32)
    mask[:, 2, 3] = 0
    stepper = DirectConfig().build(spec, Constant([np.nan, 1.0]), Normalizer.identity(spec))
    frames = np.asarray(rollout(stepper, dataclasses.replace(window, mask=mask), 2))
    assert_array_equal(frames[:, :, 2, 3], 0)
    assert np.isnan(frames[:, :, 0, 0, 0]).all()


def test_jit_equals_eager_and_gradients_reach_every_parameter(tiny, spec, window):
    stepper = ResidualConfig(history=2).build(spec, tiny.model(4, 2), scaled(spec))
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)

    def loss(params):
        return (rollout(nnx.merge(graph, params, rest), window, 3) ** 2).mean()

    with jax.disable_jit():
        eager = loss(params)
    assert_allclose(jax.jit(loss)(params), eager, rtol=1e-6)
    for path, gradient in nnx.to_flat_state(jax.grad(loss)(params)):
        assert np.abs(np.asarray(gradient[...])).max() > 0, path


def test_the_grid_can_be_exchanged(tiny, spec):
    stepper = ResidualConfig().build(spec, tiny.model(2, 2), scaled(spec))
    finer = Grid(tuple(Axis.uniform(name, n) for name, n in (("x", 16), ("y", 12))))
    moved = stepper.on_grid(finer)
    assert moved.spec.grid == finer
    assert stepper.spec.grid.shape == (8, 6)
    window = tiny.window(tiny.spec((16, 12)))
    assert rollout(moved, window, 2).shape == (3, 2, 16, 12, 2)


def test_constraints_move_to_another_grid_with_their_stepper(tiny, spec):
    stepper = ResidualConfig().build(spec, tiny.model(2, 2), scaled(spec), (MassFixer("u").build(spec),))
    window = tiny.window(tiny.spec((16, 12)))
    frames = rollout(stepper.on_grid(window.spec.grid), window, 2)
    totals, first = frames.mean((2, 3)), np.mean(window.frames[:, :1], (2, 3))
    assert_allclose(totals[..., 0], np.repeat(first[..., 0], 2, 1), atol=1e-5)  # float32 sums of 192 cells
    assert np.abs(totals[..., 1] - first[..., 1]).max() > 0.01


@pytest.mark.parametrize(
    ("config", "inputs", "outputs", "message"),
    [
        (DirectConfig(history=2), 2, 2, r"does not accept 4 field channels on \(8, 6\) points.*history=2"),
        (DirectConfig(), 2, 3, r"gives \(1, 8, 6, 3\), but \(1, 8, 6, 2\) was expected"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tiny, spec, config, inputs, outputs, message):
    with pytest.raises(SpecError, match=message):
        config.build(spec, tiny.model(inputs, outputs), Normalizer.identity(spec))


def test_other_mismatches_are_refused(tiny, spec):
    one = tiny.spec(channels=("u",))
    with pytest.raises(SpecError, match="normalizer holds 2 numbers for frames"):
        DirectConfig().build(one, tiny.model(1, 1), Normalizer.identity(spec))
    with pytest.raises(ConfigError, match="needs a model"):
        DirectConfig().build(spec, None, Normalizer.identity(spec))
    with pytest.raises(ConfigError, match="needs a normalizer"):
        DirectConfig().build(spec, tiny.model(2, 2), None)
    with pytest.raises(SpecError, match="history=0"):
        DirectConfig(history=0).signature(spec)
    with pytest.raises(ConfigError, match="history is -1"):
        DirectConfig(history=-1)
    with pytest.raises(ConfigError, match=r"history is 1.5 \(float\), but an integer"):
        ResidualConfig(history=1.5)
    with pytest.raises(ConfigError, match=r"longest_lead is '4' \(str\), but an integer"):
        DirectConfig(lead=True, longest_lead="4")
    with pytest.raises(ConfigError, match="Use `direct`"):
        ResidualConfig(history=0)
