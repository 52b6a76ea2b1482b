"""Arrays of one shape, one per trajectory, each in a file or group of its own, as one lazy variable."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from physml.data import netcdf


def stack(
    count: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    dims: Sequence[str],
    read: Callable[[int, int, int], np.ndarray],
    attrs: Mapping[str, Any] | None = None,
) -> xr.Variable:
    """A lazy variable with dimensions `trajectory`, then `dims` (the first is time).

    Args:
        count: trajectories. shape: of one of them.
        read: `(trajectory, start, stop)` -> the frames start..stop of it; raises DataError. Called by several threads.
    """
    data = indexing.LazilyIndexedArray(_Members((count, *shape), np.dtype(dtype), read))
    together = max(1, netcdf.CHUNK_BYTES // max(1, math.prod(shape) * np.dtype(dtype).itemsize))
    encoding = {"preferred_chunks": {"trajectory": min(count, together)}}
    return xr.Variable(("trajectory", *dims), data, dict(attrs or {}), encoding)


class _Members(BackendArray):
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[int, int, int], np.ndarray]):
        self.shape, self.dtype, self.read = shape, dtype, read

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple) -> np.ndarray:
        chosen = [np.arange(size)[part] for size, part in zip(self.shape, key, strict=True)]
        members, frames, *space = (np.atleast_1d(part) for part in chosen)
        result = np.empty((len(members), len(frames), *map(len, space)), self.dtype)
        if result.size:
            start, stop = int(frames.min()), int(frames.max()) + 1
            inside = np.ix_(frames - start, *space)
            for at, member in enumerate(members.tolist()):
                result[at] = self.read(member, start, stop)[inside]
        return result.reshape([part.size for part in chosen if part.ndim])
