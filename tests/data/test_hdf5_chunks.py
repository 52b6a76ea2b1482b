"""What is read beside the netCDF library is what the library reads, in any thread; damage is told."""

import pickle
import subprocess
import sys

import h5py
import netCDF4
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

import physml
from physml.data import XarrayDataset, netcdf, spec_of, tensors
from physml.data.hdf5_chunks import Array, Chunks
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


def test_what_is_not_in_such_chunks_is_read_by_h5py(path):
    assert tensors.locate(xr.open_dataset(path, chunks=None).big.variable) is None
    for name in ("checked", "whole"):
        variable, array = opened(path, name)
        assert_array_equal(
            tensors.read(tensors.open_array(array), (3, slice(4, 21, 3), slice(None))), variable[3, 4:21:3]
        )
        assert isinstance(tensors.open_array(array), Array)
    variable, array = opened(path, "usual")
    for key in ((np.array([3, 1]), slice(None), slice(None)), (slice(5, 0, -1), np.array([2, 0, 9]), 4)):
        expected = variable.isel(dict(zip(variable.dims, key, strict=True)))
        assert_array_equal(tensors.read(tensors.open_array(array), key), expected)


def test_what_only_the_netcdf_library_knows_is_left_to_it(tmp_path):
    with netCDF4.Dataset(tmp_path / "a.nc", "w") as file:
        file.createDimension("time", None)
        file.createDimension("x", 3)
        file.createVariable("u", "f4", ("time", "x"))[:5] = 1
        file.createVariable("short", "f4", ("time", "x"))[:2] = 1  # as the library shows it: 5 long, the rest is filled
    ds = netcdf.open_netcdf(str(tmp_path / "a.nc"))
    assert ds.short.shape == (5, 3)
    assert_array_equal(ds.short[:, 0], [1, 1, *3 * [np.float32(netCDF4.default_fillvals["f4"])]])
    array = tensors.locate(xr.open_dataset(tmp_path / "a.nc", decode_cf=False).short.variable)[0]
    assert tensors.open_array(array) is None


def test_a_closed_file_can_be_written_again(tmp_path):
    path = tmp_path / "a.nc"
    ds = xr.Dataset({name: (("time", "x"), np.zeros((4, 3))) for name in "uvw"})
    ds.to_netcdf(path)
    opened = netcdf.open_netcdf(str(path))
    assert opened.u.sum() + opened.v.sum() == 0
    opened.close()
    (ds + 1).to_netcdf(path)
    assert netcdf.open_netcdf(str(path)).w.min() == 1


def test_a_file_is_read_from_any_folder_and_in_another_process(tmp_path, monkeypatch):
    folder = tmp_path / "données"
    folder.mkdir()
    ds = xr.Dataset({"u": (("time", "x"), np.arange(12.0).reshape(4, 3))})
    ds.to_netcdf(folder / "ü.nc", encoding={"u": {"dtype": "i2", "scale_factor": 0.5}})
    monkeypatch.chdir(folder)
    opened = physml.open_dataset("ü.nc")
    assert opened.encoding["source"] == str(folder / "ü.nc")
    monkeypatch.chdir(tmp_path)
    copy = pickle.loads(pickle.dumps(opened))
    opened.close()
    assert_array_equal(copy.u[0], ds.u)
    assert_array_equal(netcdf.open_netcdf(copy.encoding["source"], chunks={}).u.compute(), ds.u)


CRASH = """
import sys, threading
import numpy as np
import xarray as xr
from physml.data import DataConfig, Loader, XarrayDataset, open_dataset, spec_of

folder = sys.argv[1]
rng = np.random.default_rng(0)
coords = {"time": np.arange(400.0), "x": ("x", np.arange(16) / 16, {"periodic": 1})}
ds = xr.Dataset({"u": (("time", "x"), rng.normal(size=(400, 16)).astype("f4"))}, coords)
plain, packed = f"{folder}/plain.nc", f"{folder}/packed.nc"
ds.to_netcdf(plain, encoding={"u": {"_FillValue": None}})
ds.to_netcdf(packed, encoding={"u": {"dtype": "i2", "scale_factor": 0.001, "_FillValue": -32768, "zlib": True}})
user = xr.open_dataset(plain, cache=False)
dask = open_dataset(packed)
whole = DataConfig(packed, train=(0, 400), valid=(), test=()).open()["train"]
data = XarrayDataset(user, spec_of(user)), whole, XarrayDataset(dask, spec_of(dask))
done = threading.Event()
failed = []

def read(dataset):
    loader = Loader(dataset, 3, 4, seed=0, memory=64 * 80, threads=0)
    try:
        while not done.is_set():
            next(loader)
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=read, args=(dataset,)) for dataset in data]
for thread in threads:
    thread.start()
for i in range(300):
    ds.to_netcdf(f"{folder}/other.nc", encoding={"u": {"zlib": True}})
    xr.open_dataset(f"{folder}/other.nc").u[3].values
done.set()
for thread in threads:
    thread.join()
assert not failed, failed
"""


def test_reading_in_threads_beside_the_netcdf_library_neither_crashes_nor_fails(tmp_path):
    run = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


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
