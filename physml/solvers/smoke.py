"""Smoke that rises in a closed box, after the Navier-Stokes data of PDEArena (Gupta & Brandstetter 2022,
arXiv:2209.15616). Solved by `mac`, not by the semi-Lagrangian scheme of the original: the smoke is conserved.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.coding import check_fields
from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers import fourier, mac
from physml.solvers.mac import Box, Flow
from physml.solvers.solver import Range, Solver, Step, block_mean, check_cells, check_parameters, check_time, require

MODES = 4  # of the initial smoke; steep spectra have nothing beyond


class SmokeState(NamedTuple):
    """Velocity and pressure, and the density of the smoke in the cells `(y, x)`."""

    flow: Flow
    smoke: jax.Array


@dataclass(frozen=True)
class Smoke(Solver):
    """u_t + u . grad(u) = -grad(p) + viscosity laplace(u) + buoyancy smoke e_y, smoke_t + div(u smoke) = 0, div u = 0.

    No slip at the walls of the square box. The smoke is transported by limited fluxes (van Leer): its sum is exact and
    it stays positive. It starts as the absolute value of Gaussian noise of variance one, the fluid at rest.

    Attributes:
        points: stored points per axis.
        solver_points: points of the solver per axis, a multiple.
        length: of both sides.
        viscosity: number, or (low, high) to draw one per trajectory.
        buoyancy: acceleration by smoke of density one, likewise.
        time_step: time between stored frames.
        substeps: the least solver steps per stored frame; stability usually asks for more.
        warmup: time dropped before the first stored frame.
        noise_scale: wavelengths longer than sqrt(10) noise_scale are left out of the noise.
        noise_smoothness: its amplitude falls with the wavenumber to the power -2 noise_smoothness.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    solver_points: int = 64
    length: float = 32.0
    viscosity: Range = 0.01
    buoyancy: Range = 0.5
    time_step: float = 1.5
    substeps: int = 8
    warmup: float = 18.0
    noise_scale: float = 11.0
    noise_smoothness: float = 6.0
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    channels: ClassVar[tuple[Channel, ...]] = (Channel("smoke"), Channel("u"), Channel("v"))
    parameters: ClassVar[tuple[str, ...]] = ("viscosity", "buoyancy")
    meanings: ClassVar[dict[str, str]] = {
        "smoke": "density of the smoke", "u": "velocity to the right", "v": "velocity upwards",
    }  # fmt: skip
    equation: ClassVar[str] = (
        "u_t + u . grad(u) = -grad(p) + viscosity laplace(u) + buoyancy smoke e_y, smoke_t + div(u smoke) = 0, "
        "div u = 0"
    )
    boundary: ClassVar[str] = "closed box: walls without slip"
    scheme: ClassVar[str] = "staggered finite volumes, van Leer limiter, SSP Runge-Kutta 3, projection"
    usual_steps: ClassVar[int] = 56
    advice: ClassVar[str] = "Raise solver_points or the viscosity."

    def __post_init__(self):
        check_fields(self)
        check_cells(self)
        check_time(self)
        for name in ("length", "noise_scale", "noise_smoothness"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive")
        check_parameters(self, buoyancy="finite")
        longest = self.length / math.sqrt(10) / self.noise_scale
        require(longest < MODES, "noise_scale", self.noise_scale, f"at least {self.length / MODES / math.sqrt(10):.3g}")

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.cells(name, self.points, self.length) for name in self.axes))

    @property
    def cells(self) -> int:
        return self.solver_points**2

    def initial(self, key: jax.Array, **parameters: Any) -> SmokeState:
        """Random smoke, fluid at rest. Nearly the same field at every `solver_points`."""

        def envelope(k):
            kept = (k * self.noise_scale / self.length) ** 2 > 0.1
            return jnp.where(kept, jnp.maximum(k, 1.0) ** (-2 * self.noise_smoothness), 0.0)

        series = fourier.random_series(key, MODES, 2, envelope)
        noise = fourier.evaluate(series / fourier.root_mean_square(series), self.solver_points)
        return SmokeState(mac.rest(self.solver_points, self.solver_points), jnp.abs(noise[..., 0]))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `viscosity` and `buoyancy` may be given, also traced. Differentiable forward only."""
        given = self.values(parameters, *self.parameters)
        size = self.length / self.solver_points
        box = Box(size, size, given["viscosity"], advection="limited", courant=0.5)

        def force(flow, smoke):
            between = (smoke[1:] + smoke[:-1]) / 2
            return jnp.zeros_like(flow.u), given["buoyancy"] * jnp.pad(between, ((1, 1), (0, 0)))

        def step(state):
            flow, smoke = mac.advance(
                box, state.flow, self.time_step, state.smoke, force,
                lambda flow, smoke: mac.tracer_rate(box, flow, smoke), self.substeps,
            )  # fmt: skip
            return SmokeState(flow, smoke)

        return step

    def observe(self, state: SmokeState) -> Float[ArrayLike, "y x 3"]:
        """Smoke, u and v: means over the stored cells."""
        fine = jnp.concatenate([state.smoke[..., None], mac.centered(state.flow)], axis=-1)
        return block_mean(fine, self.solver_points // self.points, 2)
