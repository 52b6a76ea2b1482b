"""One experiment: a tree of frozen dataclasses, written in Python or YAML, from which every object is built.

Precedence: defaults of the classes < the experiment file < overrides such as `model.width=32`. Unknown keys are errors
that name the nearest valid one. The resolved tree is written into the run folder and reads back to an equal one.
"""

import runpy
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from physml import coding
from physml.constraints import CONSTRAINTS
from physml.data import DataConfig, MixtureConfig, SyntheticConfig
from physml.errors import ConfigError, PhysmlError, suggest, suggest_path
from physml.evaluate.statistics import as_names
from physml.evaluate.validation import PREFIX, RolloutValidation
from physml.layers.lora import LoRA
from physml.metrics import METRICS
from physml.metrics.moments import ENSEMBLE_METRICS
from physml.models import MODELS
from physml.normalize import KINDS
from physml.objectives import OBJECTIVES, OneStep
from physml.parallel.mesh import Layout
from physml.saving import StartFrom
from physml.steppers import FLOORS, STEPPERS, ResidualConfig
from physml.training import TrainingConfig

DATA = {"files": DataConfig, "mixture": MixtureConfig, "synthetic": SyntheticConfig}


@dataclass(frozen=True)
class Evaluation:
    """How the test split is scored after training.

    Attributes:
        steps: leads, counted in frames.
        starts: start frames per trajectory, evenly spread (0: every possible one).
        floors: steppers scored beside the model, with their default options. None: persistence, or climatology where
            the stepper starts from no frame (history 0).
        metrics: names of `physml.metrics.METRICS`; empty means all that apply to the data.
        spectrum_leads: leads (counted in frames) whose energy spectrum is kept; empty means first, middle and last.
        batch: start frames that are rolled out at once.
        members: realizations of a stochastic stepper (a refiner) from every start, which are scored as an ensemble; 0:
            a single one, and of an ensemble of seeds its own members.
    """

    steps: int = 20
    starts: int = 0
    floors: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    spectrum_leads: tuple[int, ...] = ()
    batch: int = 32
    members: int = 0

    def __post_init__(self):
        for name in ("floors", "metrics"):
            if (names := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_names(names))
        coding.check_fields(self)
        if self.steps < 1 or self.batch < 1 or self.starts < 0 or self.members < 0:
            raise ConfigError(f"evaluation needs steps >= 1, batch >= 1, starts >= 0 and members >= 0, but got {self}.")
        metrics = {**METRICS, **ENSEMBLE_METRICS}
        for names, registry, what in ((self.floors or (), FLOORS, "floor"), (self.metrics, metrics, "metric")):
            for name in names:
                if name not in registry:
                    raise ConfigError(f"{name!r} is no {what}." + suggest(name, registry))


@dataclass(frozen=True)
class Experiment:
    """What to train, on what, how, and how to score it.

    Attributes:
        name: folder of the run.
        data: where the splits come from.
        model: the architecture; None for steppers that need no network (the floors).
        stepper: what the network's output means.
        normalization: "zscore", "rms" or "identity", fitted to the training split.
        constraints: projections applied after every step, in order.
        objective: the loss.
        training: optimizer, batch, length.
        start_from: a run or saved model whose weights training starts from (fine-tuning), by its path or as a
            `StartFrom`; None: random weights. Where model, channels or grid differ, what fits is taken, and
            start_from.json in the run folder tells what. Without a `model`, model and stepper are those of the source.
        lora: trains low-rank changes of linear layers only; goes with `start_from`.
        validation: rollouts over the validation split, beside the loss.
        layout: device mesh.
        evaluation: scoring on the test split.
        seed: of initial weights, batch order and noise.
        seeds: an ensemble, trained at once: a member for each of these instead of one stepper for `seed`.
    """

    name: str = "run"
    data: Any = coding.tagged(DATA, untagged="files", default=None)
    model: Any = coding.tagged(MODELS, default=None)
    stepper: Any = coding.tagged(STEPPERS, default=ResidualConfig())
    normalization: str = "zscore"
    constraints: tuple[Any, ...] = coding.tagged(CONSTRAINTS, default=())
    objective: Any = coding.tagged(OBJECTIVES, default=OneStep())
    training: TrainingConfig = TrainingConfig()
    start_from: str | StartFrom | None = None
    lora: LoRA | None = None
    validation: RolloutValidation | None = None
    layout: Layout = Layout()
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    seeds: tuple[int, ...] = ()

    def __post_init__(self):
        coding.check_fields(self)
        if self.normalization not in KINDS:
            raise ConfigError(f"normalization is {self.normalization!r}, but it must be one of {', '.join(KINDS)}.")
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(f"name is {self.name!r}, but it must be a folder name without slashes.")
        if min((self.seed, *self.seeds)) < 0:
            raise ConfigError(f"seed is {self.seed} and seeds are {self.seeds}, but seeds are whole numbers from 0 on.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}, but each may be there once: one member per seed.")
        if isinstance(self.start_from, str):
            object.__setattr__(self, "start_from", StartFrom(self.start_from) if self.start_from else None)
        if self.training.monitor.startswith(PREFIX):
            if self.validation is None:
                raise ConfigError(
                    f"training.monitor is {self.training.monitor!r}, but there is no validation by rollouts: set "
                    "validation=RolloutValidation(...)."
                )
            self.validation.check_monitor(self.training.monitor, self.training.monitor_mode)


def load_experiment(source: "Experiment | str | Path", overrides: Iterable[str] = ()) -> Experiment:
    """An experiment from a Python file that defines `config`, a YAML file, or an object, with overrides applied.

    A Python file is the user's own program and is executed; a YAML file is only read.
    Raises ConfigError for a missing file, a file without `config`, unknown fields and wrong types.
    """
    experiment = source if isinstance(source, Experiment) else _read(Path(source))
    # Read back also without overrides: Python checks no types, and what cannot be read back cannot be saved.
    return coding.from_dict(Experiment, coding.override(to_dict(experiment), list(overrides)), "experiment")


def _read(path: Path) -> Experiment:
    if not path.is_file():
        raise ConfigError(
            f"There is no experiment file {str(path)!r}. Give a .py file that defines `config`, or a .yaml file."
            + suggest_path(str(path), (".py", ".yaml", ".yml"))
        )
    if path.suffix == ".py":
        names = _run(path)
        config = names.get("config")
        if not isinstance(config, Experiment):
            others = [name for name, value in names.items() if isinstance(value, Experiment)]
            found = f"`config` is of type {type(config).__name__}" if "config" in names else "there is no `config`"
            hint = f" Rename `{others[0]}` to `config`." if others else ""
            raise ConfigError(f"{path} does not define `config = Experiment(...)`: {found}.{hint}")
        return config
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: an experiment file ends in .py or .yaml.")
    try:
        data = coding.dates_as_text(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    return coding.from_dict(Experiment, data or {}, str(path))


def _run(path: Path) -> dict[str, Any]:
    """The names that a Python file defines."""
    try:
        return runpy.run_path(str(path), run_name="physml_experiment")
    except PhysmlError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else str(path)
        raise ConfigError(
            f"{where}: {type(error).__name__}: {error}. Correct the file, or run it with python."
        ) from error


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Plain containers that `load_experiment` reads back to an equal experiment."""
    return coding.to_dict(experiment)


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML."""
    return yaml.safe_dump(to_dict(experiment), sort_keys=False, width=100)
