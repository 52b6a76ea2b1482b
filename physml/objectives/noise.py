"""Noise on what a stepper starts from, so that it learns to correct states that are not quite true."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from physml.coding import check_fields, tagged
from physml.errors import ConfigError
from physml.fields import Context, Window
from physml.objectives.denoising import Denoising
from physml.objectives.scoring import Prediction, check_inner, inner_objectives
from physml.objectives.unrolled import Around, OneStep, Scored

NOISE = 2**31 - 2


@dataclass(frozen=True)
class NoisyInputs(Around):
    """Another objective whose rollouts start from frames with Gaussian noise; the truth stays as it is.

    A residual stepper therefore learns increments that lead back to the data: noise stands for the error that it has
    made itself by then (Sanchez-Gonzalez et al. 2020, arXiv:2002.09405). Validation is without noise. Cells outside the
    mask stay 0; forcing and static fields are left alone.

    Attributes:
        objective: what is trained.
        std: standard deviation of the noise on every channel, in units of `unit`.
        unit: "increment" is the scale of each channel's increments, "normalized" that of the channel itself.
        walk: noise that grows over the history as a random walk and reaches `std` at its last frame, as an error that
            accumulates does; else noise of every frame is independent.
    """

    objective: Any = tagged(inner_objectives, default=OneStep())
    std: float = 0.1
    unit: Literal["increment", "normalized"] = "increment"
    walk: bool = False

    def __post_init__(self):
        check_fields(self)
        check_inner(self.objective, type(self).__name__)
        if isinstance(self.objective, Denoising):
            raise ConfigError(
                "NoisyInputs cannot hold Denoising, which learns from noise of its own on the frame to be predicted. "
                "Use Denoising alone, or OneStep in its place."
            )
        if not 0 < self.std < float("inf"):
            raise ConfigError(f"std is {self.std}, but noise has a standard deviation above 0.")

    def __call__(self, stepper, window: Window, key) -> Scored:
        """As of the inner objective. Raises ConfigError without a key, or where no stepper is given frames."""
        return self._with_noise(self.objective, stepper, window, key)

    def predict(self, stepper, window: Window, key) -> Prediction:
        return self._with_noise(self.objective.predict, stepper, window, key)

    def _with_noise(self, function, stepper, window: Window, key):
        if key is None:
            raise ConfigError("NoisyInputs draws noise, so it needs a key: give jax.random.key(seed).")
        if stepper.history == 0:
            raise ConfigError("NoisyInputs puts noise on the frames that go in, but this stepper has history 0.")
        noisy = Noisy(self, stepper)
        result = function(noisy, window, key)
        if not noisy.reached:
            raise ConfigError(
                f"{type(self.objective).__name__} does not start its steps from `stepper.encode`, so no noise would "
                "reach them. Use it without NoisyInputs."
            )
        return result


class Noisy(nnx.Module):
    """A stepper that starts from frames with noise and is otherwise the one inside."""

    def __init__(self, noise: "NoisyInputs | Noisy", stepper):
        self.stepper, self.reached = stepper, _Flag()
        self.std, self.unit, self.walk = noise.std, noise.unit, noise.walk

    def around(self, stepper) -> "Noisy":
        """The same noise on what another stepper starts from."""
        other = Noisy(self, stepper)
        other.reached = self.reached
        return other

    def __getattr__(self, name: str):
        if name.startswith("_") or name == "stepper":
            raise AttributeError(name)
        return getattr(self.stepper, name)

    def encode(self, frames, context: Context):
        self.reached.raised = True
        normalizer = self.stepper.normalizer
        key = jax.random.fold_in(context.key, NOISE)
        drawn = self.std * jax.random.normal(key, frames.shape, frames.dtype)
        if self.walk:
            drawn = jnp.cumsum(drawn, axis=1) / jnp.sqrt(jnp.asarray(frames.shape[1], frames.dtype))
        scale = normalizer.increments if self.unit == "increment" else normalizer.frames.scale
        drawn = drawn * scale[...].astype(frames.dtype)
        if context.mask is not None:
            drawn = drawn * context.mask[:, None]
        return self.stepper.encode(frames + drawn, context)


class _Flag:
    """Shared by all copies that splitting and merging make of a module."""

    raised = False

    def __bool__(self) -> bool:
        return self.raised
