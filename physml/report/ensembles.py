"""How an ensemble relates to the truth: rank histograms."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from physml.errors import SpecError
from physml.report.curves import lines_of, styles
from physml.report.drawing import format_lead, new_figure, time_scale
from physml.report.runs import Entry


def with_ranks(lines: list[Entry], channel: str) -> list[Entry]:
    """The models that are ensembles and have a channel."""
    found = [line for line in lines if "rank_histogram" in line.run.scores]
    found = [line for line in found if channel in line.run.scores["channel"].values]
    return [line for line in found if np.isfinite(line.of("rank_histogram").sel(channel=channel)).any()]


def rank_histograms(source: Any, channel: str) -> Figure:
    """Share of cells by the rank of the truth among the members, at the first, middle and last lead.

    Flat is reliable (the thin line); high ends: too little spread; one high end: a bias. Raises SpecError when no model
    is an ensemble.
    """
    entries = with_ranks(lines_of(source), channel)
    if not entries:
        raise SpecError(f"No scores hold a rank histogram of a channel {channel!r}: no model is an ensemble.")
    figure = new_figure(9.6, 2.9 * len(entries) + 0.3)
    panels = figure.subplots(len(entries), 3, squeeze=False)
    style = styles(entries)
    for row, entry in zip(panels, entries, strict=True):
        shares = entry.of("rank_histogram").sel(channel=channel).dropna("rank", how="all")
        spec = entry.run.spec
        unit = spec.time_unit if spec is not None and spec.time_unit != "s" else ""
        lead, unit = time_scale(shares["lead"].values, unit)
        last, flat = len(lead) - 1, 1 / shares.sizes["rank"]
        for axes, position in zip(row, (0, last // 2, last), strict=True):
            axes.bar(shares["rank"], shares.isel(lead=position), width=0.9, color=style[entry.label]["color"])
            axes.axhline(flat, color="black", linewidth=0.8)
            axes.set_title(f"{entry.label}, lead {format_lead(lead[position], unit)}", fontsize=10)
            axes.set_ylim(0, None)
        row[0].set_ylabel("share of cells")
    figure.supxlabel("members below the truth", fontsize=10)
    return figure
