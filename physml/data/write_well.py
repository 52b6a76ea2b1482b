"""Writing the layout of The Well, as `physml.data.the_well` and the reader of its authors open it."""

import json
from pathlib import Path

import h5py
import numpy as np
import xarray as xr

from physml.data import slabs
from physml.data.slabs import Run
from physml.data.the_well import BOUNDARIES, GROUPS
from physml.errors import DataError

LAYOUT = "The Well"
RESERVED = ("dataset_name", "grid_type", "n_spatial_dims", "n_trajectories", "simulation_parameters")
ANGLES = {"latitude": "theta", "longitude": "phi"}
OWN = ("frames", "times")
LONGEST_TEXT = 2**15  # bytes; HDF5 takes no attribute above 64 KiB


def write(ds: xr.Dataset, out: Path) -> None:
    """A folder `data/<split>/*.hdf5`, or one file where `out` ends in .hdf5 or .h5.

    Trajectories of one split and length make a file; those without a split go to train. Fields of all components
    (`velocity_x`, `velocity_y`) become vectors, `strain_xx`, .. tensors, other fields scalars; what has no time is a
    constant field, one number per trajectory a constant scalar. Scalars that all trajectories of a file share are its
    simulation parameters too. Numbers keep their type (the authors' files are float32). Latitude and longitude become
    the angles theta and phi in radians. Units and other attributes are kept as attributes that readers may ignore.

    Holds a few slabs of one field in memory. Raises DataError for what the layout cannot hold: text, dates, more than
    three spatial dimensions, ends of axes that differ between files.
    """
    layout, parts = check(ds, out)
    if out.suffix in (".hdf5", ".h5"):
        layout.write(out, parts[0])
        return
    width = len(str(len(parts)))
    for number, run in enumerate(parts):
        folder = out / "data" / (run.split or "train")
        folder.mkdir(parents=True, exist_ok=True)
        layout.write(folder / f"{layout.name or out.stem}_{number:0{width}}.hdf5", run)


def check(ds: xr.Dataset, out: Path) -> tuple["_Layout", list[Run]]:
    """Where everything of a dataset goes, and the files. Raises DataError for what the layout cannot hold."""
    slabs.check_trajectory_labels(ds, LAYOUT)
    parts = slabs.runs(ds, LAYOUT)
    layout = _Layout(ds, _spatial(ds), out.stem)
    if out.suffix in (".hdf5", ".h5"):
        if len(parts) > 1:
            raise DataError(
                f"{out.name} is one file, but trajectories of several splits or lengths need several. Name a folder."
            )
        if "split" in ds.coords:
            raise DataError(
                f"{out.name} is one file, which does not tell its split {parts[0].split!r}. Name a folder, or drop it "
                "with drop_vars('split')."
            )
    return layout, parts


def _spatial(ds: xr.Dataset) -> list[str]:
    """Spatial dimensions in the order of the fields."""
    found: dict[str, None] = {}
    for variable in sorted(ds.data_vars.values(), key=lambda v: -v.ndim):
        found |= dict.fromkeys(str(dim) for dim in variable.dims if dim not in ("trajectory", "time"))
    spatial = [*found, *(str(d) for d in ds.dims if d not in found and d not in ("trajectory", "time"))]
    if not 1 <= len(spatial) <= 3:
        raise DataError(f"{LAYOUT} has one to three spatial dimensions, but these data have {spatial or 'none'}.")
    return spatial


class _Layout:
    """Where everything of a dataset goes."""

    def __init__(self, ds: xr.Dataset, spatial: list[str], name: str):
        self.ds, self.spatial = ds, spatial
        _, well, stated = str(ds.attrs.get("title", "")).rpartition("The Well: ")
        self.name = (stated if stated != "unnamed" else "") if well else name
        self.grid = str(ds.attrs.get("grid_type", "spherical" if {*ANGLES} <= {*spatial} else "cartesian"))
        angles = ANGLES if self.grid.lower() == "spherical" else {}
        self.axes = [angles.get(dim, dim) for dim in spatial]
        own = {*OWN, *(f"grid_{dim}" for dim in spatial), *(f"grid_{axis}" for axis in self.axes)}
        names = [str(name) for name in [*ds.data_vars, *slabs.extra_coordinates(ds)] if name not in own]
        slabs.numbers(ds, [*names, *(dim for dim in ds.dims if dim in ds.coords)], LAYOUT)
        fields = [name for name in names if {*ds[name].dims} & {*spatial}]
        if not fields:
            raise DataError(f"{LAYOUT} needs a field on {', '.join(spatial)}, but the data have none.")
        self.scalars = [name for name in names if name not in fields]
        self.groups = _tensors(ds, fields, self.axes)
        self.table = _boundaries(ds, spatial, self.axes)

    def write(self, path: Path, run: Run) -> None:
        with h5py.File(path, "w") as file:
            _describe(file, {key: value for key, value in self.ds.attrs.items() if key not in RESERVED})
            file.attrs["dataset_name"] = self.name
            file.attrs["grid_type"] = self.grid
            file.attrs["n_spatial_dims"] = len(self.spatial)
            file.attrs["n_trajectories"] = run.count
            self._dimensions(file, run)
            self._boundary_conditions(file)
            self._scalars(file, run)
            for group, members in zip(GROUPS, self.groups, strict=True):
                node = file.create_group(group)
                node.attrs["field_names"] = _texts(list(members))
                for name, components in members.items():
                    self._field(node, name, components, run)

    def _dimensions(self, file: h5py.File, run: Run) -> None:
        group = file.create_group("dimensions")
        group.attrs["spatial_dims"] = _texts(self.axes)
        if "time" in self.ds.dims:
            values = slabs.rows(self.ds, "time", "times", run)
            values = np.arange(run.frames, dtype=np.float64) if values is None else values
            group["time"] = values
            group["time"].attrs["sample_varying"] = np.bool_(values.ndim == 2)
        for dim, axis in zip(self.spatial, self.axes, strict=True):
            values = slabs.rows(self.ds, dim, f"grid_{axis}", run)
            values = np.arange(self.ds.sizes[dim], dtype=np.float64) if values is None else values
            group[axis] = values if axis == dim else _radians(values, dim)
            group[axis].attrs["sample_varying"] = np.bool_(values.ndim == 2)
            group[axis].attrs["time_varying"] = np.False_

    def _boundary_conditions(self, file: h5py.File) -> None:
        if self.table is None:
            return
        group = file.create_group("boundary_conditions")
        for axis, dim, ends in zip(self.axes, self.spatial, self.table, strict=True):
            for code in sorted(set(ends)):
                mask = np.zeros(self.ds.sizes[dim], bool)
                mask[[at for at, end in zip((0, -1), ends, strict=True) if end == code]] = True
                node = group.create_group(f"{axis}_{BOUNDARIES[code].lower()}")
                node.attrs["associated_dims"] = _texts([axis])
                node.attrs["associated_fields"] = _texts([])
                node.attrs["bc_type"] = BOUNDARIES[code]
                node.attrs["sample_varying"] = node.attrs["time_varying"] = np.False_
                node["mask"] = mask

    def _scalars(self, file: h5py.File, run: Run) -> None:
        group, names, shared = file.create_group("scalars"), [], []
        for stored in self.scalars:
            variable = self.ds[stored].variable
            name = stored.removeprefix("parameter_")
            if name == stored or name not in {*self.ds.variables, *self.axes, "trajectory", "frames"}:
                name = stored
            values = variable.transpose(*(d for d in ("trajectory", "time") if d in variable.dims)).values
            values = values[run.first : run.first + run.count] if "trajectory" in variable.dims else values
            values = values[..., : run.frames] if "time" in variable.dims else values
            same = values.ndim == 1 and "trajectory" in variable.dims and _constant(values)
            values = values[0] if same else values
            group[name] = values
            group[name].attrs["sample_varying"] = np.bool_("trajectory" in variable.dims and not same)
            group[name].attrs["time_varying"] = np.bool_("time" in variable.dims)
            names.append(name)
            if np.ndim(values) == 0 and name not in file.attrs:
                file.attrs[name] = values
                shared.append(name)
        group.attrs["field_names"] = _texts(names)
        file.attrs["simulation_parameters"] = _texts(shared)

    def _field(self, group: h5py.Group, name: str, components: list[str], run: Run) -> None:
        order, count = GROUPS.index(group.name.strip("/")), len(self.spatial)
        first = self.ds[components[0]]
        dims = [dim for dim in ("trajectory", "time", *self.spatial) if dim in first.dims]
        sizes = {**self.ds.sizes, "trajectory": run.count, "time": run.frames}
        shape = (*(sizes[dim] for dim in dims), *[count] * order)
        data = group.create_dataset(name, shape, first.dtype)
        for at, arrays in slabs.slabs(self.ds, components, dims, run):
            data[at] = np.stack(arrays, -1).reshape(*arrays[0].shape, *[count] * order)
        _describe(data, first.attrs if order == 0 else {})
        data.attrs["dim_varying"] = np.array([dim in dims for dim in self.spatial])
        data.attrs["sample_varying"] = np.bool_("trajectory" in dims)
        data.attrs["time_varying"] = np.bool_("time" in dims)
        if order == 2:
            data.attrs["symmetric"] = data.attrs["antisymmetric"] = np.False_


def _tensors(ds: xr.Dataset, fields: list[str], axes: list[str]) -> tuple[dict[str, list[str]], ...]:
    """Scalars, vectors and tensors: name -> components, in the order of the fields."""
    groups: tuple[dict[str, list[str]], ...] = ({}, {}, {})
    suffixes = {1: list(axes), 2: [a + b for a in axes for b in axes]}
    taken: set[str] = set()
    for name in fields:
        if name in taken:
            continue
        order, base, members = 0, name, [name]
        for candidate, endings in suffixes.items():
            stem = name.removesuffix("_" + endings[0])
            parts = [f"{stem}_{ending}" for ending in endings]
            alike = all(p in fields and _shape(ds, p) == _shape(ds, name) and p not in taken for p in parts)
            if stem and stem != name and alike and stem not in ds.variables:
                order, base, members = candidate, stem, parts
        groups[order][base] = members
        taken.update(members)
    return groups


def _shape(ds: xr.Dataset, name: str) -> tuple:
    return ds[name].dims, ds[name].dtype


def _boundaries(ds: xr.Dataset, spatial: list[str], axes: list[str]) -> np.ndarray | None:
    """`(dims, 2)` codes, by the text of the reader or by which coordinates are periodic; None where nothing is told."""
    text = str(ds.attrs.get("boundary_conditions", ""))
    if " or, in other files, " in text:
        raise DataError(
            f"The files behind these data differ in their boundary conditions ({text}), and the data do not tell whose "
            "are which. Write them file by file."
        )
    stated = dict(part.split(": ", 1) for part in text.split("; ") if ": " in part)
    if {*stated} == {*axes}:
        table = [[end.split(" ")[0] for end in (stated[axis].split(", ") * 2)[:2]] for axis in axes]
        if {end for ends in table for end in ends} <= {*BOUNDARIES}:
            return np.array([[BOUNDARIES.index(end) for end in ends] for ends in table])
    periodic = [dim in ds.coords and bool(ds[dim].attrs.get("periodic", 0)) for dim in spatial]
    if not any(periodic):
        return None
    kinds = [BOUNDARIES.index("PERIODIC" if yes else "OPEN") for yes in periodic]
    return np.array([[kind, kind] for kind in kinds])


def _radians(degrees: np.ndarray, dim: str) -> np.ndarray:
    """The angle of a latitude or longitude, in float32 where reading that gives the same degrees."""
    degrees = degrees.astype(np.float64)
    angle = np.deg2rad(90 - degrees if dim == "latitude" else degrees)
    short = angle.astype(np.float32)
    back = np.rad2deg(short.astype(np.float64))
    return short if np.array_equal(90 - back if dim == "latitude" else back, degrees) else angle


def _constant(values: np.ndarray) -> bool:
    return bool(np.array_equal(values, np.broadcast_to(values[:1], values.shape), equal_nan=values.dtype.kind == "f"))


def _texts(names: list[str]) -> np.ndarray:
    return np.array(names, h5py.string_dtype())


def _describe(node: h5py.Group | h5py.Dataset, attrs: dict) -> None:
    """Adds attributes that readers of the layout may ignore: numbers and texts as they are, others as JSON."""
    for key, value in attrs.items():
        plain = isinstance(value, str | bool | int | float | np.number | np.bool_)
        value = value if plain else json.dumps(value, default=str)
        if not isinstance(value, str) or len(value.encode()) < LONGEST_TEXT:
            node.attrs[str(key)] = value
