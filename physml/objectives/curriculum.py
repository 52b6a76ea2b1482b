"""Rollouts that grow while training goes on: a schedule of objectives."""

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from physml.coding import check_fields, tagged
from physml.errors import ConfigError
from physml.fields import Window
from physml.objectives.scoring import check_inner, inner_objectives
from physml.objectives.unrolled import Scored, Unrolled


@dataclass(frozen=True)
class Stage:
    """Updates `start` to `stop` of a training.

    Attributes:
        objective: what is trained; windows have its length.
        batch: windows per update.
        rate: factor of the learning rates.
    """

    objective: Any
    start: int
    stop: int
    batch: int
    rate: float = 1.0


@dataclass(frozen=True)
class Curriculum:
    """An objective whose `steps` grow from stage to stage.

    Optimizer, moving average and the count of updates (with its learning rate schedule) carry on. Windows are cut to
    the stage at hand, and each stage compiles an update of its own. Validation always uses the same objective, so that
    its values can be compared. CarbonBench's, after training of one step (Benson et al. 2024, arXiv:2408.11032):
    `Curriculum(steps=tuple(range(3, 32, 2)), shrink=True)`.

    Attributes:
        objective: what is trained; the `steps` of it, or of the objective inside it, are replaced.
        steps: of each stage.
        updates: of each stage but the last, which goes on to the end (one number, as in (100,), is that of each of
            these). Empty: all stages are equally long.
        shrink: a stage of n steps has batches of training.batch / (n + 1) windows, rounded down to what devices and
            `accumulate` divide, so that memory stays about the same.
        rates: factor of the learning rate in each stage; empty: 1.
        validation_steps: `steps` of the objective in validation; 0: those of the last stage.
    """

    objective: Any = tagged(inner_objectives, default=Unrolled())
    steps: tuple[int, ...] = (1, 2, 4, 8)
    updates: tuple[int, ...] = ()
    shrink: bool = False
    rates: tuple[float, ...] = ()
    validation_steps: int = 0

    def __post_init__(self):
        check_fields(self)
        check_inner(self.objective, type(self).__name__)
        if not self.steps:
            raise ConfigError("steps is empty, but a curriculum has at least one stage.")
        if len(self.updates) not in (0, 1, len(self.steps) - 1) or min(self.updates, default=1) < 1:
            raise ConfigError(
                f"updates are {self.updates}, but {len(self.steps)} stages need {len(self.steps) - 1} counts above 0 "
                "(the last stage goes on to the end), one for all of these, or none for equal parts."
            )
        if self.rates and (len(self.rates) != len(self.steps) or min(self.rates) <= 0):
            raise ConfigError(
                f"rates are {self.rates}, but {len(self.steps)} stages need as many factors of the learning rate, all "
                "above 0."
            )
        for steps in (*self.steps, self.validation_steps or self.steps[-1]):
            with_steps(self.objective, steps)

    @property
    def loss(self):
        return getattr(self.objective, "loss", None)

    @property
    def validation(self):
        objective = with_steps(self.objective, self.validation_steps or self.steps[-1])
        return getattr(objective, "validation", objective)

    def frames(self, history: int) -> int:
        """Of the longest stage."""
        return max(with_steps(self.objective, steps).frames(history) for steps in self.steps)

    def __call__(self, stepper, window: Window, key) -> Scored:
        """The loss of the last stage."""
        return with_steps(self.objective, self.steps[-1])(stepper, window, key)

    def stages(self, total: int, batch: int, unit: int = 1) -> tuple[Stage, ...]:
        """The stages of a training of `total` updates with `batch` windows each; batches are multiples of `unit`.

        Raises ConfigError when the training ends before the last stage begins.
        """
        count = len(self.steps)
        if self.updates:
            lengths = self.updates * (count - 1) if len(self.updates) == 1 else self.updates
            starts = [0, *accumulate(lengths)]
        else:
            starts = [i * total // count for i in range(count)]
        stops = [*starts[1:], total]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            raise ConfigError(
                f"Training has {total} updates, but the curriculum's {count} stages begin after {starts}. Raise "
                "training.steps, or lower the curriculum's updates."
            )
        result = []
        for number, steps in enumerate(self.steps):
            size = max(batch // (steps + 1) // unit, 1) * unit if self.shrink else batch
            rate = self.rates[number] if self.rates else 1.0
            result.append(Stage(with_steps(self.objective, steps), starts[number], stops[number], size, rate))
        return tuple(result)


def with_steps(objective, steps: int):
    """The objective with other `steps`, its own or those of the objective inside. Raises ConfigError without any."""
    fields = {field.name for field in dataclasses.fields(objective)}
    if "steps" in fields:
        return dataclasses.replace(objective, steps=steps)
    if "objective" in fields:
        return dataclasses.replace(objective, objective=with_steps(objective.objective, steps))
    raise ConfigError(
        f"A curriculum changes the steps of an objective, but {type(objective).__name__} has none. Use unrolled."
    )


def stages_of(objective, total: int, batch: int, unit: int = 1) -> tuple[Stage, ...]:
    """The stages of any objective: a single one, unless it is a schedule."""
    if hasattr(objective, "stages"):
        return objective.stages(total, batch, unit)
    return (Stage(objective, 0, total, batch),)
