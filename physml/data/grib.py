"""GRIB files through cfgrib and ecCodes (extra `grib`)."""

import numpy as np
import xarray as xr

from physml.data import netcdf
from physml.data.guarded import guarded
from physml.errors import DataError, DependencyError, first_line

LEVELS = (
    "isobaricInhPa", "isobaricInPa", "hybrid", "hybridHeight", "heightAboveGround", "heightAboveSea", "depthBelowLand",
    "depthBelowLandLayer", "potentialVorticity", "theta", "generalVerticalLayer", "eta", "sigma", "levels",
)  # fmt: skip


def open_grib(path: str, *, chunks=None, filter_by_keys: dict | None = None, decode_times: bool = True,
              storage_options=None):  # fmt: skip
    """One GRIB file, lazily: dimensions `time`, `level`, `latitude`, `longitude` as far as messages differ in them.

    A forecast from one initial time has its valid times as `time`; from several, `step` stays a dimension of its own.
    No index file is written. Times are decoded by cfgrib; `decode_times` is there for the sake of other formats.

    Args:
        path: a local file.
        chunks: as of xarray.
        filter_by_keys: takes only the messages with these GRIB keys, such as {"typeOfLevel": "surface"}, for files
            whose messages do not make one dataset.

    Raises DependencyError without cfgrib or ecCodes; DataError for damaged files, for URLs, and where messages do not
    fit together.
    """
    if netcdf.is_url(path):
        raise DataError(f"{path} is GRIB, which is read from local files only. Fetch it first: physml data fetch URL.")
    if netcdf.magic(path, storage_options) != netcdf.GRIB:
        raise DataError(f"{path} is no GRIB file. Leave out format='grib'.")
    cfgrib = _library(path)
    options = {"indexpath": "", "errors": "raise", "filter_by_keys": filter_by_keys or {}}

    def read() -> xr.Dataset:
        try:
            return xr.open_dataset(path, engine="cfgrib", chunks=chunks, cache=False, backend_kwargs=options)
        except cfgrib.DatasetBuildError as error:
            raise DataError(
                f"{path} holds messages that do not make one dataset ({first_line(error)}). Choose some with "
                "the option filter_by_keys, such as filter_by_keys={'typeOfLevel': 'surface'}."
            ) from error

    ds = netcdf.guarded_open(path, read)
    if not ds.data_vars:
        raise DataError(f"{path} holds no GRIB message" + (f" with {filter_by_keys}." if filter_by_keys else "."))
    ds = _named(ds)
    return ds if chunks else guarded(ds, path)


def _library(path: str):
    try:
        import cfgrib
    except Exception as error:  # without the library of ecCodes, cfgrib raises RuntimeError
        raise DependencyError(
            f"{path} is GRIB, which needs cfgrib and ecCodes ({type(error).__name__}: {first_line(error)}). "
            "Install them: pip install 'physml[grib]'."
        ) from error
    return cfgrib


def _named(ds: xr.Dataset) -> xr.Dataset:
    levels = [name for name in LEVELS if name in ds.dims]
    if len(levels) == 1 and "level" not in ds.variables:
        ds = ds.rename({levels[0]: "level"})
    if "step" in ds.dims and "time" not in ds.dims and "valid_time" in ds.coords:
        start = ds["time"].values
        ds = ds.drop_vars("time").rename(valid_time="time").swap_dims(step="time")
        ds = ds.assign_coords(initial_time=((), np.asarray(start), {"long_name": "start of the forecast"}))
    leading = [dim for dim in ("number", "time", "step", "level") if dim in ds.dims]
    return ds.transpose(*leading, ...)
