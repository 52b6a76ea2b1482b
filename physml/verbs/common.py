"""Options that every verb has, and what several verbs share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

Assignments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
HEADLINE = ("rmse", "acc", "correlation")
OF_ENSEMBLES = ("crps_fair", "spread_skill")
Words = tyro.conf.Positional[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Common:
    dry_run: bool = False
    """Check everything and say what would be done, without doing it."""
    json: bool = False
    """Print the result as one JSON object."""
    quiet: bool = False
    """No progress."""
    debug: bool = False
    """Show the traceback of an error."""


def progress_of(verb: Common, what: str):
    """A bar, lines or nothing, as the options say."""
    from physml.progress import open_progress

    return open_progress(what, quiet=verb.quiet or verb.json)


def check_trajectory(trajectory: int, count: int) -> None:
    """Raises DataError when the dataset has no such trajectory."""
    from physml.errors import DataError

    if not 0 <= trajectory < count:
        raise DataError(f"--trajectory is {trajectory}, but the dataset has {count}: 0 to {count - 1}.")


def frames_until(data: Any, at: str | None, trajectory: int | None) -> Any:
    """The frames up to the chosen start. Raises DataError when there is none at this time."""
    from physml.data.axes import time_dim
    from physml.data.reader import lengths_of, without_lengths
    from physml.errors import DataError

    if trajectory is not None:
        check_trajectory(trajectory, data.sizes.get("trajectory", 1))
        if "trajectory" in data.dims:
            data = data.isel(trajectory=[trajectory])
    if at is None:
        return data
    dim = time_dim(data)
    if dim is None:
        raise DataError(f"--at is {at!r}, but the dataset holds a single instant. Leave --at out.")
    last = _numbered(data, dim, at) if at.startswith("#") else _timed(data, dim, at)
    lengths = lengths_of(data)
    if lengths is not None and (short := lengths <= last).any():
        which = int(short.argmax())
        name = which if trajectory is None else trajectory
        raise DataError(
            f"--at is {at!r}, frame #{last}, but trajectory {name} ends with frame #{lengths[which] - 1}. Start "
            "earlier, or choose another --trajectory."
        )
    return without_lengths(data).isel({dim: slice(0, last + 1)})


def _numbered(data: Any, dim: str, at: str) -> int:
    from physml.errors import DataError

    count = data.sizes[dim]
    if not at[1:].isdigit() or int(at[1:]) >= count:
        raise DataError(f"--at is {at}, but the dataset has frames #0 to #{count - 1}.")
    return int(at[1:])


def _timed(data: Any, dim: str, at: str) -> int:
    """The frame at a time, to a thousandth of the time step: a number is rarely stored as it is written."""
    import numpy as np

    from physml.data import clock as ck
    from physml.data.channels import source_of
    from physml.errors import DataError

    times = ck.clock(data, dim)
    labels, step = times.labels, ck.time_step(times, source_of(data))
    span = f"the dataset spans {labels[0]} to {labels[-1]}"
    try:
        wanted = ck.elapsed(times, np.array([ck.parse(at, times)]))
    except ValueError as error:
        raise DataError(f"--at is {at!r}, which is no time of the dataset: {error}; {span}.") from error
    found = int(ck.nearest(times.values, wanted)[0])
    if abs(times.values[found] - wanted[0]) <= 1e-3 * step:
        return found
    after = int(np.searchsorted(times.values, wanted[0]))
    if 0 < after < len(labels):
        raise DataError(
            f"--at is {at!r}, which lies between frame #{after - 1} at {labels[after - 1]} and #{after} at "
            f"{labels[after]}; {span}. Give the time of a frame, or its number."
        )
    raise DataError(f"--at is {at!r}, but {span}.")


def headline(scores: Any) -> dict[str, Any]:
    """For a screen: the best known scores at first, middle and last lead, and how long correlation lasts."""
    last = scores.sizes["lead"] - 1
    leads = sorted({0, last // 2, last})
    result: dict[str, Any] = {}
    for model in scores["model"].values:
        rows = result[str(model)] = {}
        for channel in scores["channel"].values:
            cell = rows[str(channel)] = {}
            for metric in (*HEADLINE, *OF_ENSEMBLES):
                if metric in scores["metric"]:
                    values = scores["score"].sel(model=model, metric=metric, channel=channel)
                    if metric in OF_ENSEMBLES and values.isnull().all():  # of a single forecast
                        continue
                    cell[metric] = {f"step {int(scores['step'][i])}": _short(values[i]) for i in leads}
            times, capped = (scores[f"correlation_time{end}"].sel(model=model, channel=channel)
                             for end in ("", "_capped"))  # fmt: skip
            unit = times.attrs.get("units", "")
            cell["high-correlation time"] = {
                f"> {float(t):g}": at_least(_time(times.sel(threshold=t), unit), bool(capped.sel(threshold=t)))
                for t in times["threshold"]
            }
    return result


def at_least(value: Any, capped: bool) -> Any:
    """For a screen: a lower bound as ">= value", any other value as it is."""
    return f">= {value}" if capped and value == value else value  # a channel without truth has no number


def _time(value: Any, unit: str) -> float | str:
    """A number, with its unit where it has both."""
    short = _short(value)
    return f"{short:g} {unit}" if unit and short == short else short


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def in_files(data: Any) -> bool:
    """Whether data can be opened without generating any: they are files, or were generated before."""
    from physml.data import DataConfig, MixtureConfig, SyntheticConfig

    if isinstance(data, MixtureConfig):
        return all(in_files(part) for part in data.parts.values())
    if isinstance(data, SyntheticConfig):
        return all(data.path(split).is_file() for split in data.recipes())
    return isinstance(data, DataConfig)


def split_names(data: Any) -> list[str]:
    """The splits that data have, as far as it can be said without generating any. Opens what lies in files."""
    from physml.data import MixtureConfig, SyntheticConfig

    if isinstance(data, MixtureConfig):
        return list(dict.fromkeys(name for part in data.parts.values() for name in split_names(part)))
    return list(data.recipes() if isinstance(data, SyntheticConfig) else data.open())


def first_line(thing: Any) -> str:
    """Of its docstring."""
    return (thing.__doc__ or "").strip().split("\n")[0]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
