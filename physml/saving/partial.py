"""Saved weights in a model that may differ from the one that was saved, and a report of what found its place."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.coding import check_fields
from physml.errors import CheckpointError, ConfigError, SpecError
from physml.layers.lora import merge_lora
from physml.normalize import Statistic
from physml.steppers.describe import configs

ROWS = 8  # of each kind in the text of a report


@dataclass(frozen=True)
class StartFrom:
    """Trained weights that training starts from.

    Attributes:
        path: a run, a saved folder, or with `weights` the name of a published model.
        weights: for such a name: the downloaded folder, see `physml.load`.
        strict: every number of the model must be in the checkpoint, and the other way round.
        normalizer: "saved" keeps the normalization that the weights were trained with where the data has the same
            channels and time step and the stepper the same intervals, and fits one to the new data elsewhere; "data"
            always fits one.
    """

    path: str
    weights: str = ""
    strict: bool = False
    normalizer: Literal["saved", "data"] = "saved"

    def __post_init__(self):
        check_fields(self)
        if not self.path:
            raise ConfigError("start_from has an empty path. Name a run or a saved model, or leave start_from out.")


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint and of a model, by dotted path.

    Attributes:
        source: where the weights came from.
        loaded: in both, of one shape: copied.
        reshaped: in both, of other shapes, `(path, shape in the checkpoint, shape here)`: left fresh.
        fresh: in the model only: left as they were.
        unused: in the checkpoint only.
        numbers: how many were copied, and how many the model has.
        normalizer: "saved" or "data": whose statistics are used.
        notes: other differences between the two, in words.
    """

    source: str
    loaded: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    numbers: tuple[int, int] = (0, 0)
    normalizer: str = "data"
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether checkpoint and model hold the same arrays."""
        return not (self.reshaped or self.fresh or self.unused)

    @property
    def untrained(self) -> tuple[str, ...]:
        """What the model has that the checkpoint could not fill."""
        return (*(path for path, *_ in self.reshaped), *self.fresh)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able containers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LoadReport":
        """What `to_dict` gave, also after JSON."""
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        rows = tuple((path, tuple(saved), tuple(here)) for path, saved, here in plain["reshaped"])
        return cls(**{**plain, "reshaped": rows})

    def __str__(self) -> str:
        count, total = self.numbers
        share = f"{count:,} of {total:,} numbers ({count / max(total, 1):.1%})"
        lines = [f"Loaded {len(self.loaded)} arrays, {share}, from {self.source}; normalizer: {self.normalizer}."]
        rows = [f"{path}: {saved} there, {here} here" for path, saved, here in self.reshaped]
        for label, items in (("other shape, fresh", rows), ("not in the checkpoint, fresh", self.fresh),
                             ("not used", self.unused), ("note", self.notes)):  # fmt: skip
            lines += [f"  {label}: {item}" for item in items[:ROWS]]
            lines += [f"  {label}: ... and {len(items) - ROWS} more"] if len(items) > ROWS else []
        return "\n".join(lines)


def load_into(
    stepper: Any, source: Any, name: str, *, strict: bool = False, normalizer: Literal["saved", "data"] = "saved"
) -> LoadReport:
    """Copies into `stepper`, in place, every number of `source` whose path and shape are the same.

    Parameters, running statistics and numbers that were drawn once are copied; what depends on the grid stays. LoRA
    layers of `source` are folded in first. The normalizer is that of `source` where `normalizer` is "saved" and both
    have the same channels, units, time step and intervals; data with gaps in either of them stay allowed.

    Args:
        source: a stepper, or a bare model, which then goes into `stepper.model`.
        name: of the source, for messages.
        strict: raise unless everything fits.

    Raises CheckpointError where nothing fits, and with `strict` where anything does not.
    """
    source = merge_lora(source)
    bare = not hasattr(source, "spec")
    saved = {("model." if bare else "") + path: value for path, value in _variables(source).items()}
    here = _variables(stepper)
    common = [path for path in here if path in saved]
    loaded = [path for path in common if saved[path].shape == here[path].shape]
    notes, same = ((), False) if bare else _differences(stepper, source)
    statistics = _statistics(stepper, source) if normalizer == "saved" and same else []
    report = LoadReport(
        name, tuple(loaded),
        tuple((p, tuple(saved[p].shape), tuple(here[p].shape)) for p in common if p not in set(loaded)),
        tuple(path for path in here if path not in saved), tuple(path for path in saved if path not in here),
        (_count(here, loaded), _count(here, here)), "saved" if statistics else "data", notes,
    )  # fmt: skip
    if not loaded:
        raise CheckpointError(
            f"Nothing of {name} fits {_kind(stepper)}: no array has the same path and shape (it has "
            f"{', '.join(list(saved)[:3]) or 'none'}; the model has {', '.join(list(here)[:3]) or 'none'}). Use the "
            "architecture and widths it was trained with, or leave start_from out."
        )
    if strict and not report.complete:
        raise CheckpointError(
            f"{name} does not fit {_kind(stepper)} in all its numbers, and start_from is strict:\n{report}\n"
            "Use the model config it was saved with, or set start_from.strict to false."
        )
    for path in loaded:
        here[path][...] = jnp.asarray(saved[path][...]).astype(here[path].dtype)
    for mine, value in statistics:
        mine[...] = value
    return report


def _variables(module: Any) -> dict[str, nnx.Variable]:
    """What a checkpoint can hand on: not the normalizer, not the state of random numbers."""
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Variable))}
    return {path: leaf for path, leaf in flat.items() if not isinstance(leaf, Statistic | nnx.RngState)}


def _statistics(stepper: Any, source: Any) -> list[tuple[Statistic, jax.Array]]:
    """The numbers of the normalizer, each with what it becomes; none where both do not have the same ones.

    `masked` is set where one of them has it: the weights may come from data without gaps, and meet them now.
    """
    here, saved = (
        {path: leaf for path, leaf in nnx.to_flat_state(nnx.state(module, Statistic)) if path[0] == "normalizer"}
        for module in (stepper, source)
    )
    if {path: leaf.shape for path, leaf in here.items()} != {path: leaf.shape for path, leaf in saved.items()}:
        return []
    return [
        (leaf, jnp.maximum(leaf[...], saved[path][...]) if path[-1] == "masked" else saved[path][...])
        for path, leaf in here.items()
    ]


def _differences(stepper: Any, source: Any) -> tuple[tuple[str, ...], bool]:
    """(what differs beside the weights, whether a normalizer of the source holds for the data of the stepper)."""
    notes, same = [], True
    try:
        source.spec.on(stepper.spec.grid).check_same(stepper.spec, mine="the checkpoint", theirs="the data")
    except SpecError as error:
        notes.append(str(error).split(". ")[0])
        same = False
    there, here = (getattr(getattr(module, "normalizer", None), "intervals", ()) for module in (source, stepper))
    if there != here:
        notes.append(f"intervals: {there or 'none'} there, {here or 'none'} here")
        same = False
    if source.spec.grid.shape != stepper.spec.grid.shape:
        notes.append(f"grid: {source.spec.grid.shape} points there, {stepper.spec.grid.shape} here")
    try:
        there, here = configs(source), configs(stepper)
    except ConfigError:  # parts of the user's own, outside the registries
        return tuple(notes), same
    for part in ("stepper", "constraints"):
        if there[part] != here[part]:
            notes.append(f"{part}: {there[part]} there, {here[part]} here")
    return tuple(notes), same


def _count(variables: dict[str, nnx.Variable], paths: Any) -> int:
    return sum(int(np.prod(variables[path].shape)) for path in paths)


def _kind(stepper: Any) -> str:
    return type(getattr(stepper, "model", stepper)).__name__
