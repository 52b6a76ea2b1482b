"""Several files as one dataset: along time, along trajectory, or variable by variable."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data.netcdf import in_chunks, name_dimensions
from physml.errors import DataError, first_line


class Piece(NamedTuple):
    """What one file brought to a dataset; `times` and `trajectories` are its labels, None where it has none."""

    file: str
    variables: frozenset[str]
    times: np.ndarray | None
    trajectories: np.ndarray | None = None


def open_many(paths: Sequence[str], opener, **options) -> xr.Dataset:
    """Several files of one dataset: joined along time where times differ, along `trajectory` where they repeat.

    Files that hold different variables are merged. Raises DataError when grids or units differ, naming the two files.
    """
    parts = [(path, in_chunks(name_dimensions(opener(path, **options)))) for path in paths]
    _check_alike(parts)
    groups: dict[frozenset, list] = {}
    for path, ds in parts:
        groups.setdefault(frozenset(map(str, ds.data_vars)), []).append((path, ds))
    joined, pieces = [], []
    for members in groups.values():
        whole, along = _join(members)
        joined.append(whole)
        pieces += _pieces(members, whole, along)
    if len(joined) == 1:
        result = joined[0]
    else:
        names = [members[0][0] for members in groups.values()]
        result = _merge(joined, names)
    result.encoding["source"] = f"{paths[0]} (and {len(paths) - 1} more)"
    result.encoding["files"] = tuple(map(str, paths))
    result.encoding["pieces"] = tuple(pieces)
    return result


def piece_of(file: str, ds: xr.Dataset) -> Piece:
    """What a dataset of one file is."""
    time = ds.variables.get("time")
    times = None if time is None or time.ndim > 1 else np.atleast_1d(np.asarray(time.values))
    return Piece(str(file), frozenset(map(str, ds.data_vars)), times)


def _pieces(members: list[tuple[str, xr.Dataset]], whole: xr.Dataset, along: str | None) -> list[Piece]:
    pieces = [piece_of(*member) for member in members]
    if along != "trajectory":
        return pieces
    ends = np.cumsum([ds.sizes.get("trajectory", 1) for _, ds in members])
    named = whole.variables.get("trajectory")
    labels = np.arange(ends[-1]) if named is None else np.asarray(named.values)
    # Their times are the same: one array for all.
    return [
        piece._replace(times=pieces[0].times, trajectories=part)
        for piece, part in zip(pieces, np.split(labels, ends[:-1]), strict=True)
    ]


def locate(ds: xr.Dataset, variable: str | None, time: Any, trajectory: Any, frame: int) -> tuple[str, int] | None:
    """(file, frame in this file) of what `ds` calls `time` and `trajectory`, its own `frame`; None where it cannot be
    told.
    """
    pieces = ds.encoding.get("pieces", ())
    pieces = [piece for piece in pieces if variable in piece.variables] or pieces  # variables may have been renamed
    found = set()
    for piece in pieces:
        if piece.trajectories is None or trajectory in piece.trajectories:
            inside = [frame] if piece.times is None else np.flatnonzero(piece.times == time)
            found |= {(piece.file, int(i)) for i in inside}
    return found.pop() if len(found) == 1 else None


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


def _join(members: list[tuple[str, xr.Dataset]]) -> tuple[xr.Dataset, str | None]:
    """Files with the same variables, along time or along trajectory, and along which; None for a single file."""
    if len(members) == 1:
        return members[0][1], None
    times = [np.asarray(ds["time"].values) if "time" in ds.variables else None for _, ds in members]
    if all(t is not None and t.ndim <= 1 for t in times) and not all(np.array_equal(t, times[0]) for t in times):
        return _join_time(members, [np.atleast_1d(t) for t in times]), "time"
    stacked = []
    for _, ds in members:
        if "trajectory" in ds.dims:
            stacked.append(ds)
        else:
            fields = [n for n, v in ds.data_vars.items() if v.ndim]
            stacked.append(ds.assign({n: ds[n].expand_dims("trajectory") for n in fields}))
    stacked = _spread(stacked)
    return _concat([(p, d) for (p, _), d in zip(members, stacked, strict=True)], "trajectory"), "trajectory"


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
