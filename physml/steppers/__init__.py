"""Steppers: one time step, physical units in and out."""

from physml.steppers.floors import (
    FLOORS,
    ClimatologyConfig,
    ExtrapolationConfig,
    LinearInverseConfig,
    PersistenceConfig,
)
from physml.steppers.plain import DirectConfig, ResidualConfig

STEPPERS = {
    "climatology": ClimatologyConfig,
    "direct": DirectConfig,
    "extrapolation": ExtrapolationConfig,
    "linear_inverse": LinearInverseConfig,
    "persistence": PersistenceConfig,
    "residual": ResidualConfig,
}

__all__ = ["FLOORS", "STEPPERS", "DirectConfig", "ResidualConfig"]
