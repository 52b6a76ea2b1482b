"""PDE-Refiner: laws of its schedule, training problem and sampler, and the stepper that is made of them."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

import physml
from physml.convert import FAMILIES
from physml.convert.arena import flat
from physml.errors import ConfigError, SpecError
from physml.evaluate import evaluate_stepper
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.forecast import forecast
from physml.models.fno import FNOConfig
from physml.models.modern_unet import ModernUNetConfig
from physml.normalize import Normalizer
from physml.objectives import OneStep, Unrolled
from physml.rollout import ensemble, rollout, rollout_chunks
from physml.steppers import STEPPERS, DirectConfig
from physml.steppers.describe import build_stepper
from physml.steppers.refiner import (
    NoiseSchedule,
    RefinerConfig,
    denoise,
    denoising_loss,
    frames_of,
    increment_of,
    refine,
)

SCHEDULE = NoiseSchedule(refinements=3, minimum=4e-7)
RANDOM = np.random.default_rng(0)
HISTORY, TARGET, START = (RANDOM.standard_normal((2, 8, n)).astype(np.float32) for n in (4, 2, 2))
NOISES = RANDOM.standard_normal((3, 2, 8, 2)).astype(np.float32)
NONE = np.zeros((2, 0), np.float32)


def test_schedule_runs_from_almost_no_noise_to_nothing_but_noise():
    np.testing.assert_allclose(SCHEDULE.betas, [4e-7, 5.4288352e-5, 7.368063e-3, 1], rtol=1e-6)
    assert SCHEDULE.signal[-1] == 0
    assert np.all(np.diff(SCHEDULE.signal) < 0)
    assert SCHEDULE.signal[0] == np.float32(1) - np.float32(4e-7)  # as float32 has it: 1 - 4.17e-7
    np.testing.assert_allclose(SCHEDULE.times, [0, 1000 / 3, 2000 / 3, 1000], rtol=1e-6)


@pytest.mark.parametrize("options", [{"refinements": 0}, {"minimum": 0.0}, {"minimum": 1.0}])
def test_schedules_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match="at least one refinement"):
        NoiseSchedule(**options)


def test_increments_are_from_the_last_frame_for_every_frame():
    last = HISTORY[..., :1]
    increment = increment_of(TARGET, last, 0.3)
    np.testing.assert_allclose(increment[..., 1], (TARGET[..., 1] - last[..., 0]) / 0.3, rtol=1e-6)
    np.testing.assert_allclose(frames_of(increment, last, 0.3), TARGET, atol=1e-6)


def exact(fields, scalars):
    """The network that knows the target: its velocity follows from the noisy target and the step."""
    signal = jnp.asarray(SCHEDULE.signal)[jnp.round(scalars[:, 0] * 3 / 1000).astype(int)].reshape(-1, 1, 1)
    noise = (fields[..., 4:] - jnp.sqrt(signal) * TARGET) / jnp.sqrt(1 - signal)
    return jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * TARGET


def test_a_perfect_network_is_refined_to_the_target():
    found = refine(exact, SCHEDULE, HISTORY, NONE, START, NOISES)
    np.testing.assert_allclose(found.result, TARGET, atol=1e-6)
    np.testing.assert_array_equal(found.samples[0], START)
    assert found.samples.shape == found.outputs.shape == (4, *TARGET.shape)
    # The noise that is left when step k is read has the variance 1 - signal; only fresh noise is random by then.
    for j, k in ((1, 2), (2, 1), (3, 0)):
        left = np.std(found.samples[j] - np.sqrt(SCHEDULE.signal[k]) * TARGET)
        np.testing.assert_allclose(left, np.sqrt(1 - SCHEDULE.signal[k]), rtol=0.5)


def test_a_perfect_network_has_no_loss_at_any_step():
    for step in range(4):
        found = denoise(exact, SCHEDULE, HISTORY, TARGET, NONE, np.full(2, step), NOISES[0])
        np.testing.assert_allclose(found.loss, 0, atol=1e-6)
        np.testing.assert_array_equal(found.inputs[..., :4], HISTORY)


def test_the_last_step_is_the_plain_one_step_problem():
    found = denoise(exact, SCHEDULE, HISTORY, TARGET, NONE, np.array([3, 3]), NOISES[0])
    np.testing.assert_array_equal(found.inputs[..., 4:], NOISES[0])
    np.testing.assert_array_equal(found.target, -TARGET)


def test_loss_sums_channels_and_averages_the_rest():
    error = np.zeros((2, 8, 3), np.float32)
    error[..., 0], error[..., 1] = 1, 2
    np.testing.assert_allclose(denoising_loss(error, np.zeros_like(error)), 5)


def test_steps_and_parameters_reach_the_network_as_scalars_and_gradients_come_back():
    seen = []

    def network(fields, scalars):
        seen.append(scalars.shape)
        return fields[..., 4:] * scalars[:, 1].reshape(-1, 1, 1) + 0.001 * scalars[:, 0].reshape(-1, 1, 1)

    parameters = np.full((2, 1), 0.1, np.float32)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(refine(network, SCHEDULE, HISTORY, p, START, NOISES).result ** 2)))(
        parameters
    )
    assert set(seen) == {(2, 2)}
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient)


GOLDEN = Path(__file__).parents[1] / "golden" / "pderefiner"
PLAIN = RefinerConfig(weight=0.5, longest_time=1000.0)
INCREMENT = np.array([0.3, -0.2], np.float32)  # per channel, physical units


class Knows(nnx.Module):
    """The velocity of a target that is known, plus an error of its own; `dtype` is that of its answer."""

    def __init__(self, target, config=PLAIN, error=0.0, dtype=jnp.float32):
        self.target, self.schedule, self.error, self.dtype = tuple(map(float, target)), config.schedule, error, dtype

    def __call__(self, fields, scalars):
        schedule, target = self.schedule, jnp.asarray(self.target, fields.dtype)
        step = jnp.round(scalars[:, 0] * schedule.refinements / schedule.longest_time).astype(int)
        signal = jnp.asarray(schedule.signal)[step].reshape(-1, *[1] * (fields.ndim - 1))
        noisy = fields[..., -len(self.target) :]
        noise = (noisy - jnp.sqrt(signal) * target) / jnp.sqrt(1 - signal)
        return (jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * target + self.error).astype(self.dtype)


def scaled(spec):
    return Normalizer(spec, [1.0, -2.0], [2.0, 3.0], [0.5, 0.25])


def knowing(spec, config=PLAIN, constraints=(), **options):
    """Adds `INCREMENT` at every step, if everything around the network is right."""
    target = INCREMENT / np.array([0.5, 0.25], np.float32) / config.weight
    return config.build(spec, Knows(target, config, **options), scaled(spec), constraints)


def blurry(tiny, spec, config=PLAIN):
    signature = config.signature(spec)
    plain = tiny.model(signature.inputs + signature.scalars, signature.outputs)
    return config.build(spec, plain, scaled(spec))


@pytest.mark.parametrize("case", ["refiner1d_ks", pytest.param("refiner2d", marks=pytest.mark.slow)])
def test_the_stepper_predicts_what_the_authors_predict(case):
    """Prediction and training problem of the recorded runs, from frames, through the stepper."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    io = load_file(GOLDEN / case / "io.safetensors")
    kwargs = config["kwargs"]
    model = FAMILIES["pderefiner"].build(config, load_file(GOLDEN / case / "weights.safetensors"))
    channels = io["in.x"].shape[2]
    numbers = io["in.cond"].reshape(len(io["in.x"]), -1)
    spec = Spec(
        Grid(tuple(Axis.uniform(name, n) for name, n in zip("xy", io["in.x"].shape[3:], strict=False))),
        tuple(Channel(f"u{i}") for i in range(channels)),
        parameters=tuple(Channel(f"p{i}") for i in range(numbers.shape[1])),
    )
    refiner = RefinerConfig(
        history=kwargs["time_history"],
        refinements=kwargs["num_refinement_steps"],
        minimum=kwargs["min_noise_std"],
        weight=kwargs["difference_weight"],
    ).build(spec, model, Normalizer.identity(spec))
    frames = jnp.moveaxis(jnp.concatenate([io["in.x"], io["in.y"]], axis=1), 2, -1)
    window = Window.of(frames, spec, parameters=numbers)
    context, history = window.context(0, refiner.history), refiner.history
    noises = jnp.stack([flat(io[f"in.noise_step{j}"]) for j in range(refiner.config.refinements)])
    state = refiner.encode(window.frames[:, :history], context)
    step = jnp.asarray(io["in.train_k"]).astype(int)

    @jax.jit
    def run(state, frame, noises):
        found = refiner.advance_with(state, context, flat(io["in.noise_init"]), noises)
        return found, refiner.problem(state, frame, context, step, flat(io["in.train_noise"]))

    found, problem = run(state, window.frames[:, history], noises)
    assert_array_equal(found[:, :-1], state[:, 1:])
    expected = flat(io["out.predict"])
    assert_allclose(refiner.decode(found), expected, atol=1e-5 * np.abs(expected).max())
    for name, value in (("net_in", problem.inputs), ("pred", problem.prediction), ("target", problem.target)):
        expected = flat(io[f"out.train.{name}"])
        assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    assert_allclose(problem.loss, io["out.train.loss"][0], rtol=1e-5)


@pytest.mark.parametrize("minimum", [4e-8, 1e-7, 0.9])
def test_any_noise_that_float32_can_tell_is_refined(spec, window, minimum):
    frames = rollout(knowing(spec, dataclasses.replace(PLAIN, minimum=minimum)), window, 2, jax.random.key(0))
    assert np.isfinite(frames).all()


@pytest.mark.parametrize("minimum", [2.9e-8, 1e-10, 0.0, 1.0])
def test_noise_that_float32_cannot_tell_is_refused(minimum):
    with pytest.raises(ConfigError, match="minimum"):
        RefinerConfig(minimum=minimum)


@pytest.mark.parametrize(
    "config", [PLAIN, RefinerConfig(history=2, refinements=5, minimum=1e-3, weight=2.0, longest_time=1.0)]
)
def test_a_perfect_network_steps_exactly(spec, window, config):
    frames = rollout(knowing(spec, config), window, 2, jax.random.key(0))
    assert frames.shape == (3, 2, 8, 6, 2)
    for step in range(2):
        expected = window.frames[:, config.history - 1] + (step + 1) * INCREMENT
        assert_allclose(frames[:, step], expected, atol=1e-5)  # float32 noise of the first, noisiest step


def test_noise_follows_the_key_and_differs_between_samples(tiny, spec):
    window = tiny.window(spec)
    window = dataclasses.replace(window, frames=np.repeat(window.frames[:1], 3, axis=0))
    stepper = blurry(tiny, spec)
    first, again, other = (np.asarray(rollout(stepper, window, 2, jax.random.key(seed))) for seed in (0, 0, 1))
    assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-3


def test_the_drawn_noise_is_standard_normal(tiny, spec, window, monkeypatch):
    stepper, seen = blurry(tiny, spec), []
    monkeypatch.setattr(stepper, "advance_with", lambda state, context, *noise: seen.extend(noise))
    many = dataclasses.replace(window, frames=np.repeat(window.frames, 50, axis=0))
    stepper.advance(many.frames[:, :1], many.context(0, 1, jax.random.key(0)))
    start, noises = map(np.asarray, seen)
    assert noises.shape == (3, *start.shape) == (3, 150, 8, 6, 2)
    draws = np.concatenate([start[None], noises]).reshape(4, -1)  # 14400 numbers each
    assert_allclose(draws.mean(1), 0, atol=0.04)
    assert_allclose(np.corrcoef(draws), np.eye(4), atol=0.04)
    assert_allclose(draws.std(1), 1, atol=0.03)


def test_members_side_by_side_are_single_rollouts(tiny, spec, window):
    stepper, keys = blurry(tiny, spec), jax.random.split(jax.random.key(0), 3)
    together = ensemble(stepper, window, 3, keys)
    for member, key in zip(together, keys, strict=True):
        assert_allclose(member, rollout(stepper, window, 3, key), atol=1e-5)
    pieces = rollout_chunks(stepper, window, 3, 2, keys[0])
    assert_allclose(np.concatenate([piece.frames for piece in pieces], axis=1), together[0], atol=1e-5)


@pytest.mark.parametrize("objective", [OneStep(), Unrolled(2)])
def test_jit_equals_eager_and_gradients_pass_the_sampler(tiny, spec, window, objective):
    graph, params, rest = nnx.split(blurry(tiny, spec), nnx.Param, ...)

    def loss(params):
        return objective(nnx.merge(graph, params, rest), window, jax.random.key(0))[0]

    with jax.disable_jit():
        eager = loss(params)
    assert_allclose(jax.jit(loss)(params), eager, rtol=1e-5)
    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        assert np.abs(np.asarray(gradient[...])).max() > 0, path


def test_everything_reaches_the_network(tiny):
    spec = tiny.spec(channels=("u",), forcing=("sun",), static=("land",), parameters=("viscosity",))
    config = RefinerConfig(history=2, calendar=True, lead=True)
    signature = config.signature(spec)
    assert (signature.inputs, signature.scalars, signature.outputs) == (2 + 1 + 1 + 1, 1 + 1 + 4 + 1, 1)
    random = np.random.default_rng(0)
    fields = {
        "forcing": random.random((3, 4, 8, 6, 1)).astype(np.float32),
        "static": random.random((3, 8, 6, 1)).astype(np.float32),
        "parameters": random.random((3, 1)).astype(np.float32),
        "calendar": random.random((3, 4, 2)).astype(np.float32),
    }
    window = tiny.window(spec, **fields)
    # The step is given as 0 .. 1, or it would drown the other scalars in a network that does not embed them.
    config = dataclasses.replace(config, longest_time=1.0)
    stepper = config.build(spec, tiny.model(12, 1), Normalizer.identity(spec))
    before = np.asarray(rollout(stepper, window, 1, jax.random.key(0)))
    for name, values in {**fields, "frames": window.frames}.items():
        changed = dataclasses.replace(window, **{name: values + 0.3})
        assert np.abs(np.asarray(rollout(stepper, changed, 1, jax.random.key(0))) - before).max() > 1e-3, name


class Halved:
    """Keeps half of every change."""

    def project(self, frame, previous, context):
        return previous + 0.5 * (frame - previous)


def test_constraints_project_every_step(spec, window):
    frames = rollout(knowing(spec, constraints=(Halved(),)), window, 2, jax.random.key(0))
    assert_allclose(frames[:, 1], window.frames[:, 0] + INCREMENT, atol=1e-5)


def test_masked_cells_give_and_take_no_noise(spec, window):
    class Neighbors(Knows):
        """NaN on land, which a convolution would spread; reads its neighbors' noisy increments."""

        def __call__(self, fields, scalars):
            velocity = super().__call__(fields, scalars) + jnp.roll(fields[..., -2:], 1, axis=1) * land
            return jnp.where(land, jnp.nan, velocity)

    mask = np.ones((3, 8, 6, 2), np.float32)
    mask[:, 2, 3] = 0
    land = mask[0][None] == 0
    masked = dataclasses.replace(window, frames=window.frames * mask[:, None], mask=mask)
    target = INCREMENT / np.array([0.5, 0.25], np.float32) / PLAIN.weight
    frames = np.asarray(rollout(PLAIN.build(spec, Neighbors(target), scaled(spec)), masked, 2, jax.random.key(0)))
    assert_array_equal(frames[:, :, 2, 3], 0)
    assert_allclose(frames[:, 1], (window.frames[:, 0] + 2 * INCREMENT) * mask, atol=1e-5)


def test_the_ladder_is_float32_whatever_the_network_computes_in(spec, window):
    """A velocity in bfloat16 is off by 2e-3; step 0 multiplies that by sqrt(4e-7), in float32."""
    frames = rollout(knowing(spec, dtype=jnp.bfloat16), window, 1, jax.random.key(0))
    assert frames.dtype == jnp.float32
    assert_allclose(frames[:, 0], window.frames[:, 0] + INCREMENT, atol=1e-5)
    rough = dataclasses.replace(window, frames=jnp.asarray(window.frames, jnp.bfloat16))
    assert rollout(knowing(spec), rough, 2, jax.random.key(0)).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        fine = dataclasses.replace(window, frames=np.asarray(window.frames, np.float64))
        assert rollout(knowing(spec), fine, 2, jax.random.key(0)).dtype == jnp.float64


def test_running_statistics_stay_inside_the_sampler(spec, window):
    class Normed(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(5, rngs=nnx.Rngs(0))

        def __call__(self, fields, scalars):
            return self.norm(jnp.concatenate([fields, jnp.ones_like(fields[..., :1])], -1))[..., :2]

    stepper = PLAIN.build(spec, Normed(), scaled(spec))
    stepper.train()
    assert np.isfinite(OneStep()(stepper, window, jax.random.key(0))[0])


def test_a_saved_refiner_is_the_same_refiner(spec, window, tmp_path):
    config = RefinerConfig(history=2, refinements=2, minimum=1e-5, weight=0.7, longest_time=1.0)
    stepper = build_stepper(config, FNOConfig(width=4, modes=(2, 2), depth=1), spec, scaled(spec))
    physml.save(stepper, tmp_path / "model")
    loaded = physml.load(tmp_path / "model")
    assert loaded.config == stepper.config
    run = jax.jit(functools.partial(rollout, steps=3, key=jax.random.key(1)))
    assert_array_equal(run(loaded, window), run(stepper, window))


def test_the_grid_can_be_exchanged(tiny, spec):
    stepper = build_stepper(PLAIN, ModernUNetConfig(width=8, multipliers=(1, 2), blocks=1), spec, scaled(spec))
    moved = stepper.on_grid(Grid(tuple(Axis.uniform(name, n) for name, n in (("x", 16), ("y", 12)))))
    assert moved.spec.grid.shape == (16, 12)
    frames = rollout(moved, tiny.window(moved.spec), 1, jax.random.key(0))
    assert frames.shape == (3, 1, 16, 12, 2)
    assert np.isfinite(frames).all()


def test_a_rollout_without_a_key_is_refused(tiny, spec, window):
    with pytest.raises(ConfigError, match=r"no random key.*jax\.random\.key"):
        rollout(blurry(tiny, spec), window, 2)


def test_scores_and_forecasts_bring_a_key(tiny, spec):
    class Split:
        lengths = (6, 6)

        def __init__(self):
            self.spec, self.frames = spec, tiny.window(spec, batch=2, frames=6).frames

        def read(self, trajectory, frames):
            window = Window.of(self.frames[trajectory : trajectory + 1, frames.start : frames.stop], spec)
            return jax.tree.map(lambda a: a[0], window)

    stepper = blurry(tiny, spec)

    def scored(**options):
        return evaluate_stepper(stepper, Split(), 2, metrics=["rmse"], draws=2, **options)["score"]

    assert_array_equal(scored(), scored(key=jax.random.key(0)))
    assert np.abs(scored() - scored(key=jax.random.key(1))).max() > 1e-4
    start = xr.Dataset({name: (("time", "x", "y"), Split().frames[0, :1, ..., i]) for i, name in enumerate(spec.names)})
    start = start.assign_coords({"time": [0.0], **{axis.name: list(axis.centers) for axis in spec.grid.axes}})
    plain = forecast(stepper, start, 2)
    assert_array_equal(plain["u"], forecast(stepper, start, 2, key=jax.random.key(0))["u"])
    members = forecast(stepper, start, 2, key=jax.random.key(0), members=3)["u"]
    assert float(members.std("member").max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 0}, "history is 0"),
        ({"refinements": 0}, "at least one refinement"),
        ({"refinements": 1.5}, r"refinements is 1.5 \(float\), but an integer"),
        ({"minimum": 0.0}, "between 0 and 1"),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": np.inf}, "weight is inf"),
        ({"longest_time": -1.0}, "longest_time -1.0"),
        ({"longest_time": np.inf}, "longest_time inf"),
    ],
)
def test_configs_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RefinerConfig(**options)


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (ModernUNetConfig(width=8, multipliers=(1, 1), blocks=1), 1000.0),
        (FNOConfig(modes=(2, 2), width=4, depth=1), 1.0),
    ],
)
def test_networks_read_times_of_the_size_that_they_take(spec, model, longest):
    for given in (None, 7.0):
        stepper = build_stepper(RefinerConfig(refinements=2, longest_time=given), model, spec, scaled(spec))
        assert stepper.schedule.times.tolist() == [0.0, (given or longest) / 2, given or longest]


def test_configs_are_plain_data_and_networks_must_fit(tiny, spec):
    from physml import coding

    config = RefinerConfig(refinements=2, weight=1.0)
    plain = coding.to_dict(config, STEPPERS)
    assert plain["name"] == "refiner"
    assert coding.from_dict(STEPPERS, plain) == config
    with pytest.raises(SpecError, match="does not accept 4 field channels"):
        PLAIN.build(spec, tiny.model(DirectConfig().signature(spec).inputs, 2), scaled(spec))
