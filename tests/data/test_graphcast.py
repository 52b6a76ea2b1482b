import contextlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_array_equal

import physml
from physml.data import DataConfig, graphcast
from physml.data.formats import recognize
from physml.data.place import Place
from physml.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
NAME = "source-era5_date-2022-01-01_res-1.0_levels-2_steps-04.nc"
LEVELS, LAT, LON = np.array([500, 850]), np.linspace(-90, 90, 7), np.arange(12) * 30.0


def raw(frames=6, batch=1, date="2022-01-01", dtype="f4", levels=LEVELS) -> xr.Dataset:
    """value = 1000 * frame + 100 * level index + latitude, in the layout of the samples."""
    time = np.arange(frames) * np.timedelta64(6, "h").astype("timedelta64[ns]")
    dates = np.datetime64(date, "ns") + np.arange(batch)[:, None] * np.timedelta64(1, "D") + time
    flat = 1000.0 * np.arange(frames)[:, None, None] + LAT[:, None] + LON / 1000
    flat = np.broadcast_to(flat, (batch, *flat.shape)).astype(dtype)
    deep = (flat[:, :, None] + 100 * np.arange(len(levels))[:, None, None]).astype(dtype)
    ocean = np.where(LON > 100, np.nan, flat).astype(dtype)
    return xr.Dataset(
        {
            "2m_temperature": (("batch", "time", "lat", "lon"), flat),
            "sea_surface_temperature": (("batch", "time", "lat", "lon"), ocean),
            "geopotential": (("batch", "time", "level", "lat", "lon"), deep),
            "land_sea_mask": (("lat", "lon"), np.ones((7, 12), dtype)),
        },
        {"time": time, "datetime": (("batch", "time"), dates), "level": levels, "lat": LAT, "lon": LON},
    )


@pytest.fixture
def sample(tmp_path):
    raw().to_netcdf(tmp_path / NAME)
    return tmp_path / NAME


def test_names_carry_facts():
    assert graphcast.facts("source-era5_date-2022-01-01_res-1.0_levels-13_steps-04.nc") == {
        "source": "era5",
        "date": "2022-01-01",
        "res": "1.0",
        "levels": "13",
        "steps": "04",
    }
    for other in ("era5_2022.nc", "source-era5_date-2022-01-01.nc", NAME.replace(".nc", ".zarr"), "-.nc", ".nc"):
        assert graphcast.facts(other) == {}


def test_samples_are_labelled_and_lazy(sample):
    assert recognize(sample) == "graphcast"
    ds = graphcast.open_dataset(Place(sample))
    assert ds["geopotential"].dims == ("trajectory", "time", "level", "latitude", "longitude")
    assert ds["land_sea_mask"].dims == ("latitude", "longitude")
    for field in ds.data_vars.values():
        assert not isinstance(field.variable._data, np.ndarray)
    assert_array_equal(ds.time, raw().datetime[0])
    assert_array_equal(ds.datetime, raw().datetime)
    assert (ds.attrs["name_source"], ds.attrs["name_date"], ds.attrs["name_res"]) == ("era5", "2022-01-01", "1.0")
    assert [ds[n].attrs["units"] for n in ("geopotential", "level", "latitude")] == ["m2 s-2", "hPa", "degrees_north"]
    assert ds.longitude.attrs["periodic"] == 1
    for name in ds.data_vars:
        assert_array_equal(ds[name], raw()[name])


def test_training_masks_land(sample):
    config = DataConfig(
        path=str(sample),
        variables=("2m_temperature", "sea_surface_temperature", "geopotential"),
        static=("land_sea_mask",),
        flatten=("level",),
        train=(0, 4),
        valid=(4, 6),
        test=(),
    )
    splits = config.open()
    assert splits["train"].spec.time_step == 6 * 3600
    window = splits["train"].read(0, range(3))
    assert_array_equal(window.frames[..., 3], raw()["geopotential"][0, :3, 1])
    assert_array_equal(window.mask[0, :, 1] == 0, LON > 100)
    assert not np.isnan(window.frames).any()


def test_a_folder_of_samples_is_one_dataset(tmp_path):
    for day in (1, 2, 3):
        raw(date=f"2022-01-0{day}").to_netcdf(tmp_path / NAME.replace("01-01", f"01-0{day}"))
    assert recognize(tmp_path) == "graphcast"
    ds = physml.open_dataset(tmp_path)
    assert ds["geopotential"].shape == (3, 6, 2, 7, 12)
    assert_array_equal(ds.time, raw().time)
    assert_array_equal(ds.datetime[2], raw(date="2022-01-03").datetime[0])
    assert (ds.attrs["name_res"], "name_date" in ds.attrs) == ("1.0", False)
    splits = DataConfig(path=str(tmp_path), variables=("2m_temperature",), train=(0, 2), valid=(2, 3), test=()).open()
    assert splits["train"].lengths == (6, 6)
    raw(levels=np.array([500, 700])).to_netcdf(tmp_path / NAME.replace("01-01", "01-09"))
    with pytest.raises(DataError, match="differ in grid, levels, times or variables"):
        physml.open_dataset(tmp_path)


def test_batches_and_their_absence_are_read(tmp_path):
    raw(batch=2).to_netcdf(tmp_path / NAME)
    ds = physml.open_dataset(tmp_path / NAME)
    assert ds["2m_temperature"].sizes["trajectory"] == 2
    assert ds.time.dtype.kind == "m"
    raw(dtype="f8").isel(batch=0).assign(unknown=3).to_netcdf(tmp_path / "plain.nc")
    ds = physml.open_dataset(tmp_path / "plain.nc", format="graphcast")
    assert ds["geopotential"].dims == ("time", "level", "latitude", "longitude")
    assert (ds["geopotential"].dtype, "unknown" in ds) == (np.float64, True)
    assert_array_equal(ds.time, raw().datetime[0])
    hours = raw().drop_vars("datetime").assign_coords(time=("time", np.arange(6) * 6, {"units": "hours"}))
    hours.to_netcdf(tmp_path / "hours.nc")
    ds = physml.open_dataset(tmp_path / "hours.nc", format="graphcast")
    assert_array_equal(ds.time, raw().time)


def test_normalization_files_are_read(tmp_path):
    for i, name in enumerate(("mean", "stddev", "diffs_stddev")):
        stats = xr.Dataset({"geopotential": ("level", [i + 0.5, i + 1.5]), "2m_temperature": i}, {"level": LEVELS})
        stats.to_netcdf(tmp_path / f"{name}_by_level.nc")
    assert recognize(tmp_path / "mean_by_level.nc") == "graphcast"
    assert physml.open_dataset(tmp_path / "mean_by_level.nc")["geopotential"].dims == ("level",)
    stats[["geopotential"]].to_netcdf(tmp_path / "min_by_level.nc")
    ds = physml.open_dataset(tmp_path)
    assert_array_equal(ds["geopotential"].sel(statistic="stddev"), [1.5, 2.5])
    assert ds["2m_temperature"].sel(statistic="diffs_stddev") == 2
    assert np.isnan(ds["2m_temperature"].sel(statistic="min"))
    stats.assign_coords(level=[1, 2]).to_netcdf(tmp_path / "min_by_level.nc")
    with pytest.raises(DataError, match="statistics differ"):
        physml.open_dataset(tmp_path)
    raw().to_netcdf(tmp_path / "min_by_level.nc")
    with pytest.raises(DataError, match="only 'level' was expected"):
        physml.open_dataset(tmp_path)


def test_urls_are_read(sample):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/graphcast/{NAME}", sample.read_bytes())
    try:
        ds = physml.open_dataset(f"memory://graphcast/{NAME}")
        assert ds.attrs["format"] == "graphcast"
        assert_array_equal(ds["geopotential"], raw()["geopotential"])
    finally:
        memory.rm("/graphcast", recursive=True)


def test_others_are_not_recognized(make, tmp_path):
    make.weather().to_netcdf(tmp_path / "weather.nc")
    for path in [*SAMPLES.rglob("*"), tmp_path, *tmp_path.iterdir()]:
        with contextlib.suppress(DataError):
            assert not graphcast.recognizes(Place(path)), path


def test_wrong_files_are_refused(tmp_path):
    def refused(ds, message):
        path = tmp_path / str(len(list(tmp_path.iterdir()))) / NAME  # an open file cannot be written again
        path.parent.mkdir()
        ds.to_netcdf(path)
        with pytest.raises(DataError, match=message) as error:
            physml.open_dataset(path)
        assert str(path) in str(error.value)

    refused(raw(levels=np.array([500])), "has 1 levels, but its name says 2")
    refused(raw().drop_vars("lat"), "'latitude' with a coordinate")
    refused(raw().drop_vars("time"), "no coordinate 'time'")
    refused(raw().isel(time=[0, 0]), "ascending durations")
    refused(raw().isel(batch=slice(0, 0)), "one sample at least")
    refused(raw().isel(time=0), "one sample at least|coordinate")
    refused(raw().assign_coords(datetime=("time", np.arange(6.0))), "dates of frames")
    refused(raw().assign_coords(level=[500, 500]), "repeat")
    path = tmp_path / NAME
    raw().to_netcdf(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="damaged or incomplete"):
        physml.open_dataset(path)
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(DataError, match="neither netCDF nor zarr"):
        physml.open_dataset(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no sample"):
        physml.open_dataset(tmp_path / "empty", format="graphcast")


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    folder = tmp_path / "folder"
    folder.mkdir()
    for day in (1, 2):
        raw(date=f"2022-01-0{day}", frames=2).to_netcdf(folder / NAME.replace("01-01", f"01-0{day}"))
    sources, targets = (folder / NAME, folder), (tmp_path / "damaged" / NAME, tmp_path / "damaged_folder")
    outcomes = [survives(damage(sources[i % 2], targets[i % 2], i), "graphcast") for i in seeds]
    assert set(outcomes) == {"opened", "DataError"}
