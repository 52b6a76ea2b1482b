"""CarbonBench: global transport of CO2, CarbonTracker fields in zarr (Hugging Face vitusbenson/carbonbench).

A store holds two arrays, `variables_2d (time, vari_2d, lat, lon)` and `variables_3d (time, vari_3d, level, lat, lon)`,
whose entries are the fields that the text coordinates `vari_2d` and `vari_3d` name. Stores come as folders or as zip
files (`.zarr.zip`), which are read where they are, never unpacked.
"""

import numpy as np
import xarray as xr

from physml.data import netcdf, zarrs
from physml.data.globe import RENAMED, check_ascending, label_space, renamed
from physml.data.hdf5 import component
from physml.data.place import Place
from physml.errors import ConfigError, DataError, suggest

ARRAYS = {"variables_2d": "vari_2d", "variables_3d": "vari_3d"}
FOLDERS = {"train": "train", "valid": "val", "test": "test"}
SUFFIXES = (".zarr", ".zarr.zip")
PREFIX = "carbontracker_"  # others are samples at stations (obs_carbontracker_*)
UNITS = {
    "co2massmix": "1e-6 kg kg-1", "airmass": "Pg", "p_bottom": "hPa", "p_top": "hPa", "gph_bottom": "km",
    "gph_top": "km", "co2flux_land": "kg m-2 s-1", "co2flux_ocean": "kg m-2 s-1", "co2flux_anthro": "kg m-2 s-1",
}  # fmt: skip


def recognizes(place: Place) -> bool:
    """Whether a place is a store (folder or zip file) with the arrays of CarbonBench, or a folder of its splits."""
    if any(dim in array.dims for array in zarrs.header(place).values() for dim in ARRAYS.values()):
        return True
    names = [name for name in FOLDERS.values() if _is_folder_of_splits(place, name)]
    return bool(names) and recognizes(_stores(place.below(names[0]))[0])


def open_dataset(place: Place, *, split: str | None = None, store: str | None = None) -> xr.Dataset:
    """Fields `time[, level], latitude, longitude` by name, lazily.

    `level` counts layers, 0 being the one at the surface. `co2massmix` is in 1e-6 kg kg-1 and `airmass` in Pg, so that
    the mass of CO2 in Pg is the sum of co2massmix * 1e-6 * airmass. `cell_area` and `orography` are stored with time.
    A store of statistics (`*_stats.zarr`) has the dimension `stats` (min, mean, max, std) instead of space and time;
    beside a field v it has v_next and v_delta, its difference over one step.

    Args:
        place: one store, or the folder that holds the folders train, val and test.
        split: "train" (to 2016), "valid" (2017) or "test" (2018 to 2020), for a folder of splits. All of them are
            joined along time when None, with a coordinate `split` on time.
        store: the name of the store, such as "carbontracker_latlon5.625_l10_6h", where a folder has several.

    Raises DataError for damaged stores and zip files, for names that repeat or are absent, and where splits differ.
    """
    if split is not None and split not in FOLDERS:
        raise ConfigError(f"carbonbench has no split {split!r}." + suggest(split, FOLDERS))
    folders = {own: name for own, name in FOLDERS.items() if _is_folder_of_splits(place, name)}
    if not folders:
        if split is not None or store is not None:
            raise ConfigError(f"{place} is one store. Give the folder that holds train, val and test to choose one.")
        return _open(place)
    if split is not None:
        if split not in folders:
            raise DataError(f"{place} has no folder {FOLDERS[split]!r}, so no split {split!r}. Download it.")
        return _open(_choose(place.below(folders[split]), store))
    parts = {own: _open(_choose(place.below(name), store)) for own, name in folders.items()}
    return _join(parts, place)


def _is_folder_of_splits(place: Place, name: str) -> bool:
    return place.is_folder() and (folder := place.below(name)).is_folder() and bool(_stores(folder))


def _stores(folder: Place) -> list[Place]:
    names = [n for n in folder.names() if n.startswith(PREFIX) and n.endswith(SUFFIXES) and "_stats." not in n]
    return [folder.below(name) for name in names]


def _choose(folder: Place, name: str | None) -> Place:
    stores = {store.name().removesuffix(".zip").removesuffix(".zarr"): store for store in _stores(folder)}
    if name is None and len(stores) == 1:
        return next(iter(stores.values()))
    if name not in stores:
        raise DataError(f"{folder} holds no store {name!r}: give `store`." + suggest(str(name), stores))
    return stores[name]


def _open(place: Place) -> xr.Dataset:
    ds = zarrs.open_store(place)
    present = [name for name, variable in ds.data_vars.items() if set(variable.dims) & set(ARRAYS.values())]
    if not present:
        raise DataError(f"{place} has neither of the arrays {tuple(ARRAYS)}." + suggest("variables_3d", ds.data_vars))
    ds = renamed(ds, RENAMED)
    if "level" in ds.dims:
        numbers = ds["level"].variable if "level" in ds.variables else np.arange(ds.sizes["level"])
        ds = ds.assign_coords(
            level=("level", np.asarray(numbers), {"units": "1", "long_name": "layer, 0 at the surface"})
        )
    fields: dict[str, xr.Variable] = {}
    for array in present:
        for name, field in _fields(ds, array, place).items():
            if name in fields or name in ds.coords or name in ds.dims:
                raise DataError(f"{place} names two arrays {name!r}. Copy or download it again.")
            fields[name] = field
    ds = ds.drop_vars([*present, *(name for name in ARRAYS.values() if name in ds.coords)]).assign(fields)
    if "stats" not in ds.dims:
        ds = label_space(ds, place)
        check_ascending(ds, "time", place)
        ds = ds.transpose("time", ...)
    ds.attrs = {"title": "CarbonBench", "source": "https://huggingface.co/datasets/vitusbenson/carbonbench", **ds.attrs}
    return ds


def _fields(ds: xr.Dataset, array: str, place: Place) -> dict[str, xr.Variable]:
    """The entries of one array by name. Raises DataError when names are absent, no text, or repeat."""
    variable = ds.variables[array]
    dim = next(dim for dim in ARRAYS.values() if dim in variable.dims)
    if dim not in ds.variables or ds.variables[dim].dims != (dim,):
        raise DataError(f"{place} has no coordinate {dim!r}, so the fields of {array!r} have no names.")
    labels = np.asarray(ds.variables[dim].values).tolist()
    names = [label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in labels]
    if not all(isinstance(name, str) and name.strip() and "/" not in name for name in names):
        raise DataError(f"{place}: {dim!r} holds {names[:5]}, but names of fields were expected.")
    if len(set(names)) < len(names):
        raise DataError(f"{place}: {dim!r} names a field twice: {sorted(n for n in names if names.count(n) > 1)[0]!r}.")
    fields = {name: component(variable, dim, i) for i, name in enumerate(names)}
    for name, field in fields.items():
        base = name.removesuffix("_next").removesuffix("_delta")
        field.attrs = {**({"units": UNITS[base]} if base in UNITS else {}), **variable.attrs}
    return fields


def _join(parts: dict[str, xr.Dataset], place: Place) -> xr.Dataset:
    first = next(iter(parts.values()))
    for name, ds in parts.items():
        same = all(np.array_equal(ds[dim], first[dim]) for dim in ("latitude", "longitude"))
        if not same or set(ds.data_vars) != set(first.data_vars) or ds.sizes.get("level") != first.sizes.get("level"):
            raise DataError(
                f"{place}: the splits {next(iter(parts))!r} and {name!r} differ in grid or variables. Choose one "
                "with `split`, or stores of one kind with `store`."
            )
    labelled = [
        netcdf.in_chunks(ds).assign_coords(split=("time", np.full(ds.sizes["time"], name)))
        for name, ds in parts.items()
    ]
    same = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "join": "override"}
    joined = xr.concat(labelled, "time", combine_attrs="override", **same)
    check_ascending(joined, "time", place)
    return joined
