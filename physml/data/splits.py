"""How data split into train, valid and test: by time, by trajectory, by what the format has."""

import json

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data.labelled import source_of
from physml.errors import ConfigError, DataError


def own_split(name: str, bounds: tuple) -> dict[str, str]:
    """The option that opens a split which the format itself has."""
    if len(bounds) != 1 or not isinstance(bounds[0], str):
        raise ConfigError(f"Split {name!r} = {bounds}, but split_by='format' wants a name of the format: ('{name}',).")
    return {"split": bounds[0]}


def cut_time(ds: xr.Dataset, name: str, bounds: tuple) -> xr.Dataset:
    """The frames of one split."""
    source = source_of(ds)
    times = frames_of(ds)
    dim = ax.time_dim(ds)
    if dim is None:
        advice = unnamed(ds) or "Use split_by='trajectory' or one path per split."
        raise DataError(f"{source} has no time dimension to split. {advice}")
    if any(isinstance(bound, str) for bound in bounds):
        chosen = _between(ds, dim, times, bounds, name, source)
    else:
        _check_not_years(bounds, times, name)
        chosen = range(*_numbers(bounds, len(times), name, "frames"))
    if len(chosen) == 0:
        raise DataError(f"Split {name!r} = {bounds} holds no frame of {source}, whose times are {_extent(times)}.")
    ds = ds.isel({dim: slice(chosen[0], chosen[-1] + 1)})
    ds.encoding["source"] = source
    return ds


def cut_trajectory(ds: xr.Dataset, name: str, bounds: tuple, seed: int | None) -> xr.Dataset:
    """The trajectories of one split; `seed` shuffles them before they are counted."""
    source, total = source_of(ds), ds.sizes.get("trajectory", 1)
    order = np.arange(total)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(total)
    if len(bounds) == 1 and isinstance(bounds[0], str):
        chosen = _listed(bounds[0], total)
    else:
        low, high = _numbers(bounds, total, name, "trajectories")
        chosen = np.sort(order[low:high])
    if "trajectory" not in ds.dims:
        if len(chosen) == 0:
            timed = "Use split_by='time'." if ax.time_dim(ds) else "Without a time dimension, give one path per split."
            raise DataError(
                f"{source} has one trajectory, so split {name!r} by trajectory is empty. {unnamed(ds) or timed}"
            )
        return ds
    if len(chosen) == 0:
        raise DataError(f"Split {name!r} = {bounds} holds none of the {total} trajectories of {source}.")
    ds = ds.isel(trajectory=ax.as_slice(chosen)).assign_coords(
        {} if "trajectory" in ds.variables else {"trajectory": ("trajectory", chosen)}
    )
    ds.encoding["source"] = source
    return ds


def unnamed(ds: xr.Dataset) -> str:
    """What to do about the dimensions of an HDF5 file that says no names of them; empty where all have names."""
    dims = sorted(str(dim) for dim in ds.dims if str(dim).startswith("phony_dim_"))
    if not dims:
        return ""
    found = ", ".join(f"{dim} ({ds.sizes[dim]} long)" for dim in dims)
    return (
        f"Its dimensions have no names in the file: {found}. Name them by data.rename, such as "
        f"rename={{'{dims[0]}': 'time'}}; trajectory, time, x, y and z are known."
    )


def _check_not_years(bounds: tuple, times: ck.Clock, name: str) -> None:
    """Raises ConfigError for numbers that are years of the data: 2001 unquoted would silently mean frame 2001."""
    if times.calendar is None or any(isinstance(bound, float) for bound in bounds):
        return
    years = [int(str(label)[:4]) for label in (times.labels[0], times.labels[-1])]
    if all(years[0] <= bound <= years[1] for bound in bounds):
        raise ConfigError(
            f"Split {name!r} = {bounds} are numbers, which count frames, but they look like years of the data "
            f"({_extent(times)}). Quote them: ('{bounds[0]}', '{bounds[-1]}')."
        )


def _extent(times: ck.Clock) -> str:
    return f"{times.labels[0]} .. {times.labels[-1]} ({len(times)} frames)"


def _between(ds: xr.Dataset, dim: str, times: ck.Clock, bounds: tuple, name: str, source: str) -> np.ndarray:
    """Frames whose labels lie in [low, high], partial dates such as "2001" included whole, as in `xr.Dataset.sel`."""
    if len(bounds) not in (1, 2):
        raise ConfigError(f"Split {name!r} = {bounds}, but one or two times were expected.")
    low, high = (bounds[0], bounds[-1])
    index = xr.DataArray(np.arange(len(times)), dims=dim, coords={dim: ds[dim].variable})
    try:
        if times.calendar is None:
            low, high = float(low), float(high)
        return index.sel({dim: slice(low, high)}).values
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"Split {name!r} = {bounds} cannot be read as times ({error}). {source} has {_extent(times)}; write for "
            "example "
            f"('{str(times.labels[0])[:10]}', '{str(times.labels[-1])[:10]}')."
        ) from error


def _numbers(bounds: tuple, total: int, name: str, what: str) -> tuple[int, int]:
    """Half-open bounds from numbers or fractions."""
    if len(bounds) != 2 or any(isinstance(b, str) for b in bounds):
        raise ConfigError(f"Split {name!r} = {bounds}, but (first, end) as two numbers or two fractions was expected.")
    low, high = bounds
    if isinstance(low, float) or isinstance(high, float):
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"Split {name!r} = {bounds}: fractions must satisfy 0 <= first <= end <= 1.")
        return round(low * total), round(high * total)
    if not 0 <= low < high <= total:
        raise ConfigError(
            f"Split {name!r} = {bounds} does not lie in the {total} {what} that there are: use 0 <= first < end <= "
            f"{total}."
        )
    return int(low), int(high)


def _listed(path: str, total: int) -> np.ndarray:
    """Trajectory numbers from a text file (one per line), a JSON list or a .npy array."""
    try:
        if path.endswith(".npy"):
            numbers = np.load(path, allow_pickle=False)
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            numbers = np.array(json.loads(text) if path.endswith(".json") else text.split(), dtype=np.int64)
    except FileNotFoundError as error:
        raise DataError(f"There is no index file {path}.") from error
    except (ValueError, OverflowError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a list of whole numbers: {error}.") from error
    numbers = np.asarray(numbers).ravel()
    if numbers.dtype.kind not in "iu":
        raise DataError(f"{path} holds {numbers.dtype} numbers; trajectory numbers are integers.")
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= total):
        raise DataError(f"{path} lists trajectory {int(numbers.max())}, but the data have {total} (0..{total - 1}).")
    return numbers.astype(np.int64)


def check_disjoint(parts: dict[str, xr.Dataset], whole: xr.Dataset, by_time: bool) -> None:
    """Raises ConfigError when two splits share frames or trajectories: scores would be too good."""
    seen: dict[object, str] = {}
    dim = ax.time_dim(whole) if by_time else "trajectory"
    if dim is None or dim not in next(iter(parts.values())).variables:
        return
    for name, ds in parts.items():
        for label in np.asarray(ds[dim].values).tolist():
            if seen.setdefault(label, name) != name:
                text = f"frame {ds[dim].values[0]}" if by_time else f"trajectory {label}"
                raise ConfigError(f"Splits {seen[label]!r} and {name!r} overlap: both hold {text}. Make them disjoint.")


def check_apart(members: dict[str, list[str]], what: str) -> None:
    """Raises ConfigError when two splits name the same: scores would be too good."""
    seen: dict[str, str] = {}
    for split, names in members.items():
        for name in names:
            if seen.setdefault(name, split) != split:
                raise ConfigError(
                    f"Splits {seen[name]!r} and {split!r} overlap: both hold {what} {name!r}. Make them disjoint."
                )


def frames_of(ds: xr.Dataset) -> ck.Clock:
    """The times of data."""
    return ck.clock(ds, ax.time_dim(ds))
