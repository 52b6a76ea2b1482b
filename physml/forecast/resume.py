"""An unfinished rollout on disk: the state of the stepper and of the watchdog, and what they belong to.

`OUT.partial/state.safetensors` holds the arrays of the state and, as JSON in its header, everything else. It is
replaced in one piece after the output up to its step is written, so that it never speaks of what is not there.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import xarray as xr

from physml.errors import CheckpointError
from physml.fields import Window
from physml.files import whole
from physml.forecast.stores import ANEW, reopen
from physml.rollout import Divergence, Watchdog, named
from physml.saving.weights import read_weights, to_bytes

STATE, HEADER = "state.safetensors", "rollout"
FORMAT = 3  # 1 knew forcing by its first step alone; the ledgers of 1 and 2 had twice the energy
MARK = "rollout_identity"  # attribute of a finished output


@dataclass(frozen=True)
class Saved:
    """Where an unfinished rollout stands: `step` steps are done, `arrays` are the state after them."""

    step: int
    arrays: dict[str, Any]
    names: list[str]
    good: list[int]
    events: list[Divergence]

    def put_into(self, watch: Watchdog) -> None:
        watch.good = np.asarray(self.good)
        watch.events = {event.sample: event for event in self.events}


def identity(
    model: Mapping[str, str], window: Window, begins: Any, key, forcing: str, **options: Any
) -> dict[str, str]:
    """What a rollout may be continued with, by the words that an error calls it. `forcing` is a checksum."""
    digest = hashlib.sha256()
    leaves = [window.frames, window.calendar[:, : window.frames.shape[1]], window.parameters, window.static]
    for leaf in [*leaves, *([] if window.mask is None else [window.mask])]:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return {
        "model": f"{model['model_id']} {model['config_hash']}",
        # Before the initial state, which the key perturbs.
        "key": "none" if key is None else str(np.asarray(jax.random.key_data(key)).tolist()),
        "initial state": f"{begins} {digest.hexdigest()[:12]}",
        **{name: str(value) for name, value in options.items()},
        "forcing": forcing,  # the last to be compared: it depends on the steps
    }


def mark(owner: dict[str, str]) -> str:
    """What a finished output says of its `identity`."""
    return json.dumps(_without_chunk(owner))


def _without_chunk(owner: dict[str, str]) -> dict[str, str]:
    """Only an unfinished output depends on chunks."""
    return {what: value for what, value in owner.items() if what != "chunk"}


def finished(out: str | Path, owner: dict[str, str]) -> xr.Dataset | None:
    """The output of this very rollout, opened; None when there is none. Raises CheckpointError for another one."""
    if not Path(out).exists():
        return None
    try:
        data = reopen(Path(out))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{out} exists and cannot be read: {error}. Pass overwrite=True (--overwrite)."
        ) from error
    try:
        found = dict(json.loads(data.attrs[MARK]))
    except (KeyError, TypeError, ValueError):
        found = {}
    difference = _difference(found, _without_chunk(owner))
    if difference is None:
        return data
    data.close()
    what = f"was made with another {difference}" if found else "is no rollout of this version of physml"
    raise CheckpointError(f"{out} exists and {what}. Choose another name, or pass overwrite=True (--overwrite).")


def _difference(found: dict[str, str], owner: dict[str, str]) -> str | None:
    """What differs first, in words."""
    for what in owner:
        if found.get(what) != owner[what]:
            return f"{what}: {found.get(what)} there, {owner[what]} now"
    return None


def save(folder: Path, owner: dict[str, str], step: int, state, names: list[str], watch: Watchdog) -> None:
    """Replaces the saved state in one piece."""
    about = {
        "format": FORMAT, "identity": owner, "step": step, "names": names, "good": watch.good.tolist(),
        "events": [dataclasses.asdict(event) for event in watch.events.values()],
    }  # fmt: skip
    content = to_bytes(named(state), {HEADER: json.dumps(about)})
    with whole(folder / STATE) as partial:
        partial.write_bytes(content)


def load(folder: Path, owner: dict[str, str]) -> Saved | None:
    """What was saved in `folder`; None when nothing was.

    Raises CheckpointError when the file is damaged, or when the rollout was begun with anything else than `owner`.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    arrays = read_weights(path, None)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()[HEADER])
        found, version = about["identity"], int(about["format"])
        events = [Divergence(**{**event, "place": tuple(event["place"])}) for event in about["events"]]
        saved = Saved(int(about["step"]), arrays, list(about["names"]), list(about["good"]), events)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. {ANEW}.") from error
    if version < FORMAT:
        raise CheckpointError(
            f"{folder} was begun with an older physml, whose ledger has another energy and whose forcing cannot be "
            f"told from another one. {ANEW}."
        )
    if difference := _difference(found, owner):
        raise CheckpointError(
            f"{folder} was begun with another {difference}. Give the same to continue it. {ANEW} to drop it."
        )
    return saved
