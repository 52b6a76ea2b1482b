"""Chaotic ordinary differential equations: few numbers that change with time, on a grid without axes.

Solved by the classical Runge-Kutta method with fixed substeps, which the defaults keep far below the error of float32
files. Lorenz 96 lives on a ring, a periodic axis. All are nondimensional. Trajectories start at random and the
warm-up brings them to the attractor.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers.runge_kutta import rk4
from physml.solvers.solver import Range, Solver, Step, check_parameters, check_time, require


@dataclass(frozen=True)
class System(Solver):
    """What the systems share. A state is `(component,)`; each component is a channel.

    Attributes:
        time_step: time between stored frames.
        substeps: Runge-Kutta steps per stored frame.
        warmup: time dropped before the first stored frame, so that it lies on the attractor.
        initial_spread: standard deviation of the random initial state around `center`.
        precision: of the computation. Files hold float32.
    """

    time_step: float = 0.05
    substeps: int = 10
    warmup: float = 20.0
    initial_spread: float = 1.0
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ()
    usual_steps: ClassVar[int] = 400
    boundary: ClassVar[str] = "none: no space"
    scheme: ClassVar[str] = "classical Runge-Kutta method of fourth order"
    advice: ClassVar[str] = "Raise substeps, or choose parameters whose attractor is bounded."
    center: ClassVar[tuple[float, ...]]

    def __post_init__(self):
        check_time(self)
        check_parameters(self, **dict.fromkeys(self.parameters, "finite"))
        require(0 < self.initial_spread < math.inf, "initial_spread", self.initial_spread, "positive")

    @property
    def grid(self) -> Grid:
        return Grid(())

    @property
    def cells(self) -> int:
        return len(self.channels)

    def rates(self, state: Float[ArrayLike, " component"], **values: Any) -> Float[ArrayLike, " component"]:
        """The time derivative; `values` are the numbers `parameters`."""
        raise NotImplementedError

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, " component"]:
        """A random state around `center`."""
        center = jnp.asarray(self.center, float)
        return center + self.initial_spread * jax.random.normal(key, center.shape, float)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step; the parameters and `time_step` may be given, also traced."""
        given = self.values(parameters, *self.parameters, "time_step")
        values = {name: given[name] for name in self.parameters}
        step = rk4(lambda state: self.rates(state, **values), given["time_step"] / self.substeps)
        return lambda state: jax.lax.fori_loop(0, self.substeps, lambda _, s: step(s), jnp.asarray(state))

    def observe(self, state: Float[ArrayLike, " component"]) -> Float[ArrayLike, " component"]:
        """The state."""
        return state

    def resume(self, frame: Float[ArrayLike, " component"], **parameters: Any) -> Float[ArrayLike, " component"]:
        """The frame."""
        return jnp.asarray(frame)


def _components(*names: str) -> tuple[Channel, ...]:
    return tuple(Channel(name) for name in names)


@dataclass(frozen=True)
class Lorenz63(System):
    """x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z. Lorenz 1963, equations 25-27.

    doi:10.1175/1520-0469(1963)020<0130:DNF>2.0.CO;2. The leading Lyapunov exponent is 0.906. Fields as in `System`.
    """

    sigma: Range = 10.0
    rho: Range = 28.0
    beta: Range = 8 / 3

    channels: ClassVar[tuple[Channel, ...]] = _components("x", "y", "z")
    parameters: ClassVar[tuple[str, ...]] = ("sigma", "rho", "beta")
    equation: ClassVar[str] = "x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z"
    meanings: ClassVar[dict[str, str]] = {
        "x": "strength of the convection", "y": "temperature difference of up- and downdraft",
        "z": "departure of the temperature profile from a line",
    }  # fmt: skip
    center: ClassVar[tuple[float, ...]] = (0.0, 0.0, 25.0)

    def rates(self, state, sigma, rho, beta):
        x, y, z = state
        return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])


@dataclass(frozen=True)
class Lorenz84(System):
    """Westerlies x and the two phases of a wave y, z. Lorenz 1984, doi:10.3402/tellusa.v36i2.11473, equations 1-3.

    x' = -y^2 - z^2 - a x + a forcing, y' = x y - b x z - y + contrast, z' = b x y + x z - z. A time unit is five days.
    Fields as in `System`.
    """

    a: Range = 0.25
    b: Range = 4.0
    forcing: Range = 8.0
    contrast: Range = 1.0
    warmup: float = 50.0

    channels: ClassVar[tuple[Channel, ...]] = _components("x", "y", "z")
    parameters: ClassVar[tuple[str, ...]] = ("a", "b", "forcing", "contrast")
    equation: ClassVar[str] = "x' = -y^2 - z^2 - a x + a forcing, y' = x y - b x z - y + contrast, z' = b x y + x z - z"
    meanings: ClassVar[dict[str, str]] = {
        "x": "strength of the westerlies", "y": "cosine phase of the wave", "z": "sine phase of the wave",
    }  # fmt: skip
    center: ClassVar[tuple[float, ...]] = (1.0, 0.0, 0.0)

    def rates(self, state, a, b, forcing, contrast):
        x, y, z = state
        return jnp.stack(
            [-(y**2) - z**2 - a * x + a * forcing, x * y - b * x * z - y + contrast, b * x * y + x * z - z]
        )


@dataclass(frozen=True)
class Rossler(System):
    """x' = -y - z, y' = x + a y, z' = b + z (x - c). Rossler 1976, doi:10.1016/0375-9601(76)90101-8.

    The leading Lyapunov exponent is 0.071. Fields as in `System`.
    """

    a: Range = 0.2
    b: Range = 0.2
    c: Range = 5.7
    time_step: float = 0.2
    substeps: int = 20
    warmup: float = 100.0

    channels: ClassVar[tuple[Channel, ...]] = _components("x", "y", "z")
    parameters: ClassVar[tuple[str, ...]] = ("a", "b", "c")
    equation: ClassVar[str] = "x' = -y - z, y' = x + a y, z' = b + z (x - c)"
    meanings: ClassVar[dict[str, str]] = {
        "x": "first coordinate of the spiral", "y": "second coordinate of the spiral", "z": "excursion from the spiral",
    }  # fmt: skip
    center: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0)

    def rates(self, state, a, b, c):
        x, y, z = state
        return jnp.stack([-y - z, x + a * y, b + z * (x - c)])


@dataclass(frozen=True)
class Chen(System):
    """x' = a (y - x), y' = (c - a) x - x z + c y, z' = x y - b z. Chen & Ueta 1999, doi:10.1142/S0218127499001024.

    The leading Lyapunov exponent is 2.02. Fields as in `System`.
    """

    a: Range = 35.0
    b: Range = 3.0
    c: Range = 28.0
    time_step: float = 0.02

    channels: ClassVar[tuple[Channel, ...]] = _components("x", "y", "z")
    parameters: ClassVar[tuple[str, ...]] = ("a", "b", "c")
    equation: ClassVar[str] = "x' = a (y - x), y' = (c - a) x - x z + c y, z' = x y - b z"
    meanings: ClassVar[dict[str, str]] = {
        "x": "first component", "y": "second component", "z": "third component",
    }  # fmt: skip
    center: ClassVar[tuple[float, ...]] = (0.0, 0.0, 20.0)

    def rates(self, state, a, b, c):
        x, y, z = state
        return jnp.stack([a * (y - x), (c - a) * x - x * z + c * y, x * y - b * z])


@dataclass(frozen=True)
class Thomas(System):
    """x' = sin(y) - b x and its two cyclic shifts. Thomas 1999, doi:10.1142/S0218127499001383.

    Volumes shrink as exp(-3 b t). Fields as in `System`.
    """

    b: Range = 0.18
    time_step: float = 0.5
    substeps: int = 20
    warmup: float = 200.0

    channels: ClassVar[tuple[Channel, ...]] = _components("x", "y", "z")
    parameters: ClassVar[tuple[str, ...]] = ("b",)
    equation: ClassVar[str] = "x' = sin(y) - b x, y' = sin(z) - b y, z' = sin(x) - b z"
    meanings: ClassVar[dict[str, str]] = {
        "x": "first component", "y": "second component", "z": "third component",
    }  # fmt: skip
    center: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0)

    def rates(self, state, b):
        return jnp.sin(jnp.roll(state, -1)) - b * state


@dataclass(frozen=True)
class HenonHeiles(System):
    """A star in the potential (x^2 + y^2) / 2 + x^2 y - y^3 / 3. Henon & Heiles 1964, doi:10.1086/109234.

    Conservative: the energy (u^2 + v^2) / 2 + potential stays. Orbits below energy 1/12 are regular, those near 1/6 are
    chaotic, and in between both kinds live side by side; above 1/6 a star may escape.

    Attributes:
        energy: number up to 1/6, or (low, high) to draw one per trajectory. Other fields as in `System`.
        initial_spread: standard deviation of the initial position, before it is kept in the well.
    """

    energy: Range = 0.125
    time_step: float = 0.5
    substeps: int = 25
    warmup: float = 0.0
    initial_spread: float = 0.1

    channels: ClassVar[tuple[Channel, ...]] = _components("x", "y", "u", "v")
    parameters: ClassVar[tuple[str, ...]] = ("energy",)
    equation: ClassVar[str] = "x' = u, y' = v, u' = -x - 2 x y, v' = -y - x^2 + y^2"
    meanings: ClassVar[dict[str, str]] = {
        "x": "first coordinate", "y": "second coordinate", "u": "velocity along x", "v": "velocity along y",
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        for value in self.energy if isinstance(self.energy, tuple) else (self.energy,):
            require(0 < value <= 1 / 6, "energy", self.energy, "positive and at most 1/6, where stars escape")

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "4"]:
        """A random place in the well, a random direction, and the speed that the energy leaves."""
        energy = self.values(parameters, "energy")["energy"]
        place, direction = jax.random.split(key)
        x, y = self.initial_spread * jax.random.normal(place, (2,), float)
        # The potential is at most r^2 / 2 + r^3 / 3, so within this radius a quarter of the energy is left.
        radius, reach = jnp.hypot(x, y), jnp.sqrt(0.9 * energy)
        x, y = (reach * jnp.tanh(radius / reach) / radius * at for at in (x, y))
        speed = jnp.sqrt(2 * (energy - henon_heiles_potential(x, y)))
        angle = 2 * jnp.pi * jax.random.uniform(direction, (), float)
        return jnp.stack([x, y, speed * jnp.cos(angle), speed * jnp.sin(angle)])

    def rates(self, state, energy):
        x, y, u, v = state
        return jnp.stack([u, v, -x - 2 * x * y, -y - x**2 + y**2])


def henon_heiles_potential(x: Any, y: Any) -> Any:
    """Potential energy of a star at (x, y)."""
    return (x**2 + y**2) / 2 + x**2 * y - y**3 / 3


@dataclass(frozen=True)
class Lorenz96(System):
    """u_i' = (u_{i+1} - u_{i-2}) u_{i-1} - u_i + forcing on a ring of `points` sites. Lorenz 1996, "Predictability".

    In Lorenz 2006, doi:10.1017/CBO9780511617652.004, equation 1. The leading Lyapunov exponent is 1.67 with 40 sites
    and forcing 8; a time unit is five days. States are `(x, 1)`. Other fields as in `System`.

    Attributes:
        points: sites.
        forcing: number, or (low, high) to draw one per trajectory.
    """

    points: int = 40
    forcing: Range = 8.0

    axes: ClassVar[tuple[str, ...]] = ("x",)
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)
    parameters: ClassVar[tuple[str, ...]] = ("forcing",)
    equation: ClassVar[str] = "u_i' = (u_{i+1} - u_{i-2}) u_{i-1} - u_i + forcing"
    boundary: ClassVar[str] = "periodic"
    meanings: ClassVar[dict[str, str]] = {"u": "atmospheric quantity at a longitude"}

    def __post_init__(self):
        super().__post_init__()
        require(self.points >= 4, "points", self.points, "at least 4")

    @property
    def grid(self) -> Grid:
        return Grid((Axis.uniform("x", self.points, float(self.points)),))

    @property
    def cells(self) -> int:
        return self.points

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "x 1"]:
        """Noise around zero at every site."""
        return self.initial_spread * jax.random.normal(key, (self.points, 1), float)

    def rates(self, state, forcing):
        return (jnp.roll(state, -1, 0) - jnp.roll(state, 2, 0)) * jnp.roll(state, 1, 0) - state + forcing
