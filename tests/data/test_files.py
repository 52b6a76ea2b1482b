import glob
import json
import os
import struct
import zipfile

import fsspec
import h5py
import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from numpy.testing import assert_array_equal

from physml.data import DataConfig, XarrayDataset, describe, open_dataset, spec_of, to_window
from physml.errors import ConfigError, DataError

WRITERS = {
    "netcdf4": lambda ds, p: ds.to_netcdf(p, format="NETCDF4"),
    "classic": lambda ds, p: ds.to_netcdf(p, format="NETCDF3_CLASSIC"),
    "64-bit offset": lambda ds, p: ds.to_netcdf(p, format="NETCDF3_64BIT"),
    "CDF-5": lambda ds, p: ds.to_netcdf(p, format="NETCDF3_64BIT_DATA", engine="netcdf4"),
    "compressed": lambda ds, p: ds.to_netcdf(p, encoding={n: {"zlib": True} for n in ds.data_vars}),
    "packed": lambda ds, p: ds.to_netcdf(p, encoding={"slp": {"dtype": "i4", "scale_factor": 0.5, "_FillValue": -1}}),
    "zarr 2": lambda ds, p: ds.to_zarr(p, zarr_format=2),
    "zarr 3": lambda ds, p: ds.to_zarr(p, zarr_format=3, consolidated=False),
}


def frames(ds):
    return to_window(ds, spec_of(ds, ("slp", "t2m"))).frames


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_window_whatever_its_name(make, tmp_path, kind):
    ds = make.weather()
    path = str(tmp_path / "data.txt")
    WRITERS[kind](ds, path)
    opened = open_dataset(path)
    assert opened.slp.dims == ("trajectory", "time", "latitude", "longitude")
    assert opened.slp.chunks is not None  # lazy
    assert_array_equal(frames(opened), frames(ds))
    dataset = DataConfig(path, train=(0, 12), valid=(), test=()).open()["train"]
    assert_array_equal(dataset.read(0, range(12)).frames, frames(ds)[0])


def test_zipped_zarr(make, tmp_path):
    ds = make.weather()
    with zarr.storage.ZipStore(str(tmp_path / "data.zip"), mode="w") as store:
        ds.to_zarr(store, zarr_format=3, consolidated=False)
    assert_array_equal(frames(open_dataset(tmp_path / "data.zip")), frames(ds))


@pytest.mark.parametrize("how", ["folder", "glob", "list", "shuffled list"])
def test_files_along_time_equal_one_file(make, tmp_path, how):
    ds = make.weather(days=12)
    paths = []
    for i, part in enumerate((ds.isel(time=slice(0, 5)), ds.isel(time=slice(5, 6)), ds.isel(time=slice(6, 12)))):
        paths.append(str(tmp_path / f"part{i}.nc"))
        part.to_netcdf(paths[-1])
    (tmp_path / "README").write_text("not data")
    path = {
        "folder": tmp_path,
        "glob": f"{tmp_path}/*.nc",
        "list": paths,
        "shuffled list": [paths[2], paths[0], paths[1]],
    }[how]
    assert_array_equal(frames(open_dataset(path)), frames(ds))


def test_files_with_equal_times_are_trajectories_with_their_own_parameters(make, tmp_path):
    ds = make.waves().drop_vars("wind")
    for i in range(4):
        one = ds.isel(trajectory=i)
        one.assign(viscosity=float(one.viscosity)).to_netcdf(tmp_path / f"{i}.nc")
    together = open_dataset(tmp_path)
    spec = spec_of(together, ("u",), static=("a",), parameters=("viscosity",))
    window, expected = to_window(together, spec), to_window(ds, spec)
    assert_array_equal(window.frames, expected.frames)
    assert_array_equal(window.static, expected.static)
    assert_array_equal(window.parameters, expected.parameters)


def test_files_with_different_variables_are_merged(make, tmp_path):
    ds = make.weather()
    ds[["slp"]].to_netcdf(tmp_path / "slp.nc")
    ds[["t2m"]].to_netcdf(tmp_path / "t2m.nc")
    assert_array_equal(frames(open_dataset(tmp_path)), frames(ds))
    ds[["t2m"]].isel(time=slice(3)).to_netcdf(tmp_path / "t2m.nc")
    with pytest.raises(DataError, match="cannot be merged"):
        open_dataset(tmp_path)


def test_files_that_do_not_fit_each_other(make, tmp_path):
    ds = make.weather(days=6)
    ds.isel(time=slice(0, 3)).to_netcdf(tmp_path / "a.nc")

    def second(part):
        part.to_netcdf(tmp_path / "b.nc")
        return open_dataset(tmp_path)

    rest = ds.isel(time=slice(3, 6))
    with pytest.raises(DataError, match=r"b.nc and .*a.nc are on different grids: 'latitude' has 4 points"):
        second(rest.isel(latitude=slice(4)))
    with pytest.raises(DataError, match="different grids"):
        second(rest.assign_coords(longitude=rest.longitude + 0.5))
    with pytest.raises(DataError, match="'slp' is in 'hPa' in"):
        second(rest.assign(slp=rest.slp.assign_attrs(units="hPa")))
    with pytest.raises(DataError, match="their times overlap"):
        second(ds.isel(time=slice(2, 6)))
    assert open_dataset([tmp_path / "a.nc"]).sizes["time"] == 3


def test_urls(make):
    ds = make.weather()
    files = fsspec.filesystem("memory")
    with files.open("/bucket/a.nc", "wb") as file:
        file.write(bytes(ds.isel(time=slice(0, 6)).to_netcdf(engine="h5netcdf")))
    with files.open("/bucket/b.nc", "wb") as file:
        file.write(bytes(ds.isel(time=slice(6, 12)).to_netcdf(engine="scipy")))
    ds.to_zarr("memory://store/data.zarr", zarr_format=3)
    assert_array_equal(frames(open_dataset("memory://bucket/*.nc")), frames(ds))
    assert_array_equal(frames(open_dataset("memory://store/data.zarr")), frames(ds))
    with pytest.raises(DataError, match="There is no file memory://bucket/c.nc"):
        open_dataset("memory://bucket/c.nc")
    with pytest.raises(DataError, match="cannot be reached"):
        open_dataset("nowhere://bucket/c.nc")


def test_a_mistyped_path_is_matched_against_all_names_of_its_folder(tmp_path):
    """It was matched against the first 20, hidden ones among them."""
    for i in range(30):
        (tmp_path / f".a{i:02}.json").touch()
        (tmp_path / f"log_{i:02}.txt").touch()
    (tmp_path / "zonal.nc").touch()
    with pytest.raises(DataError, match=r"Did you mean 'zonal\.nc'\? Its folder has log_00.* and 11 more\.") as error:
        open_dataset(tmp_path / "zonla.nc")
    assert ".json" not in str(error.value)


def test_missing_and_foreign_files(make, tmp_path):
    make.weather().to_netcdf(tmp_path / "slp_2001.nc")
    with pytest.raises(DataError, match="There is no file .*Did you mean 'slp_2001.nc'"):
        open_dataset(tmp_path / "slp_2002.nc")
    with pytest.raises(DataError, match="folder is not there either"):
        open_dataset(tmp_path / "absent" / "slp.nc")
    with pytest.raises(DataError, match="No file matches"):
        open_dataset(f"{tmp_path}/*.h5")
    (tmp_path / "page.nc").write_text("<!DOCTYPE html>")
    with pytest.raises(DataError, match="neither netCDF nor zarr: it begins with b'<!DOCTYPE"):
        open_dataset(tmp_path / "page.nc")
    (tmp_path / "empty.nc").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes"):
        open_dataset(tmp_path / "empty.nc")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no netCDF file and no zarr store"):
        open_dataset(tmp_path / "folder")
    with pytest.raises(DataError, match="list of files is empty"):
        open_dataset([])
    with pytest.raises(ConfigError, match="no data format 'netcdf4'. Did you mean 'netcdf'"):
        open_dataset(tmp_path / "slp_2001.nc", format="netcdf4")
    with pytest.raises(DataError, match="not a zarr store"):
        open_dataset(tmp_path / "slp_2001.nc", format="zarr")
    with pytest.raises(DataError, match="no 'latt' to rename. Did you mean 'latitude'"):
        open_dataset(tmp_path / "slp_2001.nc", rename={"latt": "y"})


@pytest.mark.parametrize("kind", ["netcdf4", "compressed", "classic", "64-bit offset", "CDF-5"])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.98])
def test_truncated_files_are_refused_on_opening(make, tmp_path, kind, share):
    path = tmp_path / "data.nc"
    WRITERS[kind](make.weather(days=40, lat=12, lon=20), path)
    content = path.read_bytes()
    path.write_bytes(content[: max(9, int(len(content) * share))])
    with pytest.raises(DataError, match="data.nc .*(truncated|damaged|incomplete)"):
        open_dataset(path)


def test_complete_classic_files_pass_the_length_check(tmp_path):
    # records of one variable are packed, those of several are padded to four bytes
    one = xr.Dataset({"a": (("time", "x"), np.ones((5, 3), "i1"))})
    one.to_netcdf(tmp_path / "one.nc", format="NETCDF3_CLASSIC", unlimited_dims=["time"])
    two = one.assign(b=(("time",), np.ones(5, "i2")), c=((), np.int8(1)))
    two.to_netcdf(tmp_path / "two.nc", format="NETCDF3_CLASSIC", unlimited_dims=["time"])
    for name in ("one", "two"):
        content = (tmp_path / f"{name}.nc").read_bytes()
        assert open_dataset(tmp_path / f"{name}.nc").a.shape == (1, 5, 3)
        (tmp_path / f"{name}.nc").write_bytes(content[:-4])
        with pytest.raises(DataError, match="truncated"):
            open_dataset(tmp_path / f"{name}.nc")


def _spoil_netcdf(path):
    with h5py.File(path) as file:
        offset, size = (file["slp"].id.get_chunk_info(0).byte_offset, file["slp"].id.get_chunk_info(0).size)
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)


def _spoil_zarr(path):
    chunk = next(p for p in sorted((path / "slp").rglob("*")) if p.is_file() and not p.name.startswith((".", "zarr")))
    chunk.write_bytes(b"\x00garbage" * 4)


@pytest.mark.parametrize("kind", ["compressed", "zarr 2", "zarr 3"])
def test_damaged_chunks_are_named_when_read(make, tmp_path, kind):
    path = tmp_path / "data"
    WRITERS[kind](make.weather(), path)
    _spoil_netcdf(path) if kind == "compressed" else _spoil_zarr(path)
    for ds in (open_dataset(path), DataConfig(str(path)).read(str(path))):
        with pytest.raises(DataError, match=r"data: variable 'slp' cannot be read .*damaged"):
            XarrayDataset(ds, spec_of(ds, ("t2m", "slp"))).read(0, range(2))
        assert XarrayDataset(ds, spec_of(ds, ("t2m",))).read(0, range(2)).frames.shape == (2, 5, 6, 1)


def test_damaged_zarr_metadata(make, tmp_path):
    make.weather().to_zarr(tmp_path / "data.zarr", zarr_format=3, consolidated=False)
    (tmp_path / "data.zarr" / "zarr.json").write_text('{"zarr_format": 3,')
    with pytest.raises(DataError, match="damaged or incomplete"):
        open_dataset(tmp_path / "data.zarr")


class _Mischief:
    def __reduce__(self):
        return (open, (os.environ["PHYSML_TEST_PROOF"], "w"))


PICKLE = {"id": "pickle", "protocol": 5}
SHUFFLE = {"id": "shuffle", "elementsize": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O", "filters": [PICKLE], "compressor": None, "fill_value": None},
        {"compressor": PICKLE},
        {"filters": [SHUFFLE, PICKLE], "compressor": None},
    ],
)
@pytest.mark.parametrize("name", ["slp", "time"])
def test_a_pickle_inside_a_store_is_never_run(make, tmp_path, monkeypatch, name, change):
    proof, store = tmp_path / "proof", tmp_path / "data.zarr"
    monkeypatch.setenv("PHYSML_TEST_PROOF", str(proof))
    make.weather().to_zarr(store, zarr_format=2, consolidated=False)
    metadata = store / name / ".zarray"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), **change}))
    array = np.empty(1, object)
    array[0] = _Mischief()
    for chunk in (store / name).glob("[0-9]*"):
        chunk.write_bytes(numcodecs.Pickle().encode(array))
    with pytest.raises(DataError, match="never opened"):
        open_dataset(store)
    assert not proof.exists()


def test_times_that_cannot_be_decoded(make, tmp_path):
    ds = make.weather(days=3)
    ds["time"] = ("time", np.arange(3.0), {"units": "fortnights since 2000-01-01"})
    ds.to_netcdf(tmp_path / "data.nc")
    with pytest.raises(DataError, match="decode_times=False"):
        open_dataset(tmp_path / "data.nc")
    assert spec_of(open_dataset(tmp_path / "data.nc", decode_times=False)).time_unit == ""


def test_common_names_of_trajectories_and_time(tmp_path):
    for names in (("sample", "t"), ("member", "time"), ("batch", "valid_time"), ("number", "time_counter")):
        ds = xr.Dataset({"u": ((*names, "x"), np.zeros((2, 3, 4), "f4"))})
        ds.to_netcdf(tmp_path / "data.nc")
        assert open_dataset(tmp_path / "data.nc").u.dims == ("trajectory", "time", "x")
        os.remove(tmp_path / "data.nc")
    ds = xr.Dataset({"u": (("car", "step", "x"), np.zeros((2, 3, 4), "f4"))})
    ds.to_netcdf(tmp_path / "data.nc")
    renamed = open_dataset(tmp_path / "data.nc", rename={"car": "trajectory"})
    assert to_window(renamed, spec_of(renamed)).frames.shape == (2, 3, 4, 1)  # `step` is time when nothing else is


def test_a_plain_hdf5_group(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["train/u"] = np.zeros((2, 3, 4), "f4")
    ds = open_dataset(tmp_path / "data.h5", group="train")
    assert ds.u.shape[-3:] == (2, 3, 4)
    with pytest.raises(DataError):
        open_dataset(tmp_path / "data.h5", group="valid")


def test_describe_reads_what_is_there(make, tmp_path):
    ds = make.weather().where(lambda d: d.latitude < 50).isel(latitude=slice(None, None, -1))
    ds.to_netcdf(tmp_path / "data.nc", encoding={"slp": {"zlib": True, "chunksizes": (4, 5, 6)}})
    facts = describe(tmp_path / "data.nc")
    assert facts["dimensions"]["latitude"] == {"size": 5, "role": "latitude"}
    assert facts["axes"]["latitude"]["descending"]
    assert facts["axes"]["longitude"]["spacing"] == 5.0
    assert facts["time"]["step"] == 86400.0
    assert facts["time"]["first"].startswith("2001-02-20")
    assert facts["variables"]["slp"]["unit"] == "Pa"
    assert facts["variables"]["slp"]["chunks"] == [4, 5, 6]
    assert facts["variables"]["slp"]["missing"]["first_frame"] == pytest.approx(0.2)
    json.dumps(facts, allow_nan=False)


def test_a_window_of_a_big_contiguous_file_does_not_read_it_whole(tmp_path):
    values = np.zeros((320, 128, 128), "f4")  # 20 MiB
    xr.Dataset({"u": (("time", "x", "y"), values)}).to_netcdf(tmp_path / "big.nc")
    ds = open_dataset(tmp_path / "big.nc")
    assert max(ds.u.data.blocks[i].nbytes for i in np.ndindex(ds.u.data.numblocks)) <= 8 * 2**20
    lazy = DataConfig(str(tmp_path / "big.nc")).read(str(tmp_path / "big.nc"))
    XarrayDataset(lazy, spec_of(lazy)).read(0, range(3))
    assert not lazy.u.variable._in_memory


def test_globs_are_sorted_and_magic_characters_in_names_still_open(make, tmp_path):
    ds = make.weather()
    ds.to_netcdf(tmp_path / "a[1].nc")
    assert glob.has_magic(str(tmp_path / "a[1].nc"))
    assert_array_equal(frames(open_dataset(tmp_path / "a[1].nc")), frames(ds))


def test_damaged_zip(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04" + struct.pack("<I", 7) * 10)
    with pytest.raises(DataError, match="damaged zip"):
        open_dataset(tmp_path / "data.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("note.txt", "hello")
    with pytest.raises(DataError, match="neither netCDF nor zarr"):
        open_dataset(tmp_path / "other.zip")


def test_chunked_fields_can_be_renamed(tmp_path):
    """The chunks of a file are named after its dimensions, which may be renamed."""
    stored = xr.Dataset({"u": (("sample", "t", "a"), np.random.default_rng(0).standard_normal((2, 6, 8)))})
    stored.to_netcdf(tmp_path / "u.nc", encoding={"u": {"chunksizes": (1, 2, 8)}})
    assert open_dataset(tmp_path / "u.nc").u.chunks == ((1, 1), (2, 2, 2), (8,))
    ds = open_dataset(tmp_path / "u.nc", rename={"a": "x"})
    assert ds.u.dims == ("trajectory", "time", "x")
    assert_array_equal(ds.u, stored.u)


def test_the_order_of_variables_in_a_store_is_no_accident(make, tmp_path):
    """A store that lists its variables keeps their order; one that does not gives them by name."""
    ds = make.weather()
    ds = ds[["t2m", "slp"]]
    ds.to_zarr(tmp_path / "listed.zarr", zarr_format=2, consolidated=True)
    ds.to_zarr(tmp_path / "bare.zarr", zarr_format=3, consolidated=False)
    assert list(open_dataset(tmp_path / "listed.zarr").data_vars) == list(xr.open_zarr(tmp_path / "listed.zarr"))
    for _ in range(3):
        assert list(open_dataset(tmp_path / "bare.zarr").data_vars) == ["slp", "t2m"]


def test_longitudes_that_cross_their_seam_eastward_do_not_descend(make, tmp_path):
    ds = make.weather(lon=8)
    eastward = [340.0, 345, 350, 355, 0, 5, 10, 15]
    for values, descending in ((eastward, False), (eastward[::-1], True), (np.arange(8.0), False)):
        facts = describe(ds.assign_coords(longitude=("longitude", values, ds.longitude.attrs)))
        assert facts["axes"]["longitude"]["descending"] is descending
    assert describe(ds.isel(latitude=slice(None, None, -1)))["axes"]["latitude"]["descending"] is True
