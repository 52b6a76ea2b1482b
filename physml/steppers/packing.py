"""From frames and context to what a model eats: normalized fields and scalars."""

import jax.numpy as jnp

from physml.fields import Context, Spec
from physml.normalize import Normalizer


def count(spec: Spec, history: int, calendar: bool, lead: bool) -> tuple[int, int]:
    """(input channels, scalars) that `pack` makes."""
    inputs = history * len(spec.channels) + len(spec.forcing) + len(spec.static)
    return inputs, len(spec.parameters) + 4 * calendar + lead


def pack(frames, context: Context, normalizer: Normalizer, history: int, calendar: bool, lead: bool):
    """`frames (batch, history, *space, channel)` in physical units -> `(fields, scalars)`, normalized.

    Order of the fields: history (oldest first, channels inside), forcing, static. Order of the scalars: parameters,
    then sine and cosine of the year and of the day, then the lead in units of the time step.
    """
    spec = context.spec
    batch, space = frames.shape[0], spec.grid.shape
    parts = []
    if history:
        z = normalizer.normalize(frames)
        if context.mask is not None:
            z = z * context.mask[:, None]
        parts.append(jnp.moveaxis(z, 1, -2).reshape(batch, *space, -1))
    if spec.forcing:
        parts.append(normalizer.forcing(context.forcing))
    if spec.static:
        parts.append(normalizer.static(context.static))
    fields = jnp.concatenate(parts, axis=-1) if parts else jnp.zeros((batch, *space, 0), frames.dtype)
    numbers = [normalizer.parameters(context.parameters)] if spec.parameters else []
    if calendar:
        angle = 2 * jnp.pi * context.calendar
        numbers += [jnp.sin(angle), jnp.cos(angle)]
    if lead:
        numbers.append(context.lead[:, None] / spec.time_step)
    scalars = jnp.concatenate(numbers, axis=-1) if numbers else jnp.zeros((batch, 0), frames.dtype)
    return fields, scalars
