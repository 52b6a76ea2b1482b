"""The classical Runge-Kutta method."""

from typing import Any

import jax

from physml.solvers.solver import Step


def rk4(rates: Step, time_step: Any) -> Step:
    """One step of fourth order of state_t = rates(state), for any pytree, in the precision of the state."""

    def moved(state, slope, factor):
        return jax.tree.map(lambda y, k: (y + factor * time_step * k).astype(y.dtype), state, slope)

    def step(state):
        first = rates(state)
        second = rates(moved(state, first, 0.5))
        third = rates(moved(state, second, 0.5))
        fourth = rates(moved(state, third, 1.0))
        slope = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth)
        return moved(state, slope, 1.0)

    return step
