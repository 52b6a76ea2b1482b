"""Data larger than memory: every chunk is read about once per epoch, memory stays bounded, nothing is left out."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray as xr
import zarr
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import (
    DataConfig,
    Loader,
    Mixture,
    Samples,
    XarrayDataset,
    fit_normalizer,
    sidecar,
    spec_of,
    statistics,
    tensors,
)  # fmt: skip
from physml.data.blocks import DaskBlocks, edges
from physml.data.sampling import Shuffled
from physml.data.windows import POOL, Cache, cut, pooled_order
from physml.errors import DataError
from physml.normalize import Normalizer
from physml.training import TrainingConfig
from physml.training.members import _MembersTraining


def waves(frames=400, trajectories=1, points=16, seed=0):
    values = np.random.default_rng(seed).normal(size=(trajectories, frames, points)).astype("f4")
    return xr.Dataset(
        {"u": (("trajectory", "time", "x"), values)},
        {"time": 0.5 * np.arange(frames), "x": ("x", np.arange(points) / points, {"periodic": 1})},
    )


def stored(folder, chunk=10, together=1, kind="zarr", **kwargs):
    """A dataset of the file, and the same in memory."""
    ds = waves(**kwargs)
    sizes = (together, chunk, ds.sizes["x"])
    if kind == "zarr":
        ds.to_zarr(folder / "waves.zarr", encoding={"u": {"chunks": sizes}}, zarr_format=2)
        opened = xr.open_zarr(folder / "waves.zarr", chunks=None)
    else:
        ds.to_netcdf(folder / "waves.nc", encoding={"u": {"chunksizes": sizes, "zlib": True}})
        opened = xr.open_dataset(folder / "waves.nc", cache=False)
    return XarrayDataset(opened, spec_of(opened)), XarrayDataset(ds, spec_of(ds))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_array_equal(x, y)


def count_frames(dataset):
    """Counts how often each (trajectory, frame) of the file is read, from now on."""
    seen, read = Counter(), dataset.reader.parts

    def counted(trajectories, frames):
        seen.update((t, f) for t in trajectories for f in frames)
        return read(trajectories, frames)

    dataset.reader.parts = counted
    return seen


def epoch(loader, number=0):
    """Sample numbers of an epoch in the order of the batches (the batch must divide it)."""
    steps = len(loader.samples) // loader.batch
    return np.concatenate([loader.numbers(number * steps + i) for i in range(steps)])


MEMORY = 2 * 16 * 4 * 300  # the stream's half holds 300 frames of 16 float32


@pytest.mark.parametrize("kind", ["zarr", "netcdf"])
def test_an_epoch_holds_every_window_once_and_reads_every_frame_about_once(tmp_path, kind):
    data, memory = stored(tmp_path, kind=kind, frames=1600)
    seen = count_frames(data)
    loader = Loader(data, 3, 2, seed=0, memory=MEMORY, threads=0)
    assert data._arrays is None
    count = len(loader.samples)  # 1598, across all chunk boundaries
    first, second = epoch(loader), epoch(loader, 1)
    assert sorted(first) == sorted(second) == list(range(count))
    assert not np.array_equal(first, second)
    assert_array_equal(first, epoch(Loader(data, 3, 2, seed=0, memory=MEMORY)))
    seen.clear()
    for step, window in zip(range(count // 2), loader, strict=False):
        trajectory, start, stride = loader.samples.locate(loader.numbers(step))
        equal(window, memory.read_batch(trajectory, start, stride, 3))
    assert set(seen) == {(0, frame) for frame in range(1600)}
    assert sum(seen.values()) < 1.3 * 1600  # windows that straddle blocks cost some; one by one it would be 3 x 1598
    assert data._stream[1].nbytes <= MEMORY // 2


def test_the_order_is_well_mixed(tmp_path):
    data, _ = stored(tmp_path, frames=4000)
    loader = Loader(data, 2, 31, seed=0, memory=3 * MEMORY)
    order = loader.order.at(np.arange(3999)).astype(float)  # inside a batch, windows of a block stand together
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.2  # neighbors come from different blocks
    spread = [len(np.unique(batch // 80)) for batch in order.reshape(-1, 31)]  # blocks in a batch
    assert min(spread) >= 5
    # Places in the epoch and in the file have nothing to do with each other.
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.3


def test_a_position_is_one_integer_also_when_streaming(tmp_path):
    data, _ = stored(tmp_path, frames=1302)
    loader = Loader(data, 3, 26, seed=5, memory=MEMORY)
    assert data._stream is not None
    windows = [w for _, w in zip(range(60), loader, strict=False)]  # beyond the first epoch
    resumed = Loader(XarrayDataset(data.ds, data.spec), 3, 26, seed=5, memory=MEMORY).at(47)
    for expected, window in zip(windows[47:], resumed, strict=False):
        equal(expected, window)


def test_loaders_of_several_seeds_share_a_cache_and_each_reads_every_frame_about_once(tmp_path):
    data, memory = stored(tmp_path, frames=1600)
    options = {"memory": 2 * MEMORY, "readers": 4, "threads": 0}
    loaders = [Loader(data, 3, 2, seed=seed, **options) for seed in range(4)]
    seen, count = count_frames(data), len(loaders[0].samples)
    kept = []
    for step, windows in zip(range(count // 2), zip(*loaders, strict=True), strict=False):
        kept.append(windows[3])
        for loader, window in zip(loaders, windows, strict=True):
            equal(window, memory.read_batch(*loader.samples.locate(loader.numbers(step)), 3))
    assert sum(seen.values()) < 1.4 * 4 * 1600
    assert data._stream[1].nbytes <= MEMORY
    for loader in loaders:
        assert sorted(epoch(loader)) == list(range(count))
    again = Loader(XarrayDataset(data.ds, data.spec), 3, 2, seed=3, **options)  # alone, with another cache
    assert_array_equal(epoch(again), epoch(loaders[3]))
    for expected, window in zip(kept[700:], again.at(700), strict=False):
        equal(expected, window)
    one = Loader(data, 3, 2, seed=3, memory=2 * MEMORY)
    assert not np.array_equal(epoch(one), epoch(again))
    inside = [Loader(memory, 3, 2, seed=3, readers=readers) for readers in (1, 4)]
    assert_array_equal(*map(epoch, inside))  # what is in memory has no cache to share


def test_parts_of_a_mixture_share_their_cache_among_readers(tmp_path):
    data, _ = stored(tmp_path, frames=1600)
    samples = Samples(data.lengths, 3)
    one, four = (Mixture({"a": data}).shuffled(samples, 0, 2 * MEMORY, readers).orders[0] for readers in (1, 4))
    assert four.pool == pytest.approx(one.pool / 4, abs=1)


def test_members_are_as_many_readers(tmp_path):
    data, seen = stored(tmp_path)[1], []
    data.shuffled = lambda samples, seed, memory, readers: seen.append((seed, readers)) or Shuffled(len(samples), seed)
    run = SimpleNamespace(seed=[3, 1], size=2)
    window = next(_MembersTraining.load(run, data, 2, TrainingConfig(batch=4), 5))
    assert seen == [(3, 2), (1, 2)]
    expected = [next(Loader(data, 2, 4, seed=seed).at(5)) for seed in run.seed]
    assert_array_equal(window.frames, np.stack([own.frames for own in expected]))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_batches_and_mostly_read_different_blocks(tmp_path, processes):
    data, _ = stored(tmp_path, frames=2000)
    memory = MEMORY
    whole = Loader(data, 2, 32, seed=1, memory=memory)
    assert data._stream is not None
    shares, read = [], []
    for process in range(processes):
        own = XarrayDataset(data.ds, data.spec)
        seen = count_frames(own)
        loader = Loader(own, 2, 32, seed=1, memory=memory, process_index=process, process_count=processes, threads=0)
        seen.clear()
        shares.append([window for _, window in zip(range(62), loader, strict=False)])
        read.append(len(seen))
    for step, expected in zip(range(62), whole, strict=False):
        equal(expected, jax.tree.map(lambda *parts: np.concatenate(parts), *[share[step] for share in shares]))
    if processes == 4:  # without lanes each of them reads everything
        assert max(read) < 0.75 * 2000


def test_chunks_that_hold_several_trajectories_are_read_for_all_of_them(tmp_path):
    data, memory = stored(tmp_path, trajectories=160, frames=20, chunk=20, together=4)
    seen = count_frames(data)
    loader = Loader(data, 5, 16, seed=0, memory=2 * 64 * 20 * 32, threads=0)
    seen.clear()
    for step, window in zip(range(160), loader, strict=False):
        trajectory, start, stride = loader.samples.locate(loader.numbers(step))
        equal(window, memory.read_batch(trajectory, start, stride, 5))
    assert sum(seen.values()) < 1.3 * 3200
    assert data._stream[0].groups.tolist() == list(range(0, 161, 4))


def test_splits_strides_and_runs_are_cut_where_the_chunks_are(tmp_path):
    ds = waves(frames=100)
    ds.to_zarr(tmp_path / "a.zarr", encoding={"u": {"chunks": (1, 10, 16)}}, zarr_format=2)
    config = DataConfig(str(tmp_path / "a.zarr"), train=(0.05, 0.95), valid=(), test=(), time_stride=3)
    data = config.open()["train"]
    kept = np.arange(0, 100, 3)[2:32]
    expected = [0, *(np.flatnonzero(np.diff(kept // 10)) + 1), len(kept)]
    assert_array_equal(data.reader.chunks()[1], expected)
    loader = Loader(data, 2, 29, seed=0, memory=64 * 28)
    window = next(loader)
    rows = loader.samples.locate(loader.numbers(0))[1]
    assert_array_equal(window.frames[:, 0], ds.u.values[0, kept[rows]][..., None])
    gap = ds.isel(time=[*range(33), *range(50, 100)])
    gap.to_netcdf(tmp_path / "gap.nc", encoding={"u": {"chunksizes": (1, 10, 16)}})
    gap = XarrayDataset(xr.open_dataset(tmp_path / "gap.nc", cache=False), spec_of(gap))
    assert gap.lengths == (33, 50)
    loader = Loader(gap, 4, 77, seed=0, memory=64 * 80)
    assert sorted(loader.numbers(0)) == list(range(77))
    assert_array_equal(next(loader).times, np.broadcast_to(0.5 * np.arange(4, dtype="f4"), (77, 4)))
    assert 33 in gap._stream[0].starts  # no block crosses the jump


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("overhang", [0, 3, 60])
@pytest.mark.parametrize("together", [1, 5])
def test_blocks_cover_every_frame_once_and_fit_the_pool(chunk, overhang, together):
    groups = np.unique([*range(0, 6, together), 6])
    runs = [range(90), range(90, 240)]
    blocks = cut(groups, np.unique([*range(0, 240, chunk), 240]), runs, overhang, 100, cache=50_000)
    assert_array_equal(blocks.starts, [0, *blocks.stops[:-1]])
    assert blocks.stops[-1] == 240
    assert 90 in blocks.starts
    assert blocks.ends.max() <= 240
    assert (blocks.ends - blocks.stops <= overhang).all()
    assert (blocks.ends >= np.minimum(blocks.stops + overhang, np.where(blocks.stops <= 90, 90, 240))).all()
    if overhang < 60:  # a window of 61 frames of 5 trajectories is larger than the pool has room for
        assert blocks.sizes.max() <= POOL * 50_000 / 2
    trajectories, frames = (a.ravel() for a in np.meshgrid(np.arange(6), np.arange(240), indexing="ij"))
    for block in np.unique(blocks.of(trajectories, frames)):
        members, inside = blocks.extent(block)
        mine = blocks.of(trajectories, frames) == block
        assert set(trajectories[mine]) == set(members)
        assert set(frames[mine]) <= set(inside)


def test_the_pool_bounds_what_is_open():
    random = np.random.default_rng(0)
    blocks, sizes = np.repeat(np.arange(200), 30), np.full(200, 10.0)
    order = pooled_order(blocks, sizes, 100.0, random)
    assert sorted(order) == list(range(6000))
    first, last = np.full(200, 6000), np.zeros(200)
    for place, block in enumerate(blocks[order]):
        first[block], last[block] = min(first[block], place), place
    opened = [((first <= place) & (place <= last)).sum() for place in range(0, 6000, 50)]
    assert max(opened) <= 11
    assert np.mean(opened) > 8
    assert sorted(pooled_order(blocks, sizes, 1e9, random)) == list(range(6000))
    assert not len(pooled_order(np.zeros(0, int), sizes, 100.0, random))


def test_a_cache_makes_each_entry_once_and_forgets_failures():
    cache, made = Cache(100), Counter()

    def make(key):
        made[key] += 1
        return (np.zeros(5, np.float64),)

    threads = [threading.Thread(target=lambda: cache.get("a", lambda: make("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made["a"] == 1
    cache.get("b", lambda: make("b"))
    cache.get("a", lambda: make("a"))
    cache.get("c", lambda: make("c"))  # 120 bytes: the least recently used, b, goes
    assert cache.nbytes == 80
    cache.get("a", lambda: make("a"))
    cache.get("b", lambda: make("b"))
    assert made == {"a": 1, "b": 2, "c": 1}
    for _ in range(2):
        with pytest.raises(DataError):
            cache.get("bad", _fail)


def _fail():
    raise DataError("damaged")


def test_windows_of_many_files_do_not_go_through_the_whole_graph(tmp_path):
    ds = waves(frames=60)
    for i in range(0, 60, 5):
        part = ds.isel(trajectory=0, time=slice(i, i + 5))
        part.to_netcdf(tmp_path / f"{i:03d}.nc", encoding={"u": {"chunksizes": (2, 16)}})
    data = DataConfig(str(tmp_path), train=(3, 57), valid=(), test=()).open()["train"]
    assert_array_equal(data.read(0, range(4, 30, 3)).frames, ds.u.values[0, 7:33:3, :, None])
    variable = data.ds.variables["u"]
    assert_array_equal(edges(variable, "time")[:4], [0, 1, 2, 4])
    graph = DaskBlocks(variable)
    computed = []
    graph._compute = lambda bounds, inner=graph._compute: computed.append(bounds) or inner(bounds)
    for selection in ({"time": slice(4, 9, 2)}, {"time": 3}, {"time": slice(0, 0)}, {"x": np.array([3, 1]), "time": 1}):
        assert_array_equal(graph.isel(selection).values, variable.isel(selection).values)
    assert computed[0][0] == (3, 6)  # three chunks of some thirty
    loader = Loader(data, 3, 26, seed=0, memory=3200)
    assert data._stream is not None
    starts = loader.samples.locate(loader.numbers(0))[1]
    assert_array_equal(next(loader).frames[:, 2], ds.u.values[0, 5 + starts, :, None])


def test_errors_of_a_streamed_file_name_the_place(tmp_path):
    ds = waves(frames=100)
    ds.u[0, 60, 3] = np.nan
    ds.to_zarr(tmp_path / "a.zarr", encoding={"u": {"chunks": (1, 10, 16)}}, zarr_format=2)
    opened = xr.open_zarr(tmp_path / "a.zarr", chunks=None)
    loader = Loader(XarrayDataset(opened, spec_of(opened)), 2, 9, seed=0, memory=64 * 80)
    with pytest.raises(DataError, match="'u' has NaN at time index 60"):
        list(zip(range(11), loader, strict=False))


@pytest.mark.parametrize("kind", ["zarr", "netcdf", "contiguous"])
def test_a_pass_in_order_goes_through_blocks_too(tmp_path, kind):
    if kind == "contiguous":
        ds = waves(frames=401)
        ds.to_netcdf(tmp_path / "waves.nc")  # not in chunks: any frames may be read together
        opened = xr.open_dataset(tmp_path / "waves.nc", cache=False)
        data, memory = XarrayDataset(opened, spec_of(opened)), XarrayDataset(ds, spec_of(ds))
    else:
        data, memory = stored(tmp_path, kind=kind, frames=401)
    seen = count_frames(data)
    loader = Loader(data, 3, 16, seed=0, shuffle=False, memory=64 * 200, threads=0)
    assert data._stream is not None
    whole = [window.frames for window in loader]
    assert_array_equal(
        np.concatenate(whole), memory.read_batch(np.zeros(399, int), np.arange(399), np.ones(399, int), 3).frames
    )
    assert sum(seen.values()) < 1.4 * 401
    assert data._stream[1].nbytes <= 64 * 100


def test_a_few_windows_of_many_blocks_are_read_alone(tmp_path):
    data, memory = stored(tmp_path, frames=400)
    samples = Samples(data.lengths, 3)
    blocks = data.prepare(samples, 64 * 200)
    assert data.prepare(samples, 64 * 200, count=len(blocks) - 1) is None
    seen = count_frames(data)
    places = np.zeros(2, int), np.array([7, 211]), np.ones(2, int)
    equal(data.read_batch(*places, 3), memory.read_batch(*places, 3))
    assert sum(seen.values()) == 6
    assert data.prepare(samples, 64 * 200, count=len(blocks)) is not None
    assert data.prepare(samples, 2**30) is None
    assert data._arrays is not None


def test_windows_that_do_not_exist_are_refused(tmp_path):
    data, _ = stored(tmp_path, trajectories=2, frames=100)
    for memory in (64 * 80, 2**30):
        data.prepare(Samples(data.lengths, 3), memory)
        for trajectory, start, message in ((2, 0, "no trajectory 2"), (1, 98, "has 100 frames"), (0, -1, "has 100")):
            with pytest.raises(DataError, match=message):
                data.read_batch(np.array([0, trajectory]), np.array([0, start]), np.ones(2, int), 3)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_decoded_by_tensorstore_is_what_zarr_reads(tmp_path, zarr_format):
    ds = waves(frames=50, trajectories=3)
    ds["v"] = ds.u.transpose("x", "time", "trajectory").astype("f8") * 2  # another order and type
    ds["w"] = ds.u.round(1)
    packed = {"w": {"dtype": "i2", "scale_factor": 0.1, "_FillValue": -9999}}
    ds.to_zarr(tmp_path / "a.zarr", zarr_format=zarr_format, encoding={"u": {"chunks": (2, 7, 16)}, **packed})
    opened = xr.open_zarr(tmp_path / "a.zarr", chunks=None)
    data = XarrayDataset(opened, spec_of(opened, ("u", "v", "w")))
    window = data.read(1, range(3, 40, 3))
    for i, name in enumerate("uv"):
        assert data.reader._tensors[name] is not None
        assert_array_equal(window.frames[..., i], ds[name].transpose("trajectory", "time", "x")[1, 3:40:3].astype("f4"))
    assert "w" not in data.reader._tensors  # decoded further, by xarray
    assert_allclose(window.frames[..., 2], ds.w[1, 3:40:3], atol=1e-6)
    part = opened.isel(x=[5, 2, 9], trajectory=[2, 0]).isel(time=slice(4, None, 5))
    array, key = tensors.locate(part.u.variable.isel(time=slice(1, 6, 2)))
    assert_array_equal(tensors.read(tensors.open_array(array), key), part.u[:, 1:6:2])


def test_chunks_that_were_never_written_hold_the_fill_value(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    for name, value in (("a", 7.0), ("b", None)):
        array = group.create_array(name, shape=(40, 3), chunks=(10, 3), dtype="f4", fill_value=value)
        array[10:20] = 1.5
        read = tensors.read(tensors.open_array(array), (slice(5, 25), slice(None)))
        assert_array_equal(read, array[5:25])


def test_a_damaged_zarr_chunk_is_told(tmp_path):
    data, _ = stored(tmp_path, frames=100)
    (tmp_path / "waves.zarr" / "u" / "0.3.0").write_bytes(b"no chunk")
    with pytest.raises(DataError, match="variable 'u' cannot be read from trajectory 0, frame 30"):
        data.read(0, range(30, 33))


# --- statistics, stored ---


def test_a_pass_reads_every_frame_once(tmp_path):
    data, memory = stored(tmp_path, trajectories=3, frames=50)
    seen = count_frames(data)
    for chunk in (None, 7, 1000):
        seen.clear()
        windows = list(data.windows(chunk))
        assert set(seen.values()) == {1}
        assert len(seen) == 150
        fresh = np.concatenate([w.frames[int(w.times[0] > 0) :] for w in windows])
        assert_array_equal(fresh, memory.ds.u.values.reshape(150, 16, 1))
    assert [len(w.times) for w in data.windows(7)][:3] == [7, 8, 8]


def numbers(dataset, **options):
    return statistics(dataset, **options)["u"]


def sidecars(folder):
    return sorted(path.name for path in folder.rglob("*.physml-*.json"))


def test_statistics_are_stored_beside_the_data_and_reused(tmp_path, monkeypatch):
    data, memory = stored(tmp_path, kind="netcdf")
    expected = numbers(memory)
    assert numbers(memory, store=True) == expected  # nothing in memory is stored
    assert not sidecars(tmp_path)
    for name, value in {"mean": memory.ds.u.mean(), "min": memory.ds.u.min(), "std": memory.ds.u.std()}.items():
        assert_allclose(expected[name], value, rtol=1e-5, atol=1e-7)
    assert numbers(data) == expected
    assert not sidecars(tmp_path)
    assert numbers(data, store=True) == expected
    assert len(sidecars(tmp_path)) == 1
    assert sidecars(tmp_path)[0].startswith(".waves.nc.physml-")
    direct = Normalizer.fit(data.windows())
    monkeypatch.setattr(XarrayDataset, "windows", None)  # no second pass
    again = XarrayDataset(data.ds, data.spec)
    assert numbers(again, store=True) == expected
    equal(jax.tree.leaves(fit_normalizer(again)), jax.tree.leaves(direct))


def changed_file(path):
    import netCDF4

    with netCDF4.Dataset(path, "a") as file:
        file["u"][0, 200, 3] = 100.0  # one number, the size stays


def touched_file(path):
    os.utime(path, ns=(0, 0))


def no_change(path):
    pass


@pytest.mark.parametrize("change", [changed_file, touched_file, no_change])
def test_a_changed_file_is_never_served_from_the_store(tmp_path, change):
    path = tmp_path / "a.nc"
    waves().to_netcdf(path)
    config = DataConfig(str(path), train=(0, 400), valid=(), test=())
    first = numbers(config.open()["train"], store=True)
    (name,) = sidecars(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    content["totals"]["high"] = [77.0]  # to tell stored from fresh numbers
    content["checksum"] = sidecar._digest(content["totals"])
    (tmp_path / name).write_text(json.dumps(content))
    change(path)
    highest = {changed_file: 100.0, touched_file: first["max"], no_change: 77.0}[change]
    for _ in range(2):
        assert numbers(config.open()["train"], store=True)["max"] == highest


def test_another_selection_has_its_own_numbers(tmp_path):
    waves(trajectories=4, frames=40).to_zarr(tmp_path / "a.zarr", zarr_format=2)
    base = {"path": str(tmp_path / "a.zarr"), "valid": (), "test": (), "split_by": "trajectory"}
    options = [{"train": (0, 4)}, {"train": (0, 2)}, {"train": (2, 4)}, {"train": (0, 4), "time_stride": 2},
               {"train": (0, 4), "region": {"x": (0.0, 0.4)}}, {"train": (0, 4), "coarsen": 2}]  # fmt: skip
    for _ in range(2):
        for option in options:
            data = DataConfig(**base, **option).open()["train"]
            assert numbers(data, store=True) == numbers(data)
    assert len(sidecars(tmp_path)) == len(options)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"identity": {}, "totals": {}, "checksum": "x"}', "flip"])
def test_a_damaged_store_is_replaced_with_a_warning(tmp_path, damage):
    data, memory = stored(tmp_path)
    expected = numbers(data, store=True)
    (name,) = sidecars(tmp_path)
    content = (tmp_path / name).read_text()
    (tmp_path / name).write_text(content.replace('"frames": 400', '"frames": 399') if damage == "flip" else damage)
    with pytest.warns(UserWarning, match="is damaged"):
        assert numbers(data, store=True) == expected
    assert (tmp_path / name).read_text() == content


def test_a_folder_that_cannot_be_written_uses_the_cache(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    data, _ = stored(tmp_path / "data", kind="netcdf")
    monkeypatch.setenv("PHYSML_CACHE", str(tmp_path / "cache"))

    def refuse(path, text, inner=sidecar.write_text):
        if path.parent == tmp_path / "data":
            raise PermissionError(path)
        inner(path, text)

    monkeypatch.setattr("physml.data.sidecar.write_text", refuse)
    expected = numbers(data, store=True)
    assert not sidecars(tmp_path / "data")
    assert len(sidecars(tmp_path / "cache" / "statistics")) == 1
    monkeypatch.setattr(XarrayDataset, "windows", None)
    assert numbers(data, store=True) == expected


def test_all_files_of_many_are_watched(tmp_path):
    ds = waves(frames=30)
    for i in range(3):
        ds.isel(trajectory=0, time=slice(10 * i, 10 * i + 10)).to_netcdf(tmp_path / f"{i}.nc")
    config = DataConfig(str(tmp_path), train=(0, 30), valid=(), test=())
    first = numbers(config.open()["train"], store=True)
    assert len(sidecars(tmp_path)) == 1
    (3 * ds.isel(trajectory=0, time=slice(10, 20))).to_netcdf(tmp_path / "1.nc")
    data = config.open()["train"]
    assert numbers(data, store=True) == numbers(data) != first


# --- memory, measured in processes of their own ---

PEAK = """
import resource, sys, numpy as np, xarray as xr
from physml.data import DataConfig, Loader, fit_normalizer
path, task = sys.argv[1:]
data = DataConfig(path, train=(0.0, 1.0), valid=(), test=()).open()["train"]
if task == "stream":
    loader = Loader(data, 3, 16, seed=0, memory=50 * 2**20)
    assert data._arrays is None
    for _ in zip(range(len(loader)), loader): pass
elif task == "fit":
    fit_normalizer(data, store=False)
else:
    data.read(0, range(2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(path, task):
    """Peak resident memory (MiB) of a process that does `task` with a store."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), task], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def large(path, megabytes):
    """A zarr store of so many MB, written chunk by chunk."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    frames = megabytes * 10**6 // (4 * 64 * 64)
    array = group.create_array(
        "u", shape=(frames, 64, 64), chunks=(16, 64, 64), dtype="f4", compressors=None, fill_value=np.nan
    )
    array.attrs["_ARRAY_DIMENSIONS"] = ["time", "x", "y"]
    random = np.random.default_rng(0)
    for start in range(0, frames, 640):
        array[start : start + 640] = random.random((min(640, frames - start), 64, 64), np.float32)
    time = group.create_array("time", shape=(frames,), chunks=(frames,), dtype="f8", fill_value=np.nan)
    time[:] = np.arange(frames)
    time.attrs["_ARRAY_DIMENSIONS"] = ["time"]
    return path


@pytest.mark.slow
def test_ten_times_the_data_take_the_same_memory(tmp_path):
    small, big = large(tmp_path / "small.zarr", 60), large(tmp_path / "big.zarr", 600)
    base, few, many = peak(small, "open"), peak(small, "stream"), peak(big, "stream")
    assert many - few < 25  # 540 MB more data; the order of 36 600 windows and the names of chunks need a few
    assert many - base < 120  # 25 MiB of cache, batches made ahead, and the libraries that read


@pytest.mark.slow
def test_fitting_takes_little_memory(tmp_path):
    path = large(tmp_path / "big.zarr", 1500)
    assert peak(path, "fit") - peak(path, "open") < 200
