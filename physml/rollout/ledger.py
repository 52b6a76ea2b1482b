"""The drift ledger that a rollout carries along, and the watchdog that reads it between chunks."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from physml.errors import ConfigError, DivergedError
from physml.fields import Spec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["finite", "mean", "variance", "minimum", "maximum", "spectrum"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Ledger:
    """What is kept of every frame, physical units: arrays `(batch, lead, channel)`, or `(batch, channel)` for one.

    Attributes:
        finite: whether every number is finite.
        mean: area-weighted mean; times the area of the domain it is the total.
        variance: area-weighted, about the mean.
        minimum, maximum: over the cells.
        spectrum: energy by wavenumber shell, `(batch, step, channel, wavenumber)` or `(batch, channel, wavenumber)`,
            of the steps at which a rollout measures it; None where it does not.
    """

    finite: Any
    mean: Any
    variance: Any
    minimum: Any
    maximum: Any
    spectrum: Any = None

    @property
    def energy(self):
        """Half the area-weighted mean square: what the spectrum adds up to."""
        return (self.variance + self.mean**2) / 2


def measure(frame, spec: Spec, mask=None, reference=0.0) -> Ledger:
    """The ledger of frames `(batch, *space, channel)`; cells where `mask` is 0 do not count.

    `reference (batch, channel)` is taken off before summing: small drifts of large means stay visible in float32.
    """
    axes = tuple(range(1, frame.ndim - 1))
    weights = jnp.asarray(spec.grid.weights())[..., None]
    if mask is None:
        inside, share = True, 1.0
    else:
        inside, weights = mask > 0, weights * mask
        share = jnp.maximum(weights.mean(axes, keepdims=True), 1e-30)
    offset = jnp.reshape(reference, (*np.shape(reference)[:1], *[1] * len(axes), *np.shape(reference)[1:]))
    shifted = frame - offset
    mean = (weights * shifted).mean(axes, keepdims=True) / share
    variance = ((weights * (shifted - mean) ** 2).mean(axes, keepdims=True) / share).reshape(frame.shape[0], -1)
    return Ledger(
        jnp.isfinite(frame).all(axes),
        (mean + offset).reshape(frame.shape[0], -1),
        variance,
        jnp.where(inside, frame, jnp.inf).min(axes),
        jnp.where(inside, frame, -jnp.inf).max(axes),
    )


@dataclass(frozen=True)
class Bounds:
    """What counts as diverged: values outside `[lower, upper]`, each `(batch, channel)`, or not finite.

    Attributes:
        center, scale: of the training data, per channel, or None where nothing is known of them.
    """

    lower: np.ndarray
    upper: np.ndarray
    center: np.ndarray | None = None
    scale: np.ndarray | None = None

    @classmethod
    def of(cls, stepper, initial: Ledger, limit: float | None = 100.0) -> "Bounds":
        """`limit` scales beyond the training data (center and scale of the normalizer) and beyond the initial state
        (its range and standard deviation), whichever reaches further; None or inf: only numbers that are not finite
        count.
        """
        check_limit(limit)
        low, high = np.asarray(initial.minimum, np.float64), np.asarray(initial.maximum, np.float64)
        spread = np.sqrt(np.asarray(initial.variance, np.float64))
        center, scale = _training_range(stepper)
        if limit in (None, np.inf):
            return cls(np.full_like(low, -np.inf), np.full_like(high, np.inf), center, scale)
        # A nearly constant initial state tells nothing about the scale of the field.
        varied = spread > 1e-3 * np.abs(np.asarray(initial.mean, np.float64))
        known = varied | (scale is not None)
        width = limit * np.where(varied, spread, 0)
        lower, upper = low - width, high + width
        if scale is not None:
            lower, upper = np.minimum(lower, center - limit * scale), np.maximum(upper, center + limit * scale)
        return cls(np.where(known, lower, -np.inf), np.where(known, upper, np.inf), center, scale)


def check_limit(limit) -> None:
    """Raises ConfigError for what is no limit of `Bounds`."""
    number = np.ndim(limit) == 0 and np.asarray(limit).dtype.kind in "iuf"
    if limit is not None and not (number and limit > 0):
        raise ConfigError(f"limit is {limit!r}, but a positive number of standard deviations was expected (or None).")


def _training_range(stepper) -> tuple[np.ndarray | None, np.ndarray | None]:
    frames = getattr(getattr(stepper, "normalizer", None), "frames", None)
    if frames is None:
        return None, None
    center, scale = np.asarray(frames.center[...], np.float64), np.asarray(frames.scale[...], np.float64)
    if np.all(center == 0) and np.all(scale == 1):  # the identity: nothing was fitted
        return None, None
    return center, scale


@dataclass(frozen=True)
class Divergence:
    """The first bad value of one trajectory: `step` counts from 1, `place` indexes the cell; empty where the frame of
    that step was not stored.
    """

    sample: int
    step: int
    channel: str
    value: float
    place: tuple[int, ...]
    message: str


class Watchdog:
    """Reads the ledger of each chunk on the host and remembers which trajectories left the bounds, where and when.

    Attributes:
        events: one `Divergence` per bad trajectory.
        good: `(batch,)` steps before the first bad one, so far.
    """

    def __init__(self, spec: Spec, bounds: Bounds, names: tuple[str, ...] = (), store_every: int = 1):
        """`names` are what messages call the trajectories; their numbers when empty."""
        self.spec, self.bounds, self.names, self.store_every = spec, bounds, names, store_every
        self.events: dict[int, Divergence] = {}
        self.good = np.zeros(bounds.lower.shape[0], int)

    def read(self, start: int, frames: np.ndarray, ledger: Ledger) -> list[Divergence]:
        """New divergences in the steps from `start + 1` on: their `ledger (batch, step, channel)`, and the frames
        `(batch, lead, *space, channel)` of those that are stored. `store_every` divides `start`.
        """
        lower, upper = self.bounds.lower[:, None], self.bounds.upper[:, None]
        low, high = np.asarray(ledger.minimum), np.asarray(ledger.maximum)
        with np.errstate(invalid="ignore"):
            bad = ~np.asarray(ledger.finite) | (low < lower) | (high > upper)
        found = []
        for sample in range(len(bad)):
            if sample in self.events:
                continue
            steps = np.flatnonzero(bad[sample].any(-1))
            if not len(steps):
                self.good[sample] = start + bad.shape[1]
                continue
            first = int(steps[0])
            self.good[sample] = start + first
            stored = (start + first + 1) % self.store_every == 0
            frame = frames[sample, first // self.store_every] if stored else None
            finite, extremes = np.asarray(ledger.finite)[sample, first], (low[sample, first], high[sample, first])
            self.events[sample] = self._describe(sample, start + first + 1, bad[sample, first], finite, extremes, frame)
            found.append(self.events[sample])
        return found

    @property
    def everything_failed(self) -> bool:
        return len(self.events) == len(self.good)

    def raise_first(self, found: list[Divergence]) -> None:
        """Raises DivergedError for the earliest of `found`, if there is any."""
        if found:
            raise DivergedError(min(found, key=lambda event: event.step).message)

    def _describe(self, sample: int, step: int, bad, finite, extremes, frame) -> Divergence:
        """The others `(channel,)` and the `frame`, None where it was not stored, are of that step."""
        # A number that is not finite says more than one that is only large.
        channel = int(np.argmax(bad if finite.all() else ~finite))
        name = self.spec.names[channel]
        lower, upper = self.bounds.lower[sample, channel], self.bounds.upper[sample, channel]
        if frame is None:
            place, at = (), ", in a frame that was not stored"
            low, high = (float(extreme[channel]) for extreme in extremes)
            value = low if low < lower or not np.isfinite(low) else high
        else:
            field = frame[..., channel]
            with np.errstate(invalid="ignore"):
                excess = np.where(np.isfinite(field), np.maximum(field - upper, lower - field), np.inf)
            place = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), field.shape))
            value, axes = float(field[place]), zip(self.spec.grid.axes, place, strict=True)
            cell = ", ".join(f"{axis.name}={axis.centers[i]:g}{axis.unit and ' ' + axis.unit}" for axis, i in axes)
            at = f" at index {place} ({cell})"
        who = self.names[sample] if self.names else sample
        unit = self.spec.channels[channel].unit
        what = f"is {value:g}" if not np.isfinite(value) else (
            f"is {value:g} {unit}".rstrip() + f", outside {lower:g} to {upper:g} (training data and initial state)"
        )  # fmt: skip
        message = (
            f"The rollout diverged at step {step} (trajectory {who}): variable {name!r} {what}{at}. "
            f"The {step - 1} steps before are good. Take fewer steps, train on longer unrolled windows, or "
            "keep the good part with on_divergence='stop'."
        )
        return Divergence(sample, step, name, value, place, message)
