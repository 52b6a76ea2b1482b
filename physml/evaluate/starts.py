"""From where a stepper is rolled out to be scored."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from physml.errors import ConfigError, DataError
from physml.evaluate.statistics import whole


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
        return whole("starts", starts)
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
