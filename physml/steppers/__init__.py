"""Steppers: one time step, physical units in and out."""

from physml.steppers.plain import DirectConfig, ResidualConfig

STEPPERS = {"direct": DirectConfig, "residual": ResidualConfig}
