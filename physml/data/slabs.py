"""What writers of benchmark layouts share: which trajectories make one file, and reading fields slab by slab."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from physml.errors import DataError, suggest

SPLITS = ("train", "valid", "test")
SLAB_BYTES = 8 * 2**20


class Run(NamedTuple):
    """Consecutive trajectories of one split with one number of frames, which make one file.

    Attributes:
        split: "train", "valid", "test", or "" where the data do not tell.
        first: position of the first trajectory in the data.
        count: how many. frames: the frames that each of them has.
    """

    split: str
    first: int
    count: int
    frames: int


def runs(ds: xr.Dataset, layout: str) -> list[Run]:
    """The files to write, in the order of the splits; one run of one trajectory where there is no such dimension.

    Splits are those of the coordinate `split`, else of the attribute; frames those of the variable `frames`.
    Raises DataError for a split that the layout does not have and for data without trajectories or frames.
    """
    count, frames = ds.sizes.get("trajectory", 1), ds.sizes.get("time", 1)
    if count == 0 or frames == 0:
        raise DataError(f"There is nothing to write: the data have {count} trajectories of {frames} frames.")
    if "split" in ds.coords and ds["split"].dims == ("trajectory",):
        splits = [str(name) for name in ds["split"].values]
    else:
        splits = [str(ds.attrs.get("split", ""))] * count
    for name in sorted({*splits} - {*SPLITS, ""}):
        raise DataError(f"{layout} has no split {name!r}." + suggest(name, SPLITS))
    lengths = ds["frames"].values.tolist() if _counts_frames(ds) else [frames] * count
    found: list[Run] = []
    for split in dict.fromkeys([*SPLITS, ""]):
        for i in (i for i in range(count) if splits[i] == split):
            last = found[-1] if found else None
            if last and (last.split, last.frames, last.first + last.count) == (split, lengths[i], i):
                found[-1] = last._replace(count=last.count + 1)
            else:
                found.append(Run(split, i, 1, lengths[i]))
    return found


def rows(ds: xr.Dataset, dim: str, table: str, run: Run) -> np.ndarray | None:
    """Positions along a dimension: `(size,)`, `(trajectory, size)` where trajectories differ, None where unknown."""
    length = run.frames if dim == "time" else None
    if table in ds.variables and ds[table].dims == ("trajectory", dim):
        return np.asarray(ds[table].values[run.first : run.first + run.count, :length])
    if dim in ds.coords and ds[dim].dims == (dim,):
        return np.asarray(ds[dim].values[:length])
    return None


def slabs(
    ds: xr.Dataset, names: Sequence[str], dims: Sequence[str], run: Run
) -> Iterator[tuple[tuple[slice, ...], list[np.ndarray]]]:
    """Where to put and what to put there, for fields of equal dimensions: about 8 MiB of each at a time.

    Arrays have their axes in the order `dims`. A field in chunks is read chunk by chunk along trajectory and time.
    """
    fields = [ds[name].variable.transpose(*dims) for name in names]
    first = fields[0]
    starts, sizes, steps = [], [], []
    room = max(1, SLAB_BYTES * first.sizes.get("trajectory", 1) * first.sizes.get("time", 1) // max(first.nbytes, 1))
    for dim in reversed([dim for dim in dims if dim in ("trajectory", "time")]):
        start, size = (run.first, run.count) if dim == "trajectory" else (0, run.frames)
        step = max(first.chunksizes[dim]) if dim in first.chunksizes else min(room, size)
        room = max(1, room // step)
        starts.insert(0, start)
        sizes.insert(0, size)
        steps.insert(0, step)
    for corner in np.ndindex(*(-(-size // step) for size, step in zip(sizes, steps, strict=True))):
        at = [slice(i * n, min((i + 1) * n, size)) for i, n, size in zip(corner, steps, sizes, strict=True)]
        inside = [slice(a.start + start, a.stop + start) for a, start in zip(at, starts, strict=True)]
        yield tuple(at), [np.asarray(field[tuple(inside)].values) for field in fields]


def numbers(ds: xr.Dataset, names: Sequence[str], layout: str) -> None:
    """Raises DataError for a variable that is no plain number."""
    for name in names:
        if ds[name].dtype.kind not in "iufb":
            raise DataError(
                f"{layout} holds plain numbers, but {name!r} is {_kind(ds[name])}. Drop it with drop_vars({name!r}), "
                "or write netCDF or zarr."
            )


def extra_coordinates(ds: xr.Dataset) -> list[str]:
    """Names of coordinates that are neither positions along a dimension nor labels of trajectories and splits."""
    return [str(n) for n in ds.coords if n not in ds.dims and n != "split"]


def check_trajectory_labels(ds: xr.Dataset, layout: str) -> None:
    """Raises DataError for labels of trajectories that are more than a count."""
    if "trajectory" in ds.coords and ds["trajectory"].dtype.kind not in "iu":
        raise DataError(
            f"{layout} does not label trajectories, but these have labels such as "
            f"{str(ds['trajectory'].values[0])!r}. Drop them with drop_vars('trajectory')."
        )


def _counts_frames(ds: xr.Dataset) -> bool:
    return "frames" in ds.variables and ds["frames"].dims == ("trajectory",) and ds["frames"].dtype.kind in "iu"


def _kind(variable: xr.DataArray) -> str:
    return {"M": "dates", "m": "time spans", "U": "text", "O": "text or objects", "S": "text"}.get(
        variable.dtype.kind, f"of type {variable.dtype}"
    )
