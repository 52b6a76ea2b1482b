"""Zarr stores of benchmarks, folders or zip files: a header read without opening them, limits checked before anything
is unpacked, and fields whose damage is a DataError.

A zip file is never extracted. It may hold the store itself or one folder that is the store.
"""

import json
import math
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xarray as xr

from physml.data import netcdf
from physml.data.guarded import guarded
from physml.data.hdf5 import LARGEST_CHUNK, SMALL
from physml.data.place import SMALL as SMALL_TEXT
from physml.data.place import Place
from physml.errors import DataError, first_line

CONSOLIDATED = (".zmetadata", "zarr.json")


@dataclass(frozen=True)
class Array:
    """What the header says of one array: `dtype` is its text in the file, `filters` the names of the codecs."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    filters: tuple[str, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one entry; 8, those of a pointer, where they vary."""
        try:
            return max(np.dtype(self.dtype).itemsize, 1)
        except (TypeError, ValueError, SyntaxError):
            return 8


def header(place: Place) -> dict[str, Array]:
    """Name -> array from the consolidated metadata of a store (v2 or v3); empty for anything else.

    Raises DataError when the metadata are damaged.
    """
    if place.is_folder():
        files = {name: place.below(name) for name in CONSOLIDATED}
    elif place.is_file() and (inner := _inside(place)) is not None:
        files = {name: Place(*_zip_url(place, f"{inner}/{name}".lstrip("/"))) for name in CONSOLIDATED}
    else:
        return {}
    for name in CONSOLIDATED:
        if files[name].is_file():
            return _parse(files[name])
    return {}


def open_store(place: Place) -> xr.Dataset:
    """A store with lazy fields and times decoded, dimensions as in the file.

    Raises DataError when it is missing, damaged, no zarr store, or larger where it must be small: coordinates above
    128 MiB, chunks above 2 GiB, members of a zip file larger than what their array needs.
    """
    path, options = place.path, place.storage_options
    if not place.is_folder() and place.is_file():
        inner = _inside(place)
        if inner is None:
            raise DataError(f"{place} is neither a zarr store nor a zip file of one.")
        _check_members(place, inner)
        path, options = _zip_url(place, inner)
    arrays = header(place)
    for name, array in arrays.items():
        _check_array(place, name, array)
    ds = guarded(netcdf.open_zarr(path, storage_options=options), str(place))
    ds.encoding["source"] = str(place)
    return ds


def _parse(file: Place) -> dict[str, Array]:
    try:
        content = json.loads(file.read())
        if file.name() == ".zmetadata":
            metadata = content["metadata"]
            return {
                path[: -len("/.zarray")]: _version_2(array, metadata.get(path[: -len("array")] + "attrs", {}))
                for path, array in metadata.items()
                if path.endswith("/.zarray")
            }
        metadata = (content.get("consolidated_metadata") or {}).get("metadata", {})
        return {path: _version_3(array) for path, array in metadata.items() if array["node_type"] == "array"}
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of JSON, of the shape of its content, of zip and zlib
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {first_line(error)}). Copy or download it again."
        ) from error


def _version_2(array: dict, attrs: dict) -> Array:
    filters = tuple(str(codec["id"]) for codec in array.get("filters") or ())
    dims = tuple(map(str, attrs.get("_ARRAY_DIMENSIONS", ())))
    return Array(dims, _sizes(array["shape"]), _sizes(array["chunks"]), str(array["dtype"]), filters)


def _version_3(array: dict) -> Array:
    kind = array["data_type"]
    codecs = tuple(str(codec["name"]) for codec in array.get("codecs", ()))
    chunks = _sizes(array["chunk_grid"]["configuration"]["chunk_shape"])
    dims = tuple(map(str, array.get("dimension_names") or ()))
    return Array(dims, _sizes(array["shape"]), chunks, kind if isinstance(kind, str) else str(kind["name"]), codecs)


def _sizes(numbers: Iterable) -> tuple[int, ...]:
    result = tuple(int(number) for number in numbers)
    if any(number < 0 for number in result):
        raise ValueError(f"negative sizes {result}")
    return result


def _check_array(place: Place, name: str, array: Array) -> None:
    if "O" in array.dtype and "vlen-utf8" not in array.filters:
        raise DataError(f"{place}: {name!r} holds objects or pickles, which are never opened. Write plain numbers.")
    if math.prod(array.chunks) * array.itemsize > LARGEST_CHUNK:
        raise DataError(f"{place}: one chunk of {name!r} unpacks to more than {LARGEST_CHUNK} bytes.")
    if array.dims == (name,) and math.prod(array.shape) * array.itemsize > SMALL:
        raise DataError(f"{place}: the coordinate {name!r} has {array.shape[0]} entries, which is too many.")


# --- zip files --------------------------------------------------------------------------------------------------------


@contextmanager
def _archive(place: Place):
    with place.opened() as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{place} is a damaged zip file ({first_line(error)}). Copy or download it again."
            ) from error


def _inside(place: Place) -> str | None:
    """The folder of a zip file that is a zarr store ("" for its top); None where there is no zip file or store."""
    with place.opened() as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    with _archive(place) as archive:
        names = archive.namelist()
    roots = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in (".zgroup", *CONSOLIDATED)}
    outermost = min(roots, key=lambda root: (root.count("/") + bool(root), root), default=None)
    return outermost if outermost is not None and (outermost == "" or "/" not in outermost) else None


def _zip_url(place: Place, member: str) -> tuple[str, dict | None]:
    """A member of a zip file as a URL, and the storage options for it."""
    protocol = place.path.split("://")[0] if netcdf.is_url(place.path) else "file"
    return f"zip://{member}::{place.path}", {protocol: place.storage_options} if place.storage_options else None


def _check_members(place: Place, inner: str) -> None:
    """Raises DataError for members that are encrypted, lead out, come twice, or unpack to more than their array can
    hold: a header that promises gigabytes is never followed.
    """
    arrays = header(place)
    with _archive(place) as archive:
        members = archive.infolist()
    seen = set()
    for member in members:
        name = member.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or name in seen:
            raise DataError(f"{place} holds {name!r}, which is no name of a zarr store or comes twice.")
        seen.add(name)
        if member.flag_bits & 1:
            raise DataError(f"{place}: {name!r} is encrypted. Store it plainly.")
        own = name[len(inner) + 1 :] if inner else name
        array = next((arrays[key] for key in (own.rpartition("/")[0], own.partition("/")[0]) if key in arrays), None)
        limit = SMALL_TEXT
        if array is not None and not own.rpartition("/")[2].startswith((".z", "zarr.json")):
            limit = 2 * math.prod(array.chunks) * array.itemsize + 2**20  # no codec makes a chunk much longer
        elif not arrays:
            limit = LARGEST_CHUNK
        if member.file_size > limit:
            raise DataError(
                f"{place}: {name!r} unpacks to {member.file_size} bytes, but at most {limit} were expected."
            )
