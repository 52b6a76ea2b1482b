"""PDEArena: smoke in a box, Kuramoto-Sivashinsky, shallow water. Gupta & Brandstetter 2022, arXiv:2209.15616.

Kuramoto-Sivashinsky: Lippe et al. 2023, arXiv:2308.05732.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from physml.data import hdf5, joined, netcdf
from physml.data.guarded import guarded
from physml.data.hdf5 import Hdf5
from physml.data.place import Place
from physml.errors import ConfigError, DataError, suggest

SPLITS = ("train", "valid", "test")
SUFFIXES = (".h5", ".hdf5")
SMOKE = {
    "u": "smoke density, at cell centres",
    "vx": "velocity along x, staggered: on the faces between cells along x",
    "vy": "velocity along y, staggered: on the faces between cells along y",
}
PARAMETERS = {
    "dt": ("distance of frames", "s"),
    "dx": ("width of cells along x", ""),
    "dy": ("width of cells along y", ""),
    "buo_y": ("buoyancy along y", ""),
    "v": ("viscosity", ""),
}
SHALLOW = ("u", "v", "vor", "pres")
SHALLOW_DIMS = {"b": "trajectory", "lev": "level", "lat": "latitude", "lon": "longitude"}
SPIN_UP = 4  # frames that sub-sampled shallow water leaves out at the beginning


def recognizes(place: Place) -> bool:
    """A file or folder of the three data sets; shallow water by its folder."""
    if place.is_file():
        return place.name().endswith(SUFFIXES) and _kind(Hdf5(place)) is not None
    if _stores(place):
        return True
    return any(_split_of(file.name()) and _kind(Hdf5(file)) is not None for file in place.files(*SUFFIXES)[:1])


def open_dataset(place: Place, *, split: str | None = None, time_step: int = 1) -> xr.Dataset:
    """Trajectories of one data set, from its folder or from one file.

    - Smoke: `u` (density), `vx`, `vy` `(trajectory, time, x, y)`, parameters `buo_y, dt, dx, dy`. Velocities are
      staggered: they lie on faces.
    - Kuramoto-Sivashinsky: `u` `(trajectory, time, x)`, parameters `dt, dx` and, where it varies, the viscosity `v`;
      `ks_conditions` scales them as the benchmark does.
    - Shallow water: `u, v, vor, pres` `(trajectory, time, latitude, longitude)` out of `<split>.zarr` or, without it,
      `<split>/seed=*/run*/output.nc`. normstats.pt beside them is a pickle and not read: `point_statistics` computes
      the same from the data.

    Positions are `dx * (i + 0.5)` and times `t[0] + dt * i`: the arrays `x`, `y` and `t` of the files count the far end
    in, though cells are centred and frames `dt` apart. Where `dx` or `dt` differ between trajectories there is no
    coordinate; `grid_x(trajectory, x)` and `times(trajectory, time)` tell the positions.

    Args:
        place: the folder, or one file.
        split: "train", "valid" or "test", by the names of the files (not of folders); all when None, with a coordinate
            `split`.
        time_step: keeps every n-th frame. The benchmark takes 4 for Kuramoto-Sivashinsky; for shallow water 4 (one
            day) or 8 (two days), and then leaves the first four frames out, as is done here.

    Raises DataError for missing files, groups and fields, and for files that differ in grid.
    """
    if not isinstance(time_step, int) or time_step < 1:
        raise ConfigError(f"time_step is {time_step!r}, but a count of frames was expected.")
    stores = {} if place.is_file() else _stores(place)
    members = stores if stores else _files(place)
    if split is not None:
        if split not in members:
            raise DataError(f"{place} has no split {split!r}." + suggest(split, filter(None, members)))
        members = {split: members[split]}
    read = _read_shallow if stores else _read
    files = [file for name, found in members.items() for part in found for file in read(part, name)]
    return _every(_assemble(files, str(place)), time_step, SPIN_UP if stores else 0, str(place))


def ks_conditions(ds: xr.Dataset) -> np.ndarray:
    """`(trajectory, 2 or 3)` float32: the parameters of Kuramoto-Sivashinsky as the benchmark gives them to models.

    `(dt - 0.15) * 100` if all dt lie in (0.15, 0.25), `(dx - 0.2) * 100` if all dx lie in (0.2, 0.3), and, where there
    is a viscosity, `(v - 0.5) * 100` if all lie in [0.5, 1.5]: numbers from 0 to 10, or to 100. A parameter outside of
    its range stays as it is, with a warning.
    """
    columns = []
    for name, low, high in (("dt", 0.15, 0.25), ("dx", 0.2, 0.3), ("v", 0.5, 1.5)):
        if name not in ds:
            if name != "v":
                raise DataError(f"These data have no {name!r}, which is a condition of Kuramoto-Sivashinsky.")
            continue
        values = np.atleast_1d(ds[name].values).astype(np.float64)
        inside = (values >= low) & (values <= high) if name == "v" else (values > low) & (values < high)
        if inside.all():
            values = (values - low) * 100
        else:
            warnings.warn(f"{name} leaves {low}..{high}, so it is not scaled.", stacklevel=2)
        columns.append(values.astype(np.float32))
    return np.stack(columns, -1)


def point_statistics(ds: xr.Dataset) -> dict[str, xr.Dataset]:
    """What normstats.pt holds: "mean" and "std" of every field at every grid point, over trajectories and time.

    The standard deviation has the divisor n. The benchmark scales `pres` and `vor` by them, not `u`
    and `v`; its numbers are those of the split train.
    """
    fields = ds[[name for name in SHALLOW if name in ds]]
    dims = [dim for dim in ("trajectory", "time") if dim in fields.dims]
    return {"mean": fields.mean(dims), "std": fields.std(dims)}


# --- smoke and Kuramoto-Sivashinsky -----------------------------------------------------------------------------------


@dataclass
class _File:
    """`rows` are positions along a dimension, one array per trajectory."""

    source: str
    split: str
    kind: str
    count: int
    fields: dict[str, xr.Variable]
    rows: dict[str, list[np.ndarray]]
    parameters: dict[str, np.ndarray]


def _split_of(name: str) -> str | None:
    """The split that a file name tells, or None."""
    found = [s for s in SPLITS if f"_{s}_" in name] or [s for s in SPLITS if s in name]
    return found[0] if len(found) == 1 else None


def _files(place: Place) -> dict[str, list[Place]]:
    if place.is_file():
        groups = _groups(Hdf5(place))
        if len(groups) != 1:
            raise DataError(
                f"{place} should hold one group out of {', '.join(SPLITS)}, but it holds {groups or 'none'}."
            )
        return {groups[0]: [place]}
    found: dict[str, list[Place]] = {}
    for file in place.files(*SUFFIXES):
        if split := _split_of(file.name()):
            found.setdefault(split, []).append(file)
    if not found:
        raise DataError(
            f"{place} holds no {SUFFIXES[0]} file with {', '.join(SPLITS)} in its name, and no shallow water."
        )
    return {split: found[split] for split in SPLITS if split in found}


def _groups(h5: Hdf5) -> list[str]:
    keys = h5.keys()
    return [split for split in SPLITS if split in keys]


def _kind(h5: Hdf5, group: str | None = None) -> str | None:
    group = group or next(iter(_groups(h5)), None)
    if group is None or not h5.is_group(group):
        return None
    keys = h5.keys(group)
    if {*SMOKE} <= set(keys):
        return "smoke"
    return "ks" if any(key.startswith("pde_") for key in keys) else None


def _read(place: Place, split: str) -> list[_File]:
    h5 = Hdf5(place)
    if split not in _groups(h5):
        raise DataError(f"{place} has no group {split!r}, which its name promises." + suggest(split, h5.keys()))
    kind = _kind(h5, split)
    if kind is None:
        raise DataError(f"{place}: group {split!r} holds neither {', '.join(SMOKE)} nor 'pde_...'. Download it again.")
    if kind == "smoke":
        fields = {
            name: h5.variable(f"{split}/{name}", ("trajectory", "time", "x", "y"), {"long_name": text})
            for name, text in SMOKE.items()
        }
    else:
        fields = {"u": _ks_field(h5, split)}
    sizes = next(iter(fields.values())).sizes
    for name, variable in fields.items():
        if variable.sizes != sizes:
            raise DataError(f"{place}: {name!r} has shape {variable.shape}, but {tuple(sizes.values())} was expected.")
    count = sizes["trajectory"]
    parameters = {name: h5.values(f"{split}/{name}") for name in PARAMETERS if h5.has(f"{split}/{name}")}
    for name, values in parameters.items():
        if values.shape != (count,):
            raise DataError(f"{place}: {name!r} has shape {values.shape}, but ({count},) was expected.")
    rows = {
        dim: _rows(parameters[f"d{dim}"] * 0.5, parameters[f"d{dim}"], sizes[dim])
        for dim in ("x", "y")
        if f"d{dim}" in parameters and dim in sizes
    }
    if h5.has(f"{split}/t"):
        times = h5.values(f"{split}/t")
        if times.shape != (count, sizes["time"]):
            raise DataError(f"{place}: 't' has shape {times.shape}, but {(count, sizes['time'])} was expected.")
        rows["time"] = _rows(times[:, 0], parameters["dt"], sizes["time"]) if "dt" in parameters else list(times)
    elif "dt" in parameters:
        rows["time"] = _rows(np.zeros(count), parameters["dt"], sizes["time"])
    return [_File(str(place), split, kind, count, fields, rows, parameters)]


def _ks_field(h5: Hdf5, split: str) -> xr.Variable:
    """The key tells frames and points, such as pde_140-256; a channel axis of one is taken away."""
    keys = [key for key in h5.keys(split) if key.startswith("pde_")]
    if len(keys) > 1:
        raise DataError(f"{h5}: group {split!r} holds several fields: {', '.join(keys)}. Keep one of them.")
    key = f"{split}/{keys[0]}"
    if len(h5.shape(key)) != 4:
        return h5.variable(key, ("trajectory", "time", "x"))
    variable = h5.variable(key, ("trajectory", "time", "channel", "x"))
    if variable.sizes["channel"] != 1:
        raise DataError(f"{h5}: {key!r} has shape {variable.shape}, but one channel was expected.")
    return hdf5.component(variable, "channel", 0)


def _rows(first: np.ndarray, steps: np.ndarray, size: int) -> list[np.ndarray]:
    """Even positions in every trajectory; trajectories with the same start and step share one array."""
    known: dict[tuple[float, float], np.ndarray] = {}
    pairs = zip(np.asarray(first, np.float64).tolist(), np.asarray(steps, np.float64).tolist(), strict=True)
    return [known.setdefault((a, d), a + d * np.arange(size)) for a, d in pairs]


# --- shallow water ----------------------------------------------------------------------------------------------------


def _stores(place: Place) -> dict[str, list[Place]]:
    """Split -> one zarr store, or the output.nc of every run; empty where it is no shallow water."""
    names = place.names()
    if any(name.startswith("seed=") for name in names):
        return {place.name(): _runs(place)} if place.name() in SPLITS else {"": _runs(place)}
    if _is_store(place):
        return {place.name().split(".")[0]: [place]}
    found: dict[str, list[Place]] = {}
    for split in SPLITS:
        if f"{split}.zarr" in names and _is_store(place.below(f"{split}.zarr")):
            found[split] = [place.below(f"{split}.zarr")]
        elif split in names and place.below(split).is_folder() and (runs := _runs(place.below(split))):
            found[split] = runs
    return found


def _is_store(place: Place) -> bool:
    names = [f"{split}.zarr" for split in SPLITS]
    return place.name() in names and place.is_folder() and {*SHALLOW} <= set(place.names())


def _runs(place: Place) -> list[Place]:
    seeds = [place.below(name) for name in place.names() if name.startswith("seed=")]
    return [
        seed.below(run, "output.nc") for seed in seeds for run in seed.names() if run.startswith("run")
    ]  # fmt: skip


def _read_shallow(place: Place, split: str) -> list[_File]:
    opener = netcdf.open_zarr if place.name().endswith(".zarr") else netcdf.open_netcdf
    ds = guarded(opener(place.path, storage_options=place.storage_options), str(place))
    ds = ds.rename({old: new for old, new in SHALLOW_DIMS.items() if old in ds.dims})
    if missing := {*SHALLOW} - set(ds.data_vars):
        raise DataError(f"{place} has no {min(missing)!r}." + suggest(min(missing), map(str, ds.data_vars)))
    for dim in ("time", "latitude", "longitude"):
        if dim not in ds.dims or ds.sizes[dim] == 0 or (dim in ds.variables and ds[dim].dims != (dim,)):
            raise DataError(f"{place} has no axis {dim!r}, or an empty one. Its axes are {dict(ds.sizes)}.")
    ds = ds[[*SHALLOW]]
    if ds.sizes.get("level") == 1:
        ds = ds.isel(level=0, drop=True)
    allowed = [d for d in ("trajectory", "time", "level", "latitude", "longitude") if d in ds.dims]
    for name, variable in ds.variables.items():
        if name in SHALLOW and not {"time", "latitude", "longitude"} <= set(variable.dims) <= set(allowed):
            raise DataError(f"{place}: {name!r} has axes {variable.dims}, but {tuple(allowed)} was expected.")
    count = ds.sizes.get("trajectory", 1)
    if count == 0:
        raise DataError(f"{place} holds no trajectory.")
    rows = {dim: [np.asarray(ds[dim].values)] * count for dim in allowed if dim in ds.coords and dim != "trajectory"}
    fields = {}
    for name in SHALLOW:
        variable = ds.variables[name].transpose(*(d for d in allowed if d in ds.variables[name].dims))
        chunks = {SHALLOW_DIMS.get(d, d): n for d, n in variable.encoding.get("preferred_chunks", {}).items()}
        chunks = {d: n for d, n in chunks.items() if d in variable.dims}
        variable.encoding = {"preferred_chunks": chunks} if chunks else {}
        fields[name] = variable
    return [_File(str(place), split, "shallow water", count, fields, rows, {})]


# --- together ---------------------------------------------------------------------------------------------------------

ABOUT: dict[str, dict[str, Any]] = {
    "smoke": {
        "title": "PDEArena: Navier-Stokes, smoke in a box",
        "source": "https://huggingface.co/datasets/pdearena/NavierStokes-2D (or NavierStokes-2D-conditoned)",
        "boundary_conditions": "not periodic",
        "staggered": "vx and vy lie on cell faces, u at cell centres",
    },
    "ks": {
        "title": "PDEArena: Kuramoto-Sivashinsky",
        "source": "https://huggingface.co/datasets/pdearena/KuramotoSivashinsky1D",
        "boundary_conditions": "x: periodic",
        "periodic": "x",
    },
    "shallow water": {
        "title": "PDEArena: shallow water on the sphere (SpeedyWeather)",
        "source": "https://huggingface.co/datasets/pdearena/ShallowWater-2D",
        "boundary_conditions": "sphere",
        "periodic": "longitude",
    },
}
REFERENCES = "Gupta & Brandstetter 2022, arXiv:2209.15616; Lippe et al. 2023, arXiv:2308.05732 (Kuramoto-Sivashinsky)"


def _assemble(files: list[_File], source: str) -> xr.Dataset:
    if not files:
        raise DataError(f"{source} holds no run with an output.nc. Copy or download it again.")
    first = files[0]
    for file in files:
        if file.kind != first.kind:
            raise DataError(f"{file.source} holds {file.kind}, but {first.source} {first.kind}. Open them one by one.")
    about = ABOUT[first.kind]
    variables = {
        name: joined.join(name, [joined.Part(file.source, file.count, file.fields[name]) for file in files])
        for name in first.fields
    }
    coords: dict[str, xr.Variable] = {}
    for dim in first.rows:
        if not all(dim in file.rows for file in files):
            continue
        rows = [row for file in files for row in file.rows[dim]]
        found = joined.axis(dim, "times" if dim == "time" else f"grid_{dim}", rows, _axis_attrs(first, dim, rows[0]))
        (coords if dim in found else variables).update(found)
    for name, (text, unit) in PARAMETERS.items():
        if any(name in file.parameters for file in files):
            values = [file.parameters.get(name, np.full(file.count, np.nan)) for file in files]
            attrs = {"long_name": text, **({"units": unit} if unit else {})}
            variables[name] = xr.Variable(("trajectory",), np.concatenate(values), attrs)
    if "trajectory" in next(iter(variables.values())).dims:
        lengths = [next(iter(file.fields.values())).sizes["time"] for file in files for _ in range(file.count)]
        variables |= joined.frames(lengths)
        if first.split:
            coords["split"] = xr.Variable(("trajectory",), [file.split for file in files for _ in range(file.count)])
    return xr.Dataset(variables, coords, {**about, "references": REFERENCES})


def _axis_attrs(file: _File, dim: str, row: np.ndarray) -> dict[str, Any]:
    if dim == "time":
        return {} if file.kind == "shallow water" else {"units": "s"}
    if dim == "longitude":
        return {"units": "degrees_east", "standard_name": "longitude", "periodic": 1, "period": 360.0}
    if dim == "latitude":
        return {"units": "degrees_north", "standard_name": "latitude", "periodic": 0}
    if dim == "x" and file.kind == "ks":
        return {"periodic": 1, "period": float(2 * row[0] * len(row))}
    return {"periodic": 0}


def _every(ds: xr.Dataset, step: int, skip: int, source: str) -> xr.Dataset:
    """Every n-th frame, after the first `skip`."""
    if step == 1:
        return ds
    if ds.sizes["time"] <= skip:
        raise DataError(
            f"{source} has {ds.sizes['time']} frames, of which time_step={step} leaves out the first {skip}."
        )
    ds = ds.isel(time=slice(skip, None, step))
    if "frames" in ds:
        ds["frames"] = ((ds["frames"] - skip + step - 1) // step).clip(0).assign_attrs(ds["frames"].attrs)
    return ds
