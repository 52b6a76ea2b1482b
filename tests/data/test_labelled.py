import dataclasses

import cftime
import jax
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import DataConfig, XarrayDataset, from_array, from_frames, spec_of, to_window
from physml.errors import DataError, SpecError
from physml.fields import Channel


def same(a, b):
    assert a.spec == b.spec
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_array_equal(x, y)


VARIANTS = {
    "other order of dimensions": lambda ds: ds.transpose("longitude", "time", "latitude"),
    "descending latitude": lambda ds: ds.isel(latitude=slice(None, None, -1)),
    "descending longitude": lambda ds: ds.isel(longitude=slice(None, None, -1)),
    "float64": lambda ds: ds.astype("f8"),
    "dask": lambda ds: ds.chunk(time=5, latitude=2),
    "short names": lambda ds: ds.rename(latitude="lat", longitude="lon"),
    "names told by units only": lambda ds: _strip(ds).rename(latitude="north", longitude="east"),
    "names told by axis and names only": lambda ds: _plain(ds),
    "a trajectory dimension": lambda ds: ds.expand_dims("member"),
    "more variables": lambda ds: ds.assign(other=ds.slp * 2, orography=ds.slp[0]),
}


def _strip(ds):
    ds = ds.copy()
    for dim in ("latitude", "longitude"):
        ds[dim].attrs.pop("standard_name")
    return ds


def _plain(ds):
    return ds.assign_coords(latitude=("latitude", ds.latitude.values), longitude=("longitude", ds.longitude.values))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layout_of_a_file_does_not_change_its_window(make, variant):
    ds = make.weather()
    reference = to_window(ds, spec_of(ds))
    other = VARIANTS[variant](ds)
    spec = spec_of(other, ("slp", "t2m"))
    if variant.startswith("names told by axis"):
        spec = type(spec).from_dict({**reference.spec.to_dict()})
    same(to_window(other, spec), reference)


def test_values_land_where_their_coordinates_say(make):
    ds = make.weather().isel(latitude=slice(None, None, -1)).transpose("longitude", "latitude", "time")
    spec = spec_of(ds)
    window = to_window(ds, spec)
    assert [axis.name for axis in spec.grid.axes] == ["latitude", "longitude"]
    assert spec.grid.axes[0].centers == (30.0, 35.0, 40.0, 45.0, 50.0)
    expected = ds.t2m.isel(time=3).sel(latitude=45.0, longitude=-15.0)
    assert window.frames[0, 3, 3, 1, spec.index("t2m")] == np.float32(expected)
    assert [c.unit for c in spec.channels] == ["Pa", "K"]


def test_cartesian_axes_come_in_alphabetical_order_unless_told(make):
    ds = make.waves()
    flipped = ds.transpose("y", "x", "time", "trajectory")
    same(to_window(ds, spec_of(ds, ("u",))), to_window(flipped, spec_of(flipped, ("u",))))
    spec = spec_of(ds, ("u",), space=("y", "x"))
    assert_array_equal(to_window(ds, spec).frames[..., 0], ds.u.transpose("trajectory", "time", "y", "x"))
    with pytest.raises(SpecError, match="space"):
        spec_of(ds, ("u",), space=("x", "z"))


def test_a_window_follows_the_spec_not_the_file(make):
    ds = make.weather()
    spec = spec_of(ds, ("t2m", "slp"))
    assert_array_equal(to_window(ds, spec).frames[0, ..., 0], ds.t2m)
    assert_array_equal(to_window(ds, spec).frames[0, ..., 1], ds.slp)


def test_longitudes_match_modulo_360_and_across_a_seam(make):
    ds = make.weather()
    spec = spec_of(ds)
    east = ds.assign_coords(longitude=("longitude", ds.longitude.values % 360, ds.longitude.attrs))
    same(to_window(east, spec), to_window(ds, spec))
    assert spec_of(east).grid.axes[1].centers == spec.grid.axes[1].centers
    shuffled = east.sortby("longitude")
    same(to_window(shuffled, spec), to_window(ds, spec))


def test_only_longitudes_that_go_around_are_periodic():
    def lon(values):
        ds = xr.Dataset({"u": (("time", "lon"), np.zeros((2, len(values))))}, {"lon": values, "time": [0.0, 1.0]})
        return spec_of(ds).grid.axes[0].periodic

    assert lon(np.arange(0, 360, 2.5))
    assert lon(np.arange(-180, 180, 1.0))
    assert not lon(np.arange(0, 361, 2.5))  # the end repeats the beginning
    assert not lon(np.arange(-70, 12.5, 2.5))
    assert not lon(np.arange(0, 350, 2.5))


def test_periodic_axes_come_from_attributes_or_options(make):
    ds = make.waves()
    assert spec_of(ds, ("u",)).grid.periodic == (True, False)
    assert spec_of(ds, ("u",), periodic=("y",)).grid.periodic == (False, True)
    assert spec_of(ds.assign_attrs(periodic="x y"), ("u",)).grid.periodic == (True, True)
    assert spec_of(ds.assign_attrs(periodic=1), ("u",)).grid.periodic == (True, True)
    with pytest.raises(SpecError, match="Did you mean 'x'|Valid: x, y"):
        spec_of(ds, ("u",), periodic=("xx",))


def test_latitude_weights_are_cosines_with_mean_one(make):
    spec = spec_of(make.weather())
    cosine = np.cos(np.deg2rad(spec.grid.axes[0].centers))
    assert_allclose(spec.grid.axes[0].weights, cosine / cosine.mean(), rtol=1e-12)
    assert_allclose(spec.grid.weights().mean(), 1, rtol=1e-6)
    assert spec.grid.axes[1].weights == ()


def test_stretched_cartesian_axes_weigh_by_cell_width():
    ds = xr.Dataset({"u": (("time", "x"), np.zeros((2, 4)))}, {"x": [0.0, 1.0, 2.0, 4.0], "time": [0.0, 1.0]})
    assert_allclose(spec_of(ds).grid.axes[0].weights, np.array([1, 1, 1.5, 2]) / 1.375)


def test_missing_coordinates_lie_at_i_over_n():
    ds = xr.Dataset({"u": (("sample", "y", "x"), np.zeros((3, 4, 8)))})
    spec = spec_of(ds)
    assert [a.name for a in spec.grid.axes] == ["x", "y"]
    assert spec.grid.axes[0].centers == tuple(i / 8 for i in range(8))
    assert to_window(ds, spec).frames.shape == (3, 1, 8, 4, 1)  # one frame per trajectory


def test_static_forcing_and_parameters_reach_every_trajectory(make):
    ds = make.waves()
    spec = spec_of(ds, ("u",), forcing=("wind",), static=("a",), parameters=("viscosity",))
    window = to_window(ds, spec)
    assert_array_equal(window.static[..., 0], ds.a)
    assert_array_equal(window.forcing[..., 0], np.broadcast_to(ds.wind, (4, 7, 8, 6)))
    assert_array_equal(window.parameters[:, 0], ds.viscosity)
    scalar = ds.drop_vars("viscosity").assign_coords(viscosity=0.5)
    assert_array_equal(to_window(scalar, spec).parameters, np.full((4, 1), 0.5, "f4"))
    with pytest.raises(DataError, match="parameter 'a'"):
        to_window(ds, spec_of(ds, ("u",), parameters=("a",)))


def test_levels_are_an_axis_or_channels(make):
    ds = make.weather(days=3)
    z = xr.concat([ds.slp, ds.slp + 0.5], xr.DataArray([850.0, 500.0], dims="plev", name="plev"))
    ds = xr.Dataset({"z": z.transpose("time", "plev", "latitude", "longitude"), "slp": ds.slp})
    volume = spec_of(ds, ("z",))
    assert volume.grid.axes[0].name == "level"
    assert volume.grid.axes[0].centers == (500.0, 850.0)
    assert_array_equal(to_window(ds, volume).frames[0, :, 1, ..., 0], ds.slp)
    flat = spec_of(ds, flatten=("level",))
    assert flat.names == ("z_850", "z_500", "slp")
    window = to_window(ds, flat)
    assert_array_equal(window.frames[0, ..., 1], ds.slp + 0.5)
    same(to_window(ds, spec_of(ds, ("z_850", "z_500", "slp"))), window)
    back = from_frames(window.frames, flat, ds, ds.time.values, dim="time").isel(trajectory=0)
    xr.testing.assert_equal(back[["z"]], ds[["z"]])
    with pytest.raises(SpecError, match="flatten"):
        spec_of(ds)


def test_land_becomes_a_mask(make):
    ds = make.weather()
    land = ds.where(ds.latitude < 50)
    land["t2m"] = ds.t2m
    window = to_window(land, spec_of(land))
    assert_array_equal(window.mask[0, ..., 0], np.broadcast_to((ds.latitude.values < 50)[:, None], (5, 6)))
    assert (window.mask[0, ..., 1] == 1).all()
    assert (window.frames[0, :, -1, :, 0] == 0).all()
    assert np.isfinite(window.frames).all()
    assert to_window(ds, spec_of(ds)).mask is None


def test_a_mask_variable_adds_to_missing_values(make):
    ds = make.waves().assign(fluid=(("x", "y"), np.ones((8, 6), "i1")))
    ds.fluid[2, 3] = 0
    window = to_window(ds, spec_of(ds, ("u",), mask="fluid"))
    assert window.mask.sum() == 4 * (48 - 1)
    assert (window.mask[:, 2, 3] == 0).all()


@pytest.mark.parametrize("frame", [1, 7])
def test_nan_that_moves_is_an_error_naming_variable_and_frame(make, frame):
    ds = make.weather()
    ds.encoding["source"] = "north.nc"
    ds.t2m[frame, 2, 3] = np.nan
    with pytest.raises(DataError, match=rf"north.nc: variable 't2m' has NaN at time index {frame} .*latitude=40"):
        to_window(ds, spec_of(ds))
    dataset = XarrayDataset(ds, spec_of(ds))
    dataset.read(0, range(1))
    with pytest.raises(DataError, match=f"time index {frame}"):
        dataset.read(0, range(frame, frame + 1))  # alone in its window: compared with the first frame


def test_a_gap_in_the_first_frame_alone_names_the_first_frame(make):
    ds = make.weather()
    ds.slp[0, 1, 1] = np.nan
    with pytest.raises(DataError, match=r"'slp' has NaN at time index 0 \(2001-02-20.*value there at time index 1"):
        to_window(ds, spec_of(ds))


def test_of_several_files_the_one_with_the_gap_is_named(make, tmp_path):
    """And its frames are counted there: of joined files the first was named, and frames were counted in the split."""
    ds = make.weather()
    ds.slp[9, 1, 1] = np.nan
    ds.isel(time=slice(0, 6)).to_netcdf(tmp_path / "early.nc")
    ds.isel(time=slice(6, 12)).to_netcdf(tmp_path / "late.nc")
    config = DataConfig(path=str(tmp_path), train=(0, 4), valid=(4, 5), test=(5, 12))
    with pytest.raises(DataError, match=r"late.nc: variable 'slp' has NaN at time index 3 \(2001-03-01.*index 5 of "):
        config.open()["test"].read(0, range(7))
    (tmp_path / "whole").mkdir()
    ds.to_netcdf(tmp_path / "whole" / "all.nc")
    single = dataclasses.replace(config, path=str(tmp_path / "whole"))
    with pytest.raises(DataError, match=r"all.nc: variable 'slp' has NaN at time index 9 .*index 5\. Missing"):
        single.open()["test"].read(0, range(7))


def test_of_files_with_a_trajectory_each_the_one_with_the_gap_is_named(make, tmp_path):
    ds = make.waves()
    ds.u[2, 3, 1, 1] = np.inf
    for i in range(4):
        ds.isel(trajectory=i, drop=True).drop_vars("viscosity").to_netcdf(tmp_path / f"run_{i}.nc")
    config = DataConfig(path=str(tmp_path), variables=("u",), train=(0, 1), valid=(1, 2), test=(2, 4))
    with pytest.raises(DataError, match=r"run_2.nc: variable 'u' is infinite at time index 3 "):
        config.open()["test"].read(0, range(7))


def test_a_first_frame_of_nan_and_infinity_are_errors(make):
    ds = make.weather()
    broken = ds.copy(deep=True)
    broken.slp[0] = np.nan
    with pytest.raises(DataError, match="'slp' is NaN everywhere at time index 0"):
        to_window(broken, spec_of(broken))
    broken = ds.astype("f8")
    broken.slp[4, 0, 0] = 1e300  # finite, but not in float32
    with pytest.raises(DataError, match="'slp' is infinite at time index 4"):
        to_window(broken, spec_of(broken))


def test_nan_in_forcing_must_stay_in_place(make):
    ds = make.waves()
    spec = spec_of(ds, ("u",), forcing=("wind",))
    ds.wind[:, 0, 0] = np.nan
    assert (to_window(ds, spec).forcing[:, :, 0, 0] == 0).all()
    ds.wind[3, 1, 1] = np.nan
    with pytest.raises(DataError, match="forcing 'wind' has NaN that change with time, first at time index 3"):
        to_window(ds, spec)


@pytest.mark.parametrize(
    ("levels", "unit", "said"),
    [
        ([1000, 850], "hPa", r"t has levels 1000, 850 hPa; 500 is missing\.$"),
        ([100000, 50000], "Pa", r"t has levels 100000, 50000 Pa; 500 is missing\. Is 50000 the same in another unit"),
    ],
)
def test_a_missing_level_is_not_a_missing_variable(levels, unit, said):
    dims = ("time", "level", "x")
    coords = {"time": [0.0, 1.0], "level": ("level", levels, {"units": unit}), "x": [0.0, 0.5]}
    ds = xr.Dataset({"t": (dims, np.zeros((2, 2, 2)), {"units": "K"})}, coords)
    with pytest.raises(DataError, match=said):
        to_window(ds, dataclasses.replace(spec_of(ds, flatten=("level",)), channels=(Channel("t_500"),)))
    with pytest.raises(DataError, match="has no variable 't_max'"):
        to_window(ds, dataclasses.replace(spec_of(ds, flatten=("level",)), channels=(Channel("t_max"),)))


def test_the_ledger_of_a_forecast_is_not_offered_as_fields(make):
    ds = make.weather()
    with pytest.raises(DataError, match="no variable 'v'") as error:
        spec_of(ds.assign(ledger_mean_slp=ds.slp.mean()), ("v",))
    assert "slp" in str(error.value)
    assert "ledger" not in str(error.value)


def test_wrong_names_grids_units_and_steps_are_typed_errors(make):
    ds = make.weather()
    spec = spec_of(ds)
    with pytest.raises(DataError, match="no variable 'spl'. Did you mean 'slp'"):
        spec_of(ds, ("spl",))
    with pytest.raises(DataError, match="no variable 't2m'"):
        to_window(ds[["slp"]], spec)
    with pytest.raises(SpecError, match="3 points along 'latitude', but 5"):
        to_window(ds.isel(latitude=slice(3)), spec)
    moved = ds.assign_coords(latitude=ds.latitude + 1)
    with pytest.raises(SpecError, match="'latitude' spans 31..51"):
        to_window(moved, spec)
    hecto = ds.assign(slp=(ds.slp / 100).assign_attrs(units="hPa"))
    with pytest.raises(SpecError, match="'slp' is in 'hPa', but 'Pa'"):
        to_window(hecto, spec)
    with pytest.raises(SpecError, match="172800 s apart, but 86400 s was expected. Use data"):
        to_window(ds.isel(time=slice(None, None, 2)), spec)
    text = ds.assign(text=(ds.slp.dims, np.full(ds.slp.shape, "a")))
    with pytest.raises(DataError, match="'text' is of type"):
        to_window(text, spec_of(text, ("text",)))
    with pytest.raises(DataError, match="not monotonic"):
        spec_of(ds.assign_coords(latitude=[30.0, 40.0, 35.0, 45.0, 50.0]))
    with pytest.raises(DataError, match="no numeric variable"):
        spec_of(xr.Dataset(coords={"x": [1.0]}))


def test_a_system_without_space_is_predicted_by_its_components():
    """Lorenz' system in a file: two components in time, one number per trajectory, no space."""
    moving = ("trajectory", "time")
    ds = xr.Dataset(
        {"x": (moving, np.ones((2, 5))), "y": (moving, np.zeros((2, 5))), "rho": ("trajectory", [28.0, 29.0])},
        {"time": np.arange(5.0)},
    )
    spec = spec_of(ds.rename(x="a", y="b"))
    assert (spec.names, spec.grid.shape, spec.time_step) == (("a", "b"), (), 1.0)


def test_spellings_of_a_unit_are_one_unit(make):
    ds = make.weather()
    ds.t2m.attrs["units"] = "m s**-1"
    spec = spec_of(ds)
    assert spec.channels[1].unit == "m s-1"
    for spelling in ("m/s", "m s-1", "m s^-1", "m  s**-1"):
        ds.t2m.attrs["units"] = spelling
        to_window(ds, spec)
    ds.t2m.attrs["units"] = "km s-1"
    with pytest.raises(SpecError, match="'t2m' is in 'km s-1'"):
        to_window(ds, spec)


def test_years_far_from_now(make):
    ds = make.weather(days=3).assign_coords(time=np.array(["1200-02-27", "1200-02-28", "1200-02-29"], "datetime64[s]"))
    spec = spec_of(ds)
    window = to_window(ds, spec)
    assert_allclose(window.times[0], [0, 86400, 172800])
    assert_allclose(window.calendar[0, 2, 0], 59 / 366, rtol=1e-6)
    forecast = from_frames(window.frames[:, :1], spec, ds)
    assert forecast.time.values[0] == np.datetime64("1200-03-01")


def test_calendar_fractions(make):
    ds = make.weather(days=4, start="2003-12-30", hours=18)
    window = to_window(ds, spec_of(ds))
    assert_allclose(window.times[0], np.arange(4) * 64800)
    assert_allclose(window.calendar[0, :, 1], [0, 0.75, 0.5, 0.25])
    assert_allclose(window.calendar[0, :, 0], [363 / 365, 363.75 / 365, 364.5 / 365, 0.25 / 366], rtol=1e-6)


@pytest.mark.parametrize(("calendar", "year"), [("noleap", 365), ("360_day", 360), ("standard", 366)])
def test_calendars(make, calendar, year):
    times = xr.date_range("2004-02-27", periods=5, freq="D", calendar=calendar, use_cftime=True)
    ds = make.weather(days=5).assign_coords(time=times)
    spec = spec_of(ds)
    window = to_window(ds, spec)
    assert (spec.time_step, spec.time_unit) == (86400.0, "s")
    day = (2 - 1) * (30 if calendar == "360_day" else 31) + 26
    assert_allclose(window.calendar[0, 0, 0], day / year if calendar != "360_day" else (30 + 26) / 360, rtol=1e-6)
    forecast = from_frames(window.frames[:, :2], spec, ds)
    assert isinstance(forecast.time.values[0], cftime.datetime)
    assert forecast.time.values[0] == ds.time.values[-1] + (ds.time.values[1] - ds.time.values[0])


def test_plain_times_and_durations(make):
    ds = make.waves(step=0.1)
    spec = spec_of(ds, ("u",))
    assert (spec.time_step, spec.time_unit) == (0.1, "")
    window = to_window(ds.assign_coords(time=ds.time + 5), spec)
    assert_allclose(window.times[0], np.arange(7) * 0.1, rtol=1e-6)
    assert (window.calendar == 0).all()
    hours = ds.assign_coords(time=("time", np.arange(7) * 6.0, {"units": "hours"}))
    assert (spec_of(hours, ("u",)).time_step, spec_of(hours, ("u",)).time_unit) == (21600.0, "s")
    deltas = ds.assign_coords(time=(np.arange(7) * 6).astype("timedelta64[h]").astype("timedelta64[ns]"))
    assert (spec_of(deltas, ("u",)).time_step, spec_of(deltas, ("u",)).time_unit) == (21600.0, "s")


def test_months_are_regular_and_every_slice_has_the_same_step(make):
    times = np.arange("2001-01", "2003-01", dtype="datetime64[M]").astype("datetime64[ns]")
    ds = make.weather(days=24).assign_coords(time=times)
    spec = spec_of(ds)
    assert spec.time_step == 2629746.0  # 365.2425 / 12 days
    assert spec_of(ds.isel(time=slice(5, 9))) == spec
    assert len(XarrayDataset(ds, spec).lengths) == 1
    window = to_window(ds, spec)
    assert window.times[0, 1] == 31 * 86400
    forecast = from_frames(window.frames[:, :3], spec, ds)
    assert_array_equal(forecast.time.values, np.array(["2003-01", "2003-02", "2003-03"], "datetime64[M]"))


def test_a_jumping_time_axis_becomes_trajectories(make):
    first, second = make.weather(days=5, start="2001-02-20"), make.weather(days=4, start="2001-12-01")
    ds = xr.concat([first, second], "time")
    spec = spec_of(ds)
    dataset = XarrayDataset(ds, spec)
    assert dataset.lengths == (5, 4)
    assert_array_equal(dataset.read(1, range(4)).frames[..., 0], second.slp)
    assert dataset.labels(1)[0] == np.datetime64("2001-12-01")
    with pytest.raises(DataError, match="jumps after 2001-02-24"):
        to_window(ds, spec)
    irregular = make.weather(days=4).assign_coords(time=[0.0, 1.0, 3.0, 7.0])
    with pytest.raises(DataError, match="irregular"):
        XarrayDataset(irregular, spec_of(irregular))
    with pytest.raises(DataError, match="time does not increase at frame 5"):
        spec_of(xr.concat([first, first], "time"))


def test_forecasts_carry_labels_units_and_lead_time(make):
    ds = make.weather().isel(latitude=slice(None, None, -1)).rename(latitude="lat")
    spec = spec_of(ds)
    window = to_window(ds, spec)
    forecast = from_frames(window.frames[:, :4], spec, ds)
    assert forecast.slp.dims == ("trajectory", "lead", "lat", "longitude")
    assert_array_equal(forecast.slp[0], ds.slp[:4])
    assert forecast.slp.attrs == ds.slp.attrs
    assert forecast.attrs == ds.attrs
    assert forecast.lat.identical(ds.lat)
    days = np.arange(1, 5).astype("timedelta64[D]")
    assert_array_equal(forecast.lead.values, days.astype("timedelta64[ns]"))
    assert_array_equal(forecast.time.values, ds.time.values[-1] + days)
    later = from_frames(window.frames[:, :2], spec, ds, forecast.time.values[2:4], leads=forecast.lead.values[2:4])
    assert later.lead.identical(forecast.lead[2:4])
    starts = ds.time.values[:2, None] + days[:4]
    several = from_frames(np.repeat(window.frames[:, :4], 2, 0), spec, ds, starts)
    assert several.time.dims == ("trajectory", "lead")
    with pytest.raises(SpecError, match="was expected"):
        from_frames(window.frames[..., :1], spec, ds)


def test_labels_of_trajectories_come_back(make):
    ds = make.waves()[["u"]].assign_coords(trajectory=[10, 20, 30, 40]).rename(trajectory="member")
    spec = spec_of(ds)
    forecast = from_frames(to_window(ds, spec).frames[:, :2], spec, ds)
    assert_array_equal(forecast.trajectory, [10, 20, 30, 40])
    assert forecast.u.dims == ("trajectory", "lead", "x", "y")
    assert_allclose(forecast.lead, [0.25, 0.5])
    assert_allclose(forecast.time, ds.time[-1] + forecast.lead)


def test_a_written_forecast_reads_back_as_a_window(make, tmp_path):
    ds = make.weather()
    spec = spec_of(ds)
    frames = to_window(ds, spec).frames
    from_frames(frames[:, :5], spec, ds).to_netcdf(tmp_path / "forecast.nc")
    again = xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True)
    window = to_window(again, spec)
    assert_array_equal(window.frames, frames[:, :5])
    assert_allclose(window.calendar[0, 0, 0], 62 / 365, rtol=1e-6)  # 4 March, from the valid time


@pytest.mark.parametrize("order", [("trajectory", "time", "y", "x"), ("time", "x", "trajectory", "y")])
def test_round_trip_is_exact(make, order):
    ds = make.waves().isel(x=slice(None, None, -1)).transpose(*order)[["u"]]
    spec = spec_of(ds)
    window = to_window(ds, spec)
    back = from_frames(window.frames, spec, ds, ds.time.values, dim="time")
    xr.testing.assert_identical(back.transpose(*order), ds.assign_coords(time=back.time))
    assert_array_equal(back.time, ds.time)


def test_truth_with_labels(make):
    ds = make.waves()
    dataset = XarrayDataset(ds, spec_of(ds, ("u",)))
    truth = dataset.to_xarray(2, range(1, 4))
    assert_array_equal(truth.u.isel(trajectory=0), ds.u.isel(trajectory=2, time=slice(1, 4)))
    assert_array_equal(truth.time, ds.time[1:4])
    xr.testing.assert_equal(dataset.to_xarray(), ds)
    assert_array_equal(dataset.to_xarray([0, 3]).u, ds.u[[0, 3]])
    weather = make.weather()
    truth = XarrayDataset(weather, spec_of(weather)).to_xarray(0)
    assert truth.slp.dims[:2] == ("trajectory", "time")


def test_arrays_become_labelled():
    array = np.random.default_rng(0).normal(size=(3, 5, 8, 2))
    dims = ("sample", "time", "x", "channel")
    ds = from_array(array, dims, ("u", "v"), periodic=("x",), units={"u": "m s-1"}, time_step=0.5)
    spec = spec_of(ds)
    assert spec.names == ("u", "v")
    assert spec.channels[0].unit == "m s-1"
    assert spec.time_step == 0.5
    assert spec.grid.periodic == (True,)
    assert_array_equal(to_window(ds, spec).frames, array.astype("f4"))
    assert from_array(array[0, :, :, 0], ("time", "x")).u.dims == ("trajectory", "time", "x")
    for bad in (
        {"dims": ("sample", "time", "x")},
        {"dims": dims, "names": ("u",)},
        {"dims": dims, "names": ("u", "v"), "coords": {"x": np.arange(4)}},
        {"dims": dims, "names": ("u", "v"), "coords": {"y": np.arange(4)}},
    ):
        with pytest.raises(SpecError):
            from_array(array, **bad)
