"""What the template shows: sections with figures, tables of text, provenance."""

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from physml import __version__
from physml.metrics.table import to_rows
from physml.report.curves import LABELS
from physml.report.drawing import format_lead, time_scale
from physml.report.runs import Entry, RunData

SUMMARY_METRICS = ("rmse", "nrmse", "vrmse", "correlation", "acc", "skill", "log_spectral_error")
SUMMARY_LEADS = 5
NOTHING = ("–", "")


@dataclass
class Figure:
    """`source` is a data URL."""

    source: str
    alt: str
    caption: str
    wide: bool = False
    folded: bool = False


@dataclass
class Table:
    """Rows of a label and cells (text, small text below it); `best` marks the cells in bold."""

    caption: str
    header: list[str]
    rows: list[list]
    best: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Section:
    """A heading, a sentence, figures, tables; `missing` says why there are none."""

    name: str
    title: str
    note: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: str = ""

    def add(
        self, draw: Callable[[], bytes], alt: str, caption: str, *, wide: bool = False, folded: bool = False
    ) -> None:
        source = "data:image/png;base64," + base64.b64encode(draw()).decode()
        self.figures.append(Figure(source, alt, caption, wide, folded))

    def or_say(self, reason: str) -> "Section":
        self.missing = "" if self.figures else reason
        return self


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file: one text without references to anything outside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(version=__version__, **values)


def number(value: float, digits: int = 4) -> str:
    """Four significant digits; a dash for what is not defined."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and not 1e-4 <= size < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    return f"{value:.{decimals}f}".replace("-", "−")


def summary_leads(count: int) -> list[int]:
    """Positions of the leads in the summary: all of a few, else spread evenly in ratio."""
    if count <= SUMMARY_LEADS + 2:
        return list(range(count))
    return sorted({round(float(i)) - 1 for i in np.geomspace(1, count, SUMMARY_LEADS)})


def _many_leads(count: int, most: int = 40) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def summary_tables(lines: Sequence[Entry]) -> list[Table]:
    """One table per metric and channel: models and floors down, chosen leads across, the best of each lead in bold."""
    tables = []
    for metric in SUMMARY_METRICS:
        for channel in _all(lines, "channel"):
            table = score_table(lines, metric, channel)
            if table is not None:
                tables.append(table)
    return tables


def score_tables(lines: Sequence[Entry]) -> list[Table]:
    """Every metric and channel at every lead, or at forty evenly spread ones; the files hold all."""
    tables = [
        score_table(lines, metric, channel, every=True)
        for metric in _all(lines, "metric")
        for channel in _all(lines, "channel")
    ]
    return [table for table in tables if table is not None]


def score_table(lines: Sequence[Entry], metric: str, channel: str, every: bool = False) -> Table | None:
    """Score and interval; None where no line has this metric and channel."""
    lines = [line for line in lines if metric in line.run.scores["metric"] and channel in line.run.scores["channel"]]
    if not lines:
        return None
    longest = max((line.run.scores for line in lines), key=lambda scores: scores.sizes["lead"])
    times, unit = _times(longest, lines[0].run)
    chosen = _many_leads(len(times)) if every else summary_leads(len(times))
    ideal = float(longest["ideal"].sel(metric=metric))
    dimensional = bool(longest["dimensional"].sel(metric=metric))
    rows, distance = [], np.full((len(lines), len(chosen)), np.nan)
    for i, line in enumerate(lines):
        values = _along(line, metric, channel, longest["lead"].values[list(chosen)])
        rows.append([line.label, *(NOTHING if value is None else _cell(*value) for value in values)])
        best_is = np.negative if ideal == np.inf else lambda value: abs(value - ideal)
        distance[i] = [np.nan if value is None else best_is(value[0]) for value in values]
    best = set()
    if len(lines) > 1:
        for j in range(len(chosen)):
            if np.isfinite(distance[:, j]).any():
                best |= {(int(i), j + 1) for i in np.flatnonzero(distance[:, j] == np.nanmin(distance[:, j]))}
    field_unit = str(longest["unit"].sel(channel=channel).values)
    name = LABELS.get(metric, metric.replace("_", " "))
    caption = f"{name}, {channel}" + (f" ({field_unit})" if dimensional and field_unit else "")
    return Table(caption, ["lead", *(format_lead(times[at], unit) for at in chosen)], rows, best)


def _along(line: Entry, metric: str, channel: str, leads: np.ndarray) -> list[tuple[float, float, float] | None]:
    """(score, low, high) at each of `leads`; None where the line does not reach."""
    own = line.run.scores["lead"].values
    if own.dtype.kind != leads.dtype.kind:
        return [None] * len(leads)
    names = ("score", "score_low", "score_high")
    columns = np.stack([line.of(name).sel(metric=metric, channel=channel).values for name in names], -1)
    position = {lead: i for i, lead in enumerate(own.tolist())}
    return [tuple(columns[position[lead]].tolist()) if lead in position else None for lead in leads.tolist()]


def _cell(score: float, low: float, high: float) -> tuple[str, str]:
    return number(score), "" if math.isnan(low) else f"{number(low, 3)} – {number(high, 3)}"


def _plain(value: float, digits: int = 3) -> tuple[str, str]:
    return number(value, digits), ""


def series_tables(lines: Sequence[Entry], name: str) -> list[Table]:
    """The numbers behind the figures of correlation times, spectra and energy."""
    lines = [line for line in lines if name in line.run.scores]
    build = {"correlation_time": _correlation_table, "spectrum": _spectrum_table, "energy": _energy_table}[name]
    return [table for channel in _all(lines, "channel") for table in build(lines, channel)]


def _correlation_table(lines, channel) -> list[Table]:
    first = lines[0].run
    times, unit = _times(first.scores, first)
    raw = first.scores["lead"].values
    scale = float(times[0]) / float(raw[0] / np.timedelta64(1, "s") if raw.dtype.kind == "m" else raw[0])
    thresholds = [float(t) for t in first.scores["threshold"].values]
    rows = []
    for line in lines:
        cells = [line.label]
        for threshold in thresholds:
            time, low, high = (
                scale * float(line.of(f"correlation_time{s}").sel(channel=channel, threshold=threshold))
                for s in ("", "_low", "_high")
            )
            capped = bool(line.of("correlation_time_capped").sel(channel=channel, threshold=threshold))
            value, between = _cell(time, low, high)
            cells.append((f"≥ {value}" if capped else value, between))
        rows.append(cells)
    caption = f"High-correlation time, {channel}" + (f" ({unit})" if unit else "")
    return [Table(caption, ["threshold", *(f"{t:g}" for t in thresholds)], rows)]


def _spectrum_table(lines, channel) -> list[Table]:
    first = lines[0].run
    scores, tables = first.scores, []
    leads, unit = time_scale(scores["spectrum_lead"].values, _unit(first))
    resolved = int(scores["wavenumber"].attrs.get("resolved", scores.sizes["wavenumber"] - 1))
    shells = sorted({round(float(i)) for i in np.geomspace(1, max(resolved, 1), min(8, max(resolved, 1)))})
    for i, lead in enumerate(leads):
        rows = [
            [
                "truth",
                *(_plain(float(scores["spectrum"].sel(source="truth", channel=channel)[i, k])) for k in shells),
            ]
        ]
        for line in lines:
            spectrum = line.of("spectrum").sel(channel=channel).values
            same = np.flatnonzero(line.run.scores["spectrum_lead"].values == scores["spectrum_lead"].values[i])
            fits = same.size and spectrum.shape[1] > shells[-1]
            rows.append([line.label, *(_plain(float(spectrum[same[0], k])) if fits else NOTHING for k in shells)])
        header = ["wavenumber", *(number(float(scores["wavenumber"][k]), 3) for k in shells)]
        tables.append(Table(f"Energy, {channel}, lead {format_lead(lead, unit)}", header, rows))
    return tables


def _energy_table(lines, channel) -> list[Table]:
    first = lines[0].run
    times, unit = _times(first.scores, first)
    chosen = summary_leads(len(times))
    leads, tables = first.scores["lead"].values[chosen].tolist(), []
    for name, label in (("mean", "Area mean"), ("energy", "Energy")):
        truth = first.scores[name].sel(source="truth", channel=channel)
        rows = [["truth", *(_plain(float(truth[i]), 5) for i in chosen)]]
        for line in lines:
            values = line.of(name).sel(channel=channel).values.tolist()
            at = {lead: value for lead, value in zip(line.run.scores["lead"].values.tolist(), values)}
            rows.append([line.label, *(_plain(at[lead], 5) if lead in at else NOTHING for lead in leads)])
        tables.append(Table(f"{label}, {channel}", ["lead", *(format_lead(times[i], unit) for i in chosen)], rows))
    return tables


def provenance(run: RunData) -> dict[str, Any]:
    """Facts of a run as label -> text, its config, and its environment."""
    facts: dict[str, str] = {"run": run.name}
    if run.folder is not None:
        facts["folder"] = run.folder.name
    if run.spec is not None:
        spec = run.spec
        facts["channels"] = ", ".join(f"{c.name} ({c.unit})" if c.unit else c.name for c in spec.channels)
        facts["grid"] = " × ".join(f"{axis.name} {len(axis)}" for axis in spec.grid.axes) or "none"
        step = np.array(
            [np.timedelta64(round(spec.time_step * 1e9), "ns") if spec.time_unit == "s" else spec.time_step]
        )
        lead, unit = time_scale(step, _unit(run))
        facts["time step"] = format_lead(float(lead[0]), unit)
    facts |= _settings(run.settings) | _machine(run.environment)
    if run.scores is not None:
        names = [n for n in run.scores.attrs if n not in ("title", "format", "spec", "model")]
        facts |= {f"scores: {n.replace('_', ' ')}": str(run.scores.attrs[n]) for n in names}
    environment = json.dumps(run.environment, indent=1) if run.environment else ""
    return {"name": run.name, "facts": facts, "config": run.config, "environment": environment}


def _settings(settings: dict[str, Any]) -> dict[str, str]:
    chosen = {}
    for key in ("data", "model", "stepper", "objective", "normalization", "seed"):
        if (value := settings.get(key)) not in (None, "", [], {}):
            chosen[key] = _short(value)
    return chosen


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_short(v)}" for k, v in value.items() if v not in (None, "", [], {}, ()))[:300]
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)


def _machine(environment: dict[str, Any]) -> dict[str, str]:
    facts = {}
    packages = environment.get("packages") or {}
    if packages:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    for key in ("python", "platform", "cpus", "processes"):
        if environment.get(key) is not None:
            facts[key] = str(environment[key])
    if devices := environment.get("devices"):
        facts["devices"] = _short(devices)
    if isinstance(git := environment.get("git"), dict):
        changed = len(git.get("changed") or [])
        facts["git commit"] = str(git.get("commit", "")) + (f" with {changed} changed files" if changed else "")
    if command := environment.get("command"):
        facts["command"] = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    return facts


def rows_of(lines: Sequence[Entry]) -> list[dict[str, Any]]:
    """Tidy rows of all lines, `model` being the label in the page."""
    rows, cache = [], {}
    for line in lines:
        key = id(line.run)
        if key not in cache:
            cache[key] = to_rows(line.run.scores)
        rows += [{**row, "model": line.label} for row in cache[key] if row["model"] == line.model]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def to_text(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; empty where a value is not finite."""
    text = io.StringIO()
    columns = (
        list(rows[0])
        if rows
        else ["model", "metric", "channel", "unit", "step", "lead", "score", "low", "high", "spread"]
    )
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _all(lines: Sequence[Entry], dim: str) -> list[str]:
    return list(dict.fromkeys(str(v) for line in lines for v in line.run.scores[dim].values))


def _times(scores, run: RunData) -> tuple[np.ndarray, str]:
    return time_scale(scores["lead"].values, _unit(run))


def _unit(run: RunData) -> str:
    return run.spec.time_unit if run.spec is not None and run.spec.time_unit != "s" else ""
