"""What the readers of data on the globe share: names, units and checks of times, levels, latitudes and longitudes."""

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.errors import DataError

RENAMED = {"lat": "latitude", "lon": "longitude"}
UNITS = {"latitude": "degrees_north", "longitude": "degrees_east"}


def renamed(ds: xr.Dataset, names: dict[str, str]) -> xr.Dataset:
    """The dataset with other names where it has the old and not the new, also in the chunk layout of its variables."""
    free = set(ds.variables) | set(ds.dims)
    names = {old: new for old, new in names.items() if old in free and new not in free}
    result = ds.rename(names)
    for name, variable in ds.variables.items():
        if chunks := variable.encoding.get("preferred_chunks"):
            own = result.variables[names.get(name, name)]
            own.encoding = {**own.encoding, "preferred_chunks": {names.get(d, d): n for d, n in chunks.items()}}
    return result


def has_coordinate(ds: xr.Dataset, dim: str) -> bool:
    """Whether a dimension has a coordinate of its name."""
    return dim in ds.variables and ds.variables[dim].dims == (dim,)


def label_space(ds: xr.Dataset, source, level: str = "") -> xr.Dataset:
    """With units and periodicity at latitude, longitude and level (`level`: the unit where the file says none).

    Raises DataError for a missing latitude or longitude, and for coordinates that repeat or are not numbers.
    """
    coordinates = {}
    for dim in ("level", "latitude", "longitude"):
        if dim == "level" and dim not in ds.dims:
            continue
        if not has_coordinate(ds, dim):
            raise DataError(
                f"{source} has dimensions {tuple(map(str, ds.dims))}, but {dim!r} with a coordinate was expected. "
                "Leave out `format`, or name another one, if it is a plain file."
            )
        coordinate = ds.variables[dim].copy()
        if coordinate.dtype.kind not in "iuf":
            raise DataError(f"{source}: the coordinate {dim!r} holds {coordinate.dtype}, not numbers.")
        coordinate.attrs.setdefault("units", UNITS.get(dim, level))
        if dim != "level":
            periodic = ax.axis_of(ds, dim, dim, source=str(source)).periodic
            coordinate.attrs["periodic"] = int(periodic)
            if periodic:
                coordinate.attrs["period"] = 360.0
        elif len(np.unique(coordinate.values)) < coordinate.size:
            raise DataError(f"{source}: the levels {coordinate.values.tolist()} repeat. Copy or download it again.")
        coordinates[dim] = coordinate
    return ds.assign_coords(coordinates)


def check_ascending(ds: xr.Dataset, dim: str, source) -> None:
    """Raises DataError when the coordinate `dim` is not one of ascending dates."""
    times = ds.variables[dim].values if has_coordinate(ds, dim) else np.zeros(0)
    dates = times.dtype.kind == "M" or (times.dtype.kind == "O" and all(hasattr(time, "calendar") for time in times))
    if not times.size or not dates or any(time != time for time in times[[0, -1]]):
        raise DataError(f"{source}: {dim!r} holds {times.dtype} values, but dates were expected. Check its `units`.")
    wrong = ~(times[1:] > times[:-1])
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"{source}: {dim!r} does not increase: {times[at]} is followed by {times[at + 1]}. Sort the data, or copy "
            "them again."
        )


def durations(ds: xr.Dataset, dim: str, source) -> np.ndarray:
    """The coordinate `dim` as timedelta64[ns], decoded already or numbers with a unit. Raises DataError for others."""
    if not has_coordinate(ds, dim):
        raise DataError(f"{source} has no coordinate {dim!r}, so its times are not known.")
    values, unit = ds[dim].values, str(ds[dim].attrs.get("units", "")).strip().lower()
    if values.dtype.kind in "iuf":
        seconds = ck.DURATIONS.get(unit)
        if seconds is None or not np.isfinite(values).all() or np.abs(values.astype(float)).max() * seconds > 1e9:
            raise DataError(f"{source}: {dim!r} is {values[:4]} in {unit!r}, but a duration was expected.")
        values = np.round(values.astype(float) * seconds * 1e9).astype("timedelta64[ns]")
    if values.dtype.kind != "m" or np.isnat(values).any() or (np.diff(values) <= np.timedelta64(0)).any():
        raise DataError(f"{source}: {dim!r} is {values[:4]}, but ascending durations were expected.")
    return values.astype("timedelta64[ns]")
