"""Differentiable losses on frames `(batch, time, *space, channel)`.

Every loss is a frozen dataclass. `errors` gives one number per sample, frame and channel; calling the loss reduces them
to a scalar. Cells count by their area (`Grid.weights`) and by the mask; channels by `channels`. Units are those of the
arguments: objectives call losses in normalized units.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Float

from physml.coding import check_fields
from physml.errors import ConfigError, SpecError, suggest
from physml.fields import ArrayLike, Spec
from physml.metrics.metric import check_even

Frames = Float[ArrayLike, "batch time *space channel"]
Errors = Float[ArrayLike, "batch time channel"]


@dataclass(frozen=True)
class MSE:
    """Mean squared error over cells.

    Attributes:
        channels: relative weight of every channel; empty means equal.
        reduction: over samples, frames and channels: "mean" is their weighted mean, "sum" the weighted sum over samples
            and channels, averaged over frames.
    """

    channels: tuple[float, ...] = ()
    reduction: Literal["mean", "sum"] = "mean"

    joint = False  # not a field: only relative losses can join channels in one norm

    def __post_init__(self):
        check_fields(self)
        if any(weight < 0 for weight in self.channels) or (self.channels and not any(self.channels)):
            raise ConfigError(f"channel weights are {self.channels}, but they must be 0 or more and not all 0.")

    def errors(self, prediction: Frames, truth: Frames, spec: Spec, mask=None) -> Errors:
        """Of every sample, frame and channel; 0 where the mask `(batch, *space, channel)` leaves no cell.

        Raises SpecError when the shapes do not fit each other or `spec`.
        """
        prediction, truth, cells = _prepare(prediction, truth, spec, mask)
        return _mean(self.pointwise(prediction - truth), cells)

    def pointwise(self, difference):
        return difference**2

    def __call__(self, prediction: Frames, truth: Frames, spec: Spec, mask=None) -> Float[ArrayLike, ""]:
        return self.reduce(self.errors(prediction, truth, spec, mask), spec, mask)

    def reduce(self, errors: Errors, spec: Spec, mask=None, leads=None):
        """The scalar: weighted over channels and over `leads (time,)`, by `reduction` over samples and channels.

        A channel that the mask hides wholly in a sample does not count there. Raises ConfigError when the number of
        channel weights is not that of the channels.
        """
        weights = jnp.ones(1) if self.joint else self._channel_weights(spec)
        if mask is not None and not self.joint:
            weights = weights * (_space_sum(mask, 1) > 0)[:, None]
        leads = jnp.ones(errors.shape[1], errors.dtype) if leads is None else jnp.asarray(leads, errors.dtype)
        weights = jnp.broadcast_to(weights * (leads / leads.sum())[:, None], errors.shape)
        total = jnp.sum(errors * weights)
        return total if self.reduction == "sum" else total / jnp.maximum(weights.sum(), 1e-30)

    def _channel_weights(self, spec: Spec):
        count = len(spec.channels)
        if self.channels and len(self.channels) != count:
            raise ConfigError(
                f"The loss has {len(self.channels)} channel weights {self.channels}, but there are {count} channels "
                f"{list(spec.names)}: give one weight for each, in this order."
            )
        return jnp.asarray(self.channels or (1.0,) * count, jnp.float32)


@dataclass(frozen=True)
class MAE(MSE):
    """Mean absolute error over cells."""

    def pointwise(self, difference):
        return jnp.abs(difference)


@dataclass(frozen=True)
class RelativeLp(MSE):
    """|prediction - truth|_p / |truth|_p per sample, frame and channel, |u|_p = (sum w |u|^p)^(1/p) over cells.

    With uniform cells this is `LpLoss(d, p).rel` of neuraloperator 2.0, with the same "sum" and "mean".
    Li et al. 2021, arXiv:2010.08895, section 5.

    Attributes:
        p: 1 or 2.
        joint: one norm over all channels together, for vector fields whose components may vanish one at a time.
        epsilon: added to the norm of the truth.
    """

    p: int = 2
    joint: bool = False
    epsilon: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        if self.p not in (1, 2):
            raise ConfigError(f"p is {self.p}, but the relative loss has p = 1 or p = 2.")

    def errors(self, prediction: Frames, truth: Frames, spec: Spec, mask=None) -> Errors:
        """As `MSE.errors`; with `joint` the last axis has length 1."""
        prediction, truth, cells = _prepare(prediction, truth, spec, mask)
        error = self._power(prediction - truth, cells, spec, mask is not None)
        return self._ratio(error, self._power(truth, cells, spec, mask is not None), spec)

    def _power(self, frames, cells, spec, masked):
        """sum w |u|^p over cells `(batch, time, channel)`."""
        return _space_sum(cells * (frames**2 if self.p == 2 else jnp.abs(frames)), 2)

    def _ratio(self, error, size, spec):
        if self.joint:
            weights = self._channel_weights(spec)  # inside the norm: afterwards there are no channels to weigh
            error, size = (jnp.sum(a * weights, axis=-1, keepdims=True) for a in (error, size))
        if self.p == 2:
            error, size = _root(error), _root(size)
        return error / (size + self.epsilon)


@dataclass(frozen=True)
class H1(RelativeLp):
    """Relative Sobolev norm: values and first derivatives along every axis, |u|_H1^2 = sum w (u^2 + |grad u|^2).

    Derivatives are central differences; third-order one-sided ones at the ends of an axis that is not periodic.
    With `spacing="unit"` and `boundary="periodic"` this is the default `H1Loss(d)` of neuraloperator 2.0.

    Attributes:
        spacing: "unit" takes 1 / number of points as the spacing of every axis, as if its length were 1 and its points
            even, so that the derivative's share does not depend on the unit of length; "physical" uses the spacing of
            the grid, which must be even (else SpecError).
        boundary: "grid" follows `Axis.periodic`; "periodic" and "one-sided" hold for every axis.
    """

    spacing: Literal["unit", "physical"] = "unit"
    boundary: Literal["grid", "periodic", "one-sided"] = "grid"

    def __post_init__(self):
        super().__post_init__()
        if self.p != 2:
            raise ConfigError(f"p is {self.p}, but the H1 loss is defined for p = 2.")

    def _power(self, frames, cells, spec, masked):
        total = _space_sum(cells * frames**2, 2)
        for position, axis in enumerate(spec.grid.axes):
            periodic = {"grid": axis.periodic, "periodic": True, "one-sided": False}[self.boundary]
            if not periodic and len(axis) < 4:
                raise ConfigError(
                    f"Axis {axis.name!r} has {len(axis)} points, but one-sided differences need 4. Use another loss."
                )
            if self.spacing == "physical":
                check_even(axis, "The H1 loss with spacing='physical'", "use spacing='unit'")
            step = abs(axis.spacing) if self.spacing == "physical" else 1.0 / len(axis)
            slope = derivative(frames, position + 2, step, periodic)
            seen = cells
            if masked:
                # A difference that reaches into a masked cell would see the fill value, not the field.
                hidden = derivative((cells <= 0).astype(frames.dtype), position + 2, 1.0, periodic, absolute=True)
                seen = jnp.where(hidden > 0, 0.0, cells)
            total = total + _space_sum(seen * slope**2, 2)
        return total


@dataclass(frozen=True)
class SliceNormalized(MSE):
    """Mean error of each slice of channels, relative to the mean size of its truth over the whole batch.

    Of every frame and slice: mean |prediction - truth|^p over samples, cells and the channels of the slice, divided by
    the mean of |truth|^p. The ratio is one of batch means (with `accumulate`, of each part of the batch), so that
    samples near zero do not dominate. Where a mask hides cells, predictions count as right: they add nothing above,
    but the truth there counts below. Herde et al. 2024, arXiv:2405.19101, section 2.

    Attributes:
        p: 1 or 2.
        slices: channel numbers between which the slices lie: (0, 1, 3, 4) joins the second and the third of four
            channels, as those of one vector. Empty: every channel by itself.
        epsilon: added to the size of the truth.
    """

    p: int = 1
    slices: tuple[int, ...] = ()
    epsilon: float = 1e-10

    joint = True

    def __post_init__(self):
        super().__post_init__()
        if self.p not in (1, 2):
            raise ConfigError(f"p is {self.p}, but the slice-normalized loss has p = 1 or p = 2.")
        if self.channels or self.reduction != "mean":
            raise ConfigError("The slice-normalized loss weighs all slices alike: leave `channels` and `reduction`.")
        rising = all(low < high for low, high in zip(self.slices, self.slices[1:], strict=False))
        if self.slices and (len(self.slices) < 2 or min(self.slices) < 0 or not rising):
            raise ConfigError(f"slices are {self.slices}, but they must rise and be two numbers or more: (0, 1, 3, 4).")

    def errors(self, prediction: Frames, truth: Frames, spec: Spec, mask=None) -> Errors:
        """As `MSE.errors`, but the last axis has one entry for each slice."""
        prediction, truth, cells = _prepare(prediction, truth, spec, None)
        edges = self.slices or tuple(range(len(spec.channels) + 1))
        if edges[-1] > len(spec.channels):
            raise ConfigError(f"slices are {edges}, but there are {len(spec.channels)} channels {list(spec.names)}.")
        if mask is not None:
            prediction = replace_masked(prediction, truth, jnp.asarray(mask)[:, None])
        error, size = (
            _mean(abs(frames) if self.p == 1 else frames**2, cells) for frames in (prediction - truth, truth)
        )
        pairs = list(zip(edges, edges[1:], strict=False))
        error, size = (jnp.stack([part[..., a:b].mean(-1) for a, b in pairs], axis=-1) for part in (error, size))
        return error / (size.mean(0) + self.epsilon)


def replace_masked(prediction, truth, mask):
    """`prediction` where `mask` is set, `truth` elsewhere: hidden places count as predicted, without a gradient."""
    return jnp.where(jnp.asarray(mask) > 0, prediction, jnp.asarray(truth, prediction.dtype))


def derivative(frames, axis: int, step: float, periodic: bool, absolute: bool = False):
    """First derivative along `axis`: second-order central, third-order one-sided at open ends (at least 4 points).

    `absolute` takes the magnitudes of the coefficients: positive where the stencil touches a positive cell.
    """
    sign = 1.0 if absolute else -1.0
    if periodic:
        return (jnp.roll(frames, -1, axis) + sign * jnp.roll(frames, 1, axis)) / (2 * step)

    def at(index):
        return jnp.take(frames, jnp.asarray([index]), axis=axis)

    n = frames.shape[axis]
    inner = _cut(frames, axis, 2, n) + sign * _cut(frames, axis, 0, n - 2)
    coefficients = [11.0, 18.0, 9.0, 2.0]
    signs = [1.0] * 4 if absolute else [-1.0, 1.0, -1.0, 1.0]
    first = sum(s * c * at(i) for i, (s, c) in enumerate(zip(signs, coefficients, strict=True)))
    last = sum(s * c * at(n - 1 - i) for i, (s, c) in enumerate(zip(signs, coefficients, strict=True)))
    last = last if absolute else -last
    return jnp.concatenate([first / (6 * step), inner / (2 * step), last / (6 * step)], axis=axis)


def _cut(array, axis, start, stop):
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _prepare(prediction, truth, spec: Spec, mask):
    """Both in float32 or better, and cell weights `(batch or 1, 1, *space, channel or 1)`."""
    expected = (*spec.grid.shape, len(spec.channels))
    if prediction.shape != truth.shape or prediction.ndim != spec.grid.ndim + 3 or prediction.shape[2:] != expected:
        raise SpecError(
            f"The loss got a prediction {tuple(prediction.shape)} and a truth {tuple(truth.shape)}, but both must be "
            f"(batch, time, {', '.join(map(str, expected))})."
        )
    dtype = jnp.promote_types(jnp.result_type(prediction, truth), jnp.float32)
    cells = jnp.asarray(spec.grid.weights(), dtype)[None, None, ..., None]
    if mask is not None:
        cells = cells * jnp.asarray(mask, dtype)[:, None]
    return jnp.asarray(prediction, dtype), jnp.asarray(truth, dtype), cells


def _space_sum(array, first: int):
    """Sums the spatial axes, which begin at axis `first` and end before the last one."""
    return jnp.sum(array, axis=tuple(range(first, array.ndim - 1)))


def _mean(values, cells):
    total = _space_sum(cells, 2)
    return _space_sum(values * cells, 2) / jnp.where(total > 0, total, 1.0)


def _root(square):
    """Square root whose gradient at 0 is 0 instead of NaN."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


Loss = MSE | MAE | RelativeLp | H1 | SliceNormalized
LOSSES = {"h1": H1, "mae": MAE, "mse": MSE, "relative": RelativeLp, "slice_normalized": SliceNormalized}


def resolve(loss: "Loss | str") -> Loss:
    """A loss from its name in `LOSSES`, or the loss itself. Raises ConfigError naming the nearest one."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ConfigError(f"There is no loss {loss!r}." + suggest(loss, LOSSES))
        return LOSSES[loss]()
    made = dataclasses.is_dataclass(loss) and not isinstance(loss, type)
    if not (made and hasattr(loss, "errors") and hasattr(loss, "reduce")):
        raise ConfigError(
            f"{loss!r} is not a loss: give one of {', '.join(sorted(LOSSES))}, or its dataclass, as MSE()."
        )
    return loss
