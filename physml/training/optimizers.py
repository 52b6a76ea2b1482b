"""Optax chains and learning-rate schedules from one frozen dataclass."""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from physml.coding import check_fields
from physml.errors import ConfigError, nearest_paths


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at a rate of their own.

    Attributes:
        pattern: regular expression, searched in the dotted path of a parameter ("model.embedding.norm.scale").
        learning_rate: peak rate, on the schedule of the optimizer; None takes the optimizer's. 0 freezes the group: its
            parameters have no gradient, no moments and no decay.
        weight_decay: as the optimizer's, for every parameter of the group; None takes the optimizer's and its `decay`.
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        check_fields(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"pattern {self.pattern!r} of a parameter group is no regular expression: {error}."
            ) from error
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name} of the parameter group {self.pattern!r} is {value}, but must be 0 or more.")


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, how fast, and how the rate changes.

    Attributes:
        name: one of `OPTIMIZERS`.
        learning_rate: peak rate.
        schedule: "constant"; "cosine" from the peak to `final` times the peak; "step" multiplies by `factor` after
            every `every` steps; "one_cycle" rises from 1/25 of the peak during the first 30 % and then falls to 1e-4
            of where it began (Smith & Topin 2017, arXiv:1708.07120).
        warmup: steps of linear rise from zero before the schedule; below 1 a fraction of all steps.
        final: rate at the end relative to the peak, for "cosine".
        every: steps between drops, for "step"; below 1 a fraction of all steps.
        factor: of each drop, for "step".
        weight_decay: decoupled from the gradient (adamw, lion, sgd), or added to it as an L2 penalty (adam).
        decay: which parameters decay: "all", or "matrices" (not biases, scales and other vectors).
        groups: parameters with rates of their own; the first group that matches counts, and each must match some.
        clip: largest global norm of the gradient; 0 does not clip.
        beta1, beta2: decay of the moments (adam, adamw, lion); `beta1` is the momentum of sgd.
        epsilon: added to the root of the second moment (adam, adamw).
    """

    name: Literal["adam", "adamw", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "cosine"
    warmup: float = 0.0
    final: float = 0.0
    every: float = 0.0
    factor: float = 0.5
    weight_decay: float = 0.0
    decay: Literal["all", "matrices"] = "all"
    clip: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self):
        check_fields(self)
        for name in ("learning_rate", "warmup", "final", "every", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be 0 or more.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.epsilon < float("inf")):
            raise ConfigError(
                f"beta1 is {self.beta1}, beta2 {self.beta2} and epsilon {self.epsilon}, but betas must be in [0, 1) "
                "and epsilon 0 or more."
            )
        if self.learning_rate == 0:
            raise ConfigError("learning_rate is 0: nothing would be learned.")
        if (self.schedule == "step") != (self.every > 0):
            raise ConfigError(
                f"schedule is {self.schedule!r} and every={self.every}: `every` goes with schedule='step', always."
            )
        if not 0 < self.factor < float("inf"):
            raise ConfigError(f"factor is {self.factor}, but the learning rate is multiplied by it: above 0.")
        if self.final and self.schedule != "cosine":
            raise ConfigError(
                f"final is {self.final}, which goes with schedule='cosine', but schedule is {self.schedule!r}."
            )
        if self.schedule == "one_cycle" and self.warmup:
            raise ConfigError("schedule='one_cycle' has its own rise: leave `warmup` at 0.")

    def scaled(self, factor: float) -> "OptimizerConfig":
        """With `factor` times the learning rates, those of groups too."""
        groups = tuple(
            group if group.learning_rate is None else replace(group, learning_rate=group.learning_rate * factor)
            for group in self.groups
        )
        return replace(self, learning_rate=self.learning_rate * factor, groups=groups)

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate by update number, for a run of `steps` updates."""
        warmup = _count(self.warmup, steps)
        rest = max(steps - warmup, 1)
        peak = self.learning_rate
        if self.schedule == "constant":
            schedule = optax.constant_schedule(peak)
        elif self.schedule == "cosine":
            schedule = optax.cosine_decay_schedule(peak, rest, alpha=self.final)
        elif self.schedule == "one_cycle":
            return optax.cosine_onecycle_schedule(max(steps, 2), peak)
        else:
            schedule = optax.exponential_decay(peak, max(_count(self.every, steps), 1), self.factor, staircase=True)
        if not warmup:
            return schedule
        # From one step above zero: the first update would otherwise be lost.
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        return optax.join_schedules([rise, schedule], [warmup])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a run of `steps` updates: clip, then the optimizer with its schedule and decay."""
        chain = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        groups = [_scale_groups(self)] if self.groups else []
        return optax.chain(*chain, OPTIMIZERS[self.name](self, self.rate(steps), _decays(self)), *groups)

    def group_of(self, path: str) -> int | None:
        """The number of the group that a parameter belongs to; None for the rest."""
        return next((i for i, group in enumerate(self.groups) if re.search(group.pattern, path)), None)

    def freezes(self, path: str) -> bool:
        """Whether a parameter is in a group whose rate is 0."""
        number = self.group_of(path)
        return number is not None and self.groups[number].learning_rate == 0

    def check_groups(self, paths: Iterable[str]) -> None:
        """Raises ConfigError, with the nearest of the parameters' `paths`, for a group that none of them is in."""
        paths = list(paths)
        found = {self.group_of(path) for path in paths}
        unused = [group.pattern for i, group in enumerate(self.groups) if i not in found]
        if not unused:
            return
        taken = [pattern for pattern in unused if any(re.search(pattern, path) for path in paths)]
        why = "earlier groups take all that match" if taken else "none matches"
        advice = "Move it to the front" if taken else "Correct the pattern"
        raise ConfigError(
            f"No parameter is left for the groups {unused}: {why}. {advice}; the nearest parameters to {unused[0]!r} "
            f"are {', '.join(nearest_paths(unused[0], paths))}."
        )


def _count(value: float, steps: int) -> int:
    """Steps from a count, or from a fraction of all steps below 1."""
    return round(value * steps) if value < 1 else round(value)


# Paths of vectors, which may be stacked.
VECTORS = re.compile(r"(bias|scale|shift)[^.]*$|(^|\.)length$|norms?\.(\d+\.)?weight$")


def is_matrix(path: str, leaf) -> bool:
    """Whether `decay="matrices"` decays a parameter."""
    return jnp.ndim(leaf) > 1 and not VECTORS.search(path)


def _by_path(function: Callable, params):
    """`function(dotted path, leaf)` of every parameter."""

    def call(path, leaf):
        return function(".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf)

    return jax.tree_util.tree_map_with_path(call, params)


def _decays(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """One term for every weight decay that occurs, on the parameters that have it."""
    values = [config.weight_decay, *(group.weight_decay for group in config.groups)]

    def has(value: float, path: str, leaf) -> bool:
        number = config.group_of(path)
        own = None if number is None else config.groups[number].weight_decay
        if own is not None:
            return own == value
        return config.weight_decay == value and (config.decay == "all" or is_matrix(path, leaf))

    if not config.groups:
        mask = functools.partial(_by_path, is_matrix) if config.decay == "matrices" else None
        return [optax.add_decayed_weights(config.weight_decay, mask)] if config.weight_decay else []
    return [
        optax.add_decayed_weights(value, functools.partial(_by_path, functools.partial(has, value)))
        for value in sorted({value for value in values if value})
    ]


def _scale_groups(config: OptimizerConfig) -> optax.GradientTransformation:
    """Scales the updates of each group by its rate, relative to that of the optimizer."""

    def factor(path: str) -> float:
        number = config.group_of(path)
        rate = None if number is None else config.groups[number].learning_rate
        return 1.0 if rate is None else rate / config.learning_rate

    def init(params):
        # Frozen parameters are not here any more where `split` took them out.
        live = tuple(group for group in config.groups if group.learning_rate != 0)
        paths = jax.tree.leaves(_by_path(lambda path, leaf: path, params))
        kept = [path for path in paths if not config.freezes(path)]
        replace(config, groups=live).check_groups(kept)
        return optax.EmptyState()

    def update(updates, state, params=None):
        return _by_path(lambda path, leaf: leaf * factor(path), updates), state

    return optax.GradientTransformation(init, update)


def _adam(config: OptimizerConfig, rate, decays):
    return optax.chain(*decays, optax.adam(rate, config.beta1, config.beta2, config.epsilon))


def _adamw(config: OptimizerConfig, rate, decays):
    moments = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return optax.chain(moments, _all(decays), optax.scale_by_learning_rate(rate))


def _lion(config: OptimizerConfig, rate, decays):
    moments = optax.scale_by_lion(config.beta1, config.beta2)
    return optax.chain(moments, _all(decays), optax.scale_by_learning_rate(rate))


def _all(decays):
    """The decays as one transformation, so that a run without any has the same state as `optax.adamw`."""
    return decays[0] if len(decays) == 1 else optax.chain(*decays) if decays else optax.add_decayed_weights(0.0)


def _sgd(config: OptimizerConfig, rate, decays):
    momentum = [optax.trace(config.beta1)] if config.beta1 else []
    return optax.chain(*momentum, *decays, optax.scale_by_learning_rate(rate))


OPTIMIZERS = {"adam": _adam, "adamw": _adamw, "lion": _lion, "sgd": _sgd}


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at once, and what is written when.

    Counts of steps are optimizer updates. Intervals take effect at the first dispatch that ends at or after them.

    Attributes:
        steps: updates in all; `epochs`, where it is not 0, is used instead.
        epochs: passes over the training windows; rounded up to whole updates.
        batch: windows per update, over all devices and processes.
        accumulate: parts in which each batch is computed one after the other, to save memory. Parts count alike: where
            samples lack channels (a mixture), loss and gradient are the mean over the parts of what each has, not
            exactly those of the whole batch; the recorded errors of channels are.
        updates_per_call: updates in one compiled call; the host is needed between calls only. (XLA runs some gradients
            of convolutions slowly inside loops on CPUs: with layers that are not of this package, try 1 there.)
        optimizer: see `OptimizerConfig`.
        average: decay of the moving average of the parameters, which is then what is validated and returned; 0: none.
            The decay of update t is at most (1 + t) / (10 + t), so that the first random weights are soon forgotten.
        precision: number format of the weights and fields that the model computes with; parameters, scalars, losses and
            the optimizer stay in float32. Models of this package keep hidden fields in their own `dtype`: for speed set
            that to "bfloat16", too.
        nonfinite: "stop" at the first NaN or infinite loss or gradient, or "skip" and count such updates.
        skip_limit: updates in a row that may be skipped before training stops anyway.
        log_every: updates between records in metrics.jsonl.
        validate_every: updates between validations; 0: only at the end.
        validate_windows: windows of the validation split to use, evenly spread; 0: all.
        checkpoint_every: updates between checkpoints; 0: only at the end.
        keep: newest checkpoints to keep, besides the best one.
        monitor: score of the validation that says which checkpoint is best.
        monitor_mode: whether small ("min") or large ("max") is good.
        select: whether the best or the last weights are returned.
        patience: validations without a new best after which training stops; 0: never. Those of a curriculum count in
            its last stage.
        threads: reading threads of the loader.
    """

    steps: int = 1000
    epochs: float = 0.0
    batch: int = 16
    accumulate: int = 1
    updates_per_call: int = 4
    optimizer: OptimizerConfig = OptimizerConfig()
    average: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_limit: int = 100
    log_every: int = 10
    validate_every: int = 0
    validate_windows: int = 256
    checkpoint_every: int = 500
    keep: int = 2
    monitor: str = "valid/loss"
    monitor_mode: Literal["min", "max"] = "min"
    select: Literal["best", "last"] = "best"
    patience: int = 0
    threads: int = 4

    def __post_init__(self):
        check_fields(self)
        for name, least in (
            ("steps", 1), ("epochs", 0), ("batch", 1), ("accumulate", 1), ("updates_per_call", 1), ("skip_limit", 1),
            ("log_every", 1), ("validate_every", 0), ("validate_windows", 0), ("checkpoint_every", 0), ("keep", 1),
            ("patience", 0), ("threads", 0),
        ):  # fmt: skip
            if not getattr(self, name) >= least:
                raise ConfigError(f"training.{name} is {getattr(self, name)}, but it must be at least {least}.")
        if not 0 <= self.average < 1:
            raise ConfigError(f"training.average is {self.average}, but a decay lies in [0, 1), e.g. 0.999.")
        if self.batch % self.accumulate:
            raise ConfigError(
                f"training.batch={self.batch} does not divide into accumulate={self.accumulate} equal parts. "
                f"Use a batch of {(self.batch // self.accumulate + 1) * self.accumulate}."
            )
        if self.patience and not self.validate_every:
            raise ConfigError("training.patience counts validations: set training.validate_every too.")

    def total_steps(self, windows: int) -> int:
        """Updates of the whole run over `windows` training windows."""
        return max(1, -int(-self.epochs * windows // self.batch)) if self.epochs else self.steps
