"""Transport of a tracer on the sphere by prescribed winds.

Air and tracer move through the faces of latitude-longitude cells (C grid). The directions are split (half a zonal, a
meridional, half a zonal step) and carry the mass of air of every cell along, so that a constant mixing ratio stays
constant; within a direction the mixing ratio is piecewise linear with van Leer's monotonized limiter (flux form on the
sphere after Lin & Rood 1996, doi:10.1175/1520-0493(1996)124<2046:MFFSLT>2.0.CO;2). Where meridians converge the zonal
steps are divided further. Mass is exact, and no new extrema appear, to rounding.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers.finite_volume import FiniteVolume, advance, monotonized
from physml.solvers.solver import Step, require

RADIUS = 6.371e6  # m, of the Earth


class Winds(NamedTuple):
    """Air through the faces of the cells; the depth of the air is one.

    zonal: `(latitude, longitude)` through the western faces, eastward, m2 s-1 (or m2 in a step).
    meridional: `(latitude + 1, longitude)` through the southern and northern faces, northward; zero at the poles.
    """

    zonal: jax.Array
    meridional: jax.Array


class Transport(NamedTuple):
    """State: mixing ratio `(latitude, longitude)`, winds per second, and the time in seconds."""

    tracer: jax.Array
    winds: Winds
    time: jax.Array


@dataclass(frozen=True)
class TracerSphere(FiniteVolume):
    """(m q)_t + div(q F) = 0 for the mixing ratio q of a tracer in air m that moves with the non-divergent flux F.

    Winds, drawn once per trajectory:
    - "random": eddies of root mean square `eddies` with a solid-body rotation of speed `jet` at the equator;
    - "rotation": a solid-body rotation of speed `jet` about an axis of random inclination;
    - "deformation": case 2 of Nair & Lauritzen 2010 (doi:10.1016/j.jcp.2010.08.014) with the highest meridional speed
      `jet`; it needs a `period`, after which the tracer returns.

    The tracer starts as a sum of `blobs` Gaussians of height 0.5 to 1 and radius 0.1 to 0.4 of the sphere's.

    Attributes:
        points: stored rows of latitude; twice as many columns of longitude.
        solver_points: rows of the solver.
        wind: see above.
        jet, eddies: speeds, m s-1.
        period: seconds in which the winds turn round and back, as cos(pi t / period); None for steady winds.
        blobs: number of initial blobs.
        time_step: seconds between stored frames.
        substeps: solver steps per stored frame; None for as many as stability needs.
        precision: of the computation. Files hold float32.
    """

    points: int = 32
    solver_points: int = 64
    wind: Literal["random", "rotation", "deformation"] = "random"
    jet: float = 15.0
    eddies: float = 10.0
    period: float | None = None
    blobs: int = 6
    time_step: float = 21600.0
    substeps: int | None = None
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("latitude", "longitude")
    channels: ClassVar[tuple[Channel, ...]] = (Channel("tracer"),)
    statics: ClassVar[tuple[Channel, ...]] = (Channel("u", "m s-1"), Channel("v", "m s-1"))
    usual_steps: ClassVar[int] = 40
    time_unit: ClassVar[str] = "s"
    meanings: ClassVar[dict[str, str]] = {
        "tracer": "mixing ratio", "u": "eastward wind at time zero", "v": "northward wind at time zero",
    }  # fmt: skip
    equation: ClassVar[str] = "q_t + wind . grad(q) = 0, in flux form; wind(t) = wind(0) cos(pi t / period), or steady"
    boundary: ClassVar[str] = "sphere"
    scheme: ClassVar[str] = "finite volumes, split directions, linear with the monotonized central limiter"

    def __post_init__(self):
        super().__post_init__()
        for name in ("jet", "eddies"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "zero or positive")
        require(self.period is None or 0 < self.period < math.inf, "period", self.period, "positive, or left out")
        require(self.blobs >= 1, "blobs", self.blobs, "at least 1")
        if self.wind == "deformation" and self.period is None:
            raise ConfigError("The winds of 'deformation' turn round, so they need a period. Set one, in seconds.")

    @property
    def grid(self) -> Grid:
        sphere = Sphere(self.points)
        weights = tuple(sphere.areas[:, 0] / sphere.areas.mean())
        latitude, longitude = (tuple(np.degrees(centers).tolist()) for centers in sphere.centers)
        return Grid((
            Axis("latitude", latitude, weights, unit="degrees_north"),
            Axis("longitude", longitude, periodic=True, unit="degrees_east"),
        ))  # fmt: skip

    @property
    def cells(self) -> int:
        return 2 * self.solver_points**2

    def initial(self, key: jax.Array, **parameters: Any) -> Transport:
        """Random blobs and winds; the same fields at every `solver_points`."""
        sphere = Sphere(self.solver_points)
        first, second = jax.random.split(key)
        corner, center = (_positions(*axes) for axes in (sphere.corners, sphere.centers))
        axis = jax.random.uniform(second, (), float, -1, 1)
        if self.wind == "deformation":
            stream = deformation_stream(corner, self.jet)
        elif self.wind == "rotation":
            stream = rotation_stream(corner, self.jet, jnp.arccos(axis))
        else:
            stream = rotation_stream(corner, self.jet, 0.0) + eddy_stream(second, corner, self.eddies)
        keys = jax.random.split(first, 3)
        middle = jax.random.normal(keys[0], (self.blobs, 3), float)
        middle = middle / jnp.linalg.norm(middle, axis=1, keepdims=True)
        height = jax.random.uniform(keys[1], (self.blobs,), float, 0.5, 1)
        radius = jax.random.uniform(keys[2], (self.blobs,), float, 0.1, 0.4)
        squared = jnp.sum((center[..., None, :] - middle) ** 2, axis=-1)  # of the chord
        tracer = jnp.sum(height * jnp.exp(-squared / radius**2), axis=-1)
        return Transport(tracer, face_fluxes(stream), jnp.zeros((), tracer.dtype))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step; `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "time_step")
        sphere = Sphere(self.solver_points)

        def step(state):
            mass = jnp.broadcast_to(jnp.asarray(sphere.areas, state.tracer.dtype), state.tracer.shape)
            longest = stable_step(mass, state.winds)

            def substep(state, dt):
                middle = state.time + dt / 2
                factor = 1.0 if self.period is None else jnp.cos(jnp.pi * middle / self.period)
                moved = jax.tree.map(lambda wind: factor * dt * wind, state.winds)
                tracer, _ = transport(state.tracer, mass, moved)
                return state._replace(tracer=tracer, time=state.time + dt)

            return advance(substep, lambda state, left: longest, state, given["time_step"], self.substeps)

        return step

    def observe(self, state: Transport) -> Float[ArrayLike, "latitude longitude 1"]:
        """The mean mixing ratio of the air in every stored cell."""
        return self._mean(state.tracer)[..., None]

    def observe_static(self, state: Transport) -> Float[ArrayLike, "latitude longitude 2"]:
        """Eastward and northward wind, means over the stored cells."""
        return jnp.stack([self._mean(wind) for wind in cell_winds(state.winds)], axis=-1)

    def _mean(self, field: jax.Array) -> jax.Array:
        areas = jnp.asarray(Sphere(self.solver_points).areas, field.dtype)
        return self.coarsen(areas * field) / self.coarsen(jnp.broadcast_to(areas, field.shape))


class Sphere(NamedTuple):
    """The cells of `rows` latitudes and twice as many longitudes, equal angles; radians and m2."""

    rows: int

    @property
    def centers(self) -> tuple[np.ndarray, np.ndarray]:
        half = np.pi / self.rows / 2
        return self.corners[0][:-1] + half, self.corners[1] + half

    @property
    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Southern and western edges; latitude also has the last northern one."""
        return np.linspace(-np.pi / 2, np.pi / 2, self.rows + 1), np.arange(2 * self.rows) * (np.pi / self.rows)

    @property
    def areas(self) -> np.ndarray:
        """`(rows, 1)`."""
        return np.diff(np.sin(self.corners[0]))[:, None] * (np.pi / self.rows) * RADIUS**2


def face_fluxes(stream: Float[ArrayLike, "edges longitude"]) -> Winds:
    """The non-divergent winds of a stream function (m2 s-1) at the corners: u = -d psi/dy, v = d psi/dx."""
    stream = jnp.asarray(stream)
    # One value at each pole, although rounding makes a few.
    stream = stream.at[0].set(stream[0, 0]).at[-1].set(stream[-1, 0])
    return Winds(-jnp.diff(stream, axis=0), jnp.roll(stream, -1, axis=1) - stream)


def cell_winds(winds: Winds) -> tuple[jax.Array, jax.Array]:
    """Eastward and northward wind (m s-1), averaged from the faces of every cell."""
    rows = winds.zonal.shape[0]
    edge = RADIUS * np.pi / rows
    parallel = edge * np.cos(Sphere(rows).corners[0])
    lengths = jnp.asarray((parallel[1:] + parallel[:-1])[:, None], winds.zonal.dtype)
    u = (winds.zonal + jnp.roll(winds.zonal, -1, axis=1)) / (2 * edge)
    return u, (winds.meridional[1:] + winds.meridional[:-1]) / lengths


def stable_step(mass: Float[ArrayLike, "latitude longitude"], winds: Winds) -> jax.Array:
    """The longest step in which `transport` empties no cell: seconds, for winds per second without divergence."""
    zonal, south, north = winds.zonal, winds.meridional[:-1], winds.meridional[1:]
    east = jnp.roll(zonal, -1, axis=1)
    leaving = jnp.maximum(east, 0) - jnp.minimum(zonal, 0)
    divided = jnp.asarray(_divisions(mass.shape[0]), mass.dtype)[:, None]
    along = jnp.max(leaving / mass / divided)
    across = jnp.maximum(jnp.maximum(north, 0) - jnp.minimum(south, 0), jnp.maximum(south, 0) - jnp.minimum(north, 0))
    # After half a zonal step a cell holds at least 1 - a / 2 of its air if a is what the meridional step exchanges;
    # that step may take a <= 2/3, and the halves of the zonal one 2 - a.
    return 1 / jnp.maximum(jnp.max(across / mass) * 1.5, along * 0.75)


def transport(
    tracer: Float[ArrayLike, "latitude longitude"],
    mass: Float[ArrayLike, "latitude longitude"],
    moved: Winds,
    source: ArrayLike = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """One step: the mixing ratio and the air of every cell after it.

    Args:
        tracer: mixing ratio.
        mass: of air in each cell, any unit.
        moved: air that passes the faces during the step, in that unit; it must not empty a cell (see `stable_step`).
        source: change of the mixing ratio by sources during the step; half acts before the transport, half after.

    sum(mass * tracer) changes by sum((mass before + mass after) / 2 * source).
    """
    half = moved.zonal / 2
    tracer, mass = _zonal(tracer + source / 2, mass, half)
    tracer, mass = _meridional(tracer, mass, moved.meridional)
    tracer, mass = _zonal(tracer, mass, half)
    return tracer + source / 2, mass


def _divisions(rows: int) -> np.ndarray:
    """Into how many parts a zonal step is divided in each row: the power of 2 that cells are narrower than at 0."""
    return 2 ** np.floor(np.log2(1 / np.cos(Sphere(rows).centers[0]))).astype(int)


def _zonal(tracer: jax.Array, mass: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves air `moved` through the western faces; rows with the same number of divisions together."""

    def once(_, carry, moved):
        tracer, mass = carry
        west, east = jnp.roll(tracer, 1, axis=1), jnp.roll(tracer, -1, axis=1)
        slope = monotonized(tracer - west, east - tracer)
        before = west, jnp.roll(mass, 1, axis=1), jnp.roll(slope, 1, axis=1)
        carried = _carried(moved, before, (tracer, mass, slope))
        return _settle(tracer, mass, moved, jnp.roll(moved, -1, axis=1), carried, jnp.roll(carried, -1, axis=1))

    divisions = _divisions(tracer.shape[0])
    for number in np.unique(divisions):
        rows = np.flatnonzero(divisions == number)
        share = moved[rows] / int(number)
        carry = jax.lax.fori_loop(
            0, int(number), lambda i, carry, share=share: once(i, carry, share), (tracer[rows], mass[rows])
        )
        tracer, mass = tracer.at[rows].set(carry[0]), mass.at[rows].set(carry[1])
    return tracer, mass


def _meridional(tracer: jax.Array, mass: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves air `moved` through the southern and northern faces."""
    across = tracer.shape[1] // 2  # columns to the other side of the pole
    first, last = (jnp.roll(row, across, axis=1) for row in (tracer[:1], tracer[-1:]))
    difference = jnp.diff(jnp.concatenate([first, tracer, last]), axis=0)
    slope = monotonized(difference[:-1], difference[1:])
    below, above = ((tracer[cut], mass[cut], slope[cut]) for cut in (slice(None, -1), slice(1, None)))
    inner = _carried(moved[1:-1], below, above)
    carried = jnp.pad(inner, ((1, 1), (0, 0)))
    return _settle(tracer, mass, moved[:-1], moved[1:], carried[:-1], carried[1:])


def _carried(moved: jax.Array, before: tuple, after: tuple) -> jax.Array:
    """Tracer in the air `moved` from the cells `before` the faces to those `after`: (tracer, mass, slope) each.

    It is the mean over that part of the linear profile next to the face which leaves.
    """
    (q0, m0, s0), (q1, m1, s1) = before, after
    forward, backward = q0 + (1 - moved / m0) * s0 / 2, q1 - (1 + moved / m1) * s1 / 2
    return moved * jnp.where(moved > 0, forward, backward)


def _settle(tracer, mass, entered, left, gained, lost) -> tuple[jax.Array, jax.Array]:
    after = mass + entered - left
    return (mass * tracer + gained - lost) / after, after


def _positions(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Points of the unit sphere, `(latitude, longitude, 3)`."""
    cos, sin = np.cos(latitude)[:, None], np.sin(latitude)[:, None]
    parts = cos * np.cos(longitude), cos * np.sin(longitude), sin * np.ones_like(longitude)
    return np.stack(parts, axis=-1)


def rotation_stream(position: ArrayLike, speed: float, angle: ArrayLike) -> jax.Array:
    """Solid-body rotation (m s-1 at its equator) about an axis `angle` away from the pole.

    Williamson et al. 1992, doi:10.1016/S0021-9991(05)80016-6, case 1; positions on the unit sphere.
    """
    return -RADIUS * speed * (position[..., 2] * jnp.cos(angle) - position[..., 0] * jnp.sin(angle))


def deformation_stream(position: ArrayLike, speed: float) -> jax.Array:
    """Two vortices that stretch what is between them: speed R sin(longitude)^2 cos(latitude)^2, at time zero.

    Nair & Lauritzen 2010, case 2, where speed is 2 R per unit of time and the period 5.
    """
    return RADIUS * speed * jnp.asarray(position[..., 1]) ** 2


def eddy_stream(key: jax.Array, position: ArrayLike, speed: float, waves: int = 24, number: float = 4.0) -> jax.Array:
    """Random eddies of root mean square `speed` (m s-1): plane waves in space, seen on the sphere.

    Statistically the same everywhere, and smooth at the poles. Around `number` wavelengths go round the sphere.
    """
    first, second, third = jax.random.split(key, 3)
    vector = number * jax.random.normal(first, (waves, 3), float) / math.sqrt(3)
    phase = jax.random.uniform(second, (waves,), float, 0, 2 * jnp.pi)
    height = jax.random.normal(third, (waves,), float)
    # Two thirds of the squared gradient in space lie along the sphere, half of it on average over the phase.
    height = height * speed * RADIUS / jnp.sqrt(jnp.sum(height**2 * jnp.sum(vector**2, axis=1)) / 3)
    return jnp.sum(height * jnp.cos(position @ vector.T + phase), axis=-1)
