"""Steps of several intervals by one network, and forecasts that average over them.

Nguyen et al. 2023, arXiv:2312.03876 (Stormer), section 3.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.errors import ConfigError, SpecError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer, check_intervals
from physml.steppers.packing import count
from physml.steppers.plain import Direct, check_fits


@dataclass(frozen=True)
class IntervalConfig:
    """The network predicts the increment over an interval that it is told, in units of that interval's increments.

    Train with `RandomInterval`. Rollouts step by one frame; `physml.rollout.rollout_stride` steps by another interval.
    With `average` the forecast at frame n is the mean over the rollouts of all intervals that divide n, at the price of
    the sum of their inverses in network calls per frame (1.75 for 1, 2, 4). `averaged` switches it on and off.

    Attributes:
        intervals: in frames, rising from 1: subsample the data in time where the shortest step is longer.
        calendar: give the network the time of year and of day.
        average: forecast the mean over intervals.
    """

    intervals: tuple[int, ...] = (1, 2, 4)
    calendar: bool = False
    average: bool = False

    history: ClassVar[int] = 1
    lead: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)
        if check_intervals(self.intervals)[:1] != (1,):
            raise ConfigError(
                f"intervals are {self.intervals}, but forecasts of every frame need the interval 1. Add it, or "
                "subsample the data in time."
            )

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network that this stepper needs."""
        inputs, scalars = count(spec, self.history, self.calendar, self.lead)
        return Signature(spec.grid, inputs, scalars, len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Interval":
        """Raises SpecError when the model does not fit, or the normalizer lacks the increments of an interval;
        ConfigError when there is none."""
        check_fits(self, spec, model, normalizer)
        if missing := [interval for interval in self.intervals if interval not in normalizer.intervals]:
            raise SpecError(
                f"The normalizer has no scale of increments over {missing} frames, only over "
                f"{list(normalizer.intervals)}. Fit it with them: fit_normalizer(data, intervals={self.intervals})."
            )
        return (Averaged if self.average else Interval)(self, spec, model, normalizer, constraints)


class Interval(Direct):
    """State: the last frame, `(batch, 1, *space, channel)`. A step is of the interval nearest to `context.lead`."""

    def predict(self, previous, output, context: Context):
        scale = self.scale(context.lead)
        return previous + output * scale.reshape(scale.shape[0], *[1] * (output.ndim - 2), scale.shape[1])

    def scale(self, lead: Float[Array, " batch"]) -> Float[Array, " batch channel"]:
        """Root mean square of the increments over steps of length `lead`, in physical units."""
        intervals = self.config.intervals
        nearest = jnp.argmin(abs(lead[:, None] / self.spec.time_step - jnp.asarray(intervals)), axis=1)
        rows = [self.normalizer.intervals.index(interval) for interval in intervals]
        return self.normalizer.interval_increments[...][jnp.asarray(rows)[nearest]]


class Averaged(Interval):
    """State: the latest frame of every interval's rollout, `(batch, interval, *space, channel)`, and the frames so far.

    Constraints act on every rollout; of their mean those hold that are linear.
    """

    def encode(self, frames, context: Context):
        return jnp.repeat(frames, len(self.config.intervals), axis=1), jnp.zeros((), jnp.int32)

    def advance(self, state, context: Context):
        latest, frames = state
        frames = frames + 1
        results = []
        for i, interval in enumerate(self.config.intervals):
            lead = jnp.full_like(context.lead, interval * self.spec.time_step)
            key = None if context.key is None else jax.random.fold_in(context.key, i)
            step = dataclasses.replace(context, lead=lead, key=key)

            def advance(frame, step=step):
                return super(Averaged, self).advance(frame, step).astype(frame.dtype)

            frame = latest[:, i : i + 1]
            results.append(
                advance(frame) if interval == 1 else jax.lax.cond(frames % interval == 0, advance, lambda f: f, frame)
            )
        return jnp.concatenate(results, axis=1), frames

    def decode(self, state):
        latest, frames = state
        due = frames % jnp.asarray(self.config.intervals) == 0
        column = due.reshape(-1, *[1] * (latest.ndim - 2))
        return jnp.where(column, latest, 0).sum(1) / due.sum().astype(latest.dtype)


def averaged(stepper: Interval, average: bool = True) -> Interval:
    """The same trained stepper with averaging over intervals switched on or off.

    Raises ConfigError for a stepper without intervals.
    """
    if not isinstance(stepper, Interval):
        raise ConfigError(
            f"{type(stepper).__name__} has no intervals to average over. Train one with IntervalConfig and "
            "RandomInterval."
        )
    config = dataclasses.replace(stepper.config, average=average)
    kind = Averaged if average else Interval
    return kind(config, stepper.spec, stepper.model, stepper.normalizer, tuple(stepper.constraints or ()))
