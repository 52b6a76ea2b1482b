"""Quadratic invariants: energy and enstrophy stay what they were, or do not grow."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.constraints.differences import Differences, check_components, component_axes
from physml.constraints.names import channels_of, check_density, density_of, positions
from physml.constraints.sums import over_space, settle, valid_cells
from physml.errors import ConfigError
from physml.fields import ArrayLike, Context, Spec

STEPS = 2  # of Newton's method, each exact along its gradient


@dataclass(frozen=True)
class QuadraticInvariant:
    """Restores a sum of squares after a step, to rounding: one number for all channels together.

    The sum is over cells of cell size x density x square; what it has to be is that of the previous frame. The field
    moves along the gradient of the sum: an energy is scaled, an enstrophy of velocities is corrected by the curl of the
    vorticity, which changes small scales most and makes no divergence. Each step solves the quadratic equation along
    its gradient; what is left in the end, by a factor. A field without energy, which no factor can help, stays as it
    is, and so does the mean where `keep_mean` leaves more energy in it than there may be.

    Attributes:
        channels: of "energy" the components of the velocity, or any fields whose squares count; of "enstrophy" the
            vorticity, or the two or three components of the velocity.
        kind: "energy" or "enstrophy".
        density: a field that multiplies the cell size: layer thickness, density. Of a predicted channel, which is not
            changed, each frame's own values count. Only for "energy".
        keep_mean: the mean of every channel (its momentum, with `density`) is left alone, and with it a mass or
            momentum that an earlier constraint has fixed.
        at_most: for decaying flows: less than in the previous frame is left as it is.
        axes: the axis along which each component of the velocity points, for "enstrophy"; without, x, y and z in the
            order of `channels`. The vorticity is that of the Fourier series on periodic axes, else by differences
            between cells, with walls and masked cells that hold the fluid.

    Raises ConfigError for contradictory options; `build` raises SpecError for names that the data do not have.
    """

    channels: str | tuple[str, ...]
    kind: Literal["energy", "enstrophy"] = "energy"
    density: str = ""
    keep_mean: bool = False
    at_most: bool = False
    axes: str | tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("channels", "axes"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        check_fields(self)
        if not self.channels:
            raise ConfigError('channels is empty, so nothing is kept. Name some, e.g. QuadraticInvariant(("u", "v")).')
        if self.kind == "enstrophy":
            check_components(self.channels, self.axes, (1, 2, 3))
            if self.density:
                raise ConfigError("The enstrophy knows no density. Leave `density` out, or set kind to energy.")
        if self.axes and not self.turning:
            raise ConfigError("axes are for the enstrophy of a velocity only. Leave them out.")

    @property
    def turning(self) -> bool:
        """Whether squares are those of the curl of the channels."""
        return self.kind == "enstrophy" and len(self.channels) > 1

    def build(self, spec: Spec) -> "QuadraticInvariant":
        """Itself. Raises SpecError for a channel, field or axis that `spec` does not have."""
        positions(spec, self.channels)
        check_density(self.density, self.channels, spec)
        if self.turning:
            Differences(spec.grid, component_axes(self.channels, self.axes, spec.grid))
        return self

    @functools.partial(jax.jit, static_argnums=0)
    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """The sum of squares minus what it has to be, relative to the larger of both; one law."""
        squares = _Squares(self, frame, previous, context)
        excess = squares.excess(squares.values)
        size = jnp.maximum(jnp.abs(squares.sum(squares.before)), jnp.abs(squares.sum(squares.terms(squares.values))))
        excess = jnp.maximum(excess, 0) if self.at_most else excess
        return (excess / jnp.where(size > 0, size, 1)).reshape(-1, 1)

    @functools.partial(jax.jit, static_argnums=0)
    def project(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch *space channel"]:
        """`frame` with the sum of squares that it has to have, unchanged where it has it."""
        frame = jnp.asarray(frame)
        squares = _Squares(self, frame, previous, context)
        values = squares.values
        if self.turning:
            for _ in range(STEPS):
                slope = squares.gradient(values)
                values = squares.moved(values, squares.deviation(slope / squares.per_cell), slope)
        for _ in range(2):
            # Walls hold a mean velocity too, and turn it.
            slope = squares.gradient(values) if self.turning and self.keep_mean else None
            values = squares.moved(values, squares.deviation(values), slope)
        for _ in range(2):
            values = squares.settled(values)
        excess = squares.excess(squares.values)
        needed = excess > 0 if self.at_most else excess != 0
        values = jnp.where(needed & squares.exists, values, frame[..., squares.places])
        return frame.at[..., squares.places].set(values.astype(frame.dtype))


class _Squares:
    """What one projection works with: values `(batch, *space, channels)` and the terms whose total is the law."""

    def __init__(self, law: QuadraticInvariant, frame, previous, context: Context):
        frame, previous, spec = jnp.asarray(frame), jnp.asarray(previous), context.spec
        self.law, self.places = law, jnp.asarray(positions(spec, law.channels))
        cells, self.exists = valid_cells(context, positions(spec, law.channels), frame)
        size = over_space(cells)
        self.per_cell = cells / jnp.where(size > 0, size, 1)
        self.differences = None
        if law.turning:
            exists = None if context.mask is None else jnp.all(self.exists, axis=-1)
            self.differences = Differences(spec.grid, component_axes(law.channels, law.axes, spec.grid), exists)
        self.weights = self.per_cell * density_of(law.density, frame, context)
        self.values = self._values(frame)
        before = self.per_cell * density_of(law.density, previous, context)
        self.before = self.terms(self._values(previous), before)
        self.per_cell = jnp.where(self.per_cell > 0, self.per_cell, 1)

    def _values(self, frame):
        return jnp.where(self.exists, frame[..., self.places], 0).astype(self.per_cell.dtype)

    def terms(self, values, weights=None) -> Float[Array, "batch *space terms"]:
        """The squares times their weights."""
        weights = self.weights if weights is None else weights
        if self.differences is not None:
            vorticity = self.differences.curl(jnp.moveaxis(values, -1, 1))
            values, weights = jnp.moveaxis(vorticity, 1, -1), weights[..., :1]
        return weights * jnp.square(values)

    def sum(self, *terms):
        """One number per sample, with size 1 along all other axes."""
        return over_space(*terms, together=True)

    def excess(self, values):
        """The total minus what it has to be."""
        return self.sum(self.terms(values), -self.before)

    def gradient(self, values):
        """Of the total, with respect to every value."""
        return jax.grad(lambda values: self.terms(values).sum())(values)

    def deviation(self, values):
        """The direction in which a factor moves `values`."""
        if not self.law.keep_mean:
            return values
        share = over_space(self.weights)
        mean = over_space(self.weights * values) / jnp.where(share != 0, share, 1)
        return jnp.where(self.exists, values - mean, 0)

    def moved(self, values, direction, gradient=None):
        """`values` moved along `direction` to the target, or as near to it as that leads.

        The total is q + b t + a t^2 at `values + t direction`; the nearer root, in the form that does not cancel.
        Without a `gradient` of the total, the direction is that of a factor: orthogonal to what the factor leaves.
        """
        excess = self.excess(values)
        if self.law.at_most:
            excess = jnp.maximum(excess, 0)
        bend = self.sum(self.terms(direction))
        slope = 2 * bend if gradient is None else self.sum(gradient * direction)
        possible = (slope > 0) & (bend > 0)
        slope, bend = jnp.where(possible, slope, 1), jnp.where(possible, bend, 1)
        first, ratio = excess / slope, bend / slope  # 4 a q and b^2 would leave the range of numbers sooner
        inside = 1 - 4 * ratio * first
        reached = inside > 0
        root = jnp.sqrt(jnp.where(reached, inside, 1))
        step = jnp.where(possible, jnp.where(reached, -2 * first / (1 + root), -0.5 / ratio), 0)
        return values + step * direction

    def settled(self, values):
        """`values` with units in the last place moved until the rounding of `moved` is made up for."""
        slope = jax.lax.stop_gradient(self.gradient(values))

        def row(numbers):
            return numbers.reshape(numbers.shape[0], -1)[..., None]

        missing = -self.excess(values)
        if self.law.at_most:
            missing = jnp.minimum(missing, 0)
        size = row(jnp.abs(values))
        grown = settle(size, row(missing), row(jnp.abs(slope))) - size
        return values + jax.lax.stop_gradient(jnp.sign(slope) * grown[..., 0].reshape(values.shape))
