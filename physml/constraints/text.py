"""Constraints as one line of text, for the command line."""

import dataclasses
from typing import Any

from physml import constraints
from physml.coding import from_dict, override
from physml.errors import ConfigError, suggest


def from_text(text: str) -> Any:
    """A constraint from `NAME[:CHANNELS[:OPTION=VALUE]...]`, e.g. "mass:rho" or "mass:co2,ch4:method=multiplicative".

    CHANNELS, separated by commas, are the first field of the constraint. Raises ConfigError for what is unknown.
    """
    name, *rest = text.strip().split(":")
    if name not in constraints.CONSTRAINTS:
        raise ConfigError(f"There is no constraint {name!r}, of {text!r}." + suggest(name, constraints.CONSTRAINTS))
    data: dict[str, Any] = {"name": name}
    if rest and "=" not in rest[0]:
        first = dataclasses.fields(constraints.CONSTRAINTS[name])[0].name
        data[first] = [part.strip() for part in rest.pop(0).split(",") if part.strip()]
    wrong = [part for part in rest if "=" not in part]
    if wrong:
        raise ConfigError(
            f"{wrong[0]!r} in --constraint {text!r} is not an option. "
            "Write NAME:CHANNELS:OPTION=VALUE, e.g. mass:rho or mass:co2,ch4:method=multiplicative."
        )
    return from_dict(constraints.CONSTRAINTS, override(data, rest), f"constraint {text!r}")
