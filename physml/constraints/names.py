"""Names in constraints and steppers: of channels, and of the fields and parameters beside them."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.errors import SpecError, suggest
from physml.fields import Axis, Channel, Context, Spec


def channels_of(names: Any) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


def positions(spec: Spec, names: tuple[str, ...]) -> list[int]:
    """Places of predicted channels. Raises SpecError with the nearest name when there is none of that name."""
    return [spec.index(name) for name in names]


def field_of(name: str, frame: Any, context: Context) -> Float[Array, "batch *space 1"]:
    """A predicted channel of `frame`, or a forcing or static field of the context, by name.

    Raises SpecError when the spec has none of that name.
    """
    spec = context.spec
    for group, values in (("channels", frame), ("forcing", context.forcing), ("static", context.static)):
        names = [channel.name for channel in getattr(spec, group)]
        if name in names:
            index = names.index(name)
            return jnp.asarray(values)[..., index : index + 1]
    raise SpecError(_missing(name, spec))


def density_of(name: str, frame: Any, context: Context) -> Float[Array, "batch *space 1"] | int:
    """`field_of`, or 1 without a name."""
    return field_of(name, frame, context) if name else 1


def check_density(name: str, channels: tuple[str, ...], spec: Spec) -> None:
    """Raises SpecError for a density that is no field, or one of the channels that it multiplies."""
    if name and name not in _fields(spec):
        raise SpecError(_missing(name, spec))
    if name in channels:
        raise SpecError(f"{name!r} cannot be its own density. Leave `density` out, or name other channels.")


def check_known(what: str, names: Iterable[str], *groups: Iterable[Axis | Channel]) -> None:
    """Raises SpecError for a name that is in none of the groups of a spec; `what` they hold, e.g. "forcing field"."""
    known = [entry.name for group in groups for entry in group]
    for name in names:
        if name not in known:
            raise SpecError(f"There is no {what} {name!r}." + suggest(name, known))


def _fields(spec: Spec) -> list[str]:
    return [channel.name for group in (spec.channels, spec.forcing, spec.static) for channel in group]


def _missing(name: str, spec: Spec) -> str:
    return f"There is no field {name!r}; the data has {', '.join(_fields(spec))}. Name one of them."
