"""Where the frames of a forecast go as they come: memory, zarr or netCDF. A file appears complete or not at all."""

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from physml.data.store import SUFFIXES
from physml.errors import CheckpointError, ConfigError
from physml.files import exclusive, replace

LEAD = "lead"
ANEW = "Start anew with resume='never' and overwrite=True (--resume never --overwrite)"
Label = Callable[
    [np.ndarray, int], xr.Dataset
]  # frames (batch, lead, *space, channel), the number of the first -> labels


def partial_of(path: Path) -> Path:
    """The folder that holds an unfinished output and what it takes to continue it."""
    return path.with_name(f"{path.name}.partial")


def open_store(out: str | Path | None, label: Label, coords: dict[str, xr.Variable], overwrite: bool, resume: str):
    """A store for leads that arrive in order. `coords` are all coordinates along the dimensions that grow.

    Raises ConfigError for an unknown suffix, or when the output, or an unfinished one, exists and is neither to be
    replaced nor to be continued.
    """
    if out is None:
        return Memory(label, coords)
    path = check_out(out, overwrite, resume)
    return (Zarr if SUFFIXES[path.suffix] == "zarr" else Netcdf)(path, label, coords)


def check_out(out: str | Path, overwrite: bool, resume: str) -> Path:
    """Raises ConfigError where `open_store` would."""
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} ends in {path.suffix!r}, but one of {', '.join(sorted(SUFFIXES))} was expected.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists. Choose another name, or pass overwrite=True (--overwrite).")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder: make it first, or choose another place for {path.name}.")
    if resume == "never" and not overwrite and partial_of(path).exists():
        raise ConfigError(
            f"{partial_of(path)} holds an unfinished rollout. Continue it with resume='auto' (--resume auto), or pass "
            "overwrite=True (--overwrite) to start anew."
        )
    return path


def reopen(path: Path) -> xr.Dataset:
    """A finished output, lazily."""
    if SUFFIXES.get(path.suffix) == "zarr":
        return xr.open_zarr(path, chunks=None, consolidated=False)
    return xr.open_dataset(path, engine="netcdf4", chunks=None)


class Memory:
    """Keeps everything."""

    folder = None

    def __init__(self, label: Label, coords: dict[str, xr.Variable]):
        self.label, self.coords, self.frames, self.pieces = label, coords, [], {}

    def alone(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def begin(self, names: list[str]) -> None:
        pass

    def write(self, first: int, frames: np.ndarray) -> None:
        self.frames.append(np.array(frames))  # a copy: the view would keep the whole device buffer

    def extend(self, dim: str, at: int, piece: xr.Dataset) -> None:
        self.pieces.setdefault(dim, []).append(piece)

    def finish(self, sizes: dict[str, int], extra: xr.Dataset, attrs: dict) -> xr.Dataset:
        frames = np.concatenate(self.frames, axis=1)[:, : sizes[LEAD]]
        options = {"coords": "minimal", "compat": "override", "join": "override", "combine_attrs": "override"}
        parts = [self.label(frames, 1)]
        for dim, pieces in self.pieces.items():
            along = {name: c[: sizes[dim]] for name, c in self.coords.items() if c.dims == (dim,)}
            parts.append(xr.concat(pieces, dim, data_vars="minimal", **options).assign_coords(along))
        return xr.merge([*parts, extra], compat="override", combine_attrs="override").assign_attrs(attrs)

    def abort(self, keep: bool) -> None:
        self.frames.clear()


class _File:
    """A file or folder inside a partial folder until it is finished.

    Attributes:
        names: variables in the order of the result.
    """

    def __init__(self, path: Path, label: Label, coords: dict[str, xr.Variable]):
        self.path, self.label, self.coords = path, label, coords
        self.folder = partial_of(path)
        self.partial = self.folder / f"data{path.suffix}"
        self.names: list[str] = []

    def alone(self) -> contextlib.AbstractContextManager:
        """While no other process writes this output. Raises DataError while one does."""
        return exclusive(self.path, wait=False)

    def begin(self, names: list[str]) -> None:
        """Opens the unfinished output with the variables `names`, or starts anew when there are none."""
        if names:
            self._reopen()
            self.names = list(names)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()

    def write(self, first: int, frames: np.ndarray) -> None:
        """Frames `(batch, lead, *space, channel)`; `first` is the number of the first one, from 1 on."""
        self.extend(LEAD, first - 1, self.label(frames, first))

    def extend(self, dim: str, at: int, piece: xr.Dataset) -> None:
        """The variables of `piece`, which all have `dim`, from position `at` along it."""
        fresh = piece[[name for name in piece.data_vars if name not in self.names]]
        if fresh.data_vars:
            self._create(dim, fresh)
            self.names += [str(name) for name in fresh.data_vars]
        self._write(dim, at, piece)

    def _put(self) -> None:
        """The partial name becomes the final one."""
        replace(self.partial, self.path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def abort(self, keep: bool) -> None:
        """Stops writing; what was written stays for a later continuation, or goes."""
        self._close()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.partial} cannot be continued ({type(error).__name__}: {error}). {ANEW}; zarr outlasts a killed "
            "process more surely than netCDF."
        )


class Zarr(_File):
    """zarr version 3, one storage chunk per chunk of the rollout."""

    group = None

    def _reopen(self) -> None:
        import zarr

        try:
            # A process that was killed while it finished may have left consolidated metadata of shorter arrays.
            self.group = zarr.open_group(self.partial, mode="r+", zarr_format=3, use_consolidated=False)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _write(self, dim: str, at: int, piece: xr.Dataset) -> None:
        for name, variable in piece.data_vars.items():
            place = tuple(slice(at, at + size) if d == dim else slice(None) for d, size in variable.sizes.items())
            self.group[name][place] = variable.values

    def _create(self, dim: str, piece: xr.Dataset) -> None:
        import dask.array
        import zarr

        total = next(c.size for c in self.coords.values() if c.dims == (dim,))
        variables, encoding = {}, {}
        for name, variable in piece.data_vars.items():
            shape = tuple(total if d == dim else size for d, size in variable.sizes.items())
            chunks = tuple(variable.sizes.values())
            values = dask.array.full(shape, np.nan, chunks=chunks, dtype=variable.dtype)  # a shape, never computed
            variables[name] = xr.Variable(variable.dims, values, variable.attrs)
            encoding[name] = {"chunks": chunks}
        there = set() if self.group is None else set(self.group.array_keys())
        coords = {n: c.variable for n, c in piece.coords.items() if dim not in c.dims and n not in there}
        coords |= {n: c for n, c in self.coords.items() if self.group is None}
        # Every call replaces all attributes of the store.
        attrs = piece.attrs if self.group is None else {**self.group.attrs, **piece.attrs}
        template = _plainly(xr.Dataset(variables, coords, attrs))
        mode = "w-" if self.group is None else "a"
        template.to_zarr(self.partial, mode=mode, compute=False, zarr_format=3, consolidated=False, encoding=encoding)
        self.group = zarr.open_group(self.partial, mode="r+", zarr_format=3)

    def finish(self, sizes: dict[str, int], extra: xr.Dataset, attrs: dict) -> xr.Dataset:
        import zarr

        for _, array in self.group.arrays():
            dims = array.metadata.dimension_names or ()  # a scalar has none
            shape = tuple(sizes.get(dim, size) for dim, size in zip(dims, array.shape, strict=True))
            if shape != array.shape:
                array.resize(shape)
        extra = extra.assign_attrs({**self.group.attrs, **attrs})
        _plainly(extra).to_zarr(self.partial, mode="a", zarr_format=3, consolidated=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")  # not in the specification yet
            zarr.consolidate_metadata(self.partial, zarr_format=3)
        self._put()
        result = reopen(self.path)
        return result[[*self.names, *extra.data_vars]]  # zarr does not keep the order

    def _close(self) -> None:
        self.group = None


class Netcdf(_File):
    """netCDF-4; the dimensions that grow are unlimited."""

    file = None

    def _reopen(self) -> None:
        import netCDF4

        try:
            self.file = netCDF4.Dataset(self.partial, "a")
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error
        self.file.set_auto_maskandscale(False)

    @functools.cached_property
    def _along(self) -> dict[str, xr.Variable]:
        """The coordinates along growing dimensions, encoded over their whole length."""
        return {name: xr.conventions.encode_cf_variable(v, name=name) for name, v in self.coords.items()}

    def _write(self, dim: str, at: int, piece: xr.Dataset) -> None:
        part = slice(at, at + piece.sizes[dim])
        along = {name: v[part] for name, v in self._along.items() if v.dims == (dim,)}
        for name, variable in {**piece.data_vars, **along}.items():
            place = tuple(part if d == dim else slice(None) for d in variable.dims)
            self.file.variables[name][place] = variable.values
        self.file.sync()

    def _create(self, dim: str, piece: xr.Dataset) -> None:
        import netCDF4

        along = {name: v[:0] for name, v in self.coords.items() if v.dims == (dim,)}
        names, attrs = xr.conventions.encode_dataset_coordinates(piece.isel({dim: slice(0)}).assign_coords(along))
        if self.file is None:
            self.file = netCDF4.Dataset(self.partial, "w", format="NETCDF4")
        self.file.setncatts(_plain(attrs))
        for name, variable in names.items():
            if name in self.file.variables:
                continue
            encoded = self._along.get(name)
            encoded = xr.conventions.encode_cf_variable(variable, name=name) if encoded is None else encoded.copy()
            encoded.attrs.update({k: v for k, v in variable.attrs.items() if k == "coordinates"})
            self._define(name, encoded, piece.sizes[dim] if name in piece.data_vars else encoded.size)

    def _define(self, name: str, variable: xr.Variable, length: int = 0) -> None:
        """`length` of a storage chunk along the dimension that grows."""
        growing = {c.dims[0] for c in self.coords.values()}
        for dim, size in variable.sizes.items():
            if dim not in self.file.dimensions:
                self.file.createDimension(dim, None if dim in growing else size)
        attrs = dict(variable.attrs)
        fill = attrs.pop("_FillValue", None)
        kind = str if variable.dtype.kind in "OU" else variable.dtype.newbyteorder("=")
        chunks = [length if dim in growing else size for dim, size in variable.sizes.items()]
        grows = bool(growing & set(variable.dims))
        options = {"chunksizes": chunks} if grows else {}
        target = self.file.createVariable(name, kind, variable.dims, fill_value=fill, **options)
        target.setncatts(_plain(attrs))
        target.set_auto_maskandscale(False)
        if not grows:
            target[...] = variable.values

    def finish(self, sizes: dict[str, int], extra: xr.Dataset, attrs: dict) -> xr.Dataset:
        for name, variable in extra.variables.items():
            self._define(name, xr.conventions.encode_cf_variable(variable, name=name))
        self.file.setncatts(_plain(attrs))
        self._close()
        self._put()
        return reopen(self.path)

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None


def _plainly(ds: xr.Dataset) -> xr.Dataset:
    """`ds` with attributes that a file can hold."""
    ds = ds.copy()
    ds.attrs = _plain(ds.attrs)
    for variable in ds.variables.values():
        variable.attrs = _plain(variable.attrs)
    return ds


def _plain(attrs: dict) -> dict:
    """Attributes that netCDF and zarr can hold: text and numbers, alone or in a row; text for everything else."""
    return {str(key): _plain_value(value) for key, value in attrs.items() if value is not None}


def _plain_value(value):
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        return str(value)
    if array.dtype.kind == "b" and array.size:
        value = array = array.astype("int32")
    known = array.dtype.kind in "iufU" and array.dtype != np.float16
    if not known or array.ndim > 1 or (array.ndim and not array.size):
        return str(value)
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value
