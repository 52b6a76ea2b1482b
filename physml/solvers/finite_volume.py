"""What the finite-volume solvers share: cells, slope limiters, and substeps that respect a stability limit."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.fields import ArrayLike, Axis, Grid
from physml.solvers.solver import Solver, block_mean, check_cells, require

MOST_SUBSTEPS = 1_000_000  # of one stored step: a state that needs more has diverged


class FiniteVolume(Solver):
    """Configs whose state is means over equal cells: `solver_points` per axis, averaged to `points` when stored.

    `substeps` None takes as many as the stability limit of the current state asks for, which has forward-mode
    derivatives only; a number is fixed and can also be differentiated in reverse; a step beyond the limit gives NaN.
    """

    advice: ClassVar[str] = "Leave substeps out, so that the stability limit decides, or raise it."

    def __post_init__(self):
        check_cells(self)
        require(self.substeps is None or self.substeps >= 1, "substeps", self.substeps, "at least 1, or left out")
        require(0 < self.time_step < math.inf, "time_step", self.time_step, "positive")

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.cells(name, self.points, self.length, periodic=self.periodic) for name in self.axes))

    @property
    def cells(self) -> int:
        return self.solver_points ** len(self.axes)

    def coarsen(self, field: Float[ArrayLike, "*space"]) -> Float[ArrayLike, "*stored"]:
        """Means over the solver's cells in every stored cell."""
        return block_mean(field, self.solver_points // self.points, field.ndim)


def van_leer(before: ArrayLike, after: ArrayLike) -> jax.Array:
    """The limited difference across a cell from those to its neighbors: their harmonic mean, zero at extrema.

    van Leer 1974, doi:10.1016/0021-9991(74)90019-9.
    """
    product = before * after
    rising = product > 0
    return jnp.where(rising, 2 * product / jnp.where(rising, before + after, 1), 0)


def monotonized(before: ArrayLike, after: ArrayLike) -> jax.Array:
    """The mean of both differences, at most twice either of them, zero at extrema: sharper than `van_leer`.

    The monotonized central limiter, van Leer 1977, doi:10.1016/0021-9991(77)90095-X.
    """
    before, after = jnp.asarray(before), jnp.asarray(after)
    size = jnp.minimum(jnp.abs(before + after) / 2, 2 * jnp.minimum(jnp.abs(before), jnp.abs(after)))
    return jnp.where(before * after > 0, jnp.sign(after) * size, 0)


def advance(
    substep: Callable[[Any, jax.Array], Any],
    limit: Callable[[Any, jax.Array], jax.Array],
    state: Any,
    duration: Any,
    substeps: int | None,
) -> Any:
    """The state `duration` later.

    Args:
        substep: (state, time step) -> state.
        limit: (state, time that is left) -> the longest stable time step.
        state: a pytree of floating-point arrays.
        duration: the whole time; may be traced.
        substeps: see `FiniteVolume`. All values are NaN where the limit does not allow them.
    """
    duration = jnp.asarray(duration, jnp.result_type(*jax.tree.leaves(state)))
    if substeps is not None:

        def fixed(_, carry):
            state, stable = carry
            return substep(state, duration / substeps), stable & (duration / substeps <= limit(state, duration))

        state, stable = jax.lax.fori_loop(0, substeps, fixed, (state, jnp.asarray(True)))
    else:

        def unfinished(carry):
            _, left, count = carry
            return (left > 0) & (count < MOST_SUBSTEPS)

        def adapted(carry):
            state, left, count = carry
            needed = jnp.maximum(jnp.ceil(left / limit(state, left)), 1)
            step = left / needed  # equal steps, as far as one can tell now: no sliver at the end
            return substep(state, step), jnp.where(needed > 1, left - step, 0), count + 1

        state, left, _ = jax.lax.while_loop(unfinished, adapted, (state, duration, jnp.asarray(0)))
        stable = left <= 0
    return jax.tree.map(lambda x: jnp.where(stable, x, jnp.nan), state)
