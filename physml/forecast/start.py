"""Where a forecast starts: labelled data become a window, valid times and a source of forcing, all checked first."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data.channels import base_of, missing_variable, time_of
from physml.data.labelled import to_window
from physml.data.reader import Reader
from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Spec, Window


@dataclass(frozen=True)
class Start:
    """What a rollout needs, and what its result is labelled with.

    Attributes:
        window: the history, batched over trajectories; times and calendar reach to the last lead.
        like: the dataset of these frames, whose labels the forecast takes over.
        leads: lead times of all steps. valid: the instants they are valid at.
        forcing: reads the prescribed fields of some steps, see `rollout_chunks`; None when there are none.
        names: what messages call the trajectories.
    """

    window: Window
    like: xr.Dataset
    leads: np.ndarray
    valid: np.ndarray
    forcing: Callable[[int, int], np.ndarray] | None
    names: tuple[str, ...]


def start_of(stepper, initial: xr.Dataset, steps: int, forcing: xr.Dataset | None, masked: bool | None) -> Start:
    """From the last `history` frames of `initial`. Raises SpecError and DataError for what does not fit the stepper."""
    if not isinstance(initial, xr.Dataset):
        raise ConfigError(
            f"initial is a {type(initial).__name__}, but an xarray.Dataset with {list(stepper.spec.names)} was "
            "expected. Open one with physml.open_dataset, or use array.to_dataset(name=...)."
        )
    spec = stepper.spec
    like = _history(initial, spec, stepper.history)
    window = _window(like, spec, stepper.history)
    if window.mask is not None and not _allows_missing(stepper, masked):
        raise _missing_values(window)
    times = ck.clock(like, time_of(like, base_of(like, spec.names[0])))
    _check_clock(times, spec, stepper)
    valid = ck.after(times, steps, spec.time_step)
    window = _with_clock(window, times, valid, max(stepper.history, 1))
    read = _forcing(forcing if forcing is not None else like, spec, valid, window.frames.shape[0], forcing is None)
    leads = ck.lead_labels(times, steps, spec.time_step)
    return Start(window, like, leads, valid, read, _names(like, window.frames.shape[0]))


def _history(initial: xr.Dataset, spec: Spec, history: int) -> xr.Dataset:
    """The last frames of `initial`, with a time dimension."""
    if history == 0:
        return initial
    names = {name: base_of(initial, name) for name in spec.names}
    for name, base in names.items():
        if base is None:
            raise missing_variable(initial, name)
    dim = time_of(initial, names[spec.names[0]])
    if dim is None:  # one instant: its time is a scalar coordinate, or unknown
        if history > 1:
            raise SpecError(
                f"The stepper needs {history} frames of history, but initial holds a single one. "
                f"Give the last {history}: data.isel(time=slice(-{history}, None))."
            )
        return _as_one_frame(initial, set(names.values()))
    count = initial.sizes[dim]
    if count < history:
        raise SpecError(
            f"The stepper needs {history} frames of history, but initial holds {count} along {dim!r}. "
            f"Give the last {history}: data.isel({dim}=slice(-{history}, None))."
        )
    return initial.isel({dim: slice(count - history, None)})


def _as_one_frame(initial: xr.Dataset, variables: set[str]) -> xr.Dataset:
    scalars = [name for name, c in initial.coords.items() if c.ndim == 0 and ax.NAMES.get(str(name).lower()) == "time"]
    if not scalars:
        return initial
    time = initial[scalars[0]]
    frame = initial.drop_vars(scalars)
    frame = frame.assign({name: frame[name].expand_dims("time") for name in variables})
    return frame.assign_coords(time=("time", time.values.reshape(1), time.attrs))


def _window(like: xr.Dataset, spec: Spec, history: int) -> Window:
    """The history, without forcing, which is read step by step. Without history: static fields and parameters alone."""
    read = replace(spec, forcing=()) if history else replace(spec, forcing=(), channels=())
    window = to_window(like, read)
    batch = window.frames.shape[0]
    if not history:
        frames = np.zeros((batch, 1, *spec.grid.shape, len(spec.channels)), np.float32)
        window = replace(window, frames=frames, mask=None)
    return replace(window, forcing=np.zeros((batch, 1, *spec.grid.shape, len(spec.forcing)), np.float32), spec=spec)


def _allows_missing(stepper, masked: bool | None) -> bool:
    if masked is not None:
        return masked
    normalizer = getattr(stepper, "normalizer", None)
    # Floors keep no normalizer; they treat masked cells as data do.
    return normalizer is None or bool(normalizer.masked[...])


def _missing_values(window: Window) -> DataError:
    sample, *place, channel = (int(i) for i in np.argwhere(np.asarray(window.mask) == 0)[0])
    spec = window.spec
    at = ", ".join(f"{axis.name}={axis.centers[i]:g}" for axis, i in zip(spec.grid.axes, place, strict=True))
    count = int((np.asarray(window.mask)[sample, ..., channel] == 0).sum())
    return DataError(
        f"The initial state has NaN: variable {spec.names[channel]!r}, trajectory {sample}, {count} cells, first at "
        f"index {tuple(place)} ({at}), but the model was trained on data without gaps. Fill them, or pass masked=True "
        "when the field does not exist there."
    )


def _check_clock(times: ck.Clock, spec: Spec, stepper) -> None:
    if times.calendar is None and _needs_calendar(stepper):
        raise SpecError(
            "The stepper asks for the time of the year or of the day, but initial has no calendar time. "
            "Give it a time coordinate of dates: initial.assign_coords(time=...)."
        )
    if times.unit and times.unit != spec.time_unit:
        raise SpecError(
            f"Time of initial is in {times.unit!r}, but the model's is {spec.time_unit or 'nondimensional'!r}. "
            "Use data with the same kind of time coordinate as in training."
        )


def _needs_calendar(stepper) -> bool:
    config = getattr(stepper, "config", None)
    climatology = getattr(config, "climatology", config)  # of a linear inverse model, or the stepper's own
    slots = (getattr(climatology, "days", None) or 1) * (getattr(climatology, "hours", None) or 1)
    return bool(getattr(config, "calendar", False)) or slots > 1


def _with_clock(window: Window, times: ck.Clock, valid: np.ndarray, history: int) -> Window:
    batch, total = window.frames.shape[0], history + len(valid)
    since = (np.arange(total) * window.spec.time_step).astype(np.float32)
    calendar = np.zeros((total, 2), np.float32)
    if times.calendar is not None:
        calendar = np.concatenate([times.calendar[-history:], ck.of_labels(valid).calendar])

    def spread(array):
        return np.broadcast_to(array, (batch, *array.shape))

    return replace(window, times=spread(since), calendar=spread(calendar))


def _names(like: xr.Dataset, batch: int) -> tuple[str, ...]:
    for dim in like.dims:
        if ax.role(like, dim) == "trajectory" and dim in like.variables and like.sizes[dim] == batch:
            return tuple(str(value) for value in like.variables[dim].values)
    return ()


def _forcing(source: xr.Dataset, spec: Spec, valid: np.ndarray, batch: int, from_initial: bool):
    """A reader of forcing, after checking that it covers every valid time."""
    if not spec.forcing:
        return None
    names = [channel.name for channel in spec.forcing]
    if from_initial and (
        any(base_of(source, n) is None for n in names) or time_of(source, base_of(source, names[0])) is not None
    ):
        raise DataError(
            f"The model needs the forcing {names} at every valid time, {valid[0]} to {valid[-1]}, and initial ends "
            "before them. Pass forcing=dataset that holds it over that range."
        )
    reader = Reader(source, replace(spec, channels=spec.forcing, forcing=(), static=(), parameters=()))
    reader.check_units()
    if reader.trajectories not in (1, batch):
        raise SpecError(
            f"The forcing has {reader.trajectories} trajectories, but initial has {batch}. Give one, or one for each."
        )
    index = np.zeros(len(valid), int) if reader.time_dim is None else _positions(reader, valid, spec.time_step)

    def read(first: int, last: int) -> np.ndarray:
        wanted = index[first:last]
        frames = [reader.arrays(range(reader.trajectories), range(i, i + 1))[0] for i in wanted]
        if len(wanted) > 1 and (np.diff(wanted) == 1).all():
            frames = [reader.arrays(range(reader.trajectories), range(wanted[0], wanted[-1] + 1))[0]]
        values = np.concatenate(frames, axis=1)
        return np.broadcast_to(values, (batch, *values.shape[1:]))

    return read


def _positions(reader: Reader, valid: np.ndarray, step: float) -> np.ndarray:
    """Frame of the forcing at every valid time. Raises DataError naming the first that is not there."""
    labels = reader.times.labels
    if labels.dtype.kind == "f" or valid.dtype.kind == "f":
        found = np.clip(np.searchsorted(labels, valid - 0.5 * step), 0, len(labels) - 1)
        there = np.abs(labels[found] - valid) <= 1e-3 * step
    else:
        known = {_instant(label): i for i, label in enumerate(labels)}
        found = np.array([known.get(_instant(label), -1) for label in valid])
        there = found >= 0
    if there.all():
        return found
    raise DataError(
        f"{reader.source}: forcing covers {labels[0]} to {labels[-1]} ({len(labels)} frames), but the forecast needs "
        f"{valid[0]} to {valid[-1]}, every {step:g}; {valid[int(np.argmin(there))]} is missing. "
        f"Give forcing over that range, or take at most {int(np.argmin(there))} steps."
    )


def _instant(label):
    return label.astype("datetime64[ns]").astype(int) if isinstance(label, np.datetime64) else label
