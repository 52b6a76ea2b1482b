"""What an evaluation of a stepper will do, decided and checked before it computes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from physml.coding import whole_number
from physml.contracts import Dataset, Stepper
from physml.errors import ConfigError, DataError
from physml.evaluate.statistics import choose_metrics, choose_spectrum_leads, has_spectrum
from physml.fields import Window, stack
from physml.rollout import rollout
from physml.steppers.members import drawn

CLIMATOLOGY = "climatology"  # a floor of this name also serves as the climatology of skill and ACC


def check_evaluation(
    stepper: Stepper,
    dataset: Dataset,
    leads: int,
    *,
    starts: int | None = None,
    floors: dict[str, Stepper] | None = None,
    metrics: str | Sequence[str] | None = None,
    spectrum_leads: Sequence[int] | None = None,
    members: int | None = None,
    seeds: int | None = None,
) -> None:
    """Raises what `evaluate_stepper` would after training `stepper`, of which only the structure counts; one of each of
    the `seeds` will be stacked. `floors` need not be fitted.
    """
    floors, count = floors or {}, member_count(seeds, members)
    history = max(model.history for model in (stepper, *floors.values()))
    plan, *_ = choose(dataset, history, leads, starts, metrics, spectrum_leads, CLIMATOLOGY in floors, (count or 1) > 1)
    if (members or 1) > (seeds or 1):
        window = stack([_first(dataset, plan, stepper.history)])
        if not _draws(drawn(stepper), window):
            raise no_ensemble("the stepper")


def _draws(stepper: Stepper, window: Window) -> bool:
    """Whether its steps draw random numbers, by what is traced."""
    graph, state = nnx.split(stepper)

    def step(state, window, key):
        model = nnx.merge(graph, state)
        model.eval()
        return rollout(model, window, 1, key)

    return "random_bits" in str(jax.make_jaxpr(step)(state, window, jax.random.key(0)))


def no_ensemble(name: str) -> ConfigError:
    """What to raise where members were asked for that cannot differ."""
    return ConfigError(
        f"Several members of {name} are the same: the stepper draws no random numbers. Leave `members` out, or stack "
        "steppers of several seeds (physml.stack_members). Forecasts from perturbed initial states: "
        "physml.forecast(..., members=, perturb=0.01), then physml.evaluate."
    )


def choose(
    dataset: Dataset, history: int, leads: int, starts, metrics, spectrum_leads, climatology: bool, ensemble: bool
) -> tuple:
    """`(plan, metrics, leads, spectrum leads)` of an evaluation."""
    plan = plan_starts(dataset.lengths, history, leads, starts)
    spectral = has_spectrum(dataset.spec.grid, _first(dataset, plan, history).mask is not None)
    chosen = choose_metrics(metrics, climatology=climatology, spectrum=spectral, ensemble=ensemble)
    kept = choose_spectrum_leads(spectrum_leads, leads) if spectral else ()
    return plan, chosen, np.arange(1, leads + 1), kept


def _first(dataset: Dataset, plan, history: int) -> Window:
    """The history and the first predicted frame of the first start."""
    trajectory, frame = plan[0]
    return dataset.read(trajectory, range(max(frame - history, 0), frame + 1))


def member_count(own: int | None, asked: int | None) -> int | None:
    """Members that are rolled out of a stepper of `own`; None for a single stepper. Raises ConfigError for a number
    that cannot be shared.
    """
    if asked is not None and (asked < 1 or asked % (own or 1)):
        what = f"the stepper is an ensemble of {own}: use a multiple of it" if own else "at least one is needed"
        raise ConfigError(f"members is {asked}, but {what}.")
    return asked or own


def plan_starts(lengths: Sequence[int], history: int, leads: int, starts) -> list[tuple[int, int]]:
    """`(trajectory, first predicted frame)` of every rollout, see `evaluate_stepper`."""
    if leads < 1:
        raise ConfigError(f"leads is {leads}, but at least one frame must be predicted.")
    starts = _listed(starts)
    if isinstance(starts, list):
        return _check_starts(starts, lengths, history)
    need = history + (leads if starts else 1)
    usable = [t for t, length in enumerate(lengths) if length >= need]
    if not usable:
        raise DataError(
            f"{history} frames of history and {leads} leads need trajectories of {need} frames, but the longest has "
            f"{max(lengths, default=0)}. Lower the leads to at most {max(max(lengths, default=0) - history, 0)}, or "
            "use longer data."
        )
    if starts is None:
        return [(t, frame) for t in usable for frame in range(history, lengths[t])]
    if starts < 1:
        raise ConfigError(f"starts is {starts}, but at least one start per trajectory is needed (None: all of them).")
    plan = []
    for t in usable:
        last = lengths[t] - leads
        frames = np.unique(np.linspace(history, last, min(starts, last - history + 1)).round().astype(int))
        plan += [(t, int(frame)) for frame in (frames if starts > 1 else [history])]
    return plan


def _listed(starts: Any) -> int | list[tuple[int, int]] | None:
    """Starts as a number, or as pairs of numbers. Raises ConfigError for what is neither."""
    if starts is None:
        return None
    try:
        pairs = np.asarray(starts)
    except ValueError:  # of uneven length
        pairs = np.empty((1, 0))
    if pairs.ndim == 0:
        return whole_number("starts", starts)
    if len(pairs) and (pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu"):
        raise ConfigError(
            f"starts is {starts!r}, but a number of starts per trajectory, or (trajectory, first predicted frame) "
            "pairs of whole numbers, were expected."
        )
    return [(int(trajectory), int(frame)) for trajectory, frame in pairs]


def _check_starts(plan, lengths, history):
    if not plan:
        raise ConfigError(
            "starts is empty: give at least one (trajectory, first predicted frame) pair, or None for all."
        )
    for trajectory, frame in plan:
        if not 0 <= trajectory < len(lengths) or not history <= frame < lengths[trajectory]:
            valid = f"{history}..{lengths[trajectory] - 1}" if 0 <= trajectory < len(lengths) else "none"
            raise ConfigError(
                f"The start {(trajectory, frame)} is outside the data: there are {len(lengths)} trajectories, and with "
                f"{history} frames of history the first predicted frame can be {valid}."
            )
    return plan
