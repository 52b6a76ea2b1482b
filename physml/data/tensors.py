"""Local arrays that several threads decode at once: zarr by TensorStore, HDF5 by `physml.data.hdf5_chunks`.

zarr's own reader hands every chunk through an event loop and the interpreter, which for chunks below a megabyte takes
longer than decoding them, and keeps other threads of the program waiting; h5py lets one thread work.
"""

from typing import Any

import numpy as np
import xarray as xr
from xarray.backends.netCDF4_ import NetCDF4ArrayWrapper
from xarray.core import indexing

from physml.data.blocks import backend
from physml.data.guarded import Guarded
from physml.data.hdf5_chunks import Array, Chunks, by_h5py, open_chunks


def locate(variable: xr.Variable) -> tuple[Any, tuple] | None:
    """The zarr or HDF5 array behind a lazy variable and the selection of it; None for anything else, and for numbers
    that are decoded further (scales, masks, times).
    """
    found = backend(variable, plain=True)
    while found is not None and isinstance(found[0], Guarded):
        found = backend(found[0].variable[found[1]], plain=True)
    if found is None or isinstance(found[0], Array | NetCDF4ArrayWrapper):
        return found
    return (found[0]._array, found[1]) if type(found[0]).__name__ == "ZarrArrayWrapper" else None


def open_array(array: Any) -> Any | None:
    """A local array as a `tensorstore.TensorStore` or `Chunks`, else one of h5py; None where it is elsewhere, or coded
    in a way that they do not know.
    """
    if isinstance(array, NetCDF4ArrayWrapper):
        array = by_h5py(array)
    if array is None:
        return None
    if isinstance(array, Array):
        chunks = open_chunks(array)
        return array if chunks is None else chunks
    import tensorstore
    from zarr.storage import LocalStore

    store, path = array.store_path.store, array.store_path.path
    if not isinstance(store, LocalStore) or array.dtype.kind not in "iuf":
        return None
    driver = "zarr" if array.metadata.zarr_format == 2 else "zarr3"
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{store.root}/{path}"}}
    try:
        opened = tensorstore.open(spec, read=True, open=True).result()
    except (ValueError, NotImplementedError, OSError):  # zarr itself opened it, and will say what is wrong
        return None
    same = opened.shape == array.shape and np.dtype(opened.dtype.numpy_dtype) == array.dtype.newbyteorder("=")
    return opened if same else None


def read(opened: Any, key: tuple) -> np.ndarray:
    """The selection, as numpy indexes one axis after another. Raises ValueError for chunks that cannot be decoded."""
    if isinstance(opened, Chunks):
        values = opened.read(key)
        if values is not None:
            return values
        opened = opened.array
    if isinstance(opened, Array):
        return np.asarray(opened[indexing.OuterIndexer(key)])
    return opened.oindex[key].read(order="C").result()
