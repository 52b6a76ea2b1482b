"""Penalties beside the error: laws that predicted frames break, and energy that they lack or have too much of."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.coding import check_fields, check_positive, name_of, tagged
from physml.constraints import CONSTRAINTS
from physml.errors import ConfigError, SpecError
from physml.fields import Window
from physml.metrics.pointwise import rounding
from physml.metrics.spectra import energy_spectrum, shells
from physml.objectives.scoring import Prediction, check_inner, inner_objectives
from physml.objectives.unrolled import Around, OneStep, Rollout, Scored


@dataclass(frozen=True)
class ConstraintPenalty:
    """Mean square violation of a constraint over samples, leads and laws.

    Attributes:
        constraint: one of `physml.constraints.CONSTRAINTS`, or anything with `violation(frame, previous, context)`.
        weight: of the penalty beside the loss.
        scale: violation that counts as 1; those of `CONSTRAINTS` are relative.
    """

    constraint: Any = tagged(CONSTRAINTS, default=None)
    weight: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        check_fields(self)
        check_positive(self, "weight", "scale")
        if not (hasattr(self.constraint, "violation") or hasattr(self.constraint, "build")):
            raise ConfigError(
                f"constraint is {self.constraint!r}, which has neither `violation` nor `build`. "
                f"Use one of {sorted(CONSTRAINTS)}, or an object of your own with `violation`."
            )

    def __call__(self, window: Window, prediction: Prediction, stop: int) -> Float[Array, ""]:
        """The penalty of frames that end at frame `stop - 1` of the window, without its weight."""
        constraint = self.constraint
        if hasattr(constraint, "build"):
            constraint = constraint.build(window.spec)

        def violation(frame, previous, index):
            return constraint.violation(frame, previous, window.context(index, 0))

        indices = jnp.arange(stop - prediction.frames.shape[1], stop)
        violations = jax.vmap(violation, in_axes=(1, 1, 0))(prediction.frames, prediction.previous, indices)
        return jnp.mean(jnp.square(violations / self.scale))


@dataclass(frozen=True)
class SpectralPower:
    """Mean of |E_p - E_t| / (E_t + floor * sum E_t) over samples, leads, channels and wavenumber shells.

    E is the energy in a shell of `physml.metrics.spectra`, the mean of the field left out. Every scale counts alike, so
    that a blurred prediction, which a mean square error hardly notices, costs up to 1 in each shell that it lost. A
    truth that is constant in space up to rounding, which has no energy to compare with, costs nothing. After the
    spectral loss of CarbonBench (Benson et al. 2024, arXiv:2408.11032), which uses spherical harmonics.

    Attributes:
        weight: of the penalty beside the loss.
        cut: shells up to this fraction of the last complete one count; CarbonBench's option is 3/4.
        floor: share of the energy below which a shell counts as part of it only: rounding has no true spectrum.
    """

    weight: float = 0.1
    cut: float = 1.0
    floor: float = 1e-6

    def __post_init__(self):
        check_fields(self)
        check_positive(self, "weight", "cut", "floor")
        if self.cut > 1:
            raise ConfigError(f"cut is {self.cut}, but it is a fraction of the complete shells: at most 1.")

    def __call__(self, window: Window, prediction: Prediction, stop: int) -> Float[Array, ""]:
        """The penalty, without its weight. Raises SpecError for masked fields and grids that have no spectrum, or whose
        points are uneven.
        """
        if window.mask is not None:
            raise SpecError(
                "SpectralPower needs fields that exist everywhere, but these have a mask. Leave the penalty out."
            )
        grid = window.spec.grid
        last = max(int(self.cut * shells(grid).resolved), 1)
        truth = jnp.asarray(window.frames)[:, stop - prediction.frames.shape[1] : stop]
        predicted, true = (energy_spectrum(f, grid)[..., 1 : last + 1] for f in (prediction.frames, truth))
        # Where the truth is constant in space, up to rounding, there is no energy to compare with.
        varies = (true.sum(-1) > rounding((truth**2).mean(tuple(range(2, truth.ndim - 1)))) / 2)[..., None]
        size = true + self.floor * true.sum(-1, keepdims=True)
        return jnp.mean(jnp.where(varies, jnp.abs(predicted - true) / jnp.where(varies, size, 1), 0))


PENALTIES = {
    "constraint": ConstraintPenalty,
    "spectral_power": SpectralPower,
}


@dataclass(frozen=True)
class Penalized(Around):
    """Another objective plus `weight * penalty` for each penalty, of the same predicted frames in physical units.

    Validation is the error alone.

    Attributes:
        objective: the error of a `Rollout`, or noise on one.
        penalties: of `PENALTIES`, or callables of one's own with the same signature and a `weight`.
    """

    objective: Any = tagged(inner_objectives, default=OneStep())
    penalties: tuple[Any, ...] = tagged(PENALTIES, default=())

    def __post_init__(self):
        check_inner(self.objective, type(self).__name__)
        if not isinstance(self.innermost, Rollout):
            raise ConfigError(
                f"Penalized needs the frames of a rollout, which {type(self.innermost).__name__} does not offer. Use "
                "one_step, unrolled, pushforward, all_to_all, random_interval, likelihood, or noisy_inputs of these."
            )
        if not isinstance(self.penalties, tuple | list) or not self.penalties:
            raise ConfigError(
                f"penalties are {self.penalties!r}, but one or more in a tuple were expected: of {sorted(PENALTIES)}."
            )
        for penalty in self.penalties:
            if isinstance(penalty, type) or not callable(penalty) or not hasattr(penalty, "weight"):
                constraint = hasattr(penalty, "violation") or hasattr(penalty, "build")
                advice = "Put it into ConstraintPenalty(...)" if constraint else "Write SpectralPower(weight=0.1)"
                raise ConfigError(f"penalties hold {penalty!r}, which is no penalty. {advice}.")
        object.__setattr__(self, "penalties", tuple(self.penalties))

    def score(self, stepper, window: Window, prediction: Prediction) -> Scored:
        """As of the inner objective, with the parts of the sum as {"part": {"data": ..., PENALTY: ...}}."""
        value, aux = self.objective.score(stepper, window, prediction)
        parts = {"data": value, **aux.get("part", {})}
        for penalty in self.penalties:
            amount = penalty(window, prediction, window.length)
            value = value + penalty.weight * amount
            name = _name(penalty)
            parts[name] = parts.get(name, 0) + amount
        return value, {**aux, "part": jax.lax.stop_gradient(parts)}


def _name(penalty) -> str:
    try:
        return name_of(penalty, PENALTIES)
    except ConfigError:  # a penalty of the user's own
        return type(penalty).__name__
