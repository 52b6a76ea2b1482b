"""What a benchmark is: tasks with their splits, a score as the benchmark defines it, floors, published numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from physml.metrics import METRICS, Metric
from physml.objectives import OneStep
from physml.progress import Progress

Table = xr.DataArray  # scores by `metric`, `channel`, `lead` and, for single starts, `start`


@dataclass(frozen=True)
class Score:
    """One number per lead, made from the metrics of `physml.metrics`.

    Attributes:
        name, label: short and long.
        metrics: what it needs, by name.
        of: table of these metrics -> score, without the dimensions `metric` and `channel`.
        median: the median over starts, each scored by itself, instead of the score of all pairs pooled.
    """

    name: str
    label: str
    metrics: dict[str, Metric]
    of: Callable[[Table], xr.DataArray]
    median: bool = False

    def __call__(self, scores: xr.Dataset, model: str) -> np.ndarray:
        """`(lead,)`, from a dataset of scores with `score_per_start`."""
        if self.median:
            return self.of(scores["score_per_start"].sel(model=model)).median("start").transpose("lead").values
        return self.of(scores["score"].sel(model=model)).transpose("lead").values

    def per_start(self, scores: xr.Dataset, model: str) -> np.ndarray:
        """`(lead, start)`."""
        return self.of(scores["score_per_start"].sel(model=model)).transpose("lead", "start").values


def _pooled_square_error(table: Table) -> xr.DataArray:
    """Mean squared error over mean square of the truth, all channels together: a ratio of means."""
    error = table.sel(metric="rmse") ** 2
    ratio = table.sel(metric="nrmse_pooled") ** 2
    power = xr.where(ratio > 0, error / xr.where(ratio > 0, ratio, 1.0), np.nan).sum("channel")
    return xr.where(power > 0, error.sum("channel", skipna=False) / xr.where(power > 0, power, 1.0), 0.0)


def _mean_of(metric: str) -> Callable[[Table], xr.DataArray]:
    return lambda table: table.sel(metric=metric).mean("channel", skipna=False)


def _relative_l1(prediction, truth, measure):
    return (measure.mean(abs(prediction - truth)) / measure.mean(abs(truth)),)


def _registered(*names: str) -> dict[str, Metric]:
    return {name: METRICS[name] for name in names}


NMSE = Score(
    "nmse", "MSE / mean square of the truth", _registered("rmse", "nrmse_pooled"), _pooled_square_error
)  # CFDBench
SMSE = Score(
    "smse", "mean squared error, summed over channels", _registered("rmse"),
    lambda table: (table.sel(metric="rmse") ** 2).sum("channel", skipna=False),
)  # fmt: skip  # PDEArena
SCALED_L2 = Score("scaled_l2", "relative L2 error", {"relative_l2": METRICS["relative_l2"]}, _mean_of("relative_l2"))
VRMSE = Score("vrmse", "VRMSE (1: error of the spatial mean)", _registered("vrmse"), _mean_of("vrmse"))
RELATIVE_L1 = Score(
    "relative_l1", "relative L1 error, median over starts", {"relative_l1": Metric(_relative_l1)},
    _mean_of("relative_l1"), median=True,
)  # fmt: skip  # Poseidon
H1 = Score("h1", "relative H1 error", {"h1": METRICS["h1"]}, _mean_of("h1"))
RMSE = Score("rmse", "RMSE, mean over channels", {"rmse": METRICS["rmse"]}, _mean_of("rmse"))
RELATIVE_RMSE = Score(
    "relative_rmse", "RMSE over that of the climatology, mean over channels", _registered("skill"),
    lambda table: np.sqrt(1 - table.sel(metric="skill")).mean("channel", skipna=False),
)  # fmt: skip
ACC = Score("acc", "anomaly correlation, mean over channels", _registered("acc"), _mean_of("acc"))
CORRELATION = Score("correlation", "correlation", {"correlation": METRICS["correlation"]}, _mean_of("correlation"))


@dataclass(frozen=True)
class Published:
    """A number that others report, and where. `floor`: it measures less than it claims; it is shown as a floor only."""

    task: str
    model: str
    value: float
    source: str
    lead: int = 1
    floor: bool = False


@dataclass(frozen=True)
class Task:
    """One data set of a benchmark.

    Attributes:
        name: folder and heading.
        data: splits train, valid, test; one-step errors are taken over all pairs of `test`.
        steps: leads of a rollout.
        rollouts: where rollouts start: in `rollout_data` (`data` if None), `starts` of them per trajectory, evenly
            spread (1: at its beginning).
        history: frames that go in; 0 for problems without time.
        objective: of the training.
        prepare: makes the data where they are generated, before they are opened.
    """

    name: str
    data: Any
    steps: int = 20
    rollout_data: Any = None
    starts: int = 1
    history: int = 1
    objective: Any = OneStep(space="increment")
    prepare: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        title: of the page.
        protocol: how its scores are taken, in a paragraph.
        tasks: (folder of the data or None, points per axis of generated data or None) -> tasks.
        score: the headline; more: further ones.
        floors: steppers without a network, scored beside.
        models: contenders where none are named.
        published: numbers of others.
        embedded: what is generated without data.
    """

    title: str
    protocol: str
    tasks: Callable[[Path | None, int | None], tuple[Task, ...]]
    score: Score
    models: tuple[str, ...]
    embedded: str
    more: tuple[Score, ...] = ()
    floors: tuple[str, ...] = ("persistence", "extrapolation", "climatology")
    published: tuple[Published, ...] = ()

    @property
    def scores(self) -> tuple[Score, ...]:
        return (self.score, *self.more)


__all__ = [
    "ACC", "CORRELATION", "H1", "NMSE", "RELATIVE_L1", "RELATIVE_RMSE", "RMSE", "SCALED_L2", "SMSE", "VRMSE",
    "Published", "Score", "Suite", "Task",
]  # fmt: skip
