"""Temporal bundling: frames by hand, one call per bundle, and everything else as with any stepper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import saving
from physml.constraints import MassFixer
from physml.errors import ConfigError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.layers.batch_norm import BatchNorm
from physml.models.resnet import ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import OneStep, Pushforward, Unrolled
from physml.rollout import rollout, rollout_chunks
from physml.steppers.bundled import BundledConfig
from physml.steppers.describe import build_stepper

SPEC = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"), Channel("v")))
NORMALIZER = Normalizer(SPEC, [1.0, -2.0], [2.0, 3.0], [0.5, 0.25])


class Powers(nnx.Module):
    """Output k of a bundle is a_k times the last frame of the history."""

    def __init__(self, factors, channels=2):
        self.factors, self.channels = nnx.Param(jnp.asarray(factors, jnp.float32)), channels

    def __call__(self, fields, scalars):
        last = fields[..., -self.channels :]
        return jnp.concatenate([a * last for a in self.factors[...]], axis=-1)


def waves(frames=9, batch=2, seed=0):
    values = np.random.default_rng(seed).standard_normal((batch, frames, 8, 2)).astype("f4")
    return Window.of(values, SPEC)


def build(factors=(0.9, 0.8, 0.7), normalizer=None, **fields):
    config = BundledConfig(bundle=len(factors), **fields)
    return config.build(SPEC, Powers(factors), normalizer or Normalizer.identity(SPEC))


def test_frames_come_from_the_last_frame_of_the_bundle_before():
    window, factors = waves(), (0.9, 0.8, 0.7)
    frames = rollout(build(factors, residual=False), window, 7)
    for step in range(7):
        expected = 0.7 ** (step // 3) * factors[step % 3] * window.frames[:, 0]
        assert_allclose(frames[:, step], expected, rtol=1e-5)


def test_residual_outputs_are_slopes_in_the_scale_of_increments():
    window = waves()
    frames = np.asarray(rollout(build((0.5, 0.5, 0.5), NORMALIZER), window, 4))
    first = window.frames[:, 0]
    slope = 0.5 * (first - [1.0, -2.0]) / [2.0, 3.0] * [0.5, 0.25]
    for step in range(3):
        assert_allclose(frames[:, step], first + (step + 1) * slope, rtol=1e-5, atol=1e-6)
    again = 0.5 * (frames[:, 2] - [1.0, -2.0]) / [2.0, 3.0] * [0.5, 0.25]
    assert_allclose(frames[:, 3], frames[:, 2] + again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_the_network_is_called_once_per_bundle(jit):
    calls = []

    class Counted(Powers):
        def __call__(self, fields, scalars):
            jax.debug.callback(lambda: calls.append(1))
            return super().__call__(fields, scalars)

    stepper = BundledConfig(bundle=4).build(SPEC, Counted([0.1] * 4), Normalizer.identity(SPEC))
    calls.clear()
    run = (lambda window: rollout(stepper, window, 10)) if not jit else jax.jit(lambda w: rollout(stepper, w, 10))
    jax.block_until_ready(run(waves()))
    jax.effects_barrier()
    assert len(calls) == 3  # steps 0, 4 and 8


def test_the_history_is_made_of_the_frames_handed_out():
    """With two frames of history the second call sees the last two of the first bundle."""

    class Sum(nnx.Module):
        def __call__(self, fields, scalars):
            total = fields[..., :2] + fields[..., 2:]
            return jnp.concatenate([total, 2 * total], axis=-1)

    config = BundledConfig(bundle=2, history=2, residual=False)
    window = waves()
    frames = rollout(config.build(SPEC, Sum(), Normalizer.identity(SPEC)), window, 3)
    first = window.frames[:, 0] + window.frames[:, 1]
    assert_allclose(frames[:, 1], 2 * first, rtol=1e-5)
    assert_allclose(frames[:, 2], first + 2 * first, rtol=1e-5)


def test_forcing_calendar_and_lead_are_those_of_the_first_frame_of_a_bundle():
    class Told(nnx.Module):
        def __call__(self, fields, scalars):
            told = jnp.concatenate([scalars[:, jnp.array([0, 1, 4])], scalars[:, 2:3]], axis=-1)
            told = jnp.broadcast_to(told[:, None], (*fields.shape[:2], 4))
            return jnp.concatenate([fields[..., -1:], told] * 2, axis=-1)

    spec = Spec(SPEC.grid, tuple(map(Channel, "fyadY")), forcing=(Channel("force"),), time_step=2.0)
    random = np.random.default_rng(0)
    forcing, calendar = random.normal(size=(2, 5, 8, 1)).astype("f4"), random.uniform(size=(2, 5, 2)).astype("f4")
    window = Window.of(np.zeros((2, 1, 8, 5), "f4"), spec, forcing=forcing, calendar=calendar)
    window = dataclasses.replace(window, times=np.float32([[0, 2, 4, 7, 9]] * 2))
    config = BundledConfig(bundle=2, residual=False, calendar=True, lead=True)
    frames = rollout(config.build(spec, Told(), Normalizer.identity(spec)), window, 4)
    first = [1, 1, 3, 3]
    assert_allclose(frames[..., :1], forcing[:, first], rtol=1e-6)
    angle = 2 * np.pi * calendar[:, first]
    told = [np.sin(angle[..., 0]), np.sin(angle[..., 1]), np.float32([[1, 1, 1.5, 1.5]] * 2), np.cos(angle[..., 0])]
    assert_allclose(frames[:, :, 3, 1:], np.stack(told, -1), atol=1e-6)


def test_a_bundle_of_one_is_the_plain_stepper():
    from physml.steppers import ResidualConfig

    model, window = Powers([0.3]), waves()
    plain = ResidualConfig().build(SPEC, model, NORMALIZER)
    bundled = BundledConfig(bundle=1).build(SPEC, model, NORMALIZER)
    assert_allclose(rollout(bundled, window, 5), rollout(plain, window, 5), rtol=1e-6)


def gradient(objective, window, factors=(0.9, 0.8, 0.7)):
    graphdef, params, rest = nnx.split(build(factors, residual=False), nnx.Param, ...)

    def loss(params):
        return objective(nnx.merge(graphdef, params, rest), window, jax.random.key(0))[0]

    return np.asarray(jax.jit(jax.grad(loss))(params)["model"]["factors"][...])


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_flow_through_every_frame_of_a_bundle_and_through_bundles(remat):
    window, factors = waves(), jnp.asarray([0.9, 0.8, 0.7])
    u0, truth = window.frames[:, 0], window.frames[:, 1:7]

    def by_hand(a):
        frames = jnp.stack([a[2] ** (k // 3) * a[k % 3] * u0 for k in range(6)], axis=1)
        return jnp.mean((frames - truth) ** 2)

    assert_allclose(gradient(Unrolled(6, remat=remat), window), jax.grad(by_hand)(factors), rtol=1e-4)


def test_warm_up_and_truncation_cut_between_bundles():
    window = waves()
    u1 = 0.7 * window.frames[:, 0]
    frozen = np.mean([2 * (0.9 * u1 - window.frames[:, 4]) * u1]) / 3
    for objective in (Unrolled(6, differentiate=3), Pushforward(3, differentiate=3).validation):
        assert_allclose(gradient(objective, window)[0], frozen, rtol=1e-4)
    pieces = [
        gradient(Unrolled(3), Window.of(np.concatenate([0.7**k * window.frames[:, :1], later], 1), SPEC))
        for k, later in ((0, window.frames[:, 1:4]), (1, window.frames[:, 4:7]))
    ]
    assert_allclose(gradient(Unrolled(6, truncate=3), window), np.mean(pieces, 0), rtol=1e-4)
    for objective in (OneStep(), Unrolled(6, differentiate=2), Unrolled(6, differentiate=4), Unrolled(6, truncate=2)):
        with pytest.raises(ConfigError, match="3 frames at once"):
            gradient(objective, window)
    stepper = build(residual=False)
    scored = jax.jit(lambda key: Pushforward(3, differentiate=3)(stepper, window, key)[0])
    assert len({round(float(scored(jax.random.key(key))), 6) for key in range(8)}) == 2  # warm-ups of 0 and of 3 steps


@pytest.mark.parametrize("truncate", [None, 3])
def test_what_is_scored_is_the_rollout(truncate):
    """Also of a last bundle that is handed out in part."""
    stepper, window = build((0.9, 0.8, 0.7), NORMALIZER), waves()

    @jax.jit
    def both(window):
        return Unrolled(8, truncate=truncate).predict(stepper, window, None), rollout(stepper, window, 8)

    prediction, frames = both(window)
    assert_allclose(prediction.frames, frames, rtol=1e-6)
    assert_allclose(prediction.previous[:, 1:], frames[:, :-1], rtol=1e-6)


def test_gradients_store_one_call_for_each_bundle():
    def memory(bundle, steps):
        stepper = build_stepper(BundledConfig(bundle=bundle), ResNetConfig(width=32, depth=2), SPEC, NORMALIZER)
        graphdef, params, rest = nnx.split(stepper, nnx.Param, ...)

        def loss(params, window):
            return Unrolled(steps)(nnx.merge(graphdef, params, rest), window, None)[0]

        window = waves(steps + 1, batch=64)
        return jax.jit(jax.grad(loss)).lower(params, window).compile().memory_analysis().temp_size_in_bytes

    one = memory(1, 1)
    assert memory(6, 6) < 1.4 * one  # five more frames of 2 channels beside layers of 32
    assert memory(6, 12) < 2.5 * one


def test_the_total_that_is_kept_is_that_of_the_latest_frame():
    config = BundledConfig(bundle=2, history=2)
    law = MassFixer(("u",)).build(SPEC)
    stepper = config.build(SPEC, Powers((0.9, 0.8)), Normalizer.identity(SPEC), (law,))
    window = waves()
    totals = np.asarray(rollout(stepper, window, 5))[..., 0].mean(-1)
    assert_allclose(totals, window.frames[:, 1, :, 0].mean(-1)[:, None].repeat(5, 1), atol=1e-6)


def test_warm_ups_begin_with_a_bundle():
    """Warm-ups of 0, 2 and 4 of the 4 steps, each scored at the last bundle."""
    window, stepper = waves(frames=7), build((0.9, 0.8), residual=False)
    call = jax.jit(lambda key: Pushforward(steps=4, differentiate=2)(stepper, window, key)[0])
    drawn = {round(float(call(jax.random.key(i))), 4) for i in range(30)}
    expected = set()
    for start in (0, 2, 4):
        first = window.frames[:, start] * 0.8 ** ((4 - start) // 2)
        frames = np.stack([0.9 * first, 0.8 * first], 1)
        expected.add(round(float(((frames - window.frames[:, 5:7]) ** 2).mean()), 4))
    assert drawn == expected


def test_constraints_and_masks_act_on_every_frame():
    class Halve:
        def project(self, frame, previous, context):
            return frame / 2

    mask = np.ones((2, 8, 2), "f4")
    mask[:, 3] = 0
    values = waves().frames * mask[:, None]
    window = Window.of(values, SPEC, mask=mask)
    config = BundledConfig(bundle=2, residual=False)
    stepper = config.build(SPEC, Powers((0.9, 0.8)), Normalizer.identity(SPEC), (Halve(),))
    frames = rollout(stepper, window, 3)
    assert_allclose(frames[:, 1], 0.4 * values[:, 0], rtol=1e-5)
    assert_allclose(frames[:, 2], 0.45 * 0.4 * values[:, 0], rtol=1e-5)
    assert np.all(np.asarray(frames)[:, :, 3] == 0)


def test_batch_statistics_move_once_per_bundle():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = BatchNorm(2)

        def __call__(self, fields, scalars):
            return jnp.concatenate([self.norm(fields).astype(fields.dtype)] * 2, axis=-1)

    def moved(steps):
        stepper = BundledConfig(bundle=2).build(SPEC, Net(), Normalizer.identity(SPEC))
        stepper.train()
        Unrolled(steps)(stepper, waves(), None)
        return np.asarray(stepper.model.norm.mean[...])

    expected = 0.1 * waves().frames[:, 0].mean((0, 1))
    assert_allclose(moved(2), expected, rtol=1e-4)
    assert np.abs(moved(4) - expected).max() > 1e-3


def test_rollouts_in_chunks_and_saved_steppers_are_the_same(tmp_path):
    stepper = build_stepper(BundledConfig(bundle=3, history=2), ResNetConfig(width=8, depth=1), SPEC, NORMALIZER)
    window = waves()
    whole = rollout(stepper, window, 8)
    pieces = np.concatenate([chunk.frames for chunk in rollout_chunks(stepper, window, 8, 5)], axis=1)
    assert_allclose(pieces, whole, rtol=1e-5, atol=1e-6)
    loaded = saving.load(saving.save(stepper, tmp_path / "model"))
    assert loaded.config == stepper.config
    assert_array_equal(rollout(loaded, window, 8), whole)
    moved = loaded.on_grid(Grid((Axis.uniform("x", 16),)))
    assert moved.history == 2
    many = jax.vmap(lambda frames: rollout(stepper, Window.of(frames, SPEC), 8))(window.frames[None])
    assert_allclose(many[0], whole, rtol=1e-5, atol=1e-6)


def test_what_cannot_work_is_refused():
    for wrong in ({"bundle": 0}, {"history": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            BundledConfig(**wrong)
    with pytest.raises(ConfigError, match=r"bundle is 2.5 \(float\), but an integer"):
        BundledConfig(bundle=2.5)
    with pytest.raises(ConfigError, match="needs a model"):
        BundledConfig().build(SPEC, None, NORMALIZER)
