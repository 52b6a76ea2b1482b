"""A stepper that predicts how sure it is: mean and variance of every number, conserved together."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Context, Gaussian, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.plain import Direct, ResidualConfig, check_fits

DRAW = 2**32 - 2  # folded into the key of a step, beside what its dropout draws with


@dataclass(frozen=True)
class GaussianConfig(ResidualConfig):
    """The network predicts mean and standard deviation of the increment to the next frame, each normal by itself.

    Its first channels are the mean in units of the increments' scale, as of `residual`; of the others, as many, the
    softplus plus `floor` is the standard deviation in the same unit (Nix & Weigend 1994; Lakshminarayanan et al. 2017,
    arXiv:1612.01474, section 2.2). Train it with the objective `likelihood`.

    Attributes:
        floor: least standard deviation of a step, in units of the increments' scale.
        conserve: "condition": constraints condition mean and variance, so that cells which are less certain take more
            of the correction; of those that cannot (no method `condition`) the mean is projected. "project": the mean
            alone is projected, as in other steppers.
        sample: every step is drawn from its distribution with `context.key`, for members of an ensemble. Else frames
            are means, and variances of steps add up.
    """

    floor: float = 1e-3
    conserve: Literal["condition", "project"] = "condition"
    sample: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.floor < float("inf"):
            raise ConfigError(f"floor is {self.floor}, but the least standard deviation must be above 0.")

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network: two outputs for every channel."""
        return dataclasses.replace(super().signature(spec), outputs=2 * len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "GaussianResidual":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return GaussianResidual(self, spec, model, normalizer, constraints)


class GaussianResidual(Direct):
    """State: the last `history` frames `(batch, history, *space, channel)` as mean of a `Gaussian`, and the variance
    `(batch, *space, channel)` of the last one.

    Increments of different steps count as independent and errors as carried along unchanged, so that variances add; how
    the dynamics stretch them only samples tell. A sampled frame has the variance of its last step.
    """

    def encode(self, frames, context: Context):
        return Gaussian(frames, jnp.zeros_like(frames[:, -1]))

    def advance(self, state, context: Context, sample: bool | None = None):
        """One step; `sample` overrules the config. Raises ConfigError where there is no key to draw with."""
        sample, frames = self.config.sample if sample is None else sample, state.mean
        previous = frames[:, -1]
        mean, variance = self.step(frames, context)
        if sample:
            if context.key is None:
                raise ConfigError(
                    "A Gaussian stepper with sample=True draws every step, but no random key was given. Pass "
                    "key=jax.random.key(0) to the rollout."
                )
            noise = jax.random.normal(jax.random.fold_in(context.key, DRAW), mean.shape, mean.dtype)
            mean = mean + jnp.sqrt(variance) * noise
        # Conditioning a draw the way the mean is conditioned draws from the conditioned distribution.
        mean, variance = self.conserved(mean, variance, previous, context)
        mean, variance = mean.astype(frames.dtype), variance.astype(frames.dtype)
        variance = variance if sample else state.variance + variance
        return Gaussian(jnp.concatenate([frames[:, 1:], mean[:, None]], axis=1), variance)

    def step(self, frames, context: Context):
        """Mean and variance of the next frame, given the ones before it and before any constraint."""
        shift, width = jnp.split(self.ask(*self.inputs(frames, context), context), 2, axis=-1)
        mean = frames[:, -1] + self.normalizer.increment(shift)
        return mean, self.normalizer.increment(self.config.floor + jax.nn.softplus(width)) ** 2

    def conserved(self, mean, variance, previous, context: Context):
        """Mean and variance after mask and constraints."""
        if context.mask is not None:
            mean, variance = (jnp.where(context.mask > 0, part, 0) for part in (mean, variance))
        for constraint in self.constraints or ():
            if self.config.conserve == "condition" and hasattr(constraint, "condition"):
                mean, variance = constraint.condition(mean, variance, previous, context)
            else:
                mean = constraint.project(mean, previous, context)
        return mean, variance

    def decode(self, state):
        return state.mean[:, -1]

    def distribution(self, state) -> Gaussian:
        """The last frame with its variance."""
        return Gaussian(state.mean[:, -1], state.variance)

    def sampled(self) -> "GaussianResidual":
        """The same weights; every step is drawn."""
        config = dataclasses.replace(self.config, sample=True)
        return type(self)(config, self.spec, self.model, self.normalizer, tuple(self.constraints or ()))


class Distribution(nnx.Module):
    """A Gaussian stepper that decodes to mean and variance: `rollout(Distribution(stepper), window, steps)` gives a
    `Gaussian` of arrays `(batch, lead, *space, channel)`; of `stack_members` of several, those of their mixture. It
    never draws.

    Raises ConfigError for a stepper without variance.
    """

    def __init__(self, stepper):
        single = getattr(stepper, "stacked", stepper)
        if not hasattr(single, "distribution"):
            raise ConfigError(
                f"{type(single).__name__} predicts no variance. Set the stepper to GaussianConfig() (stepper=gaussian)."
            )
        self.stepper = stepper
        self.history, self.spec = stepper.history, stepper.spec

    @property
    def normalizer(self):
        return self.stepper.normalizer

    def encode(self, frames, context: Context):
        return self.stepper.encode(frames, context)

    def advance(self, state, context: Context):
        return self.stepper.advance(state, context, sample=False)

    def decode(self, state) -> Gaussian:
        return self.stepper.distribution(state)
