"""Scores of steppers: rollouts from many starts of a dataset, in jitted batches, floors beside the model."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from physml.coding import whole_number
from physml.contracts import Dataset, Stepper
from physml.errors import ConfigError, DataError
from physml.evaluate.planning import CLIMATOLOGY, choose, member_count, no_ensemble
from physml.evaluate.scores import Setting, assemble, lead_times
from physml.evaluate.statistics import (
    Tally,
    blocks_of_starts,
    ensemble_statistics,
    field_statistics,
    finite_frames,
    pair_statistics,
)
from physml.fields import Spec, Window, stack
from physml.metrics import METRICS, THRESHOLDS, Measure, Metric, MomentMetric
from physml.metrics.table import write_netcdf
from physml.rollout import rollout
from physml.rollout.scan import remembered
from physml.steppers import Members
from physml.steppers.members import drawn

SAMPLE_VALUES = 2**25  # numbers per field of sample.nc: longer rollouts are thinned


def evaluate_stepper(
    stepper: Stepper,
    dataset: Dataset,
    leads: int,
    *,
    starts: int | Sequence[tuple[int, int]] | None = None,
    batch: int = 32,
    floors: dict[str, Stepper] | None = None,
    climatology: Stepper | None = None,
    metrics: str | Sequence[str] | dict | None = None,
    spectrum_leads: Sequence[int] | None = None,
    thresholds: float | tuple[float, ...] = THRESHOLDS,
    key: jax.Array | None = None,
    members: int | None = None,
    name: str = "model",
    sample: str | Path | None = None,
    draws: int = 500,
    level: float = 0.95,
    per_start: bool = False,
    processes: bool = False,
) -> xr.Dataset:
    """Rolls a stepper and its floors out from many starts of a dataset and scores them against what followed.

    Only frames before the first predicted one go in: a rollout cannot see what it is scored against.

    Args:
        leads: frames to predict from every start.
        starts: how many starts per trajectory, evenly spread, each with all its leads inside the trajectory; or
            `(trajectory, first predicted frame)` pairs; or None for every frame that has the history before it, where a
            lead averages over the starts that it still has truth for (as weather forecasts are scored).
        batch: starts rolled out at once.
        floors: steppers scored beside the model on the same starts, by name.
        climatology: a stepper whose rollout is the climatology at the valid time, for ACC and skill; the floor
            "climatology" where there is one.
        metrics: names of `METRICS`, or own `Metric`s by name; all that apply by default.
        spectrum_leads: leads in frames whose energy spectrum is kept; first, middle and last by default.
        thresholds: of the high-correlation time.
        key: randomness of stochastic steppers, jax.random.key(0) if not given. Every start has draws of its own; which
            ones, depends on `batch` and on the number of devices and processes.
        members: realizations of a stochastic stepper from every start, each with a key of its own. They, or the members
            of an ensemble of steppers (`physml.stack_members`), are also scored by `crps`, `crps_fair`, `spread` and
            `spread_skill`, and have a `rank_histogram`; every other score is that of their mean.
        sample: a file to write the truth and the forecast of the first start to, for the figures of a report.
        draws: bootstrap draws for the interval of confidence `level`, over trajectories or blocks of starts.
        per_start: also keep `score_per_start (model, metric, channel, lead, start)`.
        processes: share the starts among all processes of a multi-process run; all must call, and get the same scores,
            but `score_spread`, `correlation_time_spread` and `per_start` of their own share. Otherwise the calling
            process does all of it.

    Returns the dataset that `scores.assemble` describes. Raises ConfigError for options that cannot work, SpecError for
    a stepper that does not fit the data, DataError when no trajectory is long enough or the truth is not finite.
    """
    models, leads = _name_models(stepper, floors or {}, name), whole_number("leads", leads)
    spec = dataset.spec
    for label, model in models.items():
        model.spec.check_same(spec, mine=f"the stepper {label!r}", theirs="the data")
    climatology = climatology if climatology is not None else models.get(CLIMATOLOGY)
    history = max(model.history for model in (*models.values(), *([] if climatology is None else [climatology])))
    counts = {name: member_count(stepper.count if isinstance(stepper, Members) else None, members)}
    models[name] = drawn(stepper) if members else stepper
    plan, *chosen = choose(
        dataset, history, leads, starts, metrics, spectrum_leads, climatology is not None, (counts[name] or 1) > 1
    )
    if processes and len(plan) < jax.process_count():
        raise ConfigError(
            f"There are {len(plan)} starts for {jax.process_count()} processes, but each needs one at least. Give "
            "more starts (None: all of them) or longer data, or processes=False."
        )
    groups, grouping = blocks_of_starts(plan, leads)
    setting = Setting(spec, *chosen, thresholds, grouping, draws, level)
    key = jax.random.key(0) if key is None else key
    if processes and jax.process_count() > 1:  # each counts its batches from 0: without this, they would share draws
        key = jax.random.fold_in(key, jax.process_index())
    run = _Run(setting, models, counts, climatology, history, leads, key)
    share = slice(jax.process_index(), None, jax.process_count()) if processes else slice(None)
    several = name if (members or 1) > 1 else None
    tallies, truth, shown = run(dataset, plan[share], groups[share], int(groups.max()) + 1, batch, several)
    if processes:
        for tally in (*tallies.values(), truth):
            tally.merge_processes()
    attrs = {
        "model": name,
        "floors": ", ".join(label for label in models if label != name),
        "starts": len(plan),
        "trajectories": len({trajectory for trajectory, _ in plan}),
        "history": history,
        "climatology": "given" if climatology is not None else "none",
        **({"members": f"{name}: {counts[name]}"} if counts[name] else {}),
    }
    scores = assemble(tallies, truth, setting, attrs)
    if per_start:
        scores = scores.merge(_per_start(tallies, setting, plan[share]))
    if sample is not None and jax.process_index() == 0:
        write_netcdf(sample_dataset(*shown, spec, plan[0], name), sample)
    return scores


def _name_models(stepper: Stepper, floors: dict[str, Stepper], name: str) -> dict[str, Stepper]:
    if not isinstance(floors, dict):
        raise ConfigError(
            f"floors is {floors!r}, but those of a stepper are steppers by name, fitted to its training data, e.g. "
            'floors={"persistence": PersistenceConfig().fit(train)}.'
        )
    if name in floors or "truth" in (name, *floors):
        raise ConfigError(
            f"The model is called {name!r} and its floors {list(floors)}: names must differ, and 'truth' is taken. "
            "Pass another `name=`."
        )
    return {name: stepper, **floors}


@dataclass(frozen=True)
class _Scoring:
    """What is taken of every rollout; hashable, so that programs are found again. No metrics: the rollout itself."""

    spec: Spec
    metrics: tuple[tuple[str, Metric], ...] | None = None
    spectrum_leads: tuple[int, ...] = ()
    ensembles: bool = False

    def __call__(self, ensemble, truth, climatology, mask):
        """`ensemble (member, batch, lead, *space, channel)`."""
        frames = ensemble.mean(0) if len(ensemble) > 1 else ensemble[0]
        if self.metrics is None:
            return frames
        measure = Measure.of(self.spec, mask, climatology)
        parts, pairs = pair_statistics(frames, truth, measure, dict(self.metrics))
        parts |= field_statistics(frames, measure, self.spectrum_leads)
        finite = finite_frames(frames)
        parts["finite"] = (finite[..., None].astype(jnp.float32),)
        if self.ensembles:
            parts |= ensemble_statistics(ensemble, truth, measure)
        return parts, pairs, frames[:1], _repeated(ensemble)


@remembered
def _scored(graph, stacked: int, repeats: int, leads: int, skip: int, scoring: _Scoring):
    """`(numbers, window, truth, climatology, key, number of the batch) -> scoring(rollout, ...)`, jitted, of
    `stacked * repeats` members."""

    @jax.jit
    def scored(state, window, truth, climatology, key, number):
        start, batch = _later(window, skip), window.frames.shape[0]
        key = jax.random.fold_in(key, number)
        if repeats > 1:
            # Realizations of one start side by side: those of a device stay on it, where tiling would move them all.
            start = jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=0), start)

        def run(state, key):
            model = nnx.merge(graph, state)
            model.eval()
            return rollout(model, start, leads, key)

        if stacked:
            frames = jax.vmap(run)(state, jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(stacked)))
        else:
            frames = run(state, key)
        frames = frames.reshape(max(stacked, 1), batch, repeats, *frames.shape[bool(stacked) + 1 :])
        frames = jnp.moveaxis(frames, 2, 1)
        return scoring(frames.reshape(-1, *frames.shape[2:]), truth, climatology, window.mask)

    return scored


@functools.partial(jax.jit, static_argnames=("spec", "spectrum_leads"))
def _of_truth(frames, mask, *, spec: Spec, spectrum_leads: tuple[int, ...]):
    return field_statistics(frames, Measure.of(spec, mask), spectrum_leads)


class _Run:
    """The jitted functions of one evaluation and the loop over its batches."""

    def __init__(self, setting: Setting, models, counts, climatology, history: int, leads: int, key):
        self.setting, self.history, self.leads = setting, history, leads
        # All devices of this process, and no other: the caller may be the only process that evaluates.
        devices = jax.local_devices()
        self.mesh = jax.make_mesh(
            (1, len(devices), 1), ("member", "data", "space"), axis_types=(AxisType.Auto,) * 3, devices=devices
        )
        self.key = jax.device_put(key, NamedSharding(self.mesh, PartitionSpec()))  # it may come from another mesh
        # Correlation is always taken: the high-correlation time needs it.
        metrics = {**setting.metrics, "correlation": METRICS["correlation"]}
        self.of_ensembles = {label: m for label, m in metrics.items() if isinstance(m, MomentMetric)}
        single = tuple((label, m) for label, m in metrics.items() if label not in self.of_ensembles)
        scoring = _Scoring(setting.spec, single, setting.spectrum_leads, bool(self.of_ensembles))
        self.models = {label: self._prepare(model, scoring, counts.get(label)) for label, model in models.items()}
        self.climatology = None if climatology is None else self._prepare(climatology, _Scoring(setting.spec))

    def _prepare(self, stepper: Stepper, scoring: _Scoring, members: int | None = None):
        """`(window, truth, climatology, key, number of the batch) -> scoring(rollout, ...)` of a stepper; of `members`,
        each by itself."""
        stacked = stepper.count if members and isinstance(stepper, Members) else 0
        graph, state = nnx.split(stepper.stacked if stacked else stepper)
        state = jax.tree.map(lambda a: a.addressable_data(0) if not a.is_fully_addressable else a, state)
        state = jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))
        repeats = (members or 1) // (stacked or 1)
        scored = _scored(graph, stacked, repeats, self.leads, self.history - stepper.history, scoring)
        return functools.partial(scored, state)

    def __call__(self, dataset: Dataset, plan, groups, count: int, batch: int, several: str | None = None):
        """`several`: the model whose members must differ, because they were asked for."""
        if batch < 1:
            raise ConfigError(f"batch is {batch}, but at least one start must be rolled out at a time.")
        devices = self.mesh.size
        batch = -(-min(batch, len(plan)) // devices) * devices
        tallies = {label: Tally(count, self.setting.spectrum_leads) for label in self.models}
        truth_tally = Tally(count, self.setting.spectrum_leads)
        shown = None
        with jax.set_mesh(self.mesh):
            for number, (window, weights) in enumerate(self._batches(dataset, plan, batch)):
                truth, mask, counts = window.frames[:, self.history :], window.mask, weights
                if mask is not None:  # a channel that a sample lacks altogether does not count there
                    exists = np.asarray(mask).any(tuple(range(1, mask.ndim - 1)))
                    counts = weights[..., None] * exists[:, None, :]
                window = dataclasses.replace(window, frames=window.frames[:, : self.history])
                window, truth, mask = jax.device_put(
                    (window, truth, mask), NamedSharding(self.mesh, PartitionSpec("data"))
                )
                draws = self.key, np.int32(number)
                normal = None if self.climatology is None else self.climatology(window, truth, None, *draws)
                found = {label: model(window, truth, normal, *draws) for label, model in self.models.items()}
                spectrum_leads = self.setting.spectrum_leads
                of_truth = _of_truth(truth, mask, spec=self.setting.spec, spectrum_leads=spectrum_leads)
                index = np.resize(groups[number * batch : (number + 1) * batch], batch)
                truth_tally.add(jax.device_get(of_truth), {}, index, counts)
                if number == 0 and several and found[several][3]:
                    raise no_ensemble(repr(several))
                for label, (parts, pairs, *_) in found.items():
                    parts, pairs = jax.device_get((parts, pairs))
                    pairs |= {key: metric.per_pair(parts[key]) for key, metric in self.of_ensembles.items()}
                    tallies[label].add(parts, pairs, index, counts)
                if shown is None:
                    frames = found[next(iter(found))][2]
                    kept = int(weights[0].sum())
                    shown = (
                        *(np.asarray(a)[0, :kept] for a in (truth[:1], frames)),
                        None if mask is None else np.asarray(mask[:1])[0],
                    )
        return tallies, truth_tally, shown

    def _batches(self, dataset: Dataset, plan, batch: int) -> Iterator[tuple[Window, np.ndarray]]:
        """Batched windows of equal shape and their weights `(batch, lead)`; the next is read while one is scored."""
        chunks = [plan[i : i + batch] for i in range(0, len(plan), batch)]
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(self._read, dataset, chunks[0], batch)
            for i in range(len(chunks)):
                ready = waiting.result()
                if i + 1 < len(chunks):
                    waiting = reader.submit(self._read, dataset, chunks[i + 1], batch)
                yield ready

    def _read(self, dataset: Dataset, chunk, batch: int) -> tuple[Window, np.ndarray]:
        windows, weights = [], np.zeros((batch, self.leads), np.float32)
        for i, (trajectory, frame) in enumerate(chunk):
            stop = min(frame + self.leads, dataset.lengths[trajectory])
            window = dataset.read(trajectory, range(frame - self.history, stop))
            _check_finite(window, trajectory, frame - self.history)
            windows.append(_fill_up(window, self.history + self.leads))
            weights[i, : stop - frame] = 1
        # A smaller last batch repeats its starts with weight zero: the same shapes, so nothing is traced again.
        windows += [windows[i % len(chunk)] for i in range(batch - len(chunk))]
        return stack(windows), weights


def _repeated(ensemble):
    """Whether a member is equal to the one before it; not where both hold no finite number."""
    first, second = ensemble[:-1], ensemble[1:]
    axes = tuple(range(1, ensemble.ndim))
    equal = (first == second) | (jnp.isnan(first) & jnp.isnan(second))
    return (equal.all(axes) & jnp.isfinite(first).any(axes)).any()


def _later(window: Window, skip: int) -> Window:
    """The window without its first `skip` frames; its clock starts again at zero."""
    if skip == 0:
        return window
    cut = window.slice(skip, None)
    return dataclasses.replace(cut, times=cut.times - cut.times[:, :1])


def _fill_up(window: Window, length: int) -> Window:
    """A window (without batch axis) made `length` frames long by repeating its last frame; the clock goes on."""
    missing = length - len(window.frames)
    if missing == 0:
        return window

    def repeat(array):
        return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])

    times = np.asarray(window.times)
    later = times[-1] + np.arange(1, missing + 1, dtype=times.dtype) * times.dtype.type(window.spec.time_step)
    filled = {name: repeat(np.asarray(getattr(window, name))) for name in ("frames", "calendar", "forcing")}
    return dataclasses.replace(window, times=np.concatenate([times, later]), **filled)


def _check_finite(window: Window, trajectory: int, first: int) -> None:
    frames = np.asarray(window.frames)
    if not np.isfinite(frames).all():
        time, *_, channel = (int(i) for i in np.argwhere(~np.isfinite(frames))[0])
        raise DataError(
            f"The truth is not finite: channel {window.spec.names[channel]!r} of trajectory {trajectory}, frame "
            f"{first + time}. "
            "Mask or fill it, or choose other starts."
        )


def _per_start(tallies, setting: Setting, plan) -> xr.Dataset:
    values = [[np.moveaxis(tally.per_pair(name), 0, -1) for name in setting.metrics] for tally in tallies.values()]
    array = np.moveaxis(np.stack([np.stack(rows) for rows in values]), 2, 3)
    return xr.Dataset(
        {"score_per_start": (("model", "metric", "channel", "lead", "start"), array)},
        {"trajectory": ("start", [t for t, _ in plan]), "frame": ("start", [f for _, f in plan])},
    )


def sample_dataset(truth, forecast, mask, spec: Spec, start: tuple[int, int], name: str) -> xr.Dataset:
    """The layout of sample.nc: `CHANNEL_truth` and `CHANNEL_forecast`, dims `(lead, *space)`, NaN where the mask is 0.

    Frames are thinned evenly to keep a field below 2^25 numbers; coordinate `step` counts them from 1.
    """
    stride = max(1, -(-truth[..., 0].size // SAMPLE_VALUES))
    steps = np.arange(1, len(truth) + 1)[stride - 1 :: stride]
    dims = ("lead", *(axis.name for axis in spec.grid.axes))
    variables = {}
    for i, channel in enumerate(spec.channels):
        for label, frames in (("truth", truth), ("forecast", forecast)):
            field = frames[steps - 1, ..., i]
            field = field if mask is None else np.where(mask[..., i] > 0, field, np.nan)
            variables[f"{channel.name}_{label}"] = (dims, field.astype(np.float32), {"units": channel.unit})
    coords: dict[str, Any] = {"lead": lead_times(spec, steps), "step": ("lead", steps)}
    coords |= {axis.name: (axis.name, np.asarray(axis.centers), {"units": axis.unit}) for axis in spec.grid.axes}
    attrs = {"title": "One rollout beside the truth", "model": name, "trajectory": start[0], "frame": start[1]}
    return xr.Dataset(variables, coords, attrs)
