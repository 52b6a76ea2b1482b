"""One self-contained HTML page about one run or several: tables, figures, an animation, and where it all came from."""

import base64
import json
from pathlib import Path
from typing import Any

from physml.files import write_text
from physml.metrics.table import file_of
from physml.report import drawing
from physml.report.animation import animation
from physml.report.curves import (
    LABELS,
    correlation_curves,
    correlation_times,
    drift,
    error_curves,
    spectra,
    training_curve,
)
from physml.report.ensembles import rank_histograms, with_ranks
from physml.report.fields import field_panels, slice_of
from physml.report.page import (
    Figure,
    Section,
    provenance,
    render,
    rows_of,
    score_tables,
    series_tables,
    summary_tables,
    to_text,
)
from physml.report.runs import Entry, RunData, entries, read_runs, sample_channels, scored_on

FEW_GROUPS = 10  # a bootstrap of fewer is told to be rough
MAX_CHANNELS = 4  # with figures of their own; tables hold all
DETAILS = ("bias", "mae", "relative_l2", "nrmse_pooled", "h1", "acc_pooled")  # figures folded away


def report(runs: Any, path: str | Path = "report.html", *, title: str | None = None, split: str = "test") -> Path:
    """Writes `path`, one HTML file without references to anything outside it, and metrics.json and metrics.csv (of
    another split than test metrics-SPLIT.json and metrics-SPLIT.csv) beside it. With a page of another name
    than report.html (report-SPLIT.html) they are NAME.metrics.json and NAME.metrics.csv.

    Args:
        runs: one or several run folders (as `physml.train` leaves them), objects with an attribute `folder`, files
            scores.nc, or datasets of scores; several, in a list or by name in a dict, make a comparison. A folder may
            lack any of scores.nc, sample.nc, metrics.jsonl, config.yaml and environment.json; the page says what is
            missing and how to make it.
        path: the page to write; a folder gets report.html inside.
        split: whose scores of run folders are shown, see `physml.score`.

    Raises ConfigError when there is nothing to report on, or something else than runs, DataError when a piece of a run
    is damaged.
    """
    path = Path(path)
    path = path / "report.html" if path.is_dir() or path.suffix == "" else path
    loaded = read_runs(runs, split)
    lines = entries(loaded)
    title = title or (
        f"Run {loaded[0].name}" if len(loaded) == 1 else "Comparison of " + ", ".join(r.name for r in loaded)
    ) + ("" if split == "test" else f", {split} split")
    own = "" if path.name == file_of("report.html", split) else f"{path.stem}."
    text, plain = (path.with_name(own + file_of(name, split)) for name in ("metrics.csv", "metrics.json"))
    page = render(
        "report.html",
        title=title,
        scored_on=scored_on(loaded),
        runs=[provenance(run) for run in loaded],
        summaries=summary_tables(lines),
        sections=sections(loaded, lines),
        tables=score_tables(lines),
        files=f"{text.name} and {plain.name}",
    )
    rows = rows_of(lines)
    write_text(path, page)
    write_text(plain, json.dumps(rows, indent=1))
    write_text(text, to_text(rows))
    return path


def sections(runs: list[RunData], lines: list[Entry]) -> list[Section]:
    """Everything between the summary and the tables, in order; a section without figures says why."""
    return [
        _errors(lines),
        _correlation(lines),
        _spectra(lines),
        *_ensembles(lines),
        _fields(runs),
        _drift(lines),
        _training(runs),
        _animation(runs),
    ]


def _errors(lines: list[Entry]) -> Section:
    section = Section("errors", "Error against lead time", f"Shaded: bootstrap interval over {_groups(lines)}.")
    for channel in _channels(lines):
        for metric in _metrics(lines):
            if metric == "correlation":
                continue
            name = LABELS.get(metric, metric.replace("_", " "))
            section.add(
                lambda c=channel, m=metric: drawing.png(error_curves(lines, m, c)),
                f"{name} of {channel} against lead time for {_names(lines)}",
                f"{name}, {channel}", folded=metric in DETAILS,
            )  # fmt: skip
    return section.or_say("No scores. Make them with `physml evaluate RUN`.")


def _correlation(lines: list[Entry]) -> Section:
    section = Section(
        "correlation", "Correlation and high-correlation time",
        "Time of the first lead at which the mean correlation with the truth is below the threshold, without "
        "interpolation; "
        f"≥ marks rollouts that end before. Whiskers: bootstrap interval over {_groups(lines)}.",
    )  # fmt: skip
    for channel in _channels(lines):
        if "correlation" in _metrics(lines):
            section.add(
                lambda c=channel: drawing.png(correlation_curves(lines, c)),
                f"Correlation of {channel} with the truth against lead time for {_names(lines)}",
                f"Correlation, {channel}",
            )
        if any("correlation_time" in line.run.scores for line in lines):
            section.add(
                lambda c=channel: drawing.png(correlation_times(lines, c)),
                f"Bars of the high-correlation time of {channel} for {_names(lines)}; numbers in the table below",
                f"High-correlation time, {channel}",
            )
    section.tables = series_tables(lines, "correlation_time")
    return section.or_say("No correlation. Score the run again with `physml evaluate RUN`.")


def _spectra(lines: list[Entry]) -> Section:
    section = Section(
        "spectra", "Energy spectra",
        "Half the mean square per wavenumber shell, averaged over starts. Axes that are not periodic are detrended and "
        "windowed.",
    )  # fmt: skip
    for channel in _channels(lines):
        if any("spectrum" in line.run.scores for line in lines):
            section.add(
                lambda c=channel: drawing.png(spectra(lines, c)),
                f"Energy of {channel} by wavenumber at chosen leads, truth and {_names(lines)}",
                f"Spectrum, {channel}", wide=True,
            )  # fmt: skip
    section.tables = series_tables(lines, "spectrum")
    return section.or_say("No spectra: the grid is too small, or cells are masked.")


def _ensembles(lines: list[Entry]) -> list[Section]:
    """One section where a model is an ensemble, else none."""
    section = Section(
        "ensembles", "Ensembles",
        "Rank of the truth among the members: flat (the line) where it is drawn like one of them, high at both ends "
        "where they are too close together, at one end where they are biased.",
    )  # fmt: skip
    for channel in _channels(lines):
        if found := with_ranks(lines, channel):
            section.add(
                lambda c=channel: drawing.png(rank_histograms(lines, c)),
                f"Rank histograms of {channel} at the first, middle and last lead for {_names(found)}",
                f"Rank histogram, {channel}", wide=True,
            )  # fmt: skip
    return [section] if section.figures else []


def _fields(runs: list[RunData]) -> Section:
    section = Section("fields", "Fields", "One start: truth and forecast with common limits, and their difference.")
    for run in runs:
        for channel in sample_channels(run.sample)[:MAX_CHANNELS] if run.sample is not None else ():
            section.add(
                lambda r=run, c=channel: drawing.png(field_panels(r.sample, c), dpi=110),
                f"Panels of {channel}: truth, forecast of {run.name} and difference at several leads",
                _titled(run, channel), wide=True,
            )  # fmt: skip
    return section.or_say("No sample fields. `physml evaluate RUN` writes sample.nc into the run folder.")


def _drift(lines: list[Entry]) -> Section:
    section = Section(
        "drift",
        "Drift",
        "Area mean and energy (half the mean square) over all starts, and the share of finite rollouts.",
    )
    for channel in _channels(lines):
        if any("energy" in line.run.scores for line in lines):
            section.add(
                lambda c=channel: drawing.png(drift(lines, c)),
                f"Area mean and energy of {channel} and share of finite rollouts against lead time, truth and "
                f"{_names(lines)}",
                f"Drift, {channel}", wide=True,
            )  # fmt: skip
    section.tables = series_tables(lines, "energy")
    return section.or_say("No totals in the scores. Score the run again with `physml evaluate RUN`.")


def _training(runs: list[RunData]) -> Section:
    section = Section("training", "Training", "From metrics.jsonl.")
    trained = [
        run for run in runs if any(isinstance(r.get("loss", r.get("valid/loss")), int | float) for r in run.history)
    ]
    if trained:
        section.add(
            lambda: drawing.png(training_curve(trained)),
            f"Loss against update step for {', '.join(run.name for run in trained)}",
            "Loss",
        )
    return section.or_say("No training log: metrics.jsonl is missing or empty. Floors need no training.")


def _animation(runs: list[RunData]) -> Section:
    section = Section("animation", "Animation", "The same start as in the field panels.")
    for run in runs:
        channels = sample_channels(run.sample)[:1] if run.sample is not None and run.sample.sizes["lead"] > 1 else []
        for channel in channels:
            if moving := animation(run.sample, channel):
                source = "data:image/gif;base64," + base64.b64encode(moving).decode()
                alt = f"Animation of {channel}: truth, forecast of {run.name} and difference"
                section.figures.append(Figure(source, alt, _titled(run, channel), wide=True))
    return section.or_say("No animation: sample.nc with two leads or more is needed.")


def _titled(run: RunData, channel: str) -> str:
    """The caption of fields of a run, and where they are cut."""
    where = slice_of(run.sample[f"{channel}_truth"])
    return f"{channel}, {run.name}" + (f", slice at {where}" if where else "")


def _groups(lines: list[Entry]) -> str:
    """What the intervals are drawn from: an interval over few groups is a rough one."""
    attrs = [line.run.scores.attrs for line in lines]
    counts = sorted({int(a["bootstrap_groups"]) for a in attrs if "bootstrap_groups" in a})
    kinds = {str(a["bootstrap_group"]) for a in attrs if "bootstrap_group" in a}
    kind = kinds.pop() if len(kinds) == 1 else "trajectory or block of starts"
    if not counts:
        return "trajectories or blocks of starts"
    least = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    warning = ": few, so the interval is rough, and mostly too narrow" if counts[0] < FEW_GROUPS else ""
    return f"{least} groups ({kind}){warning}"


def _channels(lines: list[Entry]) -> list[str]:
    found = dict.fromkeys(str(c) for line in lines for c in line.run.scores["channel"].values)
    return list(found)[:MAX_CHANNELS]


def _metrics(lines: list[Entry]) -> list[str]:
    """All metrics, the most telling first; `nrmse` stands for `relative_l2`, which is equal to it."""
    found = dict.fromkeys(str(m) for line in lines for m in line.run.scores["metric"].values)
    if "nrmse" in found:
        found.pop("relative_l2", None)
    first = [name for name in ("rmse", "nrmse", "vrmse", "acc", "skill", "correlation") if name in found]
    return first + [name for name in found if name not in first]


def _names(lines: list[Entry]) -> str:
    return ", ".join(line.label for line in lines)


__all__ = [
    "animation",
    "correlation_curves",
    "correlation_times",
    "drift",
    "error_curves",
    "field_panels",
    "rank_histograms",
    "report",
    "sections",
    "spectra",
    "training_curve",
]
