import importlib.util
import pathlib
import sys

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

from physml.data import open_dataset, spec_of
from physml.errors import DataError

DATASETS = pathlib.Path(__file__).parents[2] / "datasets"
HEADINGS = [
    "Equation", "Variables and units", "Grid and boundary", "Parameters", "Splits", "Size", "License", "Citation",
    "How to get it", "Baseline scores",
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "ncep_slp",
        "era5_t2m_uk",
        "darcy",
        "weatherbench2",
        "carbonbench",
        "cfdbench",
        "pdebench",
        "graphcast",
        "merra2",
        "the_well",
        "pdearena",
        "poseidon",
        "jax_cfd",
    ],
)
def test_cards_follow_one_template(name):
    text = (DATASETS / name / "CARD.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == HEADINGS


@pytest.fixture
def prepare(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare", DATASETS / "ncep_slp" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prepare", module)
    spec.loader.exec_module(module)
    return module.prepare


@pytest.fixture
def years(tmp_path):
    """Yearly files in the layout of the archive: global, latitude descending, longitude 0..357.5, packed integers."""
    latitude, longitude = np.arange(90, -90.1, -2.5, dtype="f4"), np.arange(0, 360, 2.5, dtype="f4")
    for year in (2001, 2002):
        time = np.arange(f"{year}-01-01", f"{year}-01-04", dtype="datetime64[D]").astype("datetime64[ns]")
        day = np.arange(3)[:, None, None] + 10 * (year - 2001)
        value = 100000.0 + 1000 * day + 10 * latitude[:, None] + longitude
        ds = xr.Dataset(
            {"slp": (("time", "lat", "lon"), value.astype("f4"), {"units": "Pascals"})},
            {
                "time": time,
                "lat": ("lat", latitude, {"units": "degrees_north"}),
                "lon": ("lon", longitude, {"units": "degrees_east"}),
            },
        )
        packed = {"dtype": "i2", "scale_factor": 10.0, "add_offset": 119765.0, "_FillValue": np.int16(32767)}
        encoding = {"slp": packed, "time": {"units": "hours since 1800-01-01", "dtype": "f8"}}
        ds.to_netcdf(tmp_path / f"slp.{year}.nc", encoding=encoding)
    return [str(tmp_path / f"slp.{year}.nc") for year in (2001, 2002)]


def test_preparing_cuts_the_region_across_greenwich(prepare, years):
    ds = prepare(years[:1], "2001-01-01", "2001-01-03")
    assert ds.slp.dims == ("time", "latitude", "longitude")
    assert_array_equal(ds.latitude, np.arange(30, 70.1, 2.5))
    assert_array_equal(ds.longitude, np.arange(-70, 10.1, 2.5))
    assert ds.slp.attrs["units"] == "Pa"
    raw = xr.open_dataset(years[0]).slp
    for lat, lon in ((30, -70), (70, 10), (52.5, 0), (32.5, -2.5)):
        assert_array_equal(ds.slp.sel(latitude=lat, longitude=lon), raw.sel(lat=lat, lon=lon % 360))
    assert spec_of(ds).grid.shape == (17, 33)


def test_preparing_refuses_gaps_and_other_units(prepare, years, tmp_path):
    with pytest.raises(DataError, match=r"days are missing, the first is 2001-01-04. Add the file slp.2001.nc"):
        prepare(years, "2001-01-01", "2002-01-03")
    other = xr.open_dataset(years[0]).load()
    other.slp.attrs["units"] = "hPa"
    other.to_netcdf(tmp_path / "other.nc")
    with pytest.raises(DataError, match="in 'hPa', but pascal"):
        prepare([str(tmp_path / "other.nc")], "2001-01-01", "2001-01-03")


def test_the_script_writes_a_file_or_one_clear_line(prepare, years, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.nc"

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["prepare.py", years[0], "--out", str(out), "--last", "2001-01-03", *options])
        return sys.modules[prepare.__module__].main()

    assert run("--first", "2000-12-31") == 2
    assert "days are missing" in capsys.readouterr().err
    assert list(tmp_path.glob("out*")) == []
    assert run("--first", "2001-01-01") == 0
    assert open_dataset(out).slp.shape == (1, 3, 17, 33)
