"""A leaderboard: finished entries as one dataset, as rows, and as a page."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from physml import __version__
from physml.benchmarks.protocol import Score, Suite
from physml.errors import DataError
from physml.files import write_text
from physml.metrics.table import load_scores, write_netcdf
from physml.report import drawing
from physml.report.curves import LABELS
from physml.report.fields import field_panels
from physml.report.page import Section, Table, number, render, to_text
from physml.report.runs import sample_channels

NAMES = {"persistence": "persistence (identity)", "extrapolation": "linear extrapolation"}


@dataclass
class Entry:
    """A model or a floor on one task, with all its finished seeds (a floor has one).

    Attributes:
        one_step: score -> `(seed,)`. rollout: score -> `(seed, lead)`.
        facts: parameters, seconds_single, seconds_batched, updates, training_seconds: means over seeds.
        diverged: seeds whose training or rollout left the finite numbers.
        worst: file of the worst rollout of the first seed.
    """

    task: str
    model: str
    floor: bool
    one_step: dict[str, np.ndarray] = field(default_factory=dict)
    rollout: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    seeds: int = 0
    failed: int = 0
    worst: Path | None = None

    @property
    def label(self) -> str:
        return NAMES.get(self.model, self.model)


def read_entries(out: Path, suite: Suite) -> dict[str, list[Entry]]:
    """Finished entries by task, floors last. Raises DataError for a damaged one."""
    tasks: dict[str, list[Entry]] = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        entries = [_read(model, suite) for model in sorted(folder.iterdir()) if model.is_dir()]
        if finished := [entry for entry in entries if entry.seeds]:
            tasks[folder.name] = sorted(finished, key=lambda entry: (entry.floor, _final(entry, suite.score)))
    return tasks


def _read(folder: Path, suite: Suite) -> Entry:
    floor = (folder / "entry.json").is_file()
    entry = Entry(folder.parent.name, folder.name, floor)
    one_step, rollouts, facts = [], [], []
    for run in [folder] if floor else sorted(folder.glob("seed*"), key=lambda path: int(path.name[4:])):
        if not (run / "entry.json").is_file():
            continue
        try:
            found = json.loads((run / "entry.json").read_text())
        except ValueError as error:
            raise DataError(f"{run / 'entry.json'} is damaged. Delete {run} and run the benchmark again.") from error
        entry.seeds += 1
        if "diverged" in found:
            entry.failed += 1
            continue
        facts.append(found)
        one_step.append(load_scores(run / "one_step.nc"))
        if (run / "rollout.nc").is_file():
            rollouts.append(load_scores(run / "rollout.nc"))
            entry.worst = entry.worst or (run / "worst.nc")
    for score in suite.scores:
        entry.one_step[score.name] = np.array([score(scores, folder.name)[0] for scores in one_step])
        entry.rollout[score.name] = np.array([score(scores, folder.name) for scores in rollouts])
    keys = sorted({key for found in facts for key in found})
    entry.facts = {key: float(np.mean([found[key] for found in facts if key in found])) for key in keys}
    return entry


def _final(entry: Entry, score: Score) -> float:
    """What entries are ranked by: the mean over seeds at one step; worst where nothing is finite."""
    values = entry.one_step.get(score.name, np.array([]))
    return float(values.mean()) if values.size and np.isfinite(values).all() else float("inf")


# --- files ------------------------------------------------------------------------------------------------------------


def write_leaderboard(out: Path, suite: Suite, name: str) -> None:
    """Writes leaderboard.html, leaderboard.csv and leaderboard.nc of the finished entries below `out`."""
    tasks = read_entries(out, suite)
    rows = list(rows_of(tasks, suite))
    page = render(
        "leaderboard.html", title=f"{suite.title}: leaderboard", protocol=suite.protocol, data=_data_of(out, suite),
        sections=[_section(task, entries, suite) for task, entries in tasks.items()],
    )  # fmt: skip
    write_text(out / "leaderboard.csv", to_text(rows))
    write_netcdf(dataset_of(tasks, suite, name), out / "leaderboard.nc")
    write_text(out / "leaderboard.html", page)


def _data_of(out: Path, suite: Suite) -> str:
    """What was trained on, for how long."""
    try:
        plan = json.loads((out / "plan.json").read_text())
        data, size, seconds = plan["settings"]["data"], plan["settings"]["size"], float(plan["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    source = f"Data: {data}." if data else f"Generated data: {suite.embedded}. Numbers of others are for other data."
    return f"{source} Networks of {size} size, about {seconds:.0f} s of training for each run."


def rows_of(tasks: dict[str, list[Entry]], suite: Suite) -> Iterator[dict[str, Any]]:
    """One row per task, model, seed, score and lead; those of others have no seed."""
    for task, entries in tasks.items():
        for entry in entries:
            facts = {key: entry.facts.get(key) for key in ("parameters", "seconds_single", "updates")}
            for score in suite.scores:
                for seed, value in enumerate(entry.one_step[score.name]):
                    yield {"task": task, "model": entry.model, "floor": entry.floor, "seed": seed, "score": score.name,
                           "kind": "one_step", "lead": 1, "value": float(value), **facts, "source": ""}  # fmt: skip
                for seed, values in enumerate(entry.rollout[score.name]):
                    for lead, value in enumerate(values, 1):
                        yield {"task": task, "model": entry.model, "floor": entry.floor, "seed": seed,
                               "score": score.name, "kind": "rollout", "lead": lead, "value": float(value), **facts,
                               "source": ""}  # fmt: skip
    nothing = {"parameters": None, "seconds_single": None, "updates": None}
    for other in suite.published:
        kind = "one_step" if other.lead == 1 else "rollout"
        yield {"task": other.task, "model": other.model, "floor": other.floor, "seed": "", "score": suite.score.name,
               "kind": kind, "lead": other.lead, "value": other.value, **nothing, "source": other.source}  # fmt: skip


def dataset_of(tasks: dict[str, list[Entry]], suite: Suite, name: str) -> xr.Dataset:
    """Scores by `(score, task, model, seed, lead)`, NaN where there is no such entry."""
    models = list(dict.fromkeys(entry.model for entries in tasks.values() for entry in entries))
    every = [(task, entry) for task, entries in tasks.items() for entry in entries]
    seeds = max((entry.seeds for _, entry in every), default=1)
    leads = max((values.shape[1] for _, e in every for values in e.rollout.values() if values.ndim == 2), default=1)
    one_step = np.full((len(suite.scores), len(tasks), len(models), seeds), np.nan)
    rollout = np.full((*one_step.shape, leads), np.nan)
    facts = {key: np.full((len(tasks), len(models)), np.nan)
             for key in ("parameters", "seconds_single", "seconds_batched", "updates", "training_seconds")}  # fmt: skip
    for task, entry in every:
        i, j = list(tasks).index(task), models.index(entry.model)
        for k, score in enumerate(suite.scores):
            values = entry.one_step[score.name]
            one_step[k, i, j, : len(values)] = values
            for seed, row in enumerate(entry.rollout[score.name]):
                rollout[k, i, j, seed, : len(row)] = row
        for key, array in facts.items():
            array[i, j] = entry.facts.get(key, np.nan)
    dims = ("score_name", "task", "model", "seed")
    return xr.Dataset(
        {"one_step": (dims, one_step), "rollout": ((*dims, "lead"), rollout),
         **{key: (("task", "model"), array) for key, array in facts.items()}},
        {"score_name": [score.name for score in suite.scores], "task": list(tasks), "model": models,
         "seed": np.arange(seeds), "lead": np.arange(1, leads + 1)},
        {"title": suite.title, "benchmark": name, "protocol": suite.protocol, "physml_version": __version__},
    )  # fmt: skip


# --- page -------------------------------------------------------------------------------------------------------------


def _section(task: str, entries: list[Entry], suite: Suite) -> Section:
    section = Section(task, task.replace("_", " "), "")
    section.tables = [_ranking(entries, suite)]
    if others := [other for other in suite.published if other.task == task]:
        rows = [
            [other.model + (" (floor)" if other.floor else ""), (str(other.lead), ""), (number(other.value), ""),
             (other.source, "")]
            for other in others
        ]  # fmt: skip
        section.tables.append(Table("Reported by others, on their data", ["model", "lead", suite.score.name, "source"],
                                    rows))  # fmt: skip
    with_rollouts = [entry for entry in entries if entry.rollout[suite.score.name].size]
    names = ", ".join(entry.label for entry in with_rollouts)
    for score in suite.scores if with_rollouts else ():
        section.add(
            lambda score=score: drawing.png(curves(with_rollouts, score)),
            f"{score.label} against lead for {names}", f"{LABELS.get(score.name, score.label)}, band: range of seeds",
            folded=score is not suite.score,
        )  # fmt: skip
    for key, what in (("seconds_single", "time of one step of one state (ms)"), ("parameters", "trained numbers")):
        section.add(
            lambda key=key, what=what: drawing.png(pareto(entries, suite.score, key, what)),
            f"{suite.score.label} at one step against {what}", f"One-step error against {what.split(' (')[0]}",
        )  # fmt: skip
    first = True
    for entry in with_rollouts:
        if entry.floor or entry.worst is None or not entry.worst.is_file():
            continue
        with xr.open_dataset(entry.worst, decode_timedelta=True) as sample:
            sample = sample.load()
        for channel in sample_channels(sample)[: 1 if not first else 2]:
            section.add(
                lambda sample=sample, channel=channel: drawing.png(field_panels(sample, channel), dpi=90),
                f"Truth, rollout of {entry.label} and difference: {channel} of its worst test case",
                f"Worst case of {entry.label}: {channel}, trajectory {sample.attrs.get('trajectory', '')}", wide=True,
                folded=not first,
            )  # fmt: skip
        first = False
    return section.or_say("No entry is finished.")


def _ranking(entries: list[Entry], suite: Suite) -> Table:
    """Mean over seeds and their spread, at one step and along rollouts; the best network of each column in bold."""
    score = suite.score
    leads = sorted({entry.rollout[score.name].shape[1] for entry in entries if entry.rollout[score.name].size})
    shown = sorted({1, leads[-1] // 4 or 1, leads[-1] // 2 or 1, leads[-1]}) if leads else []
    header = ["model", f"{score.name}, one step", *(f"rollout, step {lead}" for lead in shown)]
    header += [f"{other.name}, one step" for other in suite.more]
    header += ["trained numbers", "ms per step", "updates", "training (s)", "seeds"]
    rows, values = [], []
    for entry in entries:
        columns = [entry.one_step[score.name]]
        rollout = entry.rollout[score.name]
        columns += [rollout[:, lead - 1] if rollout.size else np.array([]) for lead in shown]
        columns += [entry.one_step[other.name] for other in suite.more]
        facts = entry.facts
        seeds = f"{entry.seeds}" + (f", {entry.failed} diverged" if entry.failed else "")
        rows.append([
            entry.label + (" (floor)" if entry.floor else ""), *(_mean(column) for column in columns),
            (f"{int(facts.get('parameters', 0)):,}", ""), (number(1e3 * facts.get("seconds_single", np.nan), 3), ""),
            (f"{int(facts['updates']):,}" if "updates" in facts else "–", ""),
            (number(facts.get("training_seconds", np.nan), 3), ""), (seeds, ""),
        ])  # fmt: skip
        values.append([column.mean() if column.size and not entry.floor else np.nan for column in columns])
    best = set()
    for j in range(1 + len(shown)):
        column = np.array([row[j] for row in values])
        if np.isfinite(column).any():
            best.add((int(np.nanargmin(np.where(np.isfinite(column), column, np.nan))), j + 1))
    return Table(f"{score.label}; mean over seeds, standard deviation below", header, rows, best)


def _mean(column: np.ndarray) -> tuple[str, str]:
    if not column.size:
        return ("–", "")
    return (number(float(column.mean())), f"± {number(float(column.std(ddof=1)), 2)}" if column.size > 1 else "")


def _styles(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    styles, networks, floors = {}, 0, 0
    for entry in entries:
        if entry.floor:
            color, line = drawing.GRAYS[floors % len(drawing.GRAYS)]
            styles[entry.model], floors = {"color": color, "linestyle": line}, floors + 1
        else:
            styles[entry.model] = {"color": drawing.COLORS[networks % len(drawing.COLORS)], "linewidth": 1.8}
            networks += 1
    return styles


def curves(entries: list[Entry], score: Score) -> Figure:
    """Score against lead: the mean over seeds, and their range as a band."""
    figure = drawing.new_figure(6.4, 4.0)
    axes = figure.subplots()
    for entry in entries:
        values = entry.rollout[score.name]
        lead = np.arange(1, values.shape[1] + 1)
        style = _styles(entries)[entry.model]
        axes.plot(lead, values.mean(0), label=entry.label, **style)
        if len(values) > 1:
            axes.fill_between(lead, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
    every = np.concatenate([entry.rollout[score.name].ravel() for entry in entries])
    if score.name != "correlation" and (every[np.isfinite(every)] > 0).any():
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="lead (steps)", ylabel=score.label)
    return drawing.finish(figure, axes)


def pareto(entries: list[Entry], score: Score, key: str, what: str) -> Figure:
    """One-step score against a cost; networks that no other beats in both are joined by a line."""
    figure = drawing.new_figure(6.4, 4.0)
    axes = figure.subplots()
    points = []
    for entry in entries:
        value, cost = _final(entry, score), entry.facts.get(key, np.nan) * (1e3 if key.startswith("seconds") else 1)
        if not np.isfinite(value):
            continue
        style = _styles(entries)[entry.model]
        if entry.floor:
            axes.axhline(value, label=entry.label, **style)
            continue
        axes.plot(cost, value, "o", color=style["color"], markersize=8)
        axes.annotate(entry.label, (cost, value), xytext=(6, 4), textcoords="offset points", fontsize=9)
        points.append((cost, value))
    front = [p for p in sorted(points) if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color="#444444", linewidth=1.0, zorder=0)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set(xlabel=what, ylabel=f"{score.name} at one step")
    return drawing.finish(figure, axes, outside=True)
