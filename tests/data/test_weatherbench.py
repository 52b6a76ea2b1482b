import contextlib
import json
import shutil
from pathlib import Path

import dask.array
import fsspec
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, spec_of, weatherbench
from physml.data.axes import area_weights
from physml.data.formats import recognize
from physml.data.place import Place
from physml.data.weatherbench import at_times
from physml.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples"
ROOT = SAMPLES / "weatherbench2"
ANALYSIS = ROOT / "2020-6h-16x8_equiangular_conservative.zarr"
DESCENDING = ROOT / "2020-6h-16x8_latlon_descending.zarr"
CLIMATOLOGY = ROOT / "1990-2019_6h_16x8_equiangular_conservative.zarr"
FORECAST = ROOT / "forecast_2020-16x8.zarr"
WEIGHTS = [0.30448, 0.86709, 1.29769, 1.53073, 1.53073, 1.29769, 0.86709, 0.30448]


@pytest.fixture
def copy(tmp_path):
    """A copy of a sample whose arrays can be edited: `copy(sample, {"name/.zarray": {"key": value}})`."""

    def make(sample: Path, edits: dict | None = None) -> Path:
        target = tmp_path / "store.zarr"
        shutil.copytree(sample, target)
        content = json.loads((target / ".zmetadata").read_text())
        for key, change in (edits or {}).items():
            content["metadata"][key] |= change
            (target / key).write_text(json.dumps(content["metadata"][key]))
        (target / ".zmetadata").write_text(json.dumps(content))
        return target

    return make


def rewritten(ds: xr.Dataset, path: Path) -> Path:
    for variable in ds.variables.values():
        variable.encoding.clear()
    ds.attrs.pop("format", None)
    ds.to_zarr(path, zarr_format=2, consolidated=True)
    return path


def mean(field: xr.DataArray) -> xr.DataArray:
    """Over the globe, as WeatherBench 2 weighs it, in double precision."""
    weights = xr.DataArray(area_weights(field.latitude), dims="latitude")
    return (field * weights).mean(["latitude", "longitude"])


@pytest.mark.parametrize("sample", [ANALYSIS, DESCENDING, CLIMATOLOGY, FORECAST])
def test_stores_are_recognized(sample):
    assert recognize(sample) == "weatherbench2"
    assert physml.open_dataset(sample).attrs["format"] == "weatherbench2"


def test_others_are_not_recognized(make, tmp_path):
    others = [path for path in SAMPLES.rglob("*") if "weatherbench2" not in path.parts]
    make.weather().to_zarr(tmp_path / "plain.zarr", zarr_format=2)
    ds = xr.open_zarr(ANALYSIS)[["temperature", "geopotential"]]
    rewritten(ds, tmp_path / "telling_little.zarr")
    forecast = xr.open_zarr(ANALYSIS)[["2m_temperature"]].expand_dims("trajectory")
    rewritten(forecast, tmp_path / "with_trajectories.zarr")
    for path in [*others, *tmp_path.iterdir()]:
        with contextlib.suppress(DataError):
            assert not weatherbench.recognizes(Place(path)), path
    assert physml.open_dataset(tmp_path / "plain.zarr")["slp"].dims[:2] == ("trajectory", "time")


def test_analysis_is_labelled_and_lazy():
    ds = weatherbench.open_dataset(Place(ANALYSIS))
    assert ds["geopotential"].dims == ("time", "level", "longitude", "latitude")
    assert ds["2m_temperature"].dims == ("time", "longitude", "latitude")
    assert ds["land_sea_mask"].dims == ("longitude", "latitude")
    assert ds["geopotential"].attrs["units"] == "m**2 s**-2"
    assert [ds[dim].attrs["units"] for dim in ("level", "latitude", "longitude")] == [
        "hPa",
        "degrees_north",
        "degrees_east",
    ]
    assert (ds.longitude.attrs["periodic"], ds.longitude.attrs["period"], ds.latitude.attrs["periodic"]) == (1, 360, 0)
    for name in ds.data_vars:
        assert not isinstance(ds[name].variable._data, np.ndarray)
    chunks = physml.open_dataset(ANALYSIS)["geopotential"].data
    assert isinstance(chunks, dask.array.Array)
    assert chunks.chunksize == (1, 3, 16, 8)


def test_values_are_found_by_name_in_both_orders():
    first, second = physml.open_dataset(ANALYSIS), physml.open_dataset(DESCENDING)
    assert_allclose(first["2m_temperature"][2, 3, 4], 276.346344, rtol=1e-7)
    assert_allclose(first["geopotential"][2, 1, 3, 4], 23927.611, rtol=1e-7)
    assert second["geopotential"].dims == ("time", "level", "latitude", "longitude")
    assert second.latitude[0] > second.latitude[-1]
    for name in ("geopotential", "2m_temperature", "land_sea_mask"):
        same = {dim: second[dim] for dim in second[name].dims}
        assert_array_equal(first[name].sel(same).transpose(*same), second[name])
    names = ("2m_temperature", "temperature_850")
    specs = [spec_of(ds, names, static=("land_sea_mask",), flatten=("level",)) for ds in (first, second)]
    assert specs[0].grid == specs[1].grid


def test_area_weights_are_those_of_the_benchmark():
    latitude = physml.open_dataset(ANALYSIS).latitude
    assert_allclose(area_weights(latitude), WEIGHTS, atol=5e-6)  # published with five digits
    axis = spec_of(physml.open_dataset(ANALYSIS), ["2m_temperature"]).grid.axes[0]
    assert axis.name == "latitude"
    assert_allclose(axis.weights, area_weights(latitude), rtol=1e-12)
    poles = np.linspace(90, -90, 121)
    bounds = np.sin(np.deg2rad([89.25, 0.75]))
    assert_allclose(area_weights(poles)[0] / area_weights(poles)[60], (1 - bounds[0]) / (2 * bounds[1]), rtol=1e-9)
    assert_allclose(area_weights(poles[::-1]), area_weights(poles)[::-1], rtol=1e-12)
    assert area_weights([10.0]) == [1.0]


def test_forecast_has_the_dimensions_of_forecasts():
    ds = weatherbench.open_dataset(Place(FORECAST))
    assert ds["geopotential"].dims == ("trajectory", "lead", "level", "longitude", "latitude")
    assert_array_equal(ds.lead, np.arange(4) * np.timedelta64(6, "h"))
    assert_array_equal(ds.initial_time, np.array(["2020-01-01T00", "2020-01-01T12"], "datetime64[ns]"))
    assert_array_equal(ds.time, ds.initial_time + ds.lead)
    assert not isinstance(ds["geopotential"].variable._data, np.ndarray)


def test_scores_of_the_forecast_are_those_of_the_benchmark():
    forecast, truth, climatology = map(physml.open_dataset, (FORECAST, ANALYSIS, CLIMATOLOGY))
    at = truth.sel(time=forecast.time, level=forecast.level)
    square = mean((forecast["2m_temperature"].astype("f8") - at["2m_temperature"]) ** 2).mean("trajectory")
    assert_allclose(square, [0, 0.25, 1, 2.25], atol=2e-6)  # float32 of 300
    assert_allclose(np.sqrt(square), [0, 0.5, 1, 1.5], atol=2e-6)
    normal = at_times(climatology, forecast.time)
    expected = {
        "2m_temperature": [0.99940169, 0.99914771],
        "geopotential": [[0.99999995, 0.99999996], [0.99999994, 0.99999994]],
    }
    for name, values in expected.items():
        p, t = (ds[name].astype("f8") - normal[name] for ds in (forecast, at))
        score = mean(p * t) / np.sqrt(mean(p**2) * mean(t**2))
        score = score.isel(lead=1).transpose(..., "trajectory")
        assert_allclose(score, values, atol=1e-8)


@pytest.mark.parametrize("name", ["2m_temperature", "geopotential"])
def test_evaluate_scores_a_forecast_store(name):
    forecast, truth, climatology = map(physml.open_dataset, (FORECAST, ANALYSIS, CLIMATOLOGY))
    scores = physml.evaluate(
        forecast[[name]].isel(lead=slice(1, None)),
        truth.sel(level=forecast.level),
        climatology=climatology,
        metrics=("rmse", "acc"),
    )
    assert_allclose(scores.score.sel(metric="rmse").isel(model=0, channel=-1), [0.5, 1, 1.5], rtol=2e-6)
    acc = {"2m_temperature": np.mean([0.99940169, 0.99914771]), "geopotential": 0.99999994}[name]
    assert_allclose(scores.score.sel(metric="acc").isel(model=0, channel=-1, lead=0), acc, atol=1e-6)  # float32


def test_climatology_is_looked_up_by_hour_and_day():
    climatology = physml.open_dataset(CLIMATOLOGY)
    assert climatology["geopotential"].dims == ("hour", "dayofyear", "level", "longitude", "latitude")
    assert "total_precipitation_6hr_seeps_threshold" in climatology
    assert "total_precipitation_6hr_seeps_dry_fraction" in climatology
    times = np.array(["2020-01-01T06", "2019-12-31T18", "2020-12-31T00"], "datetime64[ns]")
    found = at_times(climatology, times)
    assert found["geopotential"].dims == ("time", "level", "longitude", "latitude")
    for i, (hour, day) in enumerate([(1, 0), (3, 364), (0, 365)]):
        assert_array_equal(found["geopotential"][i], climatology["geopotential"][hour, day])
    assert_array_equal(found.time, times)
    with pytest.raises(DataError, match=r"hours \[0, 6, 12, 18\] only"):
        at_times(climatology, times + np.timedelta64(3, "h"))


def test_training_reads_windows_of_an_analysis():
    config = DataConfig(
        path=str(ANALYSIS),
        variables=("2m_temperature", "geopotential"),
        static=("land_sea_mask",),
        flatten=("level",),
        levels=(500, 850),
        train=("2020-01-01", "2020-01-02"),
        valid=("2020-01-03",),
        test=(),
    )
    splits = config.open()
    spec = splits["train"].spec
    assert spec.names == ("2m_temperature", "geopotential_500", "geopotential_850")
    assert (spec.grid.shape, spec.time_step) == ((8, 16), 6 * 3600)
    assert (splits["train"].lengths, splits["valid"].lengths) == ((8,), (4,))
    window = splits["valid"].read(0, range(2))
    raw = xr.open_zarr(ANALYSIS)["geopotential"].sel(level=850).isel(time=[8, 9]).transpose("time", "latitude", ...)
    assert_array_equal(window.frames[..., 2], raw)
    assert window.static.shape == (8, 16, 1)


def test_training_reads_windows_of_forecasts():
    splits = DataConfig(path=str(FORECAST), variables=("2m_temperature",), train=(0, 1), valid=(1, 2), test=()).open()
    assert splits["train"].read(0, range(3)).frames.shape == (3, 8, 16, 1)
    assert splits["train"].spec.time_step == 6 * 3600


def test_other_spellings_are_read(tmp_path):
    raw = xr.open_zarr(FORECAST).load()
    hours = raw.rename(time="init_time", prediction_timedelta="lead_time", latitude="lat", longitude="lon")
    hours = hours.assign_coords(lead_time=("lead_time", [0, 6, 12, 18], {"units": "hours"}))
    hours = hours.chunk(init_time=1).astype("f8")
    hours["unknown"] = 3
    hours["2m_temperature"][0, 1, 2, 3] = np.nan
    path = rewritten(hours, tmp_path / "forecast.zarr")
    ds, same = physml.open_dataset(path), physml.open_dataset(FORECAST)
    assert ds["geopotential"].dims == same["geopotential"].dims
    assert ds["geopotential"].dtype == np.float64
    assert ds["geopotential"].chunks[:2] == ((1, 1), (4,))
    assert_array_equal(ds.time, same.time)
    assert_array_equal(ds["geopotential"], same["geopotential"])
    assert np.isnan(ds["2m_temperature"][0, 1, 2, 3])


def test_stores_without_levels_and_single_times_are_read(tmp_path):
    raw = xr.open_zarr(ANALYSIS)[["2m_temperature"]].isel(time=[0]).load()
    ds = physml.open_dataset(rewritten(raw, tmp_path / "one.zarr"))
    assert ds["2m_temperature"].shape == (1, 16, 8)


def test_urls_are_read():
    files = {f"/weather/a.zarr/{p.relative_to(ANALYSIS)}": p.read_bytes() for p in ANALYSIS.rglob("*") if p.is_file()}
    memory = fsspec.filesystem("memory")
    memory.pipe(files)
    try:
        ds = physml.open_dataset("memory://weather/a.zarr")
        assert ds.attrs["format"] == "weatherbench2"
        assert_allclose(ds["2m_temperature"][2, 3, 4], 276.346344, rtol=1e-7)
    finally:
        memory.rm("/weather", recursive=True)


def test_a_store_without_consolidated_metadata_is_read_when_named(copy):
    path = copy(ANALYSIS)
    (path / ".zmetadata").unlink()
    assert physml.open_dataset(path, format="weatherbench2")["geopotential"].shape == (12, 3, 16, 8)


@pytest.mark.parametrize(
    ("sample", "edits", "message"),
    [
        (ANALYSIS, {"geopotential/.zarray": {"shape": [11, 3, 16, 8]}}, "cannot be opened"),
        (ANALYSIS, {"geopotential/.zarray": {"chunks": [1, 2**20, 2**10, 8]}}, "one chunk of 'geopotential'"),
        (ANALYSIS, {"time/.zarray": {"shape": [10**12], "chunks": [12]}}, "'time' has 1000000000000 entries"),
        (ANALYSIS, {"time/.zattrs": {"units": "weeks of 2020"}}, "'time' holds int64"),
        (ANALYSIS, {"time/.zattrs": {"units": "hours since never"}}, "time axis cannot be decoded"),
        (ANALYSIS, {"latitude/.zattrs": {"_ARRAY_DIMENSIONS": ["row"]}}, "latitude"),
        (ANALYSIS, {"temperature/.zarray": {"dtype": "|O", "filters": [{"id": "pickle"}]}}, "'temperature' holds obj"),
        (FORECAST, {"prediction_timedelta/.zattrs": {"units": "weeks", "dtype": ""}}, "prediction_timedelta"),
    ],
)
def test_wrong_metadata_are_refused(copy, sample, edits, message):
    path = copy(sample, edits)
    with pytest.raises(DataError, match=message) as error:
        physml.open_dataset(path, format="weatherbench2")
    assert str(path) in str(error.value)


def test_wrong_content_is_refused(tmp_path):
    raw = xr.open_zarr(ANALYSIS)[["2m_temperature"]].load()

    def refused(ds, message):
        path = rewritten(ds.copy(), tmp_path / "wrong.zarr")
        with pytest.raises(DataError, match=message):
            physml.open_dataset(path, format="weatherbench2")
        shutil.rmtree(path)

    refused(raw.isel(time=[0, 2, 1]), "'time' does not increase")
    refused(raw.isel(time=slice(0, 0)), "'time' holds|cannot be opened")
    refused(raw.isel(time=0), "neither 'time' nor")
    refused(raw.drop_vars("latitude"), "'latitude' with a coordinate was expected")
    refused(raw.isel(latitude=[0, 2, 1]), "not monotonic")
    climatology = xr.open_zarr(CLIMATOLOGY)[["2m_temperature"]].isel(hour=[0, 1], dayofyear=[0, 1, 2]).load()
    refused(climatology.assign_coords(dayofyear=[0, 1, 2]), "'dayofyear' holds")
    forecast = xr.open_zarr(FORECAST)[["2m_temperature"]].load()
    refused(forecast.isel(prediction_timedelta=[1, 0]), "ascending durations")


def test_damaged_and_missing_files_are_named(copy, tmp_path):
    path = copy(ANALYSIS)
    (path / ".zmetadata").write_text('{"metadata": {')
    with pytest.raises(DataError, match="zmetadata is damaged"):
        physml.open_dataset(path, format="weatherbench2")
    shutil.rmtree(path)
    path = copy(ANALYSIS)
    chunk = path / "2m_temperature" / "3.0.0"
    chunk.write_bytes(chunk.read_bytes()[:30])
    ds = physml.open_dataset(path)
    with pytest.raises(DataError, match="'2m_temperature' cannot be read"):
        ds["2m_temperature"].load()
    assert np.isfinite(ds["2m_temperature"][:3]).all()
    with pytest.raises(DataError, match="no file|There is no"):
        physml.open_dataset(tmp_path / "nowhere.zarr", format="weatherbench2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        physml.open_dataset(tmp_path / "empty", format="weatherbench2")
    with pytest.raises(ConfigError, match="no option 'split'"):
        physml.open_dataset(ANALYSIS, split="train")


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    outcomes = [
        survives(damage(sample, tmp_path / "damaged.zarr", seed), "weatherbench2")
        for seed in seeds
        for sample in [(ANALYSIS, DESCENDING, CLIMATOLOGY, FORECAST)[seed % 4]]
    ]
    assert set(outcomes) == {"opened", "DataError"}
