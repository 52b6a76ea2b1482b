"""How much a model gains over a reference, from their errors after training on ever more samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from physml.errors import ConfigError


class EfficiencyGain(NamedTuple):
    """Gains of a model over a reference; above 1 the model is better.

    Attributes:
        samples: EG, how many times fewer samples the model needs to reach the error of the reference at its largest
            count; 0 where it never does.
        accuracy: AG, error of the reference over error of the model at the same count.
        is_bound: the model is that good with its fewest samples already: `samples` is a lower bound.
    """

    samples: float
    accuracy: float
    is_bound: bool


def efficiency_gain(
    samples: Sequence[float],
    errors: Sequence[float],
    reference_samples: Sequence[float],
    reference_errors: Sequence[float],
    at: float | None = None,
) -> EfficiencyGain:
    """Efficiency and accuracy gain of Herde et al. 2024, arXiv:2405.19101, section 4.

    Errors between two counts lie on a straight line of log error over log samples; where a curve crosses the target
    several times, the fewest samples count.

    Args:
        samples, reference_samples: rising numbers of training samples.
        errors, reference_errors: of the trained models, in the same measure.
        at: the count for the accuracy gain, inside both curves; the largest that both measured if not given.

    Raises ConfigError for curves that are empty, uneven, not rising or not positive, and for `at` outside of them.
    """
    model, reference = _curve(samples, errors, ""), _curve(reference_samples, reference_errors, "reference_")
    if at is None:
        common = np.intersect1d(model[0], reference[0])
        if not common.size:
            raise ConfigError("The curves have no number of samples in common: give `at` for the accuracy gain.")
        at = float(common[-1])
    for counts, _ in (model, reference):
        if not counts[0] <= at <= counts[-1]:
            raise ConfigError(
                f"at is {at:g}, but one curve spans {counts[0]:g} to {counts[-1]:g} samples. Choose a count that both "
                "span, or train with more counts."
            )
    accuracy = float(np.exp(_at(reference, at) - _at(model, at)))
    needed = _first_below(model, reference[1][-1])
    if needed is None:
        return EfficiencyGain(0.0, accuracy, False)
    return EfficiencyGain(float(reference[0][-1] / needed), accuracy, needed == model[0][0])


def _curve(samples, errors, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    samples, errors = np.asarray(samples, float), np.asarray(errors, float)
    if samples.ndim != 1 or samples.shape != errors.shape or not samples.size:
        raise ConfigError(
            f"{prefix}samples has shape {samples.shape} and {prefix}errors {errors.shape}, but each count of samples "
            "needs one error: give two lists of the same length."
        )
    for name, values in ((f"{prefix}samples", samples), (f"{prefix}errors", errors)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ConfigError(f"{name} are {values.tolist()}, but they must be positive and finite.")
    if (np.diff(samples) <= 0).any():
        raise ConfigError(f"{prefix}samples are {samples.tolist()}, but they must rise. Sort the curve.")
    return samples, errors


def _at(curve, count: float) -> float:
    """Logarithm of the error at a count."""
    return float(np.interp(np.log(count), np.log(curve[0]), np.log(curve[1])))


def _first_below(curve, target: float) -> float | None:
    """The fewest samples at which the error is not above the target."""
    counts, errors = curve
    below = np.flatnonzero(errors <= target)
    if not below.size:
        return None
    i = int(below[0])
    if i == 0:
        return float(counts[0])
    high, low = np.log(errors[i - 1 : i + 1])
    share = (high - np.log(target)) / (high - low)
    return float(np.exp(np.log(counts[i - 1]) + share * np.log(counts[i] / counts[i - 1])))
