"""Scores as a labelled dataset."""

import datetime
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from physml import __version__
from physml.coding import whole_number
from physml.errors import ConfigError
from physml.evaluate.statistics import RANKS, Tally, channel_units, spread
from physml.fields import Spec
from physml.metrics import Metric, MomentMetric, high_correlation_time
from physml.metrics.aggregate import interval, quantiles, resample
from physml.metrics.chaos import checked_thresholds
from physml.metrics.spectra import shells
from physml.metrics.table import FORMAT

TRUTH = "truth"
SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Setting:
    """How scores were made: what every table and figure needs to be read."""

    spec: Spec
    metrics: dict[str, Metric | MomentMetric]
    leads: np.ndarray  # frames, from 1
    spectrum_leads: tuple[int, ...]
    thresholds: float | tuple[float, ...]
    grouping: str
    draws: int
    level: float

    def __post_init__(self):
        object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds))
        if isinstance(self.level, str) or not 0 < self.level < 1:
            raise ConfigError(f"level is {self.level!r}, but a share between 0 and 1 was expected, e.g. 0.95.")
        if whole_number("draws", self.draws) < 1:
            raise ConfigError(f"draws is {self.draws}, but a bootstrap needs at least one.")


def lead_times(spec: Spec, leads: np.ndarray) -> np.ndarray:
    """Lead times of `leads` (in frames): timedelta64[ns] for data in seconds, else numbers."""
    times = np.asarray(leads) * spec.time_step
    return np.round(times * 1e9).astype("timedelta64[ns]") if spec.time_unit == "s" else times


def assemble(tallies: dict[str, Tally], truth: Tally, setting: Setting, attrs: dict[str, Any]) -> xr.Dataset:
    """The scores of all models. Variables:

    - score, score_low, score_high, score_spread `(model, metric, channel, lead)`: value, bootstrap interval, standard
      deviation of the scores of single pairs;
    - correlation_time, _low, _high, _spread, _capped `(model, channel, threshold)`, in the unit of time; leads without
      any pair do not end it: it is at most the last lead with one;
    - spectrum, spectrum_low, spectrum_high `(source, channel, spectrum_lead, wavenumber)`; source is the truth or a
      model;
    - mean, energy `(source, channel, lead)`: area mean of the field and of half its square;
    - rank_histogram `(model, channel, lead, rank)`, where a model is an ensemble: share of the cells and starts where
      the truth has that rank among its members (NaN beyond their number, and for single forecasts);
    - finite `(model, lead)`: share of rollouts that hold only finite numbers; pairs `(lead)`: how many were averaged.
    """
    groups = truth.groups
    draws = resample(groups, setting.draws, SEED)
    variables = {}
    variables |= _metric_variables(tallies, setting, draws)
    variables |= _correlation_variables(tallies, setting, draws)
    sources = {TRUTH: truth, **tallies}
    for name, part, factor in (("mean", "mean", 1.0), ("energy", "square", 0.5)):
        values = [factor * tally.sums[part].means()[0].T for tally in sources.values()]
        variables[name] = (("source", "channel", "lead"), np.stack(values))
    if setting.spectrum_leads:
        variables |= _spectrum_variables(sources, setting, draws)
    if any(RANKS in tally.sums for tally in tallies.values()):
        variables["rank_histogram"] = _rank_variable(tallies, next(iter(variables.values()))[1].shape)
    finite = [tally.sums["finite"].means()[0][:, 0] for tally in tallies.values()]
    variables["finite"] = (("model", "lead"), np.stack(finite))
    variables["pairs"] = (("lead",), next(iter(tallies.values())).sums["finite"].weights.sum(0).astype(int))
    scores = xr.Dataset(variables, _coordinates(list(tallies), setting))
    scores.attrs = {
        "title": "Scores of rollouts",
        "format": FORMAT,
        "physml_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "interval": f"{setting.level:g} percentile bootstrap, {setting.draws} draws of whole groups",
        "bootstrap_group": setting.grouping,
        "bootstrap_groups": groups,
        "bootstrap_seed": SEED,
        "area_weights": "cell areas of the grid, mean one",
        "spec": json.dumps(setting.spec.to_dict()),
        **attrs,
    }
    return _describe(scores, setting)


def _metric_variables(tallies, setting: Setting, draws) -> dict[str, tuple]:
    dims, result = ("model", "metric", "channel", "lead"), {"": [], "_low": [], "_high": [], "_spread": []}
    for tally in tallies.values():
        rows = {key: [] for key in result}
        for name, metric in setting.metrics.items():
            low, high = interval(metric.finish, tally.sums[name], draws, setting.level)
            rows[""].append(np.asarray(metric.finish(*tally.sums[name].means())).T)
            rows["_low"].append(low.T)
            rows["_high"].append(high.T)
            rows["_spread"].append(spread(tally.per_pair(name)).T)
        for key, values in rows.items():
            result[key].append(np.stack(values))
    return {f"score{key}": (dims, np.stack(values).astype(np.float64)) for key, values in result.items()}


def _correlation_variables(tallies, setting: Setting, draws) -> dict[str, tuple]:
    dims = ("model", "channel", "threshold")
    times = setting.leads * setting.spec.time_step
    result = {key: [] for key in ("", "_low", "_high", "_spread", "_capped")}

    def duration(correlation, pairs=1):  # (..., lead, channel) -> (..., channel, threshold)
        carried = _carried(correlation, np.broadcast_to(pairs, correlation.shape) > 0)
        return high_correlation_time(np.moveaxis(carried, -1, -2), times, setting.thresholds)

    for tally in tallies.values():
        sums = tally.sums["correlation"]
        (mean,), (drawn,) = sums.means(), sums.means(draws)
        pairs = sums.weights.reshape(*sums.weights.shape[:2], -1)  # (group, lead, channel or 1)
        counted = pairs.sum(0) > 0
        reached = times[len(times) - 1 - counted[::-1].argmax(0)]  # the last lead with pairs
        reached = np.where(counted.any(0), reached, np.nan)[:, None]
        value, capped = duration(mean, counted)
        value = np.minimum(value, reached)
        pairs = np.tensordot(draws, pairs, 1)
        of_draws = np.minimum(duration(drawn, pairs)[0], reached)
        tails = quantiles(np.where(pairs.any(1)[..., None], of_draws, np.nan), setting.level)
        alone = tally.groups < 2
        whole = tally.per_pair("correlation")[tally.complete]
        deviation = duration(whole)[0].std(0, ddof=1) if len(whole) > 1 else np.full(value.shape, np.nan)
        result[""].append(value)
        result["_capped"].append(capped)
        result["_low"].append(np.where(alone, np.nan, tails[0]))
        result["_high"].append(np.where(alone, np.nan, tails[1]))
        result["_spread"].append(deviation)
    return {f"correlation_time{key}": (dims, np.stack(values)) for key, values in result.items()}


def _carried(correlation: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """`correlation (..., lead, channel)`; where no pair is `counted`, that of the last lead before, 1 before any."""
    leads = np.arange(1, correlation.shape[-2] + 1)[:, None]
    last = np.maximum.accumulate(np.where(counted, leads, 0), -2)
    padded = np.concatenate([np.ones_like(correlation[..., :1, :]), correlation], -2)
    return np.take_along_axis(padded, last, -2)


def _rank_variable(tallies, shape: tuple[int, ...]) -> tuple:
    """Mean over starts; `shape (model, metric, channel, lead)`."""
    means = [tally.sums[RANKS].means()[0] if RANKS in tally.sums else np.zeros((0, 0, 0)) for tally in tallies.values()]
    values = np.full((shape[0], shape[2], shape[3], max(mean.shape[-1] for mean in means)), np.nan)
    for own, mean in zip(values, means, strict=True):
        if mean.size:
            own[..., : mean.shape[-1]] = np.moveaxis(mean, 0, 1)
    return ("model", "channel", "lead", "rank"), values


def _spectrum_variables(sources, setting: Setting, draws) -> dict[str, tuple]:
    dims = ("source", "channel", "spectrum_lead", "wavenumber")
    result = {"": [], "_low": [], "_high": []}
    for tally in sources.values():
        sums = tally.sums["spectrum"]
        low, high = interval(lambda mean: mean, sums, draws, setting.level)
        for key, values in (("", sums.means()[0]), ("_low", low), ("_high", high)):
            result[key].append(np.moveaxis(values, 0, 1))
    return {f"spectrum{key}": (dims, np.stack(values)) for key, values in result.items()}


def _coordinates(models: list[str], setting: Setting) -> dict[str, Any]:
    spec, metrics = setting.spec, setting.metrics
    coords = {
        "model": models,
        "metric": list(metrics),
        "channel": list(spec.names),
        "lead": lead_times(spec, setting.leads),
        "step": ("lead", setting.leads),
        "threshold": list(setting.thresholds),
        "source": [TRUTH, *models],
        "unit": ("channel", channel_units(spec)),
        "ideal": ("metric", [metric.ideal for metric in metrics.values()]),
        "dimensional": ("metric", [metric.dimensional for metric in metrics.values()]),
    }
    if setting.spectrum_leads:
        chosen = np.asarray(setting.spectrum_leads)
        coords["spectrum_lead"] = lead_times(spec, setting.leads[chosen - 1])
        coords["spectrum_step"] = ("spectrum_lead", chosen)
        coords["wavenumber"] = shells(spec.grid).wavenumbers
    return coords


def _describe(scores: xr.Dataset, setting: Setting) -> xr.Dataset:
    unit = setting.spec.time_unit
    scores["score"].attrs["long_name"] = "score; dimensional metrics have the unit of their channel"
    scores["score_spread"].attrs["long_name"] = "standard deviation of the scores of single rollouts"
    scores["lead"].attrs["long_name"] = "lead time"
    scores["step"].attrs["long_name"] = "lead time in frames"
    scores["finite"].attrs["long_name"] = "share of rollouts that hold only finite numbers"
    for name in ("correlation_time", "correlation_time_low", "correlation_time_high", "correlation_time_spread"):
        scores[name].attrs["units"] = unit
    scores["correlation_time"].attrs["long_name"] = "time of the first lead with mean correlation below the threshold"
    scores["correlation_time_capped"].attrs["long_name"] = "true where it never fell below: the time is a lower bound"
    if "rank_histogram" in scores:
        scores["rank_histogram"].attrs["long_name"] = "share of cells where the truth has a rank among the members"
        scores["rank"] = ("rank", np.arange(scores.sizes["rank"]), {"long_name": "members below the truth"})
    if "spectrum" in scores:
        plan = shells(setting.spec.grid)
        scores["wavenumber"].attrs.update(units=plan.unit, resolved=plan.resolved)
        scores["spectrum"].attrs["long_name"] = "half the mean square per wavenumber shell"
    return scores
