"""Any labelled data to netCDF-4, zarr or the layout of a benchmark: whole or not at all, every number as it was."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from physml.data import write_pdearena, write_well
from physml.data.store import SUFFIXES
from physml.errors import ConfigError, DataError, suggest
from physml.files import whole

LAYOUTS = ("netcdf", "pdearena", "the_well", "zarr")
COMPRESSION = 4
CONVENTIONS = "CF-1.11"


def save_dataset(
    ds: xr.Dataset,
    out: str | os.PathLike,
    to: str | None = None,
    *,
    zarr_format: Literal[2, 3] = 3,
    overwrite: bool = False,
) -> Path:
    """Writes a dataset and returns the path. Reading it back gives the same numbers and labels.

    Holds a few chunks in memory at a time. Packed numbers (scale_factor) are stored unpacked. Benchmark layouts hold
    what `physml.data.write_well.write` and `physml.data.write_pdearena.write` say; the rest is an error that names it.

    Args:
        ds: what to write, lazy or not.
        out: a .nc file or a .zarr folder; for benchmark layouts a folder, or one .h5 or .hdf5 file. It appears when it
            is complete.
        to: "netcdf", "zarr", "the_well" or "pdearena"; the first two are told by the suffix of `out` when None.
        zarr_format: 2 for readers that are older than zarr 3.
        overwrite: replaces what is there.

    Raises ConfigError for a format that cannot be told, DataError where `out` exists or cannot be written, and for what
    a layout cannot hold.
    """
    out = Path(out)
    to = check_output(out, to, overwrite)
    ds = _portable(ds) if to in SUFFIXES.values() else ds
    with whole(out) as temporary:
        if to == "netcdf":
            ds.to_netcdf(temporary, engine="netcdf4", format="NETCDF4", encoding=_packing(ds))
        elif to == "zarr":
            _write_zarr(ds, temporary, zarr_format)
        elif to == "the_well":
            write_well.write(ds, temporary)
        else:
            write_pdearena.write(ds, temporary, _write_portable_zarr)
    return out


def check_output(out: Path, to: str | None, overwrite: bool) -> str:
    """The format to write. Raises ConfigError when nothing tells it, DataError where `out` exists."""
    to = to or SUFFIXES.get(out.suffix)
    if to is None:
        raise ConfigError(f"{out} does not tell its format. End the name with .nc or .zarr, or say to='the_well'.")
    if to not in LAYOUTS:
        raise ConfigError(f"There is no output format {to!r}." + suggest(to, LAYOUTS))
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists. Choose another name, or overwrite it: overwrite=True, or --overwrite.")
    return to


def check_layout(ds: xr.Dataset, out: Path, to: str) -> None:
    """Raises DataError for what a layout cannot hold, as far as names, sizes and coordinates tell."""
    if to == "the_well":
        write_well.check(ds, out)
    elif to == "pdearena":
        write_pdearena.check(ds, out)


def _write_portable_zarr(ds: xr.Dataset, path: Path, zarr_format: int) -> None:
    _write_zarr(_portable(ds), path, zarr_format)


def _write_zarr(ds: xr.Dataset, path: Path, zarr_format: int) -> None:
    encoding = {str(name): {"_FillValue": None} for name, v in ds.variables.items() if v.dtype.kind == "f"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")  # not in the specification of format 3 yet
        ds.to_zarr(path, mode="w-", zarr_format=zarr_format, consolidated=True, encoding=encoding)


def _packing(ds: xr.Dataset) -> dict[str, dict[str, Any]]:
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in ds.variables.items():
        own: dict[str, Any] = {"_FillValue": None} if variable.dtype.kind == "f" else {}
        if variable.ndim and variable.dtype.kind in "iuf" and name not in ds.dims:
            own |= {"zlib": True, "complevel": COMPRESSION, "shuffle": True}
            if variable.chunks:
                own["chunksizes"] = tuple(sizes[0] for sizes in variable.chunks)
        encoding[str(name)] = own
    return encoding


def _portable(ds: xr.Dataset) -> xr.Dataset:
    """Without what belongs to the file it came from, with attributes that both formats can hold."""
    ds = ds.copy()
    for variable in ds.variables.values():
        kept = {key: variable.encoding[key] for key in ("units", "calendar") if key in variable.encoding}
        variable.encoding = kept if variable.dtype.kind in "Mm" or _is_time(variable) else {}
        variable.attrs = {str(key): _attribute(value) for key, value in variable.attrs.items()}
        if variable.dtype.kind == "U" and not isinstance(variable, xr.IndexVariable):
            variable.data = variable.values.astype(object)  # zarr 3 has text of any length, not of a fixed one
        if variable.chunks and any(len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0] for sizes in variable.chunks):
            # Files have one chunk size per axis.
            variable.data = variable.data.rechunk(tuple(max(sizes) for sizes in variable.chunks))
    ds.attrs = {"Conventions": CONVENTIONS, **{str(key): _attribute(value) for key, value in ds.attrs.items()}}
    ds.encoding = {}
    return ds


def _is_time(variable: xr.Variable) -> bool:
    return variable.dtype.kind == "O" and variable.size > 0 and hasattr(variable.values.flat[0], "calendar")


def _attribute(value: Any) -> Any:
    """Numbers, text and lists of them as they are; others as JSON text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray | list | tuple):
        plain = np.asarray(value).tolist()
        flat = plain if isinstance(plain, list) else [plain]
        if flat and (all(isinstance(v, str) for v in flat) or all(isinstance(v, int | float) for v in flat)):
            return [int(v) if isinstance(v, bool) else v for v in flat]
        value = plain
    with contextlib.suppress(TypeError, ValueError):
        return json.dumps(value)
    return str(value)
