"""What is in a dataset: `describe` reads metadata, `statistics` reads every number once."""

import os

import numpy as np
import xarray as xr

from physml.contracts import Dataset
from physml.data import axes as ax
from physml.data import clock as ck
from physml.data.dataset import windows_of
from physml.data.labelled import source_of
from physml.data.opening import read_files
from physml.data.sidecar import totals
from physml.errors import DataError
from physml.normalize import Normalizer
from physml.progress import Progress


def describe(data, **options) -> dict:
    """Dimensions, variables, units, times, grid, chunks and sizes, as plain JSON-able containers.

    `data` is a path (see `open_dataset`, which also explains `options`) or a dataset. Reads coordinates and the first
    and last frame of every field, for missing values.
    """
    ds = data if isinstance(data, xr.Dataset) else read_files(data, **options)
    dims = {str(d): {"size": int(ds.sizes[d]), "role": ax.role(ds, d)} for d in ds.dims}
    return {
        "source": source_of(ds),
        "dimensions": dims,
        "axes": {str(d): _axis(ds, d) for d in ds.dims if dims[str(d)]["role"] not in ("trajectory", "time")},
        "time": _time(ds),
        "variables": {str(n): _variable(ds, n) for n in ds.data_vars},
        "scalars": {
            str(n): _plain(v.values) for n, v in ds.variables.items() if v.ndim == 0 and v.dtype.kind in "iufM"
        },
        "bytes": int(sum(v.nbytes for v in ds.data_vars.values())),
        "attributes": {str(k): _plain(v) for k, v in ds.attrs.items()},
    }


def statistics(
    dataset: Dataset, chunk: int | None = None, store: bool = False, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, extremes and RMS increment per channel, in one streaming pass (area and mask as
    weights). `store` keeps and reuses the numbers, see `totals`; `progress` is told how many frames are read.
    """
    found = totals(dataset, store, chunk, progress=progress)
    if found.frames == 0:
        raise DataError("The dataset has no frames.")
    values, increments = found.moments["channels"], found.moments["increments"]
    return {
        channel.name: {
            "mean": float(values.mean[i]),
            "std": float(np.sqrt(values.variance[i])),
            "min": float(found.low[i]),
            "max": float(found.high[i]),
            "increment_rms": float(increments.rms[i]),
            "missing": float(found.missing[i] / found.frames),
            "unit": channel.unit,
        }
        for i, channel in enumerate(dataset.spec.channels)
    }


def fit_normalizer(
    dataset: Dataset, kind: str = "zscore", store: bool = True, intervals: tuple[int, ...] = ()
) -> Normalizer:
    """A normalizer fitted to all frames of a dataset; `store` keeps and reuses the numbers, see `totals`.

    `intervals`, in frames, get increments of a scale of their own, as `physml.steppers.IntervalConfig` needs them.
    """
    if kind == "identity":
        return Normalizer.fit(windows_of(dataset), kind, intervals)
    return Normalizer.of(totals(dataset, store, intervals=tuple(intervals)), kind)


def _axis(ds: xr.Dataset, dim: str) -> dict:
    try:
        axis = ax.axis_of(ds, dim, ax.role(ds, dim), source=source_of(ds))
    except DataError as error:
        return {"problem": str(error)}
    values = ax.coordinate_values(ds, dim)
    return {
        "first": axis.centers[0] if axis.centers else None,
        "last": axis.centers[-1] if axis.centers else None,
        "spacing": axis.spacing if axis.centers else None,
        "unit": axis.unit,
        "periodic": axis.periodic,
        "descending": values is not None and len(values) > 1 and _descends(values, ax.role(ds, dim)),
        "has_coordinate": values is not None,
    }


def _descends(values: np.ndarray, role: str) -> bool:
    """Whether most steps go down; longitudes that go east across their seam (350, 0) do not."""
    steps = np.diff(values)
    if role == "longitude":
        steps = (steps + 180) % 360 - 180
    return bool(steps.sum() < 0)


def _time(ds: xr.Dataset) -> dict | None:
    dim = ax.time_dim(ds)
    times = ck.clock(ds, dim)
    if dim is None and times.calendar is None:
        return None
    if not len(times):
        return {"frames": 0}
    result = {
        "frames": len(times),
        "first": _plain(times.labels[0]),
        "last": _plain(times.labels[-1]),
        "unit": times.unit,
    }
    try:
        step = ck.time_step(times, source_of(ds))
        runs = ck.segments(times, step)
    except DataError as error:
        return {**result, "problem": str(error)}
    return {**result, "step": step, "regular_runs": len(runs), "longest_run": max(map(len, runs))}


def _variable(ds: xr.Dataset, name: str) -> dict:
    variable = ds.variables[name]
    chunks = (
        variable.encoding.get("chunksizes")
        or variable.encoding.get("preferred_chunks")
        or variable.encoding.get("chunks")
    )
    if isinstance(chunks, dict):
        chunks = [chunks.get(d, ds.sizes[d]) for d in variable.dims]
    return {
        "dims": list(map(str, variable.dims)),
        "shape": list(map(int, variable.shape)),
        "dtype": str(variable.dtype),
        "unit": str(variable.attrs.get("units", "")),
        "long_name": str(variable.attrs.get("long_name", variable.attrs.get("standard_name", ""))),
        "chunks": None if chunks is None else [int(c) for c in chunks],
        "missing": _missing(ds, name),
    }


def _missing(ds: xr.Dataset, name: str) -> dict[str, float] | None:
    """Share of NaN in the first and in the last frame."""
    variable = ds.variables[name]
    if variable.dtype.kind != "f" or variable.size == 0:
        return None
    moving = [d for d in variable.dims if ax.role(ds, d) in ("trajectory", "time")]
    shares = {}
    for key, position in (("first_frame", 0), ("last_frame", -1)):
        try:
            values = np.asarray(variable.isel(dict.fromkeys(moving, position)).values)
        except Exception as error:  # every backend has its own exceptions for damaged chunks
            raise DataError(
                f"{source_of(ds)}: variable {name!r} cannot be read ({error}). The file seems damaged."
            ) from error
        shares[key] = float(np.isnan(values).mean())
    return shares


def _plain(value):
    """A JSON-able form of an attribute or a scalar."""
    if isinstance(value, np.ndarray):
        return _plain(value.item()) if value.ndim == 0 else [_plain(v) for v in value.tolist()]
    if isinstance(value, np.datetime64):
        return str(np.datetime_as_string(value, unit="s"))
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
