"""Scores of short rollouts while training goes on: what early stopping and the best checkpoint can go by."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.coding import check_fields
from physml.contracts import Dataset, Stepper
from physml.errors import ConfigError, suggest
from physml.evaluate.planning import plan_starts
from physml.evaluate.statistics import choose_metrics
from physml.fields import Window, stack
from physml.metrics import METRICS, Measure, high_correlation_time
from physml.parallel.mesh import Layout
from physml.rollout import rollout

CORRELATION_TIME = "correlation_time"
PREFIX = "rollout/"


@dataclass(frozen=True)
class RolloutValidation:
    """Rollouts over the validation split at every validation, recorded as "rollout/METRIC".

    `TrainingConfig(monitor="rollout/nrmse", patience=5, validate_every=500)` stops by them and keeps the best weights.
    A score is the mean over leads and channels; "rollout/METRIC/CHANNEL" is one of several channels.

    Attributes:
        steps: frames that are predicted.
        starts: start frames per trajectory, evenly spread.
        trajectories: of the split, evenly spread; 0: all.
        metrics: names of `physml.metrics.METRICS` that need no climatology, and "correlation_time": the time until the
            mean correlation falls below `threshold`, where more is better (`monitor_mode="max"`).
        threshold: of that correlation.
        batch: starts rolled out at once.
    """

    steps: int = 20
    starts: int = 1
    trajectories: int = 16
    metrics: tuple[str, ...] = ("nrmse",)
    threshold: float = 0.8
    batch: int = 16

    def __post_init__(self):
        if isinstance(self.metrics, str):
            object.__setattr__(self, "metrics", (self.metrics,))
        check_fields(self)
        for name, least in (("steps", 1), ("starts", 1), ("trajectories", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"validation.{name} is {getattr(self, name)}, but it must be at least {least}.")
        if not 0 < self.threshold < 1:
            raise ConfigError(f"validation.threshold is {self.threshold}, but a correlation between 0 and 1 is needed.")
        valid = [CORRELATION_TIME, *(name for name, metric in METRICS.items() if not metric.climatology)]
        if not self.metrics:
            raise ConfigError("validation.metrics is empty: name at least one." + suggest("", valid))
        for name in self.metrics:
            if name not in valid:
                raise ConfigError(f"validation.metrics holds {name!r}, which no rollout gives." + suggest(name, valid))

    def check_monitor(self, monitor: str, mode: str) -> None:
        """Raises ConfigError where training is to watch a score that is not taken, or for the wrong end of it."""
        metric = monitor.removeprefix(PREFIX).split("/")[0]
        if metric not in self.metrics:
            raise ConfigError(
                f"training.monitor is {monitor!r}, but validation.metrics are {list(self.metrics)}: add {metric!r}."
                + suggest(metric, self.metrics)
            )
        if metric == "bias":
            raise ConfigError(
                f"training.monitor is {monitor!r}, but a bias has a sign: the smallest one is not the best. Watch "
                "rollout/rmse or rollout/mae."
            )
        better = "max" if metric == CORRELATION_TIME or METRICS[metric].ideal > 0 else "min"
        if mode != better:
            raise ConfigError(
                f"training.monitor is {monitor!r} with monitor_mode={mode!r}, which would keep the worst weights. "
                f"Set training.monitor_mode to {better!r}."
            )


class RolloutScores:
    """`scores(stepper)`: the numbers that a `RolloutValidation` asks for, from one compiled program.

    Every call must be given a stepper of the same structure and rolls out from the same starts with the same random
    numbers, which differ from batch to batch. All processes call it together. Raises DataError where no trajectory is
    long enough.
    """

    def __init__(self, config: RolloutValidation, stepper: Stepper, dataset: Dataset, layout: Layout, seed: int = 0):
        self.config, self.dataset, self.layout, self.history = config, dataset, layout, stepper.history
        stepper.spec.check_same(dataset.spec, mine="the stepper", theirs="the validation split")
        plan = plan_starts(dataset.lengths, self.history, config.steps, config.starts)
        usable = sorted({trajectory for trajectory, _ in plan})
        count = min(config.trajectories or len(usable), len(usable))
        chosen = {usable[i * len(usable) // count] for i in range(count)}
        self.plan = [start for start in plan if start[0] in chosen]
        devices = layout.mesh.shape["data"]
        self.batch = -(-min(config.batch, len(self.plan)) // devices) * devices
        names = [name for name in config.metrics if name != CORRELATION_TIME]
        self.metrics = {
            **choose_metrics(names, climatology=False, spectrum=True),
            **({"correlation": METRICS["correlation"]} if CORRELATION_TIME in config.metrics else {}),
        } if names else {"correlation": METRICS["correlation"]}  # fmt: skip
        self.key = layout.replicate(jax.random.key(seed))
        channels = dataset.spec.names if len(dataset.spec.names) > 1 else ()
        each = ["", *(f"/{channel}" for channel in channels)]
        self.names = [PREFIX + metric + channel for metric in config.metrics for channel in each]
        self._scored = None

    def __call__(self, stepper: Stepper) -> dict[str, float]:
        """{"rollout/METRIC": ..., "rollout/METRIC/CHANNEL": ...}; NaN or infinite where forecasts blow up."""
        graph, state = nnx.split(stepper)
        self._scored = self._scored or self._compile(graph)
        results = []
        for first in range(0, len(self.plan), self.batch):
            window, weights = self._read(self.plan[first : first + self.batch])
            results.append(self._scored(state, window, weights, self.key, np.int32(first)))
        sums, counts = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *jax.device_get(results))
        return self._values({name: self._finish(name, parts, counts) for name, parts in sums.items()}, counts > 0)

    def _compile(self, graph: Any):
        """`(state, window, weights, key, first) -> ({metric: sums of its parts}, counts)`; numbers are arguments."""
        steps, history, spec = self.config.steps, self.history, self.dataset.spec

        def scored(state, window: Window, weights, key, first):
            stepper = nnx.merge(graph, state)
            stepper.eval()
            truth = window.frames[:, history:]
            key = jax.random.fold_in(key, first)
            frames = rollout(stepper, dataclasses.replace(window, frames=window.frames[:, :history]), steps, key)
            measure = Measure.of(spec, window.mask)
            counts = jnp.ones((len(spec.channels),)) * weights[:, None]
            if window.mask is not None:  # a channel that a sample lacks altogether does not count there
                counts = counts * (window.mask > 0).any(tuple(range(1, window.mask.ndim - 1)))

            def total(part):
                weight = counts.reshape(len(counts), 1, -1, *(1,) * (part.ndim - 3))
                return jnp.where(weight > 0, part * weight, 0).sum(0)

            parts = {name: metric.statistic(frames, truth, measure) for name, metric in self.metrics.items()}
            return jax.tree.map(total, parts), counts.sum(0)

        return jax.jit(scored, out_shardings=self.layout.replicated())

    def _finish(self, name: str, parts: tuple, counts: np.ndarray) -> np.ndarray:
        """`(lead, channel)`."""
        shaped = [counts.reshape(1, -1, *(1,) * (part.ndim - 2)) for part in parts]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.metrics[name].finish(*(part / n for part, n in zip(parts, shaped, strict=True))))

    def _values(self, scores: dict[str, np.ndarray], present: np.ndarray) -> dict[str, float]:
        """Means over leads, and over the channels that are `present` in the split."""
        values, spec = {}, self.dataset.spec
        for name in self.config.metrics:
            if name == CORRELATION_TIME:
                times = spec.time_step * np.arange(1, self.config.steps + 1)
                times, _ = high_correlation_time(scores["correlation"].T, times, (self.config.threshold,))
                each = times[:, 0]
            else:
                each = scores[name].mean(0)
            each = np.where(present, each, np.nan)
            values[PREFIX + name] = float(each[present].mean())
            if len(each) > 1:
                values |= {
                    f"{PREFIX}{name}/{label}": float(value) for label, value in zip(spec.names, each, strict=True)
                }
        return values

    def _read(self, plan: list[tuple[int, int]]) -> tuple[Window, Any]:
        """A placed batch, filled up with starts of weight zero, so that every batch has one shape."""
        weights = np.zeros(self.batch, np.float32)
        weights[: len(plan)] = 1
        plan = [plan[i % len(plan)] for i in range(self.batch)]
        share = self.batch // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        windows = [
            self.dataset.read(trajectory, range(frame - self.history, frame + self.config.steps))
            for trajectory, frame in plan[mine]
        ]
        return self.layout.place((stack(windows), weights[mine]))
