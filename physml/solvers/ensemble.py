"""Many trajectories of a solver at once, in memory: what `physml.data.generate` stores chunk by chunk."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from physml.errors import DivergedError
from physml.solvers.solver import Solver

SPLITS = ("train", "valid", "test")  # the position is part of the random keys: never reorder
POINTS_AT_ONCE = {"cpu": 2**15, "other": 2**20}  # grid points solved together: caches of a CPU, occupancy of the others
BLOCK_BYTES = 2**26  # stored frames kept on the device between two looks at them


class Trajectories(NamedTuple):
    """Frames `(batch, steps + 1, *space, channel)`, drawn parameters by name, each `(batch,)`, and the fields without
    time `(batch, *space, static)` or None. Numpy arrays; fields are float32.
    """

    frames: np.ndarray
    drawn: dict[str, np.ndarray]
    static: np.ndarray | None


def warmup_steps(solver: Solver) -> int:
    """Stored steps between the random initial state and the first frame."""
    return round(solver.warmup / solver.time_step)


def usual_batch(solver: Solver) -> int:
    """Trajectories that are worth solving together on this machine."""
    limit = POINTS_AT_ONCE.get(jax.default_backend(), POINTS_AT_ONCE["other"])
    return max(1, limit // solver.cells)


@contextlib.contextmanager
def precision(solver: Solver) -> Iterator[None]:
    """The solver's precision and fixed random numbers, whatever the caller's settings; in this thread only."""
    with jax.enable_x64(solver.precision == "float64"), jax.threefry_partitionable(True):
        yield


def usual_workers() -> int:
    """Batches that are worth solving at the same time: one trajectory does not keep several CPU cores busy."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Ensemble:
    """The compiled solver of `batch` trajectories at a time, advanced a block of steps at a time.

    Args:
        solver: a config of `physml.solvers.SOLVERS`.
        steps: stored steps of every trajectory.
        batch: trajectories solved together.
        seed: with `split`, decides all random numbers. Trajectory i has a key of its own, whatever the batch.
        split: one of SPLITS.

    To be made and used within `precision(solver)`; threads may share one.
    """

    def __init__(self, solver: Solver, steps: int, batch: int, seed: int = 0, split: str = "train"):
        self.solver, self.steps, self.batch = solver, steps, batch
        self.shape = (*solver.grid.shape, len(solver.channels))
        frame_bytes = 4 * batch * int(np.prod(self.shape))
        block = max(1, min(BLOCK_BYTES // frame_bytes, max(steps, warmup_steps(solver)) // 4))
        self.block = 2 ** (
            block.bit_length() - 1
        )  # few sizes, so that splits find the program in the compilation cache
        self.key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), SPLITS.index(split))
        self._start_one = jax.jit(self._start)
        self._static = jax.jit(jax.vmap(lambda state: solver.observe_static(state).astype(jnp.float32)))
        self.advance = jax.jit(jax.vmap(self._advance, in_axes=(0, 0, None)))
        self._compiling = threading.Lock()

    def run(
        self, first: int, needed: int | None = None, advanced: Callable[[int], None] = lambda steps: None
    ) -> Trajectories:
        """Trajectories `first` to `first + batch - 1`, of which `needed` must stay finite.

        `advanced` is told the number of steps taken so far. Raises DivergedError, naming trajectory and time.
        """
        warmup, done = warmup_steps(self.solver), 0
        with self._compiling:  # threads that run together would each compile
            state, drawn, frame = self.start(first)
            if self.steps + warmup:
                self.advance(state, drawn, 0)
        result = np.empty((self.batch, self.steps + 1, *self.shape), np.float32)
        result[:, 0] = frame
        self._check(np.isfinite(result[:needed, 0]).all(axis=tuple(range(1, result.ndim - 1)))[:, None], first, -1)
        static = np.asarray(self._static(state)) if self.solver.statics else None
        for begin, end in itertools.chain(_blocks(warmup, self.block), _blocks(self.steps, self.block)):
            count = end - begin
            state, frames, finite = self.advance(state, drawn, count)
            self._check(np.asarray(finite)[:needed, :count], first, done)
            if done >= warmup:
                result[:, begin + 1 : end + 1] = frames[:, :count]
            elif end == warmup:
                result[:, 0] = frames[:, count - 1]
            done += count
            advanced(done)
        return Trajectories(result, {name: np.asarray(values, np.float64) for name, values in drawn.items()}, static)

    def start(self, first: int) -> tuple[Any, dict[str, Any], Any]:
        """Initial states, drawn parameters and first frames (without warm-up) of `batch` trajectories from `first` on.

        One by one: sums and matrix products round differently in batches of another size, and chaos would show it.
        The steps have none, so they give equal bits in any batch.
        """
        each = [self._start_one(self.key, index) for index in range(first, first + self.batch)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def _start(self, key, index):
        """Initial state, drawn parameters and first frame of trajectory `index`."""
        first, second = jax.random.split(jax.random.fold_in(key, index))
        drawn = self.solver.draw(second, index)
        state = self.solver.initial(first, **drawn)
        return state, drawn, self.solver.observe(state).astype(jnp.float32)

    def _advance(self, state, drawn, count):
        """`count` steps (at most `block`): the state, the stored frames, and which of them are finite."""
        step = self.solver.stepper(**drawn)

        def body(i, carry):
            state, frames = carry
            state = step(state)
            return state, frames.at[i].set(self.solver.observe(state).astype(jnp.float32))

        frames = jnp.zeros((self.block, *self.shape), jnp.float32)
        state, frames = jax.lax.fori_loop(0, count, body, (state, frames))
        return state, frames, jnp.isfinite(frames).all(axis=tuple(range(1, frames.ndim)))

    def _check(self, finite: np.ndarray, first: int, done: int) -> None:
        if finite.all():
            return
        solver, at = self.solver, int(np.argmin(finite.all(axis=0)))
        time = (done + at + 1) * solver.time_step
        raise DivergedError(
            f"{type(solver).__name__}: trajectory {first + int(np.argmin(finite[:, at]))} is not finite at time "
            f"{time:g}, counted from the random initial state. {solver.advice}"
        )


def _blocks(steps: int, block: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + block, steps)) for i in range(0, steps, block))
