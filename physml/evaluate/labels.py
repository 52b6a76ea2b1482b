"""What the labels of a forecast say: when it started and is valid, its members; and where the truth has that time."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data.channels import base_of, entry_labels, source_of, time_of, unit_of
from physml.data.globe import durations, renamed
from physml.data.labelled import spec_of
from physml.errors import ConfigError, DataError, SpecError, suggest
from physml.fields import Spec
from physml.forecast.run import STD

LEAD, TIME, TRAJECTORY, MEMBER = "lead", "time", "trajectory", "member"
LEADS = (LEAD, "lead_time", "prediction_timedelta", "forecast_period", "step")
STARTS = (TRAJECTORY, "init_time", "initial_time", "forecast_reference_time", "reference_time", "init", TIME)
VALID = (TIME, "valid_time")
MEMBERS = (MEMBER, "members", "realization", "number", "ensemble", "ens")
LEDGER = "ledger_"  # variables of a forecast that watch its totals
MONTHS = 0.1  # of a step: how far frames may be from where steps of equal length put them; months are 0.08 off
GEOMETRIC = ("height", "altitude", "depth")  # vertical axes that are space, unless some variables lack them


class Forecast:
    """One prediction: its times, and its fields with the dimensions member, trajectory and time (for lead).

    Attributes:
        fields: the dataset, without coordinates of time; space as it is stored.
        valid: valid times `(trajectory, lead)`. lead: labels `(lead,)`, None when it does not say. members: 1 or more.
        labels: of the trajectories `(trajectory,)`, None when it does not say. dims: names that the dataset had for
            trajectory (None where it has no such dimension) and lead.
    """

    def __init__(self, name: str, ds: xr.Dataset):
        self.name = name
        lead = _lead_dim(ds)
        self.has_lead = lead is not None and lead in ds.variables
        if lead is None and TIME not in ds.dims:
            raise SpecError(
                f"The prediction {name!r} has dimensions {dict(ds.sizes)}, but {LEAD!r} or {TIME!r} was expected."
            )
        member = next((dim for dim in MEMBERS if dim in ds.dims), None)
        start = self._start_dim(ds, lead)
        frames = lead or TIME
        if ds.sizes[frames] == 0 or (start and ds.sizes[start] == 0):
            raise SpecError(f"The prediction {name!r} holds no frames: its {frames!r} or {start!r} has length zero.")
        self.dims = (start, frames)
        self.leads, self.trajectories = ds.sizes[frames], ds.sizes[start] if start else 1
        self.members = ds.sizes[member] if member else 1
        self.labels = trajectory_labels(ds, start, self.trajectories)
        self.lead = self._lead(ds, lead, start) if self.has_lead else None
        self.valid = self._valid(ds, frames, start)
        drop = {*VALID, *STARTS, frames, member} - {None}
        ds = ds.drop_vars([n for n in drop if n in ds.coords])
        for dim, new in ((start, TRAJECTORY), (frames, TIME), (member, MEMBER)):
            ds = renamed(ds, {dim: new}) if dim else ds
        self.fields = ds

    def _start_dim(self, ds: xr.Dataset, lead: str | None) -> str | None:
        known = [dim for dim in STARTS if dim in ds.dims and (lead is not None or dim != TIME)]
        known += [dim for dim in ds.dims if dim in ax.TRAJECTORY and dim not in (*MEMBERS, *known)]
        if len(known) > 1:
            raise SpecError(
                f"The prediction {self.name!r} has the dimensions {known}, and each could be that of its starts. Keep "
                "one: select or stack the others."
            )
        return known[0] if known else None

    def _lead(self, ds: xr.Dataset, dim: str, start: str | None) -> np.ndarray:
        """Leads as timedelta64[ns] for calendar times, else as they are; ascending and above zero."""
        lead = np.asarray(ds[dim].values)
        dates = any(n in ds.variables and ds[n].dtype.kind in "MO" for n in (*VALID, start, *STARTS) if n)
        if lead.dtype.kind == "m" or (dates and lead.dtype.kind in "iuf"):
            lead = durations(ds, dim, f"The prediction {self.name!r}") if (np.diff(lead) > 0).all() else lead
        zero = np.zeros(1, lead.dtype)
        if (lead <= zero).any():
            raise SpecError(
                f"The prediction {self.name!r} holds lead {lead[lead <= zero][0]}: that frame went into the forecast, "
                f"and scoring it would compare the input with itself. Drop it, e.g. prediction.isel({dim}=slice(1, "
                "None))."
            )
        if (np.diff(lead) <= zero).any():
            raise SpecError(f"The leads of the prediction {self.name!r} do not ascend: {lead[:5]}. Sort them.")
        return lead

    def _valid(self, ds: xr.Dataset, frames: str, start: str | None) -> np.ndarray:
        shape = (self.trajectories, self.leads)
        for name in VALID:
            if name in ds.variables and frames in ds[name].dims and set(ds[name].dims) <= {frames, start}:
                valid = ds[name].transpose(*[d for d in (start, frames) if d in ds[name].dims]).values
                return _checked_times(np.broadcast_to(valid, shape), f"The prediction {self.name!r}")
        first = next((n for n in STARTS if n in ds.variables and ds[n].dims in ((start,), ())), None)
        if self.lead is None or first is None:
            raise SpecError(
                f"The prediction {self.name!r} has no coordinate {TIME!r} (valid time) and no time of its starts, so "
                f"it cannot be aligned with the truth. Assign one along {frames!r}: the times that the frames are "
                "predictions of."
            )
        starts = _checked_times(np.broadcast_to(ds[first].values, shape[:1]), f"The prediction {self.name!r}")
        if (starts.dtype.kind in "MO") != (self.lead.dtype.kind == "m"):
            raise SpecError(
                f"The prediction {self.name!r} starts at {first!r} of type {starts.dtype}, but its leads are of type "
                f"{self.lead.dtype}: their sum is no time."
            )
        lead = self.lead.astype("timedelta64[us]").astype(object) if starts.dtype.kind == "O" else self.lead
        return starts[:, None] + lead

    def deviations(self, spec: Spec) -> xr.Dataset | None:
        """Standard deviations under the names of the fields; None of an ensemble, and unless every channel has one."""
        names = {f"{name}{STD}": name for name in self.fields.data_vars if f"{name}{STD}" in self.fields.data_vars}
        found = self.fields[list(names)].rename(names)
        alone = self.members == 1 and all(base_of(found, name) is not None for name in spec.names)
        return found if alone else None

    def check_same_times(self, other: "Forecast") -> None:
        """Raises SpecError when two predictions are not made for the same times."""
        if self.valid.shape != other.valid.shape or not (self.valid == other.valid).all():
            raise SpecError(
                f"The predictions {self.name!r} and {other.name!r} have different valid times or trajectories: "
                f"{self.valid.shape} from {self.valid.flat[0]} and {other.valid.shape} from {other.valid.flat[0]}. "
                "Score models on the same starts and leads, or one at a time."
            )
        if self.labels is not None and other.labels is not None and not np.array_equal(self.labels, other.labels):
            raise SpecError(
                f"The predictions {self.name!r} and {other.name!r} hold other trajectories, or the same trajectories "
                f"in different order: {self.labels[:8].tolist()} and {other.labels[:8].tolist()}. Select the same ones "
                "of both."
            )

    def check_inputs(self, inputs) -> None:
        """Raises SpecError when a frame that went in is among those to be scored, or when that cannot be known."""
        if inputs is None and not self.has_lead:
            raise SpecError(
                f"The prediction {self.name!r} has times but no coordinate {LEAD!r}, so it does not say where the "
                f"inputs end. Give it a coordinate {LEAD!r} (time since the last input), or pass `inputs=`: the "
                "frames, or times, that went in."
            )
        if inputs is None:
            return
        times = np.asarray(inputs[TIME].values if isinstance(inputs, xr.Dataset) else inputs)
        if times.ndim == 0 or (times.ndim == 1 and self.trajectories > 1 and len(times) == self.trajectories):
            last = np.broadcast_to(times, (self.trajectories,))
        else:
            last = np.broadcast_to(times.max(-1), (self.trajectories,))
        for trajectory, end in enumerate(last):
            if (seen := self.valid[trajectory][self.valid[trajectory] <= end]).size:
                raise SpecError(
                    f"The prediction {self.name!r} holds frames valid at {seen[0]}..{seen[-1]}, but its inputs reach "
                    f"to {end} (trajectory {trajectory}): input and target times overlap. Score only frames after the "
                    "inputs."
                )

    def steps(self, spec: Spec, kept: np.ndarray) -> np.ndarray:
        """The leads at positions `kept` in frames of the truth, from 1."""
        if self.lead is None:
            return kept + 1
        lead = self.lead[kept]
        steps = (lead / np.timedelta64(1, "s") if lead.dtype.kind == "m" else lead.astype(float)) / spec.time_step
        if np.abs(steps - steps.round()).max() > 0.01:
            raise SpecError(
                f"The leads of the prediction {self.name!r} are {lead[:3]}..., which are not multiples of the time "
                f"step of the truth, {spec.time_step:g} {spec.time_unit}."
            )
        return steps.round().astype(int)


def trajectory_labels(ds: xr.Dataset, dim: str | None, count: int) -> np.ndarray | None:
    """Which trajectory each of the `count` starts along `dim` is of; None where no coordinate says it."""
    for name in (dim, TRAJECTORY):
        if name in ax.TRAJECTORY and name in ds.variables and ds[name].dims in ((), (dim,)):
            return np.broadcast_to(ds[name].values, (count,))
    return None


def _lead_dim(ds: xr.Dataset) -> str | None:
    return next((dim for dim in LEADS if dim in ds.dims), None)


def first_leads(name: str, ds: xr.Dataset, leads: int) -> xr.Dataset:
    """The first `leads` frames of a forecast. Raises ConfigError where it does not hold as many."""
    dim = _lead_dim(ds) or TIME
    count = ds.sizes.get(dim, max(leads, 1))
    if not 1 <= leads <= count:
        raise ConfigError(f"leads is {leads}, but the prediction {name!r} holds {count} frames: give 1 to {count}.")
    return ds.isel({dim: slice(leads)}, missing_dims="ignore")


def _checked_times(times: np.ndarray, source: str) -> np.ndarray:
    wrong = np.isnat(times) if times.dtype.kind in "mM" else times != times  # noqa: PLR0124 (NaN differs from itself)
    if np.any(wrong):
        raise DataError(f"{source}: {int(np.sum(wrong))} of its times are missing (NaT). Drop those starts.")
    return times


class Times:
    """The times of the truth, and where given ones lie among them."""

    def __init__(self, truth: xr.Dataset, spec: Spec):
        clock = ck.clock(truth, time_of(truth, base_of(truth, spec.names[0])))
        self.labels, self.values, self.step = clock.labels, clock.values, spec.time_step

    def find(self, times: np.ndarray, what: str) -> np.ndarray:
        """Positions of `times` in the truth, -1 where it lacks them. Raises SpecError for another kind of time."""
        labels = self.labels
        kinds = [array.dtype.kind if array.dtype.kind in "MO" else "f" for array in (times, labels)]
        if kinds[0] != kinds[1]:
            raise SpecError(
                f"The times of {what} are of type {times.dtype}, those of the truth {labels.dtype}: both need one "
                "calendar."
            )
        position = np.clip(np.searchsorted(labels, times), 0, len(labels) - 1)
        if times.dtype.kind in "iuf":
            before = np.clip(position - 1, 0, len(labels) - 1)
            position = np.where(np.abs(labels[before] - times) < np.abs(labels[position] - times), before, position)
            wrong = np.abs(labels[position] - times) > 0.01 * self.step
        else:
            wrong = labels[position] != times
        return np.where(wrong, -1, position)

    def before(self, position: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Positions of the frames `steps` before those at `position`, -1 where the truth lacks them.

        Months differ in length and data have gaps, so neither labels are subtracted nor frames counted.
        """
        times, slack = self.values[position] - steps * self.step, MONTHS * self.step
        found = np.minimum(np.searchsorted(self.values, times - slack), len(self.values) - 1)
        return np.where(np.abs(self.values[found] - times) > slack, -1, found)

    def missing(self, times: np.ndarray, position: np.ndarray, what: str) -> DataError:
        """The error for `times` that `find` did not find."""
        wrong = position < 0
        return DataError(
            f"The truth has no frame at {times[wrong][0]} ({wrong.sum()} of {wrong.size} frames of {what}); it covers "
            f"{self.labels[0]}..{self.labels[-1]}. Shorten the forecast with .isel({LEAD}=...), or open more data."
        )


def choose_channels(predictions: dict[str, xr.Dataset], truth: xr.Dataset) -> tuple[Spec, list[str]]:
    """What can be scored: the spec of the truth, with levels as channels, and the names of fields left out.

    Raises SpecError when a prediction lacks a field of the first, or has it on other levels, or in another unit;
    DataError when the truth has none of them.
    """
    if not predictions:
        raise ConfigError("There is no prediction to evaluate: pass a dataset, or a dict name -> dataset.")
    first = next(iter(predictions.values()))
    moving = {*LEADS, TIME}
    names = [str(n) for n, v in first.data_vars.items()
             if moving & set(v.dims) and not str(n).startswith(LEDGER) and v.dtype.kind in "iufb"]  # fmt: skip
    if not names:
        dims = {str(n): v.dims for n, v in first.data_vars.items()}
        raise SpecError(f"The prediction holds no field with a dimension {LEAD!r} or {TIME!r}: it has {dims}.")
    names = [name for name in names if not (name.endswith(STD) and name.removesuffix(STD) in names)]
    bases = {name: base_of(truth, name) for name in names}
    found = list(dict.fromkeys(base for base in bases.values() if base in truth.data_vars))
    if not found:
        raise DataError(
            f"The truth has none of the predicted variables {names}." + suggest(names[0], map(str, truth.data_vars))
        )
    split = any(base != name for name, base in bases.items() if base)  # z_500 is a field of its own in the forecast
    spec = spec_of(truth, found, flatten=_levels(truth, found, first, split))
    kept = tuple(channel for channel in spec.channels if base_of(first, channel.name) is not None)
    if not kept:
        raise DataError(f"The truth has {list(spec.names)}, but the prediction holds none of these levels.")
    spec = dataclasses.replace(spec, channels=kept)
    for label, ds in predictions.items():
        if missing := [n for n in spec.names if base_of(ds, n) is None]:
            raise SpecError(
                f"The prediction {label!r} lacks {missing[0]!r}." + suggest(missing[0], map(str, ds.data_vars))
            )
        check_units(ds, spec)
    return spec, _left_out(first, names, spec)


def check_units(ds: xr.Dataset, spec: Spec) -> None:
    """Raises SpecError where a unit of the dataset differs from the spec's."""
    for channel in spec.channels:
        unit = unit_of(ds, channel.name)
        if unit and channel.unit and unit != channel.unit:
            raise SpecError(
                f"{source_of(ds)}: {channel.name!r} is in {unit!r}, but {channel.unit!r} was expected. Convert it to "
                f"{channel.unit!r} and set its `units` attribute."
            )


def _levels(truth: xr.Dataset, names: Sequence[str], prediction: xr.Dataset, split: bool) -> tuple[str, ...]:
    """Dimensions of levels that become channels: pressures always, heights where only some variables have them."""
    levels = any(ax.role(prediction, dim) == "level" for dim in prediction.dims)
    flat = []
    for dim in dict.fromkeys(dim for name in names for dim in truth[name].dims):
        mixed = split or not all(dim in truth[name].dims for name in names)
        if ax.role(truth, dim) == "level" and (mixed or (levels and dim not in GEOMETRIC)):
            flat.append(dim)
    return tuple(flat)


def _left_out(prediction: xr.Dataset, names: Sequence[str], spec: Spec) -> list[str]:
    """Predicted fields, or levels of them, that the truth does not have."""
    result = []
    for name in names:
        levels = [dim for dim in prediction[name].dims if ax.role(prediction, dim) == "level"]
        parts = [f"{name}_{label}" for label in entry_labels(prediction, levels[0])] if levels else [name]
        result += [] if name in spec.names else [part for part in parts if part not in spec.names]
    return result
