"""Opening netCDF (classic, 64-bit, HDF5) and zarr (v2, v3, zipped): a file, a folder, a glob, a list, or an fsspec URL.

The format is told by the content, not by the name. Opening reads metadata and coordinates only. Nothing in a file is
executed: zarr arrays coded as pickles are refused.
"""

import glob
import math
import os
import struct
import uuid
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data.hdf5_chunks import Netcdf4
from physml.data.heaps import HEAD, check_heaps
from physml.data.remote import file_system, first_line, is_there, is_url, open_file, zarr_store
from physml.errors import DataError, PhysmlError, suggest

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
    _check_classic_length(path)
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


def open_many(paths: Sequence[str], opener, **options) -> xr.Dataset:
    """Several files of one dataset: joined along time where times differ, along `trajectory` where they repeat.

    Files that hold different variables are merged. Raises DataError when grids or units differ, naming the two files.
    """
    parts = [(path, in_chunks(name_dimensions(opener(path, **options)))) for path in paths]
    _check_alike(parts)
    groups: dict[frozenset, list] = {}
    for path, ds in parts:
        groups.setdefault(frozenset(map(str, ds.data_vars)), []).append((path, ds))
    joined = [_join(members) for members in groups.values()]
    if len(joined) == 1:
        result = joined[0]
    else:
        names = [members[0][0] for members in groups.values()]
        result = _merge(joined, names)
    result.encoding["source"] = f"{paths[0]} (and {len(paths) - 1} more)"
    result.encoding["files"] = tuple(map(str, paths))
    return result


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
        raise DataError(
            f"{url} cannot be {what}: {(first_line(error) or type(error).__name__).rstrip('.')}."
        ) from error


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
    folder = os.path.dirname(path) or "."
    if is_url(path) or not os.path.isdir(folder):
        return f"There is no file {path}, nor its folder." if not is_url(path) else f"There is no file {path}."
    return f"There is no file {path}." + suggest(os.path.basename(path), sorted(os.listdir(folder))[:20])


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


def _check_classic_length(path: str) -> None:
    """Raises DataError when a classic netCDF file is shorter than its header says (the C library would read zeros)."""
    with open(path, "rb") as file:
        try:
            expected = _classic_length(file)
        except (struct.error, ValueError, LookupError, OverflowError) as error:
            raise DataError(f"{path} is truncated inside its header. Copy or download it again.") from error
    size = os.path.getsize(path)
    if size < expected:
        raise DataError(
            f"{path} is truncated: {size} bytes, but its header needs {expected}. Copy or download it again."
        )


def _classic_length(file) -> int:
    """Bytes that the header of a classic netCDF file (CDF-1, -2, -5) promises; netCDF file format specification."""
    version = file.read(4)[3]
    count_format, offset_format = (">q" if version == 5 else ">i"), (">i" if version == 1 else ">q")
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}

    def number(fmt=count_format):
        return struct.unpack(fmt, file.read(struct.calcsize(fmt)))[0]

    def skip(length):
        padded = length + -length % 4
        if length < 0 or len(file.read(padded)) != padded:
            raise ValueError("header ends early")

    def count():
        size = number()
        if size < 0:  # the C library would take it as billions
            raise ValueError("negative count")
        return range(size)

    def items():
        number(">i")  # tag of the list, or zero when it is absent
        return count()

    def skip_attributes():
        for _ in items():
            skip(number())
            kind = number(">i")
            skip(number() * sizes[kind])

    records = number()
    dims = []
    for _ in items():
        skip(number())
        dims.append(number())
    skip_attributes()
    ends, record_bytes, record_ends = [0], 0, []
    variables = []
    for _ in items():
        skip(number())
        shape = [dims[number()] for _ in count()]
        skip_attributes()
        kind = number(">i")
        number()  # vsize: recomputed below, because it overflows for big variables
        variables.append((shape, sizes[kind], number(offset_format)))
    recorded = [v for v in variables if v[0] and v[0][0] == 0]
    for shape, size, begin in variables:
        if shape and shape[0] == 0:
            slab = int(np.prod(shape[1:], dtype=object)) * size
            record_bytes += slab if len(recorded) == 1 else slab + -slab % 4
            record_ends.append((begin, slab))
        else:
            ends.append(begin + int(np.prod(shape, dtype=object) if shape else 1) * size)
    if records > 0:
        ends += [begin + (records - 1) * record_bytes + slab for begin, slab in record_ends]
    return max(ends)


# --- several files ----------------------------------------------------------------------------------------------------


def _check_alike(parts: list[tuple[str, xr.Dataset]]) -> None:
    """Raises DataError when two files differ in grid or units."""
    seen: dict[str, tuple[str, np.ndarray | int]] = {}
    units: dict[str, tuple[str, str]] = {}
    for path, ds in parts:
        for dim in ds.dims:
            if ax.role(ds, dim) in ("trajectory", "time"):
                continue
            values = ax.coordinate_values(ds, dim)
            values = np.arange(ds.sizes[dim]) if values is None else values
            other, known = seen.setdefault(str(dim), (path, values))
            if len(values) != len(known) or not np.allclose(values, known, rtol=1e-6, atol=1e-6 * (np.ptp(known) or 1)):
                raise DataError(
                    f"{path} and {other} are on different grids: {dim!r} has {len(values)} points {_ends(values)} in "
                    "the first, "
                    f"{len(known)} points {_ends(known)} in the second. Open them one by one, or interpolate."
                )
        for name, variable in ds.data_vars.items():
            unit = str(variable.attrs.get("units", ""))
            other, known = units.setdefault(str(name), (path, unit))
            if unit != known:
                raise DataError(f"{name!r} is in {unit!r} in {path}, but in {known!r} in {other}. Convert one of them.")


def _ends(values: np.ndarray) -> str:
    return f"({values[0]:g}..{values[-1]:g})" if len(values) else "()"


def _join(members: list[tuple[str, xr.Dataset]]) -> xr.Dataset:
    """Files with the same variables, along time or along trajectory."""
    if len(members) == 1:
        return members[0][1]
    times = [np.asarray(ds["time"].values) if "time" in ds.variables else None for _, ds in members]
    if all(t is not None and t.ndim <= 1 for t in times) and not all(np.array_equal(t, times[0]) for t in times):
        return _join_time(members, [np.atleast_1d(t) for t in times])
    stacked = []
    for _, ds in members:
        if "trajectory" in ds.dims:
            stacked.append(ds)
        else:
            fields = [n for n, v in ds.data_vars.items() if v.ndim]
            stacked.append(ds.assign({n: ds[n].expand_dims("trajectory") for n in fields}))
    stacked = _spread(stacked)
    return _concat([(p, d) for (p, _), d in zip(members, stacked, strict=True)], "trajectory")


def _join_time(members, times) -> xr.Dataset:
    order = sorted(range(len(members)), key=lambda i: times[i][0])
    for a, b in zip(order[:-1], order[1:], strict=True):
        if not times[a][-1] < times[b][0]:
            raise DataError(
                f"{members[a][0]} ends at {times[a][-1]}, but {members[b][0]} begins at {times[b][0]}: their times "
                "overlap. "
                "Trajectories of one dataset must share one time axis; parts of one trajectory must not overlap."
            )
    parts = [(p, d if "time" in d.dims else d.expand_dims("time")) for p, d in (members[i] for i in order)]
    return _concat(parts, "time")


def _spread(datasets: list[xr.Dataset]) -> list[xr.Dataset]:
    """Gives `trajectory` to scalars and static fields that differ between files (parameters of the files)."""
    names = [
        n
        for n, v in datasets[0].variables.items()
        if not {"trajectory", "time"} & set(v.dims) and n not in datasets[0].dims
    ]
    for name in names:
        values = [np.asarray(ds[name].values) for ds in datasets if name in ds.variables]
        if len(values) == len(datasets) and all(_same(v, values[0]) for v in values):
            continue
        if len(values) < len(datasets):
            continue
        datasets = [
            ds.drop_vars(name).assign(
                {name: ds[name].variable.set_dims({"trajectory": ds.sizes["trajectory"], **dict(ds[name].sizes)})}
            )
            for ds in datasets
        ]
    return datasets


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _concat(members, dim: str) -> xr.Dataset:
    try:
        return xr.concat(
            [ds for _, ds in members], dim, data_vars="minimal", coords="minimal", compat="override", join="override",
            combine_attrs="drop_conflicts",
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise DataError(f"{members[0][0]} and the files after it cannot be joined along {dim}: {error}") from error


def _merge(datasets: list[xr.Dataset], names: list[str]) -> xr.Dataset:
    try:
        return xr.merge(datasets, join="exact", compat="no_conflicts", combine_attrs="drop_conflicts")
    except (ValueError, xr.MergeError) as error:
        fullest = max(range(len(datasets)), key=lambda i: len(datasets[i].data_vars))
        for name, ds in zip(names, datasets, strict=True):
            lacking = {*datasets[fullest].data_vars} - {*ds.data_vars}
            shared = {*datasets[fullest].data_vars} & {*ds.data_vars}
            if lacking and any("time" in ds[own].dims for own in shared):  # parts of one series
                raise DataError(
                    f"{name} has no variable {min(map(str, lacking))!r}, which {names[fullest]} has, so the two cannot "
                    "be joined. Download or generate it again, or leave it out."
                ) from error
        raise DataError(
            f"{names[0]} and {names[1]} hold different variables, but cannot be merged: {first_line(error)}. Their "
            "coordinates "
            "must be equal; open them one by one otherwise."
        ) from error


def as_text(path: str | Path | Sequence) -> str:
    return os.fspath(path) if isinstance(path, str | os.PathLike) else ", ".join(map(str, path))
