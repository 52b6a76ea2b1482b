"""Writing the layouts of PDEArena: HDF5 files of smoke or of one-dimensional flow, zarr stores of shallow water."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import xarray as xr

from physml.data import slabs
from physml.data.pdearena import SHALLOW, SHALLOW_DIMS, SMOKE
from physml.data.slabs import Run
from physml.errors import DataError

LAYOUT = "PDEArena"
KINDS = {
    "smoke": ("u, vx, vy on (trajectory, time, x, y)", ("dt", "dx", "dy", "buo_y")),
    "ks": ("u on (trajectory, time, x)", ("dt", "dx", "v")),
}
AXES = {"smoke": ("x", "y"), "ks": ("x",)}
RENAMED = {"viscosity": "v"}  # what other data call a parameter of the layout


def write(ds: xr.Dataset, out: Path, write_zarr: Callable[[xr.Dataset, Path, int], None]) -> None:
    """A folder of `<name>_<split>_..h5`, one file where `out` ends in .h5 or .hdf5, or a folder of `<split>.zarr`.

    - `u, vx, vy` on (trajectory, time, x, y): the layout of smoke;
    - `u` on (trajectory, time, x): that of Kuramoto-Sivashinsky, with `dt`, `dx` and a viscosity `v`;
    - `u, v, vor, pres` on (trajectory, time, latitude, longitude): that of shallow water, zarr version 2.

    Trajectories without a split go to train. Of positions, HDF5 files hold the steps and the first time: axes must be
    even, and are read back as cell centres `dx * (i + 0.5)`. Raises DataError for everything else, by name.
    """
    kind = check(ds, out)
    if kind == "shallow":
        _write_shallow(ds, out, write_zarr)
    else:
        _write_files(_renamed(ds, kind), out, kind)


def check(ds: xr.Dataset, out: Path) -> str:
    """The kind of files that hold a dataset: a key of KINDS, or "shallow". Raises DataError for what none holds."""
    slabs.check_trajectory_labels(ds, LAYOUT)
    fields = {str(n): v.dims for n, v in ds.data_vars.items() if {*v.dims} - {"trajectory", "time"}}
    fields = {name: dims for name, dims in fields.items() if not name.startswith("grid_")}
    shape = {frozenset(dims) for dims in fields.values()}
    if {*SHALLOW} == {*fields} and shape == {frozenset(("trajectory", "time", "latitude", "longitude"))}:
        _check_shallow(ds, out)
        return "shallow"
    if {*SMOKE} == {*fields} and shape == {frozenset(("trajectory", "time", "x", "y"))}:
        kind = "smoke"
    elif {"u"} == {*fields} and shape == {frozenset(("trajectory", "time", "x"))}:
        kind = "ks"
    else:
        found = ", ".join(f"{name} on ({', '.join(map(str, dims))})" for name, dims in fields.items())
        raise DataError(
            f"{LAYOUT} has no layout for {found or 'data without a field'}: it holds {KINDS['smoke'][0]}; "
            f"{KINDS['ks'][0]}; or {', '.join(SHALLOW)} on (trajectory, time, latitude, longitude). Rename, select or "
            "transpose fields, or write the_well, netcdf or zarr."
        )
    ds = _renamed(ds, kind)
    _check_kept(ds, kind, AXES[kind])
    parts = _runs(ds)
    for run in parts:
        _parameters(ds, kind, run)
    if out.suffix in (".h5", ".hdf5") and len(parts) > 1:
        raise DataError(
            f"{out.name} is one file, but trajectories of several splits or lengths need several. Name a folder."
        )
    return kind


def _renamed(ds: xr.Dataset, kind: str) -> xr.Dataset:
    own = KINDS[kind][1]
    return ds.rename({old: new for old, new in RENAMED.items() if old in ds and new in own and new not in ds})


def _runs(ds: xr.Dataset) -> list[Run]:
    return [run._replace(split=run.split or "train") for run in slabs.runs(ds, LAYOUT)]


def _write_files(ds: xr.Dataset, out: Path, kind: str) -> None:
    axes, parts = AXES[kind], _runs(ds)
    if out.suffix in (".h5", ".hdf5"):
        _write_file(ds, out, kind, axes, parts[0])
        return
    out.mkdir()
    for number, run in enumerate(parts):
        # As the generators of the benchmark name them: equation, split, seed, buoyancy, and the count for train.
        buoyancy = f"_{float(_parameter(ds, 'buo_y', run)[0]):.5f}" if "buo_y" in ds else ""
        name = f"NavierStokes2D_{run.split}_{number}{buoyancy}" if kind == "smoke" else f"KS_{run.split}_{number}"
        count = f"_{run.count}" if run.split == "train" or kind == "ks" else ""
        _write_file(ds, out / f"{name}{count}.h5", kind, axes, run)


def _check_kept(ds: xr.Dataset, kind: str, axes: tuple[str, ...]) -> None:
    """Raises DataError for what files of this kind cannot hold."""
    own = {*KINDS[kind][1], "frames", "times", "split", *axes, *(f"grid_{axis}" for axis in axes), "trajectory", "time"}
    own |= {*SMOKE} if kind == "smoke" else {"u"}
    for name in map(str, ds.variables):
        if name not in own:
            raise DataError(
                f"{LAYOUT} has no place for {name!r} beside {', '.join(KINDS[kind][1])}. Drop it with "
                f"drop_vars({name!r}), or write the_well, netcdf or zarr."
            )
        if name in KINDS[kind][1] and ds[name].dims not in ((), ("trajectory",)):
            raise DataError(f"{LAYOUT} holds one {name!r} per trajectory, but here it has axes {ds[name].dims}.")
    slabs.numbers(ds, [str(name) for name in ds.variables if name not in ("split", "trajectory")], LAYOUT)
    if kind == "ks" and "x" in ds.coords and not ds["x"].attrs.get("periodic", 1):
        raise DataError(f"{LAYOUT} holds one-dimensional fields on a periodic axis, but 'x' is not. Write the_well.")


def _write_file(ds: xr.Dataset, path: Path, kind: str, axes: tuple[str, ...], run: Run) -> None:
    names = [*SMOKE] if kind == "smoke" else ["u"]
    with h5py.File(path, "w") as file:
        group = file.create_group(run.split)
        for name in names:
            dims = ("trajectory", "time", *axes)
            shape = (run.count, run.frames, *(ds.sizes[axis] for axis in axes))
            key = name if kind == "smoke" else f"pde_{run.frames}-{ds.sizes['x']}"
            data = group.create_dataset(key, shape, ds[name].dtype)
            for at, arrays in slabs.slabs(ds, [name], dims, run):
                data[at] = arrays[0]
        parameters, times = _parameters(ds, kind, run), slabs.rows(ds, "time", "times", run)
        for name, values in parameters.items():
            group[name] = values
        if times is None:
            times = parameters["dt"][:, None] * np.arange(run.frames)
        group["t"] = _as_short(np.broadcast_to(times, (run.count, run.frames)), parameters["dt"].dtype)
        for axis in axes:  # with the far end, as the benchmark has them
            length = parameters[f"d{axis}"] * ds.sizes[axis]
            group[axis] = np.linspace(0, length, ds.sizes[axis], axis=-1).astype(parameters[f"d{axis}"].dtype)


def _parameters(ds: xr.Dataset, kind: str, run: Run) -> dict[str, np.ndarray]:
    """What a file holds beside its fields, one number per trajectory."""
    parameters = {name: _parameter(ds, name, run) for name in KINDS[kind][1] if name in ds}
    for axis in AXES[kind]:
        parameters.setdefault(f"d{axis}", _step(slabs.rows(ds, axis, f"grid_{axis}", run), axis, run))
    parameters.setdefault("dt", _step(slabs.rows(ds, "time", "times", run), "time", run))
    return parameters


def _parameter(ds: xr.Dataset, name: str, run: Run) -> np.ndarray:
    values = ds[name].values
    return values[run.first : run.first + run.count] if values.ndim else np.full(run.count, values)


def _step(positions: np.ndarray | None, axis: str, run: Run) -> np.ndarray:
    """The step of even positions, one per trajectory."""
    if positions is None:
        return np.ones(run.count)
    steps = np.diff(np.atleast_2d(positions).astype(np.float64), axis=-1)
    if steps.shape[-1] == 0:
        return np.ones(run.count)
    mean = steps.mean(-1)
    if not np.allclose(steps, mean[:, None], rtol=1e-4, atol=0) or (mean <= 0).any():
        raise DataError(f"{LAYOUT} holds steps instead of positions, but those of {axis!r} are not even. Interpolate.")
    return np.broadcast_to(mean, run.count)


def _as_short(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In a type that holds the first of every row exactly: readers take the rest from the step."""
    return values.astype(dtype) if np.array_equal(values[:, 0].astype(dtype), values[:, 0]) else values


def _check_shallow(ds: xr.Dataset, out: Path) -> None:
    if out.suffix in (".h5", ".hdf5"):
        raise DataError(f"Shallow water of {LAYOUT} is a folder of zarr stores, but {out.name} is a file name.")
    parts = _runs(ds)
    for name in map(str, ds.variables):
        if name not in (*SHALLOW, "trajectory", "split", "time", "latitude", "longitude"):
            raise DataError(f"{LAYOUT} has no place for {name!r} in shallow water. Drop it with drop_vars({name!r}).")
    if len({run.split for run in parts}) < len(parts):
        raise DataError(
            f"{LAYOUT} holds shallow water in one store per split, but trajectories of one differ in length."
        )


def _write_shallow(ds: xr.Dataset, out: Path, write_zarr: Callable[[xr.Dataset, Path, int], None]) -> None:
    back = {new: old for old, new in SHALLOW_DIMS.items()}
    out.mkdir()
    for run in _runs(ds):
        part = ds.isel(trajectory=slice(run.first, run.first + run.count), time=slice(run.frames))
        part = part.drop_vars([name for name in ("trajectory", "split") if name in part.coords]).transpose(
            "trajectory", "time", "latitude", "longitude"
        )
        part = part.rename({new: old for new, old in back.items() if new in part.dims})
        waves = [name for name in SHALLOW if name != "pres"]
        levelled = part[waves].expand_dims(lev=[1.0], axis=2)
        write_zarr(levelled.assign(pres=part["pres"]).assign_attrs(ds.attrs), out / f"{run.split}.zarr", 2)
