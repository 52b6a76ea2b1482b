"""One split of labelled data as a `Dataset`: random access to windows, from the file or from memory."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from physml.data import clock as ck
from physml.data.channels import source_of
from physml.data.reader import Reader, stack
from physml.errors import DataError
from physml.fields import Spec, Window

MEMORY_LIMIT = 2 * 2**30  # bytes of a split that are kept in memory
CHUNK_BYTES = 64 * 2**20


class XarrayDataset:
    """Implements `physml.contracts.Dataset` over an xarray dataset with any dimension order.

    Where the time axis jumps, every regular run is a trajectory of its own, so a window never crosses a jump.

    Attributes:
        spec: names, units and grid; arrays come in its order.
        lengths: frames of every trajectory (of every run of every trajectory).
    """

    def __init__(self, ds: xr.Dataset, spec: Spec, mask: str | None = None):
        self.ds, self.spec = ds, spec
        self.reader = Reader(ds, spec, mask)
        self.reader.check_units()
        self.reader.check_step()
        self.runs = ck.segments(self.reader.times, spec.time_step)
        self.lengths = tuple(max(0, min(run.stop, n) - run.start) for n in self.reader.lengths for run in self.runs)
        self._arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"XarrayDataset({source_of(self.ds)}: {len(self.lengths)} trajectories, {sum(self.lengths)} frames, "
            f"grid {self.spec.grid.shape}, channels {list(self.spec.names)})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all frames and forcing in memory (float32)."""
        channels = len(self.spec.channels) + len(self.spec.forcing)
        return 4 * sum(self.lengths) * int(np.prod(self.spec.grid.shape, dtype=np.int64)) * channels

    def locate(self, trajectory: int, frames: range) -> tuple[int, range]:
        """(trajectory of the file, frames of the file) of frames of one run. Raises DataError when they do not
        exist.
        """
        if not 0 <= trajectory < len(self.lengths):
            raise DataError(f"There is no trajectory {trajectory}: {self.reader.source} has {len(self.lengths)}.")
        length = self.lengths[trajectory]
        if len(frames) and not (0 <= frames[0] < length and 0 <= frames[-1] < length):
            raise DataError(f"Frames {frames} do not lie in trajectory {trajectory}, which has {length} frames.")
        source, run = divmod(trajectory, len(self.runs))
        begin = self.runs[run].start
        return source, range(frames.start + begin, frames.stop + begin, frames.step)

    def read(self, trajectory: int, frames: range) -> Window:
        """A window without a batch axis: float32, physical units, times since its first frame."""
        source, inside = self.locate(trajectory, frames)
        if self._arrays is None:
            return self.reader.read(source, inside)
        values, forcing = (array[source, inside.start : inside.stop : inside.step] for array in self._arrays)
        return self.reader.window(source, inside, values, forcing)

    def read_batch(self, trajectories: np.ndarray, starts: np.ndarray, strides: np.ndarray, frames: int) -> Window:
        """Windows of `frames` frames, `strides` apart, stacked along a batch axis. One gather when the split is in
        memory.
        """
        if self._arrays is None:
            spans = zip(trajectories.tolist(), starts.tolist(), strides.tolist(), strict=True)
            return stack([self.read(t, range(s, s + (frames - 1) * d + 1, d)) for t, s, d in spans])
        sources, run = np.divmod(trajectories, len(self.runs))
        first = np.array([r.start for r in self.runs])[run] + starts
        index = first[:, None] + strides[:, None] * np.arange(frames)
        values, forcing = (array[sources[:, None], index] for array in self._arrays)
        times, calendar = self.reader.clock_of(index)
        static = np.stack([self.reader.static(i) for i in sources.tolist()])
        mask = np.stack([self.reader.mask(i) for i in sources.tolist()]) if self.reader.masked else None
        return Window(values, times, calendar, self.reader.parameters[sources], forcing, static, mask, self.spec)

    def preload(self, limit: int = MEMORY_LIMIT) -> bool:
        """Keeps the split in memory when it needs at most `limit` bytes; says whether it is in memory."""
        with self._lock:
            if self._arrays is None and self.nbytes <= limit:
                self._arrays = self._whole()
                self.reader.keep_static()
        return self._arrays is not None

    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        """All frames and forcing `(trajectory, time, *space, channel)`, read in blocks of equally long trajectories.

        Zero after the end of a shorter one.
        """
        reader, total = self.reader, self.reader.trajectories
        block = max(1, int(CHUNK_BYTES * total // max(self.nbytes, 1)))
        arrays: list[np.ndarray] = []
        start = 0
        while start < total:
            length, end = reader.lengths[start], min(start + block, total)
            stop = next((i for i in range(start, end) if reader.lengths[i] != length), end)
            part = reader.arrays(range(start, stop), range(length))
            arrays = arrays or [np.zeros((total, reader.frames, *p.shape[2:]), np.float32) for p in part]
            for array, values in zip(arrays, part, strict=True):
                array[start:stop, :length] = values
            start = stop
        for array in arrays:
            array.flags.writeable = False  # windows are views of it
        return arrays[0], arrays[1]

    def windows(self, chunk: int | None = None) -> Iterator[Window]:
        """All frames in order, for one streaming pass; `chunk` frames at a time (as many as fit in 64 MiB when None).

        Neighboring windows of a trajectory share one frame, so that no increment is lost. `times` run since the
        beginning of the
        trajectory: a window whose times do not begin at zero continues the one before, and its first frame was seen
            already.
        """
        if chunk is None:
            frame_bytes = self.nbytes / max(sum(self.lengths), 1)
            chunk = max(2, int(CHUNK_BYTES / max(frame_bytes, 1)))
        for trajectory, length in enumerate(self.lengths):
            for start in range(0, length, chunk):
                begin = max(start - 1, 0)
                window = self.read(trajectory, range(begin, min(start + chunk, length)))
                clock = self.reader.times.values
                since = (
                    clock[self.locate(trajectory, range(begin, begin + 1))[1].start]
                    - clock[self.locate(trajectory, range(1))[1].start]
                )
                yield dataclasses.replace(window, times=window.times + np.float32(since))

    def labels(self, trajectory: int, frames: range | None = None) -> np.ndarray:
        """Times of the frames as the file gives them: datetime64, cftime objects or numbers."""
        frames = range(self.lengths[trajectory]) if frames is None else frames
        _, inside = self.locate(trajectory, frames)
        return self.reader.times.labels[inside.start : inside.stop : inside.step]

    def to_xarray(self, trajectory: int | Sequence[int] | None = None, frames: range | None = None) -> xr.Dataset:
        """The labelled data behind one trajectory, several, or all: dimensions `trajectory`, `time`, then space.

        Coordinates, units and attributes are those of the file. Several trajectories must share their times (raises
        DataError).
        """
        chosen = range(len(self.lengths)) if trajectory is None else np.atleast_1d(trajectory).tolist()
        parts = [self._labelled(int(i), frames) for i in chosen]
        if len(parts) == 1:
            return parts[0]
        labels = [self.labels(int(i), frames) for i in chosen]
        if any(not np.array_equal(label, labels[0]) for label in labels):
            raise DataError("These trajectories have different times. Ask for one at a time.")
        if len(self.runs) == 1 and trajectory is None and self.reader.trajectory_dim:
            return self._labelled(None, frames)
        return xr.concat(parts, "trajectory", data_vars="minimal", coords="minimal", compat="override", join="override")

    def _labelled(self, trajectory: int | None, frames: range | None) -> xr.Dataset:
        from physml.data.netcdf import name_dimensions

        reader, ds = self.reader, self.ds
        length = self.lengths[trajectory or 0]
        source, inside = self.locate(trajectory or 0, range(length) if frames is None else frames)
        if reader.time_dim:
            ds = ds.isel({reader.time_dim: slice(inside.start, inside.stop, inside.step)})
        if reader.trajectory_dim and trajectory is not None:
            ds = ds.isel({reader.trajectory_dim: slice(source, source + 1)})
        ds = name_dimensions(ds)
        if "trajectory" not in ds.dims:
            moving = [n for n, v in ds.data_vars.items() if "time" in v.dims or not reader.time_dim]
            ds = ds.assign({n: ds[n].expand_dims("trajectory") for n in moving})
        leading = [d for d in ("trajectory", "time") if d in ds.dims]
        result = ds.transpose(*leading, ...)
        result.encoding["source"] = reader.source
        return result
