"""Lazy fields of any backend whose damage is told as DataError, when it is met."""

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from physml.errors import DataError, first_line


def guarded(ds: xr.Dataset, source: str) -> xr.Dataset:
    """The same dataset; reading a damaged part of a field raises DataError with the source and the name of the field.

    Coordinates of dimensions, which are in memory already, stay as they are.
    """
    variables = {}
    for name, variable in ds.variables.items():
        if variable.dims != (name,):
            data = indexing.LazilyIndexedArray(Guarded(variable, f"{source}: {name!r}"))
            layout = {key: value for key, value in variable.encoding.items() if key == "preferred_chunks"}
            variables[name] = xr.Variable(variable.dims, data, variable.attrs, layout)
    result = ds.assign({n: v for n, v in variables.items() if n in ds.data_vars})
    result = result.assign_coords({n: v for n, v in variables.items() if n in ds.coords})
    result.encoding = dict(ds.encoding)
    return result


class Guarded(BackendArray):
    def __init__(self, variable: xr.Variable, label: str):
        self.variable, self.label, self.shape, self.dtype = variable, label, variable.shape, variable.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        try:
            return np.asarray(self.variable[key].values)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # every backend and codec has its own exceptions
            raise DataError(
                f"{self.label} cannot be read: the file is damaged or incomplete ({type(error).__name__}: "
                f"{first_line(error)}). Copy, download or generate it again."
            ) from error
