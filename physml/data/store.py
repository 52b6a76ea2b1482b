"""Files of generated trajectories, written chunk by chunk in a fixed order, so that equal numbers give equal bytes."""

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from physml.errors import ConfigError, DataError, suggest

CHUNK_BYTES = 2**18  # a few frames are read at a time: small chunks, whole frames
COMPRESSION = 4

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
        format = {".nc": "netcdf", ".nc4": "netcdf", ".zarr": "zarr"}.get(out.suffix)
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


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary name beside `path`, then moves the file into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(finished: Path, out: Path) -> None:
    """Moves a finished file or folder to `out`. A folder there is set aside, put back on failure, and removed last."""
    if not out.is_dir() or out.is_symlink():
        os.replace(finished, out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(out, old)
    try:
        os.replace(finished, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def exclusive(out: Path, *, wait: bool = True) -> Iterator[None]:
    """Lets one process at a time work on `out`; the others wait. The lock ends with the process, however it ends.

    Raises DataError when the folder of `out` cannot be written, and without `wait` when another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system: files still appear whole, two processes only do the work twice
        yield
        return
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = lock.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                file.close()
                raise DataError(
                    f"Another process is writing {out}. Wait until it has ended, or choose another name."
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break  # a file system without locks
            # Whoever had it before may have removed the file: only a lock on the file that others will open counts.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                    break
            file.close()
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}. Choose a folder that you may write to.") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()
