"""PDEBench: one HDF5 file for each equation and its coefficients, in three layouts. DaRUS, doi:10.18419/darus-2986.

Array files (.hdf5): `tensor`, or `density`, `pressure`, `Vx`, .., of shape (N, T, X[, Y[, Z]]); `x-coordinate`, ..,
`t-coordinate`. Darcy flow: `nu` (N, X, Y) and `tensor` (N, 1, X, Y), no times. Coefficients are root attributes.
Group files (.h5): groups `0000`, .. with `data` (T, X[, Y], components), `grid/x`, .., `grid/t`, attribute `config`.
Incompressible flow: `velocity` (N, T, X, Y, 2), `particles` (N, T, X, Y, 1), `force` (N, X, Y, 2), `t` (N, T).
"""

from typing import Literal

import numpy as np
import xarray as xr

from physml.data import hdf5, joined, members, netcdf
from physml.data.hdf5 import Hdf5, common_sizes
from physml.data.place import Place
from physml.errors import ConfigError, DataError, suggest

SPACE = ("x", "y", "z")
ARRAYS = ("tensor", "density", "pressure", "Vx", "Vy", "Vz")
COEFFICIENTS = ("beta", "nu", "rho", "eta", "zeta", "m")  # in lower case
BOUNDARIES = {
    "Darcy flow": "the solution is 0 on the boundary",
    "diffusion-reaction": "no flux through the boundary",
    "diffusion-sorption": "left: 1; right: D times the slope",
    "incompressible Navier-Stokes": "walls",
    "shallow water": "no slope at the boundary",
}
DIMENSIONLESS = {"units": "1"}


def recognizes(place: Place) -> bool:
    """Whether this is a file in one of the three layouts, and not written by a netCDF library, or a folder of them."""
    if place.is_folder():
        files = _files(place)
        return bool(files) and recognizes(files[0])
    if not place.is_file() or netcdf.magic(place.path, place.storage_options) != netcdf.HDF5:
        return False
    file = Hdf5(place)
    with file.file() as handle:
        by_netcdf = "_NCProperties" in handle.attrs
    return not by_netcdf and _layout(file) is not None


def open_dataset(
    place: Place, *, split: str | None = None, split_rule: Literal["first", "last"] | None = None
) -> xr.Dataset:
    """Fields under the names of the file, lazily; the content tells the layout, not the suffix.

    Dimensions are `trajectory, time, x[, y[, z]]`; Darcy flow has no time. `data` with several components becomes
    `data_0`, `data_1`, ..; vectors become `velocity_x`, `velocity_y`, `force_x`, `force_y`. Everything is
    nondimensional (units 1). Where the file has more times than frames, the first ones count. Incompressible files
    store no positions: theirs are the cell centers of the unit square. Coefficients (beta, Nu, rho, eta, zeta, M) are
    variables on `trajectory`, and attributes as all other numbers. Text (`config`) is not read: the HDF5 library
    never returns from some damaged texts, and no field needs it. One-dimensional array files are
    periodic unless the name says "trans", compressible ones in two and three dimensions where it says "periodic".
    The files of a folder are one after another: parts of one set, or one equation with several coefficients.

    Args:
        place: one file, or a folder of files in one layout and on one grid; other files in it are left alone.
        split: "train" or "test"; None for both. There is no validation set.
        split_rule: which trajectories are the test set: "first", int(0.1 N) of them, the rule of the benchmark for
            array files (the default there and for incompressible flow); "last", all after int(0.9 N), its rule for
            group files. Its two readers differ, and give different splits of one file. Every file of a folder is split
            for itself.

    Raises ConfigError for options that do not exist, DataError for files that are damaged, incomplete or inconsistent.
    Groups are read when their trajectories are: one of another shape raises DataError then.
    """
    if split not in (None, "train", "test"):
        raise ConfigError(f"PDEBench has no split {split!r}." + suggest(str(split), ("train", "test")))
    if split_rule not in (None, "first", "last"):
        raise ConfigError(f"There is no split_rule {split_rule!r}." + suggest(str(split_rule), ("first", "last")))
    files = _files(place) if place.is_folder() else [place]
    if not files:
        raise DataError(f"{place} holds no .hdf5 or .h5 file. Give a file of PDEBench or a folder of such files.")
    ds = _join(files, [_open(file, split, split_rule) for file in files])
    return ds.assign_attrs(source="DaRUS, doi:10.18419/darus-2986", references="doi:10.18419/darus-2986")


def _files(folder: Place) -> list[Place]:
    return [folder.below(name) for name in sorted(folder.names()) if name.endswith((".hdf5", ".h5"))]


def _open(place: Place, split: str | None, split_rule: str | None) -> xr.Dataset:
    file = Hdf5(place)
    layout = _layout(file)
    if layout is None:
        raise DataError(
            f"{place} has {', '.join(file.keys()[:6]) or 'nothing'}, which is no layout of PDEBench. Expected "
            "'x-coordinate' with 'tensor' or 'density', groups '0000', '0001', .., or 'velocity' with 't'."
        )
    ds = {"arrays": _arrays, "groups": _groups, "incompressible": _incompressible}[layout](file)
    if split is not None:
        total = ds.sizes["trajectory"]
        rule = split_rule or ("last" if layout == "groups" else "first")
        border = int(0.1 * total) if rule == "first" else int(0.9 * total)
        chosen = slice(border) if (split == "test") == (rule == "first") else slice(border, None)
        ds = ds.isel(trajectory=chosen)
        if not ds.sizes["trajectory"]:
            raise DataError(f"{place}: the split {split!r} of {total} trajectories is empty. Use split=None.")
    return ds


def _join(files: list[Place], parts: list[xr.Dataset]) -> xr.Dataset:
    """The trajectories of all files in order. Raises DataError when fields or grids differ."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for file, part in zip(files[1:], parts[1:], strict=True):
        if set(part.data_vars) != set(first.data_vars):
            raise DataError(
                f"{file} holds {', '.join(map(str, part.data_vars))}, but {files[0]} holds "
                f"{', '.join(map(str, first.data_vars))}. Keep each equation in a folder of its own."
            )
        for axis in set(first.coords) - {"time"}:
            if not part[axis].equals(first[axis]):
                raise DataError(f"{file} has other positions {axis!r} than {files[0]}. Open them one by one.")
    counts = [part.sizes["trajectory"] for part in parts]
    variables = {
        name: joined.join(
            str(name), [joined.Part(str(f), n, p[name].variable) for f, n, p in zip(files, counts, parts, strict=True)]
        )
        for name in first.data_vars
    }
    coords = {axis: first[axis].variable for axis in set(first.coords) - {"time"}}
    if "time" in first.coords:
        times = [part["time"].values for n, part in zip(counts, parts, strict=True) for _ in range(n)]
        found = joined.axis("time", "times", times, first["time"].attrs)
        coords |= {name: variable for name, variable in found.items() if name == "time"}
        variables |= {name: variable for name, variable in found.items() if name != "time"}
        variables |= joined.frames([len(row) for row in times])
    same = {k: v for k, v in first.attrs.items() if all(part.attrs.get(k) == v for part in parts)}
    return xr.Dataset(variables, coords, same)


def _layout(file: Hdf5) -> str | None:
    keys = file.keys()
    if "x-coordinate" in keys and {"tensor", "density"} & set(keys):
        return "arrays"
    if {"velocity", "t"} <= set(keys) and {"particles", "force"} & set(keys):
        return "incompressible"
    numbered = [key for key in keys if _is_number(key)]
    if numbered and file.is_group(numbered[0]) and {"data", "grid"} <= set(file.keys(numbered[0])):
        return "groups"
    return None


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdigit()


# --- layouts ----------------------------------------------------------------------------------------------------------


def _arrays(file: Hdf5) -> xr.Dataset:
    keys = file.keys()
    space = tuple(axis for axis in SPACE if f"{axis}-coordinate" in keys)
    steady = "nu" in keys and "t-coordinate" not in keys
    fields = {
        name: file.variable(name, ("trajectory", "time", *space), DIMENSIONLESS) for name in ARRAYS if name in keys
    }
    if "density" in fields:
        for name in ("pressure", *(f"V{axis}" for axis in space)):
            if name not in fields:
                raise DataError(f"{file} has 'density', but no {name!r}. Download it again.")
    if steady:
        if fields["tensor"].sizes["time"] != 1:
            raise DataError(
                f"{file} has no 't-coordinate', but {fields['tensor'].sizes['time']} frames. Add the times."
            )
        fields["tensor"] = hdf5.component(fields["tensor"], "time", 0)
    if "nu" in keys:
        fields["nu"] = file.variable("nu", ("trajectory", *space), DIMENSIONLESS)
    sizes = common_sizes(file, fields)
    name = file.place.name().lower()
    periodic = "nu" not in keys and ("periodic" in name or (len(space) == 1 and "trans" not in name))
    coords = {axis: _axis(file, f"{axis}-coordinate", axis, sizes[axis], periodic) for axis in space}
    if not steady:
        coords["time"] = _times(file, "t-coordinate", sizes["time"])
    ds = xr.Dataset(fields, coords, _attributes(file))
    return _with_coefficients(ds, _equation(fields, ds.attrs, len(space)), periodic)


def _groups(file: Hdf5) -> xr.Dataset:
    keys = file.keys()
    names = sorted(filter(_is_number, keys))
    first = names[0]
    space = tuple(axis for axis in SPACE if file.has(f"{first}/grid/{axis}"))
    dims = ("time", *space, "component")
    example = file.variable(f"{first}/data", dims)

    def read(member: int, start: int, stop: int) -> np.ndarray:
        own = file.variable(f"{names[member]}/data", dims)
        if own.shape != example.shape:
            raise DataError(
                f"{file}: {names[member]!r} has shape {own.shape}, but {first!r} has {example.shape}. Leave one "
                "of them out, or download the file again."
            )
        return own[start:stop].values

    data = members.stack(len(names), example.shape, example.dtype, dims, read, DIMENSIONLESS)
    count = data.sizes["component"]
    parts = ["data"] if count == 1 else [f"data_{i}" for i in range(min(count, 100))]
    fields = {name: hdf5.component(data, "component", i) for i, name in enumerate(parts)}
    coords = {
        **{axis: _axis(file, f"{first}/grid/{axis}", axis, data.sizes[axis], False) for axis in space},
        "time": _times(file, f"{first}/grid/t", data.sizes["time"]),
    }
    ds = xr.Dataset(fields, coords, _attributes(file))
    title = {(1, 1): "diffusion-sorption", (2, 1): "shallow water", (2, 2): "diffusion-reaction"}
    return _with_coefficients(ds, title.get((len(space), count), "groups"), False)


def _incompressible(file: Hdf5) -> xr.Dataset:
    dims, keys = ("trajectory", "time", "x", "y"), file.keys()
    fields: dict[str, xr.Variable] = {}
    for name, own, suffixes in (
        ("velocity", dims, ("_x", "_y")),
        ("particles", dims, ("",)),
        ("force", ("trajectory", "x", "y"), ("_x", "_y")),
    ):
        if name not in keys:  # one of particles and force is enough
            continue
        whole = file.variable(name, (*own, "component"), DIMENSIONLESS)
        if whole.sizes["component"] != len(suffixes):
            raise DataError(f"{file}: {name!r} has shape {whole.shape}, whose last axis should be {len(suffixes)}.")
        fields |= {name + suffix: hdf5.component(whole, "component", i) for i, suffix in enumerate(suffixes)}
    sizes = common_sizes(file, fields)
    times = file.values("t")
    if times.ndim != 2 or times.shape[0] != sizes["trajectory"] or _differ(times):
        raise DataError(
            f"{file}: 't' has shape {times.shape} and should hold the same times for each of {sizes['trajectory']} "
            "trajectories. Write trajectories with other times to other files."
        )
    coords = {
        axis: (axis, (np.arange(sizes[axis]) + 0.5) / sizes[axis], {**DIMENSIONLESS, "periodic": 0})
        for axis in ("x", "y")
    }
    coords["time"] = _first(file, "t", times[0], sizes["time"])
    return _with_coefficients(xr.Dataset(fields, coords, _attributes(file)), "incompressible Navier-Stokes", False)


# --- coordinates and attributes ---------------------------------------------------------------------------------------


def _differ(rows: np.ndarray) -> bool:
    return any(not np.array_equal(row, rows[0], equal_nan=True) for row in rows)


def _axis(file: Hdf5, key: str, axis: str, size: int, periodic: bool) -> tuple:
    values = file.values(key)
    if values.shape != (size,) or values.dtype.kind != "f":
        raise DataError(
            f"{file}: {key!r} has shape {values.shape}, but the fields have {size} points. Download it again."
        )
    attrs = {**DIMENSIONLESS, "periodic": int(periodic)}
    if periodic and size > 1:
        length = (float(values[-1]) - float(values[0])) * size / (size - 1)
        attrs["period"] = float(f"{length:.6g}")  # the coordinates are float32
    return axis, values, attrs


def _times(file: Hdf5, key: str, frames: int) -> tuple:
    return _first(file, key, file.values(key), frames)


def _first(file: Hdf5, key: str, values: np.ndarray, frames: int) -> tuple:
    if values.ndim != 1 or len(values) < frames:
        raise DataError(f"{file}: {key!r} has shape {values.shape} for {frames} frames. Download it again.")
    return "time", values[:frames], DIMENSIONLESS


def _equation(fields: dict, attrs: dict, ndim: int) -> str:
    known = {name.lower() for name in attrs}
    if "density" in fields:
        return f"compressible Navier-Stokes in {ndim}D"
    if "nu" in fields:
        return "Darcy flow"
    return "advection" if "beta" in known else "reaction-diffusion" if "rho" in known else "Burgers"


def _attributes(file: Hdf5) -> dict[str, int | float]:
    """The numbers among the root attributes."""
    with file.file() as handle:
        kinds = {name: handle.attrs.get_id(name) for name in handle.attrs}
        plain = [name for name, kind in kinds.items() if kind.shape == () and kind.dtype.kind in "iuf"]
        return {name: handle.attrs[name].item() for name in plain}


def _with_coefficients(ds: xr.Dataset, equation: str, periodic: bool) -> xr.Dataset:
    for name, value in list(ds.attrs.items()):
        if name.lower() in COEFFICIENTS and name not in ds.variables:
            # A broadcast view: a damaged file may claim any number of trajectories.
            spread = np.broadcast_to(np.float64(value), ds.sizes["trajectory"])
            ds = ds.assign({name: xr.Variable("trajectory", spread, DIMENSIONLESS)})
    return ds.assign_attrs(
        title=f"PDEBench, {equation}",
        boundary_conditions="periodic" if periodic else BOUNDARIES.get(equation, "not periodic"),
    )
