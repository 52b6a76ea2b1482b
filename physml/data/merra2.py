"""MERRA-2 in daily files as Prithvi WxC takes it (Hugging Face ibm-nasa-geospatial/Prithvi-WxC-1.0-2300M).

`MERRA2_sfc_YYYYMMDD.nc` holds fields at the surface, `MERRA_pres_YYYYMMDD.nc` (the prefix differs) fields on native
model levels; both have 8 times, every 3 hours. Climatologies are one file per day of the year and hour, scalers one
file per group of variables.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from physml.data import netcdf
from physml.data.globe import check_ascending, has_coordinate, label_space, renamed
from physml.data.guarded import guarded
from physml.data.hdf5 import Hdf5, component
from physml.data.joined import Part, join
from physml.data.place import Place
from physml.errors import DataError

DAILY = re.compile(r"MERRA2?_(sfc|pres)_(\d{8})\.nc4?$")
CLIMATE = {"surface": "climate_surface_doy{:03d}_hour{:02d}.nc", "vertical": "climate_vertical_doy{:03d}_hour{:02d}.nc"}
RENAMED = {"lat": "latitude", "lon": "longitude", "lev": "level"}
LEVEL = {"units": "1", "long_name": "native model level"}
FILLS = {"GWETROOT": 1.0, "LAI": 0.0}  # over sea and ice
MISSING = ("_FillValue", "missing_value", "fmissing_value")
# Times are called "trajectory", along which `joined.join` puts files, until they are together.
SHAPES = (("trajectory", "lev", "lat", "lon"), ("trajectory", "lat", "lon"), ("lev", "lat", "lon"), ("lat", "lon"))


class _File(NamedTuple):
    """One file: `times` is None, and no field has any, in a climatology."""

    hdf5: Hdf5
    times: np.ndarray | None
    space: dict[str, np.ndarray]
    fields: dict[str, xr.Variable]


def recognizes(place: Place) -> bool:
    """Whether a file has the name of a daily file, or a folder holds one."""
    if place.is_folder():
        return any(DAILY.fullmatch(name) for name in place.names())
    return place.is_file() and bool(DAILY.fullmatch(place.name()))


def open_dataset(place: Place) -> xr.Dataset:
    """Fields `time[, level], latitude, longitude`, lazily, of one file or of all days of a folder.

    Surface and level files of a day are joined, days follow each other along time. Levels are numbers of native model
    levels, integers from the top. GWETROOT is 1 and LAI 0 where they are missing; other missing values are NaN. Times
    are minutes since the attributes `begin_date` (YYYYMMDD) and `begin_time` (HHMMSS), or since their `units`.

    Raises DataError for damaged files, days of which one file is missing, and files with different grids or fields.
    """
    files = place.files(".nc", ".nc4") if place.is_folder() else [place]
    named = [(match, file) for file in files if (match := DAILY.fullmatch(file.name()))]
    named.sort(key=lambda item: item[0][2])
    kinds = {kind: [(match[2], file) for match, file in named if match[1] == kind] for kind in ("sfc", "pres")}
    if not place.is_folder() and not named:
        kinds = {"sfc": [("", place)]}
    kinds = {kind: days for kind, days in kinds.items() if days}
    if not kinds:
        raise DataError(f"{place} holds no daily file: MERRA2_sfc_YYYYMMDD.nc and MERRA_pres_YYYYMMDD.nc are expected.")
    dates = {date for days in kinds.values() for date, _ in days}
    for kind, days in kinds.items():
        if len({date for date, _ in days}) < max(len(days), len(dates)):
            lacking = dates - {date for date, _ in days}
            what = f"no {kind!r} file of {min(lacking)}" if lacking else f"two {kind!r} files of one day"
            raise DataError(f"{place} holds {what}. Each day needs one file of either kind, or all days of one kind.")
    ds = _join([_read_days([file for _, file in days]) for days in kinds.values()])
    check_ascending(ds, "time", place)
    source = "https://huggingface.co/ibm-nasa-geospatial/Prithvi-WxC-1.0-2300M"
    ds.attrs = {"title": "MERRA-2 for Prithvi WxC", "source": source}
    return ds


def climatology(place: Place, times) -> xr.Dataset:
    """The climatology at dates, lazily: fields `time[, level], latitude, longitude` from the folder of its files.

    Day 366 takes the files of day 365. Raises DataError for a day and hour that has no file.
    """
    times = np.atleast_1d(np.asarray(times, "datetime64[ns]"))
    clock = xr.DataArray(times, dims="time").dt
    keys = list(zip(np.minimum(clock.dayofyear.values, 365).tolist(), clock.hour.values.tolist(), strict=True))
    known: dict[Place | str, _File] = {}
    kinds = []
    names = set(place.names())
    for pattern in CLIMATE.values():
        wanted = [pattern.format(*key) for key in keys]
        if not any(name in names for name in wanted):
            continue
        for name in wanted:
            if name not in known:
                known[name] = _read(place.below(name), timed=False)
        kinds.append([known[name] for name in wanted])
    if not kinds:
        raise DataError(f"{place} has no file {CLIMATE['surface'].format(*keys[0])}. Download the climatology.")
    return _join(kinds).assign_coords(time=("time", times, {"standard_name": "time"}))


def scalers(place: Place) -> xr.Dataset:
    """Means and standard deviations of one group of variables: dimension `statistic` with the labels mu and sigma."""
    ds = guarded(netcdf.open_netcdf(place.path, storage_options=place.storage_options), str(place))
    labels = ds["statistic"].values.tolist() if has_coordinate(ds, "statistic") else []
    labels = [label.decode("ascii", "replace") if isinstance(label, bytes) else str(label) for label in labels]
    labels = [label.strip("\0 ") for label in labels]
    if not {"mu", "sigma"} <= set(labels):
        raise DataError(f"{place} has the statistics {labels}, but 'mu' and 'sigma' were expected.")
    ds = renamed(ds.assign_coords(statistic=labels), RENAMED)
    return ds.assign_coords(level=("level", _levels(ds["level"].values), LEVEL)) if has_coordinate(ds, "level") else ds


def _read_days(files: Sequence[Place]) -> list[_File]:
    first = _read(files[0], timed=True)
    return [first, *(_read(file, timed=True, like=first) for file in files[1:])]


def _read(file: Place, timed: bool, like: _File | None = None) -> _File:
    hdf5 = Hdf5(file)
    keys = hdf5.keys()
    space = {dim: hdf5.values(dim) for dim in ("lat", "lon", "lev") if dim != "lev" or "lev" in keys}
    sizes = {dim: len(values) if values.ndim == 1 else -1 for dim, values in space.items()}
    if -1 in sizes.values():
        raise DataError(f"{file}: the coordinates {[d for d, n in sizes.items() if n < 0]} have more than one axis.")
    times = _times(hdf5) if timed else None
    sizes["trajectory"] = len(times) if times is not None else 1
    if like is not None:  # one look per field keeps thousands of files cheap
        fields = {key: hdf5.variable(key, field.dims) for key, field in like.fields.items()}
        for key, field in fields.items():
            _check_fit(file, key, field.dims, field.shape, sizes)
        return _File(hdf5, times, space, fields)
    fields = {}
    for key in keys:
        if key in ("time", *space) or hdf5.is_group(key) or len(shape := _shape(hdf5, key)) < 2:
            continue
        dims = next((dims for dims in SHAPES if shape == tuple(sizes.get(dim) for dim in dims)), None)
        if dims is None:
            if len(shape) in (3, 4):
                _check_fit(file, key, SHAPES[4 - len(shape)], shape, sizes)
            continue
        field = hdf5.variable(key, dims)
        fields[key] = component(field, "trajectory", 0) if not timed and "trajectory" in dims else field
    if not fields:
        raise DataError(f"{file} holds no field on {tuple(sizes)}; it has {keys[:10]}.")
    return _File(hdf5, times, space, fields)


def _check_fit(file: Place, key: str, dims: Sequence[str], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    if shape != tuple(sizes.get(dim) for dim in dims):
        raise DataError(f"{file}: {key!r} has shape {shape}, which does not fit the axes {sizes}. Copy it again.")


def _shape(hdf5: Hdf5, key: str) -> tuple[int, ...]:
    try:
        return hdf5.shape(key)
    except DataError:  # text and the like, which no field is
        return ()


def _times(hdf5: Hdf5) -> np.ndarray:
    minutes, attrs = hdf5.values("time"), hdf5.attributes("time")
    if minutes.ndim != 1 or not np.isfinite(minutes).all() or np.abs(minutes.astype(float)).max(initial=0) > 1e9:
        raise DataError(f"{hdf5}: 'time' holds {minutes.ravel()[:4]}, but minutes were expected.")
    try:
        if "begin_date" in attrs:
            date = int(np.ravel(attrs["begin_date"])[0])
            clock = int(np.ravel(attrs.get("begin_time", 0))[0])
            begin = np.datetime64(f"{date // 10000:04d}-{date // 100 % 100:02d}-{date % 100:02d}", "ns")
            begin += np.timedelta64(clock // 10000 * 3600 + clock // 100 % 100 * 60 + clock % 100, "s")
        else:
            begin = np.datetime64(re.fullmatch(r"minutes since (.*?)( ?UTC|Z)?", str(attrs["units"]))[1].strip(), "ns")
    except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
        raise DataError(
            f"{hdf5}: 'time' does not say when it begins. Give it the attributes begin_date (YYYYMMDD) and begin_time "
            "(HHMMSS)."
        ) from error
    return begin + np.round(minutes.astype(float) * 60).astype("timedelta64[s]")


def _levels(values: np.ndarray) -> np.ndarray:
    """Level numbers, which some files store as floats, as integers where they are whole."""
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    return values.astype(np.int64) if whole else values


def _join(kinds: Sequence[Sequence[_File]]) -> xr.Dataset:
    """The files of each kind one after another along time, and the kinds side by side."""
    fields: dict[str, xr.Variable] = {}
    space: dict[str, np.ndarray] = {}
    for files in kinds:
        for file, other in zip(files, kinds[0], strict=True):
            _check_alike(file, files[0])
            if file.times is not None and not np.array_equal(file.times, other.times):
                raise DataError(f"{file.hdf5} and {other.hdf5} have different times. Copy or download them again.")
        if any(not np.array_equal(space[dim], values) for dim, values in files[0].space.items() if dim in space):
            raise DataError(f"{files[0].hdf5} and {kinds[0][0].hdf5} have different grids. Use files of one grid.")
        space |= files[0].space
        fields |= {name: _along_time(name, files) for name in files[0].fields if name not in fields}
    coords = {dim: (dim, _levels(v), LEVEL) if dim == "lev" else (dim, v) for dim, v in space.items()}
    ds = renamed(xr.Dataset(fields, coords), {**RENAMED, "trajectory": "time"})
    times = [file.times for file in kinds[0] if file.times is not None]
    ds = ds.assign_coords(time=("time", np.concatenate(times), {"standard_name": "time"})) if times else ds
    return label_space(ds, kinds[0][0].hdf5)


def _check_alike(file: _File, first: _File) -> None:
    if set(file.space) != set(first.space) or not all(np.array_equal(v, first.space[d]) for d, v in file.space.items()):
        raise DataError(f"{file.hdf5} and {first.hdf5} have different grids. Use files of one grid.")
    if lacking := set(first.fields) ^ set(file.fields):
        raise DataError(f"{min(lacking)!r} is in only one of {first.hdf5} and {file.hdf5}. Download them again.")


def _along_time(name: str, files: Sequence[_File]) -> xr.Variable:
    first = files[0].fields[name]
    attrs = files[0].hdf5.attributes(name)
    missing = [
        float(v) for key in MISSING for v in np.ravel(attrs.get(key, ())) if isinstance(v, int | float | np.number)
    ]
    if files[0].times is not None and "trajectory" not in first.dims:
        variable = first  # static: the same in every file
    else:
        parts = [
            Part(str(file.hdf5), 1 if file.times is None else len(file.times), file.fields[name]) for file in files
        ]
        one = len(parts) == 1 and "trajectory" not in first.dims
        variable = join(name, parts * 2).isel(trajectory=slice(1)) if one else join(name, parts)
    data = indexing.LazilyIndexedArray(_Filled(variable, np.array(missing), FILLS.get(name, np.nan)))
    kept = {key: attrs[key] for key in ("units", "long_name", "standard_name") if isinstance(attrs.get(key), str)}
    return xr.Variable(variable.dims, data, kept, variable.encoding)


class _Filled(BackendArray):
    """A lazy variable with `fill` where it is NaN or one of the values that mean missing."""

    def __init__(self, variable: xr.Variable, missing: np.ndarray, fill: float):
        self.variable, self.shape, self.dtype, self.fill = variable, variable.shape, variable.dtype, fill
        with np.errstate(over="ignore"):
            self.missing = missing.astype(variable.dtype) if variable.dtype.kind == "f" else missing[:0]

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        values = np.asarray(self.variable[key].values)
        if self.dtype.kind != "f":
            return values
        return np.where(np.isnan(values) | np.isin(values, self.missing), self.dtype.type(self.fill), values)
