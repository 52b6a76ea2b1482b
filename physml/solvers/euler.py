"""The compressible Euler equations of an ideal gas in two dimensions.

Finite volumes: limited linear reconstruction of density, velocity and pressure (MUSCL; van Leer 1979,
doi:10.1016/0021-9991(79)90145-1), HLLC fluxes (Toro, Spruce & Speares 1994, doi:10.1007/BF01414629) with the wave
speeds of Batten et al. 1997 (doi:10.1137/S1064827593260140), and the strong-stability-preserving third-order
Runge-Kutta method of Shu & Osher 1988 (doi:10.1016/0021-9991(88)90177-5). The directions are not split.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.fields import ArrayLike, Channel
from physml.solvers.finite_volume import FiniteVolume, advance, van_leer
from physml.solvers.solver import Range, Step, check_parameters, require

FLOOR = 1e-8  # least density and pressure
TAU = 2 * math.pi


class Conserved(NamedTuple):
    """Cell means (y, x), and the ratio of specific heats, without which they have no pressure."""

    density: jax.Array
    momentum_x: jax.Array
    momentum_y: jax.Array
    energy: jax.Array
    gamma: jax.Array


class Primitive(NamedTuple):
    """What is stored, (y, x) each."""

    density: jax.Array
    u: jax.Array
    v: jax.Array
    pressure: jax.Array


@dataclass(frozen=True)
class Euler(FiniteVolume):
    """Density, momentum and energy of an ideal gas on [0, length)^2; no viscosity.

    Initial states, in the manner of CE-RP, CE-KH and CE-Gauss of Herde et al. 2024 (Poseidon, arXiv:2405.19101):
    - "riemann": four quadrants, each of a random constant density and pressure in [0.1, 1] and velocity in [-1, 1];
    - "kelvin_helmholtz": a layer of density 2 between gas of density 1 that moves the other way, with speed 0.5 and
      pressure 2.5; its edges are perturbed by ten random waves of at most 5% of the length;
    - "gauss": a hundred random vortices, with Gaussian stream functions of radius 0.01 to 0.1 of the length and a
      highest speed of 1, at density 0.1 and pressure 2.5.

    Attributes:
        points: stored cells per axis.
        solver_points: cells of the solver per axis.
        length: side of the square.
        initial_state: see above.
        boundary: "periodic", "outflow" (zero slope) or "wall" (reflecting, free slip), on all four sides.
        gamma: ratio of specific heats; number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        courant: of a solver step, summed over both directions.
        substeps: solver steps per stored frame; None for as many as `courant` needs.
        precision: of the computation. Files hold float32.
    """

    points: int = 128
    solver_points: int = 128
    length: float = 1.0
    initial_state: Literal["riemann", "kelvin_helmholtz", "gauss"] = "riemann"
    boundary: Literal["periodic", "outflow", "wall"] = "periodic"
    gamma: Range = 1.4
    time_step: float = 0.05
    courant: float = 0.4
    substeps: int | None = None
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    channels: ClassVar[tuple[Channel, ...]] = tuple(map(Channel, Primitive._fields))
    usual_steps: ClassVar[int] = 20
    parameters: ClassVar[tuple[str, ...]] = ("gamma",)
    meanings: ClassVar[dict[str, str]] = {
        "density": "density", "u": "velocity along x", "v": "velocity along y", "pressure": "pressure",
    }  # fmt: skip
    equation: ClassVar[str] = (
        "rho_t + div(rho u) = 0, (rho u)_t + div(rho u u) + grad(p) = 0, e_t + div((e + p) u) = 0, "
        "p = (gamma - 1) (e - rho |u|^2 / 2)"
    )
    scheme: ClassVar[str] = "finite volumes, primitive MUSCL with the van Leer limiter, HLLC, SSPRK3"

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.length < math.inf, "length", self.length, "positive")
        require(0 < self.courant <= 0.5, "courant", self.courant, "positive and at most 0.5")
        check_parameters(self, gamma=(1, math.inf))

    @property
    def periodic(self) -> bool:
        return self.boundary == "periodic"

    def initial(self, key: jax.Array, **parameters: Any) -> Conserved:
        """A random state of the family `initial_state`; the same fields at every `solver_points`."""
        center = (jnp.arange(self.solver_points, dtype=float) + 0.5) / self.solver_points
        fields = FAMILIES[self.initial_state](key, center[:, None], center[None, :])
        return conserved(fields, self.values(parameters, "gamma")["gamma"])

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `gamma`, `length` and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "gamma", "length", "time_step")

        def step(state):
            state = state._replace(gamma=jnp.asarray(given["gamma"], state.density.dtype))
            spacing = jnp.asarray(given["length"], state.density.dtype) / jnp.asarray(self.solver_points)

            def limit(state, left):
                gas = primitive(state)
                sound = jnp.sqrt(state.gamma * gas.pressure / gas.density)
                return self.courant * spacing / jnp.max(jnp.abs(gas.u) + jnp.abs(gas.v) + 2 * sound)

            def substep(state, dt):
                return runge_kutta(lambda state: tendency(state, spacing, self.boundary), state, dt)

            return advance(substep, limit, state, given["time_step"], self.substeps)

        return step

    def observe(self, state: Conserved) -> Float[ArrayLike, "y x 4"]:
        """Density, velocity and pressure of the means over stored cells."""
        means = Conserved(*(self.coarsen(field) for field in state[:4]), state.gamma)
        return jnp.stack(primitive(means), axis=-1)

    def resume(self, frame: Float[ArrayLike, "y x 4"], **parameters: Any) -> Conserved:
        """The gas with that density, velocity and pressure."""
        gas = Primitive(*jnp.moveaxis(jnp.asarray(frame), -1, 0))
        return conserved(gas, self.values(parameters, "gamma")["gamma"])


def conserved(gas: Primitive, gamma: Any) -> Conserved:
    """The conserved fields of a gas."""
    gamma = jnp.asarray(gamma, gas.density.dtype)
    energy = gas.pressure / (gamma - 1) + gas.density * (gas.u**2 + gas.v**2) / 2
    return Conserved(gas.density, gas.density * gas.u, gas.density * gas.v, energy, gamma)


def primitive(state: Conserved) -> Primitive:
    """Density, velocity and pressure; density and pressure are at least `FLOOR`."""
    density = jnp.maximum(state.density, FLOOR)
    u, v = state.momentum_x / density, state.momentum_y / density
    pressure = (state.gamma - 1) * (state.energy - density * (u**2 + v**2) / 2)
    return Primitive(density, u, v, jnp.maximum(pressure, FLOOR))


def tendency(state: Conserved, spacing: Any, boundary: str) -> Conserved:
    """The time derivative of the cell means."""
    gas, gamma = primitive(state), state.gamma
    along_x = _divergence(gas, gamma, spacing, boundary)
    turned = Primitive(gas.density.T, gas.v.T, gas.u.T, gas.pressure.T)
    mass, normal, tangential, energy = (field.T for field in _divergence(turned, gamma, spacing, boundary))
    along_y = mass, tangential, normal, energy
    return Conserved(*(-(a + b) for a, b in zip(along_x, along_y, strict=True)), jnp.zeros_like(gamma))


def runge_kutta(slope: Any, state: Conserved, dt: jax.Array) -> Conserved:
    """One SSPRK3 step; after every stage density and pressure are raised to `FLOOR` where they fell below."""

    def stage(i, later):
        weight = jnp.asarray([1, 1 / 4, 2 / 3], dt.dtype)[i]
        moved = jax.tree.map(lambda a, b, f: (1 - weight) * a + weight * (b + dt * f), state, later, slope(later))
        return _floored(moved)._replace(gamma=state.gamma)  # without the rounding of the weights

    return jax.lax.fori_loop(0, 3, stage, state)


def _floored(state: Conserved) -> Conserved:
    density = jnp.maximum(state.density, FLOOR)
    least = (state.momentum_x**2 + state.momentum_y**2) / (2 * density) + FLOOR / (state.gamma - 1)
    return state._replace(density=density, energy=jnp.maximum(state.energy, least))


def _divergence(gas: Primitive, gamma: jax.Array, spacing: Any, boundary: str) -> tuple[jax.Array, ...]:
    """Flux differences along the last axis, whose velocity is `u`: of mass, normal and tangential momentum, energy."""
    below, above = [], []
    for name, field in zip(gas._fields, gas, strict=True):
        padded = _with_ghosts(field, boundary, odd=name == "u")
        difference = jnp.diff(padded)
        half = van_leer(difference[:, :-1], difference[:, 1:]) / 2
        below.append(padded[:, 1:-2] + half[:, :-1])
        above.append(padded[:, 2:-1] - half[:, 1:])
    return tuple(jnp.diff(flux) / spacing for flux in hllc(Primitive(*below), Primitive(*above), gamma))


def _with_ghosts(field: jax.Array, boundary: str, odd: bool) -> jax.Array:
    """The field with two more cells at both ends of the last axis."""
    if boundary == "periodic":
        before, after = field[:, -2:], field[:, :2]
    elif boundary == "outflow":
        before, after = (jnp.repeat(edge, 2, axis=1) for edge in (field[:, :1], field[:, -1:]))
    else:
        sign = -1 if odd else 1
        before, after = sign * field[:, 1::-1], sign * field[:, :-3:-1]
    return jnp.concatenate([before, field, after], axis=1)


def hllc(left: Primitive, right: Primitive, gamma: jax.Array) -> tuple[jax.Array, ...]:
    """Fluxes of mass, normal momentum, tangential momentum and energy between two states; `u` is normal to the face."""

    def total_energy(gas):
        return gas.pressure / (gamma - 1) + gas.density * (gas.u**2 + gas.v**2) / 2

    energies = total_energy(left), total_energy(right)
    sounds = (jnp.sqrt(gamma * gas.pressure / gas.density) for gas in (left, right))
    roots = jnp.sqrt(left.density), jnp.sqrt(right.density)

    def roe(a, b):
        return (roots[0] * a + roots[1] * b) / (roots[0] + roots[1])

    enthalpy = roe(*((e + gas.pressure) / gas.density for e, gas in zip(energies, (left, right), strict=True)))
    u, v = roe(left.u, right.u), roe(left.v, right.v)
    sound = jnp.sqrt((gamma - 1) * (enthalpy - (u**2 + v**2) / 2))
    slow = jnp.minimum(left.u - next(sounds), u - sound)
    fast = jnp.maximum(right.u + next(sounds), u + sound)

    push_left, push_right = left.density * (slow - left.u), right.density * (fast - right.u)
    contact = right.pressure - left.pressure + push_left * left.u - push_right * right.u
    contact = contact / (push_left - push_right)

    is_left = contact >= 0
    gas = Primitive(*(jnp.where(is_left, a, b) for a, b in zip(left, right, strict=True)))
    energy = jnp.where(is_left, *energies)
    wave = jnp.where(is_left, slow, fast)
    active = jnp.where(is_left, jnp.minimum(slow, 0), jnp.maximum(fast, 0))  # 0: all waves leave to the other side
    density = gas.density * (wave - gas.u) / (wave - contact)
    lifted = energy / gas.density + (contact - gas.u) * (contact + gas.pressure / (gas.density * (wave - gas.u)))
    mass = gas.density * gas.u
    return (
        mass + active * (density - gas.density),
        mass * gas.u + gas.pressure + active * (density * contact - mass),
        mass * gas.v + active * (density - gas.density) * gas.v,
        (energy + gas.pressure) * gas.u + active * (density * lifted - energy),
    )


def _riemann(key: jax.Array, y: jax.Array, x: jax.Array) -> Primitive:
    lowest = jnp.asarray([0.1, -1.0, -1.0, 0.1])[:, None, None]
    quadrants = lowest + (1 - lowest) * jax.random.uniform(key, (4, 2, 2), float)
    upper, right = (y >= 0.5).astype(int), (x >= 0.5).astype(int)
    return Primitive(*(values[upper, right] for values in quadrants))


def _kelvin_helmholtz(key: jax.Array, y: jax.Array, x: jax.Array) -> Primitive:
    first, second = jax.random.split(key)
    amplitude, phase = (jax.random.uniform(k, (2, 10), float) for k in (first, second))
    amplitude = 0.05 * amplitude / amplitude.sum(axis=1, keepdims=True)
    waves = jnp.cos(TAU * jnp.arange(1, 11)[:, None] * (x + phase[..., None]))
    lower, upper = jnp.sum(amplitude[..., None] * waves, axis=1)
    inside = (y > 0.25 + lower) & (y < 0.75 + upper)
    one = jnp.ones(inside.shape, float)
    return Primitive(jnp.where(inside, 2, one), jnp.where(inside, -0.5, 0.5 * one), 0 * one, 2.5 * one)


def _gauss(key: jax.Array, y: jax.Array, x: jax.Array) -> Primitive:
    keys = jax.random.split(key, 4)
    strength = jax.random.uniform(keys[0], (100, 1, 1), float, -1, 1)
    radius = jax.random.uniform(keys[1], (100, 1, 1), float, 0.01, 0.1)
    at_x, at_y = (jax.random.uniform(k, (100, 1, 1), float) for k in keys[2:])
    # Nearest periodic image: a vortex is much smaller than the box.
    east, north = (d - jnp.round(d) for d in (x - at_x, y - at_y))
    squared = (east**2 + north**2) / radius**2
    swirl = strength * jnp.exp(-squared / 2)
    u, v = jnp.sum(-swirl * north / radius, axis=0), jnp.sum(swirl * east / radius, axis=0)
    scale = 1 / jnp.sqrt(jnp.max(u**2 + v**2))
    one = jnp.ones(u.shape, float)
    return Primitive(0.1 * one, u * scale, v * scale, 2.5 * one)


FAMILIES = {"gauss": _gauss, "kelvin_helmholtz": _kelvin_helmholtz, "riemann": _riemann}
