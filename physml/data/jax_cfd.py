"""netCDF files of JAX-CFD: what plain netCDF does not tell of them, the periodic domain and the staggered grid.

Kochkov et al. 2021, doi:10.1073/pnas.2101784118. Files of TSM (`train.nc`, `test.nc`) have the same variables but no
attributes: they are plain netCDF.
"""

from typing import Any

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import netcdf
from physml.data.guarded import guarded
from physml.data.place import Place
from physml.errors import DataError

SPACE = ("x", "y", "z")
LONGEST = 2**16  # points along an axis; more come from a damaged header


def recognizes(place: Place) -> bool:
    """A netCDF file with the attributes of a simulation, or with a velocity that has an offset."""
    if place.is_folder():
        return False
    with _opened(place) as ds:
        grid = "ndim" in ds.attrs and {"save_grid_size", "save_grid_size_x"} & {*ds.attrs}
        if grid and {"domain_size", "domain_size_multiple"} & {*ds.attrs}:
            return True
        return any(_offset(ds[name]) for name in ("u", "v", "w") if name in ds.data_vars)


def open_dataset(place: Place) -> xr.Dataset:
    """Velocities `u`, `v`, `w` and tracer `c`, with dimensions `trajectory, time, x, y, z` as far as the file has them.

    `trajectory` is `sample` in the file. Everything is in the units of the simulation. All variables share the
    coordinates of cell centers, though velocities lie on faces: the attribute `offset` of a variable, one number per
    axis, is its place in the cell, from 0 to 1. So u with (1, 0.5) lies at x + dx / 2 and y. An axis is periodic where
    it spans `domain_size` (in old files 2 pi `domain_size_multiple`); its coordinate is made where the file has none.
    Other attributes and variables, such as spectra, stay as they are.

    Raises DataError for a file that is damaged, or whose length of the domain is no length.
    """
    ds = guarded(netcdf.name_dimensions(_opened(place)), str(place))
    lengths = _lengths(ds, place)
    for dim in SPACE:
        if dim in ds.dims and (coordinate := _coordinate(ds, dim, lengths.get(dim), place)) is not None:
            ds = ds.assign_coords({dim: coordinate})
    for name in ds.data_vars:
        if offset := _offset(ds[name]):
            ds[name].attrs["offset"] = offset
        ds[name].attrs.setdefault("units", "1")
    if "time" in ds.coords:
        ds["time"].attrs.setdefault("units", "1")
    periodic = [dim for dim in SPACE if dim in ds.coords and ds[dim].attrs.get("periodic")]
    ds.attrs.setdefault("boundary_conditions", f"periodic in {', '.join(periodic)}" if periodic else "not stated")
    ds.attrs.setdefault("title", "JAX-CFD simulation")
    ds.attrs.setdefault("references", "Kochkov et al. 2021, doi:10.1073/pnas.2101784118")
    ds.encoding["source"] = str(place)
    return ds


def _opened(place: Place) -> xr.Dataset:
    return netcdf.open_netcdf(place.path, decode_times=False, storage_options=place.storage_options)


def _offset(variable: xr.DataArray) -> list[float] | None:
    """The place in the cell of a variable, one number per spatial axis; None where the file does not say."""
    numbers = _numbers(variable.attrs.get("offset"))
    axes = sum(dim in SPACE for dim in variable.dims)
    return numbers.tolist() if numbers is not None and axes and len(numbers) == axes else None


def _lengths(ds: xr.Dataset, place: Place) -> dict[str, float]:
    """Of the domain along its axes; empty where the file does not say."""
    axes = [dim for dim in SPACE if dim in ds.dims]
    for key, unit in (("domain_size", 1.0), ("domain_size_multiple", 2 * np.pi)):
        if key not in ds.attrs:
            continue
        numbers = _numbers(ds.attrs[key])
        if numbers is None or len(numbers) not in (1, len(axes)) or not (numbers > 0).all():
            raise DataError(
                f"{place}: the attribute {key!r} is {ds.attrs[key]!r}, but the length of the domain was expected, one "
                "positive number or one per axis. Correct it, or open the file with format='netcdf'."
            )
        return dict(zip(axes, np.resize(unit * numbers, len(axes)).tolist()))
    return {}


def _coordinate(ds: xr.Dataset, dim: str, length: float | None, place: Place) -> xr.Variable | None:
    """That of the file, or else centers of cells that fill the domain; periodic where it spans the domain."""
    size, values = ds.sizes[dim], ax.coordinate_values(ds, dim)
    if values is None and (length is None or dim in ds.variables):
        return None
    if values is None:
        if size > LONGEST:
            raise DataError(f"{place} has {size} points along {dim!r}, which no grid has. Download the file again.")
        values = (np.arange(size) + 0.5) * (length / size)
    attrs = {"units": "1", **(ds[dim].attrs if dim in ds.variables else {}), "periodic": 0}
    if length is not None and np.isclose(size * (values[-1] - values[0]), length * (size - 1), rtol=1e-3):
        attrs |= {"periodic": 1, "period": length}
    return xr.Variable(dim, values, attrs)


def _numbers(value: Any) -> np.ndarray | None:
    """An attribute as finite numbers."""
    array = np.atleast_1d(np.asarray(value))
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    return array.astype(np.float64)
