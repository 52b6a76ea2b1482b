"""Physics of a frame, projected after each step.

A constraint is a frozen dataclass that is its own config: `build(spec)` checks it against the names of the data and
gives what projects. Any stepper takes some: `constraints=` of an experiment, `physml.constrain(stepper, ...)`, or
`physml rollout --constraint mass:rho`.
"""

from physml.constraints.mass import MassFixer
from physml.constraints.positivity import Positivity

CONSTRAINTS: dict[str, type] = {
    "mass": MassFixer,
    "positivity": Positivity,
}

__all__ = ["CONSTRAINTS", "MassFixer", "Positivity"]
