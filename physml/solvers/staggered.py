"""Forced two-dimensional flow on few cells: finite volumes on a periodic staggered grid, and learned corrections to it.

A state holds means of the velocity over the sides of cells, `(y, x, 2)`: u over the right one, v over the upper one
(Harlow & Welch 1965, doi:10.1063/1.1761178), so that the net outflow of a cell is exact. Momentum flows between the
cells around those sides; what is transported is taken upwind with the limiter of van Leer, the transporting velocity is
a mean of two, whose control volumes lose nothing either. Time: Heun's method (two stages) in the integrating factor of
viscosity and drag (Lawson 1967, doi:10.1137/0704033), each stage projected in Fourier space. Of second order where the
limiter is at rest; momentum changes by force and drag alone.

A learned interpolation (Kochkov et al. 2021, doi:10.1073/pnas.2101784118) adds multiples of the neighbors to what is
transported; see `StaggeredFlow.march`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers import fourier
from physml.solvers.mac import limited
from physml.solvers.solver import Range, Solver, Step, check_parameters, check_time, require

FLUXES = 4  # of u along x and y, of v along x and y
X, Y = 1, 0  # axes of a component


@dataclass(frozen=True)
class StaggeredFlow(Solver):
    """u_t + div(u u) = -grad(p) + viscosity laplace(u) - drag u + forcing_scale sin(2 pi forcing_mode y / length) e_x.

    The equation of `Kolmogorov` on [0, length)^2, by a method that stays usable where the flow is not resolved: a
    coarse solver to be corrected by a network. `forcing_scale=0, drag=0` leaves the decaying Navier-Stokes equations.
    Stable up to a Courant number of about one, summed over both axes.

    Attributes:
        points: cells per axis, of the solver and stored.
        length: period of both axes.
        viscosity: number, or (low, high) to draw one per trajectory.
        drag: likewise; positive drag dissipates.
        forcing_scale: amplitude of the force, likewise.
        forcing_mode: periods of the force in the box.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period and axis) of the random initial state.
        initial_speed: root mean square of its velocity.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    length: float = fourier.TAU
    viscosity: Range = 1e-2
    drag: Range = 0.1
    forcing_scale: Range = 1.0
    forcing_mode: int = 4
    time_step: float = 0.1
    substeps: int = 8
    warmup: float = 0.0
    initial_modes: int = 6
    initial_speed: float = 1.0
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"), Channel("v"))
    parameters: ClassVar[tuple[str, ...]] = ("viscosity", "drag", "forcing_scale")
    meanings: ClassVar[dict[str, str]] = {"u": "velocity along x", "v": "velocity along y"}
    equation: ClassVar[str] = (
        "u_t + div(u u) = -grad(p) + viscosity laplace(u) - drag u "
        "+ forcing_scale sin(2 pi forcing_mode y / length) e_x, div u = 0"
    )
    boundary: ClassVar[str] = "periodic"
    scheme: ClassVar[str] = "finite volumes on a staggered grid, van Leer limiter, Lawson-Heun, exact projection"
    usual_steps: ClassVar[int] = 100
    advice: ClassVar[str] = "Raise substeps or the viscosity."

    def __post_init__(self):
        check_time(self)
        check_parameters(self)
        for name in ("length", "initial_speed"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive")
        require(self.points >= 8 and self.points % 2 == 0, "points", self.points, "even and at least 8")
        for name in ("initial_modes", "forcing_mode"):
            most = self.points // 2 - 1
            require(1 <= getattr(self, name) <= most, name, getattr(self, name), f"from 1 to points / 2 - 1 = {most}")

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.uniform(name, self.points, self.length) for name in self.axes))

    @property
    def solver_points(self) -> int:
        """Cells of the solver per axis: all are stored."""
        return self.points

    @property
    def cells(self) -> int:
        return self.points**2

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 2"]:
        """A random smooth flow without divergence, of zero mean; the same flow for every `points`."""
        return project(to_faces(fourier.velocity_of(fourier.random_vorticity(self, key), self.length)))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `viscosity`, `drag`, `forcing_scale` and `time_step` may be given, also traced."""
        given = self.values(parameters, *self.parameters, "time_step")
        step = given.pop("time_step") / self.substeps

        def stored_step(state):
            state = jnp.asarray(state)
            if state.shape != (self.points, self.points, 2):
                raise fourier.wrong_shape(state.shape, (self.points, self.points, 2))
            return self.march(state, self.substeps, step, **given)

        return stored_step

    def march(
        self,
        faces: Float[ArrayLike, "y x 2"],
        steps: int,
        time_step: Any,
        deviations: Float[ArrayLike, "y x 4 taps"] | None = None,
        **parameters: Any,
    ) -> Float[Array, "y x 2"]:
        """The state after `steps` solver steps, in one `lax.scan`.

        Args:
            deviations: what is added to the interpolation of the four fluxes `transported` describes: multiples of the
                `taps` neighbors, an even number, half of them on either side. Their sum must be zero at every place, or
                else a uniform flow does not stay one. They hold for all steps.
            parameters: of the solver where they are not the config's.
        """
        given = self.values(parameters, *self.parameters)
        faces = jnp.asarray(faces)
        spacing = self.length / self.points
        ky, kx = _wavenumbers(self.points)
        decay = jnp.asarray((2 * np.pi / self.length) ** 2 * (ky**2 + kx**2), faces.dtype)
        damping = jnp.exp(-(given["viscosity"] * decay + given["drag"]) * time_step).astype(faces.dtype)[..., None]
        force = (given["forcing_scale"] * jnp.asarray(self._force(), faces.dtype))[:, None]

        def change(spectrum):
            rates = momentum_rates(_from_spectrum(spectrum, faces), spacing, deviations)
            rates = rates.at[..., 0].add(force)
            return (time_step * _to_spectrum(rates)).astype(spectrum.dtype)

        def step(spectrum, _):
            first = change(spectrum)
            guess = _projected(damping * (spectrum + first))
            moved = damping * (spectrum + first / 2) + change(guess) / 2
            return _projected(moved), None

        start = _projected(_to_spectrum(faces))
        return _from_spectrum(jax.lax.scan(step, start, length=steps)[0], faces)

    def _force(self) -> np.ndarray:
        """The unit force on u `(y,)`: a mean over the side of a cell."""
        phase = 2 * np.pi * self.forcing_mode * np.arange(self.points) / self.points
        return np.sin(phase) * np.sinc(self.forcing_mode / self.points)

    def observe(self, state: Float[ArrayLike, "y x 2"]) -> Float[ArrayLike, "y x 2"]:
        """The velocity at the points of the grid, the centers of the cells. Its Fourier series has no divergence."""
        return to_points(state)

    def resume(self, frame: Float[ArrayLike, "y x 2"], **parameters: Any) -> Float[ArrayLike, "y x 2"]:
        """The velocity on the sides of the cells, without its divergence."""
        return project(to_faces(jnp.asarray(frame)))


# --- fluxes -----------------------------------------------------------------------------------------------------------


def momentum_rates(
    faces: Float[Array, "y x 2"], spacing: Any, deviations: Float[ArrayLike, "y x 4 taps"] | None = None
) -> Float[Array, "y x 2"]:
    """-div(u u): what flows into the control volume around each side of the cells, through its own four sides."""
    rates = []
    for component in (0, 1):
        rate = 0.0
        for axis in (X, Y):
            weights = None if deviations is None else deviations[..., 2 * component + (axis == Y), :]
            flux = transported(faces, component, axis, weights)
            rate = rate - (flux - _shifted(flux, -1, axis)) / spacing
        rates.append(rate)
    return jnp.stack(rates, axis=-1)


def transported(
    faces: Float[Array, "y x 2"], component: int, axis: int, deviations: Float[ArrayLike, "y x taps"] | None = None
) -> Float[Array, "y x"]:
    """Momentum `component` that flows along `axis`, from each control volume into the next one.

    For `deviations` see `StaggeredFlow.march`; tap t is the neighbor `t - taps / 2 + 1` control volumes further along.
    """
    field, along = faces[..., component], faces[..., 0 if axis == X else 1]
    speed = (along + _shifted(along, 1, X if component == 0 else Y)) / 2
    taps = [_shifted(field, offset, axis) for offset in (-1, 0, 1, 2)]
    value = limited(*taps, speed)
    if deviations is not None:
        count = deviations.shape[-1]
        neighbors = [_shifted(field, t - count // 2 + 1, axis) for t in range(count)]
        value = value + jnp.sum(jnp.stack(neighbors, axis=-1) * deviations, axis=-1)
    return speed * value


def outflow(faces: Float[ArrayLike, "y x 2"], spacing: Any) -> Float[Array, "y x"]:
    """The divergence: net outflow of every cell."""
    u, v = faces[..., 0], faces[..., 1]
    return (u - _shifted(u, -1, X) + v - _shifted(v, -1, Y)) / spacing


def _shifted(field, places: int, axis: int):
    """The value `places` further along `axis`, at every place."""
    return jnp.roll(field, -places, axis) if places else field


# --- from points to faces and back ------------------------------------------------------------------------------------


def to_faces(velocity: Float[ArrayLike, "y x 2"]) -> Float[Array, "y x 2"]:
    """Means over the sides of cells from values at their centers, exact for Fourier series; Nyquist modes are dropped.

    A Fourier series without divergence gives cells without net outflow.
    """
    return _moved(velocity, lambda factor: factor)


def to_points(faces: Float[ArrayLike, "y x 2"]) -> Float[Array, "y x 2"]:
    """Undoes `to_faces`."""
    return _moved(faces, lambda factor: 1 / factor)


def _moved(field, change):
    field = jnp.asarray(field)
    points = field.shape[0]
    ky, kx = _wavenumbers(points)

    def factor(along, across):
        half = np.exp(1j * np.pi * along / points) * np.sinc(across / points)
        return np.where(_inside(points), change(half), 0)

    factors = np.stack([factor(kx, ky), factor(ky, kx)], axis=-1)
    spectrum = _to_spectrum(field)
    return _from_spectrum(spectrum * jnp.asarray(factors, spectrum.dtype), field)


def project(faces: Float[ArrayLike, "y x 2"]) -> Float[Array, "y x 2"]:
    """The nearest field without net outflow of any cell, and without Nyquist modes."""
    faces = jnp.asarray(faces)
    return _from_spectrum(_projected(_to_spectrum(faces)), faces)


def _projected(spectrum):
    """A spectrum `(ky, kx, 2)` without its part along the gradient, which differences between cells make.

    Nyquist modes, of which half a cell further on nothing is seen, are left out: frames could not hold them.
    """
    points = spectrum.shape[0]
    ky, kx = np.broadcast_arrays(*_wavenumbers(points))
    gradient = np.stack([np.exp(2j * np.pi * k / points) - 1 for k in (kx, ky)], axis=-1)
    length = np.sqrt(np.sum(np.abs(gradient) ** 2, axis=-1, keepdims=True))
    unit = jnp.asarray(gradient / np.where(length == 0, 1, length), spectrum.dtype)
    inside = _inside(points)[..., None]
    return inside * (spectrum - unit * jnp.sum(unit.conj() * spectrum, axis=-1, keepdims=True))


def _to_spectrum(field):
    return jnp.fft.rfft2(field, axes=(0, 1))


def _from_spectrum(spectrum, like):
    return jnp.fft.irfft2(spectrum, s=like.shape[:2], axes=(0, 1)).astype(like.dtype)


def _inside(points: int) -> np.ndarray:
    """Whether a mode is below the Nyquist modes of both axes."""
    ky, kx = _wavenumbers(points)
    return (2 * np.abs(ky) < points) & (2 * kx < points)


def _wavenumbers(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Cycles per period of the modes of `rfft2`: `(ky, 1)` and `(1, kx)`."""
    return np.fft.fftfreq(points, 1 / points)[:, None], np.arange(points // 2 + 1)[None, :] * 1.0
