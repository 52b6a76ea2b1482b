"""What holds for every reference solver, small: shapes, precision, batches, gradients, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml import coding
from physml.data import XarrayDataset, open_dataset, spec_of
from physml.data.generate import generate
from physml.solvers import SOLVERS, make_solver
from physml.solvers.ensemble import Ensemble, precision
from physml.solvers.solver import STEADY

SMALL = {  # fields that make it cheap, with one parameter drawn where there is one
    "acoustic": {"points": 16, "refinement": 1, "speed": (0.5, 1.0), "medium_modes": 2, "initial_modes": 3},
    "advection": {"points": 32, "solver_points": 32, "speed": (0.5, 1.0)},
    "burgers": {"points": 32, "solver_points": 64, "viscosity": (0.05, 0.1)},
    "cavity": {"points": 8, "solver_points": 16, "vel_top": (1.0, 2.0)},
    "chen": {"c": (27.0, 28.0), "warmup": 0.1},
    "cylinder": {"points": 16, "solver_points": 32, "vel_in": (0.5, 1.0), "warmup": 0.01},
    "dam": {"points": 16, "solver_points": 32, "velocity": (0.1, 0.2)},
    "darcy_flow": {"points": 16, "modes": 8},
    "decaying_navier_stokes": {"points": 16, "solver_points": 32, "viscosity": (0.02, 0.03), "substeps": 10},
    "euler": {"points": 16, "solver_points": 32, "gamma": (1.3, 1.5), "time_step": 0.02},
    "gray_scott": {"points": 16, "solver_points": 32, "length": 0.2, "initial_modes": 3, "pattern": "all"},
    "heat": {"points": 32, "solver_points": 32, "diffusivity": (1.0, 2.0)},
    "henon_heiles": {"energy": (0.1, 0.125)},
    "kolmogorov": {"points": 16, "solver_points": 32, "viscosity": (0.05, 0.1), "substeps": 10, "warmup": 0.2},
    "korteweg_de_vries": {"points": 64, "solver_points": 64, "dispersion": (0.9, 1.0)},
    "kuramoto_sivashinsky": {"points": 64, "solver_points": 64, "length": 32.0, "initial_modes": 8, "warmup": 0.4},
    "lorenz63": {"rho": (26.0, 30.0), "warmup": 0.1},
    "lorenz84": {"forcing": (7.0, 8.0), "warmup": 0.1},
    "lorenz96": {"points": 8, "forcing": (8.0, 9.0), "warmup": 0.1},
    "porous_medium": {"points": 16, "solver_points": 32, "exponent": (1.0, 3.0)},
    "quasigeostrophic": {"points": 16, "initial_modes": 4, "shear": (0.02, 0.03), "warmup": 86400.0},
    "rossler": {"c": (5.0, 5.7), "warmup": 0.2},
    "shallow_water": {"points": 16, "solver_points": 32, "initial_modes": 4, "coriolis": (1.0, 2.0), "beta": 0.5},
    "shallow_water_sphere": {"points": 16, "modes": 4, "depth": (5000.0, 10000.0), "substeps": 18},
    "smoke": {"points": 8, "solver_points": 16, "buoyancy": (0.3, 0.5), "warmup": 1.5},
    "staggered_flow": {"points": 16, "viscosity": (0.05, 0.1), "initial_modes": 3, "forcing_mode": 2},
    "stefan": {"points": 16, "solver_points": 32},
    "thomas": {"b": (0.17, 0.18), "warmup": 0.5},
    "tracer_sphere": {"points": 8, "solver_points": 16},
    "tube": {"points": 8, "solver_points": 16, "vel_in": (0.5, 1.0)},
    "wave": {"points": 32, "solver_points": 32, "speed": (0.5, 1.0)},
}
LOOSE = {}  # solver -> relative difference of float32 from float64 after one stored step, where 2e-5 is too strict

OPTIONAL = {"quasigeostrophic": "pyqg_jax", "shallow_water_sphere": "dinosaur"}  # solver -> package of an extra


@pytest.fixture(autouse=True)
def installed(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name], reason=f"{name} needs {OPTIONAL[name]}, which is not installed")


def test_every_solver_is_checked():
    assert sorted(SMALL) == sorted(SOLVERS)


def cast(state, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def begin(solver, *keys):
    """Drawn parameters of trajectory 0, and a random state for each key; compiled, which is quicker."""

    @jax.jit
    def states():
        drawn = solver.draw(jax.random.key(1), jnp.asarray(0))
        return drawn, [solver.initial(jax.random.key(key), **drawn) for key in keys]

    return states()


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, float) - b) / max(np.linalg.norm(b), 1e-30))


HEAVY = {"euler", "shallow_water_sphere", "tracer_sphere", "cylinder", "dam", "tube", "quasigeostrophic", "kolmogorov"}
ALIKE = {"advection", "kuramoto_sivashinsky", "cavity", "chen", "henon_heiles", "lorenz84", "rossler", "thomas", "heat"}
# Their schemes (spectral, walls, ordinary equations, diffusion) are those of others that stay quick.


def each(names):
    """A test for every name; those that compile for long or are like others run with the slow tests."""
    slow = HEAVY | ALIKE
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in slow)) for n in names])


@each(SMALL)
def test_a_step_keeps_shape_structure_and_precision(name):
    solver = make_solver(name, **SMALL[name])
    assert coding.from_dict(SOLVERS, coding.to_dict(solver, SOLVERS)) == solver
    with jax.enable_x64(True):
        drawn, (state,) = begin(solver, 0)
        assert set(drawn) == set(solver.drawn) <= set(solver.parameters)
        observe = jax.jit(solver.observe)
        frame = observe(state)
        assert frame.shape == (*solver.grid.shape, len(solver.channels))
        assert np.isfinite(frame).all()
        assert frame.dtype == jnp.float64
        if solver.statics:
            static = jax.jit(solver.observe_static)(state)
            assert static.shape == (*solver.grid.shape, len(solver.statics))
            assert np.isfinite(static).all()
        if solver.usual_steps == STEADY:
            return
        step = jax.jit(lambda state, drawn: solver.stepper(**drawn)(state))
        after = step(state, drawn)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert [x.shape for x in jax.tree.leaves(after)] == [x.shape for x in jax.tree.leaves(state)]
        assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
        exact = observe(after)
        assert relative(exact, frame) > 1e-6
        single = observe(step(cast(state, jnp.float32), cast(drawn, jnp.float32)))
    assert single.dtype == jnp.float32
    assert relative(single, exact) < LOOSE.get(name, 2e-5)


@each(SMALL)
def test_a_batch_holds_the_single_runs(name):
    solver = make_solver(name, **SMALL[name])
    steps = 0 if solver.usual_steps == STEADY else 2
    with precision(solver):
        many = Ensemble(solver, steps, 3).run(0)
        alone = Ensemble(solver, steps, 1).run(2)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
        assert_allclose(a[2:], b, rtol=1e-6, atol=1e-6 * abs(b).max())
    assert relative(many.frames[0], many.frames[2]) > 1e-3 or solver.drawn or solver.statics


@each([name for name in SMALL if SOLVERS[name].usual_steps != STEADY])
def test_the_slope_of_a_step(name):
    """The gradient through a stored step is the difference quotient along a random direction."""
    solver = make_solver(name, **SMALL[name])
    with jax.enable_x64(True):
        drawn, (state, other) = begin(solver, 0, 7)
        weight = jax.random.normal(jax.random.key(3), (*solver.grid.shape, len(solver.channels)))

        @jax.jit
        def score(t):
            mixed = jax.tree.map(lambda a, b: a + t * (b - a) if a.dtype.kind == "f" else a, state, other)
            return jnp.sum(weight * solver.observe(solver.stepper(**drawn)(mixed)))

        slope = jax.jvp(score, (0.0,), (1.0,))[1]
        quotient = (score(1e-5) - score(-1e-5)) / 2e-5
        scale = abs(float(score(0.0)))
    assert np.isfinite(slope)
    assert_allclose(slope, quotient, rtol=1e-3, atol=1e-6 * scale + 1e-9)


@each(SMALL)
def test_a_file_opens_as_training_data(name, tmp_path):
    """The same bytes twice; labels, units and provenance; windows with statics and parameters."""
    solver = make_solver(name, **SMALL[name])
    steps = None if solver.usual_steps == STEADY else 2
    path = generate(solver, tmp_path / "a.nc", 2, steps=steps, workers=1)
    assert generate(solver, tmp_path / "b.nc", 2, steps=steps, batch=2).read_bytes() == path.read_bytes()
    data = open_dataset(path)
    leading = ("trajectory",) if steps is None else ("trajectory", "time")
    for channel in solver.channels:
        assert data[channel.name].dims == (*leading, *solver.axes)
        assert data[channel.name].attrs["units"] == (channel.unit or "1")
        assert len(data[channel.name].attrs["long_name"]) > 3
    for name_ in solver.parameters:
        assert data[name_].dims == ("trajectory",)
    for key in ("equation", "boundary_conditions", "scheme", "recipe", "history"):
        assert data.attrs[key]
    channels, static = ([channel.name for channel in fields] for fields in (solver.channels, solver.statics))
    dataset = XarrayDataset(data, spec_of(data, channels, static=static, parameters=solver.drawn))
    window = dataset.read(0, range(1))
    assert window.frames.shape == (1, *solver.grid.shape, len(solver.channels))
    assert window.static.shape == (*solver.grid.shape, len(solver.statics))
    assert window.parameters.shape == (len(solver.drawn),)
    assert dataset.spec.grid.periodic == solver.grid.periodic
