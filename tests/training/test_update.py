"""The update against a hand-written optimizer step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import ConfigError
from physml.fields import Axis, Channel, Grid, Spec, Window, stack
from physml.models import FNOConfig, ModernUNetConfig, ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import Denoising, OneStep, Unrolled
from physml.saving import build_stepper
from physml.steppers import DirectConfig, RefinerConfig, ResidualConfig
from physml.training import TrainingConfig
from physml.training.update import build_loss, build_update, initial_state, split


def batch(number=0, size=8):
    data = problem.Waves()
    picks = np.random.default_rng(number).integers(0, 8, size)
    return stack([data.read(number % 3, range(pick, pick + 2)) for pick in picks])


def start(stepper=None, **fields):
    config = problem.config(steps=20, **fields)
    parts, params, rest = split(stepper or problem.build_stepper())
    transform, update = build_update(problem.OBJECTIVE, parts, config, 20)
    return parts, rest, initial_state(params, transform, config), update


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_split_and_merge_are_inverse():
    stepper = problem.build_stepper()
    parts, params, rest = split(stepper)
    window = batch()
    again = parts.merge(params, rest)
    assert_array_equal(*(problem.OBJECTIVE(s, window, None)[0] for s in (stepper, again)))
    assert set(params) == {"model"}
    assert set(params["model"]["layers"]) == {"0", "1"}  # text keys, for JSON and Orbax


def test_one_update_is_one_optax_step_written_by_hand():
    parts, rest, state, update = start()
    params, window, key = jax.tree.map(jnp.copy, state["params"]), batch(), jax.random.key(0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 20), weight_decay=0)
    )
    loss, gradient = jax.value_and_grad(lambda p: problem.OBJECTIVE(parts.merge(p, rest), window, key)[0])(params)
    changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = optax.apply_updates(params, changes)
    state, metrics = update(state, rest, key, (window,), 1)
    assert_allclose(metrics["loss"], [loss], rtol=1e-6)
    assert_allclose(metrics["gradient"], [optax.tree.norm(gradient)], rtol=1e-5)
    assert_allclose(metrics["learning_rate"], [1e-2], rtol=1e-6)
    for a, b in zip(leaves(state["params"]), leaves(expected), strict=True):
        assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    # (1 + 0) / (10 + 0) of the first weights stay in the average
    for average, old, new in zip(*map(leaves, (state["average"], params, expected)), strict=True):
        assert_allclose(average, 0.1 * old + 0.9 * new, rtol=1e-4, atol=1e-6)


def test_average_tends_to_its_decay():
    parts, rest, state, update = start(average=0.5)
    history = []
    for i in range(12):
        state, _ = update(state, rest, jax.random.key(0), (batch(i),), 1)
        history.append((leaves(state["params"]), leaves(state["average"])))
    for old, new, weights in zip(history[-2][1], history[-1][1], history[-1][0], strict=True):
        assert_allclose(new, 0.5 * old + 0.5 * weights, rtol=1e-4, atol=1e-6)


def test_several_updates_in_one_call_are_several_calls():
    windows = [batch(i) for i in range(4)]
    _, rest, single, update = start()
    losses = []
    for window in windows:
        single, metrics = update(single, rest, jax.random.key(0), (window,), 1)
        losses.append(float(metrics["loss"][0]))
    _, rest, scanned, update = start()
    scanned, metrics = update(scanned, rest, jax.random.key(0), tuple(windows), len(windows))
    assert_allclose(metrics["loss"], losses, rtol=1e-5)
    assert int(scanned["step"]) == 4
    for a, b in zip(leaves(single), leaves(scanned), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_end_of_a_run_uses_a_part_of_a_call():
    """Batches past `count` leave no trace, whatever they hold."""
    _, rest, whole, update = start(nonfinite="stop")
    whole, _ = update(whole, rest, jax.random.key(0), (batch(0), batch(1), batch(1)), 2)
    _, rest, part, update = start(nonfinite="stop")
    part, _ = update(part, rest, jax.random.key(0), (batch(0), batch(1), spoiled()), 2)
    assert (int(part["step"]), int(part["skipped"]), bool(part["alive"])) == (2, 0, True)
    for a, b in zip(leaves(whole), leaves(part), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(parts):
    _, rest, whole, update = start()
    whole, expected = update(whole, rest, jax.random.key(0), (batch(),), 1)
    _, rest, state, update = start(accumulate=parts)
    state, metrics = update(state, rest, jax.random.key(0), (batch(),), 1)
    for name in ("loss", "gradient", "channel"):
        assert_allclose(metrics[name], expected[name], rtol=1e-5)
    for a, b in zip(leaves(whole["params"]), leaves(state["params"]), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def lacking():
    """A batch of which every other sample has no channel v, and none of them w."""
    whole = batch()
    frames, mask = np.concatenate([whole.frames, whole.frames[..., :1]], -1), np.ones((8, 8, 3), "f4")
    mask[::2, :, 1] = mask[..., 2] = 0
    spec = Spec(problem.SPEC.grid, (*problem.SPEC.channels, Channel("w")))
    return Window.of(frames * mask[:, None], spec, mask=mask)


@pytest.mark.parametrize("parts", [2, 4])
def test_channel_errors_of_parts_count_by_the_samples_that_have_the_channel(parts):
    window, found = lacking(), []
    three = ResidualConfig().build(window.spec, problem.build_model(3, 3), Normalizer.identity(window.spec))
    for accumulate in (1, parts):
        _, rest, state, update = start(three, accumulate=accumulate)
        found.append(update(state, rest, jax.random.key(0), (window,), 1)[1]["channel"][0])
    assert_allclose(found[1], found[0], rtol=1e-5)
    having = jax.tree.map(lambda leaf: leaf[1::2], window)
    assert_allclose(found[0][1], problem.OBJECTIVE(three, having, None)[1]["channel"][1], rtol=1e-5)
    assert np.isnan(found[0][2])


@pytest.mark.parametrize("together", [False, True])
def test_every_update_and_every_part_of_a_batch_draws_its_own_numbers(together):
    drawn = []

    class Draws(type(problem.OBJECTIVE)):
        def __call__(self, stepper, window, key):
            jax.debug.callback(lambda number: drawn.append(float(number)), jax.random.uniform(key))
            return super().__call__(stepper, window, key)

    config = problem.config(steps=20, accumulate=2)
    parts, params, rest = split(problem.build_stepper())
    transform, update = build_update(Draws(), parts, config, 20)
    state, windows = initial_state(params, transform, config), (batch(),) * 2
    for call in [windows] if together else [windows[:1], windows[1:]]:
        state, _ = update(state, rest, jax.random.key(0), call, len(call))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(drawn) == len(set(drawn)) == 4


def spoiled():
    window = batch(1)
    window.frames[3, 1] = np.nan
    return window


@pytest.mark.parametrize("together", [False, True])
def test_a_bad_update_changes_nothing_and_the_next_goes_on(together):
    def train(windows):
        _, rest, state, update = start(nonfinite="skip")
        if together:
            return update(state, rest, jax.random.key(0), tuple(windows), len(windows))
        for window in windows:
            state, metrics = update(state, rest, jax.random.key(0), (window,), 1)
        return state, metrics

    state, metrics = train([batch(0), spoiled(), batch(2)])
    if together:
        assert list(metrics["good"]) == [True, False, True]
        assert list(metrics["skipped"]) == [0, 1, 1]
        assert_allclose(metrics["learning_rate"][2], metrics["learning_rate"][1])  # the schedule waits
    clean, _ = train([batch(0), batch(2)])
    assert int(state["skipped"]) == 1
    assert int(state["step"]) == 3
    for a, b in zip(leaves(state["params"]), leaves(clean["params"]), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_stop_freezes_everything_after_the_first_bad_update():
    _, rest, state, update = start(nonfinite="stop")
    state, _ = update(state, rest, jax.random.key(0), (batch(0),), 1)
    kept = leaves(state["params"])
    state, _ = update(state, rest, jax.random.key(0), (spoiled(), batch(2)), 2)
    state, _ = update(state, rest, jax.random.key(0), (batch(3), batch(4)), 2)
    for a, b in zip(leaves(state["params"]), kept, strict=True):
        assert_array_equal(a, b)


def test_a_gradient_that_is_not_finite_is_caught_where_the_loss_is():
    class Root(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.zeros(()))

        def __call__(self, fields, scalars):
            return fields * jnp.sqrt(self.scale[...])  # slope infinite at 0

    from physml.normalize import Normalizer

    stepper = DirectConfig().build(problem.SPEC, Root(), Normalizer.identity(problem.SPEC))
    _, rest, state, update = start(stepper)
    state, metrics = update(state, rest, jax.random.key(0), (batch(),), 1)
    assert np.isfinite(metrics["loss"]).all()
    assert not metrics["good"].any()
    assert float(state["params"]["model"]["scale"]) == 0


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    seen = []

    class Spy(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, fields, scalars):
            out = self.inner(fields, scalars)
            seen.append((fields.dtype, self.inner.layers[0].kernel[...].dtype, out.dtype))
            return out

    stepper = problem.build_stepper()
    stepper.model = Spy(stepper.model)
    _, rest, state, update = start(stepper, precision="bfloat16")
    state, metrics = update(state, rest, jax.random.key(0), (batch(),), 1)
    assert seen[-1] == (jnp.bfloat16,) * 3
    assert {leaf.dtype.name for leaf in leaves((state["params"], state["average"]))} == {"float32"}
    _, rest, single, update = start()
    _, expected = update(single, rest, jax.random.key(0), (batch(),), 1)
    assert_allclose(metrics["loss"], expected["loss"], rtol=2e-2)
    assert float(metrics["loss"][0]) != float(expected["loss"][0])


def test_scalars_keep_their_digits_in_bfloat16():
    """A refiner's steps 333.33 and 666.67 would be 334 and 668."""
    seen = []

    class Told(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, fields, scalars):
            jax.debug.callback(lambda numbers: seen.extend(np.asarray(numbers, float)), scalars[:, 0])
            return fields[..., -2:] * self.scale[...]

    config = RefinerConfig(minimum=1e-3, longest_time=1000.0)
    parts, params, rest = split(config.build(problem.SPEC, Told(), Normalizer.identity(problem.SPEC)))
    half = problem.config(precision="bfloat16")
    jax.block_until_ready(build_loss(Denoising(), parts, half)(params, rest, batch(size=64), jax.random.key(0)))
    jax.effects_barrier()
    assert_array_equal(np.unique(seen), config.schedule.times)


@pytest.mark.parametrize(
    "model", [FNOConfig(modes=(3,), width=4, depth=1), ModernUNetConfig(width=8, multipliers=(1, 2))]
)
def test_scalars_do_not_widen_hidden_fields(model):
    model = dataclasses.replace(model, dtype="bfloat16")
    spec = Spec(Grid((Axis.uniform("x", 16),)), (Channel("u"),))
    parts, params, rest = split(build_stepper(RefinerConfig(), model, spec, Normalizer.identity(spec)))
    inner, fields = parts.merge(params, rest, jnp.bfloat16).model.model, jnp.zeros((2, 16, 2), jnp.bfloat16)
    programs = [str(jax.make_jaxpr(inner)(fields, jnp.zeros((2, 1), dtype))) for dtype in (jnp.float32, jnp.bfloat16)]
    products = [re.findall(r"(\w+)\[.* = (?:dot_general|conv_general)", program) for program in programs]
    assert products[0] == products[1]
    assert "bf16" in products[0]


def test_the_update_is_traced_once():
    traces = []

    class Counting(type(problem.OBJECTIVE)):
        def __call__(self, *arguments):
            traces.append(1)
            return super().__call__(*arguments)

    parts, params, rest = split(problem.build_stepper())
    config = problem.config(steps=20)
    transform, update = build_update(Counting(), parts, config, 20)
    state = initial_state(params, transform, config)
    for i in range(5):
        state, _ = update(state, rest, jax.random.key(0), (batch(i),), 1)
    assert len(traces) == 1


def test_the_callers_arrays_survive():
    stepper = problem.build_stepper()
    _, rest, state, update = start(stepper)
    update(state, rest, jax.random.key(0), (batch(),), 1)
    assert all(np.isfinite(leaf).all() for leaf in leaves(nnx.state(stepper)))


def test_nothing_to_train_is_refused():
    from physml.normalize import Normalizer

    class Fixed(nnx.Module):
        def __call__(self, fields, scalars):
            return fields

    identity = Normalizer.identity(problem.SPEC)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        split(DirectConfig().build(problem.SPEC, Fixed(), identity))


def test_dropout_draws_in_updates_and_rests_in_validation():
    spec = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"),))
    window = Window.of(np.random.default_rng(0).standard_normal((4, 3, 8, 1)).astype(np.float32), spec)
    model = ResNetConfig(width=8, depth=1, dropout=0.3)
    stepper = build_stepper(ResidualConfig(), model, spec, Normalizer.identity(spec))
    config = TrainingConfig(updates_per_call=1)
    parts, params, rest = split(stepper)
    transform, update = build_update(Unrolled(steps=2), parts, config, 4)
    keys = jax.random.key(0), jax.random.key(1)
    drawn = [update(initial_state(params, transform, config), rest, key, (window,), 1)[1]["loss"] for key in keys]
    assert float(drawn[0][0]) != float(drawn[1][0])
    loss = build_loss(Unrolled(steps=2), parts, config)
    rests = loss(params, rest, window, keys[0])[0]
    assert_array_equal(loss(params, rest, window, keys[1])[0], rests)
    stepper.train()  # the mode of the stepper given does not matter
    parts, params, rest = split(stepper)
    assert_array_equal(build_loss(Unrolled(steps=2), parts, config)(params, rest, window, keys[0])[0], rests)
    assert_array_equal(*(OneStep()(parts.merge(params, rest), window, key)[0] for key in keys))
