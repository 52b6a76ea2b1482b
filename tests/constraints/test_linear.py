"""Linear constraints of frames, the quadrature rules they may use, and the inequalities that may follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from constraint_cases import GRIDS, context, frames, rows

from physml.constraints import Linear, condition, monotone, nonnegative, right_rule, second_difference, trapezoid
from physml.constraints.text import from_text
from physml.errors import ConfigError, DataError, SpecError

# --- frames -----------------------------------------------------------------------------------------------------------


def case(grid, **fields):
    around = context(GRIDS[grid], **fields)
    frame, previous = frames(GRIDS[grid], mask=around.mask)
    return frame, previous, around


def test_one_row_is_the_mass_fixer_over_cells():
    """The nearest frame of equal variances adds in proportion to cell size; over equal cells, the same everywhere."""
    frame, previous, around = case("periodic")
    fixed = Linear("rho").build(around.spec).project(frame, previous, around)
    shift = (previous - frame)[..., 0].mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(fixed[..., 0], frame[..., 0] + shift[:, None, None], atol=1e-6)
    np.testing.assert_array_equal(fixed[..., 1:], frame[..., 1:])


def test_rows_of_several_channels_are_the_oblique_projection():
    frame, previous, around = case("line")
    operator, variance = rows(3, 74), tuple(0.5 + np.arange(37) / 37)
    law = Linear(("rho", "u"), operator, ("mean", 0.5, -1.0), variance).build(around.spec)
    fixed = np.asarray(law.project(frame, previous, around))
    flat = frame[..., [0, 2]].reshape(2, -1).astype(np.float64)
    wanted, _ = condition(flat, np.repeat(variance, 2)[None].repeat(2, 0), np.array(operator), [[0.7, 0.5, -1.0]] * 2)
    np.testing.assert_allclose(fixed[..., [0, 2]].reshape(2, -1), wanted, atol=1e-6)
    np.testing.assert_array_equal(fixed[..., [1, 3]], frame[..., [1, 3]])


@pytest.mark.parametrize("law", [Linear(("rho", "q")), Linear("rho", rows(1, 37)), Linear("rho", rows(3, 37))])
def test_conditioned_frames_are_conditioned_gaussians(law):
    frame, previous, around = case("line")
    variance = np.random.default_rng(2).random(frame.shape).astype(np.float32)
    mean, left = jax.jit(law.build(around.spec).condition)(frame, variance, previous, around)
    operator = np.full((1, 37), 1 / 37) if law.rule else np.array(law.operator)
    wanted = condition(
        *(array[..., 0].astype(np.float64) for array in (frame, variance)), operator, previous[..., 0] @ operator.T,
        return_diagonal=True,
    )  # fmt: skip
    np.testing.assert_allclose(mean[..., 0], wanted[0], atol=2e-6)
    np.testing.assert_allclose(left[..., 0], wanted[1], atol=2e-6)
    np.testing.assert_array_equal(left[..., 2:], variance[..., 2:])
    certain, none = law.build(around.spec).condition(frame, 0 * variance, previous, around)
    np.testing.assert_allclose(certain, law.project(frame, previous, around), atol=1e-6)
    assert not np.any(none)


def test_a_rule_keeps_its_total_over_thousands_of_steps():
    frame, previous, around = case("sphere", mask=True)
    law = Linear(("rho", "u"), "trapezoid").build(around.spec)

    def step(state, key):
        return law.project(state + 0.1 * jax.random.normal(key, state.shape) * around.mask, state, around), None

    last, _ = jax.jit(lambda keys: jax.lax.scan(step, jnp.asarray(previous), keys))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert float(jnp.abs(law.violation(last, previous, around)).max()) < 1e-6


def test_prescribed_integrals():
    frame, previous, around = case("walls")
    fixed = Linear(("rho", "q"), "trapezoid", ("mean", 2.0)).build(around.spec).project(frame, previous, around)
    x, y = (np.asarray(axis.centers) for axis in around.spec.grid.axes)
    integral = np.trapezoid(np.trapezoid(np.asarray(fixed, np.float64), y, axis=2), x, axis=1)
    np.testing.assert_allclose(integral[:, :2], [[0.7, 2.0]] * 2, rtol=1e-6)


def test_values_without_variance_stay():
    frame, previous, around = case("line")
    variance = tuple(float(i % 2) for i in range(37))
    fixed = np.asarray(Linear("rho", variance=variance).build(around.spec).project(frame, previous, around))
    np.testing.assert_array_equal(fixed[:, ::2], frame[:, ::2])
    assert np.all(fixed[:, 1::2, 0] != frame[:, 1::2, 0])


@pytest.mark.parametrize(
    ("law", "error", "message"),
    [
        (lambda: Linear(()), ConfigError, "channels is empty"),
        (lambda: Linear("rho", ()), ConfigError, "no rows"),
        (lambda: Linear("rho", "trapezium"), ConfigError, "Did you mean 'trapezoid'"),
        (lambda: Linear("rho", variance=(-1.0,)), ConfigError, "negative"),
        (lambda: Linear("rh"), SpecError, "Did you mean 'rho'"),
        (lambda: Linear("rho", rows(2, 36)), SpecError, "36 numbers, but 37"),
        (lambda: Linear("rho", ((1.0,) * 37, (1.0,) * 5)), SpecError, "5 and 37 numbers"),
        (lambda: Linear("rho", rows(2, 37), (1.0, 2.0, 3.0)), SpecError, "3 targets for 2 rows"),
        (lambda: Linear("rho", target="meen"), SpecError, "Did you mean 'mean'"),
        (lambda: Linear("rho", variance="deep"), SpecError, "Did you mean 'depth'"),
        (lambda: Linear("rho", variance=(1.0, 2.0)), SpecError, "variance has 2 numbers, but 37"),
        (lambda: Linear("rho", (*rows(2, 37), rows(2, 37)[0])), ConfigError, "3 rows but rank 2"),
        (lambda: Linear("rho", ((0.0,) * 37,)), ConfigError, "1 rows but rank 0"),
        (lambda: Linear("rho", ((np.nan,) * 37,)), ConfigError, "not finite"),
        (lambda: Linear("rho", variance=(0.0,) * 37), ConfigError, "variance is zero where"),
        (lambda: Linear("rho", rows(2, 37), variance=(1.0, *(0.0,) * 36)), ConfigError, "variance is zero where"),
    ],
)
def test_what_does_not_fit_is_said(law, error, message):
    with pytest.raises(error, match=message):
        law().build(context(GRIDS["line"]).spec)


def test_is_said_on_the_command_line():
    law = from_text("linear:rho,q:operator=trapezoid:target=mean")
    assert law == Linear(("rho", "q"), "trapezoid", "mean")


# --- operators --------------------------------------------------------------------------------------------------------


def test_quadrature_rules():
    points = np.array([0, 0.1, 0.4, 1.0])
    np.testing.assert_allclose(trapezoid(points), [[0.05, 0.2, 0.45, 0.3]])
    np.testing.assert_allclose(right_rule(points), [[0, 0.1, 0.3, 0.6]])
    np.testing.assert_allclose(trapezoid(points) @ (3 * points + 1), 2.5)  # exact for lines
    np.testing.assert_allclose(jax.jit(trapezoid)(points), trapezoid(points), atol=1e-7)
    np.testing.assert_allclose(second_difference(4), [[1, -2, 1, 0], [0, 1, -2, 1]])
    for wrong in (points[::-1], points[:1], points[None]):
        with pytest.raises(SpecError):
            trapezoid(wrong)
    with pytest.raises(SpecError, match="takes three"):
        second_difference(2)


def test_periodic_axes_close():
    """The trapezoid rule on a periodic axis counts all points alike."""
    frame, previous, around = case("periodic")
    by_rule = Linear("rho", "trapezoid", 0.3).build(around.spec).project(frame, previous, around)
    np.testing.assert_allclose(np.asarray(by_rule)[..., 0].mean((1, 2), dtype=float), 0.3, rtol=1e-6)


# --- inequalities -----------------------------------------------------------------------------------------------------

POINTS = np.sort(np.random.default_rng(8).random(40)).astype(np.float32)


def uneven(batch=3, seed=4):
    return np.random.default_rng(seed).normal(0.4, 1, size=(batch, 40)).astype(np.float32)


@pytest.mark.parametrize("by_variance", [False, True])
def test_nonnegative_values_are_the_nearest(by_variance):
    values, weight = uneven(), trapezoid(POINTS)
    variance = 0.2 + np.random.default_rng(5).random(values.shape).astype(np.float32) if by_variance else None
    target = np.array([[0.1], [0.3], [0.9]], np.float32)
    came = np.asarray(jax.jit(nonnegative)(values, weight, target, variance))
    assert came.min() >= 0
    np.testing.assert_allclose(came @ weight[0], target[:, 0], rtol=1e-6)
    metric = 1 / variance if by_variance else np.broadcast_to(weight, values.shape)
    # Karush-Kuhn-Tucker: gradient = multiplier * weight where positive, no smaller where zero.
    for slope, one in zip(metric * (came - values) / weight, came):
        multiplier = slope[one > 0].mean()
        np.testing.assert_allclose(slope[one > 0], multiplier, atol=2e-4)
        assert np.all(slope[one == 0] >= multiplier - 2e-4)


def test_nonnegative_keeps_its_own_total_and_what_is_fine():
    values, weight = uneven(), trapezoid(POINTS)
    came = np.asarray(nonnegative(values, weight))
    kept = np.asarray(values, float) @ weight[0].astype(float)
    np.testing.assert_allclose(came.astype(float) @ weight[0].astype(float), kept, rtol=1e-6)
    np.testing.assert_allclose(nonnegative(came, weight), came, atol=1e-6)
    np.testing.assert_array_equal(nonnegative(values), np.maximum(values, 0))
    certain = nonnegative(
        values, weight, variance=np.where(np.arange(40) < 20, 0, 1).astype(np.float32) * np.ones((3, 1))
    )
    np.testing.assert_array_equal(certain[:, :20], np.maximum(values, 0)[:, :20])


def test_nonnegative_of_nothing_or_less():
    values, weight = uneven(), trapezoid(POINTS)
    with pytest.raises(DataError, match="A total is"):
        nonnegative(-1 - np.abs(values), weight)
    assert not np.any(jax.jit(nonnegative)(-1 - np.abs(values), weight))
    np.testing.assert_allclose(nonnegative(values, weight, np.zeros((3, 1), np.float32)), 0, atol=1e-6)
    with pytest.raises(ConfigError, match="negative weights"):
        nonnegative(values, -weight)
    with pytest.raises(ConfigError, match="Give an operator"):
        nonnegative(values, target=np.zeros((3, 1)))
    with pytest.raises(SpecError, match="one row"):
        nonnegative(values, np.ones((2, 40)))
    with pytest.raises(SpecError, match=r"target has shape \(3,\)"):
        nonnegative(values, weight, np.zeros(3))
    with pytest.raises(DataError, match="NaN"):
        nonnegative(values * np.nan, weight)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_monotone_is_isotonic_regression(increasing, weighted):
    values = uneven() + np.linspace(-2, 2, 40, dtype=np.float32) * (1 if increasing else -1)
    weight = trapezoid(POINTS) if weighted else None
    came = np.asarray(jax.jit(monotone, static_argnames="increasing")(values, weight, increasing=increasing))
    for one, value in zip(came, values):
        wanted = scipy.optimize.isotonic_regression(
            value.astype(float), weights=weight[0].astype(float) if weighted else None, increasing=increasing
        )
        np.testing.assert_allclose(one, wanted.x, atol=1e-6)
    assert np.all((np.diff(came) >= 0) if increasing else (np.diff(came) <= 0))
    total = weight[0] if weighted else np.ones(40)
    np.testing.assert_allclose(came @ total, values @ total, atol=1e-5)
    np.testing.assert_allclose(monotone(came, weight, increasing), came, atol=1e-6)


def test_monotone_of_the_right_rule_and_of_one_value():
    """The first point has no weight, so it may be anything that fits."""
    values, weight = uneven(), right_rule(POINTS)
    came = np.asarray(monotone(values, weight))
    assert np.isfinite(came).all()
    np.testing.assert_allclose(came @ weight[0], values @ weight[0], atol=1e-6)
    np.testing.assert_array_equal(monotone(values[:, :1]), values[:, :1])


@pytest.mark.parametrize("function", [nonnegative, monotone])
def test_gradients_of_inequalities_are_those_of_differences(function):
    values, weight = uneven(), trapezoid(POINTS)
    direction = np.cos(np.arange(values.size)).reshape(values.shape)
    with jax.enable_x64(True):
        wide = jnp.asarray(values, jnp.float64)
        loss = jax.jit(lambda amount: jnp.sum(jnp.sin(function(wide + amount * direction, weight))))
        difference = (loss(1e-7) - loss(-1e-7)) / 2e-7
        np.testing.assert_allclose(jax.grad(loss)(0.0), difference, rtol=1e-6)
    mapped = jax.vmap(function, (0, None))(np.stack([values, 2 * values]), weight)
    np.testing.assert_allclose(mapped[0], function(values, weight), atol=1e-6)
