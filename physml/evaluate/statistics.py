"""What is taken from every pair of rollout and truth, and how it adds up over batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from physml.coding import whole_number
from physml.errors import ConfigError, SpecError, suggest
from physml.fields import Grid, Spec
from physml.metrics import METRICS, Measure, Metric, energy_spectrum
from physml.metrics.aggregate import Sums, across_processes
from physml.metrics.ensemble import crps, rank_shares, variance
from physml.metrics.moments import ENSEMBLE_METRICS
from physml.metrics.spectra import shells

SPECTRAL = ("spectrum", "log_spectral_error")  # defined for frames without missing cells
RANKS = "ranks"  # parts of a rank histogram, (pair, lead, channel, rank)
TWINS = ("h1_periodic",)  # variants that are scored only when asked for by name


def as_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names as a tuple; a text is one name."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def choose_metrics(names, *, climatology: bool, spectrum: bool, ensemble: bool = False) -> dict[str, Any]:
    """`pick_metrics` of those that score a stepper."""
    lacking = {
        "climatology": "compares with a climatology, but none is given: pass `climatology=`, or score the floor "
        "'climatology' beside the model",
        "ensemble": "scores ensembles, but the stepper is a single one. Pass `members=` for several realizations, or "
        "train it with several seeds",
    }
    has = {"climatology": climatology, "ensemble": ensemble}
    lacking = {need: said for need, said in lacking.items() if not has[need]}
    unasked = TWINS if spectrum else (*TWINS, "log_spectral_error")
    return pick_metrics(names, {**METRICS, **ENSEMBLE_METRICS}, lacking, unasked)


def pick_metrics(names, every: dict[str, Any], lacking: dict[str, str], unasked: Sequence[str] = TWINS) -> dict:
    """Metrics by name, or all that apply when `names` is empty; a dict of own `Metric`s is taken as it is.

    Args:
        lacking: what is not there, of what metrics may need, and what is said to those who name one that needs it.
        unasked: names of those that are left out unless they are named.

    Raises ConfigError for an unknown name and for one that needs what is not there.
    """
    if isinstance(names, dict):
        return dict(names)
    names = as_names(names)
    for name in names:
        if name not in every:
            raise ConfigError(f"There is no metric {name!r}." + suggest(name, every))
        if (need := every[name].needs) in lacking:
            raise ConfigError(f"The metric {name!r} {lacking[need]}.")
    fit = [name for name in sorted(every) if every[name].needs not in lacking and name not in unasked]
    return {name: every[name] for name in names or fit}


def has_spectrum(grid: Grid, masked: bool) -> bool:
    """Whether an energy spectrum is defined: every cell exists and some axis has at least four points."""
    if masked:
        return False
    try:
        shells(grid)
    except SpecError:
        return False
    return True


def choose_spectrum_leads(leads: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Leads (in frames, from 1) whose spectrum is kept: first, middle and last when none are given."""
    given = [] if leads is None else [whole_number("spectrum_leads", lead) for lead in np.atleast_1d(leads).tolist()]
    chosen = sorted(set(given or (1, (count + 1) // 2, count)))
    if chosen[0] < 1 or chosen[-1] > count:
        raise ConfigError(f"spectrum_leads are {tuple(chosen)}, but leads count from 1 to {count}.")
    return tuple(chosen)


def field_statistics(frames, measure: Measure, spectrum_leads: tuple[int, ...]) -> dict:
    """Moments and spectra of fields `(batch, lead, *space, channel)`, as tuples of parts per pair. Jittable."""
    found = {"mean": (measure.mean(frames),), "square": (measure.mean(frames**2),)}
    if spectrum_leads:
        found["spectrum"] = (energy_spectrum(frames[:, np.asarray(spectrum_leads) - 1], measure.grid),)
    return found


def pair_statistics(prediction, truth, measure: Measure, metrics: dict[str, Metric]) -> tuple[dict, dict]:
    """(parts, score of every pair by itself) of each metric. Jittable."""
    parts = {name: metric.statistic(prediction, truth, measure) for name, metric in metrics.items()}
    return parts, {name: metrics[name].per_pair(part) for name, part in parts.items()}


def ensemble_statistics(ensemble, truth, measure: Measure) -> dict:
    """Parts of `ENSEMBLE_METRICS` and of the rank histogram, from `(member, batch, lead, *space, channel)`. Jittable.

    A single member has a CRPS, the absolute error, but no spread and no ranks.
    """
    members, error = len(ensemble), ensemble.mean(0) - truth
    spread = measure.mean(variance(ensemble))
    parts = {
        "crps": (measure.mean(crps(ensemble, truth)),),
        "crps_fair": (measure.mean(crps(ensemble, truth, fair=True)),),
        "spread": (spread,),
        "spread_skill": (spread * ((members + 1) / members), measure.mean(error**2)),
    }
    if members > 1:
        parts[RANKS] = (jnp.moveaxis(jax.vmap(measure.mean)(rank_shares(ensemble, truth)), 0, -1),)
    return parts


def finite_frames(frames):
    """`(batch, lead)`: whether a frame holds only finite numbers."""
    return jnp.isfinite(frames).all(tuple(range(2, frames.ndim)))


class Tally:
    """Everything kept of one model (or of the truth) while batches stream by; all on the host."""

    def __init__(self, groups: int, spectrum_leads: tuple[int, ...]):
        self.groups = groups
        self.spectrum_index = np.asarray(spectrum_leads, int) - 1
        self.sums: dict[str, Sums] = {}
        self.pairs: dict[str, list[np.ndarray]] = {}
        self._complete: list[np.ndarray] = []

    def add(self, parts: dict, pairs: dict, groups: np.ndarray, weights: np.ndarray, complete=True) -> None:
        """One batch: `parts[name]` as `Sums.of` takes them, `weights (batch, lead)` 1 where the pair counts, or
        `(batch, lead, channel)`; `complete`, of that shape, is false where a frame has no spectrum (missing cells)."""
        for name, values in parts.items():
            weight = weights * complete if name in SPECTRAL else weights
            weight = weight[:, self.spectrum_index] if name == "spectrum" else weight
            weight = weight.any(-1) if name == "finite" and weight.ndim > 2 else weight
            new = Sums.of(values, groups, self.groups, weight)
            self.sums[name] = self.sums[name] + new if name in self.sums else new
        each = weights if weights.ndim > 2 else weights[..., None]
        real = weights.any(tuple(range(1, weights.ndim)))  # rows that only fill up the last batch are dropped
        for name, values in pairs.items():
            values = np.where(each > 0, np.asarray(values), np.nan)
            self.pairs.setdefault(name, []).append(values[real].astype(np.float32))
        self._complete.append(each[real].all((1, 2)))

    def per_pair(self, name: str) -> np.ndarray:
        """`(pair, lead, channel)`; NaN at leads that the truth does not reach."""
        return np.concatenate(self.pairs[name])

    @property
    def complete(self) -> np.ndarray:
        """`(pair,)`: whether the truth reaches all leads of a pair."""
        return np.concatenate(self._complete)

    def merge_processes(self) -> None:
        """Adds the sums of all processes (not the scores per pair)."""
        self.sums = {name: across_processes(sums) for name, sums in self.sums.items()}


def blocks_of_starts(starts: Sequence[tuple[int, int]], leads: int) -> tuple[np.ndarray, str]:
    """Groups of dependent pairs for the bootstrap, `(start,)`, and what they are.

    With eight trajectories or more each is a group. Otherwise starts of one trajectory within `leads` frames are
    (moving-block bootstrap with blocks that do not overlap, Carlstein 1986): forecasts that verify on the same frames
    are not independent.
    """
    trajectories = np.array([trajectory for trajectory, _ in starts])
    frames = np.array([frame for _, frame in starts])
    if len(np.unique(trajectories)) >= 8:
        return np.unique(trajectories, return_inverse=True)[1], "trajectory"
    first = {t: frames[trajectories == t].min() for t in np.unique(trajectories)}
    block = [(t, (f - first[t]) // max(leads, 1)) for t, f in zip(trajectories, frames)]
    _, groups = np.unique(np.array(block), axis=0, return_inverse=True)
    return groups.ravel(), f"block of {leads} frames"


def spread(per_pair: np.ndarray) -> np.ndarray:
    """Standard deviation over pairs, `(lead, channel)`; NaN with fewer than two."""
    count = np.isfinite(per_pair).sum(0)
    if len(per_pair) < 2:
        return np.full(per_pair.shape[1:], np.nan)
    deviation = np.ma.masked_invalid(per_pair.astype(np.float64)).std(0, ddof=1)
    return np.where(count > 1, np.ma.filled(deviation, np.nan), np.nan)


def channel_units(spec: Spec) -> list[str]:
    """Unit of every channel, "" where it has none."""
    return [channel.unit for channel in spec.channels]
