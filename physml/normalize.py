"""Normalization: one module that travels with the model, fitted in one streaming pass.

Its numbers are `Statistic` variables: saved with the model, placed on devices with it, never trained.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Spec, Window

KINDS = ("zscore", "rms", "identity")
NUMBERS = ("weight", "mean", "square")  # of `Moments`
PIECE = 2**18  # numbers that are worked on at a time


class Statistic(nnx.Variable):
    """A number fitted to data: part of the state, not of the parameters."""


class Scaling(nnx.Module):
    """`(x - center) / scale` per channel of one group of fields."""

    def __init__(self, center, scale):
        self.center = Statistic(jnp.asarray(center, jnp.float32))
        self.scale = Statistic(jnp.asarray(scale, jnp.float32))

    def __call__(self, x):
        return (x - self.center[...]) / self.scale[...]

    def invert(self, z):
        return z * self.scale[...] + self.center[...]


class Normalizer(nnx.Module):
    """Between physical units and numbers of order one.

    `normalize` and `denormalize` act on frames `(..., channel)`, `increment` turns a normalized increment into a
    physical one (increments have a scale of their own: at small time steps they are much smaller than the fields).
    `forcing`, `static` and `parameters` are `Scaling`s of the conditioning groups, None where the spec has none.
    `masked (channel,)` tells whether the data had cells without that field (land): forecasts then accept its NaN.
    `intervals` names the steps, in frames, that increments have a scale of their own for, `interval_increments
    (interval, channel)`; None where there are none.
    """

    def __init__(
        self, spec: Spec, center, scale, increment_scale, forcing=None, static=None, parameters=None, masked=False,
        intervals: Mapping[int, Sequence[float]] | None = None,
    ):  # fmt: skip
        self.frames = Scaling(center, scale)
        self.increments = Statistic(jnp.asarray(increment_scale, jnp.float32))
        masked = np.broadcast_to(masked, len(spec.channels))
        self.masked = Statistic(jnp.asarray(masked, jnp.float32))  # not bool: states are differentiated
        sizes = {"forcing": len(spec.forcing), "static": len(spec.static), "parameters": len(spec.parameters)}
        given = {"forcing": forcing, "static": static, "parameters": parameters}
        for name, size in sizes.items():
            # No empty arrays: checkpoints cannot hold them.
            setattr(self, name, Scaling(*(given[name] or (np.zeros(size), np.ones(size)))) if size else None)
        arrays = {"center": center, "scale": scale, "increment_scale": increment_scale}
        arrays |= {f"intervals[{interval}]": numbers for interval, numbers in (intervals or {}).items()}
        for name, array in arrays.items():
            if np.shape(array) != (len(spec.channels),):
                raise SpecError(
                    f"Normalizer {name} has shape {np.shape(array)}, but the spec has {len(spec.channels)} channels "
                    f"{list(spec.names)}: one number per channel is needed."
                )
        self.intervals = check_intervals(intervals or ())
        scales = [intervals[interval] for interval in self.intervals]
        self.interval_increments = Statistic(jnp.asarray(np.array(scales), jnp.float32)) if scales else None

    def normalize(self, frames):
        return self.frames(frames)

    def denormalize(self, normalized):
        return self.frames.invert(normalized)

    def increment(self, normalized):
        return normalized * self.increments[...]

    def normalize_increment(self, increment):
        return increment / self.increments[...]

    @classmethod
    def identity(cls, spec: Spec, masked: Any = False, intervals: Sequence[int] = ()) -> "Normalizer":
        """Leaves every number as it is. `masked` is one for all channels, or one for each."""
        n = len(spec.channels)
        scales = {interval: np.ones(n) for interval in check_intervals(intervals)}
        return cls(spec, np.zeros(n), np.ones(n), np.ones(n), masked=masked, intervals=scales)

    @classmethod
    def fit(cls, windows: Iterable[Window], kind: str = "zscore", intervals: Sequence[int] = ()) -> "Normalizer":
        """Fits to windows without a batch axis, in one streaming pass (float64, cell areas and masks as weights).

        A window whose times do not begin at zero continues the one before: its first frame was seen already, so it
        counts for the increment only. Cutting a trajectory that way leaves the result unchanged.

        `kind` is "zscore" (center and scale), "rms" (scale only: zero stays zero) or "identity". `intervals` are the
        distances of frames whose increments get a scale of their own.
        Raises DataError when a channel holds a number that is not finite or is constant without "identity", and when no
        two frames are an interval apart.
        """
        _check(kind)
        totals = None
        for window in windows:
            if kind == "identity":
                return cls.identity(window.spec, window.mask is not None, intervals)
            totals = totals or Totals(window.spec, intervals)
            totals.add(window)
        if totals is None:
            raise DataError("There is no data to fit the normalization to: the training split is empty.")
        return cls.of(totals, kind)

    @classmethod
    def of(cls, totals: "Totals", kind: str = "zscore") -> "Normalizer":
        """As `fit`, from what a pass over the windows gathered."""
        _check(kind)
        spec, moments = totals.spec, totals.moments
        if kind == "identity":
            return cls.identity(spec, totals.hidden, totals.intervals)
        center, scale = moments["channels"].center_scale(kind, [c.name for c in spec.channels])

        def increments(name):
            return np.where(moments[name].rms > 0, moments[name].rms, scale)

        for interval in totals.intervals:
            if not moments[_steps(interval)].weight.any():
                raise DataError(
                    f"No two frames of a trajectory are {interval} apart: the increments over that interval have no "
                    "scale. Leave the interval out, or use longer trajectories."
                )
        intervals = {interval: increments(_steps(interval)) for interval in totals.intervals}

        def group(name):
            names = [c.name for c in getattr(spec, name)]
            return moments[name].center_scale(kind, names, constant_ok=True) if names else None

        groups = (group("forcing"), group("static"), group("parameters"))
        return cls(spec, center, scale, increments("increments"), *groups, masked=totals.hidden, intervals=intervals)


class Moments:
    """Running weighted mean and variance per channel (Chan et al. 1983: sums of shifted squares, merged pairwise)."""

    def __init__(self, channels: int):
        self.weight = np.zeros(channels)
        self.mean = np.zeros(channels)
        self.square = np.zeros(channels)  # weighted sum of squared deviations from the mean

    def add(self, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        """`values (..., channel)`; `weights` of the same shape, or without leading axes, over which they repeat.

        Copies at most a few MiB at a time, whatever the shape and number format of `values`.
        """
        channels = values.shape[-1]
        weights = np.ones((1, channels)) if weights is None else np.asarray(weights).reshape(-1, channels)
        values = np.asarray(values).reshape(-1, *weights.shape)  # (repetition, cell, channel)
        room = max(1, PIECE // max(channels, 1))
        for cell in range(0, weights.shape[0], room):
            part = weights[cell : cell + room].astype(np.float64)
            repeat = max(1, room // len(part))
            for first in range(0, len(values), repeat):
                self._merge(values[first : first + repeat, cell : cell + room].astype(np.float64), part)

    def _merge(self, values: np.ndarray, weights: np.ndarray) -> None:
        """`values (repetition, cell, channel)` are overwritten. `weights (cell, channel)`."""
        repetitions, cells, channels = values.shape
        rows, ones = values.reshape(repetitions, -1), np.ones(cells)
        total = repetitions * weights.sum(0)
        safe = np.where(total > 0, total, 1.0)
        # Rows are as long as they can be: loops over the few channels of a cell would cost several times more.
        mean = ones @ (rows.sum(0).reshape(cells, channels) * weights) / safe
        rows -= np.tile(mean, cells)
        np.square(rows, out=rows)
        square = ones @ (rows.sum(0).reshape(cells, channels) * weights)
        delta, both = mean - self.mean, self.weight + total
        share = total / np.where(both > 0, both, 1.0)
        self.mean = self.mean + delta * share
        self.square = self.square + square + delta**2 * self.weight * share
        self.weight = both

    @property
    def variance(self) -> np.ndarray:
        return self.square / np.where(self.weight > 0, self.weight, 1.0)

    @property
    def rms(self) -> np.ndarray:
        return np.sqrt(self.variance + self.mean**2)

    def center_scale(self, kind: str, names: list[str], constant_ok: bool = False) -> tuple[np.ndarray, np.ndarray]:
        center = self.mean if kind == "zscore" else np.zeros_like(self.mean)
        scale = np.sqrt(self.variance) if kind == "zscore" else self.rms
        for name, value in zip(names, scale, strict=True):
            if not np.isfinite(value):
                raise DataError(
                    f"Channel {name!r} holds NaN or infinite values: no scale can be fitted. Mask or fill them first."
                )
        flat = scale <= 1e-7 * np.abs(self.mean)
        if flat.any() and not constant_ok:
            names = [name for name, is_flat in zip(names, flat, strict=True) if is_flat]
            raise DataError(
                f"Channel(s) {names} are constant over the training data: drop them, or use them as static."
            )
        return center, np.where(flat, 1.0, scale)


class Totals:
    """What one pass over windows gathers: all that normalization and `physml.data.statistics` are made of.

    Windows have no batch axis. One whose times do not begin at zero continues the one before: its first frame was seen
    already and counts for the increment only. Cells count by area and mask. As many frames as the longest of
    `intervals` are kept in memory.

    Attributes:
        spec: of the windows.
        intervals: distances of frames, beyond neighbors, whose differences are gathered.
        moments: of "channels", "increments", "forcing", "static", "parameters" and "increments_H" of every interval H.
        low, high: extremes of every channel where it exists. missing: sum over frames of the share of hidden cells.
        frames: how many.
    """

    def __init__(self, spec: Spec, intervals: Sequence[int] = ()):
        self.spec, self.intervals = spec, check_intervals(intervals)
        sizes = {name: len(getattr(spec, name)) for name in ("channels", "forcing", "static", "parameters")}
        differences = ("increments", *map(_steps, self.intervals))
        moments = {**sizes, **dict.fromkeys(differences, sizes["channels"])}
        self.moments = {name: Moments(size) for name, size in moments.items()}
        self._recent = np.zeros((0,))  # the last frames of the trajectory at hand
        self.low, self.high = np.full(sizes["channels"], np.inf), np.full(sizes["channels"], -np.inf)
        self.missing, self.frames = np.zeros(sizes["channels"]), 0

    @property
    def hidden(self) -> np.ndarray:
        """Channels that do not exist everywhere: by a mask that the data name all of them."""
        return (self.missing > 0) | (self.spec.mask is not None)

    def add(self, window: Window) -> None:
        area = self.spec.grid.weights()[..., None]
        cells = np.broadcast_to(area, (*self.spec.grid.shape, len(self.spec.channels)))
        exists = None
        if window.mask is not None:
            exists = np.asarray(window.mask) > 0
            cells = cells * window.mask
            self.missing += (len(window.frames) - _seen(window)) * (~exists).mean(axis=tuple(range(exists.ndim - 1)))
        frames = np.asarray(window.frames)
        seen = _seen(window)
        fresh = frames[seen:]
        self.frames += len(fresh)
        self._add("channels", fresh, cells)
        self._add("forcing", np.asarray(window.forcing)[seen:])
        self._add_differences("increments", frames, 1, 1, cells)
        if self.intervals:
            before = self._recent if seen else frames[:0]
            joined = np.concatenate([before, fresh])
            for interval in self.intervals:
                self._add_differences(_steps(interval), joined, interval, len(before), cells)
            self._recent = joined[-max(self.intervals) :].copy()
        if not seen:  # once per trajectory
            self._add("static", np.asarray(window.static))
            self._add("parameters", np.asarray(window.parameters)[None])
        if len(fresh):
            for bound, reduce, nothing in ((self.low, np.minimum, np.inf), (self.high, np.maximum, -np.inf)):
                extreme = reduce.reduce(fresh, axis=0)
                extreme = extreme if exists is None else np.where(exists, extreme, nothing)
                reduce(bound, reduce.reduce(extreme.reshape(-1, extreme.shape[-1]), axis=0), out=bound)

    def _add_differences(self, name: str, frames: np.ndarray, distance: int, first: int, cells: np.ndarray) -> None:
        """Of frames `distance` apart, the later one at `first` or behind it: in float64, a few at a time."""
        rows = max(1, PIECE // max(cells.size, 1))
        for start in range(max(first, distance), len(frames), rows):
            stop = min(start + rows, len(frames))
            later, earlier = frames[start:stop].astype(np.float64), frames[start - distance : stop - distance]
            self._add(name, later - earlier, cells)

    def _add(self, name: str, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        if values.size:
            self.moments[name].add(values, weights)

    def to_dict(self) -> dict:
        """Plain JSON-able containers, without the spec; `Totals.from_dict` gives exactly the same numbers."""
        moments = {name: {key: getattr(m, key).tolist() for key in NUMBERS} for name, m in self.moments.items()}
        own = {name: getattr(self, name).tolist() for name in ("low", "high", "missing")}
        return {"moments": moments, **own, "frames": self.frames}

    @classmethod
    def from_dict(cls, data: dict, spec: Spec, intervals: Sequence[int] = ()) -> "Totals":
        """Raises KeyError, TypeError or ValueError for containers that `to_dict` did not make for such a spec."""
        result = cls(spec, intervals)
        for name, moments in result.moments.items():
            for key in NUMBERS:
                setattr(moments, key, _numbers(data["moments"][name][key], len(getattr(moments, key))))
        for name in ("low", "high", "missing"):
            setattr(result, name, _numbers(data[name], len(spec.channels)))
        result.frames = int(data["frames"])
        return result


def check_intervals(intervals: Iterable[int]) -> tuple[int, ...]:
    """The intervals as a tuple. Raises ConfigError unless they are rising whole numbers from 1 on."""
    found = tuple(intervals)
    rising = all(low < high for low, high in zip((0, *found), found, strict=False))
    if not rising or not all(isinstance(interval, int) for interval in found):
        raise ConfigError(f"intervals are {found}, but they count frames: rising whole numbers such as (1, 2, 4).")
    return found


def _steps(interval: int) -> str:
    return f"increments_{interval}"


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"normalization is {kind!r}, but it must be one of {KINDS}.")


def _seen(window: Window) -> int:
    """Leading frames that an earlier window held already."""
    return int(len(window.times) > 0 and window.times[0] > 0)


def _numbers(values: list, size: int) -> np.ndarray:
    array = np.array(values, np.float64)
    if array.shape != (size,):
        raise ValueError(f"{array.shape} numbers instead of {size}")
    return array
