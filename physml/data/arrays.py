"""Plain arrays as labelled datasets."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from physml.errors import SpecError

INTERVAL_AXES = ("x", "y", "z")


def from_array(
    array,
    dims: Sequence[str],
    names: Sequence[str] = ("u",),
    coords: Mapping[str, Sequence] | None = None,
    units: Mapping[str, str] | None = None,
    periodic: Sequence[str] = (),
    time_step: float = 1.0,
) -> xr.Dataset:
    """A dataset from one array.

    Args:
        array: numbers, such as `(sample, time, x, y, channel)`.
        dims: the name of every axis of the array. "sample", "batch" and the like mean `trajectory`; "channel" splits
            into variables.
        names: names of the variables: one, or one per channel.
        coords: coordinates by dimension. Without them, x, y and z lie at i / n and time at i * time_step.
        units: unit of variables and coordinates, by name.
        periodic: dimensions whose last point is a neighbor of the first.
        time_step: distance of frames where `coords` has no time.

    Raises SpecError when names, dims or coordinates do not fit the shape.
    """
    array, dims, names = np.asarray(array), tuple(dims), tuple(names)
    coords, units = dict(coords or {}), dict(units or {})
    if array.ndim != len(dims) or len(set(dims)) != len(dims):
        raise SpecError(
            f"The array has {array.ndim} axes of sizes {array.shape}, but dims={dims}. Name each axis once."
        )
    if array.dtype.kind not in "iufb":
        raise SpecError(f"The array holds {array.dtype}, but real numbers were expected.")
    channels = array.shape[dims.index("channel")] if "channel" in dims else 1
    if len(names) != channels:
        raise SpecError(f"There are {channels} channels, but names={names}. Give one name per channel.")
    if unknown := (set(coords) | set(periodic)) - set(dims):
        raise SpecError(f"{sorted(unknown)[0]!r} is not among dims={dims}.")
    sizes = dict(zip(dims, array.shape, strict=True))
    variables = {}
    for i, name in enumerate(names):
        values = np.take(array, i, axis=dims.index("channel")) if "channel" in dims else array
        attrs = {"units": units[name]} if name in units else {}
        variables[name] = (tuple(d for d in dims if d != "channel"), values, attrs)
    labels = {d: _coordinate(d, n, coords, units, periodic, time_step) for d, n in sizes.items() if d != "channel"}
    ds = xr.Dataset(variables, {d: v for d, v in labels.items() if v is not None})
    from physml.data.netcdf import name_dimensions

    ds = name_dimensions(ds)
    if "trajectory" not in ds.dims:
        ds = ds.assign({name: ds[name].expand_dims("trajectory") for name in names})
    return ds.transpose(*[d for d in ("trajectory", "time") if d in ds.dims], ...)


def _coordinate(dim, size, coords, units, periodic, time_step):
    attrs = {"units": units[dim]} if dim in units else {}
    if dim in periodic:
        attrs["periodic"] = 1
    if dim in coords:
        values = np.asarray(coords[dim])
        if values.shape != (size,):
            raise SpecError(f"Coordinate {dim!r} has shape {values.shape}, but the array has {size} points along it.")
        return (dim, values, attrs)
    if dim in INTERVAL_AXES:
        return (dim, np.arange(size) / size, attrs)
    if dim in ("time", "t"):
        return (dim, np.arange(size) * time_step, attrs)
    return (dim, np.arange(size), attrs) if attrs else None
