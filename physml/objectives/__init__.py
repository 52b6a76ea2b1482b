"""Training strategies: a loss from a stepper and a window of data.

An objective knows the stepper's contract only (`history`, `encode`, `advance`, `decode`, `normalizer`). It is a pure
function of arrays: usable in a notebook, inside jit, and under any sharding.
"""

from physml.objectives.unrolled import OneStep, Unrolled

OBJECTIVES = {
    "one_step": OneStep,
    "unrolled": Unrolled,
}

__all__ = ["OBJECTIVES", "OneStep", "Unrolled"]
