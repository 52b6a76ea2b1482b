"""Mass fixers: the total of a field over the domain is that of the previous frame, plus what sources brought."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.constraints.names import channels_of, check_density, check_known, density_of, field_of, positions
from physml.constraints.sums import gain, over_space, settle, valid_cells
from physml.errors import ConfigError, SpecError
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
        check_fields(self)
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
        check_density(self.density, self.channels, spec)
        check_known("forcing field", self.sources, spec.forcing)
        check_known("parameter", (self.total,) if self.total else (), spec.parameters)
        check_known("axis", self.separately, spec.grid.axes)
        axes = [axis.name for axis in spec.grid.axes]
        if self.separately and set(self.separately) >= set(axes):
            raise SpecError(f"separately names every axis, {axes}: no total is left to conserve. Name fewer.")
        return self

    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """The total minus what it has to be, relative to the mean size of the values; one law per channel and position
        of `separately`."""
        parts = self._parts(frame, previous, context)
        size = jnp.maximum(parts.sum(parts.weights * jnp.abs(parts.values)), jnp.abs(parts.target))
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

        Cells that are less certain take more of the correction (`physml.constraints.sums.gain`; the covariances that
        this makes are left out). That stands in for `method`, which spreads the correction only where all variances of
        a total vanish. A predicted `density` counts as known: that of the mean. The mean of `positive` is clipped
        afterwards as in `project`.
        """
        mean, variance = jnp.asarray(mean), jnp.asarray(variance)
        parts = self._parts(mean, previous, context)
        own = jnp.where(parts.exists, variance[..., parts.places], 0)
        taken, possible = gain(parts.weights, own, parts.keep, self.together)
        even = parts.spread(parts.values, self.method)
        values = jnp.where(possible, parts.values - parts.excess(parts.values) * taken, even)
        own = own * jnp.maximum(1 - parts.weights * taken, 0)
        own = jnp.where(parts.exists, own, variance[..., parts.places]).astype(variance.dtype)
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
        size = over_space(cells, keep=self.keep)
        cells = cells / jnp.where(size > 0, size, 1)
        self.values = jnp.where(self.exists, frame[..., self.places], 0)
        self.weights = cells * density_of(law.density, frame, context)
        self.owed = self._owed(cells, previous, context)
        self.target = self._prescribed(context) if law.total else self.sum(*self.owed)

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
        owed = (cells * density_of(law.density, previous, context) * before,)
        if law.sources:
            sources = jnp.concatenate([field_of(name, previous, context) for name in law.sources], -1)
            lead = jnp.asarray(context.lead).reshape(-1, *[1] * (self.values.ndim - 1))
            owed += (self.weights * sources * lead,)
        return owed

    def sum(self, *terms):
        """The totals of several terms together."""
        return over_space(*terms, keep=self.keep, together=self.law.together)

    def excess(self, values):
        """The total of `values` minus the target; zero where no cell exists."""
        if self.law.total:
            return self.sum(self.weights * values) - self.target
        return self.sum(self.weights * values, *(-term for term in self.owed))

    def spread(self, values, method: str):
        """`values` corrected to have the target as total."""
        even = self.added(values, jnp.ones((), values.dtype))
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
        return jnp.where(now > 0, scaled, self.added(kept, jnp.ones((), kept.dtype)))


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
