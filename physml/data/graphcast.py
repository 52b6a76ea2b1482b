"""Example data of GraphCast and GenCast in netCDF, and their normalization files. Lam et al. 2023, arXiv:2212.12794.

A file name carries the facts: `source-era5_date-2022-01-01_res-1.0_levels-13_steps-04.nc`. The first two frames are
inputs, the targets follow at the same step (6 h, for GenCast 12 h).
"""

import os
import re

import numpy as np
import xarray as xr

from physml.data import netcdf
from physml.data.globe import RENAMED, durations, has_coordinate, label_space, renamed
from physml.data.guarded import guarded
from physml.data.joined import Part, join
from physml.data.place import Place
from physml.errors import DataError, first_line

FACTS = {"source", "date", "res", "levels", "steps"}
NORMALIZATION = re.compile(r"(diffs_stddev|stddev|mean|min)_by_level\.nc$")
UNITS = {
    "2m_temperature": "K", "temperature": "K", "sea_surface_temperature": "K", "mean_sea_level_pressure": "Pa",
    "10m_u_component_of_wind": "m s-1", "10m_v_component_of_wind": "m s-1", "u_component_of_wind": "m s-1",
    "v_component_of_wind": "m s-1", "vertical_velocity": "Pa s-1", "specific_humidity": "kg kg-1",
    "geopotential": "m2 s-2", "geopotential_at_surface": "m2 s-2", "total_precipitation_6hr": "m",
    "total_precipitation_12hr": "m", "toa_incident_solar_radiation": "J m-2", "land_sea_mask": "1",
}  # fmt: skip


def facts(name: str) -> dict[str, str]:
    """What a file name says, such as {"source": "era5", "date": "2022-01-01", ..}; empty for other names."""
    if not name.endswith(".nc"):
        return {}
    items = [item.partition("-") for item in name.removesuffix(".nc").split("_")]
    found = {key: value for key, dash, value in items if dash and value}
    return found if set(found) >= FACTS and len(found) == len(items) else {}


def recognizes(place: Place) -> bool:
    """Whether a file has the name of a sample or of a normalization file, or a folder holds only such files."""
    if place.is_folder():
        names = [name for name in place.names() if name.endswith(".nc")]
    else:
        names = [place.name()] if place.is_file() else []
    return bool(names) and (all(map(facts, names)) or all(map(NORMALIZATION.search, names)))


def open_dataset(place: Place) -> xr.Dataset:
    """Fields `trajectory, time[, level], latitude, longitude`, lazily; static fields `latitude, longitude`.

    `time` is the date where all trajectories have the same dates, as in a single file, else the time since the first
    frame; `datetime (trajectory, time)` is the date in both cases. `sea_surface_temperature` is NaN over land. Levels
    are in hPa. Facts of the file name are attributes `name_source`, `name_res`, ...

    A folder of samples with equal grids, levels and steps becomes one dataset with their trajectories. Normalization
    files, `mean_by_level.nc`, `stddev_by_level.nc`, `diffs_stddev_by_level.nc` (of one step) and `min_by_level.nc`,
    have variables on `level` or scalar ones; a folder of them gets a dimension `statistic` (NaN where one lacks it).

    Raises DataError for damaged files, files that do not fit together, and coordinates that are missing or repeat.
    """
    files = place.files(".nc") if place.is_folder() else [place]
    if files and all(NORMALIZATION.search(file.name()) for file in files):
        return _normalization(files, joined=place.is_folder())
    samples = [file for file in files if facts(file.name())] if place.is_folder() else files
    if not samples:
        raise DataError(f"{place} holds no sample of GraphCast: names like source-era5_date-.._steps-04.nc.")
    parts = [(file, _sample(file)) for file in samples]
    first_file, first = parts[0]
    for file, ds in parts[1:]:
        same = all(np.array_equal(ds.get(dim), first.get(dim)) for dim in ("time", "level", "latitude", "longitude"))
        if not same or set(ds.variables) != set(first.variables):
            raise DataError(
                f"{file} and {first_file} differ in grid, levels, times or variables. Open them one by one, or keep "
                "samples of one kind in a folder."
            )
    dates = [_dates(file, ds) for file, ds in parts]
    ds = first.drop_vars("datetime", errors="ignore")
    if len(parts) > 1:
        framed = [name for name, variable in ds.data_vars.items() if "time" in variable.dims]
        ds = ds.assign({name: _join(str(name), parts) for name in framed})
        ds.attrs = {key: v for key, v in first.attrs.items() if all(other.attrs.get(key) == v for _, other in parts)}
    if all(rows is not None for rows in dates):
        rows = np.concatenate(dates)
        dims = ("trajectory", "time") if "trajectory" in ds.dims else ("time",)
        table = rows if len(dims) == 2 else rows[0]
        ds = ds.assign_coords(datetime=(dims, table, {"long_name": "date of the frame"}))
        if (rows == rows[:1]).all():
            ds = ds.assign_coords(time=("time", rows[0], {"standard_name": "time"}))
    return ds


def _open(file: Place) -> xr.Dataset:
    # As a URL, so that HDF5 is read by h5py: the netCDF library hangs on some damaged files.
    path = file.path if netcdf.is_url(file.path) else f"file://{os.path.abspath(file.path)}"
    return guarded(netcdf.open_netcdf(path, storage_options=file.storage_options), str(file))


def _sample(file: Place) -> xr.Dataset:
    ds = _open(file)
    ds = label_space(renamed(ds, {**RENAMED, "batch": "trajectory"}), file, level="hPa")
    if ds.sizes.get("trajectory") == 0 or "time" not in ds.dims:
        raise DataError(f"{file} has dimensions {dict(ds.sizes)}, but frames of one sample at least were expected.")
    ds = ds.assign_coords(time=("time", durations(ds, "time", file), {"long_name": "time since the first frame"}))
    ds.attrs = {"title": "GraphCast example data", "references": "arXiv:2212.12794", **ds.attrs}
    for key, value in facts(file.name()).items():
        ds.attrs[f"name_{key}"] = value
    levels = ds.attrs.get("name_levels", "")
    if levels.isdigit() and "level" in ds.dims and int(levels) != ds.sizes["level"]:
        raise DataError(f"{file} has {ds.sizes['level']} levels, but its name says {levels}. Download it again.")
    return _with_units(ds).transpose(*(dim for dim in ("trajectory", "time", "level") if dim in ds.dims), ...)


def _with_units(ds: xr.Dataset) -> xr.Dataset:
    for name, variable in ds.data_vars.items():
        if name in UNITS:
            variable.attrs.setdefault("units", UNITS[str(name)])
    return ds


def _dates(file: Place, ds: xr.Dataset) -> np.ndarray | None:
    """`(trajectory, time)`, or None where the file has no `datetime`."""
    if "datetime" not in ds.variables:
        return None
    variable = ds.variables["datetime"]
    if set(variable.dims) - {"trajectory"} != {"time"} or variable.dtype.kind != "M":
        raise DataError(
            f"{file}: 'datetime' is {variable.dtype} along {variable.dims}, but dates of frames were expected."
        )
    dates = np.atleast_2d(variable.transpose(..., "time").values)
    if np.isnat(dates).any():
        raise DataError(f"{file}: 'datetime' lacks the dates of some frames. Copy or download it again.")
    return dates


def _join(name: str, parts: list[tuple[Place, xr.Dataset]]) -> xr.Variable:
    return join(name, [Part(str(file), ds.sizes.get("trajectory", 1), ds.variables[name]) for file, ds in parts])


def _normalization(files: list[Place], joined: bool) -> xr.Dataset:
    parts = {}
    for file in files:
        ds = _open(file)
        if unknown := set(ds.dims) - {"level"}:
            raise DataError(f"{file} has a dimension {min(map(str, unknown))!r}, but only 'level' was expected.")
        if "level" in ds.dims and not has_coordinate(ds, "level"):
            raise DataError(
                f"{file} has no coordinate 'level', so its statistics cannot be matched. Download it again."
            )
        ds = _with_units(ds)
        parts[NORMALIZATION.search(file.name())[1]] = ds.load() if joined else ds
    if not joined:
        return next(iter(parts.values()))
    if len(parts) < len(files):
        raise DataError(f"{files[0].parent()} holds one kind of statistic twice. Keep those of one model in a folder.")
    try:
        return xr.concat(
            list(parts.values()),
            xr.DataArray(list(parts), dims="statistic", name="statistic"),
            join="exact",
            data_vars="all",
            combine_attrs="drop",
        )
    except ValueError as error:
        raise DataError(f"{files[0].parent()}: files of statistics differ ({first_line(error)}).") from error
