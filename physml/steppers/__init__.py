"""Steppers: one time step, physical units in and out."""

from physml.steppers.bundled import BundledConfig
from physml.steppers.closure import ClosureConfig
from physml.steppers.corrected import CorrectedConfig
from physml.steppers.floors import (
    FLOORS,
    ClimatologyConfig,
    ExtrapolationConfig,
    LinearInverseConfig,
    PersistenceConfig,
)
from physml.steppers.intervals import IntervalConfig, averaged
from physml.steppers.learned_interpolation import LearnedInterpolationConfig
from physml.steppers.members import Members, stack_members
from physml.steppers.plain import DirectConfig, ResidualConfig
from physml.steppers.refiner import RefinerConfig
from physml.steppers.temporal_stencil import TemporalStencilConfig

STEPPERS = {
    "bundled": BundledConfig,
    "climatology": ClimatologyConfig,
    "closure": ClosureConfig,
    "corrected": CorrectedConfig,
    "direct": DirectConfig,
    "extrapolation": ExtrapolationConfig,
    "interval": IntervalConfig,
    "learned_interpolation": LearnedInterpolationConfig,
    "linear_inverse": LinearInverseConfig,
    "persistence": PersistenceConfig,
    "refiner": RefinerConfig,
    "residual": ResidualConfig,
    "temporal_stencil": TemporalStencilConfig,
}

__all__ = [
    "BundledConfig",
    "ClosureConfig",
    "CorrectedConfig",
    "DirectConfig",
    "FLOORS",
    "IntervalConfig",
    "LearnedInterpolationConfig",
    "Members",
    "RefinerConfig",
    "ResidualConfig",
    "STEPPERS",
    "TemporalStencilConfig",
    "averaged",
    "stack_members",
]
