"""Remote files are read once: the second reader finds them on disk, within a limit, and never an old version."""

import time

import numpy as np
import pytest
import xarray as xr
from serving import serve

import physml
from physml.data import remote
from physml.data.place import Place
from physml.errors import ConfigError, DataError


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYSML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK", 50_000)
    with serve() as (served, address):
        served.address = address
        yield served


def fields(seed=0, size=64):
    values = np.random.default_rng(seed).standard_normal((4, size, size)).astype("f4")
    return xr.Dataset({"u": (("time", "x", "y"), values)}, {"time": np.arange(4.0)})


def netcdf(served, tmp_path, seed=0, name="a.nc"):
    ds = fields(seed)
    ds.to_netcdf(tmp_path / name, engine="netcdf4", encoding={"u": {"chunksizes": (1, 64, 64)}})
    served.files[f"/{name}"] = (tmp_path / name).read_bytes()
    return f"{served.address}/{name}", ds


def store(served, tmp_path, seed=0, name="a.zarr", version=3):
    ds = fields(seed)
    path = physml.data.save_dataset(ds.chunk(time=1), tmp_path / f"{seed}-{name}", zarr_format=version)
    for file in path.rglob("*"):
        if file.is_file():
            served.files[f"/{name}/{file.relative_to(path)}"] = file.read_bytes()
    return f"{served.address}/{name}", ds


def kept():
    return sum(path.stat().st_size for path in remote.cache_root().rglob("*") if path.is_file())


@pytest.mark.parametrize("make", [netcdf, store], ids=["netcdf", "zarr"])
def test_the_second_reader_takes_nothing_from_the_server(server, tmp_path, make):
    url, ds = make(server, tmp_path)
    np.testing.assert_array_equal(physml.open_dataset(url)["u"][0], ds["u"])
    first = server.total
    assert first > ds["u"].nbytes / 2
    np.testing.assert_array_equal(physml.open_dataset(url)["u"][0], ds["u"])
    assert server.total == first
    assert kept() > 0


def test_opening_reads_a_part_only(server, tmp_path):
    url, ds = netcdf(server, tmp_path)
    big = server.files["/a.nc"] + bytes(2_000_000)  # HDF5 ignores what comes after its end
    server.files["/a.nc"] = big
    np.testing.assert_array_equal(physml.open_dataset(url)["u"][0, 0], ds["u"][0])
    assert server.total < 600_000


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_of_zarr_are_kept(server, tmp_path, version):
    url, ds = store(server, tmp_path, version=version)
    for _ in range(2):
        np.testing.assert_array_equal(physml.open_dataset(url)["u"][0], ds["u"])
    assert all(count == len(server.files[path]) for path, count in server.sent.items() if "/c/" in path)


def test_benchmark_files_take_the_same_way(server, tmp_path):
    from pathlib import Path

    sample = Path(__file__).parent / "samples/the_well/shear_flow/data/test/shear_flow_Reynolds_1e4_Schmidt_1e0.hdf5"
    server.files["/a.hdf5"] = sample.read_bytes()
    url = f"{server.address}/a.hdf5"
    totals = []
    for _ in range(2):
        ds = physml.open_dataset(url)
        assert ds.attrs["format"] == "the_well"
        xr.testing.assert_equal(ds.compute(), physml.open_dataset(sample).compute())
        totals.append(server.total)
    assert totals[0] == totals[1]
    assert Place(url).read() == sample.read_bytes()


@pytest.mark.parametrize("make", [netcdf, store], ids=["netcdf", "zarr"])
def test_a_changed_file_is_noticed(server, tmp_path, make):
    url, _ = make(server, tmp_path, seed=0)
    physml.open_dataset(url)["u"].load()
    before = kept()
    url, new = make(server, tmp_path, seed=1)
    if make is store:  # the version of a store is that of its metadata
        server.files["/a.zarr/zarr.json"] += b"\n"
    np.testing.assert_array_equal(physml.open_dataset(url)["u"][0], new["u"])
    assert kept() < 1.5 * before  # the old version is gone


def test_the_limit_is_respected_and_the_oldest_goes_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv(remote.LIMIT, "0.0002")  # 200 kB
    monkeypatch.setattr(remote, "_BOUND", remote._Bound())
    urls = []
    for i in range(6):
        server.files[f"/{i}.bin"] = np.random.default_rng(i).bytes(60_000)
        urls.append(f"{server.address}/{i}.bin")
    for url in urls:
        assert Place(url).read() == server.files[url.removeprefix(server.address)]
        assert kept() <= 200_000
        time.sleep(0.01)  # times of use must differ
    before = server.total
    Place(urls[-1]).read()
    assert server.total == before
    Place(urls[0]).read()
    assert server.total == before + 60_000


def test_nothing_is_kept_without_room_or_version(server, tmp_path, monkeypatch):
    url, ds = netcdf(server, tmp_path)
    monkeypatch.setenv(remote.LIMIT, "0")
    np.testing.assert_array_equal(physml.open_dataset(url)["u"][0], ds["u"])
    monkeypatch.delenv(remote.LIMIT)
    server.tags = False
    np.testing.assert_array_equal(physml.open_dataset(url)["u"][0], ds["u"])
    assert kept() == 0
    monkeypatch.setenv(remote.LIMIT, "much")
    with pytest.raises(ConfigError, match="PHYSML_REMOTE_CACHE_GB is 'much'"):
        physml.open_dataset(url)


def test_a_damaged_copy_is_read_again(server, tmp_path):
    server.files["/a.bin"] = content = np.random.default_rng(0).bytes(60_000)
    place = Place(f"{server.address}/a.bin")
    assert place.read() == content
    for file in [path for path in remote.cache_root().rglob("*") if path.is_file()]:
        file.write_bytes(file.read_bytes()[:-1])
    assert Place(f"{server.address}/a.bin").read() == content


def test_what_is_kept_is_written_whole_or_not(tmp_path, monkeypatch):
    file = tmp_path / "remote/url/version/0"
    monkeypatch.setattr(remote.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    remote.keep(file, b"content", 10**6)
    assert remote.recall(file) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_unreachable_servers_are_one_error(server):
    with pytest.raises(DataError, match=r"There is no file .*absent\.nc"):
        physml.open_dataset(f"{server.address}/absent.nc")
    with pytest.raises(DataError, match="cannot be reached"):
        physml.open_dataset("http://127.0.0.1:9/a.nc")


def test_versions_need_more_than_a_size():
    assert remote.identity({"size": 5, "name": "a"}) == ""
    assert remote.identity({"size": 5, "ETag": "x"}) != remote.identity({"size": 5, "ETag": "y"})
    assert remote.identity({"size": 5, "mtime": 1}) != remote.identity({"size": 6, "mtime": 1})
