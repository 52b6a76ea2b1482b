"""Mass fixers and linear laws over many steps, in float32, and where a correction has nothing to hold on to."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constraint_cases import GRIDS, context, frames

from physml.constraints import Linear, MassFixer
from physml.constraints.linear import rule_weights

STEPS = 2000


@pytest.mark.parametrize(
    "law",
    [
        MassFixer("rho"),
        MassFixer("rho", "multiplicative"),
        MassFixer("rho", sources="source"),
        MassFixer("rho", "multiplicative", sources="source"),
        MassFixer(("rho", "q"), "multiplicative", together=True),
        MassFixer("rho", positive=True),
    ],
    ids=str,
)
def test_totals_do_not_drift_in_thousands_of_steps(law):
    """Corrections of a tenth of a unit in the last place, and sources that change; totals in float64 afterwards."""
    grid = GRIDS["sphere"]
    around = context(grid)
    law = law.build(around.spec)

    def step(frame, key):
        noise, source = jax.random.normal(key, frame.shape), jax.random.normal(jax.random.fold_in(key, 1))
        forcing = jnp.full_like(around.forcing, 1e-2 * source)
        changed = frame * (1 + 1e-8) + 1e-3 * noise
        frame = law.project(changed, frame, dataclasses.replace(around, forcing=forcing))
        return frame, (frame, forcing[..., 0].mean((1, 2)))

    first = jnp.asarray(frames(grid)[0]) + 5
    _, (found, source) = jax.jit(lambda f: jax.lax.scan(step, f, jax.random.split(jax.random.key(0), STEPS)))(first)
    names = [around.spec.index(name) for name in law.channels]
    found = np.concatenate([np.asarray(first)[None], found]).astype(np.float64)[..., names]
    totals = (found * grid.weights()[..., None].astype(np.float64)).mean((2, 3))
    totals = totals.sum(-1) if law.together else totals[..., 0]
    budget = np.cumsum(np.asarray(source, np.float64), 0) * around.spec.time_step if law.sources else 0
    drift = totals[1:] - budget - totals[0]
    assert np.abs(drift).max() <= 1e-6 * np.abs(totals[0]).max()


@pytest.mark.parametrize(
    "law",
    [
        Linear("rho"),
        Linear("rho", "trapezoid"),
        Linear(("rho", "q"), ((1.0,) * 468,)),
        Linear(("rho", "q"), ((1.0,) * 468, tuple(np.linspace(0, 1, 468)))),
    ],
    ids=["cells", "trapezoid", "one row", "two rows"],
)
def test_linear_laws_of_the_previous_frame_do_not_drift(law):
    grid = GRIDS["sphere"]
    around = context(grid)
    law = law.build(around.spec)

    def step(frame, key):
        frame = law.project(frame * (1 + 1e-8) + 1e-3 * jax.random.normal(key, frame.shape), frame, around)
        return frame, frame

    first = jnp.asarray(frames(grid)[0]) + 5
    _, found = jax.jit(lambda f: jax.lax.scan(step, f, jax.random.split(jax.random.key(0), STEPS)))(first)
    places = [around.spec.index(name) for name in law.channels]
    found = np.asarray(found, np.float64)[..., places].reshape(STEPS, 2, -1)
    operator = rule_weights(law.rule, grid) if law.rule else np.asarray(law.operator)
    totals = found @ operator.T
    assert np.abs(totals / totals[0] - 1).max() <= 5e-7


EQUAL_TOTALS = """
import jax, numpy as np
from physml.constraints.sums import over_space
generator = np.random.default_rng(0)
for size in (5, 8, 63):
    field = generator.standard_normal((3, size, size, 2)).astype("f4")
    weights = generator.random((1, size, size, 1)).astype("f4")
    excess = jax.jit(lambda weights, field, before: over_space(weights * field, -weights * before))
    print(np.abs(excess(weights, field, field.copy())).max())
"""


def test_equal_fields_have_equal_totals_in_optimized_programs(users_environment):
    """A compiler that joins a product with the addition that follows gives one of two equal terms more digits. Tests
    are compiled without optimization, so this runs as users run it."""
    command = [sys.executable, "-c", EQUAL_TOTALS]
    found = subprocess.run(command, check=True, env=users_environment, timeout=300, capture_output=True, text=True)
    assert found.stdout.split() == ["0.0"] * 3


def test_fields_that_conserve_are_left_alone():
    """Bit for bit: a shifted field has the same total."""
    around = context(GRIDS["periodic"])
    frame = frames(GRIDS["periodic"])[0]
    moved = np.roll(frame, (3, 5), (1, 2))
    for method in ("additive", "multiplicative", "gradient"):
        law = MassFixer(("rho", "u"), method)
        np.testing.assert_array_equal(jax.jit(law.project)(moved, frame, around), moved)


def test_a_factor_that_cannot_be_becomes_a_shift():
    around = context(GRIDS["walls"])
    frame, previous = frames(GRIDS["walls"])
    law = MassFixer("rho", "multiplicative")
    for other in (-frame, frame - frame.mean((1, 2), keepdims=True), np.zeros_like(frame)):
        fixed = law.project(other, previous, around)
        assert np.isfinite(fixed).all()
        assert float(np.abs(law.violation(fixed, previous, around)).max()) <= 1e-6
    flat = np.ones_like(frame)  # no gradient anywhere
    steep = MassFixer("rho", "gradient")
    assert float(np.abs(steep.violation(steep.project(flat, previous, around), previous, around)).max()) <= 1e-6


def test_a_negative_total_keeps_its_sign_though_positive_was_asked():
    around = context(GRIDS["walls"])
    frame, previous = frames(GRIDS["walls"])
    law = MassFixer("rho", positive=True)
    fixed = law.project(frame, -previous, around)
    assert float(np.abs(law.violation(fixed, -previous, around)).max()) <= 1e-6
    assert (np.asarray(fixed)[..., 0] < 0).any()
    assert (np.asarray(law.project(frame - 3, previous, around))[..., 0] >= 0).all()
