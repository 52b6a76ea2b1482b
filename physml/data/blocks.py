"""What is stored together: chunk boundaries of a lazy variable, and single chunks out of a large dask graph."""

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from xarray.core import indexing

from physml.data import axes as ax


def edges(variable: xr.Variable, dim: str) -> np.ndarray | None:
    """The first index of every stored chunk along a dimension, and the end; None where nothing says how it is stored.

    Selections made since the file was opened are accounted for.
    """
    if variable.chunks is not None:
        return np.concatenate([[0], np.cumsum(variable.chunks[variable.dims.index(dim)])])
    found = backend(variable)
    if found is None:
        return None
    array, key = found
    kept = [i for i, part in enumerate(key) if not isinstance(part, int | np.integer)]
    if len(kept) != variable.ndim or len(array.shape) != len(key):
        return None
    position = kept[variable.dims.index(dim)]
    size = _chunk(variable, dim, position, len(key))
    if not size:
        return None
    part = key[position]
    index = np.arange(array.shape[position])[part] if isinstance(part, slice) else np.asarray(part)
    return np.concatenate([[0], np.flatnonzero(np.diff(index // size)) + 1, [len(index)]]).astype(np.int64)


def backend(variable: xr.Variable, plain: bool = False) -> tuple[Any, tuple] | None:
    """The array of the file behind a lazy variable, and the selection of it, an entry for each of its axes; None where
    there is none. With `plain` also None for numbers that are decoded further (scales, masks) or picked point by point.
    """
    array = variable._data  # the lazy array; `data` would read it
    while not hasattr(array, "key"):
        if plain and not isinstance(array, indexing.MemoryCachedArray | indexing.CopyOnWriteArray):
            return None
        array = getattr(array, "array", None)
        if array is None:
            return None
    if plain and not isinstance(array.key, indexing.BasicIndexer | indexing.OuterIndexer):
        return None
    return array.array, array.key.tuple


def _chunk(variable: xr.Variable, dim: str, position: int, ndim: int) -> int | None:
    for name in ("shards", "chunks", "chunksizes"):
        sizes = variable.encoding.get(name)
        if sizes is not None and len(sizes) == ndim:
            return int(sizes[position])
    if variable.encoding.get("contiguous"):
        return 1
    return variable.encoding.get("preferred_chunks", {}).get(dim)


class DaskBlocks:
    """A dask variable of which chunks are computed one by one.

    `Variable.isel(...).values` goes through the graph of the whole array every time: 50 ms and more for 1000 files. The
    graph is laid open once here, and only the chunks that a selection needs are computed, whole.
    """

    def __init__(self, variable: xr.Variable):
        self.variable, self.name = variable, variable.data.name
        self.edges = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in variable.chunks]
        self._graph: dict | None = None
        self._lock = threading.Lock()

    def isel(self, selection: Mapping[str, Any]) -> xr.Variable:
        """As `Variable.isel`, in memory."""
        inside, bounds = dict(selection), []
        for dim, ends in zip(self.variable.dims, self.edges, strict=True):
            chosen = np.arange(ends[-1])[selection.get(dim, slice(None))]
            if chosen.size == 0:
                return self.variable.isel(selection).compute()
            first = int(np.searchsorted(ends, chosen.min(), side="right")) - 1
            last = int(np.searchsorted(ends, chosen.max(), side="right"))
            bounds.append((first, last))
            shifted = chosen - int(ends[first])
            inside[dim] = ax.as_slice(shifted) if shifted.ndim else int(shifted)
        return xr.Variable(self.variable.dims, self._compute(bounds)).isel(inside)

    def _compute(self, bounds: list[tuple[int, int]]) -> np.ndarray:
        from dask.optimization import cull
        from dask.threaded import get

        places = list(itertools.product(*(range(first, last) for first, last in bounds)))
        keys = [(self.name, *place) for place in places]
        needed, _ = cull(self._opened(), keys)
        chunks = get(needed, keys)
        if len(chunks) == 1:
            return np.asarray(chunks[0])
        origin = [ends[first] for ends, (first, _) in zip(self.edges, bounds, strict=True)]
        shape = [ends[last] - ends[first] for ends, (first, last) in zip(self.edges, bounds, strict=True)]
        result = np.empty(shape, self.variable.dtype)
        for place, chunk in zip(places, chunks, strict=True):
            where = zip(self.edges, origin, place, strict=True)
            result[tuple(slice(ends[i] - start, ends[i + 1] - start) for ends, start, i in where)] = chunk
        return result

    def _opened(self) -> dict:
        with self._lock:
            if self._graph is None:
                self._graph = dict(self.variable.data.__dask_graph__())
        return self._graph
