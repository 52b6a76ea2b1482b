"""Shallow water, a layer of fluid much thinner than wide: on a rotating plane, periodic both ways, and on a sphere.

The plane is nondimensional and solved here; the sphere is in SI units and solved by dinosaur (the extra `sphere`).
"""

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers import fourier
from physml.solvers.fourier import TAU, Spectral
from physml.solvers.runge_kutta import rk4
from physml.solvers.solver import Range, Solver, Step, borrowed, check_parameters, check_time, require


@dataclass(frozen=True)
class ShallowWater(Spectral):
    """height_t + div(height (u, v)) = 0, (u, v)_t + (u, v) . grad(u, v) + f k x (u, v) = -gravity grad(height) +
    viscosity laplace(u, v) on [0, length)^2. Vallis 2017, doi:10.1017/9781107588417, section 3.1.

    f = coriolis + beta length / (2 pi) sin(2 pi (y / length - 1 / 2)): a periodic f with the slope beta at mid-height.
    Mass is kept to rounding, the energy <height (u^2 + v^2) + gravity height^2> / 2 only falls by viscosity. Waves that
    steepen into shocks are not resolved: keep the speed of the flow well below sqrt(gravity depth).

    Attributes:
        points: stored points per axis.
        solver_points: points of the solver per axis.
        length: period of both axes.
        depth: mean height: number, or (low, high) to draw one per trajectory.
        gravity: likewise.
        coriolis: likewise.
        beta: likewise.
        viscosity: likewise.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period and axis) of the random initial flow.
        initial_speed: root mean square of its velocity, which has no divergence; the height balances it.
        initial_waves: root mean square of a random height on top, which is not balanced, in parts of the depth.
        downsampling: "fourier" truncates the spectrum; "stride" takes every nth point, aliases included.
        precision: of the computation. Files hold float32.
    """

    points: int = 64
    solver_points: int = 128
    length: float = TAU
    depth: Range = 1.0
    gravity: Range = 1.0
    coriolis: Range = 2.0
    beta: Range = 0.0
    viscosity: Range = 1e-3
    time_step: float = 0.25
    substeps: int = 20
    warmup: float = 0.0
    initial_modes: int = 8
    initial_speed: float = 0.2
    initial_waves: float = 0.02
    downsampling: Literal["fourier", "stride"] = "fourier"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 100
    parameters: ClassVar[tuple[str, ...]] = ("depth", "gravity", "coriolis", "beta", "viscosity")
    equation: ClassVar[str] = (
        "height_t + div(height (u, v)) = 0, (u, v)_t + (u, v) . grad(u, v) + f k x (u, v) = -gravity grad(height) + "
        "viscosity laplace(u, v), f = coriolis + beta length / (2 pi) sin(2 pi (y / length - 1 / 2))"
    )
    scheme: ClassVar[str] = "Fourier pseudo-spectral with the 2/3 rule, classical Runge-Kutta method"
    advice: ClassVar[str] = "Raise substeps, solver_points or the viscosity, or lower initial_speed."
    meanings: ClassVar[dict[str, str]] = {
        "height": "height of the fluid column", "u": "velocity along x", "v": "velocity along y",
    }  # fmt: skip
    channels: ClassVar[tuple[Channel, ...]] = (Channel("height"), Channel("u"), Channel("v"))

    def __post_init__(self):
        super().__post_init__()
        check_parameters(self, depth="positive", gravity="positive")
        require(0 <= self.initial_waves < 0.2, "initial_waves", self.initial_waves, "at least 0 and below 0.2")

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 3"]:
        """A random flow without divergence, the height that gives it none at first, and random waves on top."""
        given = self.values(parameters, *self.parameters)
        first, second = jax.random.split(key)
        velocity = fourier.velocity_of(fourier.random_vorticity(self, first), self.length)
        state = jnp.concatenate([jnp.zeros_like(velocity[..., :1]), velocity], axis=-1)
        slopes, laplace, _ = _operators(self.solver_points, self.length)
        spectrum = jnp.fft.rfft2(state, axes=(0, 1))
        rates = self._rates(spectrum, self.length, **{**given, "viscosity": 0.0})
        divergence = slopes[0] * rates[..., 1] + slopes[1] * rates[..., 2]
        balanced = divergence / (given["gravity"] * jnp.where(laplace == 0, 1.0, laplace))
        height = jnp.fft.irfft2(balanced, s=(self.solver_points,) * 2)[..., None]
        waves = fourier.smooth_field(second, self.initial_modes, self.solver_points)
        height = given["depth"] * (1 + self.initial_waves * waves) + height
        return state.at[..., :1].set(height.astype(state.dtype))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step; `length`, `time_step` and parameters (`depth` is in the state) may be given, also traced."""
        given = self.values(parameters, *self.parameters, "length", "time_step")
        values = {name: given[name] for name in (*self.parameters, "length")}
        points = self.solver_points
        advance = rk4(lambda spectrum: self._rates(spectrum, **values), given["time_step"] / self.substeps)

        def step(state):
            state = jnp.asarray(state)
            if state.shape != (points, points, 3):
                raise fourier.wrong_shape(state.shape, (points, points, 3))
            spectrum = jnp.fft.rfft2(state, axes=(0, 1))
            kept = _operators(points, given["length"])[2]
            spectrum = jax.lax.fori_loop(0, self.substeps, lambda _, s: advance(s), kept * spectrum)
            return jnp.fft.irfft2(spectrum, s=(points, points), axes=(0, 1)).astype(state.dtype)

        return step

    def _rates(self, spectrum, length, depth, gravity, coriolis, beta, viscosity):
        """Time derivatives of the spectra `(ky, kx, 3)` of height, u and v, in the form of vorticity and energy."""
        points = self.solver_points
        slopes, laplace, kept = _operators(points, length)
        along_x, along_y = (slope.astype(spectrum.dtype) for slope in slopes)
        _, u_hat, v_hat = (spectrum[..., i] for i in range(3))
        vorticity = along_x * v_hat - along_y * u_hat
        real = jnp.fft.irfft2(
            jnp.concatenate([spectrum, vorticity[..., None]], axis=-1), s=(points, points), axes=(0, 1)
        )
        height, u, v, vorticity = (real[..., i] for i in range(4))
        y = jnp.arange(points)[:, None] / points
        absolute = vorticity + (coriolis + beta * length / TAU * jnp.sin(TAU * (y - 0.5)))
        head = gravity * height + (u**2 + v**2) / 2
        products = jnp.stack([height * u, height * v, head, absolute * u, absolute * v], axis=-1)
        products = kept * jnp.fft.rfft2(products.astype(real.dtype), axes=(0, 1))
        mass_x, mass_y, head, turned_u, turned_v = (products[..., i] for i in range(5))
        damping = (viscosity * laplace).astype(real.dtype)
        return jnp.stack(
            [
                -along_x * mass_x - along_y * mass_y,
                turned_v - along_x * head + damping * u_hat,
                -turned_u - along_y * head + damping * v_hat,
            ],
            axis=-1,
        )


def _operators(points: int, length: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """d/dx and d/dy, the Laplacian, and the modes that the 2/3 rule keeps (channel axis last), on spectra (ky, kx)."""
    ky, kx = jnp.fft.fftfreq(points, 1 / points)[:, None], jnp.arange(points // 2 + 1)[None, :] * 1.0
    kept = (jnp.abs(ky) < points / 3) & (kx < points / 3)
    unit = TAU / length
    return (1j * unit * kx, 1j * unit * ky), -(unit**2) * (kx**2 + ky**2), kept[..., None]


@dataclass(frozen=True)
class ShallowWaterSphere(Solver):
    """Rotating shallow water on the sphere: an unstable jet or random eddies, in SI units.

    vorticity_t = -div((vorticity + f) velocity), divergence_t = k . curl((vorticity + f) velocity) - laplace(gravity
    height + |velocity|^2 / 2), height_t = -div(height velocity), f = 2 omega sin(latitude), and viscosity laplace(.) of
    each. Spherical harmonics, semi-implicit gravity waves (Whitaker & Kar 2013, doi:10.1175/MWR-D-13-00132.1), by
    dinosaur. Mass is kept to rounding. A state holds harmonics `(3, order, degree)` of vorticity, divergence and
    gravity times height.

    Attributes:
        points: latitudes (Gauss); there are twice as many longitudes. Quadratic terms are free of aliasing.
        family: "jet" is the barotropic instability of Galewsky, Scott & Polvani 2004 (doi:10.3402/tellusa.v56i5.14436)
            with the bump at a random place in the jet; "eddies" is a random balanced flow without a mean.
        depth: mean height in m, without the bump: number, or (low, high) to draw one per trajectory.
        speed: greatest speed of the jet, root mean square of the eddies, in m s-1; likewise.
        viscosity: in m2 s-1, likewise; 1e5 is that of Galewsky et al.
        bump: height of the bump on the jet in m.
        modes: highest degree of the eddies.
        time_step: seconds between stored frames.
        substeps: solver steps per stored frame.
        warmup: seconds dropped before the first stored frame.
        store: "velocity" (height, u, v) or "vorticity" (height, vorticity, divergence).
        precision: of the computation. Files hold float32.
    """

    points: int = 96
    family: Literal["jet", "eddies"] = "jet"
    depth: Range = 1e4
    speed: Range = 80.0
    viscosity: Range = 1e5
    bump: float = 120.0
    modes: int = 12
    time_step: float = 21600.0
    substeps: int = 36
    warmup: float = 0.0
    store: Literal["velocity", "vorticity"] = "velocity"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("latitude", "longitude")
    usual_steps: ClassVar[int] = 24
    time_unit: ClassVar[str] = "s"
    parameters: ClassVar[tuple[str, ...]] = ("depth", "speed", "viscosity")
    units: ClassVar[dict[str, str]] = {"depth": "m", "speed": "m s-1", "viscosity": "m2 s-1"}
    equation: ClassVar[str] = (
        "height_t + div(height (u, v)) = 0, (u, v)_t + (u, v) . grad(u, v) + f k x (u, v) = -gravity grad(height), "
        "f = 2 omega sin(latitude), and viscosity laplace of vorticity, divergence and height"
    )
    boundary: ClassVar[str] = "sphere"
    scheme: ClassVar[str] = "spherical harmonics on a Gauss grid, implicit-explicit Runge-Kutta method SIL3"
    packages: ClassVar[tuple[str, ...]] = ("dinosaur",)
    advice: ClassVar[str] = "Raise substeps, points or the viscosity, or lower the speed."
    meanings: ClassVar[dict[str, str]] = {
        "height": "height of the fluid column", "u": "eastward velocity", "v": "northward velocity",
        "vorticity": "relative vorticity", "divergence": "divergence of the velocity",
    }  # fmt: skip

    def __post_init__(self):
        check_time(self)
        check_parameters(self, depth="positive", speed="positive")
        require(self.points >= 8 and self.points % 2 == 0, "points", self.points, "even and at least 8")
        require(0 <= self.bump < math.inf, "bump", self.bump, "zero or positive")
        require(1 <= self.modes <= self.truncation, "modes", self.modes, f"from 1 to {self.truncation}, the truncation")

    @property
    def truncation(self) -> int:
        """The highest degree whose products are exact: T21, T42, T63, T85 for 32, 64, 96, 128 latitudes."""
        return (2 * self.points - 1) // 3

    @property
    def channels(self) -> tuple[Channel, ...]:
        height = Channel("height", "m")
        if self.store == "velocity":
            return height, Channel("u", "m s-1"), Channel("v", "m s-1")
        return height, Channel("vorticity", "s-1"), Channel("divergence", "s-1")

    @property
    def grid(self) -> Grid:
        sines, _ = np.polynomial.legendre.leggauss(self.points)
        latitude = np.degrees(np.arcsin(sines))
        weights = np.cos(np.radians(latitude))
        return Grid(
            (
                Axis("latitude", tuple(latitude.tolist()), tuple((weights / weights.mean()).tolist()),
                     unit="degrees_north"),
                Axis.uniform("longitude", 2 * self.points, 360.0, unit="degrees_east"),
            )
        )  # fmt: skip

    @property
    def cells(self) -> int:
        return 2 * self.points**2

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "3 order degree"]:
        """A random member of the family, without divergence and, but for the bump, in balance."""
        given = self.values(parameters, *self.parameters)
        latitude = jnp.radians(jnp.asarray(self.grid.axes[0].centers, float))
        if self.family == "eddies":
            return self.balanced(self._eddies(key, given["speed"]), given["depth"])
        jet = jnp.broadcast_to(given["speed"] * _jet(latitude), (2 * self.points, self.points))
        longitude, north = jax.random.uniform(key, (2,), float)
        state = self.balanced(self.curl(jet), given["depth"])
        # The jet is widest between 30 and 60 degrees.
        return self.add_bump(state, 360.0 * longitude, 30.0 + 30.0 * north)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. `time_step` and the parameters (`speed` lies in the state) may be given, also traced."""
        given = self.values(parameters, *self.parameters, "time_step")
        time_step = given["time_step"] / self.substeps
        sphere = _sphere(self.points)
        advance = sphere.integrator(sphere.equations(given["depth"] * GRAVITY), time_step)
        damping = jnp.exp(given["viscosity"] * time_step * jnp.asarray(sphere.grid.laplacian_eigenvalues))

        mean = given["depth"] * GRAVITY * CONSTANT

        def substep(_, state):
            moved = advance(sphere.wrap(state))
            return (sphere.unwrap(moved) * damping).astype(state.dtype)

        def step(state):
            # dinosaur adds the mean of gravity times height itself.
            state = jnp.asarray(state).at[2, 0, 0].add(-mean)
            return jax.lax.fori_loop(0, self.substeps, substep, state).at[2, 0, 0].add(mean)

        return step

    def observe(self, state: Float[ArrayLike, "3 order degree"]) -> Float[ArrayLike, "latitude longitude 3"]:
        """Height and velocity, or height, vorticity and divergence, on the grid."""
        sphere = _sphere(self.points)
        state = jnp.asarray(state)
        height = sphere.grid.to_nodal(state[2]) / GRAVITY
        others = sphere.velocity(state[0], state[1]) if self.store == "velocity" else sphere.grid.to_nodal(state[:2])
        fields = jnp.stack([height, *others], axis=-1)
        return jnp.swapaxes(fields, 0, 1).astype(state.dtype)

    def curl(self, eastward: Float[ArrayLike, "longitude latitude"]) -> Float[ArrayLike, "order degree"]:
        """Harmonics of the vorticity of a wind along the latitudes."""
        grid = _sphere(self.points).grid
        return -grid.sec_lat_d_dlat_cos2(grid.to_modal(eastward / grid.cos_lat)) / grid.radius

    def balanced(self, vorticity: Float[ArrayLike, "order degree"], depth: Any) -> Float[ArrayLike, "3 order degree"]:
        """The flow of this vorticity without divergence, and the height of mean `depth` that keeps it so at first."""
        sphere = _sphere(self.points)
        none = jnp.zeros_like(vorticity)
        # With no height, the tendency of the divergence is the laplacian of what balances it.
        tendency = sphere.equations(0.0).explicit_terms(sphere.wrap(jnp.stack([vorticity, none, none])))
        height = sphere.grid.inverse_laplacian(tendency.divergence[0])
        return jnp.stack([vorticity, none, height.at[0, 0].set(GRAVITY * depth * CONSTANT)])

    def add_bump(
        self, state: Float[ArrayLike, "3 order degree"], longitude: Any, latitude: Any
    ) -> Float[ArrayLike, "3 order degree"]:
        """The state with the bump of Galewsky et al. 2004, equation 4, at a place in degrees."""
        grid = _sphere(self.points).grid
        east, sines = grid.nodal_mesh
        north = jnp.arcsin(sines)
        away = (east - jnp.radians(longitude) + jnp.pi) % (2 * jnp.pi) - jnp.pi
        shape = jnp.cos(north) * jnp.exp(-((3 * away) ** 2) - (15 * (jnp.radians(latitude) - north)) ** 2)
        return state.at[2].add(grid.to_modal(GRAVITY * self.bump * shape).astype(state.dtype))

    def _eddies(self, key, speed):
        """A random vorticity, mostly of degrees near half of `modes`, whose velocity has the mean square speed^2."""
        grid = _sphere(self.points).grid
        order, degree = grid.modal_mesh
        kept = (abs(order) <= degree) & (degree >= 1) & (degree <= self.modes)
        peak = self.modes / 2
        stream = kept * np.exp(-((degree / peak) ** 2)) * jax.random.normal(key, kept.shape, float)
        eigenvalues = jnp.asarray(grid.laplacian_eigenvalues)
        mean_square = -jnp.sum(eigenvalues * stream**2) / (4 * jnp.pi)
        return eigenvalues * stream * speed / jnp.sqrt(mean_square)


RADIUS, OMEGA, GRAVITY = 6371220.0, 7.292e-5, 9.80616  # m, s-1, m s-2; Galewsky et al. 2004
CONSTANT = math.sqrt(4 * math.pi)  # the harmonic of degree zero of a field that is one everywhere


def _jet(latitude: jax.Array) -> jax.Array:
    """The zonal jet of Galewsky et al. 2004, equation 2, of greatest speed one; latitude in radians."""
    south, north = math.pi / 7, math.pi / 2 - math.pi / 7
    inside = (latitude > south) & (latitude < north)
    product = jnp.where(inside, (latitude - south) * (latitude - north), -1.0)
    return jnp.where(inside, jnp.exp(1 / product + 4 / (north - south) ** 2), 0.0)


def _sphere(points: int) -> SimpleNamespace:
    """dinosaur on a Gauss grid of `points` latitudes in SI units, one layer. Raises DependencyError without it."""
    # jax remembers the type that a numpy constant was lowered with: one grid must not serve both precisions.
    return _build_sphere(points, bool(jax.config.jax_enable_x64))


@functools.lru_cache(maxsize=8)
def _build_sphere(points: int, double: bool) -> SimpleNamespace:
    harmonics = borrowed("dinosaur.spherical_harmonic", "sphere")
    shallow_water, coordinates, layers, integration = (
        borrowed(f"dinosaur.{name}", "sphere")
        for name in ("shallow_water", "coordinate_systems", "layer_coordinates", "time_integration")
    )
    truncation = (2 * points - 1) // 3
    grid = harmonics.Grid(truncation + 1, truncation + 2, 2 * points, points, radius=RADIUS)
    system = coordinates.CoordinateSystem(grid, layers.LayerCoordinates(1))
    rotation = SimpleNamespace(angular_velocity=OMEGA)
    return SimpleNamespace(
        grid=grid,
        equations=lambda potential: shallow_water.ShallowWaterEquations(
            system, rotation, None, jnp.asarray(potential, float)[None]
        ),
        integrator=integration.imex_rk_sil3,
        wrap=lambda state: shallow_water.State(*state[:, None]),
        unwrap=lambda state: jnp.concatenate([state.vorticity, state.divergence, state.potential]),
        velocity=lambda vorticity, divergence: harmonics.vor_div_to_uv_nodal(grid, vorticity, divergence),
    )
