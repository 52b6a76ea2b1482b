"""Place in an endless order -> sample number -> (trajectory, start, stride): pure index arithmetic.

A position is one integer, and what comes there is a function of it and the seed alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from physml.data.windows import pooled_order
from physml.errors import ConfigError


class Sample(NamedTuple):
    """Where one window lies: frames `start, start + stride, ...` of `trajectory`."""

    trajectory: int
    start: int
    stride: int


@dataclass(frozen=True)
class Samples:
    """All windows of `frames` frames that fit into trajectories of the given lengths.

    Numbers run over strides, then trajectories, then starts. A window never leaves its trajectory.

    Attributes:
        lengths: frames per trajectory.
        frames: frames per window.
        strides: distances of frames inside a window.
        every: distance of the starts of neighboring windows.
    """

    lengths: tuple[int, ...]
    frames: int
    strides: tuple[int, ...] = (1,)
    every: int = 1

    def __post_init__(self):
        if self.frames < 1 or self.every < 1 or not self.strides or min(self.strides) < 1:
            raise ConfigError(
                f"Windows of {self.frames} frames with strides {self.strides}, every {self.every} frames: all must be "
                "at least 1."
            )
        per_stride = [
            np.maximum(
                0, (np.asarray(self.lengths, np.int64) - (self.frames - 1) * stride + self.every - 1) // self.every
            )
            for stride in self.strides
        ]
        # cumulative number of samples up to and including (stride, trajectory)
        object.__setattr__(self, "_ends", np.cumsum(np.concatenate([np.zeros(0, np.int64), *per_stride])))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        trajectories, starts, strides = self.locate(np.array([number]))
        return Sample(int(trajectories[0]), int(starts[0]), int(strides[0]))

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(trajectories, starts, strides) of many sample numbers."""
        cell = np.searchsorted(self._ends, numbers, side="right")
        before = np.where(cell > 0, self._ends[np.maximum(cell - 1, 0)], 0)
        stride, trajectory = np.divmod(cell, max(len(self.lengths), 1))
        return trajectory, (np.asarray(numbers) - before) * self.every, np.asarray(self.strides)[stride]

    def number(self, trajectories: np.ndarray, starts: np.ndarray, strides: np.ndarray) -> np.ndarray:
        """The inverse of `locate`."""
        row = np.array([self.strides.index(stride) for stride in np.asarray(strides).tolist()], np.int64)
        cell = row * len(self.lengths) + trajectories
        before = np.where(cell > 0, self._ends[np.maximum(cell - 1, 0)], 0)
        return before + np.asarray(starts) // self.every


class Order(Protocol):
    """An endless order of sample numbers with random access."""

    def at(self, places: np.ndarray) -> np.ndarray:
        """The sample numbers at these places."""
        ...

    def lanes(self, numbers: np.ndarray) -> np.ndarray:
        """`(number,)` in [0, 1): samples that are read together have the same lane at all times."""
        ...


class Shuffled:
    """Epoch after epoch of all samples, each in an order of its own, which depends on (seed, epoch) alone.

    Args:
        samples: how many there are.
        blocks: the block of each sample, where samples are read in blocks. sizes: bytes of every block.
        pool: bytes of blocks from which the order draws at a time, see `physml.data.windows.pooled_order`.
    """

    def __init__(self, samples: int, seed: int, blocks: np.ndarray | None = None, sizes=None, pool: float = 0.0):
        self.samples, self.seed, self.blocks, self.sizes, self.pool = samples, seed, blocks, sizes, pool
        self._epoch = functools.lru_cache(maxsize=3)(self._shuffle)

    def at(self, places: np.ndarray) -> np.ndarray:
        epochs, inside = np.divmod(places, self.samples)
        result = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            result[epochs == epoch] = self._epoch(epoch)[inside[epochs == epoch]]
        return result

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = _random(self.seed, epoch)
        if self.blocks is None:
            return random.permutation(self.samples)
        return pooled_order(self.blocks, self.sizes, self.pool, random)

    @functools.cached_property
    def _lanes(self) -> np.ndarray:
        return np.random.Generator(np.random.Philox(self.seed)).random(len(self.sizes))

    def lanes(self, numbers: np.ndarray) -> np.ndarray:
        return np.zeros(len(numbers)) if self.blocks is None else self._lanes[self.blocks[numbers]]


class Mixed:
    """An endless order in which several orders take part by whole weights.

    Among the first n samples, part j has n * weight_j / sum(weights) up to one and up to the shuffling inside a round
    of a few dozen samples; the fraction is rounded by a random offset, so that the expectation is exact. Each part goes
    through its own order without leaving anything out.

    Args:
        orders: of the parts. numbers: of each part, the sample number here of each of its own sample numbers.
        weights: whole numbers above zero.
    """

    def __init__(self, orders: Sequence[Order], numbers: Sequence[np.ndarray], weights: Sequence[int], seed: int):
        self.orders, self.numbers, self.seed = orders, numbers, seed
        self.bounds = np.cumsum([0, *weights])  # of the parts, along one round through all weights
        self.total = int(self.bounds[-1])
        self.round = max(64, -(-2 * self.total // min(weights)))  # two samples of the rarest part, or more
        self.offset = int(_random(seed, 2**31).integers(self.total))
        self._round = functools.lru_cache(maxsize=8)(self._deal)

    def drawn(self, samples: int) -> np.ndarray:
        """How many of the first `samples` belong to each part; exact at the end of a round."""
        upto = [(samples * int(bound) + self.offset) // self.total for bound in self.bounds]
        return np.diff(upto)

    def _deal(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(part, place in the order of that part) of the samples of one round."""
        before, after = self.drawn(number * self.round), self.drawn((number + 1) * self.round)
        parts = np.repeat(np.arange(len(before)), after - before)
        parts = _random(self.seed, 2**31, number).permutation(parts)
        places = np.empty(len(parts), np.int64)
        for part, first in enumerate(before.tolist()):
            places[parts == part] = first + np.arange((parts == part).sum())
        return parts, places

    def at(self, places: np.ndarray) -> np.ndarray:
        rounds, inside = np.divmod(places, self.round)
        result = np.empty(len(places), np.int64)
        for number in np.unique(rounds).tolist():
            rows = np.flatnonzero(rounds == number)
            parts, own = (array[inside[rows]] for array in self._round(number))
            for part in np.unique(parts).tolist():
                chosen = parts == part
                result[rows[chosen]] = self.numbers[part][self.orders[part].at(own[chosen])]
        return result

    @functools.cached_property
    def _lanes(self) -> np.ndarray:
        result = np.zeros(sum(map(len, self.numbers)))
        for order, numbers in zip(self.orders, self.numbers, strict=True):
            result[numbers] = order.lanes(np.arange(len(numbers)))
        return result

    def lanes(self, numbers: np.ndarray) -> np.ndarray:
        return self._lanes[numbers]


def _random(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
