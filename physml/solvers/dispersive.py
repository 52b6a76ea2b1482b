"""Waves that travel without loss in a periodic interval: linear advection and the Korteweg-de Vries equation.

As in `periodic`: spectral in space, states `(x, 1)`, nondimensional, pure step functions in the precision of the state.
The time stepping is our own, because exponax 0.2 keeps only the real part of its coefficients (see `etdrk4`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Channel
from physml.solvers import fourier
from physml.solvers.etdrk4 import build_step
from physml.solvers.fourier import Spectral
from physml.solvers.solver import Range, Step


@dataclass(frozen=True)
class Advection(Spectral):
    """u_t + speed u_x = 0 on [0, length): the initial state, shifted. Exact for every time step.

    Attributes:
        points: stored points.
        solver_points: points of the solver.
        length: period.
        speed: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: of no effect: a step is exact.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period) of the random initial state.
        initial_speed: its root mean square.
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 128
    solver_points: int = 128
    length: float = 1.0
    speed: Range = 1.0
    time_step: float = 0.01
    substeps: int = 1
    warmup: float = 0.0
    initial_modes: int = 8
    initial_speed: float = 1.0
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("x",)
    usual_steps: ClassVar[int] = 200
    parameters: ClassVar[tuple[str, ...]] = ("speed",)
    equation: ClassVar[str] = "u_t + speed u_x = 0"
    scheme: ClassVar[str] = "shift of every Fourier mode, exact"
    meanings: ClassVar[dict[str, str]] = {"u": "transported quantity"}
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "x 1"]:
        """A random smooth state on the solver's grid, of zero mean; the same field at every `solver_points`."""
        return fourier.random_state(self, key, lambda k: jnp.exp(-2 * (k / self.initial_modes) ** 2))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `speed`, `length` and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "speed", "length", "time_step")
        derivative = _derivative(self.solver_points, given["length"])
        shift = jnp.exp(-derivative * given["speed"] * given["time_step"])
        return _on_spectrum(self.solver_points, lambda spectrum: shift.astype(spectrum.dtype) * spectrum)


@dataclass(frozen=True)
class KortewegDeVries(Spectral):
    """u_t + steepening u u_x + dispersion u_xxx = 0 on [0, length), 2/3 rule, ETDRK4.

    Solitons pass through each other. With the default coefficients a soliton of speed c is
    u = c / 2 sech^2(sqrt(c) / 2 (x - c t)), and <u>, <u^2> and <u^3 - u_x^2 / 2> never change. The solver's step,
    time_step / substeps, should resolve its passage: 0.002 errs by 3e-7 at c = 4 after t = 2 with 256 points on 40.

    Attributes:
        points: stored points.
        solver_points: points of the solver.
        length: period.
        dispersion: number, or (low, high) to draw one per trajectory.
        steepening: factor of u u_x; 6 is usual among mathematicians, 1 among physicists.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period) of the random initial state.
        initial_speed: its root mean square.
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 256
    solver_points: int = 256
    length: float = 40.0
    dispersion: Range = 1.0
    steepening: float = 6.0
    time_step: float = 0.1
    substeps: int = 50
    warmup: float = 0.0
    initial_modes: int = 5
    initial_speed: float = 0.5
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("x",)
    usual_steps: ClassVar[int] = 100
    parameters: ClassVar[tuple[str, ...]] = ("dispersion",)
    equation: ClassVar[str] = "u_t + steepening u u_x + dispersion u_xxx = 0"
    meanings: ClassVar[dict[str, str]] = {"u": "elevation of the wave"}
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)

    def __post_init__(self):
        super().__post_init__()
        if not abs(self.steepening) < float("inf"):
            raise ConfigError(f"steepening is {self.steepening}, but it must be finite.")

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "x 1"]:
        """A random smooth state on the solver's grid, of zero mean; the same field at every `solver_points`."""
        return fourier.random_state(self, key, lambda k: jnp.exp(-2 * (k / self.initial_modes) ** 2))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `dispersion`, `length` and `time_step` may be given, also traced."""
        given = self.values(parameters, "dispersion", "length", "time_step")
        points = self.solver_points
        derivative = _derivative(points, given["length"])
        kept = jnp.arange(len(derivative)) < points / 3

        def advance(spectrum):
            def steepen(v):
                squared = jnp.fft.rfft(jnp.fft.irfft(v, n=points) ** 2)
                return ((-self.steepening / 2) * kept * derivative).astype(v.dtype) * squared

            symbol = (-given["dispersion"] * derivative**3).astype(spectrum.dtype)
            step = build_step(symbol, steepen, given["time_step"] / self.substeps)
            start = kept * spectrum
            return jax.lax.fori_loop(0, self.substeps, lambda _, v: step(v).astype(v.dtype), start)

        return _on_spectrum(points, advance)


def _derivative(points: int, length: Any) -> jax.Array:
    """i k of every mode of a real field; 0 for the Nyquist mode, whose derivative is not real."""
    mode = jnp.arange(points // 2 + 1)
    return 2j * jnp.pi / length * jnp.where(2 * mode == points, 0, mode)


def _on_spectrum(points: int, advance: Step) -> Step:
    def step(state):
        state = jnp.asarray(state)
        if state.shape != (points, 1):
            raise fourier.wrong_shape(state.shape, (points, 1))
        spectrum = advance(jnp.fft.rfft(state[:, 0]))
        return jnp.fft.irfft(spectrum, n=points)[:, None].astype(state.dtype)

    return step
