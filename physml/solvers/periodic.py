"""Burgers, Kuramoto-Sivashinsky and two-dimensional Navier-Stokes flows in periodic boxes.

Space is spectral (Fourier, 2/3 rule), time is ETDRK4 (Cox & Matthews 2002, doi:10.1006/jcph.2002.6995, with the contour
integrals of Kassam & Trefethen 2005, doi:10.1137/S1064827502410633), both from exponax. A state is `(*space, 1)`, space
stored as (x,) or (y, x), nondimensional. Step functions are pure: they can be jitted, mapped over batches,
differentiated, and their physical parameters may be traced. They compute in the precision of the state.

What exponax does differently from the usual conventions is handled here and nowhere else:
- it has no limit on the time step and no check: `physml.data.generate` looks at every stored frame;
- with space stored as (x, y) its vorticity is du/dy - dv/dx, the negative of the usual one. Stored as (y, x), the same
  formula is dv/dx - du/dy, so `DecayingNavierStokes` needs no sign. Its forcing acts on the first axis and varies along
  the second, so `Kolmogorov` swaps the axes and the sign;
- its forcing lacks the factor 2 pi / length, and its drag is added: dissipation needs a negative one;
- its 2/3 rule keeps the modes up to points / 3 - 1, one less than the usual rule.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import exponax
import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Channel
from physml.solvers import fourier
from physml.solvers.fourier import TAU, Spectral
from physml.solvers.solver import Range, Step


@dataclass(frozen=True)
class Burgers(Spectral):
    """u_t + u u_x = viscosity u_xx on [0, length).

    Without forcing, shocks form and decay. A shock is about viscosity / speed wide: the defaults resolve 0.01 with 1024
    points.

    Attributes:
        points: stored points.
        solver_points: points of the solver.
        length: period.
        viscosity: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period) of the random initial state.
        initial_speed: its root mean square.
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 256
    solver_points: int = 1024
    length: float = TAU
    viscosity: Range = 0.01
    time_step: float = 0.05
    substeps: int = 50
    warmup: float = 0.0
    initial_modes: int = 4
    initial_speed: float = 0.5
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("x",)
    usual_steps: ClassVar[int] = 40
    parameters: ClassVar[tuple[str, ...]] = ("viscosity",)
    equation: ClassVar[str] = "u_t + u u_x = viscosity u_xx"
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "x 1"]:
        """A random smooth state on the solver's grid, of zero mean; the same field at every `solver_points`."""
        return fourier.random_state(self, key, lambda k: jnp.exp(-2 * (k / self.initial_modes) ** 2))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `viscosity`, `length` and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "viscosity", "length", "time_step")
        solver = exponax.stepper.Burgers(
            1, given["length"], self.solver_points, given["time_step"] / self.substeps,
            diffusivity=given["viscosity"], conservative=True, order=4,
        )  # fmt: skip
        return fourier.repeated(solver, self.substeps)


@dataclass(frozen=True)
class KuramotoSivashinsky(Spectral):
    """u_t + u u_x + u_xx + viscosity u_xxxx = 0 on [0, length), in conservative form.

    Chaotic from length ~ 22 on; the leading Lyapunov exponent is 0.085-0.089 at length 60-64. The defaults are close to
    Lippe et al. 2023 (PDE-Refiner, arXiv:2308.05732). The mean is zero and stays zero.

    Attributes:
        points: stored points.
        solver_points: points of the solver.
        length: period.
        viscosity: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame, so that it lies on the attractor.
        initial_modes: highest wavenumber (cycles per period) of the random initial state.
        initial_speed: its root mean square.
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 256
    solver_points: int = 256
    length: float = 64.0
    viscosity: Range = 1.0
    time_step: float = 0.2
    substeps: int = 8
    warmup: float = 72.0
    initial_modes: int = 16
    initial_speed: float = 1.0
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("x",)
    usual_steps: ClassVar[int] = 140
    parameters: ClassVar[tuple[str, ...]] = ("viscosity",)
    equation: ClassVar[str] = "u_t + u u_x + u_xx + viscosity u_xxxx = 0"
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "x 1"]:
        """A random smooth state on the solver's grid, of zero mean; the same field at every `solver_points`."""
        return fourier.random_state(self, key, jnp.ones_like)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `viscosity`, `length` and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "viscosity", "length", "time_step")
        solver = exponax.stepper.KuramotoSivashinskyConservative(
            1, given["length"], self.solver_points, given["time_step"] / self.substeps,
            fourth_order_scale=given["viscosity"], order=4,
        )  # fmt: skip
        return fourier.repeated(solver, self.substeps)


@dataclass(frozen=True)
class DecayingNavierStokes(Spectral):
    """omega_t + u . grad(omega) = viscosity laplace(omega) on [0, length)^2, omega = dv/dx - du/dy.

    Two-dimensional turbulence without forcing: energy E = <|u|^2>/2 obeys dE/dt = -2 viscosity Z with the enstrophy
    Z = <omega^2>/2, and Z never grows.

    Attributes:
        points: stored points per axis.
        solver_points: points of the solver per axis.
        length: period of both axes.
        viscosity: number, or (low, high) to draw one per trajectory.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period and axis) of the random initial state.
        initial_speed: root mean square of its velocity.
        store: "vorticity" or "velocity" (u along x, v along y).
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    solver_points: int = 192
    length: float = TAU
    viscosity: Range = 4e-3
    time_step: float = 0.25
    substeps: int = 50
    warmup: float = 0.0
    initial_modes: int = 8
    initial_speed: float = 1.0
    store: Literal["vorticity", "velocity"] = "vorticity"
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 32
    parameters: ClassVar[tuple[str, ...]] = ("viscosity",)
    equation: ClassVar[str] = "omega_t + u . grad(omega) = viscosity laplace(omega), omega = dv/dx - du/dy, div u = 0"

    @property
    def channels(self) -> tuple[Channel, ...]:
        return fourier.flow_channels(self.store)

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 1"]:
        """A random smooth vorticity on the solver's grid, of zero mean; the same field at every `solver_points`."""
        return fourier.random_vorticity(self, key)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `viscosity`, `length` and `time_step` may be given (also traced) instead of the config's."""
        given = self.values(parameters, "viscosity", "length", "time_step")
        solver = exponax.stepper.NavierStokesVorticity(
            2, given["length"], self.solver_points, given["time_step"] / self.substeps,
            diffusivity=given["viscosity"], order=4,
        )  # fmt: skip
        return fourier.repeated(solver, self.substeps)

    def observe(self, state: Float[ArrayLike, "y x 1"]) -> Float[ArrayLike, "y2 x2 channel"]:
        """The state as it is stored: vorticity or velocity."""
        return fourier.observe_flow(self, state)

    def resume(self, frame: Float[ArrayLike, "y2 x2 channel"], **parameters: Any) -> Float[ArrayLike, "y x 1"]:
        """The vorticity on the solver's points."""
        return fourier.resume_flow(self, frame)


@dataclass(frozen=True)
class Kolmogorov(Spectral):
    """Two-dimensional flow driven by forcing_scale sin(2 pi forcing_mode y / length) along x, with linear drag.

    omega_t + u . grad(omega) = viscosity laplace(omega) - drag omega + curl(forcing) on [0, length)^2. Forcing and drag
    are those of Kochkov et al. 2021 (doi:10.1073/pnas.2101784118), who take viscosity 1e-3 and 2048^2 points; 0.01 is
    resolved by the default 192^2. Energy obeys dE/dt = <u f> - 2 drag E - 2 viscosity Z.
    The vorticity keeps a zero mean.

    Attributes:
        points: stored points per axis.
        solver_points: points of the solver per axis.
        length: period of both axes.
        viscosity: number, or (low, high) to draw one per trajectory.
        drag: likewise; positive drag dissipates.
        forcing_scale: amplitude of the force, likewise.
        forcing_mode: periods of the force in the box.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame, so that it lies on the attractor.
        initial_modes: highest wavenumber (cycles per period and axis) of the random initial state.
        initial_speed: root mean square of its velocity.
        store: "vorticity" or "velocity" (u along x, v along y).
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    solver_points: int = 192
    length: float = TAU
    viscosity: Range = 1e-2
    drag: Range = 0.1
    forcing_scale: Range = 1.0
    forcing_mode: int = 4
    time_step: float = 0.2
    substeps: int = 25
    warmup: float = 40.0
    initial_modes: int = 6
    initial_speed: float = 1.0
    store: Literal["vorticity", "velocity"] = "vorticity"
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 100
    parameters: ClassVar[tuple[str, ...]] = ("viscosity", "drag", "forcing_scale")
    equation: ClassVar[str] = (
        "u_t + u . grad(u) = -grad(p) + viscosity laplace(u) - drag u "
        "+ forcing_scale sin(2 pi forcing_mode y / length) e_x, div u = 0, omega = dv/dx - du/dy"
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.forcing_mode < self.solver_points // 3:
            raise ConfigError(
                f"forcing_mode is {self.forcing_mode}, but {self.solver_points} solver_points carry the modes 1 to "
                f"{self.solver_points // 3 - 1}. Raise solver_points to at least {3 * self.forcing_mode + 3}."
            )

    @property
    def channels(self) -> tuple[Channel, ...]:
        return fourier.flow_channels(self.store)

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 1"]:
        """A random smooth vorticity on the solver's grid, of zero mean; the same field at every `solver_points`."""
        return fourier.random_vorticity(self, key)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `viscosity`, `drag`, `forcing_scale`, `length` and `time_step` may be given, also traced."""
        given = self.values(parameters, *self.parameters, "length", "time_step")
        solver = exponax.stepper.KolmogorovFlowVorticity(
            2, given["length"], self.solver_points, given["time_step"] / self.substeps,
            diffusivity=given["viscosity"], drag=-given["drag"], injection_mode=self.forcing_mode,
            injection_scale=-given["forcing_scale"] * TAU / given["length"], order=4,
        )  # fmt: skip
        step = fourier.repeated(solver, self.substeps)
        return lambda state: -jnp.swapaxes(step(-jnp.swapaxes(state, 0, 1)), 0, 1)

    def observe(self, state: Float[ArrayLike, "y x 1"]) -> Float[ArrayLike, "y2 x2 channel"]:
        """The state as it is stored: vorticity or velocity."""
        return fourier.observe_flow(self, state)

    def resume(self, frame: Float[ArrayLike, "y2 x2 channel"], **parameters: Any) -> Float[ArrayLike, "y x 1"]:
        """The vorticity on the solver's points."""
        return fourier.resume_flow(self, frame)
