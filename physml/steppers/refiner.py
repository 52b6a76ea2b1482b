"""PDE-Refiner: a prediction made in one step, then refined by removing ever weaker noise from it.

Lippe et al. 2023, arXiv:2308.05732; numbers as in the authors' code (pdearena) with the DDPM sampler of diffusers.
First the stepper, then the pure functions on normalized fields `(batch, *space, channel)` that it is made of.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from physml.errors import ConfigError
from physml.fields import ArrayLike, Context, Signature, Spec
from physml.layers.scalar_embedding import ScalarEmbedding
from physml.normalize import Normalizer
from physml.steppers.plain import Direct, DirectConfig, check_fits

LONGEST_TIME = 1000.0  # what the network reads at the noisiest step, as published
LEAST_VARIANCE = 1e-20

Network = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class RefinerConfig(DirectConfig):
    """The increment to the next frame is predicted from noise, then refined: `refinements` + 1 calls of the network.

    The network reads history, forcing and static fields and, in the last channels, the noisy increment; its first
    scalar is the step of the refinement, 0 .. `longest_time`, the others are those of `direct`. Train it with the
    objective `denoising` and score the moving average of its weights (`training.average=0.995` as published).

    Attributes:
        refinements: steps after the first prediction, K.
        minimum: least noise, see `NoiseSchedule`.
        weight: the increment is predicted in units of `weight` times the scale of increments, so that the noise meets
            numbers of order one. The authors use 0.3 on fields that are not normalized (`normalization="identity"`).
        longest_time: what the network reads at the noisiest step; None: 1000 for networks that embed their scalars as
            the authors' does (modern_unet, sinenet), 1 for those that take them as they are (fno, resnet,
            poseidon_scot, ...).
    """

    refinements: int = 3
    minimum: float = 4e-7
    weight: float = 1.0
    longest_time: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ConfigError(f"history is {self.history}, but a refiner adds to the last frame: give at least 1.")
        if not (0 < self.weight < math.inf and (self.longest_time is None or 0 < self.longest_time < math.inf)):
            raise ConfigError(
                f"weight is {self.weight} and longest_time {self.longest_time}, but both must be finite and above 0."
            )
        _ = self.schedule  # refuses what cannot be

    @property
    def schedule(self) -> "NoiseSchedule":
        """The noise of every step; with the times of networks that embed their scalars where none are given."""
        return NoiseSchedule(self.refinements, self.minimum, self.longest_time or LONGEST_TIME)

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network: the noisy increment and its step come on top of what `direct` reads."""
        plain, channels = super().signature(spec), len(spec.channels)
        return Signature(spec.grid, plain.inputs + channels, plain.scalars + 1, channels)

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Refiner":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return Refiner(self, spec, model, normalizer, constraints)


class Refiner(Direct):
    """State: the last `history` frames, `(batch, history, *space, channel)` in physical units.

    Every step draws new noise from `context.key`; members of an ensemble differ by their keys alone. Noise, noisy
    increments and the coefficients of the ladder are float32 (or the state's own format, where that is wider) also
    when the network computes in bfloat16. What such a network reads is rounded, to 4e-3 for numbers of order one: noise
    below that, as of the default `minimum`, is lost on it; training there warns of it.
    """

    @property
    def schedule(self) -> "NoiseSchedule":
        """That of the config, with the times that the network reads."""
        embedded = any(isinstance(part, ScalarEmbedding) for _, part in nnx.iter_modules(self.model))
        longest = self.config.longest_time or (LONGEST_TIME if embedded else 1.0)
        return replace(self.config.schedule, longest_time=longest)

    def advance(self, state, context: Context):
        """One step. Raises ConfigError when the context has no key."""
        if context.key is None:
            raise ConfigError(
                "A refiner draws noise at every step, but no random key was given. Pass key=jax.random.key(0) to the "
                "rollout."
            )
        shape = (self.config.refinements + 1, *state[:, -1].shape)
        noise = jax.random.normal(context.key, shape, _wide(state))
        return self.advance_with(state, context, noise[0], noise[1:])

    def advance_with(
        self,
        state: Float[ArrayLike, "batch history *space channel"],
        context: Context,
        start: Float[ArrayLike, "batch *space channel"],
        noises: Float[ArrayLike, "refinement batch *space channel"],
    ) -> Float[Array, "batch history *space channel"]:
        """`advance` with given standard normal noise, see `refine`."""
        config, previous = self.config, state[:, -1]
        fields, scalars = self.read(state, context)
        graph, numbers = nnx.split(self.model)

        def model(*inputs, **random):  # merged anew: running statistics that move may not leave the scan
            return nnx.merge(graph, numbers, copy=True)(*inputs, **random)

        found = refine(self.network(model, context), self.schedule, fields, scalars, start, noises)
        frame = (previous + self.normalizer.increment(config.weight * found.result)).astype(state.dtype)
        frame = self.finish(frame, previous, context)
        return jnp.concatenate([state[:, 1:], frame[:, None]], axis=1)

    def problem(
        self,
        state: Float[ArrayLike, "batch history *space channel"],
        frame: Float[ArrayLike, "batch *space channel"],
        context: Context,
        step: Int[ArrayLike, " batch"],
        noise: Float[ArrayLike, "batch *space channel"],
    ) -> "DenoisingProblem":
        """The training problem whose solution leads to the true next `frame` (physical units), see `denoise`."""
        fields, scalars = self.read(state, context)
        increment = jnp.asarray(frame, fields.dtype) - jnp.asarray(state[:, -1], fields.dtype)
        target = self.normalizer.normalize_increment(increment) / self.config.weight
        return denoise(self.network(self.model, context), self.schedule, fields, target, scalars, step, noise)

    def read(self, state, context: Context) -> tuple[Array, Array]:
        """What the network reads beside the noisy increment and its step: `(fields, scalars)`, normalized."""
        return tuple(array.astype(_wide(array)) for array in self.inputs(state, context))

    def network(self, model, context: Context) -> Network:
        """The model as the pure functions call it; cells without a field neither give nor take noise."""
        random = {"key": context.key} if getattr(self.model, "dropout", 0) else {}
        channels = len(self.spec.channels)

        def call(fields, scalars):
            if context.mask is not None:
                noisy = jnp.where(context.mask > 0, fields[..., -channels:], 0)
                fields = jnp.concatenate([fields[..., :-channels], noisy], axis=-1)
            velocity = model(fields, scalars, **random).astype(fields.dtype)
            return velocity if context.mask is None else jnp.where(context.mask > 0, velocity, 0)

        return call


def _wide(array):
    return jnp.promote_types(jnp.asarray(array).dtype, jnp.float32)


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise of the steps 0 .. `refinements`: none is left at 0, nothing else is there at the last, where they begin.

    All numbers are float32, as the authors' are: 1 - 4e-7 rounds to 1 - 4.2e-7, which the last steps notice.

    Attributes:
        refinements: steps after the first prediction, K.
        minimum: beta of step 0. Despite the paper's name for it (a standard deviation) it acts as a variance.
        longest_time: what the network reads at the last, noisiest step.
    """

    refinements: int = 3
    minimum: float = 4e-7
    longest_time: float = LONGEST_TIME

    def __post_init__(self):
        if self.refinements < 1 or not 0 < self.minimum < 1:
            raise ConfigError(
                f"refinements={self.refinements} and minimum={self.minimum} were given, but a schedule needs at least "
                "one refinement and a least variance between 0 and 1."
            )
        if np.float32(1) - np.float32(self.minimum) == 1:
            raise ConfigError(
                f"minimum is {self.minimum}, but float32 cannot tell 1 - minimum from 1 then, and the last refinement "
                "would divide by zero. Use 1e-7 or more."
            )

    @property
    def betas(self) -> np.ndarray:
        """`minimum^((K - k) / K)` of every step k."""
        steps = self.refinements
        return np.array([self.minimum ** ((steps - k) / steps) for k in range(steps + 1)], np.float32)

    @property
    def signal(self) -> np.ndarray:
        """Share of the target in the variance of a noisy one, the product of 1 - beta up to each step."""
        return np.cumprod(np.float32(1) - self.betas, dtype=np.float64).astype(np.float32)

    @property
    def times(self) -> np.ndarray:
        """What the network reads at every step, 0 .. `longest_time`."""
        return np.arange(self.refinements + 1, dtype=np.float32) * np.float32(self.longest_time / self.refinements)


def increment_of(
    frames: Float[ArrayLike, "batch *space out"], last: Float[ArrayLike, "batch *space channel"], weight: float
) -> Float[Array, "batch *space out"]:
    """The target `(frame - last) / weight` for each of the frames to be predicted, from the last one known."""
    return (jnp.asarray(frames) - _repeated(last, frames)) / weight


def frames_of(
    increment: Float[ArrayLike, "batch *space out"], last: Float[ArrayLike, "batch *space channel"], weight: float
) -> Float[Array, "batch *space out"]:
    """Undoes `increment_of`."""
    return jnp.asarray(increment) * weight + _repeated(last, increment)


def _repeated(last, like):
    return jnp.tile(jnp.asarray(last), (1,) * (last.ndim - 1) + (like.shape[-1] // last.shape[-1],))


class DenoisingProblem(NamedTuple):
    """One evaluation of the training problem.

    Attributes:
        inputs: what the network read, history and noisy target.
        prediction, target: its result and what it should have been (velocity), `(batch, *space, out)`.
        loss: see `denoising_loss`.
    """

    inputs: Array
    prediction: Array
    target: Array
    loss: Array


def denoise(
    network: Network,
    schedule: NoiseSchedule,
    history: Float[ArrayLike, "batch *space channels"],
    target: Float[ArrayLike, "batch *space out"],
    parameters: Float[ArrayLike, "batch numbers"],
    step: Int[ArrayLike, " batch"],
    noise: Float[ArrayLike, "batch *space out"],
) -> DenoisingProblem:
    """The training problem at a `step` per sample, drawn uniformly from 0 .. K, and standard normal `noise`.

    With a the signal of the step the network reads `sqrt(a) target + sqrt(1 - a) noise` and predicts the velocity
    `sqrt(a) noise - sqrt(1 - a) target` (Salimans & Ho 2022, arXiv:2202.00512). At step K that is the one-step problem.
    """
    column = (-1, *(1,) * (jnp.ndim(target) - 1))
    signal = jnp.asarray(schedule.signal)[step].reshape(column)
    kept, added = jnp.sqrt(signal), jnp.sqrt(1 - signal)
    inputs = jnp.concatenate([history, kept * target + added * noise], axis=-1)
    prediction = network(inputs, _conditions(jnp.asarray(schedule.times)[step], parameters))
    velocity = kept * noise - added * target
    return DenoisingProblem(inputs, prediction, velocity, denoising_loss(prediction, velocity))


def denoising_loss(
    prediction: Float[ArrayLike, "batch *space out"], target: Float[ArrayLike, "batch *space out"]
) -> Float[Array, ""]:
    """Mean square error over batch and space, summed over channels and frames."""
    error = jnp.square(prediction - target)
    return error.sum(-1).mean()


class Refinement(NamedTuple):
    """A prediction and how it came about.

    Attributes:
        result: `(batch, *space, out)`.
        samples, outputs: what each step K, .., 0 read as noisy target, and what the network returned there,
            `(step, batch, *space, out)`.
    """

    result: Array
    samples: Array
    outputs: Array


def refine(
    network: Network,
    schedule: NoiseSchedule,
    history: Float[ArrayLike, "batch *space channels"],
    parameters: Float[ArrayLike, "batch numbers"],
    start: Float[ArrayLike, "batch *space out"],
    noises: Float[ArrayLike, "refinement batch *space out"],
) -> Refinement:
    """A whole prediction of the target, K + 1 calls of the network, from standard normal `start` and `noises`.

    `noises[j]` is added after the call at step K - j, j = 0 .. K - 1. Nothing is clipped.
    """
    history, parameters = jnp.asarray(history), jnp.asarray(parameters)
    last = jnp.zeros((1, *jnp.shape(start)), jnp.result_type(noises))  # step 0 adds no noise

    def advance(sample, entry):
        (time, kept, added, of_clean, of_sample, of_noise), noise = entry
        output = network(
            jnp.concatenate([history, sample], axis=-1), _conditions(jnp.full(sample.shape[0], time), parameters)
        )
        clean = kept * sample - added * output
        return of_clean * clean + of_sample * sample + of_noise * noise, (sample, output)

    entries = (tuple(_coefficients(schedule)), jnp.concatenate([noises, last]))
    result, (samples, outputs) = jax.lax.scan(advance, jnp.asarray(start), entries)
    return Refinement(result, samples, outputs)


def _coefficients(schedule: NoiseSchedule) -> np.ndarray:
    """Numbers of the steps K, .., 0 in a column each.

    Evaluated in float32 in the order of diffusers' sampler: near the end 1 - now / before cancels, and exact
    coefficients would give other samples, by 2e-5.
    """
    one, rows = np.float32(1), []
    for step in reversed(range(schedule.refinements + 1)):
        now = schedule.signal[step]
        before = schedule.signal[step - 1] if step else one
        ratio = now / before
        drop = one - ratio
        of_clean = np.sqrt(before) * drop / (one - now)
        of_sample = np.sqrt(ratio) * (one - before) / (one - now)
        variance = max((one - before) / (one - now) * drop, np.float32(LEAST_VARIANCE))
        of_noise = np.sqrt(variance) if step else np.float32(0)
        rows.append((schedule.times[step], np.sqrt(now), np.sqrt(one - now), of_clean, of_sample, of_noise))
    return np.array(rows, np.float32).T


def _conditions(times, parameters):
    """Scalars of the network: the step, then the parameters."""
    return jnp.concatenate([times[:, None], jnp.asarray(parameters, times.dtype)], axis=1)
