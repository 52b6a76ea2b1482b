"""Local arrays that several threads decode at once: zarr by TensorStore, netCDF-4 by `physml.data.hdf5_chunks`.

zarr's own reader hands every chunk through an event loop and the interpreter, which for chunks below a megabyte takes
longer than decoding them, and keeps other threads of the program waiting; the netCDF library lets one thread work.
"""

from typing import Any

import numpy as np
import xarray as xr

from physml.data.blocks import backend
from physml.data.guarded import Guarded
from physml.data.hdf5_chunks import Chunks, open_chunks


def locate(variable: xr.Variable) -> tuple[Any, tuple] | None:
    """The zarr or netCDF array behind a lazy variable and the selection of it; None for anything else, and for numbers
    that are decoded further (scales, masks, times).
    """
    found = backend(variable, plain=True)
    while found is not None and isinstance(found[0], Guarded):
        found = backend(found[0].variable[found[1]], plain=True)
    kind = None if found is None else type(found[0]).__name__
    if kind == "ZarrArrayWrapper":
        return found[0]._array, found[1]
    return found if kind == "NetCDF4ArrayWrapper" else None


def open_array(array: Any) -> Any | None:
    """A local array as a `tensorstore.TensorStore` or `Chunks`; None where it is elsewhere, or coded in a way that they
    do not know.
    """
    if hasattr(array, "datastore"):
        return open_chunks(array)
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


def read(opened: Any, key: tuple) -> np.ndarray | None:
    """The selection, as numpy indexes one axis after another; None where only the library of the format can make it.

    Raises ValueError for chunks that cannot be decoded.
    """
    if isinstance(opened, Chunks):
        return opened.read(key)
    return opened.oindex[key].read(order="C").result()
