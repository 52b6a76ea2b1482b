import importlib.util
import pathlib
import sys

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

from physml.data import cards, open_dataset, spec_of
from physml.errors import DataError
from physml.solvers import SOLVERS

DATASETS = pathlib.Path(__file__).parents[2] / "datasets"
NAMES = sorted(path.name for path in DATASETS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_cards_follow_one_template(name):
    lines = (DATASETS / name / "CARD.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert [line[3:] for line in lines if line.startswith("## ")] == list(cards.HEADINGS)
    parts = cards.sections(name)
    assert all(parts[heading] for heading in cards.HEADINGS), "a section is empty"


def test_every_source_is_well_formed():
    known = cards.sources()
    assert {name.partition("/")[0] for name in known} == {path.parent.name for path in DATASETS.glob("*/source.yaml")}
    for name, source in known.items():
        assert source.hub or source.urls or source.page, name
        assert "{" not in f"{source.hub}{source.page}", name
        assert all(digest is None or len(digest) == 64 for digest in source.urls.values()), name
    # What a card says about its repository and what is fetched are one thing.
    for name, source in known.items():
        if source.hub:
            assert source.hub.partition("/")[0] in cards.text(name.partition("/")[0])


def test_every_generated_equation_names_its_command():
    for name in set(NAMES) & set(SOLVERS):
        assert f"physml data generate {name}" in cards.sections(name)["How to get it"]


def test_summaries_fit_a_line():
    summaries = cards.summaries()
    assert set(summaries) == set(NAMES)
    for name, summary in summaries.items():
        for key in ("about", "size", "license"):
            assert summary[key], (name, key)
            assert "\n" not in summary[key]
    assert summaries["ncep_slp"]["size"] == "3.1 MB (netCDF4, zlib); 8.2 MB in memory"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "no YAML"),
        ("- a", "should hold keys"),
        ("hubb: a/b", "unknown key 'hubb'. Did you mean 'hub'"),
        ("files: ['*.nc']", "neither urls, hub nor page"),
        ("hub: a/b\nurls: [c]", "urls should map"),
        ("hub: a/{part}\nparts: {x: y}", "parts should be a list"),
    ],
)
def test_broken_sources_are_named(tmp_path, text, said):
    (tmp_path / "source.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        cards.read_source("made", tmp_path / "source.yaml")


def test_cards_that_were_not_installed_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "FOLDERS", (tmp_path,))
    with pytest.raises(DataError, match="dataset cards are missing"):
        cards.names()


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
