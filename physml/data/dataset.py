"""One split of labelled data as a `Dataset`: random access to windows, from the file or from memory."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from physml.contracts import Dataset
from physml.data import clock as ck
from physml.data.channels import source_of
from physml.data.reader import Reader
from physml.data.sampling import Samples, Shuffled
from physml.data.windows import POOL, Blocks, Cache, cut
from physml.errors import DataError
from physml.fields import Spec, Window

MEMORY_LIMIT = 2 * 2**30  # bytes of a split that are kept in memory
STREAM_SHARE = 2  # a larger split streams through a cache of this part of the limit
CHUNK_BYTES = 64 * 2**20  # read at once
PASS_BYTES = 16 * 2**20  # of a window of a pass over everything

Block = tuple[range, range, tuple[np.ndarray, ...]]  # (trajectories, frames, parts), numbered as in the file


class XarrayDataset:
    """Implements `physml.contracts.Dataset` over an xarray dataset with any dimension order.

    Where the time axis jumps, every regular run is a trajectory of its own, so a window never crosses a jump.

    Attributes:
        spec: names, units and grid; arrays come in its order.
        lengths: frames of every trajectory (of every run of every trajectory).
    """

    def __init__(self, ds: xr.Dataset, spec: Spec):
        self.ds, self.spec = ds, spec
        self.reader = Reader(ds, spec)
        self.reader.check_units()
        self.reader.check_step()
        self.runs = ck.segments(self.reader.times, spec.time_step)
        self.lengths = tuple(max(0, min(run.stop, n) - run.start) for n in self.reader.lengths for run in self.runs)
        self._arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        self._lock = threading.Lock()
        self._stream: tuple[Blocks, Cache] | None = None
        self._lengths, self._begins = np.array(self.lengths), np.array([run.start for run in self.runs])

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
        values, forcing = self._values(source, inside)
        return self.reader.window(source, inside, values, forcing)

    def _values(self, source: int, frames: range) -> tuple[np.ndarray, np.ndarray]:
        """Frames and forcing `(time, *space, channel)` of one trajectory of the file."""
        if self._arrays is not None:
            piece = slice(frames.start, frames.stop, frames.step)
            return tuple(array[source, piece] for array in self._arrays)
        if self._stream is not None and len(frames):
            result = self._empty((len(frames),))
            self._copy(self._block(int(self._stream[0].of(source, frames[0]))), source, frames, result)
            return result
        return tuple(array[0] for array in self.reader.arrays(range(source, source + 1), frames))

    def _block(self, number: int) -> Block:
        blocks, cache = self._stream
        trajectories, kept = blocks.extent(number)
        kept = range(kept.start, min(kept.stop, self.reader.lengths[trajectories.start]))
        return trajectories, kept, cache.get((blocks, number), lambda: self.reader.parts(trajectories, kept))

    def _copy(self, block: Block, source: int, frames: range, result: tuple[np.ndarray, np.ndarray]) -> None:
        """Writes frames that begin in a block, from it if it holds them all, else from the file."""
        trajectories, kept, parts = block
        if frames[-1] in kept:
            piece = slice(frames.start - kept.start, frames.stop - kept.start, frames.step)
            parts = [values[:, source - trajectories.start, piece] for values in parts]
        else:
            parts = [values[:, 0] for values in self.reader.parts(range(source, source + 1), frames)]
        self.reader.put(parts, result)

    def _empty(self, leading: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        shape = (*leading, *self.spec.grid.shape)
        return tuple(np.empty((*shape, len(group)), np.float32) for group in (self.spec.channels, self.spec.forcing))

    def read_batch(self, trajectories: np.ndarray, starts: np.ndarray, strides: np.ndarray, frames: int) -> Window:
        """Windows of `frames` frames, `strides` apart, stacked along a batch axis. One gather when the split is in
        memory.
        """
        self._check_inside(trajectories, starts, starts + (frames - 1) * strides)
        sources, first = self._place(trajectories, starts)
        index = first[:, None] + strides[:, None] * np.arange(frames)
        if self._arrays is not None:
            values, forcing = (array[sources[:, None], index] for array in self._arrays)
        else:
            values, forcing = self._gather(sources, index, strides)
        times, calendar = self.reader.clock_of(index)
        own, row = np.unique(sources, return_inverse=True)
        static = np.stack([self.reader.static(i) for i in own.tolist()])[row]
        mask = np.stack([self.reader.mask(i) for i in own.tolist()])[row] if self.reader.masked else None
        return Window(values, times, calendar, self.reader.parameters[sources], forcing, static, mask, self.spec)

    def _gather(self, sources: np.ndarray, index: np.ndarray, strides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames `index (window, time)` of trajectories of the file, each window out of the block of its first one."""
        result = self._empty(index.shape)
        places = zip(sources.tolist(), index[:, 0].tolist(), index[:, -1].tolist(), strides.tolist(), strict=True)
        numbers = [None] * len(sources) if self._stream is None else self._stream[0].of(sources, index[:, 0]).tolist()
        last, block = None, None
        for row, ((source, start, stop, stride), number) in enumerate(zip(places, numbers, strict=True)):
            frames, window = range(start, stop + 1, stride), tuple(array[row] for array in result)
            if number is None:
                self.reader.put([v[:, 0] for v in self.reader.parts(range(source, source + 1), frames)], window)
                continue
            if number != last:
                last, block = number, self._block(number)
            self._copy(block, source, frames, window)
        return result

    def _place(self, trajectories: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(trajectories, frames) of the file of frames of runs."""
        sources, run = np.divmod(trajectories, len(self.runs))
        return sources, self._begins[run] + starts

    def _check_inside(self, trajectories: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        known = (trajectories >= 0) & (trajectories < len(self.lengths))
        lengths = self._lengths[np.where(known, trajectories, 0)]
        for bad in np.flatnonzero(~known | (first < 0) | (last >= lengths))[:1].tolist():
            self.locate(int(trajectories[bad]), range(int(first[bad]), int(last[bad]) + 1))

    def preload(self, limit: int = MEMORY_LIMIT) -> bool:
        """Keeps the split in memory when it needs at most `limit` bytes; says whether it is in memory."""
        with self._lock:
            if self._arrays is None and self.nbytes <= limit:
                self._arrays = self._whole()
                self.reader.keep_static()
        return self._arrays is not None

    def prepare(
        self, samples: Samples, memory: int = MEMORY_LIMIT, count: int | None = None, readers: int = 1
    ) -> Blocks | None:
        """Gets ready to read windows of `samples`: all of them, or `count` that are evenly spread.

        A split of at most `memory` bytes is kept in memory. A larger one in a chunked file is read through a cache of
        blocks of chunks, half of `memory`; the result are those blocks, small enough for so many `readers` of one
        cache. Each window is read for itself where nothing says how the file is stored, or where windows are fewer than
        blocks.
        """
        if self.preload(memory):
            return None
        self._stream = None
        chunks = self.reader.chunks()
        if chunks is None:
            return None
        overhang = (samples.frames - 1) * max(samples.strides)
        frame_bytes = self.nbytes // max(sum(self.lengths), 1)
        blocks = cut(*chunks, self.runs, overhang, frame_bytes, memory // (STREAM_SHARE * readers))
        if count is not None and count < len(blocks):
            return None
        self._stream = blocks, Cache(memory // STREAM_SHARE)
        return blocks

    def shuffled(self, samples: Samples, seed: int, memory: int = MEMORY_LIMIT, readers: int = 1) -> Shuffled:
        """An endless random order of windows, after `prepare`: where they are read through blocks, it draws from those
        that are open together. Each of `readers` has an equal part of the cache for these, so that its order depends on
        how many there are.
        """
        blocks = self.prepare(samples, memory, readers=readers)
        if blocks is None:
            return Shuffled(len(samples), seed)
        trajectories, starts, _ = samples.locate(np.arange(len(samples)))
        of = blocks.of(*self._place(trajectories, starts))
        return Shuffled(len(samples), seed, of, blocks.sizes, POOL * memory // (STREAM_SHARE * readers))

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
        """All frames in order, for one streaming pass; `chunk` frames at a time, at least two (whole stored chunks of
        about 16 MiB when None). Each frame is read once.

        Neighboring windows of a trajectory share one frame, so that no increment is lost. `times` run since the
        beginning of the trajectory: a window whose times do not begin at zero continues the one before, and its first
        frame was seen already.
        """
        frame_bytes = max(1, self.nbytes // max(sum(self.lengths), 1))
        if chunk is None:
            stored = self.reader.chunks()
            whole = 1 if stored is None else int(np.median(np.diff(stored[1])))
            chunk = max(1, PASS_BYTES // frame_bytes)
            chunk = max(chunk // whole, 1) * whole if whole * frame_bytes <= CHUNK_BYTES else chunk
        chunk = max(chunk, 2)  # the window after a single frame would begin at time zero too
        clock, runs = self.reader.times.values, len(self.runs)
        for sources, whole in self._read_ahead(PASS_BYTES // frame_bytes):
            for trajectory in range(sources.start * runs, sources.stop * runs):
                source, frames = self.locate(trajectory, range(self.lengths[trajectory]))
                last: tuple[np.ndarray, ...] = ()
                for start in range(frames.start, frames.stop, chunk):
                    piece = range(start, min(start + chunk, frames.stop))
                    if whole is None:
                        arrays = self._values(source, piece)
                    else:
                        arrays = tuple(array[source - sources.start, piece.start : piece.stop] for array in whole)
                    if last:
                        arrays = tuple(map(np.concatenate, zip(last, arrays, strict=True)))
                    piece = range(piece.start - bool(last), piece.stop)
                    last = tuple(array[-1:].copy() for array in arrays)
                    window = self.reader.window(source, piece, *arrays)
                    since = np.float32(clock[piece.start] - clock[frames.start])
                    yield dataclasses.replace(window, times=window.times + since)

    def _read_ahead(self, room: int) -> Iterator[tuple[range, tuple[np.ndarray, np.ndarray] | None]]:
        """Trajectories of the file with all their frames: several at once where `room` frames hold them, else one and
        None.
        """
        lengths, start = self.reader.lengths, 0
        while start < len(lengths):
            most = max(1, room // lengths[start])
            fits = lengths[start] <= room and self._arrays is None
            alike = (i for i in range(start, len(lengths)) if lengths[i] != lengths[start] or i - start >= most)
            stop = next(alike, len(lengths)) if fits else start + 1
            sources = range(start, stop)
            yield sources, self.reader.arrays(sources, range(lengths[start])) if fits else None
            start = stop

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


def windows_of(dataset: Dataset, chunk: int | None = None) -> Iterator[Window]:
    """All frames of a dataset of any kind in order, as `XarrayDataset.windows`: by its own `windows` where it has one,
    else by `read`."""
    if hasattr(dataset, "windows"):
        yield from dataset.windows(chunk)
        return
    frame_bytes = 4 * max(int(np.prod(dataset.spec.grid.shape)) * len(dataset.spec.channels), 1)
    chunk = max(chunk or PASS_BYTES // frame_bytes, 2)
    for trajectory, total in enumerate(dataset.lengths):
        for start in range(0, total, chunk):
            first = max(start - 1, 0)
            window = dataset.read(trajectory, range(first, min(start + chunk, total)))
            times = np.asarray(window.times)
            since = np.float32(first * dataset.spec.time_step)
            yield dataclasses.replace(window, times=times - times[:1] + since)
