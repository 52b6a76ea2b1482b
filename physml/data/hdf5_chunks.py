"""Chunks of local netCDF-4 files, read and decompressed by several threads.

The HDF5 library lets one thread of a program work at a time. Here it only says where the chunks of a variable lie.
"""

import functools
import itertools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

MOST = 500_000  # chunks whose places are kept
DEFLATE, SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


class Chunks:
    """One variable of a file, see `open_chunks`.

    Attributes:
        shape, chunk: of the variable and of a chunk.
        dtype: as it is stored.
    """

    def __init__(self, path: Path, variable: h5py.Dataset):
        from numcodecs import Shuffle

        self.shape, self.chunk, self.dtype = variable.shape, variable.chunks, variable.dtype
        self._fill = variable.fillvalue
        self._bytes = int(np.prod(self.chunk)) * self.dtype.itemsize
        self._places = {}
        variable.id.chunk_iter(lambda c: self._places.update({c.chunk_offset: (c.byte_offset, c.size, c.filter_mask)}))
        self._filters = _filters(variable)
        self._shuffle = Shuffle(self.dtype.itemsize)
        self._file = path.open("rb", buffering=0)

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


def open_chunks(array: Any) -> Chunks | None:
    """Of an `xarray` array of the netCDF4 library; None where the file is elsewhere, or stored or coded in another way.

    The numbers must be those of the file: callers check that nothing is decoded further.
    """
    store = array.datastore
    path = Path(str(store._filename))
    if not hasattr(os, "pread") or not path.is_file() or np.dtype(array.dtype).kind not in "iuf":
        return None
    try:
        with h5py.File(path) as file:
            variable = file[(store._group or "") + "/" + array.variable_name]
            plain = (
                isinstance(variable, h5py.Dataset) and variable.chunks and {*_filters(variable)} <= {DEFLATE, SHUFFLE}
            )
            same = plain and (variable.shape, variable.dtype) == (array.shape, array.dtype)
            if not same or variable.id.get_num_chunks() > MOST:
                return None
            return Chunks(path, variable)
    except (OSError, RuntimeError, KeyError, ValueError):  # the library itself opened it, and will say what is wrong
        return None
