"""Where a forecast starts: labelled data become a window, valid times and a source of forcing, all checked first."""

import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data.channels import base_of, missing_variable, time_of
from physml.data.labelled import to_window, with_mask_of
from physml.data.mixture import spread_channels
from physml.data.reader import Reader, lengths_of, without_lengths
from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Channel, Spec, Window
from physml.rollout import reads_calendar

SMALL, BLOCK, SAMPLES = 2**26, 2**22, 16  # bytes of forcing that are read at once to know it again; or else steps of it
MEMBER = "member"  # dimension of the members of an ensemble
LEADS = ("lead", "lead_time")  # durations, not instants
SAME_TIME = 0.01  # steps that two times may differ by


@dataclass(frozen=True)
class Start:
    """What a rollout needs, and what its result is labelled with.

    Attributes:
        window: the history, batched over trajectories (over members, then them); times and calendar reach to the last
            lead.
        like: the dataset of these frames (of one member), whose labels the forecast takes over.
        leads: lead times of all steps. valid: the instants they are valid at. valid_attrs: what these are.
        forcing: the prescribed fields, the same for all members; None when there are none.
        batch: trajectories. names: what messages call them.
        members: labels of the members that the initial state has; None when it has none.
        held: positions of the channels that exist: all, or with `masked=True` those that the initial state has.
    """

    window: Window
    like: xr.Dataset
    leads: np.ndarray
    valid: np.ndarray
    valid_attrs: dict[str, str]
    forcing: "Forcing | None"
    batch: int
    names: tuple[str, ...]
    members: np.ndarray | None
    held: tuple[int, ...]

    @property
    def own(self) -> Spec:
        """That of the channels that exist."""
        return _of_channels(self.window.spec, self.held)


@dataclass(frozen=True)
class Forcing:
    """Prescribed fields `(batch, last - first, *space, forcing)` of the steps `first:last`, as `rollout_chunks` asks.

    Attributes:
        reader: of their dataset. index: its frame for every step. batch: trajectories that they are for.
    """

    reader: Reader
    index: np.ndarray
    batch: int

    def __call__(self, first: int, last: int) -> np.ndarray:
        values = self._read(first, last)
        return np.broadcast_to(values, (self.batch, *values.shape[1:]))

    def _read(self, first: int, last: int) -> np.ndarray:
        wanted, place = np.unique(self.index[first:last], return_inverse=True)
        everyone, strides = range(self.reader.trajectories), set(np.diff(wanted).tolist())
        if len(strides) <= 1:
            frames = range(int(wanted[0]), int(wanted[-1]) + 1, *strides)
            values = self.reader.arrays(everyone, frames)[0]
        else:
            parts = [self.reader.arrays(everyone, range(i, i + 1))[0] for i in wanted.tolist()]
            values = np.concatenate(parts, axis=1)
        return values if np.array_equal(place, np.arange(len(wanted))) else values[:, place]

    def digest(self) -> str:
        """Tells other fields: a checksum of all steps where they are small, else of `SAMPLES` steps and of how many
        frames and bytes there are to read from.
        """
        steps, source, found = len(self.index), self.reader.source, hashlib.sha256()
        one = max(self._read(0, 1).nbytes, 1)
        block = max(1, BLOCK // one)
        pieces = [(first, min(first + block, steps)) for first in range(0, steps, block)]
        if steps * one > SMALL:
            size = os.path.getsize(source) if os.path.isfile(source) else 0
            found.update(f"{self.reader.frames} {size}".encode())
            pieces = [(i, i + 1) for i in np.unique(np.linspace(0, steps - 1, SAMPLES).round().astype(int)).tolist()]
        for first, last in pieces:
            found.update(np.ascontiguousarray(self._read(first, last)))
        return found.hexdigest()[:16]


def start_of(stepper, initial: xr.Dataset, steps: int, forcing: xr.Dataset | None, masked: bool | None) -> Start:
    """From the last `history` frames of `initial`. Raises SpecError and DataError for what does not fit the stepper."""
    if not isinstance(initial, xr.Dataset):
        raise ConfigError(
            f"initial is a {type(initial).__name__}, but an xarray.Dataset with {list(stepper.spec.names)} was "
            "expected. Open one with physml.open_dataset, or use array.to_dataset(name=...)."
        )
    spec, held = stepper.spec, _held(initial, stepper, masked)
    own = _of_channels(spec, held)
    whole, count = _history(initial, own, stepper.history), members_of(initial, stepper)
    like = whole.isel({MEMBER: 0}, drop=True) if count else whole
    fields = _members_as_trajectories(whole, own) if count else whole
    read = replace(own, mask=None) if masked is False else with_mask_of(fields, own)
    window = _window(fields, read, stepper.history)
    if window.mask is not None and read.mask is None:
        _check_missing(window, _allows_missing(stepper, masked))
    if window.mask is None and read.mask != spec.mask and masked is None:
        raise DataError(
            f"The model was trained on data whose variable {spec.mask!r} is 0 where fields do not exist, but initial "
            f"has neither {spec.mask!r} nor NaN there. Give one of them, or pass masked=False "
            "(--masked no) where all cells exist."
        )
    window = _with_channels(window, spec, held)
    times = ck.clock(like, time_of(like, base_of(like, own.names[0])))
    _check_clock(times, spec, stepper)
    valid = ck.after(times, steps, spec.time_step)
    window = _with_clock(window, times, valid, stepper.history)
    batch = window.frames.shape[0] // (count or 1)
    source = whole if forcing is None else forcing
    prescribed = _forcing(source, spec, times, valid, batch, None if forcing is None else like)
    leads = ck.lead_labels(times, steps, spec.time_step)
    members = np.asarray(whole[MEMBER].values) if count else None
    return Start(
        window, like, leads, valid, ck.valid_attrs(times), prescribed, batch, _names(like, batch), members, held
    )


def _held(initial: xr.Dataset, stepper, masked: bool | None) -> tuple[int, ...]:
    """The channels that `initial` has. Raises DataError where it lacks one, unless `masked` allows that."""
    names = stepper.spec.names
    there = [base_of(initial, name) is not None for name in names]
    if all(there) or not stepper.history:
        return tuple(range(len(names)))
    if masked and any(there):
        return tuple(i for i, has in enumerate(there) if has)
    absent = there.index(False)
    error = missing_variable(initial, names[absent])
    if any(there) and np.broadcast_to(_allows_missing(stepper, masked), len(names))[absent]:
        raise DataError(
            f"{error} Where that field does not exist, as in parts of a mixture of datasets, pass masked=True "
            "(--masked yes)."
        )
    raise error


def _of_channels(spec: Spec, held: tuple[int, ...]) -> Spec:
    return replace(spec, channels=tuple(spec.channels[i] for i in held))


def _with_channels(window: Window, spec: Spec, held: tuple[int, ...]) -> Window:
    """A window of the `held` channels with all those of `spec`: the others are 0, and masked."""
    if len(held) == len(spec.channels):
        return replace(window, spec=spec)
    mask = np.ones_like(window.frames[:, 0]) if window.mask is None else window.mask
    frames, mask = (spread_channels(array, list(held), len(spec.channels)) for array in (window.frames, mask))
    return replace(window, frames=frames, mask=mask, spec=spec)


def members_of(initial: xr.Dataset, stepper) -> int | None:
    """How many members the fields of `initial` have along a dimension of that name; None when they have none."""
    if not isinstance(initial, xr.Dataset) or MEMBER not in initial.dims or not hasattr(stepper, "spec"):
        return None
    bases = {base_of(initial, name) for name in stepper.spec.names} - {None}
    return initial.sizes[MEMBER] if any(MEMBER in initial.variables[base].dims for base in bases) else None


def _members_as_trajectories(ds: xr.Dataset, spec: Spec) -> xr.Dataset:
    """One trajectory for each of each member, member by member."""
    names = [channel.name for channel in (*spec.channels, *spec.static, *spec.parameters)]
    bases = {base_of(ds, name) for name in names} - {None}
    dims = {dim for base in bases for dim in ds.variables[base].dims if ax.role(ds, dim) == "trajectory"}
    both = [MEMBER, *sorted(dims - {MEMBER})]
    bare = ds.drop_vars({*both, "trajectory"}, errors="ignore")
    return bare.stack({"trajectory of a member": both}, create_index=False).rename(
        {"trajectory of a member": "trajectory"}
    )


def _history(initial: xr.Dataset, spec: Spec, history: int) -> xr.Dataset:
    """The last frames of `initial`, with a time dimension."""
    if history == 0:
        return without_lengths(initial)
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
        return _as_one_frame(without_lengths(initial), set(names.values()))
    count = _real_frames(initial, dim)
    if count < history:
        raise SpecError(
            f"The stepper needs {history} frames of history, but initial holds {count} along {dim!r}. "
            f"Give the last {history}: data.isel({dim}=slice(-{history}, None))."
        )
    return without_lengths(initial).isel({dim: slice(count - history, count)})


def _real_frames(initial: xr.Dataset, dim: str) -> int:
    """How many frames are no padding. Raises SpecError for trajectories that end at different times."""
    lengths = lengths_of(initial)
    if lengths is None:
        return initial.sizes[dim]
    found = np.minimum(lengths, initial.sizes[dim])
    if len(found) and found.min() < found.max():
        raise SpecError(
            f"The trajectories of initial end after {found.min()} to {found.max()} frames, so they have no last frame "
            f"in common. Say where to start, at most {found.min()} frames in: "
            f"initial.isel({dim}=slice({found.min()})) (--at '#{found.min() - 1}'), or give one trajectory."
        )
    return int(found.min())


def _as_one_frame(initial: xr.Dataset, variables: set[str]) -> xr.Dataset:
    scalars = [name for name, c in initial.coords.items() if c.ndim == 0 and ax.NAMES.get(str(name).lower()) == "time"]
    instants = [name for name in scalars if str(name).lower() not in LEADS]
    if not instants:
        return initial
    time = initial[next((name for name in ("valid_time", "time") if name in instants), instants[0])]
    frame = initial.drop_vars(scalars)
    frame = frame.assign({name: frame[name].expand_dims("time") for name in variables})
    return frame.assign_coords(time=("time", time.values.reshape(1), time.attrs))


def _window(like: xr.Dataset, spec: Spec, history: int) -> Window:
    """The history, without forcing, which is read step by step. Without history: static fields and parameters alone."""
    read = replace(spec, forcing=())
    if not history:
        shown = () if spec.mask is None else (Channel(spec.mask),)
        read = replace(read, channels=(), static=(*spec.static, *shown), mask=None)
    window = to_window(like, read)
    batch = window.frames.shape[0]
    if not history:
        frames = np.zeros((batch, 1, *spec.grid.shape, len(spec.channels)), np.float32)
        static, shown = np.split(window.static, [len(spec.static)], axis=-1)
        mask = None if spec.mask is None else (shown != 0) * np.ones(len(spec.channels), np.float32)
        window = replace(window, frames=frames, static=static, mask=mask)
    return replace(window, forcing=np.zeros((batch, 1, *spec.grid.shape, len(spec.forcing)), np.float32), spec=spec)


def _allows_missing(stepper, masked: bool | None) -> np.ndarray:
    """For each channel, or for all."""
    normalizer = getattr(stepper, "normalizer", None)
    # Floors keep no normalizer; they treat masked cells as data do.
    allowed = masked if masked is not None else normalizer is None or normalizer.masked[...]
    return np.asarray(allowed, bool)


def _check_missing(window: Window, allowed: np.ndarray) -> None:
    """Raises DataError for a cell without a value in a channel that must have one."""
    wrong = (np.asarray(window.mask) == 0) & ~allowed
    if not wrong.any():
        return
    sample, *place, channel = (int(i) for i in np.argwhere(wrong)[0])
    spec = window.spec
    at = ", ".join(f"{axis.name}={axis.centers[i]:g}" for axis, i in zip(spec.grid.axes, place, strict=True))
    count = int(wrong[sample, ..., channel].sum())
    raise DataError(
        f"The initial state has NaN: variable {spec.names[channel]!r}, trajectory {sample}, {count} cells, first at "
        f"index {tuple(place)} ({at}), but the model was trained on data without gaps there. Fill them, or pass "
        "masked=True (--masked yes) when the field does not exist there."
    )


def _check_clock(times: ck.Clock, spec: Spec, stepper) -> None:
    if times.calendar is None and reads_calendar(stepper):
        raise SpecError(
            "The stepper asks for the time of the year or of the day, but initial has no calendar time. "
            "Give it a time coordinate of dates: initial.assign_coords(time=...)."
        )
    if times.unit and times.unit != spec.time_unit:
        raise SpecError(
            f"Time of initial is in {times.unit!r}, but the model's is {spec.time_unit or 'nondimensional'!r}. "
            "Use data with the same kind of time coordinate as in training."
        )


def _with_clock(window: Window, times: ck.Clock, valid: np.ndarray, history: int) -> Window:
    batch, total = window.frames.shape[0], history + len(valid)
    since = (np.arange(total) * window.spec.time_step).astype(np.float32)
    calendar = np.zeros((total, 2), np.float32)
    if times.calendar is not None:
        past = times.calendar[len(times) - history :]
        calendar = np.concatenate([past, ck.of_labels(valid).calendar])

    def spread(array):
        return np.broadcast_to(array, (batch, *array.shape))

    return replace(window, times=spread(since), calendar=spread(calendar))


def _names(like: xr.Dataset, batch: int) -> tuple[str, ...]:
    for dim in like.dims:
        if ax.role(like, dim) == "trajectory" and dim in like.variables and like.sizes[dim] == batch:
            return tuple(str(value) for value in like.variables[dim].values)
    return ()


def _forcing(source: xr.Dataset, spec: Spec, times: ck.Clock, valid, batch: int, like) -> Forcing | None:
    """The prescribed fields, after checking that they cover every valid time; those of the trajectories of `like`,
    which is None when the fields come from there.
    """
    if not spec.forcing:
        return None
    names = [channel.name for channel in spec.forcing]
    if like is None and (
        any(base_of(source, n) is None for n in names) or time_of(source, base_of(source, names[0])) is not None
    ):
        raise DataError(
            f"The model needs the forcing {names} at every valid time, {valid[0]} to {valid[-1]}, and initial ends "
            "before them. Pass forcing=dataset (--forcing FILE) that holds it over that range."
        )
    for base in {base_of(source, name) for name in names} - {None}:
        if MEMBER in source.variables[base].dims:
            raise SpecError(
                f"The forcing {base!r} has a dimension {MEMBER!r}, but members share their forcing. Give that of one, "
                f"forcing.isel({MEMBER}=0), or make members trajectories: "
                f"forcing.rename({MEMBER}='trajectory'), and initial too."
            )
    fields = replace(spec, channels=spec.forcing, forcing=(), static=(), parameters=(), mask=None)
    reader = Reader(source, fields)
    reader.check_units()
    order = None if like is None else _by_label(source, reader.trajectory_dim, like, batch)
    if order is not None and not np.array_equal(order, np.arange(reader.trajectories)):
        reader = Reader(source.isel({reader.trajectory_dim: ax.as_slice(order)}), fields)
    if reader.trajectories not in (1, batch):
        raise SpecError(
            f"The forcing has {reader.trajectories} trajectories, but initial has {batch}. Give one, or one for each."
        )
    if reader.time_dim is None:
        return Forcing(reader, np.zeros(len(valid), int), batch)
    return Forcing(reader, _positions(reader, times, valid, spec.time_step), batch)


def _by_label(source: xr.Dataset, dim: str | None, like: xr.Dataset, batch: int) -> np.ndarray | None:
    """Where the `batch` trajectories of `like` lie in the forcing; None unless the labels of both tell.

    Raises SpecError for those that are not there.
    """
    if dim is None or any(dim not in ds.variables for ds in (source, like)):
        return None
    known, wanted = (pd.Index(ds.variables[dim].values.ravel()) for ds in (source, like))
    if not known.is_unique or not wanted.is_unique or len(wanted) != batch:
        return None
    found = known.get_indexer(wanted)
    if (found < 0).any():
        raise SpecError(
            f"The forcing has no {dim} {', '.join(map(str, wanted[found < 0][:10]))}, which initial has: it has "
            f"{', '.join(map(str, known[:10]))}{', ...' if len(known) > 10 else ''}. Give forcing for all of initial, "
            f"or leave the labels out, forcing.drop_vars({dim!r}), to take it by position."
        )
    return found


def _positions(reader: Reader, times: ck.Clock, valid: np.ndarray, step: float) -> np.ndarray:
    """Frame of the forcing at every valid time. Raises SpecError for another kind of time, DataError naming the first
    one that is not there.
    """
    known = reader.times
    kinds = ck.kind_of(times.labels), ck.kind_of(known.labels)
    if kinds[0] != kinds[1]:
        raise SpecError(
            f"The times of initial are {kinds[0]} (the first one {times.labels[0]}), but those of the forcing, "
            f"{reader.source}, are {kinds[1]} (the first one {known.labels[0]}). Give both the same kind of time "
            "coordinate."
        )
    ratio = times.scale / known.scale if times.unit and known.unit else 1.0  # numbers without unit are taken as alike
    asked = valid if ratio == 1 else valid * ratio
    wanted = ck.elapsed(known, asked)
    found = ck.nearest(known.values, wanted)
    there = np.abs(known.values[found] - wanted) <= SAME_TIME * step / times.scale * ratio * known.scale
    there &= found < min(reader.lengths)  # what follows is padding
    if there.all():
        return found
    first = int(np.argmin(there))
    last = known.labels[min(reader.lengths) - 1]
    raise DataError(
        f"{reader.source}: forcing covers {known.labels[0]} to {last} ({min(reader.lengths)} frames), but the forecast "
        f"needs {asked[0]} to {asked[-1]}; {asked[first]} is missing. "
        f"Give forcing over that range, or take at most {first} steps."
    )
