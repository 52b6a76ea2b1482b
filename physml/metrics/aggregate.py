"""Means over pairs that add: over batches, over processes, and over resampled groups of pairs.

Pairs come in groups (trajectories, or blocks of neighboring start dates) because neighbors in time are not independent:
the bootstrap draws whole groups, so the interval does not pretend to more samples than there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from physml.errors import ConfigError


@dataclass(frozen=True)
class Sums:
    """Weighted sums of the parts of a metric per group, in float64 on the host. `a + b` merges two sets of pairs.

    Attributes:
        totals: per part, `(group, lead, channel, ...)`.
        weights: `(group, lead)`, or `(group, lead, channel)` where channels differ: number of pairs that count.
    """

    totals: tuple[np.ndarray, ...]
    weights: np.ndarray

    @classmethod
    def of(cls, parts: tuple, groups: np.ndarray, count: int, weights: np.ndarray | None = None) -> "Sums":
        """Sums one batch. `parts`: `(batch, lead, channel, ...)`; `groups (batch,)` in 0..count-1; `weights (batch,
        lead)` or `(batch, lead, channel)`.

        Pairs of weight zero do not count, whatever they hold.
        """
        parts = tuple(np.asarray(part, np.float64) for part in parts)
        weights = np.ones(parts[0].shape[:2]) if weights is None else np.asarray(weights, np.float64)
        total = np.zeros((count, *weights.shape[1:]))
        np.add.at(total, groups, weights)
        return cls(tuple(_grouped(part, groups, count, weights) for part in parts), total)

    def __add__(self, other: "Sums") -> "Sums":
        totals = tuple(a + b for a, b in zip(self.totals, other.totals, strict=True))
        return Sums(totals, self.weights + other.weights)

    def means(self, draws: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Means over all pairs, `(lead, channel, ...)` per part; with `draws (draw, group)`, how often each group
        counts, one mean per draw. NaN where no pair counts."""
        one = draws is None
        draws = np.ones((1, len(self.weights))) if one else draws
        weight = np.tensordot(draws, self.weights, 1)
        weight = np.where(weight > 0, weight, np.nan)
        means = tuple(
            np.tensordot(draws, total, 1) / weight.reshape(*weight.shape, *(1,) * (total.ndim - weight.ndim))
            for total in self.totals
        )
        return tuple(mean[0] for mean in means) if one else means


def _grouped(part, groups, count, weights):
    spread = weights.reshape(*weights.shape, *(1,) * (part.ndim - weights.ndim))
    total = np.zeros((count, *part.shape[1:]))
    np.add.at(total, groups, np.where(spread > 0, part, 0.0) * spread)
    return total


def across_processes(sums: Sums) -> Sums:
    """Adds the sums of all processes; every process must call it, and gets the same answer."""
    if jax.process_count() == 1:
        return sums
    from jax.experimental import multihost_utils

    # float64 would become float32 on its way through jax: the bytes travel instead.
    def add(array):
        packed = np.frombuffer(array.tobytes(), np.uint8)
        every = np.asarray(multihost_utils.process_allgather(packed))
        return sum(np.frombuffer(row.tobytes(), np.float64).reshape(array.shape) for row in every)

    return Sums(tuple(add(total) for total in sums.totals), add(sums.weights))


def resample(groups: int, draws: int, seed: int = 0) -> np.ndarray:
    """`(draw, group)`: how often each group is drawn when `groups` of them are drawn with replacement."""
    if draws < 1 or groups < 1:
        raise ConfigError(f"A bootstrap needs at least one draw and one group, but got {draws} and {groups}.")
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), draws).astype(np.float64)


def interval(
    finish: Callable, sums: Sums, draws: np.ndarray, level: float = 0.95, chunk: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of `finish(*means)`: (low, high), each of the shape that `finish` gives.

    NaN where fewer than two groups count: one trajectory says nothing about the next.
    """
    scores = [np.asarray(finish(*sums.means(part))) for part in np.split(draws, range(chunk, len(draws), chunk))]
    scores = np.concatenate(scores)
    low, high = quantiles(scores, level)
    lone = (sums.weights > 0).sum(0) < 2
    lone = lone.reshape(*lone.shape, *(1,) * (low.ndim - lone.ndim))
    return np.where(lone, np.nan, low), np.where(lone, np.nan, high)


def quantiles(scores: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the central interval of the draws `(draw, ...)`."""
    # A draw in which no pair counts is NaN and left out; a diverged score is infinite and must stay in.
    import warnings

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return tuple(np.nanquantile(scores, q, axis=0) for q in ((1 - level) / 2, (1 + level) / 2))
