"""Fields of one rollout beside the truth. Each function returns a matplotlib `Figure`, never pyplot's."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from physml.report.drawing import COLORS, LAND, color_scale, finish, format_lead, lead_label, new_figure, time_scale


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
    where = slice_of(truth)
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
        panels[0, column].set_title(f"{title}, {where}" if where else title, fontsize=10 if where else 11)
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


def slice_of(array: xr.DataArray) -> str:
    """Where `as_map` cuts a field of three space axes, e.g. "x = 0.5 m"; empty for others."""
    space = array.dims[1:]
    if len(space) != 3:
        return ""
    dim, middle = space[0], array.sizes[space[0]] // 2
    if dim not in array.coords:
        return f"{dim} cell {middle} of {array.sizes[dim]}"
    return f"{dim} = {float(array[dim][middle]):.4g} {array[dim].attrs.get('units', '')}".strip()


def panel_leads(count: int, most: int = 4) -> list[int]:
    """Positions of the leads that are drawn: the first, the last and some between, denser at the beginning."""
    return sorted({round(float(i)) - 1 for i in np.geomspace(1, count, min(count, most))})


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
    return finish(figure, axes)
