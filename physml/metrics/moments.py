"""Metrics from sums over cells that add: space, like time, may come in pieces, and the score does not depend on them.

`pair_sums` takes float64 sums of one piece, `Moments` turns the total of all pieces into means over the cells that
exist, and a `MomentMetric` makes its parts of these. The metrics of `physml.metrics.METRICS` among them mean the same
as there; those of ensembles and of precipitation categories exist only here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from physml.metrics.calibration import central_level, coverage_from_ranks, gaussian_crps, log_likelihood
from physml.metrics.ensemble import member_distance, rank_shares, variance
from physml.metrics.metric import identity
from physml.metrics.weather import seeps

COVERAGES = (50, 90)  # per cent of the central intervals whose coverage is scored
RANK = "rank_"  # with a number: cells where the truth has that rank among the members
OPTIONAL = (
    "anomaly_field", "anomaly_truth", "distance", "gaussian_crps", "log_likelihood", "member_distance", "seeps",
    "variance",
)  # fmt: skip
CELLS = 2**15  # numbers handled at once: they stay in the cache of a core
CONSTANT = 1e-13  # share of the mean square below which a variance is rounding of float64


@dataclass(frozen=True)
class MomentMetric:
    """A score made of `Moments`.

    Attributes:
        parts: moments -> tuple of parts `(start, lead, channel)`, to be averaged over starts.
        finish, ideal, dimensional: as in `metric.Metric`.
        needs: "climatology", "ensemble", "gaussian" (standard deviations), "uncertainty" (one of these two), "seeps" (a
            climatology of precipitation categories), or nothing.
    """

    parts: Callable[[Any], tuple]
    finish: Callable[..., Any] = identity
    ideal: float = 0.0
    dimensional: bool = False
    needs: str = ""

    def per_pair(self, parts: tuple):
        return self.finish(*parts)


def pair_sums(
    prediction: np.ndarray,
    truth: np.ndarray,
    area: np.ndarray,
    shift: float = 0.0,
    climatology: np.ndarray | None = None,
    categories: tuple[np.ndarray, np.ndarray] | None = None,
    std: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Sums over the cells of a piece of space, float64 `(pair,)` by name.

    Args:
        prediction: `(member, pair, cell)`; the pair scores are those of the mean over members.
        truth: `(pair, cell)`. Cells where it is NaN do not count; NaN of the prediction elsewhere stay in the sums.
        area: `(cell,)` weights.
        shift: taken off all fields first, so that variances keep their digits; `Moments` puts it back.
        climatology: `(pair, cell)`.
        categories: (`threshold (pair, cell)`, `dry_fraction (cell,)`) of `weather.seeps`.
        std: `(pair, cell)` standard deviations of a prediction of one member.
    """
    pieces = []
    for begin in range(0, area.size, CELLS):
        cells = slice(begin, begin + CELLS)
        rows = max(1, CELLS // area[cells].size)
        done = [
            _sums(
                prediction[:, pairs, cells], truth[pairs, cells], area[cells], shift,
                None if climatology is None else climatology[pairs, cells],
                None if categories is None else (categories[0][pairs, cells], categories[1][cells]),
                None if std is None else std[pairs, cells],
            )
            for pairs in (slice(i, i + rows) for i in range(0, len(truth), rows))
        ]  # fmt: skip
        pieces.append({name: np.concatenate([sums[name] for sums in done]) for name in done[0]})
    return {name: functools.reduce(np.add, (piece[name] for piece in pieces)) for name in pieces[0]}


def _sums(prediction, truth, area, shift, climatology, categories, std) -> dict[str, np.ndarray]:
    true = np.subtract(truth, shift, dtype=np.float64)
    members = np.subtract(prediction, shift, dtype=np.float64)
    missing = np.isnan(true)
    weights = area
    if missing.any():
        weights = np.where(missing, 0.0, area)
        true = np.where(missing, 0.0, true)
        members = np.where(missing, 0.0, members)
    field = members[0] if len(members) == 1 else members.mean(0)
    cells = "g" if weights.ndim == 2 else ""

    def total(*factors):
        return np.einsum(",".join(["gn"] * len(factors)) + f",{cells}n->g", *factors, weights)

    error = field - true
    sums = {
        "weight": np.broadcast_to(weights.sum(-1), len(true)),
        "cells": (weights > 0).sum(-1) * np.ones(len(true)),
        "error": total(error),
        "absolute": total(np.abs(error)),
        "square": total(error, error),
        "truth": total(true),
        "truth_square": total(true, true),
        "field_square": total(field, field),
    }
    if climatology is not None:
        normal = np.subtract(climatology, shift, dtype=np.float64)
        normal = np.where(missing, 0.0, normal) if weights.ndim == 2 else normal
        anomaly, true_anomaly = field - normal, true - normal
        sums |= {"anomaly_field": total(anomaly, anomaly), "anomaly_truth": total(true_anomaly, true_anomaly)}
    if len(members) > 1:
        sums |= {
            "distance": total(np.abs(members - true).mean(0)),
            "member_distance": total(member_distance(members)),
            "variance": total(variance(members)),
        }
        sums |= {f"{RANK}{i}": total(share) for i, share in enumerate(rank_shares(members, true))}
    if std is not None:
        spread = np.where(missing, 1.0, std).astype(np.float64) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):  # a variance of zero has no density
            sums["log_likelihood"] = total(log_likelihood(field, spread, true))
        sums["gaussian_crps"] = total(gaussian_crps(field, spread, true))
        level = central_level(field, spread, true)
        sums |= {f"within_{c}": total(np.where(np.isnan(level), np.nan, level <= c / 100)) for c in COVERAGES}
    if categories is not None:
        score = seeps(field + shift, true + shift, *categories)
        defined = np.isfinite(score) | np.isnan(field)
        weights, cells = np.where(defined, weights, 0.0), "g"
        sums |= {"seeps": total(np.where(defined, score, 0.0)), "seeps_weight": weights.sum(-1)}
    return sums


class Moments:
    """Means over cells of total sums, `(start, lead, channel)`; see the properties for what each is.

    Args:
        sums: as `pair_sums` gives them, of all pieces of space together, any leading shape.
        shift: `(channel,)`, what was taken off the fields.
        members: of the ensemble.
    """

    def __init__(self, sums: dict[str, np.ndarray], shift: np.ndarray, members: int = 1):
        self.sums, self.shift, self.members = sums, shift, members
        with np.errstate(invalid="ignore", divide="ignore"):
            self.per_weight = 1 / sums["weight"]  # infinite where no cell exists: the means are NaN there
        self.cells = sums["cells"]

    def __getattr__(self, name: str) -> np.ndarray:
        if name in self.__dict__.get("sums", {}):
            with np.errstate(invalid="ignore"):
                return self.sums[name] * self.per_weight
        if name in OPTIONAL:
            return np.full_like(self.cells, np.nan)  # not given for this channel or forecast
        raise AttributeError(name)

    @property
    def truth_mean(self):
        return self.truth + self.shift

    @property
    def field_mean(self):
        return self.truth + self.error + self.shift

    @property
    def truth_power(self):
        """<t^2>."""
        return self.truth_square + 2 * self.shift * self.truth + self.shift**2

    @property
    def field_power(self):
        """<p^2>."""
        return self.field_square + 2 * self.shift * (self.truth + self.error) + self.shift**2

    @property
    def truth_variance(self):
        return _variance(self.truth_square, self.truth)

    @property
    def field_variance(self):
        return _variance(self.field_square, self.truth + self.error)

    @property
    def covariance(self):
        product = (self.field_square + self.truth_square - self.square) / 2
        return product - self.truth * (self.truth + self.error)

    @property
    def anomaly_product(self):
        return (self.anomaly_field + self.anomaly_truth - self.square) / 2

    @property
    def ranks(self) -> np.ndarray:
        """Share of the cells where the truth has each rank among the members, `(start, lead, channel, member + 1)`."""
        return np.stack([getattr(self, f"{RANK}{i}") for i in range(self.members + 1)], -1)

    @property
    def finite(self) -> np.ndarray:
        """Whether the prediction is finite in all cells that exist."""
        return np.isfinite(self.sums["field_square"])


def _variance(square, mean):
    value = square - mean**2
    return np.where(value <= CONSTANT * square, 0.0, value)


def _cosine(product, a, b):
    norm = np.sqrt(a) * np.sqrt(b)
    return np.where(norm == 0, 0.0, product / np.where(norm == 0, 1.0, norm))


def _vrmse(m: Moments) -> tuple:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.sqrt(m.square / (m.truth_variance * (m.cells / (m.cells - 1)))),)


def _relative(m: Moments) -> tuple:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.sqrt(m.square / m.truth_power),)


def _crps(m: Moments, fair: bool) -> tuple:
    if m.members == 1:
        return (m.absolute * (np.nan if fair else 1.0),)
    return (m.distance - m.member_distance / 2 * (1.0 if fair else (m.members - 1) / m.members),)


def _spread_skill(m: Moments) -> tuple:
    return m.variance * ((m.members + 1) / m.members), m.square


def _coverage(m: Moments, per_cent: int) -> tuple:
    if f"within_{per_cent}" in m.sums:
        return (getattr(m, f"within_{per_cent}"),)
    if m.members == 1:
        return (np.full_like(m.cells, np.nan),)
    return (coverage_from_ranks(m.ranks, per_cent / 100),)


def _ratio(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(np.asarray(a) / np.asarray(b))


def _seeps(m: Moments) -> tuple:
    if "seeps" not in m.sums:
        return (m.seeps,)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (m.sums["seeps"] / m.sums["seeps_weight"],)


# Parts of the metrics of METRICS that follow from moments; the rest of their definition is taken from there.
PARTS: dict[str, Callable[[Moments], tuple]] = {
    "acc": lambda m: (_cosine(m.anomaly_product, m.anomaly_field, m.anomaly_truth),),
    "acc_pooled": lambda m: (m.anomaly_product, m.anomaly_field, m.anomaly_truth),
    "bias": lambda m: (m.error,),
    "correlation": lambda m: (_cosine(m.covariance, m.field_variance, m.truth_variance),),
    "mae": lambda m: (m.absolute,),
    "nrmse": _relative,
    "nrmse_pooled": lambda m: (m.square, m.truth_power),
    "relative_l2": _relative,
    "rmse": lambda m: (m.square,),
    "skill": lambda m: (m.square, m.anomaly_truth),
    "vrmse": _vrmse,
}

# Of labelled forecasts only. `spread_skill` is sqrt((M + 1) / M) spread / RMSE of the mean, 1 for a reliable ensemble
# of any size (Fortin et al. 2014, doi:10.1175/JHM-D-14-0008.1, eq. 15).
ENSEMBLE_METRICS: dict[str, MomentMetric] = {
    "crps": MomentMetric(lambda m: _crps(m, fair=False), dimensional=True, needs="ensemble"),
    "crps_fair": MomentMetric(lambda m: _crps(m, fair=True), dimensional=True, needs="ensemble"),
    "spread": MomentMetric(lambda m: (m.variance,), np.sqrt, dimensional=True, needs="ensemble"),
    "spread_skill": MomentMetric(_spread_skill, _ratio, ideal=1.0, needs="ensemble"),
}
# Of labelled forecasts with standard deviations; coverage also of ensembles, from the ranks of the truth. The logarithm
# is of the density per unit of the channel.
UNCERTAINTY_METRICS: dict[str, MomentMetric] = {
    **{
        f"coverage_{c}": MomentMetric(functools.partial(_coverage, per_cent=c), ideal=c / 100, needs="uncertainty")
        for c in COVERAGES
    },
    "gaussian_crps": MomentMetric(lambda m: (m.gaussian_crps,), dimensional=True, needs="gaussian"),
    "log_likelihood": MomentMetric(lambda m: (m.log_likelihood,), ideal=np.inf, needs="gaussian"),
}
SEEPS_METRICS: dict[str, MomentMetric] = {"seeps": MomentMetric(_seeps, needs="seeps")}
