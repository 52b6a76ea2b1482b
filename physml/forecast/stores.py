"""Where the frames of a forecast go as they come: memory, zarr or netCDF. A file appears complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from physml.errors import ConfigError

LEAD = "lead"
SUFFIXES = {".nc": "netcdf", ".nc4": "netcdf", ".netcdf": "netcdf", ".zarr": "zarr"}
Label = Callable[[np.ndarray, int], xr.Dataset]  # frames (batch, lead, *space, channel) and their first step -> labels


def open_store(out: str | Path | None, label: Label, coords: dict[str, xr.Variable], overwrite: bool):
    """A store for leads that arrive in order. `coords` are the coordinates along `lead`, for all steps.

    Raises ConfigError for an unknown suffix, or when the output exists and `overwrite` is not set.
    """
    if out is None:
        return Memory(label, coords)
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} ends in {path.suffix!r}, but one of {', '.join(sorted(SUFFIXES))} was expected.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists. Choose another name, or pass overwrite=True.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder: make it first, or choose another place for {path.name}.")
    return (Zarr if SUFFIXES[path.suffix] == "zarr" else Netcdf)(path, label, coords)


class Memory:
    """Keeps everything."""

    def __init__(self, label: Label, coords: dict[str, xr.Variable]):
        self.label, self.coords, self.frames = label, coords, []

    def write(self, first: int, frames: np.ndarray) -> None:
        self.frames.append(np.array(frames))  # a copy: the view would keep the whole device buffer

    def finish(self, leads: int, extra: xr.Dataset, attrs: dict) -> xr.Dataset:
        frames = np.concatenate(self.frames, axis=1)[:, :leads]
        return xr.merge([self.label(frames, 1), extra], combine_attrs="override").assign_attrs(attrs)

    def abort(self) -> None:
        self.frames.clear()


class _File:
    """A file or folder under a partial name until it is finished."""

    def __init__(self, path: Path, label: Label, coords: dict[str, xr.Variable]):
        self.path, self.label, self.coords = path, label, coords
        self.partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")

    def _put(self) -> None:
        """The partial name becomes the final one; what was there is set aside first and removed last."""
        aside = self.path.with_name(f".{self.path.stem}.{uuid.uuid4().hex[:8]}.old")
        if self.path.is_dir():
            os.replace(self.path, aside)
        os.replace(self.partial, self.path)
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)

    def _remove(self) -> None:
        if self.partial.is_dir():
            shutil.rmtree(self.partial, ignore_errors=True)
        else:
            self.partial.unlink(missing_ok=True)


class Zarr(_File):
    """zarr version 3, one storage chunk per chunk of the rollout."""

    group = None

    def write(self, first: int, frames: np.ndarray) -> None:
        piece = self.label(frames, first)
        if self.group is None:
            self._create(piece)
        count = piece.sizes[LEAD]
        for name, variable in piece.data_vars.items():
            at = tuple(slice(first - 1, first - 1 + count) if dim == LEAD else slice(None) for dim in variable.dims)
            self.group[name][at] = variable.values

    def _create(self, piece: xr.Dataset) -> None:
        import dask.array
        import zarr

        total, chunk = self.coords[LEAD].size, piece.sizes[LEAD]
        variables, encoding = {}, {}
        for name, variable in piece.data_vars.items():
            shape = tuple(total if dim == LEAD else size for dim, size in variable.sizes.items())
            chunks = tuple(chunk if dim == LEAD else size for dim, size in variable.sizes.items())
            values = dask.array.full(shape, np.nan, chunks=chunks, dtype=variable.dtype)  # a shape, never computed
            variables[name] = xr.Variable(variable.dims, values, variable.attrs)
            encoding[name] = {"chunks": chunks}
        coords = {name: c.variable for name, c in piece.coords.items() if LEAD not in c.dims}
        template = xr.Dataset(variables, {**coords, **self.coords}, piece.attrs)
        template.to_zarr(self.partial, mode="w-", compute=False, zarr_format=3, consolidated=False, encoding=encoding)
        self.names = tuple(variables)
        self.group = zarr.open_group(self.partial, mode="r+", zarr_format=3)

    def finish(self, leads: int, extra: xr.Dataset, attrs: dict) -> xr.Dataset:
        for _, array in self.group.arrays():
            dims = array.metadata.dimension_names
            if LEAD in dims and leads < self.coords[LEAD].size:
                array.resize(tuple(leads if dim == LEAD else size for dim, size in zip(dims, array.shape, strict=True)))
        extra.to_zarr(self.partial, mode="a", zarr_format=3, consolidated=False)
        self.group.attrs.update(attrs)
        self._put()
        result = xr.open_zarr(self.path, chunks=None, consolidated=False)
        return result[[*self.names, *extra.data_vars]]  # zarr does not keep the order

    def abort(self) -> None:
        self._remove()


class Netcdf(_File):
    """netCDF-4 with an unlimited lead dimension."""

    file = None

    def write(self, first: int, frames: np.ndarray) -> None:
        piece = self.label(frames, first)
        if self.file is None:
            self._create(piece)
        stop = first - 1 + piece.sizes[LEAD]
        self._write_leads({**piece.data_vars, **self.encoded}, first - 1, stop)
        self.file.sync()

    def _create(self, piece: xr.Dataset) -> None:
        import netCDF4

        names, attrs = xr.conventions.encode_dataset_coordinates(piece.isel({LEAD: slice(0)}))
        full = {name: xr.conventions.encode_cf_variable(v, name=name) for name, v in self.coords.items()}
        self.file = netCDF4.Dataset(self.partial, "w", format="NETCDF4")
        self.file.setncatts(_plain(attrs))
        self.encoded = {}
        for name, variable in names.items():
            encoded = full[name] if name in full else xr.conventions.encode_cf_variable(variable, name=name)
            encoded.attrs.update({k: v for k, v in variable.attrs.items() if k == "coordinates"})
            lead_chunk = piece.sizes[LEAD] if name in piece.data_vars else self.coords[LEAD].size
            self._define(name, encoded, lead_chunk)
            if name in full:
                self.encoded[name] = encoded

    def _define(self, name: str, variable: xr.Variable, lead_chunk: int) -> None:
        for dim, size in variable.sizes.items():
            if dim not in self.file.dimensions:
                self.file.createDimension(dim, None if dim == LEAD else size)
        attrs = dict(variable.attrs)
        fill = attrs.pop("_FillValue", None)
        kind = str if variable.dtype.kind in "OU" else variable.dtype
        chunks = [lead_chunk if dim == LEAD else size for dim, size in variable.sizes.items()]
        options = {"chunksizes": chunks} if LEAD in variable.dims else {}
        target = self.file.createVariable(name, kind, variable.dims, fill_value=fill, **options)
        target.setncatts(_plain(attrs))
        target.set_auto_maskandscale(False)
        if LEAD not in variable.dims:
            target[...] = variable.values

    def _write_leads(self, variables: dict, start: int, stop: int) -> None:
        for name, variable in variables.items():
            values = variable.isel({LEAD: slice(start, stop)}) if name in self.encoded else variable
            at = tuple(slice(start, stop) if dim == LEAD else slice(None) for dim in variable.dims)
            self.file.variables[name][at] = values.values

    def finish(self, leads: int, extra: xr.Dataset, attrs: dict) -> xr.Dataset:
        for name, variable in extra.variables.items():
            encoded = xr.conventions.encode_cf_variable(variable, name=name)
            self._define(name, encoded, leads)
            if LEAD in encoded.dims:
                self.file.variables[name][...] = encoded.values
        self.file.setncatts(_plain(attrs))
        self.file.close()
        self.file = None
        self._put()
        return xr.open_dataset(self.path, engine="netcdf4", chunks=None)

    def abort(self) -> None:
        if self.file is not None:
            self.file.close()
        self._remove()


def _plain(attrs: dict) -> dict:
    """Attributes that netCDF can hold."""
    return {
        key: value if isinstance(value, str | int | float | np.ndarray | np.generic | list | tuple) else str(value)
        for key, value in attrs.items()
        if value is not None
    }
