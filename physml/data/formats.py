"""The formats that `physml.open_dataset` reads: one module and one line each.

A format of a benchmark is a function `open_dataset(place, **options) -> xr.Dataset` and a function `recognizes(place)`
that looks at names and small headers only. Both take a `Place`; what `open_dataset` promises is written at
`physml.data.open_dataset`. Plain GRIB, netCDF and zarr come last and take single files (several: `joining.open_many`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr

from physml.data import (
    carbonbench,
    cfdbench,
    graphcast,
    grib,
    jax_cfd,
    merra2,
    netcdf,
    pdearena,
    pdebench,
    poseidon,
    the_well,
    weatherbench,
)
from physml.data.place import Place
from physml.errors import DataError


@dataclass(frozen=True)
class Format:
    """How one format is opened, and how it is recognized by its content (None: by its signature alone).

    Attributes:
        open: `(place, **options)` for benchmarks, `(path, **options)` for plain files.
        recognizes: whether a place, which exists, is of this format.
    """

    open: Callable[..., xr.Dataset]
    recognizes: Callable[[Place], bool] | None = None


FORMATS: dict[str, Format] = {
    "carbonbench": Format(carbonbench.open_dataset, carbonbench.recognizes),
    "cfdbench": Format(cfdbench.open_dataset, cfdbench.recognizes),
    "pdebench": Format(pdebench.open_dataset, pdebench.recognizes),
    "weatherbench2": Format(weatherbench.open_dataset, weatherbench.recognizes),
    "poseidon": Format(poseidon.open_dataset, poseidon.recognizes),
    "pdearena": Format(pdearena.open_dataset, pdearena.recognizes),
    "the_well": Format(the_well.open_dataset, the_well.recognizes),
    "jax_cfd": Format(jax_cfd.open_dataset, jax_cfd.recognizes),
    "graphcast": Format(graphcast.open_dataset, graphcast.recognizes),
    "merra2": Format(merra2.open_dataset, merra2.recognizes),
    "grib": Format(grib.open_grib),
    "netcdf": Format(netcdf.open_netcdf),
    "zarr": Format(netcdf.open_zarr),
}


def recognize(path, storage_options: dict | None = None) -> str | None:
    """The benchmark format of what lies at a path, or None: then it is a plain file, several files, or nothing."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        return None
    place = Place(path, storage_options)
    if not place.is_folder() and not place.is_file():
        return None
    for name, format in FORMATS.items():
        try:
            if format.recognizes is not None and format.recognizes(place):
                return name
        except DataError:  # a damaged file is reported by the reader that it falls to
            continue
    return None
