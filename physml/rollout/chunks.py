"""Rollouts of any length in chunks of constant memory; the host reads one chunk while the next one runs."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Window
from physml.rollout.ledger import Ledger, measure
from physml.rollout.scan import check_window


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames on the host.

    Attributes:
        start: steps before the first of these frames.
        frames: `(batch, lead, *space, channel)`.
        ledger: arrays `(batch, lead, channel)`.
        initial: ledger of the state that the rollout began from, `(batch, channel)`.
    """

    start: int
    frames: np.ndarray
    ledger: Ledger
    initial: Ledger


def rollout_chunks(
    stepper,
    window: Window,
    steps: int,
    chunk: int,
    key=None,
    *,
    forcing: Callable[[int, int], np.ndarray] | None = None,
) -> Iterator[Chunk]:
    """The frames of `rollout`, the same bits, in pieces of `chunk` steps (the last one may be shorter).

    Every chunk runs the same compiled loop, whose length is data: any number of steps needs one trace. A chunk is
    started before the one ahead of it is handed out, so that writing overlaps with computing.

    Args:
        forcing: `(first, last) -> (batch, last - first, *space, forcing)` of the frames that steps first..last predict;
            what `window.forcing` holds when None.

    Raises SpecError for a window that cannot start the rollout, at once and not at the first chunk.
    """
    if steps < 1 or chunk < 1:
        raise ConfigError(f"steps is {steps} and chunk {chunk}, but both count frames: at least 1.")
    check_window(stepper, window, None if forcing else steps)
    return _generate(stepper, window, steps, min(chunk, steps), key, forcing)


def _generate(stepper, window: Window, steps: int, chunk: int, key, forcing) -> Iterator[Chunk]:
    history = stepper.history
    graph, numbers = nnx.split(stepper)
    pieces = _Pieces(window, history, chunk, forcing)
    fixed = jax.device_put(replace(window, frames=window.frames[:, :history], **pieces.cut(0, 1)))
    carry, initial = _begin(graph, numbers, fixed, key)
    # The carry is given away to each chunk: it must not be an array of the caller.
    carry, initial = jax.tree.map(jnp.copy, carry), jax.tree.map(np.asarray, initial)
    fixed = replace(fixed, frames=fixed.frames[:, :0])
    ahead = None
    for start in range(0, steps, chunk):
        count = min(chunk, steps - start)
        piece = replace(fixed, **pieces.cut(start, count))
        carry, frames, ledger = _advance(graph, numbers, piece, carry, start, count, key, initial.mean, chunk=chunk)
        for leaf in jax.tree.leaves((frames, ledger)):
            leaf.copy_to_host_async()
        if ahead is not None:
            yield _on_host(*ahead, initial)
        ahead = (start, count, frames, ledger)
        del frames, ledger
    yield _on_host(*ahead, initial)


def _on_host(start: int, count: int, frames, ledger, initial) -> Chunk:
    """Time first on the device, batch first for everybody else."""
    frames, ledger = jax.tree.map(lambda a: np.moveaxis(np.asarray(a)[:count], 0, 1), (frames, ledger))
    return Chunk(start, frames, ledger, initial)


class _Pieces:
    """Times, calendar and forcing of one chunk: `chunk + 1` entries, the first for the frame before it."""

    def __init__(self, window: Window, history: int, chunk: int, forcing):
        self.window, self.history, self.chunk, self.forcing = window, history, chunk, forcing
        self.times, self.calendar = np.asarray(window.times), np.asarray(window.calendar)

    def cut(self, start: int, count: int) -> dict[str, np.ndarray]:
        first = self.history + start - 1
        index = first + np.arange(self.chunk + 1)
        at = np.clip(index, 0, self.times.shape[1] - 1)
        step = self.times.dtype.type(self.window.spec.time_step)
        beyond = (index - at).astype(self.times.dtype) * step
        return {
            "times": self.times[:, at] + beyond,
            "calendar": self.calendar[:, at],
            "forcing": self._forcing(first + 1, count),
        }

    def _forcing(self, first: int, count: int) -> np.ndarray:
        if self.forcing is not None:
            array = np.asarray(self.forcing(first - self.history, first - self.history + count), np.float32)
        else:
            array = np.asarray(self.window.forcing[:, first : first + count])
        if not self.window.spec.forcing:
            return np.zeros((array.shape[0], self.chunk + 1, *array.shape[2:]), array.dtype)
        before = array[:, :1]  # only the clock of that frame is asked for
        after = np.repeat(array[:, -1:], self.chunk - count, axis=1)
        return np.concatenate([before, array, after], axis=1)


def _frame_of(decoded):
    """The frame that is kept: the mean of a stepper that decodes to a distribution."""
    return decoded if isinstance(decoded, jax.Array) else decoded.mean


@functools.partial(jax.jit, static_argnames=("graph",))
def _begin(graph, numbers, piece: Window, key):
    stepper = nnx.merge(graph, numbers)
    state = stepper.encode(piece.frames, piece.context(0, 1, key))
    return state, measure(_frame_of(stepper.decode(state)), piece.spec, piece.mask)


@functools.partial(jax.jit, static_argnames=("graph", "chunk"), donate_argnames=("carry",))
def _advance(graph, numbers, piece: Window, carry, start, count, key, reference, *, chunk: int):
    """`count` steps from step `start` on; frames and ledger come in buffers of `chunk` leads."""
    stepper = nnx.merge(graph, numbers)

    def step(state, i):
        step_key = None if key is None else jax.random.fold_in(key, start + i)
        state = stepper.advance(state, piece.context(i, 1, step_key))
        frame = _frame_of(stepper.decode(state))
        return state, (frame, measure(frame, piece.spec, piece.mask, reference))

    shapes = jax.eval_shape(step, carry, jnp.int32(0))[1]
    buffers = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), shapes)

    def body(i, loop):
        state, buffers = loop
        state, now = step(state, i)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return state, jax.tree.map(put, buffers, now)

    # A loop of dynamic length, not a scan: the last, shorter chunk needs neither a trace of its own nor idle steps.
    carry, (frames, ledger) = jax.lax.fori_loop(0, count, body, (carry, buffers))
    return carry, frames, ledger
