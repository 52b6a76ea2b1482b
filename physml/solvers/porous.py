"""The generalized porous medium equation u_t = (k(u) u_x)_x: heat, porous media, melting fronts.

The three cases, their intervals of parameters and their exact solutions are those of Hansen et al. 2023 (ProbConserv,
arXiv:2302.11002), in order of difficulty: k constant, k = u^m with a front of infinite slope, k a step with a jump of
u.

Cell means; the flux through a face is the difference of the integral of k over u, which is k averaged between the two
cells. It keeps fronts at their speed: the mass of the melting front errs by 2e-4 with 100 cells, by 1e-2 with the
arithmetic mean of both k, and the harmonic mean would freeze the fronts, because k = 0 ahead of them. Time: RKL2, the
stabilized second-order Runge-Kutta-Legendre method of Meyer, Balsara & Aslam 2014, doi:10.1016/j.jcp.2013.08.021, whose
steps grow with the square of the number of stages. A state is a dict of the cell means `u` (x,), the `time`, and the
`inflow`: what entered through both ends so far. It is integrated with `u`, so the mass is the initial mass plus the
inflow to rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf
from jaxtyping import Float

from physml.fields import ArrayLike, Channel
from physml.solvers.finite_volume import FiniteVolume, advance
from physml.solvers.solver import Range, Step, check_parameters

STAGES = 9
SAFETY = 0.9  # of the stability limit, because k changes within a step


class Diffusion(FiniteVolume):
    """What the cases share; they give `conductivity`, `integral`, `ends` and `exact`."""

    periodic: ClassVar[bool] = False
    axes: ClassVar[tuple[str, ...]] = ("x",)
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)
    boundary: ClassVar[str]
    scheme: ClassVar[str] = f"finite volumes, k averaged over u between cells, RKL2 with {STAGES} stages"

    def conductivity(self, u: jax.Array, parameter: Any) -> jax.Array:
        """k(u)."""
        raise NotImplementedError

    def integral(self, u: jax.Array, parameter: Any) -> jax.Array:
        """The integral of k from 0 to u."""
        raise NotImplementedError

    def ends(self, time: jax.Array, parameter: Any) -> tuple[Any, Any] | None:
        """u at both ends; None where the interval is periodic."""
        raise NotImplementedError

    def exact(self, x: ArrayLike, time: ArrayLike, parameter: Any) -> jax.Array:
        """The exact solution at points x."""
        raise NotImplementedError

    def initial(self, key: jax.Array, **parameters: Any) -> dict[str, jax.Array]:
        """The exact solution at time zero, at the cell centers; nothing is random but the drawn parameter."""
        given = self.values(parameters, *self.parameters)
        x = (jnp.arange(self.solver_points, dtype=float) + 0.5) * self.length / self.solver_points
        zero = jnp.zeros((), x.dtype)
        return {"u": self.exact(x, zero, given[self.parameters[0]]).astype(x.dtype), "time": zero, "inflow": zero}

    def stepper(self, **parameters: Any) -> Step:
        """One stored step; the parameter and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, *self.parameters, "time_step")
        name = self.parameters[0]

        def step(state):
            parameter = jnp.asarray(given[name], state["u"].dtype)
            spacing = self.length / state["u"].shape[0]

            def slope(state):
                ends = self.ends(state["time"], parameter)
                flux = _fluxes(state["u"], ends, lambda u: self.integral(u, parameter)) / spacing
                return {
                    "u": (flux[:-1] - flux[1:]) / spacing,
                    "time": jnp.ones_like(state["time"]),
                    "inflow": flux[0] - flux[-1],
                }

            def limit(state, left):
                largest = jnp.max(self.conductivity(state["u"], parameter))
                if (ends := self.ends(state["time"] + left, parameter)) is not None:
                    largest = jnp.maximum(largest, self.conductivity(jnp.maximum(*ends), parameter))
                return SAFETY * (STAGES**2 + STAGES - 2) / 4 * spacing**2 / 2 / jnp.maximum(largest, 1e-30)

            return advance(lambda state, dt: _rkl2(slope, state, dt), limit, state, given["time_step"], self.substeps)

        return step

    def observe(self, state: dict[str, jax.Array]) -> Float[ArrayLike, "x 1"]:
        return self.coarsen(state["u"])[:, None]


@dataclass(frozen=True)
class Heat(Diffusion):
    """u_t = diffusivity u_xx on [0, 2 pi), periodic: a sine that decays.

    Attributes:
        points: stored cells.
        solver_points: cells of the solver.
        diffusivity: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: solver steps per stored frame; None for as many as stability needs.
        precision: of the computation. Files hold float32.
    """

    points: int = 128
    solver_points: int = 128
    diffusivity: Range = (1.0, 5.0)
    time_step: float = 0.02
    substeps: int | None = None
    precision: Literal["float32", "float64"] = "float64"

    length: ClassVar[float] = 2 * math.pi
    periodic: ClassVar[bool] = True
    usual_steps: ClassVar[int] = 50
    parameters: ClassVar[tuple[str, ...]] = ("diffusivity",)
    meanings: ClassVar[dict[str, str]] = {"u": "temperature"}
    equation: ClassVar[str] = "u_t = diffusivity u_xx, u(x, 0) = sin(x)"
    boundary: ClassVar[str] = "periodic"

    def __post_init__(self):
        super().__post_init__()
        check_parameters(self, diffusivity="positive")

    def conductivity(self, u, parameter):
        return jnp.full_like(u, parameter)

    def integral(self, u, parameter):
        return parameter * u

    def ends(self, time, parameter):
        return None

    def exact(self, x, time, parameter):
        return jnp.exp(-parameter * jnp.asarray(time)) * jnp.sin(x)


@dataclass(frozen=True)
class PorousMedium(Diffusion):
    """u_t = (u^exponent u_x)_x on [0, 1], u = 0 at first: a front enters with speed 1 and is at x = t.

    The exact solution holds until the front is at the right end, at time 1.

    Attributes:
        points: stored cells.
        solver_points: cells of the solver.
        exponent: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: solver steps per stored frame; None for as many as stability needs.
        precision: of the computation. Files hold float32.
    """

    points: int = 128
    solver_points: int = 128
    exponent: Range = (1.0, 6.0)
    time_step: float = 0.02
    substeps: int | None = None
    precision: Literal["float32", "float64"] = "float64"

    length: ClassVar[float] = 1.0
    usual_steps: ClassVar[int] = 50
    parameters: ClassVar[tuple[str, ...]] = ("exponent",)
    meanings: ClassVar[dict[str, str]] = {"u": "density"}
    equation: ClassVar[str] = "u_t = (u^exponent u_x)_x, u(x, 0) = 0"
    boundary: ClassVar[str] = "u(0, t) = (exponent t)^(1 / exponent), u(1, t) = 0"

    def __post_init__(self):
        super().__post_init__()
        check_parameters(self, exponent="positive")

    def conductivity(self, u, parameter):
        return _power(u, parameter)

    def integral(self, u, parameter):
        return _power(u, parameter + 1) / (parameter + 1)

    def ends(self, time, parameter):
        return _power(parameter * time, 1 / parameter), jnp.zeros_like(time)

    def exact(self, x, time, parameter):
        return porous_medium_front(x, time, parameter)


@dataclass(frozen=True)
class Stefan(Diffusion):
    """u_t = (k(u) u_x)_x on [0, 1], k = 1 where u is at least `threshold` and 0 elsewhere: a jump that slows down.

    The jump, from `threshold` to 0, is at x = 2 alpha sqrt(t) (see `stefan_front`). On a grid it advances cell by cell,
    so u at a point oscillates in time while the mass does not.

    Attributes:
        points: stored cells.
        solver_points: cells of the solver.
        threshold: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: solver steps per stored frame; None for as many as stability needs.
        precision: of the computation. Files hold float32.
    """

    points: int = 128
    solver_points: int = 128
    threshold: Range = (0.55, 0.7)
    time_step: float = 0.002
    substeps: int | None = None
    precision: Literal["float32", "float64"] = "float64"

    length: ClassVar[float] = 1.0
    usual_steps: ClassVar[int] = 50
    parameters: ClassVar[tuple[str, ...]] = ("threshold",)
    meanings: ClassVar[dict[str, str]] = {"u": "temperature"}
    equation: ClassVar[str] = "u_t = (k(u) u_x)_x, k = 1 where u >= threshold and 0 elsewhere, u(x, 0) = 0"
    boundary: ClassVar[str] = "u(0, t) = 1, u(1, t) = 0"

    def __post_init__(self):
        super().__post_init__()
        check_parameters(self, threshold=(0, 1))

    def conductivity(self, u, parameter):
        return (u >= parameter).astype(u.dtype)

    def integral(self, u, parameter):
        return jnp.maximum(u - parameter, 0)

    def ends(self, time, parameter):
        return jnp.ones_like(time), jnp.zeros_like(time)

    def exact(self, x, time, parameter):
        return stefan_front(x, time, parameter)


def porous_medium_front(x: ArrayLike, time: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """u = (exponent (t - x))^(1 / exponent) behind the front at x = t, 0 ahead of it."""
    return _power(exponent * (jnp.asarray(time) - x), 1 / jnp.asarray(exponent))


def porous_medium_mass(time: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """The integral of `porous_medium_front` over x >= 0."""
    return exponent * _power(exponent * jnp.asarray(time), 1 / jnp.asarray(exponent)) * time / (exponent + 1)


def stefan_front(x: ArrayLike, time: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """u = 1 - (1 - threshold) erf(x / (2 sqrt t)) / erf(alpha) behind the front at 2 alpha sqrt(t), 0 ahead of it."""
    alpha, root = stefan_speed(threshold), jnp.sqrt(jnp.asarray(time))
    scaled = x / (2 * jnp.where(root > 0, root, 1))
    inside = (scaled <= alpha) & (root > 0)
    return jnp.where(inside, 1 - (1 - threshold) * erf(scaled) / erf(alpha), 0)


def stefan_mass(time: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """The integral of `stefan_front` over x >= 0: what the heat flux at x = 0 brought."""
    return 2 * (1 - threshold) / erf(stefan_speed(threshold)) * jnp.sqrt(jnp.asarray(time) / jnp.pi)


def stefan_speed(threshold: ArrayLike) -> jax.Array:
    """alpha of the front at 2 alpha sqrt(t): (1 - threshold) exp(-alpha^2) = threshold sqrt(pi) alpha erf(alpha).

    Bisection, then one step of Newton's method, which also carries the derivative. threshold in (0, 1).
    """
    threshold = jnp.asarray(threshold) * 1.0

    def excess(alpha):
        return (1 - threshold) * jnp.exp(-(alpha**2)) - threshold * jnp.sqrt(jnp.pi) * alpha * erf(alpha)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        return jnp.where(excess(middle) > 0, middle, low), jnp.where(excess(middle) > 0, high, middle)

    start = jnp.zeros_like(threshold), jnp.full_like(threshold, 8.0)
    alpha = jax.lax.stop_gradient(sum(jax.lax.fori_loop(0, 40, halve, start)) / 2)
    slope = -2 * alpha * jnp.exp(-(alpha**2)) - threshold * (jnp.sqrt(jnp.pi) * erf(alpha))
    return alpha - excess(alpha) / jax.lax.stop_gradient(slope)


def _power(base: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """base^exponent, 0 where base is not positive; so is its derivative, infinite at zero for a root."""
    positive = base > 0
    return jnp.where(positive, jnp.where(positive, base, 1) ** exponent, 0)


def _fluxes(u: jax.Array, ends: tuple[Any, Any] | None, integral: Callable) -> jax.Array:
    """-k u_x through all faces, times the spacing, from left to right."""
    inside = integral(u)
    if ends is None:
        return -jnp.diff(jnp.concatenate([inside[-1:], inside, inside[:1]]))
    left, right = (integral(jnp.asarray(end, u.dtype))[None] for end in ends)
    # Half a cell from the end to the first center: twice the difference.
    return -jnp.concatenate([2 * (inside[:1] - left), jnp.diff(inside), 2 * (right - inside[-1:])])


def _rkl2(slope: Callable, state: Any, dt: jax.Array) -> Any:
    """One step of RKL2 (equations 16 to 18 of the paper)."""
    j = np.arange(2.0, STAGES + 1)
    b = np.concatenate([[1 / 3, 1 / 3], (j**2 + j - 2) / (2 * j * (j + 1))])
    mu, nu = (2 * j - 1) / j * b[2:] / b[1:-1], -(j - 1) / j * b[2:] / b[:-2]
    weight = 4 / (STAGES**2 + STAGES - 2)
    table = jnp.asarray([mu, nu, mu * weight, (b[1:-1] - 1) * mu * weight], dt.dtype).T
    first = slope(state)

    def stage(i, carry):
        older, old = carry
        mu, nu, gain, loss = table[i]

        def combine(y1, y2, y0, f1, f0):
            return mu * y1 + nu * y2 + (1 - mu - nu) * y0 + dt * (gain * f1 + loss * f0)

        return old, jax.tree.map(combine, old, older, state, slope(old), first)

    second = jax.tree.map(lambda y, f: y + weight / 3 * dt * f, state, first)
    return jax.lax.fori_loop(0, STAGES - 1, stage, (state, second))[1]
