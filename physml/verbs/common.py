"""Options that every verb has, and what several verbs share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

Assignments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
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


def frames_until(data: Any, at: str | None, trajectory: int | None) -> Any:
    """The frames up to the chosen start."""
    from physml.errors import DataError

    if trajectory is not None:
        count = data.sizes.get("trajectory", 1)
        if not 0 <= trajectory < count:
            raise DataError(f"--trajectory is {trajectory}, but the dataset has {count}: 0 to {count - 1}.")
        if "trajectory" in data.dims:
            data = data.isel(trajectory=[trajectory])
    if at is None or "time" not in data.dims:
        return data
    if at.startswith("#"):
        count = data.sizes["time"]
        if not at[1:].isdigit() or int(at[1:]) >= count:
            raise DataError(f"--at is {at}, but the dataset has frames #0 to #{count - 1}.")
        return data.isel(time=slice(0, int(at[1:]) + 1))
    kind = data["time"].dtype.kind
    try:
        until = data.sel(time=slice(None, float(at) if kind in "fiu" else at))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--at is {at!r}, which is no time of the dataset: {error}") from error
    if until.sizes["time"] == 0:
        first, last = data["time"].values[0], data["time"].values[-1]
        raise DataError(f"--at is {at!r}, but the dataset spans {first} to {last}.")
    return until


def headline(scores: Any) -> dict[str, Any]:
    """For a screen: RMSE, ACC and correlation at first, middle and last lead, and how long correlation lasts."""
    last = scores.sizes["lead"] - 1
    leads = sorted({0, last // 2, last})
    result: dict[str, Any] = {}
    for model in scores["model"].values:
        rows = result[str(model)] = {}
        for channel in scores["channel"].values:
            cell = rows[str(channel)] = {}
            for metric in ("rmse", "acc", "correlation"):
                if metric in scores["metric"]:
                    values = scores["score"].sel(model=model, metric=metric, channel=channel)
                    cell[metric] = {f"step {int(scores['step'][i])}": _short(values[i]) for i in leads}
            times = scores["correlation_time"].sel(model=model, channel=channel)
            cell["high-correlation time"] = {
                f"> {float(t):g}": _short(times.sel(threshold=t)) for t in times["threshold"]
            }
    return result


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def first_line(thing: Any) -> str:
    """Of its docstring."""
    return (thing.__doc__ or "").strip().split("\n")[0]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
