"""Darcy flow: the steady pressure in a random porous medium."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers.solver import STEADY, Solver, require


@dataclass(frozen=True)
class DarcyFlow(Solver):
    """-div(coefficient grad(solution)) = source on the unit square, solution = 0 on its edge.

    The coefficient follows from a Gaussian random field of covariance (-laplace + 9)^-2 with zero normal slope, as in
    Li et al. 2020 (FNO, arXiv:2010.08895, appendix A.3.2): `high` where the field is positive and `low` elsewhere, or
    the exponential of the field. The field has `modes` cosines per axis and is the same at every number of points.

    Attributes:
        points: cells per axis.
        medium: "binary", or "lognormal", whose logarithm has the standard deviation `log_deviation`.
        high, low: the two values of a binary medium.
        log_deviation: see `medium`.
        source: right-hand side.
        modes: cosines of the random field per axis.
        iterations: the most of the conjugate gradients.
    """

    points: int = 64
    medium: Literal["binary", "lognormal"] = "binary"
    high: float = 12.0
    low: float = 3.0
    log_deviation: float = 1.0
    source: float = 1.0
    modes: int = 64
    iterations: int = 1000

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    channels: ClassVar[tuple[Channel, ...]] = (Channel("solution"),)
    statics: ClassVar[tuple[Channel, ...]] = (Channel("coefficient"),)
    usual_steps: ClassVar[int] = STEADY
    meanings: ClassVar[dict[str, str]] = {"solution": "pressure", "coefficient": "permeability"}
    equation: ClassVar[str] = "-div(coefficient grad(solution)) = source"
    boundary: ClassVar[str] = "solution = 0 on the edge of the unit square"
    scheme: ClassVar[str] = "finite volumes, harmonic means, preconditioned conjugate gradients to a residual of 1e-10"
    advice: ClassVar[str] = "The conjugate gradients did not converge: raise iterations, or lower the contrast."

    def __post_init__(self):
        for name in ("points", "modes", "iterations"):
            require(getattr(self, name) >= 2 - (name == "iterations"), name, getattr(self, name), "larger")
        for name in ("high", "low", "log_deviation"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive")
        require(abs(self.source) < math.inf, "source", self.source, "finite")

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.cells(name, self.points) for name in self.axes))

    @property
    def cells(self) -> int:
        return self.points**2

    def initial(self, key: jax.Array, **parameters: Any) -> dict[str, jax.Array]:
        """A random medium and its solution: `coefficient` and `solution`, both (y, x)."""
        field = gaussian_field(key, self.points, self.modes)
        if self.medium == "binary":
            coefficient = jnp.where(field >= 0, self.high, self.low).astype(field.dtype)
        else:
            coefficient = jnp.exp(self.log_deviation * field)
        source = jnp.full_like(coefficient, self.source)
        return {"coefficient": coefficient, "solution": solve(coefficient, source, self.iterations)}

    def observe(self, state: dict[str, jax.Array]) -> Float[ArrayLike, "y x 1"]:
        return state["solution"][..., None]

    def observe_static(self, state: dict[str, jax.Array]) -> Float[ArrayLike, "y x 1"]:
        return state["coefficient"][..., None]


def gaussian_field(key: jax.Array, points: int, modes: int, shift: float = 9.0) -> Float[jax.Array, "y x"]:
    """A Gaussian random field of covariance (-laplace + shift)^-2 on the unit square, at the cell centers.

    Zero normal slope, zero mean over the square, variance one on average over the square.
    """
    wave = np.pi * np.arange(modes)
    deviation = 1 / (wave[:, None] ** 2 + wave**2 + shift)
    deviation[0, 0] = 0
    deviation /= np.sqrt(np.sum(deviation**2))
    norm = np.where(np.arange(modes) > 0, np.sqrt(2), 1)
    basis = jnp.asarray(norm * np.cos((np.arange(points)[:, None] + 0.5) / points * wave), float)
    return basis @ (jax.random.normal(key, (modes, modes), float) * deviation) @ basis.T


def solve(
    coefficient: Float[ArrayLike, "y x"], source: Float[ArrayLike, "y x"], iterations: int = 1000
) -> Float[jax.Array, "y x"]:
    """The cell values whose fluxes balance `source`; zero on the edge of the unit square.

    Conjugate gradients, preconditioned with the inverse for a constant coefficient, until the residual is 1e-10 of
    the source (1e-5 in float32); NaN when `iterations` are not enough. Differentiable: the derivative solves the same
    kind of system.
    """
    coefficient, source = jnp.asarray(coefficient), jnp.asarray(source)
    tolerance = 1e-10 if coefficient.dtype == jnp.float64 else 1e-5
    balance = conductance(coefficient)
    rows, columns = ((_sines(points), _eigenvalues(points)) for points in coefficient.shape)
    scale = 1 / (rows[1][:, None] + columns[1])

    def precondition(residual):
        left, right = (jnp.asarray(sines, residual.dtype) for sines in (rows[0], columns[0]))
        return left @ ((left.T @ residual @ right) * jnp.asarray(scale, residual.dtype)) @ right.T

    solution, _ = jax.scipy.sparse.linalg.cg(balance, source, tol=tolerance, maxiter=iterations, M=precondition)
    residual = jnp.linalg.norm(balance(solution) - source)
    return jnp.where(residual <= 10 * tolerance * jnp.linalg.norm(source), solution, jnp.nan)


def conductance(coefficient: Float[ArrayLike, "y x"]):
    """The linear map solution -> -div(coefficient grad(solution)): five points, symmetric, positive definite.

    Fluxes between neighbors use the harmonic mean of the coefficient, exact for layers; the edge is half a cell away.
    """

    def flux(solution, k, points):
        inner = 2 * k[:-1] * k[1:] / (k[:-1] + k[1:]) * (solution[1:] - solution[:-1])
        return jnp.concatenate([2 * k[:1] * solution[:1], inner, -2 * k[-1:] * solution[-1:]]) * points**2

    def balance(solution):
        rows, columns = coefficient.shape
        along_y = jnp.diff(flux(solution, coefficient, rows), axis=0)
        along_x = jnp.diff(flux(solution.T, coefficient.T, columns), axis=0).T
        return -(along_y + along_x)

    return balance


def _sines(points: int) -> np.ndarray:
    """Orthonormal eigenvectors of the second difference between cell centers, zero half a cell outside."""
    mode = np.arange(1, points + 1)
    sines = np.sin(np.pi * mode * (np.arange(points)[:, None] + 0.5) / points)
    return sines / np.linalg.norm(sines, axis=0)


def _eigenvalues(points: int) -> np.ndarray:
    return (2 * points * np.sin(np.pi * np.arange(1, points + 1) / (2 * points))) ** 2
