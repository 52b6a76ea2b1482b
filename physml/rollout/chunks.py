"""Rollouts of any length in chunks of constant memory; the host reads one chunk while the next one runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.errors import ConfigError, SpecError
from physml.fields import Context, Spec, Window
from physml.metrics.spectra import energy_spectrum, shells
from physml.rollout.ledger import Ledger, measure
from physml.rollout.scan import check_window, remembered
from physml.rollout.state import restore


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames on the host.

    Attributes:
        start: steps before these.
        frames: `(batch, lead, *space, channel)`, of the steps that `store_every` divides.
        ledger: of every step, arrays `(batch, step, channel)`; spectra of those that `spectrum_every` divides.
        initial: ledger of the state that the rollout began from, `(batch, channel)`.
        state: of the stepper after these frames, on the device. `named(state)` is what a rollout is continued from.
        std: standard deviations of the frames, of a stepper that decodes to a `Gaussian`.
    """

    start: int
    frames: np.ndarray
    ledger: Ledger
    initial: Ledger
    state: Any
    std: np.ndarray | None = None


def rollout_chunks(
    stepper,
    window: Window,
    steps: int,
    chunk: int,
    key=None,
    *,
    forcing: Callable[[int, int], np.ndarray] | None = None,
    store_every: int = 1,
    spectrum_every: int | None = None,
    resume: tuple[int, Mapping[str, Any]] | None = None,
) -> Iterator[Chunk]:
    """The frames of `rollout`, the same bits, in pieces of `chunk` steps, or of the next multiple of `store_every` (the
    last piece may be shorter).

    Every chunk runs the same compiled loop, whose length is data: any number of steps from `chunk` on needs one trace,
    fewer steps that of the next power of two. A chunk is started before the one ahead of it is handed out, so that
    writing overlaps with computing.

    Args:
        forcing: `(first, last) -> (batch, last - first, *space, forcing)` of the frames that steps first..last predict;
            what `window.forcing` holds when None. Of a part of the batch, it is repeated for the others: members along
            the batch share that of their trajectories.
        store_every: steps from one frame that is kept to the next; the others never leave the device.
        spectrum_every: steps from one energy spectrum in the ledger to the next; None: no spectra.
        resume: steps that were done before and the `named` state after them: the chunks that were still to come follow,
            the same bits when `chunk` is the same.

    Raises at once, not at the first chunk, SpecError for a window that cannot start the rollout and for spectra of a
    grid that has none, and ConfigError where `store_every` does not divide the steps, those done before or the distance
    of spectra; at the first chunk CheckpointError for a state that is not one of this stepper.
    """
    if steps < 1 or chunk < 1 or (spectrum_every is not None and spectrum_every < 1):
        raise ConfigError(
            f"steps is {steps}, chunk {chunk} and spectrum_every {spectrum_every}, but they count frames: at least 1."
        )
    check_stored(steps, store_every, spectrum_every)
    if resume is not None and resume[0] % store_every:
        raise ConfigError(
            f"resume begins after step {resume[0]}, but frames are kept of the steps that store_every={store_every} "
            "divides. Resume from the state after one of these, which is what chunks give."
        )
    check_window(stepper, window, steps, forcing=forcing is None)
    if spectrum_every:
        check_spectrum(window.spec, window.mask)
    chunk = min(chunk, 1 << (steps - 1).bit_length())  # few lengths of buffers: each is compiled for
    chunk += -chunk % store_every
    return _generate(stepper, window, steps, chunk, key, forcing, store_every, spectrum_every or 0, resume)


def check_stored(steps: int, store_every: int, spectrum_every: int | None) -> None:
    """Raises ConfigError where the frames that are kept lack the last one, or one whose spectrum is."""
    if store_every is None or store_every < 1:
        raise ConfigError(f"store_every is {store_every}, but it counts steps: at least 1, which stores every frame.")
    if steps % store_every:
        raise ConfigError(
            f"store_every is {store_every}, so of {steps} steps the last {steps % store_every} would be computed and "
            f"not kept. Take {steps + -steps % store_every} steps, or a store_every that divides them."
        )
    if spectrum_every and spectrum_every % store_every:
        raise ConfigError(
            f"spectrum_every is {spectrum_every} and store_every {store_every}, but spectra are of frames that are "
            f"kept. Use a multiple of {store_every}."
        )


def check_spectrum(spec: Spec, mask) -> None:
    """Raises SpecError where an energy spectrum is not defined: masked cells, or no axis of at least four points."""
    if mask is not None:
        raise SpecError("A field with masked cells has no energy spectrum. Leave spectrum_every out.")
    shells(spec.grid)


def _generate(
    stepper, window: Window, steps: int, chunk: int, key, forcing, stored: int, every: int, resume
) -> Iterator[Chunk]:
    """`stored` and `every` are the steps from one frame, and from one spectrum, that is kept to the next."""
    history = stepper.history
    graph, numbers = nnx.split(stepper)
    pieces = _Pieces(window, history, chunk, forcing)
    first = _Pieces(window, history, 1, forcing).cut(0, 1)  # of one length whatever the chunk
    fixed = jax.device_put(replace(window, frames=window.frames[:, :history], **first))
    carry, initial = _begin(graph, every > 0)(numbers, fixed, key)
    initial, begin = jax.tree.map(np.asarray, initial), 0
    if resume is not None:
        begin, carry = resume[0], restore(carry, resume[1])
    fixed = replace(fixed, frames=fixed.frames[:, :0])
    ahead, advance = None, _advance(graph, chunk, stored, every)
    for start in range(begin, steps, chunk):
        count = min(chunk, steps - start)
        piece = replace(fixed, **pieces.cut(start, count))
        carry, frames, ledger, std = advance(numbers, piece, carry, start, count, key, initial.mean)
        for leaf in jax.tree.leaves((frames, ledger, std)):
            leaf.copy_to_host_async()
        if ahead is not None:
            yield _on_host(*ahead, initial, stored, every)
        ahead = (start, count, carry, frames, ledger, std)
        del frames, ledger, std
    if ahead is not None:
        yield _on_host(*ahead, initial, stored, every)


def _on_host(start: int, count: int, state, frames, ledger, std, initial, stored: int, every: int) -> Chunk:
    """Time first on the device, batch first for everybody else."""
    spectra, ledger = ledger.spectrum, replace(ledger, spectrum=None)
    frames, std = jax.tree.map(lambda a: np.moveaxis(np.asarray(a)[: count // stored], 0, 1), (frames, std))
    ledger = jax.tree.map(lambda a: np.moveaxis(np.asarray(a)[:count], 0, 1), ledger)
    if every:
        measured = (start + count) // every - start // every
        ledger = replace(ledger, spectrum=np.moveaxis(np.asarray(spectra)[:measured], 0, 1))
    return Chunk(start, frames, ledger, initial, state, std)


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
            "calendar": self.calendar[:, np.clip(index, 0, self.calendar.shape[1] - 1)],
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


def _shared(context: Context) -> Context:
    """With the forcing of a part of the batch repeated for all of it: for one step, on the device."""
    forcing, batch = context.forcing, context.time.shape[0]
    if forcing.shape[0] == batch:
        return context
    return replace(context, forcing=jnp.tile(forcing, (batch // forcing.shape[0], *[1] * (forcing.ndim - 1))))


def _frame_of(decoded):
    """The frame that is kept: the mean of a stepper that decodes to a distribution."""
    return decoded if isinstance(decoded, jax.Array) else decoded.mean


@remembered
def _begin(graph, spectrum: bool):
    return jax.jit(lambda numbers, *arguments: _start(nnx.merge(graph, numbers), *arguments, spectrum))


def _start(stepper, piece: Window, key, spectrum: bool):
    state = stepper.encode(piece.frames, _shared(piece.context(0, 1, key)))
    # Python scalars in the state are weakly typed, which no file keeps: a continued rollout would promote otherwise.
    state = jax.tree.map(lambda a: jax.lax.convert_element_type(a, jnp.result_type(a)) if _weak(a) else a, state)
    frame = _frame_of(stepper.decode(state))
    ledger = measure(frame, piece.spec, piece.mask)
    if spectrum:
        ledger = replace(ledger, spectrum=energy_spectrum(frame[:, None], piece.spec.grid)[:, 0])
    return state, ledger


def _weak(leaf) -> bool:
    return getattr(jax.typeof(leaf), "weak_type", False)


@remembered
def _advance(graph, chunk: int, stored: int, every: int):
    lengths = chunk, stored, every
    return jax.jit(lambda numbers, *arguments: _loop(nnx.merge(graph, numbers), *arguments, *lengths))


def _loop(stepper, piece: Window, carry, start, count, key, reference, chunk: int, stored: int, every: int):
    """`count` steps from step `start` on; the ledger comes in buffers of `chunk` steps, frames and std of those that
    are stored. `start`, `count` and `chunk` are multiples of `stored`.
    """

    def step(state, i):
        step_key = None if key is None else jax.random.fold_in(key, start + i)
        state = stepper.advance(state, _shared(piece.context(i, 1, step_key)))
        decoded = stepper.decode(state)
        frame = _frame_of(decoded)
        std = None if frame is decoded else decoded.std
        return state, ((frame, std), measure(frame, piece.spec, piece.mask, reference))

    def buffer(rows: int, shapes):
        return jax.tree.map(lambda s: jnp.zeros((rows, *s.shape), s.dtype), shapes)

    def put(row, buffers, now):
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, row, 0), buffers, now)

    def body(i, loop):
        state, frames, ledger = loop
        state, (frame, totals) = step(state, i)
        return state, put(i // stored, frames, frame), put(i, ledger, totals)  # the last of a row's steps stays there

    frame, totals = jax.eval_shape(step, carry, jnp.int32(0))[1]
    loop = (carry, buffer(chunk // stored, frame), buffer(chunk, totals))
    # A loop of dynamic length, not a scan: the last, shorter chunk needs neither a trace of its own nor idle steps.
    carry, (frames, std), ledger = jax.lax.fori_loop(0, count, body, loop)
    if every:
        rows = every - 1 - start % every + every * jnp.arange(-(-chunk // every))
        chosen = jnp.moveaxis(frames[jnp.minimum(rows, chunk - 1) // stored], 0, 1)
        ledger = replace(ledger, spectrum=jnp.moveaxis(energy_spectrum(chosen, piece.spec.grid), 1, 0))
    return carry, frames, ledger, std
