"""Windows from data larger than memory: blocks of stored chunks, a bounded cache of them, and an order that fits it.

A stored chunk is decompressed as a whole, so windows that were drawn from everywhere would read their chunks again and
again. Here a split is cut into *blocks* of neighboring chunks, the blocks of an epoch are shuffled, and windows are
drawn from a moving pool of open blocks: every chunk is read about once per epoch, and neighbors in the order still come
from all blocks of the pool.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

OPEN = 8  # blocks that the pool holds at least
CHUNKS = 16  # that a block holds where the pool allows it: what straddles its end costs one more
BLOCK_BYTES = 8 * 2**20
POOL = 0.7  # of the cache belongs to the pool; the rest is for blocks that are just coming or going


class Blocks:
    """How a split is cut. Block `g * len(starts) + i` holds frames `starts[i]..stops[i]` of trajectories
    `groups[g]..groups[g + 1]`, all numbered as in the file.

    A window belongs to the block of its first frame. What is read and kept of a block reaches `overhang` frames further
    (`ends`), so that windows which straddle two blocks need only one of them; chunks at the end of a block are
    therefore read for both.
    """

    def __init__(self, groups, starts, stops, ends, frame_bytes: int):
        self.groups, self.starts, self.stops, self.ends = (
            np.asarray(a, np.int64) for a in (groups, starts, stops, ends)
        )
        self.frame_bytes = frame_bytes

    def __len__(self) -> int:
        return (len(self.groups) - 1) * len(self.starts)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of every block in memory."""
        return np.outer(np.diff(self.groups), self.ends - self.starts).ravel() * self.frame_bytes

    def of(self, trajectories: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """The blocks of windows that begin at these frames, numbered as in the file."""
        group = np.searchsorted(self.groups, trajectories, side="right") - 1
        return group * len(self.starts) + np.searchsorted(self.starts, frames, side="right") - 1

    def extent(self, block: int) -> tuple[range, range]:
        """(trajectories, frames) to be read for one block."""
        group, i = divmod(int(block), len(self.starts))
        return range(*self.groups[group : group + 2].tolist()), range(int(self.starts[i]), int(self.ends[i]))


def cut(
    groups: np.ndarray, edges: np.ndarray, runs: list[range], overhang: int, frame_bytes: int, cache: int
) -> Blocks:
    """Blocks for a cache of `cache` bytes.

    Args:
        groups: first trajectories of chunks, and the end. edges: first frames of chunks, and the end.
        runs: regular runs of frames, which no window leaves.
        overhang: frames between the first and the last of a window.
        frame_bytes: of one frame of one trajectory.

    A block has 16 chunks or more, and 16 times the overhang, as far as the pool has room for eight of them. A
    chunk that is larger than half of the pool is cut (and read once for every piece).
    """
    together = int(np.diff(groups).max(initial=1))
    pool = POOL * cache
    if together * frame_bytes * (overhang + 1) > pool / 2:  # not even one frame of all of them fits: one at a time
        groups, together = np.arange(int(groups[-1]) + 1), 1
    chunk = int(np.median(np.diff(edges)))
    bytes_per_frame = max(1, together * frame_bytes)
    wanted = max(CHUNKS * chunk, CHUNKS * overhang, BLOCK_BYTES // bytes_per_frame)
    room = max(1, int(pool / OPEN) // bytes_per_frame - overhang)
    frames = max(1, min(wanted, room))
    whole = max(frames, int(pool / 2) // bytes_per_frame - overhang)  # a single chunk may be as large as this
    starts, stops, ends = [], [], []
    for run in runs:
        inner = [run.start, *edges[(edges > run.start) & (edges < run.stop)].tolist(), run.stop]
        first = run.start
        for here, following in zip(inner[1:], [*inner[2:], None], strict=True):
            if following is not None and following - first <= frames:
                continue
            size = here - first
            pieces = 1 if size <= whole else -(-size // frames)
            cuts = [first + size * i // pieces for i in range(pieces + 1)]
            starts += cuts[:-1]
            stops += cuts[1:]
            ends += [min(stop + overhang, run.stop) for stop in cuts[1:]]
            first = here
    return Blocks(groups, starts, stops, ends, frame_bytes)


def pooled_order(blocks: np.ndarray, sizes: np.ndarray, pool: float, random: np.random.Generator) -> np.ndarray:
    """An order of windows that keeps about `pool` bytes of blocks open.

    `blocks` says to which block each window belongs, `sizes` gives the bytes of every block. Blocks come in random
    order, each is laid at the sum of the sizes before it, and each of its windows at a random distance up to `pool`
    behind: at any place, the windows come from the blocks of the last `pool` bytes. At the beginning, where
    fewer blocks would be open, the windows of the whole first pool are shuffled together, and likewise at the end.
    """
    present, member = np.unique(blocks, return_inverse=True)
    order = random.permutation(len(present))
    ends = np.cumsum(sizes[present][order])
    place = np.empty(len(present))
    place[order] = ends - sizes[present][order]
    key = place[member] + pool * random.random(len(blocks))
    total = float(ends[-1]) if len(ends) else 0.0
    if total <= pool:
        return random.permutation(len(blocks))
    head, tail = key < pool, key >= max(pool, total - float(sizes[present[order[-1]]]))
    key[head] = random.uniform(0, pool, head.sum())
    key[tail] = total + random.random(tail.sum())
    return np.argsort(key, kind="stable")


class Cache:
    """Values by key, the least recently used ones dropped beyond `limit` bytes. Each is made once, also by threads that
    ask at the same time; a failure is not kept.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, Future] = OrderedDict()
        self._sizes: dict[Any, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def get(self, key: Any, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """The arrays of `key`; `make()` gives those that are not kept."""
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if mine:
                entry = self._entries[key] = Future()
            self._entries.move_to_end(key)
        if mine:
            try:
                arrays = make()
            except BaseException as error:
                with self._lock:
                    del self._entries[key]
                entry.set_exception(error)
                raise
            entry.set_result(arrays)
            with self._lock:
                self._sizes[key] = sum(array.nbytes for array in arrays)
                self._shrink(key)
        return entry.result()

    def _shrink(self, newest: Any) -> None:
        total = self.nbytes
        for key in [key for key in self._entries if key in self._sizes and key != newest]:
            if total <= self.limit:
                return
            total -= self._sizes.pop(key)
            del self._entries[key]
