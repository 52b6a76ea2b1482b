"""Evaluation in blocks: the cut does not matter, labels decide what meets what, memory does not grow with the data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import open_dataset
from physml.data.axes import area_weights
from physml.errors import ConfigError, DataError, DependencyError, SpecError
from physml.evaluate import blocks, evaluate

HOUR = np.timedelta64(3_600_000_000_000, "ns")
ADDITIVE = ("acc", "bias", "correlation", "mae", "nrmse", "rmse", "skill", "vrmse")
KEPT = ("score", "score_low", "score_high", "score_spread", "mean", "energy", "finite", "pairs", "correlation_time")


def made(times=40, latitudes=8, longitudes=12, seed=0):
    """Six-hourly truth with a surface field and one on two levels; latitude descending, longitude 0..360."""
    rng = np.random.default_rng(seed)
    time = np.datetime64("2020-12-28", "ns") + 6 * HOUR * np.arange(times)
    coords = {
        "time": time,
        "level": ("level", [500, 850], {"units": "hPa"}),
        "latitude": ("latitude", np.linspace(80, -80, latitudes), {"units": "degrees_north"}),
        "longitude": ("longitude", np.arange(longitudes) * 360 / longitudes, {"units": "degrees_east"}),
    }
    noise = rng.standard_normal((times, 3, latitudes, longitudes)).astype(np.float32)
    return xr.Dataset(
        {
            "t2m": (("time", "latitude", "longitude"), 280 + 10 * noise[:, 0], {"units": "K"}),
            "z": (("time", "level", "latitude", "longitude"), 5e4 + 500 * noise[:, 1:], {"units": "m**2 s**-2"}),
        },
        coords,
    )


def forecast_of(truth, starts=(0, 2, 3, 9, 20, 21), leads=5, error=1.0, seed=1):
    """Truth plus noise that grows with lead, as `(init_time, prediction_timedelta, ...)`."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, leads + 1)
    index = xr.DataArray(np.asarray(starts)[:, None] + steps, dims=("init_time", "prediction_timedelta"))
    ds = truth.drop_vars("time").isel(time=index)
    for name, scale in (("t2m", 1.0), ("z", 50.0)):
        noise = rng.standard_normal(ds[name].shape) * steps.reshape(-1, *(1,) * (ds[name].ndim - 2))
        ds[name] = ds[name] + (error * scale * noise).astype(np.float32)
        ds[name].attrs = truth[name].attrs
    return ds.assign_coords(init_time=truth["time"].values[list(starts)], prediction_timedelta=steps * 6 * HOUR)


def climatology_of(truth):
    rng = np.random.default_rng(5)
    normal = truth.isel(time=0, drop=True).expand_dims(hour=[0, 6, 12, 18], dayofyear=np.arange(1, 367))
    return normal.map(lambda v: (v + rng.standard_normal(v.shape)).astype(np.float32), keep_attrs=True)


def value(scores, metric, channel="t2m", model="model"):
    return scores["score"].sel(model=model, metric=metric, channel=channel).values


def area_mean(field):
    """Mean of `(..., latitude, longitude)` on the grid of `made`."""
    return np.average(field.mean(-1), axis=-1, weights=area_weights(np.linspace(80, -80, field.shape[-2])))


@pytest.fixture(scope="module")
def truth():
    return made()


@pytest.fixture(scope="module")
def prediction(truth):
    return forecast_of(truth)


# --- the cut does not matter -----------------------------------------------------------------------------------------

CUTS = {
    "one start": {"init_time": 1},
    "leads": {"prediction_timedelta": 2, "init_time": 4},
    "latitude": {"latitude": 3},
    "tiles": {"init_time": 2, "prediction_timedelta": 3, "level": 1, "latitude": 5, "longitude": 7},
}


@pytest.mark.parametrize("metrics", [ADDITIVE, None], ids=["sums", "all"])
def test_scores_do_not_depend_on_the_chunks(truth, prediction, metrics, monkeypatch):
    climatology = climatology_of(truth)
    options = {"metrics": metrics, "climatology": climatology, "floors": ("persistence", "climatology"), "draws": 20}
    whole = evaluate(prediction, truth, **options)
    monkeypatch.setattr(blocks, "BLOCK", 2000 if metrics else 8000)  # bytes: blocks keep the length of the chunks
    for cut in CUTS.values() if metrics else [CUTS["tiles"]]:  # what compares whole frames is compiled for each shape
        pieces = truth.chunk({"time": 7, "longitude": 5, "level": 1})
        found = evaluate(prediction.chunk(cut), pieces, **{**options, "climatology": climatology.chunk(dayofyear=50)})
        for name in (*KEPT, *(["spectrum"] if metrics is None else [])):
            # Sums are float64; what compares whole frames (h1, spectra) is float32 and in other batches.
            loose = name == "spectrum"
            assert_allclose(found[name], whole[name], rtol=1e-5 if loose else 1e-6, atol=1e-6, err_msg=name)
    assert set(map(str, whole["metric"].values)) >= set(ADDITIVE)


def test_a_climatology_without_labels_begins_on_the_first_of_january(truth, prediction):
    climatology = climatology_of(truth)
    plain = climatology.drop_vars(["hour", "dayofyear"])
    found, expected = (
        evaluate(prediction, truth, climatology=c, metrics=("acc",), draws=1) for c in (plain, climatology)
    )
    assert_array_equal(found["score"], expected["score"])


def test_blocks_follow_chunks_and_cover_everything_once(truth, prediction, monkeypatch):
    seen = []
    monkeypatch.setattr(blocks, "BLOCK", 4000)
    original = blocks.plan

    def spy(work, *options):
        seen.append(original(work, *options))
        return seen[-1]

    monkeypatch.setattr(sys.modules["physml.evaluate.forecasts"], "plan", spy)
    evaluate(prediction.chunk(init_time=2, latitude=4), truth, metrics=("rmse",))
    plan, count = seen[0], np.zeros((6, 5, 3, 8, 12))
    for block in plan:
        count[np.ix_(*(np.arange(n)[s] for n, s in ((6, block.starts), (5, block.leads))), block.channels,
                     *(np.arange(n)[s] for n, s in zip((8, 12), block.tile)))] += 1  # fmt: skip
    assert (count == 1).all()
    assert all(block.starts.start % 2 == 0 for block in plan)
    assert max((b.starts.stop - b.starts.start) * (b.leads.stop - b.leads.start) * 96 * 4 for b in plan) <= 4000


def test_scores_equal_plain_numpy(truth, prediction):
    climatology = climatology_of(truth)
    scores = evaluate(prediction, truth, climatology=climatology, metrics=("rmse", "mae", "bias", "acc"))
    assert scores["score"].dims == ("model", "metric", "channel", "lead")
    assert scores["channel"].values.tolist() == ["t2m", "z_500", "z_850"]
    assert scores["unit"].values.tolist() == ["K", "m2 s-2", "m2 s-2"]
    index = np.array([0, 2, 3, 9, 20, 21])[:, None] + np.arange(1, 6)
    valid = truth["time"].values[index]
    for channel, pick in (("t2m", ("t2m", {})), ("z_850", ("z", {"level": 850}))):
        name, at = pick
        p = prediction[name].sel(at).values.astype(float)
        t = truth[name].sel(at).values.astype(float)[index]
        date = xr.DataArray(valid, dims=("a", "b")).dt
        c = climatology[name].sel(at).sel(hour=date.hour, dayofyear=date.dayofyear).transpose("a", "b", ...).values
        assert_allclose(value(scores, "rmse", channel), np.sqrt(area_mean((p - t) ** 2).mean(0)), rtol=2e-7)
        assert_allclose(value(scores, "mae", channel), area_mean(np.abs(p - t)).mean(0), rtol=2e-7)
        assert_allclose(value(scores, "bias", channel), area_mean(p - t).mean(0), rtol=1e-6)
        a, b = p - c, t - c
        acc = area_mean(a * b) / np.sqrt(area_mean(a**2) * area_mean(b**2))
        assert_allclose(value(scores, "acc", channel), acc.mean(0), rtol=1e-6)


# --- what meets what -------------------------------------------------------------------------------------------------


def test_space_is_aligned_by_coordinate(truth, prediction):
    expected = evaluate(prediction, truth, metrics=("rmse",))["score"]
    turned = prediction.assign_coords(longitude=(prediction["longitude"] + 180) % 360 - 180).sortby("longitude")
    turned["longitude"].attrs["units"] = "degrees_east"
    turned = turned.sortby("latitude").transpose("init_time", "prediction_timedelta", "longitude", "latitude", "level")
    assert_allclose(evaluate(turned, truth, metrics=("rmse",))["score"], expected, rtol=1e-12)
    shifted = prediction.assign_coords(longitude=prediction["longitude"] + 4)
    shifted["longitude"].attrs["units"] = "degrees_east"
    with pytest.raises(SpecError, match="longitude"):
        evaluate(shifted, truth)
    with pytest.raises(SpecError, match="latitude"):
        evaluate(prediction.isel(latitude=slice(4)), truth)


@pytest.mark.parametrize(
    ("start", "lead"), [("time", "prediction_timedelta"), ("init_time", "lead_time"), ("trajectory", "lead")]
)
def test_names_of_starts_and_leads(truth, prediction, start, lead):
    expected = evaluate(prediction, truth, metrics=("rmse",))
    other = prediction.rename(init_time=start, prediction_timedelta=lead)
    if start == "trajectory":
        other = other.drop_vars("trajectory").assign_coords(initial_time=("trajectory", other["trajectory"].values))
    assert_allclose(evaluate(other, truth, metrics=("rmse",))["score"], expected["score"])
    hours = other.assign_coords({lead: (lead, np.arange(6, 31, 6), {"units": "hours"})})
    found = evaluate(hours, truth, metrics=("rmse",))
    assert_allclose(found["score"], expected["score"])
    assert found["lead"].values[0] == 6 * HOUR
    with pytest.raises(DataError, match="duration was expected"):
        evaluate(other.assign_coords({lead: np.arange(6, 31, 6)}), truth)


def test_times_that_the_truth_lacks_are_left_out_and_counted(truth, prediction):
    few = truth.isel(time=slice(0, 24))  # the starts 20 and 21 reach frames 21..26
    scores = evaluate(prediction, few, metrics=("rmse",))
    assert scores.attrs["pairs_left_out"] == 2 + 3
    assert scores.attrs["starts_left_out"] == 0
    assert scores["pairs"].values.tolist() == [6, 6, 5, 4, 4]
    for lead, kept in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3])):
        alone = evaluate(prediction.isel(init_time=kept), truth, metrics=("rmse",))
        assert_allclose(value(scores, "rmse")[lead], value(alone, "rmse")[lead], rtol=1e-6)
    short = evaluate(prediction, truth.isel(time=slice(0, 4)), metrics=("rmse",))
    assert (short.attrs["starts_left_out"], short.attrs["leads_left_out"]) == (4, 2)
    assert short.sizes["lead"] == 3
    with pytest.raises(DataError, match="no frame at 2020-12-28"):
        evaluate(prediction, truth.isel(time=slice(30, 40)))
    # Half-way leads of a forecast that is finer in time than the truth.
    finer = prediction.assign_coords(prediction_timedelta=np.arange(1, 6) * 3 * HOUR)
    found = evaluate(finer, truth, metrics=("rmse",))
    assert found["lead"].values.tolist() == [6 * HOUR, 12 * HOUR]
    assert found.attrs["leads_left_out"] == 3


def test_levels_and_fields_without_truth_are_named(truth, prediction):
    scores = evaluate(prediction, truth[["z"]].sel(level=[850]), metrics=("rmse",))
    assert scores["channel"].values.tolist() == ["z_850"]
    assert scores.attrs["channels_left_out"] == "t2m, z_500"
    # Levels as fields of their own, as `physml.forecast` writes them beside fields without levels.
    split = prediction[["t2m"]].assign({f"z_{p}": prediction["z"].sel(level=p, drop=True) for p in (500, 850)})
    expected = evaluate(prediction, truth, metrics=("rmse",))
    assert_allclose(evaluate(split, truth, metrics=("rmse",))["score"], expected["score"])
    with pytest.raises(DataError, match="none of these levels"):
        evaluate(prediction[["z"]].sel(level=[500]), truth.sel(level=[850]))


def test_wrong_times_are_refused(truth, prediction):
    starts = prediction["init_time"].values.copy()
    starts[2] = np.datetime64("NaT")
    with pytest.raises(DataError, match="NaT"):
        evaluate(prediction.assign_coords(init_time=starts), truth)
    with pytest.raises(SpecError, match="no time of its starts"):
        evaluate(prediction.drop_vars("init_time"), truth)
    with pytest.raises(SpecError, match="do not ascend"):
        evaluate(prediction.isel(prediction_timedelta=[1, 0]), truth)
    with pytest.raises(SpecError, match="holds no frames"):
        evaluate(prediction.isel(init_time=slice(0)), truth)
    with pytest.raises(SpecError, match="each could be that of its starts"):
        evaluate(prediction.expand_dims(sample=2), truth)
    with pytest.raises(ConfigError, match="at least one start"):
        evaluate(prediction, truth, batch=0)
    with pytest.raises(ConfigError, match="which is taken"):
        evaluate({"persistence": prediction}, truth, floors=("persistence",))


def test_one_mean_state_is_the_climatology_of_every_season(truth, prediction):
    climatology = climatology_of(truth)
    mean = climatology.mean(("dayofyear", "hour"))
    same = mean + 0 * climatology
    options = {"metrics": ("acc", "rmse"), "floors": ("climatology",), "draws": 20}
    expected = evaluate(prediction, truth, climatology=same, **options)
    single = mean.expand_dims("trajectory")  # as `open_dataset` reads a file of one state
    for forecast, state in ((prediction, mean), (prediction.chunk(init_time=1), single)):
        found = evaluate(forecast, truth, climatology=state, **options)
        assert_allclose(found["score"], expected["score"], rtol=1e-5, atol=1e-6)
    with pytest.raises(SpecError, match="2 trajectories"):
        evaluate(prediction, truth, climatology=xr.concat([single, single], "trajectory"), **options)
    assert np.isfinite(expected["score"].sel(metric="acc", model="model")).all()


def test_climatology_is_found_by_label(truth, prediction):
    climatology = climatology_of(truth)
    expected = evaluate(prediction, truth, climatology=climatology, metrics=("acc",))["score"]
    shuffled = climatology.isel(hour=[2, 0, 3, 1])
    assert_allclose(evaluate(prediction, truth, climatology=shuffled, metrics=("acc",))["score"], expected)
    with pytest.raises(DataError, match="no hour 6"):
        evaluate(prediction, truth, climatology=climatology.sel(hour=[0, 12]), metrics=("acc",))
    with pytest.raises(SpecError, match="366 were expected"):
        evaluate(prediction, truth, climatology=climatology.isel(dayofyear=slice(365)), metrics=("acc",))
    with pytest.raises(DataError, match="z has levels 850 hPa; 500 is missing"):
        evaluate(prediction, truth, climatology=climatology.sel(level=[850]), metrics=("acc",))


# --- missing values, ensembles, precipitation ------------------------------------------------------------------------


def test_missing_truth_is_left_out_with_its_weight(truth, prediction):
    holes = truth.copy(deep=True)
    rng = np.random.default_rng(7)
    where = rng.random(holes["t2m"].shape) < 0.3  # other cells in every frame
    holes["t2m"] = holes["t2m"].where(~where)
    holes["t2m"][3] = np.nan  # a frame without any
    scores = evaluate(prediction, holes, metrics=("rmse", "bias"))
    index = np.array([0, 2, 3, 9, 20, 21])[:, None] + np.arange(1, 6)
    error = prediction["t2m"].values.astype(float) - holes["t2m"].values[index]
    weights = area_weights(truth["latitude"].values)[:, None] * np.isfinite(error)
    with np.errstate(invalid="ignore"):
        frames = (weights * np.nan_to_num(error) ** 2).sum((-1, -2)) / weights.sum((-1, -2))
    assert_allclose(value(scores, "rmse"), np.sqrt(np.nanmean(frames, 0)), rtol=1e-6)
    assert_allclose(scores["finite"], 1)
    assert np.isfinite(value(scores, "rmse", "z_500")).all()
    assert scores["pairs"].values.tolist() == [6] * 5  # z counts there
    gap = truth.copy(deep=True)
    gap["t2m"][10, 0, 0] = np.nan  # in one frame, that of the start 9 at the first lead: it has no spectrum
    names = ("h1", "log_spectral_error", "rmse")
    found, others = evaluate(prediction, gap, metrics=names), prediction.isel(init_time=[0, 1, 2, 4, 5])
    spectral = value(evaluate(others, truth, metrics=names), "log_spectral_error")[0]
    assert_allclose(value(found, "log_spectral_error")[0], spectral, rtol=1e-4)
    whole = value(evaluate(prediction, truth, metrics=names), "h1")
    assert_allclose(value(found, "h1")[1:], whole[1:], rtol=1e-5)
    assert_allclose(value(found, "h1")[0], whole[0], rtol=0.05)  # a cell of 96 and its neighbors in one of six frames
    with pytest.raises(DataError, match="'t2m' is missing"):
        evaluate(prediction, truth.assign(t2m=truth["t2m"] * np.nan))
    spoiled = truth.copy(deep=True)
    spoiled["t2m"][4, 1, 2] = np.inf
    with pytest.raises(DataError, match="'t2m' is infinite"):
        evaluate(prediction, spoiled)


LABELS = [30, 10, 20]


def trajectories(times=8, labels=LABELS):
    """Truth of three trajectories, and a forecast of its frames 1 to 4 that is off by 1, 2 and 3."""
    values = np.random.default_rng(0).standard_normal((3, times, 16)).astype(np.float32) * 10
    space, offset = {"x": np.arange(16) / 16}, np.array([1, 2, 3], np.float32).reshape(3, 1, 1)
    dims = ("trajectory", "time", "x")
    truth = xr.Dataset({"u": (dims, values)}, {"time": np.arange(times) * 1.0, **space})
    fields = xr.Dataset({"u": (("trajectory", "lead", "x"), values[:, 1:5] + offset)}, space)
    fields = fields.assign_coords(lead=np.arange(1, 5) * 1.0, time=("lead", np.arange(1, 5) * 1.0))
    return (ds if labels is None else ds.assign_coords(trajectory=labels) for ds in (truth, fields))


@pytest.mark.parametrize("order", [[2, 0, 1], [1], [2, 0], [1, 1, 0]])
def test_trajectories_meet_by_label(order, tmp_path):
    truth, ahead = trajectories()
    mean = np.mean(np.array([1, 2, 3])[order])
    part = ahead.isel(trajectory=order)
    options = {"metrics": ("bias", "mae"), "floors": ("persistence",)}
    scores = evaluate(part, truth, **options)
    assert_allclose(value(scores, "bias", "u"), mean, rtol=1e-5)
    last = truth["u"].values[order, 0][:, None]
    expected = np.abs(truth["u"].values[order, 1:5] - last).mean((0, 2))
    assert_allclose(value(scores, "mae", "u", "persistence"), expected, rtol=1e-5)
    truth.to_netcdf(tmp_path / "truth.nc")
    stored = evaluate(part.chunk(trajectory=1, lead=2), open_dataset(tmp_path / "truth.nc"), **options)
    assert_allclose(stored["score"], scores["score"], rtol=1e-6)
    turned = evaluate(part, truth.isel(trajectory=[2, 1, 0]), **options)
    assert_allclose(turned["score"], scores["score"], rtol=1e-6)


def test_one_trajectory_keeps_its_label_without_a_dimension():
    truth, ahead = trajectories()
    alone = ahead.isel(trajectory=2)
    assert_allclose(value(evaluate(alone, truth, metrics=("bias",)), "bias", "u"), 3, rtol=1e-5)
    assert_allclose(value(evaluate(alone, truth.isel(trajectory=2), metrics=("bias",)), "bias", "u"), 3, rtol=1e-5)
    with pytest.raises(SpecError, match=r"holds the trajectories \[20\], which the truth lacks: it has \[10\]"):
        evaluate(alone, truth.isel(trajectory=1))


def test_trajectories_without_labels_meet_by_position():
    truth, ahead = trajectories(labels=None)
    for labels in ({}, {"trajectory": LABELS}):
        for pair in ((ahead.assign_coords(labels), truth), (ahead, truth.assign_coords(labels))):
            assert_allclose(value(evaluate(*pair, metrics=("bias",)), "bias", "u"), 2, rtol=1e-5)
    same = evaluate(ahead.assign_coords(trajectory=[1, 1, 1]), truth.assign_coords(trajectory=[1, 1, 2]))
    assert_allclose(value(same, "bias", "u"), 2, rtol=1e-5)
    with pytest.raises(SpecError, match="has 2 trajectories, but the truth has 3"):
        evaluate(ahead.isel(trajectory=[0, 1]), truth)


def test_labels_that_the_truth_lacks_are_named():
    truth, ahead = trajectories()
    for known in ([0], [0, 1]):
        with pytest.raises(SpecError, match=r"the trajectories \[.*20\], which the truth lacks.*drop_vars"):
            evaluate(ahead, truth.isel(trajectory=known))
    unlabelled = evaluate(ahead.drop_vars("trajectory"), truth, metrics=("bias",))
    assert_allclose(value(unlabelled, "bias", "u"), 2, rtol=1e-5)
    with pytest.raises(SpecError, match="trajectories in different order"):
        evaluate({"a": ahead, "b": ahead.isel(trajectory=[2, 1, 0])}, truth)


@pytest.mark.parametrize("member", ["member", "realization", "number"])
def test_ensembles_are_scored(truth, member):
    parts = [forecast_of(truth, seed=seed).astype(np.float32) for seed in range(4)]
    ensemble = xr.concat(parts, member).transpose("init_time", member, ...)
    names = ("crps", "crps_fair", "rmse", "spread", "spread_skill", "acc")
    options = {"metrics": names, "climatology": climatology_of(truth)}
    scores = evaluate(ensemble, truth, **options)
    assert scores.attrs["members"] == "model: 4"
    index = np.array([0, 2, 3, 9, 20, 21])[:, None] + np.arange(1, 6)
    x, y = np.stack([p["t2m"].values for p in parts]).astype(float), truth["t2m"].values[index].astype(float)
    pairs = np.abs(x[:, None] - x[None]).mean((0, 1))
    distance = np.abs(x - y).mean(0)
    assert_allclose(value(scores, "crps"), area_mean(distance - pairs / 2).mean(0), rtol=1e-6)
    assert_allclose(value(scores, "crps_fair"), area_mean(distance - pairs * 4 / 3 / 2).mean(0), rtol=1e-6)
    assert_allclose(value(scores, "spread"), np.sqrt(area_mean(x.var(0, ddof=1)).mean(0)), rtol=1e-6)
    assert_allclose(value(scores, "rmse"), np.sqrt(area_mean((x.mean(0) - y) ** 2).mean(0)), rtol=1e-6)
    expected = value(scores, "spread") / value(scores, "rmse") * np.sqrt(5 / 4)
    assert_allclose(value(scores, "spread_skill"), expected, rtol=1e-6)
    pieces = evaluate(ensemble.chunk({member: 1, "latitude": 3, "init_time": 2}), truth.chunk(time=3), **options)
    assert_allclose(pieces["score"], scores["score"], rtol=1e-6)
    ranks = scores["rank_histogram"].sel(model="model", channel="t2m")
    for rank in range(5):
        expected = area_mean(((x < y).sum(0) == rank).astype(float)).mean(0)
        assert_allclose(ranks.sel(rank=rank), expected, rtol=1e-6)
    assert_allclose(pieces["rank_histogram"], scores["rank_histogram"], rtol=1e-6)
    both = evaluate({"ensemble": ensemble, "one": parts[0]}, truth, metrics=("crps", "mae", "spread"))
    assert_allclose(value(both, "crps", model="one"), value(both, "mae", model="one"))
    assert np.isnan(value(both, "spread", model="one")).all()
    assert np.isnan(both["rank_histogram"].sel(model="one")).all()
    assert "rank_histogram" not in evaluate(parts[0], truth, metrics=("rmse",))
    with pytest.raises(ConfigError, match="no prediction has a dimension of two members"):
        evaluate(parts[0], truth, metrics=("crps",))


def test_a_single_start_may_be_an_ensemble(truth):
    alone = forecast_of(truth).isel(init_time=0).expand_dims(number=3)
    scores = evaluate(alone, truth, metrics=("rmse", "spread"))
    assert scores.attrs["starts"] == 1
    assert_allclose(value(scores, "spread"), 0, atol=1e-6)


def test_seeps_of_labelled_precipitation(truth):
    rng = np.random.default_rng(0)
    rain = xr.where(rng.random(truth["t2m"].shape) < 0.5, 0.0, 0.01 * truth["t2m"] / 280)
    observed = truth[["t2m"]].assign(tp=rain.astype(np.float32).assign_attrs(units="m"))
    prediction = forecast_of(truth)[["t2m"]]
    index = np.array([0, 2, 3, 9, 20, 21])[:, None] + np.arange(1, 6)
    prediction["tp"] = prediction["t2m"].dims, np.zeros_like(prediction["t2m"].values), {"units": "m"}
    season = {"hour": [0, 6, 12, 18], "dayofyear": np.arange(1, 367)}
    one = xr.ones_like(truth["t2m"].isel(time=0, drop=True)).expand_dims(season)
    climatology = xr.Dataset({"tp_seeps_threshold": 0.01 * one, "tp_seeps_dry_fraction": 0.5 * one})
    scores = evaluate(prediction, observed, climatology=climatology, metrics=("seeps", "rmse"))
    seen = observed["tp"].values[index]
    threshold = np.float32(0.01)
    expected = np.where(seen < 0.25e-3, 0, np.where(seen < threshold, 0.5 / 0.5, 0.5 * 4 / 0.5))
    assert_allclose(value(scores, "seeps", "tp"), area_mean(expected).mean(0), rtol=1e-5)
    assert np.isnan(value(scores, "seeps", "t2m")).all()
    cut = evaluate(
        prediction.chunk(init_time=1, latitude=3), observed, climatology=climatology.chunk(dayofyear=100),
        metrics=("seeps",),
    )  # fmt: skip
    assert_allclose(value(cut, "seeps", "tp"), value(scores, "seeps", "tp"), rtol=1e-6)
    with pytest.raises(ConfigError, match="NAME_seeps_threshold"):
        evaluate(prediction, observed, metrics=("seeps",))


# --- WeatherBench 2 --------------------------------------------------------------------------------------------------


def test_weatherbench_samples_give_the_verified_scores():
    """Values that weatherbench2.metrics gave for these samples."""
    folder = Path(__file__).parent / "data" / "samples" / "weatherbench2"
    prediction = open_dataset(folder / "forecast_2020-16x8.zarr").isel(lead=slice(1, None))
    truth = open_dataset(folder / "2020-6h-16x8_equiangular_conservative.zarr")
    climatology = open_dataset(folder / "1990-2019_6h_16x8_equiangular_conservative.zarr")
    options = {"climatology": climatology, "metrics": ("rmse", "acc")}
    scores = evaluate(prediction, truth, **options)
    assert scores["channel"].values.tolist() == ["2m_temperature", "geopotential_500", "geopotential_850"]
    assert_allclose(value(scores, "rmse", "2m_temperature"), [0.5, 1, 1.5], rtol=1e-5)
    expected = {
        "2m_temperature": [0.99940169, 0.99914771],
        "geopotential_500": [0.99999995, 0.99999996],
        "geopotential_850": [0.99999994, 0.99999994],
    }
    for start in range(2):
        alone = evaluate(prediction.isel(trajectory=[start]), truth, **options)
        for channel, acc in expected.items():
            assert_allclose(value(alone, "acc", channel)[0], acc[start], atol=1.2e-8)
    raw = xr.open_zarr(folder / "forecast_2020-16x8.zarr", chunks=None).isel(prediction_timedelta=slice(1, None))
    assert_allclose(evaluate(raw, truth, **options)["score"], scores["score"])


def test_weatherbench_ensembles_are_read_and_scored(tmp_path):
    folder = Path(__file__).parent / "data" / "samples" / "weatherbench2"
    plain = (
        xr.open_zarr(folder / "forecast_2020-16x8.zarr", chunks=None).isel(prediction_timedelta=slice(1, None)).load()
    )
    ensemble = xr.concat([plain - 1, plain + 1], "number", join="exact").assign_coords(number=[0, 1])
    for name in plain.data_vars:
        ensemble[name].attrs = plain[name].attrs
    for variable in ensemble.variables.values():
        variable.encoding.clear()
    ensemble.to_zarr(tmp_path / "ensemble.zarr", zarr_format=2, consolidated=True)
    prediction = open_dataset(tmp_path / "ensemble.zarr")
    assert prediction["2m_temperature"].dims[:3] == ("trajectory", "member", "lead")
    truth = open_dataset(folder / "2020-6h-16x8_equiangular_conservative.zarr")
    scores = evaluate(prediction, truth, metrics=("rmse", "spread", "crps"))
    assert_allclose(value(scores, "rmse", "2m_temperature"), [0.5, 1, 1.5], rtol=1e-4)
    assert_allclose(value(scores, "spread", "geopotential_500"), np.sqrt(2), rtol=1e-4)
    # Members at e - 1 and e + 1 from the truth: mean distance max(e, 1), half their mean distance 1 / 2.
    assert_allclose(value(scores, "crps", "2m_temperature"), [0.5, 0.5, 1], rtol=1e-4)


# --- schedulers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, truth, prediction):
    truth.chunk(time=8).to_zarr(tmp_path / "truth.zarr", zarr_format=3, consolidated=False)
    prediction.chunk(init_time=2).to_zarr(tmp_path / "forecast.zarr", zarr_format=3, consolidated=False)
    return [xr.open_zarr(tmp_path / name, consolidated=False) for name in ("forecast.zarr", "truth.zarr")]


def test_other_processes_read_for_themselves(stored, monkeypatch):
    """What a block needs travels: the same pickles go to the workers of a cluster."""
    monkeypatch.setattr(blocks, "BLOCK", 30_000)
    here = evaluate(*stored, metrics=ADDITIVE[1:5], scheduler="synchronous")
    there = evaluate(*stored, metrics=ADDITIVE[1:5], scheduler="processes")
    assert_allclose(there["score"], here["score"], rtol=1e-12)


def test_a_cluster_gives_the_same_scores(stored, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(blocks, "BLOCK", 8000)
    here = evaluate(*stored, metrics=ADDITIVE[1:5])
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        there = evaluate(*stored, metrics=ADDITIVE[1:5], scheduler=cluster.scheduler_address)
        with pytest.raises(DataError, match="no frame at"):
            evaluate(stored[0], stored[1].isel(time=slice(30, 40)), scheduler=cluster.scheduler_address)
    assert_allclose(there["score"], here["score"], rtol=1e-12)


def test_unknown_schedulers_are_refused(truth, prediction, monkeypatch):
    with pytest.raises(ConfigError, match="address of a dask.distributed scheduler"):
        evaluate(prediction, truth, scheduler="slurm")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DependencyError, match=r"pip install 'dask\[distributed\]'"):
        evaluate(prediction, truth, metrics=("rmse",), scheduler="tcp://127.0.0.1:1")


def test_damaged_chunks_are_named(stored, tmp_path):
    chunk = next(path for path in (tmp_path / "forecast.zarr" / "t2m" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(b"not a chunk")
    with pytest.raises(DataError, match="'t2m' cannot be read"):
        evaluate(*stored, metrics=("rmse",))


# --- memory ----------------------------------------------------------------------------------------------------------

HUNGRY = """
import json, resource, sys
import dask.array, numpy as np, xarray as xr
from physml.evaluate import blocks, evaluate
blocks.BLOCK = 2**22
starts = int(sys.argv[1])
hour = np.timedelta64(3600, "s").astype("timedelta64[ns]")
def field(shape, chunks, dims, value):
    return xr.Variable(dims, dask.array.full(shape, value, chunks=chunks, dtype=np.float32), {"units": "K"})
space = {"latitude": ("latitude", np.linspace(-89, 89, 90), {"units": "degrees_north"}),
         "longitude": ("longitude", np.arange(180) * 2.0, {"units": "degrees_east"})}
time = np.datetime64("2020-01-01", "ns") + 6 * hour * np.arange(starts + 10)
truth = xr.Dataset({"t": field((starts + 10, 90, 180), (16, 90, 180), ("time", "latitude", "longitude"), 1)},
                   {"time": time, **space})
dims = ("init_time", "prediction_timedelta", "latitude", "longitude")
lead = np.arange(1, 11) * 6 * hour
forecast = xr.Dataset({"t": field((starts, 10, 90, 180), (4, 10, 90, 180), dims, 3)},
                      {"init_time": time[:starts], "prediction_timedelta": lead, **space})
small = evaluate(forecast.isel(init_time=slice(8)), truth, metrics=("rmse", "mae"))  # loads what any evaluation loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = evaluate(forecast, truth, metrics=("rmse", "mae"))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("MEMORY", json.dumps([before, after, forecast.nbytes + truth.nbytes, float(scores["score"][0, 0, 0, 0])]))
"""


def measured(starts):
    done = subprocess.run([sys.executable, "-c", HUNGRY, str(starts)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEMORY "))
    before, after, size, score = json.loads(line.removeprefix("MEMORY "))
    return before / 1024, after / 1024, size / 2**20, score


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data():
    """Ten times the data, 1.4 GB of it: the peak is nearly the same."""
    _, small, size, _ = measured(200)
    _, large, ten, score = measured(2000)
    assert ten > 9 * size
    assert ten > 1300  # MiB
    assert score == 2
    assert large < small + 100, (small, large)
