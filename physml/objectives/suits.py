"""Whether an objective trains all that a stepper is meant for."""

import logging
import math

from physml.errors import ConfigError
from physml.objectives.denoising import Denoising
from physml.objectives.intervals import RandomInterval
from physml.objectives.pairs import AllToAll
from physml.objectives.unrolled import OneStep, Pushforward, Unrolled
from physml.steppers.gaussian import GaussianConfig
from physml.steppers.refiner import RefinerConfig

logger = logging.getLogger("physml.training")

BFLOAT16 = 2.0**-8  # relative rounding: of numbers of order one, noise of less is lost

WITHOUT_VARIANCE = (AllToAll, Denoising, OneStep, Pushforward, RandomInterval, Unrolled)


def innermost(objective):
    """What is trained inside noise, penalties and curricula."""
    while hasattr(objective, "objective"):
        objective = objective.objective
    return objective


def check_variance(config, objective) -> None:
    """Raises ConfigError where standard deviations would stay random."""
    inner = innermost(objective)
    if isinstance(config, GaussianConfig) and not config.sample and isinstance(inner, WITHOUT_VARIANCE):
        raise ConfigError(
            f"The stepper predicts standard deviations, which {type(inner).__name__} does not train: they would stay "
            "random. Use the objective Likelihood() (objective=likelihood)."
        )


def check_leads(config, objective) -> None:
    """Raises ConfigError where a new stepper is meant for leads or intervals that training never shows it."""
    inner = innermost(objective)
    longest = inner.longest_lead if isinstance(inner, AllToAll) else 1
    if getattr(config, "longest_lead", 1) > longest:
        raise ConfigError(
            f"The stepper is meant for leads of up to {config.longest_lead} time steps, but {type(inner).__name__} "
            f"trains up to {longest}. Set longest_lead={longest}, or use "
            f"AllToAll(snapshots={config.longest_lead + 1})."
        )
    drawn = inner.intervals if isinstance(inner, RandomInterval) else (1,)
    if unseen := [interval for interval in getattr(config, "intervals", ()) if interval not in drawn]:
        raise ConfigError(
            f"The stepper is meant for the intervals {config.intervals}, but {type(inner).__name__} never shows it "
            f"{unseen}. Use RandomInterval(intervals={config.intervals}), or IntervalConfig(intervals={drawn})."
        )


def warn_of_precision(config, *formats: str | None) -> None:
    """Logs where a refiner is to remove noise that is lost in the `formats` its network reads."""
    if isinstance(config, RefinerConfig) and "bfloat16" in formats and (std := math.sqrt(config.minimum)) < BFLOAT16:
        logger.warning(
            "The refiner's last step removes noise of %.1e, but a network in bfloat16 reads numbers of order one "
            "to %.1e only: it cannot learn that step. Use float32 (training.precision and the model's dtype), or a "
            "larger least variance: stepper.minimum=2e-5.", std, BFLOAT16,
        )  # fmt: skip
