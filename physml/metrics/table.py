"""Tables of scores as files: netCDF, JSON and CSV, each written at once or not at all.

The dataset is the one that `physml.evaluate.scores.assemble` describes.
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from physml.errors import DataError
from physml.files import whole, write_text

FORMAT = 1  # of scores.nc


def file_of(name: str, split: str = "test") -> str:
    """The file of a split: scores.nc of the test split, scores-train.nc of the training split."""
    path = Path(name)
    return name if split == "test" else f"{path.stem}-{split}{path.suffix}"


def save_scores(scores: xr.Dataset, folder: str | Path) -> None:
    """Writes scores.nc, scores.json and metrics.csv (one row per model, metric, channel and lead), each at once or not
    at all; with the split in their names where the attribute `split` is another than "test"."""
    folder, split = Path(folder), scores.attrs.get("split", "test")
    plain, rows = json.dumps(to_plain(scores), indent=1), to_csv(scores)
    write_netcdf(scores, folder / file_of("scores.nc", split))
    write_text(folder / file_of("scores.json", split), plain)
    write_text(folder / file_of("metrics.csv", split), rows)


def load_scores(path: str | Path) -> xr.Dataset:
    """Scores that `save_scores` wrote, from the folder or the file.

    Raises DataError when the file is missing, damaged or holds something else.
    """
    path = Path(path)
    path = path / "scores.nc" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"There are no scores at {path}. `physml evaluate` writes scores.nc into a run folder.")
    try:
        with xr.open_dataset(path, decode_timedelta=True) as scores:
            scores = scores.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or no netCDF file: {error}. Evaluate again to write a new one.") from error
    if missing := {"score", "score_low", "score_high"} - set(scores.data_vars):
        raise DataError(
            f"{path} holds no scores: variables {sorted(missing)} are missing; it has {sorted(scores.data_vars)}."
        )
    if int(scores.attrs.get("format", FORMAT)) > FORMAT:
        raise DataError(f"{path} was written by a newer physml (format {scores.attrs['format']}). Upgrade to read it.")
    for name in ("correlation_time_capped", "dimensional"):
        if name in scores.variables:
            scores[name] = scores[name].astype(bool)
    return scores


def write_netcdf(ds: xr.Dataset, path: str | Path) -> None:
    """A compressed netCDF file that appears whole or not at all."""
    packed = {"zlib": True, "complevel": 4}
    encoding = {name: packed for name, v in ds.data_vars.items() if v.dtype.kind == "f" and v.ndim}
    with whole(path) as partial:
        ds.to_netcdf(partial, engine="netcdf4", encoding=encoding)


def seconds_or_numbers(times: np.ndarray) -> list[float]:
    """Lead times as floats: seconds where they are timedelta64."""
    times = np.asarray(times)
    return (times / np.timedelta64(1, "s")).tolist() if times.dtype.kind == "m" else times.astype(float).tolist()


def to_rows(scores: xr.Dataset) -> list[dict[str, Any]]:
    """Tidy rows: model, metric, channel, unit, step, lead, score, low, high, spread."""
    leads, steps = seconds_or_numbers(scores["lead"].values), scores["step"].values.tolist()
    names = {"score": "score", "low": "score_low", "high": "score_high", "spread": "score_spread"}
    values = {key: scores[name].values.astype(float) for key, name in names.items()}
    dimensional, units = scores["dimensional"].values, scores["unit"].values
    labels = [[str(label) for label in scores[dim].values] for dim in ("model", "metric", "channel")]
    rows = []
    for model, metric, channel in np.ndindex(*scores["score"].shape[:3]):
        head = {
            "model": labels[0][model],
            "metric": labels[1][metric],
            "channel": labels[2][channel],
            "unit": str(units[channel]) if dimensional[metric] else "",
        }
        columns = {key: array[model, metric, channel].tolist() for key, array in values.items()}
        for i, (step, lead) in enumerate(zip(steps, leads)):
            rows.append({**head, "step": step, "lead": lead, **{key: column[i] for key, column in columns.items()}})
    return rows


def to_csv(scores: xr.Dataset) -> str:
    """`to_rows` as CSV; floats with nine digits, empty where a value is not defined."""
    rows, text = to_rows(scores), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for key in [key for key, value in row.items() if isinstance(value, float)]:
            row[key] = "" if math.isnan(row[key]) else f"{row[key]:.9g}"
        writer.writerow(row)
    return text.getvalue()


def to_plain(scores: xr.Dataset) -> dict[str, Any]:
    """Nested dicts and lists that JSON can hold: models -> metrics -> channels -> score, low, high, spread along
    lead."""
    models = {}
    for model in scores["model"].values:
        one = scores.sel(model=model)
        models[str(model)] = {
            "metrics": {
                str(metric): {
                    str(channel): {
                        key: _numbers(one[name].sel(metric=metric, channel=channel))
                        for key, name in (
                            ("score", "score"),
                            ("low", "score_low"),
                            ("high", "score_high"),
                            ("spread", "score_spread"),
                        )
                    }
                    for channel in scores["channel"].values
                }
                for metric in scores["metric"].values
            },
            "correlation_time": {
                str(channel): {
                    f"{threshold:g}": {
                        key: _numbers(one[f"correlation_time{suffix}"].sel(channel=channel, threshold=threshold))
                        for key, suffix in (("time", ""), ("low", "_low"), ("high", "_high"), ("capped", "_capped"))
                    }
                    for threshold in scores["threshold"].values
                }
                for channel in scores["channel"].values
            },
            "finite": _numbers(one["finite"]),
        }
    attrs = {key: value.item() if isinstance(value, np.generic) else value for key, value in scores.attrs.items()}
    return {
        "attributes": {key: value for key, value in attrs.items() if key != "spec"},
        "steps": scores["step"].values.tolist(),
        "leads": seconds_or_numbers(scores["lead"].values),
        "units": dict(zip(scores["channel"].values.tolist(), scores["unit"].values.tolist())),
        "models": models,
    }


def _numbers(array: xr.DataArray) -> Any:
    """JSON has no NaN and no infinity: null and "Infinity" stand for them."""

    def plain(value):
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return value

    return plain(array.values.tolist())
