"""Several datasets as one: the union of their channels with a mask, and sampling by weights."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from physml import coding
from physml.data.config import SPLITS, DataConfig
from physml.data.dataset import MEMORY_LIMIT, XarrayDataset
from physml.data.sampling import Mixed, Samples
from physml.data.synthetic import SyntheticConfig
from physml.errors import ConfigError, DataError, SpecError, suggest
from physml.fields import Channel, Spec, Window

PARTS = {"files": DataConfig, "synthetic": SyntheticConfig}
GROUPS = ("channels", "forcing", "static", "parameters")
RESOLUTION = 10**6  # weights are rounded to so many parts


@dataclass(frozen=True)
class MixtureConfig:
    """Trains one model on several datasets on one grid, whose channels may differ.

    The mixture has the channels, forcing, static fields and parameters of all parts, in order of first appearance. What
    a part lacks is 0 there; a channel that it lacks also has mask 0, so that losses, scores and normalization leave it
    out. (Fields and parameters that condition have no mask: where a part lacks one, the model sees a constant 0 in
    physical units, which counts in their normalization.)

    Attributes:
        parts: name -> `DataConfig` or `SyntheticConfig`; each needs a train split. The mixture's valid and test splits
            join those of the parts that have them.
        weights: name -> share of the training samples, relative to the others; proportional to the windows when empty.
        same_time_step: whether parts must have equal time steps. When False the spec has that of the first part, and
            windows carry their own times.
    """

    parts: dict[str, Any] = coding.tagged(PARTS, untagged="files", default_factory=dict, hash=False)
    weights: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    same_time_step: bool = True

    def __post_init__(self):
        if not self.parts:
            raise ConfigError("The mixture has no parts. Give at least one: parts={'name': DataConfig(...)}.")
        for name in self.weights:
            if name not in self.parts:
                raise ConfigError(f"weights names {name!r}, which is no part." + suggest(name, self.parts))
        _check_weights(self.weights, self.parts)

    def open(self, progress: Any = None) -> dict[str, "Mixture"]:
        """The splits by name; all share one spec. Raises what the parts raise, SpecError where they do not fit."""
        opened = {}
        for name, part in self.parts.items():
            opened[name] = part.open(progress)
            if "train" not in opened[name]:
                raise ConfigError(f"Part {name!r} has no train split, but every part of a mixture needs one.")
        spec = union({name: splits["train"].spec for name, splits in opened.items()}, self.same_time_step)
        result = {}
        for split in SPLITS:
            members = {name: splits[split] for name, splits in opened.items() if split in splits}
            if members:
                result[split] = Mixture(members, spec, self.weights if split == "train" else {}, self.same_time_step)
        return result


class Mixture:
    """Implements `physml.contracts.Dataset` over several datasets: trajectories of the first part, then of the next.

    Attributes:
        parts: name -> dataset. spec: the union. lengths: frames of every trajectory. part_of: its part's name.
    """

    def __init__(
        self,
        parts: Mapping[str, XarrayDataset],
        spec: Spec | None = None,
        weights: Mapping[str, float] | None = None,
        same_time_step: bool = True,
    ):
        self.parts, self.weights = dict(parts), dict(weights or {})
        _check_weights(self.weights, self.parts)
        specs = {name: part.spec for name, part in self.parts.items()}
        self.spec = union(specs, same_time_step) if spec is None else spec
        union({"the mixture": self.spec, **specs}, same_time_step)
        self.lengths = tuple(length for part in self.parts.values() for length in part.lengths)
        self.part_of = tuple(name for name, part in self.parts.items() for _ in part.lengths)
        self._first = np.cumsum([0, *(len(part.lengths) for part in self.parts.values())])
        self._positions = {name: _positions(part, self.spec) for name, part in specs.items()}

    def __repr__(self) -> str:
        return f"Mixture({', '.join(self.parts)}: {len(self.lengths)} trajectories, channels {list(self.spec.names)})"

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in memory."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self, trajectory: int, frames: range) -> Window:
        """A window without a batch axis. Raises DataError for frames that do not exist."""
        name, inside = self._locate(trajectory)
        return self._widen(name, self.parts[name].read(inside, frames))

    def read_batch(self, trajectories: np.ndarray, starts: np.ndarray, strides: np.ndarray, frames: int) -> Window:
        """Windows of `frames` frames, `strides` apart, stacked along a batch axis; each part reads its own together."""
        owners = np.searchsorted(self._first, trajectories, side="right") - 1
        found, rows = [], []
        for owner in np.unique(owners).tolist():
            name, mine = list(self.parts)[owner], np.flatnonzero(owners == owner)
            inside = trajectories[mine] - self._first[owner]
            window = self.parts[name].read_batch(inside, starts[mine], strides[mine], frames)
            found.append(self._widen(name, window))
            rows.append(mine)
        if len(found) == 1:
            return found[0]
        order = np.argsort(np.concatenate(rows))
        fields = [field.name for field in dataclasses.fields(Window) if field.name != "spec"]
        joined = {field: np.concatenate([getattr(window, field) for window in found])[order] for field in fields}
        return Window(**joined, spec=self.spec)

    def windows(self, chunk: int | None = None) -> Iterator[Window]:
        """All frames in order, for one streaming pass, as `XarrayDataset.windows`."""
        for name, part in self.parts.items():
            for window in part.windows(chunk):
                yield self._widen(name, window)

    def preload(self, limit: int = MEMORY_LIMIT) -> bool:
        """Keeps all parts in memory when they need at most `limit` bytes; says whether they are."""
        return self.nbytes <= limit and all([part.preload(limit) for part in self.parts.values()])

    def prepare(self, samples: Samples, memory: int = MEMORY_LIMIT, count: int | None = None) -> None:
        """Gets every part ready to read windows, see `XarrayDataset.prepare`; they share the memory equally."""
        room = self._room(memory)
        for part in self.parts.values():
            own = dataclasses.replace(samples, lengths=tuple(part.lengths))
            part.prepare(own, room, None if count is None else count * len(own) // max(len(samples), 1))

    def _room(self, memory: int) -> int:
        """Bytes for each part: all where they fit together."""
        return memory if self.preload(memory) else memory // len(self.parts)

    def shuffled(self, samples: Samples, seed: int, memory: int = MEMORY_LIMIT, readers: int = 1) -> Mixed:
        """An endless random order in which the parts take part by their weights, and each goes through all of its
        windows. Parts that do not fit in memory together share it equally; `readers` as `XarrayDataset.shuffled`.
        """
        room = self._room(memory)
        orders, numbers, weights = [], [], []
        for owner, (name, part) in enumerate(self.parts.items()):
            own = dataclasses.replace(samples, lengths=tuple(part.lengths))
            if not len(own):
                raise DataError(
                    f"Part {name!r} has no window of {samples.frames} frames: its longest trajectory has "
                    f"{max(part.lengths, default=0)}. Leave it out, or use longer trajectories."
                )
            orders.append(part.shuffled(own, _seed(seed, owner), room, readers))
            trajectories, starts, strides = own.locate(np.arange(len(own)))
            numbers.append(samples.number(trajectories + self._first[owner], starts, strides))
            weights.append(len(own) if not self.weights else self.weights[name])
        if self.weights:
            weights = [max(1, round(RESOLUTION * weight / sum(weights))) for weight in weights]
        divisor = math.gcd(*weights)
        return Mixed(orders, numbers, [weight // divisor for weight in weights], seed)

    def _locate(self, trajectory: int) -> tuple[str, int]:
        if not 0 <= trajectory < len(self.lengths):
            raise DataError(f"There is no trajectory {trajectory}: the mixture has {len(self.lengths)}.")
        name = self.part_of[trajectory]
        return name, int(trajectory - self._first[list(self.parts).index(name)])

    def _widen(self, name: str, window: Window) -> Window:
        """A window of a part, with or without a batch axis, with the channels of the mixture."""
        positions = self._positions[name]

        def spread(group: str, values) -> np.ndarray:
            return spread_channels(np.asarray(values), positions[group], len(getattr(self.spec, group)))

        batched = window.times.ndim == 2
        shape = (*window.frames.shape[: int(batched)], *window.frames.shape[1 + int(batched) :])
        mask = np.ones(shape, np.float32) if window.mask is None else window.mask
        return dataclasses.replace(
            window,
            frames=spread("channels", window.frames),
            mask=spread("channels", mask),
            parameters=spread("parameters", window.parameters),
            forcing=spread("forcing", window.forcing),
            static=spread("static", window.static),
            spec=self.spec,
        )


def spread_channels(values: np.ndarray, positions: list[int], count: int) -> np.ndarray:
    """The channels of `values (..., channel)` at their positions among `count`; the others are 0."""
    if positions == list(range(count)):
        return values
    result = np.zeros((*values.shape[:-1], count), values.dtype)
    result[..., positions] = values
    return result


def union(specs: Mapping[str, Spec], same_time_step: bool = True) -> Spec:
    """All channels, forcing, static fields and parameters of specs on one grid, in order of first appearance.

    Raises SpecError that names the first difference: grid, unit of a channel, unit of time or time step.
    """
    (first_name, first), *others = specs.items()
    groups: dict[str, dict[str, tuple[str, Channel]]] = {group: {} for group in GROUPS}
    for name, spec in specs.items():
        for group in GROUPS:
            for channel in getattr(spec, group):
                owner, known = groups[group].setdefault(channel.name, (name, channel))
                if channel.unit and known.unit and channel.unit != known.unit:
                    raise SpecError(
                        f"{channel.name!r} is in {known.unit!r} in {owner}, but in {channel.unit!r} in {name}. Convert "
                        "one of them and set its `units` attribute."
                    )
                if channel.unit and not known.unit:
                    groups[group][channel.name] = name, channel
    for name, spec in others:
        bare = dataclasses.replace(first, channels=(), forcing=(), static=(), parameters=())
        other = dataclasses.replace(spec, channels=(), forcing=(), static=(), parameters=())
        if len(bare.grid.axes) == len(other.grid.axes):
            for a, b in zip(bare.grid.axes, other.grid.axes, strict=True):
                if a.name != b.name:
                    raise SpecError(
                        f"{first_name} has axis {a.name!r} where {name} has {b.name!r}. Rename one of them, or give "
                        "both the same order with `space`."
                    )
        if not same_time_step:
            other = dataclasses.replace(other, time_step=bare.time_step)
        bare.check_same(other, mine=first_name, theirs=name)
        if first.time_unit != spec.time_unit:
            raise SpecError(
                f"Times are in {first.time_unit or 'no unit'!r} in {first_name}, but in "
                f"{spec.time_unit or 'no unit'!r} in {name}. Parts of a mixture need one unit of time."
            )
    channels = {group: tuple(channel for _, channel in members.values()) for group, members in groups.items()}
    masks = {spec.mask for spec in specs.values()}
    return dataclasses.replace(first, **channels, mask=masks.pop() if len(masks) == 1 else None)


def _positions(spec: Spec, whole: Spec) -> dict[str, list[int]]:
    places = {group: [channel.name for channel in getattr(whole, group)] for group in GROUPS}
    return {group: [places[group].index(c.name) for c in getattr(spec, group)] for group in GROUPS}


def _seed(seed: int, owner: int) -> int:
    return int(np.random.SeedSequence([seed, owner, 1]).generate_state(1, np.uint64)[0])


def _check_weights(weights: Mapping[str, float], parts: Mapping[str, Any]) -> None:
    if not weights:
        return
    if missing := [name for name in parts if name not in weights]:
        raise ConfigError(f"weights has no number for part {missing[0]!r}. Give one for every part, or none at all.")
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"The weight of part {name!r} is {weight}, but it must be a positive number.")
