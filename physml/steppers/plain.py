"""Steppers that call a network once: the next frame itself, or its normalized increment."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from physml.coding import check_fields
from physml.errors import ConfigError, SpecError, first_line
from physml.fields import Context, Grid, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.packing import count, pack


@dataclass(frozen=True)
class DirectConfig:
    """The network predicts the next frame. `history=0`: operator learning from static fields and parameters.

    Attributes:
        history: frames that go in.
        calendar: give the network the time of year and of day.
        lead: give the network the length of the step.
        longest_lead: longest step, counted in time steps of the data, that the network is trained for; above 1 only
            with `lead`. `AllToAll` trains up to it, `direct_leads` (`from physml.rollout import direct_leads`)
            forecasts up to it.
    """

    history: int = 1
    calendar: bool = False
    lead: bool = False
    longest_lead: int = 1

    def __post_init__(self):
        check_fields(self)
        if self.history < 0:
            raise ConfigError(f"history is {self.history}, but it counts the frames that go in: 0 or more.")
        if self.longest_lead < 1 or (self.longest_lead > 1 and not self.lead):
            raise ConfigError(
                f"longest_lead is {self.longest_lead} with lead={self.lead}, but it must be at least 1, and a network "
                "that takes longer steps must be told their length: set lead=True."
            )

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network that this stepper needs. Raises SpecError when nothing would go in."""
        inputs, scalars = count(spec, self.history, self.calendar, self.lead)
        if inputs + scalars == 0:
            raise SpecError(
                "With history=0 the network sees only forcing, static fields and parameters, but the data has none. "
                "Set history to at least 1, or name static fields in the data config."
            )
        return Signature(spec.grid, inputs, scalars, len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Direct":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return Direct(self, spec, model, normalizer, constraints)


@dataclass(frozen=True)
class ResidualConfig(DirectConfig):
    """The network predicts the increment to the next frame, in units of the increments' own scale.

    That scale is of one time step: with `lead` the output of the network grows with it, and has to vanish at lead zero.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ConfigError("A residual stepper adds to the last frame, so history must be at least 1. Use `direct`.")

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Residual":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
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
            shape = (context.time.shape[0], 1, *context.spec.grid.shape, len(self.spec.channels))
            return jnp.zeros(shape, frames.dtype)
        return frames

    def advance(self, state, context: Context):
        previous = state[:, -1]
        output = self.ask(*self.inputs(state, context), context)
        frame = self.finish(self.predict(previous, output, context), previous, context)
        return jnp.concatenate([state[:, 1:], frame[:, None].astype(state.dtype)], axis=1)

    def inputs(self, frames, context: Context):
        """Fields and scalars that the network reads of `frames` `(batch, history, *space, channel)`."""
        config = self.config
        return pack(frames, context, self.normalizer, self.history, config.calendar, config.lead)

    def ask(self, fields, scalars, context: Context):
        """What the network says."""
        random = {"key": context.key} if getattr(self.model, "dropout", 0) else {}
        return self.model(fields, scalars, **random)

    def finish(self, frame, previous, context: Context):
        """The frame after mask and constraints."""
        if context.mask is not None:
            frame = jnp.where(context.mask > 0, frame, 0)  # not a product: the network may say NaN on land
        for constraint in self.constraints or ():
            frame = constraint.project(frame, previous, context)
        return frame

    def predict(self, previous, output, context: Context):
        return self.normalizer.denormalize(output)

    def decode(self, state):
        return state[:, -1]

    def __repr__(self) -> str:
        spec, model = self.spec, type(self.model).__name__
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))
        return (
            f"{type(self).__name__}({model}, {count:,} parameters)\n"
            f"  variables: {', '.join(spec.names)}\n  grid: {', '.join(map(repr, spec.grid.axes))}\n"
            f"  history: {self.history}, time step: {spec.time_step:g} {spec.time_unit}".rstrip()
        )

    __str__ = __repr__

    def on_grid(self, grid: Grid) -> "Direct":
        """The same weights on another grid. Raises SpecError where the architecture does not allow it."""
        spec, model = self.spec.on(grid), self.model
        if hasattr(model, "on_grid"):
            model = model.on_grid(grid)
        check_fits(self.config, spec, model, self.normalizer)
        return type(self)(self.config, spec, model, self.normalizer, tuple(self.constraints or ()))


class Residual(Direct):
    def predict(self, previous, output, context: Context):
        return previous + self.normalizer.increment(output)


def check_fits(config: DirectConfig, spec: Spec, model, normalizer: Normalizer) -> None:
    """Raises SpecError unless model and normalizer have the shapes that the stepper needs on `spec`, ConfigError when
    there is none.

    The model is traced with abstract arrays: nothing is computed.
    """
    if model is None or normalizer is None:
        missing = "model" if model is None else "normalizer"
        raise ConfigError(f"{type(config).__name__} needs a {missing}, but got None.")
    groups = {"frames": spec.channels, "forcing": spec.forcing, "static": spec.static, "parameters": spec.parameters}
    for name, channels in groups.items():
        scaling = getattr(normalizer, name)
        size = 0 if scaling is None else scaling.scale.shape[-1]
        if size != len(channels):
            raise SpecError(
                f"The normalizer holds {size} numbers for {name}, but the data has {[c.name for c in channels]}. "
                "Fit it to windows with the same spec: Normalizer.fit(dataset.windows())."
            )
    signature = config.signature(spec)
    fields = jax.ShapeDtypeStruct((1, *spec.grid.shape, signature.inputs), jnp.float32)
    scalars = jax.ShapeDtypeStruct((1, signature.scalars), jnp.float32)
    graph, state = nnx.split(model)
    try:
        output = jax.eval_shape(lambda s, f, c: nnx.merge(graph, s)(f, c), state, fields, scalars)
    except SpecError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise SpecError(
            f"{type(model).__name__} does not accept {signature.inputs} field channels on {spec.grid.shape} points and "
            f"{signature.scalars} scalars ({type(config).__name__}, history={config.history}): {first_line(error)} "
            "Build it with the signature that the stepper's config computes: config.signature(spec)."
        ) from error
    expected = (1, *spec.grid.shape, signature.outputs)
    if getattr(output, "shape", None) != expected:
        raise SpecError(
            f"{type(model).__name__} gives {getattr(output, 'shape', output)}, but {expected} was expected: "
            f"{signature.outputs} channels {list(spec.names)} on {spec.grid.shape} points."
        )
