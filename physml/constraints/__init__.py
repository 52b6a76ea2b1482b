"""Physics of a frame, projected after each step.

A constraint is a frozen dataclass that is its own config: `build(spec)` checks it against the names of the data and
gives what projects. Any stepper takes some: `constraints=` of an experiment, `physml.constrain(stepper, ...)`, or
`physml rollout --constraint mass:rho`.
"""

from physml.constraints.boundary import Boundary, no_slip
from physml.constraints.conditioning import LowRank, condition, project_linear
from physml.constraints.divergence import DivergenceFree
from physml.constraints.inequalities import monotone, nonnegative
from physml.constraints.linear import Linear
from physml.constraints.mass import MassFixer
from physml.constraints.operators import right_rule, second_difference, smooth, trapezoid
from physml.constraints.positivity import Positivity
from physml.constraints.quadratic import QuadraticInvariant

CONSTRAINTS: dict[str, type] = {
    "boundary": Boundary,
    "divergence_free": DivergenceFree,
    "linear": Linear,
    "mass": MassFixer,
    "positivity": Positivity,
    "quadratic": QuadraticInvariant,
}

__all__ = [
    "CONSTRAINTS",
    "Boundary",
    "DivergenceFree",
    "Linear",
    "LowRank",
    "MassFixer",
    "Positivity",
    "QuadraticInvariant",
    "condition",
    "monotone",
    "no_slip",
    "nonnegative",
    "project_linear",
    "right_rule",
    "second_difference",
    "smooth",
    "trapezoid",
]
