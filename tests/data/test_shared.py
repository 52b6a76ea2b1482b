"""Real files of several kinds open and become windows. Skipped where they are not at hand."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

from physml.data import DataConfig, describe, from_frames, open_dataset, statistics
from physml.errors import SpecError

WHOLE = {"train": (0.0, 1.0), "valid": (), "test": ()}
# file: options, grid, channels, lengths of the trajectories in train, time step
FILES = {
    "ncep_slp_natl_daily_2001-2010": ({}, (17, 33), 1, (3652,), 86400.0),
    "era5_t2m_uk_hourly_2019-03": ({}, (33, 49), 1, (744,), 3600.0),
    "ersst_global_monthly_2010-2020": ({}, (89, 180), 1, (128,), 2629746.0),
    "ncep_gh700_sh_monthly_1990-1995": ({}, (28, 144), 1, (72,), 2629746.0),
    "era5_eda_zt_members_2017-01": ({"flatten": ("level",)}, (61, 120), 4, (4,) * 10, 43200.0),
    "era5_tl31_1959-01-02T00": ({"flatten": ("level",), "levels": (500, 850)}, (32, 64), 12, (1,), 1.0),
    "era_interim_uvz_jan_jul_1p5deg": ({}, (3, 121, 240), 3, (2,), 6.0),
    "era_interim_surface_2017_feb-apr_1p5deg": ({}, (121, 240), 5, (3,), 2629746.0),
}


def path_of(folder, name):
    path = folder / f"{name}.nc"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return str(path)


@pytest.fixture
def reanalysis(shared_data):
    return lambda name: path_of(shared_data / "reanalysis", name)


@pytest.mark.parametrize("file", FILES)
def test_reanalysis_files_become_windows_and_labels_again(reanalysis, file):
    options, grid, channels, lengths, step = FILES[file]
    path = reanalysis(file)
    dataset = DataConfig(path, **{**WHOLE, **options}).open()["train"]
    assert dataset.spec.grid.shape == grid
    assert (len(dataset.spec.channels), dataset.lengths, dataset.spec.time_step) == (channels, lengths, step)
    assert all(channel.unit for channel in dataset.spec.channels)
    window = dataset.read(0, range(min(3, lengths[0])))
    assert np.isfinite(window.frames).all()
    truth = dataset.to_xarray(0, range(min(3, lengths[0])))
    times = truth.time.values if "time" in truth.dims else np.arange(len(window.frames))
    back = from_frames(window.frames[None], dataset.spec, truth, times, dim="time")
    for name in back.data_vars:
        values = back[name].squeeze()
        expected = truth[name].rename(dict.fromkeys({"month"} & set(truth[name].dims), "time")).squeeze()
        values = values.where(values != 0) if window.mask is not None else values
        assert_array_equal(values, expected.transpose(*values.dims))
        assert values.attrs == expected.attrs
    assert describe(path)["time"] is not None or "time" not in open_dataset(path).dims


def test_slp_splits_by_year(reanalysis):
    path = reanalysis("ncep_slp_natl_daily_2001-2010")
    config = DataConfig(path, train=("2001", "2007"), valid=("2008", "2008"), test=("2009", "2010"))
    splits = config.open()
    assert [s.lengths for s in splits.values()] == [(2556,), (366,), (730,)]
    facts = statistics(splits["train"])["slp"]
    raw = (
        xr.open_dataset(path)
        .slp.sel(time=slice("2001", "2007"))
        .weighted(np.cos(np.deg2rad(xr.open_dataset(path).latitude)))
    )
    assert_allclose([facts["mean"], facts["std"]], [raw.mean(), raw.std()], rtol=1e-5)
    # persistence at one day over the test years, as the data card states
    test = splits["test"].read(0, range(730))
    area = test.spec.grid.weights()[..., None]
    assert_allclose(np.sqrt((np.diff(test.frames, axis=0).astype("f8") ** 2 * area).mean()), 614.9, atol=0.1)


def test_hourly_temperature_splits_by_options_alone(reanalysis):
    path = reanalysis("era5_t2m_uk_hourly_2019-03")
    splits = DataConfig(path, train=(0, 600), valid=(600, 648), test=(648, 744)).open()
    assert splits["train"].spec.grid.axes[0].centers[0] == 50.0  # ascending, though stored north to south
    rest = DataConfig(path, train=(0, 600), valid=(), test=(600, 744)).open()["test"].read(0, range(144))
    error = np.diff(rest.frames, axis=0).astype("f8") ** 2
    assert_allclose(np.sqrt(error.mean()), 0.582, atol=0.0005)  # persistence at one hour, as the data card states
    area = rest.spec.grid.weights()[..., None]
    assert_allclose(np.sqrt((error * area).mean()), 0.589, atol=0.0005)


def test_winters_are_trajectories(reanalysis):
    path = reanalysis("ncep_iberia_winter_daily_1982-2002")
    with pytest.raises(SpecError, match="Choose variables on one grid"):
        DataConfig(path).open()
    splits = DataConfig(
        path, variables=("psl", "ta850"), train=("1982", "1995-06"), valid=("1995-07", "1998-06")
    ).open()
    assert len(splits["train"].lengths) == 13
    assert set(splits["train"].lengths) == {90, 91}
    assert DataConfig(path, variables=("tas", "pr")).open()["train"].spec.grid.axes[0].name == "latitude"


def test_land_is_masked(reanalysis):
    dataset = DataConfig(reanalysis("ersst_global_monthly_2010-2020"), **WHOLE).open()["train"]
    window = dataset.read(0, range(128))
    assert dataset.spec.grid.periodic == (False, True)
    land = np.isnan(xr.open_dataset(dataset.reader.source).sst[0].values)[::-1]
    assert_array_equal(window.mask[..., 0] == 0, land)
    assert (window.frames[:, land] == 0).all()


def test_darcy_has_one_frame_per_trajectory_and_a_static_field(shared_data):
    folder = shared_data / "neuraloperator"
    files = {
        k: (path_of(folder, f"darcy_{v}"),)
        for k, v in (("train", "train_16"), ("valid", "test_16"), ("test", "test_32"))
    }
    splits = DataConfig(variables=("u",), static=("a",), space=("y", "x"), **files).open()
    assert splits["train"].lengths == (1,) * 1000
    raw = xr.open_dataset(files["train"][0])
    window = splits["train"].read(7, range(1))
    assert_array_equal(window.frames[0, ..., 0], raw.u[7])
    assert_array_equal(window.static[..., 0], raw.a[7])
    assert splits["test"].spec.grid.shape == (32, 32)
    coarse, fine = (splits[k].read(3, range(1)).frames[0, ..., 0] for k in ("valid", "test"))
    assert_array_equal(coarse, fine[::2, ::2])


def test_burgers_has_a_parameter(shared_data):
    path = path_of(shared_data / "neuraloperator", "burgers_train_16")
    dataset = DataConfig(path, variables=("u",), parameters=("viscosity",), periodic=("x",)).open()["train"]
    assert dataset.spec.grid.periodic == (True,)
    assert_allclose(dataset.read(0, range(2)).parameters, [0.01])
    assert dataset.spec.time_step == 0.0625
