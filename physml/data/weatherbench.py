"""WeatherBench 2 stores: ERA5 analyses, forecasts and climatologies in zarr. Rasp et al. 2024, arXiv:2308.15560.

Dimensions are addressed by name: stores on the grid of ERA5 run (latitude descending, longitude), regridded ones
(longitude, latitude ascending), and `open_dataset` keeps the order of space as it is stored.

Times of accumulations (`total_precipitation_6hr`, `_24hr`) are the ends of their intervals.
"""

import numpy as np
import xarray as xr

from physml.data import zarrs
from physml.data.globe import RENAMED, check_ascending, durations, has_coordinate, label_space, renamed
from physml.data.place import Place
from physml.errors import DataError

LEADS = ("prediction_timedelta", "lead_time")
INITIAL = ("init_time", "time")
MEMBERS = ("number", "realization")
SEASONS = ("hour", "dayofyear")
DIMS = {"time", *LEADS, "init_time", *MEMBERS, *SEASONS, "level", "latitude", "longitude", *RENAMED}
# Names that nothing but ERA5 in its long spelling has; "temperature" alone says too little.
TELLING = {
    "2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind", "10m_wind_speed", "u_component_of_wind",
    "v_component_of_wind", "mean_sea_level_pressure", "total_precipitation_6hr", "total_precipitation_24hr",
    "geopotential_at_surface",
}  # fmt: skip


def recognizes(place: Place) -> bool:
    """Whether a folder is a consolidated store with the names and dimensions of WeatherBench 2, and no others."""
    if not place.is_folder():
        return False
    arrays = zarrs.header(place)
    dims = {dim for array in arrays.values() for dim in array.dims}
    if not dims <= DIMS or not {"latitude", "longitude"} <= dims | {RENAMED.get(dim) for dim in dims}:
        return False
    kinds = {"time", "init_time"} & dims or set(SEASONS) <= dims
    return bool(kinds) and not TELLING.isdisjoint(arrays)


def open_dataset(place: Place) -> xr.Dataset:
    """One store, lazily: an analysis, a forecast or a climatology, told by its dimensions.

    - analysis: `time, level, <latitude and longitude as stored>`, static fields without time;
    - forecast (`prediction_timedelta` or `lead_time`): as `physml.forecast` writes it and `physml.evaluate` takes it,
      `trajectory, lead, level, <space>` with `initial_time (trajectory)`, the valid time `time (trajectory, lead)` and
      `lead` as timedelta64. Lead 0, which is the input, is kept: drop it before scoring. The members of an ensemble
      (`number` or `realization`) are `trajectory, member, lead, ...`;
    - climatology: `hour, dayofyear (1..366), level, <space>`; the mean has no suffix, the standard deviation `_std`,
      SEEPS `_seeps_threshold` and `_seeps_dry_fraction`. `at_times` looks it up.

    Levels are in hPa, units those of ERA5. Chunks that a store lacks are NaN, as zarr defines it.

    Raises DataError for damaged stores, for missing coordinates, and for times, leads or levels that repeat.
    """
    ds = zarrs.open_store(place)
    ds = renamed(ds, RENAMED)
    ds = label_space(ds, place, level="hPa")
    lead = next((dim for dim in LEADS if dim in ds.dims), None)
    if set(SEASONS) <= set(ds.dims):
        _check_climatology(ds, place)
        leading = SEASONS
    elif lead is not None:
        member = next((dim for dim in MEMBERS if dim in ds.dims), "member")
        ds = renamed(_forecast(ds, lead, place), {member: "member"})
        leading = ("trajectory", *(["member"] if "member" in ds.dims else []), "lead")
    else:
        if "time" not in ds.dims:
            raise DataError(f"{place} has neither 'time' nor {SEASONS} among its dimensions {tuple(ds.dims)}.")
        check_ascending(ds, "time", place)
        leading = ("time",)
    first = [*leading, *(["level"] if "level" in ds.dims else [])]
    ds = ds.transpose(*first, ...)
    ds.attrs = {"title": "WeatherBench 2", "references": "arXiv:2308.15560", **ds.attrs}
    return ds


def at_times(climatology: xr.Dataset, times) -> xr.Dataset:
    """The entries of a climatology `(hour, dayofyear, ...)` at dates, lazily: `(*dimensions of times, ...)`.

    Args:
        climatology: from `open_dataset`; days count from 1 (1 January) to 366, in leap years and others alike.
        times: a DataArray of dates, such as the coordinate `time` of an analysis or a forecast, or an array `(time,)`.

    Raises DataError for an hour that the climatology does not have.
    """
    if not isinstance(times, xr.DataArray):
        times = xr.DataArray(np.asarray(times), dims="time")
    times = times.reset_coords(drop=True)
    clock = times.dt
    known = climatology["hour"].values
    if not np.isin(clock.hour.values, known).all() or clock.minute.values.any():
        raise DataError(
            f"The climatology has the hours {known.tolist()} only. Select those times, or interpolate the climatology."
        )
    picked = climatology.sel(hour=clock.hour, dayofyear=clock.dayofyear)
    names = [dim for dim in times.dims if dim in picked.dims]
    return picked.drop_vars([n for n in SEASONS if n in picked.coords]).assign_coords(time=times).transpose(*names, ...)


def _forecast(ds: xr.Dataset, lead: str, place: Place) -> xr.Dataset:
    initial = next((dim for dim in INITIAL if dim in ds.dims), None)
    if initial is None:
        raise DataError(f"{place} has leads along {lead!r}, but no dimension of initial times {INITIAL}.")
    check_ascending(ds, initial, place)
    if ds[initial].dtype.kind != "M":
        raise DataError(f"{place}: {initial!r} is not in the standard calendar, or far from today.")
    starts, leads = ds[initial].values, durations(ds, lead, place)
    ds = ds.drop_vars([n for n in (initial, lead, "time", "valid_time", "lead") if n in ds.coords])
    ds = renamed(ds, {initial: "trajectory", lead: "lead"})
    valid = starts[:, None] + leads
    return ds.assign_coords(
        lead=("lead", leads, {"long_name": "lead time"}),
        initial_time=("trajectory", starts, {"long_name": "initial time"}),
        time=(("trajectory", "lead"), valid, {"standard_name": "time", "long_name": "valid time"}),
    )


def _check_climatology(ds: xr.Dataset, place: Place) -> None:
    for dim, low, high in (("hour", 0, 23), ("dayofyear", 1, 366)):
        values = ds[dim].values if has_coordinate(ds, dim) else np.zeros(0)
        ascending = values.dtype.kind in "iuf" and values.size and (np.diff(values) > 0).all()
        if not ascending or values[0] < low or values[-1] > high:
            raise DataError(f"{place}: {dim!r} holds {values[:5]}, but ascending numbers {low}..{high} were expected.")
