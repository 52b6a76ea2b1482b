"""Evaluation: aligned by valid time, blind to the future, averaged over starts, floors beside the model."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose

from physml import api
from physml.data import SyntheticConfig, XarrayDataset, from_frames, spec_of
from physml.errors import ConfigError, DataError, SpecError
from physml.evaluate import evaluate, evaluate_stepper, load_scores, plan_starts, save_scores, to_rows
from physml.evaluate.statistics import blocks_of_starts
from physml.experiment import Evaluation, Experiment
from physml.fields import Window
from physml.forecast import forecast
from physml.metrics import METRICS, Measure, Metric
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.objectives import Denoising
from physml.steppers import GaussianConfig, RefinerConfig, stack_members
from physml.steppers.floors import ClimatologyConfig, ExtrapolationConfig, PersistenceConfig
from physml.training import TrainingConfig


class Trajectories:
    """A `contracts.Dataset` in memory: noisy waves, or (`still`) trajectories whose frames are all equal."""

    def __init__(self, spec, tiny, lengths=(9, 12, 9), still=False):
        self.spec, self.lengths = spec, lengths
        frames = tiny.window(spec, batch=len(lengths), frames=max(lengths)).frames
        noise = np.random.default_rng(0).standard_normal(frames.shape).astype(np.float32)
        self.frames = np.repeat(frames[:, :1], max(lengths), axis=1) if still else frames + 0.1 * noise

    def read(self, trajectory, frames):
        assert 0 <= frames[0] <= frames[-1] < self.lengths[trajectory], "read outside the trajectory"
        window = Window.of(self.frames[trajectory : trajectory + 1, frames.start : frames.stop], self.spec)
        return jax.tree.map(lambda a: a[0], window)


class Blowup(nnx.Module):
    """Adds `rate` to the last frame; becomes NaN after `until` steps."""

    def __init__(self, spec, rate=0.5, until=99, history=1):
        self.spec, self.history, self.until = spec, history, until
        self.rate = nnx.Param(jnp.asarray(rate))

    def encode(self, frames, context):
        return frames[:, -1], jnp.zeros((), jnp.int32)

    def advance(self, state, context):
        frame, count = state
        frame = frame + self.rate[...]
        return jnp.where(count < self.until, frame, jnp.nan), count + 1

    def decode(self, state):
        return state[0]


@pytest.fixture
def dataset(spec, tiny):
    return Trajectories(spec, tiny)


@pytest.fixture
def labelled():
    """One year of daily data on a small latitude-longitude grid, latitude descending."""
    time = np.arange("2001-01-01", "2002-01-01", dtype="datetime64[D]").astype("datetime64[ns]")
    values = np.random.default_rng(0).standard_normal((365, 5, 6)).astype(np.float32) + 10
    return xr.Dataset(
        {"slp": (("time", "latitude", "longitude"), values, {"units": "Pa"})},
        {
            "time": time,
            "latitude": ("latitude", np.linspace(50.0, 40.0, 5), {"units": "degrees_north"}),
            "longitude": ("longitude", np.arange(6.0), {"units": "degrees_east"}),
        },
    )


def forecast_of(ds, starts, leads, shift=0.0):
    """A forecast in the layout of `physml.forecast`: the truth plus `shift`."""
    spec = spec_of(ds)
    index = np.asarray(starts)[:, None] + np.arange(1, leads + 1)
    frames = ds["slp"].values[index][:, :, ::-1][..., None] + np.float32(shift)  # the spec has latitude ascending
    return from_frames(frames, spec, ds, times=ds["time"].values[index])


# --- steppers ------------------------------------------------------------------------------------------------------


def test_scores_equal_a_plain_loop(dataset):
    scores = evaluate_stepper(PersistenceConfig().fit(dataset), dataset, 4, batch=5, name="persistence")
    measure = Measure.of(dataset.spec)
    for name in ("rmse", "mae", "vrmse", "nrmse_pooled", "correlation"):
        for lead in (1, 4):
            pairs = [
                (dataset.frames[t, f - 1], dataset.frames[t, f + lead - 1])
                for t, length in enumerate(dataset.lengths)
                for f in range(1, length - lead + 1)
            ]
            prediction, truth = (np.stack(side)[:, None] for side in zip(*pairs))
            expected = METRICS[name](prediction, truth, measure)[0]
            got = scores["score"].sel(model="persistence", metric=name, lead=float(lead))
            assert_allclose(got, expected, rtol=1e-5)
            assert scores["pairs"].sel(lead=float(lead)) == len(pairs)


def test_batch_size_does_not_matter_and_last_batch_is_not_traced_again(dataset):
    traces, few = [], ("rmse", "vrmse", "log_spectral_error")

    class Counted(Blowup):
        def decode(self, state):
            traces.append(1)
            return super().decode(state)

    whole = evaluate_stepper(Counted(dataset.spec), dataset, 3, batch=64, metrics=few)
    once = len(traces)
    parts = evaluate_stepper(
        Counted(dataset.spec), dataset, 3, batch=8, metrics=few
    )  # 27 starts: three full batches and a part
    assert len(traces) == 2 * once
    for name in ("score", "score_low", "score_spread", "energy", "spectrum", "correlation_time"):
        assert_allclose(parts[name], whole[name], rtol=2e-5, atol=1e-6)


class Noisy(Blowup):
    def advance(self, state, context):
        return state[0] + self.rate[...] * jax.random.normal(context.key, state[0].shape), state[1]


@pytest.mark.parametrize("members", [None, 2])
def test_a_second_evaluation_traces_nothing(dataset, members):
    """Of other numbers and another key; a metric of one's own is known by identity."""
    traces = []

    class Counted(Noisy):
        def advance(self, state, context):
            traces.append("stepper")
            return super().advance(state, context)

    def statistic(prediction, truth, measure):
        traces.append("metric")
        return (measure.mean(abs(prediction - truth)),)

    own = {"own": Metric(statistic, lambda mean: mean)}

    def scores(rate, seed):
        model, floors = Counted(dataset.spec, rate), {"climatology": ClimatologyConfig().fit(dataset)}
        found = evaluate_stepper(
            model, dataset, 2, starts=1, floors=floors, metrics=own, members=members, key=jax.random.key(seed), draws=2
        )
        return found["score"].sel(model="model").values

    first, once = scores(1.0, 0), len(traces)
    assert abs(scores(1.0, 1) - first).min() > 0
    assert abs(scores(3.0, 0) - first).min() > 0.1
    assert len(traces) == once


def test_steppers_that_hold_lists_are_scored(dataset):
    model = Blowup(dataset.spec)
    model.notes = ["no", "hash"]
    assert np.isfinite(evaluate_stepper(model, dataset, 2, starts=1, metrics=("rmse",))["score"]).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_devices_share_the_starts_of_all_members(dataset, stacked):
    """Each of the four holds the members of its own two of the eight starts."""
    shapes, whole = [], (2, 24, 8, 6, 2) if stacked else (24, 8, 6, 2)

    class Seen(Noisy):
        def advance(self, state, context):
            state = super().advance(state, context)
            jax.debug.inspect_array_sharding(state[0], callback=lambda s: shapes.append(s.shard_shape(whole)))
            return state

    model = Seen(dataset.spec)
    if stacked:
        model = stack_members([model, Seen(dataset.spec, rate=2.0)])
    evaluate_stepper(model, dataset, 2, starts=4, batch=8, members=6 if stacked else 3, metrics=("rmse",), draws=2)
    assert shapes == [(*whole[:-4], 6, 8, 6, 2)]


def test_equal_starts_have_draws_of_their_own(spec, tiny):
    """Within a batch and in another one: the error of a still truth is the noise of its start."""
    still = Trajectories(spec, tiny, lengths=(9, 9), still=True)
    starts = [(0, frame) for frame in range(1, 9)]
    scores = evaluate_stepper(Noisy(spec), still, 1, starts=starts, batch=4, metrics=("rmse",), per_start=True)
    errors = scores["score_per_start"].sel(channel="u").values.ravel()
    assert len(set(errors)) == len(starts)


def test_constant_drift_is_measured_exactly(spec, tiny):
    still = Trajectories(spec, tiny, still=True)
    scores = evaluate_stepper(Blowup(spec, rate=0.5), still, 3, starts=2, metrics=("bias", "mae", "rmse"))
    for name in ("bias", "mae", "rmse"):
        assert_allclose(scores["score"].sel(model="model", metric=name, channel="u"), [0.5, 1.0, 1.5], rtol=1e-5)
    mean = scores["mean"].sel(channel="u")
    assert_allclose(mean.sel(source="model") - mean.sel(source="truth"), [0.5, 1.0, 1.5], rtol=1e-4)
    energy = scores["energy"].sel(source="truth", channel="u")
    assert_allclose(energy, 0.5 * (still.frames[..., 0] ** 2).mean(), rtol=1e-5)
    assert_allclose(scores["spectrum"].sel(source="truth", channel="u").sum("wavenumber"), energy[0], rtol=1e-5)


def test_the_future_cannot_leak_into_a_rollout(spec, tiny):
    seen = []

    class Nosy(Blowup):
        def encode(self, frames, context):
            seen.append(frames.shape[1])
            return super().encode(frames, context)

    data = Trajectories(spec, tiny)
    evaluate_stepper(Nosy(spec, history=2), data, 3, starts=1, metrics=("rmse",))
    assert set(seen) == {2}
    before = evaluate_stepper(Nosy(spec), data, 3, starts=1, metrics=("rmse",))["mean"]
    data.frames[:, 1:] += 100  # everything after the first start's input
    after = evaluate_stepper(Nosy(spec), data, 3, starts=1, metrics=("rmse",))["mean"]
    assert_allclose(after.sel(source="model"), before.sel(source="model"), rtol=1e-6)
    assert (after.sel(source="truth") > before.sel(source="truth") + 90).all()


def test_models_of_different_history_share_starts_and_clock(dataset):
    floors = {"persistence": PersistenceConfig().fit(dataset)}
    scores = evaluate_stepper(ExtrapolationConfig().fit(dataset), dataset, 2, floors=floors, metrics=("rmse",))
    alone = evaluate_stepper(
        floors["persistence"],
        dataset,
        2,
        starts=plan_starts(dataset.lengths, 2, 2, None),
        name="persistence",
        metrics=("rmse",),
    )
    assert_allclose(
        scores["score"].sel(model="persistence"), alone["score"].sel(model="persistence"), rtol=1e-6, atol=1e-7
    )
    assert scores.attrs["history"] == 2
    assert scores.attrs["floors"] == "persistence"


def test_diverged_rollouts_are_counted_and_not_forgiven(dataset):
    scores = evaluate_stepper(Blowup(dataset.spec, until=2), dataset, 4, starts=2, metrics=("rmse",))
    assert_allclose(scores["finite"].sel(model="model"), [1, 1, 0, 0])
    rmse = scores["score"].sel(model="model", metric="rmse", channel="u")
    assert np.isfinite(rmse[:2]).all()
    assert np.isnan(rmse[2:]).all()
    time = scores["correlation_time"].sel(model="model", channel="u", threshold=0.8)
    assert time <= 3
    assert not scores["correlation_time_capped"].sel(model="model", channel="u", threshold=0.8)


@pytest.mark.parametrize(("lengths", "leads", "lasts"), [((13, 13), 12, 12), ((13, 13), 20, 12), ((21, 8), 20, 20)])
def test_correlation_lasts_as_long_as_the_data(spec, tiny, lengths, leads, lasts):
    """Perfect forecasts are capped by the last lead that has truth, also in draws of the short trajectory alone."""
    still = Trajectories(spec, tiny, lengths, still=True)
    persistence = PersistenceConfig().fit(still)
    scores = evaluate_stepper(persistence, still, leads, batch=64, metrics=("rmse",), draws=40)
    for key in ("", "_low", "_high"):
        assert_allclose(scores[f"correlation_time{key}"], lasts)
    assert scores["correlation_time_capped"].all()


def test_a_blow_up_ends_the_correlation_where_leads_outrun_the_data(spec, tiny):
    still = Trajectories(spec, tiny, (9, 6), still=True)
    scores = evaluate_stepper(Blowup(spec, rate=0.0, until=3), still, 12, batch=64, metrics=("rmse",), draws=40)
    for key in ("", "_low", "_high"):
        assert_allclose(scores[f"correlation_time{key}"], 4)
    assert not scores["correlation_time_capped"].any()


def test_climatology_floor_gives_skill_and_acc(dataset):
    climatology = ClimatologyConfig().fit(dataset)
    floors = {"persistence": PersistenceConfig().fit(dataset), "climatology": climatology}
    scores = evaluate_stepper(Blowup(dataset.spec, rate=0.0), dataset, 3, floors=floors, metrics=("rmse", "skill"))
    assert_allclose(scores["score"].sel(model="climatology", metric="skill"), 0, atol=1e-6)
    square = scores["score"].sel(metric="rmse") ** 2
    expected = 1 - square.sel(model="persistence") / square.sel(model="climatology")
    assert_allclose(scores["score"].sel(model="persistence", metric="skill"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="climatology"):
        evaluate_stepper(floors["persistence"], dataset, 3, metrics=("acc",))


def test_persistence_and_climatology_on_real_reanalysis(shared_data):
    path = shared_data / "reanalysis" / "ncep_slp_natl_daily_2001-2010.nc"
    if not path.is_file():
        pytest.skip(f"no file {path}")
    with xr.open_dataset(path) as ds:
        spec = spec_of(ds)
        train = XarrayDataset(ds.sel(time=slice("2001", "2007")).load(), spec)
        test = XarrayDataset(ds.sel(time=slice("2009", "2010")).load(), spec)
    floors = {"climatology": ClimatologyConfig().fit(train)}
    scores = evaluate_stepper(
        PersistenceConfig().fit(train), test, 7, floors=floors, metrics=("rmse",), name="persistence", batch=128
    )
    rmse = scores["score"].sel(metric="rmse", channel="slp") / 100
    persistence = [6.149, 9.062, 10.334, 11.138, 11.666, 12.064, 12.385]
    climatology = [9.737, 9.732, 9.730, 9.728, 9.728, 9.728, 9.730]
    assert_allclose(rmse.sel(model="persistence"), persistence, atol=6e-4)
    assert_allclose(rmse.sel(model="climatology"), climatology, atol=6e-4)
    inside = scores["score_low"] < scores["score"]
    assert bool((inside & (scores["score"] < scores["score_high"])).all())
    assert rmse["lead"].values[0] == np.timedelta64(1, "D")


def test_starts_are_planned_inside_the_data():
    assert plan_starts((5, 3), 1, 2, None) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    assert plan_starts((10, 3), 1, 4, 3) == [(0, 1), (0, 4), (0, 6)]
    assert plan_starts((10,), 2, 4, 1) == [(0, 2)]
    assert plan_starts((1, 1), 0, 1, None) == [(0, 0), (1, 0)]  # operator learning: no history
    with pytest.raises(DataError, match="Lower the leads to at most 4"):
        plan_starts((5,), 1, 6, 2)
    with pytest.raises(ConfigError, match=r"outside the data.*1\.\.4"):
        plan_starts((5,), 1, 2, [(0, 5)])
    with pytest.raises(ConfigError, match="at least one frame"):
        plan_starts((5,), 1, 0, None)


def test_dependent_starts_share_a_group():
    groups, what = blocks_of_starts([(0, f) for f in range(1, 21)], 5)
    assert what == "block of 5 frames"
    assert groups.tolist() == [i // 5 for i in range(20)]
    groups, what = blocks_of_starts([(t, f) for t in range(8) for f in (1, 2)], 5)
    assert what == "trajectory"
    assert groups.tolist() == [i // 2 for i in range(16)]


def test_sample_and_per_start_scores(dataset, tmp_path):
    scores = evaluate_stepper(
        Blowup(dataset.spec), dataset, 3, starts=2, sample=tmp_path / "sample.nc", per_start=True, metrics=("rmse",)
    )
    assert scores["score_per_start"].dims == ("model", "metric", "channel", "lead", "start")
    assert scores.sizes["start"] == 6
    each = scores["score_per_start"].sel(model="model", metric="rmse")
    assert_allclose(np.sqrt((each**2).mean("start")), scores["score"].sel(model="model", metric="rmse"), rtol=1e-5)
    assert_allclose(each.std("start", ddof=1), scores["score_spread"].sel(model="model", metric="rmse"), rtol=1e-4)
    with xr.open_dataset(tmp_path / "sample.nc") as sample:
        assert sample["u_truth"].dims == ("lead", "x", "y")
        assert_allclose(sample["u_truth"], dataset.frames[0, 1:4, ..., 0])
        assert_allclose(sample["v_forecast"][2], dataset.frames[0, 0, ..., 1] + 1.5, rtol=1e-5)


def test_wrong_options_are_refused(dataset, tiny):
    model = Blowup(dataset.spec)
    with pytest.raises(ConfigError, match="Did you mean 'rmse'"):
        evaluate_stepper(model, dataset, 2, metrics=("rmsee",))
    with pytest.raises(ConfigError, match="names must differ"):
        evaluate_stepper(model, dataset, 2, floors={"model": model})
    with pytest.raises(SpecError, match="grid"):
        evaluate_stepper(Blowup(tiny.spec((4, 4))), dataset, 2)
    with pytest.raises(ConfigError, match="leads count from 1 to 2"):
        evaluate_stepper(model, dataset, 2, spectrum_leads=3)
    with pytest.raises(ConfigError, match="spectrum_leads is 1.5"):
        evaluate_stepper(model, dataset, 2, spectrum_leads=(1.5,))
    with pytest.raises(ConfigError, match="say how far"):
        evaluate(model, dataset)
    dataset.frames[1, 4, 0, 0, 1] = np.nan
    with pytest.raises(DataError, match="channel 'v' of trajectory 1, frame 4"):
        evaluate_stepper(model, dataset, 2)


def test_numbers_and_names_may_be_of_any_kind(dataset):
    """One text is one name, one number one threshold, and numbers of numpy are numbers."""
    model, plan = Blowup(dataset.spec), [(0, 1), (1, 5)]
    one = evaluate(model, dataset, leads=np.int64(2), starts=np.int64(2), metrics="rmse", thresholds=0.8)
    same = evaluate(model, dataset, leads=2, starts=2, metrics=("rmse",), thresholds=(0.8,))
    xr.testing.assert_equal(one, same)
    assert plan_starts((9, 9), 1, 2, np.array(plan)) == plan == plan_starts((9, 9), 1, 2, plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leads": "5"}, "leads is '5', but a whole number"),
        ({"leads": 2.5}, r"leads is 2\.5, but a whole number"),
        ({"starts": "all"}, "starts is 'all', but a whole number"),
        ({"starts": [1, 2]}, r"starts is \[1, 2\], but a number of starts"),
        ({"starts": [(0, 1), (2,)]}, r"starts is \[\(0, 1\), \(2,\)\], but a number of starts"),
        ({"starts": []}, "starts is empty"),
        ({"level": 95}, "level is 95, but a share between 0 and 1"),
        ({"draws": 0}, "draws is 0"),
        ({"thresholds": "high"}, "thresholds are 'high'"),
    ],
)
def test_numbers_that_are_none_are_named(dataset, labelled, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(Blowup(dataset.spec), dataset, **{"leads": 2, "metrics": "rmse", **options})
    if "starts" not in options:
        with pytest.raises(ConfigError, match=message):
            evaluate(forecast_of(labelled, [3, 50], 4), labelled, metrics="rmse", **options)


def test_stochastic_rollouts_follow_their_key(dataset):
    model = Noisy(dataset.spec, rate=1.0)
    one, again = (
        evaluate_stepper(model, dataset, 2, starts=2, metrics=("rmse",), key=jax.random.key(1)) for _ in range(2)
    )
    other = evaluate_stepper(model, dataset, 2, starts=2, metrics=("rmse",), key=jax.random.key(2))
    assert_allclose(one["score"], again["score"])
    assert abs(one["score"] - other["score"]).max() > 1e-3


def test_an_ensemble_of_steppers_is_scored_as_one(dataset):
    """Three models that add 0, 1 and 3 at every step, scored by hand; the floor is a single forecast."""
    spec, rates = dataset.spec, (0.0, 1.0, 3.0)
    members = stack_members([Blowup(spec, rate=rate) for rate in rates])
    floors = {"persistence": PersistenceConfig().fit(dataset)}
    scores = evaluate_stepper(members, dataset, 2, starts=1, floors=floors, batch=2)
    x = np.stack([[dataset.frames[t, 0] + rate * np.arange(1, 3)[:, None, None, None] for t in range(3)]
                  for rate in rates])  # fmt: skip
    y = dataset.frames[:, 1:3]
    space = (0, 2, 3)  # of (start, lead, *space, channel): all but lead and channel

    def mean(field):
        return field.mean(space).T

    def score(metric, model="model"):
        return scores["score"].sel(model=model, metric=metric)

    distance, error = np.abs(x - y).mean(0), x.mean(0) - y
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1)) / 6
    assert_allclose(score("crps_fair"), mean(distance - pairs / 2), rtol=1e-4)
    assert_allclose(score("crps"), mean(distance - pairs / 3), rtol=1e-4)
    assert_allclose(score("rmse"), np.sqrt(mean(error**2)), rtol=1e-4)
    assert_allclose(score("spread"), np.sqrt(mean(x.var(0, ddof=1))), rtol=1e-4)
    assert_allclose(score("spread_skill"), np.sqrt(4 / 3 * mean(x.var(0, ddof=1)) / mean(error**2)), rtol=1e-4)
    ranks = scores["rank_histogram"].sel(model="model")
    for rank in range(4):
        assert_allclose(ranks.sel(rank=rank), mean(((x < y).sum(0) == rank).astype(float)), atol=1e-6)
    assert_allclose(score("crps", "persistence"), score("mae", "persistence"), rtol=1e-6)
    assert np.isnan(score("crps_fair", "persistence")).all()
    assert scores.attrs["members"] == "model: 3"
    with pytest.raises(ConfigError, match="ensemble of 3: use a multiple"):
        evaluate_stepper(members, dataset, 2, members=4)
    with pytest.raises(ConfigError, match="'crps_fair' scores ensembles"):
        evaluate_stepper(Blowup(spec), dataset, 2, metrics=("crps_fair",))


def test_realizations_of_a_stochastic_stepper_are_an_ensemble(dataset):
    noisy, metrics = Noisy(dataset.spec, rate=1.0), ("spread", "spread_skill")
    scores = evaluate_stepper(noisy, dataset, 2, starts=3, members=20, metrics=metrics)
    # the sum of n standard normal numbers; 20 members, 3 x 3 starts and 48 cells
    expected = np.broadcast_to(np.sqrt([1, 2]), (2, 2))
    assert_allclose(scores["score"].sel(model="model", metric="spread"), expected, rtol=0.03)


def test_members_that_repeat_each_other_are_refused(dataset):
    spec = dataset.spec
    for stepper in (Blowup(spec), stack_members([Blowup(spec, rate=1.0), Blowup(spec, rate=2.0)])):
        with pytest.raises(ConfigError, match=r"draws no random numbers.*perturb"):
            evaluate_stepper(stepper, dataset, 2, members=4, starts=1, metrics=("rmse",))


def test_an_ensemble_of_gaussian_steppers_is_drawn_from(dataset):
    class Says(nnx.Module):
        def __init__(self, shift):
            self.output = nnx.Param(jnp.full((*dataset.spec.grid.shape, 4), shift))

        def __call__(self, fields, scalars):
            return jnp.broadcast_to(self.output[...], (fields.shape[0], *self.output.shape))

    unit = Normalizer(dataset.spec, [0.0, 0.0], [1.0, 1.0], [1.0, 1.0])
    members = stack_members([GaussianConfig().build(dataset.spec, Says(0.0), unit) for _ in range(2)])
    scores = evaluate_stepper(members, dataset, 2, members=20, starts=3, metrics=("spread",))
    drawn = np.log(2) * np.sqrt([1, 2])  # the softplus of 0 is the deviation of a step
    assert_allclose(scores["score"].sel(model="model", metric="spread"), np.broadcast_to(drawn, (2, 2)), rtol=0.03)


def test_an_ensemble_as_a_floor_is_its_mean(dataset):
    floor = stack_members([Blowup(dataset.spec, rate=rate) for rate in (1.0, 2.0)])
    scores = evaluate_stepper(Blowup(dataset.spec, rate=1.5), dataset, 2, floors={"both": floor}, metrics=("mae",))
    assert_allclose(scores["score"].sel(model="both"), scores["score"].sel(model="model"), rtol=1e-5)


# --- labelled forecasts --------------------------------------------------------------------------------------------


def test_forecasts_are_aligned_by_valid_time(labelled):
    perfect = evaluate(forecast_of(labelled, [3, 50, 200], 4), labelled, metrics=("rmse",))
    assert_allclose(perfect["score"].sel(metric="rmse"), 0, atol=1e-6)
    shifted = evaluate(forecast_of(labelled, [3, 50, 200], 4, shift=2.0), labelled, metrics=("bias",))
    assert_allclose(shifted["score"].sel(metric="bias"), 2, rtol=1e-5)
    late = forecast_of(labelled, [3, 50, 200], 4).assign_coords(time=lambda d: d["time"] + np.timedelta64(1, "D"))
    assert (evaluate(late, labelled, metrics=("rmse",))["score"].sel(metric="rmse") > 0.5).all()


def test_forecasts_equal_the_rollout_of_the_same_stepper(labelled):
    spec = spec_of(labelled)
    data = XarrayDataset(labelled, spec)
    starts = [10, 40, 70]
    by_rollout = evaluate_stepper(
        PersistenceConfig().fit(data),
        data,
        3,
        starts=[(0, s + 1) for s in starts],
        name="persistence",
        metrics=("rmse", "correlation"),
    )
    frames = np.repeat(labelled["slp"].values[starts][:, None, ::-1, :, None], 3, axis=1)
    index = np.asarray(starts)[:, None] + np.arange(1, 4)
    prediction = from_frames(frames, spec, labelled, times=labelled["time"].values[index])
    by_labels = evaluate({"persistence": prediction}, labelled, metrics=("rmse", "correlation"))
    assert_allclose(by_labels["score"], by_rollout["score"], rtol=1e-5, atol=1e-6)
    beside = evaluate(
        forecast_of(labelled, starts, 3), labelled, floors=("persistence",), metrics=("rmse", "correlation")
    )
    got = beside["score"].sel(model="persistence")
    assert_allclose(got, by_rollout["score"].sel(model="persistence"), rtol=1e-5, atol=1e-6)


def test_a_forecast_can_be_scored_as_it_comes(labelled):
    spec = spec_of(labelled)
    persistence = PersistenceConfig().fit(XarrayDataset(labelled, spec))
    prediction = forecast(persistence, labelled.isel(time=slice(100, 101)), 3)
    scores = evaluate(prediction, labelled, metrics=("rmse",))
    expected = evaluate_stepper(persistence, XarrayDataset(labelled, spec), 3, starts=[(0, 101)], metrics=("rmse",))
    assert_allclose(scores["score"], expected["score"], rtol=1e-5)
    assert scores["channel"].values.tolist() == ["slp"]
    twins = evaluate(prediction.expand_dims(member=2), labelled, metrics=("rmse", "crps", "spread"))
    assert_allclose(twins["score"].sel(metric="rmse"), scores["score"].sel(metric="rmse"), rtol=1e-6)
    assert_allclose(twins["score"].sel(metric="spread"), 0, atol=1e-6)


HOURS = np.arange(12.0) * 6
CLOCKS = {
    "noleap": xr.date_range("2000-02-25", periods=12, freq="1D", calendar="noleap", use_cftime=True),
    "360_day": xr.date_range("2000-02-25", periods=12, freq="1D", calendar="360_day", use_cftime=True),
    "months": np.arange("2001-01", "2002-01", dtype="datetime64[M]").astype("datetime64[ns]"),
    "hours": xr.Variable("time", HOURS, {"units": "hours"}),
    "durations": (HOURS * np.timedelta64(3_600_000_000_000, "ns")).astype("timedelta64[ns]"),
    "numbers": HOURS,
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_forecasts_are_scored_on_every_clock(clock):
    """The floor `persistence` finds the last input, which a persistence forecast repeats."""
    random, time = np.random.default_rng(0), CLOCKS[clock]
    truth = xr.Dataset({"u": (("time", "x"), random.standard_normal((12, 8)).astype(np.float32))})
    truth = truth.assign_coords(time=time if isinstance(time, xr.Variable) else ("time", time), x=np.arange(8) / 8)
    persistence = PersistenceConfig().build(spec_of(truth))
    prediction = forecast(persistence, truth.isel(time=slice(0, 3)), 4)
    score = evaluate(prediction, truth, floors=("persistence",), metrics=("rmse",))["score"]
    error = truth["u"].values[3:7] - truth["u"].values[2]
    assert_allclose(score.sel(model="model").squeeze(), np.sqrt((error.astype(float) ** 2).mean(-1)), rtol=1e-5)
    assert_allclose(score.sel(model="persistence"), score.sel(model="model"), rtol=1e-6)


def test_the_last_input_is_found_across_a_gap(labelled):
    """Leads 2 and 12 from day 8; the truth has days 0 to 9 and 20 to 29, so the first lead does not count."""
    truth, day = labelled.isel(time=[*range(10), *range(20, 30)]), np.timedelta64(86_400_000_000_000, "ns")
    prediction = labelled.isel(time=[10, 20]).rename(time="lead")
    valid = prediction["lead"].values
    prediction = prediction.assign_coords(lead=("lead", np.array([2, 12]) * day), time=("lead", valid))
    scores = evaluate(prediction, truth, floors=("persistence",), metrics=("mae",))
    expected = evaluate(xr.zeros_like(prediction) + labelled["slp"].values[8], truth, metrics=("mae",))
    assert_allclose(scores["score"].sel(model="persistence"), expected["score"].sel(model="model"), rtol=1e-6)
    with pytest.raises(DataError, match="no frame 12 steps before 2001-01-21"):
        evaluate(prediction, truth.isel(time=slice(9, None)), floors=("persistence",), metrics=("mae",))


def test_one_text_is_one_name(labelled):
    scores = evaluate(forecast_of(labelled, [3, 50], 4), labelled, metrics="rmse", floors="persistence")
    assert scores["metric"].values.tolist() == ["rmse"]
    assert scores["model"].values.tolist() == ["model", "persistence"]
    with pytest.raises(ConfigError, match="no metric 'rmsee'"):
        evaluate(forecast_of(labelled, [3], 2), labelled, metrics="rmsee")


def test_only_the_first_leads_are_scored_where_asked(labelled):
    prediction = forecast_of(labelled, [3, 50], 4, shift=1.0)
    some, every = (evaluate(prediction, labelled, leads=leads, metrics=("mae",)) for leads in (2, None))
    xr.testing.assert_allclose(some["score"], every["score"].isel(lead=slice(2)))
    for leads in (0, 5):
        with pytest.raises(ConfigError, match=f"leads is {leads}.*give 1 to 4"):
            evaluate(prediction, labelled, leads=leads)


def test_options_that_do_not_fit_are_named(dataset, labelled):
    model = Blowup(dataset.spec)
    with pytest.raises(ConfigError, match="steppers by name"):
        evaluate(model, dataset, leads=2, floors=("persistence",))
    with pytest.raises(ConfigError, match="no option 'inputs' for a stepper"):
        evaluate(model, dataset, leads=2, inputs=labelled)
    with pytest.raises(ConfigError, match="no option 'draw' for a forecast. Did you mean 'draws'"):
        evaluate(forecast_of(labelled, [3], 2), labelled, draw=2)


def test_what_is_no_truth_is_named(dataset, labelled):
    for prediction in (Blowup(dataset.spec), forecast_of(labelled, [3], 2)):
        with pytest.raises(ConfigError, match="a str as truth"):
            evaluate(prediction, "truth.nc", leads=2)


def test_overlap_of_inputs_and_targets_is_refused(labelled):
    prediction = forecast_of(labelled, [3], 4)
    initial = prediction.assign_coords(lead=prediction["lead"] - np.timedelta64(1, "D"))
    with pytest.raises(SpecError, match=r"isel\(lead=slice"):
        evaluate(initial, labelled)
    with pytest.raises(SpecError, match="overlap"):
        evaluate(prediction, labelled, inputs=labelled.isel(time=slice(0, 6)))
    evaluate(prediction, labelled, inputs=labelled.isel(time=slice(0, 4)), metrics=("rmse",))
    plain = prediction.isel(trajectory=0).swap_dims(lead="time").drop_vars("lead")
    with pytest.raises(SpecError, match="inputs="):
        evaluate(plain, labelled)
    scores = evaluate(plain, labelled, inputs=labelled.isel(time=slice(0, 4)), metrics=("rmse",))
    assert_allclose(scores["score"].sel(metric="rmse"), 0, atol=1e-6)


def test_missing_truth_units_and_grid_are_refused(labelled):
    prediction = forecast_of(labelled, [362], 2)
    with pytest.raises(DataError, match=r"no frame at 2001-12-30.*covers"):
        evaluate(prediction, labelled.isel(time=slice(0, 363)))
    other = prediction.assign(slp=prediction["slp"].assign_attrs(units="hPa"))
    with pytest.raises(SpecError, match=r"'hPa'.*'Pa'"):
        evaluate(other, labelled)
    with pytest.raises(SpecError, match="longitude"):
        evaluate(prediction.isel(longitude=slice(0, 4)), labelled)
    with pytest.raises(DataError, match="none of the predicted variables"):
        evaluate(prediction.rename(slp="pressure"), labelled)


def test_diverged_forecast_is_scored_as_such(labelled):
    prediction = forecast_of(labelled, [3, 9], 3)
    prediction["slp"][1, 2] = np.nan
    scores = evaluate(prediction, labelled, metrics=("rmse",))
    assert_allclose(scores["finite"].sel(model="model"), [1, 1, 0.5])
    assert np.isnan(scores["score"].sel(metric="rmse")[..., 2]).all()
    assert np.isfinite(scores["score"].sel(metric="rmse")[..., :2]).all()


def test_labelled_climatology_gives_skill(labelled):
    days = xr.DataArray(np.arange(1, 367), dims="dayofyear", name="dayofyear")
    normal = (10.0 + days / 100).expand_dims(latitude=labelled["latitude"], longitude=labelled["longitude"])
    climatology = normal.to_dataset(name="slp").assign_coords(dayofyear=days).astype("float32")
    climatology["slp"].attrs["units"] = "Pa"
    prediction = forecast_of(labelled, [3, 200], 2, shift=0.5)
    scores = evaluate(prediction, labelled, climatology=climatology, floors=("climatology",), metrics=("skill", "rmse"))
    valid = labelled["slp"].values[[[4, 5], [201, 202]]]
    anomaly = valid - (10 + (np.array([[5, 6], [202, 203]])[:, :, None, None]) / 100)
    weights = np.cos(np.deg2rad(labelled["latitude"].values))[:, None] * np.ones(6)
    square = (anomaly**2).mean(0)
    expected = np.sqrt([np.average(square[lead], weights=weights) for lead in range(2)])
    assert_allclose(scores["score"].sel(model="climatology", metric="rmse", channel="slp"), expected, rtol=1e-5)
    assert_allclose(
        scores["score"].sel(model="model", metric="skill", channel="slp"), 1 - 0.25 / expected**2, rtol=1e-4
    )


# --- files ---------------------------------------------------------------------------------------------------------


def test_scores_survive_files(dataset, tmp_path):
    scores = evaluate_stepper(Blowup(dataset.spec, until=2), dataset, 3, starts=2, metrics=("rmse", "bias"))
    save_scores(scores, tmp_path)
    xr.testing.assert_identical(load_scores(tmp_path).drop_attrs(), scores.drop_attrs())
    plain = json.loads((tmp_path / "scores.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    rmse = plain["models"]["model"]["metrics"]["rmse"]["u"]["score"]
    assert_allclose(rmse[:2], scores["score"].sel(model="model", metric="rmse", channel="u")[:2])
    assert rmse[2] is None
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "model,metric,channel,unit,step,lead,score,low,high,spread"
    assert len(lines) == 1 + scores["score"].size == 1 + len(to_rows(scores))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "scores.json", "scores.nc"]


def test_damaged_scores_are_refused(tmp_path):
    with pytest.raises(DataError, match="physml evaluate"):
        load_scores(tmp_path)
    (tmp_path / "scores.nc").write_bytes(b"not netcdf")
    with pytest.raises(DataError, match="damaged"):
        load_scores(tmp_path)
    xr.Dataset({"x": 1}).to_netcdf(tmp_path / "other.nc")
    with pytest.raises(DataError, match="holds no scores"):
        load_scores(tmp_path / "other.nc")


def test_scores_of_other_splits_have_files_of_their_own(dataset, tmp_path):
    scores = evaluate_stepper(Blowup(dataset.spec), dataset, 2, starts=1, metrics=("rmse",))
    for split in ("test", "train"):
        save_scores(scores.assign_attrs(split=split), tmp_path)
    assert load_scores(tmp_path).attrs["split"] == "test"
    assert load_scores(tmp_path / "scores-train.nc").attrs["split"] == "train"
    names = ["metrics-train.csv", "metrics.csv", "scores-train.json", "scores-train.nc", "scores.json", "scores.nc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(DataError, match="cannot be written"):
        save_scores(scores, tmp_path / "scores.nc")


def test_failed_write_leaves_the_old_file(dataset, tmp_path, monkeypatch):
    scores = evaluate_stepper(Blowup(dataset.spec), dataset, 2, starts=1, metrics=("rmse",))
    save_scores(scores, tmp_path)
    before = (tmp_path / "scores.nc").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", fail)
    with pytest.raises(OSError, match="disk full"):
        save_scores(scores, tmp_path)
    assert (tmp_path / "scores.nc").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "scores.json", "scores.nc"]


# --- processes -----------------------------------------------------------------------------------------------------

WORKER = """
import sys, json, numpy as np, jax
from physml.parallel.mesh import start_distributed
start_distributed()
sys.path.insert(0, sys.argv[1])
from test_evaluate import Blowup, Trajectories
from physml.evaluate import evaluate_stepper
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.steppers.floors import PersistenceConfig
spec = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"),))
class Tiny:
    @staticmethod
    def window(spec, batch, frames):
        values = np.random.default_rng(0).standard_normal((batch, frames, 8, 1)).astype(np.float32)
        return Window.of(values, spec)
data = Trajectories(spec, Tiny)
shared = jax.process_count() > 1
scores = evaluate_stepper(PersistenceConfig().fit(data), data, 2, batch=4, metrics=("rmse",), processes=shared)
names = ("score", "score_low", "energy", "pairs")
print("SCORES", json.dumps([scores[name].values.tolist() for name in names]), flush=True)
class Noisy(Blowup):
    def advance(self, state, context):
        return state[0] + jax.random.normal(context.key, state[0].shape), state[1]
still = Trajectories(spec, Tiny, still=True)
noise = evaluate_stepper(
    Noisy(spec), still, 2, batch=4, metrics=("rmse",), processes=shared, per_start=True, key=jax.random.key(1)
)
print("DRAWS", json.dumps(noise["score_per_start"].values[..., -1, :].ravel().tolist()), flush=True)
"""


def test_every_process_needs_a_start(dataset, monkeypatch):
    """All refuse it, so that none waits for the others."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(ConfigError, match="2 starts for 3 processes"):
            evaluate_stepper(Blowup(dataset.spec), dataset, 2, starts=[(0, 1), (1, 1)], processes=True)


def test_two_processes_share_the_starts_and_agree():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    common = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    pair = {"PHYSML_COORDINATOR": f"127.0.0.1:{port}", "PHYSML_PROCESSES": "2", "PHYSML_TIMEOUT": "120"}
    command = [sys.executable, "-c", WORKER, str(pathlib.Path(__file__).parent)]
    settings = [common, *({**common, **pair, "PHYSML_PROCESS": str(number)} for number in range(2))]
    workers = [
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for env in settings
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:  # jax catches SIGTERM in a multi-process run
                worker.kill()
    found = [[line for line in output.splitlines() if line.startswith("SCORES ")] for output in outputs]
    assert all(len(lines) == 1 for lines in found), outputs
    alone, first, second = (json.loads(lines[0].removeprefix("SCORES ")) for lines in found)
    assert first == second
    for one, both in zip(alone, first):
        assert_allclose(both, one, rtol=1e-6)
    draws = [json.loads(line.removeprefix("DRAWS ")) for output in outputs for line in output.splitlines()
             if line.startswith("DRAWS ")]  # fmt: skip
    for found in (draws[0], draws[1] + draws[2]):  # the error of a still truth is the noise of its start
        finite = [value for value in found if np.isfinite(value)]
        assert len(set(finite)) == len(finite) > 10


@pytest.mark.parametrize("members", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_run_scores_the_members_that_its_evaluation_asks_for(tmp_path, members):
    """Of a stepper that draws random numbers."""
    data = SyntheticConfig(
        "burgers", points=16, steps=4, trajectories={"train": 2, "valid": 1, "test": 2}, options={"solver_points": 32},
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    experiment = Experiment(
        data=data, model=FNOConfig(modes=(2,), width=4, depth=1), stepper=RefinerConfig(), objective=Denoising(),
        training=TrainingConfig(steps=1, batch=4), evaluation=Evaluation(steps=2, members=members, floors=()),
    )  # fmt: skip
    scores = api.train(experiment, folder=tmp_path / "runs").scores
    assert ("crps_fair" in scores["metric"]) == bool(members)
