"""The loop, spelled out: load, place, update, log, validate, save."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from physml.data.loader import Loader
from physml.errors import CheckpointError, ConfigError, DataError, DivergedError, Interrupted
from physml.parallel.mesh import Layout
from physml.progress import Silent
from physml.training.checkpoint import Checkpoints
from physml.training.interrupt import Signals
from physml.training.journal import Journal
from physml.training.optimizers import TrainingConfig
from physml.training.update import Parts, build_loss, build_update, initial_state, split, with_statistics
from physml.training.validation import Validation, channel_values, count_windows

logger = logging.getLogger("physml.training")


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
    progress=None,
    resume: str = "auto",
) -> FitResult:
    """Trains `stepper` on datasets["train"]; its loss over datasets["valid"], if there, is recorded as "valid/loss".

    Writes FOLDER/metrics.jsonl and FOLDER/checkpoints/STEP. A run that was interrupted at any step and resumed gives
    bit for bit what an uninterrupted run gives, on the same devices with the same configuration.

    Args:
        validate: further scores of a stepper with the weights so far; its names become names in the record.
        tracker: see `physml.training.tracking`.
        progress: see `physml.progress`; None shows nothing.
        resume: "auto" continues the newest complete checkpoint in `folder`, if any; "never" refuses a folder that has
            checkpoints; a path (a run, or one of its checkpoints/STEP) continues from there.

    Raises ConfigError for a configuration that cannot work, DataError for a split without a window, CheckpointError for
    a checkpoint that does not fit, DivergedError when loss or gradient are not finite, and Interrupted after SIGTERM or
    SIGINT, once the running call is finished and its state is saved.
    """
    if "train" not in datasets:
        raise DataError(f'There is no "train" split, only {sorted(datasets)}.')
    _check(objective, config, layout)
    dataset, frames = datasets["train"], objective.frames(stepper.history)
    total = config.total_steps(count_windows(dataset, frames, "training"))
    parts, params, rest = split(stepper)
    with layout.use():
        transform, update = build_update(objective, parts, config, total, layout.replicated())
        run = _Run(config, layout, Path(folder), total, seed, parts)
        run.state = layout.replicate(initial_state(params, transform, config, parts.statistics(rest)))
        run.fixed = layout.replicate(_copy(rest))
        score = _scorer(stepper, datasets, objective, parts, config, layout, seed, validate)
        with Checkpoints(run.folder / "checkpoints", config.keep, config.monitor_mode) as run.checkpoints:
            step = run.resume(resume)
            first = jax.process_index() == 0  # it alone writes logs
            shown = progress if progress and first else Silent()
            journal = Journal(run.folder, step, tracker, write=first)
            try:
                if tracker and first:
                    tracker.start({"training": dataclasses.asdict(config), "objective": repr(objective), "seed": seed})
                loader = _load(dataset, frames, config, seed, step)
                step = _loop(run, step, update, loader, score, journal, shown, dataset.spec)
            finally:
                journal.close()
            weights, rest = run.selected()
    return FitResult(parts.merge(_local(weights), _local(rest)), step, journal.records, run.best)


def _loop(run: "_Run", step: int, update, loader, score, journal: Journal, progress, spec) -> int:
    config, clock = run.config, _Clock(run.config.batch)
    report = _Report(run, journal, progress, clock, spec)
    if step < run.total:
        progress.message("Compiling the update (cached next time) ...")
    with Signals() as signals:
        while step < run.total and not run.exhausted():
            count = min(config.updates_per_call, run.total - step)
            with clock.waiting():
                windows = [next(loader) for _ in range(count)]
            placed = [run.layout.place(window) for window in windows]
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
                new_best = validating and run.judge(step, score(run.weights, run.rest), journal)
                if saving or stopping or new_best:
                    journal.sync()
                    run.save(step, scored=validating)
            if stopping and step < run.total:
                run.checkpoints.wait()
                raise Interrupted(
                    f"Training stopped after step {step} of {run.total} on {signals.received or 'request'}. "
                    f"Its state is saved in {run.checkpoints.folder / str(step)}. "
                    'Continue it with resume="auto" (--resume auto).'
                )
    return step


class _Run:
    """State, place and best score of one training."""

    def __init__(self, config: TrainingConfig, layout: Layout, folder: Path, total: int, seed: int, parts: Parts):
        self.config, self.layout, self.folder, self.total, self.seed = config, layout, folder, total, seed
        self.parts = parts
        self.key = layout.replicate(jax.random.key(seed))
        self.state = self.fixed = self.checkpoints = self.best = None
        self.unimproved = 0

    @property
    def weights(self):
        """The moving average where there is one, else the parameters."""
        return self.state["params"] if self.state["average"] is None else self.state["average"]

    @property
    def rest(self):
        """What is not trained, with the running statistics of now."""
        return with_statistics(self.fixed, self.state["statistics"])

    def _arrays(self):
        kept = ("params", "average", "optimizer", "step", "skipped")
        return {**{name: self.state[name] for name in kept}, "rest": self.rest, "key": jax.random.key_data(self.key)}

    def _data(self, step: int) -> dict[str, Any]:
        return {
            "loader": {"step": step}, "seed": self.seed, "total": self.total, "best": self.best,
            "unimproved": self.unimproved,
        }  # fmt: skip

    def save(self, step: int, scored: bool) -> None:
        """`scored`: this very state was validated, so it may be kept as the best one."""
        value = self.last_value if scored else None
        self.checkpoints.save(step, self._arrays(), self._data(step), value)

    def judge(self, step: int, values: dict[str, float], journal: Journal) -> bool:
        """Records a validation; whether it is the best so far."""
        self.last_value = None
        if not values:
            return False
        journal.add("valid", step, values)
        if self.config.monitor not in values:
            raise ConfigError(
                f"training.monitor is {self.config.monitor!r}, but the validation gives {sorted(values)}. "
                "Set it to one of them."
            )
        value = float(values[self.config.monitor])
        if not np.isfinite(value):
            raise DivergedError(
                f"{self.config.monitor} is {value} after step {step}.{self.last_good()} "
                "Lower the learning rate, or clip the gradient with optimizer.clip."
            )
        self.last_value = value
        sign = 1 if self.config.monitor_mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best["value"]
        self.unimproved = 0 if better else self.unimproved + 1
        if better:
            self.best = {"step": step, "value": value}
        return better

    def exhausted(self) -> bool:
        return bool(self.config.patience) and self.unimproved >= self.config.patience

    def resume(self, how: str) -> int:
        """The step to go on from; state, average, optimizer and best score are those of the checkpoint."""
        existing = self.checkpoints.steps
        if how == "never":
            if existing:
                raise CheckpointError(
                    f'{self.folder} already holds a run up to step {existing[-1]}. Continue it with resume="auto", '
                    "or choose another folder."
                )
            return 0
        auto = how == "auto"
        found = self.checkpoints.restore(self._arrays()) if auto else self._restore_from(Path(how), existing)
        if found is None:
            return 0
        arrays, data = found
        if data["seed"] != self.seed:
            raise CheckpointError(
                f"{self.folder} was trained with seed {data['seed']}, but seed {self.seed} is asked for: the order of "
                f"the data would change on the way. Use seed {data['seed']}, or start a new run."
            )
        self.fixed = arrays.pop("rest")
        self.key = jax.random.wrap_key_data(arrays.pop("key"))
        # Copies: the update consumes its state, and `fixed` holds these arrays too.
        statistics = _copy(self.parts.statistics(self.fixed))
        self.state = {**arrays, "statistics": statistics, "alive": self.state["alive"]}
        self.best, self.unimproved = data["best"], data["unimproved"]
        step = data["loader"]["step"]
        logger.info("Resumed %s at step %d.", self.folder, step)
        return step

    def _restore_from(self, path: Path, existing: list[int]):
        path = path.absolute()
        step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
        folder = path.parent if step is not None else path / "checkpoints"
        if not folder.is_dir():
            raise CheckpointError(
                f"{path} is no run: it holds no checkpoints. Give a run folder or one of its checkpoints/STEP."
            )
        if folder == self.checkpoints.folder:
            found = self.checkpoints.restore(self._arrays(), step)
            self.checkpoints.discard_after(found[1]["step"] if found else 0)
            return found
        if existing:
            raise CheckpointError(
                f"{self.folder} already holds a run up to step {existing[-1]}, so it cannot continue {path} as well. "
                "Choose another folder."
            )
        with Checkpoints(folder, self.config.keep) as other:
            found = other.restore(self._arrays(), step)
        if found is None:
            raise CheckpointError(f"{folder} holds no complete checkpoint.")
        # The best checkpoint stays in the other folder: the search for the best begins anew.
        found[1].update(best=None, unimproved=0)
        return found

    def last_good(self) -> str:
        self.checkpoints.wait()
        steps = self.checkpoints.steps
        if not steps:
            return " No checkpoint was written yet."
        return f" The last good checkpoint is {self.checkpoints.folder / str(steps[-1])}."

    def selected(self):
        """(weights, rest) of the best checkpoint or of the last step."""
        self.checkpoints.wait()
        step = self.best["step"] if self.best and self.config.select == "best" else None
        if step is None or step == int(self.state["step"]):
            return self.weights, self.rest
        if step not in self.checkpoints.steps:
            logger.warning("The best checkpoint %d is gone; the last weights are returned.", step)
            return self.weights, self.rest
        arrays, _ = self.checkpoints.restore(self._arrays(), step)
        return arrays["params"] if arrays["average"] is None else arrays["average"], arrays["rest"]


class _Clock:
    """How fast training goes and which part of the time it waits for data, over a second or more.

    `rate` (samples per second) and `wait` (fraction) are None until the first measurement; it leaves out compilation.
    """

    def __init__(self, batch: int):
        self.batch, self.rate, self.wait = batch, None, None
        self.start = None
        self.waited, self.updates = 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        entered = time.perf_counter()
        yield
        self.waited += time.perf_counter() - entered

    @contextlib.contextmanager
    def paused(self):
        """For validation and saving, which are not training."""
        entered = time.perf_counter()
        yield
        if self.start is not None:
            self.start += time.perf_counter() - entered

    def done(self, updates: int) -> None:
        """So many more updates are finished."""
        now = time.perf_counter()
        self.updates += updates
        if self.start is not None and now - self.start < 1.0:
            return
        if self.start is not None:
            self.rate, self.wait = self.updates * self.batch / (now - self.start), self.waited / (now - self.start)
        self.start, self.waited, self.updates = now, 0.0, 0


class _Report:
    """Reads the numbers of finished calls: checks them, records them, shows them."""

    def __init__(self, run: _Run, journal: Journal, progress, clock: _Clock, spec):
        self.run, self.journal, self.progress, self.clock, self.spec = run, journal, progress, clock, spec
        self.pending, self.bad_in_a_row, self.hinted = None, 0, False

    def later(self, before: int, count: int, metrics) -> None:
        """Takes note of a call that may still be running, and reads the one before it."""
        self.now()
        self.pending = (before, count, metrics)
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            # Two processes with queued steps deadlock on jax 0.10 CPU collectives.
            jax.block_until_ready(metrics)

    def now(self) -> None:
        """Reads what is pending. Raises DivergedError when an update was not finite and may not be skipped."""
        if self.pending is None:
            return
        before, count, metrics = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        self.clock.done(count)
        for row in range(count):
            self._row(before + row + 1, jax.tree.map(lambda a, row=row: a[row], metrics))
        rate, wait = self.clock.rate, self.clock.wait
        shown = {"loss": float(metrics["loss"][-1]), "samples/s": rate, "waiting": f"{wait or 0:.0%}"}
        self.progress.update(before + count, self.run.total, **shown)
        if (wait or 0) > 0.2 and not self.hinted:
            self.hinted = True
            self.progress.message(
                f"Training waits for data {wait:.0%} of the time. Raise training.threads, chunk the files by time, "
                "or copy them to a faster disk."
            )

    def _row(self, step: int, metrics) -> None:
        config = self.run.config
        self.bad_in_a_row = 0 if metrics["good"] else self.bad_in_a_row + 1
        if not metrics["good"] and (config.nonfinite == "stop" or self.bad_in_a_row >= config.skip_limit):
            times = f" for the {self.bad_in_a_row}th time in a row" if self.bad_in_a_row > 1 else ""
            advice = "" if config.nonfinite == "skip" else ', or skip such updates with nonfinite="skip"'
            raise DivergedError(
                f"Step {step} gave loss {metrics['loss']:g} and gradient norm {metrics['gradient']:g}{times}."
                f"{self.run.last_good()} Lower the learning rate, clip the gradient with optimizer.clip{advice}."
            )
        if step % config.log_every == 0 or step == self.run.total:
            self._record(step, metrics)

    def _record(self, step: int, metrics) -> None:
        values = {
            "loss": float(metrics["loss"]), "gradient": float(metrics["gradient"]),
            "learning_rate": float(metrics["learning_rate"]), "skipped": int(metrics["skipped"]),
            **channel_values("loss", metrics.get("channel", ()), self.spec),
        }  # fmt: skip
        if self.clock.rate is not None:
            values |= {"samples_per_second": round(self.clock.rate, 3), "data_wait": round(self.clock.wait, 4)}
        self.journal.add("train", step, values)


def _check(objective, config: TrainingConfig, layout: Layout) -> None:
    layout.check_batch(config.batch // config.accumulate)
    loss = getattr(objective, "loss", None)
    if config.accumulate > 1 and getattr(loss, "reduction", "mean") == "sum":
        raise ConfigError(
            f"accumulate={config.accumulate} averages the parts of a batch, but the loss has reduction='sum'. "
            "Use reduction='mean', or accumulate=1."
        )


def _scorer(stepper, datasets, objective, parts, config: TrainingConfig, layout: Layout, seed: int, validate):
    """`score(weights, rest)`: loss over the validation split, and the caller's own scores."""
    validation = None
    if "valid" in datasets and datasets["valid"] is not None:
        validation = Validation(
            datasets["valid"], objective.frames(stepper.history), config.batch, config.validate_windows,
            build_loss(objective, parts, config), layout, layout.replicate(jax.random.key(seed)),
        )  # fmt: skip

    def score(weights, rest) -> dict[str, float]:
        values = validation(weights, rest) if validation else {}
        return {**values, **(validate(parts.merge(weights, rest)) if validate else {})}

    return score


def _load(dataset, frames: int, config: TrainingConfig, seed: int, step: int):
    loader = Loader(
        dataset, frames, config.batch, seed=seed, process_index=jax.process_index(),
        process_count=jax.process_count(), threads=config.threads,
    )  # fmt: skip
    return iter(loader.at(step))


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every > 0 and after // every > before // every


def _copy(tree):
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _local(tree):
    """Ordinary arrays on the default device, free of the mesh that trained them."""

    def fetch(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(leaf))))
        return jnp.asarray(np.asarray(leaf))

    return jax.tree.map(fetch, tree)
