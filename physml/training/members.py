"""Several seeds of one experiment trained at once: one compiled update for all of them, on each device for the
members that it holds, by `vmap` (on CPUs one after the other).

A member is what the run with its seed would be: its own first weights, random numbers and order of the data. Nothing is
shared but the compilation, and one that diverges or stops improving stands still while the others go on.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from physml.data.loader import Loader
from physml.errors import ConfigError, DivergedError
from physml.fields import stack
from physml.parallel.mesh import Layout
from physml.steppers import Members, stack_members
from physml.training.journal import Journal
from physml.training.loop import plan, run_stages
from physml.training.optimizers import TrainingConfig
from physml.training.report import Report
from physml.training.run import Training, copied, local
from physml.training.update import Parts, build_loss, build_update, initial_state, split
from physml.training.validation import channel_values

logger = logging.getLogger("physml.training")


@dataclass(frozen=True)
class MembersResult:
    """What training of several seeds gives.

    Attributes:
        stepper: the ensemble of those that did not diverge, in the order of `seeds`, each with its best or its last
            weights (`TrainingConfig.select`), averaged where an average was kept.
        seeds: of its members.
        step: updates done.
        history: the records of metrics.jsonl.
        best: by seed, {"step", "value"} of the best validation; None where nothing was validated.
        diverged: by seed, the update that was not finite, of those that are left out.
    """

    stepper: Members
    seeds: tuple[int, ...]
    step: int
    history: list[dict[str, Any]]
    best: dict[int, dict[str, Any] | None]
    diverged: dict[int, int]


def fit_members(
    steppers: Sequence[Any],
    datasets: Mapping[str, Any],
    objective,
    config: TrainingConfig,
    layout: Layout,
    folder: str | Path,
    *,
    seeds: Sequence[int],
    validate: Callable[[Any], dict[str, float]] | None = None,
    tracker=None,
    settings: dict[str, Any] | None = None,
    progress=None,
    resume: str = "auto",
) -> MembersResult:
    """Trains `steppers`, which differ in their numbers only, each as `fit` would with its own one of `seeds`.

    Equal to S runs of `fit` up to rounding: batched products may be summed up in another order. metrics.jsonl holds the
    mean over the members that are trained ("loss", "valid/loss") and each by itself ("seed3/loss"; null once it stands
    still). Beside the state of all members checkpoints hold the best weights of each.

    A member whose loss or gradient is not finite stands still from there and is left out of the result, as is one whose
    loss in validation is not finite; with `config.patience` one that does not improve keeps its best weights. Members
    are spread over the devices: `layout.member` of them, or by default as many as divide both members and devices.

    The other arguments are those of `fit`; scores by rollouts (`RolloutScores`) take the layout that
    `spread_members(layout, S)` gives. Raises what `fit` raises, DivergedError only when no member is left, and
    ConfigError for seeds that are no S different numbers, several processes, or devices that do not divide the members.
    """
    seeds = tuple(seeds)
    _check_seeds(steppers, seeds)
    layout = spread_members(layout, len(seeds))
    total, stages = plan(steppers[0], datasets, objective, config, layout, validate)
    parts, params, rest = split(stack_members(list(steppers)).stacked, config.optimizer)
    with layout.use():
        run = _MembersTraining(config, layout, Path(folder), total, seeds, parts)
        run.begin(params, rest)
        step, records, weights, rest = run_stages(
            run, stages, datasets, objective, steppers[0].history, validate, (tracker, settings), progress, resume
        )
    kept = [i for i in range(len(seeds)) if not run.diverged[i]]
    weights, rest = jax.tree.map(lambda leaf: leaf[np.asarray(kept)], (local(weights), local(rest)))
    return MembersResult(
        Members(parts.merge(weights, rest), len(kept)), tuple(seeds[i] for i in kept), step, records,
        dict(zip(seeds, run.best, strict=True)),
        {seed: run.diverged[i] for i, seed in enumerate(seeds) if run.diverged[i]},
    )  # fmt: skip


def spread_members(layout: Layout, members: int) -> Layout:
    """The layout with members over devices, see `fit_members`. Raises ConfigError where they do not divide."""
    if jax.process_count() > 1:
        raise ConfigError(
            "Several seeds are trained by one process. Start one run with a seed for each, or one process."
        )
    if layout == Layout():
        return replace(layout, member=math.gcd(members, jax.device_count()))
    if members % layout.mesh.shape["member"]:
        raise ConfigError(
            f"{members} seeds do not divide over layout.member={layout.member} devices. Use a number of devices that "
            "divides them."
        )
    return layout


def _check_seeds(steppers: Sequence[Any], seeds: tuple[int, ...]) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds are {seeds}, but different numbers, none below 0, were expected: one per member.")
    if len(steppers) != len(seeds):
        raise ConfigError(f"There are {len(steppers)} steppers for {len(seeds)} seeds. Give one stepper per seed.")


class _MembersTraining(Training):
    """State, place and best scores of several members. Arrays have a leading member axis, lists one entry per member.

    Attributes:
        live: whether a member is trained; it stands still otherwise.
        diverged: the update that was not finite, 0 where all were.
        kept: weights of the best validation of each member and what goes with them; None if they are not asked for.
    """

    def __init__(self, config: TrainingConfig, layout: Layout, folder: Path, total: int, seeds, parts: Parts):
        super().__init__(config, layout, folder, total, list(seeds), parts)
        self.size = len(seeds)
        self.live, self.diverged = np.ones(self.size, bool), [0] * self.size
        self.best, self.unimproved = [None] * self.size, [0] * self.size
        self.kept = self.last_value = None

    def _shard(self, tree, *axes: str | None):
        return jax.device_put(tree, NamedSharding(self.layout.mesh, PartitionSpec(*axes)))

    def begin(self, params: dict, rest: dict) -> None:
        transform = self.config.optimizer.build(self.total)
        state = jax.vmap(lambda p, s: initial_state(p, transform, self.config, s))(params, self.parts.statistics(rest))
        self.state, self.fixed = self._shard(state, "member"), self._shard(copied(rest), "member")
        self.kept = copied((self.weights, self.rest)) if self.config.select == "best" else None

    def build_update(self, objective, config: TrainingConfig) -> Callable:
        mesh = self.layout.mesh
        places = (NamedSharding(mesh, PartitionSpec("member")), NamedSharding(mesh, PartitionSpec(None, "member")))
        return build_update(objective, self.parts, config, self.total, places, members=True)[1]

    def build_loss(self, objective) -> Callable:
        return build_loss(objective, self.parts, self.config, members=True)

    def load(self, dataset, frames: int, config: TrainingConfig, step: int) -> Iterator:
        """As `Training.load`. The threads and the cache of data larger than memory are shared by as many loaders as
        there are seeds: the order of such data depends on their number, too.
        """
        loaders = [
            Loader(
                dataset, frames, config.batch, seed=seed, threads=-(-config.threads // self.size), readers=self.size
            ).at(step)
            for seed in self.seed
        ]
        return map(stack, zip(*loaders, strict=True))

    def place(self, window):
        return self._shard(window, "member", "data")

    def first_key(self):
        return self._shard(jnp.stack([jax.random.key(seed) for seed in self.seed]), "member")

    def own_scores(self, validate: Callable, weights: dict, rest: dict) -> dict[str, np.ndarray]:
        numbers = local(weights), local(rest)

        def member(i):
            return self.parts.merge(*jax.tree.map(lambda leaf: leaf[i], numbers))

        scores = [validate(member(i)) for i in range(self.size)]
        return {name: np.array([score[name] for score in scores]) for name in scores[0]}

    def report(self, *arguments) -> Report:
        return _MembersReport(self, *arguments)

    def judge(self, step: int, values: dict[str, np.ndarray], journal: Journal) -> bool:
        """Records a validation and keeps the weights of the members that were never better.

        They are saved with the next checkpoint: none needs to be written for them.
        """
        if not values:
            return False
        journal.add("valid", step, self.summary(values))
        value = np.asarray(self.monitored(values), np.float64)
        if not self.may_blow_up:
            for i in np.flatnonzero(self.live & ~np.isfinite(value)):
                self.fail(i, step, f"{self.config.monitor} is {value[i]} after step {step}")
        sign = 1 if self.config.monitor_mode == "min" else -1
        before = np.array([np.inf if best is None else sign * best["value"] for best in self.best])
        better = self.live & np.isfinite(value) & (sign * value < before)
        for i in np.flatnonzero(self.live):
            self.unimproved[i] = 0 if better[i] else self.unimproved[i] + self.waits(step)
            self.best[i] = {"step": step, "value": float(value[i])} if better[i] else self.best[i]
            self.live[i] &= not self.config.patience or self.unimproved[i] < self.config.patience
        if self.kept is not None and better.any():
            self.kept = _chosen(jnp.asarray(better), (self.weights, self.rest), self.kept)
        self.freeze()
        return False

    def summary(self, values: dict[str, Any], each: str = "") -> dict[str, float]:
        """For the record: means over the members that are trained, then what begins with `each` of every member."""
        means, own = {}, {}
        for name, value in values.items():
            value = np.where(self.live, np.asarray(value, np.float64), np.nan)
            finite = value[np.isfinite(value)]
            means[name] = float(finite.mean()) if len(finite) else math.nan
            if name.startswith(each):
                own |= {f"seed{seed}/{name}": float(number) for seed, number in zip(self.seed, value, strict=True)}
        return {**means, **own}

    def fail(self, member: int, step: int, what: str) -> None:
        """A member diverged. Raises DivergedError when it was the last one."""
        self.live[member], self.diverged[member] = False, int(step)
        logger.warning("Seed %d diverged and is left out: %s.", self.seed[member], what)
        if all(self.diverged):
            raise DivergedError(
                f"All {self.size} members diverged, the last one with seed {self.seed[member]}: {what}."
                f"{self.last_good()} Lower the learning rate, or clip the gradient with optimizer.clip."
            )
        self.freeze()

    def freeze(self) -> None:
        """Members that are not live stand still from the next update on."""
        alive = self.state["alive"] & self._shard(self.live, "member")
        self.state = {**self.state, "alive": self._shard(alive, "member")}

    def exhausted(self) -> bool:
        return not self.live.any()

    def _arrays(self):
        return {**super()._arrays(), "alive": self.state["alive"], "best": self.kept}

    def _data(self, step: int) -> dict[str, Any]:
        return {**super()._data(step), "live": self.live.tolist(), "diverged": self.diverged}

    def leave_best(self, data: dict[str, Any]) -> None:
        """Nothing stays behind: the best weights of each member are in the checkpoint."""

    def take(self, arrays: dict[str, Any], data: dict[str, Any]) -> None:
        alive, self.kept = arrays.pop("alive"), arrays.pop("best")
        self.live, self.diverged = np.array(data["live"]), list(data["diverged"])
        super().take(arrays, data)
        self.state["alive"] = alive

    def selected(self):
        self.checkpoints.wait()
        now = (self.weights, self.rest)
        if self.kept is None:
            return now
        return _chosen(jnp.asarray([best is not None for best in self.best]), self.kept, now)


@jax.jit
def _chosen(mask, first, second):
    """Of every member the numbers of `first` where `mask (member,)` is true, else of `second`."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b), first, second)


class _MembersReport(Report):
    """Reads one row of numbers per update and member."""

    def __init__(self, run: _MembersTraining, *arguments):
        super().__init__(run, *arguments)
        self.bad_in_a_row = np.zeros(run.size, int)

    def shown(self, loss) -> float:
        return self.run.summary({"loss": loss})["loss"]

    def check(self, step: int, metrics) -> None:
        """Members that may not go on stand still. Raises DivergedError when none is left."""
        run, config = self.run, self.run.config
        self.bad_in_a_row = np.where(metrics["good"], 0, self.bad_in_a_row + 1)
        limit = 1 if config.nonfinite == "stop" else config.skip_limit
        for i in np.flatnonzero(run.live & (self.bad_in_a_row >= limit)):
            loss, gradient = metrics["loss"][i], metrics["gradient"][i]
            times = f" for the {self.bad_in_a_row[i]}th time in a row" if limit > 1 else ""
            run.fail(i, step, f"step {step} gave loss {loss:g} and gradient norm {gradient:g}{times}")

    def values(self, metrics) -> dict[str, Any]:
        names = ("loss", "gradient", "learning_rate", "skipped")
        channels = channel_values("loss", metrics.get("channel", ()), self.spec)
        parts = {f"loss/{name}": value for name, value in metrics.get("part", {}).items()}
        return self.run.summary({**{name: metrics[name] for name in names}, **channels, **parts}, each="loss")
