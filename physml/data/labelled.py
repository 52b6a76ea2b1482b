"""The only door between labelled data (xarray) and windows (arrays).

In: `spec_of` derives names, units and grid; `to_window` and `Reader` cut arrays in the order of the spec, whatever the
order and direction of the dimensions in the file. Out: `from_frames` puts names, units, coordinates and attributes back
on.

A channel is a variable of the dataset, or one level of it: channel `z_850` is variable `z` at level 850.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.errors import DataError, SpecError, suggest
from physml.fields import Channel, Grid, Spec, Window


def spec_of(
    ds: xr.Dataset,
    variables: Sequence[str] | None = None,
    forcing: Sequence[str] = (),
    static: Sequence[str] = (),
    parameters: Sequence[str] = (),
    *,
    flatten: Sequence[str] = (),
    space: Sequence[str] = (),
    periodic: Sequence[str] | None = None,
    time_step: float | None = None,
) -> Spec:
    """Names, units and grid of `ds`.

    Args:
        ds: data with any order and direction of dimensions.
        variables: predicted fields; all that vary in time (or, without a time dimension, all) when None or empty.
        forcing: prescribed fields with time. static: prescribed fields without. parameters: scalars, per trajectory or
            global.
        flatten: dimensions whose entries become channels of their own, for example ("level",): z -> z_500, z_850.
        space: order of the spatial axes; level, latitude, longitude, x, y, z when empty.
        periodic: names of the periodic axes, overriding what the file says. Longitudes that go all around are periodic
            anyway.
        time_step: in the unit of time; derived from the time axis when None.

    Raises DataError for a variable that is not there, SpecError for variables on different grids.
    """
    source = source_of(ds)
    dims = {role: dim for dim in ds.dims for role in [ax.role(ds, dim)]}
    flat = {dims.get(name, name) for name in flatten}
    if unknown := flat - set(ds.dims):
        raise DataError(
            f"{source} has no dimension {sorted(unknown)[0]!r} to flatten." + suggest(min(unknown), ds.dims)
        )
    for name in (*(variables or ()), *forcing, *static, *parameters):
        if base_of(ds, name) is None:
            raise DataError(f"{source} has no variable {name!r}." + suggest(name, ds.data_vars))
    chosen = list(variables or _predicted(ds, {*forcing, *static, *parameters}, flat, source))
    grid, _ = _grid(ds, chosen, flat, space, periodic, source)
    times = ck.clock(ds, _time_dim(ds, base_of(ds, chosen[0])))
    step = float(time_step) if time_step is not None else ck.time_step(times, source)
    return Spec(
        grid,
        _channels(ds, chosen, flat),
        _channels(ds, forcing, flat),
        _channels(ds, static, flat),
        _channels(ds, parameters, set()),
        step,
        times.unit,
    )


def to_window(ds: xr.Dataset, spec: Spec, mask: str | None = None) -> Window:
    """Every frame of every trajectory as one batched window of host arrays (float32), in the order of `spec`.

    NaN that stay at one place (land) become `mask`, with 0 in the frames. `mask` names a variable that is 0 where
    fields do not exist. Raises SpecError when units or grid differ from `spec`, DataError for missing variables, NaN
    elsewhere, and for time that is not regular.
    """
    reader = Reader(ds, spec, mask)
    reader.check_units()
    runs = ck.segments(reader.times, spec.time_step)
    if len(runs) > 1:
        raise DataError(
            f"{reader.source}: the time axis jumps after {reader.times.labels[runs[0][-1]]}, so it is not one window. "
            "Select one run of regular frames, or use physml.data.XarrayDataset, which makes each run a trajectory."
        )
    windows = [reader.read(i, range(reader.frames)) for i in range(reader.trajectories)]
    return _stack(windows)


def _stack(windows: list[Window]) -> Window:
    leaves = {}
    for field in dataclasses.fields(Window):
        values = [getattr(window, field.name) for window in windows]
        leaves[field.name] = values[0] if field.name == "spec" or values[0] is None else np.stack(values)
    return Window(**leaves)


def from_frames(
    frames: np.ndarray,
    spec: Spec,
    like: xr.Dataset,
    times: np.ndarray | None = None,
    *,
    first: int = 1,
    dim: str = "lead",
) -> xr.Dataset:
    """The inverse door: `frames (batch, lead, *space, channel)` as a dataset with the labels of `like`.

    Dimensions are `trajectory`, `lead`, then the spatial dimensions under the names, order and direction of `like`.
    Coordinate `lead` is timedelta64 (or numbers for nondimensional time) since the last frame of `like`; `time` is the
    valid time. Units and attributes come from `like`. Channels `z_500`, `z_850` become `z` again when `like` has it on
    levels.

    Args:
        times: valid times `(lead,)`, or `(batch, lead)` for several starts; the frames after the last one of `like`
            when None.
        first: lead of the first frame, in steps (a forecast written in chunks sets it).
        dim: "lead", or "time" for frames that are not a forecast; `time` is then the dimension.
    """
    frames = np.asarray(frames)
    expected = (*spec.grid.shape, len(spec.channels))
    if frames.ndim != 3 + spec.grid.ndim - 0 or frames.shape[2:] != expected:
        raise SpecError(
            f"frames have shape {frames.shape}, but (batch, {dim}, {', '.join(map(str, expected))}) was expected."
        )
    like_clock = ck.clock(like, _time_dim(like, base_of(like, spec.names[0])))
    count = frames.shape[1]
    coords = _time_coordinates(like_clock, spec, times, count, first, dim)
    variables: dict[str, xr.Variable] = {}
    for name, channels in _by_variable(like, spec).items():
        variable, extra = _labelled_variable(frames, spec, like, name, channels, dim)
        variables[name] = variable
        coords.update(extra)
    coords.update(_trajectory_coordinate(like, frames.shape[0]))
    result = xr.Dataset(variables, coords, dict(like.attrs))
    result.encoding = {}
    return result


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """One variable and the channels it fills: `positions[i]` is the channel read at `entries[i]` of the flattened
    dimension.
    """

    variable: str
    dims: dict[str, str]  # role -> dimension
    flat: str | None
    entries: tuple[int, ...]
    positions: tuple[int, ...]


class Reader:
    """Reads windows of one dataset in the order of a spec. Stateless apart from remembered masks; safe in threads."""

    def __init__(self, ds: xr.Dataset, spec: Spec, mask: str | None = None):
        self.ds, self.spec, self.source = ds, spec, source_of(ds)
        self.fields = {
            group: _resolve(ds, getattr(spec, group), spec, self.source) for group in ("channels", "forcing", "static")
        }
        every = [field for group in self.fields.values() for field in group]
        self.index = {field.variable: self._space_index(field) for field in every}
        self.trajectory_dim = next((f.dims["trajectory"] for f in every if "trajectory" in f.dims), None)
        self.time_dim = next((f.dims["time"] for f in every if "time" in f.dims), None)
        self.trajectories = ds.sizes[self.trajectory_dim] if self.trajectory_dim else 1
        self.times = ck.clock(ds, self.time_dim)
        self.frames = len(self.times)
        self.parameters = self._parameters()
        self.mask_name = mask
        self._static: dict[int, np.ndarray] = {}
        self._missing: dict[int, np.ndarray] = {}
        self.masked = mask is not None or bool(self.missing(0).any())

    def check_units(self) -> None:
        """Raises SpecError where a unit of the dataset differs from the spec's."""
        for group in ("channels", "forcing", "static", "parameters"):
            for channel in getattr(self.spec, group):
                unit = _unit(self.ds, channel.name)
                if unit and channel.unit and unit != channel.unit:
                    raise SpecError(
                        f"{self.source}: {channel.name!r} is in {unit!r}, but {channel.unit!r} was expected. "
                        f"Convert it to {channel.unit!r} and set its `units` attribute."
                    )

    def read(self, trajectory: int, frames: range) -> Window:
        """The window of these frames without a batch axis, float32."""
        fields = self.raw(trajectory, frames)
        return self.window(trajectory, frames, *fields)

    def raw(self, trajectory: int, frames: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(frames, forcing, static), with missing places filled by 0 and checked."""
        values = self._read("channels", trajectory, frames)
        values = self._fill(values, trajectory, frames)
        forcing = self._read("forcing", trajectory, frames)
        if forcing.size:
            self._check_steady(forcing, frames, self.spec.forcing)
            forcing = np.where(np.isnan(forcing), np.float32(0), forcing)
        return values, forcing, self.static(trajectory)

    def window(self, trajectory: int, frames: range, values, forcing, static) -> Window:
        """A window without a batch axis, from arrays that `raw` gave."""
        index = as_index(frames)
        seconds = self.times.values[index]
        seconds = (seconds - seconds[:1]).astype(np.float32)
        calendar = self.times.calendar
        calendar = np.zeros((len(frames), 2), np.float32) if calendar is None else calendar[index]
        return Window(
            values, seconds, calendar, self.parameters[trajectory], forcing, static, self.mask(trajectory), self.spec
        )  # fmt: skip

    def static(self, trajectory: int) -> np.ndarray:
        """`(*space, static)`, NaN replaced by 0. Remembered when all trajectories share it."""
        shared = not any("trajectory" in field.dims for field in self.fields["static"])
        key = 0 if shared else trajectory
        if key not in self._static:
            values = np.nan_to_num(self._read("static", trajectory, None), nan=0.0)
            if not shared:
                return values
            self._static[key] = values
        return self._static[key]

    def missing(self, trajectory: int) -> np.ndarray:
        """Where the first frame of a trajectory is NaN, `(*space, channel)` bool."""
        shared = self.trajectory_dim is None
        key = 0 if shared else trajectory
        if key not in self._missing:
            if len(self._missing) > 256:
                self._missing.clear()
            found = np.isnan(self._read("channels", trajectory, range(1))[0])
            everywhere = found.all(axis=tuple(range(found.ndim - 1)))
            if found.size and everywhere.any():
                name = self.spec.names[int(np.argmax(everywhere))]
                raise DataError(
                    f"{self.source}: variable {name!r} is NaN everywhere in frame 0 ({self.times.labels[0]}). "
                    "Drop that frame, or check the file."
                )
            self._missing[key] = found
        return self._missing[key]

    def mask(self, trajectory: int) -> np.ndarray | None:
        """`(*space, channel)` float32, 1 where fields exist; None where all exist everywhere."""
        if not self.masked:
            return None
        mask = (~self.missing(trajectory)).astype(np.float32)
        if self.mask_name is not None:
            channel = (Channel(self.mask_name),)
            field = _resolve(self.ds, channel, self.spec, self.source)
            self.index.setdefault(self.mask_name, self._space_index(field[0]))
            values = self._gather(field, 1, trajectory, None)
            mask = mask * (np.nan_to_num(values, nan=0.0) != 0)
        return mask.astype(np.float32)

    # The arrays below are `(time, *space, channel)`, or `(*space, channel)` where `frames` is None.

    def _read(self, group: str, trajectory: int, frames: range | None) -> np.ndarray:
        return self._gather(self.fields[group], len(getattr(self.spec, group)), trajectory, frames)

    def _gather(self, fields: list[_Field], channels: int, trajectory: int, frames: range | None) -> np.ndarray:
        lead = () if frames is None else (len(frames),)
        result = np.empty((*lead, *self.spec.grid.shape, channels), np.float32)
        for field in fields:
            values = self._values(field, trajectory, frames)
            for i, position in enumerate(field.positions):
                result[..., position] = values[i] if field.flat else values
        return result

    def _values(self, field: _Field, trajectory: int, frames: range | None) -> np.ndarray:
        """`(entries?, time?, *space)`."""
        selection: dict[str, object] = dict(self.index[field.variable])
        order = [field.dims[axis.name] for axis in self.spec.grid.axes]
        if "trajectory" in field.dims:
            selection[field.dims["trajectory"]] = trajectory
        if "time" in field.dims:
            selection[field.dims["time"]] = 0 if frames is None else slice(frames.start, frames.stop, frames.step)
            order = order if frames is None else [field.dims["time"], *order]
        if field.flat:
            selection[field.flat] = np.asarray(field.entries)
            order = [field.flat, *order]
        picked = self.ds.variables[field.variable].isel(selection)
        try:
            values = np.asarray(picked.transpose(*order).values)
        except MemoryError:
            raise
        except Exception as error:  # every backend has its own exceptions for damaged chunks
            raise DataError(
                f"{self.source}: variable {field.variable!r} cannot be read at trajectory {trajectory}, frames "
                f"{frames}: {type(error).__name__}: {error}. The file seems damaged: copy or generate it again."
            ) from error
        values = values.astype(np.float32)
        if frames is None or "time" in field.dims:
            return values
        return values[:, None] if field.flat else values[None]

    def _fill(self, values: np.ndarray, trajectory: int, frames: range) -> np.ndarray:
        self._check_infinite(values, frames, self.spec.channels)
        missing = np.isnan(values)
        if not missing.any() and not self.masked:
            return values
        wrong = missing != self.missing(trajectory)
        if wrong.any():
            time, *place, channel = (int(i) for i in np.argwhere(wrong)[0])
            names = [axis.name for axis in self.spec.grid.axes]
            at = ", ".join(f"{n}={a.centers[i]:g}" for n, a, i in zip(names, self.spec.grid.axes, place, strict=True))
            frame = frames[time]
            what = "NaN" if missing[tuple([time, *place, channel])] else "a value where frame 0 has NaN"
            raise DataError(
                f"{self.source}: variable {self.spec.names[channel]!r} has {what} at time index {frame} "
                f"({self.times.labels[frame]}), trajectory {trajectory}, {at}. Missing values must stay at the same "
                "places "
                "in every frame (land); fill or drop the others."
            )
        return np.where(missing, np.float32(0), values)

    def _check_infinite(self, values: np.ndarray, frames: range, channels: tuple[Channel, ...]) -> None:
        if np.isinf(values).any():
            time, *_, channel = np.argwhere(np.isinf(values))[0]
            frame = frames[int(time)]
            raise DataError(
                f"{self.source}: variable {channels[channel].name!r} is infinite at time index {frame} "
                f"({self.times.labels[frame]}). Only finite numbers (in float32) can be used."
            )

    def _check_steady(self, values: np.ndarray, frames: range, channels: tuple[Channel, ...]) -> None:
        self._check_infinite(values, frames, channels)
        missing = np.isnan(values)
        if (missing != missing[:1]).any():
            time, *_, channel = np.argwhere(missing != missing[:1])[0]
            frame = frames[int(time)]
            raise DataError(
                f"{self.source}: forcing {channels[channel].name!r} has NaN that change with time, first at time "
                f"index {frame} "
                f"({self.times.labels[frame]}). Fill them."
            )

    def _space_index(self, field: _Field) -> dict[str, slice | np.ndarray]:
        return {
            field.dims[axis.name]: ax.positions(self.ds, field.dims[axis.name], axis, self.source)
            for axis in self.spec.grid.axes
        }

    def _parameters(self) -> np.ndarray:
        """`(trajectory, parameter)` float32."""
        result = np.empty((self.trajectories, len(self.spec.parameters)), np.float32)
        for i, channel in enumerate(self.spec.parameters):
            if channel.name not in self.ds.variables:
                raise DataError(
                    f"{self.source} has no variable {channel.name!r}." + suggest(channel.name, self.ds.variables)
                )
            variable = self.ds.variables[channel.name]
            if variable.dims not in ((), (self.trajectory_dim,)):
                raise DataError(
                    f"{self.source}: parameter {channel.name!r} has dimensions {variable.dims}, but a parameter is "
                    "one number, or "
                    f"one per trajectory. Use it as a static field or as forcing."
                )
            result[:, i] = np.asarray(variable.values, np.float32)
            if not np.isfinite(result[:, i]).all():
                at = int(np.argmin(np.isfinite(result[:, i])))
                raise DataError(f"{self.source}: parameter {channel.name!r} is not finite for trajectory {at}.")
        return result


def as_index(frames: range) -> slice:
    return slice(frames.start, frames.stop, frames.step)


def source_of(ds: xr.Dataset) -> str:
    """The file a dataset came from, for messages."""
    if source := ds.encoding.get("source"):
        return str(source)
    for variable in ds.variables.values():
        if source := variable.encoding.get("source"):
            return str(source)
    return "The dataset"


def base_of(ds: xr.Dataset, name: str) -> str | None:
    """The variable that holds channel `name`: itself, or `z` for `z_850` when `z` has a level 850."""
    if name in ds.variables:
        return name
    base, _, entry = name.rpartition("_")
    while base:
        if base in ds.variables and _entry_of(ds, base, name[len(base) + 1 :]) is not None:
            return base
        base, _, entry = base.rpartition("_")
    return None


def _entry_of(ds: xr.Dataset, variable: str, label: str) -> tuple[str, int] | None:
    """(dimension, position) of the entry called `label` along a dimension of `variable`."""
    for dim in ds.variables[variable].dims:
        if ax.role(ds, dim) in ("trajectory", "time", "latitude", "longitude", "x", "y", "z"):
            continue
        labels = _entry_labels(ds, dim)
        if label in labels:
            return dim, labels.index(label)
    return None


def _entry_labels(ds: xr.Dataset, dim: str) -> list[str]:
    if dim not in ds.variables:
        return [str(i) for i in range(ds.sizes[dim])]
    values = np.asarray(ds.variables[dim].values)
    return [f"{v:g}" if values.dtype.kind in "iuf" else str(v) for v in values.tolist()]


def _resolve(ds: xr.Dataset, channels: tuple[Channel, ...], spec: Spec, source: str) -> list[_Field]:
    """One `_Field` per variable that `channels` need. Raises DataError or SpecError when a variable does not fit."""
    grouped: dict[str, list[tuple[int, tuple[str, int] | None]]] = {}
    for position, channel in enumerate(channels):
        base = base_of(ds, channel.name)
        if base is None:
            raise DataError(f"{source} has no variable {channel.name!r}." + suggest(channel.name, ds.data_vars))
        entry = None if base == channel.name else _entry_of(ds, base, channel.name[len(base) + 1 :])
        grouped.setdefault(base, []).append((position, entry))
    fields = []
    for name, members in grouped.items():
        flat = members[0][1][0] if members[0][1] else None
        dims = ax.roles(ds, [d for d in ds.variables[name].dims if d != flat])
        found, wanted = set(ax.space_of(dims)), {axis.name for axis in spec.grid.axes}
        if found != wanted:
            raise SpecError(
                f"{source}: variable {name!r} has spatial dimensions {sorted(found)}, but {sorted(wanted)} were "
                "expected "
                f"(its dimensions are {ds.variables[name].dims})."
            )
        if ds.variables[name].dtype.kind not in "iufb":
            raise DataError(f"{source}: variable {name!r} is of type {ds.variables[name].dtype}, not a number.")
        entries = tuple(entry[1] for _, entry in members) if flat else ()
        fields.append(_Field(name, dims, flat, entries, tuple(position for position, _ in members)))
    return fields


# --- deriving a spec --------------------------------------------------------------------------------------------------


def _predicted(ds: xr.Dataset, taken: set[str], flat: set[str], source: str) -> list[str]:
    """Fields of `ds` that vary in time (all fields when none does), in the order of the file."""
    names = [str(n) for n, v in ds.data_vars.items() if v.dtype.kind in "iuf" and str(n) not in taken]
    fields = {n: ax.roles(ds, [d for d in ds[n].dims if d not in flat]) for n in names}
    fields = {n: r for n, r in fields.items() if ax.space_of(r)}
    moving = [n for n, r in fields.items() if "time" in r]
    chosen = moving or list(fields)
    if not chosen:
        raise DataError(
            f"{source} has no numeric variable on a grid. It has {sorted(map(str, ds.variables)) or 'nothing'}."
        )
    return chosen


def _grid(ds, names, flat, space, periodic, source) -> tuple[Grid, dict[str, str]]:
    """The grid that all `names` share. Raises SpecError when they do not."""
    first: tuple[str, dict[str, str]] | None = None
    for name in names:
        base = base_of(ds, name)
        drop = flat if base == name else {_entry_of(ds, base, name[len(base) + 1 :])[0]}
        dims = {
            r: d
            for r, d in ax.roles(ds, [d for d in ds[base].dims if d not in drop]).items()
            if r not in ("trajectory", "time")
        }
        if first is None:
            first = (name, dims)
        elif dims != first[1]:
            raise SpecError(
                f"{source}: {first[0]!r} is on {tuple(first[1].values())}, but {name!r} is on {tuple(dims.values())}. "
                "Choose variables on "
                "one grid"
                + (", or flatten=('level',) to make levels channels." if "level" in {*first[1], *dims} else ".")
            )
    dims = first[1]
    order = ax.space_of(dims, space)
    if space and set(space) != set(dims):
        raise SpecError(f"{source}: space={tuple(space)}, but the spatial axes are {ax.space_of(dims)}.")
    if periodic and (unknown := set(periodic) - set(dims) - set(dims.values())):
        raise SpecError(f"{source}: periodic names {min(unknown)!r}." + suggest(min(unknown), dims))

    def is_periodic(name):
        if periodic is None:
            return None
        return name in periodic or dims[name] in periodic or (name == "longitude" and None)

    return Grid(tuple(ax.axis_of(ds, dims[name], name, is_periodic(name), source) for name in order)), dims


def _channels(ds: xr.Dataset, names: Sequence[str], flat: set[str]) -> tuple[Channel, ...]:
    result = []
    for name in names:
        dim = next((d for d in ds[name].dims if d in flat), None) if name in ds.variables else None
        labels = [f"{name}_{label}" for label in _entry_labels(ds, dim)] if dim else [name]
        result += [Channel(label, _unit(ds, label)) for label in labels]
    return tuple(result)


def _unit(ds: xr.Dataset, channel: str) -> str:
    base = base_of(ds, channel)
    unit = "" if base is None else str(ds.variables[base].attrs.get("units", ""))
    return "" if unit == "1" else unit


def _time_dim(ds: xr.Dataset, variable: str | None) -> str | None:
    if variable is not None:
        return ax.roles(ds, ds.variables[variable].dims).get("time")
    return ax.time_dim(ds)


# --- writing labels ---------------------------------------------------------------------------------------------------


def _by_variable(like: xr.Dataset, spec: Spec) -> dict[str, list[int]]:
    """Output variable -> channels. Levels are put together again when the variables of `like` have the same levels."""
    result: dict[str, list[int]] = {}
    for i, name in enumerate(spec.names):
        result.setdefault(base_of(like, name) or name, []).append(i)
    levels = {
        tuple(spec.names[i][len(base) + 1 :] for i in members)
        for base, members in result.items()
        if base not in spec.names
    }
    if len(levels) > 1:
        return {name: [i] for i, name in enumerate(spec.names)}
    return result


def _labelled_variable(frames, spec, like, name, channels, dim) -> tuple[xr.Variable, dict[str, xr.Variable]]:
    base = base_of(like, name)
    roles = ax.roles(like, like.variables[base].dims) if base else {}
    flat = (
        _entry_of(like, base, spec.names[channels[0]][len(base) + 1 :])
        if base and base != spec.names[channels[0]]
        else None
    )
    values = [_restore(frames[..., i], spec, like, roles) for i in channels]
    names = [roles.get(axis.name, axis.name) for axis in spec.grid.axes]
    coords = {n: _axis_coordinate(like, n, axis) for n, axis in zip(names, spec.grid.axes, strict=True)}
    attrs = dict(like.variables[base].attrs) if base else {}
    if not attrs.get("units") and spec.channels[channels[0]].unit:
        attrs["units"] = spec.channels[channels[0]].unit
    if flat and name == base:
        entries = [_entry_of(like, base, spec.names[i][len(base) + 1 :])[1] for i in channels]
        level = flat[0]
        if level in like.variables:
            coords[level] = like.variables[level].isel({level: entries})
        order = ("trajectory", dim, *[d for d in like.variables[base].dims if d == level or d in names])
        variable = xr.Variable(("trajectory", dim, level, *names), np.stack(values, 2), attrs)
        return variable.transpose(*order), coords
    variable = xr.Variable(("trajectory", dim, *names), values[0], attrs)
    order = [d for d in (like.variables[base].dims if base else ()) if d in names]
    return variable.transpose("trajectory", dim, *(order or names)), coords


def _restore(values: np.ndarray, spec: Spec, like: xr.Dataset, roles: dict[str, str]) -> np.ndarray:
    """Puts every axis of `(batch, lead, *space)` back into the order of `like`."""
    for i, axis in enumerate(spec.grid.axes):
        dim = roles.get(axis.name)
        if dim is None:
            continue
        position = ax.positions(like, dim, axis, source_of(like))
        values = np.take(values, np.argsort(np.arange(len(axis))[position]), axis=2 + i)
    return values


def _axis_coordinate(like: xr.Dataset, dim: str, axis) -> xr.Variable:
    if dim in like.variables:
        return like.variables[dim].copy(deep=False)
    attrs = {"units": axis.unit} if axis.unit else {}
    return xr.Variable((dim,), np.asarray(axis.centers), attrs)


def _time_coordinates(times: ck.Clock, spec: Spec, valid, count: int, first: int, dim: str) -> dict[str, xr.Variable]:
    if valid is None:
        valid = ck.after(times, count, spec.time_step, first)
    valid = np.asarray(valid)
    if dim == "time":
        return {"time": xr.Variable(("time",), valid)}
    lead = xr.Variable((dim,), ck.lead_labels(times, count, spec.time_step, first), {"long_name": "lead time"})
    dims = (dim,) if valid.ndim == 1 else ("trajectory", dim)
    return {dim: lead, "time": xr.Variable(dims, valid, {"standard_name": "time", "long_name": "valid time"})}


def _trajectory_coordinate(like: xr.Dataset, batch: int) -> dict[str, xr.Variable]:
    for dim in like.dims:
        if ax.role(like, dim) == "trajectory" and like.sizes[dim] == batch and dim in like.variables:
            return {"trajectory": like.variables[dim].to_base_variable().rename({}) if dim == "trajectory" else
                    xr.Variable(("trajectory",), like.variables[dim].values, like.variables[dim].attrs)}  # fmt: skip
    return {}
