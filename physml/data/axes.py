"""What the dimensions of an xarray dataset mean, and the `Axis` each becomes.

A dimension has a *role*: "trajectory", "time", "latitude", "longitude", "level", "x", "y", "z", or its own name when
nothing tells more. CF attributes (`standard_name`, `axis`, `units`) decide first, then common names.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from physml.errors import DataError, SpecError
from physml.fields import Axis

TRAJECTORY = {
    "trajectory", "trajectories", "traj", "sample", "samples", "batch", "member", "members", "number", "realization",
    "ensemble", "ens", "run", "case", "simulation", "sim",
}  # fmt: skip
TIME = {"time", "times", "t", "valid_time", "datetime", "date", "time_counter", "lead", "lead_time", "frame"}
TIME_IF_NOTHING_ELSE = ("month", "day", "dayofyear", "hour", "step", "snapshot")
NAMES = {
    **dict.fromkeys(TRAJECTORY, "trajectory"),
    **dict.fromkeys(TIME, "time"),
    **dict.fromkeys(("lat", "lats", "latitude", "latitudes", "nav_lat"), "latitude"),
    **dict.fromkeys(("lon", "lons", "long", "longitude", "longitudes", "nav_lon"), "longitude"),
    **dict.fromkeys(
        ("level", "levels", "lev", "plev", "pressure", "pressure_level", "isobaricinhpa", "model_level", "height",
         "altitude", "depth", "hybrid", "sigma"),
        "level",
    ),
    "x": "x", "y": "y", "z": "z",
}  # fmt: skip
STANDARD_NAMES = {
    "latitude": "latitude",
    "longitude": "longitude",
    "grid_latitude": "y",
    "grid_longitude": "x",
    "projection_x_coordinate": "x",
    "projection_y_coordinate": "y",
    "time": "time",
    "realization": "trajectory",
    **dict.fromkeys(("air_pressure", "height", "altitude", "depth", "model_level_number"), "level"),
}
UNITS = {
    **dict.fromkeys(("degrees_north", "degree_north", "degrees_n", "degree_n", "degreesn", "degreen"), "latitude"),
    **dict.fromkeys(("degrees_east", "degree_east", "degrees_e", "degree_e", "degreese", "degreee"), "longitude"),
}
ORDER = ("level", "latitude", "longitude", "x", "y", "z")  # of spatial axes in a window; unknown ones come before


def role(ds: xr.Dataset, dim: str) -> str:
    """The role of one dimension of `ds`."""
    coordinate = ds.variables.get(dim)
    attrs = coordinate.attrs if coordinate is not None else {}
    found = STANDARD_NAMES.get(str(attrs.get("standard_name", "")).lower())
    found = found or UNITS.get(str(attrs.get("units", "")).lower())
    if found:
        return found
    if coordinate is not None and (coordinate.dtype.kind == "M" or _is_cftime(coordinate)):
        return "time"
    if named := NAMES.get(str(dim).lower()):
        return named
    by_axis = {"T": "time", "X": "x", "Y": "y", "Z": "level"}.get(str(attrs.get("axis", "")).upper())
    return by_axis or str(dim)


def roles(ds: xr.Dataset, dims: Sequence[str]) -> dict[str, str]:
    """Role -> dimension for the dimensions of one variable; no role is given twice (a second one keeps its own
    name).
    """
    result: dict[str, str] = {}
    for dim in dims:
        name = role(ds, dim)
        result[name if name not in result else str(dim)] = dim
    if "time" not in result and "time" not in {role(ds, d) for d in ds.dims}:
        for dim in dims:
            if str(dim).lower() in TIME_IF_NOTHING_ELSE:
                result = {("time" if d == dim else r): d for r, d in result.items()}
                break
    return result


def time_dim(ds: xr.Dataset) -> str | None:
    """The dimension of `ds` that is time, or None."""
    return roles(ds, list(ds.dims)).get("time")


def space_of(roles_of_variable: dict[str, str], order: Sequence[str] = ()) -> tuple[str, ...]:
    """Spatial roles of a variable in the order that windows use: level, latitude, longitude, x, y, z (or `order`)."""
    space = [name for name in roles_of_variable if name not in ("trajectory", "time")]
    known = tuple(order) or ORDER
    return tuple(sorted(space, key=lambda name: known.index(name) if name in known else -1))


def axis_of(ds: xr.Dataset, dim: str, name: str, periodic: bool | None = None, source: str = "the data") -> Axis:
    """The `Axis` of a dimension: ascending centers, weights, periodicity.

    Without coordinate, x, y and z lie at i / n (a unit interval) and other axes at 0, 1, 2, ...
    Weights are cos(latitude); cell widths where x, y or z is stretched. Raises DataError when the coordinate is not
    monotonic.
    """
    size = ds.sizes[dim]
    values = coordinate_values(ds, dim)
    unit = str(ds[dim].attrs.get("units", "")) if dim in ds.variables else ""
    if values is None:
        values = np.arange(size) / size if name in ("x", "y", "z") else np.arange(size, dtype=float)
    if not np.isfinite(values).all():
        raise DataError(f"{source}: the coordinate {dim!r} holds NaN or infinite values. Correct the file.")
    if name == "longitude":
        values = _unwrap(values)
    steps = np.diff(values)
    if size > 1 and not ((steps > 0).all() or (steps < 0).all()):
        at = int(np.argmax(steps * np.sign(steps[0]) <= 0))
        raise DataError(
            f"{source}: the coordinate {dim!r} is not monotonic: {values[at]:g} is followed by {values[at + 1]:g} "
            f"(position {at}). Sort the data along {dim!r} first."
        )
    centers = np.sort(values)
    if periodic is None:
        periodic = _covers_circle(centers) if name == "longitude" else _marked_periodic(ds, dim, name)
    weights = _weights(name, centers)
    return Axis(name, tuple(map(float, centers)), tuple(map(float, weights)), bool(periodic), unit)


def coordinate_values(ds: xr.Dataset, dim: str) -> np.ndarray | None:
    """One-dimensional numeric coordinate of `dim`, float64, or None where there is none."""
    coordinate = ds.variables.get(dim)
    if coordinate is None or coordinate.ndim != 1 or coordinate.dtype.kind not in "iuf":
        return None
    return np.asarray(coordinate.values, np.float64)


def positions(ds: xr.Dataset, dim: str, axis: Axis, source: str = "the data") -> slice | np.ndarray:
    """Where the centers of `axis` lie along `dim` of `ds`: a slice when possible (reversed for a descending
    coordinate).

    Longitudes are compared modulo 360. Raises SpecError when the axis has other points.
    """
    size = ds.sizes[dim]
    if size != len(axis):
        raise SpecError(
            f"{source} has {size} points along {dim!r}, but {len(axis)} were expected ({_span(axis)}). "
            "Select that region, or interpolate the data to this grid."
        )
    values = coordinate_values(ds, dim)
    if values is None:
        return slice(None)
    centers = np.asarray(axis.centers)
    if axis.name == "longitude":
        # Count both from the western edge, so that -70 and 290 are the same place.
        origin = centers[0] - abs(axis.spacing) / 2
        values, centers = (values - origin) % 360, (centers - origin) % 360
    order = np.argsort(values, kind="stable")
    if not np.allclose(values[order], np.sort(centers), rtol=1e-5, atol=1e-3 * abs(axis.spacing)):
        raw = coordinate_values(ds, dim)
        raise SpecError(
            f"{source}: {dim!r} spans {raw.min():g}..{raw.max():g}, but {_span(axis)} was expected. "
            "Select that region, or interpolate the data to this grid."
        )
    order = order[np.argsort(np.argsort(centers, kind="stable"), kind="stable")]
    return as_slice(order)


def as_slice(index: np.ndarray) -> slice | np.ndarray:
    """A slice that selects the same as the integer array `index`, if there is one."""
    steps = np.diff(index)
    if len(index) == 0 or (len(steps) and (steps != steps[0]).any()):
        return index
    step = int(steps[0]) if len(steps) else 1
    if step == 0:
        return index
    stop = int(index[-1]) + (1 if step > 0 else -1)
    return slice(int(index[0]), stop if stop >= 0 else None, step)


def _span(axis: Axis) -> str:
    return f"{axis.centers[0]:g}..{axis.centers[-1]:g}, {len(axis)} points"


def _is_cftime(coordinate: xr.Variable) -> bool:
    if coordinate.dtype.kind != "O" or coordinate.size == 0:
        return False
    return hasattr(np.asarray(coordinate.values).ravel()[0], "calendar")


def _unwrap(longitude: np.ndarray) -> np.ndarray:
    """Longitudes that jump at a seam (..., 357.5, 0, ...) made continuous, in the convention of their western edge."""
    jumps = np.diff(longitude)
    if len(jumps) < 2 or (jumps > 0).all() or (jumps < 0).all():
        return longitude
    values = np.rad2deg(np.unwrap(np.deg2rad(longitude)))
    values = np.where(np.abs(values - np.round(values, 6)) < 1e-9, np.round(values, 6), values)
    return values - 360.0 if values.max() >= 360 else values


def _covers_circle(centers: np.ndarray) -> bool:
    if len(centers) < 3:
        return False
    spacing = (centers[-1] - centers[0]) / (len(centers) - 1)
    return bool(abs(spacing * len(centers) - 360) < 0.01 * spacing and np.ptp(np.diff(centers)) < 0.01 * spacing)


def _marked_periodic(ds: xr.Dataset, dim: str, name: str) -> bool:
    """From the attribute `periodic` of the coordinate (0 or 1) or of the dataset (0, 1, or names of axes)."""
    own = ds.variables[dim].attrs.get("periodic") if dim in ds.variables else None
    if own is not None:
        return str(own).lower() in ("1", "true", "yes")
    marked = ds.attrs.get("periodic", "")
    if isinstance(marked, str) and marked.lower() not in ("true", "yes", "1"):
        return {dim, name} & set(marked.replace(",", " ").split()) != set()
    if isinstance(marked, list | tuple | np.ndarray) and np.asarray(marked).dtype.kind in "US":
        return {dim, name} & set(map(str, marked)) != set()
    return bool(np.all(marked))


def area_weights(latitude) -> np.ndarray:
    """Area of the cells around latitudes (degrees, any direction), with mean one.

    Cells are bounded by the middles between latitudes and by the poles: the weight is the difference of sin(latitude)
    at the bounds. Rows at the poles have half a cell; where the grid has none, this equals cos(latitude) / mean.
    """
    degrees = np.asarray(latitude, np.float64)
    ascending = np.sort(degrees)
    steps = np.diff(ascending)
    inner = ascending[:-1] + steps / 2
    ends = (ascending[0] - steps[0] / 2, ascending[-1] + steps[-1] / 2) if len(steps) else (-90.0, 90.0)
    bounds = np.clip([ends[0], *inner, ends[1]], -90, 90)
    weights = np.diff(np.sin(np.deg2rad(bounds)))
    weights = weights[np.argsort(np.argsort(degrees))]
    return weights / weights.mean()


def _weights(name: str, centers: np.ndarray) -> np.ndarray:
    """Relative cell sizes with mean one; empty where they are uniform."""
    if name == "latitude":
        return area_weights(centers)
    if name in ("x", "y", "z") and len(centers) > 2:
        steps = np.diff(centers)
        if np.ptp(steps) > 1e-3 * steps.mean():
            width = np.concatenate([steps[:1], (steps[:-1] + steps[1:]) / 2, steps[-1:]])
            return width / width.mean()
    return np.zeros(0)


def inside(
    ds: xr.Dataset, dim: str, name: str, bounds: tuple[float, float], source: str = "the data"
) -> slice | np.ndarray:
    """Positions along `dim` in [low, high]; longitudes may cross the seam of the file: (-40, 10) on a 0..360 grid.

    Raises DataError when there are none.
    """
    values = coordinate_values(ds, dim)
    if values is None:
        values = np.asarray(axis_of(ds, dim, name).centers)
    low, high = sorted(map(float, bounds)) if name != "longitude" else map(float, bounds)
    tolerance = 1e-6 * max(1.0, abs(low), abs(high))
    if name == "longitude" and high - low < 360:
        offset = (values - low + tolerance) % 360
        chosen = np.flatnonzero(offset <= (high - low) % 360 + 2 * tolerance)
        chosen = chosen[np.argsort(offset[chosen], kind="stable")]
    else:
        chosen = np.flatnonzero((values >= low - tolerance) & (values <= high + tolerance))
    if len(chosen) == 0:
        raise DataError(
            f"{source}: no point of {dim!r} lies in {low:g}..{high:g}; it spans {values.min():g}..{values.max():g}."
        )
    return as_slice(chosen)


def entries(ds: xr.Dataset, dim: str, wanted: Sequence[float], source: str = "the data") -> np.ndarray:
    """Positions of the levels `wanted` along `dim`. Raises DataError naming the levels that exist."""
    values = coordinate_values(ds, dim)
    values = np.arange(ds.sizes[dim], dtype=float) if values is None else values
    found = []
    for level in wanted:
        match = np.flatnonzero(np.isclose(values, level, rtol=1e-5))
        if len(match) == 0:
            raise DataError(f"{source} has no {dim} {level:g}. It has {', '.join(f'{v:g}' for v in values)}.")
        found.append(int(match[0]))
    return np.array(found)
