"""Batches of windows on Grain: shuffled, prefetched by threads, and positioned by one integer.

The order is a function of (seed, epoch) alone. Every process computes the same global batches and reads its own
contiguous share, so a run continues on another number of processes with the same samples in the same order. Data larger
than memory are streamed in an order that reads every stored chunk about once per epoch (`physml.data.windows`); it
depends on the size of the cache, too, and on how many loaders share it.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from physml.contracts import Dataset
from physml.data.dataset import MEMORY_LIMIT
from physml.data.sampling import Order, Samples, Shuffled
from physml.errors import ConfigError, DataError
from physml.fields import Window, stack


class Loader:
    """Iterates over this process's share of the batches, as stacked host windows `(batch / process_count, frames,
    ...)`.

    With `shuffle` it never ends: epochs follow each other, each in a new order, and a batch may hold the end of one
    epoch and the beginning of the next. Without, it is one pass in order; its last batch is smaller, or, with `pad`,
    filled up with the last sample, and `weights` says which samples count.

    Batches are read in threads beside the program. Open netCDF files with `physml.open_dataset` or `DataConfig`: packed
    fields and dask arrays that xarray itself opened go through the netCDF library, which crashes when the program opens
    or writes another file meanwhile.

    Args:
        dataset: any `physml.contracts.Dataset`. One with `shuffled` and `prepare` chooses its own order and gets ready
            for it: that of files is kept in memory when it needs at most `memory` bytes, and else streamed through a
            cache of half of `memory`.
        frames: frames per window. batch: windows per global batch.
        seed: of the order.
        process_index, process_count: this process and how many share a batch.
        threads: batches read in parallel (local zarr and netCDF-4 files already decode the chunks of one batch in
            parallel: more threads pay for remote files). prefetch: batches kept ready.
        strides: distances of frames inside a window. every: distance of the starts of windows.
        readers: loaders that go through these data at the same time and share that cache, as for an ensemble: the order
            of streamed data then needs only its part of the cache.

    Raises ConfigError when the batch cannot be shared, DataError when no window fits into any trajectory.
    """

    def __init__(
        self,
        dataset: Dataset,
        frames: int,
        batch: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 1,
        prefetch: int = 4,
        shuffle: bool = True,
        pad: bool = False,
        strides: Sequence[int] = (1,),
        every: int = 1,
        memory: int = MEMORY_LIMIT,
        readers: int = 1,
    ):
        self.dataset, self.frames, self.batch, self.seed = dataset, frames, batch, seed
        self.process_index, self.process_count, self.shuffle, self.pad = process_index, process_count, shuffle, pad
        self.threads, self.prefetch = threads, prefetch
        self.samples = Samples(tuple(dataset.lengths), frames, tuple(strides), every)
        self._check()
        self.order: Order = Shuffled(len(self.samples), seed)
        if shuffle and hasattr(dataset, "shuffled"):
            self.order = dataset.shuffled(self.samples, seed, memory, readers)
        elif hasattr(dataset, "prepare"):
            dataset.prepare(self.samples, memory)
        self.step = 0
        self._iterator = None

    def _check(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but it must not be negative.")
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(f"process_index is {self.process_index}, but it must be in 0..{self.process_count - 1}.")
        if self.batch < 1 or self.batch % self.process_count:
            near = max(self.process_count, round(self.batch / self.process_count) * self.process_count)
            raise ConfigError(
                f"A batch of {self.batch} windows cannot be shared by {self.process_count} processes. Use batch={near}."
            )
        if len(self.samples) == 0:
            longest = max(self.dataset.lengths, default=0)
            raise DataError(
                f"No window of {self.frames} frames fits: the longest of {len(self.dataset.lengths)} trajectories has "
                f"{longest} "
                "frames. Use a shorter history, fewer unrolled steps, or a longer split."
            )
        if not self.shuffle and not self.pad and self.process_count > 1 and len(self.samples) % self.batch:
            raise ConfigError(
                f"{len(self.samples)} windows do not divide into batches of {self.batch}: the last one cannot be "
                "shared by "
                f"{self.process_count} processes. Use pad=True and the weights."
            )

    @property
    def share(self) -> int:
        """Windows per batch that this process reads."""
        return self.batch // self.process_count

    def __len__(self) -> int:
        """Batches of a pass; with `shuffle`, full batches in an epoch (at least one)."""
        whole, rest = divmod(len(self.samples), self.batch)
        return max(1, whole) if self.shuffle else whole + (rest > 0)

    def numbers(self, step: int) -> np.ndarray:
        """Sample numbers of this process's share of batch `step`."""
        return self._share(self._stream()[step])

    def weights(self, step: int) -> np.ndarray:
        """`(share,)` float32: 1 for samples that count, 0 for those that fill up the last batch of a padded pass."""
        first = step * self.batch + self.process_index * self.share
        return (self.shuffle | (np.arange(first, first + self.share) < len(self.samples))).astype(np.float32)

    def at(self, step: int) -> "Loader":
        """Positions the loader: the next batch is batch `step`. Returns itself."""
        self.step, self._iterator = int(step), None
        return self

    def __iter__(self) -> "Loader":
        if not self.shuffle and self.step >= len(self):  # a finished pass begins again
            self.at(0)
        return self

    def __next__(self) -> Window:
        if self._iterator is None:
            self._iterator = self._start()
        window = next(self._iterator)
        self.step += 1
        return window

    def _stream(self) -> "_Endless | _Pass":
        """Global batches of sample numbers, by step."""
        if self.shuffle:
            return _Endless(self.order, self.batch)
        return _Pass(len(self.samples), self.batch, self.pad)

    def _share(self, numbers: np.ndarray) -> np.ndarray:
        begin = self.process_index * self.share
        return np.asarray(numbers)[begin : begin + self.share]

    def _read(self, numbers: np.ndarray) -> Window:
        trajectories, starts, strides = self.samples.locate(self._share(numbers))
        if hasattr(self.dataset, "read_batch"):
            return self.dataset.read_batch(trajectories, starts, strides, self.frames)
        span = (self.frames - 1) * strides + 1
        ranges = [range(s, s + n, d) for s, n, d in zip(starts.tolist(), span.tolist(), strides.tolist(), strict=True)]
        return stack([self.dataset.read(t, r) for t, r in zip(trajectories.tolist(), ranges, strict=True)])

    def _start(self):
        batches = grain.MapDataset.source(self._stream()).map(self._read)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.prefetch if self.threads else 0)
        iterator = iter(batches.to_iter_dataset(options))
        if self.step:
            iterator.set_state({"next_index": self.step})
        return iterator


@dataclasses.dataclass(frozen=True)
class _Endless:
    """Batches of sample numbers out of an order; random access, as Grain wants it.

    Inside a batch, samples stand by lanes: then each process needs the blocks of few lanes, not all that are open.
    """

    order: Order
    batch: int

    def __len__(self) -> int:
        return 2**62 // self.batch

    def __getitem__(self, step: int) -> np.ndarray:
        numbers = self.order.at(np.arange(step * self.batch, (step + 1) * self.batch))
        return numbers[np.argsort(self.order.lanes(numbers), kind="stable")]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Batches of sample numbers of one pass in order."""

    samples: int
    batch: int
    pad: bool

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def __getitem__(self, step: int) -> np.ndarray:
        numbers = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.minimum(numbers, self.samples - 1) if self.pad else numbers[numbers < self.samples]
