"""The state of a run on disk: Orbax, asynchronous, atomic, the newest few and the best.

A checkpoint is FOLDER/STEP. It holds arrays (parameters, average, optimizer, everything else of the stepper, key) and
plain data (loader position, seed, best score). Arrays may be restored onto any layout.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from physml.errors import CheckpointError, first_line

FORMAT = 1
_ROWS = 10  # of a table of differences
logger = logging.getLogger("physml.training")


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving it waits for what is being written.

    `keep` newest ones stay, and the one with the best `score` (`mode` "min" or "max"). `own` is False for a folder that
    another process may be writing to.
    """

    def __init__(self, folder: str | Path, keep: int = 2, mode: str = "min", own: bool = True):
        self.folder = Path(folder).absolute()
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["score"], reverse=mode == "min", n=1,
            keep_checkpoints_without_metrics=False,
        )  # fmt: skip
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            # Left over by a killed process; its name never counts as a checkpoint, but it takes room.
            cleanup_tmp_directories=own,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, step: int, arrays: Any, data: dict[str, Any], score: float | None = None) -> None:
        """Starts to write a checkpoint and returns as soon as the arrays may be overwritten. All processes call it."""
        self._orbax.wait()
        arrays = _filled(arrays)
        # Copied: it is written later, while the caller goes on changing its lists.
        data = copy.deepcopy({"format": FORMAT, "step": step, "fingerprints": fingerprints(arrays), **data})
        self._orbax.save_checkpointables_async(
            step,
            {"state": arrays},
            force=True,
            overwrite=True,
            metrics=None if score is None else {"score": score},
            custom_metadata=data,
        )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._orbax.wait()

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step`: the run goes another way from there."""
        for later in self.steps:
            if later > step:
                self._orbax.delete(later)

    def restore(self, target: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """(arrays, data) of `step`, or of the newest checkpoint that can be read; None where there is none.

        `target` is a tree of arrays that gives names, shapes, dtypes and shardings. A newest checkpoint that is damaged
        is passed over with a warning. Raises CheckpointError with a table when the checkpoint does not fit `target`,
        and when none can be read.
        """
        steps = self.steps if step is None else [step]
        if step is not None and step not in self.steps:
            raise CheckpointError(f"{self.folder} has no complete checkpoint {step}. There are {self.steps or 'none'}.")
        reasons = []
        for candidate in reversed(steps):
            try:
                return self._read(candidate, target)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and tensorstore raise many types for damaged files
                reasons.append(f"{candidate}: {first_line(error)}")
                logger.warning(
                    "Checkpoint %s/%d is damaged and is passed over: %s", self.folder, candidate, first_line(error)
                )
        if reasons:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be read ({'; '.join(reasons)}). "
                "Restore the folder from a copy, or delete it and start again."
            )
        return None

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        saved = self._orbax.checkpointables_metadata(step)
        data = saved.custom_metadata or {}
        if "format" not in data:
            raise ValueError("its metadata cannot be read")
        if data["format"] != FORMAT:
            raise CheckpointError(
                f"{self.folder / str(step)} has format {data['format']}, but this version reads {FORMAT}. "
                "Use the version of physml that wrote it."
            )
        if saved.metadata.get("state") is None:  # what Orbax gives when it cannot read the description of the arrays
            raise ValueError("the names and shapes of its arrays cannot be read")
        filled = _filled(target)
        check_fits(_flat(saved.metadata["state"]), _flat(filled), self.folder / str(step))
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), filled)
        loaded = dict(_named(self._orbax.load_checkpointables(step, {"state": wanted})["state"]))
        read, written = fingerprints(loaded), data.pop("fingerprints")
        changed = [name for name in loaded if read[name] != written.get(name)]
        if changed:
            raise ValueError(f"{changed[0]} is not what was saved")
        return jax.tree_util.tree_map_with_path(lambda path, leaf: loaded.get(_name(path), leaf), target), data


def fingerprints(tree: Any) -> dict[str, int]:
    """A number per array that changes with any change of its bits; the same under every layout."""
    named = _named(tree)
    # Large arrays are summed where they are; small ones on the host, or each shape would have to be compiled.
    large = {name: _sum_on_device(leaf) for name, leaf in named if leaf.nbytes >= 2**20}
    small = {name: leaf for name, leaf in named if name not in large}
    large, small = jax.device_get((large, small))
    numbers = {**large, **{name: _weighted_sum(_words(leaf), np) for name, leaf in small.items()}}
    return {name: int(numbers[name]) for name, _ in named}


@jax.jit
def _sum_on_device(leaf):
    if leaf.dtype == bool:
        return _weighted_sum(leaf.astype(jnp.uint32).reshape(-1), jnp)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return _weighted_sum(jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1), jnp)


def _words(leaf: np.ndarray) -> np.ndarray:
    leaf = np.ascontiguousarray(leaf)
    return leaf.view(f"u{min(leaf.dtype.itemsize, 4)}").reshape(-1).astype(np.uint32)


def _weighted_sum(words, np_or_jnp):
    # Files carry no checksum of the arrays. Odd weights modulo 2^32: no change of a single word can cancel.
    weights = 2 * np_or_jnp.arange(words.size, dtype=np.uint32) + np.uint32(1)
    return np_or_jnp.sum(words * weights, dtype=np.uint32)


def check_fits(saved: dict[str, tuple], expected: dict[str, tuple], where: Any) -> None:
    """Raises CheckpointError with a short table when names, shapes or dtypes differ. Values are (shape, dtype)."""
    rows = [f"missing     {name} {_show(expected[name])}" for name in expected if name not in saved]
    rows += [f"unexpected  {name} {_show(saved[name])}" for name in saved if name not in expected]
    rows += [
        f"differs     {name} saved {_show(saved[name])}, expected {_show(expected[name])}"
        for name in expected
        if name in saved and saved[name] != expected[name]
    ]
    if rows:
        more = [f"... and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else []
        table = "\n  ".join(rows[:_ROWS] + more)
        raise CheckpointError(
            f"The checkpoint {where} does not fit this model and optimizer:\n  {table}\n"
            "Use the configuration it was trained with, or start a new run."
        )


def _show(entry: tuple) -> str:
    return f"{entry[0]} {entry[1]}"


def _filled(tree: Any) -> Any:
    """Without arrays of size zero, which Orbax refuses to save; `restore` takes them from its target."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _name(path: tuple) -> str:
    """params/model/lift/kernel; the same for Orbax's containers as for optax's."""
    return "/".join(str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a))) for key in path)


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _flat(tree: Any) -> dict[str, tuple]:
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in _named(tree)}
