"""Pairs of frames at every distance, for steppers that are told the lead time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from physml.coding import tagged
from physml.errors import ConfigError, SpecError
from physml.fields import ArrayLike, Window
from physml.metrics.losses import LOSSES, MSE, Loss
from physml.objectives.scoring import Prediction, Space, check_window, predict, score, settle
from physml.objectives.unrolled import Rollout, Scored


def ordered_pairs(snapshots: int, zero_lead: bool = True) -> np.ndarray:
    """Numbers `(pair, 2)` of the earlier and the later of `snapshots` frames; with `zero_lead` also each with itself.

    11 snapshots make 66 pairs, 55 without zero lead.
    """
    return np.stack(np.triu_indices(snapshots, 0 if zero_lead else 1), axis=-1)


@dataclass(frozen=True)
class AllToAll(Rollout):
    """The error of single steps between any two frames of a window, from the earlier to the later one.

    By the semigroup property of autonomous dynamics every pair is a sample of the flow map at its lead, which the
    stepper is told (`context.lead`); forcing, calendar and time are those of the later frame. Herde et al. 2024,
    arXiv:2405.19101, section 2. Pairs are uniform: short leads are as many more as there are pairs of them.

    For `DirectConfig(lead=True, longest_lead=(snapshots - 1) * stride)`, as in the paper. A residual stepper may be
    trained too, but measures its increments by those of one time step at every lead.

    Attributes:
        snapshots: frames that are paired.
        stride: distance between them, in frames of the data.
        pairs: drawn anew from every window at every update, each at most once; 0: all of them. Activations are those of
            a batch of so many times its size: lower the batch with many.
        zero_lead: pair each frame with itself as well, whose forecast is the frame.
        space: "normalized" or "physical", see `OneStep`.
    """

    snapshots: int = 8
    stride: int = 1
    pairs: int = 1
    zero_lead: bool = True
    loss: Loss = tagged(LOSSES, default=MSE())
    space: Space = "normalized"

    def __post_init__(self):
        settle(self)
        if self.snapshots < 2 or self.stride < 1:
            raise ConfigError(
                f"snapshots is {self.snapshots} and stride {self.stride}, but pairs need 2 frames or more, at least 1 "
                "apart."
            )
        count = len(ordered_pairs(self.snapshots, self.zero_lead))
        if not 0 <= self.pairs <= count:
            raise ConfigError(f"pairs is {self.pairs}, but {self.snapshots} snapshots have 1 to {count}, or 0 for all.")
        if self.space == "increment":
            raise ConfigError(
                'space is "increment", but the increments of all leads have no common scale. Use "normalized".'
            )

    @property
    def longest_lead(self) -> int:
        """In frames of the data."""
        return (self.snapshots - 1) * self.stride

    def frames(self, history: int) -> int:
        return max(history, 1) + self.longest_lead

    def draw(self, stepper, window: Window, key) -> tuple[Window, Any]:
        """Every pair as a window of its own.

        Raises SpecError for a stepper that is not told the lead or not meant for the longest one, and for a short
        window; ConfigError where pairs are to be drawn without a key.
        """
        self._check(stepper)
        check_window(window, self.frames(stepper.history), f"the {self.frames(stepper.history)} of AllToAll")
        picked = pick(window, self._frames(stepper.history, window.frames.shape[0], key))
        return picked, None if key is None else jax.random.fold_in(key, 1)

    def predict(self, stepper, window: Window, key) -> Prediction:
        return predict(stepper, window, key, steps=1)

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        value, aux = score(self, stepper, window, prediction.frames, leads=jnp.ones(1))
        return value, {name: part for name, part in aux.items() if name != "lead"}

    def _check(self, stepper) -> None:
        config = getattr(stepper, "config", None)
        wanted = f"DirectConfig(lead=True, longest_lead={self.longest_lead})"
        if not getattr(config, "lead", False) or not hasattr(config, "longest_lead"):
            raise SpecError(
                f"AllToAll trains steps of many lengths, but {config or type(stepper).__name__} is not meant for them, "
                f"or does not tell the network how long a step is. Use {wanted}."
            )
        if stepper.history == 0:
            raise SpecError(f"AllToAll steps from frame to frame, but the stepper has history 0. Use {wanted}.")
        if config.longest_lead < self.longest_lead:
            raise SpecError(
                f"{self.snapshots} snapshots at stride {self.stride} make leads of up to {self.longest_lead} time "
                f"steps, but the stepper is meant for {config.longest_lead}. Use {wanted}, or fewer snapshots."
            )

    def _frames(self, history: int, batch: int, key) -> Int[ArrayLike, "batch pairs frames"]:
        """For every pair the frames of the history and the frame to be predicted."""
        table = ordered_pairs(self.snapshots, self.zero_lead) * self.stride
        index = np.concatenate([table[:, :1] + np.arange(history), table[:, 1:] + history - 1], axis=1)
        if not self.pairs:
            return jnp.broadcast_to(jnp.asarray(index), (batch, *index.shape))
        if key is None:
            raise ConfigError("AllToAll draws pairs, but got no key. Give one, or set pairs=0 for all of them.")
        keys = jax.random.split(jax.random.fold_in(key, 0), batch)
        drawn = jax.vmap(lambda key: jax.random.choice(key, len(index), (self.pairs,), replace=False))(keys)
        return jnp.asarray(index)[drawn]


def pick(window: Window, index: Int[ArrayLike, "batch draws frames"]) -> Window:
    """The numbered frames of each sample with all that belongs to them, as a window of `batch * draws` samples."""
    batch, draws, _ = index.shape

    def frames(array):
        picked = jax.vmap(lambda own, numbers: own[numbers])(jnp.asarray(array), index)
        return picked.reshape(batch * draws, *picked.shape[2:])

    def whole(array):
        if array is None or draws == 1:
            return array
        array = jnp.asarray(array)[:, None]
        return jnp.broadcast_to(array, (batch, draws, *array.shape[2:])).reshape(batch * draws, *array.shape[2:])

    moving = {name: frames(getattr(window, name)) for name in ("frames", "times", "calendar", "forcing")}
    still = {name: whole(getattr(window, name)) for name in ("parameters", "static", "mask")}
    return dataclasses.replace(window, **moving, **still)
