"""Chunks that are decoded beside the netCDF library are what the library reads; damage is told."""

import h5py
import netCDF4
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

from physml.data import XarrayDataset, spec_of, tensors
from physml.data.hdf5_chunks import Chunks
from physml.errors import DataError

SHAPE, CHUNK = (7, 23, 10), (2, 5, 10)
KEYS = (
    (slice(None), slice(None), slice(None)),
    (3, slice(4, 21, 3), slice(None)),
    (np.int64(6), slice(20, 23), 9),
    (slice(1, 7, 4), slice(7, 8), slice(2, 9, 2)),
    (slice(2, 2), slice(None), slice(None)),
    (slice(None), 5, slice(-4, None)),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Variables of all kinds of storage, one of them with chunks that were never written."""
    path = tmp_path_factory.mktemp("chunks") / "a.nc"
    random = np.random.default_rng(0)
    with netCDF4.Dataset(path, "w") as file:
        for name, size in zip("abc", SHAPE, strict=True):
            file.createDimension(name, size)
        file.createGroup("inside")
        kinds = {
            "usual": ("f4", {"zlib": True}), "unshuffled": ("f8", {"zlib": True, "shuffle": False}),
            "plain": ("i4", {}), "big": ("f4", {"zlib": True, "endian": "big"}),
            "short": ("i2", {"zlib": True, "complevel": 1}),
            "inside/usual": ("f4", {"zlib": True}), "checked": ("f4", {"zlib": True, "fletcher32": True}),
            "sparse": ("f4", {"zlib": True}), "whole": ("f4", {"contiguous": True}),
        }  # fmt: skip
        for name, (dtype, options) in kinds.items():
            sizes = {} if name == "whole" else {"chunksizes": CHUNK}
            variable = file.createVariable(name, dtype, ("a", "b", "c"), **sizes, **options)
            values = (100 * random.normal(size=SHAPE)).astype(dtype)
            if name == "sparse":
                variable[2:4, 5:10] = values[2:4, 5:10]
            else:
                variable[:] = values
    return path


def opened(path, name):
    group, _, own = name.rpartition("/")
    variable = xr.open_dataset(path, group=group or None, chunks=None)[own].variable
    return variable, tensors.locate(variable)[0]


@pytest.mark.parametrize("name", ["usual", "unshuffled", "plain", "short", "inside/usual", "sparse"])
def test_selections_are_those_of_the_library(path, name):
    variable, array = opened(path, name)
    chunks = tensors.open_array(array)
    assert isinstance(chunks, Chunks)
    picked = variable.isel(a=slice(1, None, 2)).isel(b=slice(3, 20), a=slice(1, None))
    chosen = tensors.locate(picked)[1]
    whole = variable.values
    for key in KEYS:
        read = tensors.read(chunks, key)
        assert_array_equal(read, whole[key], strict=True) if np.ndim(read) else assert_array_equal(read, whole[key])
    assert_array_equal(tensors.read(chunks, chosen), picked.values)


def test_what_only_the_library_can_read_is_left_to_it(path):
    assert tensors.locate(xr.open_dataset(path, chunks=None).big.variable) is None
    for name in ("checked", "whole"):
        assert tensors.open_array(opened(path, name)[1]) is None
    array = opened(path, "usual")[1]
    chunks = tensors.open_array(array)
    assert tensors.read(chunks, (np.array([3, 1]), slice(None), slice(None))) is None
    assert tensors.read(chunks, (slice(5, 0, -1), slice(None), slice(None))) is None


def test_scaled_and_masked_numbers_are_not_taken_raw(tmp_path):
    ds = xr.Dataset({"u": (("time", "x"), np.arange(12.0).reshape(4, 3))})
    ds.to_netcdf(tmp_path / "a.nc", encoding={"u": {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}})
    assert tensors.locate(xr.open_dataset(tmp_path / "a.nc", chunks=None).u.variable) is None


@pytest.mark.parametrize("damage", ["noise", "cut", "swollen"])
def test_damage_is_told(tmp_path, damage):
    values = np.random.default_rng(0).normal(size=(40, 8)).astype("f4")
    coords = {"time": 0.5 * np.arange(40), "x": ("x", np.arange(8) / 8, {"periodic": 1})}
    path = tmp_path / "a.nc"
    sizes = {"zlib": True, "chunksizes": (10, 8)}
    xr.Dataset({"u": (("time", "x"), values)}, coords).to_netcdf(path, encoding={"u": {**sizes, "_FillValue": None}})
    data = xr.open_dataset(path, chunks=None)
    dataset = XarrayDataset(data, spec_of(data, ("u",)))
    assert_array_equal(dataset.read(0, range(4, 9)).frames[..., 0], values[4:9])
    with h5py.File(path) as file:
        place = file["u"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    if damage == "noise":
        content[place.byte_offset + 8 : place.byte_offset + 40] = b"\xff" * 32
    elif damage == "cut":
        content = content[: place.byte_offset + 20]
    else:  # a stream that unpacks to more than a chunk
        import zlib

        larger = zlib.compress(bytes(10**6))[: place.size]
        content[place.byte_offset : place.byte_offset + place.size] = larger.ljust(place.size, b"\0")
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="variable 'u' cannot be read from trajectory 0, frame 12"):
        dataset.read(0, range(12, 15))
