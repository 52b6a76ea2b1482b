"""PDE-Refiner: a prediction made in one step, then refined by removing ever weaker noise from it.

Lippe et al. 2023, arXiv:2308.05732; numbers as in the authors' code (pdearena) with the DDPM sampler of diffusers. Pure
functions on normalized fields `(batch, *space, channel)`; a network reads the history and, in the channels behind it,
the noisy target, and is conditioned on the refinement step (scalar 0) and on parameters of the equation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from physml.errors import ConfigError
from physml.fields import ArrayLike

LONGEST_TIME = 1000.0  # what the network reads at the first, noisiest step
LEAST_VARIANCE = 1e-20

Network = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise of the steps 0 .. `refinements`: none is left at 0, nothing else is there at the last, where they begin.

    All numbers are float32, as the authors' are: 1 - 4e-7 rounds to 1 - 4.2e-7, which the last steps notice.

    Attributes:
        refinements: steps after the first prediction, K.
        minimum: beta of step 0. Despite the paper's name for it (a standard deviation) it acts as a variance.
    """

    refinements: int = 3
    minimum: float = 4e-7

    def __post_init__(self):
        if self.refinements < 1 or not 0 < self.minimum < 1:
            raise ConfigError(
                f"refinements={self.refinements} and minimum={self.minimum} were given, but a schedule needs at least "
                "one refinement and a least variance between 0 and 1."
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
        """What the network reads at every step, 0 .. 1000."""
        return np.arange(self.refinements + 1, dtype=np.float32) * np.float32(LONGEST_TIME / self.refinements)


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


class Denoising(NamedTuple):
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
    step: Int[ArrayLike, "batch"],
    noise: Float[ArrayLike, "batch *space out"],
) -> Denoising:
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
    return Denoising(inputs, prediction, velocity, denoising_loss(prediction, velocity))


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
            jnp.concatenate([history, sample], axis=-1), _conditions(jnp.full(len(sample), time), parameters)
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
