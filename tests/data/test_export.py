"""What is written reads back equal, from any format to netCDF and both versions of zarr."""

import tracemalloc

import dask
import dask.array
import numpy as np
import pytest
import xarray as xr

import physml
from physml.data.export import save_dataset
from physml.errors import ConfigError, DataError

WAYS = [("a.nc", {}), ("a.zarr", {"zarr_format": 2}), ("a.zarr", {"zarr_format": 3})]


@pytest.fixture
def fields():
    random = np.random.default_rng(0)
    values = random.standard_normal((3, 5, 8, 6)).astype("f4")
    values[:, :, 2, 3] = np.nan
    return xr.Dataset(
        {
            "u": (("trajectory", "time", "x", "y"), values, {"units": "m s-1", "flag": True, "range": (0, 1)}),
            "level": (("trajectory", "time", "x", "y"), (values * 10).astype("f8")),
            "count": (("trajectory",), np.array([1, 2, 3], "i8"), {"extra": {"a": [1, None]}}),
            "name": (("trajectory",), ["one", "two", "drei"]),
        },
        {
            "time": ("time", np.arange("2001-01-01", "2001-01-06", dtype="datetime64[D]").astype("datetime64[ns]")),
            "x": ("x", np.linspace(0, 1, 8), {"periodic": np.int8(1)}),
        },
        {"title": "waves", "numbers": np.array([1.5, 2.5]), "nothing": None},
    )


@pytest.mark.parametrize(("name", "options"), WAYS)
@pytest.mark.parametrize("chunks", [None, {"trajectory": 1, "time": 2}])
def test_round_trip_is_exact(tmp_path, fields, name, options, chunks):
    path = save_dataset(fields.chunk(chunks) if chunks else fields, tmp_path / name, **options)
    back = xr.open_dataset(path, engine="netcdf4") if path.suffix == ".nc" else xr.open_zarr(path)
    xr.testing.assert_equal(back.compute(), fields)
    for key in fields.variables:
        if fields[key].dtype.kind == "f":
            assert back[key].dtype == fields[key].dtype
    assert back["u"].attrs["units"] == "m s-1"
    assert back["u"].attrs["flag"] == 1
    assert back.attrs["title"] == "waves"
    assert back.attrs["Conventions"].startswith("CF-")
    assert list(back.attrs["numbers"]) == [1.5, 2.5]
    if chunks:
        stored = back["u"].encoding.get("chunks") or back["u"].encoding["chunksizes"]
        assert tuple(stored) == (1, 2, 8, 6)
    again = save_dataset(physml.open_dataset(path), tmp_path / f"again-{name}", **options)
    xr.testing.assert_equal(physml.open_dataset(again).compute(), physml.open_dataset(path).compute())


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_a_large_dataset_is_never_whole_in_memory(tmp_path, name):
    values = dask.array.random.default_rng(0).random((64, 256, 512), chunks=(1, 256, 512))  # 64 MiB
    ds = xr.Dataset({"u": (("time", "x", "y"), values)})
    save_dataset(ds.isel(time=[0]), tmp_path / f"first-{name}")  # imports
    with dask.config.set(scheduler="synchronous"):
        tracemalloc.start()
        save_dataset(ds, tmp_path / name)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 16 * 2**20


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_chunks_of_joined_files_may_differ(tmp_path, fields, name):
    uneven = fields.chunk({"time": (2, 1, 2)})
    xr.testing.assert_equal(
        physml.open_dataset(save_dataset(uneven, tmp_path / name))
        .compute()["u"]
        .drop_vars("trajectory", errors="ignore"),
        fields["u"],
    )


def test_nothing_is_lost_and_nothing_is_half_written(tmp_path, fields):
    path = save_dataset(fields, tmp_path / "a.nc")
    before = path.read_bytes()
    with pytest.raises(DataError, match="exists"):
        save_dataset(fields, path)

    def fail(block):
        raise RuntimeError("disk gone")

    broken = fields.assign(u=(fields["u"].dims, dask.array.zeros((3, 5, 8, 6)).map_blocks(fail, dtype="f4")))
    for name in ("a.nc", "b.nc", "b.zarr"):
        with pytest.raises(RuntimeError, match="disk gone"):
            save_dataset(broken, tmp_path / name, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nc"]
    save_dataset(fields.isel(time=[0]), path, overwrite=True)
    assert xr.open_dataset(path).sizes["time"] == 1


def test_what_cannot_be_written_is_named(tmp_path, fields):
    with pytest.raises(ConfigError, match=r"does not tell its format"):
        save_dataset(fields, tmp_path / "a.hdf")
    with pytest.raises(ConfigError, match="no output format 'netcd'"):
        save_dataset(fields, tmp_path / "a", to="netcd")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_dataset(fields, tmp_path / "file" / "a.nc")
