"""What a report is made of: run folders and score datasets, read with whatever pieces they have."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr
import yaml

from physml.errors import ConfigError, DataError
from physml.fields import Spec
from physml.files import read_records
from physml.metrics.table import file_of, load_scores

SCORE_DIMS = ("model", "metric", "channel", "lead")


@dataclass(frozen=True)
class RunData:
    """One run. A piece that the run does not have is None or empty.

    Attributes:
        name: shown in tables and legends; unique within a report.
        scores: as `physml.evaluate` makes them.
        config: text of config.yaml. settings: the same, parsed.
        environment: versions, devices, git state.
        history: records of metrics.jsonl, dicts with "step".
        sample: one rollout beside the truth, variables `CHANNEL_truth` and `CHANNEL_forecast (lead, *space)`.
        spec: names, units and grid.
        folder: where it was read from.
    """

    name: str
    scores: xr.Dataset | None = None
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    sample: xr.Dataset | None = None
    spec: Spec | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Entry:
    """One line of a figure: a model or a floor of some run."""

    label: str
    model: str
    run: RunData
    floor: bool

    def of(self, name: str) -> xr.DataArray:
        """A variable of the scores for this model; it has `model` or `source` as its first dimension."""
        array = self.run.scores[name]
        return array.sel({"source" if "source" in array.dims else "model": self.model})


def read_runs(runs: Any, split: str = "test") -> list[RunData]:
    """Runs from folders, score datasets, or objects with an attribute `folder`; of folders the scores on `split`. Of a
    dict, under its names.

    Raises ConfigError when nothing is given, or something else, DataError when a run has nothing to show or a piece of
    it is damaged.
    """
    if isinstance(runs, dict):
        return [dataclasses.replace(run, name=str(name)) for name, run in zip(runs, read_runs([*runs.values()], split))]
    runs = [runs] if isinstance(runs, str | Path | xr.Dataset) or not isinstance(runs, Sequence) else list(runs)
    if not runs:
        raise ConfigError("There is nothing to report on: give at least one run folder.")
    return _unique([_of_one(run, split) for run in runs])


def _of_one(run: Any, split: str) -> RunData:
    if isinstance(run, xr.Dataset):
        return _of_scores(run)
    folder = getattr(run, "folder", run)
    if not isinstance(folder, str | Path):
        raise ConfigError(
            f"A report was asked for of a {type(run).__name__}, but run folders, files scores.nc or datasets of scores "
            "were expected: one, several in a list, or several by name in a dict."
        )
    return _of_folder(Path(folder), split)


def entries(runs: list[RunData]) -> list[Entry]:
    """Models first, then floors; a floor that several runs share appears once, if their scores of it agree."""
    models, floors = [], []
    for run in runs:
        if run.scores is None:
            continue
        main = model_names(run.scores)
        for model in map(str, run.scores["model"].values):
            if model in main:
                label = run.name if len(main) == 1 else (f"{run.name}: {model}" if len(runs) > 1 else model)
                models.append(Entry(label, model, run, floor=False))
            elif (same := next((e for e in floors if e.model == model), None)) is None:
                floors.append(Entry(model, model, run, floor=True))
            elif not _agree(same.run.scores, run.scores, model):
                floors.append(Entry(f"{model} ({run.name})", model, run, floor=True))
    return models + floors


def scored_on(runs: list[RunData]) -> str:
    """The splits that the scores are of, in words; empty where they do not say."""
    splits = {run.name: run.scores.attrs.get("split") for run in runs if run.scores is not None}
    if len(set(splits.values())) == 1:
        split = next(iter(splits.values()))
        return f"on the {split} split" if split else ""
    known = [f"{name} on the {split} split" for name, split in splits.items() if split]
    return f"({', '.join(known)})" if known else ""


def model_names(scores: xr.Dataset) -> list[str]:
    """The models that are not floors."""
    floors = {name.strip() for name in str(scores.attrs.get("floors", "")).split(",")}
    return [str(name) for name in scores["model"].values if str(name) not in floors] or [str(scores["model"].values[0])]


def _agree(a: xr.Dataset, b: xr.Dataset, model: str) -> bool:
    try:
        a, b = xr.align(a["score"].sel(model=model), b["score"].sel(model=model), join="exact")
    except ValueError:
        return False
    return bool((abs(a - b) <= 1e-4 * abs(a) + 1e-12).where(a.notnull() & b.notnull(), True).all())


def _of_scores(scores: xr.Dataset) -> RunData:
    if missing := {"score", "score_low", "score_high"} - set(scores.data_vars):
        raise DataError(f"The dataset holds no scores: it lacks {sorted(missing)}. Make it with `physml.evaluate`.")
    if lost := [dim for dim in SCORE_DIMS if dim not in scores["score"].dims]:
        raise DataError(
            f"The scores have lost the dimension {lost[0]!r}. Select with a list or a slice, which keeps it: "
            f"scores.isel({lost[0]}=[0])."
        )
    return RunData(model_names(scores)[0], scores, spec=_spec(scores, None))


def _of_folder(folder: Path, split: str) -> RunData:
    if folder.is_file():
        return _of_scores(load_scores(folder))
    if not folder.is_dir():
        raise DataError(f"There is no run folder {str(folder)!r}. Runs are made by `physml train`.")
    file = folder / file_of("scores.nc", split)
    scores = load_scores(file) if file.exists() else None
    config = _text(folder / "config.yaml")
    try:
        settings = yaml.safe_load(config) if config else {}
    except yaml.YAMLError as error:
        raise DataError(f"{folder / 'config.yaml'} is not readable as YAML: {error}") from error
    records = read_records(folder / "metrics.jsonl")
    history = [record for record in records if isinstance(record.get("step"), int | float)]
    if scores is None and not history and not config:
        raise DataError(
            f"{folder} holds none of scores.nc, metrics.jsonl and config.yaml: it is no run folder, or nothing was "
            "written yet."
        )
    environment = _json(folder / "environment.json")
    sample = _sample(folder / file_of("sample.nc", split))
    settings = settings if isinstance(settings, dict) else {}
    name = str(settings.get("name") or folder.resolve().name)
    return RunData(name, scores, config, settings, environment, history, sample, _spec(scores, folder), folder)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}. Delete it, or write the run again.") from error
    return found if isinstance(found, dict) else {}


def _sample(path: Path) -> xr.Dataset | None:
    if not path.is_file():
        return None
    try:
        with xr.open_dataset(path, decode_timedelta=True) as sample:
            sample = sample.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or no netCDF file: {error}. Evaluate again to write a new one.") from error
    return sample if sample_channels(sample) and sample.sizes.get("lead") else None


def sample_channels(sample: xr.Dataset) -> list[str]:
    """Channels that a sample holds both truth and forecast of."""
    names = [str(name)[: -len("_truth")] for name in sample.data_vars if str(name).endswith("_truth")]
    return [name for name in names if f"{name}_forecast" in sample.data_vars]


def _spec(scores: xr.Dataset | None, folder: Path | None) -> Spec | None:
    text = "" if scores is None else scores.attrs.get("spec", "")
    try:
        if not text and folder is not None:
            text = _text(folder / "spec.json")
        return Spec.from_dict(json.loads(text)) if text else None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"The spec of {folder or 'the scores'} is damaged: {error}. Evaluate again to write it."
        ) from error


def _unique(runs: list[RunData]) -> list[RunData]:
    """Runs of one name get numbers."""
    names = [run.name for run in runs]
    counted: dict[str, int] = {}
    result = []
    for run in runs:
        counted[run.name] = counted.get(run.name, 0) + 1
        many = names.count(run.name) > 1
        result.append(dataclasses.replace(run, name=f"{run.name} #{counted[run.name]}") if many else run)
    return result
