"""Scores of labelled forecasts: xarray in, aligned with the truth by valid time, summed up in blocks of any size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from physml.errors import ConfigError, DataError, suggest
from physml.evaluate.blocks import CLIMATOLOGY, PERSISTENCE, Work, check_scheduler, plan, run
from physml.evaluate.labels import LEAD, MEMBER, Forecast, Times, choose_channels
from physml.evaluate.scores import Setting, assemble
from physml.evaluate.sources import Categories, Climatology, Source, truth_source
from physml.evaluate.statistics import RANKS, Tally, as_names, choose_spectrum_leads, has_spectrum, pick_metrics
from physml.fields import Spec
from physml.metrics import FORECAST_METRICS, METRICS, THRESHOLDS, Metric, MomentMetric
from physml.metrics.moments import Moments


def evaluate_forecasts(
    predictions: dict[str, xr.Dataset],
    truth: xr.Dataset,
    *,
    metrics: str | Sequence[str] | dict | None = None,
    climatology: xr.Dataset | None = None,
    floors: str | Sequence[str] = (),
    inputs: xr.Dataset | np.ndarray | None = None,
    spectrum_leads: Sequence[int] | None = None,
    thresholds: float | tuple[float, ...] = THRESHOLDS,
    batch: int | None = None,
    draws: int = 500,
    level: float = 0.95,
    scheduler: str | None = None,
) -> xr.Dataset:
    """Scores forecasts by name against the truth at their valid times, in blocks. See `physml.evaluate`.

    Nothing is loaded as a whole: forecasts, truth and climatology may be opened lazily and be far larger than memory.

    - Fields on levels and without are scored together, as channels `z_500`, `t2m`. Space is aligned by coordinate.
    - Starts and leads that the truth has no frame for are left out and counted in the attributes `pairs_left_out`,
      `starts_left_out` and `leads_left_out`; fields and levels that it lacks in `channels_left_out`.
    - Cells where the truth is NaN do not count; the weights of a frame are those of its other cells, and a frame
      without any does not count. A forecast that is NaN where the truth is not has no score there: `finite` says so.
    - An ensemble (dimension `member`, `realization`, `number` or `ensemble`) is scored by `crps`, `crps_fair`,
      `spread` and `spread_skill`, and its `rank_histogram`; every other metric, and the spectrum, is that of its mean.
    - Standard deviations, variables `NAME_std` beside every field, are scored by `gaussian_crps` and `log_likelihood`.
      Those and ensembles have `coverage_50` and `coverage_90`, the share of truths in the central 50 and 90 per cent.
    - Spectra and the metrics of whole frames (h1, log_spectral_error, own ones) need all cells at once. They are left
      out when `metrics` names only others, and no `spectrum_leads` are given.

    Args:
        batch: starts in a block at most; as many as fit into `blocks.BLOCK` bytes by default.
        climatology: for `seeps` also variables `NAME_seeps_threshold` (m) and `NAME_seeps_dry_fraction`.
        scheduler: "threads" (of this process), "processes", "synchronous", or the address of a dask.distributed
            scheduler, whose workers must be able to open the files.
    """
    scheduler = check_scheduler(scheduler)
    if batch is not None and batch < 1:
        raise ConfigError(f"batch is {batch}, but at least one start must be scored at a time.")
    spec, channels_left_out = choose_channels(predictions, truth)
    forecasts = {name: Forecast(name, ds) for name, ds in predictions.items()}
    first = next(iter(forecasts.values()))
    for other in forecasts.values():
        first.check_same_times(other)
    first.check_inputs(inputs)
    deviations = {name: found for name, f in forecasts.items() if (found := f.deviations(spec)) is not None}
    chosen = _choose_metrics(metrics, forecasts, climatology, spec, bool(deviations))
    floors = _known_floors(floors, climatology)
    if clash := set(forecasts) & {*floors, "truth"}:
        raise ConfigError(f"A prediction is called {min(clash)!r}, which is taken: give it another name.")
    times = Times(truth, spec)
    index = np.stack([times.find(valid, f"the prediction {first.name!r}") for valid in first.valid])
    starts, leads = np.flatnonzero((index >= 0).any(1)), np.flatnonzero((index >= 0).any(0))
    if not len(starts):
        raise times.missing(first.valid.ravel(), index.ravel(), f"the prediction {first.name!r}")
    source, positions = truth_source(truth, spec, first)
    positions, index = positions[starts], index[np.ix_(starts, leads)]
    shift, masked = _first_frame(source, positions, index, spec)
    whole = {name: metric for name, metric in chosen.items() if isinstance(metric, Metric)}
    spectral = has_spectrum(spec.grid, masked) and (metrics is None or spectrum_leads is not None)
    if "log_spectral_error" in whole and not has_spectrum(spec.grid, masked):
        whole.pop("log_spectral_error")
        if metrics is not None:
            raise ConfigError(
                "'log_spectral_error' needs a spectrum, but the truth has missing cells, or a small grid."
            )
        chosen.pop("log_spectral_error")
    kept = choose_spectrum_leads(spectrum_leads, len(leads)) if spectral or "log_spectral_error" in whole else ()
    valid = first.valid[np.ix_(starts, leads)]
    work = Work(
        spec=spec,
        forecasts={name: Source(forecast.fields, spec, (MEMBER,)) for name, forecast in forecasts.items()},
        truth=source, starts=starts, leads=leads, trajectories=positions, truth_index=index, shift=shift, floors=floors,
        last_input=_last_inputs(first, times, index, first.steps(spec, leads)) if PERSISTENCE in floors else None,
        whole=whole, spectrum_leads=kept, masked=masked,
        deviations={name: Source(ds, spec) for name, ds in deviations.items()},
        **_climate(climatology, chosen, floors, spec, valid, scheduler),
    )  # fmt: skip
    setting = Setting(spec, chosen, first.steps(spec, leads), kept, thresholds, "trajectory", draws, level)
    totals, frames = _sum(work, plan(work, isinstance(metrics, dict), batch), scheduler)
    members = {name: forecast.members for name, forecast in forecasts.items()}
    tallies, of_truth = _tally(work, setting, totals, frames, members)
    attrs = {
        "starts": len(starts), "floors": ", ".join(floors), "climatology": "none" if climatology is None else "given",
        "members": ", ".join(f"{name}: {count}" for name, count in members.items()),
        "pairs_left_out": first.valid.size - int((index >= 0).sum()),
        "starts_left_out": first.trajectories - len(starts), "leads_left_out": first.leads - len(leads),
        "channels_left_out": ", ".join(channels_left_out),
    }  # fmt: skip
    return assemble(tallies, of_truth, setting, attrs)


def _choose_metrics(names, forecasts, climatology, spec: Spec, gaussian: bool) -> dict[str, Metric | MomentMetric]:
    """`pick_metrics` of those that score forecasts."""
    ensemble = any(forecast.members > 1 for forecast in forecasts.values())
    has = {
        "climatology": climatology is not None,
        "ensemble": ensemble,
        "gaussian": gaussian,
        "uncertainty": ensemble or gaussian,
        "seeps": climatology is not None
        and any(f"{name}_seeps_threshold" in climatology.variables for name in spec.names),
    }
    lacking = {
        "climatology": "compares with a climatology, but none is given: pass `climatology=` (--climatology FILE)",
        "ensemble": "scores ensembles, but no prediction has a dimension of two members or more",
        "gaussian": "scores standard deviations, but no prediction has variables NAME_std beside all of its fields",
        "uncertainty": "scores uncertainty, but no prediction has two members or more, or variables NAME_std beside "
        "its fields",
        "seeps": "needs a climatology with the variables NAME_seeps_threshold and NAME_seeps_dry_fraction of a "
        "predicted precipitation: pass `climatology=` (--climatology FILE)",
    }
    lacking = {need: said for need, said in lacking.items() if not has[need]}
    return pick_metrics(names, {**METRICS, **FORECAST_METRICS}, lacking)


def _known_floors(floors: str | Sequence[str], climatology) -> tuple[str, ...]:
    floors = as_names(floors)
    for name in floors:
        if name not in (PERSISTENCE, CLIMATOLOGY):
            raise ConfigError(
                f"{name!r} is no floor of labelled forecasts." + suggest(name, (PERSISTENCE, CLIMATOLOGY))
            )
        if name == CLIMATOLOGY and climatology is None:
            raise ConfigError("The floor 'climatology' needs one: pass `climatology=` (--climatology FILE).")
    return floors


def _last_inputs(forecast: Forecast, times: Times, index: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Positions in the truth of the last input of every start, from those of its frames, `index (start, lead)`."""
    if forecast.lead is None:
        raise ConfigError(
            f"The floor 'persistence' needs to know the last input: give the prediction a coordinate {LEAD!r}."
        )
    lead = (index >= 0).argmax(1)
    known = index[np.arange(len(index)), lead]
    last = times.before(known, steps[lead])
    if (last < 0).any():
        start = int(np.argmin(last))
        raise DataError(
            f"The truth has no frame {steps[lead][start]} steps before {times.labels[known][start]}, the last input "
            f"of a forecast, which the floor 'persistence' repeats; it covers {times.labels[0]}..{times.labels[-1]}. "
            "Open more data, or leave the floor out."
        )
    return last


def _first_frame(source: Source, positions: np.ndarray, index: np.ndarray, spec: Spec) -> tuple[np.ndarray, bool]:
    """Mean of each channel in the first frame of the truth, 0 where it has none, and whether cells are missing."""
    start, lead = np.argwhere(index >= 0)[0]
    tile = tuple(slice(None) for _ in spec.grid.axes)
    means, masked = [], False
    for channel in range(len(spec.channels)):
        frame = source.read((channel,), tile, trajectory=[positions[start]], time=[index[start, lead]])
        finite = np.isfinite(frame)
        masked |= not finite.all()
        means.append(frame.mean(where=finite, dtype=np.float64) if finite.any() else 0.0)
    return np.array(means), masked


def _climate(climatology, chosen, floors, spec: Spec, valid: np.ndarray, scheduler: str) -> dict[str, Any]:
    """The climatologies of `Work` that the metrics need, and where the valid times lie in them."""
    found: dict[str, Any] = {}
    if climatology is None:
        return found
    if CLIMATOLOGY in floors or any(metric.needs == "climatology" for metric in chosen.values()):
        found["climatology"] = normal = Climatology(climatology, spec)
        found["seasons"] = normal.index(valid.ravel()).reshape(*valid.shape, -1)
    if "seeps" in chosen:
        found["categories"] = categories = Categories(climatology, spec, scheduler)
        found["category_seasons"] = categories.threshold.index(valid.ravel()).reshape(*valid.shape, -1)
    return found


def _sum(work: Work, blocks, scheduler: str) -> tuple[dict, dict]:
    """Sums of all blocks by model and name, `(start, lead, channel)`; the parts of whole frames, lists of arrays."""
    shape = (*work.truth_index.shape, len(work.spec.channels))
    totals: dict[str, dict[str, np.ndarray]] = {}
    frames: dict[str, dict[str, list[np.ndarray]]] = {}
    for block, sums, parts in run(work, blocks, scheduler):
        at = np.ix_(*(np.arange(size)[part] for size, part in zip(shape, (block.starts, block.leads))), block.channels)
        for name, found in sums.items():
            for key, values in found.items():
                array = totals.setdefault(name, {}).setdefault(key, np.full(shape, np.nan))
                array[at] = np.where(np.isnan(array[at]), 0.0, array[at]) + values
        for name, found in parts.items():
            for key, arrays in found.items():
                _place(frames.setdefault(name, {}), key, arrays, at, work)
    return totals, frames


def _place(frames: dict, key: str, arrays: tuple, at: tuple, work: Work) -> None:
    starts, leads, channels = at
    count = len(work.leads)
    if key == "spectrum":  # it has the kept leads only
        kept = np.asarray(work.spectrum_leads) - 1
        inside = np.isin(kept, leads)
        leads, count = np.flatnonzero(inside)[None, :, None], len(kept)
    shape = (len(work.starts), count, len(work.spec.channels))
    for i, values in enumerate(arrays):
        whole = frames.setdefault(key, [])
        if len(whole) <= i:
            whole.append(np.full((*shape, *values.shape[3:]), np.nan))
        whole[i][starts, leads, channels] = values


def _tally(work: Work, setting: Setting, totals: dict, frames: dict, members: dict[str, int]):
    """Sums over starts for the table of scores."""
    starts = len(work.starts)
    tallies, of_truth = {}, None
    for name, sums in totals.items():
        moments = Moments(sums, work.shift, members.get(name, 1))
        weights = ((work.truth_index >= 0)[..., None] & (sums["weight"] > 0)).astype(float)
        _check_somewhere(weights, setting.spec)
        own = {key: tuple(parts) for key, parts in frames.get(name, {}).items()}
        parts = {key: m.parts(moments) for key, m in setting.metrics.items() if isinstance(m, MomentMetric)} | own
        parts["correlation"] = FORECAST_METRICS["correlation"].parts(moments)
        metrics = {**setting.metrics, "correlation": FORECAST_METRICS["correlation"]}
        pairs = {key: metrics[key].per_pair(parts[key]) for key in metrics}
        parts["mean"], parts["square"] = (moments.field_mean,), (moments.field_power,)
        finite = (moments.finite | (sums["weight"] == 0)).all(-1, keepdims=True)
        parts["finite"] = (finite.astype(float),)
        if moments.members > 1:
            parts[RANKS] = (moments.ranks,)
        tallies[name] = Tally(starts, setting.spectrum_leads)
        # Frames with a gap that the first does not have: no spectrum, but every other score.
        complete = np.full(weights.shape, work.masked) | (sums["cells"] == np.prod(setting.spec.grid.shape))
        if "log_spectral_error" in pairs:
            pairs["log_spectral_error"] = np.where(complete, pairs["log_spectral_error"], np.nan)
        tallies[name].add(parts, pairs, np.arange(starts), weights, complete)
        if of_truth is None:
            of_truth = Tally(starts, setting.spectrum_leads)
            parts = {"mean": (moments.truth_mean,), "square": (moments.truth_power,)}
            parts |= {key: tuple(values) for key, values in frames.get("", {}).items()}
            of_truth.add(parts, {}, np.arange(starts), weights, complete)
    return tallies, of_truth


def _check_somewhere(weights: np.ndarray, spec: Spec) -> None:
    empty = ~weights.any((0, 1))
    if empty.any():
        name = spec.names[int(np.argmax(empty))]
        raise DataError(f"The truth of {name!r} is missing (NaN) in all cells at all valid times. Leave it out.")
