"""Numbers of HDF5 and netCDF-4 files for several threads: by h5py, and chunk by chunk beside any library.

The netCDF library lets several threads into HDF5 at once: a program crashes where one thread reads a file while another
opens or writes any other. h5py, which has an HDF5 library of its own, lets one in at a time: what a loader reads goes
through it. For chunks, HDF5 only says where they lie; they are read and decompressed by all threads.
"""

import functools
import itertools
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import h5py
import numpy as np
import xarray as xr
from xarray.backends import BackendArray, CachingFileManager, NetCDF4DataStore
from xarray.core import indexing

from physml.errors import DataError

MOST = 500_000  # chunks whose places are kept
DEFLATE, SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


class Array(BackendArray):
    """A dataset of a file, read by h5py.

    Attributes:
        file: gives the open file.
        path, key: of the file, and of the dataset in it.
    """

    def __init__(
        self,
        file: Callable[[], AbstractContextManager[h5py.File]],
        path: str,
        key: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ):
        self.file, self.path, self.key, self.shape, self.dtype = file, path, key, shape, dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER_1VECTOR, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        with self.file() as file:
            return file[self.key][key]


class Netcdf4(NetCDF4DataStore):
    """A local netCDF-4 file for `xarray.open_dataset`: the netCDF library tells its variables, h5py reads them."""

    __slots__ = ("numbers",)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.numbers = CachingFileManager(h5py.File, str(self._filename), mode="r")

    def open_store_variable(self, name: str, var) -> xr.Variable:
        variable = super().open_store_variable(name, var)
        if variable.dims != (name,):  # those become an index, and are read at once
            array = by_h5py(variable._data.array, self.numbers)
            variable._data = variable._data if array is None else indexing.LazilyIndexedArray(array)
        return variable

    def close(self, **options) -> None:
        super().close(**options)
        self.numbers.close()


def by_h5py(array: BackendArray, manager: CachingFileManager | None = None) -> Array | None:
    """What reads the same numbers as an `xarray` array of the netCDF4 library, out of the file that a manager opens;
    None where the file is elsewhere, or holds them in another way.
    """
    store = array.datastore
    path, key = str(store._filename), f"{store._group or ''}/{array.variable_name}"
    if np.dtype(array.dtype).kind not in "iuf" or not os.path.isfile(path):
        return None
    manager = manager or CachingFileManager(h5py.File, path, mode="r")
    try:
        with manager.acquire_context() as file:
            variable = file[key]
            own = isinstance(variable, h5py.Dataset) and not variable.is_virtual and not variable.external
            if not own or (variable.shape, variable.dtype) != (array.shape, array.dtype):
                return None
    except (OSError, RuntimeError, KeyError, ValueError):  # the library itself opened it, and will say what is wrong
        return None
    return Array(manager.acquire_context, path, key, array.shape, array.dtype)


class Chunks:
    """One variable of a file, see `open_chunks`.

    Attributes:
        array: what reads the selections that `read` does not know.
        shape, chunk: of the variable and of a chunk.
        dtype: as it is stored.
    """

    def __init__(self, array: Array, variable: h5py.Dataset):
        from numcodecs import Shuffle

        self.array, self.shape, self.chunk, self.dtype = array, variable.shape, variable.chunks, variable.dtype
        self._fill = variable.fillvalue
        self._bytes = int(np.prod(self.chunk)) * self.dtype.itemsize
        self._places = {}
        variable.id.chunk_iter(lambda c: self._places.update({c.chunk_offset: (c.byte_offset, c.size, c.filter_mask)}))
        self._filters = _filters(variable)
        self._shuffle = Shuffle(self.dtype.itemsize)
        self._file = open(array.path, "rb", buffering=0)  # noqa: SIM115  stays open for as long as it is read

    def read(self, key: tuple) -> np.ndarray | None:
        """The selection, an entry for each axis; None for other entries than numbers and slices with a positive step.

        Raises ValueError for chunks that cannot be decoded.
        """
        if any(isinstance(part, np.ndarray) or (isinstance(part, slice) and (part.step or 1) < 1) for part in key):
            return None
        whole = [part if isinstance(part, slice) else slice(int(part), int(part) + 1) for part in key]
        ranges = [range(*part.indices(size)) for part, size in zip(whole, self.shape, strict=True)]
        result = np.empty([len(wanted) for wanted in ranges], self.dtype)
        pieces = (_pieces(wanted, size) for wanted, size in zip(ranges, self.chunk, strict=True))

        def put(parts) -> None:
            offsets, sources, targets = zip(*parts, strict=True)
            place = result[targets]
            fits = place.shape == self.chunk and place.flags.c_contiguous
            decoded = self._decoded(offsets, place if fits else None)
            if decoded is not place:
                place[...] = decoded[sources]

        for _ in _pool().map(put, itertools.product(*pieces)):
            pass  # raises what a thread raised
        return result[tuple(slice(None) if isinstance(part, slice) else 0 for part in key)]

    def _decoded(self, offset: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
        """One chunk: `out`, where that could be written to, else an array of its own."""
        if offset not in self._places:
            return np.broadcast_to(self._fill, self.chunk)
        start, size, skipped = self._places[offset]
        content = os.pread(self._file.fileno(), size, start)
        if len(content) != size:
            raise ValueError(f"the file ends within the chunk at {offset}")
        for number, kind in reversed(list(enumerate(self._filters))):
            if skipped >> number & 1:
                continue
            if kind == DEFLATE:
                content = self._inflated(content, offset)
            elif number == 0 and out is not None and len(content) == self._bytes:
                self._shuffle.decode(content, out=out)
                return out
            else:
                content = self._shuffle.decode(content)
        if len(content) != self._bytes:
            raise ValueError(f"the chunk at {offset} holds {len(content)} bytes instead of {self._bytes}")
        return np.frombuffer(content, self.dtype).reshape(self.chunk)

    def _inflated(self, content: bytes, offset: tuple[int, ...]) -> bytes:
        unpack = zlib.decompressobj()
        try:
            content = unpack.decompress(content, self._bytes + 1)  # and no more, whatever the file says
        except zlib.error as error:
            raise ValueError(f"the chunk at {offset} cannot be decompressed: {error}") from error
        if not unpack.eof:
            raise ValueError(f"the chunk at {offset} is cut short, or larger than a chunk")
        return content


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "physml-chunks")


def _filters(variable: h5py.Dataset) -> list[int]:
    """Codes of what chunks went through when they were written, in that order."""
    properties = variable.id.get_create_plist()
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _pieces(wanted: range, size: int) -> list[tuple[int, slice, slice]]:
    """Where an axis meets its chunks: (offset of the chunk, which of its entries, which entries of the result)."""
    result = []
    if not len(wanted):
        return result
    for offset in range(wanted[0] // size * size, wanted[-1] + 1, size):
        first = max(0, -(-(offset - wanted.start) // wanted.step))
        last = min(len(wanted), -(-(offset + size - wanted.start) // wanted.step))
        if first < last:
            source = slice(wanted[first] - offset, wanted[last - 1] - offset + 1, wanted.step)
            result.append((offset, source, slice(first, last)))
    return result


def open_chunks(array: Array) -> Chunks | None:
    """The chunks of an array; None where the file is elsewhere, or it is stored or coded in another way."""
    if not hasattr(os, "pread") or not os.path.isfile(array.path) or array.dtype.kind not in "iuf":
        return None
    try:
        with array.file() as file:
            variable = file[array.key]
            if not variable.chunks or not {*_filters(variable)} <= {DEFLATE, SHUFFLE}:
                return None
            return None if variable.id.get_num_chunks() > MOST else Chunks(array, variable)
    except (OSError, RuntimeError, KeyError, ValueError, DataError):  # the array itself will say what is wrong
        return None
