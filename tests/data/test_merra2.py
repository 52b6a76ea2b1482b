import contextlib
import shutil
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_array_equal

import physml
from physml.data import DataConfig, merra2
from physml.data.formats import recognize
from physml.data.place import Place
from physml.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
LAT, LON, LEV = np.linspace(-90, 90, 5), -180 + 45.0 * np.arange(8), np.array([48.0, 71.0, 72.0])
HOURS, FILL = np.arange(8), np.float32(1e15)


def flat(day: int, number: float, dtype="f4") -> np.ndarray:
    """10000 * variable + 1000 * day + 10 * time index + latitude / 100, `(time, lat, lon)`."""
    values = 10000.0 * number + 1000 * day + 10 * HOURS[:, None, None] + LAT[:, None] / 100 + 0 * LON
    return values.astype(dtype)


def write(folder: Path, day: int, kinds=("sfc", "pres"), dtype="f4", edit=None) -> None:
    """Files of one day in January 2020."""
    names = {"sfc": f"MERRA2_sfc_202001{day:02d}.nc", "pres": f"MERRA_pres_202001{day:02d}.nc"}
    for kind in kinds:
        with h5py.File(folder / names[kind], "w") as file:
            file["time"] = np.arange(8, dtype="i4") * 180
            file["time"].attrs["begin_date"] = np.array([20200100 + day], "i4")
            file["time"].attrs["begin_time"] = np.int32(0)
            file["lat"], file["lon"] = LAT, LON
            if kind == "sfc":
                for i, name in enumerate(("T2M", "GWETROOT", "LAI", "TS")):
                    file[name] = flat(day, i, dtype)
                    file[name].attrs["_FillValue"] = FILL
                file["T2M"].attrs["units"] = "K"
                file["GWETROOT"][:, :, 0] = np.nan
                file["LAI"][:, :, 1] = FILL
                file["TS"][:, 0, 2] = FILL
                file["PHIS"] = np.full((5, 8), 7, dtype)
            else:
                file["lev"] = LEV
                for i, name in enumerate(("T", "U")):
                    file[name] = np.stack([flat(day, i + level / 10, dtype) for level in range(3)], 1)
            file["label"] = h5py.Empty("f4")
            if edit is not None:
                edit(kind, file)


@pytest.fixture
def days(tmp_path):
    folder = tmp_path / "merra-2"
    folder.mkdir()
    for day in (1, 2, 3):
        write(folder, day)
    return folder


def test_days_are_joined_and_lazy(days):
    assert recognize(days) == "merra2"
    ds = merra2.open_dataset(Place(days))
    assert ds["T"].dims == ("time", "level", "latitude", "longitude")
    assert ds["T2M"].dims == ("time", "latitude", "longitude")
    assert ds["PHIS"].dims == ("latitude", "longitude")
    for field in ds.data_vars.values():
        assert not isinstance(field.variable._data, np.ndarray)
    assert_array_equal(ds.time, np.datetime64("2020-01-01", "ns") + np.arange(24) * np.timedelta64(3, "h"))
    assert ds.level.values.tolist() == [48, 71, 72]
    assert (ds.level.dtype.kind, ds.longitude.attrs["periodic"], ds["T2M"].attrs["units"]) == ("i", 1, "K")
    opened = physml.open_dataset(days)
    assert_array_equal(opened["T2M"], np.concatenate([flat(day, 0) for day in (1, 2, 3)]))
    assert_array_equal(opened["U"][:, 2], np.concatenate([flat(day, 1.2) for day in (1, 2, 3)]))
    assert_array_equal(opened["U"][[17, 3], 1, 2], np.stack([flat(3, 1.1)[1, 2], flat(1, 1.1)[3, 2]]))


def test_missing_land_values_are_filled(days):
    ds = physml.open_dataset(days)
    assert (ds["GWETROOT"][:, :, 0] == 1).all()
    assert (ds["LAI"][:, :, 1] == 0).all()
    assert_array_equal(np.isnan(ds["TS"]).sum(["time", "latitude"]), [0, 0, 24, 0, 0, 0, 0, 0])
    assert_array_equal(ds["LAI"][:8, :, 3], flat(1, 2)[..., 3])


def test_single_files_and_kinds_are_read(days, tmp_path):
    file = days / "MERRA_pres_20200102.nc"
    assert recognize(file) == "merra2"
    assert physml.open_dataset(file).sizes["time"] == 8
    shutil.copy(file, tmp_path / "any.nc")
    assert set(physml.open_dataset(tmp_path / "any.nc", format="merra2").data_vars) == {"T", "U"}
    for path in days.glob("*sfc*"):
        path.unlink()
    assert set(physml.open_dataset(days).data_vars) == {"T", "U"}


def test_double_precision_unknown_keys_and_units_of_time(tmp_path):
    def edit(kind, file):
        file["unknown"] = np.arange(3)
        file["text"] = b"hello"
        file.create_group("more")
        del file["time"].attrs["begin_date"]
        file["time"].attrs["units"] = "minutes since 2020-01-05 00:30:00"

    write(tmp_path, 5, dtype="f8", edit=edit)
    ds = physml.open_dataset(tmp_path)
    assert ds["T2M"].dtype == np.float64
    assert ds.time.values[0] == np.datetime64("2020-01-05T00:30")


def test_begin_time_counts(tmp_path):
    write(tmp_path, 5, edit=lambda kind, file: file["time"].attrs.modify("begin_time", 13000))
    assert physml.open_dataset(tmp_path).time.values[1] == np.datetime64("2020-01-05T04:30")


def test_training_reads_windows(days):
    config = DataConfig(
        path=str(days),
        variables=("T2M", "T"),
        static=("PHIS",),
        flatten=("level",),
        train=("2020-01-01", "2020-01-02"),
        valid=("2020-01-03",),
        test=(),
    )
    splits = config.open()
    assert splits["train"].spec.names == ("T2M", "T_48", "T_71", "T_72")
    assert (splits["train"].lengths, splits["train"].spec.time_step) == ((16,), 3 * 3600)
    frames = splits["train"].read(0, range(6, 10)).frames
    assert_array_equal(frames[..., 3], np.concatenate([flat(1, 0.2), flat(2, 0.2)])[6:10])


def test_climatology_is_looked_up_by_day_and_hour(tmp_path):
    for day, hour in ((1, 0), (1, 3), (365, 21)):
        for kind in ("surface", "vertical"):
            with h5py.File(tmp_path / f"climate_{kind}_doy{day:03d}_hour{hour:02d}.nc", "w") as file:
                file["lat"], file["lon"] = LAT, LON
                value = day + hour / 100
                if kind == "surface":
                    file["T2M"] = np.full((5, 8), value, "f4")
                else:
                    file["lev"] = LEV
                    file["T"] = np.full((1, 3, 5, 8), value, "f4")
    times = np.array(["2020-01-01T03", "2020-12-31T21", "2021-12-31T21", "2021-01-01T00"], "datetime64[ns]")
    ds = merra2.climatology(Place(tmp_path), times)
    expected = np.array([1.03, 365.21, 365.21, 1.0], "f4")
    assert_array_equal(ds["T2M"][:, 2, 3], expected)
    assert_array_equal(ds["T"][:, 1, 2, 3], expected)
    assert ds["T"].dims == ("time", "level", "latitude", "longitude")
    assert_array_equal(ds.time, times)
    assert merra2.climatology(Place(tmp_path), times[0])["T"].shape == (1, 3, 5, 8)
    with pytest.raises(DataError, match="climate_surface_doy002_hour00"):
        merra2.climatology(Place(tmp_path), ["2020-01-01T00", "2020-01-02T00"])
    with pytest.raises(DataError, match="Download the climatology"):
        merra2.climatology(Place(tmp_path), "2020-02-01T00")


def test_scalers_are_read(tmp_path):
    names = np.array([b"mu", b"sigma"])
    fields = {"T": (("statistic", "lev"), np.arange(6.0).reshape(2, 3))}
    xr.Dataset(fields, {"statistic": names, "lev": LEV}).to_netcdf(tmp_path / "vertical.nc")
    ds = merra2.scalers(Place(tmp_path / "vertical.nc"))
    assert_array_equal(ds["T"].sel(statistic="sigma", level=71), 4)
    xr.Dataset(fields, {"statistic": [b"a", b"b"]}).to_netcdf(tmp_path / "other.nc")
    with pytest.raises(DataError, match="'mu' and 'sigma' were expected"):
        merra2.scalers(Place(tmp_path / "other.nc"))


def test_urls_are_read(days):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/merra/{path.name}": path.read_bytes() for path in days.iterdir()})
    try:
        assert recognize("memory://merra") == "merra2"
        assert_array_equal(physml.open_dataset("memory://merra")["T2M"][8:16], flat(2, 0))
    finally:
        memory.rm("/merra", recursive=True)


def test_many_days_open_fast(days):
    for kind in ("MERRA2_sfc", "MERRA_pres"):
        for i in range(100):
            shutil.copy(days / f"{kind}_20200101.nc", days / f"{kind}_1999{i // 28 + 1:02d}{i % 28 + 1:02d}.nc")
    with pytest.raises(DataError, match="does not increase"):  # copies of one day
        physml.open_dataset(days)


def test_others_are_not_recognized(make, tmp_path):
    make.weather().to_netcdf(tmp_path / "weather.nc")
    for path in [*SAMPLES.rglob("*"), tmp_path, *tmp_path.iterdir()]:
        with contextlib.suppress(DataError):
            assert not merra2.recognizes(Place(path)), path


def test_wrong_files_are_refused(tmp_path):
    def refused(message, edit=lambda kind, file: None, change=lambda folder: None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write(folder, 1)
        write(folder, 2, edit=edit)
        change(folder)
        with pytest.raises(DataError, match=message) as error:
            physml.open_dataset(folder, format="merra2")
        assert str(folder) in str(error.value)

    def replace(name, values, only=None):
        def edit(kind, file):
            if only in (None, kind) and name in file:
                attrs = dict(file[name].attrs)
                del file[name]
                if values is not None:
                    file[name] = values
                    file[name].attrs.update(attrs)

        return edit

    refused("no 'pres' file of 20200102", change=lambda folder: (folder / "MERRA_pres_20200102.nc").unlink())
    refused("two 'sfc' files", change=lambda f: shutil.copy(f / "MERRA2_sfc_20200101.nc", f / "MERRA_sfc_20200101.nc"))
    refused("has no 'lat'", edit=replace("lat", None))
    refused("has no 'time'", edit=replace("time", None))
    refused("does not fit the axes", edit=replace("T2M", np.zeros((7, 5, 8), "f4")))
    refused("different grids", edit=replace("lon", LON + 1))
    refused("different grids", edit=replace("lon", LON + 1, only="pres"))
    refused("different times", edit=replace("time", np.arange(8) * 180 + 1, only="pres"))
    refused("20200102.nc has no 'TS'", edit=replace("TS", None))
    refused("minutes were expected", edit=replace("time", np.full(8, np.nan)))
    refused("does not say when it begins", edit=lambda k, f: f["time"].attrs.pop("begin_date"))
    refused("does not say when it begins", edit=lambda k, f: f["time"].attrs.modify("begin_date", 20201399))
    refused("does not increase", edit=lambda k, f: f["time"].attrs.modify("begin_date", 20200101))

    def link(kind, file):
        del file["U" if kind == "pres" else "T2M"]
        file["U" if kind == "pres" else "T2M"] = h5py.ExternalLink("/etc/passwd", "/x")

    refused("is a link", edit=link)
    path = tmp_path / "MERRA2_sfc_20200101.nc"
    path.write_bytes(b"CDF\x01" + bytes(100))
    with pytest.raises(DataError, match="not an HDF5 file"):
        physml.open_dataset(path)
    write(tmp_path, 3, edit=lambda k, f: [f.pop(key) for key in [*f] if f[key].shape and f[key].ndim > 1])
    with pytest.raises(DataError, match="no field on"):
        physml.open_dataset(tmp_path / "MERRA_pres_20200103.nc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no daily file"):
        physml.open_dataset(tmp_path / "empty", format="merra2")


@SEEDS
def test_damage_ends_in_a_typed_error(days, seeds):
    outcomes = [survives(damage(days, days.parent / "damaged", seed), "merra2") for seed in seeds]
    assert set(outcomes) == {"opened", "DataError"}
