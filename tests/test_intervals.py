"""Randomized intervals: increments per interval, one interval per rollout, and forecasts averaged over intervals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import coding, saving
from physml.api import initial_stepper
from physml.data import XarrayDataset, fit_normalizer, from_array, save_dataset
from physml.data.labelled import spec_of
from physml.errors import CheckpointError, ConfigError, DataError, SpecError
from physml.evaluate import evaluate_stepper
from physml.experiment import Experiment
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models import ResNetConfig
from physml.normalize import Normalizer, Totals
from physml.objectives import OBJECTIVES, NoisyInputs, OneStep, RandomInterval
from physml.objectives.curriculum import Curriculum
from physml.rollout import direct_leads, ensemble, rollout, rollout_chunks, rollout_stride
from physml.steppers import STEPPERS, DirectConfig, IntervalConfig, averaged

STEP = 0.5
SPEC = Spec(Grid((Axis.uniform("x", 4),)), (Channel("u"),), time_step=STEP)
SCALES = {1: [0.5], 2: [2.0], 4: [8.0]}


class Rate(nnx.Module):
    """rate * u * (a number that depends on the lead in steps)."""

    def __init__(self, rate=-0.1):
        self.rate = nnx.Param(jnp.float32(rate))

    def __call__(self, fields, scalars):
        return self.rate[...] * (1 + 0.5 * scalars[:, :1, None]) * fields


class Flow(nnx.Module):
    """The increment of u' = -0.3 u over the lead, exact with increments of scale 1."""

    def __call__(self, fields, scalars):
        return jnp.expm1(-0.3 * STEP * scalars[:, :1, None]) * fields


def normalizer(scales=SCALES):
    return Normalizer(SPEC, [0.0], [1.0], scales[1], intervals=scales)


def stepper(model=None, scales=SCALES, **config):
    return IntervalConfig(**config).build(SPEC, model or Rate(), normalizer(scales))


def frames_of(count, batch=3, rate=0.3):
    start = np.random.default_rng(0).uniform(0.5, 2, (batch, 1, 4, 1))
    values = start * np.exp(-rate * STEP * np.arange(count))[:, None, None]
    return Window.of(values.astype("f4"), SPEC)


def chaos(trajectories=3, frames=23, seed=0):
    """Random walks of two channels, so that increments grow with the interval."""
    random = np.random.default_rng(seed)
    steps = random.normal(0.1, 1, (trajectories, frames, 4, 6, 2)) * [1.0, 5.0]
    return np.cumsum(steps, axis=1).astype("f4")


def dataset(values, path=None):
    ds = from_array(values, ("trajectory", "time", "y", "x", "channel"), ("u", "v"), time_step=STEP)
    if path is not None:
        from physml.data import open_dataset

        save_dataset(ds, path)
        ds = open_dataset(path)
    return XarrayDataset(ds, spec_of(ds, ["u", "v"]))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_increments_of_every_interval_are_those_of_numpy(chunk):
    values = chaos()
    fitted = Normalizer.fit(dataset(values).windows(chunk), intervals=(1, 2, 4, 7))
    for row, interval in enumerate((1, 2, 4, 7)):
        increments = (values[:, interval:] - values[:, :-interval]).astype(float)
        expected = np.sqrt((increments**2).mean((0, 1, 2, 3)))
        assert_allclose(fitted.interval_increments[row], expected, rtol=1e-6)
    assert_allclose(fitted.interval_increments[0], fitted.increments[...], rtol=1e-6)
    assert fitted.intervals == (1, 2, 4, 7)
    space = (0, 1, 2, 3)
    assert_allclose(fitted.frames.center[...], values.mean(space, dtype=float), rtol=1e-6)
    assert_allclose(fitted.frames.scale[...], values.std(space, dtype=float), rtol=1e-6)


def test_a_channel_that_stands_still_has_increments_of_the_size_of_the_field():
    values = chaos()
    values[..., 1] = values[:, :1, ..., 1]
    fitted = Normalizer.fit(dataset(values).windows(), intervals=(1, 4))
    assert_array_equal(fitted.increments[1], fitted.frames.scale[1])
    assert_array_equal(fitted.interval_increments[:, 1], [fitted.frames.scale[1]] * 2)
    increments = np.diff(values[..., 0].astype(float), axis=1)
    assert_allclose(fitted.increments[0], np.sqrt((increments**2).mean()), rtol=1e-6)


def test_masked_cells_do_not_count():
    window = next(iter(dataset(chaos(1)).windows()))
    mask = np.ones(window.frames.shape[1:], "f4")
    mask[:2] = 0
    fitted = Normalizer.fit([dataclasses.replace(window, mask=mask)], intervals=(3,))
    seen = window.frames[:, 2:].astype(float)
    increments = seen[3:] - seen[:-3]
    assert_allclose(fitted.interval_increments[0], np.sqrt((increments**2).mean((0, 1, 2))), rtol=1e-6)


def test_stored_statistics_know_their_intervals(tmp_path):
    data = dataset(chaos(), tmp_path / "walk.nc")
    plain, some, more = (fit_normalizer(data, intervals=intervals) for intervals in ((), (1, 2), (1, 2, 4)))
    assert len(list(tmp_path.glob(".walk.nc.physml-*.json"))) == 3
    again = fit_normalizer(data, intervals=(1, 2))  # from the file
    for a, b in zip(jax.tree.leaves(nnx.state(some)), jax.tree.leaves(nnx.state(again)), strict=True):
        assert_array_equal(a, b)
    assert plain.interval_increments is None
    assert_array_equal(more.interval_increments[:2], some.interval_increments[...])
    totals = Totals(data.spec, (1, 3))
    for window in data.windows():
        totals.add(window)
    assert Totals.from_dict(totals.to_dict(), data.spec, (1, 3)).to_dict() == totals.to_dict()


def test_intervals_longer_than_trajectories_have_no_statistics():
    with pytest.raises(DataError, match="No two frames of a trajectory are 30 apart"):
        fit_normalizer(dataset(chaos()), intervals=(1, 30))


def test_a_step_is_scaled_by_its_own_interval():
    window, u = frames_of(1), np.asarray(frames_of(1).frames)[:, 0]
    for interval, scale in SCALES.items():
        frame = rollout_stride(stepper(), window, 1, interval)[:, 0]
        assert_allclose(frame, u * (1 - 0.1 * (1 + 0.5 * interval) * scale[0]), rtol=1e-5)
    assert_allclose(direct_leads(stepper(), window, [1, 4])[:, 1], rollout_stride(stepper(), window, 1, 4)[:, 0])


def test_samples_of_one_batch_have_intervals_of_their_own():
    scale = stepper().scale(jnp.asarray([4, 1, 2, 1]) * STEP)
    assert_array_equal(scale[:, 0], [8, 0.5, 2, 0.5])


def test_the_exact_flow_has_no_error():
    ones = dict.fromkeys((1, 2, 4), [1.0])
    for steps in (1, 3):
        objective = RandomInterval(steps=steps)
        loss, aux = objective(stepper(Flow(), ones), frames_of(objective.frames(1)), jax.random.key(0))
        assert float(loss) < 1e-12
        assert aux["lead"].shape == (steps,)
        wrong = objective(stepper(Rate(), ones), frames_of(objective.frames(1)), jax.random.key(0))[0]
        assert float(wrong) > 1e-4


def test_errors_are_in_units_of_the_interval_and_one_interval_serves_a_whole_rollout():
    """Without motion the error at step k of interval h is the change since, in units of `SCALES[h]`.

    1000 equal samples: n1 of interval 1 and the rest of 4 explain both leads with the same n1, within 5 deviations
    (16) of a half.
    """
    objective = RandomInterval((1, 4), steps=2)
    window = frames_of(objective.frames(1), batch=1)
    u = np.asarray(window.frames, float)[0]
    many = jax.tree.map(lambda a: np.repeat(a, 1000, axis=0), window)
    _, aux = objective(stepper(Rate(0.0)), many, jax.random.key(5))
    errors = {(h, k): (((u[h * k] - u[0]) / SCALES[h][0]) ** 2).mean() for h in (1, 4) for k in (1, 2)}
    counts = []
    for k in (1, 2):
        share = (float(aux["lead"][k - 1]) - errors[4, k]) / (errors[1, k] - errors[4, k])
        counts.append(1000 * share)
    assert abs(counts[0] - round(counts[0])) < 0.05
    assert_allclose(counts[0], counts[1], atol=0.05)
    assert abs(counts[0] - 500) < 80


def test_a_single_interval_of_one_is_one_step():
    window = frames_of(2)
    expected = OneStep(space="increment")(stepper(), window, jax.random.key(0))[0]
    assert_allclose(RandomInterval((1,))(stepper(), window, jax.random.key(0))[0], expected, rtol=1e-6)


def test_jit_and_recomputing_change_nothing_and_gradients_are_right():
    objective, window = RandomInterval(steps=2, space="normalized"), frames_of(9)
    graph, params, rest = nnx.split(stepper(Rate(-0.05)), nnx.Param, ...)

    def loss(params, objective=objective):
        return objective(nnx.merge(graph, params, rest), window, jax.random.key(1))[0]

    assert_allclose(jax.jit(loss)(params), loss(params), rtol=1e-6)
    slope = jax.jit(jax.grad(loss))(params)["model"]["rate"][...]
    again = jax.grad(lambda p: loss(p, dataclasses.replace(objective, remat=True)))(params)["model"]["rate"][...]
    assert_allclose(again, slope, rtol=1e-5)
    values = [objective(stepper(Rate(-0.05 + s)), window, jax.random.key(1))[0] for s in (1e-3, -1e-3)]
    assert_allclose(slope, (values[0] - values[1]) / 2e-3, rtol=1e-2)  # differences of a float32 loss


@pytest.mark.parametrize("intervals", [(1,), (1, 2, 4), (1, 3, 4)])
def test_averaging_is_the_mean_of_rollouts(intervals):
    scales = {interval: [0.3 * interval] for interval in intervals}
    scales = {1: [0.3], **scales}
    window = frames_of(1)
    single = stepper(scales=scales, intervals=intervals)
    frames = np.asarray(rollout(averaged(single), window, 12))
    runs = {h: np.asarray(rollout_stride(single, window, 12 // h, h)) for h in intervals}
    for n in range(1, 13):
        mean = np.mean([runs[h][:, n // h - 1] for h in intervals if n % h == 0], axis=0)
        assert_allclose(frames[:, n - 1], mean, rtol=1e-5)


def test_averaged_rollouts_run_everywhere():
    """Jitted, in chunks of any length, in ensembles, with gradients: the same frames as in one scan."""
    model, window = averaged(stepper()), frames_of(1)
    frames = rollout(model, window, 9)
    assert_allclose(jax.jit(lambda w: rollout(model, w, 9))(window), frames, rtol=1e-6)
    pieces = [chunk.frames for chunk in rollout_chunks(model, window, 9, 4)]
    assert_allclose(np.concatenate(pieces, axis=1), frames, rtol=1e-6)
    members = ensemble(model, window, 9, jax.random.split(jax.random.key(0), 2))
    assert_allclose(members, np.stack([frames, frames]), rtol=1e-6)
    slope = jax.grad(lambda u: rollout(model, dataclasses.replace(window, frames=u), 4)[:, -1].sum())(window.frames)
    assert_allclose(slope[0, 0, :, 0], frames[0, 3, :, 0] / window.frames[0, 0, :, 0], rtol=1e-5)  # linear in u


def test_undue_intervals_cost_nothing():
    """Interval 4 blows up, but is asked for at frame 4 first."""
    scales = {1: [0.5], 4: [np.inf]}
    frames = rollout(averaged(stepper(scales=scales, intervals=(1, 4))), frames_of(1), 4)
    assert np.isfinite(frames[:, :3]).all()
    assert not np.isfinite(frames[:, 3]).any()


def test_training_does_not_see_the_averaging():
    objective, window, key = RandomInterval(steps=2), frames_of(9), jax.random.key(0)
    expected = objective(stepper(), window, key)[0]
    assert_allclose(objective(averaged(stepper()), window, key)[0], expected)
    noisy = NoisyInputs(objective, std=1e-6)(stepper(), window, key)[0]
    assert_allclose(noisy, NoisyInputs(objective, std=1e-7)(stepper(), window, key)[0], rtol=1e-3)
    assert Curriculum(objective, steps=(1, 3)).frames(1) == 13


@pytest.mark.parametrize("average", [False, True])
def test_frames_of_half_precision_step_and_train(average):
    model, window = stepper(average=average), frames_of(9)
    short = dataclasses.replace(window, frames=jnp.asarray(window.frames, jnp.bfloat16))
    frames = rollout(model, short, 4)
    assert frames.dtype == jnp.bfloat16
    assert_allclose(frames.astype("f4"), rollout(model, window, 4), rtol=0.05)  # 8 bits, in every step
    objective, key = RandomInterval(steps=2, space="normalized"), jax.random.key(0)
    assert_allclose(objective(model, short, key)[0], objective(model, window, key)[0], rtol=0.1)


@pytest.mark.parametrize("wrap", [NoisyInputs, lambda objective: NoisyInputs(NoisyInputs(objective))])
def test_noise_reaches_the_single_steps_of_an_averaging_stepper(wrap):
    noisy, window, key = wrap(RandomInterval(steps=2)), frames_of(9), jax.random.key(0)
    expected, clean = noisy(stepper(), window, key)[0], RandomInterval(steps=2)(stepper(), window, key)[0]
    assert_allclose(noisy(averaged(stepper()), window, key)[0], expected)
    assert abs(expected - clean) > 1e-3 * clean


def experiment(**fields):
    config = {"stepper": IntervalConfig(), "objective": RandomInterval(), **fields}
    return Experiment(model=ResNetConfig(width=4, depth=1), **config)


def test_an_experiment_fits_scores_and_comes_back(tmp_path):
    data = dataset(chaos())
    fitted = initial_stepper(experiment(), data)
    expected = Normalizer.fit(data.windows(), intervals=(1, 2, 4)).interval_increments[...]
    assert_array_equal(fitted.normalizer.interval_increments[...], expected)
    model = averaged(fitted)
    loaded = saving.load(saving.save(model, tmp_path / "model"))
    assert loaded.config == dataclasses.replace(fitted.config, average=True)
    window = jax.tree.map(lambda a: a[None], data.read(0, range(1)))
    assert_array_equal(rollout(loaded, window, 5), rollout(model, window, 5))
    assert_array_equal(rollout(averaged(loaded, False), window, 5), rollout(fitted, window, 5))
    assert np.abs(np.asarray(rollout(loaded, window, 5) - rollout(fitted, window, 5))[:, 1]).max() > 1e-3
    scores = evaluate_stepper(loaded, data, 4, starts=1, metrics=["rmse"])
    assert np.isfinite(scores["score"]).all()
    plain = coding.to_dict(loaded.config, STEPPERS)
    assert plain["name"] == "interval"
    assert coding.from_dict(STEPPERS, plain) == loaded.config


def test_missing_statistics_are_named(tmp_path):
    with pytest.raises(SpecError, match=r"no scale of increments over \[4\] frames, only over \[1, 2\]"):
        IntervalConfig().build(SPEC, Rate(), normalizer({1: [1.0], 2: [1.0]}))
    with pytest.raises(SpecError, match=r"over \[1, 2, 4\] frames, only over \[\]"):
        IntervalConfig().build(SPEC, Rate(), Normalizer.identity(SPEC))
    with pytest.raises(SpecError, match=r"intervals\[2\] has shape \(2,\)"):
        normalizer({1: [1.0], 2: [1.0, 2.0]})
    config = IntervalConfig(intervals=(1, 2))
    model = ResNetConfig(width=4, depth=1).build(config.signature(SPEC), nnx.Rngs(0))
    folder = saving.save(config.build(SPEC, model, normalizer({1: [1.0], 2: [3.0]})), tmp_path / "model")
    text = (folder / "config.json").read_text()
    assert '"intervals": [\n   1,\n   2\n' in text
    (folder / "config.json").write_text(text.replace('"intervals": [\n   1,\n   2\n', '"intervals": [1, 2, 4\n'))
    with pytest.raises(CheckpointError, match="interval_increments"):
        saving.load(folder)


def test_bad_input_is_named():
    window, key = frames_of(5), jax.random.key(0)
    direct = DirectConfig(lead=True, longest_lead=4).build(SPEC, Flow(), Normalizer.identity(SPEC))
    with pytest.raises(SpecError, match=r"got that of DirectConfig.* Use IntervalConfig\(intervals=\(1, 2, 4\)\)"):
        RandomInterval()(direct, window, key)
    with pytest.raises(SpecError, match=r"draws the intervals \[3\], but the stepper has \(1, 2, 4\)"):
        RandomInterval((1, 3))(stepper(), window, key)
    with pytest.raises(SpecError, match="holds 5 frames, but the 9 of RandomInterval"):
        RandomInterval(steps=2)(stepper(), window, key)
    with pytest.raises(ConfigError, match="got no key"):
        RandomInterval()(stepper(), window, None)
    with pytest.raises(ConfigError, match=r"step of 3 frames .* intervals \(1, 2, 4\)"):
        rollout_stride(stepper(), window, 1, 3)
    with pytest.raises(ConfigError, match="averages over its intervals"):
        rollout_stride(averaged(stepper()), window, 1, 2)
    with pytest.raises(ConfigError, match="Direct has no intervals"):
        averaged(direct)
    for wrong in ((2, 4), (1, 1), (2, 1), (), (0, 1), (1, 2.5)):
        with pytest.raises(ConfigError, match=r"^intervals(\[1\] is| are)"):
            IntervalConfig(intervals=wrong)
    for wrong in ({"intervals": ()}, {"intervals": (4, 2)}, {"steps": 0}, {"space": "fourier"}):
        with pytest.raises(ConfigError):
            RandomInterval(**wrong)
    objective = RandomInterval((1, 6), 4, "mae", "normalized", remat=True)
    plain = coding.to_dict(objective, OBJECTIVES)
    assert plain["name"] == "random_interval"
    assert coding.from_dict(OBJECTIVES, plain) == objective
