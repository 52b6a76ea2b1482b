"""The Well: HDF5 files of one simulation code each, in one documented layout. Ohana et al. 2024, arXiv:2412.00568."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
import yaml

from physml.data import hdf5, joined
from physml.data.hdf5 import Hdf5
from physml.data.place import Place
from physml.errors import DataError, suggest

SPLITS = ("train", "valid", "test")
SUFFIXES = (".hdf5", ".h5")
GROUPS = ("t0_fields", "t1_fields", "t2_fields")
BOUNDARIES = ("WALL", "OPEN", "PERIODIC")  # the position is the code
STATISTICS = ("mean", "std", "rms", "mean_delta", "std_delta", "rms_delta")
SMALLEST_STD = 1e-4  # by which the authors divide at least, when they make z-scores
LARGEST_STATISTICS = 2**20  # bytes


def recognizes(place: Place) -> bool:
    """A file or folder of The Well."""
    if place.is_file():
        return place.name().endswith(SUFFIXES) and _is_well(place)
    if "stats.yaml" in place.names() and "data" in place.names() and _splits(place):
        return True
    files = [file for found in _splits(place).values() for file in found]
    return bool(files) and _is_well(files[0])


def open_dataset(place: Place, *, split: str | None = None) -> xr.Dataset:
    """A data set (folder with `data/<split>/*.hdf5`), one split of it, or one file.

    Fields `(trajectory, time, *space)` in the order of the file: scalars, vectors (`velocity_x`), tensors
    (`strain_xy`), with fewer dimensions where they do not vary. Constant fields have no `time`. Simulation parameters
    and constant scalars are variables on `trajectory` (`parameter_h` where a field is called `h` too), and so is the
    coordinate `split` without `split=`. Space has the
    names of the file; on spherical grids the angles `theta` and `phi` become `latitude` and `longitude` in degrees.
    Files state no units. A file that holds other times or positions than the rest takes the coordinate away: the
    variables `times(trajectory, time)` or `grid_x(trajectory, x)` have them then.

    Boundary conditions are in `attrs["boundary_conditions"]`; an axis is periodic where both of its ends are in every
    file. `boundaries` gives them as codes, `statistics` reads stats.yaml.

    Args:
        place: the folder of the data set, its folder `data`, a folder of files, or a file.
        split: "train", "valid" or "test"; all when None.

    Raises DataError for missing files and groups, fields whose axes are not as their flags say, and files that differ
    in name, dimensions, fields or grid.
    """
    found = _splits(place)
    if split is not None:
        if split not in found:
            raise DataError(f"{place} has no split {split!r}." + suggest(split, filter(None, found)))
        found = {split: found[split]}
    files = [_read(file, name) for name, members in found.items() for file in members]
    if not files:
        raise DataError(f"{place} holds no {' or '.join(SUFFIXES)} file, neither directly nor in data/train and so on.")
    _check_alike(files)
    return _assemble(files)


def boundaries(place: Place) -> np.ndarray:
    """`(dims, 2)` codes at the low and high end of every axis, in the order of the file: 0 wall, 1 open, 2 periodic.

    Of the first file, by the rule of the authors: open where nothing is stated; a wall only where it covers the whole
    end, the others where they touch it. Raises DataError for conditions of another type.
    """
    for members in _splits(place).values():
        for file in members:
            h5 = _open(file)
            return _boundaries(h5, _spatial_dims(h5))
    raise DataError(f"{place} holds no {' or '.join(SUFFIXES)} file.")


def statistics(place: Place) -> dict[str, dict[str, float]]:
    """stats.yaml by channel: "mean", "std", "rms" and the same of increments, "mean_delta", ..; -> channel -> number.

    Constant fields have no increments. To make the z-scores of the authors, divide by
    `max(std, SMALLEST_STD)`. Raises DataError when the file is missing, is no YAML, or holds other shapes than the
    fields of the first data file.
    """
    file = place.below("stats.yaml")
    content = file.read(LARGEST_STATISTICS)
    if b"<<" in content:
        raise DataError(f"{file} uses merge keys (<<), which statistics do not need. Write the numbers out.")
    try:
        stored = yaml.safe_load(content)
    except MemoryError:
        raise
    except Exception as error:  # PyYAML raises many types for damaged text
        raise DataError(f"{file} is no YAML ({type(error).__name__}). Copy or download it again.") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("mean"), dict):
        raise DataError(f"{file} has no 'mean'. It should hold {', '.join(STATISTICS)}.")
    first = next((file for members in _splits(place).values() for file in members), None)
    if first is None:
        raise DataError(f"{place} holds no data file, without which the channels of stats.yaml have no names.")
    h5 = _open(first)
    spatial = _spatial_dims(h5)
    components = {
        name: _components(name, order, spatial) for order, group in enumerate(GROUPS) for name in _names(h5, group)
    }
    result: dict[str, dict[str, float]] = {}
    for statistic in STATISTICS:
        values = stored.get(statistic)
        if not isinstance(values, dict):
            continue
        result[statistic] = {}
        for name, channels in components.items():
            if name in values:
                numbers = _numbers(values[name], len(channels), f"{file}: {statistic} of {name!r}")
                result[statistic].update(zip(channels, numbers, strict=True))
    return result


# --- files ------------------------------------------------------------------------------------------------------------


def _open(place: Place) -> Hdf5:
    return Hdf5(place)


def _is_well(place: Place) -> bool:
    h5 = _open(place)
    groups = h5.keys()
    return "dimensions" in groups and "t0_fields" in groups and "spatial_dims" in h5.attributes("dimensions")


def _splits(place: Place) -> dict[str, list[Place]]:
    """Split -> files; the split is "" where folders do not tell."""
    if place.is_file():
        return {"": [place]}
    names = place.names()
    root = place.below("data") if "data" in names else place
    names = root.names() if root is not place and root.is_folder() else names
    found = {s: root.below(s).files(*SUFFIXES) for s in SPLITS if s in names and root.below(s).is_folder()}
    found = {split: files for split, files in found.items() if files}
    if found:
        return found
    files = place.files(*SUFFIXES)
    if not files:
        return {}
    return {place.name() if place.name() in SPLITS else "": files}


@dataclass
class _File:
    source: str
    split: str
    dataset: str
    grid: str
    spatial: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # dim -> positions, (trajectory, dim) or (dim,)
    fields: dict[str, xr.Variable] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)  # numbers, or one per trajectory
    boundaries: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.sizes.get("trajectory", 1)

    def row(self, dim: str) -> list[np.ndarray]:
        """Positions in every trajectory."""
        values = self.rows[dim]
        return [values] * self.count if values.ndim == 1 else list(values)

    def take(self, name: str, variable: xr.Variable) -> None:
        """Adds a field, after its sizes are checked against those before."""
        for dim, size in variable.sizes.items():
            if self.sizes.setdefault(str(dim), size) != size:
                raise DataError(
                    f"{self.source}: {name!r} has {size} entries along {dim!r}, but {self.sizes[str(dim)]} were "
                    "expected. The file is incomplete or inconsistent: copy or download it again."
                )
        if name in self.fields or name in ("trajectory", "time", "split", "frames", *self.spatial):
            raise DataError(f"{self.source}: there are two things called {name!r}. Rename one of them.")
        self.fields[name] = variable


def _read(place: Place, split: str) -> _File:
    """Names, sizes, coordinates and parameters of one file; fields stay in it."""
    h5 = _open(place)
    attrs = h5.attributes()
    spatial = _spatial_dims(h5)
    stored = attrs.get("n_spatial_dims", len(spatial))
    if not np.array_equal(stored, len(spatial)):
        raise DataError(f"{place}: n_spatial_dims is {stored}, but spatial_dims are {spatial}.")
    file = _File(str(place), split, str(attrs.get("dataset_name", "")), str(attrs.get("grid_type", "")), spatial)
    _read_dimensions(h5, file)
    for order, group in enumerate(GROUPS):
        for name in _names(h5, group):
            _read_field(h5, file, group, name, order)
    if not file.fields:
        raise DataError(f"{place} lists no field in {', '.join(GROUPS)}.")
    if "time" not in file.rows and any("time" in v.dims for v in file.fields.values()):
        raise DataError(f"{place} has no 'dimensions/time', but fields that vary in time. Download it again.")
    if not np.array_equal(number := attrs.get("n_trajectories", file.count), file.count):
        raise DataError(f"{place}: n_trajectories is {number}, but fields hold {file.count}. The file is incomplete.")
    for name in _texts(attrs.get("simulation_parameters")):
        if isinstance(attrs.get(name), bool | int | float):
            file.scalars[name] = np.asarray(attrs[name])
    for name in _names(h5, "scalars"):
        _read_scalar(h5, file, name)
    if h5.has("boundary_conditions"):
        file.boundaries = _boundaries(h5, spatial)
    return file


def _read_dimensions(h5: Hdf5, file: _File) -> None:
    for dim in ("time", *file.spatial):
        key = f"dimensions/{dim}"
        if dim == "time" and not h5.has(key):
            continue
        attrs = h5.attributes(key)
        if dim != "time" and _flag(attrs, "time_varying", False, key, h5):
            raise DataError(f"{h5}: {key!r} moves in time, which is not supported.")
        varying = _flag(attrs, "sample_varying", False, key, h5)
        dims = ("trajectory", dim) if varying else (dim,)
        file.sizes.update(dict(h5.variable(key, dims).sizes))
        file.rows[dim] = h5.values(key)
    rows = {len(values) for values in file.rows.values() if values.ndim == 2}
    if len(rows) > 1:
        raise DataError(f"{h5}: the datasets in 'dimensions' hold {sorted(rows)} trajectories. Download it again.")


def _read_field(h5: Hdf5, file: _File, group: str, name: str, order: int) -> None:
    key = f"{group}/{name}"
    attrs = h5.attributes(key)
    varying = np.atleast_1d(attrs.get("dim_varying", [True] * len(file.spatial)))
    if varying.dtype.kind not in "biu" or varying.shape != (len(file.spatial),):
        raise DataError(f"{h5}: dim_varying of {key!r} is {varying}, but space has the axes {file.spatial}.")
    dims = ["trajectory"] if _flag(attrs, "sample_varying", True, key, h5) else []
    dims += ["time"] if _flag(attrs, "time_varying", True, key, h5) else []
    dims += [dim for dim, there in zip(file.spatial, varying, strict=True) if there]
    variable = h5.variable(key, (*dims, *"ij"[:order]))
    count = len(file.spatial)
    if any(variable.sizes[i] != count for i in "ij"[:order]):
        raise DataError(
            f"{h5}: {key!r} has shape {variable.shape}, but {order} axes of {count} components ({file.spatial}) should "
            "come last."
        )
    for i, channel in enumerate(_components(name, order, file.spatial)):
        part = variable
        for at, dim in enumerate("ij"[:order]):
            part = hdf5.component(part, dim, i // count ** (order - 1 - at) % count)
        file.take(channel, part)


def _read_scalar(h5: Hdf5, file: _File, name: str) -> None:
    key = f"scalars/{name}"
    attrs = h5.attributes(key)
    dims = ["trajectory"] if _flag(attrs, "sample_varying", False, key, h5) else []
    if _flag(attrs, "time_varying", False, key, h5):
        file.scalars.pop(name, None)
        file.take(name, h5.variable(key, (*dims, "time")))
        return
    values = h5.values(key)
    if values.shape != ((file.count,) if dims else ()):
        raise DataError(
            f"{h5}: {key!r} has shape {values.shape}, but {(file.count,) if dims else 'one number'} was expected."
        )
    file.scalars[name] = values


def _boundaries(h5: Hdf5, spatial: list[str]) -> np.ndarray:
    table = np.full((len(spatial), 2), BOUNDARIES.index("OPEN"))
    for name in h5.keys("boundary_conditions") if h5.has("boundary_conditions") else ():
        key = f"boundary_conditions/{name}"
        attrs = h5.attributes(key)
        kind = str(attrs.get("bc_type", "")).upper()
        dims = _texts(attrs.get("associated_dims"))
        if kind not in BOUNDARIES or not set(dims) <= set(spatial) or len(set(dims)) < len(dims):
            raise DataError(
                f"{h5}: {key!r} is of type {kind!r} on {dims}, but {', '.join(BOUNDARIES)} on axes of {spatial} was "
                "expected."
            )
        mask = None
        if h5.has(f"{key}/mask"):
            lead = [flag for flag in ("sample_varying", "time_varying") if _flag(attrs, flag, False, key, h5)]
            mask = h5.variable(f"{key}/mask", (*lead, *dims))
        covers = np.all if kind == "WALL" else np.any
        for dim in dims:
            for end in (0, 1):
                if mask is None or covers(mask.isel({dim: -end}).values):
                    table[spatial.index(dim), end] = BOUNDARIES.index(kind)
    return table


def _spatial_dims(h5: Hdf5) -> list[str]:
    spatial = _texts(h5.attributes("dimensions").get("spatial_dims"))
    if not 1 <= len(set(spatial)) == len(spatial) <= 3 or {"time", "trajectory", "i", "j", ""} & set(spatial):
        raise DataError(f"{h5}: spatial_dims of 'dimensions' are {spatial}, but one to three names were expected.")
    return spatial


def _names(h5: Hdf5, group: str) -> list[str]:
    """The members of a group in the order that it states; none where it is absent."""
    if not h5.has(group):
        return []
    attrs = h5.attributes(group)
    return _texts(attrs["field_names"]) if "field_names" in attrs else h5.keys(group)


def _components(name: str, order: int, spatial: list[str]) -> list[str]:
    if order == 0:
        return [name]
    return [f"{name}_{a}{b}" for a in spatial for b in (spatial if order == 2 else [""])]


def _flag(attrs: dict, name: str, default: bool, key: str, h5: Hdf5) -> bool:
    value = attrs.get(name, default)
    if not isinstance(value, bool | int):
        raise DataError(f"{h5}: {name} of {key!r} is {value!r}, but true or false was expected.")
    return bool(value)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _numbers(value: Any, count: int, what: str) -> list[float]:
    rows = value if isinstance(value, list) else [value]
    flat = [item for row in rows[:count] for item in (row[: count + 1] if isinstance(row, list) else [row])]
    if len(rows) > count or len(flat) != count or not all(isinstance(item, int | float) for item in flat):
        raise DataError(f"{what} should be {count} {'numbers' if count > 1 else 'number'}. Download the file again.")
    return [float(item) for item in flat]


# --- together ---------------------------------------------------------------------------------------------------------


def _check_alike(files: list[_File]) -> None:
    first = files[0]
    for file in files[1:]:
        for what, a, b in (
            ("dataset_name", file.dataset, first.dataset),
            ("grid_type", file.grid, first.grid),
            ("axes", list(file.rows), list(first.rows)),
            ("grid", [file.sizes[d] for d in file.spatial], [first.sizes[d] for d in first.spatial]),
            ("fields", sorted(file.fields), sorted(first.fields)),
        ):
            if a != b:
                raise DataError(
                    f"{file.source} and {first.source} differ in {what}: {a} and {b}. Open them one by one."
                )


def _assemble(files: list[_File]) -> xr.Dataset:
    first = files[0]
    variables = {
        name: joined.join(name, [joined.Part(file.source, file.count, file.fields[name]) for file in files])
        for name in first.fields
    }
    per_trajectory = len(files) > 1 or "trajectory" in first.sizes
    for name in dict.fromkeys(name for file in files for name in file.scalars):
        values = [np.broadcast_to(file.scalars.get(name, np.nan), file.count) for file in files]
        taken = {*first.fields, *first.rows, "trajectory", "split", "frames"}
        variables[f"parameter_{name}" if name in taken else name] = (
            xr.Variable(("trajectory",), np.concatenate(values)) if per_trajectory else xr.Variable((), values[0][0])
        )
    text, ends = _boundary_text(files)
    coords: dict[str, xr.Variable] = {}
    for dim in first.rows:
        attrs: dict[str, Any] = {}
        if dim != "time" and ends is not None:
            attrs["periodic"] = int((ends[first.spatial.index(dim)] == BOUNDARIES.index("PERIODIC")).all())
        rows = [row for file in files for row in file.row(dim)]
        found = joined.axis(dim, "times" if dim == "time" else f"grid_{dim}", rows, attrs)
        if dim in found and attrs.get("periodic") and len(rows[0]) > 1:
            found[dim].attrs["period"] = float(np.ptp(rows[0]) * len(rows[0]) / (len(rows[0]) - 1))
        (coords if dim in found else variables).update(found)
    if "time" in first.rows and per_trajectory:
        variables |= joined.frames([file.sizes["time"] for file in files for _ in range(file.count)])
    if per_trajectory and any(file.split for file in files):
        coords["split"] = xr.Variable(("trajectory",), [file.split for file in files for _ in range(file.count)])
    return _with_degrees(xr.Dataset(variables, coords, _attributes(first, text)), first.grid)


def _attributes(file: _File, boundary_text: str) -> dict[str, str]:
    return {
        "title": f"The Well: {file.dataset or 'unnamed'}",
        "grid_type": file.grid,
        "boundary_conditions": boundary_text,
        "source": f"https://huggingface.co/datasets/polymathic-ai/{file.dataset}",
        "references": "Ohana et al. 2024, The Well, arXiv:2412.00568",
    }


def _boundary_text(files: list[_File]) -> tuple[str, np.ndarray | None]:
    """(what the files say, the codes where all of them agree and OPEN elsewhere)."""
    tables = [file.boundaries for file in files]
    if any(table is None for table in tables):
        return "not stated", None
    texts = dict.fromkeys(
        "; ".join(
            f"{dim}: {BOUNDARIES[low]}" + (f" (low end), {BOUNDARIES[high]} (high end)" if low != high else "")
            for dim, (low, high) in zip(file.spatial, table, strict=True)
        )
        for file, table in zip(files, tables, strict=True)
    )
    agreed = np.where((np.array(tables) == tables[0]).all(0), tables[0], BOUNDARIES.index("OPEN"))
    return " or, in other files, ".join(texts), agreed


def _with_degrees(ds: xr.Dataset, grid: str) -> xr.Dataset:
    """Colatitude theta and azimuth phi, in radians, as latitude and longitude in degrees."""
    if grid.lower() != "spherical":
        return ds
    for angle, name, limit in (("theta", "latitude", np.pi), ("phi", "longitude", 2 * np.pi)):
        if angle not in ds.coords or not ((ds[angle] > -0.01) & (ds[angle] < limit + 0.01)).all():
            continue
        degrees = np.rad2deg(ds[angle].values.astype(np.float64))
        attrs = {k: v for k, v in ds[angle].attrs.items() if k != "period"}
        if attrs.get("periodic"):
            attrs["period"] = 360.0
        if name == "latitude":
            degrees = 90 - degrees
        attrs |= {"units": "degrees_north" if name == "latitude" else "degrees_east", "standard_name": name}
        ds = ds.rename({angle: name}).assign_coords({name: (name, degrees, attrs)})
    return ds
