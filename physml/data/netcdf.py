"""Opening netCDF (classic, 64-bit, HDF5) and zarr (v2, v3, zipped): a file, a folder, a glob, a list, or an fsspec URL.

The format is told by the content, not by the name. Opening reads metadata and coordinates only. Nothing in a file is
executed: zarr arrays coded as pickles are refused.
"""

import glob
import math
import os
import uuid
import warnings
from contextlib import contextmanager

import xarray as xr

from physml.data import axes as ax
from physml.data.classic import check_length
from physml.data.hdf5_chunks import Netcdf4
from physml.data.heaps import HEAD, check_heaps
from physml.data.remote import file_system, is_there, is_url, open_file, zarr_store
from physml.errors import DataError, PhysmlError, first_line, suggest_path

HDF5 = b"\x89HDF\r\n\x1a\n"
GRIB = b"GRIB"
ZARR_FILES = ("zarr.json", ".zgroup", ".zmetadata", ".zarray")
CHUNK_BYTES = 8 * 2**20


def detect(path: str, storage_options: dict | None = None) -> str:
    """ "netcdf", "grib" or "zarr", by content. Raises DataError when the path is missing or is none of them."""
    if is_zarr(path, storage_options):
        return "zarr"
    return "grib" if magic(path, storage_options) == GRIB else "netcdf"


def open_netcdf(path: str, *, chunks=None, group: str | None = None, decode_times: bool = True, storage_options=None):
    """One netCDF file, lazily. `group` is a group inside the file."""
    signature = magic(path, storage_options)
    if signature == GRIB:
        raise DataError(f"{path} is GRIB, not netCDF. Leave out format='netcdf'.")
    options = {"chunks": chunks, "decode_times": decode_times, "cache": False}
    if is_url(path):
        engine = "h5netcdf" if signature == HDF5 else "scipy"
        target = open_file(path, storage_options)
        return guarded_open(path, lambda: xr.open_dataset(target, engine=engine, group=group, **options))
    if signature == HDF5:
        whole = os.path.abspath(path)
        ds = guarded_open(path, lambda: xr.open_dataset(Netcdf4.open(whole, group=group), **options))
        ds.encoding["source"] = whole  # as xarray says it of other files
        return ds
    check_length(path)
    return guarded_open(path, lambda: xr.open_dataset(path, engine="netcdf4", group=group, **options))


def open_zarr(path: str, *, chunks=None, group: str | None = None, decode_times: bool = True, storage_options=None):
    """One zarr store (folder, zip file or URL), lazily. `group` is a group inside the store."""
    if not is_zarr(path, storage_options):
        magic(path, storage_options)  # says what is wrong with the path
        raise DataError(f"{path} is a netCDF file, not a zarr store. Leave out format='zarr'.")
    import zarr

    target = path
    if not is_url(path) and os.path.isfile(path):
        target, storage_options = zarr.storage.ZipStore(path, mode="r"), None
    elif is_url(path) and (kept := zarr_store(path, storage_options, _header(path, storage_options))) is not None:
        target, storage_options = kept, None
    options = {"group": group, "chunks": chunks, "decode_times": decode_times, "storage_options": storage_options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to open Zarr store with consolidated")
        ds = guarded_open(path, lambda: xr.open_zarr(target, **options))
        where = {"path": group or "", "storage_options": storage_options}
        listed = guarded_open(path, lambda: zarr.open_group(target, mode="r", **where)).metadata.consolidated_metadata
    if listed is not None:
        return ds
    # Without a list of its own, variables come in the order in which the store happened to answer.
    ordered = ds.drop_vars(list(ds.data_vars)).assign({name: ds[name] for name in sorted(ds.data_vars, key=str)})
    ordered.encoding = ds.encoding
    return ordered


def expand(path, storage_options: dict | None = None) -> list[str]:
    """The files and stores that a path means, sorted. Raises DataError when there are none."""
    if isinstance(path, list | tuple):
        if not path:
            raise DataError("The list of files is empty. Give at least one path.")
        return [file for item in path for file in expand(item, storage_options)]
    path = os.fspath(path)
    if not path:
        raise DataError("The path of the data is empty. Give a file, a folder, a glob or a URL.")
    if is_url(path):
        return _expand_url(path, storage_options)
    path = os.path.expanduser(path)
    if not os.path.exists(path) and glob.has_magic(path):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise DataError(f"No file matches {path!r}. Check the pattern; ** stands for any folders.")
        return files
    if os.path.isdir(path) and not is_zarr(path, None):
        return _expand_folder(path)
    return [path]


def in_chunks(ds: xr.Dataset) -> xr.Dataset:
    """Fields as dask arrays: in the chunks of the file, or, where it has none, in runs of frames of about 8 MiB."""
    result = ds.copy()
    for name, variable in result.data_vars.items():
        if variable.ndim and not variable.chunks:
            own = variable.encoding.get("preferred_chunks")
            if not own or not {*own} <= {*variable.dims}:  # those of the file may have been renamed
                own = _runs(ds, variable)
            # A name of our own: dask would read the whole variable to make one from its content. Data are replaced in
            # place, because assigning variables would align them with the others, for every file of many.
            result.variables[name].data = variable.variable.chunk(own, name=f"{name}-{uuid.uuid4().hex}").data
    return result


def _runs(ds: xr.Dataset, variable: xr.DataArray) -> dict[str, int]:
    dims = [d for d in variable.dims if ax.role(ds, d) in ("time", "trajectory")]
    chunks = {d: 1 for d in dims}
    room = max(1, CHUNK_BYTES * math.prod(variable.sizes[d] for d in dims) // max(variable.nbytes, 1))
    for dim in reversed(dims):
        chunks[dim] = int(min(room, variable.sizes[dim]))
        room = max(1, room // chunks[dim])
    return chunks


def name_dimensions(ds: xr.Dataset) -> xr.Dataset:
    """Calls the dimension of trajectories `trajectory` and that of time `time`, where those names are free."""
    rename = {}
    for target in ("trajectory", "time"):
        if target in ds.dims:
            continue
        same = [d for d in ds.dims if ax.role(ds, d) == target and d not in ("lead", "lead_time")]
        if len(same) == 1 and target not in ds.variables:
            rename[same[0]] = target
    if not rename:
        return ds
    result = ds.rename(rename)
    for variable in result.variables.values():
        if chunks := variable.encoding.get("preferred_chunks"):
            own = {rename.get(dim, dim): size for dim, size in chunks.items()}
            variable.encoding = {**variable.encoding, "preferred_chunks": own}
    return result


# --- one path ---------------------------------------------------------------------------------------------------------


def guarded_open(path: str, read):
    try:
        ds = read()
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # every backend has its own exceptions
        if "pickle" in str(error):  # zarr refuses them; decoding one could run code
            raise DataError(
                f"{path} holds arrays coded as pickles, which are never opened. Write plain numbers."
            ) from error
        if "decode time" in str(error) or "since" in str(error):
            raise DataError(
                f"{path}: the time axis cannot be decoded: {error} Correct its `units` (such as 'days since "
                "2000-01-01') or "
                "pass decode_times=False to use it as plain numbers."
            ) from error
        if isinstance(error, OSError) and "group" in str(error).lower() and "not" in str(error).lower():
            raise DataError(f"{path}: {error}.") from error
        raise DataError(
            f"{path} cannot be opened: it is damaged or incomplete ({type(error).__name__}: {first_line(error)}). "
            "Copy, download or generate it again."
        ) from error
    if isinstance(ds, xr.Dataset):
        ds.encoding.setdefault("source", str(path))
    return ds


def is_zarr(path: str, storage_options: dict | None) -> bool:
    """Whether a path is a zarr store: a folder, a zip file or a URL."""
    if is_url(path):
        return _header(path, storage_options) is not None
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in ZARR_FILES)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return bool({*ZARR_FILES} & set(archive.namelist()))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is a damaged zip file ({error}). Copy or download it again.") from error


def _header(url: str, storage_options: dict | None) -> str | None:
    """The first of ZARR_FILES that is there."""
    system, root = file_system(url, storage_options)
    with reaching(url):
        return next((n for n in ZARR_FILES if is_there(system, f"{root.rstrip('/')}/{n}", folder=False)), None)


@contextmanager
def reaching(url: str, what: str = "reached"):
    """Failures of a file system, of which every one has its own, as DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(missing(url)) from error
    except (PhysmlError, MemoryError, IsADirectoryError):
        raise
    except Exception as error:
        if not is_url(url) and not isinstance(error, OSError):
            raise
        raise DataError(f"{url} cannot be {what}: {first_line(error).rstrip('.')}.") from error


def magic(path: str, storage_options: dict | None) -> bytes:
    """The signature of a netCDF, HDF5 or GRIB file. Raises DataError for anything else."""
    try:
        with reaching(path, "read"), open_file(path, storage_options) if is_url(path) else open(path, "rb") as file:
            head = file.read(HEAD)
            size = len(head)
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, but neither a zarr store nor a folder of netCDF files.") from error
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes). Copy, download or generate it again.")
    if head[:4] == GRIB:
        return GRIB
    if head[:3] == b"CDF" and head[3:4] in (b"\x01", b"\x02", b"\x05"):
        return head[:4]
    # The signature may come after a user block of 512, 1024, 2048, ... bytes.
    if any(head[at : at + 8] == HDF5 for at in (0, 512, 1024, 2048)):
        check_heaps(head, path)
        return HDF5
    raise DataError(
        f"{path} is neither netCDF nor zarr: it begins with {head[:16]!r}. Expected a file written by netCDF, HDF5 or "
        "zarr; "
        "convert arrays with physml.data.from_array(...).to_netcdf(...)."
    )


def missing(path: str) -> str:
    """What to say when a path does not exist, with the nearest name that does."""
    return f"There is no file {path}." + ("" if is_url(path) else suggest_path(path.rstrip("/")))


def _expand_url(url: str, storage_options: dict | None) -> list[str]:
    if not glob.has_magic(url.split("?")[0]) or "?" in url:
        return [url]
    system, root = file_system(url, storage_options)
    found = sorted(system.glob(root))
    if not found:
        raise DataError(f"No file matches {url!r}.")
    chain = url.split("::")[:-1]
    return ["::".join([*chain, system.unstrip_protocol(file)]) for file in map(str, found)]


def _expand_folder(path: str) -> list[str]:
    inside = sorted(os.path.join(path, name) for name in os.listdir(path) if not name.startswith("."))
    files = []
    for item in inside:
        if is_zarr(item, None):
            files.append(item)
        elif os.path.isfile(item) and os.path.getsize(item):
            try:
                magic(item, None)
            except DataError:
                continue  # cards, checksums and the like lie beside data
            files.append(item)
    if not files:
        names = [os.path.basename(item) for item in inside][:10]
        raise DataError(f"The folder {path} holds no netCDF file and no zarr store. It holds {names or 'nothing'}.")
    return files
