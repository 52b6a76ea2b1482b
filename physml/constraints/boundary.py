"""Values at the sides of the domain and in obstacles, prescribed after every step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.constraints.names import channels_of, check_known, field_of, positions
from physml.constraints.sums import over_space, valid_cells
from physml.errors import ConfigError, SpecError
from physml.fields import ArrayLike, Context, Grid, Spec

WALLS = "walls"
PREVIOUS = "previous"


@dataclass(frozen=True)
class Boundary:
    """Sets the outermost cells of sides, and the cells of obstacles, to what they have to be.

    Attributes:
        channels: names.
        sides: where: "x low" is the first cell along the axis x, "x high" the last one; "walls" means both sides of
            every axis that is not periodic.
        value: a number in the unit of the channel; "previous" holds what the previous frame has there; any other text
            is the name of a forcing or static field. One for all channels, or one each.
        obstacle: name of a static or forcing field of zeros and ones; where it is `solid`, values are prescribed too.
        solid: what the field `obstacle` holds inside of obstacles: 0 for a mask that is 1 in the fluid.

    Where sides meet all have the same value; for different values apply one constraint after the other, and the last
    one wins in the corners. Raises ConfigError for options that cannot be read; `build` raises SpecError for names that
    the data do not have and for sides that do not exist.
    """

    channels: str | tuple[str, ...]
    sides: str | tuple[str, ...] = ()
    value: float | str | tuple[float | str, ...] = 0.0
    obstacle: str = ""
    solid: Literal[0, 1] = 0

    def __post_init__(self):
        for name in ("channels", "sides"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        check_fields(self)
        if not self.channels:
            raise ConfigError('channels is empty, so nothing is prescribed. Name some, e.g. Boundary("u", "walls").')
        if not self.sides and not self.obstacle:
            raise ConfigError('Neither sides nor an obstacle are named. Set sides, e.g. "walls" or ("x low",).')
        for side in self.sides:
            if side != WALLS:
                axis_and_end(side)
        if len(self.values) != len(self.channels):
            raise ConfigError(
                f"There are {len(self.values)} values for {len(self.channels)} channels. Give one for all, or one each."
            )
        for value in self.values:
            if not isinstance(value, str) and not math.isfinite(value):
                raise ConfigError(f"value is {value}, but what is prescribed must be finite.")

    @property
    def values(self) -> tuple[float | str, ...]:
        """One per channel."""
        if isinstance(self.value, tuple) and len(self.value) != 1:
            return self.value
        return (self.value if not isinstance(self.value, tuple) else self.value[0],) * len(self.channels)

    def build(self, spec: Spec) -> "Boundary":
        """Itself. Raises SpecError for a channel, field, axis or side that `spec` does not have."""
        positions(spec, self.channels)
        sides_of(self.sides, spec.grid)
        names = [value for value in self.values if isinstance(value, str) and value != PREVIOUS]
        names = [*names, self.obstacle] if self.obstacle else names
        check_known("forcing or static field", names, spec.forcing, spec.static)
        return self

    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """Root mean square of the difference from what is prescribed, over the cells where it is, relative to that of
        all values; one law per channel."""
        places, given, where, cells = self._parts(frame, previous, context)
        values = jnp.where(cells > 0, jnp.asarray(frame)[..., places], 0)
        found = over_space(cells * where)
        off = over_space(cells * where * jnp.square(values - given)) / jnp.where(found > 0, found, 1)
        share = over_space(cells)
        size = over_space(cells * jnp.square(values)) / jnp.where(share > 0, share, 1)
        size = size + over_space(cells * where * jnp.square(given)) / jnp.where(found > 0, found, 1)
        ratio = off / jnp.where(size > 0, size, 1)
        root = jnp.where(ratio > 0, jnp.sqrt(jnp.where(ratio > 0, ratio, 1)), 0)
        return root.reshape(root.shape[0], -1)

    def project(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch *space channel"]:
        """`frame` with the prescribed values; all others, and masked cells, as they were."""
        frame = jnp.asarray(frame)
        places, given, where, cells = self._parts(frame, previous, context)
        values = jnp.where(where & (cells > 0), given, frame[..., places])
        return frame.at[..., places].set(values.astype(frame.dtype))

    def _parts(self, frame, previous, context: Context):
        """Numbers of the channels, then what is prescribed, where, and the sizes of the cells in which it exists."""
        spec = context.spec
        places = positions(spec, self.channels)
        cells, _ = valid_cells(context, places, frame)
        where = jnp.asarray(_edges(self.sides, spec.grid))[None, ..., None]
        if self.obstacle:
            where = where | inside(self.obstacle, self.solid, context)
        previous = jnp.asarray(previous)

        def given(value, place):
            if value == PREVIOUS:
                return previous[..., place]
            if isinstance(value, str):
                return field_of(value, previous, context)[..., 0]
            return jnp.full(previous.shape[:-1], value)

        parts = [given(value, place).astype(cells.dtype) for value, place in zip(self.values, places, strict=True)]
        return places, jnp.stack(parts, -1), where, cells


def no_slip(velocity: tuple[str, ...] = ("u", "v"), obstacle: str = "", solid: int = 0) -> Boundary:
    """A fluid that sticks to all walls, and to obstacles if there are any: no velocity in the cells there."""
    return Boundary(velocity, WALLS, 0.0, obstacle, solid)


def axis_and_end(side: str) -> tuple[str, str]:
    """("x", "low") of "x low". Raises ConfigError for text that is not a side."""
    axis, _, end = side.rpartition(" ")
    if not axis or end not in ("low", "high"):
        raise ConfigError(f'{side!r} is no side. Write the name of an axis and low or high, e.g. "x low".')
    return axis.strip(), end


def sides_of(sides: tuple[str, ...], grid: Grid) -> set[tuple[int, str]]:
    """(number of the axis, "low" or "high") of every side named. Raises SpecError for sides that the grid lacks."""
    names = [axis.name for axis in grid.axes]
    walls = [number for number, wraps in enumerate(grid.periodic) if not wraps]
    found = set()
    for side in sides:
        if side == WALLS:
            if not walls:
                raise SpecError(f"Every axis of the grid is periodic, {names}: there are no walls. Leave them out.")
            found |= {(number, end) for number in walls for end in ("low", "high")}
            continue
        axis, end = axis_and_end(side)
        check_known("axis", [axis], grid.axes)
        if names.index(axis) not in walls:
            raise SpecError(f"The axis {axis!r} is periodic, so {side!r} does not exist. Name a side of another axis.")
        found.add((names.index(axis), end))
    return found


def inside(obstacle: str, solid: int, context: Context) -> Any:
    """Whether cells lie in an obstacle, `(batch, *space, 1)`: where the field of that name is `solid`, 0 or 1."""
    one = field_of(obstacle, None, context) > 0.5
    return one if solid else ~one


def _edges(sides: tuple[str, ...], grid: Grid) -> np.ndarray:
    """Whether a cell touches one of the sides, `(*space)`."""
    found = np.zeros(grid.shape, bool)
    for number, end in sides_of(sides, grid):
        np.moveaxis(found, number, 0)[0 if end == "low" else -1] = True
    return found
