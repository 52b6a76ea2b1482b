import dataclasses
import json

import h5py
import jax
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import DataConfig, XarrayDataset, spec_of, statistics
from physml.data.axes import area_weights
from physml.errors import ConfigError, DataError, SpecError
from physml.normalize import Normalizer


@pytest.fixture
def weather(make, tmp_path):
    """The path of 40 days from 20 February 2001, and its content."""
    ds = make.weather(days=40)
    ds.to_netcdf(tmp_path / "weather.nc")
    return str(tmp_path / "weather.nc"), ds


@pytest.fixture
def waves(make, tmp_path):
    ds = make.waves(trajectories=10)
    ds.to_netcdf(tmp_path / "waves.nc")
    return str(tmp_path / "waves.nc"), ds


def first_values(dataset):
    return [dataset.read(i, range(1)).frames[0].flat[0] for i in range(len(dataset.lengths))]


@pytest.mark.parametrize(
    ("train", "valid", "frames"),
    [
        (("2001-02", "2001-02"), ("2001-03-01", "2001-03-05"), (9, 5)),
        (("2001-02",), ("2001-03",), (9, 31)),
        ((0, 30), (30, 40), (30, 10)),
        ((0.0, 0.5), (0.5, 0.75), (20, 10)),
        (("2001-02-20T00", "2001-02-21T00"), ("2001-03-31", "2001-03-31"), (2, 1)),
    ],
)
def test_splits_by_time(weather, train, valid, frames):
    path, ds = weather
    splits = DataConfig(path, train=train, valid=valid, test=()).open()
    assert list(splits) == ["train", "valid"]
    assert (splits["train"].lengths, splits["valid"].lengths) == ((frames[0],), (frames[1],))
    assert splits["train"].spec is splits["valid"].spec
    assert_array_equal(splits["train"].read(0, range(frames[0])).frames[..., 0], ds.slp[: frames[0]])
    end = splits["train"].labels(0)[-1]
    assert splits["valid"].labels(0)[0] > end  # no frame in both


def test_splits_by_trajectory(waves, tmp_path):
    path, ds = waves
    config = DataConfig(path, variables=("u",), parameters=("viscosity",))
    splits = config.open()
    assert [len(s.lengths) for s in splits.values()] == [8, 1, 1]
    assert_array_equal(first_values(splits["valid"]), ds.u[8:9, 0, 0, 0])
    numbered = dataclasses.replace(config, train=(2, 5), valid=(5, 7), test=()).open()
    assert_array_equal(first_values(numbered["train"]), ds.u[2:5, 0, 0, 0])
    assert_allclose(numbered["train"].read(0, range(1)).parameters, ds.viscosity[2:3])
    (tmp_path / "a.txt").write_text("7\n1\n")
    (tmp_path / "b.json").write_text(json.dumps([3]))
    np.save(tmp_path / "c.npy", np.array([0, 9]))
    train, valid, test = ((str(tmp_path / name),) for name in ("a.txt", "b.json", "c.npy"))
    listed = dataclasses.replace(config, train=train, valid=valid, test=test).open()
    assert_array_equal(first_values(listed["train"]), ds.u[[7, 1], 0, 0, 0])
    assert_array_equal(first_values(listed["test"]), ds.u[[0, 9], 0, 0, 0])


def test_shuffled_splits_are_disjoint_complete_and_repeatable(waves):
    path, _ = waves
    config = DataConfig(path, variables=("u",), split_seed=3, train=(0.0, 0.6), valid=(0.6, 0.8), test=(0.8, 1.0))

    def labels():
        return [s.ds.trajectory.values.tolist() for s in config.open().values()]

    assert sorted(sum(labels(), [])) == list(range(10))
    assert labels() == labels()
    assert labels()[0] != list(range(6))


def test_splits_by_file(make, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (make.waves() * seed).assign_coords(make.waves().coords).to_netcdf(tmp_path / f"{name}.nc")
    fine = make.waves(x=16, y=12)
    fine.to_netcdf(tmp_path / "fine.nc")
    config = DataConfig(
        variables=("u",), train=(f"{tmp_path}/a.nc",), valid=(f"{tmp_path}/b.nc",), test=(f"{tmp_path}/fine.nc",)
    )
    splits = config.open()
    assert splits["valid"].spec is splits["train"].spec
    assert splits["test"].spec.grid.shape == (16, 12)  # zero-shot: its own grid, the same channels
    fine.assign(u=fine.u.assign_attrs(units="m s-1")).to_netcdf(tmp_path / "units.nc")
    make.waves().assign(u=make.waves().u.assign_attrs(units="km h-1")).to_netcdf(tmp_path / "km.nc")
    with pytest.raises(SpecError, match="'u' is in 'km h-1' in split 'train', but in 'm s-1' in split 'test'"):
        dataclasses.replace(config, train=(f"{tmp_path}/km.nc",), test=(f"{tmp_path}/units.nc",)).open()


def test_train_statistics_see_only_train_frames(weather):
    path, ds = weather
    splits = DataConfig(path, variables=("slp",), train=(0, 20), valid=(20, 30), test=(30, 40)).open()
    facts = statistics(splits["train"])["slp"]
    area = np.cos(np.deg2rad(ds.latitude))
    assert facts["mean"] == pytest.approx(float(ds.slp[:20].weighted(area).mean()), rel=1e-6)
    assert facts["max"] == float(ds.slp[:20].max())
    assert facts["unit"] == "Pa"


def test_region_levels_and_strides(make, tmp_path):
    ds = make.weather(days=8, lat=6, lon=8)
    deep = xr.concat([ds.slp, ds.slp + 1, ds.slp + 2], xr.DataArray([1000, 850, 500], dims="level", name="level"))
    xr.Dataset({"z": deep}).to_netcdf(tmp_path / "z.nc")
    config = DataConfig(str(tmp_path / "z.nc"), train=(0.0, 1.0), valid=(), test=(), split_by="time")

    def train(**options):
        return dataclasses.replace(config, **options).open()["train"]

    levels = train(levels=(500, 1000), flatten=("level",))
    assert levels.spec.names == ("z_500", "z_1000")
    assert_array_equal(levels.read(0, range(8)).frames[..., 0], ds.slp + 2)
    box = train(levels=(850,), region={"latitude": (50, 38), "longitude": (-15, 0)}, flatten=("level",))
    inside = ds.slp.sel(latitude=slice(38, 50), longitude=slice(-15, 0))
    assert_array_equal(box.read(0, range(8)).frames[..., 0], inside + 1)
    sparse = train(time_stride=2, space_stride=2, levels=(850,), flatten=("level",))
    assert sparse.spec.time_step == 2 * 86400
    assert_array_equal(sparse.read(0, range(4)).frames[..., 0], ds.slp[::2, ::2, ::2] + 1)
    mean = train(coarsen=2, levels=(850,), flatten=("level",))
    area = xr.DataArray(area_weights(ds.latitude), dims="latitude")
    blocks = (ds.slp * area).coarsen(latitude=2, longitude=2).mean() / area.coarsen(latitude=2).mean()
    assert_allclose(mean.read(0, range(8)).frames[..., 0], blocks.transpose(*ds.slp.dims) + 1)
    with pytest.raises(DataError, match="no level 700. It has 1000, 850, 500"):
        train(levels=(700,))
    with pytest.raises(DataError, match="no point of 'latitude' lies in 60..70; it spans 30..50"):
        train(region={"latitude": (60, 70)})
    with pytest.raises(DataError, match="no axis 'lattitude'. Did you mean 'latitude'"):
        train(region={"lattitude": (60, 70)})


@pytest.mark.parametrize("option", ["coarsen", "space_stride"])
@pytest.mark.parametrize(
    "fields", [{"flatten": ("level",)}, {"variables": ("z_250", "z_500", "z_850", "z_1000")}], ids=["flat", "named"]
)
def test_thinning_a_grid_leaves_levels_that_are_channels(tmp_path, option, fields):
    levels, space = np.array([250.0, 500.0, 850.0, 1000.0]), np.zeros((3, 1, 8, 12))
    globe = {"time": np.arange(3.0), "level": levels, "lat": np.linspace(-70, 70, 8), "lon": np.arange(12) * 30.0}
    z = xr.Dataset({"z": (("time", "level", "lat", "lon"), levels[:, None, None] + space)}, globe)
    z.assign(lat_bnds=(("lat", "bnds"), np.zeros((8, 1)))).to_netcdf(tmp_path / "z.nc")  # bnds is too short for it
    config = DataConfig(str(tmp_path / "z.nc"), train=(0.0, 1.0), valid=(), test=(), **fields, **{option: 2})
    thin = config.open()["train"]
    assert thin.spec.names == ("z_250", "z_500", "z_850", "z_1000")
    assert thin.spec.grid.shape == (4, 6)
    assert_allclose(thin.read(0, range(3)).frames, np.broadcast_to(levels, (3, 4, 6, 4)), rtol=1e-6)  # float32


def test_block_means_keep_area_means(make, tmp_path):
    """Also where some cells have no value: what is left of a block counts by its area."""
    ds = make.weather(days=2, lat=8, lon=8)
    ds = ds.assign_coords(latitude=("latitude", np.linspace(-80, 60, 8), ds.latitude.attrs))
    ds["t2m"] = ds.t2m.where((ds.latitude != 40) | (ds.longitude > 0))
    ds.to_netcdf(tmp_path / "a.nc")
    config = DataConfig(str(tmp_path / "a.nc"), train=(0.0, 1.0), valid=(), test=())
    fine, coarse = (dataclasses.replace(config, coarsen=n).open()["train"] for n in (1, 2))

    def mean(dataset, values):
        return (values * np.asarray(dataset.spec.grid.axes[0].weights)[:, None]).mean((1, 2))

    slp = [mean(d, d.read(0, range(2)).frames[..., 0].astype("f8")) for d in (fine, coarse)]
    assert_allclose(slp[1], slp[0], rtol=1e-6)  # float32; unweighted means are off by more than 0.1 %
    area = area_weights(ds.latitude)
    block = ds.t2m.values[0, 6:8, 0:2].astype("f8")  # the row at 40 degrees is missing there
    assert np.isnan(block[0]).all()
    assert coarse.read(0, range(1)).frames[0, 3, 0, 1] == pytest.approx(np.nanmean(block), rel=1e-6)
    block = ds.t2m.values[0, 6:8, 6:8].astype("f8")
    expected = (block * area[6:8, None]).sum() / (2 * area[6:8].sum())
    assert coarse.read(0, range(1)).frames[0, 3, 3, 1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("option", ["coarsen", "space_stride"])
def test_a_state_without_a_grid_cannot_be_thinned(tmp_path, option):
    xr.Dataset({"a": ("time", np.arange(20.0))}, {"time": np.arange(20.0)}).to_netcdf(tmp_path / "ode.nc")
    with pytest.raises(ConfigError, match="ode.nc has no grid to thin out"):
        DataConfig(str(tmp_path / "ode.nc"), **{option: 2}).open()


def test_block_means_read_nothing_on_opening(make, tmp_path):
    make.weather(days=8).to_netcdf(tmp_path / "a.nc")
    config = DataConfig(str(tmp_path / "a.nc"), train=(0.0, 1.0), valid=(), test=(), coarsen=2)
    selected = config.select(config.read(config.path))
    assert selected.slp.chunks is not None


def test_regions_cross_the_seam_of_a_file(tmp_path):
    values = np.arange(2 * 36, dtype="f4").reshape(2, 36)
    globe = xr.Dataset({"u": (("time", "lon"), values)}, {"lon": np.arange(0, 360, 10.0), "time": [0.0, 1.0]})
    globe.to_netcdf(tmp_path / "globe.nc")
    config = DataConfig(
        str(tmp_path / "globe.nc"), region={"longitude": (-30, 20)}, train=(0.0, 1.0), valid=(), test=()
    )
    dataset = config.open()["train"]
    assert dataset.spec.grid.axes[0].centers == (-30.0, -20.0, -10.0, 0.0, 10.0, 20.0)
    assert_array_equal(dataset.read(0, range(2)).frames[..., 0], values[:, [33, 34, 35, 0, 1, 2]])
    assert not dataset.spec.grid.axes[0].periodic
    coarse = dataclasses.replace(config, coarsen=2).open()["train"]
    assert coarse.spec.grid.axes[0].centers == (-25.0, -5.0, 15.0)
    assert_array_equal(coarse.read(0, range(2)).frames[..., 0], values[:, [33, 35, 1]] / 2 + values[:, [34, 0, 2]] / 2)


def test_dimensions_are_renamed_by_the_names_that_the_file_has(make, tmp_path):
    """Also those that would be understood without."""
    make.waves().rename(trajectory="sample", time="t").to_netcdf(tmp_path / "waves.nc")
    names = {"sample": "trajectory", "t": "time"}
    config = DataConfig(path=str(tmp_path / "waves.nc"), variables=("u",), rename=names, valid=(), test=())
    assert config.open()["train"].lengths == (7,) * 3


def test_dimensions_without_names_are_told_to_be_named(tmp_path):
    """HDF5 of plain arrays was sent to split_by='time', which it has not."""
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["u"] = np.random.default_rng(0).normal(size=(4, 20, 16))
    config = DataConfig(path=str(tmp_path / "plain.h5"))
    for split_by in ("auto", "time"):
        with pytest.raises(DataError, match=r"no names in the file: phony_dim_0 \(4 long\), .*by data\.rename"):
            dataclasses.replace(config, split_by=split_by).open()
    names = {"phony_dim_0": "trajectory", "phony_dim_1": "time", "phony_dim_2": "x"}
    splits = dataclasses.replace(config, rename=names, train=(0, 2), valid=(2, 3), test=(3, 4)).open()
    assert splits["train"].lengths == (20, 20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": (0, 50)}, ConfigError, "does not lie in the 40 frames"),
        ({"train": (0.5, 0.2)}, ConfigError, "fractions"),
        ({"train": ("2002", "2003")}, DataError, "holds no frame .*2001-02-20.*40 frames"),
        ({"train": ("last week", "today")}, ConfigError, "cannot be read as times"),
        ({"train": (2001, 2001)}, ConfigError, r"look like years.*Quote them: \('2001'"),
        ({"train": (0, 30), "valid": (20, 40)}, ConfigError, "'train' and 'valid' overlap"),
        ({"train": (), "valid": (), "test": ()}, ConfigError, "No split"),
        ({"path": ""}, ConfigError, "data.path is empty"),
        ({"split_by": "trajectory", "train": ("none.txt",)}, DataError, "no index file none.txt"),
        ({"variables": ("pressure",)}, DataError, "no variable 'pressure'"),
        ({"coarsen": 9}, ConfigError, "coarsen=9"),
        ({"format": "bufr"}, ConfigError, "no data format 'bufr'"),
        ({"time_stride": 0}, ConfigError, "time_stride is 0.*1 .all. or more"),
        ({"space_stride": -1}, ConfigError, "space_stride is -1"),
        ({"coarsen": -2}, ConfigError, "coarsen is -2"),
        ({"coarsen": 2, "space_stride": 2}, ConfigError, "Give one of them"),
        ({"levels": (500.0,)}, DataError, r"levels is \(500.0,\), but .*weather.nc has no levels"),
        ({"variables": ("slp", "slp")}, ConfigError, "'slp' is in variables twice"),
        ({"variables": ("slp", "t2m"), "forcing": ("t2m",)}, ConfigError, "'t2m' is in both variables and forcing"),
        ({"variables": ("slp",), "forcing": ("t2m",), "static": ("t2m",)}, ConfigError, "both forcing and static"),
        ({"variables": ("slp",), "static": ("t2m",)}, DataError, "static 't2m' changes with time.*Name it in forcing"),
        ({"options": {"foo": 1}}, ConfigError, "netcdf has no option 'foo'"),
        ({"options": {"format": "zarr"}}, ConfigError, "options has 'format'.*set format"),
        ({"split_by": "format", "train": ("train",), "valid": ()}, ConfigError, "netcdf has no option 'split'"),
        ({"rename": {"latitude": "longitude"}}, DataError, "cannot be renamed.*conflicts.*Choose names"),
    ],
)
def test_configs_that_cannot_work_say_why(weather, change, error, message):
    config = DataConfig(weather[0], train=(0, 20), valid=(20, 30), test=())
    with pytest.raises(error, match=message):
        dataclasses.replace(config, **change).open()


def test_static_fields_may_be_stored_with_time(weather, tmp_path):
    _, ds = weather
    noise = np.random.default_rng(0).uniform(-1e-5, 1e-5, ds.slp.shape).astype("f4")  # of packing
    ds.assign(hills=(xr.ones_like(ds.slp) + noise) * ds.t2m[0]).to_netcdf(tmp_path / "hills.nc")
    config = DataConfig(str(tmp_path / "hills.nc"), variables=("slp",), static=("hills",))
    assert_allclose(config.open()["test"].read(0, range(1)).static[..., 0], ds.t2m[0], rtol=2e-5)


def test_data_without_frames_say_so(weather, tmp_path):
    path, ds = weather
    ds.isel(time=slice(0, 0)).to_netcdf(tmp_path / "empty.nc")
    for config in (
        DataConfig(str(tmp_path / "empty.nc")),
        DataConfig(train=(path,), valid=(str(tmp_path / "empty.nc"),), test=()),
    ):
        with pytest.raises(DataError, match="empty.nc holds 0 frames along 'time'"):
            config.open()


def test_text_is_no_time_of_a_numeric_axis(waves):
    with pytest.raises(ConfigError, match="cannot be read as times.*could not convert.*write for example"):
        DataConfig(waves[0], variables=("u",), split_by="time", train=("abc", "def"), valid=(), test=()).open()


def test_a_file_is_in_one_split(weather, tmp_path):
    path, _ = weather
    link = tmp_path / "again.nc"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="'train' and 'test' overlap: both hold the file '.*weather.nc'"):
        DataConfig(train=(path,), valid=(), test=(str(link),)).open()
    with pytest.raises(ConfigError, match="'train' and 'test' overlap: both hold the split of the format 'all'"):
        DataConfig(path, split_by="format", train=("all",), valid=(), test=("all",)).open()


def test_a_file_that_lacks_a_variable_is_named(weather, tmp_path):
    _, ds = weather
    names = [str(tmp_path / f"{name}.nc") for name in ("first", "second", "third")]
    for i, name in enumerate(names):
        part = ds.isel(time=slice(10 * i, 10 * i + 10))
        (part.drop_vars("t2m") if i == 1 else part).to_netcdf(name)
    with pytest.raises(DataError, match="second.nc has no variable 't2m', which .*first.nc has.*leave it out"):
        DataConfig(tuple(names)).open()


def test_bad_index_files(waves, tmp_path):
    path, _ = waves
    for text, message in (
        ("1 12", "lists trajectory 12, but the data have 10"),
        ("one", "not a list of whole numbers"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            DataConfig(path, variables=("u",), train=(str(tmp_path / "list.txt"),), valid=(), test=()).open()
    np.save(tmp_path / "list.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match="not a list of whole numbers"):
        DataConfig(path, variables=("u",), train=(str(tmp_path / "list.npy"),), valid=(), test=()).open()


def test_configs_survive_plain_containers():
    from physml import coding

    config = DataConfig("a.nc", train=("2001", "2007"), valid=(0, 3), test=(0.5, 1.0), region={"x": (0.0, 1.0)})
    assert coding.from_dict(DataConfig, json.loads(json.dumps(coding.to_dict(config)))) == config
    assert hash(config)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("kind", ["zscore", "rms"])
def test_streamed_normalization_equals_the_whole(make, chunk, kind):
    ds = make.waves(frames=20, trajectories=3)
    ds = ds.assign(u=ds.u * 3 + 100 + 5 * ds.time)
    dataset = XarrayDataset(ds, spec_of(ds, ("u",), forcing=("wind",), static=("a",), parameters=("viscosity",)))
    fitted = Normalizer.fit(dataset.windows(chunk), kind)
    center, scale = (ds.u.mean(), ds.u.std()) if kind == "zscore" else (0.0, np.sqrt((ds.u**2).mean()))
    assert_allclose(fitted.frames.center[...], [float(center)], rtol=1e-6, atol=1e-6)
    assert_allclose(fitted.frames.scale[...], [float(scale)], rtol=1e-6)
    assert_allclose(fitted.increments[...], [float(np.sqrt((ds.u.diff("time") ** 2).mean()))], rtol=1e-6)
    wind = ds.wind.std() if kind == "zscore" else np.sqrt((ds.wind**2).mean())
    assert_allclose(fitted.forcing.scale[...], [float(wind)], rtol=1e-6)
    whole = Normalizer.fit(dataset.windows(10**6), kind)
    assert_allclose(fitted.parameters.scale[...], whole.parameters.scale[...], rtol=1e-6)


def test_large_frames_count_once(make, monkeypatch):
    ds = make.waves(frames=6, trajectories=3)
    dataset = XarrayDataset(ds, spec_of(ds, ("u",), forcing=("wind",), static=("a",), parameters=("viscosity",)))
    expected = Normalizer.fit(dataset.windows(6))
    monkeypatch.setattr("physml.data.dataset.PASS_BYTES", 1)  # less than a frame
    found = Normalizer.fit(dataset.windows())
    for a, b in zip(jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(expected)), strict=True):
        assert_allclose(a, b, rtol=1e-6)
    assert statistics(dataset)["u"]["mean"] == pytest.approx(float(ds.u.mean()), abs=1e-6)


def test_statistics_skip_masked_places(make):
    ds = make.weather().where(lambda d: d.latitude < 50)[["slp"]]
    facts = statistics(XarrayDataset(ds, spec_of(ds)), chunk=5)["slp"]
    assert facts["missing"] == pytest.approx(0.2)
    assert facts["min"] == float(ds.slp.min())
    assert facts["max"] == float(ds.slp.max())
    assert facts["increment_rms"] == pytest.approx(1000.0)
    assert facts["mean"] == pytest.approx(float(ds.slp.weighted(np.cos(np.deg2rad(ds.latitude))).mean()), rel=1e-6)
