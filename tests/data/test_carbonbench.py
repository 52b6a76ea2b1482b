import contextlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, carbonbench
from physml.data.formats import recognize
from physml.data.place import Place
from physml.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples"
NAMES_3D, NAMES_2D = ["co2massmix", "airmass", "u"], ["co2flux_land", "cell_area"]
STORE = "carbontracker_latlon5.625_l10_6h"


def raw(times=4, start="2016-12-30", levels=3, dtype="f4", names=NAMES_3D) -> xr.Dataset:
    """value = 1000 * entry + 100 * time + 10 * level + latitude + longitude / 100, in the layout of the benchmark; the
    second field of the surface does not change with time.
    """
    time = np.datetime64(start, "ns") + np.arange(times) * np.timedelta64(6, "h")
    lat, lon = np.linspace(-78.75, 78.75, 8), np.arange(16) * 22.5
    entry, hour, level = np.arange(len(names)), np.arange(times), np.arange(levels)
    place = lat[:, None] + lon / 100
    value = (
        1000 * entry[:, None, None, None] + 100 * hour[:, None, None, None, None] + 10 * level[:, None, None] + place
    )
    moves = np.array([1, 0])[:, None, None]
    flat = 1000 * np.arange(2)[:, None, None] + 100 * hour[:, None, None, None] * moves + place
    return xr.Dataset(
        {
            "variables_2d": (("time", "vari_2d", "lat", "lon"), flat.astype(dtype)),
            "variables_3d": (("time", "vari_3d", "level", "lat", "lon"), value.astype(dtype)),
        },
        {"time": time, "vari_2d": NAMES_2D, "vari_3d": names, "level": level, "lat": lat, "lon": lon},
        {"made": "up"},
    )


def statistics() -> xr.Dataset:
    names = [f"{name}{suffix}" for name in NAMES_3D for suffix in ("", "_next", "_delta")]
    values = np.arange(4 * len(names) * 3, dtype="f4").reshape(4, len(names), 3)
    coords = {"stats": ["min", "mean", "max", "std"], "vari_3d": names}
    return xr.Dataset({"variables_3d": (("stats", "vari_3d", "level"), values)}, coords)


def write(ds: xr.Dataset, path: Path, version=2, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = {name: {"chunks": (2, *v.shape[1:])} for name, v in ds.data_vars.items()}
    ds.to_zarr(path, zarr_format=version, consolidated=True, encoding=chunks, **options)
    return path


def zipped(store: Path, target: Path, inside: str = "") -> Path:
    """With the store at the top of the zip file, or in a folder."""
    with zipfile.ZipFile(target, "w") as archive:
        for folder, _, names in os.walk(store):
            for name in sorted(names):
                file = Path(folder, name)
                archive.write(file, os.path.join(inside, file.relative_to(store)))
    return target


@pytest.fixture
def store(tmp_path):
    return write(raw(), tmp_path / f"{STORE}.zarr")


@pytest.fixture
def splits(tmp_path):
    for name, start in (("train", "2016-12-31"), ("val", "2017-12-31"), ("test", "2020-12-31")):
        folder = tmp_path / "Carbontracker" / name
        path = write(raw(start=start), folder / f"{STORE}.zarr")
        if name == "test":
            zipped(path, folder / f"{STORE}.zarr.zip")
            shutil.rmtree(path)
            write(raw(), folder / f"obs_{STORE}.zarr")
        write(statistics(), folder / f"{STORE}_stats.zarr")
    return tmp_path / "Carbontracker"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["folder", "version 3", "zip", "zip with a folder"])
def test_fields_are_named_and_lazy(store, tmp_path, kind):
    if kind == "version 3":
        store = write(raw(), tmp_path / "three.zarr", version=3)
    elif kind != "folder":
        store = zipped(store, tmp_path / "a.zarr.zip", f"{STORE}.zarr" if kind == "zip with a folder" else "")
    assert recognize(store) == "carbonbench"
    ds = carbonbench.open_dataset(Place(store))
    assert set(ds.data_vars) == {*NAMES_3D, *NAMES_2D}
    assert ds["airmass"].dims == ("time", "level", "latitude", "longitude")
    assert ds["co2flux_land"].dims == ("time", "latitude", "longitude")
    for field in ds.data_vars.values():
        assert not isinstance(field.variable._data, np.ndarray)
    assert "vari_3d" not in ds.variables
    assert [ds[n].attrs.get("units") for n in ("co2massmix", "airmass", "co2flux_land", "u")] == [
        "1e-6 kg kg-1",
        "Pg",
        "kg m-2 s-1",
        None,
    ]
    assert (ds.longitude.attrs["periodic"], ds.latitude.attrs["units"], ds.level.attrs["units"]) == (
        1,
        "degrees_north",
        "1",
    )
    assert ds.attrs["made"] == "up"
    opened, source = physml.open_dataset(store), raw()
    assert opened["u"].chunks[0] == (2, 2)
    for i, name in enumerate(NAMES_3D):
        assert_array_equal(opened[name], source["variables_3d"][:, i])
    for i, name in enumerate(NAMES_2D):
        assert_array_equal(opened[name], source["variables_2d"][:, i])
    assert_array_equal(opened.time, source.time)


def test_splits_are_chosen_or_joined(splits):
    assert recognize(splits) == "carbonbench"
    for split, year in (("train", 2016), ("valid", 2017), ("test", 2020)):
        ds = physml.open_dataset(splits, split=split)
        assert set(ds.time.dt.year.values) == {year}
    whole = physml.open_dataset(splits)
    assert whole.sizes["time"] == 12
    assert whole.split.values.tolist() == ["train"] * 4 + ["valid"] * 4 + ["test"] * 4
    assert whole["u"].chunks is not None
    assert_array_equal(whole["u"][-1], ds["u"][-1])
    with pytest.raises(ConfigError, match="no split 'val'. Did you mean 'valid'"):
        physml.open_dataset(splits, split="val")
    with pytest.raises(ConfigError, match="is one store"):
        physml.open_dataset(splits / "train" / f"{STORE}.zarr", split="train")


def test_several_stores_need_a_name(splits):
    write(raw(levels=2), splits / "train" / "carbontracker_latlon2.8125_l20_6h.zarr")
    with pytest.raises(DataError, match="give `store`.*carbontracker_latlon2.8125_l20_6h"):
        physml.open_dataset(splits, split="train")
    assert physml.open_dataset(splits, split="train", store=STORE).sizes["level"] == 3
    with pytest.raises(DataError, match="no store 'x'"):
        physml.open_dataset(splits, split="train", store="x")


def test_splits_that_differ_are_refused(splits):
    shutil.rmtree(splits / "val" / f"{STORE}.zarr")
    write(raw(start="2017-06-01", levels=2), splits / "val" / f"{STORE}.zarr")
    with pytest.raises(DataError, match="'train' and 'valid' differ"):
        physml.open_dataset(splits)
    shutil.rmtree(splits / "val")
    assert set(physml.open_dataset(splits).split.values) == {"train", "test"}
    with pytest.raises(DataError, match="no folder 'val'"):
        physml.open_dataset(splits, split="valid")


def test_training_reads_windows_of_the_splits(splits):
    config = DataConfig(
        path=str(splits),
        variables=("co2massmix",),
        forcing=("u", "co2flux_land"),
        static=("cell_area",),
        flatten=("level",),
        split_by="format",
        train=("train",),
        valid=("valid",),
        test=("test",),
    )
    opened = config.open()
    assert opened["train"].spec.names == ("co2massmix_0", "co2massmix_1", "co2massmix_2")
    assert (opened["train"].spec.time_step, opened["train"].lengths) == (6 * 3600, (4,))
    window = opened["test"].read(0, range(1, 3))
    assert_array_equal(window.frames[..., 1], raw(start="2020-12-31")["variables_3d"][1:3, 0, 1])
    assert (window.forcing.shape[-1], window.static.shape[-1]) == (4, 1)


def test_statistics_are_read(splits):
    path = splits / "train" / f"{STORE}_stats.zarr"
    assert recognize(path) == "carbonbench"
    ds = physml.open_dataset(path)
    assert ds["co2massmix_delta"].dims == ("stats", "level")
    assert ds["co2massmix_delta"].attrs["units"] == "1e-6 kg kg-1"
    assert_allclose(ds["airmass"].sel(stats="std"), statistics()["variables_3d"][3, 3])


def test_other_numbers_and_missing_parts_are_read(tmp_path):
    ds = raw(dtype="f8", times=1).drop_vars(["variables_2d", "vari_2d", "level"])
    ds["variables_3d"][0, 0, 0, 0, 0] = np.nan
    ds["unknown"] = ("anything", [1, 2])
    opened = physml.open_dataset(write(ds, tmp_path / "a.zarr"))
    assert opened["u"].dtype == np.float64
    assert np.isnan(opened["co2massmix"][0, 0, 0, 0])
    assert_array_equal(opened.level, [0, 1, 2])
    assert "unknown" in opened


def test_urls_are_read(store, tmp_path):
    memory = fsspec.filesystem("memory")
    path = zipped(store, tmp_path / "a.zarr.zip", "inner.zarr")
    memory.pipe("/carbon/a.zarr.zip", path.read_bytes())
    memory.put(str(store), "/carbon/b.zarr", recursive=True)
    try:
        for url in ("memory://carbon/a.zarr.zip", "memory://carbon/b.zarr"):
            assert recognize(url) == "carbonbench"
            assert_array_equal(physml.open_dataset(url)["u"], raw()["variables_3d"][:, 2])
    finally:
        memory.rm("/carbon", recursive=True)


def test_others_are_not_recognized(make, tmp_path):
    make.weather().to_zarr(tmp_path / "plain.zarr", zarr_format=2)
    zipped(tmp_path / "plain.zarr", tmp_path / "plain.zarr.zip")
    (tmp_path / "train").mkdir()
    for path in [*SAMPLES.rglob("*"), tmp_path, *tmp_path.iterdir()]:
        with contextlib.suppress(DataError):
            assert not carbonbench.recognizes(Place(path)), path
    assert physml.open_dataset(tmp_path / "plain.zarr.zip").attrs.get("format") != "carbonbench"


def test_wrong_names_are_refused(tmp_path):
    def refused(ds, message):
        path = write(ds, tmp_path / "wrong.zarr")
        with pytest.raises(DataError, match=message) as error:
            physml.open_dataset(path, format="carbonbench")
        assert str(path) in str(error.value)
        shutil.rmtree(path)

    refused(raw().drop_vars("vari_3d"), "no coordinate 'vari_3d'")
    refused(raw().assign_coords(vari_3d=[1, 2, 3]), "names of fields were expected")
    refused(raw(names=["u", "v", "u"]), "names a field twice: 'u'")
    refused(raw(names=["u", "v", "cell_area"]), "two arrays 'cell_area'")
    refused(raw(names=["u", "v", "time"]), "two arrays 'time'")
    refused(raw(names=["u", "v", "/w"]), "names of fields")
    refused(raw().drop_vars("lat"), "'latitude' with a coordinate")
    refused(raw().isel(time=[0, 0]), "'time' does not increase")
    refused(raw().isel(time=0), "'time' holds")
    refused(raw().isel(time=slice(0, 0)), "'time' holds")
    refused(raw()[["vari_3d"]], "neither of the arrays")


def rebuilt(path: Path, change) -> Path:
    """The zip file with members changed: `change(name, content)` gives the new (name, content)."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(*change(name, content))
    return path


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "a\\out"])
def test_names_that_lead_out_of_a_zip_file_are_refused(store, tmp_path, name):
    path = zipped(store, tmp_path / "a.zarr.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(DataError, match="no name of a zarr store"):
        physml.open_dataset(path)
    assert not (tmp_path.parent / "out").exists()


def test_members_larger_than_their_chunk_are_refused(store, tmp_path):
    chunk = "variables_3d/0.0.0.0.0"
    path = rebuilt(
        zipped(store, tmp_path / "a.zarr.zip"),
        lambda name, content: (name, bytes(2**24) if name == chunk else content),
    )
    assert path.stat().st_size < 2**18
    with pytest.raises(DataError, match=f"'{chunk}' unpacks to 16777216 bytes"):
        physml.open_dataset(path)
    path = rebuilt(path, lambda name, content: (name, b" " * 2**25 if name == ".zmetadata" else content[:100]))
    with pytest.raises(DataError, match="zmetadata"):
        physml.open_dataset(path, format="carbonbench")


def test_pickled_names_are_never_loaded(tmp_path, store):
    class Proof:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "proof",))

    for file in (".zmetadata", "vari_3d/.zarray"):
        content = json.loads((store / file).read_text())
        array = content["metadata"]["vari_3d/.zarray"] if file == ".zmetadata" else content
        array |= {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 4}], "compressor": None, "fill_value": None}
        (store / file).write_text(json.dumps(content))
    (store / "vari_3d" / "0").write_bytes(pickle.dumps(Proof()))
    for path in (store, zipped(store, tmp_path / "a.zarr.zip")):
        with pytest.raises(DataError, match="pickles, which are never opened"):
            physml.open_dataset(path)
    (store / ".zmetadata").unlink()
    with pytest.raises(DataError):
        physml.open_dataset(store, format="carbonbench")
    assert not (tmp_path / "proof").exists()


def test_damaged_zip_files_are_named(store, tmp_path):
    path = zipped(store, tmp_path / "a.zarr.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.zarr\.zip is a damaged zip file"):
        physml.open_dataset(path, format="carbonbench")
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="neither a zarr store nor a zip file"):
        physml.open_dataset(path, format="carbonbench")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(DataError, match="neither a zarr store nor a zip file"):
        physml.open_dataset(path, format="carbonbench")
    with pytest.raises(DataError, match="There is no file"):
        physml.open_dataset(tmp_path / "nowhere.zarr.zip", format="carbonbench")


def test_text_of_variable_length_is_read(tmp_path):
    path = write(raw(), tmp_path / "a.zarr")
    group = zarr.open_group(path, mode="a")
    del group["vari_3d"]
    names = group.create_array("vari_3d", shape=(3,), dtype=str)
    names[:] = np.array(NAMES_3D, dtype=object)
    names.attrs["_ARRAY_DIMENSIONS"] = ["vari_3d"]
    zarr.consolidate_metadata(path)
    assert json.loads((path / "vari_3d" / ".zarray").read_text())["dtype"] == "|O"
    assert set(physml.open_dataset(path).data_vars) == {*NAMES_3D, *NAMES_2D}


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, store, splits, seeds):
    sources = [store, zipped(store, tmp_path / "whole.zarr.zip"), splits, zipped(store, tmp_path / "b.zip", "inner")]
    targets = [tmp_path / "damaged" / name for name in ("a.zarr", "b.zip", "c", "d.zip")]
    outcomes = [survives(damage(sources[i % 4], targets[i % 4], i), "carbonbench") for i in seeds]
    assert set(outcomes) == {"opened", "DataError"}
