"""Training strategies: a loss from a stepper and a window of data.

An objective knows the stepper's contract only (`history`, `encode`, `advance`, `decode`, `normalizer`). It is a pure
function of arrays: usable in a notebook, inside jit, and under any sharding.
"""

from physml.objectives.curriculum import Curriculum
from physml.objectives.denoising import Denoising
from physml.objectives.intervals import RandomInterval
from physml.objectives.likelihood import Likelihood
from physml.objectives.noise import NoisyInputs
from physml.objectives.pairs import AllToAll, ordered_pairs
from physml.objectives.penalized import PENALTIES, ConstraintPenalty, Penalized, SpectralPower
from physml.objectives.unrolled import OneStep, Pushforward, Unrolled

OBJECTIVES = {
    "all_to_all": AllToAll,
    "curriculum": Curriculum,
    "denoising": Denoising,
    "likelihood": Likelihood,
    "noisy_inputs": NoisyInputs,
    "one_step": OneStep,
    "penalized": Penalized,
    "pushforward": Pushforward,
    "random_interval": RandomInterval,
    "unrolled": Unrolled,
}

__all__ = [
    "OBJECTIVES",
    "PENALTIES",
    "AllToAll",
    "ConstraintPenalty",
    "Curriculum",
    "Denoising",
    "Likelihood",
    "NoisyInputs",
    "OneStep",
    "Penalized",
    "Pushforward",
    "RandomInterval",
    "SpectralPower",
    "Unrolled",
    "ordered_pairs",
]
