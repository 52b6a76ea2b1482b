"""Waves: of one speed in a periodic square, exactly, and sound in a medium whose speed varies, with or without walls.

Nondimensional, pure step functions in the precision of the state, as in `periodic`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers import fourier
from physml.solvers.fourier import TAU, Spectral
from physml.solvers.solver import Range, Solver, Step, block_mean, check_parameters, check_time, require


@dataclass(frozen=True)
class Wave(Spectral):
    """u_tt = speed^2 laplace(u) on [0, length)^2: every Fourier mode turns by speed |k| t. Exact for every time step.

    The energy <u_t^2 + speed^2 |grad(u)|^2> / 2 never changes.

    Attributes:
        points: stored points per axis.
        solver_points: points of the solver per axis.
        length: period of both axes.
        speed: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: of no effect: a step is exact.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period and axis) of the random initial u, which is at rest.
        initial_amplitude: its root mean square.
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    solver_points: int = 64
    length: float = TAU
    speed: Range = 1.0
    time_step: float = 0.1
    substeps: int = 1
    warmup: float = 0.0
    initial_modes: int = 8
    initial_amplitude: float = 1.0
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 100
    parameters: ClassVar[tuple[str, ...]] = ("speed",)
    equation: ClassVar[str] = "u_tt = speed^2 laplace(u)"
    scheme: ClassVar[str] = "rotation of every Fourier mode, exact"
    packages: ClassVar[tuple[str, ...]] = ()
    meanings: ClassVar[dict[str, str]] = {"u": "displacement", "u_t": "velocity of the displacement"}
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"), Channel("u_t"))

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.initial_amplitude < math.inf, "initial_amplitude", self.initial_amplitude, "positive")

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 2"]:
        """A random smooth u at rest, of zero mean; the same field at every `solver_points`."""
        u = self.initial_amplitude * fourier.smooth_field(key, self.initial_modes, self.solver_points)
        return jnp.concatenate([u, jnp.zeros_like(u)], axis=-1)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `speed`, `length` and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "speed", "length", "time_step")
        points, time_step = self.solver_points, given["time_step"]
        mode = jnp.hypot(jnp.fft.fftfreq(points, 1 / points)[:, None], jnp.arange(points // 2 + 1))
        turn = given["speed"] * TAU / given["length"] * mode
        cosine, sine = jnp.cos(turn * time_step), jnp.sin(turn * time_step)
        ratio = jnp.where(mode == 0, time_step, sine / jnp.where(mode == 0, 1.0, turn))

        def step(state):
            state = jnp.asarray(state)
            if state.shape != (points, points, 2):
                raise fourier.wrong_shape(state.shape, (points, points, 2))
            own = [factor.astype(state.dtype) for factor in (cosine, ratio, turn * sine)]
            u, rate = (jnp.fft.rfft2(state[..., i]) for i in range(2))
            after = jnp.stack([own[0] * u + own[1] * rate, own[0] * rate - own[2] * u], axis=-1)
            return jnp.fft.irfft2(after, s=(points, points), axes=(0, 1)).astype(state.dtype)

        return step


@dataclass(frozen=True)
class Acoustic(Solver):
    """pressure_t + speed(x, y)^2 div(velocity) = 0, velocity_t + grad(pressure) = 0 in a square of constant density.

    Staggered leapfrog (Yee 1966, doi:10.1109/TAP.1966.1138693): pressure in the cells, velocity on their faces, second
    order in space and time, and no dissipation: <pressure(t)^2 / speed^2 + velocity(t - dt/2) . velocity(t + dt/2)>,
    the energy up to a term of second order, is kept to rounding. Waves of 10 solver cells per wavelength already travel
    1 % too slowly: `refinement` gives the solver more cells than are stored.

    Attributes:
        points: stored cells per axis.
        refinement: solver cells per stored cell and axis; the mean of a block is stored.
        length: side of the square.
        speed: mean speed of sound: number, or (low, high) to draw one per trajectory.
        contrast: the speed varies between (1 - contrast) and (1 + contrast) times its mean.
        medium_modes: highest wavenumber (cycles per length and axis) of the random medium.
        boundary_condition: "periodic", or "reflecting" for rigid walls.
        time_step: time between stored frames.
        substeps: leapfrog steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per length and axis) of the random initial pressure; nothing moves.
        initial_amplitude: its root mean square.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    refinement: int = 4
    length: float = 1.0
    speed: Range = 1.0
    contrast: float = 0.5
    medium_modes: int = 3
    boundary_condition: Literal["periodic", "reflecting"] = "reflecting"
    time_step: float = 0.02
    substeps: int = 16
    warmup: float = 0.0
    initial_modes: int = 6
    initial_amplitude: float = 1.0
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 100
    parameters: ClassVar[tuple[str, ...]] = ("speed",)
    equation: ClassVar[str] = "pressure_t + sound_speed(x, y)^2 div(u, v) = 0, (u, v)_t + grad(pressure) = 0"
    scheme: ClassVar[str] = "staggered leapfrog of second order, Courant number about 0.5"
    channels: ClassVar[tuple[Channel, ...]] = (Channel("pressure"), Channel("u"), Channel("v"))
    statics: ClassVar[tuple[Channel, ...]] = (Channel("sound_speed"),)
    meanings: ClassVar[dict[str, str]] = {
        "pressure": "pressure", "u": "velocity along x", "v": "velocity along y", "sound_speed": "local speed of sound",
    }  # fmt: skip

    def __post_init__(self):
        check_time(self)
        check_parameters(self, speed="positive")
        for name in ("points", "refinement", "medium_modes", "initial_modes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("length", "initial_amplitude"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive")
        require(0 <= self.contrast < 1, "contrast", self.contrast, "at least 0 and below 1")
        fastest = (self.speed[1] if isinstance(self.speed, tuple) else self.speed) * (1 + self.contrast)
        needed = math.ceil(fastest * self.time_step * self.solver_points / self.length * math.sqrt(2))
        if self.substeps < needed:
            raise ConfigError(
                f"substeps is {self.substeps}, but waves of speed {fastest:g} cross more than a cell per step. "
                f"Raise substeps to at least {needed}, better to {2 * needed}."
            )

    @property
    def solver_points(self) -> int:
        """Cells of the solver per axis."""
        return self.points * self.refinement

    @property
    def boundary(self) -> str:
        return {"periodic": "periodic", "reflecting": "rigid walls: no normal velocity"}[self.boundary_condition]

    @property
    def grid(self) -> Grid:
        periodic = self.boundary_condition == "periodic"
        return Grid(tuple(Axis.cells(name, self.points, self.length, periodic) for name in self.axes))

    @property
    def cells(self) -> int:
        return self.solver_points**2

    def draw_medium(self, key: jax.Array, speed: Any) -> Float[ArrayLike, "y x"]:
        """A smooth random speed of sound in the cells."""
        return speed * (1 + self.contrast * jnp.tanh(self._field(key, self.medium_modes)))

    def initial(self, key: jax.Array, **parameters: Any) -> dict[str, Float[ArrayLike, "y x"]]:
        """A smooth random pressure at rest in a random medium: arrays on the solver's grid.

        `pressure` and `sound_speed` in the cells; `u` on their upper faces in x, `v` on those in y.
        """
        first, second = jax.random.split(key)
        medium = self.draw_medium(first, self.values(parameters, "speed")["speed"])
        pressure = self.initial_amplitude * self._field(second, self.initial_modes)
        return {"pressure": pressure, "u": 0 * pressure, "v": 0 * pressure, "sound_speed": medium}

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `length` and `time_step` may be given, also traced; the speed lies in the state."""
        given = self.values(parameters, *self.parameters, "length", "time_step")
        size, time_step = given["length"] / self.solver_points, given["time_step"] / self.substeps
        inner = jnp.arange(self.solver_points) < self.solver_points - (self.boundary_condition == "reflecting")

        def push(state, time_step):
            """Velocities after the pressure has pushed them; those on the last faces stay 0 at walls."""
            p, factor = state["pressure"], time_step / size
            u = state["u"] - factor * inner * (jnp.roll(p, -1, 1) - p)
            v = state["v"] - factor * inner[:, None] * (jnp.roll(p, -1, 0) - p)
            return {**state, "u": u, "v": v}

        def compress(state):
            u, v = state["u"], state["v"]
            outflow = u - jnp.roll(u, 1, 1) + v - jnp.roll(v, 1, 0)
            return {**state, "pressure": state["pressure"] - time_step / size * state["sound_speed"] ** 2 * outflow}

        def step(state):
            state = {name: jnp.asarray(value) for name, value in state.items()}
            dtypes = {name: value.dtype for name, value in state.items()}

            def substep(_, state):
                moved = push(compress(state), time_step)
                return {name: value.astype(dtypes[name]) for name, value in moved.items()}

            # Half a push at both ends brings the staggered velocities to the time of the pressure.
            state = push(state, time_step / 2)
            state = {name: value.astype(dtypes[name]) for name, value in state.items()}
            state = jax.lax.fori_loop(0, self.substeps, substep, state)
            state = push(state, -time_step / 2)
            return {name: value.astype(dtypes[name]) for name, value in state.items()}

        return step

    def observe(self, state: dict[str, Float[ArrayLike, "y x"]]) -> Float[ArrayLike, "y2 x2 3"]:
        """Pressure and velocity: means of the stored cells."""
        u, v = ((state[name] + jnp.roll(state[name], 1, axis)) / 2 for name, axis in (("u", 1), ("v", 0)))
        return block_mean(jnp.stack([state["pressure"], u, v], axis=-1), self.refinement, 2)

    def observe_static(self, state: dict[str, Float[ArrayLike, "y x"]]) -> Float[ArrayLike, "y2 x2 1"]:
        """The speed of sound, its mean in the stored cells."""
        return block_mean(state["sound_speed"][..., None], self.refinement, 2)

    def _field(self, key, modes):
        """A random field of unit root mean square, the same at every `points`; flat at walls."""
        if self.boundary_condition == "periodic":
            # The centers of the cells are half a cell beyond the points of the series.
            return fourier.smooth_field(key, modes, 2 * self.solver_points)[1::2, 1::2, 0]
        half_waves = jnp.arange(2 * modes + 1)
        radius = jnp.hypot(half_waves[:, None], half_waves) / 2
        series = jax.random.normal(key, radius.shape, float) * jnp.exp(-2 * (radius / modes) ** 2) * (radius > 0)
        series = series / jnp.sqrt(jnp.sum(series**2))
        place = (jnp.arange(self.solver_points)[:, None] + 0.5) / self.solver_points
        basis = jnp.cos(jnp.pi * place * half_waves) * jnp.where(half_waves == 0, 1.0, math.sqrt(2.0))
        return basis @ series @ basis.T
