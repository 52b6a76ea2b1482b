"""What a path opens to."""

import inspect
import os

import xarray as xr

from physml.data import joining, netcdf
from physml.data.formats import FORMATS, recognize
from physml.data.labelled import source_of
from physml.data.place import Place
from physml.errors import ConfigError, DataError, suggest


def read_files(path, format: str | None = None, rename: dict[str, str] | None = None, **options) -> xr.Dataset:
    """Opens a path lazily, with dimensions as in the file except that `trajectory` and `time` have those names."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"There is no data format {format!r}." + suggest(format, FORMATS))
    storage = options.get("storage_options")
    format = format or recognize(path, storage)
    if format is not None and FORMATS[format].recognizes is not None:
        ds = _read_benchmark(path, format, options)
    else:
        ds = _read_plain(netcdf.expand(path, storage), format, options)
    source = source_of(ds)
    if rename:
        if unknown := set(rename) - set(ds.variables) - set(ds.dims):
            raise DataError(
                f"{source} has no {min(unknown)!r} to rename." + suggest(min(unknown), [*ds.variables, *ds.dims])
            )
        try:
            ds = ds.rename(rename)
        except ValueError as error:  # xarray has one for every kind of clash
            raise DataError(
                f"{source} cannot be renamed by {rename}: {error}. Choose names that it does not have yet: it has "
                f"{', '.join(sorted({*map(str, ds.variables), *map(str, ds.dims)}))}."
            ) from error
    ds = netcdf.name_dimensions(ds)
    ds.encoding["source"] = source
    return ds


def _read_plain(files: list[str], format: str | None, options: dict) -> xr.Dataset:
    def opener(file):
        own = format or netcdf.detect(file, options.get("storage_options"))
        _check_options(own, options)
        return FORMATS[own].open(file, **options)

    if len(files) > 1:
        return joining.open_many(files, opener)
    ds = opener(files[0])
    ds.encoding["pieces"] = (joining.piece_of(files[0], netcdf.name_dimensions(ds)),)
    return ds


def _read_benchmark(path, format: str, options: dict) -> xr.Dataset:
    """The data set at one place."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"{format} is opened from one file or folder, but {path!r} was given.")
    place = Place(path, options.pop("storage_options", None))
    chunks = options.pop("chunks", None)
    _check_options(format, options)
    ds = FORMATS[format].open(place, **options)
    ds.attrs.setdefault("format", format)
    ds.encoding["source"] = str(place)
    return ds.chunk(chunks) if chunks else ds


def _check_options(format: str, options: dict) -> None:
    """Raises ConfigError for options that the format does not have."""
    _, *known = inspect.signature(FORMATS[format].open).parameters
    if unknown := set(options) - set(known):
        raise ConfigError(f"{format} has no option {min(unknown)!r}." + suggest(min(unknown), known))


def open_dataset(path, format: str | None = None, **options) -> xr.Dataset:
    """Opens data lazily: a file, a folder, a glob, a list of them, or an fsspec URL.

    netCDF and zarr: fields get dimensions `trajectory`, `time`, then space (names, order and direction as in the file);
    `time` is left out where the file has none. Several files are joined along time, or along trajectory where their
    times are equal. The formats of benchmarks: dimensions `trajectory, time, <space>` as far as the data have them,
    spatial ones named `x y z` or `level latitude longitude`, components as `velocity_x`.

    Args:
        path: where the data are.
        format: a key of `FORMATS`; told by the content when None.
        options: `rename={"old": "new"}` for dimensions and variables with unusual names, `storage_options` for URLs,
            `chunks` (dask; the chunks of the file by default); `decode_times=False` and `group` for netCDF and zarr;
            else those of the format, such as `split="train"`.

    Raises DataError when the path is missing, is of no known format, is damaged, or mixes grids.
    """
    ds = read_files(path, format, **options)
    source = source_of(ds)
    ds = ds if options.get("chunks") else netcdf.in_chunks(ds)
    if ds.attrs.get("format") not in FORMATS:
        ds = _with_leading(ds)
    ds.encoding["source"] = source
    return ds


def _with_leading(ds: xr.Dataset) -> xr.Dataset:
    """With dimensions `trajectory, time` before the others."""
    if "time" in ds.coords and ds["time"].ndim == 0:
        ds = ds.expand_dims("time")
    if "trajectory" not in ds.dims:
        fields = [n for n, v in ds.data_vars.items() if v.ndim and ("time" in v.dims or "time" not in ds.dims)]
        ds = ds.assign({name: ds[name].expand_dims("trajectory") for name in fields})
    leading = [dim for dim in ("trajectory", "time") if dim in ds.dims]
    return ds.transpose(*leading, ...)
