"""Trains and scores what a leaderboard shows: one run folder for each (task, model, seed), each finished once.

OUT/{plan.json, leaderboard.html, leaderboard.csv, leaderboard.nc,
     TASK/{persistence, ...}/{one_step.nc, rollout.nc, entry.json},
     TASK/MODEL/seedN/{everything of a run, one_step.nc, rollout.nc, worst.nc, entry.json}}

`entry.json` is written last: a folder that has it is finished and is never touched again.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from flax import nnx

from physml import api
from physml.benchmarks.contenders import Size, contender, size_of
from physml.benchmarks.leaderboard import write_leaderboard
from physml.benchmarks.protocol import Suite, Task
from physml.benchmarks.suites import BENCHMARKS
from physml.errors import ConfigError, DataError, DivergedError, suggest
from physml.evaluate import evaluate_stepper
from physml.evaluate.rollouts import sample_dataset
from physml.experiment import Evaluation, Experiment
from physml.fields import stack
from physml.files import write_text
from physml.metrics.table import write_netcdf
from physml.parallel.mesh import Layout
from physml.progress import Progress, Silent
from physml.rollout import rollout
from physml.steppers import ClimatologyConfig, DirectConfig, ResidualConfig
from physml.steppers.describe import parameter_count
from physml.steppers.floors import floors_beside
from physml.training import OptimizerConfig, TrainingConfig
from physml.training.timing import seconds_per_update

FEWEST, MOST = 50, 50_000  # updates of a run, whatever the budget
DONE = "entry.json"


@dataclass(frozen=True)
class Options:
    """What decides the numbers of a leaderboard.

    Attributes:
        name: of `BENCHMARKS`.
        data: folder of the benchmark's data; "" generates the embedded version.
        models: of `CONTENDERS`.
        seeds: how many runs of each model.
        budget: minutes of training, shared equally by all runs.
        size: of the networks.
        points: per axis of generated data; None: the suite's own choice.
        tasks: those to run; empty: all.
    """

    name: str
    data: str = ""
    models: tuple[str, ...] = ()
    seeds: int = 3
    budget: float = 60.0
    size: Size = "embedded"
    points: int | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self):
        for value, valid, what in (
            (self.name, BENCHMARKS, "benchmark"),
            (self.size, ("embedded", "published"), "size"),
        ):
            if value not in valid:
                raise ConfigError(f"There is no {what} {value!r}." + suggest(value, valid))
        for model in self.models:
            contender(model)
        if len(set(self.models)) < len(self.models):
            raise ConfigError(f"models names one twice: {', '.join(self.models)}.")
        if self.seeds < 1 or not 0 < self.budget < float("inf"):
            raise ConfigError(f"seeds is {self.seeds} and budget {self.budget}, but at least one seed and some minutes "
                              "of training are needed.")  # fmt: skip
        if self.points is not None and (self.data or self.points < 16):
            raise ConfigError(f"points is {self.points}: it is for generated data (no data folder) and at least 16.")

    @property
    def suite(self) -> Suite:
        return BENCHMARKS[self.name]

    def chosen(self) -> tuple[Task, ...]:
        """The tasks. Raises DataError when the folder holds none, ConfigError for names that are not there."""
        root = Path(self.data) if self.data else None
        if root is not None and not root.exists():
            raise DataError(f"There is no {root}. Give the folder of the data, or none to generate some.")
        tasks = {task.name: task for task in self.suite.tasks(root, self.points)}
        for name in self.tasks:
            if name not in tasks:
                raise ConfigError(f"{self.name} has no task {name!r}." + suggest(name, tasks))
        return tuple(tasks[name] for name in self.tasks or tasks)


def benchmark(
    name: str,
    data: str | Path | None = None,
    *,
    models: Sequence[str] = (),
    seeds: int = 3,
    budget: float = 60.0,
    size: Size | None = None,
    points: int | None = None,
    tasks: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Trains and scores models under the protocol of a benchmark and writes OUT/leaderboard.html, .csv and .nc.

    An interrupted call is finished by the same call; more models or seeds may be added to a leaderboard later.

    Args:
        name: one of `physml.benchmarks.BENCHMARKS`.
        data: folder of the benchmark's data; None generates an embedded version.
        models: of `physml.benchmarks.CONTENDERS`; the suite's own choice if empty.
        seeds: runs of each model.
        budget: minutes of training, shared equally by all runs (compilation and scoring come on top). The share of a
            run is decided by the first call for a folder: models added later compete on equal terms.
        size: "embedded" or "published" networks; by default the former for generated data.
        points: per axis of generated data.
        tasks: those of the benchmark to run; all if empty.
        out: folder; benchmarks/NAME if not given.
        overwrite: forget what is there.
        dry_run: only checks names, data and shapes.
        progress: see `physml.progress`.

    Returns the folder. Raises ConfigError for options that do not fit each other, a model that does not fit a task, or
    an existing leaderboard of other settings; DataError for missing or damaged data. A run that diverges is an entry
    that says so.
    """
    size = size or ("published" if data else "embedded")
    if name not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}." + suggest(name, BENCHMARKS))
    models = tuple(models) or BENCHMARKS[name].models
    options = Options(name, str(data or ""), models, seeds, float(budget), size, points, tuple(tasks))
    out = Path(out) if out is not None else Path("benchmarks") / name
    progress = progress or Silent()
    chosen = options.chosen()
    if dry_run and not options.data:
        return out  # looking at generated data would generate it
    share = 60 * budget / (len(chosen) * len(models) * seeds)
    plan = None if dry_run else _Plan.open(out, options, share, overwrite)
    for task in chosen:
        opened = _Opened.of(task, progress)
        _check_models(task, opened, models, size)
        if plan is None:
            continue
        for floor, config in floors_beside(task.history, options.suite.floors if task.history else None).items():
            _score_floor(out, options.suite, task, opened, floor, config)
        for model in models:
            _run_model(out, plan, options, task, opened, model, progress)
        write_leaderboard(out, options.suite, name)
    return out


@dataclass(frozen=True)
class _Opened:
    """The splits of a task; `rollouts` is the split that rollouts start in."""

    splits: dict[str, Any]
    rollouts: Any

    @functools.cached_property
    def climatology(self) -> Any:
        """The mean of the training split at each time of the year and of the day."""
        return ClimatologyConfig().fit(self.splits["train"])

    @staticmethod
    def of(task: Task, progress: Progress) -> "_Opened":
        if task.prepare is not None:
            task.prepare(progress)
        splits = _open(task.data, progress)
        rollouts = splits["test"] if task.rollout_data is None else _open(task.rollout_data, progress)["test"]
        return _Opened(splits, rollouts)


def _open(config: Any, progress: Progress) -> dict[str, Any]:
    splits = config.open(progress)
    if missing := {"train", "test"} - set(splits):
        raise DataError(f"The data has no split {min(missing)!r}, which a benchmark needs.")
    return splits


def _stepper_config(task: Task) -> Any:
    return ResidualConfig(history=task.history) if task.history else DirectConfig(history=0)


def _check_models(task: Task, opened: _Opened, models: Sequence[str], size: Size) -> None:
    spec = opened.splits["train"].spec
    signature = _stepper_config(task).signature(spec)
    for model in models:
        try:
            size_of(contender(model).config(spec.grid, size), signature)
        except ConfigError as error:
            raise ConfigError(f"{model} cannot enter task {task.name!r}: {error} Leave it out of models.") from error


@dataclass
class _Plan:
    """What all entries of a leaderboard share, kept in OUT/plan.json: settings, seconds of training for each run, and
    the number of updates that those are for each (task, model).
    """

    path: Path
    settings: dict[str, Any]
    seconds: float
    updates: dict[str, int]

    @staticmethod
    def open(out: Path, options: Options, seconds: float, overwrite: bool) -> "_Plan":
        """The plan of `out`, or a new one. Raises ConfigError when the leaderboard there has other settings."""
        kept = {name: getattr(options, name) for name in ("name", "data", "size", "points")}
        path = out / "plan.json"
        if overwrite and path.is_file():
            shutil.rmtree(out)
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                before, seconds, updates = found["settings"], float(found["seconds"]), dict(found["updates"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged. Delete {out} or choose another out.") from error
            if before != kept:
                changed = ", ".join(key for key in kept if before.get(key) != kept[key])
                raise ConfigError(
                    f"{out} holds a leaderboard with other settings ({changed}). Choose another out, or pass overwrite "
                    "(--overwrite) to replace it."
                )
            return _Plan(path, kept, seconds, updates)
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} exists and holds no leaderboard. Choose another out.")
        plan = _Plan(path, kept, seconds, {})
        plan.write()
        return plan

    def updates_of(self, key: str, measure: Callable[[], int]) -> int:
        """The number of updates of a (task, model): decided once, so that an interrupted run goes on with the same."""
        if key not in self.updates:
            self.updates[key] = measure()
            self.write()
        return self.updates[key]

    def write(self) -> None:
        text = {"settings": self.settings, "seconds": self.seconds, "updates": self.updates}
        write_text(self.path, json.dumps(text, indent=1))


# --- one entry --------------------------------------------------------------------------------------------------------


def _run_model(
    out: Path, plan: _Plan, options: Options, task: Task, opened: _Opened, model: str, progress: Progress
) -> None:
    folder = out / task.name / model
    missing = [seed for seed in range(options.seeds) if not (folder / f"seed{seed}" / DONE).is_file()]
    if not missing:
        return
    experiment = _experiment(task, opened, model, options.size)
    updates = plan.updates_of(f"{task.name}/{model}", lambda: _affordable(experiment, opened, plan.seconds))
    training = experiment.training
    training = dataclasses.replace(
        training, steps=updates, validate_every=max(updates // 10, 1), checkpoint_every=max(updates // 4, 1),
        log_every=max(updates // 100, 1),
    )  # fmt: skip
    for seed in missing:
        progress.message(f"{task.name}: {model}, seed {seed}, {updates} updates")
        run = dataclasses.replace(experiment, name=f"seed{seed}", seed=seed, training=training)
        start = time.perf_counter()
        try:
            trained = api.train(
                run, folder=folder, resume="auto", splits=opened.splits, scored=False, progress=progress
            )
            stepper = trained.stepper
        except DivergedError as error:
            _finish(folder / run.name, {"updates": updates, "diverged": str(error)})
            continue
        entry = {"updates": updates, "training_seconds": time.perf_counter() - start}
        _score(options.suite, task, opened, stepper, model, folder / run.name, entry)


def _experiment(task: Task, opened: _Opened, model: str, size: Size) -> Experiment:
    entrant, spec = contender(model), opened.splits["train"].spec
    optimizer = OptimizerConfig(
        learning_rate=entrant.learning_rate, warmup=0.05, weight_decay=1e-5, decay="matrices", clip=1.0
    )
    return Experiment(
        data=task.data, model=entrant.config(spec.grid, size), stepper=_stepper_config(task), objective=task.objective,
        training=TrainingConfig(batch=entrant.batch, optimizer=optimizer), layout=Layout(), evaluation=Evaluation(),
    )  # fmt: skip


def _affordable(experiment: Experiment, opened: _Opened, seconds: float) -> int:
    """Updates that fit the time."""
    stepper = api.initial_stepper(experiment, opened.splits["train"])
    each = seconds_per_update(
        stepper, opened.splits["train"], experiment.objective, experiment.training, experiment.layout
    )
    return int(np.clip(seconds / each, FEWEST, MOST))


def _score_floor(out: Path, suite: Suite, task: Task, opened: _Opened, floor: str, config: Any) -> None:
    folder = out / task.name / floor
    if not (folder / DONE).is_file():
        _score(suite, task, opened, config.fit(opened.splits["train"]), floor, folder, {})


def _score(
    suite: Suite, task: Task, opened: _Opened, stepper: Any, name: str, folder: Path, entry: dict[str, Any]
) -> None:
    """One step over all pairs, rollouts, the worst of them, and what a step costs."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {key: metric for score in suite.scores for key, metric in score.metrics.items()}
    reference = opened.climatology if any(metric.climatology for metric in metrics.values()) else None

    def scored(dataset: Any, leads: int, starts: Any, **more: Any) -> xr.Dataset:
        return evaluate_stepper(
            stepper, dataset, leads, starts=starts, metrics=metrics, climatology=reference, name=name, draws=100, **more
        )

    test, first = opened.splits["test"], stepper.history
    one_step = scored(test, 1, None, per_start=suite.score.median)
    write_netcdf(one_step, folder / "one_step.nc")
    entry = {**entry, **_cost(stepper, test)}
    if task.steps > 1:
        rollouts = opened.rollouts
        starts = [(i, first) for i, n in enumerate(rollouts.lengths) if n > first] if task.starts == 1 else task.starts
        scores = scored(rollouts, task.steps, starts, per_start=True)
        write_netcdf(scores.drop_vars("score_per_start") if not suite.score.median else scores, folder / "rollout.nc")
        worst = _worst(suite.score.per_start(scores, name))
        start = int(scores["trajectory"][worst]), int(scores["frame"][worst])
        write_netcdf(_sample(stepper, rollouts, start, task.steps, name), folder / "worst.nc")
    _finish(folder, entry)


def _worst(errors: np.ndarray) -> int:
    """The start with the largest error at the last lead where most are finite."""
    usable = [row for row in errors if np.isfinite(row).mean() > 0.5]
    return int(np.nanargmax(np.where(np.isfinite(usable[-1]), usable[-1], -np.inf))) if usable else 0


def _sample(stepper: Any, dataset: Any, start: tuple[int, int], steps: int, name: str) -> xr.Dataset:
    """One rollout beside the truth, as far as that goes."""
    trajectory, frame = start
    stop = min(frame + steps, dataset.lengths[trajectory])
    window = dataset.read(trajectory, range(frame - stepper.history, stop))
    frames = _compiled(stepper, stop - frame)(stack([window]))
    truth = np.asarray(window.frames)[stepper.history :]
    mask = None if window.mask is None else np.asarray(window.mask)
    return sample_dataset(truth, np.asarray(frames)[0], mask, dataset.spec, start, name)


def _compiled(stepper: Any, steps: int) -> Any:
    """`window -> frames`, jitted, with the weights as an argument."""
    graph, state = nnx.split(stepper)

    @jax.jit
    def run(state, window):
        model = nnx.merge(graph, state)
        model.eval()
        return rollout(model, window, steps, jax.random.key(0))

    return functools.partial(run, state)


def _finish(folder: Path, entry: dict[str, Any]) -> None:
    write_text(folder / DONE, json.dumps(entry, indent=1))


def _cost(stepper: Any, dataset: Any, batch: int = 16, calls: int = 5) -> dict[str, Any]:
    """Trained numbers, and seconds of one step: of a single state, and per state in a batch (least of some calls)."""
    frames = max(stepper.history, 1) + 1
    longest = int(np.argmax(dataset.lengths))
    window = dataset.read(longest, range(min(frames, dataset.lengths[longest])))
    step = _compiled(stepper, 1)
    result = {"parameters": parameter_count(stepper)}
    for label, count in (("seconds_single", 1), ("seconds_batched", batch)):
        windows = jax.device_put(stack([window] * count))
        times = []
        for _ in range(calls + 1):
            start = time.perf_counter()
            jax.block_until_ready(step(windows))
            times.append(time.perf_counter() - start)
        result[label] = min(times[1:]) / count
    return result
