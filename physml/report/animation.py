"""A rollout as an animated GIF, drawn by Pillow: no window system and no ffmpeg."""

import io

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from PIL import Image, ImageDraw, ImageFont

from physml.report.drawing import COLORS, LAND, color_scale, format_lead, time_scale
from physml.report.fields import as_map, panel_aspect

PANEL = 300  # pixels of the longer side of a panel
MARGIN, TITLE = 10, 24


def animation(sample: xr.Dataset, channel: str, *, frames: int = 60, milliseconds: int = 120) -> bytes:
    """Truth, forecast and difference side by side, as the bytes of a GIF with at most `frames` frames.

    One space axis: curves of truth and forecast. Three: the middle slice. None: the empty bytes.
    """
    truth, forecast = sample[f"{channel}_truth"], sample[f"{channel}_forecast"]
    if truth.ndim == 1:
        return b""
    if truth.ndim > 2:
        truth, forecast = as_map(truth), as_map(forecast)
    chosen = np.unique(np.linspace(0, truth.sizes["lead"] - 1, min(frames, truth.sizes["lead"])).round().astype(int))
    lead, unit = time_scale(truth["lead"].values)
    draw = _curves if truth.ndim == 2 else _maps
    pictures = draw(truth, forecast, chosen, [format_lead(lead[i], unit) for i in chosen], channel)
    buffer = io.BytesIO()
    palette = _palette(tuple({color_scale(truth.values[chosen])[1]: 0, "RdBu_r": 0}))
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [milliseconds] * (len(pictures) - 1) + [1200]
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
    )
    return buffer.getvalue()


def _palette(maps: tuple[str, ...]) -> Image.Image:
    """One palette for all frames, so that colors do not flicker: the colormaps in use, grays for text, land and
    lines."""
    shades = [matplotlib.colormaps[name](np.linspace(0, 1, 232 // len(maps)), bytes=True)[:, :3] for name in maps]
    grays = np.repeat(np.linspace(0, 255, 16).round().astype(np.uint8)[:, None], 3, axis=1)
    flat = np.concatenate([*shades, grays, [_rgb(LAND), _rgb(COLORS[0])]]).astype(np.uint8)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.resize(flat, (256, 3)).tobytes())
    return palette


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def _maps(truth, forecast, chosen, labels, channel) -> list[Image.Image]:
    a, b = truth.values[chosen], forecast.values[chosen]
    a, b = (_upright(values, truth) for values in (a, b))
    error = b - a
    norm, colors, _ = color_scale(a)
    wide, _, _ = color_scale(error, symmetric=True)
    ratio = panel_aspect(truth)
    size = (PANEL, max(round(PANEL / ratio), 60)) if ratio >= 1 else (max(round(PANEL * ratio), 60), PANEL)
    scales = ((norm, colors), (norm, colors), (wide, "RdBu_r"))
    sheets = []
    for *fields, label in zip(a, b, error, labels):
        panels = [_picture(values, *scale, size) for values, scale in zip(fields, scales)]
        sheets.append(_sheet(panels, ("truth", "forecast", "difference"), f"{channel}, lead {label}"))
    return sheets


def _upright(values: np.ndarray, like: xr.DataArray) -> np.ndarray:
    """Rows from top to bottom, as pictures have them: the largest coordinate first."""
    dim = like.dims[1]
    ascending = dim not in like.coords or float(like[dim][-1]) >= float(like[dim][0])
    return values[:, ::-1] if ascending else values


def _picture(values: np.ndarray, norm: Normalize, colors: str, size: tuple[int, int]) -> Image.Image:
    shades = matplotlib.colormaps[colors](norm(np.nan_to_num(values, nan=norm.vmin)), bytes=True)[..., :3]
    shades = np.where(np.isfinite(values)[..., None], shades, np.array(_rgb(LAND), np.uint8))
    return Image.fromarray(np.ascontiguousarray(shades.astype(np.uint8))).resize(size, Image.Resampling.NEAREST)


def _sheet(panels: list[Image.Image], titles, heading: str) -> Image.Image:
    width = sum(panel.width for panel in panels) + MARGIN * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0].height + 2 * TITLE + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((MARGIN, 5), heading, fill="black", font=ImageFont.load_default(14))
    x = MARGIN
    for panel, title in zip(panels, titles):
        draw.text((x, TITLE + 4), title, fill="#444444", font=font)
        sheet.paste(panel, (x, 2 * TITLE))
        x += panel.width + MARGIN
    return sheet


def _curves(truth, forecast, chosen, labels, channel) -> list[Image.Image]:
    a, b = truth.values[chosen], forecast.values[chosen]
    norm, _, _ = color_scale(a)
    low, high = norm.vmin, norm.vmax
    width, height = 560, 260
    x = MARGIN + np.arange(a.shape[1]) / max(a.shape[1] - 1, 1) * (width - 2 * MARGIN)
    pictures = []
    for one, two, label in zip(a, b, labels):
        sheet = Image.new("RGB", (width, height + 2 * TITLE), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text(
            (MARGIN, 5),
            f"{channel}, lead {label}: truth (black), forecast (blue)",
            fill="black",
            font=ImageFont.load_default(14),
        )
        for values, color in ((one, "black"), (two, COLORS[0])):
            y = TITLE + (1 - np.clip((values - low) / (high - low), -0.05, 1.05)) * height
            points = [(float(i), float(j)) for i, j in zip(x, y) if np.isfinite(j)]
            if len(points) > 1:
                draw.line(points, fill=color, width=2)
        pictures.append(sheet)
    return pictures
