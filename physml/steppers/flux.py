"""Steps in flux form: the network says what passes between cells, so that nothing is made or lost.

Networks as numerical fluxes: arXiv:2401.01783. Fluxes are limited as Zalesak 1979 (doi:10.1016/0021-9991(79)90051-2)
limits his, except that what enters a cell counts towards what may leave it.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.constraints.names import channels_of, positions
from physml.constraints.sums import over_space, settle, valid_cells
from physml.errors import ConfigError, SpecError
from physml.fields import ArrayLike, Context, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.packing import count
from physml.steppers.plain import Direct, ResidualConfig, check_fits

PASSES = 4  # of the limiter: what is held back reaches as many cells beyond


@dataclass(frozen=True)
class FluxConfig(ResidualConfig):
    """The network predicts fluxes through the faces of cells; a frame changes by what enters less what leaves.

    Totals over the domain (cell size x value, where the mask has cells) stay those of the first frame to rounding. No
    flux crosses the ends of axes that are not periodic, nor the edge of the mask: data with inflow want `residual`.
    Outputs of the network: for every axis the flux of each channel through the upper face of every cell, in units of
    the channel's increments; then the increments of the other channels. Between cells of different size, as on the
    sphere, a flux of one changes the smaller cell by one. Fluxes are rates: longer steps (`lead`) move more.

    Attributes:
        channels: names of what is conserved; empty: all.
        upwind: the network predicts velocities instead, and what moves is the value of the cell upwind: nothing leaves
            an empty cell. Velocities are in units that move increments where values have their usual size.
        positive: names of channels that never fall below zero: of a cell goes at most what it has and what enters it.
        bounded: names of channels that never leave the range of the frame before.

    The last two hold fluxes back only where a value would go too far; what is left over in a jam of more than four
    cells is spread over the domain.
    """

    channels: tuple[str, ...] = ()
    upwind: bool = False
    positive: tuple[str, ...] = ()
    bounded: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("channels", "positive", "bounded"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        super().__post_init__()
        for name in (*self.positive, *self.bounded):
            if self.channels and name not in self.channels:
                raise ConfigError(f"{name!r} is to be limited, but it is not among channels={self.channels}. Add it.")

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network. Raises SpecError for channels that the data lacks, and for data without space."""
        if not spec.grid.ndim:
            raise SpecError("Fluxes pass between cells, but the data has no spatial axis. Use `residual`.")
        for names in (self.channels, self.positive, self.bounded):
            positions(spec, names)
        moved = len(self.channels or spec.names)
        inputs, scalars = count(spec, self.history, self.calendar, self.lead)
        return Signature(spec.grid, inputs, scalars, moved * spec.grid.ndim + len(spec.channels) - moved)

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Flux":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return Flux(self, spec, model, normalizer, constraints)


class Flux(Direct):
    """State: the last `history` frames, `(batch, history, *space, channel)` in physical units."""

    def predict(self, previous, output, context: Context):
        config, spec, axes = self.config, self.spec, self.spec.grid.ndim
        moved = np.array(positions(spec, config.channels or spec.names))
        others = np.setdiff1d(np.arange(len(spec.channels)), moved)
        increments = self.normalizer.increments[...]
        cells, exists = valid_cells(context, list(moved), previous)
        values = jnp.where(exists, previous[..., moved], 0)
        faces = Faces(cells, exists, spec.grid.periodic)

        rates = jnp.moveaxis(output[..., : len(moved) * axes].reshape(*output.shape[:-1], axes, len(moved)), -2, 0)
        rates = rates * increments[moved]
        if config.upwind:
            scaling = self.normalizer.frames
            usual = jnp.sqrt(scaling.center[...] ** 2 + scaling.scale[...] ** 2)[moved]
            rates = rates * faces.upwind(rates, values) / usual
        steps = (context.lead / spec.time_step).reshape(-1, *[1] * (previous.ndim - 1))
        amounts = faces.amounts(rates * steps)
        low, high = self._bounds(values, exists, moved)
        if config.positive or config.bounded:
            amounts = faces.limit(amounts, values, low, high)
        after = faces.enforce(values + faces.change(amounts), values, low, high)
        # What rounding took from the total; values at their bounds stay there. Scaling may take more than one unit.
        free = functools.reduce(jnp.logical_and, (after != bound for bound in (low, high) if bound is not None), exists)
        for _ in range(1 if low is None else 2):
            after = settle(after, faces.lost(values, after), jnp.where(free, cells, 0))
        frame = jnp.asarray(previous).at[..., moved].set(jnp.where(exists, after, previous[..., moved]))
        if others.size:
            frame = frame.at[..., others].add(output[..., len(moved) * axes :] * increments[others])
        return frame.astype(previous.dtype)

    def _bounds(self, values, exists, moved):
        """Least and greatest values of the frame to come, like `values`; None where no channel has such a bound."""
        names = [self.spec.names[place] for place in moved]
        positive, bounded = (
            np.array([name in chosen for name in names]) for chosen in (self.config.positive, self.config.bounded)
        )
        space = tuple(range(1, values.ndim - 1))
        low = high = None
        if positive.any() or bounded.any():
            least = jnp.min(jnp.where(exists, values, jnp.inf), space, keepdims=True)
            floor = jnp.minimum(values, 0)  # what is negative already does not fall further
            low = jnp.where(bounded, least, jnp.where(positive, floor, -jnp.inf))
        if bounded.any():
            most = jnp.max(jnp.where(exists, values, -jnp.inf), space, keepdims=True)
            high = jnp.where(bounded, most, jnp.inf)
        return low, high


class Faces:
    """The upper faces of cells along every axis, and what passes them: arrays `(axis, batch, *space, channels)`.

    `cells` are relative sizes `(batch, *space, channels)`, of batch size 1 if they are alike in it; faces are closed
    at the ends of axes that are not periodic and next to cells that do not exist.
    """

    def __init__(self, cells: Float[ArrayLike, "batch *space channels"], exists, periodic: tuple[bool, ...]):
        self.cells, self.axes = cells, range(len(periodic))
        sizes = []
        for axis, wraps in enumerate(periodic):
            size = jnp.minimum(cells, self.above(cells, axis))  # zero beside cells that do not exist
            if not wraps:
                last = np.arange(cells.shape[1 + axis]) == cells.shape[1 + axis] - 1
                size = jnp.where(last.reshape([-1 if i == 1 + axis else 1 for i in range(cells.ndim)]), 0, size)
            sizes.append(size)
        self.sizes = jnp.stack(sizes)
        self.exists = exists & (cells > 0)

    def above(self, values, axis):
        return jnp.roll(values, -1, 1 + axis)

    def below(self, values, axis):
        return jnp.roll(values, 1, 1 + axis)

    def upwind(self, rates, values):
        """The value on the side that each rate comes from."""
        return jnp.stack([jnp.where(rates[a] > 0, values, self.above(values, a)) for a in self.axes])

    def amounts(self, rates):
        """What passes the faces, in units of size x value; nothing through closed ones, whatever the rate is there."""
        return jnp.where(self.sizes > 0, rates * self.sizes, 0)

    def gain(self, amounts):
        """What enters each cell less what leaves it."""
        return sum(self.below(amounts[a], a) - amounts[a] for a in self.axes)

    def change(self, amounts):
        """Of the values."""
        return jnp.where(self.exists, self.gain(amounts) / jnp.where(self.exists, self.cells, 1), 0)

    def entering(self, amounts):
        return sum(jnp.maximum(self.below(amounts[a], a), 0) + jnp.maximum(-amounts[a], 0) for a in self.axes)

    def lost(self, before, after):
        """What the total lacks. Values are summed, not their differences, which would be rounded first."""
        return over_space(self.cells * before, -self.cells * after)

    def limit(self, amounts, values, low, high) -> Float[Array, "axis batch *space channels"]:
        """`amounts` reduced where they would take `values` beyond `low` and `high` (None or infinite: no bound).

        What enters a cell counts towards what may leave it, and the other way round, so that matter may move by several
        cells in a step. That makes one cell depend on the next: after some passes little is left to be done.
        """
        spare, room = self._room(values, low), self._room(high, values)

        def reduced(_, others):
            give = self._share(self.entering(-amounts), spare, self.entering(others))
            take = self._share(self.entering(amounts), room, self.entering(-others))
            factors = [
                jnp.where(
                    amounts[a] > 0,
                    jnp.minimum(give, self.above(take, a)),
                    jnp.minimum(self.above(give, a), take),
                )
                for a in self.axes
            ]
            return jnp.stack(factors) * amounts

        return jax.lax.fori_loop(0, PASSES, reduced, amounts)

    def _room(self, upper, lower):
        """How much fits between, in units of size x value, and where there is a bound; None where there is none."""
        if upper is None or lower is None:
            return None
        finite = jnp.isfinite(upper) & jnp.isfinite(lower)
        space = jnp.where(finite, upper, 0) - jnp.where(finite, lower, 0)
        return self.cells * jnp.maximum(space, 0), finite

    @staticmethod
    def _share(wanted, bound, helped):
        """The part of `wanted` that cells can give or take if `helped` passes the other way round."""
        if bound is None:
            return jnp.ones_like(wanted)
        allowed = bound[0] + helped
        fits = (wanted <= allowed) | ~bound[1]
        return jnp.where(fits, 1, allowed / jnp.where(fits, 1, wanted))

    def enforce(self, after, before, low, high):
        """`after` within its bounds and with the total of `before`.

        What clipping adds is taken from what lies above `low`, everywhere in proportion; what it takes is added below
        `high` likewise. Both keep the bounds.
        """
        if low is None:
            return after
        after = jnp.maximum(after, low)
        after = after if high is None else jnp.minimum(after, high)
        after = jnp.where(self.exists, after, 0)
        for bound, sign in ((low, 1), (high, -1)):
            if bound is None:
                continue
            finite = self.exists & jnp.isfinite(bound)
            bound = jnp.where(finite, bound, 0)
            distance = jnp.where(finite, after - bound, 0)
            surplus = jnp.maximum(-sign * self.lost(before, after), 0)
            reach = jnp.maximum(sign * over_space(self.cells * distance), surplus)
            share = surplus / jnp.where(reach > 0, reach, 1)
            after = jnp.where(finite, bound + (1 - share) * distance, after)
        return after
