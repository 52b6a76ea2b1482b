"""Two layers of quasi-geostrophic turbulence in an ocean that is periodic both ways; by pyqg-jax (the extra `qg`).

Phillips 1954, doi:10.3402/tellusa.v6i3.8734; Vallis 2017, doi:10.1017/9781107588417, section 5.3.2.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers import fourier
from physml.solvers.runge_kutta import rk4
from physml.solvers.solver import Range, Solver, Step, adopt, borrowed, check_parameters, check_time, require

DAY = 86400.0
FILTERED = 3600.0  # the filter acts once in so many seconds
CONFIGURATIONS = {  # Ross et al. 2023, doi:10.1029/2022MS003258, table 1
    "eddy": {"drag": 5.787e-7, "thickness_ratio": 0.25, "beta": 1.5e-11},
    "jet": {"drag": 7e-8, "thickness_ratio": 0.1, "beta": 1e-11},
}


@dataclass(frozen=True)
class Quasigeostrophic(Solver):
    """q_i_t + (u_i + U_i) . grad(q_i) + v_i dQ_i/dy = drag on layer 2, i = 1 (upper), 2 (lower), in SI units.

    q_1 = laplace(psi_1) + F_1 (psi_2 - psi_1), q_2 = laplace(psi_2) + F_2 (psi_1 - psi_2), u = -dpsi/dy, v = dpsi/dx,
    F_1 = deformation_radius^-2 / (1 + thickness_ratio), F_2 = thickness_ratio F_1, dQ_1/dy = beta + F_1 shear,
    dQ_2/dy = beta - F_2 shear. The background flow U_1 - U_2 = shear feeds eddies; the drag on layer 2 and an
    exponential filter of the shortest waves (once an hour, whatever the step) take the energy out. pyqg-jax gives the
    rates; the Runge-Kutta steps are ours, so that a frame is all the state. 64 points barely resolve the deformation
    radius, as coarse ocean models do: 256 are usual for truth.

    Attributes:
        configuration: takes drag, thickness_ratio and beta from `CONFIGURATIONS`.
        points: points per axis, of the solver and stored.
        length: period of both axes in m.
        deformation_radius: in m.
        shear: velocity of the background in layer 1, in m s-1; layer 2 is at rest: number, or (low, high) to draw one
            per trajectory.
        drag: of layer 2 in s-1, likewise.
        thickness_ratio: of layer 1 to layer 2, likewise.
        beta: gradient of the Coriolis parameter in m-1 s-1, likewise.
        time_step: seconds between stored frames.
        substeps: Runge-Kutta steps per stored frame; two hours suit 64 points.
        warmup: seconds dropped before the first stored frame, so that the turbulence is stationary.
        initial_modes: highest wavenumber (cycles per period and axis) of the random initial stream function.
        initial_speed: root mean square of its velocity in m s-1, the same in both layers.
        precision: of the computation. Files hold float32.
    """

    configuration: Literal["eddy", "jet"] | None = None
    points: int = 64
    length: float = 1e6
    deformation_radius: float = 15000.0
    shear: Range = 0.025
    drag: Range = 5.787e-7
    thickness_ratio: Range = 0.25
    beta: Range = 1.5e-11
    time_step: float = DAY
    substeps: int = 12
    warmup: float = 1825 * DAY
    initial_modes: int = 12
    initial_speed: float = 0.02
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 100
    time_unit: ClassVar[str] = "s"
    parameters: ClassVar[tuple[str, ...]] = ("shear", "drag", "thickness_ratio", "beta")
    units: ClassVar[dict[str, str]] = {"shear": "m s-1", "drag": "s-1", "beta": "m-1 s-1"}
    equation: ClassVar[str] = (
        "q_i_t + (u_i + U_i) . grad(q_i) + v_i dQ_i/dy = -delta_i2 drag laplace(psi_2), "
        "q_i = laplace(psi_i) + F_i (psi_j - psi_i), u = -dpsi/dy, v = dpsi/dx"
    )
    boundary: ClassVar[str] = "periodic"
    scheme: ClassVar[str] = "Fourier pseudo-spectral with an exponential filter, classical Runge-Kutta method"
    packages: ClassVar[tuple[str, ...]] = ("pyqg-jax",)
    advice: ClassVar[str] = "Raise substeps or the drag, or lower the shear."
    channels: ClassVar[tuple[Channel, ...]] = (Channel("q_1", "s-1"), Channel("q_2", "s-1"))
    meanings: ClassVar[dict[str, str]] = {
        "q_1": "potential vorticity of the upper layer", "q_2": "potential vorticity of the lower layer",
    }  # fmt: skip

    def __post_init__(self):
        adopt(self, self.configuration, CONFIGURATIONS, "configuration")
        check_time(self)
        check_parameters(self, shear="finite", thickness_ratio="positive", beta="finite")
        for name in ("length", "deformation_radius", "initial_speed"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive")
        require(self.points >= 8 and self.points % 2 == 0, "points", self.points, "even and at least 8")
        most = self.points // 3
        require(1 <= self.initial_modes <= most, "initial_modes", self.initial_modes, f"from 1 to points / 3 = {most}")

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.cells(name, self.points, self.length, True, "m") for name in self.axes))

    @property
    def solver_points(self) -> int:
        """Points of the solver per axis: all are stored."""
        return self.points

    @property
    def cells(self) -> int:
        return self.points**2

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 2"]:
        """The potential vorticity of a random smooth flow, the same in both layers."""
        # One flow in both layers has no stretching: q = laplace(psi).
        return jnp.broadcast_to(fourier.random_vorticity(self, key), (self.points, self.points, 2))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `shear`, `drag`, `thickness_ratio`, `beta` and `time_step` may be given, also traced."""
        given = self.values(parameters, *self.parameters, "time_step")

        def step(state):
            state = jnp.asarray(state)
            if state.shape != (self.points, self.points, 2):
                raise fourier.wrong_shape(state.shape, (self.points, self.points, 2))
            model = self.model(state.dtype, **{name: given[name] for name in self.parameters})
            advance = rk4(model.get_updates, given["time_step"] / self.substeps)
            start = model.create_initial_state(jax.random.key(0)).update(q=jnp.moveaxis(state, -1, 0))
            kept = self._filter(model, given["time_step"] / self.substeps)

            def substep(_, spectra):
                moved = advance(spectra)
                return moved.update(qh=(kept * moved.qh).astype(moved.qh.dtype))

            end = jax.lax.fori_loop(0, self.substeps, substep, start)
            return jnp.moveaxis(end.q, 0, -1).astype(state.dtype)

        return step

    def kinetic_energy(self, state: Float[ArrayLike, "y x 2"], **parameters: Any) -> jax.Array:
        """Mean kinetic energy of both layers in m2 s-2, weighted by their thickness."""
        ratio = parameters.get("thickness_ratio", self.thickness_ratio)
        model = self.model(state.dtype, **self.values(parameters, *self.parameters))
        full = model.get_full_state(
            model.create_initial_state(jax.random.key(0)).update(q=jnp.moveaxis(jnp.asarray(state), -1, 0))
        )
        upper, lower = jnp.mean(full.u**2 + full.v**2, axis=(1, 2)) / 2
        return (ratio * upper + lower) / (ratio + 1)

    def model(self, dtype: Any, shear: Any, drag: Any, thickness_ratio: Any, beta: Any) -> Any:
        """The `pyqg_jax.qg_model.QGModel`. Raises DependencyError where pyqg-jax is absent."""
        qg, states = borrowed("pyqg_jax.qg_model", "qg"), borrowed("pyqg_jax.state", "qg")
        precision = states.Precision.DOUBLE if jnp.dtype(dtype) == jnp.float64 else states.Precision.SINGLE
        return qg.QGModel(
            nx=self.points, L=self.length, rd=self.deformation_radius, U1=shear, U2=0.0, rek=drag,
            delta=thickness_ratio, beta=beta, precision=precision,
        )  # fmt: skip

    def _filter(self, model: Any, time_step: Any) -> jax.Array:
        """The exponential filter of the model, as strong per hour for every step."""
        phase = jnp.hypot(model.k * model.dx, model.l * model.dy)
        beyond = jnp.maximum(phase - 0.65 * jnp.pi, 0.0)
        return jnp.exp(-model.filterfac * beyond**4 * (time_step / FILTERED))

    def observe(self, state: Float[ArrayLike, "y x 2"]) -> Float[ArrayLike, "y x 2"]:
        """The potential vorticity of both layers."""
        return state

    def resume(self, frame: Float[ArrayLike, "y x 2"], **parameters: Any) -> Float[ArrayLike, "y x 2"]:
        """The frame."""
        return jnp.asarray(frame)
