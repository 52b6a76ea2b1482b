"""Constraints on a stepper that exists already, put on and taken off without training."""

from typing import Any

from flax import nnx

from physml.errors import ConfigError


def constrain(stepper: Any, *constraints: Any, keep: bool = True) -> Any:
    """The same weights, with `constraints` projected after every step, behind those that the stepper has.

    Args:
        stepper: any stepper with a network; it stays as it is.
        constraints: of `physml.constraints`, e.g. `MassFixer("rho")`, or objects of one's own with `violation` and
            `project` (which can be saved once their class is registered). They are applied in order.
        keep: whether those that the stepper has stay; `constrain(stepper, keep=False)` takes all off.

    Raises ConfigError for a stepper that takes no constraints, SpecError for one that does not fit its data.
    """
    holder = getattr(stepper, "stacked", stepper)
    if not hasattr(holder, "constraints"):
        raise ConfigError(
            f"{type(stepper).__name__} takes no constraints: it predicts nothing that could break them. "
            "Constrain a stepper with a network."
        )
    built = []
    for constraint in constraints:
        if isinstance(constraint, str) or not (hasattr(constraint, "project") or hasattr(constraint, "build")):
            raise ConfigError(
                f"{constraint!r} is no constraint. Pass objects, e.g. physml.constraints.MassFixer('rho'); "
                "physml.constraints.text.from_text reads them from text."
            )
        built.append(constraint.build(stepper.spec) if hasattr(constraint, "build") else constraint)
    graph, state = nnx.split(stepper)
    result = nnx.merge(graph, state)
    holder = getattr(result, "stacked", result)
    kept = list(holder.constraints or ()) if keep else []
    holder.constraints = nnx.data(nnx.List([*kept, *built])) if kept or built else nnx.data(None)
    return result
