"""Incompressible flow in a rectangle with walls: staggered grid, exact projection. Harlow & Welch 1965.

Space (doi:10.1063/1.1761178): u lies on the faces between cells along x, `(ny, nx + 1)`, v on those along y,
`(ny + 1, nx)`, pressure in the cells `(ny, nx)`; boundary faces are stored, on a periodic axis the first face twice.
Second-order central differences conserve energy; `limited` ones (van Leer) do not overshoot. Time: the three-stage
SSP Runge-Kutta method of Shu & Osher 1988 (doi:10.1016/0021-9991(88)90177-5). Each stage is projected by a
direct Poisson solve (cosine or Fourier transforms), for the change of the pressure only.

The time step follows from the state, so a stored step is a `while_loop`: derivatives go forward (`jax.jvp`) through it,
not backward. Everything is pure and computes in the precision of the state; sizes and viscosity may be traced.

Obstacles are cells of no velocity ("stair steps"): the velocity on their faces is put to zero before every projection.
The projection pushes a little back through them, but, as it only solves for the change of the pressure, that vanishes
as the flow becomes steady.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.fields import ArrayLike
from physml.solvers.finite_volume import van_leer

LARGEST_SUBSTEPS = 100_000  # in one call of `advance`: a state that explodes ends as NaN, not in an endless loop


@dataclass(frozen=True)
class Side:
    """What holds on one side of the rectangle. Make it with `wall`, `free_slip`, `inflow`, `outflow`, `periodic`."""

    kind: Literal["fixed", "slip", "open", "periodic"]
    normal: Any = 0.0
    tangent: Any = 0.0


def wall(speed: Any = 0.0) -> Side:
    """No slip; the wall slides with `speed` along the other axis."""
    return Side("fixed", 0.0, speed)


def free_slip() -> Side:
    """No flow through it, no friction."""
    return Side("slip")


def inflow(profile: Any) -> Side:
    """Prescribed velocity along the axis that crosses the side (a number, or one for each face); none along it."""
    return Side("fixed", profile, 0.0)


def outflow() -> Side:
    """Velocity without gradient, shifted so that as much leaves as comes in."""
    return Side("open")


def periodic() -> Side:
    """Neighbor of the opposite side, which must be periodic too."""
    return Side("periodic")


class Flow(NamedTuple):
    """Velocity on faces and pressure divided by density, up to a constant, in cells."""

    u: Float[ArrayLike, "ny nx+1"]
    v: Float[ArrayLike, "ny+1 nx"]
    p: Float[ArrayLike, "ny nx"]


@dataclass(frozen=True)
class Box:
    """The rectangle, its fluid and its boundary.

    Attributes:
        dx, dy: size of a cell; may be traced.
        viscosity: kinematic; may be traced.
        left, right, bottom, top: sides.
        solid: faces without velocity, boolean `(ny, nx + 1)` and `(ny + 1, nx)`, or None.
        advection: "central" or "limited".
        speed: a speed that limits the time step even while the flow is slower, e.g. that of a moving wall.
        courant: largest sum of the Courant numbers along x and y. 1 is stable; a positive tracer needs 0.5.
    """

    dx: Any
    dy: Any
    viscosity: Any
    left: Side = wall()
    right: Side = wall()
    bottom: Side = wall()
    top: Side = wall()
    solid: Any = None
    advection: Literal["central", "limited"] = "central"
    speed: Any = 0.0
    courant: float = 1.0


def rest(ny: int, nx: int, u: Any = 0.0) -> Flow:
    """Uniform velocity along x."""
    zero = jnp.zeros((ny, nx), float)
    return Flow(jnp.zeros((ny, nx + 1), float) + u, jnp.zeros((ny + 1, nx), float), zero)


def advance(
    box: Box,
    flow: Flow,
    duration: Any,
    carried: Any = None,
    force: Callable | None = None,
    rate: Callable | None = None,
    least: int = 1,
) -> tuple[Flow, Any]:
    """The state `duration` later, in as many steps as stability needs.

    Args:
        box: where it flows.
        flow: velocity without divergence, and the pressure.
        duration: time to cover.
        carried: other arrays that change with the flow (a tracer), or None.
        force: (flow, carried) -> accelerations on the faces of u and of v.
        rate: (flow, carried) -> time derivative of `carried`.
        least: steps that are taken even where stability needs fewer.
    """
    duration = jnp.asarray(duration, flow.u.dtype)

    def step(loop):
        left, flow, carried = loop
        limit = jnp.clip(time_limit(box, flow), duration / LARGEST_SUBSTEPS, duration / least)
        dt = left / jnp.maximum(jnp.ceil(left / limit), 1)
        flow, carried = _runge_kutta(box, flow, carried, dt, force, rate)
        return left - dt, flow, carried

    _, flow, carried = jax.lax.while_loop(lambda loop: loop[0] > 0, step, (duration, flow, carried))
    return flow, carried


def time_limit(box: Box, flow: Flow) -> jax.Array:
    """The longest stable time step."""
    u = jnp.maximum(jnp.max(jnp.abs(flow.u)), box.speed)
    advection = u / box.dx + jnp.maximum(jnp.max(jnp.abs(flow.v)), box.speed) / box.dy
    diffusion = 2 * box.viscosity * (1 / box.dx**2 + 1 / box.dy**2)
    return (1 / (advection / box.courant + diffusion + jnp.finfo(flow.u.dtype).tiny)).astype(flow.u.dtype)


def start(box: Box, flow: Flow, passes: int = 100) -> Flow:
    """The velocity without divergence that an impulse makes of `flow`, which then flows around the obstacles."""
    pressure = jnp.zeros_like(flow.p)

    def body(_, pressure):
        u, v = _bound(box, *_stop(box, *_minus_gradient(box, flow.u, flow.v, pressure)))
        return pressure + _poisson(box, divergence(box, u, v))

    if box.solid is not None:
        pressure = jax.lax.fori_loop(0, passes, body, pressure)
    u, v = _minus_gradient(box, flow.u, flow.v, pressure)
    return project(box, *_stop(box, u, v), jnp.zeros_like(pressure), 1.0)._replace(p=jnp.zeros_like(pressure))


def project(box: Box, u: jax.Array, v: jax.Array, p: jax.Array, dt: Any) -> Flow:
    """Velocity with the boundary values and without divergence, and the pressure that did it within `dt`, added."""
    u, v = _bound(box, u, v)
    change = _poisson(box, divergence(box, u, v))
    u, v = _minus_gradient(box, u, v, change)
    return Flow(u, v, p + change / dt)


def divergence(box: Box, u: jax.Array, v: jax.Array) -> jax.Array:
    """Net outflow of every cell, `(ny, nx)`."""
    return jnp.diff(u, axis=1) / box.dx + jnp.diff(v, axis=0) / box.dy


def centered(flow: Flow) -> jax.Array:
    """(u, v) in the cells, `(ny, nx, 2)`."""
    return jnp.stack([(flow.u[:, 1:] + flow.u[:, :-1]) / 2, (flow.v[1:] + flow.v[:-1]) / 2], axis=-1)


def limited(before: jax.Array, left: jax.Array, right: jax.Array, after: jax.Array, speed: jax.Array) -> jax.Array:
    """The upwind value between two cells, corrected to second order where that makes no new extremum (van Leer)."""

    def value(far, near, next_):
        return near + van_leer(near - far, next_ - near) / 2

    return jnp.where(speed > 0, value(before, left, right), value(after, right, left))


def tracer_rate(box: Box, flow: Flow, tracer: jax.Array) -> jax.Array:
    """Time derivative `(ny, nx)` of a tracer that goes with the flow; none crosses a side that is not periodic.

    Fluxes between cells, so its sum is exact; positive where the Courant numbers of a step sum to at most 1/2.
    """

    def fluxes(tracer, u, sides):
        padded = _wrap_or_edge(tracer, sides, 2)
        return u * limited(padded[:, :-3], padded[:, 1:-2], padded[:, 2:-1], padded[:, 3:], u)

    along_x = fluxes(tracer, flow.u, (box.left, box.right))
    along_y = fluxes(tracer.T, flow.v.T, (box.bottom, box.top)).T
    return -jnp.diff(along_x, axis=1) / box.dx - jnp.diff(along_y, axis=0) / box.dy


# --- one step ---------------------------------------------------------------------------------------------------------


def _runge_kutta(box, flow, carried, dt, force, rate):
    """u1 = S(u), u2 = 3/4 u + 1/4 S(u1), u3 = 1/3 u + 2/3 S(u2), where S is an Euler step; each one projected."""
    start, p = (flow.u, flow.v, carried), flow.p

    def stage(state, old):
        flow, carried = state
        du, dv = _accelerations(box, flow)
        if force is not None:
            fu, fv = force(flow, carried)
            du, dv = du + fu, dv + fv
        du, dv = _minus_gradient(box, du, dv, p)
        change = du, dv, carried if rate is None else rate(flow, carried)
        u, v, carried = jax.tree.map(
            lambda a, b, d: old * a + (1 - old) * (b + dt * d), start, (flow.u, flow.v, carried), change
        )
        return (project(box, *_stop(box, u, v), p, (1 - old) * dt), carried), None

    return jax.lax.scan(stage, (flow, carried), jnp.asarray([0, 3 / 4, 1 / 3], p.dtype))[0]


def _stop(box, u, v):
    """Without the velocity on the faces of obstacles."""
    return (u, v) if box.solid is None else (jnp.where(box.solid[0], 0, u), jnp.where(box.solid[1], 0, v))


def _accelerations(box, flow):
    """Advection and diffusion, on all faces; those of the boundary are overwritten afterwards."""
    x, y = (box.left, box.right), (box.bottom, box.top)
    du = _acceleration(box, flow.u, flow.v, box.dx, box.dy, x, y)
    dv = _acceleration(box, flow.v.T, flow.u.T, box.dy, box.dx, y, x).T
    return du, dv


def _acceleration(box, u, v, dx, dy, x, y):
    """Of u `(ny, nx + 1)`, the component along the second axis; `x` and `y` are the pairs of sides of the axes."""
    along, across = _faces(u, x), _ghosts(u, y, 2)  # two more at each end
    corner = _ghosts(v.T, x, 1).T
    corner = (corner[:, 1:] + corner[:, :-1]) / 2  # of v at the corners
    # XLA would otherwise pad again in every loop that reads these: half of the time of a step on a CPU.
    along, across, corner = jax.lax.optimization_barrier((along, across, corner))
    center = (along[:, 2:-1] + along[:, 1:-2]) / 2  # the advecting velocity in the cells -1 .. nx
    if box.advection == "limited":
        flux_x = center * limited(along[:, :-3], along[:, 1:-2], along[:, 2:-1], along[:, 3:], center)
        flux_y = corner * limited(across[:-3], across[1:-2], across[2:-1], across[3:], corner)
    else:
        flux_x = center * center
        flux_y = corner * (across[1:-2] + across[2:-1]) / 2
    flux_x = flux_x - box.viscosity / dx * jnp.diff(along[:, 1:-1], axis=1)
    flux_y = flux_y - box.viscosity / dy * jnp.diff(across[1:-1], axis=0)
    flux_x, flux_y = jax.lax.optimization_barrier((flux_x, flux_y))
    return -jnp.diff(flux_x, axis=1) / dx - jnp.diff(flux_y, axis=0) / dy


def _faces(u, sides):
    """u with two more columns of faces at both ends, along its own axis."""
    if sides[0].kind == "periodic":
        return jnp.concatenate([u[:, -3:-1], u, u[:, 1:3]], axis=1)
    return jnp.pad(u, ((0, 0), (2, 2)), mode="edge")


def _ghosts(u, sides, count):
    """u with `count` more rows beyond both sides that it runs along: the mean across a wall is the wall's velocity."""
    if sides[0].kind == "periodic":
        return jnp.concatenate([u[-count:], u, u[:count]])
    low, high = u[:count][::-1], u[-count:][::-1]
    low = 2 * sides[0].tangent - low if sides[0].kind == "fixed" else low
    high = 2 * sides[1].tangent - high if sides[1].kind == "fixed" else high
    return jnp.concatenate([low.astype(u.dtype), u, high.astype(u.dtype)])


def _wrap_or_edge(field, sides, count):
    return jnp.pad(field, ((0, 0), (count, count)), mode="wrap" if sides[0].kind == "periodic" else "edge")


def _minus_gradient(box, u, v, p):
    """u, v minus the gradient of p; nothing is taken from boundary faces, except where they are periodic."""
    along_x = jnp.diff(_wrap_or_edge(p, (box.left, box.right), 1), axis=1)
    along_y = jnp.diff(_wrap_or_edge(p.T, (box.bottom, box.top), 1), axis=1).T
    return u - along_x / box.dx, v - along_y / box.dy


def _bound(box, u, v):
    """Boundary values on the faces of the boundary; what is too little or too much leaves through the open sides."""
    u = _bound_normal(u, box.left, box.right)
    v = _bound_normal(v.T, box.bottom, box.top).T
    sides = (box.left, box.right, box.bottom, box.top)
    if not any(side.kind == "open" for side in sides):
        return u, v
    ny, nx = v.shape[0] - 1, u.shape[1] - 1
    inside = (jnp.sum(u[:, 0]) - jnp.sum(u[:, -1])) * box.dy + (jnp.sum(v[0]) - jnp.sum(v[-1])) * box.dx
    lengths = (ny * box.dy, ny * box.dy, nx * box.dx, nx * box.dx)
    excess = inside / sum(n for side, n in zip(sides, lengths, strict=True) if side.kind == "open")
    left, right, bottom, top = (excess if side.kind == "open" else 0 for side in sides)
    u = u.at[:, 0].add(-left).at[:, -1].add(right)
    return u, v.at[0].add(-bottom).at[-1].add(top)


def _bound_normal(u, low, high):
    if low.kind == "periodic":
        return u
    first = u[:, 1] if low.kind == "open" else low.normal
    last = u[:, -2] if high.kind == "open" else high.normal
    return u.at[:, 0].set(first).at[:, -1].set(last)


# --- the Poisson equation ---------------------------------------------------------------------------------------------


def _poisson(box, source):
    """The mean-free p with laplace(p) = source - <source>: no gradient across sides, or periodic."""
    wrapped = [box.left.kind == "periodic", box.bottom.kind == "periodic"]  # in the order of the transposed spectrum
    axes = [axis for axis in (0, 1) if wrapped[axis]]
    spectrum = source if wrapped[0] else cosine_transform(source)
    spectrum = spectrum.T if wrapped[1] else cosine_transform(spectrum.T)
    shape = spectrum.shape
    if axes:
        spectrum = jnp.fft.rfftn(spectrum, axes=axes)
    symbols = []
    for axis, size in ((0, box.dx), (1, box.dy)):
        angles = np.arange(spectrum.shape[axis]) * (np.pi if wrapped[axis] else np.pi / 2) / shape[axis]
        symbols.append(jnp.asarray(-4 * np.sin(angles) ** 2, source.dtype) / size**2)
    symbol = symbols[0][:, None] + symbols[1]
    spectrum = jnp.where(symbol == 0, 0, spectrum / jnp.where(symbol == 0, 1, symbol))
    if axes:
        spectrum = jnp.fft.irfftn(spectrum, s=[shape[axis] for axis in axes], axes=axes)
    spectrum = spectrum.T if wrapped[1] else inverse_cosine_transform(spectrum).T
    return (spectrum if wrapped[0] else inverse_cosine_transform(spectrum)).astype(source.dtype)


def cosine_transform(x: Float[ArrayLike, "... n"]) -> jax.Array:
    """sum_j x_j cos(pi k (j + 1/2) / n), by a Fourier transform of the same length.

    Makhoul 1980, doi:10.1109/TASSP.1980.1163351. Rows are independent, to the last bit.
    """
    n = x.shape[-1]
    spectrum = jnp.fft.rfft(jnp.concatenate([x[..., ::2], x[..., 1::2][..., ::-1]], axis=-1))
    cos, sin = _quarter_turns(n, x.dtype)
    real, imag = spectrum.real * cos + spectrum.imag * sin, spectrum.real * sin - spectrum.imag * cos
    return jnp.concatenate([real, imag[..., 1 : (n + 1) // 2][..., ::-1]], axis=-1)


def inverse_cosine_transform(x: Float[ArrayLike, "... n"]) -> jax.Array:
    """The inverse of `cosine_transform`."""
    n = x.shape[-1]
    real, half = x[..., : n // 2 + 1], (n + 1) // 2
    imag = jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., n - n // 2 :][..., ::-1]], axis=-1)
    cos, sin = _quarter_turns(n, x.dtype)
    mixed = jnp.fft.irfft(jax.lax.complex(real * cos + imag * sin, real * sin - imag * cos), n=n)
    even, odd = mixed[..., :half], mixed[..., half:][..., ::-1]
    odd = jnp.pad(odd, [(0, 0)] * (x.ndim - 1) + [(0, n % 2)])
    return jnp.stack([even, odd], axis=-1).reshape(*x.shape[:-1], 2 * half)[..., :n]


def _quarter_turns(n, dtype):
    angles = np.arange(n // 2 + 1) * np.pi / 2 / n
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)
