"""What the spectral solvers share: steps by exponax, random initial states, resampling, velocity from vorticity."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import exponax
import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers.solver import Solver, Step, check_parameters, check_time, require

TAU = 2 * math.pi


class Spectral(Solver):
    """What the configs of spectral solvers share: checked sizes, a periodic grid, and storing by resampling."""

    meanings: ClassVar[dict[str, str]] = {
        "u": "velocity along x", "v": "velocity along y", "vorticity": "vorticity dv/dx - du/dy",
    }  # fmt: skip
    boundary: ClassVar[str] = "periodic"
    scheme: ClassVar[str] = "Fourier pseudo-spectral with the 2/3 rule, ETDRK4"
    packages: ClassVar[tuple[str, ...]] = ("exponax",)
    advice: ClassVar[str] = "Raise substeps, solver_points or the dissipation."

    def __post_init__(self):
        check(self)

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.uniform(name, self.points, self.length) for name in self.axes))

    @property
    def cells(self) -> int:
        return self.solver_points ** len(self.axes)

    def observe(self, state: Float[ArrayLike, "*space channel"]) -> Float[ArrayLike, "*stored channel"]:
        """The state as it is stored."""
        return downsample(self, state)

    def resume(
        self, frame: Float[ArrayLike, "*stored channel"], **parameters: Any
    ) -> Float[ArrayLike, "*space channel"]:
        """The frame on the solver's points."""
        return resample(jnp.asarray(frame), self.solver_points)


def velocity_of(vorticity: Float[ArrayLike, "y x 1"], length: float = TAU) -> Float[ArrayLike, "y x 2"]:
    """The divergence-free velocity (u along x, v along y), of zero mean, whose curl dv/dx - du/dy is `vorticity`.

    Spectral: laplace(psi) = -vorticity, u = dpsi/dy, v = -dpsi/dx. The Nyquist mode is dropped.
    """
    points = vorticity.shape[0]
    spectrum = exponax.fft(jnp.moveaxis(jnp.asarray(vorticity), -1, 0), num_spatial_dims=2)
    derivative = exponax.spectral.build_derivative_operator(2, length, points).astype(spectrum.dtype)
    # An odd derivative of the Nyquist mode of an even grid is not real.
    derivative = derivative * exponax.spectral.oddball_filter_mask(2, points)
    laplace = jnp.sum(derivative**2, axis=0)
    stream = -spectrum[0] / jnp.where(laplace == 0, 1, laplace) * (laplace != 0)
    velocity = jnp.stack([derivative[0] * stream, -derivative[1] * stream])
    velocity = exponax.ifft(velocity, num_spatial_dims=2, num_points=points)
    return jnp.moveaxis(velocity, 0, -1).astype(jnp.asarray(vorticity).dtype)


def vorticity_of(velocity: Float[ArrayLike, "*batch y x 2"], length: float = TAU) -> Float[ArrayLike, "*batch y x 1"]:
    """dv/dx - du/dy of a periodic velocity (u along x, v along y); `velocity_of` undoes it.

    Spectral; the Nyquist mode is dropped.
    """
    velocity = jnp.asarray(velocity)
    points = velocity.shape[-2]
    spectrum = jnp.fft.rfft2(velocity, axes=(-3, -2))
    ky, kx = jnp.fft.fftfreq(points, 1 / points)[:, None], jnp.arange(points // 2 + 1)[None, :]
    inside = (2 * jnp.abs(ky) != points) & (2 * kx != points)
    unit = (TAU / length * 1j * inside).astype(spectrum.dtype)
    curl = unit * (kx * spectrum[..., 1] - ky * spectrum[..., 0])
    return jnp.fft.irfft2(curl, s=velocity.shape[-3:-1], axes=(-2, -1)).astype(velocity.dtype)[..., None]


def resample(state: Float[ArrayLike, "*space channel"], points: int) -> Float[ArrayLike, "*space2 channel"]:
    """Moves a periodic state to `points` per axis by truncating or padding its spectrum.

    The Nyquist mode of the coarser grid, if even, is dropped. Exact for fields without modes beyond it.
    """
    state = jnp.asarray(state)
    moved = jnp.moveaxis(exponax.map_between_resolutions(jnp.moveaxis(state, -1, 0), points), 0, -1)
    return moved.astype(state.dtype)


def repeated(solver: exponax.BaseStepper, substeps: int) -> Step:
    """Channels last outside, exponax inside; between the substeps the state stays in Fourier space."""
    dims, points = solver.num_spatial_dims, solver.num_points

    def step(state):
        state = jnp.asarray(state)
        expected = (*(points,) * dims, solver.num_channels)
        if state.shape != expected:
            raise wrong_shape(state.shape, expected)
        own = _in_precision(solver, state.dtype)
        spectrum = exponax.fft(jnp.moveaxis(state, -1, 0), num_spatial_dims=dims)
        spectrum = jax.lax.fori_loop(0, substeps, lambda _, field: own.step_fourier(field), spectrum)
        return jnp.moveaxis(exponax.ifft(spectrum, num_spatial_dims=dims, num_points=points), 0, -1)

    return step


def wrong_shape(given: tuple[int, ...], expected: tuple[int, ...]) -> ConfigError:
    """What to say of a state that is not the solver's."""
    return ConfigError(
        f"The state has shape {given}, but the solver works on {expected}: resample it (physml.solvers.resample) or "
        "change solver_points. Use jax.vmap for batches."
    )


def _in_precision(solver: exponax.BaseStepper, dtype) -> exponax.BaseStepper:
    """The solver's coefficients in the precision of the state, so that the state keeps it."""
    complex_dtype = jnp.result_type(dtype, jnp.complex64)

    def cast(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return leaf.astype(complex_dtype)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, solver)


def random_series(key: jax.Array, modes: int, dims: int, envelope: Callable) -> jax.Array:
    """Random coefficients of the real Fourier basis (see `_basis`) in `dims` dimensions, without a mean.

    `envelope` gives the amplitude at each length of the wavevector (cycles per period). Cosines and sines have the same
    variance, so the field is statistically the same everywhere.
    """
    wavenumber = (jnp.arange(2 * modes + 1) + 1) // 2
    squared = sum(jnp.expand_dims(wavenumber**2, [j for j in range(dims) if j != i]) for i in range(dims))
    radius = jnp.sqrt(squared.astype(float))
    series = jax.random.normal(key, (2 * modes + 1,) * dims, float) * envelope(radius)
    return jnp.where(radius == 0, 0.0, series)


def _basis(modes: int, points: int) -> jax.Array:
    """`(points, 2 modes + 1)`: one, then sqrt(2) cos and sqrt(2) sin of every mode, each of mean square one."""
    phase = TAU * jnp.arange(points)[:, None] / points * jnp.arange(1, modes + 1)
    pairs = jnp.sqrt(2.0) * jnp.stack([jnp.cos(phase), jnp.sin(phase)], axis=-1)
    return jnp.concatenate([jnp.ones((points, 1)), pairs.reshape(points, 2 * modes)], axis=1)


def evaluate(series: jax.Array, points: int) -> jax.Array:
    """The series on the grid, with the channel axis."""
    basis = _basis(series.shape[0] // 2, points)
    field = series
    for _ in range(series.ndim):
        field = jnp.tensordot(field, basis, axes=[[0], [1]])  # consumes the first axis, appends the grid's
    return field[..., None]


def root_mean_square(series: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(series**2))  # the basis is orthonormal


def smooth_field(key: jax.Array, modes: int, points: int) -> jax.Array:
    """A random smooth field `(points, points, 1)` of zero mean and root mean square one."""
    series = random_series(key, modes, 2, lambda k: jnp.exp(-2 * (k / modes) ** 2))
    return evaluate(series / root_mean_square(series), points)


def random_state(solver: Any, key: jax.Array, envelope: Callable) -> jax.Array:
    """A random field with one channel in one dimension; its root mean square is `initial_speed`."""
    series = random_series(key, solver.initial_modes, 1, envelope)
    return evaluate(series * solver.initial_speed / root_mean_square(series), solver.solver_points)


def random_vorticity(solver: Any, key: jax.Array) -> jax.Array:
    """Energy at wavenumbers around half of `initial_modes`; scaled to `initial_speed`."""
    peak = solver.initial_modes / 2
    series = random_series(key, solver.initial_modes, 2, lambda k: k * jnp.exp(-((k / peak) ** 2)))
    wavenumber = (jnp.arange(series.shape[0]) + 1) // 2 * (TAU / solver.length)
    radius = jnp.hypot(wavenumber[:, None], wavenumber[None, :])
    speed = root_mean_square(series / jnp.where(radius == 0, 1.0, radius))
    return evaluate(series * solver.initial_speed / speed, solver.solver_points)


def flow_channels(store: str) -> tuple[Channel, ...]:
    return (Channel("vorticity"),) if store == "vorticity" else (Channel("u"), Channel("v"))


def observe_flow(solver: Any, state: jax.Array) -> jax.Array:
    return downsample(solver, velocity_of(state, solver.length) if solver.store == "velocity" else state)


def resume_flow(solver: Any, frame: jax.Array) -> jax.Array:
    vorticity = vorticity_of(frame, solver.length) if solver.store == "velocity" else jnp.asarray(frame)
    return resample(vorticity, solver.solver_points)


def downsample(solver: Any, state: jax.Array) -> jax.Array:
    if solver.downsampling == "fourier":
        return resample(state, solver.points)
    stride = solver.solver_points // solver.points
    return state[(slice(None, None, stride),) * (state.ndim - 1)]


def check(solver: Any) -> None:
    """Raises ConfigError for sizes that cannot work."""
    check_time(solver)
    for name in ("points", "solver_points", "initial_modes"):
        require(getattr(solver, name) >= 1, name, getattr(solver, name), "at least 1")
    for name in ("length", "initial_speed"):
        value = getattr(solver, name, 1.0)  # not every initial state has a speed
        require(0 < value < math.inf, name, value, "positive")
    check_parameters(solver, viscosity="positive", speed="finite")
    if solver.points > solver.solver_points:
        raise ConfigError(
            f"points is {solver.points}, but the solver has only {solver.solver_points} per axis. "
            f"Raise solver_points to at least {solver.points}, or lower points."
        )
    if solver.downsampling == "stride" and solver.solver_points % solver.points:
        near = [n for n in range(1, solver.solver_points + 1) if solver.solver_points % n == 0]
        raise ConfigError(
            f"points is {solver.points}, but a stride must divide solver_points = {solver.solver_points}. "
            f"Use {min(near, key=lambda n: abs(n - solver.points))} points, or downsampling='fourier'."
        )
    if solver.initial_modes >= solver.solver_points // 3:
        raise ConfigError(
            f"initial_modes is {solver.initial_modes}, but the 2/3 rule keeps only modes below "
            f"{solver.solver_points // 3} of {solver.solver_points} solver_points. Raise solver_points or lower "
            "initial_modes."
        )
