"""Files of generated trajectories, written chunk by chunk in a fixed order, so that equal numbers give equal bytes."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from physml.errors import ConfigError, suggest

CHUNK_BYTES = 2**18  # a few frames are read at a time: small chunks, whole frames
COMPRESSION = 4
SUFFIXES = {".nc": "netcdf", ".nc4": "netcdf", ".netcdf": "netcdf", ".zarr": "zarr"}  # of every output

Slices = Iterable[tuple[int, Mapping[str, np.ndarray]]]  # first trajectory, arrays by variable


@dataclass(frozen=True)
class Labels:
    """What a file says beside its numbers.

    Attributes:
        coordinates: dimension -> (values, attributes), in the order of the dimensions.
        variables: name -> (dimensions beginning with "trajectory", dtype, attributes).
        attributes: of the dataset.
    """

    coordinates: dict[str, tuple[np.ndarray, dict[str, Any]]]
    variables: dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]]
    attributes: dict[str, Any]

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(len(self.coordinates[dim][0]) for dim in dims)

    def chunk(self, dims: tuple[str, ...], dtype: Any) -> tuple[int, ...]:
        """One trajectory and as many whole frames as fit CHUNK_BYTES."""
        shape = self.shape(dims)
        if len(shape) == 1:
            return shape
        if dims[1] != "time":
            return (1, *shape[1:])
        frame = int(np.prod(shape[2:])) * np.dtype(dtype).itemsize
        return (1, int(np.clip(CHUNK_BYTES // frame, 1, shape[1])), *shape[2:])


def writer_of(out: Path, format: str | None = None) -> Callable[[Path, Labels, Slices], None]:
    """The writer for a file name, or for "netcdf" or "zarr". Raises ConfigError when neither tells."""
    writers = {"netcdf": write_netcdf, "zarr": write_zarr}
    if format is None:
        format = SUFFIXES.get(out.suffix)
        if format is None:
            raise ConfigError(
                f"{out} does not tell its format. End the name with .nc or .zarr, or say format='netcdf'."
            )
    if format not in writers:
        raise ConfigError(f"There is no output format {format!r}." + suggest(format, writers))
    return writers[format]


def write_netcdf(path: Path, labels: Labels, slices: Slices) -> None:
    """A compressed netCDF-4 file. Holds one slice in memory at a time."""
    import netCDF4

    with netCDF4.Dataset(path, "w", format="NETCDF4") as file:
        file.setncatts(labels.attributes)
        for name, (values, attributes) in labels.coordinates.items():
            file.createDimension(name, len(values))
            variable = file.createVariable(name, values.dtype, (name,))
            variable.setncatts(attributes)
            variable[:] = values
        for name, (dims, dtype, attributes) in labels.variables.items():
            variable = file.createVariable(
                name, dtype, dims, compression="zlib", complevel=COMPRESSION, shuffle=True, fill_value=False,
                chunksizes=labels.chunk(dims, dtype),
            )  # fmt: skip
            variable.setncatts(attributes)
        for first, arrays in slices:
            for name, array in arrays.items():
                file[name][first : first + len(array)] = array


def write_zarr(path: Path, labels: Labels, slices: Slices) -> None:
    """A zarr (format 3) folder. Holds one slice in memory at a time."""
    import dask.array
    import xarray as xr
    import zarr

    shutil.rmtree(path, ignore_errors=True)
    data = {
        name: (dims, dask.array.zeros(labels.shape(dims), dtype, chunks=labels.chunk(dims, dtype)), attributes)
        for name, (dims, dtype, attributes) in labels.variables.items()
    }
    coordinates = {name: (name, values, attributes) for name, (values, attributes) in labels.coordinates.items()}
    empty = xr.Dataset(data, coordinates, {k: _builtin(v) for k, v in labels.attributes.items()})
    for variable in empty.variables.values():
        variable.attrs = {key: _builtin(value) for key, value in variable.attrs.items()}
        variable.encoding["_FillValue"] = None
    empty.to_zarr(path, compute=False, zarr_format=3, consolidated=False)
    for first, arrays in slices:
        for name, array in arrays.items():
            part = xr.Dataset({name: (labels.variables[name][0], array)})
            part.to_zarr(path, region={"trajectory": slice(first, first + len(array))}, consolidated=False)
    with warnings.catch_warnings():
        # Not in the specification of format 3 yet, but readers warn without it.
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(path)


def _builtin(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
