"""Variables computed from lazy variables, as lazy as those."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing


def derive(
    function: Callable[..., xr.Variable],
    parts: Sequence[xr.Variable],
    like: xr.Variable,
    dims: Sequence[str] = (),
    attrs: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> xr.Variable:
    """`function` of what is read of `parts`: a lazy variable of the size of `like`, its dimensions in the order `dims`.

    The function acts point by point, since it is given any region; dimensions that its result lacks are filled up.
    """
    sizes = {str(dim): like.sizes[dim] for dim in dims or like.dims}
    data = indexing.LazilyIndexedArray(_Derived(function, parts, sizes, np.dtype(dtype)))
    return xr.Variable(tuple(sizes), data, dict(attrs or {}), dict(like.encoding))


class _Derived(BackendArray):
    def __init__(self, function: Callable, parts: Sequence[xr.Variable], sizes: dict[str, int], dtype: np.dtype):
        self.function, self.parts, self.sizes, self.dtype = function, parts, sizes, dtype
        self.shape = tuple(sizes.values())

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        index = dict(zip(self.sizes, key, strict=True))
        parts = [part.isel({dim: index[str(dim)] for dim in part.dims}) for part in self.parts]
        with np.errstate(over="ignore", invalid="ignore"):  # as for any other field, inf and NaN are found by readers
            result = self.function(*(xr.Variable(part.dims, part.values) for part in parts))
        chosen = {dim: np.arange(self.sizes[dim])[k] for dim, k in index.items()}
        kept = {dim: numbers.size for dim, numbers in chosen.items() if numbers.ndim}
        return np.asarray(result.set_dims(kept).values, self.dtype)
