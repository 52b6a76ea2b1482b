"""Batches of trajectories: independent of how they are batched, disjoint where they must be, and checked for sanity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import DivergedError
from physml.solvers import DecayingNavierStokes, KuramotoSivashinsky, make_solver
from physml.solvers.ensemble import Ensemble, precision

KS = KuramotoSivashinsky(points=32, solver_points=32, length=16.0, warmup=2.0, substeps=4, initial_modes=4)
FLOW = DecayingNavierStokes(points=12, solver_points=16, viscosity=(0.02, 0.04), substeps=3, initial_modes=4)


@pytest.mark.parametrize("solver", [KS, FLOW])
def test_the_batch_does_not_change_a_bit(solver):
    """Of the float64 states: rounding to the stored float32 would hide a difference that chaos amplifies later."""
    with precision(solver):
        ends = {}
        for batch in (1, 4):
            ensemble = Ensemble(solver, 6, batch)
            state, drawn, _ = ensemble.start(4 - batch)
            ends[batch] = np.asarray(ensemble.advance(state, drawn, 2)[0])[-1]
        assert ends[1].dtype == np.float64
        assert_array_equal(ends[4], ends[1])


def test_frames_are_those_of_the_stepper():
    """The first frame comes after the warm-up, and each next one is a stored step later."""
    with precision(KS):
        frames, drawn, _ = Ensemble(KS, 6, 2).run(0)
        again, _, _ = Ensemble(KuramotoSivashinsky(**{**vars(KS), "warmup": 0.0}), 16, 2).run(0)
    assert drawn == {}
    assert_array_equal(frames, again[:, 10:])  # a warm-up of 2 is 10 steps of 0.2
    state = jnp.asarray(frames[0, 0])
    assert_allclose(KS.stepper()(state), frames[0, 1], atol=1e-5)


def test_drawn_parameters_are_the_ones_solved_with():
    with precision(FLOW):
        frames, drawn, _ = Ensemble(FLOW, 6, 3).run(0)
        viscosity = drawn["viscosity"]
        assert ((viscosity > 0.02) & (viscosity < 0.04)).all()
        assert len(set(viscosity)) == 3
        fixed = make_solver("decaying_navier_stokes", **{**vars(FLOW), "viscosity": float(viscosity[1])})
        assert_allclose(Ensemble(fixed, 6, 1).run(1)[0][0], frames[1], atol=1e-6)


def test_seeds_and_splits_share_no_trajectory():
    with precision(KS):
        runs = [Ensemble(KS, 1, 3, seed, split).start(0)[0] for seed in (0, 1) for split in ("train", "valid", "test")]
        assert_array_equal(Ensemble(KS, 1, 1, 1, "test").start(2)[0], runs[-1][2:])
    correlation = np.corrcoef(np.concatenate(runs).reshape(18, -1)) - np.eye(18)
    assert abs(correlation).max() < 0.999


def test_a_trajectory_that_diverges_is_named():
    """No substep is small enough for this speed: the error names trajectory and time, and only needed ones count."""
    wild = DecayingNavierStokes(
        points=16, solver_points=16, initial_speed=1e4, initial_modes=4, substeps=1, time_step=0.5
    )
    with precision(wild):
        ensemble = Ensemble(wild, 20, 2)
        with pytest.raises(DivergedError, match=r"trajectory 4 is not finite at time \d.*substeps"):
            ensemble.run(4)
        ensemble.run(4, needed=0)


def test_the_precision_of_the_caller_stays():
    before = jax.config.jax_enable_x64
    with precision(KS):
        assert jnp.ones(1, float).dtype == jnp.float64
    assert jax.config.jax_enable_x64 == before
    assert jnp.ones(1, float).dtype == (jnp.float64 if before else jnp.float32)
