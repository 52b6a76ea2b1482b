"""Training: the update, the loop, checkpoints, logs."""

from physml.training.loop import FitResult, fit
from physml.training.optimizers import OptimizerConfig, TrainingConfig

__all__ = ["FitResult", "OptimizerConfig", "TrainingConfig", "fit"]
