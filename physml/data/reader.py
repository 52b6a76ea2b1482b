"""Arrays out of a labelled dataset, in the order of a spec, with missing values checked."""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data import tensors
from physml.data.blocks import DaskBlocks, edges
from physml.data.channels import Field, base_of, missing_variable, resolve, source_of, unit_of
from physml.data.joining import locate
from physml.errors import DataError, SpecError
from physml.fields import Channel, Spec, Window

REMEMBERED = 256  # trajectories whose mask is kept


class Reader:
    """Reads windows of one dataset in the order of a spec. Stateless apart from remembered masks; safe in threads.

    Attributes:
        trajectories, frames: how many the dataset has; `frames` of the longest trajectory.
        lengths: frames of every trajectory: the variable `frames` of the dataset says so where they differ, and what
            follows in a shorter trajectory is padding that is never read.
        times: the clock of the frames.
        masked: whether fields are missing somewhere.
        parameters: `(trajectory, parameter)` float32.
    """

    def __init__(self, ds: xr.Dataset, spec: Spec):
        self.ds, self.spec, self.source = ds, spec, source_of(ds)
        groups = ("channels", "forcing", "static")
        self.fields = {group: resolve(ds, getattr(spec, group), spec) for group in groups}
        self.mask_field = [] if spec.mask is None else resolve(ds, (Channel(spec.mask),), spec)
        every = [field for group in self.fields.values() for field in group]
        self.index = {field.variable: self._space_index(field) for field in [*every, *self.mask_field]}
        self.trajectory_dim = next((f.dims["trajectory"] for f in every if "trajectory" in f.dims), None)
        self.time_dim = next((f.dims["time"] for f in every if "time" in f.dims), None)
        self.trajectories = ds.sizes[self.trajectory_dim] if self.trajectory_dim else 1
        self.times = ck.clock(ds, self.time_dim)
        self.frames = len(self.times)
        self._check_not_empty()
        self.lengths = self._lengths()
        self.parameters = self._parameters()
        self._static: np.ndarray | None = None
        self._graphs: dict[str, DaskBlocks] = {}
        self._tensors: dict[str, object | None] = {}
        self._lock = threading.Lock()
        self._remembered: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._check_static()
        self.groups = (spec.channels, spec.forcing)
        self.masked = spec.mask is not None or bool(self.missing(0).any())

    def check_units(self) -> None:
        """Raises SpecError where a unit of the dataset differs from the spec's."""
        for group in ("channels", "forcing", "static", "parameters"):
            for channel in getattr(self.spec, group):
                unit = unit_of(self.ds, channel.name)
                if unit and channel.unit and unit != channel.unit:
                    raise SpecError(
                        f"{self.source}: {channel.name!r} is in {unit!r}, but {channel.unit!r} was expected. "
                        f"Convert it to {channel.unit!r} and set its `units` attribute."
                    )

    def check_step(self) -> None:
        """Raises SpecError when frames are not `spec.time_step` apart."""
        if self.frames < 2:
            return
        own = ck.time_step(self.times, self.source)
        if abs(own - self.spec.time_step) > 0.01 * self.spec.time_step:
            found = f"{own:g} {self.times.unit}".rstrip()
            expected = f"{self.spec.time_step:g} {self.spec.time_unit}".rstrip()
            finer = "Take every n-th frame, or data" if own < self.spec.time_step else "Use data"
            raise SpecError(
                f"{self.source}: frames are {found} apart, but {expected} was expected. {finer} with that time step."
            )

    def read(self, trajectory: int, frames: range) -> Window:
        """The window of these frames without a batch axis, float32."""
        values, forcing = (array[0] for array in self.arrays(range(trajectory, trajectory + 1), frames))
        return self.window(trajectory, frames, values, forcing)

    def arrays(self, trajectories: range, frames: range) -> tuple[np.ndarray, np.ndarray]:
        """Frames and forcing `(trajectory, time, *space, channel)`: missing values are checked, then 0."""
        parts = self.parts(trajectories, frames)
        shape = (len(trajectories), len(frames), *self.spec.grid.shape)
        result = tuple(np.empty((*shape, len(channels)), np.float32) for channels in self.groups)
        self.put(parts, result)
        return result

    def parts(self, trajectories: range, frames: range) -> tuple[np.ndarray, ...]:
        """The same as it comes out of the file, for `put`: `(entry, trajectory, time, *space)` of every variable,
        without the copy that puts them together.
        """
        shape = (len(trajectories), len(frames), *self.spec.grid.shape)
        result: list[np.ndarray] = []
        for group, channels in zip(("channels", "forcing"), self.groups, strict=True):
            fields = self.fields[group]
            found = [self._values(field, trajectories, frames) for field in fields]
            with np.errstate(over="ignore", invalid="ignore"):
                finite = all(np.isfinite(values.sum()) for values in found)  # one fast pass
            if not finite or (self.masked and group == "channels"):
                whole = np.empty((*shape, len(channels)), np.float32)
                self._put(fields, found, whole)
                self._check_infinite(whole, trajectories, frames, channels)
                fill = self._fill if group == "channels" else self._fill_forcing
                whole = fill(whole, trajectories, frames)
                found = [np.moveaxis(whole[..., list(field.positions)], -1, 0) for field in fields]
            result += [np.broadcast_to(v, (len(v), *shape)) for v in found]
        return tuple(result)

    def put(self, parts: Sequence[np.ndarray], result: tuple[np.ndarray, np.ndarray]) -> None:
        """Writes parts into frames and forcing `(.., channel)` of their other axes."""
        count = len(self.fields["channels"])
        self._put(self.fields["channels"], parts[:count], result[0])
        self._put(self.fields["forcing"], parts[count:], result[1])

    def _put(self, fields: list[Field], parts: Sequence[np.ndarray], result: np.ndarray) -> None:
        for field, values in zip(fields, parts, strict=True):
            for i, position in enumerate(field.positions):
                result[..., position] = values[i]

    def window(self, trajectory: int, frames: range, values: np.ndarray, forcing: np.ndarray) -> Window:
        """A window without a batch axis around arrays that were read already."""
        seconds, calendar = self.clock_of(slice(frames.start, frames.stop, frames.step))
        static, mask = self.static(trajectory), self.mask(trajectory)
        return Window(values, seconds, calendar, self.parameters[trajectory], forcing, static, mask, self.spec)

    def clock_of(self, index) -> tuple[np.ndarray, np.ndarray]:
        """(times since the first of them, calendar) of frames `index`, whose last axis is time; float32."""
        since = self.times.values[index]
        since = (since - since[..., :1]).astype(np.float32)
        calendar = self.times.calendar
        return since, np.zeros((*since.shape, 2), np.float32) if calendar is None else calendar[index]

    def static(self, trajectory: int) -> np.ndarray:
        """`(*space, static)`, NaN replaced by 0."""
        if self._static is None and not any("trajectory" in field.dims for field in self.fields["static"]):
            self.keep_static()
        if self._static is not None:
            return self._static[trajectory % len(self._static)]
        return self._read_static(range(trajectory, trajectory + 1))[0]

    def keep_static(self) -> None:
        """Keeps the static fields in memory: of all trajectories, or the one that they share."""
        if self._static is None:
            shared = not any("trajectory" in field.dims for field in self.fields["static"])
            self._static = self._read_static(range(1) if shared else range(self.trajectories))

    def _read_static(self, trajectories: range) -> np.ndarray:
        values = np.nan_to_num(self._read("static", trajectories, None), nan=0.0)
        self._check_infinite(values[:, None], trajectories, range(1), self.spec.static)
        return values

    def missing(self, trajectory: int) -> np.ndarray:
        """Where the first frame of a trajectory is NaN, `(*space, channel)` bool."""
        return self._pattern(trajectory)[0]

    def mask(self, trajectory: int) -> np.ndarray | None:
        """`(*space, channel)` float32, 1 where fields exist; None where all exist everywhere."""
        return self._pattern(trajectory)[1] if self.masked else None

    def _pattern(self, trajectory: int) -> tuple[np.ndarray, np.ndarray]:
        """(missing, mask), remembered."""
        key = trajectory if self.trajectory_dim else 0
        if key not in self._remembered:
            only = range(trajectory, trajectory + 1)
            missing = np.isnan(self._read("channels", only, range(1))[0, 0])
            self._check_somewhere(missing, trajectory)
            mask = (~missing).astype(np.float32)
            if self.mask_field:
                exists = np.nan_to_num(self._gather(self.mask_field, 1, only, None)[0], nan=0.0) != 0
                mask = mask * exists.astype(np.float32)
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = missing, mask
        return self._remembered[key]

    def chunks(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(first trajectories, first frames) of the stored chunks and their ends; None where no field is in chunks.

        Of several fields, the longest chunks along either.
        """
        found = []
        for field in (*self.fields["channels"], *self.fields["forcing"]):
            variable = self.ds.variables[field.variable]
            members = np.arange(self.trajectories + 1)  # as good as any where a field has no trajectories
            if "trajectory" in field.dims:
                members = edges(variable, field.dims["trajectory"])
            frames = edges(variable, field.dims["time"]) if "time" in field.dims else None
            if members is not None and frames is not None:
                found.append((members, frames))
        if not found:
            return None
        groups, frames = (min(parts, key=len) for parts in zip(*found, strict=True))
        if len(set(self.lengths)) > 1:  # what is read together must be equally long
            groups = np.arange(self.trajectories + 1)
        return groups, frames

    # --- arrays (trajectory, time, *space, channel), without time where `frames` is None ---

    def _read(self, group: str, trajectories: range, frames: range | None) -> np.ndarray:
        return self._gather(self.fields[group], len(getattr(self.spec, group)), trajectories, frames)

    def _gather(self, fields: list[Field], channels: int, trajectories: range, frames: range | None) -> np.ndarray:
        time = () if frames is None else (len(frames),)
        result = np.empty((len(trajectories), *time, *self.spec.grid.shape, channels), np.float32)
        self._put(fields, [self._values(field, trajectories, frames) for field in fields], result)
        return result

    def _values(self, field: Field, trajectories: range, frames: range | None) -> np.ndarray:
        """`(entry, trajectory, time, *space)`, broadcastable along what the variable does not have."""
        selection: dict[str, object] = dict(self.index[field.variable])
        order = [field.dims[axis.name] for axis in self.spec.grid.axes]
        new_axes = []
        if "time" in field.dims:
            selection[field.dims["time"]] = 0 if frames is None else slice(frames.start, frames.stop, frames.step)
            order = order if frames is None else [field.dims["time"], *order]
        elif frames is not None:
            new_axes.append(2)
        if "trajectory" in field.dims:
            selection[field.dims["trajectory"]] = slice(trajectories.start, trajectories.stop)
            order = [field.dims["trajectory"], *order]
        else:
            new_axes.append(1)
        if field.flat:
            selection[field.flat] = np.asarray(field.entries)
            order = [field.flat, *order]
        else:
            new_axes.append(0)
        values = self._load(field.variable, selection, order, trajectories, frames)
        return np.expand_dims(values, sorted(new_axes))

    def _check_static(self) -> None:
        """Raises DataError for a static field that changes with time; one that is only stored with time may stay."""
        for field in self.fields["static"]:
            if "time" not in field.dims:
                continue
            last = min(self.lengths[0], self.ds.sizes[field.dims["time"]]) - 1
            first, *others = (self._values(field, range(1), range(i, i + 1)) for i in sorted({0, min(1, last), last}))
            noise = 1e-4 * float(np.nanmax(np.abs(first), initial=0.0))  # packed files round every frame on its own
            if not all(np.allclose(first, other, rtol=0, atol=noise, equal_nan=True) for other in others):
                raise DataError(
                    f"{self.source}: static {field.variable!r} changes with time, but of a static field only the first "
                    "frame would be used. Name it in forcing, or drop its time dimension."
                )

    def _load(self, name: str, selection: dict, order: list[str], trajectories: range, frames: range | None):
        try:
            variable = self.ds.variables[name]
            picked = variable.isel(selection) if variable.chunks is None else self._joined(name).isel(selection)
            values = self._decoded(name, picked)
            # Transposed in memory: lazily, xarray would pick every number on its own.
            values = values.transpose([picked.dims.index(dim) for dim in order])
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is checked
                return values.astype(np.float32, copy=False)
        except MemoryError:
            raise
        except Exception as error:  # every backend has its own exceptions for damaged chunks
            where = f"trajectory {trajectories.start}" + ("" if frames is None else f", frame {frames.start}")
            raise DataError(
                f"{self.source}: variable {name!r} cannot be read from {where} on ({type(error).__name__}: {error}). "
                "The file seems damaged: copy, download or generate it again."
            ) from error

    def _decoded(self, name: str, picked: xr.Variable) -> np.ndarray:
        found = tensors.locate(picked)
        if found is not None:
            array, key = found
            with self._lock:
                if name not in self._tensors:
                    self._tensors[name] = tensors.open_array(array)
            if self._tensors[name] is not None:
                return tensors.read(self._tensors[name], key)
        return np.asarray(picked.values)

    def _joined(self, name: str) -> "DaskBlocks":
        with self._lock:
            if name not in self._graphs:
                self._graphs[name] = DaskBlocks(self.ds.variables[name])
        return self._graphs[name]

    def _space_index(self, field: Field) -> dict[str, slice | np.ndarray]:
        dims = [(field.dims[axis.name], axis) for axis in self.spec.grid.axes]
        return {dim: ax.positions(self.ds, dim, axis, self.source) for dim, axis in dims}

    def _lengths(self) -> tuple[int, ...]:
        variable = self.ds.variables.get("frames")
        if variable is None or not self.trajectory_dim or variable.dims != (self.trajectory_dim,):
            return (self.frames,) * self.trajectories
        lengths = np.asarray(variable.values)
        if lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > self.frames:
            raise DataError(
                f"{self.source}: the variable 'frames' counts the frames of every trajectory, whole numbers from 1 to "
                f"{self.frames}, but it holds {lengths.dtype} from {lengths.min()} to {lengths.max()}."
            )
        return tuple(lengths.tolist())

    def _parameters(self) -> np.ndarray:
        result = np.empty((self.trajectories, len(self.spec.parameters)), np.float32)
        for i, channel in enumerate(self.spec.parameters):
            if base_of(self.ds, channel.name) != channel.name:
                raise missing_variable(self.ds, channel.name)
            variable = self.ds.variables[channel.name]
            if variable.dims not in ((), (self.trajectory_dim,)) or variable.dtype.kind not in "iufb":
                raise DataError(
                    f"{self.source}: parameter {channel.name!r} has dimensions {variable.dims} and type "
                    f"{variable.dtype}, "
                    "but a parameter is one number, or one per trajectory. Use a field as static or forcing."
                )
            result[:, i] = np.asarray(variable.values, np.float32)
            finite = np.isfinite(result[:, i])
            if not finite.all():
                at = int(np.argmin(finite))
                raise DataError(f"{self.source}: parameter {channel.name!r} is not finite for trajectory {at}.")
        return result

    # --- missing values ---

    def _fill(self, values: np.ndarray, trajectories: range, frames: range) -> np.ndarray:
        missing = np.isnan(values)
        if not missing.any() and not self.masked:
            return values
        for i, trajectory in enumerate(trajectories):
            wrong = missing[i] != self.missing(trajectory)
            if wrong.any():
                raise self._moving_gap(missing[i], wrong, trajectory, frames)
            if not self.masked and missing[i].any():
                raise DataError(
                    f"{self.source}: trajectory {trajectory} has NaN, but trajectory 0 has none. Give all "
                    "trajectories a "
                    "mask (the option `mask`), or fill them."
                )
        values[missing] = 0
        return values

    def _moving_gap(self, missing: np.ndarray, wrong: np.ndarray, trajectory: int, frames: range) -> DataError:
        time, *place, channel = (int(i) for i in np.argwhere(wrong)[0])
        axes = zip(self.spec.grid.axes, place, strict=True)
        at = ", ".join(f"{axis.name}={axis.centers[i]:g}" for axis, i in axes)
        # The frame with the gap is named: the first one when its gap is filled later.
        gap, other = (frames[time], 0) if missing[(time, *place, channel)] else (0, frames[time])
        name = self.spec.names[channel]
        file, index = self._file_of(name, trajectory, gap)
        second, counted = self._file_of(name, trajectory, other)
        return DataError(
            f"{file}: variable {name!r} has NaN at time index {index} ({self.times.labels[gap]}), trajectory "
            f"{trajectory}, {at}, but a value there at time index {counted}{'' if second == file else f' of {second}'}."
            " Missing values must stay at the same places in every frame (land); fill or drop the others."
        )

    def _file_of(self, channel: str, trajectory: int, frame: int) -> tuple[str, int]:
        """(file, frame counted in that file); where the file is not known, the source and the frame counted here."""
        named = self.ds.variables.get(self.trajectory_dim)
        label = trajectory if named is None else np.asarray(named.values)[trajectory]
        found = locate(self.ds, base_of(self.ds, channel), self.times.labels[frame], label, frame)
        return found or (self.source, frame)

    def _fill_forcing(self, values: np.ndarray, trajectories: range, frames: range) -> np.ndarray:
        missing = np.isnan(values)
        moving = missing != missing[:, :1]
        if moving.any():
            sample, time, *_, channel = (int(i) for i in np.argwhere(moving)[0])
            name = self.spec.forcing[channel].name
            file, index = self._file_of(name, trajectories[sample], frames[time])
            raise DataError(
                f"{file}: forcing {name!r} has NaN that change with time, first at time index {index} "
                f"({self.times.labels[frames[time]]}). Fill them."
            )
        values[missing] = 0
        return values

    def _check_not_empty(self) -> None:
        if not self.frames or not self.trajectories:
            raise DataError(
                f"{self.source} is empty: {self.trajectories} trajectories of {self.frames} frames. Check the "
                "selection."
            )

    def _check_somewhere(self, missing: np.ndarray, trajectory: int) -> None:
        everywhere = missing.all(axis=tuple(range(missing.ndim - 1)))
        if missing.size and everywhere.any():
            name = self.spec.names[int(np.argmax(everywhere))]
            file, index = self._file_of(name, trajectory, 0)
            raise DataError(
                f"{file}: variable {name!r} is NaN everywhere at time index {index} ({self.times.labels[0]}) of "
                f"trajectory {trajectory}. Drop that frame, or check the file."
            )

    def _check_infinite(
        self, values: np.ndarray, trajectories: range, frames: range, channels: tuple[Channel, ...]
    ) -> None:
        if np.isinf(values).any():
            sample, time, *_, channel = (int(i) for i in np.argwhere(np.isinf(values))[0])
            name = channels[channel].name
            file, index = self._file_of(name, trajectories[sample], frames[time])
            raise DataError(
                f"{file}: variable {name!r} is infinite at time index {index} ({self.times.labels[frames[time]]}). "
                "Only finite numbers (in float32) can be used."
            )


def lengths_of(ds: xr.Dataset) -> np.ndarray | None:
    """Frames of every trajectory where the variable `frames` says so: what follows is padding. None where it does not.

    Of one trajectory that was taken out of several, one number.
    """
    variable = ds.variables.get("frames")
    if variable is None or variable.dtype.kind not in "iu" or variable.ndim > 1:
        return None
    if variable.ndim and ax.role(ds, variable.dims[0]) != "trajectory":
        return None
    return np.asarray(variable.values).reshape(-1)


def without_lengths(ds: xr.Dataset) -> xr.Dataset:
    """`ds` after a selection of frames that leaves no padding."""
    return ds if lengths_of(ds) is None else ds.drop_vars("frames")


def stack(windows: list[Window]) -> Window:
    """Batches windows without a batch axis, on the host."""
    leaves = {}
    for field in dataclasses.fields(Window):
        values = [getattr(window, field.name) for window in windows]
        leaves[field.name] = values[0] if field.name == "spec" or values[0] is None else np.stack(values)
    return Window(**leaves)
