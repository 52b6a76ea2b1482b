"""The loop over the chunks of a rollout, on the host."""

import contextlib
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from physml.errors import ConfigError, DivergedError, Interrupted
from physml.forecast import resume as resuming
from physml.forecast.ledgers import SPECTRUM_STEP, Labels
from physml.forecast.stores import LEAD
from physml.interrupt import Signals
from physml.rollout import Bounds, Chunk, Watchdog

SAVE_EVERY = 8  # chunks from one saved state of an unfinished rollout to the next


@dataclass
class Loop:
    """Watches, writes and saves the chunks of a rollout.

    Attributes:
        held: positions of the channels that exist.
        distinct: whether no two members may be the same.
        saved: the state that the rollout goes on from; later whether one is on disk.
        watch: set by the first chunk. labels: of the ledger, too.
    """

    store: Any
    spec: Any
    stepper: Any
    names: tuple[str, ...]
    members: int | None
    owner: dict[str, str]
    saved: Any
    on_divergence: str
    limit: float | None
    steps: int
    store_every: int
    spectrum_every: int | None
    held: tuple[int, ...]
    distinct: bool = True
    watch: Watchdog | None = None
    labels: Labels | None = None

    def __call__(self, pieces, progress) -> int:
        """How many steps were kept."""
        waiting: list[Chunk] = []
        with Signals() if self.store.folder else contextlib.nullcontext() as signals:
            for piece in pieces:
                if self.watch is None:
                    self._begin(piece)
                count, stopped = self._write(piece)
                done = piece.start + count
                waiting.append(_cut(piece, count, self.store_every, self.spectrum_every))
                finished = stopped or done == self.steps
                asked = signals is not None and signals.received
                if finished or asked or len(waiting) == SAVE_EVERY:
                    self._write_ledger(waiting)
                    waiting = []
                    if self.store.folder and not finished:
                        resuming.save(self.store.folder, self.owner, done, piece.state, self.store.names, self.watch)
                        self.saved = True
                if progress:
                    progress(done, self.steps)
                if stopped:
                    return done
                if asked and not finished:
                    raise Interrupted(
                        f"The rollout stopped after step {done} of {self.steps} on {asked}. Its state is saved in "
                        f'{self.store.folder}. Continue it with resume="auto" (--resume auto).'
                    )
        return self.steps

    def _begin(self, piece: Chunk) -> None:
        bounds = Bounds.of(self.stepper, piece.initial, self.limit)
        self.watch = Watchdog(self.spec, bounds, self.names, self.store_every)
        self.labels = Labels(self.spec, piece.initial, bounds, self.members, self.held)
        if self.saved:
            self.saved.put_into(self.watch)
        elif self.spectrum_every:
            self.store.extend(SPECTRUM_STEP, 0, self.labels.spectra(piece.initial.spectrum[:, None]))

    def _write(self, piece: Chunk) -> tuple[int, bool]:
        """Writes the good frames of a chunk; returns how many steps are, and whether the rollout ends there."""
        watch, frames, every, count = self.watch, piece.frames, self.store_every, piece.ledger.mean.shape[1]
        found = watch.read(piece.start, frames, piece.ledger)
        if piece.std is not None:
            frames = np.concatenate([frames, piece.std], -1)
        if self.distinct and self.members and self.members > 1 and piece.start == 0:
            self._check_members(frames)
        if self.on_divergence == "raise":
            watch.raise_first(found)
        if self.on_divergence == "stop" and watch.events:
            frames = np.array(frames)
            for sample in watch.events:
                frames[sample, max(watch.good[sample] - piece.start, 0) // every :] = np.nan
            if watch.everything_failed:
                count = _last_stored(watch, every) - piece.start
        if count:
            self.store.write(piece.start // every + 1, frames[:, : count // every])
        return count, self.on_divergence == "stop" and watch.everything_failed

    def _check_members(self, frames: np.ndarray) -> None:
        """Raises ConfigError for two that are equal, unless they are lost already."""
        first: dict[bytes, int] = {}
        for member, part in enumerate(np.split(frames, self.members)):
            if not np.isfinite(part).any():
                continue
            same = first.setdefault(hashlib.sha256(np.ascontiguousarray(part)).digest(), member)
            if same != member:
                raise ConfigError(
                    f"Members {same} and {member} of {self.members} are the same: the stepper draws no random numbers. "
                    "Perturb the initial state (perturb=0.01), use a stepper trained with as many seeds, or leave "
                    "members out."
                )

    def _write_ledger(self, waiting: list[Chunk]) -> None:
        first, every = waiting[0].start, self.spectrum_every
        ledger = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(chunk.ledger for chunk in waiting))
        if ledger.mean.shape[1]:
            self.store.extend(LEAD, first // self.store_every, self.labels.totals(ledger))
        if every and ledger.spectrum.shape[1]:
            self.store.extend(SPECTRUM_STEP, first // every + 1, self.labels.spectra(ledger.spectrum))


def _cut(piece: Chunk, count: int, stored: int, every: int | None) -> Chunk:
    """The ledger of the stored ones among the first `count` steps of a chunk, without the frames."""
    spectrum, ledger = piece.ledger.spectrum, replace(piece.ledger, spectrum=None)
    ledger = jax.tree.map(lambda array: array[:, stored - 1 : count : stored], ledger)
    if every:
        ledger = replace(ledger, spectrum=spectrum[:, : (piece.start + count) // every - piece.start // every])
    return replace(piece, frames=piece.frames[:, :0].copy(), ledger=ledger, state=None, std=None)


def _last_stored(watch: Watchdog, every: int) -> int:
    """The last step that is good for some trajectory and stored."""
    last = int(watch.good.max()) // every * every
    if not last:
        raise DivergedError(f"Nothing can be kept. {next(iter(watch.events.values())).message}")
    return last
