"""The objective's loss over a split, with the same windows at every call."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from physml.data.sampling import Samples
from physml.errors import DataError
from physml.fields import Spec, stack
from physml.parallel.mesh import Layout


def count_windows(dataset: Any, frames: int, what: str) -> int:
    """Windows of `frames` frames in a split. Raises DataError with the numbers when there is none."""
    count = len(Samples(tuple(dataset.lengths), frames))
    if not count:
        lengths = sorted(set(dataset.lengths))
        raise DataError(
            f"The {what} split has no window of {frames} frames: its {len(dataset.lengths)} trajectories have "
            f"{f'{lengths[0]} to {lengths[-1]}' if lengths else 'no'} frames. "
            "Use longer trajectories, fewer rollout steps or less history."
        )
    return count


class Validation:
    """Mean loss over evenly spread windows of a split (`limit` of them, 0: all), batch by batch.

    Every window counts once, also where they do not fill the last batch; for the error of a channel those that have it,
    for a loss that is a mean over channels as many times as it has channels. Every batch draws its own random numbers
    from `key` (or from an array of keys, one per member), the same at every call. All processes call it together.
    """

    def __init__(self, dataset: Any, frames: int, batch: int, limit: int, loss: Callable, layout: Layout, key: Any):
        count = count_windows(dataset, frames, "validation")
        chosen = min(limit, count) if limit else count
        self.numbers = [i * count // chosen for i in range(chosen)]
        self.dataset, self.samples = dataset, Samples(tuple(dataset.lengths), frames)
        self.loss, self.layout = loss, layout
        self.sizes = batches(chosen, batch, layout.mesh.shape["data"])
        self.firsts = np.cumsum([0, *self.sizes[:-1]]).tolist()
        self.keys = [_folded(key, first) for first in self.firsts]
        if hasattr(dataset, "prepare"):
            dataset.prepare(self.samples, count=chosen)

    def __call__(self, params: dict, rest: dict) -> dict[str, Any]:
        """{"valid/loss": ..., "valid/loss/CHANNEL": ...}: numbers, or arrays `(member,)` where `loss` gives these."""
        results, sizes = [], self.sizes
        for first, size, key in zip(self.firsts, sizes, self.keys, strict=True):
            window = self._read(self.numbers[first : first + size])
            results.append(self.loss(params, rest, self.layout.place(window), key))
        losses, extras = zip(*jax.device_get(results), strict=True)
        counts = np.array([size * np.maximum(extra.get("weight", 1), 1e-30) for size, extra in zip(sizes, extras)])
        values = {"valid/loss": np.average(losses, axis=0, weights=counts)}
        if "channel" not in extras[0]:
            return values
        channels = np.array([extra["channel"] for extra in extras])
        present = np.array([extra.get("present", np.ones_like(extra["channel"])) for extra in extras])
        weights = present * np.reshape(sizes, (-1, *[1] * (present.ndim - 1)))
        total = weights.sum(0)
        mean = (channels * weights).sum(0) / np.where(total > 0, total, np.nan)
        return {**values, **channel_values("valid/loss", mean, self.dataset.spec)}

    def _read(self, numbers: list[int]):
        """This process's share of a batch, repeated where there are fewer windows than devices."""
        numbers = numbers * -(-self.layout.mesh.shape["data"] // len(numbers))
        share = len(numbers) // jax.process_count()
        mine = numbers[jax.process_index() * share :][:share]
        if hasattr(self.dataset, "read_batch"):
            return self.dataset.read_batch(*self.samples.locate(np.asarray(mine)), self.samples.frames)
        places = [self.samples[number] for number in mine]
        frames = self.samples.frames
        return stack([self.dataset.read(p.trajectory, range(p.start, p.start + frames)) for p in places])


def batches(count: int, batch: int, devices: int) -> list[int]:
    """Sizes of at most `batch` that add up to `count`; each is a multiple of the devices, or divides their number."""
    sizes = []
    while count:
        size = min(batch, count)
        # The last few are repeated, all equally often, until every device has one.
        size = size - size % devices or max(part for part in range(1, size + 1) if devices % part == 0)
        sizes.append(size)
        count -= size
    return sizes


@jax.jit
def _folded(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number) if keys.ndim else jax.random.fold_in(keys, number)


def channel_values(prefix: str, errors: Any, spec: Spec) -> dict[str, Any]:
    """{"PREFIX/CHANNEL": error} of an objective's errors `(..., channel)`, where there are several channels."""
    errors = np.atleast_1d(errors)
    if errors.shape[-1] != len(spec.channels) or errors.shape[-1] == 1:
        return {}
    return {f"{prefix}/{name}": errors[..., i] for i, name in enumerate(spec.names)}
