"""The loop, spelled out: load, place, update, log, validate, save."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from physml.errors import ConfigError, DataError, DivergedError, Interrupted
from physml.interrupt import Signals
from physml.objectives.curriculum import Stage, stages_of
from physml.objectives.scoring import check_objective
from physml.objectives.suits import check_variance, warn_of_precision
from physml.parallel.mesh import Layout
from physml.progress import Silent
from physml.training.checkpoint import Checkpoints
from physml.training.journal import Journal
from physml.training.optimizers import TrainingConfig
from physml.training.report import Report
from physml.training.run import Training, check_monitor, local
from physml.training.update import split
from physml.training.validation import Validation, count_windows


@dataclass(frozen=True)
class FitResult:
    """What training gives.

    Attributes:
        stepper: with the best or the last weights (`TrainingConfig.select`), averaged where an average was kept.
        step: updates done.
        history: the records of metrics.jsonl.
        best: {"step", "value"} of the best validation; None where nothing was validated.
    """

    stepper: Any
    step: int
    history: list[dict[str, Any]]
    best: dict[str, Any] | None


def fit(
    stepper,
    datasets: Mapping[str, Any],
    objective,
    config: TrainingConfig,
    layout: Layout,
    folder: str | Path,
    *,
    seed: int = 0,
    validate: Callable[[Any], dict[str, float]] | None = None,
    tracker=None,
    settings: dict[str, Any] | None = None,
    progress=None,
    resume: str = "auto",
) -> FitResult:
    """Trains `stepper` on datasets["train"]; its loss over datasets["valid"], if there, is recorded as "valid/loss".

    Writes FOLDER/metrics.jsonl and FOLDER/checkpoints/STEP. A run that was interrupted at any step and resumed gives
    bit for bit what an uninterrupted run gives, on the same devices with the same configuration.

    Args:
        validate: further scores of a stepper with the weights so far; its names become names in the record.
        tracker: see `physml.training.tracking`.
        settings: what a tracker is told of the run, in plain containers; None: training, objective and seed.
        progress: see `physml.progress`; None shows nothing.
        resume: "auto" continues the newest complete checkpoint in `folder`, if any; "never" refuses a folder that has
            checkpoints; a path (a run, or one of its checkpoints/STEP) continues from there.

    An objective with stages (see `physml.contracts.Schedule`) is compiled anew for each stage; optimizer, average and
    count of updates go on.

    Raises ConfigError for a configuration that cannot work, SpecError for data of another spec than the stepper's,
    DataError for a split without a window, CheckpointError for a checkpoint that does not fit, DivergedError when loss
    or gradient are not finite, and Interrupted after SIGTERM or SIGINT, once the running call is finished and its state
    is saved.
    """
    total, stages = plan(stepper, datasets, objective, config, layout, validate)
    parts, params, rest = split(stepper, config.optimizer)
    with layout.use():
        run = Training(config, layout, Path(folder), total, seed, parts)
        run.begin(params, rest)
        step, records, weights, rest = run_stages(
            run, stages, datasets, objective, stepper.history, validate, (tracker, settings), progress, resume
        )
    return FitResult(parts.merge(local(weights), local(rest)), step, records, run.best)


def plan(stepper, datasets, objective, config: TrainingConfig, layout: Layout, validate=None):
    """(updates in all, stages) of a training, see `plan_stages`. Computes no numbers, so that `stepper` may be one of
    shapes. Raises ConfigError, SpecError or DataError where `fit` would before its first update.
    """
    check_parts(stepper, datasets, objective, config)
    total = config.total_steps(count_windows(datasets["train"], objective.frames(stepper.history), "training"))
    stages = plan_stages(objective, config, layout, total)
    split(stepper, config.optimizer)
    _check_monitor(config, datasets, validate)
    return total, stages


def _check_monitor(config: TrainingConfig, datasets, validate) -> None:
    """Raises ConfigError where no validation gives the score that says which weights are best, as far as is known."""
    if validate is not None and not hasattr(validate, "names"):
        return  # what it gives is known once it has given it
    valid = datasets.get("valid")
    channels = valid.spec.names if valid is not None and len(valid.spec.names) > 1 else ()
    names = [] if valid is None else ["valid/loss", *(f"valid/loss/{name}" for name in channels)]
    names += getattr(validate, "names", [])
    if names:
        check_monitor(config, names)
    elif config.patience:
        raise ConfigError(
            f"training.patience is {config.patience}, but there is nothing to validate. Give the data a split "
            "'valid', or set patience=0."
        )


def check_parts(stepper, datasets: Mapping[str, Any], objective, training: TrainingConfig) -> None:
    """Raises ConfigError, DataError or SpecError for a stepper, data and a training that do not fit each other."""
    check_objective(objective, "Training")
    if not isinstance(datasets, Mapping):
        raise ConfigError(f'The data are a {type(datasets).__name__}, but splits were expected: {{"train": dataset}}.')
    if "train" not in datasets:
        raise DataError(f'There is no "train" split, only {sorted(datasets)}.')
    config, network = (getattr(part, "config", None) for part in (stepper, getattr(stepper, "model", None)))
    check_variance(config, objective)
    if training.precision != "float32" and "model" not in vars(stepper):
        raise ConfigError(
            f"{type(stepper).__name__} holds no network as `model`, so its precision cannot be set. Use "
            "precision='float32', or `fit_members` for the members of an ensemble."
        )
    warn_of_precision(config, training.precision, getattr(network, "dtype", None))
    for name in ("train", "valid"):
        if (split := datasets.get(name)) is not None:
            stepper.spec.on(split.spec.grid).check_same(split.spec, mine="the stepper", theirs=f"the split {name!r}")


def run_stages(run: Training, stages, datasets, objective, history: int, validate, tracked, progress, resume: str):
    """All of the training that is left: (last step, records, selected weights, what goes with them). `tracked` are a
    tracker and what it is told of the run, or None."""
    config, dataset = run.config, datasets["train"]
    tracker, settings = tracked
    score = _scorer(run, datasets, objective, history, validate)
    _check_stages(run, stages, dataset, history)
    run.last_stage = stages[-1][0].start
    with Checkpoints(run.folder / "checkpoints", config.keep, config.monitor_mode) as run.checkpoints:
        step = run.resume(resume)
        first = jax.process_index() == 0  # it alone writes logs
        shown = progress if progress and first else Silent()
        if tracker and first:  # before there is a journal, which finishes it
            own = {"training": dataclasses.asdict(config), "objective": repr(objective), "seed": run.seed}
            tracker.start(own if settings is None else settings)
        journal = Journal(run.folder, step, tracker, write=first)
        try:
            report = run.report(journal, shown, dataset.spec, stages)
            with Signals() as signals:
                for stage, stage_config in stages:
                    if stage.start <= step < stage.stop and not run.exhausted():
                        report.begin(stage)
                        update = run.build_update(stage.objective, stage_config)
                        loader = run.load(dataset, stage.objective.frames(history), stage_config, step)
                        step = _loop(run, step, stage.stop, update, loader, score, journal, report, signals)
        finally:
            journal.close()
        return step, journal.records, *run.selected()


def _loop(run: Training, step: int, stop: int, update, loader, score, journal: Journal, report: Report, signals) -> int:
    """Updates `step` to `stop`; returns the step that was reached."""
    config, clock = run.config, report.clock
    while step < stop and not run.exhausted():
        count = min(config.updates_per_call, stop - step)
        with clock.waiting():
            windows = [next(loader) for _ in range(count)]
        placed = [run.place(window) for window in windows]
        placed += placed[-1:] * (config.updates_per_call - count)  # not used; keeps the call's shape
        run.state, metrics = update(run.state, run.fixed, run.key, tuple(placed), np.int32(count))
        before, step = step, step + count
        # The device works on this call while the host reads the numbers of the one before.
        report.later(before, count, metrics)
        validating = _crosses(before, step, config.validate_every) or step == run.total
        saving = _crosses(before, step, config.checkpoint_every) or step == run.total
        stopping = _crosses(before, step, config.log_every if jax.process_count() > 1 else 1) and signals.agreed()
        if not (validating or saving or stopping):
            continue
        report.now()
        with clock.paused():
            try:
                new_best = validating and run.judge(step, score(run.weights, run.rest), journal)
            except DivergedError:
                raise
            except Exception:
                # Nothing is wrong with the weights. Several processes save together, when all of them were about to.
                if saving or jax.process_count() == 1:
                    journal.sync()
                    run.save(step, scored=False)
                    run.checkpoints.wait()
                raise
            if saving or stopping or new_best:
                journal.sync()
                run.save(step, scored=new_best)
        if stopping and step < run.total:
            run.checkpoints.wait()
            raise Interrupted(
                f"Training stopped after step {step} of {run.total} on {signals.received or 'request'}. "
                f"Its state is saved in {run.checkpoints.folder / str(step)}. "
                'Continue it with resume="auto" (--resume auto).'
            )
    report.now()
    return step


def plan_stages(objective, config: TrainingConfig, layout: Layout, total: int) -> list[tuple[Stage, TrainingConfig]]:
    """The stages of an objective, each with its batch and its learning rates. Raises ConfigError where these do not
    suit the objective or the devices."""
    if config.epochs and hasattr(objective, "stages"):
        raise ConfigError(
            f"training.epochs is {config.epochs:g}, but with a {type(objective).__name__} windows and batches change "
            "on the way. Set training.steps instead."
        )
    unit = layout.mesh.shape["data"] * config.accumulate
    stages = [
        (stage, replace(config, batch=stage.batch, optimizer=config.optimizer.scaled(stage.rate)))
        for stage in stages_of(objective, total, config.batch, unit)
    ]
    for stage, stage_config in stages:
        _check_stage(stage.objective, stage_config, layout)
    return stages


def _check_stage(objective, config: TrainingConfig, layout: Layout) -> None:
    """Raises ConfigError for a batch that does not divide, and for parts of one whose losses may not be averaged."""
    layout.check_batch(config.batch // config.accumulate)
    loss = getattr(objective, "loss", None)
    if config.accumulate > 1 and getattr(loss, "reduction", "mean") == "sum":
        raise ConfigError(
            f"accumulate={config.accumulate} averages the parts of a batch, but the loss has reduction='sum'. "
            "Use reduction='mean', or accumulate=1."
        )


def _check_stages(run: Training, stages, dataset, history: int) -> None:
    """Traces the loss of each later stage: what cannot work is refused before the first update, not hours after it."""
    for stage, _ in stages[1:]:
        frames, batch = stage.objective.frames(history), stage.batch
        window = dataset.read(int(np.argmax(dataset.lengths)), range(frames))
        shapes = jax.tree.map(lambda a, n=batch: jax.ShapeDtypeStruct((n, *np.shape(a)), np.asarray(a).dtype), window)
        jax.eval_shape(run.build_loss(stage.objective), run.weights, run.rest, shapes, run.key)


def _scorer(run: Training, datasets, objective, history: int, validate):
    """`score(weights, rest)`: loss over the validation split, and the caller's own scores."""
    config, valid = run.config, datasets.get("valid")
    validation, objective = None, getattr(objective, "validation", objective)
    if valid is not None:
        validation = Validation(
            valid, objective.frames(history), config.batch, config.validate_windows,
            run.build_loss(objective), run.layout, run.first_key(),
        )  # fmt: skip

    def score(weights, rest) -> dict[str, float]:
        values = validation(weights, rest) if validation else {}
        return {**values, **(run.own_scores(validate, weights, rest) if validate else {})}

    return score


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every > 0 and after // every > before // every
