"""Mass fixers: the total of a field over the domain is that of the previous frame, plus what sources brought."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.coding import check_choices
from physml.constraints.sums import (
    channels_of,
    field_of,
    missing_field,
    over_space,
    positions,
    settle,
    valid_cells,
)  # fmt: skip
from physml.errors import ConfigError, SpecError, suggest
from physml.fields import ArrayLike, Context, Spec


@dataclass(frozen=True)
class MassFixer:
    """Restores the total of channels after a step.

    The total is the sum over cells of cell size x density x value, over the cells where the channel exists (mask). What
    it has to be: that of the previous frame, plus `sources` over the length of the step; or `total`. Sums are
    compensated and corrections arrive whole, so that float32 rollouts keep it to rounding over thousands of steps.

    Attributes:
        channels: names; each keeps its own total, unless `together`.
        method: how the correction is spread (Diamantakis & Flemming 2014 compare such fixers). "additive": the same
            amount everywhere. "multiplicative": in proportion to the value, which keeps signs and zeros. "gradient": in
            proportion to the differences to the neighbors, where transport schemes err. Where a factor cannot do it,
            because totals differ in sign or cancel, and where there is no gradient, the correction is additive.
        density: a field that multiplies the cell size: air mass, layer thickness, depth. Of a predicted channel each
            frame's own values count; a forcing or static field is that of the predicted frame for both.
        sources: forcing fields that the total grows by, in units of the channel per `time_unit`, valid at the predicted
            frame: one for all channels, or one per channel; surface fluxes are sources that vanish above the surface.
        total: name of a parameter of the data that prescribes the mean over the domain, in place of the previous frame.
        separately: names of axes along which every position keeps a total of its own, e.g. ("level",).
        together: one total for the sum of all channels, e.g. of species that react.
        positive: negative values become zero, and the rest is scaled so that the total stays. Where the total itself is
            negative that cannot be, and the values keep their signs.

    Raises ConfigError for contradictory options; `build` raises SpecError for names that the data do not have.
    """

    channels: str | tuple[str, ...]
    method: Literal["additive", "multiplicative", "gradient"] = "additive"
    density: str = ""
    sources: str | tuple[str, ...] = ()
    total: str = ""
    separately: tuple[str, ...] = ()
    together: bool = False
    positive: bool = False

    def __post_init__(self):
        for name in ("channels", "sources", "separately"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        check_choices(self)
        if not self.channels:
            raise ConfigError('channels is empty, so nothing would be conserved. Name some, e.g. MassFixer("rho").')
        if len(self.sources) not in (0, 1, len(self.channels)):
            raise ConfigError(
                f"There are {len(self.sources)} sources for {len(self.channels)} channels. "
                "Name one for all, or one each."
            )
        if self.total and self.sources:
            raise ConfigError("A prescribed total holds what sources bring already. Leave out `total` or `sources`.")
        if self.total and self.separately:
            raise ConfigError("A prescribed total is one number for the domain. Leave out `total` or `separately`.")

    def build(self, spec: Spec) -> "MassFixer":
        """Itself. Raises SpecError for a channel, field, parameter or axis that `spec` does not have."""
        positions(spec, self.channels)
        known = [c.name for group in (spec.channels, spec.forcing, spec.static) for c in group]
        forcing = [c.name for c in spec.forcing]
        parameters = [c.name for c in spec.parameters]
        axes = [axis.name for axis in spec.grid.axes]
        if self.density and self.density not in known:
            raise SpecError(missing_field(self.density, spec))
        if self.density in self.channels:
            raise SpecError(f"{self.density!r} cannot be its own density. Leave `density` out, or fix another channel.")
        for what, names, valid_names in (
            ("forcing field", self.sources, forcing),
            ("parameter", (self.total,) if self.total else (), parameters),
            ("axis", self.separately, axes),
        ):
            for name in names:
                if name not in valid_names:
                    raise SpecError(f"There is no {what} {name!r}." + suggest(name, valid_names))
        if self.separately and set(self.separately) >= set(axes):
            raise SpecError(f"separately names every axis, {axes}: no total is left to conserve. Name fewer.")
        return self

    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """The total minus what it has to be, relative to the mean size of the values; one law per channel and position
        of `separately`."""
        parts = self._parts(frame, previous, context)
        size = over_space(parts.weights * jnp.abs(parts.values), parts.keep)
        if self.together:
            size = size.sum(-1, keepdims=True)
        size = jnp.maximum(size, jnp.abs(parts.target))
        difference = parts.excess(parts.values)
        return (difference / jnp.where(size > 0, size, 1)).reshape(difference.shape[0], -1)

    def project(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch *space channel"]:
        """`frame` with the totals that it has to have, unchanged where it has them."""
        frame = jnp.asarray(frame)
        parts = self._parts(frame, previous, context)
        values = parts.values
        if self.positive:
            values = jnp.where(parts.target >= 0, parts.clipped(values), values)
        return self._settled(frame, parts.spread(values, self.method), parts)

    def condition(
        self,
        mean: Float[ArrayLike, "batch *space channel"],
        variance: Float[ArrayLike, "batch *space channel"],
        previous,
        context: Context,
    ) -> tuple[Float[Array, "batch *space channel"], Float[Array, "batch *space channel"]]:
        """Mean and variance of a Gaussian frame whose numbers are independent, given the totals that it has to have.

        With weights w and variances S, the total's excess e goes to the cells as S w / (w' S w), and S loses
        (S w)^2 / (w' S w): cells that are less certain take more (ProbConserv, Hansen et al. 2023, arXiv:2302.11002;
        the covariances that this makes are left out). That stands in for `method`, which spreads the correction only
        where all variances of a total vanish. A predicted `density` counts as known: that of the mean. The mean of
        `positive` is clipped afterwards as in `project`.
        """
        mean, variance = jnp.asarray(mean), jnp.asarray(variance)
        parts = self._parts(mean, previous, context)
        own = jnp.where(parts.exists, variance[..., parts.places], 0)
        gain = parts.weights * own / parts.largest(own)  # squares of small units would underflow
        room = parts.sum(parts.weights * gain)
        uncertain = room > 0
        even = parts.spread(parts.values, self.method)
        values = jnp.where(uncertain, parts.added(parts.values, gain), even)
        kept = jnp.maximum(1 - parts.weights * gain / jnp.where(uncertain, room, 1), 0)
        own = jnp.where(parts.exists, own * kept, variance[..., parts.places]).astype(variance.dtype)
        return self._settled(mean, values, parts), variance.at[..., parts.places].set(own)

    def _settled(self, frame, values, parts: "_Totals"):
        """`frame` with corrected values, whose totals are made exact."""
        if self.positive:  # a correction may have made new negative ones
            values = jnp.where(parts.target >= 0, parts.clipped(values), values)
        lack = -parts.excess(values) / (len(self.channels) if self.together else 1)
        values = settle(values, lack, parts.weights, parts.keep)
        values = jnp.where(parts.exists, values, frame[..., parts.places])
        return frame.at[..., parts.places].set(values.astype(frame.dtype))

    def _parts(self, frame, previous, context: Context) -> "_Totals":
        return _Totals(self, frame, previous, context)


class _Totals:
    """What one projection works with: values `(batch, *space, channels)`, weights like them, and the target."""

    def __init__(self, law: MassFixer, frame, previous, context: Context):
        self.law, self.spec = law, context.spec
        self.places = positions(context.spec, law.channels)
        names = [axis.name for axis in context.spec.grid.axes]
        self.keep = tuple(names.index(name) for name in law.separately)
        cells, self.exists = valid_cells(context, self.places, frame)
        size = over_space(cells, self.keep)
        cells = cells / jnp.where(size > 0, size, 1)
        self.values = jnp.where(self.exists, frame[..., self.places], 0)
        self.weights = cells * self._density(frame, context)
        self.owed = self._owed(cells, previous, context)
        self.target = self._prescribed(context) if law.total else self.sum(*self.owed)

    def _density(self, frame, context):
        return field_of(self.law.density, frame, context) if self.law.density else 1

    def _prescribed(self, context):
        index = [c.name for c in self.spec.parameters].index(self.law.total)
        number = jnp.asarray(context.parameters)[:, index].reshape(-1, *[1] * (self.values.ndim - 1))
        return number * (self.sum(self.weights) != 0)

    def _owed(self, cells, previous, context):
        """The terms, cell by cell, whose sum the total has to be."""
        law, previous = self.law, jnp.asarray(previous)
        if law.total:
            return ()
        before = jnp.where(self.exists, previous[..., self.places], 0)
        owed = (cells * self._density(previous, context) * before,)
        if law.sources:
            sources = jnp.concatenate([field_of(name, previous, context) for name in law.sources], -1)
            lead = jnp.asarray(context.lead).reshape(-1, *[1] * (self.values.ndim - 1))
            owed += (self.weights * sources * lead,)
        return owed

    def sum(self, *terms):
        """The totals of several terms together, rounded once."""
        terms = [jnp.broadcast_to(term, self.values.shape) for term in terms]
        if self.law.together:
            terms = [term[..., i : i + 1] for term in terms for i in range(term.shape[-1])]
        summed = [1 + axis for axis in range(self.values.ndim - 2) if axis not in self.keep]
        if not summed:  # a space of zero axes
            return sum(terms)
        return over_space(jnp.concatenate(terms, axis=summed[0]), self.keep)

    def largest(self, values):
        """The largest of the `values` (0 or more) of each total, 1 where all vanish."""
        axes = [1 + axis for axis in range(values.ndim - 2) if axis not in self.keep]
        largest = jnp.max(values, axis=(*axes, -1) if self.law.together else axes, keepdims=True, initial=0)
        return jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))  # it is divided out again

    def excess(self, values):
        """The total of `values` minus the target; zero where no cell exists."""
        if self.law.total:
            return self.sum(self.weights * values) - self.target
        # Two totals that are rounded before they are subtracted let a rollout drift.
        return self.sum(self.weights * values, *(-term for term in self.owed))

    def spread(self, values, method: str):
        """`values` corrected to have the target as total."""
        even = self.added(values, jnp.ones_like(values))
        if method == "multiplicative":
            now = self.sum(self.weights * values)
            size = self.sum(jnp.abs(self.weights * values))
            possible = (now * self.target > 0) & (jnp.abs(now) > 1e-3 * size)
            return jnp.where(possible, values * (self.target / jnp.where(possible, now, 1)), even)
        if method == "gradient":
            steep = gradient_size(values, self.exists, self.spec.grid.periodic)
            return jnp.where(self.sum(self.weights * steep) > 0, self.added(values, steep), even)
        return even

    def added(self, values, shape):
        """`values` with the target as total; what they lack is spread in proportion to `shape`, unless it vanishes."""
        shape = jnp.where(self.exists, shape, 0)
        room = self.sum(self.weights * shape)
        return values - self.excess(values) / jnp.where(room != 0, room, 1) * shape

    def clipped(self, values):
        """`values` without the negative ones, scaled to the target; spread evenly where nothing is left."""
        kept = jnp.maximum(values, 0)
        now = self.sum(self.weights * kept)
        scaled = kept * (self.target / jnp.where(now > 0, now, 1))
        return jnp.where(now > 0, scaled, self.added(kept, jnp.ones_like(kept)))


def gradient_size(
    values: Float[ArrayLike, "batch *space channels"], exists: Any, periodic: tuple[bool, ...]
) -> Float[Array, "batch *space channels"]:
    """The sum over axes of the sizes of the differences to both neighbors; none across walls and masked cells."""
    size = jnp.zeros_like(values)
    for axis, wraps in enumerate(periodic):
        for shift in (1, -1):
            difference = jnp.abs(values - jnp.roll(values, shift, 1 + axis))
            both = exists & jnp.roll(exists, shift, 1 + axis)
            if not wraps:
                edge = jnp.arange(values.shape[1 + axis]) == (0 if shift == 1 else values.shape[1 + axis] - 1)
                both &= ~edge.reshape([-1 if i == 1 + axis else 1 for i in range(values.ndim)])
            size = size + jnp.where(both, difference, 0)
    return size
