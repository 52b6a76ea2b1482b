"""What fields mean: scalars, vectors and tensors with dimensions, and where they lie in frames and predictions."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from physml.errors import ConfigError, SpecError
from physml.fields import Spec, Window
from physml.rollout import rollout

UNITS = {"L": 3.0, "T": 0.7, "M": 1.9, "K": 1.3}  # sizes of the new units; no powers of two, which round nothing
GROUPS = ("channels", "forcing", "static", "parameters")


@dataclass(frozen=True)
class Quantity:
    """What some channels (or forcing or static fields, or parameters) are together.

    Attributes:
        channels: names: of scalars; of the components of a vector, in the order of `axes`; of a tensor, row by row.
        axes: directions of the components, by the names of the spatial axes; empty for scalars.
        dimensions: powers of length L, time T, mass M and temperature K, e.g. "L2 T-1"; "" for pure numbers.
        velocity: grows by the velocity of a moving frame.
        axial: changes its sign in a mirror, beside what the mirror does to its components: vorticity, the Coriolis
            parameter.

    Raises ConfigError for dimensions that cannot be read and for components that do not match the axes.
    """

    channels: str | tuple[str, ...]
    axes: tuple[str, ...] = ()
    dimensions: str = ""
    velocity: bool = False
    axial: bool = False

    def __post_init__(self):
        names = (self.channels,) if isinstance(self.channels, str) else tuple(self.channels)
        object.__setattr__(self, "channels", names)
        object.__setattr__(self, "axes", tuple(self.axes))
        self.factor(UNITS)
        if self.axes and len(self.axes) ** self.rank != len(names):
            raise ConfigError(
                f"{list(names)} are {len(names)} components along {list(self.axes)}, but a vector has "
                f"{len(self.axes)} and a tensor {len(self.axes) ** 2}. Name all of them."
            )
        if self.velocity and self.rank != 1:
            raise ConfigError(f"{list(names)} is called a velocity, but it is no vector: name the axes of components.")

    @property
    def rank(self) -> int:
        """0 for scalars, 1 for vectors, 2 for tensors."""
        if not self.axes:
            return 0
        return 1 if len(self.axes) == 1 else max(1, round(math.log(len(self.channels), len(self.axes))))

    def factor(self, units: dict[str, float]) -> float:
        """What its numbers are multiplied by where lengths are by `units["L"]`, times by `units["T"]`, and so on."""
        result = 1.0
        for word in self.dimensions.split():
            found = re.fullmatch(r"([A-Z])([+-]?\d+(?:\.\d+)?)?", word)
            if found is None or found[1] not in units:
                raise ConfigError(
                    f"dimensions is {self.dimensions!r}, but powers of {', '.join(UNITS)} were expected, e.g. 'L2 T-1'."
                )
            result *= units[found[1]] ** float(found[2] or 1)
        return result


def velocity(*channels: str, axes: tuple[str, ...] = ("x", "y", "z")) -> Quantity:
    """The quantity of velocity components along the first of `axes`."""
    return Quantity(channels, axes[: len(channels)], "L T-1", velocity=True)


class Prediction:
    """A stepper or function as `window -> numpy (batch, *space, channel)`, compiled once for a stepper."""

    def __init__(self, predict: Any, steps: int | None, key: Any):
        self.history = getattr(predict, "history", None) if hasattr(predict, "advance") else None
        self.steps = (0 if self.history is None else 1) if steps is None else steps
        if self.steps < (0 if self.history is None else 1):
            raise ConfigError(f"steps is {steps}, but a stepper takes 1 or more, and a function looks 0 or more ahead.")
        if self.history is None and not callable(predict):
            raise ConfigError(
                f"A {type(predict).__name__} predicts nothing. Pass a stepper, or a function of a window."
            )
        self.function = predict if self.history is None else self._of_stepper(predict, key)

    @classmethod
    def of(cls, predict: Any, steps: int | None, key: Any) -> "Prediction":
        return predict if isinstance(predict, cls) else cls(predict, steps, key)

    def _of_stepper(self, stepper: Any, key: Any) -> Callable[[Window], Any]:
        graph, state = nnx.split(stepper)

        @jax.jit
        def last(state, window):
            model = nnx.merge(graph, state)
            model.eval()
            frames = rollout(model, window, self.steps, key)
            return (frames if hasattr(frames, "shape") else frames.mean)[:, -1]

        return lambda window: last(state, window)

    def arrival(self, window: Window) -> int:
        """The time step of the prediction, counted from the first frame."""
        return (window.length if self.history is None else max(self.history, 1)) - 1 + self.steps

    def __call__(self, window: Window, roles: "Roles") -> np.ndarray:
        result = np.array(self.function(window), np.float64)  # a copy: of jax arrays of 64 bits none can be changed
        channels = sum(len(quantity.channels) for quantity, _ in roles.output)
        expected = (np.shape(window.frames)[0], *window.spec.grid.shape, channels)
        if result.shape != expected:
            raise SpecError(
                f"The prediction has shape {result.shape}, but (batch, *space, channel) = {expected} was expected. "
                "Name what its channels are with `output`."
            )
        return result


class Roles:
    """Quantities and the places of their channels in each group of the spec, and in the output."""

    def __init__(self, spec: Spec, quantities: Sequence[Quantity], output: Sequence[Quantity]):
        names = {group: [channel.name for channel in getattr(spec, group)] for group in GROUPS}
        self.of: dict[str, list] = {group: [] for group in GROUPS}
        for quantity in quantities:
            groups = [group for group in GROUPS if set(quantity.channels) <= set(names[group])]
            if not groups:
                raise SpecError(
                    f"{list(quantity.channels)} are not together in one group of the data: "
                    + ", ".join(f"{group} {found}" for group, found in names.items() if found)
                )
            self.of[groups[0]].append((quantity, [names[groups[0]].index(name) for name in quantity.channels]))
        for group, places in self.of.items():
            count = [sum(name in quantity.channels for quantity, _ in places) for name in names[group]]
            wrong = [name for name, times in zip(names[group], count, strict=True) if times != 1]
            if wrong:
                raise SpecError(
                    f"What {wrong[0]!r} of the {group} is, is said {count[names[group].index(wrong[0])]} times. "
                    "Give exactly one Quantity for everything in the data."
                )
        self.output, at = [], 0
        for quantity in output:
            self.output.append((quantity, list(range(at, at + len(quantity.channels)))))
            at += len(quantity.channels)
        self.output = self.output or self.of["channels"]


def relative_error(found: np.ndarray, expected: np.ndarray, roles: Roles) -> np.ndarray:
    """The largest relative error over the quantities; scalars count one by one."""
    errors = []
    for quantity, where in roles.output:
        for part in [where] if quantity.rank else [[i] for i in where]:
            axes = tuple(range(1, found.ndim))
            off = np.sqrt(np.sum((found[..., part] - expected[..., part]) ** 2, axes))
            size = np.sqrt(np.sum(expected[..., part] ** 2, axes))
            errors.append(np.where(size > 0, off / np.where(size > 0, size, 1), np.where(off == 0, 0, np.inf)))
    return np.max(errors, axis=0)
