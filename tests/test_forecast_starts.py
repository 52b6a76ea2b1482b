"""Where forecasts start and what they are labelled with: kinds of time, forcing, lengths of trajectories, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import XarrayDataset, open_dataset, spec_of
from physml.data import clock as ck
from physml.errors import ConfigError, DataError, SpecError
from physml.evaluate import evaluate
from physml.forecast import forecast
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.steppers import STEPPERS, ResidualConfig
from physml.steppers.describe import build_stepper
from physml.verbs.common import frames_until

EXISTS = np.array([1, 1, 0, 0, 1, 1, 1, 1], "f4")


class Tells(nnx.Module):
    """Frames that hold what the stepper is told: "forcing", or "hour" of the day."""

    def __init__(self, spec, what="forcing", history=1):
        self.spec, self.what, self.history = spec, what, history

    def encode(self, frames, context):
        return jnp.zeros((context.time.shape[0], *self.spec.grid.shape, 1))

    def advance(self, state, context):
        return context.forcing if self.what == "forcing" else state * 0 + 24 * context.calendar[:, 1, None, None]

    def decode(self, state):
        return state


def waves(times, trajectories=2, units=None, seed=0):
    frames = np.random.default_rng(seed).standard_normal((trajectories, len(times), 8)).astype("f4")
    time = ("time", times, {"units": units} if units else {})
    return xr.Dataset({"u": (("trajectory", "time", "x"), frames)}, {"time": time, "x": np.arange(8) / 8})


def numbered(times, units=None):
    """Forcing that holds the number of its frame."""
    data = waves(times, units=units).isel(trajectory=0).rename(u="f")
    return data.assign(f=data.f * 0 + np.arange(len(times), dtype="f4")[:, None])


def dates(count, hours=6):
    return np.datetime64("2018-01-01", "ns") + np.arange(count) * np.timedelta64(hours, "h")


def daily(count):
    return xr.date_range("2018-01-01", periods=count, calendar="noleap", use_cftime=True).values


def forced(data):
    return spec_of(data.assign(f=data.u.isel(trajectory=0)), ["u"], forcing=["f"])


def persistence(data):
    return STEPPERS["persistence"]().build(spec_of(data, ["u"]))


# --- --at -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_a_start_is_the_frame_whose_time_is_written(dtype):
    """Stored times are sums in floating point: 3 * 0.1 is above 0.3."""
    data = waves((np.arange(100) * 0.1).astype(dtype))
    for i in range(100):
        assert frames_until(data, f"{i / 10:.10g}", None).sizes["time"] == i + 1


def test_a_date_is_an_instant():
    data = waves(dates(20))
    for text in ("2018-01-02", "2018-01-02T00", "2018-01-02T00:00"):
        assert frames_until(data, text, None).time.values[-1] == np.datetime64("2018-01-02")
    cftime = waves(xr.date_range("2018-02-28", periods=20, freq="6h", calendar="360_day", use_cftime=True).values)
    last = frames_until(cftime, "2018-02-30", None).time.values[-1]
    assert (last.month, last.day, last.hour) == (2, 30, 0)
    assert frames_until(cftime, "2018-02-30T06:00", None).sizes["time"] == 10
    assert frames_until(waves(np.arange(5) * np.timedelta64(6, "h").astype("m8[ns]")), "12 h", None).sizes["time"] == 3
    assert frames_until(waves(np.arange(5) * 6.0, units="hours"), "12", None).sizes["time"] == 3


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("0.35", r"between frame #3 at 0\.3.* and #4 at 0\.4; the dataset spans 0\.0 to 1\.9"),
        ("99", r"the dataset spans 0\.0 to 1\.9"),
        ("-1", r"the dataset spans 0\.0 to 1\.9"),
        ("nan", "the dataset spans"),
        ("monday", "no time of the dataset.*spans"),
        ("#20", "frames #0 to #19"),
    ],
)
def test_a_time_without_a_frame_is_refused(at, said):
    with pytest.raises(DataError, match=said):
        frames_until(waves(np.arange(20) * 0.1), at, None)
    if at not in ("#20", "-1", "0.35"):
        with pytest.raises(DataError, match="no time of the dataset|spans"):
            frames_until(waves(daily(3)), at, None)


def test_a_forecast_is_cut_at_its_valid_times():
    data = waves(np.arange(10.0))
    ahead = forecast(persistence(data), data.isel(time=[0]), 6)
    for at in ("#2", "3"):
        cut = frames_until(ahead, at, None)
        assert cut.sizes["lead"] == 3
        assert_array_equal(forecast(persistence(data), cut, 2).time, [4, 5])
    with pytest.raises(DataError, match="a single instant"):
        frames_until(data.isel(time=0), "3", None)


# --- kinds of time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize(("units", "step"), [("hours", 6.0), ("days", 1.0), ("minutes", 30.0)])
def test_numbers_with_a_unit_of_time_go_on_in_it(units, step, history, tmp_path):
    times = np.arange(20) * step
    data, forcing = waves(times, units=units), numbered(times, units)
    start = data.isel(time=slice(0, 2))
    for out in (None, tmp_path / "f.nc", tmp_path / "f.zarr"):
        result = forecast(Tells(forced(data), history=history), start, 5, forcing=forcing, out=out)
        assert_allclose(result.time, step * np.arange(2, 7))
        assert result.time.attrs["units"] == units
        assert result.lead.values[0] == np.timedelta64(int(step * ck.DURATIONS[units]), "s")
        assert_array_equal(result.u[0, :, 0], np.arange(2, 7))
    assert_array_equal(forecast(persistence(data), result, 2).time, step * np.arange(7, 9))


def test_forcing_may_be_in_another_unit_of_time():
    data, days = waves(np.arange(20) * 6.0, units="hours"), numbered(np.arange(20) * 0.25, "days")
    result = forecast(Tells(forced(data)), data.isel(time=[1]), 4, forcing=days)
    assert_array_equal(result.u[0, :, 0], np.arange(2, 6))
    plain = forecast(Tells(forced(data)), data.isel(time=[1]), 4, forcing=numbered(np.arange(20) * 6.0))
    assert_array_equal(plain.u, result.u)


@pytest.mark.parametrize("kind", ["numbers", "dates", "cftime"])
def test_forcing_may_be_finer_than_the_steps(kind):
    times = {
        "numbers": lambda n, step: np.arange(n) * step * 0.1,
        "dates": lambda n, step: dates(n, 2 * step),
        "cftime": lambda n, step: (
            xr.date_range("2001-02-27", periods=n, freq=f"{2 * step}h", calendar="noleap", use_cftime=True).values
        ),
    }[kind]
    data, forcing = waves(times(20, 3)), numbered(times(60, 1))
    result = forecast(Tells(forced(data)), data.isel(time=slice(0, 2)), 5, forcing=forcing, chunk=2)
    assert_array_equal(result.u[0, :, 0], 3 * np.arange(2, 7))
    shuffled = forcing.isel(time=np.random.default_rng(0).permutation(60))
    assert_array_equal(forecast(Tells(forced(data)), data.isel(time=slice(0, 2)), 5, forcing=shuffled).u, result.u)
    with pytest.raises(DataError, match="is missing.*take at most 2 steps"):
        forecast(Tells(forced(data)), data.isel(time=slice(0, 2)), 5, forcing=forcing.isel(time=slice(0, 10)))
    with pytest.raises(DataError, match="is missing.*take at most 1 steps"):
        forecast(Tells(forced(data)), data.isel(time=slice(0, 2)), 5, forcing=forcing.isel(time=slice(0, None, 2)))


def test_forcing_of_another_kind_of_time_is_told():
    numbers, calendar = np.arange(20.0), dates(20, 24)
    for own, other, said in (
        (numbers, calendar, "initial are plain numbers.*are dates"),
        (calendar, numbers, "initial are dates.*are plain numbers"),
    ):
        data = waves(own)
        with pytest.raises(SpecError, match=said):
            forecast(Tells(forced(data)), data.isel(time=[0]), 3, forcing=numbered(other))


@pytest.mark.parametrize("history", [0, 1, 2])
def test_the_calendar_is_that_of_the_predicted_frame(history):
    data = waves(dates(20))
    stepper = Tells(spec_of(data), "hour", history)
    result = forecast(stepper, data.isel(time=slice(0, 2)), 5, chunk=2)
    assert_allclose(result.u[0, :, 0], result.time.dt.hour, atol=1e-4)
    trained = XarrayDataset(data, stepper.spec).read(0, range(2, 7))  # as a window tells it, from its first frame on
    assert_allclose(24 * trained.calendar[:, 1], result.time.dt.hour, atol=1e-4)


# --- labels of trajectories -------------------------------------------------------------------------------------------


def labelled_forcing(labels):
    """One per trajectory, which holds its label times 100 and the number of the frame."""
    field = 100 * np.array(labels)[:, None, None] + np.arange(20.0)[:, None] + np.zeros(8)
    coords = {"trajectory": labels, "time": np.arange(20.0), "x": np.arange(8) / 8}
    return xr.Dataset({"f": (("trajectory", "time", "x"), field.astype("f4"))}, coords)


@pytest.mark.parametrize("labels", [[30, 10], [20, 30, 10], [20], [10, 20, 30]])
def test_forcing_is_taken_by_the_label_of_the_trajectory(labels):
    data, forcing = waves(np.arange(20.0), 3).assign_coords(trajectory=[10, 20, 30]), labelled_forcing([10, 20, 30])
    initial = data.sel(trajectory=labels).isel(time=[2])
    result = forecast(Tells(forced(data)), initial, 4, forcing=forcing)
    assert_array_equal(result.u[:, :, 0], 100 * np.array(labels)[:, None] + np.arange(3, 7))
    assert_array_equal(result.trajectory, labels)
    shared = forcing.drop_vars("trajectory").isel(trajectory=[0])
    result = forecast(Tells(forced(data)), initial, 4, forcing=shared)
    assert_array_equal(result.u[:, 0, 0], [1003] * len(labels))
    single = forecast(Tells(forced(data)), data.sel(trajectory=20).isel(time=[2]), 4, forcing=forcing)
    assert_array_equal(single.u[:, 0, 0], [2003])
    with pytest.raises(SpecError, match=r"forcing has no trajectory 5, .*10, 20, 30.*drop_vars\('trajectory'\)"):
        forecast(Tells(forced(data)), initial.assign_coords(trajectory=[5, *labels[1:]]), 4, forcing=forcing)


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_forcing_by_label_is_read_from_files(tmp_path, suffix):
    data = waves(np.arange(20.0), 3).assign_coords(trajectory=[7, 8, 9])
    forcing, path = labelled_forcing([1, 2, 3]).assign_coords(trajectory=[9, 7, 8]), tmp_path / f"f{suffix}"
    forcing.to_zarr(path, consolidated=False) if suffix == ".zarr" else forcing.to_netcdf(path)
    initial, out = data.isel(time=[2], trajectory=[1, 2, 0]), tmp_path / "out.zarr"
    result = forecast(Tells(forced(data)), initial, 4, forcing=open_dataset(path), out=out, chunk=3)
    assert_array_equal(result.u[:, :, 0], 100 * np.array([[3], [1], [2]]) + np.arange(3, 7))
    assert_array_equal(result.trajectory, [8, 9, 7])


@pytest.mark.parametrize("labels", [None, [7, 7]], ids=["none", "twice"])
def test_forcing_without_labels_is_taken_by_position(labels):
    data, forcing = waves(np.arange(20.0)), labelled_forcing([1, 2]).drop_vars("trajectory")
    forcing = forcing if labels is None else forcing.assign_coords(trajectory=labels)
    initial = data.isel(time=[0]).assign_coords(trajectory=[2, 1])
    result = forecast(Tells(forced(data)), initial, 2, forcing=forcing)
    assert_array_equal(result.u[:, 0, 0], [101, 201])
    with pytest.raises(SpecError, match="forcing has 2 trajectories, but initial has 1"):
        forecast(Tells(forced(data)), initial.isel(trajectory=[0]), 2, forcing=forcing)


# --- going on from a forecast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["time", "valid_time"])
@pytest.mark.parametrize("times", [np.arange(4) * 6.0, dates(4)], ids=["numbers", "dates"])
def test_one_frame_of_a_forecast_keeps_its_valid_time(times, name):
    data = waves(times, units=None if times.dtype.kind == "M" else "hours")
    whole = forecast(persistence(data), data, 6)
    frame = forecast(persistence(data), data, 3).isel(lead=-1).rename({} if name == "time" else {"time": name})
    assert_array_equal(forecast(persistence(data), frame, 3).time, whole.time[3:])
    last = frame.drop_vars(name).drop_vars("lead")
    assert_array_equal(forecast(persistence(data), frame.drop_vars(name), 2).time, np.arange(1, 3) * 21600.0)
    assert_array_equal(forecast(persistence(data), last, 2).time, np.arange(1, 3) * 21600.0)


def test_a_time_that_is_a_duration_goes_on():
    data = waves(np.arange(4) * np.timedelta64(6, "h").astype("m8[ns]"))
    for initial in (data, data.isel(time=-1)):
        assert_array_equal(forecast(persistence(data), initial, 2).time, np.arange(4, 6) * np.timedelta64(6, "h"))


class Grows(nnx.Module):
    """Every step adds the field itself times a number, and the noise of its key."""

    def __init__(self, spec, history=1, noise=0.0):
        self.spec, self.history, self.noise = spec, history, noise

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        state = jnp.roll(1.1 * state, 1, axis=1) + 0.1 * context.parameters.sum(-1)[:, None, None]
        return state + self.noise * jax.random.normal(context.key, state.shape) if self.noise else state

    def decode(self, state):
        return state


@pytest.fixture
def ensemble():
    """Three members of two labelled trajectories, as a forecast gives them, with a parameter of each trajectory."""
    data = waves(np.arange(4.0)).assign_coords(trajectory=[10, 20])
    members = xr.concat([data.isel(time=[3]) + 0.5 * m for m in range(3)], xr.Variable("member", [4, 5, 6]))
    return members.assign(nu=("trajectory", np.array([1, 2], "f4")))


@pytest.mark.parametrize("suffix", [None, ".zarr", ".nc"])
def test_members_go_on_from_their_own_states(ensemble, tmp_path, suffix):
    stepper = Grows(spec_of(ensemble.isel(member=0), ["u"], parameters=["nu"]))
    expected = xr.concat([forecast(stepper, ensemble.isel(member=m), 6) for m in range(3)], ensemble.member)
    out = suffix and tmp_path / f"f{suffix}"
    half = forecast(stepper, ensemble, 3, out=out, chunk=2).load()
    assert half.u.dims == ("member", "trajectory", "lead", "x")
    assert_array_equal(half.member, [4, 5, 6])
    assert_array_equal(half.trajectory, [10, 20])
    half.close()
    half = (half if out is None else open_dataset(out)).assign(nu=ensemble.nu)  # (trajectory, member) from a file
    for initial, members in ((half, None), (half.isel(lead=-1), 3), (half.transpose("x", "lead", ...), None)):
        result = forecast(stepper, initial, 3, members=members).transpose("member", "trajectory", "lead", "x", ...)
        assert_allclose(result.u, expected.u[:, :, 3:], rtol=1e-6)
        assert_allclose(result.ledger_mean_u, expected.ledger_mean_u[:, :, 3:], rtol=1e-5)
        assert_array_equal(result.time, np.arange(7.0, 10))
        assert_array_equal(result.member, [4, 5, 6])
    one = forecast(stepper, half.isel(trajectory=1), 3)
    assert one.u.dims == ("member", "trajectory", "lead", "x")
    assert_allclose(one.u[:, 0], expected.u[:, 1, 3:], rtol=1e-6)


def test_members_of_the_initial_state_are_not_made_again(ensemble):
    stepper, key = Grows(spec_of(ensemble.isel(member=0), ["u"], parameters=["nu"])), jax.random.key(0)
    for members in (1, 2, 6):
        with pytest.raises(ConfigError, match=rf"members is {members}, but initial has 3.*Leave members out"):
            forecast(stepper, ensemble, 2, members=members, key=key)
    noisy = Grows(stepper.spec, noise=0.1)
    assert len({noise.values.tobytes() for noise in forecast(noisy, ensemble * 0, 2, key=key).u}) == 3
    same = forecast(stepper, ensemble.isel(member=[0, 0]), 2).u
    assert_array_equal(same[0], same[1])
    noisy.normalizer = Normalizer(noisy.spec, [0.0], [2.0], [1.0])
    moved = (
        forecast(noisy, ensemble * 0, 1, key=key, perturb=0.5, members=3).u
        - forecast(noisy, ensemble * 0, 1, key=key).u
    )
    assert len({one.values.tobytes() for one in moved.stack(one=("member", "trajectory")).transpose("one", ...)}) == 6
    with pytest.raises(ConfigError, match="members needs a key"):
        forecast(noisy, ensemble, 2, perturb=0.5)
    land = ensemble.where(ensemble.x > 0.3).assign(nu=ensemble.nu)
    found = forecast(Tells(stepper.spec, "hour"), land, 2, masked=True)
    assert_array_equal(found.u.isnull().all(("member", "trajectory", "lead")), ensemble.x <= 0.3)


def test_members_share_the_forcing_of_their_trajectory(ensemble):
    spec = spec_of(ensemble.isel(member=0).assign(f=ensemble.u[0, 0]), ["u"], forcing=["f"])
    forcing = labelled_forcing([20, 10])
    result = forecast(Tells(spec), ensemble, 3, forcing=forcing)
    assert_array_equal(result.u[:, :, :, 0], np.array([[[1004, 1005, 1006], [2004, 2005, 2006]]] * 3))
    with pytest.raises(SpecError, match=r"forcing.*'f' has a dimension 'member'.*isel\(member=0\)"):
        forecast(Tells(spec), ensemble, 3, forcing=forcing.expand_dims(member=3))


# --- trajectories of different length ---------------------------------------------------------------------------------


@pytest.fixture
def padded():
    """Ten frames and six, then padding that would be taken for numbers."""
    data = waves(np.arange(10.0))
    data.u[1, 6:] = -77
    return data.assign(frames=("trajectory", np.array([10, 6])))


@pytest.mark.parametrize("name", ["persistence", "extrapolation"])
def test_padding_is_never_a_start(padded, name):
    stepper = STEPPERS[name]().build(spec_of(padded, ["u"]))
    whole, own = padded.drop_vars("frames"), XarrayDataset(padded, stepper.spec).to_xarray(1)
    for initial, real in (
        (padded.isel(time=slice(0, 3)), whole.isel(time=slice(0, 3))),
        (padded.isel(trajectory=[1]), whole.isel(trajectory=[1], time=slice(0, 6))),
        (padded.isel(trajectory=1), whole.isel(trajectory=1, time=slice(0, 6))),
        (frames_until(padded, "#5", None), whole.isel(time=slice(0, 6))),
        (frames_until(padded, "9", 0), whole.isel(trajectory=[0])),
        (own.isel(time=slice(0, 2)), whole.isel(time=slice(0, 2), trajectory=[1])),
    ):
        result, expected = forecast(stepper, initial, 2), forecast(stepper, real, 2)
        assert_array_equal(result.u, expected.u)
        assert_array_equal(result.time, expected.time)
    with pytest.raises(SpecError, match=r"end after 6 to 10 frames.*isel\(time=slice\(6\)\)"):
        forecast(stepper, padded, 2)
    for trajectory in (None, 1):
        with pytest.raises(DataError, match="trajectory 1 ends with frame #5"):
            frames_until(padded, "8", trajectory)


def test_padding_is_never_forcing(padded):
    data = waves(np.arange(10.0))
    forcing = padded.rename(u="f")
    stepper = Tells(forced(data))
    result = forecast(stepper, data.isel(time=[2]), 3, forcing=forcing)
    assert_array_equal(result.u, forcing.f[:, 3:6].values)
    with pytest.raises(DataError, match=r"covers 0\.0 to 5\.0 \(6 frames\).*take at most 3 steps"):
        forecast(stepper, data.isel(time=[2]), 4, forcing=forcing)


# --- files ------------------------------------------------------------------------------------------------------------


def levels():
    frames = np.random.default_rng(0).standard_normal((3, 2, 8)).astype("f4")
    return xr.Dataset(
        {"z": (("time", "level", "x"), frames)}, {"time": dates(3), "level": [500, 850], "x": np.arange(8) / 8}
    )


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_how_the_initial_data_are_stored_does_not_matter(tmp_path, suffix):
    from numcodecs import Zlib

    codecs = {name: {"compressors": [Zlib()]} for name in ("x", "level")}
    levels().to_zarr(tmp_path / "two.zarr", zarr_format=2, encoding=codecs)
    packed = {"dtype": "int16", "scale_factor": 0.125, "_FillValue": -1, "zlib": True, "chunksizes": (4,)}
    levels().to_netcdf(tmp_path / "packed.nc", encoding={"x": packed})
    for name in ("two.zarr", "packed.nc"):
        data = open_dataset(tmp_path / name)
        stepper = STEPPERS["persistence"]().build(spec_of(data, ["z"], flatten=("level",)))
        with forecast(stepper, data, 3, out=tmp_path / f"f{suffix}", chunk=2, overwrite=True) as result:
            assert_array_equal(result.z[0, 2], levels().z[2])
            assert_array_equal(result.x, levels().x)


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_attributes_of_any_type_are_written(tmp_path, suffix):
    data = waves(np.arange(4.0))
    data.u.attrs.update(
        units="m", flag=True, empty=[], none=None, names=["a", "b"], row=np.array([1.0, 2.0], "f4"), half=np.float16(2),
        number=np.float32(3), flags=np.array([True, False]), table=np.eye(2), ragged=[[1], [2, 3]], nested={"a": 1},
    )  # fmt: skip
    data.x.attrs.update(on=np.bool_(True), since=np.datetime64("2001-01-01"))
    data.attrs.update(since=np.datetime64("2001-01-01"), whole=2, count=np.array(5))
    with forecast(persistence(data), data, 3, out=tmp_path / f"f{suffix}", chunk=2) as result:
        found = {name: np.asarray(value).tolist() for name, value in result.u.attrs.items()}
        assert found == {
            "units": "m", "flag": 1, "empty": "[]", "names": ["a", "b"], "row": [1, 2], "half": "2.0", "number": 3,
            "flags": [1, 0], "table": str(np.eye(2)), "ragged": "[[1], [2, 3]]", "nested": "{'a': 1}",
        }  # fmt: skip
        assert (result.x.attrs["on"], result.x.attrs["since"]) == (1, "2001-01-01")
        assert (result.attrs["since"], result.attrs["whole"], result.attrs["count"]) == ("2001-01-01", 2, 5)
    assert data.u.attrs["flag"] is True


@pytest.mark.parametrize("suffix", [None, ".zarr", ".nc"])
@pytest.mark.parametrize("chosen", [slice(None), [1], 1])
def test_a_forecast_holds_all_that_another_one_needs_to_go_on(tmp_path, suffix, chosen):
    data = waves(np.arange(9.0)).rename(trajectory="case")
    data = data.assign(hill=("x", np.arange(8.0)), viscosity=("case", [0.1, 0.2]), gravity=9.8, fluid=("x", EXISTS))
    data = data.isel(case=chosen)
    spec = spec_of(data, ["u"], static=["hill"], parameters=["viscosity", "gravity"], mask="fluid")
    normalizer = Normalizer.identity(spec, masked=True)
    stepper = build_stepper(ResidualConfig(), FNOConfig(modes=(2,), width=4, depth=1), spec, normalizer, seed=0)
    start, options = data.isel(time=[0]), {"chunk": 2}
    whole = forecast(stepper, start, 6, **options)
    out = None if suffix is None else tmp_path / f"first{suffix}"
    first = forecast(stepper, start, 4, out=out, **options)
    if out is not None:
        first.close()
        first = open_dataset(out)
    assert {"hill", "viscosity", "gravity", "fluid"} <= {*first.coords}
    assert_array_equal(first.viscosity.squeeze(), data.viscosity)
    on = forecast(stepper, first, 2, **options)
    assert_array_equal(on.u, whole.u[:, 4:])
    assert list(evaluate(first, data, metrics=("rmse",)).channel.values) == ["u"]
