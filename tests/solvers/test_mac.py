"""Incompressible flow with walls against exact solutions, published profiles and balances."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from numpy.testing import assert_allclose

from physml.errors import ConfigError
from physml.solvers import Cavity, Cylinder, Dam, Smoke, Tube, mac, make_solver
from physml.solvers.cfdbench_flows import SMALLEST_REYNOLDS
from physml.solvers.mac import Box, Flow

SIDES = {
    "walls": {},
    "channel": {"left": mac.inflow(1.0), "right": mac.outflow()},
    "periodic x": {"left": mac.periodic(), "right": mac.periodic()},
    "periodic y": {"bottom": mac.periodic(), "top": mac.periodic()},
    "periodic": dict.fromkeys(("left", "right", "bottom", "top"), mac.periodic()),
    "open top": {"left": mac.inflow(1.0), "bottom": mac.free_slip(), "top": mac.outflow(), "right": mac.outflow()},
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_cosine_transforms(n):
    x = np.random.default_rng(0).standard_normal((3, n))
    found = mac.cosine_transform(jnp.asarray(x))
    assert_allclose(found, scipy.fft.dct(x, axis=1) / 2, atol=1e-14)
    assert_allclose(mac.inverse_cosine_transform(found), x, atol=1e-14)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("ny", "nx"), [(8, 6), (7, 5)])
def test_a_projection_leaves_no_divergence(sides, ny, nx):
    """The rest is a gradient: a second projection changes nothing."""
    box, random = Box(0.3, 0.2, 0.1, **SIDES[sides]), np.random.default_rng(0)
    u, v = random.standard_normal((ny, nx + 1)), random.standard_normal((ny + 1, nx))
    if box.left.kind == "periodic":
        u[:, -1] = u[:, 0]
    if box.bottom.kind == "periodic":
        v[-1] = v[0]
    once = mac.project(box, jnp.asarray(u), jnp.asarray(v), jnp.zeros((ny, nx)), 0.5)
    assert abs(mac.divergence(box, once.u, once.v)).max() < 1e-12
    assert abs(once.p).max() > 0.1
    if "open" not in {side.kind for side in (box.right, box.top)}:
        twice = mac.project(box, once.u, once.v, once.p, 0.5)
        for a, b in zip(twice, once, strict=True):
            assert_allclose(a, b, atol=1e-12)


def vortices(n, sides, wind, advection):
    """Taylor-Green vortices with viscosity 0.02 that drift with `wind`, after a time of 0.5: the largest error of u."""
    h, nu, t = 2.0 / n if sides == "periodic" else 1.0 / n, 0.02, 0.5
    side = mac.periodic() if sides == "periodic" else mac.free_slip()
    box = Box(h, h, nu, **dict.fromkeys(("left", "right", "bottom", "top"), side), advection=advection)
    face, cell = jnp.arange(n + 1) * h, (jnp.arange(n) + 0.5) * h

    def exact(t):
        decay, x, y = jnp.exp(-2 * jnp.pi**2 * nu * t), jnp.pi * (face - wind * t), jnp.pi * cell[:, None]
        u = wind + jnp.sin(x) * jnp.cos(y) * decay
        v = -jnp.cos(jnp.pi * (cell - wind * t)) * jnp.sin(jnp.pi * face[:, None]) * decay
        return Flow(u, v, jnp.zeros((n, n)))

    flow = jax.jit(lambda flow: mac.advance(box, flow, t)[0])(exact(0.0))
    assert abs(mac.divergence(box, flow.u, flow.v)).max() < 1e-10
    return float(abs(flow.u - exact(t).u).max())


@pytest.mark.parametrize(
    ("sides", "wind", "advection", "order"),
    [("slip", 0.0, "central", 1.9), ("periodic", 1.0, "central", 1.9), ("periodic", 1.0, "limited", 1.3)],
)
def test_vortices_decay_at_second_order(sides, wind, advection, order):
    """The limiter falls back to first order at extrema, so its largest error converges more slowly."""
    coarse, fine = (vortices(n, sides, wind, advection) for n in (16, 32))
    assert fine < 0.03
    assert np.log2(coarse / fine) > order


def test_a_sliding_wall_drags_the_fluid_into_a_straight_profile():
    """Couette flow, periodic along the wall, exact for this scheme."""
    n = 8
    box = Box(0.2, 1 / n, 1.0, left=mac.periodic(), right=mac.periodic(), top=mac.wall(1.5), speed=1.5)
    flow = jax.jit(lambda flow: mac.advance(box, flow, 3.0)[0])(mac.rest(n, 5))
    assert_allclose(flow.u, np.tile(1.5 * (np.arange(n)[:, None] + 0.5) / n, (1, 6)), atol=1e-11)


# --- cavity -----------------------------------------------------------------------------------------------------------


def profiles(n, reynolds, time, advection="central"):
    """(u on x = 1/2 over y, v on y = 1/2 over x) and the largest divergence of the unit cavity."""
    box = Box(1 / n, 1 / n, 1 / reynolds, top=mac.wall(1.0), advection=advection, speed=1.0)
    flow = jax.jit(lambda flow: mac.advance(box, flow, time)[0])(mac.rest(n, n))
    assert abs(mac.divergence(box, flow.u, flow.v)).max() < 1e-10
    place = np.concatenate([[0], (np.arange(n) + 0.5) / n, [1]])
    u, v = (
        np.concatenate([[0], np.asarray(line), [end]]) for line, end in ((flow.u[:, n // 2], 1), (flow.v[n // 2], 0))
    )
    return place, u, v


def deviation(profile, reference, name):
    """From a table in tests/solvers/reference: largest deviation of u and of v. Misprints of Ghia et al. left out."""
    place, u, v = profile
    return [
        max(abs(np.interp(table[:, 0], place, line) - table[:, 1]))
        for table, line in ((reference[f"u_{name}"], u), (reference[f"v_{name}"], v))
    ]


@pytest.fixture(scope="module")
def cavity():
    with np.load(pathlib.Path(__file__).parent / "reference" / "cavity.npz") as file:
        return dict(file)


def test_the_lid_driven_cavity_at_reynolds_100(cavity):
    """Ghia, Ghia & Shin 1982; extremes of an independent program on the same grid, with the same differences."""
    found = profiles(64, 100, 20.0)
    assert max(deviation(found, cavity, "ghia100")) < 0.01
    _, u, v = found
    assert_allclose([u.min(), v.max(), v.min()], [-0.21279, 0.17854, -0.25266], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("advection", ["central", "limited"])
def test_the_lid_driven_cavity_at_reynolds_400(cavity, advection):
    assert max(deviation(profiles(64, 400, 50.0, advection), cavity, "ghia400")) < 0.01


@pytest.mark.slow
def test_the_lid_driven_cavity_at_reynolds_1000(cavity):
    """Botella & Peyret 1998, spectral."""
    assert max(deviation(profiles(128, 1000, 60.0), cavity, "botella1000")) < 0.01


def test_the_slope_along_the_speed_of_the_lid():
    """Forward-mode derivatives go through the adaptive time steps; the state is linear neither in speed nor in time."""
    solver = Cavity(points=8, solver_points=16, vel_top=10.0)

    @jax.jit
    def score(speed):
        return jnp.sum(solver.observe(solver.stepper(vel_top=speed)(solver.initial(jax.random.key(0))))[..., 0] ** 2)

    slope = jax.jvp(score, (10.0,), (1.0,))[1]
    assert_allclose(slope, (score(10.0 + 1e-4) - score(10.0 - 1e-4)) / 2e-4, rtol=1e-6)
    assert slope > 1e-3


# --- tube -------------------------------------------------------------------------------------------------------------


def test_the_tube_becomes_a_parabola():
    """Reynolds number 10: the entrance is shorter than a height. Flux is the same at every x."""
    solver = Tube(points=64, width=0.3, vel_in=1.0, density=1.0, viscosity=0.01, time_step=0.3, advection="central")
    state = jax.jit(solver.stepper())(solver.initial(jax.random.key(0)))
    y = (np.arange(64) + 0.5) / 64
    assert_allclose(solver.observe(state)[:, -1, 0], 6 * y * (1 - y), atol=1e-3)
    assert_allclose(state.flow.u.sum(axis=0) / 64, np.ones(65), atol=1e-12)
    assert (solver.observe_static(state) == 1).all()


@pytest.mark.slow
def test_the_entrance_of_the_tube():
    """Durst et al. 2005: where the centerline reaches 99 % of its final 1.5 vel_in, at Reynolds number 50."""
    ny, nx = 64, 192
    box = Box(6 / nx, 1 / ny, 1 / 50, left=mac.inflow(1.0), right=mac.outflow(), speed=1.0)
    flow = jax.jit(lambda flow: mac.advance(box, flow, 25.0)[0])(mac.start(box, mac.rest(ny, nx, 1.0)))
    y = (np.arange(ny) + 0.5) / ny
    assert_allclose(flow.u[:, -1], 6 * y * (1 - y), atol=2e-3)
    center = np.asarray(flow.u[ny // 2 - 1 : ny // 2 + 1].mean(axis=0))
    length = np.interp(0.99 * 1.5, center, np.arange(nx + 1) * 6 / nx)
    assert_allclose(length, 2.3915, rtol=0.05)


# --- obstacles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "speed"),
    [
        (Dam(points=32, solver_points=32, velocity=0.2), 0.2),
        (Cylinder(points=32, solver_points=64, vel_in=1.0, warmup=0.0), 1.0),
    ],
)
def test_nothing_flows_through_an_obstacle(solver, speed):
    state = jax.jit(solver.initial)(jax.random.key(0))
    box = solver.box({name: np.mean(getattr(solver, name)) for name in solver.parameters})
    step = jax.jit(solver.stepper())
    after = step(step(step(state)))
    for flow, tolerance in ((state.flow, 0.01), (after.flow, 0.02)):
        assert abs(mac.divergence(box, flow.u, flow.v)).max() < 1e-9 * speed / float(box.dy)
        assert abs(flow.u[box.solid[0]]).max() < tolerance * speed
        assert abs(flow.v[box.solid[1]]).max() < tolerance * speed
    mask = np.asarray(solver.observe_static(after))[..., 0]
    assert 0 < (mask == 0).sum() < mask.size / 10
    assert (np.asarray(solver.observe(after))[mask == 0] == 0).all()
    assert abs(solver.observe(after)).max() > 0.8 * speed


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seven minutes alone on a core
def test_the_shedding_frequency_of_a_cylinder():
    """Williamson 1989: Strouhal number 0.164 at Reynolds number 100, far from walls."""
    width, height, cells = 22.0, 20.0, 20  # diameters; cells in each
    nx, ny = int(width * cells), int(height * cells)
    h = 1 / cells
    x, y = np.arange(nx + 1) * h - 8.0, np.arange(ny + 1) * h - height / 2
    middle = {"x": x[:-1] + h / 2, "y": y[:-1] + h / 2}
    near = 0.5 + h / 2  # as in `WallFlow`: up to half a cell outside
    solid = (np.hypot(x, middle["y"][:, None]) <= near, np.hypot(middle["x"], y[:, None]) <= near)
    box = Box(
        h, h, 0.01, left=mac.inflow(1.0), right=mac.outflow(), bottom=mac.free_slip(), top=mac.free_slip(), speed=1.0,
        solid=tuple(map(jnp.asarray, solid)),
    )  # fmt: skip
    flow = mac.rest(ny, nx, 1.0)
    bump = 0.3 * np.exp(-((middle["x"] - 1.5) ** 2) - y[:, None] ** 2)
    flow = jax.jit(lambda flow: mac.start(box, flow))(flow._replace(v=flow.v + bump))
    probe = ny // 2, int((8 + 3) / h)

    def sample(flow, _):
        flow = mac.advance(box, flow, 0.2)[0]
        return flow, flow.v[probe]

    with jax.enable_x64(False):
        flow = jax.tree.map(lambda a: a.astype(jnp.float32), flow)
        signal = np.asarray(jax.jit(lambda flow: jax.lax.scan(sample, flow, None, length=600)[1])(flow))
    late = signal[-250:]  # 50 units of time, about eight periods
    rising = np.flatnonzero((late[:-1] < 0) & (late[1:] >= 0))
    times = (rising + late[rising] / (late[rising] - late[rising + 1])) * 0.2
    assert len(times) > 6
    assert np.std(np.diff(times)) < 0.05
    assert_allclose(1 / np.diff(times).mean(), 0.164, rtol=0.03)


# --- tables and mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cavity", "tube", "dam", "cylinder"])
@pytest.mark.parametrize("subset", ["bc", "prop", "geo"])
def test_the_tables_of_cases(name, subset):
    solver = make_solver(name, subset=subset)
    cases = solver.cases
    numbers = solver.reynolds(cases)
    assert len(np.unique(np.stack(list(cases.values())), axis=1).T) == len(numbers) >= 20
    assert numbers.max() <= solver.largest_reynolds * (1 + 1e-9)
    assert numbers.min() >= (SMALLEST_REYNOLDS * (1 - 1e-9) if subset == "prop" else 1)
    varied = {n for n, column in cases.items() if len(set(column)) > 1}
    first = solver.parameters[0]
    assert varied <= {"bc": {first}, "prop": {"density", "viscosity"}}.get(subset, set(cases) - {first, "density"})
    drawn = [solver.draw(jax.random.key(i), jnp.asarray(i)) for i in (0, 1, len(numbers))]
    assert set(drawn[0]) == set(solver.drawn) >= varied
    assert drawn[0] == drawn[2] != drawn[1]
    few = cases[next(iter(varied))][:8]  # the first ones spread over the table
    assert np.ptp(few) > 0.5 * np.ptp(cases[next(iter(varied))])


def test_a_lower_cap_raises_the_viscosity_or_leaves_cases_out():
    low = Cavity(subset="bc", largest_reynolds=1000.0)
    assert_allclose(low.cases["viscosity"], 5e-4)
    assert "viscosity" in low.drawn
    assert len(Cavity(subset="prop", largest_reynolds=1000.0).cases["viscosity"]) < len(
        Cavity(subset="prop").cases["viscosity"]
    )


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("cavity", {"viscosity": 1e-5}, "Reynolds number reaches 50000.*largest_reynolds is 5000.*Raise viscosity"),
        ("cavity", {"vel_top": (2.0, 1.0)}, "vel_top is .*increasing pair"),
        ("cavity", {"density": 0.0}, "density is 0.0"),
        ("cavity", {"points": 48}, "stored cells are whole numbers of the solver's 64. Use solver_points=48"),
        ("cavity", {"subset": "propp"}, "propp.*Did you mean 'prop'"),
        ("cavity", {"subset": "prop", "largest_reynolds": 10.0}, "No case of 'prop'.*Raise largest_reynolds"),
        ("tube", {"time_step": 0.0}, "time_step is 0.0"),
        ("dam", {"barrier_height": 0.4}, "barrier reaches x = 0.55 m and y = 0.4 m"),
        ("dam", {"barrier_width": 0.01}, "barrier_width is 0.01.*solver_points to at least 150"),
        ("cylinder", {"center_y": 0.005}, "center_y is 0.005.*must lie within"),
        ("cylinder", {"radius": 0.001}, "radius is 0.001.*Raise solver_points to at least 220"),
        ("smoke", {"buoyancy": (1.0, 0.0)}, "buoyancy is .*finite, or an increasing pair"),
        ("smoke", {"viscosity": -1.0}, "viscosity is -1.0.*zero or positive"),
        ("smoke", {"solver_points": 100}, "stored cells are whole numbers of the solver's 100"),
        ("smoke", {"noise_scale": 1.0}, "noise_scale is 1.0.*at least 2.53"),
    ],
)
def test_a_mistake_is_named(name, fields, words):
    with pytest.raises(ConfigError, match=words):
        make_solver(name, **fields)


# --- smoke ------------------------------------------------------------------------------------------------------------


def test_smoke_rises_is_conserved_and_stays_positive():
    solver = Smoke(points=16, solver_points=32, warmup=0.0)
    state = jax.jit(solver.initial)(jax.random.key(0))
    box = Box(1.0, 1.0, 0.01)
    before = solver.observe(state)
    step, height = jax.jit(solver.stepper()), np.arange(32)[:, None] + 0.5
    after = state
    for _ in range(8):
        after = step(after)
        assert abs(mac.divergence(box, after.flow.u, after.flow.v)).max() < 1e-10
        assert float(after.smoke.min()) >= 0
    assert_allclose(after.smoke.sum(), state.smoke.sum(), rtol=1e-12)
    assert float(after.smoke.max()) <= float(state.smoke.max()) * 1.05
    assert (after.smoke * height).sum() > (state.smoke * height).sum() * 1.02
    assert_allclose(solver.observe(after)[..., 0].mean(), before[..., 0].mean(), rtol=1e-12)
    assert abs(solver.observe(after)[..., 1:]).max() > 0.3
    assert_allclose(np.mean(np.asarray(state.smoke) ** 2), 1.0, rtol=0.05)  # the absolute value of noise of variance 1


def test_a_uniform_tracer_stays_uniform_in_any_flow():
    box = Box(0.3, 0.2, 0.1)
    u, v = jax.random.normal(jax.random.key(0), (6, 9)), jax.random.normal(jax.random.key(1), (7, 8))
    flow = mac.project(box, u, v, jnp.zeros((6, 8)), 1.0)
    assert_allclose(mac.tracer_rate(box, flow, jnp.full((6, 8), 3.0)), 0, atol=1e-12)
