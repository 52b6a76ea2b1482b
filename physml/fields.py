"""What a field is: names, units and grids (static, hashable) and windows of arrays (pytrees).

Arrays inside jit are bare: `(batch, time, *space, channel)`, channels last. Everything that has a name lives in a
`Spec`, which is static pytree metadata: equal specs share one trace.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from physml.errors import SpecError, suggest

ArrayLike = jax.Array | np.ndarray  # what array arguments accept; `Float[ArrayLike, "..."]` in annotations


def is_key(value: Any) -> bool:
    """Whether it is an array of typed PRNG keys, which numpy cannot hold."""
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


@dataclass(frozen=True, repr=False)
class Axis:
    """One spatial axis, in storage order.

    Attributes:
        name: CF-like name: x, y, z, latitude, longitude, level, ...
        centers: coordinate of every cell center, in `unit`, ascending.
        weights: relative cell size along this axis (cos(latitude) on a sphere), mean one; empty means uniform.
        periodic: whether the last cell is a neighbor of the first.
        unit: unit of `centers`.
    """

    name: str
    centers: tuple[float, ...]
    weights: tuple[float, ...] = ()
    periodic: bool = False
    unit: str = ""

    def __post_init__(self):
        if self.weights and len(self.weights) != len(self.centers):
            raise SpecError(f"Axis {self.name!r} has {len(self.centers)} centers but {len(self.weights)} weights.")

    def __len__(self) -> int:
        return len(self.centers)

    def __repr__(self) -> str:
        span = f"{self.centers[0]:g}..{self.centers[-1]:g} {self.unit}".rstrip() if self.centers else ""
        return f"Axis({self.name!r}, {len(self)} points, {span}{', periodic' if self.periodic else ''})"

    @property
    def spacing(self) -> float:
        """Mean distance of neighboring centers, in `unit` (1 for a single point)."""
        n = len(self.centers)
        return (self.centers[-1] - self.centers[0]) / (n - 1) if n > 1 else 1.0

    @property
    def length(self) -> float:
        """Extent covered by the cells, in `unit`: the period where the axis is periodic."""
        return self.spacing * len(self.centers)

    @classmethod
    def uniform(cls, name: str, points: int, length: float = 1.0, periodic: bool = True, unit: str = "") -> "Axis":
        """`points` centers i * length / points, starting at zero."""
        return cls(name, tuple(float(i) * length / points for i in range(points)), periodic=periodic, unit=unit)

    @classmethod
    def cells(cls, name: str, points: int, length: float = 1.0, periodic: bool = False, unit: str = "") -> "Axis":
        """`points` cells of equal size that fill [0, length]: centers (i + 1/2) * length / points."""
        return cls(name, tuple((i + 0.5) * length / points for i in range(points)), periodic=periodic, unit=unit)


@dataclass(frozen=True)
class Grid:
    """The spatial axes, in storage order. A space of zero axes is a chaotic ODE."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def periodic(self) -> tuple[bool, ...]:
        return tuple(axis.periodic for axis in self.axes)

    def weights(self) -> np.ndarray:
        """Relative cell areas `(*space)`, float32, mean one."""
        return _cell_weights(self)


@functools.lru_cache(maxsize=64)
def _cell_weights(grid: Grid) -> np.ndarray:
    weights = np.ones(grid.shape)
    for i, axis in enumerate(grid.axes):
        if axis.weights:
            shape = [1] * grid.ndim
            shape[i] = len(axis)
            weights = weights * np.asarray(axis.weights).reshape(shape)
    weights = np.asarray(weights / weights.mean(), np.float32)  # a space of zero axes would give a scalar
    weights.flags.writeable = False
    return weights


@dataclass(frozen=True)
class Channel:
    """A named scalar field or parameter and its unit."""

    name: str
    unit: str = ""


@dataclass(frozen=True)
class Spec:
    """Everything that has a name: the grid, the predicted channels and what conditions them.

    Attributes:
        grid: spatial axes.
        channels: predicted fields, in storage order.
        forcing: prescribed fields that change with time.
        static: prescribed fields that do not.
        parameters: scalars of a trajectory.
        time_step: time between frames, in `time_unit`.
        time_unit: "s" for calendar data, "" for nondimensional time.
        mask: variable of the data that is 0 where fields do not exist, besides their NaN.
    """

    grid: Grid
    channels: tuple[Channel, ...]
    forcing: tuple[Channel, ...] = ()
    static: tuple[Channel, ...] = ()
    parameters: tuple[Channel, ...] = ()
    time_step: float = 1.0
    time_unit: str = ""
    mask: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(channel.name for channel in self.channels)

    def index(self, name: str) -> int:
        """Position of a predicted channel. Raises SpecError with the nearest name when there is none."""
        if name not in self.names:
            raise SpecError(f"There is no channel {name!r}." + suggest(name, self.names))
        return self.names.index(name)

    def on(self, grid: Grid) -> "Spec":
        """The same channels on another grid."""
        return dataclasses.replace(self, grid=grid)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able containers; `Spec.from_dict` inverts it exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Spec":
        def channels(key):
            return tuple(Channel(**item) for item in data.get(key, ()))

        axes = tuple(
            Axis(**{**axis, "centers": tuple(axis["centers"]), "weights": tuple(axis.get("weights", ()))})
            for axis in data["grid"]["axes"]
        )
        return cls(
            Grid(axes), channels("channels"), channels("forcing"), channels("static"), channels("parameters"),
            data["time_step"], data["time_unit"], data.get("mask"),
        )  # fmt: skip

    def check_same(self, other: "Spec", *, mine: str = "the model", theirs: str = "the data") -> None:
        """Raises SpecError naming the first difference that matters: channels, units, grid, time step.

        Units are compared where both sides name one.
        """
        for group in ("channels", "forcing", "static", "parameters"):
            a, b = getattr(self, group), getattr(other, group)
            if [c.name for c in a] != [c.name for c in b]:
                raise SpecError(
                    f"{mine} has {group} {[c.name for c in a]}, but {theirs} has {[c.name for c in b]}. "
                    "Rename or select the variables, or retrain."
                )
            for c, d in zip(a, b, strict=True):
                if c.unit and d.unit and c.unit != d.unit:
                    raise SpecError(
                        f"{c.name!r} is in {c.unit!r} in {mine}, but in {d.unit!r} in {theirs}. "
                        f"Convert it to {c.unit!r} and set its `units` attribute."
                    )
        if self.grid.shape != other.grid.shape:
            raise SpecError(
                f"{mine} is on a grid of {self.grid.shape} points, but {theirs} is on {other.grid.shape}. "
                "Interpolate the data, or move the model with `on_grid` if its architecture allows."
            )
        for a, b in zip(self.grid.axes, other.grid.axes, strict=True):
            if a.name != b.name:
                raise SpecError(f"{mine} has axis {a.name!r} where {theirs} has {b.name!r}.")
            if not np.allclose(a.centers, b.centers, rtol=1e-5, atol=1e-4 * abs(a.spacing)):
                raise SpecError(
                    f"Axis {a.name!r} spans {a.centers[0]:g}..{a.centers[-1]:g} in {mine}, but "
                    f"{b.centers[0]:g}..{b.centers[-1]:g} in {theirs}. Interpolate the data to the grid of {mine}."
                )
        if self.time_unit and other.time_unit and self.time_unit != other.time_unit:
            raise SpecError(
                f"Time is in {self.time_unit!r} in {mine}, but in {other.time_unit!r} in {theirs}. "
                f"Convert the times of {theirs} to {self.time_unit!r}."
            )
        if not math.isclose(self.time_step, other.time_step, rel_tol=1e-4):
            raise SpecError(
                f"{mine} steps {self.time_step:g} {self.time_unit}, but frames of {theirs} are "
                f"{other.time_step:g} {other.time_unit} apart. Subsample the data in time."
            )


@dataclass(frozen=True)
class Signature:
    """The shapes a model is built for; the stepper's config computes them from a `Spec`.

    Attributes:
        grid: spatial axes of inputs and outputs.
        inputs: input channels, `fields (batch, *space, inputs)`.
        scalars: conditioning numbers, `scalars (batch, scalars)`; may be zero.
        outputs: output channels.
    """

    grid: Grid
    inputs: int
    scalars: int
    outputs: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["time", "lead", "calendar", "parameters", "forcing", "static", "mask", "key"],
    meta_fields=["spec"],
)
@dataclass(frozen=True)
class Context:
    """What conditions one step, without the state itself. Arrays; `None` never occurs except for `mask` and `key`.

    Attributes:
        time: `(batch,)` time of the frame to be predicted since the window began, in `spec.time_unit`.
        lead: `(batch,)` length of this step, in `spec.time_unit`.
        calendar: `(batch, 2)` fraction of the year and of the day, each in [0, 1), of the frame to be predicted.
        parameters: `(batch, parameter)`.
        forcing: `(batch, *space, forcing)` valid at the frame to be predicted.
        static: `(batch, *space, static)`.
        mask: `(batch, *space, channel)`, 1 where the field exists; None where it exists everywhere.
        key: typed PRNG key of this step, or None for a deterministic stepper.
        spec: names, units and grid.
    """

    time: Any
    lead: Any
    calendar: Any
    parameters: Any
    forcing: Any
    static: Any
    mask: Any
    key: Any
    spec: Spec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "variance"], meta_fields=[])
@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions of every number of a field.

    Attributes:
        mean: `(batch, *space, channel)`, with more axes such as `lead` behind the batch, in physical units.
        variance: of the same shape, in their square.
    """

    mean: Any
    variance: Any

    @property
    def std(self):
        """The standard deviation, in physical units."""
        return jnp.sqrt(self.variance)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["frames", "times", "calendar", "parameters", "forcing", "static", "mask"],
    meta_fields=["spec"],
)
@dataclass(frozen=True)
class Window:
    """A few consecutive frames of a batch of trajectories, in physical units.

    `times`, `calendar` and `forcing` may reach further than `frames`: a rollout needs them for what it will predict.
    Datasets return windows without the batch axis; `stack` adds it.

    Attributes:
        frames: `(batch, time, *space, channel)`.
        times: `(batch, time)` since the window began, in `spec.time_unit`.
        calendar: `(batch, time, 2)` fraction of the year and of the day; zeros where time is nondimensional.
        parameters: `(batch, parameter)`.
        forcing: `(batch, time, *space, forcing)`.
        static: `(batch, *space, static)`.
        mask: `(batch, *space, channel)` or None, 1 where the field exists (frames hold 0 where the data have NaN).
        spec: names, units and grid.
    """

    frames: Any
    times: Any
    calendar: Any
    parameters: Any
    forcing: Any
    static: Any
    mask: Any
    spec: Spec

    @classmethod
    def of(cls, frames, spec: Spec, **fields) -> "Window":
        """A batched window from frames `(batch, time, *space, channel)`; whatever is not given is regular or empty.

        Raises SpecError when the shape does not fit `spec`, or for whole numbers.
        """
        expected = (*spec.grid.shape, len(spec.channels))
        if frames.ndim != 3 + spec.grid.ndim or tuple(frames.shape[2:]) != expected:
            raise SpecError(
                f"frames have shape {tuple(frames.shape)}, but (batch, time, {', '.join(map(str, expected))}) was "
                f"expected: axes {[a.name for a in spec.grid.axes]}, then channels {list(spec.names)}."
            )
        batch, space, dtype = frames.shape[0], spec.grid.shape, frames.dtype
        if not jnp.issubdtype(dtype, jnp.inexact):  # steppers keep the type: predictions would be rounded to it
            raise SpecError(f"frames are {dtype}, but floating-point numbers were expected: frames.astype('float32').")
        times = fields.get("times")
        if times is None:
            times = np.arange(frames.shape[1], dtype=dtype) * np.asarray(spec.time_step, dtype)
            times = np.broadcast_to(times, (batch, frames.shape[1]))
        total = times.shape[1]
        empty = {
            "times": times,
            "calendar": np.zeros((batch, total, 2), dtype),
            "parameters": np.zeros((batch, len(spec.parameters)), dtype),
            "forcing": np.zeros((batch, total, *space, len(spec.forcing)), dtype),
            "static": np.zeros((batch, *space, len(spec.static)), dtype),
            "mask": None,
        }
        given = {key: value for key, value in fields.items() if value is not None}
        return cls(frames, **{**empty, **given}, spec=spec)

    @property
    def length(self) -> int:
        """Frames along time."""
        return self.frames.shape[1]

    def context(self, step, history: int, key=None) -> Context:
        """The context in which frame `history + step` is predicted (`step` may be traced).

        Past the last given time the clock goes on with `spec.time_step`; forcing and calendar must reach that far.
        """
        index = history + step
        last = self.times.shape[1] - 1
        at = jnp.clip(jnp.asarray(index), 0, last)
        dtype = jnp.result_type(self.times)
        beyond = jnp.asarray(index - at, dtype) * jnp.asarray(self.spec.time_step, dtype)

        def take(array):
            own = jnp.clip(jnp.asarray(index), 0, array.shape[1] - 1)  # it may reach further than the times
            return jax.lax.dynamic_index_in_dim(jnp.asarray(array), own, axis=1, keepdims=False)

        time = take(self.times) + beyond
        previous = jax.lax.dynamic_index_in_dim(jnp.asarray(self.times), jnp.clip(at - 1, 0, last), 1, keepdims=False)
        regular = jnp.full_like(time, self.spec.time_step)
        difference = take(self.times) - previous
        # Late in a long trajectory the difference of two float32 times is noisy: a regular step counts as regular.
        rounding = 4 * jnp.finfo(dtype).eps * jnp.abs(time)
        is_regular = (index > last) | (at == 0) | (jnp.abs(difference - regular) <= rounding)
        lead = jnp.where(is_regular, regular, difference)
        return Context(
            time, lead, take(self.calendar), jnp.asarray(self.parameters), take(self.forcing), jnp.asarray(self.static),
            self.mask, key, self.spec,
        )  # fmt: skip

    def slice(self, start: int, stop: int) -> "Window":
        """Frames `start:stop` along time, with everything that belongs to them."""
        cut = {name: getattr(self, name)[:, start:stop] for name in ("frames", "times", "calendar", "forcing")}
        return dataclasses.replace(self, **cut)


def stack(windows: list[Window]) -> Window:
    """Batches windows without a batch axis. They must share one spec."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *windows)
