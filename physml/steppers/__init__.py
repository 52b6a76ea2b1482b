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
from physml.steppers.flux import FluxConfig
from physml.steppers.gaussian import Distribution, GaussianConfig
from physml.steppers.intervals import IntervalConfig, averaged
from physml.steppers.learned_interpolation import LearnedInterpolationConfig
from physml.steppers.members import Members, stack_members
from physml.steppers.plain import DirectConfig, ResidualConfig
from physml.steppers.refiner import RefinerConfig
from physml.steppers.stream_function import StreamFunctionConfig
from physml.steppers.temporal_stencil import TemporalStencilConfig
from physml.steppers.transport import TransportConfig

STEPPERS = {
    "bundled": BundledConfig,
    "climatology": ClimatologyConfig,
    "closure": ClosureConfig,
    "corrected": CorrectedConfig,
    "direct": DirectConfig,
    "extrapolation": ExtrapolationConfig,
    "flux": FluxConfig,
    "gaussian": GaussianConfig,
    "interval": IntervalConfig,
    "learned_interpolation": LearnedInterpolationConfig,
    "linear_inverse": LinearInverseConfig,
    "persistence": PersistenceConfig,
    "refiner": RefinerConfig,
    "residual": ResidualConfig,
    "stream_function": StreamFunctionConfig,
    "temporal_stencil": TemporalStencilConfig,
    "transport": TransportConfig,
}

__all__ = [
    "BundledConfig",
    "ClimatologyConfig",
    "ClosureConfig",
    "CorrectedConfig",
    "DirectConfig",
    "Distribution",
    "ExtrapolationConfig",
    "FLOORS",
    "FluxConfig",
    "GaussianConfig",
    "IntervalConfig",
    "LearnedInterpolationConfig",
    "LinearInverseConfig",
    "Members",
    "PersistenceConfig",
    "RefinerConfig",
    "ResidualConfig",
    "STEPPERS",
    "StreamFunctionConfig",
    "TemporalStencilConfig",
    "TransportConfig",
    "averaged",
    "stack_members",
]
