"""Training: the update, the loop, checkpoints, logs."""

from physml.training.loop import FitResult, fit, plan
from physml.training.members import MembersResult, fit_members, spread_members
from physml.training.optimizers import OptimizerConfig, TrainingConfig

__all__ = [
    "FitResult",
    "MembersResult",
    "OptimizerConfig",
    "TrainingConfig",
    "fit",
    "fit_members",
    "plan",
    "spread_members",
]
