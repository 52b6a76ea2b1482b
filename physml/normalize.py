"""Normalization: one module that travels with the model, fitted in one streaming pass.

Its numbers are `Statistic` variables: saved with the model, placed on devices with it, never trained.
"""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Spec, Window

KINDS = ("zscore", "rms", "identity")


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
    `masked` tells whether the data had cells without a field (land): forecasts then accept NaN there.
    """

    def __init__(
        self, spec: Spec, center, scale, increment_scale, forcing=None, static=None, parameters=None, masked=False
    ):
        self.frames = Scaling(center, scale)
        self.increments = Statistic(jnp.asarray(increment_scale, jnp.float32))
        self.masked = Statistic(jnp.asarray(masked, jnp.float32))  # not bool: states are differentiated
        sizes = {"forcing": len(spec.forcing), "static": len(spec.static), "parameters": len(spec.parameters)}
        given = {"forcing": forcing, "static": static, "parameters": parameters}
        for name, size in sizes.items():
            # No empty arrays: checkpoints cannot hold them.
            setattr(self, name, Scaling(*(given[name] or (np.zeros(size), np.ones(size)))) if size else None)
        for name, array in (("center", center), ("scale", scale), ("increment_scale", increment_scale)):
            if np.shape(array) != (len(spec.channels),):
                raise SpecError(
                    f"Normalizer {name} has shape {np.shape(array)}, but the spec has {len(spec.channels)} channels "
                    f"{list(spec.names)}: one number per channel is needed."
                )

    def normalize(self, frames):
        return self.frames(frames)

    def denormalize(self, normalized):
        return self.frames.invert(normalized)

    def increment(self, normalized):
        return normalized * self.increments[...]

    def normalize_increment(self, increment):
        return increment / self.increments[...]

    @classmethod
    def identity(cls, spec: Spec, masked: bool = False) -> "Normalizer":
        """Leaves every number as it is."""
        n = len(spec.channels)
        return cls(spec, np.zeros(n), np.ones(n), np.ones(n), masked=masked)

    @classmethod
    def fit(cls, windows: Iterable[Window], kind: str = "zscore") -> "Normalizer":
        """Fits to windows without a batch axis, in one streaming pass (float64, cell areas and masks as weights).

        A window whose times do not begin at zero continues the one before: its first frame was seen already, so it
        counts for the increment only. Cutting a trajectory that way leaves the result unchanged.

        `kind` is "zscore" (center and scale), "rms" (scale only: zero stays zero) or "identity".
        Raises DataError when a channel holds a number that is not finite or is constant without "identity".
        """
        if kind not in KINDS:
            raise ConfigError(f"normalization is {kind!r}, but it must be one of {KINDS}.")
        moments: dict[str, Moments] = {}
        spec, masked = None, False
        for window in windows:
            spec = window.spec
            if kind == "identity":
                return cls.identity(spec, window.mask is not None)
            masked = masked or window.mask is not None
            _accumulate(moments, window)
        if spec is None:
            raise DataError("There is no data to fit the normalization to: the training split is empty.")
        center, scale = moments["channels"].center_scale(kind, [c.name for c in spec.channels])
        steps = moments["increments"]
        increment = np.where(steps.rms > 0, steps.rms, scale) if steps.weight.sum() > 0 else scale

        def group(name):
            names = [c.name for c in getattr(spec, name)]
            return moments[name].center_scale(kind, names, constant_ok=True) if names else None

        groups = (group("forcing"), group("static"), group("parameters"))
        return cls(spec, center, scale, increment, *groups, masked=masked)


class Moments:
    """Running weighted mean and variance per channel (Chan et al. 1983: sums of shifted squares, merged pairwise)."""

    def __init__(self, channels: int):
        self.weight = np.zeros(channels)
        self.mean = np.zeros(channels)
        self.square = np.zeros(channels)  # weighted sum of squared deviations from the mean

    def add(self, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        """`values (..., channel)`, `weights` broadcastable to it."""
        values = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        weights = np.ones_like(values) if weights is None else weights.reshape(-1, values.shape[-1])
        total = weights.sum(0)
        safe = np.where(total > 0, total, 1.0)
        mean = (weights * values).sum(0) / safe
        square = (weights * (values - mean) ** 2).sum(0)
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


def _accumulate(moments: dict[str, Moments], window: Window) -> None:
    spec = window.spec
    area = spec.grid.weights()[..., None]
    cells = np.broadcast_to(area, (*spec.grid.shape, len(spec.channels)))
    if window.mask is not None:
        cells = cells * window.mask
    frames = np.asarray(window.frames, np.float64)
    continues = bool(len(window.times)) and window.times[0] > 0
    fresh = frames[int(continues) :]
    groups = {
        "channels": (fresh, np.broadcast_to(cells, fresh.shape)),
        "increments": (np.diff(frames, axis=0), np.broadcast_to(cells, (max(len(frames) - 1, 0), *cells.shape))),
        "forcing": (window.forcing[int(continues) :], None),
        "static": (window.static, None),
        "parameters": (np.asarray(window.parameters)[None], None),
    }
    if continues:  # once per trajectory
        groups = {name: values for name, values in groups.items() if name not in ("static", "parameters")}
    for name, (values, weights) in groups.items():
        if values.shape[-1] and values.size:
            moments.setdefault(name, Moments(values.shape[-1])).add(values, weights)
    moments.setdefault("increments", Moments(len(spec.channels)))
