"""Laws that hold for every constraint of the registry, on every grid it is tried on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constraint_cases import CASES, GRIDS, context, frames

from physml.coding import from_dict, to_dict
from physml.constraints import CONSTRAINTS
from physml.parallel.mesh import Layout

# One case of every class and of every way of computing is quick; the others are variants of those.
QUICK = (
    "linear: three rows", "mass: additive", "mass: sources", "mass: positive", "positivity",
    "boundary: obstacle", "divergence_free: series", "divergence_free: obstacle", "quadratic: density",
    "quadratic: enstrophy",
)  # fmt: skip
pytestmark = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
TOLERANCE = 1e-6
assert {type(CASES[name].constraint) for name in QUICK} == set(CONSTRAINTS.values()), "a constraint is never quick"


@functools.lru_cache(maxsize=8)
def prepared(name, mask=False):
    case = CASES[name]
    grid = GRIDS[case.grid]
    around = context(grid, mask=mask, **dict(case.fields))
    frame, previous = frames(grid, mask=around.mask)
    constraint = case.constraint.build(around.spec)
    return jax.jit(constraint.project), jax.jit(constraint.violation), frame, previous, around


@pytest.mark.parametrize("mask", [False, True])
def test_a_projected_frame_obeys_and_stays(name, mask):
    project, violation, frame, previous, around = prepared(name, mask)
    once = project(frame, previous, around)
    assert once.shape == frame.shape
    assert once.dtype == frame.dtype
    laws = violation(frame, previous, around)
    assert laws.ndim == 2
    assert laws.shape[0] == frame.shape[0]
    assert float(jnp.abs(laws).max()) > 1e-3, "the frame obeys before, so this shows nothing"
    assert float(jnp.abs(violation(once, previous, around)).max()) <= TOLERANCE
    np.testing.assert_allclose(project(once, previous, around), once, rtol=2e-6, atol=2e-6)


def test_masked_cells_stay_as_they_are(name):
    project, _, frame, previous, around = prepared(name, True)
    assert np.all(np.asarray(project(frame, previous, around))[around.mask == 0] == 0)


def test_gradients_are_those_of_differences(name):
    project, _, frame, previous, around = prepared(name)
    direction = np.random.default_rng(3).normal(size=frame.shape).astype(np.float32)
    weights = np.random.default_rng(4).normal(size=frame.shape)
    with jax.enable_x64(True):
        as64 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64) if x.dtype.kind == "f" else x)
        wide, before, wide_context = as64(frame), as64(previous), as64(around)
        constraint = CASES[name].constraint.build(around.spec)

        @jax.jit
        def loss(amount):
            return jnp.sum(weights * constraint.project(wide + amount * direction, before, wide_context))

        # Kinks (clipping) move with the step, so it is small; float64 carries it.
        step = 1e-7
        difference = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), difference, rtol=1e-5, atol=1e-4)


def test_gradients_are_finite_in_float32(name):
    project, _, frame, previous, around = prepared(name)
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(jnp.square(project(f, previous, around)))))(jnp.asarray(frame))
    assert bool(jnp.isfinite(gradient).all())
    assert bool((gradient != 0).any())


@pytest.mark.slow
def test_tangents_and_second_derivatives(name):
    """The tangent is the adjoint of the gradient, and products with the Hessian are symmetric."""
    project, _, frame, previous, around = prepared(name)
    random = np.random.default_rng(5)
    first, second, weights = (random.normal(size=frame.shape).astype(np.float32) for _ in range(3))

    @jax.jit
    def derive(frame):
        tangent = jax.jvp(lambda f: project(f, previous, around), (frame,), (first,))[1]
        pulled = jax.vjp(lambda f: project(f, previous, around), frame)[1](jnp.asarray(weights))[0]
        slope = jax.grad(lambda f: jnp.sum(weights * project(f, previous, around) ** 2))
        along = [jax.jvp(slope, (frame,), (direction,))[1] for direction in (first, second)]
        return (
            jnp.vdot(weights, tangent),
            jnp.vdot(pulled, first),
            jnp.vdot(along[0], second),
            jnp.vdot(along[1], first),
        )

    forward, backward, one, other = derive(jnp.asarray(frame))
    scale = float(np.linalg.norm(weights) * np.linalg.norm(first))
    np.testing.assert_allclose(backward, forward, atol=1e-5 * scale)
    np.testing.assert_allclose(other, one, atol=1e-4 * scale)
    assert one


def test_sharded_is_unsharded(name):
    """And no sample leaves its device."""
    project, _, frame, previous, around = prepared(name)
    layout = Layout(data=2)
    with layout.use():
        split = jax.device_put((frame, previous), layout.window_sharding())
        compiled = project.lower(*split, around).compile()
        found = compiled(*split, around)
    np.testing.assert_allclose(found, project(frame, previous, around), rtol=1e-6, atol=1e-6)
    for message in ("all-gather", "all-to-all", "collective-permute"):
        assert message not in compiled.as_text()


def test_the_domain_may_not_exist(name):
    """No cell at all: nothing to correct, and no NaN."""
    case = CASES[name]
    around = context(GRIDS[case.grid], **dict(case.fields))
    around = dataclasses.replace(around, mask=np.zeros((2, *around.spec.grid.shape, 4), np.float32))
    frame = np.zeros((2, *around.spec.grid.shape, 4), np.float32)
    constraint = case.constraint.build(around.spec)
    assert np.all(np.asarray(jax.jit(constraint.project)(frame, frame, around)) == 0)
    assert np.all(np.asarray(jax.jit(constraint.violation)(frame, frame, around)) == 0)


def test_survives_as_text(name):
    constraint = CASES[name].constraint
    assert from_dict(CONSTRAINTS, to_dict(constraint, CONSTRAINTS)) == constraint
