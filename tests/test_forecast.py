"""Forecasts of steppers whose every frame is known: labels, streaming, early stops, and what is refused."""

import importlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import open_dataset, spec_of
from physml.errors import ConfigError, DataError, DivergedError, SpecError
from physml.forecast import forecast
from physml.forecast.resume import MARK
from physml.normalize import Normalizer
from physml.rollout import rollout
from physml.steppers import FLOORS, STEPPERS, DirectConfig, ResidualConfig, stack_members

run = importlib.import_module("physml.forecast.run")


class Shift(nnx.Module):
    """Advection by one cell eastward per step, plus forcing, plus noise; may put a value at one place and time."""

    def __init__(self, spec, history=1, noise=0.0, breaks=()):
        self.spec, self.history, self.noise, self.breaks = spec, history, noise, breaks

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        state = jnp.roll(state, 1, axis=2)
        if self.spec.forcing:
            state = state + context.forcing
        if self.noise:
            state = state + self.noise * jax.random.normal(context.key, state.shape)
        for sample, step, place, value in self.breaks:
            now = jnp.isclose(context.time[sample], (step + self.history - 1) * self.spec.time_step)
            state = jnp.where(now, state.at[(sample, *place)].set(value), state)
        return state

    def decode(self, state):
        return state


class Scaled(Shift):
    """The same, times a number at every step."""

    def __init__(self, spec, factor, noise=0.0):
        super().__init__(spec, noise=noise)
        self.factor = nnx.Param(jnp.float32(factor))

    def advance(self, state, context):
        return self.factor[...] * super().advance(state, context)


def grid_data(times=4, trajectories=2, seed=0, names=("u",), start="2003-12-30", **dims):
    """Daily fields on a small globe, latitude descending as in many files."""
    random = np.random.default_rng(seed)
    latitude, longitude = np.linspace(60, -60, 5), np.arange(8) * 45.0
    shape = (trajectories, times, 5, 8)
    dates = np.datetime64(start, "ns") + np.arange(times) * np.timedelta64(1, "D")
    return xr.Dataset(
        {
            name: (("trajectory", "time", "latitude", "longitude"), random.standard_normal(shape).astype("f4") + 3,
                   {"units": "m s-1", "long_name": f"wind {name}"})
            for name in names
        },
        {
            "time": dates,
            "latitude": ("latitude", latitude, {"units": "degrees_north"}),
            "longitude": ("longitude", longitude, {"units": "degrees_east"}),
        },
        {"title": "winds"},
    )  # fmt: skip


@pytest.fixture
def data():
    return grid_data()


@pytest.fixture
def stepper(data):
    return Shift(spec_of(data))


def expected(data, steps):
    last = data.u.isel(time=-1).values
    return np.stack([np.roll(last, step + 1, axis=-1) for step in range(steps)], axis=1)


def fields(result):
    return result[[name for name in result.data_vars if not str(name).startswith(("ledger_", "steps_"))]]


def test_labels_come_back(data, stepper):
    result = forecast(stepper, data, 5)
    assert result.u.dims == ("trajectory", "lead", "latitude", "longitude")
    assert_array_equal(result.u, expected(data, 5))
    assert_array_equal(result.latitude, data.latitude)  # descending, as it came
    assert result.u.attrs == data.u.attrs
    assert result.latitude.attrs == data.latitude.attrs
    assert_array_equal(result.lead, np.arange(1, 6) * np.timedelta64(86400, "s"))
    assert_array_equal(result.time, np.datetime64("2004-01-02") + np.arange(1, 6))
    assert result.attrs["title"] == "winds"
    assert result.attrs["model_id"].startswith("Shift@")
    assert {"config_hash", "physml_version"} <= set(result.attrs)
    assert result.attrs["divergence"] == "none"
    assert_array_equal(result.steps_completed, [5, 5])


def test_the_ledger_is_stored_and_flat(data, stepper):
    result = forecast(stepper, data, 5)
    weights = np.cos(np.deg2rad(data.latitude))
    start = data.u.isel(time=-1)
    mean = start.weighted(weights).mean(("latitude", "longitude"))
    for name, value in (
        ("mean", mean),
        ("energy", (start**2).weighted(weights).mean(("latitude", "longitude")) / 2),
        ("variance", ((start - mean) ** 2).weighted(weights).mean(("latitude", "longitude"))),
        ("minimum", start.min(("latitude", "longitude"))),
        ("maximum", start.max(("latitude", "longitude"))),
    ):
        ledger = result[f"ledger_{name}_u"]
        assert ledger.dims == ("trajectory", "lead")
        assert_allclose(ledger, np.repeat(value.values[:, None], 5, 1), rtol=2e-6, err_msg=name)
        first = result[f"ledger_initial_{name}_u"]
        assert first.dims == ("trajectory",)
        assert_allclose(first, value, rtol=2e-6)
    assert result.ledger_finite_u.values.all()
    assert result.ledger_energy_u.attrs["units"] == "(m s-1)2"
    assert spec_of(result.rename(lead="t").drop_vars("time"), ["u"]).names == ("u",)


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
@pytest.mark.parametrize(("chunk", "every"), [(2, None), (5, None), (None, None), (2, 2)])
def test_streams_equal_memory(data, stepper, tmp_path, suffix, chunk, every):
    whole = forecast(stepper, data, 5, spectrum_every=every)
    path = tmp_path / f"forecast{suffix}"
    result = forecast(stepper, data, 5, out=path, chunk=chunk, spectrum_every=every)
    assert os.listdir(tmp_path) == [path.name]
    assert not result.u.variable._in_memory  # opened lazily
    again = xr.open_zarr(path, consolidated=False) if suffix == ".zarr" else xr.open_dataset(path)
    for opened in (result, again):
        xr.testing.assert_equal(opened.load(), whole)
        identity = {MARK: opened.attrs[MARK]}  # by which a finished file is known again
        assert opened.attrs == whole.attrs | identity
        assert set(opened.data_vars) == set(whole.data_vars)
        for name in whole.variables:
            assert opened[name].dims == whole[name].dims
            same = {k: np.asarray(v).tolist() for k, v in whole[name].attrs.items()}
            assert {k: np.asarray(v).reshape(np.shape(same[k])).tolist() for k, v in opened[name].attrs.items()} == same
    if every is None:  # spectra are written with the last frame
        assert list(result.data_vars) == list(whole.data_vars)
    result.close()
    again.close()


def test_order_of_dimensions_does_not_matter(data, stepper):
    plain = forecast(stepper, data, 3)
    permuted = data.transpose("longitude", "time", "latitude", "trajectory").sortby("latitude")
    result = forecast(stepper, permuted, 3)
    assert result.u.dims == ("trajectory", "lead", "longitude", "latitude")
    xr.testing.assert_equal(result.u.sortby("latitude", ascending=False).transpose(*plain.u.dims), plain.u)
    assert_allclose(result.ledger_mean_u, plain.ledger_mean_u, rtol=1e-6)


def test_one_frame_is_enough_for_a_history_of_one(data, stepper):
    for frame in (data.isel(time=-1), data.isel(time=[-1])):
        result = forecast(stepper, frame, 3)
        assert_array_equal(result.u, expected(data, 3))
        assert_array_equal(result.time, np.datetime64("2004-01-02") + np.arange(1, 4))
    single = data.isel(time=-1, trajectory=0)
    assert_array_equal(forecast(stepper, single, 2).u, expected(data, 2)[:1])


def test_the_last_frames_are_the_history(data):
    spec = spec_of(data)
    stepper = FLOORS["extrapolation"]().build(spec)
    result = forecast(stepper, data, 2)
    u = data.u.values
    assert_allclose(result.u[:, 1], 3 * u[:, -1] - 2 * u[:, -2], rtol=1e-5, atol=1e-5)
    for short in (data.isel(time=[0]), data.isel(time=0)):
        with pytest.raises(SpecError, match=r"needs 2 frames of history.*isel\(time=slice\(-2, None\)\)"):
            forecast(stepper, short, 2)


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_valid_times_follow_the_calendar(data, stepper, calendar, tmp_path):
    dates = xr.date_range("2004-02-25", periods=4, freq="D", calendar=calendar, use_cftime=True)
    result = forecast(stepper, data.assign_coords(time=dates), 3, out=tmp_path / "f.nc")
    last = {"noleap": (3, 3), "360_day": (3, 1)}[calendar]  # after 28 February
    assert (result.time.values[-1].month, result.time.values[-1].day) == last
    assert result.time.values[-1].calendar == calendar
    result.close()


def test_the_calendar_reaches_the_stepper():
    data = grid_data(times=800, trajectories=1, start="2001-01-01")
    season = np.cos(2 * np.pi * (data.time.dt.dayofyear - 1) / 365.25)
    data["u"] = (data.u * 0 + season).transpose(*data.u.dims).astype("f4").assign_attrs(data.u.attrs)
    spec = spec_of(data)

    class Split:
        lengths = (800,)

        def read(self, trajectory, frames):
            from physml.data.reader import Reader

            return Reader(data, spec).read(trajectory, frames)

    split = Split()
    split.spec = spec
    stepper = FLOORS["climatology"]().fit(split)
    result = forecast(stepper, data.isel(time=slice(0, 400)), 300)
    assert_allclose(result.u[0, :, 0, 0], data.u[0, 400:700, 0, 0], atol=0.04)  # the smoothed season
    with pytest.raises(SpecError, match="no calendar time"):
        forecast(stepper, data.isel(time=0, drop=True), 2)


def test_forcing_is_read_at_the_valid_times(data, tmp_path):
    forcing = grid_data(times=20, trajectories=1, seed=1, names=("sun",), start="2003-12-25")
    spec = spec_of(xr.merge([data, forcing.isel(trajectory=0)], join="inner"), ["u"], forcing=["sun"])
    result = forecast(Shift(spec), data, 6, forcing=forcing, chunk=4)
    state = data.u.isel(time=-1).values
    for step in range(6):
        state = np.roll(state, 1, -1) + forcing.sun.sel(time=result.time[step]).values
        assert_allclose(result.u[:, step], state, rtol=1e-5)
    with pytest.raises(DataError, match=r"forcing covers 2003-12-25.*to 2004-01-13.*take at most 11 steps"):
        forecast(Shift(spec), data, 12, forcing=forcing, out=tmp_path / "f.zarr")
    with pytest.raises(DataError, match="Pass forcing=dataset"):
        forecast(Shift(spec), data, 2)
    with pytest.raises(DataError, match="has no variable 'sun'"):
        forecast(Shift(spec), data, 2, forcing=forcing.rename(sun="moon"))
    assert os.listdir(tmp_path) == []
    still = data.assign(sun=forcing.sun.isel(time=0, trajectory=0, drop=True))
    frames = forecast(Shift(spec), still, 2).u
    first = np.roll(data.u.isel(time=-1).values, 1, -1) + still.sun.values
    assert_allclose(frames[:, 0], first, rtol=1e-5)


def test_nondimensional_time_goes_on(tiny):
    field = np.random.default_rng(0).random((1, 3, 8, 6)).astype("f4")
    data = xr.Dataset({"u": (("trajectory", "time", "x", "y"), field)}, {"time": [0.0, 0.5, 1.0]})
    result = forecast(Shift(spec_of(data)), data, 3)
    assert_allclose(result.lead, [0.5, 1.0, 1.5])
    assert_allclose(result.time, [1.5, 2.0, 2.5])
    assert_allclose(forecast(Shift(spec_of(data)), data.isel(time=-1), 1).time, [1.5])


def test_operator_learning_needs_no_frames(tiny):
    random = np.random.default_rng(0)
    coefficient = xr.Dataset({"a": (("sample", "x", "y"), random.random((3, 8, 6)).astype("f4"))})
    spec = tiny.spec(channels=("u",), static=("a",))
    stepper = DirectConfig(history=0).build(spec, tiny.model(1, 1), Normalizer.identity(spec))
    result = forecast(stepper, coefficient, 1)
    assert result.u.sizes == {"trajectory": 3, "lead": 1, "x": 8, "y": 6}
    window = tiny.window(spec, static=coefficient.a.values[..., None])
    assert_allclose(result.u[:, 0], rollout(stepper, window, 1)[:, 0, ..., 0], rtol=1e-5, atol=1e-6)


def test_members_are_realizations(data):
    stepper, key = Shift(spec_of(data), noise=0.1), jax.random.key(0)
    result = forecast(stepper, data, 3, members=4, key=key, chunk=2)
    assert result.u.dims == ("member", "trajectory", "lead", "latitude", "longitude")
    assert result.ledger_mean_u.dims == ("member", "trajectory", "lead")
    spread = (result.u - expected(data, 3)).std("member").mean(("trajectory", "latitude", "longitude"))
    assert_allclose(spread, 0.1 * np.sqrt([1, 2, 3]), rtol=0.35)  # three degrees of freedom, 80 cells
    assert len({result.u[m].values.tobytes() for m in range(4)}) == 4
    again = forecast(stepper, data, 3, members=4, key=key)
    xr.testing.assert_equal(again, result)
    with pytest.raises(ConfigError, match="members needs a key"):
        forecast(stepper, data, 2, members=2)


def test_land_stays_missing(data, tiny):
    sea = data.where(data.longitude > 50)
    spec = spec_of(sea)
    normalizer = Normalizer.identity(spec, masked=True)
    stepper = ResidualConfig().build(spec, tiny.model(1, 1), normalizer)
    result = forecast(stepper, sea, 3)
    assert_array_equal(np.isnan(result.u).any(("lead", "trajectory", "latitude")), data.longitude <= 50)
    assert result.ledger_finite_u.values.all()
    dry = ResidualConfig().build(spec, tiny.model(1, 1), Normalizer.identity(spec))
    with pytest.raises(DataError, match=r"has NaN: variable 'u', trajectory 0, 10 cells, first at index \(0, 0\)"):
        forecast(dry, sea, 3)
    assert forecast(dry, sea, 3, masked=True).u.sizes["lead"] == 3


def broken(data, value=np.nan, *breaks):
    return Shift(spec_of(data), breaks=((1, 4, (2, 3, 0), value), *breaks))


@pytest.mark.parametrize("out", [None, "f.zarr", "f.nc"])
def test_divergence_raises_and_leaves_nothing(data, tmp_path, out):
    path = None if out is None else tmp_path / out
    with pytest.raises(DivergedError) as error:
        forecast(broken(data), data, 9, out=path, chunk=3)
    for part in ("step 4", "trajectory 1", "'u' is nan", "(2, 3)", "latitude=0", "longitude=135"):
        assert part in str(error.value), error.value
    assert os.listdir(tmp_path) == []
    with pytest.raises(DivergedError, match="is 1e.06 m s-1, outside"):
        forecast(broken(data, 1e6), data, 9)
    assert forecast(broken(data, 1e6), data, 9, limit=None).u.sizes["lead"] == 9


@pytest.mark.parametrize("out", [None, "f.zarr", "f.nc"])
def test_only_the_bad_trajectory_stops(data, tmp_path, out):
    path = None if out is None else tmp_path / out
    result = forecast(broken(data), data, 9, out=path, chunk=3, on_divergence="stop").load()
    assert_array_equal(result.steps_completed, [9, 3])
    assert_array_equal(result.u[0], expected(data, 9)[0])
    assert_array_equal(result.u[1, :3], expected(data, 3)[1])
    assert np.isnan(result.u[1, 3:]).all()
    assert "step 4 (trajectory 1)" in result.attrs["divergence"]
    assert result.attrs["stopped_early"] == 0
    assert_array_equal(result.ledger_finite_u[1, :4], [1, 1, 1, 0])


@pytest.mark.parametrize("out", [None, "f.zarr", "f.nc"])
def test_everything_stops_when_all_are_bad(data, tmp_path, monkeypatch, out):
    stepper = broken(data, np.inf, (0, 6, (0, 0, 0), np.nan))
    path = None if out is None else tmp_path / out
    result = forecast(stepper, data, 100, out=path, chunk=4, on_divergence="stop").load()
    assert result.sizes["lead"] == 5
    assert result.sizes == forecast(stepper, data, 100, chunk=100, on_divergence="stop").sizes
    assert_array_equal(result.u[0], expected(data, 5)[0])
    assert result.attrs["stopped_early"] == 1
    assert_array_equal(result.steps_completed, [5, 3])
    assert result.time.size == result.lead.size == result.ledger_mean_u.sizes["lead"] == 5
    first = Shift(spec_of(data), breaks=((0, 1, (0, 0, 0), np.nan), (1, 1, (0, 0, 0), np.nan)))
    with pytest.raises(DivergedError, match="Nothing can be kept"):
        forecast(first, data, 5, on_divergence="stop", out=tmp_path / "g.nc")
    assert not (tmp_path / "g.nc").exists()


def test_flagging_goes_on(data):
    result = forecast(broken(data, 1e6), data, 9, on_divergence="flag")
    assert_array_equal(result.steps_completed, [9, 3])
    assert (result.u[1] == 1e6).sum() == 6
    assert "1e+06" in result.attrs["divergence"]


@pytest.mark.parametrize("out", ["f.zarr", "f.nc"])
def test_failures_leave_what_was_there(data, stepper, tmp_path, monkeypatch, out):
    path = tmp_path / out
    forecast(stepper, data, 3, out=path).close()
    with pytest.raises(ConfigError, match="overwrite=True"):
        forecast(stepper, data, 3, out=path)
    with pytest.raises(DivergedError):
        forecast(broken(data), data, 9, out=path, chunk=2, overwrite=True)
    kept = xr.open_zarr(path, consolidated=False) if out.endswith("zarr") else xr.open_dataset(path)
    assert_array_equal(kept.u, expected(data, 3))
    kept.close()
    forecast(stepper, data, 6, out=path, overwrite=True).close()
    kept = xr.open_zarr(path, consolidated=False) if out.endswith("zarr") else xr.open_dataset(path)
    assert_array_equal(kept.u, expected(data, 6))
    kept.close()
    assert os.listdir(tmp_path) == [out]


def test_what_does_not_fit_is_refused_before_anything_runs(data, stepper, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "rollout_chunks", lambda *a, **k: pytest.fail("started"))
    nan = data.copy(deep=True)
    nan.u[1, -1, 2, 2] = np.nan
    learned = Shift(spec_of(data))
    learned.normalizer = Normalizer.identity(learned.spec)
    cases = (
        (stepper, data.rename(u="uu"), DataError, "Did you mean 'uu'"),
        (stepper, data.assign(u=data.u.assign_attrs(units="km h-1")), SpecError, "'km h-1'.*'m s-1' was expected"),
        (stepper, data.isel(longitude=slice(4)), SpecError, "longitude.*8"),
        (stepper, data.assign_coords(latitude=data.latitude + 3), SpecError, "latitude"),
        (stepper, data.isel(latitude=0, drop=True), SpecError, "latitude"),
        (learned, nan, DataError, "NaN"),
        (stepper, data.u, ConfigError, "DataArray"),
        (stepper, data.assign_coords(time=[0.0, 1, 2, 3]), None, None),
    )
    for model, initial, error, message in cases[:-1]:
        with pytest.raises(error, match=message):
            forecast(model, initial, 3, out=tmp_path / "f.nc")
    two = FLOORS["extrapolation"]().build(spec_of(data))
    with pytest.raises((DataError, SpecError), match="irregular|apart"):
        forecast(two, data.isel(time=[0, 3]), 2)
    for options, message in (
        ({"steps": 0}, "at least 1"),
        ({"steps": 2, "chunk": 0}, "at least 1"),
        ({"steps": 2, "on_divergence": "panic"}, "raise, stop or flag"),
        ({"steps": 2, "out": tmp_path / "f.grib"}, r"\.nc.*\.zarr"),
        ({"steps": 2, "out": tmp_path / "no" / "f.nc"}, "is no folder"),
        ({"steps": 2.5}, "steps is 2.5, but a whole number"),
        ({"steps": 2, "chunk": 1.5}, "chunk is 1.5, but a whole number"),
        ({"steps": 2, "members": 2.0, "key": jax.random.key(0)}, "members is 2.0, but a whole number"),
        ({"steps": 2, "key": 0}, r"key is 0, but .*jax.random.key\(0\)"),
        ({"steps": 2, "key": jax.random.split(jax.random.key(0))}, "but one key"),
        ({"steps": 2, "spectrum_every": 1.5}, "spectrum_every is 1.5, but a whole number"),
        ({"steps": 2, "members": 2, "key": jax.random.key(0), "perturb": "0.1"}, "perturb is '0.1', but a number"),
        ({"steps": 2, "members": 2, "key": jax.random.key(0), "perturb": [0.1]}, "perturb is .*, but a number"),
        ({"steps": 2, "limit": "a"}, "limit is 'a', but a positive number"),
    ):
        with pytest.raises(ConfigError, match=message):
            forecast(stepper, data, **options)
    assert os.listdir(tmp_path) == []


def test_a_bare_model_is_no_stepper(data, tiny):
    with pytest.raises(ConfigError, match="no names and units.*Give a stepper"):
        forecast(tiny.model(1, 1), data, 2)


def test_whole_numbers_of_any_type_count(data, stepper):
    result = forecast(stepper, data, np.int64(4), chunk=np.int32(2), spectrum_every=np.int64(2))
    assert_array_equal(result.u, expected(data, 4))
    assert result.sizes["spectrum_step"] == 3
    assert_array_equal(forecast(stepper, data, 4, key=jax.random.PRNGKey(0)).u, result.u)


def test_members_of_a_gaussian_ensemble_are_drawn(data, tiny):
    """Asked for, every member is a draw; not asked for, they are the means of their steppers."""
    from physml.models.resnet import ResNetConfig
    from physml.saving import build_stepper

    spec = spec_of(data)
    normalizer = Normalizer(spec, [3.0], [2.0], [1.0])
    config = STEPPERS["gaussian"]()
    seeds = [build_stepper(config, ResNetConfig(width=2, depth=1), spec, normalizer, seed=seed) for seed in (0, 1)]
    ensemble, key = stack_members(seeds), jax.random.key(0)
    means = forecast(ensemble, data, 2).u
    for member, alone in enumerate(seeds):
        assert_allclose(means[member], forecast(alone, data, 2).u, rtol=1e-5, atol=1e-5)
    drawn = forecast(ensemble, data, 2, members=4, key=key).u
    assert len({drawn[member].values.tobytes() for member in range(4)}) == 4
    std = np.mean([forecast(alone, data, 2).u_std[:, 0].mean() for alone in seeds])
    spread = abs(drawn - np.repeat(means.values, 2, 0))[:, :, 0].mean()
    assert_allclose(spread, std * np.sqrt(2 / np.pi), rtol=0.15)  # of 320 numbers: 4 percent
    assert not np.array_equal(forecast(ensemble, data, 2, members=2, key=key).u, means)
    with pytest.raises(ConfigError, match="members needs a key"):
        forecast(ensemble, data, 2, members=2)


def test_members_that_are_lost_at_once_are_not_called_equal(data):
    spec = spec_of(data)
    stepper = stack_members([Scaled(spec, np.nan), Scaled(spec, np.nan), Scaled(spec, 1.0)])
    result = forecast(stepper, data, 3, on_divergence="flag")
    assert_array_equal(result.steps_completed.isel(trajectory=0), [0, 0, 3])


def test_progress_is_told(data, stepper):
    told = []
    forecast(stepper, data, 5, chunk=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_dropout_is_off_and_the_callers_mode_is_kept(data):
    class Noisy(Shift):
        def __init__(self, spec):
            super().__init__(spec)
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def advance(self, state, context):
            return self.drop(jnp.roll(state, 1, axis=2))

    stepper = Noisy(spec_of(data))
    assert_array_equal(forecast(stepper, data, 2).u, expected(data, 2))
    assert not stepper.drop.deterministic


def test_provenance_tells_models_apart(data, tiny):
    from physml.models.resnet import ResNetConfig
    from physml.saving import build_stepper

    spec = spec_of(data)
    ids = set()
    for config, seed in ((ResNetConfig(width=2, depth=1), 0), (ResNetConfig(width=2, depth=1), 1)):
        stepper = build_stepper(ResidualConfig(), config, spec, Normalizer.identity(spec), seed=seed)
        attrs = forecast(stepper, data, 1).attrs
        ids.add((attrs["model_id"], attrs["config_hash"]))
    (a, first), (b, second) = ids
    assert first == second
    assert a != b
    assert a.startswith("residual/resnet@")
    assert json.dumps(attrs["physml_version"])


def test_a_real_file_goes_through(shared_data, tmp_path):
    data = open_dataset(shared_data / "reanalysis" / "era5_t2m_uk_hourly_2019-03.nc")
    stepper = FLOORS["persistence"]().build(spec_of(data))
    result = forecast(stepper, data.isel(time=slice(0, 10)), 4, out=tmp_path / "f.zarr")
    assert_array_equal(result.t2m[0, 3], data.t2m[0, 9])
    assert result.time.values[0] == data.time.values[10]
    assert_array_equal(result.latitude, data.latitude)


def test_an_ensemble_of_steppers_forecasts_its_members(data):
    """Each frame of each member is that of its stepper alone."""
    members = stack_members([Scaled(spec_of(data), factor) for factor in (1.0, 2.0)])
    result = forecast(members, data, 3)
    assert result.u.dims[:3] == ("member", "trajectory", "lead")
    for i, factor in enumerate((1.0, 2.0)):
        alone = forecast(Scaled(spec_of(data), factor), data, 3)
        assert_allclose(result.u.isel(member=i), alone.u, rtol=1e-6)
    with pytest.raises(ConfigError, match="Members 0 and 1 of 4 are the same"):
        forecast(members, data, 2, members=4, key=jax.random.key(0))
    noisy = stack_members([Scaled(spec_of(data), factor, noise=0.1) for factor in (1.0, 2.0)])
    assert forecast(noisy, data, 2, members=4, key=jax.random.key(0), perturb=None).sizes["member"] == 4
    with pytest.raises(ConfigError, match="ensemble of 2.*multiple of 2"):
        forecast(members, data, 2, members=3, key=jax.random.key(0))


def test_perturbed_members(data, tmp_path):
    spec = spec_of(data)
    stepper = Shift(spec)
    with pytest.raises(ConfigError, match="no normalizer, so perturb=0.5 has no unit"):
        forecast(stepper, data, 2, members=3, key=jax.random.key(0), perturb=0.5)
    stepper.normalizer = Normalizer(spec, [3.0], [2.0], [1.0])
    result = forecast(stepper, data, 3, members=400, key=jax.random.key(0), perturb=0.5, perturb_kind="white")
    again = forecast(
        stepper, data, 3, members=400, key=jax.random.key(0), perturb=0.5, perturb_kind="white", chunk=2,
        out=tmp_path / "x.zarr",
    )  # fmt: skip
    assert_array_equal(again.u, result.u)
    # half a scale of 2; the standard deviation of 400 numbers is known to 3.5 percent, of the mean over cells better
    assert_allclose(result.u.std("member").mean(), 1.0, rtol=0.02)
    assert_allclose(result.u.mean("member"), forecast(stepper, data, 3).u, atol=0.25)
    for options, message in (
        ({"perturb": 0.5, "key": jax.random.key(0)}, "say how many"),
        ({"perturb": 0.0, "members": 2, "key": jax.random.key(0)}, "size above 0"),
        ({"perturb": 0.5, "members": 2}, "needs a key"),
        ({"members": 2, "key": jax.random.key(0)}, "Members 0 and 1 of 2 are the same.*Perturb"),
        ({"perturb_kind": "white"}, "perturb_kind is 'white', but nothing is perturbed"),
    ):
        with pytest.raises(ConfigError, match=message):
            forecast(stepper, data, 2, **options)
