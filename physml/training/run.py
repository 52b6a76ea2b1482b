"""A training between updates: its numbers, its place on the devices, its checkpoints and its best score."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from physml.data.loader import Loader
from physml.errors import CheckpointError, ConfigError, DivergedError
from physml.fields import is_key
from physml.parallel.mesh import Layout
from physml.training.checkpoint import Checkpoints
from physml.training.journal import Journal
from physml.training.optimizers import TrainingConfig
from physml.training.report import Report
from physml.training.update import Parts, build_loss, build_update, initial_state, with_statistics

logger = logging.getLogger("physml.training")


def check_monitor(config: TrainingConfig, names: Iterable[str]) -> None:
    """Raises ConfigError where the score that says which weights are best is not among the `names`."""
    if config.monitor not in names:
        raise ConfigError(
            f"training.monitor is {config.monitor!r}, but the validation gives {sorted(names)}. Set it to one of them."
        )


class Training:
    """State, place and best score of one training."""

    size = 1  # steppers that are trained

    def __init__(self, config: TrainingConfig, layout: Layout, folder: Path, total: int, seed: int, parts: Parts):
        self.config, self.layout, self.folder, self.total, self.seed = config, layout, folder, total, seed
        self.parts = parts
        self.key = self.first_key()
        self.state = self.fixed = self.checkpoints = self.best = None
        self.unimproved, self.last_stage = 0, 0

    def begin(self, params: dict, rest: dict) -> None:
        """The state before the first update."""
        transform, statistics = self.config.optimizer.build(self.total), self.parts.statistics(rest)
        self.state = self.layout.replicate(initial_state(params, transform, self.config, statistics))
        self.fixed = self.layout.replicate(copied(rest))

    def build_update(self, objective, config: TrainingConfig) -> Callable:
        return build_update(objective, self.parts, config, self.total, self.layout.replicated())[1]

    def build_loss(self, objective) -> Callable:
        return build_loss(objective, self.parts, self.config)

    def load(self, dataset, frames: int, config: TrainingConfig, step: int) -> Iterator:
        """Batches from the one of `step` on, on the host."""
        return load(dataset, frames, config, self.seed, step)

    def first_key(self):
        """The key of the seed, on the devices."""
        return self.layout.replicate(jax.random.key(self.seed))

    def own_scores(self, validate: Callable, weights: dict, rest: dict) -> dict[str, float]:
        return validate(self.parts.merge(weights, rest))

    def place(self, window):
        """A batch on the devices."""
        return self.layout.place(window)

    def report(self, *arguments) -> "Report":
        return Report(self, *arguments)

    @property
    def may_blow_up(self) -> bool:
        """Whether the monitored score is one of rollouts, which early in training may blow up: bad, but not the end."""
        return self.config.monitor.startswith("rollout/")

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
        """`scored`: this very state has the best score so far."""
        value = self.last_value if scored else None
        self.checkpoints.save(step, self._arrays(), self._data(step), value)

    def judge(self, step: int, values: dict[str, float], journal: Journal) -> bool:
        """Records a validation; whether it is the best so far."""
        self.last_value = None
        if not values:
            return False
        journal.add("valid", step, values)
        value = float(self.monitored(values))
        if not np.isfinite(value):
            if self.may_blow_up:
                self.unimproved += self.waits(step)
                return False
            raise DivergedError(
                f"{self.config.monitor} is {value} after step {step}.{self.last_good()} "
                "Lower the learning rate, or clip the gradient with optimizer.clip."
            )
        self.last_value = value
        sign = 1 if self.config.monitor_mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best["value"]
        self.unimproved = 0 if better else self.unimproved + self.waits(step)
        if better:
            self.best = {"step": step, "value": value}
        return better

    def monitored(self, values: dict[str, Any]) -> Any:
        """The value that says which weights are best. Raises ConfigError where there is none."""
        check_monitor(self.config, values)
        return values[self.config.monitor]

    def waits(self, step: int) -> bool:
        """Whether a validation without a new best counts for `patience`: from the last stage of a curriculum on."""
        return step > self.last_stage

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
        if data["total"] != self.total:
            logger.warning(
                "%s was planned for %d updates and goes on to %d: the learning rate follows the new schedule.",
                self.folder, data["total"], self.total,
            )  # fmt: skip
        self.take(arrays, data)
        step = data["loader"]["step"]
        logger.info("Resumed %s at step %d.", self.folder, step)
        return step

    def take(self, arrays: dict[str, Any], data: dict[str, Any]) -> None:
        """Takes over the state of a checkpoint."""
        self.fixed = arrays.pop("rest")
        self.key = jax.random.wrap_key_data(arrays.pop("key"))
        # Copies: the update consumes its state, and `fixed` holds these arrays too.
        statistics = copied(self.parts.statistics(self.fixed))
        self.state = {**arrays, "statistics": statistics, "alive": self.state["alive"]}
        self.best, self.unimproved = data["best"], data["unimproved"]

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
            if found is None:
                raise CheckpointError(f"{folder} holds no complete checkpoint.")
            self.checkpoints.discard_after(found[1]["step"])
            return found
        if existing:
            raise CheckpointError(
                f"{self.folder} already holds a run up to step {existing[-1]}, so it cannot continue {path} as well. "
                "Choose another folder."
            )
        with Checkpoints(folder, self.config.keep, own=False) as other:
            found = other.restore(self._arrays(), step)
        if found is None:
            raise CheckpointError(f"{folder} holds no complete checkpoint.")
        self.leave_best(found[1])
        return found

    def leave_best(self, data: dict[str, Any]) -> None:
        """Of what is continued in another folder: its best checkpoint stays there, the search for the best is new."""
        data.update(best=None, unimproved=0)

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


def load(dataset, frames: int, config: TrainingConfig, seed: int, step: int):
    loader = Loader(
        dataset, frames, config.batch, seed=seed, process_index=jax.process_index(),
        process_count=jax.process_count(), threads=config.threads,
    )  # fmt: skip
    return iter(loader.at(step))


def copied(tree):
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def local(tree):
    """Ordinary arrays on the default device, free of the mesh that trained them."""

    def fetch(leaf):
        if is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(leaf))))
        return jnp.asarray(np.asarray(leaf))

    return jax.tree.map(fetch, tree)
