"""Velocities without divergence: the gradient that is in a velocity is taken off."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.coding import check_fields
from physml.constraints.boundary import inside
from physml.constraints.differences import Differences, check_components, component_axes
from physml.constraints.names import channels_of, check_known, positions
from physml.constraints.sums import over_space, valid_cells
from physml.errors import ConfigError, SpecError
from physml.fields import ArrayLike, Context, Spec


@dataclass(frozen=True)
class DivergenceFree:
    """Removes the divergence: the nearest velocity that has none (Chorin 1968, doi:10.1090/S0025-5718-1968-0242392-2).

    The methods differ in the divergence that vanishes. "spectral", on periodic axes of equal cells: that of the Fourier
    series, with derivatives of Nyquist modes zero. "poisson": the net outflow of every cell, where the velocity through
    a face is the mean of the cells beside it, and zero at walls and obstacles. Gradients are the adjoint of that
    divergence under the cell sizes, so the projection is exact and costs the least energy. Alternations from cell to
    cell, which no face sees, stay; so does the mean velocity along periodic axes without obstacles. The Poisson
    equation is solved by transforms in a plain box, else by conjugate gradients, to rounding; derivatives are those of
    the exact solution.

    Attributes:
        velocity: channels of the two or three components.
        method: "auto" takes "spectral" where nothing is masked and all axes are periodic.
        axes: the axis along which each component points; without, x, y and z in the order of `velocity`. They may be
            fewer than the grid has: then every layer is on its own.
        obstacle: name of a static or forcing field of zeros and ones that marks obstacles. Masked cells are obstacles,
            too. The velocity inside of obstacles stays as it is; `Boundary` makes it zero.
        solid: what the field `obstacle` holds inside of obstacles: 0 for a mask that is 1 in the fluid.
        open: sides that the fluid crosses, such as ("x low", "x high"); the other sides of the domain are walls.

    Raises ConfigError for options that contradict each other; `build` raises SpecError for channels, axes, sides and
    fields that the data do not have, for spheres and for cells of unknown size.
    """

    velocity: str | tuple[str, ...] = ("u", "v")
    method: Literal["spectral", "poisson", "auto"] = "auto"
    axes: str | tuple[str, ...] = ()
    obstacle: str = ""
    solid: Literal[0, 1] = 0
    open: str | tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("velocity", "axes", "open"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        check_fields(self)
        check_components(self.velocity, self.axes, (2, 3))
        if self.method == "spectral" and (self.obstacle or self.open):
            raise ConfigError("Fourier series know neither obstacles nor sides. Set method to poisson or auto.")

    def build(self, spec: Spec) -> "DivergenceFree":
        """Itself. Raises SpecError where the grid, a channel or a field do not fit."""
        positions(spec, self.velocity)
        if self.obstacle:
            check_known("forcing or static field", [self.obstacle], spec.forcing, spec.static)
        self._differences(spec)
        return self

    @functools.partial(jax.jit, static_argnums=0)
    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """Root mean square of the divergence, times the length of the shortest cell, relative to that of the velocity;
        one law."""
        velocity, differences, cells = self._parts(frame, context)
        outflow = differences.smallest * differences.divergence(velocity)
        squares = jnp.stack([jnp.square(outflow), jnp.sum(jnp.square(velocity), axis=1)], axis=-1)
        sums = over_space(cells * squares).reshape(-1, 2)
        ratio = sums[:, :1] / jnp.where(sums[:, 1:] > 0, sums[:, 1:], 1)
        return jnp.where(ratio > 0, jnp.sqrt(jnp.where(ratio > 0, ratio, 1)), 0)

    @functools.partial(jax.jit, static_argnums=0)
    def project(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch *space channel"]:
        """`frame` with the velocity without divergence; to rounding unchanged where it has none.

        Raises SpecError for the method "spectral" when there is a mask.
        """
        frame = jnp.asarray(frame)
        velocity, differences, cells = self._parts(frame, context)
        change = jnp.moveaxis(differences.potential_part(velocity), 1, -1)
        places = jnp.asarray(positions(context.spec, self.velocity))
        values = frame[..., places]
        values = jnp.where(cells > 0, values - change, values)
        return frame.at[..., places].set(values.astype(frame.dtype))

    def _parts(self, frame, context: Context):
        """The velocity `(batch, component, *space)`, zero in obstacles; differences; sizes of cells with fluid,
        `(batch, *space, 1)`."""
        frame = jnp.asarray(frame)
        places = positions(context.spec, self.velocity)
        cells, exists = valid_cells(context, places, frame)
        exists = jnp.all(exists, axis=-1)
        if self.obstacle:
            exists = exists & ~inside(self.obstacle, self.solid, context)[..., 0]
        cells = jnp.where(exists, cells[..., 0], 0)[..., None]
        whole = context.mask is None and not self.obstacle
        velocity = jnp.where(cells > 0, frame[..., jnp.asarray(places)], 0).astype(cells.dtype)
        return jnp.moveaxis(velocity, -1, 1), self._differences(context.spec, None if whole else exists), cells

    def _differences(self, spec: Spec, exists=None) -> Differences:
        axes = component_axes(self.velocity, self.axes, spec.grid)
        differences = Differences(spec.grid, axes, exists, self.open, self.method != "poisson")
        if self.method == "spectral" and not differences.spectral:
            raise SpecError(
                "The spectral method needs periodic axes of equal cells and no mask, which these data do not have. "
                "Set method to poisson or auto."
            )
        return differences
