"""Figures of a report. Each function returns a matplotlib `Figure` and leaves the state of pyplot alone."""

import io
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from physml.report.runs import Entry, RunData

# Colors that stay apart for color-blind readers (Okabe & Ito 2008); floors are gray and dashed.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D1F")
GRAYS = (
    ("#5f5f5f", "--"),
    ("#8c8c8c", ":"),
    ("#5f5f5f", "-."),
    ("#8c8c8c", (0, (6, 2, 1, 2, 1, 2))),
    ("#a8a8a8", (0, (2, 1))),
)
LAND = "#bdbdbd"
LABELS = {
    "acc": "anomaly correlation",
    "acc_pooled": "anomaly correlation, pooled",
    "h1": "relative H1 error",
    "h1_periodic": "relative H1 error, periodic",
    "log_spectral_error": "log spectral error (decades)",
    "mae": "mean absolute error",
    "nrmse": "nRMSE",
    "nrmse_pooled": "nRMSE, pooled",
    "relative_l2": "relative L2 error",
    "rmse": "RMSE",
    "skill": "skill against climatology",
    "vrmse": "VRMSE",
}


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as a PNG file without a date, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


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


def time_scale(lead: np.ndarray, unit: str = "") -> tuple[np.ndarray, str]:
    """Lead times as numbers and their unit: days, hours, minutes or seconds for timedelta64."""
    lead = np.asarray(lead)
    if lead.dtype.kind != "m":
        return lead.astype(float), unit
    seconds = lead / np.timedelta64(1, "s")
    smallest = float(np.min(seconds[seconds > 0], initial=np.inf))
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if smallest >= size or (
            size == 86400.0 and float(np.max(seconds, initial=0.0)) >= 10 * size and smallest >= 3600.0
        ):
            return seconds / size, name
    return seconds, "seconds"


def lead_label(unit: str) -> str:
    return f"lead time ({unit})" if unit else "lead time"


def format_lead(value: float, unit: str) -> str:
    short = {"days": "d", "hours": "h", "minutes": "min", "seconds": "s"}.get(unit, unit)
    return f"{value:.4g} {short}".strip()


def error_curves(entries: Sequence[Entry], metric: str, channel: str) -> Figure:
    """A score against lead time, with its bootstrap interval as a band."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    style = styles(entries)
    highest, dimensional, unit, label = [], False, "", ""
    for entry in entries:
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
    name = LABELS.get(metric, metric.replace("_", " "))
    axes.set(xlabel=lead_label(label), ylabel=f"{name} ({unit})" if dimensional and unit else name)
    if metric in ("correlation", "acc", "acc_pooled"):
        axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.03)
    elif metric == "skill":
        axes.set_ylim(max(-1.0, axes.get_ylim()[0]), 1.03)
        axes.axhline(0, color="#444444", linewidth=0.8)
    elif metric == "bias":
        axes.axhline(0, color="#444444", linewidth=0.8)
    elif highest:
        _limit_diverged(axes, highest)
    return _finish(figure, axes)


def _limit_diverged(axes, highest: list[float]) -> None:
    """Keeps the readable curves readable when one of them blows up."""
    finite = [value for value in highest if value > 0]
    if finite and max(finite) > 30 * np.median(finite):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def correlation_curves(entries: Sequence[Entry], channel: str) -> Figure:
    """Correlation against lead time with the thresholds of the high-correlation time."""
    figure = error_curves(entries, "correlation", channel)
    axes = figure.axes[0]
    thresholds = {float(t) for entry in entries for t in entry.run.scores["threshold"].values}
    for threshold in sorted(thresholds):
        axes.axhline(threshold, color="#444444", linewidth=0.7, linestyle=(0, (1, 2)))
        axes.annotate(
            f"{threshold:g}", (1.0, threshold), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=8, color="#444444",
        )  # fmt: skip
    return figure


def correlation_times(entries: Sequence[Entry], channel: str) -> Figure:
    """Bars: until when the mean correlation stays above each threshold, with the bootstrap interval."""
    entries = [e for e in entries if "correlation_time" in e.run.scores and channel in e.run.scores["channel"].values]
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
    return _finish(figure, axes, grid="x", outside=True)


def _durations(entry: Entry, name: str, channel: str, threshold: float) -> tuple[float, str]:
    """A time in the unit in which lead times are drawn."""
    value = float(entry.of(name).sel(channel=channel, threshold=threshold))
    lead, unit = time_scale(entry.run.scores["lead"].values, _time_unit(entry.run))
    first = np.asarray(entry.run.scores["lead"].values)[0]
    seconds = float(first / np.timedelta64(1, "s")) if first.dtype.kind == "m" else float(first)
    return value * float(lead[0]) / seconds, unit


def spectra(entries: Sequence[Entry], channel: str) -> Figure:
    """Energy by wavenumber of the truth and of every model, one panel per kept lead."""
    entries = [e for e in entries if "spectrum" in e.run.scores and channel in e.run.scores["channel"].values]
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
            spectrum = entry.of("spectrum").sel(channel=channel)
            if i < len(spectrum):
                axes.loglog(spectrum["wavenumber"][shown], spectrum[i][shown], label=entry.label, **style[entry.label])
                low, high = (entry.of(f"spectrum_{s}").sel(channel=channel)[i][shown] for s in ("low", "high"))
                axes.fill_between(
                    spectrum["wavenumber"][shown], low, high, color=style[entry.label]["color"], alpha=0.12, lw=0
                )
        _limit_spectrum(axes, truth[shown].values)
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


def _limit_spectrum(axes, truth: np.ndarray) -> None:
    """Up to twelve decades: rounding noise and a spectrum that vanished do not squeeze the rest."""
    positive = truth[np.isfinite(truth) & (truth > 0)]
    if positive.size:
        axes.set_ylim(max(positive.min() * 0.1, positive.max() * 1e-12), positive.max() * 8)


def drift(entries: Sequence[Entry], channel: str) -> Figure:
    """Area mean and energy of the rollouts beside the truth's, and the share that stays finite."""
    entries = [e for e in entries if "energy" in e.run.scores and channel in e.run.scores["channel"].values]
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


def training_curve(runs: Sequence[RunData]) -> Figure:
    """Loss and validation loss against the update step."""
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        for name, style, what in (("loss", "-", "training"), ("valid/loss", "--", "validation")):
            points = [(r["step"], r[name]) for r in run.history if isinstance(r.get(name), int | float) and r[name] > 0]
            if points:
                steps, values = np.array(points, float).T
                label = f"{run.name}: {what}" if len(runs) > 1 else what
                marker = "o" if len(steps) < 20 else None
                axes.plot(steps, values, style, color=color, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    axes.set_yscale("log")
    axes.set(xlabel="update step", ylabel="loss (normalized units)")
    return _finish(figure, axes)


def field_panels(sample: xr.Dataset, channel: str, leads: Sequence[int] | None = None) -> Figure:
    """Truth, forecast and difference at several leads (positions along `lead`); space-time panels for one space axis,
    curves for none, the middle slice of three.
    """
    truth, forecast = sample[f"{channel}_truth"], sample[f"{channel}_forecast"]
    space = truth.dims[1:]
    if len(space) == 0:
        return _point_panels(truth, forecast, channel)
    if len(space) == 1:
        return _space_time_panels(truth, forecast, channel)
    truth, forecast = as_map(truth), as_map(forecast)
    leads = list(leads) if leads is not None else panel_leads(truth.sizes["lead"])
    times, unit = time_scale(truth["lead"].values)
    chosen, predicted = truth.values[leads], forecast.values[leads]
    norm, map_name, extend = color_scale(chosen)
    error = predicted - chosen
    wide, _, beyond = color_scale(error, symmetric=True)
    ratio = panel_aspect(truth)
    height = float(np.clip(2.6 / ratio, 1.5, 4.0))
    figure = new_figure(10.2, height * len(leads) + 0.9)
    panels = figure.subplots(len(leads), 3, squeeze=False, sharex=True, sharey=True)
    for row, i in enumerate(leads):
        images = []
        for column, values in enumerate((chosen[row], predicted[row], error[row])):
            scale, colors = (wide, "RdBu_r") if column == 2 else (norm, map_name)
            images.append(_map_panel(panels[row, column], truth, values, scale, colors))
        lead = f"lead {format_lead(times[i], unit)}"
        panels[row, 0].set_ylabel(f"{lead}\n{_axis_label(truth, truth.dims[1])}".strip(), fontsize=9)
    for column, title in enumerate(("truth", "forecast", "forecast minus truth")):
        panels[0, column].set_title(title, fontsize=11)
        panels[-1, column].set_xlabel(_axis_label(truth, truth.dims[2]), fontsize=9)
    label = _field_label(truth, channel)
    _colorbar(figure, images[0], panels[:, :2], label, extend)
    _colorbar(figure, images[2], panels[:, 2:], _field_label(truth, "difference"), beyond)
    return figure


def as_map(array: xr.DataArray) -> xr.DataArray:
    """`(lead, vertical, horizontal)`: x and longitude to the right, whatever their order; the middle slice of a third
    axis."""
    space = array.dims[1:]
    if len(space) == 3:
        array = array.isel({space[0]: array.sizes[space[0]] // 2})
    vertical, horizontal = array.dims[1:]
    swap = vertical in ("x", "longitude", "lon") and horizontal not in ("x", "longitude", "lon")
    return array.transpose("lead", horizontal, vertical) if swap else array


def panel_leads(count: int, most: int = 4) -> list[int]:
    """Positions of the leads that are drawn: the first, the last and some between, denser at the beginning."""
    return sorted({round(float(i)) - 1 for i in np.geomspace(1, count, min(count, most))})


def color_scale(values: np.ndarray, symmetric: bool = False) -> tuple[Normalize, str, str]:
    """(limits, colormap, ends that are cut) for fields: centered on zero when they change sign, the middle 99.6 %
    otherwise."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return Normalize(-1, 1), "viridis", "neither"
    low, high = np.quantile(finite, (0.002, 0.998))
    signed = symmetric or (low < 0 < high and min(-low, high) > 0.25 * max(-low, high))
    if signed:
        high = max(abs(low), abs(high)) or 1e-12
        low = -high
    elif high <= low:
        low, high = low - 0.5, high + 0.5
    under, over = finite.min() < low * (1 + 1e-6 * np.sign(-low)), finite.max() > high * (1 + 1e-6 * np.sign(high))
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
        (bool(under), bool(over)), "neither"
    )
    return Normalize(float(low), float(high)), "RdBu_r" if signed else "viridis", extend


def _map_panel(axes, like: xr.DataArray, values: np.ndarray, norm: Normalize, colors: str):
    vertical, horizontal = like.dims[-2:]
    y, x = _edges(like, vertical), _edges(like, horizontal)
    axes.set_facecolor(LAND)
    masked = np.ma.masked_invalid(values)
    image = axes.pcolormesh(x, y, masked, norm=norm, cmap=colors, shading="flat", rasterized=True)
    axes.set_aspect(_data_aspect(like))
    for axis, dim in ((axes.xaxis, horizontal), (axes.yaxis, vertical)):
        if suffixes := _degrees(dim):
            axis.set_major_formatter(
                FuncFormatter(lambda v, _, s=suffixes: f"{abs(v):g}°{s[0] if v > 0 else s[1] if v < 0 else ''}")
            )
    axes.tick_params(labelsize=8)
    return image


def _edges(array: xr.DataArray, dim: str) -> np.ndarray:
    centers = np.asarray(array[dim].values if dim in array.coords else np.arange(array.sizes[dim]), float)
    if len(centers) == 1:
        return np.array([centers[0] - 0.5, centers[0] + 0.5])
    inner = (centers[1:] + centers[:-1]) / 2
    return np.concatenate([[2 * centers[0] - inner[0]], inner, [2 * centers[-1] - inner[-1]]])


def _degrees(dim: str) -> str:
    return {"latitude": "NS", "lat": "NS", "longitude": "EW", "lon": "EW"}.get(dim.lower(), "")


def _data_aspect(array: xr.DataArray) -> float | str:
    """Degrees of longitude are shorter than those of latitude; boxes keep their shape unless it is extreme."""
    vertical, horizontal = array.dims[-2:]
    if _degrees(vertical) == "NS" and _degrees(horizontal) == "EW":
        latitude = np.asarray(array[vertical].values)
        return 1.0 if np.ptp(latitude) > 90 else 1.0 / max(np.cos(np.deg2rad(latitude.mean())), 0.2)
    y, x = np.ptp(_edges(array, vertical)), np.ptp(_edges(array, horizontal))
    return "equal" if 0.2 < x / y < 5 else "auto"


def panel_aspect(array: xr.DataArray) -> float:
    """Width over height of a panel."""
    vertical, horizontal = array.dims[-2:]
    y, x = np.ptp(_edges(array, vertical)), np.ptp(_edges(array, horizontal))
    aspect = _data_aspect(array)
    return (
        float(np.clip(x / y, 0.5, 2.0)) if aspect == "auto" else float(x / y / (1.0 if aspect == "equal" else aspect))
    )


def _axis_label(array: xr.DataArray, dim: str) -> str:
    if _degrees(dim):
        return ""
    unit = array[dim].attrs.get("units", "") if dim in array.coords else "cells"
    return f"{dim} ({unit})" if unit else dim


def _field_label(array: xr.DataArray, channel: str) -> str:
    unit = array.attrs.get("units", "")
    return f"{channel} ({unit})" if unit else channel


def _colorbar(figure: Figure, image, panels, label: str, extend: str) -> None:
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40, extend=extend, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _space_time_panels(truth: xr.DataArray, forecast: xr.DataArray, channel: str) -> Figure:
    """Lead time upward, space to the right."""
    error = forecast - truth
    norm, colors, extend = color_scale(truth.values)
    wide, _, beyond = color_scale(error.values, symmetric=True)
    figure = new_figure(10.2, 4.6)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    times, unit = time_scale(truth["lead"].values)
    clock = truth.assign_coords(lead=times)
    for axes, values, title in zip(panels, (truth, forecast, error), ("truth", "forecast", "forecast minus truth")):
        last = title.endswith("truth") and title != "truth"
        axes.set_facecolor(LAND)
        image = axes.pcolormesh(
            _edges(clock, truth.dims[1]), _edges(clock, "lead"), np.ma.masked_invalid(values.values),
            norm=wide if last else norm, cmap="RdBu_r" if last else colors, rasterized=True,
        )  # fmt: skip
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(_axis_label(truth, truth.dims[1]) or truth.dims[1], fontsize=9)
        axes.tick_params(labelsize=8)
        if title == "forecast":
            _colorbar(figure, image, panels[:2], _field_label(truth, channel), extend)
    _colorbar(figure, image, panels[2:], _field_label(truth, "difference"), beyond)
    panels[0].set_ylabel(lead_label(unit), fontsize=9)
    return figure


def _point_panels(truth: xr.DataArray, forecast: xr.DataArray, channel: str) -> Figure:
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    lead, unit = time_scale(truth["lead"].values)
    axes.plot(lead, truth, color="black", linewidth=2.2, label="truth")
    axes.plot(lead, forecast, color=COLORS[0], label="forecast")
    axes.set(xlabel=lead_label(unit), ylabel=_field_label(truth, channel))
    return _finish(figure, axes)


def _finish(figure: Figure, axes, grid: str = "both", outside: bool = False) -> Figure:
    axes.grid(True, axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if labels and outside:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    elif labels:
        axes.legend(frameon=False, fontsize=9)
    return figure


def _time_unit(run: RunData) -> str:
    return run.spec.time_unit if run.spec is not None and run.spec.time_unit != "s" else ""


def _squared(unit: str) -> str:
    if not unit:
        return "energy"
    return f"energy ({unit}²)" if unit.isalpha() else f"energy (({unit})²)"


def _unit(run: RunData, channel: str) -> str:
    return str(run.scores["unit"].sel(channel=channel).values)
