"""Floors: steppers without a network that every surrogate must beat. Their numbers are `Statistic`s, saved with them.

`config.fit(dataset)` streams once or a few times over a training split and returns the stepper; `config.build(spec)`
alone gives an empty one (NaN) to be filled from a saved folder.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.contracts import Dataset
from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Context, Grid, Spec, Window
from physml.normalize import Moments, Statistic
from physml.steppers.eofs import linear_propagator, streaming_eofs

DAY = 86400.0
YEAR = 365.2425 * DAY
DAYS = 366  # slots of the year; the last one only in leap years
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PersistenceConfig:
    """Tomorrow is like today."""

    def signature(self, spec: Spec) -> None:
        return None

    def build(self, spec: Spec, model=None, normalizer=None, constraints=()) -> "Persistence":
        _refuse(self, model, constraints)
        return Persistence(self, spec)

    def fit(self, dataset: Dataset) -> "Persistence":
        return self.build(dataset.spec)


@dataclass(frozen=True)
class ExtrapolationConfig(PersistenceConfig):
    """The last change goes on: `2 u(t) - u(t-1)`."""

    def build(self, spec: Spec, model=None, normalizer=None, constraints=()) -> "Extrapolation":
        _refuse(self, model, constraints)
        return Extrapolation(self, spec)


@dataclass(frozen=True)
class ClimatologyConfig:
    """Mean of the training data at the same day of the year and hour of the day.

    Attributes:
        half_width: days on either side that the day-of-year means are smoothed over, weight 1 - (d / half_width)^2.
        days: slots of the year, 366 or 1 (no season); None: 366 when the training data last for a year or longer.
        hours: slots of the day; None: one per time step of the day, at most 24.
        history: frames that are given, though none is needed: 1, or 0 for problems without time.
    """

    half_width: float = 31.0
    days: int | None = None
    hours: int | None = None
    history: int = 1

    def __post_init__(self):
        if self.days not in (None, 1, DAYS):
            raise ConfigError(f"days is {self.days}, but {DAYS} (seasonal), 1 (not) or None was expected.")
        if self.half_width <= 0 or (self.hours is not None and self.hours < 1):
            raise ConfigError(f"half_width is {self.half_width} and hours {self.hours}, but both must be positive.")
        if self.history not in (0, 1):
            raise ConfigError(f"history is {self.history}, but a climatology takes 1 frame, or 0 without time.")

    def signature(self, spec: Spec) -> None:
        return None

    def build(self, spec: Spec, model=None, normalizer=None, constraints=()) -> "Climatology":
        _refuse(self, model, constraints)
        return Climatology(self, spec)

    def fit(self, dataset: Dataset) -> "Climatology":
        """One pass. Nondimensional time has neither season nor day: the mean over time of each cell."""
        _check_not_empty(dataset)
        config = self.resolve(dataset)
        shape = (*dataset.spec.grid.shape, len(dataset.spec.channels))
        sums, counts = np.zeros((config.days, config.hours, *shape)), np.zeros((config.days, config.hours))
        for window in blocks(dataset):
            slots = _slots(np.asarray(window.calendar), config.days, config.hours, np)
            np.add.at(sums, slots, np.asarray(window.frames, np.float64))
            np.add.at(counts, slots, 1.0)
        return Climatology(config, dataset.spec, _smooth(sums, counts, config.half_width))

    def resolve(self, dataset: Dataset) -> "ClimatologyConfig":
        """The same with `days` and `hours` decided."""
        step = dataset.spec.time_step if dataset.spec.time_unit == "s" else np.inf
        seasonal = np.isfinite(step) and sum(dataset.lengths) * step >= 365 * DAY
        hours = int(np.clip(round(DAY / step), 1, 24)) if np.isfinite(step) else 1
        return dataclasses.replace(self, days=self.days or (DAYS if seasonal else 1), hours=self.hours or hours)


@dataclass(frozen=True)
class LinearInverseConfig:
    """Linear inverse model: leading EOFs of the anomalies, regressed on themselves at the last `lags` times.

    Penland & Sardeshmukh 1995, doi:10.1175/1520-0442(1995)008<1999:TOGOTS>2.0.CO;2; with several lags and a ridge.

    Attributes:
        modes: EOFs kept (at most the number of cells or training frames).
        lags: frames that go in.
        ridge: added to the predictors' covariance, in units of their mean variance. The default gave the lowest errors
            of sea level pressure in a validation year.
        rank: directions kept while streaming; the EOFs are exact when cells x channels do not exceed it.
        climatology: what the anomalies refer to.
    """

    modes: int = 40
    lags: int = 2
    ridge: float = 2e-2
    rank: int = 1024
    climatology: ClimatologyConfig = ClimatologyConfig()

    def __post_init__(self):
        if min(self.modes, self.lags) < 1 or self.ridge < 0 or self.rank < self.modes:
            raise ConfigError(f"{self}: modes and lags must be at least 1, ridge not negative, rank at least modes.")

    def signature(self, spec: Spec) -> None:
        return None

    def build(self, spec: Spec, model=None, normalizer=None, constraints=()) -> "LinearInverse":
        _refuse(self, model, constraints)
        return LinearInverse(self, spec)

    def fit(self, dataset: Dataset) -> "LinearInverse":
        """Three passes: climatology, EOFs, principal components. Raises DataError when there are too few frames."""
        climatology = self.climatology.fit(dataset)
        scale = _anomaly_scale(dataset, climatology)

        def anomalies():
            for trajectory in range(len(dataset.lengths)):
                for window in blocks(dataset, [trajectory]):
                    values = (np.asarray(window.frames) - climatology.of_frames(window)) * scale
                    yield trajectory, np.asarray(window.times), values.reshape(len(values), -1)

        patterns = streaming_eofs((values for _, _, values in anomalies()), self.modes, self.rank)
        series = [(trajectory, times, values @ patterns.T) for trajectory, times, values in anomalies()]
        operator = linear_propagator(_runs(series, dataset.spec.time_step), self.lags, self.ridge)
        config = dataclasses.replace(self, modes=len(patterns), climatology=climatology.config)
        unscale = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        return LinearInverse(
            config, dataset.spec, climatology, (patterns.T.reshape(*scale.shape, -1), scale, unscale, operator)
        )


class Persistence(nnx.Module):
    """State: the last frame."""

    def __init__(self, config: PersistenceConfig, spec: Spec):
        self.config, self.spec, self.history = config, spec, 1

    def encode(self, frames, context: Context):
        return frames[:, -1]

    def advance(self, state, context: Context):
        return state

    def decode(self, state):
        return state

    def on_grid(self, grid: Grid) -> "Persistence":
        return type(self)(self.config, self.spec.on(grid))


class Extrapolation(nnx.Module):
    """State: the last two frames, `(batch, 2, *space, channel)`."""

    def __init__(self, config: ExtrapolationConfig, spec: Spec):
        self.config, self.spec, self.history = config, spec, 2

    def encode(self, frames, context: Context):
        return frames

    def advance(self, state, context: Context):
        return jnp.stack([state[:, 1], 2 * state[:, 1] - state[:, 0]], axis=1)

    def decode(self, state):
        return state[:, 1]

    def on_grid(self, grid: Grid) -> "Extrapolation":
        return type(self)(self.config, self.spec.on(grid))


class Climatology(nnx.Module):
    """State: the last frame. `mean (days, hours, *space, channel)` in physical units."""

    def __init__(self, config: ClimatologyConfig, spec: Spec, mean=None):
        self.config, self.spec, self.history = config, spec, config.history
        shape = (config.days or 1, config.hours or 1, *spec.grid.shape, len(spec.channels))
        self.mean = Statistic(jnp.full(shape, jnp.nan) if mean is None else jnp.asarray(mean, jnp.float32))

    def encode(self, frames, context: Context):
        return frames[:, -1] if self.history else self.at(context.calendar)

    def advance(self, state, context: Context):
        return self.at(context.calendar)

    def decode(self, state):
        return state

    def at(self, calendar):
        """`calendar (..., 2)`, fractions of year and day -> mean state `(..., *space, channel)`."""
        mean = self.mean[...]
        return mean[_slots(calendar, *mean.shape[:2], jnp)]

    def of_frames(self, window: Window) -> np.ndarray:
        """The climatology of every frame of a host window, float32 numpy, without a trip to the device."""
        mean = np.asarray(self.mean[...])
        return mean[_slots(np.asarray(window.calendar)[: len(window.frames)], *mean.shape[:2], np)]

    def on_grid(self, grid: Grid) -> "Climatology":
        return _refuse_grid(self, grid)


class LinearInverse(nnx.Module):
    """State: `(components (batch, lags * modes), frame (batch, *space, channel))`, newest components first."""

    def __init__(self, config: LinearInverseConfig, spec: Spec, climatology: Climatology | None = None, numbers=None):
        self.config, self.spec, self.history = config, spec, config.lags
        self.climatology = climatology or config.climatology.build(spec)
        shape, size = (*spec.grid.shape, len(spec.channels)), config.lags * config.modes
        empty = [np.full(s, np.nan) for s in ((*shape, config.modes), shape, shape, (size, size))]
        patterns, scale, unscale, operator = empty if numbers is None else numbers
        self.patterns = Statistic(jnp.asarray(patterns, jnp.float32))
        self.scale = Statistic(jnp.asarray(scale, jnp.float32))
        self.unscale = Statistic(jnp.asarray(unscale, jnp.float32))
        self.operator = Statistic(jnp.asarray(operator, jnp.float32))

    def encode(self, frames, context: Context):
        # `context` belongs to the frame after the last one: the history's own calendar lies 1, 2, ... steps before it.
        components = []
        for lag in range(self.history):
            calendar = _shift(context.calendar, -(lag + 1) * self.spec.time_step, self.spec.time_unit)
            anomaly = (frames[:, self.history - 1 - lag] - self.climatology.at(calendar)) * self.scale[...]
            components.append(jnp.einsum("b...,...m->bm", anomaly, self.patterns[...]))
        return jnp.concatenate(components, axis=-1), frames[:, -1]

    def advance(self, state, context: Context):
        components = state[0] @ self.operator[...]
        newest = components[:, : self.config.modes]
        anomaly = jnp.einsum("bm,...m->b...", newest, self.patterns[...]) * self.unscale[...]
        return components, self.climatology.at(context.calendar) + anomaly

    def decode(self, state):
        return state[1]

    def on_grid(self, grid: Grid) -> "LinearInverse":
        return _refuse_grid(self, grid)


FLOORS = {
    "climatology": ClimatologyConfig,
    "extrapolation": ExtrapolationConfig,
    "linear_inverse": LinearInverseConfig,
    "persistence": PersistenceConfig,
}


def floors_beside(history: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Configs, by name and with their default options, of the floors of a stepper that starts from `history` frames.

    `names` None: persistence, or the climatology where the stepper starts from no frame. Raises ConfigError for a floor
    that needs a frame beside such a stepper.
    """
    if names is None:
        names = ("persistence",) if history else ("climatology",)
    if history:
        return {name: FLOORS[name]() for name in names}
    for name in names:
        if name != "climatology":
            raise ConfigError(
                f"The floor {name!r} starts from a frame, but the stepper from none (history is 0). Use "
                "floors=('climatology',), the mean of the training solutions, or floors=()."
            )
    return {name: ClimatologyConfig(history=0) for name in names}


def blocks(dataset: Dataset, trajectories=None) -> Iterator[Window]:
    """The frames of a split in order, as windows without a batch axis of at most 64 MiB."""
    frame_size = 4 * int(np.prod(dataset.spec.grid.shape)) * max(len(dataset.spec.channels), 1)
    length = max(1, int(BLOCK_BYTES // frame_size))
    for trajectory in range(len(dataset.lengths)) if trajectories is None else trajectories:
        total = dataset.lengths[trajectory]
        for start in range(0, total, length):
            window = dataset.read(trajectory, range(start, min(start + length, total)))
            if not np.isfinite(window.frames).all():
                raise DataError(
                    f"Trajectory {trajectory} holds NaN or infinite values after frame {start}. Mask or fill them."
                )
            yield window


def _slots(calendar, days: int, hours: int, np):
    """Slot of the year and of the day; exact for years of 365 and of 366 days, whose fractions differ by half a day."""
    year, day = calendar[..., 0], calendar[..., 1]
    day_slot = np.clip(np.round(year * (DAYS - 0.5) - day), 0, DAYS - 1) if days > 1 else year * 0
    return day_slot.astype(int), np.floor(day * hours + 0.01).astype(int) % hours  # float32 14/24 * 24 is below 14


def _shift(calendar, time: float, unit: str):
    """Fractions of year and day, `time` later; nondimensional time has none."""
    if unit != "s":
        return calendar
    return (calendar + jnp.asarray([time / YEAR % 1.0, time / DAY % 1.0], jnp.float32)) % 1.0


def _smooth(sums: np.ndarray, counts: np.ndarray, half_width: float) -> np.ndarray:
    """Weighted day-of-year means, cyclic: a day counts as often as it was seen."""
    if len(sums) > 1:
        reach = int(np.ceil(half_width)) - 1
        weights = {d: 1 - (d / half_width) ** 2 for d in range(-reach, reach + 1)}
        smooth_sums, smooth_counts = np.zeros_like(sums), np.zeros_like(counts)
        for d, weight in weights.items():
            smooth_sums += weight * np.roll(sums, d, axis=0)
            smooth_counts += weight * np.roll(counts, d, axis=0)
    else:
        smooth_sums, smooth_counts = sums, counts
    shape = (*counts.shape, *[1] * (sums.ndim - 2))
    # Seasons or hours that were never seen get the mean of everything.
    everything = sums.sum((0, 1)) / counts.sum()
    seen = smooth_counts.reshape(shape) > 0
    return np.where(seen, smooth_sums / np.where(seen, smooth_counts.reshape(shape), 1.0), everything)


def _anomaly_scale(dataset: Dataset, climatology: Climatology) -> np.ndarray:
    """Square root of the cell area over the standard deviation of each channel's anomalies; 0 where masked."""
    moments, mask = Moments(len(dataset.spec.channels)), 1.0
    for window in blocks(dataset):
        mask = 1.0 if window.mask is None else np.asarray(window.mask)
        moments.add((np.asarray(window.frames) - climatology.of_frames(window)) * mask)
    spread = np.sqrt(moments.variance)
    area = np.sqrt(dataset.spec.grid.weights())[..., None]
    return (area / np.where(spread > 0, spread, 1.0) * mask).astype(np.float32)


def _runs(series, step: float) -> list[np.ndarray]:
    """Principal components of consecutive frames, cut where the trajectory changes or the time axis jumps."""
    runs, current, last = [], [], None
    for trajectory, times, values in series:
        for time, value in zip(times, values, strict=True):
            follows = last is not None and last[0] == trajectory
            # Windows count time from their own beginning, so only jumps inside one are seen in `times`.
            if current and (not follows or (time > last[1] and time - last[1] > 1.5 * step)):
                runs.append(np.asarray(current))
                current = []
            current.append(value)
            last = (trajectory, time)
    return [*runs, np.asarray(current)] if current else runs


def _refuse(config, model, constraints) -> None:
    if model is not None or constraints:
        raise ConfigError(f"{type(config).__name__} takes neither a model nor constraints: leave them out.")


def _refuse_grid(stepper, grid: Grid):
    if grid.shape == stepper.spec.grid.shape:
        return stepper
    raise SpecError(
        f"{type(stepper).__name__} was fitted cell by cell on {stepper.spec.grid.shape} points and cannot move to "
        f"{grid.shape}. Fit it again to data on that grid."
    )


def _check_not_empty(dataset: Dataset) -> None:
    if not sum(dataset.lengths):
        raise DataError("There is nothing to fit to: the training split is empty.")
