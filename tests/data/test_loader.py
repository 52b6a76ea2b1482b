import jax
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

from physml.data import Loader, Samples, XarrayDataset, spec_of
from physml.errors import ConfigError, DataError


def dataset(make, **kwargs):
    ds = make.waves(**{"trajectories": 5, "frames": 9, **kwargs})
    return XarrayDataset(ds, spec_of(ds, ("u",), forcing=("wind",), static=("a",), parameters=("viscosity",)))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_array_equal(x, y)


def take(loader, steps):
    return [window for _, window in zip(range(steps), loader)]


@pytest.mark.parametrize("lengths", [(9,), (4, 2, 9, 3), (1, 1), ()])
@pytest.mark.parametrize(("frames", "strides", "every"), [(3, (1,), 1), (2, (1, 3), 1), (1, (1,), 2), (3, (2,), 3)])
def test_samples_enumerate_every_window_once(lengths, frames, strides, every):
    samples = Samples(lengths, frames, strides, every)
    expected = [
        (t, start, stride)
        for stride in strides
        for t, length in enumerate(lengths)
        for start in range(0, length, every)
        if start + (frames - 1) * stride < length
    ]
    assert [tuple(samples[i]) for i in range(len(samples))] == expected
    with pytest.raises(IndexError):
        samples[len(samples)]
    if expected:
        located = np.stack(samples.locate(np.arange(len(samples))), -1)
        assert_array_equal(located, expected)


def test_samples_refuse_empty_windows():
    with pytest.raises(ConfigError):
        Samples((3,), 0)


def test_an_epoch_holds_every_window_once_and_epochs_differ(make):
    loader = Loader(dataset(make), 3, 5, seed=0)
    count = len(loader.samples)
    assert count == 5 * 7
    epochs = [np.concatenate([loader.numbers(e * 7 + i) for i in range(7)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], Loader(dataset(make), 3, 5, seed=1).numbers(0))
    equal(take(loader, 3), take(Loader(dataset(make), 3, 5, seed=0), 3))


def test_windows_are_what_the_dataset_reads(make):
    data = dataset(make)
    loader = Loader(data, 3, 4, seed=3)
    for step, window in enumerate(take(loader, 4)):
        for row, number in enumerate(loader.numbers(step)):
            trajectory, start, stride = loader.samples[int(number)]
            alone = data.read(trajectory, range(start, start + 3, stride))
            equal(jax.tree.map(lambda leaf, row=row: leaf[row], window), alone)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 11])
def test_global_batches_do_not_depend_on_the_number_of_processes(make, processes, position):
    data = dataset(make)
    reference = take(Loader(data, 2, 8, seed=7).at(position), 3)
    shares = [
        take(Loader(data, 2, 8, seed=7, process_index=p, process_count=processes).at(position), 3)
        for p in range(processes)
    ]
    for step, expected in enumerate(reference):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[share[step] for share in shares])
        equal(joined, expected)


def test_a_positioned_loader_goes_on_where_another_stopped(make):
    data = dataset(make)
    straight = Loader(data, 2, 6, seed=5)
    all_windows = take(straight, 20)
    assert straight.step == 20
    equal(take(Loader(data, 2, 6, seed=5).at(13), 7), all_windows[13:])
    equal(take(straight.at(2), 2), all_windows[2:4])
    assert straight.step == 4


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_do_not_change_the_order(make, threads):
    data = dataset(make)
    equal(take(Loader(data, 2, 6, seed=5, threads=threads), 9), take(Loader(data, 2, 6, seed=5), 9))


def test_memory_and_file_give_the_same_batches(make):
    from_memory, from_file = dataset(make), dataset(make)
    a, b = Loader(from_memory, 3, 4, seed=0, strides=(1, 2)), Loader(from_file, 3, 4, seed=0, strides=(1, 2), memory=0)
    equal(take(a, 6), take(b, 6))
    assert from_memory._arrays is not None
    assert from_file._arrays is None


def test_masked_windows_and_runs_give_the_same_batches_from_memory(make):
    ds = make.weather(days=30).where(lambda d: d.latitude < 50)
    ds = ds.isel(time=[*range(11), *range(15, 30)])
    datasets = [XarrayDataset(ds, spec_of(ds)) for _ in range(2)]
    assert datasets[0].lengths == (11, 15)
    a, b = (Loader(d, 3, 4, seed=0, memory=m) for d, m in zip(datasets, (2**30, 0), strict=True))
    equal(take(a, 8), take(b, 8))
    for window in take(a, 5):  # no window crosses the jump
        assert_array_equal(window.times, np.broadcast_to(np.arange(3) * 86400.0, (4, 3)))


def test_padding_of_shorter_trajectories_is_never_read(make):
    lengths = [9, 4, 4, 1, 7]
    ds = make.waves(trajectories=5, frames=9)
    for name in ("u", "wind"):
        ds[name] = ds[name].where(ds["time"].copy(data=np.arange(9)) < xr.DataArray(lengths, dims="trajectory"))
    ds["frames"] = ("trajectory", lengths)

    def build():
        return XarrayDataset(ds, spec_of(ds, ("u",), forcing=("wind",), static=("a",), parameters=("viscosity",)))

    from_file, in_memory = build(), build()
    assert from_file.lengths == tuple(lengths)
    first, second = Loader(from_file, 3, 4, seed=0, memory=0), Loader(in_memory, 3, 4, seed=0)
    assert in_memory._arrays is not None
    assert len(first.samples) == 7 + 2 + 2 + 0 + 5
    for a, b in zip(take(first, 6), take(second, 6), strict=True):
        assert not np.isnan(a.frames).any()
        equal(a, b)
    assert sum(len(window.times) for window in in_memory.windows(chunk=100)) == sum(lengths)
    with pytest.raises(DataError, match="has 4 frames"):
        from_file.read(1, range(3, 5))
    ds["frames"] = ("trajectory", [9, 4, 10, 1, 7])
    with pytest.raises(DataError, match="from 1 to 9, but it holds int64 from 1 to 10"):
        build()


def test_a_pass_ends_keeps_its_last_batch_and_can_begin_again(make):
    data = dataset(make)  # 35 windows of 3 frames
    loader = Loader(data, 3, 8, seed=0, shuffle=False)
    for _ in range(2):
        windows = list(loader)
        assert [len(w.frames) for w in windows] == [8, 8, 8, 8, 3]
    assert len(loader) == 5
    everything = np.concatenate([w.frames for w in windows])
    assert_array_equal(everything[7], data.read(1, range(3)).frames)
    padded = Loader(data, 3, 8, seed=0, shuffle=False, pad=True)
    windows = list(padded)
    assert [len(w.frames) for w in windows] == [8] * 5
    assert_array_equal(padded.weights(4), [1, 1, 1, 0, 0, 0, 0, 0])
    assert_array_equal(padded.weights(0), np.ones(8))
    kept = np.concatenate([w.frames[padded.weights(i) > 0] for i, w in enumerate(windows)])
    assert_array_equal(kept, everything)


def test_padded_shares_of_a_pass_cover_it_once(make):
    data = dataset(make)
    whole = np.concatenate([w.frames for w in Loader(data, 3, 8, seed=0, shuffle=False)])
    loaders = [Loader(data, 3, 8, seed=0, shuffle=False, pad=True, process_index=p, process_count=2) for p in range(2)]
    weights = [np.concatenate([loader.weights(i) for loader in loaders]) for i in range(5)]
    shares = [list(loader) for loader in loaders]
    batches = [np.concatenate([share[i].frames for share in shares]) for i in range(5)]
    assert_array_equal(np.concatenate([b[w > 0] for b, w in zip(batches, weights, strict=True)]), whole)


def test_a_batch_larger_than_an_epoch_wraps_around(make):
    loader = Loader(dataset(make, trajectories=1, frames=3), 2, 5, seed=0)
    numbers = np.concatenate([loader.numbers(i) for i in range(2)])
    assert_array_equal(np.bincount(numbers), [5, 5])
    assert len(loader) == 1


def test_any_dataset_will_do(make):
    data = dataset(make)

    class Plain:
        spec, lengths = data.spec, data.lengths

        def read(self, trajectory, frames):
            return data.read(trajectory, frames)

    equal(take(Loader(Plain(), 3, 4, seed=1), 3), take(Loader(data, 3, 4, seed=1), 3))


def test_impossible_loaders_say_what_would_work(make):
    data = dataset(make)
    with pytest.raises(DataError, match="No window of 10 frames fits: the longest of 5 trajectories has 9 frames"):
        Loader(data, 10, 4, seed=0)
    with pytest.raises(ConfigError, match="batch of 6 windows cannot be shared by 4 processes. Use batch=8"):
        Loader(data, 2, 6, seed=0, process_count=4)
    with pytest.raises(ConfigError, match="process_index is 2"):
        Loader(data, 2, 4, seed=0, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="seed is -1"):
        Loader(data, 2, 4, seed=-1)
    with pytest.raises(ConfigError, match="pad=True"):
        Loader(data, 3, 8, seed=0, shuffle=False, process_count=2)


def test_an_error_while_reading_reaches_the_caller(make):
    ds = make.weather()
    ds.slp[7, 0, 0] = np.nan
    loader = Loader(XarrayDataset(ds, spec_of(ds)), 2, 4, seed=0, memory=0)
    with pytest.raises(DataError, match="'slp' has NaN at time index 7"):
        take(loader, 20)
