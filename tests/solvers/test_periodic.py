"""The periodic solvers against exact solutions, balances and independent reference trajectories."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import ive

from physml import coding
from physml.errors import ConfigError
from physml.solvers import (
    SOLVERS,
    Advection,
    Burgers,
    DecayingNavierStokes,
    Kolmogorov,
    KortewegDeVries,
    KuramotoSivashinsky,
    make_solver,
    resample,
    velocity_of,
)

REFERENCE = pathlib.Path(__file__).parent / "reference"
SMALL = {
    "advection": Advection(points=32, solver_points=32),
    "burgers": Burgers(points=32, solver_points=64, viscosity=0.1),
    "decaying_navier_stokes": DecayingNavierStokes(points=16, solver_points=32, viscosity=0.02, substeps=10),
    "kolmogorov": Kolmogorov(points=16, solver_points=32, viscosity=0.05, substeps=10),
    "korteweg_de_vries": KortewegDeVries(points=64, solver_points=64),
    "kuramoto_sivashinsky": KuramotoSivashinsky(points=64, solver_points=64, length=32.0, initial_modes=8),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def follow(solver, states, steps):
    """The batch of states after each of `steps` stored steps."""
    advance = jax.jit(jax.vmap(solver.stepper()))
    result = []
    for number in range(1, max(steps) + 1):
        states = advance(states)
        if number in steps:
            result.append(states)
    return result


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


def rate(values, step):
    """Fourth-order time derivative at all but the two first and two last times."""
    values = np.asarray(values)
    return (values[:-4] - 8 * values[1:-3] + 8 * values[3:-1] - values[4:]) / (12 * step)


def spectral_derivative(u, length, order):
    k = 2j * np.pi * np.fft.rfftfreq(u.shape[-1], 1 / u.shape[-1]) / length
    return np.fft.irfft(np.fft.rfft(u) * k**order, n=u.shape[-1])


# --- the same initial state gives the same trajectory ---


@pytest.mark.parametrize("name", ["burgers_0p01", "burgers_0p05"])
def test_burgers_follows_the_reference(float64, name):
    data = reference(name)
    solver = Burgers(viscosity=float(data["viscosity"]), downsampling="stride")
    for i, state in enumerate(follow(solver, data["initial"][..., None], data["steps"])):
        assert relative(jax.vmap(solver.observe)(state)[..., 0], data["frames"][:, i]) < 6e-8  # frames are float32


def test_kuramoto_sivashinsky_follows_the_reference(float64):
    data = reference("kuramoto_sivashinsky")
    states = follow(KuramotoSivashinsky(), data["initial"][..., None], data["steps"])
    for state, frames, limit in zip(states, data["frames"].swapaxes(0, 1), (1e-7, 7e-7, 4e-6), strict=True):
        assert relative(state[..., 0], frames) < limit  # chaos amplifies rounding: t = 1, 20, 40


@pytest.mark.parametrize(
    ("name", "solver", "limits"),
    [
        ("kolmogorov", Kolmogorov(points=96, substeps=50, downsampling="stride"), (6e-6, 1e-6)),
        ("decaying_navier_stokes", DecayingNavierStokes(points=96, time_step=0.5, substeps=100, downsampling="stride"),
         (1e-6, 1e-6)),
    ],
)  # fmt: skip
def test_flow_follows_the_reference(float64, name, solver, limits):
    data = reference(name)
    initial = jax.vmap(lambda w: resample(w, 192))(data["initial"][..., None])
    observe, velocity_of_each = jax.jit(jax.vmap(solver.observe)), jax.jit(jax.vmap(velocity_of))
    for i, state in enumerate(follow(solver, initial, data["steps"])):
        assert relative(observe(state)[..., 0], data["frames"][:, i]) < limits[i]
        velocity = velocity_of_each(state)
        assert_allclose(jnp.mean(jnp.sum(velocity**2, -1), (1, 2)) / 2, data["kinetic_energy"][:, i], rtol=1e-6)
        assert_allclose(jnp.mean(state**2, (1, 2, 3)) / 2, data["enstrophy"][:, i], rtol=1e-6)
        if "power_input" in data:
            y = np.arange(192)[:, None] * 2 * np.pi / 192
            assert_allclose(jnp.mean(velocity[..., 0] * np.sin(4 * y), (1, 2)), data["power_input"][:, i], rtol=1e-6)


def test_korteweg_de_vries_follows_the_reference(float64):
    data = reference("korteweg_de_vries")
    solver = KortewegDeVries(points=512, solver_points=512, length=60.0, time_step=0.2, substeps=200)
    for state, frame in zip(follow(solver, data["initial"][..., None], data["steps"]), data["frames"][0], strict=True):
        assert relative(state[0, :, 0], frame) < 2e-7  # frames are float32


# --- exact solutions ---


@pytest.mark.parametrize("points", [32, 33])
def test_advection_is_a_shift(float64, points):
    solver = Advection(points=points, solver_points=points, length=3.0, speed=-0.7, time_step=0.4)
    x = np.arange(points) * 3.0 / points

    def wave(x):
        return np.sin(2 * np.pi * x / 3) + np.cos(2 * np.pi * 5 * x / 3 + 1)

    moved = jax.jit(solver.stepper())(wave(x)[:, None])
    assert_allclose(moved[:, 0], wave(x + 0.7 * 0.4), atol=1e-13)


def test_korteweg_de_vries_is_of_fourth_order(float64):
    """A soliton of speed 4 on 40, after t = 2: the error falls as time_step^4 and is known from an independent code."""
    x, errors = np.arange(256) * 40 / 256, []

    def soliton(t):
        return 2 / np.cosh(x - 12 - 4 * t) ** 2

    for substeps in (500, 1000, 2000):
        solver = KortewegDeVries(time_step=2.0, substeps=substeps)
        errors.append(abs(jax.jit(solver.stepper())(soliton(0)[:, None])[:, 0] - soliton(2)).max())
    assert_allclose(errors[:2], [5.9e-6, 3.4e-7], rtol=0.3)
    assert errors[2] < 1e-7
    assert np.log2(errors[0] / errors[1]) > 3.8


def test_two_solitons_pass_through_each_other(float64):
    """u = 2 (log F)_xx, F = 1 + e1 + e2 + ((k1 - k2) / (k1 + k2))^2 e1 e2, ei = exp(ki (x - xi) - ki^3 t)."""
    x, k1, k2 = np.arange(512) * 60 / 512, 2.0, 1.3

    def exact(t):
        e1, e2 = (np.exp(k * (x - at) - k**3 * t) for k, at in ((k1, 12.0), (k2, 24.0)))
        a = ((k1 - k2) / (k1 + k2)) ** 2
        f, fx = 1 + e1 + e2 + a * e1 * e2, k1 * e1 + k2 * e2 + a * (k1 + k2) * e1 * e2
        fxx = k1**2 * e1 + k2**2 * e2 + a * (k1 + k2) ** 2 * e1 * e2
        return 2 * (fxx / f - (fx / f) ** 2)

    solver = KortewegDeVries(points=512, solver_points=512, length=60.0, time_step=6.0, substeps=6000)
    assert_allclose(jax.jit(solver.stepper())(exact(0)[:, None])[:, 0], exact(6.0), atol=2e-6)


def test_burgers_is_cole_hopf(float64):
    """From sin(x): u = -2 nu phi_x / phi with phi = I_0(z) + 2 sum I_n(z) cos(n x) exp(-nu n^2 t), z = 1 / (2 nu)."""
    nu, x, n = 0.1, np.arange(128) * 2 * np.pi / 128, np.arange(1, 60)[:, None]
    solver = Burgers(points=128, solver_points=128, viscosity=nu, time_step=2.0, substeps=200)
    weight = 2 * ive(n, 1 / (2 * nu)) * np.exp(-nu * n**2 * 2.0)
    exact = 2 * nu * np.sum(weight * n * np.sin(n * x), 0) / (ive(0, 1 / (2 * nu)) + np.sum(weight * np.cos(n * x), 0))
    assert_allclose(
        jax.jit(solver.stepper())(jnp.sin(x)[:, None])[:, 0], exact, atol=5e-7
    )  # 2.1e-7 measured at dt 0.01


@pytest.mark.parametrize("length", [2 * np.pi, 3.0])
def test_taylor_green_vortex_decays_exactly(float64, length):
    solver = DecayingNavierStokes(points=24, solver_points=24, length=length, viscosity=0.02, initial_modes=4)
    x = np.arange(24) * length / 24
    k = 2 * np.pi / length
    y = x[:, None]
    vorticity = (2 * k * np.sin(k * x) * np.sin(k * y))[..., None]
    velocity = np.stack([np.sin(k * x) * np.cos(k * y), -np.cos(k * x) * np.sin(k * y)], -1)
    assert_allclose(velocity_of(vorticity, length), velocity, atol=1e-13)
    decay = np.exp(-2 * solver.viscosity * k**2 * solver.time_step)
    assert_allclose(jax.jit(solver.stepper())(vorticity), decay * vorticity, atol=1e-12)


@pytest.mark.parametrize(("length", "mode"), [(2 * np.pi, 4), (4 * np.pi, 3)])
def test_kolmogorov_keeps_the_laminar_flow(float64, length, mode):
    """u = forcing_scale sin(k y) / (viscosity k^2 + drag), also where the box is not 2 pi long."""
    solver = Kolmogorov(points=32, solver_points=32, length=length, forcing_mode=mode, forcing_scale=0.7, drag=0.3)
    k, y = 2 * np.pi * mode / length, np.arange(32)[:, None] * length / 32
    amplitude = 0.7 / (solver.viscosity * k**2 + 0.3)
    vorticity = np.broadcast_to(-k * amplitude * np.cos(k * y), (32, 32))[..., None]  # -du/dy
    assert_allclose(
        velocity_of(vorticity, length)[..., 0], np.broadcast_to(amplitude * np.sin(k * y), (32, 32)), atol=1e-12
    )
    assert_allclose(jax.jit(solver.stepper())(vorticity), vorticity, atol=1e-12)


# --- balances ---


def test_burgers_keeps_its_mean_and_loses_energy(float64):
    solver = Burgers(points=128, solver_points=128, viscosity=0.05, substeps=20, initial_speed=1.0)
    initial = jax.vmap(solver.initial)(jax.random.split(jax.random.key(0), 3)) + 0.3
    states = np.stack([initial, *follow(solver, initial, range(1, 31))])
    assert_allclose(states.mean((2, 3)), 0.3, atol=1e-13)
    assert (np.diff((states**2).mean((2, 3)), axis=0) < 0).all()
    assert (np.diff(abs(states).max((2, 3)), axis=0) < 1e-6).all()  # the maximum principle, up to the grid's sampling


def test_korteweg_de_vries_keeps_its_invariants(float64):
    solver = KortewegDeVries(substeps=100)
    start = solver.initial(jax.random.key(0))[None] + 0.1
    u = np.stack([start, *follow(solver, start, range(1, 41))])[:, 0, :, 0]
    slope = spectral_derivative(u, 40.0, 1)
    for invariant in (u, u**2, u**3 - slope**2 / 2):
        assert_allclose(invariant.mean(-1), invariant.mean(-1)[0], rtol=1e-7)
    assert relative(u[-1], u[0]) > 0.5


def test_kuramoto_sivashinsky_balances_energy(float64):
    """d<u^2 / 2>/dt = <u_x^2> - viscosity <u_xx^2>, and the mean stays."""
    solver = KuramotoSivashinsky(
        points=64, solver_points=64, length=32.0, viscosity=1.3, time_step=0.05, initial_modes=8
    )
    initial = solver.initial(jax.random.key(1))[None]
    u = np.stack(follow(solver, initial, range(1, 61)))[:, 0, :, 0]
    assert_allclose(u.mean(-1), 0, atol=1e-13)
    production = (spectral_derivative(u, 32.0, 1) ** 2).mean(-1) - 1.3 * (spectral_derivative(u, 32.0, 2) ** 2).mean(-1)
    assert_allclose(rate((u**2).mean(-1) / 2, 0.05)[20:], production[22:-2], atol=2e-4)


def test_kuramoto_sivashinsky_has_the_known_statistics(float64):
    """On the attractor <u_x^2> = <u_xx^2> and, at length 64, <u^2> = 1.71; the spectrum peaks near k = 0.69."""
    solver = KuramotoSivashinsky(points=128, solver_points=128, time_step=0.4, substeps=10)
    initial = jax.vmap(solver.initial)(jax.random.split(jax.random.key(2), 16))
    u = np.stack(follow(solver, initial, range(250, 1001, 5)))[..., 0]  # t = 100 to 400
    first, second = (spectral_derivative(u, 64.0, order) ** 2 for order in (1, 2))
    assert first.mean() == pytest.approx(second.mean(), rel=5e-3)
    assert (u**2).mean() == pytest.approx(1.71, rel=0.05)
    spectrum = (abs(np.fft.rfft(u)) ** 2).mean((0, 1))
    assert 2 * np.pi / 64 * spectrum.argmax() == pytest.approx(0.69, abs=0.1)


def flow_budget(solver, key, steps):
    """Energy, enstrophy and <u_x sin(k y)> of every stored step."""
    states = np.stack(follow(solver, solver.initial(key)[None], range(1, steps + 1)))[:, 0]
    velocity = jax.jit(jax.vmap(velocity_of))(states)
    y = np.arange(solver.solver_points)[:, None] * 2 * np.pi / solver.solver_points
    force = np.sin(getattr(solver, "forcing_mode", 0) * y)
    power = np.asarray(velocity[..., 0] * force).mean((1, 2))
    return np.asarray(velocity**2).sum(-1).mean((1, 2)) / 2, (states**2).mean((1, 2, 3)) / 2, power, states


def test_decaying_flow_balances_energy(float64):
    solver = DecayingNavierStokes(
        points=48, solver_points=48, viscosity=0.01, time_step=0.02, substeps=4, initial_modes=6
    )
    energy, enstrophy, _, states = flow_budget(solver, jax.random.key(3), 30)
    assert_allclose(rate(energy, 0.02), -2 * 0.01 * enstrophy[2:-2], rtol=1e-4)
    assert (np.diff(enstrophy) < 0).all()
    assert_allclose(states.mean((1, 2)), 0, atol=1e-12)


def test_kolmogorov_flow_balances_energy(float64):
    solver = Kolmogorov(
        points=48, solver_points=48, viscosity=0.02, drag=0.2, forcing_scale=1.5, time_step=0.02, substeps=4
    )
    energy, enstrophy, power, states = flow_budget(solver, jax.random.key(4), 30)
    balance = 1.5 * power - 2 * 0.2 * energy - 2 * 0.02 * enstrophy
    assert_allclose(rate(energy, 0.02), balance[2:-2], atol=1e-4)
    assert_allclose(states.mean((1, 2)), 0, atol=1e-12)


# --- pure functions: mapped, differentiated, in any precision ---

QUICK = ("korteweg_de_vries", "kolmogorov")  # one of each stepping, the others with the slow tests
few = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])


@few
def test_parameters_may_be_traced(float64, name):
    """A batch over viscosity, length and time step equals the single runs, and the gradient is the slope."""
    solver = SMALL[name]
    state = solver.initial(jax.random.key(0))

    @jax.jit
    def step(values):
        return solver.stepper(**values)(state)

    name = solver.parameters[0]
    factors = {name: 1.3, "length": 1.1, "time_step": 1.2}
    values = {key: getattr(solver, key) * jnp.array([1.0, factor]) for key, factor in factors.items()}
    batch = jax.jit(jax.vmap(step))(values)
    for i in range(2):
        assert_allclose(batch[i], step({key: value[i] for key, value in values.items()}), atol=1e-10)
    assert relative(batch[1], batch[0]) > 1e-4
    assert_allclose(batch[0], jax.jit(solver.stepper())(state), atol=1e-10)  # the config's own values

    weight = jnp.linspace(0, 1, state.size).reshape(state.shape)

    def loss(value):
        return jnp.mean(weight * step({key: values[key][0] for key in values} | {name: value}) ** 2)

    nu, h = getattr(solver, name), 1e-5
    slope = (loss(nu + h) - loss(nu - h)) / (2 * h)
    assert_allclose(jax.jit(jax.grad(loss))(nu), slope, rtol=1e-5)


@few
def test_precision_follows_the_state(name):
    solver = SMALL[name]
    with jax.enable_x64(True):
        state = np.asarray(solver.initial(jax.random.key(0)))
        exact = np.asarray(jax.jit(solver.stepper())(state))
        single = jax.jit(solver.stepper())(state.astype(np.float32))
    assert exact.dtype == np.float64
    assert single.dtype == jnp.float32
    without = jax.jit(solver.stepper())(state.astype(np.float32))
    assert without.dtype == jnp.float32
    assert max(relative(single, exact), relative(without, exact)) < 2e-5  # float32 through up to 50 substeps


def test_eager_is_jit():
    solver = SMALL["kolmogorov"]
    state = solver.initial(jax.random.key(0))
    assert_allclose(jax.jit(solver.stepper())(state), solver.stepper()(state), atol=2e-5)


# --- initial states and what is stored ---


@pytest.mark.parametrize("name", SMALL)
def test_initial_state_is_smooth_and_scaled(float64, name):
    solver = SMALL[name]
    fine = make_solver(name, solver_points=2 * solver.solver_points, points=solver.points, length=solver.length,
                       initial_modes=solver.initial_modes)  # fmt: skip
    key = jax.random.key(5)
    state = solver.initial(key)
    every_second = (slice(None, None, 2),) * (state.ndim - 1)
    assert_allclose(fine.initial(key)[every_second] * solver.initial_speed / fine.initial_speed, state, atol=1e-12)
    velocity = velocity_of(state, solver.length) if state.ndim == 3 else state
    assert jnp.sqrt(jnp.mean(jnp.sum(velocity**2, -1))) == pytest.approx(solver.initial_speed, rel=1e-12)
    assert_allclose(state.mean(), 0, atol=1e-12)
    assert relative(solver.initial(jax.random.key(6)), state) > 0.5


@pytest.mark.parametrize("name", SMALL)
def test_every_solver_stores_what_its_grid_and_channels_say(name):
    solver = SMALL[name]
    frame = jax.jit(lambda key: solver.observe(solver.stepper()(solver.initial(key))))(jax.random.key(0))
    assert frame.shape == (*solver.grid.shape, len(solver.channels))
    assert np.isfinite(frame).all()
    assert all(solver.grid.periodic)
    assert [axis.length for axis in solver.grid.axes] == pytest.approx([solver.length] * len(solver.axes))
    assert coding.from_dict(SOLVERS, coding.to_dict(solver, SOLVERS)) == solver


def test_truncation_and_stride_agree_on_resolved_fields(float64):
    fields = {"points": 16, "solver_points": 32, "initial_modes": 5}
    truncated, strided = (DecayingNavierStokes(**fields, downsampling=how) for how in ("fourier", "stride"))
    state = truncated.initial(jax.random.key(0))
    assert_allclose(truncated.observe(state), strided.observe(state), atol=1e-12)
    assert_allclose(resample(resample(state, 48), 32), state, atol=1e-12)


def test_stored_velocity_has_the_stored_vorticity(float64):
    solver = Kolmogorov(points=24, solver_points=32, length=5.0, store="velocity", initial_modes=6)
    state = solver.initial(jax.random.key(0))
    u, v = np.moveaxis(np.asarray(solver.observe(state)), -1, 0)
    curl = spectral_derivative(v, 5.0, 1) - spectral_derivative(u.T, 5.0, 1).T
    assert_allclose(curl, resample(state, 24)[..., 0], atol=1e-10)
    assert_allclose(spectral_derivative(u, 5.0, 1) + spectral_derivative(v.T, 5.0, 1).T, 0, atol=1e-10)


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("kolmogorow", {}, ["kolmogorow", "Did you mean 'kolmogorov'"]),
        ("kolmogorov", {"viscocity": 1e-3}, ["viscocity", "Did you mean 'viscosity'"]),
        ("kolmogorov", {"viscosity": -1.0}, ["viscosity is -1.0", "positive"]),
        ("kolmogorov", {"viscosity": (0.2, 0.1)}, ["viscosity", "increasing"]),
        ("kolmogorov", {"drag": -0.1}, ["drag is -0.1"]),
        ("kolmogorov", {"points": "many"}, ["solver.points", "integer"]),
        ("kolmogorov", {"forcing_mode": 64}, ["forcing_mode is 64", "1 to 63", "195"]),
        ("burgers", {"points": 2048}, ["points is 2048", "1024"]),
        ("burgers", {"points": 250, "downsampling": "stride"}, ["250", "Use 256 points"]),
        ("burgers", {"substeps": 0}, ["substeps is 0", "at least 1"]),
        ("burgers", {"initial_modes": 400}, ["initial_modes is 400", "341"]),
        ("kuramoto_sivashinsky", {"warmup": -1.0}, ["warmup is -1.0"]),
        ("kuramoto_sivashinsky", {"length": float("nan")}, ["length is nan"]),
    ],
)
def test_a_mistake_is_named(name, fields, parts):
    with pytest.raises(ConfigError) as caught:
        make_solver(name, **fields)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_misplaced_state_or_parameter_is_named():
    solver = SMALL["kolmogorov"]
    with pytest.raises(ConfigError, match=r"\(16, 16, 1\).*\(32, 32, 1\)"):
        solver.stepper()(jnp.zeros((16, 16, 1)))
    with pytest.raises(ConfigError, match="no parameter.*nu.*viscosity"):
        solver.stepper(nu=0.1)
    with pytest.raises(ConfigError, match=r"viscosity is drawn from \(0.1, 0.2\)"):
        make_solver("burgers", viscosity=(0.1, 0.2)).stepper()
