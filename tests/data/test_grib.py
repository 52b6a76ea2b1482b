"""GRIB files, written with ecCodes itself. The reading tests need the extra `grib`; the others run without."""

import sys

import numpy as np
import pytest

import physml
from physml.data import netcdf
from physml.errors import DataError, DependencyError

LATITUDE, LONGITUDE = np.linspace(60, 40, 5), np.linspace(0, 15, 4)


@pytest.fixture
def eccodes():
    try:
        import cfgrib  # noqa: F401
        import eccodes
    except Exception as error:
        pytest.skip(f"the extra `grib` is not installed ({type(error).__name__}: {error})")
    return eccodes


def write(eccodes, path, messages):
    """Messages of (short name, level or None, day, step): value = level + 10 day + step + row + column / 10."""
    with path.open("wb") as file:
        for name, level, day, step in messages:
            message = eccodes.codes_grib_new_from_samples("regular_ll_pl_grib2")
            keys = {
                "Ni": 4, "Nj": 5, "latitudeOfFirstGridPointInDegrees": 60, "latitudeOfLastGridPointInDegrees": 40,
                "longitudeOfFirstGridPointInDegrees": 0, "longitudeOfLastGridPointInDegrees": 15,
                "iDirectionIncrementInDegrees": 5, "jDirectionIncrementInDegrees": 5, "dataDate": 20200100 + day,
                "dataTime": 0, "typeOfLevel": "isobaricInhPa" if level else "heightAboveGround", "level": level or 2,
                "shortName": name, "endStep": step, "bitsPerValue": 24,
            }  # fmt: skip
            for key, value in keys.items():
                eccodes.codes_set(message, key, value)
            values = (level or 0) + 10 * day + step + np.arange(5)[:, None] + np.arange(4) / 10
            eccodes.codes_set_values(message, values.ravel().astype(float))
            eccodes.codes_write(message, file)
            eccodes.codes_release(message)
    return path


def test_a_file_opens_with_the_names_of_physml(eccodes, tmp_path):
    path = write(eccodes, tmp_path / "a.grib", [("t", p, day, 0) for day in (1, 2, 3) for p in (850, 500)])
    ds = physml.open_dataset(path)
    assert ds["t"].dims == ("trajectory", "time", "level", "latitude", "longitude")
    assert ds["t"].attrs["units"] == "K"
    np.testing.assert_allclose(ds.latitude, LATITUDE)
    np.testing.assert_allclose(ds.longitude, LONGITUDE)
    assert ds.time.values.astype("datetime64[D]").astype(str).tolist() == ["2020-01-01", "2020-01-02", "2020-01-03"]
    assert float(ds["t"].sel(level=500).isel(trajectory=0, time=1, latitude=2, longitude=3)) == pytest.approx(
        522.3, abs=1e-4
    )  # 24 bits over a range of 400
    assert physml.data.spec_of(ds).grid.shape == (2, 5, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.grib"]  # no index beside it


def test_a_forecast_has_valid_times(eccodes, tmp_path):
    ds = physml.open_dataset(write(eccodes, tmp_path / "f.grib", [("2t", None, 1, step) for step in (6, 12)]))
    assert ds["t2m"].dims == ("trajectory", "time", "latitude", "longitude")
    assert ds.time.values.astype("datetime64[h]").astype(str).tolist() == ["2020-01-01T06", "2020-01-01T12"]
    assert float(ds["t2m"][0, 1, 0, 0]) == pytest.approx(22, abs=1e-4)


def test_what_does_not_fit_together_is_chosen_from(eccodes, tmp_path):
    levels = [("t", p, 1, 0) for p in (850, 500)]
    path = write(eccodes, tmp_path / "mixed.grib", [*levels, ("z", 300, 1, 0), ("z", 200, 1, 0)])
    with pytest.raises(DataError, match="filter_by_keys"):
        physml.open_dataset(path)
    ds = physml.open_dataset(path, filter_by_keys={"shortName": "t"})
    assert list(ds.data_vars) == ["t"]
    with pytest.raises(DataError, match="no GRIB message with"):
        physml.open_dataset(path, filter_by_keys={"shortName": "absent"})


def test_damage_is_told(eccodes, tmp_path):
    path = write(eccodes, tmp_path / "a.grib", [("t", 850, day, 0) for day in (1, 2)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 20])
    with pytest.raises(DataError, match="a.grib"):
        physml.open_dataset(path).compute()
    path.write_bytes(b"GRIB" + bytes(200))
    with pytest.raises(DataError, match="a.grib"):
        physml.open_dataset(path).compute()


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.grib").write_bytes(b"GRIB" + bytes(100))
    assert netcdf.detect(str(tmp_path / "a.grib")) == "grib"
    monkeypatch.setitem(sys.modules, "cfgrib", None)
    with pytest.raises(DependencyError, match=r"pip install 'physml\[grib\]'"):
        physml.open_dataset(tmp_path / "a.grib")
    with pytest.raises(DataError, match="is GRIB, not netCDF"):
        physml.open_dataset(tmp_path / "a.grib", format="netcdf")
    (tmp_path / "a.nc").write_bytes(b"CDF\x01" + bytes(100))
    with pytest.raises(DataError, match="no GRIB file"):
        physml.open_dataset(tmp_path / "a.nc", format="grib")
