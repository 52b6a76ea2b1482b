"""Plain HDF5 files (no dimension names) as lazy labelled variables: what most PDE benchmarks are made of.

Only numbers are read, and only from the file itself: external links, virtual datasets, external storage and objects are
refused. Files are closed when too many are open, and reopened when needed (`xarray.backends.CachingFileManager`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import xarray as xr
from xarray.backends import CachingFileManager
from xarray.core import indexing

from physml.data import netcdf, remote
from physml.data.hdf5_chunks import Array
from physml.data.place import Place
from physml.errors import DataError, first_line, suggest

SMALL = 2**27  # bytes that coordinates and parameters may take
LARGEST_CHUNK = 2**31  # bytes that one compressed chunk may unpack to


class Hdf5:
    """One HDF5 file, opened for reading. Raises DataError when it is missing, damaged or no HDF5."""

    def __init__(self, place: Place):
        self.place = place
        if netcdf.magic(place.path, place.storage_options) != netcdf.HDF5:
            raise DataError(f"{place} is not an HDF5 file.")
        options = {"storage_options": place.storage_options} if place.storage_options else {}
        self._manager = CachingFileManager(_open, place.path, mode="r", kwargs=options)
        with self.file():
            pass

    def __str__(self) -> str:
        return str(self.place)

    @contextmanager
    def file(self) -> Iterator[h5py.File]:
        """The open file; errors of the HDF5 library become DataError."""
        try:
            with self._manager.acquire_context() as file:
                yield file
        except (DataError, MemoryError):
            raise
        except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ValueError, .. for damaged files
            raise DataError(
                f"{self.place} cannot be read: it is damaged or incomplete ({type(error).__name__}: "
                f"{first_line(error)}). Copy, download or generate it again."
            ) from error

    def keys(self, group: str = "/") -> list[str]:
        """Names of the datasets and groups in a group. Names that are no text, as damage makes them, are left out."""
        with self.file() as file:
            return [name for name in self._at(file, group, h5py.Group) if isinstance(name, str)]

    def has(self, key: str) -> bool:
        """Whether there is a dataset or group of that path."""
        with self.file() as file:
            try:
                self._at(file, key, h5py.Dataset | h5py.Group)
            except DataError:
                return False
            return True

    def is_group(self, key: str) -> bool:
        with self.file() as file:
            return isinstance(self._at(file, key, h5py.Dataset | h5py.Group), h5py.Group)

    def shape(self, key: str) -> tuple[int, ...]:
        """Raises DataError when the dataset is absent or holds no numbers."""
        with self.file() as file:
            return tuple(self._numbers(file, key).shape)

    def attributes(self, key: str = "/") -> dict[str, Any]:
        """Attributes as plain numbers, text, lists of text and arrays; others are left out."""
        with self.file() as file:
            node = self._at(file, key, h5py.Dataset | h5py.Group)
            found = {}
            for name in node.attrs:
                value = _plain(node.attrs[name])
                if value is not None:
                    found[str(name)] = value
            return found

    def values(self, key: str, limit: int = SMALL) -> np.ndarray:
        """A whole small array. Raises DataError when it would take more than `limit` bytes."""
        with self.file() as file:
            dataset = self._numbers(file, key)
            if dataset.nbytes > limit:
                raise DataError(
                    f"{self.place}: {key!r} would take {dataset.nbytes} bytes, which is too much for what it is."
                )
            return np.asarray(dataset[()])

    def variable(self, key: str, dims: Sequence[str], attrs: Mapping[str, Any] | None = None) -> xr.Variable:
        """A lazy variable with those dimensions. Raises DataError when the dataset is absent or has other axes."""
        with self.file() as file:
            dataset = self._numbers(file, key)
            shape, dtype, chunks = tuple(dataset.shape), dataset.dtype, dataset.chunks
            if chunks and int(np.prod(chunks, dtype=object)) * dtype.itemsize > LARGEST_CHUNK:
                raise DataError(f"{self.place}: one chunk of {key!r} unpacks to more than {LARGEST_CHUNK} bytes.")
        if len(shape) != len(dims):
            raise DataError(f"{self.place}: {key!r} has shape {shape}, but its axes should be {tuple(dims)}.")
        if 0 in shape:
            raise DataError(f"{self.place}: {key!r} is empty, its shape is {shape} for {tuple(dims)}.")
        data = indexing.LazilyIndexedArray(Array(self.file, self.place.path, key, shape, dtype))
        encoding = {"preferred_chunks": dict(zip(dims, chunks, strict=True))} if chunks else {"contiguous": True}
        return xr.Variable(dims, data, dict(attrs or {}), encoding)

    def _numbers(self, file: h5py.File, key: str) -> h5py.Dataset:
        dataset = self._at(file, key, h5py.Dataset)
        if dataset.is_virtual or dataset.external:
            raise DataError(f"{self.place}: {key!r} is stored in other files, which are not opened.")
        if dataset.shape is None or dataset.dtype.kind not in "iufb" or dataset.dtype.itemsize > 8:
            raise DataError(f"{self.place}: {key!r} holds {dataset.dtype}, not plain numbers.")
        return dataset

    def _at(self, file: h5py.File, key: str, kind) -> Any:
        """The node at a path, link by link: an external link is never followed."""
        node: Any = file
        for part in key.strip("/").split("/"):
            if not part:
                continue
            if not isinstance(node, h5py.Group):
                raise self._missing(key, node.parent)
            link = node.get(part, getlink=True)
            if link is None:
                raise self._missing(key, node)
            if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
                raise DataError(f"{self.place}: {key!r} is a link, which is not followed. Store the data itself.")
            node = node[part]
        if not isinstance(node, kind):
            what = "a group" if isinstance(node, h5py.Group) else "an array"
            raise DataError(f"{self.place}: {key!r} is {what}, which was not expected there.")
        return node

    def _missing(self, key: str, group: h5py.Group) -> DataError:
        return DataError(f"{self.place} has no {key!r}." + suggest(key.rsplit("/", 1)[-1], list(group)[:20]))


def component(variable: xr.Variable, dim: str, index: int) -> xr.Variable:
    """One entry along a dimension, lazily."""
    part = variable.isel({dim: index})
    part.encoding = dict(variable.encoding)
    if "preferred_chunks" in part.encoding:
        part.encoding["preferred_chunks"] = {
            name: size for name, size in part.encoding["preferred_chunks"].items() if name != dim
        }
    return part


def common_sizes(source: Any, fields: Mapping[str, xr.Variable]) -> dict[str, int]:
    """The size of every dimension of some fields. Raises DataError where they do not agree."""
    sizes: dict[str, int] = {}
    for name, field in fields.items():
        for dim, size in field.sizes.items():
            if sizes.setdefault(str(dim), size) != size:
                raise DataError(
                    f"{source}: {name!r} has {size} entries along {str(dim)!r}, but other fields have "
                    f"{sizes[str(dim)]}. Download it again."
                )
    return sizes


def _open(path: str, mode: str, storage_options: dict | None = None) -> h5py.File:
    if netcdf.is_url(path):
        return h5py.File(remote.open_file(path, storage_options), mode)
    return h5py.File(path, mode)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item()) if value.dtype.kind in "iufbSU" else None
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "iufb":
            return value
        if value.dtype.kind in "SUO" and all(isinstance(item, str | bytes) for item in value.ravel()):
            return [_plain(item) for item in value.ravel()]
    return None
