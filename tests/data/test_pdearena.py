import contextlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.convert.torch_file import read_tensors
from physml.data import DataConfig, hdf5, pdearena
from physml.data.formats import recognize
from physml.data.place import Place
from physml.data.sampling import Samples
from physml.errors import ConfigError, DataError, PhysmlError

SAMPLES = Path(__file__).parent / "samples"
ARENA = SAMPLES / "pdearena"
SMOKE, CONDITIONED = ARENA / "NavierStokes2D", ARENA / "NavierStokes2D-conditioned"
KS, SHALLOW = ARENA / "KuramotoSivashinsky1D", ARENA / "ShallowWater-2D"


def save(path, split, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        group = f.create_group(split)
        for name, values in content.items():
            if values is not None:
                group[name] = values
    return path


def smoke(path, *, n=2, steps=3, shape=(4, 5), split="train", **extra):
    """A file of smoke with `u = 100 trajectory + 10 step + index along x`; extra datasets, None leaves one out."""
    u = 100.0 * np.arange(n)[:, None, None, None] + 10 * np.arange(steps)[:, None, None] + np.arange(shape[0])[:, None]
    u = np.broadcast_to(u, (n, steps, *shape))
    content = {"u": u, "vx": u + 1, "vy": u + 2, "t": np.tile(np.linspace(18, 102, steps), (n, 1))}
    content |= {"dt": np.full(n, 6.0), "dx": np.full(n, 8.0), "dy": np.full(n, 6.4), "buo_y": np.full(n, 0.5)}
    content |= {"x": np.tile(np.linspace(0, 32, shape[0]), (n, 1)), **extra}
    return save(path, split, content)


def ks(path, *, n=2, steps=8, points=6, split="train", channel=False, **extra):
    u = 100.0 * np.arange(n)[:, None, None] + 10 * np.arange(steps)[:, None] + np.arange(points)
    content = {f"pde_{steps}-{points}": u[:, :, None] if channel else u}
    content |= {"dt": np.full(n, 0.2), "dx": np.full(n, 0.25), **extra}
    return save(path, split, content)


def test_smoke_opens_as_its_authors_read_it():
    counts = {}
    for split in ("train", "valid", "test"):
        ds = physml.open_dataset(SMOKE, split=split)
        counts[split] = ds.sizes["trajectory"]
        assert ds.u.shape[1:] == ds.vx.shape[1:] == ds.vy.shape[1:] == (14, 16, 16)
    assert counts == {"train": 2, "valid": 1, "test": 1}
    train = physml.open_dataset(SMOKE, split="train")
    assert train.u.dims == ("trajectory", "time", "x", "y")
    assert float(train.u[0, 2, 3, 4]) == pytest.approx(0.2, abs=1e-7)
    assert train.attrs["format"] == "pdearena"
    assert train.attrs["staggered"] == "vx and vy lie on cell faces, u at cell centres"
    assert physml.open_dataset(SMOKE).split.values.tolist() == ["train", "train", "valid", "test"]


def test_conditioned_smoke():
    ds = physml.open_dataset(CONDITIONED, split="train")
    assert ds.u.shape == (2, 8, 16, 16)
    assert ds.buo_y.values[-1] == pytest.approx(0.33)
    config = DataConfig(
        str(CONDITIONED), variables=("u", "vx", "vy"), parameters=("buo_y",), split_by="format",
        train=("train",), valid=("valid",), test=("test",),
    )  # fmt: skip
    train = config.open()["train"]
    assert_allclose(train.read(1, range(5)).parameters, [0.33])


def test_one_step_windows():
    config = DataConfig(
        str(SMOKE), variables=("u", "vx", "vy"), split_by="format", train=("train",), valid=("valid",), test=("test",)
    )
    valid = config.open()["valid"]
    samples = Samples(valid.lengths, 5)  # four frames of history and a target
    assert len(samples) == 10
    window = valid.read(samples[0].trajectory, range(samples[0].start, samples[0].start + 5))
    assert window.frames[:4].shape == (4, 16, 16, 3)
    assert window.frames[4:].shape == (1, 16, 16, 3)
    assert not any(axis.periodic for axis in valid.spec.grid.axes)


def test_positions_come_from_the_steps_and_not_from_the_arrays():
    ds = physml.open_dataset(SMOKE)
    assert_allclose(ds.x, 2.0 * (np.arange(16) + 0.5))  # the file says 0, 2.13, .., 32
    assert_allclose(ds.y, ds.x.values)
    assert_allclose(ds.time, 18 + 6.0 * np.arange(14))
    assert ds.time.attrs["units"] == "s"


def test_kuramoto_sivashinsky_as_its_authors_read_it():
    train = physml.open_dataset(KS, split="train", time_step=4)
    assert train.u.shape == (3, 5, 32)
    assert_allclose(pdearena.ks_conditions(train)[-1], [7, 7, 75], rtol=1e-5)
    valid = physml.open_dataset(KS, split="valid", time_step=4)
    assert valid.u.shape == (2, 5, 32)
    assert_allclose(pdearena.ks_conditions(valid)[-1], [6, 6, 50], rtol=1e-5)
    assert float(valid.u[1, 1, 3]) == pytest.approx(1.23147, abs=1e-5)  # the second frame of the last trajectory


def test_kuramoto_sivashinsky_trains():
    config = DataConfig(
        str(KS), parameters=("dt", "dx", "v"), split_by="format", options={"time_step": 4},
        train=("train",), valid=("valid",), test=("test",),
    )  # fmt: skip
    train = config.open()["train"]
    assert train.lengths == (5, 5, 5)
    assert train.read(2, range(2)).frames.shape == (2, 32, 1)
    assert [axis.periodic for axis in train.spec.grid.axes] == [True]


def test_steps_that_differ_become_tables():
    ds = physml.open_dataset(KS, split="train")
    assert not {"time", "x"} & set(ds.coords)
    assert_allclose(ds.times[2, :3], [0, 0.22, 0.44], atol=1e-6)
    assert_allclose(ds.grid_x[1, :2], [0.13, 0.39], atol=1e-6)


def test_channel_axis_and_longer_tests(tmp_path):
    ks(tmp_path / "KS_train_2.h5", steps=8, channel=True)
    ks(tmp_path / "KS_test_2.h5", steps=13, split="test")
    ds = physml.open_dataset(tmp_path)
    assert_array_equal(ds.frames, [8, 8, 13, 13])
    assert_array_equal(ds.u[1, :, 2].values[[7, 8]], [172, np.nan])
    assert_array_equal(ds.u[3, 12], 220 + np.arange(6))
    assert ds.x.attrs == {"periodic": 1, "period": pytest.approx(1.5)}
    assert "v" not in ds
    assert pdearena.ks_conditions(ds).shape == (4, 2)
    coarse = physml.open_dataset(tmp_path, time_step=4)
    assert_array_equal(coarse.frames, [2, 2, 4, 4])
    assert_allclose(coarse.time, [0, 0.8, 1.6, 2.4])
    assert_array_equal(coarse.u[0, :, 0], [0, 40, np.nan, np.nan])


def test_conditions_outside_of_their_range_stay(tmp_path):
    path = ks(tmp_path / "KS_train_2.h5", v=np.array([0.5, 1.6]))
    with pytest.warns(UserWarning, match="v leaves"):
        conditions = pdearena.ks_conditions(physml.open_dataset(path))
    assert_allclose(conditions, [[5, 5, 0.5], [5, 5, 1.6]], rtol=1e-5)
    with pytest.raises(DataError, match="no 'dx'"):
        pdearena.ks_conditions(xr.Dataset({"dt": 0.2}))


@pytest.mark.parametrize("place", [SHALLOW, SHALLOW / "train", SHALLOW / "train.zarr"])
def test_shallow_water_as_its_authors_read_it(place):
    ds = physml.open_dataset(place, split="train")
    assert ds.pres.dims == ("trajectory", "time", "latitude", "longitude")
    assert all(ds[name].shape == (2, 12, 12, 24) for name in ("u", "v", "vor", "pres"))
    assert float(ds.u[0, 2, 3, 5]) == pytest.approx(0.2, abs=1e-6)
    assert_allclose(ds.longitude, 15.0 * np.arange(24))
    assert ds.latitude.attrs["units"] == "degrees_north"


def test_shallow_water_is_scaled_by_its_own_statistics():
    ds = physml.open_dataset(SHALLOW, split="train")
    facts = pdearena.point_statistics(ds)
    scaled = (ds.pres - facts["mean"].pres) / facts["std"].pres
    for name in ("pres", "vor", "u", "v"):
        stored = read_tensors(SHALLOW / "normstats.pt", prefer=(name,))
        assert_allclose(facts["mean"][name], np.squeeze(stored["mean"]), atol=1e-6)  # float32
        assert_allclose(facts["std"][name], np.squeeze(stored["std"]), rtol=1e-5)
    assert float(scaled[0, 2, 3, 5]) == pytest.approx(-1.01389, abs=1e-4)


def test_shallow_water_from_folders_equals_zarr(tmp_path):
    shutil.copytree(SHALLOW / "train", tmp_path / "train")
    folders, store = physml.open_dataset(tmp_path), physml.open_dataset(SHALLOW / "train.zarr")
    for name in ("u", "v", "vor", "pres"):
        assert_array_equal(folders[name], store[name])
    two_days = physml.open_dataset(SHALLOW, split="train", time_step=4)
    assert_array_equal(two_days.u, store.u[:, 4::4])
    with pytest.raises(DataError, match="leaves out the first 4"):
        pdearena._every(store.isel(time=slice(4)), 8, 4, "here")


def test_shallow_water_trains():
    config = DataConfig(str(SHALLOW), split_by="format", train=("train",), valid=(), test=("test",))
    splits = config.open()
    assert splits["train"].spec.names == ("u", "v", "vor", "pres")
    assert [axis.periodic for axis in splits["train"].spec.grid.axes] == [False, True]
    assert splits["test"].read(0, range(4, 6)).frames.shape == (2, 12, 24, 4)


def test_opening_reads_no_field(monkeypatch):
    monkeypatch.setattr(hdf5.Array, "_read", lambda *_: pytest.fail("a field was read"))
    for place in (SMOKE, KS, SHALLOW):
        ds = pdearena.open_dataset(Place(place))
        assert not isinstance(ds.u.variable._data, np.ndarray)
    assert not isinstance(physml.open_dataset(SMOKE).u.variable._data, np.ndarray)


def test_normalization_file_is_never_opened(tmp_path):
    shutil.copytree(SHALLOW, tmp_path / "shallow")
    (tmp_path / "shallow" / "normstats.pt").unlink()
    assert physml.open_dataset(tmp_path / "shallow").sizes["trajectory"] == 3


def test_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    for source in (SMOKE, SHALLOW):
        memory.put(str(source), f"/{source.name}", recursive=True)
        ds = physml.open_dataset(f"memory://{source.name}", split="test")
        assert_array_equal(ds.u, physml.open_dataset(source, split="test").u)


def test_only_pdearena_is_recognized(tmp_path, make):
    for other in SAMPLES.iterdir():
        for path in [other, *other.iterdir()]:
            assert pdearena.recognizes(Place(path)) == (other.name == "pdearena" and path != other)
            assert path.parent != ARENA or recognize(path) == "pdearena"
    make.waves().to_netcdf(tmp_path / "some_train.h5")
    make.waves().to_zarr(tmp_path / "train.zarr", consolidated=False)
    assert recognize(tmp_path / "some_train.h5") is None
    assert recognize(tmp_path / "train.zarr") is None
    assert recognize(tmp_path) is None


def test_splits_are_told_by_file_names_and_not_by_folders(tmp_path):
    smoke(tmp_path / "train_test" / "NavierStokes2D_train_1_0.50000_2.h5")
    smoke(tmp_path / "train_test" / "NavierStokes2D_valid_1_0.50000.h5", n=1, split="valid")
    (tmp_path / "train_test" / "notes.h5").write_text("no HDF5, and no split in its name")
    ds = physml.open_dataset(tmp_path / "train_test", format="pdearena")
    assert ds.split.values.tolist() == ["train", "train", "valid"]
    with pytest.raises(DataError, match="no split 'test'"):
        physml.open_dataset(tmp_path / "train_test", format="pdearena", split="test")


def test_missing_and_unknown_keys_are_tolerated(tmp_path):
    ds = physml.open_dataset(smoke(tmp_path / "a.h5", t=None, buo_y=None, dx=None, dy=None, x=None, more=np.zeros(3)))
    assert_allclose(ds.time, [0, 6, 12])
    assert not {"x", "y", "buo_y", "more"} & set(ds.variables)
    times = physml.open_dataset(smoke(tmp_path / "b.h5", dt=None)).time
    assert_allclose(times, [18, 60, 102])
    u = np.full((2, 3, 4, 5), np.nan, "f4")
    assert physml.open_dataset(smoke(tmp_path / "c.h5", u=u)).u.dtype == np.float32


BROKEN = {
    "no u": {"u": None},
    "no velocity": {"vx": None},
    "shorter velocity": {"vy": np.zeros((2, 2, 4, 5))},
    "no channel axis": {"u": np.zeros((2, 3, 4))},
    "no trajectories": {"u": np.zeros((0, 3, 4, 5)), "vx": np.zeros((0, 3, 4, 5)), "vy": np.zeros((0, 3, 4, 5))},
    "steps of other length": {"dx": np.ones(3)},
    "times of other length": {"t": np.zeros((2, 4))},
    "text": {"u": np.full((2, 3, 4, 5), b"x")},
    "link": {"u": h5py.ExternalLink("/etc/passwd", "u")},
}


@pytest.mark.parametrize("extra", BROKEN.values(), ids=BROKEN)
def test_broken_smoke_is_named(tmp_path, extra):
    smoke(tmp_path / "broken_train_1.h5", **extra)
    with pytest.raises(DataError, match="broken_train_1.h5"):
        physml.open_dataset(tmp_path / "broken_train_1.h5", format="pdearena")


@pytest.mark.parametrize(
    "extra",
    [{"pde_8-6": None}, {"pde_9-9": np.zeros((2, 9, 9))}, {"pde_8-6": np.zeros((2, 8, 2, 6))}, {"dt": np.ones(5)}],
    ids=["no field", "two fields", "two channels", "steps"],
)
def test_broken_kuramoto_sivashinsky_is_named(tmp_path, extra):
    ks(tmp_path / "KS_train_2.h5", **extra)
    with pytest.raises(DataError, match="KS_train_2.h5"):
        physml.open_dataset(tmp_path / "KS_train_2.h5", format="pdearena")


def test_files_that_differ_and_files_that_are_missing(tmp_path):
    smoke(tmp_path / "a" / "NS_train_1.h5")
    smoke(tmp_path / "a" / "NS_train_2.h5", shape=(4, 6))
    with pytest.raises(DataError, match=r"NS_train_2.h5: 'u' has axes .* in .*NS_train_1.h5"):
        physml.open_dataset(tmp_path / "a")
    smoke(tmp_path / "b" / "NS_train_1.h5")
    ks(tmp_path / "b" / "NS_train_2.h5")
    with pytest.raises(DataError, match="NS_train_2.h5 holds ks, but .*NS_train_1.h5 smoke"):
        physml.open_dataset(tmp_path / "b")
    smoke(tmp_path / "c" / "NS_train_1.h5", split="valid")
    with pytest.raises(DataError, match="no group 'train', which its name promises"):
        physml.open_dataset(tmp_path / "c")
    with pytest.raises(DataError, match="no file"):
        physml.open_dataset(tmp_path / "absent", format="pdearena")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="no shallow water"):
        physml.open_dataset(tmp_path / "d", format="pdearena")
    shutil.copytree(SHALLOW / "train", tmp_path / "e" / "train")
    next((tmp_path / "e").rglob("output.nc")).unlink()
    with pytest.raises(DataError, match="output.nc"):
        physml.open_dataset(tmp_path / "e")
    with pytest.raises(ConfigError, match="time_step"):
        physml.open_dataset(SMOKE, time_step=0)


def test_runs_on_other_grids_are_named(tmp_path):
    shutil.copytree(SHALLOW / "train", tmp_path / "train")
    file = sorted((tmp_path / "train").rglob("output.nc"))[1]
    small = xr.open_dataset(file).isel(lat=slice(4)).load()
    small.close()
    file.unlink()
    small.to_netcdf(file)
    with pytest.raises(DataError, match="seed=12/run0001/output.nc: 'u' has axes"):
        physml.open_dataset(tmp_path)
    file.unlink()
    small.drop_vars("pres").to_netcdf(file)
    with pytest.raises(DataError, match="no 'pres'"):
        physml.open_dataset(tmp_path)


def test_a_heap_of_zeros_does_not_hang(tmp_path):
    target = tmp_path / "test" / "seed=1" / "run1" / "output.nc"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = bytearray(next((SHALLOW / "test").rglob("output.nc")).read_bytes())
    at = content.index(b"GCOL") + 16
    content[at : at + 64] = bytes(64)
    target.write_bytes(content)
    with pytest.raises(DataError, match="a heap is overwritten"):
        physml.open_dataset(tmp_path)


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    sources = [SMOKE, KS, SHALLOW, SHALLOW / "train", SMOKE / "NavierStokes2D_valid_197910_0.50000.h5"]
    outcomes = set()
    for seed in seeds:
        source = sources[seed % len(sources)]
        copy = damage(source, tmp_path / "fuzzed" / source.name, seed)
        outcomes.add(survives(copy, "pdearena"))
        with contextlib.suppress(PhysmlError):
            pdearena.recognizes(Place(copy))
    assert outcomes == {"opened", "DataError"}
