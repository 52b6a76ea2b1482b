"""The trajectories of many files as one lazy variable, and the axes that they share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from physml.data import axes as ax
from physml.errors import DataError


class Part(NamedTuple):
    """What one file holds of a variable.

    Attributes:
        source: the file, for messages.
        count: its trajectories.
        variable: dimensions `trajectory, ...`; without `trajectory` it is the same for all of them.
    """

    source: str
    count: int
    variable: xr.Variable


def join(name: str, parts: Sequence[Part]) -> xr.Variable:
    """One lazy variable with the trajectories of all parts in order. Shorter times are filled with NaN.

    Nothing is read, and opening costs nothing per file. A single part comes back as it is, without a trajectory
    dimension if it has none. Raises DataError, with two files, when dimensions or sizes differ.
    """
    first = parts[0]
    for part in parts[1:]:
        if _inner(part.variable) != _inner(first.variable):
            raise DataError(
                f"{part.source}: {name!r} has axes {_inner(part.variable)}, but {_inner(first.variable)} in "
                f"{first.source}. Files of one data set must be on one grid; open them one by one otherwise."
            )
    if len(parts) == 1:
        return first.variable
    dims = ("trajectory", *(dim for dim in first.variable.dims if dim != "trajectory"))
    data = indexing.LazilyIndexedArray(_Joined(dims, parts))
    chunks = {k: n for k, n in first.variable.encoding.get("preferred_chunks", {}).items() if k in dims}
    encoding = {"preferred_chunks": {"trajectory": 1, **chunks}} if chunks else {}
    if all(part.variable.encoding.get("contiguous") for part in parts):
        encoding["contiguous"] = True
    return xr.Variable(dims, data, dict(first.variable.attrs), encoding)


def axis(dim: str, table: str, rows: Sequence[np.ndarray], attrs: dict | None = None) -> dict[str, xr.Variable]:
    """The coordinate of a dimension from its positions in every trajectory, of which shorter ones may break off early.

    Where trajectories differ there is no coordinate, but a variable `table` with dimensions `(trajectory, dim)`, NaN
    after the end of a shorter one.
    """
    longest = max(rows, key=len)
    different = {id(row): row for row in rows}  # trajectories of one file have the same row
    if all(_alike(row, longest[: len(row)]) for row in different.values()):
        return {dim: xr.Variable((dim,), longest, attrs)}
    values = np.full((len(rows), len(longest)), np.nan)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row if row.dtype.kind in "iufb" else np.arange(len(row))
    return {table: xr.Variable(("trajectory", dim), values, attrs)}


def frames(lengths: Sequence[int]) -> dict[str, xr.Variable]:
    """The variable `frames(trajectory)`, the real frames of every trajectory; nothing where all are equal."""
    if len(set(lengths)) < 2:
        return {}
    attrs = {"long_name": "number of frames; NaN comes after them"}
    return {"frames": xr.Variable(("trajectory",), np.array(lengths, np.int64), attrs)}


def _inner(variable: xr.Variable) -> dict[str, int | str]:
    return {str(d): "any" if d == "time" else n for d, n in variable.sizes.items() if d != "trajectory"}


def _alike(row: np.ndarray, other: np.ndarray) -> bool:
    if row is other or np.array_equal(row, other):
        return True
    if row.dtype.kind not in "iufb" or other.dtype.kind not in "iufb":
        return False
    step = np.abs(np.diff(other)).max(initial=0.0)
    return np.allclose(row, other, rtol=1e-6, atol=1e-3 * step if np.isfinite(step) else 0.0)


class _Joined(BackendArray):
    def __init__(self, dims: tuple[str, ...], parts: Sequence[Part]):
        self.parts = [part.variable for part in parts]
        self.ends = np.cumsum([part.count for part in parts])
        self.time = dims.index("time") if "time" in dims else None
        sizes = {dim: max(part.sizes.get(dim, 0) for part in self.parts) for dim in dims[1:]}
        self.shape = (int(self.ends[-1]), *sizes.values())
        lengths = {part.sizes.get("time") for part in self.parts}
        dtype = np.result_type(*(part.dtype for part in self.parts))
        self.dtype = np.result_type(dtype, np.float32) if len(lengths) > 1 else dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        wanted = [np.arange(size)[k] for size, k in zip(self.shape, key, strict=True)]
        single = tuple(0 if index.ndim == 0 else slice(None) for index in wanted)
        wanted = [np.atleast_1d(index) for index in wanted]
        result = np.zeros([len(index) for index in wanted], self.dtype)
        if self.dtype.kind == "f":
            result[...] = np.nan
        owners = np.searchsorted(self.ends, wanted[0], side="right")
        for owner in np.unique(owners):
            part = self.parts[owner]
            rows = np.flatnonzero(owners == owner)
            places = [rows, *(np.arange(len(index)) for index in wanted[1:])]
            if self.time is not None:
                places[self.time] = np.flatnonzero(wanted[self.time] < part.sizes["time"])
            if any(len(place) == 0 for place in places):
                continue
            inside = [index[place] for index, place in zip(wanted, places, strict=True)]
            inside[0] = inside[0] - (self.ends[owner - 1] if owner else 0)
            if "trajectory" not in part.dims:
                del inside[0]
            result[np.ix_(*places)] = part[tuple(map(ax.as_slice, inside))].values
        return result[single]
