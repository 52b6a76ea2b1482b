"""What training says of itself: how fast it goes, its numbers in the record, and when it has to stop."""

import contextlib
import time
from typing import Any

import jax

from physml.errors import DivergedError
from physml.training.journal import Journal
from physml.training.validation import channel_values


class Clock:
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


class Report:
    """Reads the numbers of finished calls: checks them, records them, shows them."""

    def __init__(self, run: Any, journal: Journal, progress, spec, stages):
        self.run, self.journal, self.progress, self.spec = run, journal, progress, spec
        self.stages = [stage for stage, _ in stages]
        self.clock, self.stage = None, None
        self.pending, self.bad_in_a_row, self.hinted = None, 0, False

    def begin(self, stage) -> None:
        """Another stage: its compilation and the size of its batches have a clock of their own."""
        self.clock, self.stage = Clock(stage.batch * self.run.size), self.stages.index(stage) + 1
        if len(self.stages) > 1:
            self.progress.message(f"Stage {self.stage} of {len(self.stages)}: {stage.objective}, batch {stage.batch}.")
        self.progress.message("Compiling the update (cached next time) ...")

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
        shown = {"loss": self.shown(metrics["loss"][count - 1]), "samples/s": rate, "waiting": f"{wait or 0:.0%}"}
        self.progress.update(before + count, self.run.total, **shown)
        if (wait or 0) > 0.2 and not self.hinted:
            self.hinted = True
            self.progress.message(
                f"Training waits for data {wait:.0%} of the time. Raise training.threads, chunk the files by time, "
                "or copy them to a faster disk."
            )

    def shown(self, loss) -> float:
        """The loss that the progress shows."""
        return float(loss)

    def _row(self, step: int, metrics) -> None:
        self.check(step, metrics)
        if step % self.run.config.log_every == 0 or step == self.run.total:
            self._record(step, metrics)

    def check(self, step: int, metrics) -> None:
        """Raises DivergedError when an update was not finite and may not be skipped."""
        config = self.run.config
        self.bad_in_a_row = 0 if metrics["good"] else self.bad_in_a_row + 1
        if not metrics["good"] and (config.nonfinite == "stop" or self.bad_in_a_row >= config.skip_limit):
            times = f" for the {self.bad_in_a_row}th time in a row" if self.bad_in_a_row > 1 else ""
            advice = "" if config.nonfinite == "skip" else ', or skip such updates with nonfinite="skip"'
            raise DivergedError(
                f"Step {step} gave loss {metrics['loss']:g} and gradient norm {metrics['gradient']:g}{times}."
                f"{self.run.last_good()} Lower the learning rate, clip the gradient with optimizer.clip{advice}."
            )

    def values(self, metrics) -> dict[str, Any]:
        """What is recorded of an update."""
        return {
            "loss": float(metrics["loss"]), "gradient": float(metrics["gradient"]),
            "learning_rate": float(metrics["learning_rate"]), "skipped": int(metrics["skipped"]),
            **channel_values("loss", metrics.get("channel", ()), self.spec),
            **{f"loss/{name}": float(value) for name, value in metrics.get("part", {}).items()},
        }  # fmt: skip

    def _record(self, step: int, metrics) -> None:
        values = self.values(metrics)
        if len(self.stages) > 1:
            values["stage"] = self.stage
        if self.clock.rate is not None:
            values |= {"samples_per_second": round(self.clock.rate, 3), "data_wait": round(self.clock.wait, 4)}
        self.journal.add("train", step, values)
