"""What all figures share: canvas, colors, color scales, lead times as text."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

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


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as a PNG file without a date, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


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


def finish(figure: Figure, axes, grid: str = "both", outside: bool = False) -> Figure:
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
