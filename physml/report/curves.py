"""Curves and bars of scores. Each function returns a matplotlib `Figure` and leaves the state of pyplot alone.

`source` is anything that `physml.report` takes: runs, folders, score datasets; or the entries of a report.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from physml.errors import SpecError, suggest
from physml.report.drawing import COLORS, GRAYS, finish, format_lead, lead_label, new_figure, time_scale
from physml.report.runs import Entry, RunData, entries, read_runs

LABELS = {
    "acc": "anomaly correlation",
    "acc_pooled": "anomaly correlation, pooled",
    "crps": "CRPS",
    "crps_fair": "CRPS, fair",
    "h1": "relative H1 error",
    "h1_periodic": "relative H1 error, periodic",
    "log_spectral_error": "log spectral error (decades)",
    "mae": "mean absolute error",
    "nrmse": "nRMSE",
    "nrmse_pooled": "nRMSE, pooled",
    "relative_l2": "relative L2 error",
    "rmse": "RMSE",
    "skill": "skill against climatology",
    "spread": "spread of members",
    "spread_skill": "spread / error",
    "vrmse": "VRMSE",
}

IDEAL = {"spread_skill": 1.0, "coverage_50": 0.5, "coverage_90": 0.9}  # what a perfect ensemble scores


def lines_of(source: Any) -> list[Entry]:
    """The models and floors of `source`."""
    if isinstance(source, Sequence) and source and all(isinstance(item, Entry) for item in source):
        return list(source)
    return entries(read_runs(source))


def _with(lines: list[Entry], name: str, channel: str) -> list[Entry]:
    """Lines that have a variable and a channel. Raises SpecError when none has."""
    found = [e for e in lines if name in e.run.scores and channel in e.run.scores["channel"].values]
    if not found:
        raise SpecError(f"No scores hold {name!r} of a channel {channel!r}." + suggest(channel, _channels(lines)))
    return found


def _channels(lines: list[Entry]) -> set[str]:
    return {str(name) for line in lines for name in line.run.scores["channel"].values}


def styles(entries: Sequence[Entry]) -> dict[str, dict]:
    """Line style of every entry: colored models, gray dashed floors."""
    models = [entry for entry in entries if not entry.floor]
    floors = [entry for entry in entries if entry.floor]
    chosen = {
        e.label: {"color": COLORS[i % len(COLORS)], "linestyle": "-", "linewidth": 2.0} for i, e in enumerate(models)
    }
    for i, entry in enumerate(floors):
        color, dash = GRAYS[i % len(GRAYS)]
        chosen[entry.label] = {"color": color, "linestyle": dash, "linewidth": 1.6}
    return chosen


def error_curves(source: Any, metric: str, channel: str) -> Figure:
    """A score against lead time, with its bootstrap interval as a band."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    lines = lines_of(source)
    style = styles(lines)
    highest, dimensional, unit, label = [], False, "", ""
    for entry in lines:
        score = entry.of("score")
        if metric not in score["metric"].values or channel not in score["channel"].values:
            continue
        score = score.sel(metric=metric, channel=channel)
        lead, label = time_scale(score["lead"].values, _time_unit(entry.run))
        values = score.values
        marker = "o" if len(lead) < 15 else None
        axes.plot(lead, values, label=entry.label, marker=marker, markersize=3.5, **style[entry.label])
        low, high = (entry.of(f"score_{side}").sel(metric=metric, channel=channel).values for side in ("low", "high"))
        axes.fill_between(lead, low, high, color=style[entry.label]["color"], alpha=0.15, linewidth=0)
        highest.append(np.max(values[np.isfinite(values)], initial=0.0))
        dimensional, unit = bool(score["dimensional"]), str(score["unit"].values)
    if not axes.lines:
        metrics = {str(name) for line in lines for name in line.run.scores["metric"].values}
        raise SpecError(f"No scores hold {metric!r} of {channel!r}." + suggest(metric, metrics))
    name = LABELS.get(metric, metric.replace("_", " "))
    axes.set(xlabel=lead_label(label), ylabel=f"{name} ({unit})" if dimensional and unit else name)
    if metric in ("correlation", "acc", "acc_pooled"):
        axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.03)
    elif metric == "skill":
        axes.set_ylim(max(-1.0, axes.get_ylim()[0]), 1.03)
        axes.axhline(0, color="#444444", linewidth=0.8)
    elif metric == "bias":
        axes.axhline(0, color="#444444", linewidth=0.8)
    elif metric in IDEAL:
        axes.axhline(IDEAL[metric], color="#444444", linewidth=0.8, label="ideal")
        axes.set_ylim(0, max(1.03, min(axes.get_ylim()[1], 3.0)))
    elif highest:
        _limit_diverged(axes, highest)
    return finish(figure, axes)


def _limit_diverged(axes, highest: list[float]) -> None:
    """Keeps the readable curves readable when one of them blows up."""
    finite = [value for value in highest if value > 0]
    if finite and max(finite) > 30 * np.median(finite):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def correlation_curves(source: Any, channel: str) -> Figure:
    """Correlation against lead time with the thresholds of the high-correlation time."""
    lines = lines_of(source)
    figure = error_curves(lines, "correlation", channel)
    axes = figure.axes[0]
    thresholds = {float(t) for entry in lines for t in entry.run.scores["threshold"].values}
    for threshold in sorted(thresholds):
        axes.axhline(threshold, color="#444444", linewidth=0.7, linestyle=(0, (1, 2)))
        axes.annotate(
            f"{threshold:g}", (1.0, threshold), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=8, color="#444444",
        )  # fmt: skip
    return figure


def correlation_times(source: Any, channel: str) -> Figure:
    """Bars: until when the mean correlation stays above each threshold, with the bootstrap interval."""
    entries = _with(lines_of(source), "correlation_time", channel)
    thresholds = sorted({float(t) for entry in entries for t in entry.run.scores["threshold"].values})
    figure = new_figure(6.4, 1.0 + 0.24 * (len(entries) + 1) * max(len(thresholds), 1))
    axes = figure.subplots()
    style, height, ticks = styles(entries), 0.8 / max(len(entries), 1), []
    unit, farthest = "", 0.0
    for row, threshold in enumerate(thresholds):
        for i, entry in enumerate(entries):
            at = row - 0.4 + (i + 0.5) * height
            time, low, high = (
                _durations(entry, f"correlation_time{suffix}", channel, threshold) for suffix in ("", "_low", "_high")
            )
            unit = time[1]
            label = entry.label if row == 0 else None
            axes.barh(at, time[0], height * 0.9, color=style[entry.label]["color"], alpha=0.9, label=label)
            if np.isfinite(low[0]) and np.isfinite(high[0]):
                axes.plot([low[0], high[0]], [at, at], color="black", linewidth=1.0, marker="|", markersize=5)
            end = max(time[0], high[0] if np.isfinite(high[0]) else 0.0)
            farthest = max(farthest, end)
            capped = bool(entry.of("correlation_time_capped").sel(channel=channel, threshold=threshold))
            text = f"{'≥ ' if capped else ''}{time[0]:.3g}"
            axes.annotate(text, (end, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        ticks.append(f"correlation > {threshold:g}")
    axes.set_yticks(range(len(thresholds)), ticks)
    axes.invert_yaxis()
    axes.set(
        xlabel=f"high-correlation time ({unit})" if unit else "high-correlation time", xlim=(0, farthest * 1.12 or 1)
    )
    return finish(figure, axes, grid="x", outside=True)


def _durations(entry: Entry, name: str, channel: str, threshold: float) -> tuple[float, str]:
    """A time in the unit in which lead times are drawn."""
    value = float(entry.of(name).sel(channel=channel, threshold=threshold))
    lead, unit = time_scale(entry.run.scores["lead"].values, _time_unit(entry.run))
    first = np.asarray(entry.run.scores["lead"].values)[0]
    seconds = float(first / np.timedelta64(1, "s")) if first.dtype.kind == "m" else float(first)
    return value * float(lead[0]) / seconds, unit


def spectra(source: Any, channel: str) -> Figure:
    """Energy by wavenumber of the truth and of every model, one panel per kept lead."""
    entries = _with(lines_of(source), "spectrum", channel)
    first = entries[0].run.scores
    leads, unit = time_scale(first["spectrum_lead"].values, _time_unit(entries[0].run))
    columns = min(len(leads), 3)
    rows = -(-len(leads) // columns)
    figure = new_figure(3.6 * columns + 0.4, 3.3 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    style = styles(entries)
    resolved = int(first["wavenumber"].attrs.get("resolved", first.sizes["wavenumber"] - 1))
    shown = slice(1, resolved + 1)
    for i, (axes, lead) in enumerate(zip(panels, leads)):
        truth = first["spectrum"].sel(source="truth", channel=channel)[i]
        axes.loglog(truth["wavenumber"][shown], truth[shown], color="black", linewidth=2.2, label="truth")
        for entry in entries:
            same = np.flatnonzero(entry.run.scores["spectrum_lead"].values == first["spectrum_lead"].values[i])
            if same.size:  # another run may have kept other leads
                spectrum, low, high = (
                    entry.of(f"spectrum{s}").sel(channel=channel)[int(same[0])][shown] for s in ("", "_low", "_high")
                )
                axes.loglog(spectrum["wavenumber"], spectrum, label=entry.label, **style[entry.label])
                axes.fill_between(
                    spectrum["wavenumber"], low, high, color=style[entry.label]["color"], alpha=0.12, linewidth=0
                )
        _limit_spectrum(axes, truth[shown].values)
        _tick_wavenumbers(axes, truth["wavenumber"].values[shown])
        axes.set_title(f"lead {format_lead(lead, unit)}", fontsize=10)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    for axes in panels[len(leads) :]:
        axes.set_visible(False)
    wave = first["wavenumber"].attrs.get("units", "")
    field = _unit(entries[0].run, channel)
    figure.supxlabel(f"wavenumber ({wave})" if wave else "wavenumber", fontsize=10)
    figure.supylabel(_squared(field), fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def _tick_wavenumbers(axes, wavenumbers: np.ndarray) -> None:
    """1, 2 and 5 of each decade in plain numbers where there are few decades: labels of all digits overlap."""
    if wavenumbers.size and wavenumbers[-1] < 50 * wavenumbers[0]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def _limit_spectrum(axes, truth: np.ndarray) -> None:
    """Up to twelve decades: rounding noise and a spectrum that vanished do not squeeze the rest."""
    positive = truth[np.isfinite(truth) & (truth > 0)]
    if positive.size:
        axes.set_ylim(max(positive.min() * 0.1, positive.max() * 1e-12), positive.max() * 8)


def drift(source: Any, channel: str) -> Figure:
    """Area mean and energy of the rollouts beside the truth's, and the share that stays finite."""
    entries = _with(lines_of(source), "energy", channel)
    figure = new_figure(9.6, 3.4)
    panels = figure.subplots(1, 3)
    style, first = styles(entries), entries[0]
    lead, unit = time_scale(first.run.scores["lead"].values, _time_unit(first.run))
    field = _unit(first.run, channel)
    names = (
        ("mean", f"area mean ({field})" if field else "area mean"),
        ("energy", _squared(field)),
    )
    for axes, (name, label) in zip(panels, names):
        truth = first.run.scores[name].sel(source="truth", channel=channel)
        axes.plot(lead, truth, color="black", linewidth=2.2, label="truth")
        for entry in entries:
            lead_of = time_scale(entry.run.scores["lead"].values, _time_unit(entry.run))[0]
            axes.plot(lead_of, entry.of(name).sel(channel=channel), label=entry.label, **style[entry.label])
        axes.set(xlabel=lead_label(unit), ylabel=label)
        energy = first.run.scores["energy"].sel(source="truth", channel=channel).values
        size = float(np.sqrt(2 * np.nanmax(energy)) if name == "mean" else np.nanmax(energy))
        _limit_drift(axes, truth.values, [e.of(name).sel(channel=channel).values for e in entries], size)
        axes.ticklabel_format(axis="y", useOffset=True, scilimits=(-4, 5))
        axes.grid(True, color="#dddddd", linewidth=0.6)
    for entry in entries:
        lead_of = time_scale(entry.run.scores["lead"].values, _time_unit(entry.run))[0]
        panels[2].plot(lead_of, 100 * entry.of("finite"), **style[entry.label])
    panels[2].set(xlabel=lead_label(unit), ylabel="rollouts with finite numbers (%)", ylim=(-3, 105))
    panels[2].grid(True, color="#dddddd", linewidth=0.6)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9
    )
    return figure


def _limit_drift(axes, truth: np.ndarray, others: list[np.ndarray], size: float) -> None:
    """Shows small drifts as small: the axis spans at least 2 % of `size`; a blow-up leaves the panel."""
    values = np.concatenate([truth, *others])
    values = values[np.isfinite(values) & (np.abs(values) < 20 * size)] if size > 0 else values[np.isfinite(values)]
    if values.size:
        low, high = values.min(), values.max()
        pad = max(0.08 * (high - low), 0.01 * size, 1e-12)
        axes.set_ylim(low - pad, high + pad)


def training_curve(source: Any) -> Figure:
    """Loss and validation loss against the update step; a new line where a stage of a curriculum begins, whose loss is
    another one.
    """
    runs = source if isinstance(source, list) and all(isinstance(r, RunData) for r in source) else read_runs(source)
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        begins = _stages(run)
        for number, begin in begins.items():
            axes.axvline(begin, color=color if len(runs) > 1 else "#444444", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(
                f"stage {number}", (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -3),
                textcoords="offset points", va="top", fontsize=8, color="#444444",
            )  # fmt: skip
        begins = list(begins.values())
        for name, style, what in (("loss", "-", "training"), ("valid/loss", "--", "validation")):
            points = [(r["step"], r[name]) for r in run.history if isinstance(r.get(name), int | float) and r[name] > 0]
            if points:
                steps, values = np.array(points, float).T
                label = f"{run.name}: {what}" if len(runs) > 1 else what
                marker = "o" if len(steps) < 20 else None
                breaks = np.searchsorted(steps, begins) if name == "loss" else []
                pieces = zip(np.split(steps, breaks), np.split(values, breaks))
                for part, (step, value) in enumerate(pieces):
                    axes.plot(
                        step, value, style, color=color, linewidth=1.6, marker=marker, markersize=3.5,
                        label=None if part else label,
                    )  # fmt: skip
    axes.set_yscale("log")
    axes.set(xlabel="update step", ylabel="loss (normalized units)")
    return finish(figure, axes)


def _stages(run: RunData) -> dict[int, float]:
    """Number of every later stage of a curriculum -> where it begins: between the last record of one stage and the
    first of the next.
    """
    records = [(r["step"], r["stage"]) for r in run.history if isinstance(r.get("stage"), int)]
    pairs = zip(records[:-1], records[1:])
    return {stage: (before + step) / 2 for (before, last), (step, stage) in pairs if stage > last}


def _time_unit(run: RunData) -> str:
    return run.spec.time_unit if run.spec is not None and run.spec.time_unit != "s" else ""


def _squared(unit: str) -> str:
    if not unit:
        return "energy"
    return f"energy ({unit}²)" if unit.isalpha() else f"energy (({unit})²)"


def _unit(run: RunData, channel: str) -> str:
    return str(run.scores["unit"].sel(channel=channel).values)
