"""Steppers that call a network once: the next frame itself, or its normalized increment."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.packing import count, pack


@dataclass(frozen=True)
class DirectConfig:
    """The network predicts the next frame. `history=0`: operator learning from static fields and parameters.

    Attributes:
        history: frames that go in.
        calendar: give the network the time of year and of day.
        lead: give the network the length of the step.
    """

    history: int = 1
    calendar: bool = False
    lead: bool = False

    def __post_init__(self):
        if self.history < 0:
            raise ConfigError(f"history is {self.history}, but it counts the frames that go in: 0 or more.")

    def signature(self, spec: Spec) -> Signature:
        inputs, scalars = count(spec, self.history, self.calendar, self.lead)
        return Signature(spec.grid, inputs, scalars, len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Direct":
        return Direct(self, spec, model, normalizer, constraints)


@dataclass(frozen=True)
class ResidualConfig(DirectConfig):
    """The network predicts the increment to the next frame, in units of the increments' own scale."""

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ConfigError("A residual stepper adds to the last frame, so history must be at least 1. Use `direct`.")

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Residual":
        return Residual(self, spec, model, normalizer, constraints)


class Direct(nnx.Module):
    """State: the last `history` frames (at least one), `(batch, history, *space, channel)` in physical units."""

    def __init__(self, config: DirectConfig, spec: Spec, model, normalizer: Normalizer, constraints=()):
        self.config = config
        self.history = config.history
        self.spec = spec
        self.model = model
        self.normalizer = normalizer
        self.constraints = nnx.List(list(constraints)) if constraints else None

    def encode(self, frames, context: Context):
        if self.history == 0:
            return jnp.zeros((context.time.shape[0], 1, *context.spec.grid.shape, len(self.spec.channels)), frames.dtype)
        return frames

    def advance(self, state, context: Context):
        config = self.config
        fields, scalars = pack(state, context, self.normalizer, self.history, config.calendar, config.lead)
        previous = state[:, -1]
        frame = self.predict(previous, self.model(fields, scalars))
        if context.mask is not None:
            frame = frame * context.mask
        for constraint in self.constraints or ():
            frame = constraint.project(frame, previous, context)
        return jnp.concatenate([state[:, 1:], frame[:, None]], axis=1)

    def predict(self, previous, output):
        return self.normalizer.denormalize(output)

    def decode(self, state):
        return state[:, -1]

    def on_grid(self, grid) -> "Direct":
        """The same weights on another grid, where the architecture allows it."""
        other = nnx.clone(self)
        other.spec = dataclasses.replace(self.spec, grid=grid)
        return other


class Residual(Direct):
    def predict(self, previous, output):
        return previous + self.normalizer.increment(output)
