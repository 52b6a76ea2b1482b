"""Gaussian conditioning against dense float64 algebra, against what it must imply, and against the authors' updates."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from physml.constraints import LowRank, condition, project_linear, smooth, trapezoid
from physml.errors import ConfigError, DataError, SpecError
from physml.metrics import gaussian_mixture
from physml.metrics.calibration import log_likelihood

BATCH, N = 3, 20


def problem(rows=3, kind="diagonal", seed=0):
    """Random mean, covariance, operator `(rows, N)` and target, float32."""
    random = np.random.default_rng(seed)
    mean, target = random.normal(size=(BATCH, N)), random.normal(size=(BATCH, rows))
    variance, factor = 0.1 + random.random((BATCH, N)), random.normal(size=(BATCH, N, 4))
    covariance = {
        "diagonal": variance,
        "full": np.einsum("bir,bjr->bij", factor, factor) + variance[..., None] * np.eye(N),
        "low rank": LowRank(variance.astype(np.float32), factor.astype(np.float32)),
    }[kind]
    operator = random.normal(size=(rows, N))
    plain = [array.astype(np.float32) for array in (mean, operator, target)]
    covariance = covariance if kind == "low rank" else covariance.astype(np.float32)
    return plain[0], covariance, plain[1], plain[2]


def dense(covariance):
    """As full float64 matrices."""
    if isinstance(covariance, LowRank):
        return dense(covariance.diagonal) + np.einsum("bir,bjr->bij", *[covariance.factor.astype(np.float64)] * 2)
    covariance = np.asarray(covariance, np.float64)
    return covariance if covariance.ndim == 3 else covariance[..., None] * np.eye(covariance.shape[-1])


def brute_force(mean, covariance, operator, target, tolerance=0.0):
    means, covariances = [], []
    noise = np.broadcast_to(np.square(tolerance), np.shape(target))
    for i, prior in enumerate(dense(covariance)):
        rows = np.asarray(operator if operator.ndim == 2 else operator[i], np.float64)
        gain = prior @ rows.T @ np.linalg.inv(rows @ prior @ rows.T + np.diag(noise[i]))
        means.append(mean[i] - gain @ (rows @ mean[i] - target[i]))
        covariances.append(prior - gain @ rows @ prior)
    return np.stack(means), np.stack(covariances)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["diagonal", "full", "low rank"])
@pytest.mark.parametrize("rows", [1, 3])
def test_is_the_formula(rows, kind, precision):
    given = problem(rows, kind)
    tolerance = np.linspace(0, 0.5, rows).astype(np.float32)
    mean, covariance = condition(*given, tolerance, precision=precision)
    expected = brute_force(*given, tolerance)
    assert mean.dtype == covariance.dtype == np.float32
    np.testing.assert_allclose(mean, expected[0], atol=2e-6 if precision == "float64" else 2e-5)
    np.testing.assert_allclose(covariance, expected[1], atol=2e-5)
    short, variance = condition(*given, tolerance, return_diagonal=True, precision=precision)
    np.testing.assert_allclose(short, mean, atol=1e-6)
    np.testing.assert_allclose(variance, np.diagonal(covariance, axis1=1, axis2=2), atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["diagonal", "full", "low rank"])
def test_constraints_hold_and_nothing_is_left_uncertain_about_them(kind, precision):
    mean, covariance, operator, target = problem(4, kind, seed=1)
    after, left = jax.jit(functools.partial(condition, precision=precision))(mean, covariance, operator, target)
    wide, rows = np.asarray(after, np.float64), operator.astype(np.float64)
    size = np.abs(rows) @ np.abs(wide).T
    assert np.abs(wide @ rows.T - target).max() <= 1e-6 * size.max()
    assert np.abs(rows @ np.asarray(left, np.float64)).max() < 1e-5 * np.abs(rows @ dense(covariance)).max()


def test_an_operator_for_each_sample():
    mean, covariance, operator, target = problem()
    each = operator * np.array([1.0, -2.0, 0.5], np.float32)[:, None, None] + np.eye(3, N, dtype=np.float32)
    for wanted, came in zip(brute_force(mean, covariance, each, target), condition(mean, covariance, each, target)):
        np.testing.assert_allclose(came, wanted, atol=2e-6)


@pytest.mark.parametrize("kind", ["diagonal", "full", "low rank"])
def test_no_confidence_in_the_constraint_leaves_the_prior(kind):
    given = problem(2, kind)
    for tolerance, within in ((1e5, 1e-6), (np.inf, 1e-7)):
        mean, covariance = condition(*given, tolerance)
        np.testing.assert_allclose(mean, given[0], atol=within)
        np.testing.assert_allclose(covariance, dense(given[1]), atol=1e-5)


def test_float64_stays_float64():
    mean, variance, operator, target = (np.asarray(array, np.float64) for array in problem())
    after, left = condition(mean, variance, operator, target)
    assert after.dtype == left.dtype == np.float64
    np.testing.assert_allclose(np.asarray(after) @ operator.T, target, atol=1e-13)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_variances_of_any_size(precision):
    """A part in 10^20 of them, whose squares float32 does not hold."""
    mean, variance, operator, target = problem(2)
    expected = condition(mean, variance, operator, target, return_diagonal=True)
    small = condition(mean, variance * np.float32(1e-30), operator, target, return_diagonal=True, precision=precision)
    np.testing.assert_allclose(small[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(small[1] * 1e30, expected[1], atol=1e-5)


def test_one_after_the_other_is_both_at_once():
    mean, variance, operator, target = problem(4)
    halfway = condition(mean, variance, operator[:2], target[:, :2], 0.3)
    after, covariance = condition(*halfway, operator[2:], target[:, 2:])
    both = condition(mean, variance, operator, target, np.array([0.3, 0.3, 0, 0], np.float32))
    np.testing.assert_allclose(after, both[0], atol=2e-6)
    np.testing.assert_allclose(covariance, both[1], atol=2e-6)


# --- transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diagonal", "full", "low rank"])
def test_gradients_are_those_of_differences(kind):
    given = problem(2, kind)
    with jax.enable_x64(True):
        given = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), given)
        direction = jax.tree.map(lambda array: jnp.cos(jnp.arange(array.size)).reshape(array.shape), given)
        if kind == "full":
            direction = (direction[0], direction[1] + direction[1].swapaxes(1, 2), *direction[2:])

        @jax.jit
        def loss(amount):
            moved = jax.tree.map(lambda array, step: array + amount * step, given, direction)
            mean, covariance = condition(*moved, 0.1)
            return jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.cos(covariance))

        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(loss)(0.0), difference, rtol=1e-6)


def test_gradients_inside_a_float32_program_are_those_of_float64():
    mean, variance, operator, target = problem()

    def loss(mean, variance):
        return sum(jnp.sum(jnp.sin(part)) for part in condition(mean, variance, operator, target, return_diagonal=True))

    gradients = jax.jit(jax.grad(loss, (0, 1)))(mean, variance)
    with jax.enable_x64(True):
        wide = jax.grad(loss, (0, 1))(jnp.asarray(mean, jnp.float64), jnp.asarray(variance, jnp.float64))
    for came, wanted in zip(gradients, wide):
        assert came.dtype == np.float32
        np.testing.assert_allclose(came, wanted, atol=1e-5)
    _, tangent = jax.jvp(lambda m: condition(m, variance, operator, target)[0], (mean,), (np.ones_like(mean),))
    np.testing.assert_allclose(tangent @ operator.T, 0, atol=1e-5)  # the constraints stay met


def test_jit_vmap_and_scan_give_what_eager_calls_give():
    mean, variance, operator, target = problem()
    update = functools.partial(condition, return_diagonal=True)
    eager = update(mean, variance, operator, target)
    operators = jnp.stack([operator, 2 * operator])
    for mapped in (jax.vmap(update, (None, None, 0, None)), jax.vmap(jax.jit(update), (None, None, 0, None))):
        mapped = mapped(mean, variance, operators, target)
        for one, expected in zip(mapped, update(mean, variance, 2 * operator, target)):
            np.testing.assert_allclose(one[1], expected, atol=1e-6)
            np.testing.assert_allclose(one[0].shape, expected.shape)

    @jax.jit
    def repeated(mean):
        return jax.lax.scan(lambda m, _: (update(m, variance, operator, target)[0], None), mean, length=3)[0]

    np.testing.assert_allclose(repeated(mean), eager[0], atol=1e-6)


def test_constants_of_a_program_are_of_its_precision():
    """Known arrays of float64 keep it, but a program that is traced without it gets none."""
    given = [np.asarray(array, np.float64) for array in problem()]
    mean = jax.jit(lambda scale: scale * condition(*given)[0])(np.float32(1))
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, condition(*given)[0], atol=1e-6)


def test_the_diagonal_never_needs_a_square():
    """A full covariance of these would take 40 GB."""
    n = 100_000
    rows = np.stack([np.ones(n), np.linspace(-1, 1, n)]).astype(np.float32) / n
    shapes = (jax.ShapeDtypeStruct((1, n), jnp.float32),) * 2
    target = np.zeros((1, 2), np.float32)
    program = jax.jit(lambda mean, variance: condition(mean, variance, rows, target, return_diagonal=True))
    memory = program.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 40 * 8 * n


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_redundant_rows_change_nothing(precision):
    mean, variance, operator, target = problem(2)
    mixing = np.array([[1, 0], [0, 1], [1, 1], [2, -1]], np.float32)
    expected = condition(mean, variance, operator, target)
    update = jax.jit(functools.partial(condition, precision=precision))
    for function in (update, functools.partial(condition, precision=precision)):
        after = function(mean, variance, mixing @ operator, target @ mixing.T)
        np.testing.assert_allclose(after[0], expected[0], atol=2e-5)
        np.testing.assert_allclose(after[1], expected[1], atol=2e-5)
    gradient = jax.grad(lambda m: jnp.sum(update(m, variance, mixing @ operator, target @ mixing.T)[0] ** 2))(mean)
    single = jax.grad(lambda m: jnp.sum(condition(m, variance, operator, target)[0] ** 2))(mean)
    np.testing.assert_allclose(gradient, single, atol=1e-4)


def test_contradictions_are_an_error_or_least_squares():
    mean, variance, operator, target = problem(1)
    twice, targets = np.concatenate([operator, operator]), np.concatenate([target - 1, target + 1], 1)
    with pytest.raises(ConfigError, match="contradict each other.*tolerance"):
        condition(mean, variance, twice, targets)
    after = jax.jit(condition)(mean, variance, twice, targets)
    np.testing.assert_allclose(after[0], condition(mean, variance, operator, target)[0], atol=2e-6)


def test_no_variance_where_one_is_needed():
    mean, variance, _, target = problem(1)
    operator, variance = np.zeros((1, N), np.float32), variance.copy()
    operator[0, :3], variance[1, :3] = 1, 0
    with pytest.raises(DataError, match="variance is zero wherever row 0 .*sample 1"):
        condition(mean, variance, operator, target)
    after, left = jax.jit(condition)(mean, variance, operator, target)
    assert np.isfinite(after).all()
    assert np.isfinite(left).all()
    np.testing.assert_array_equal(after[1], mean[1])
    met = target.copy()
    met[1] = mean[1, :3].sum()
    condition(mean, variance, operator, met)  # nothing has to be corrected
    variance[1, 0] = 1
    after, _ = condition(mean, variance, operator, target)
    np.testing.assert_array_equal(after[1, 1:], mean[1, 1:])  # zero variance stays


def test_negative_variances_are_an_error_or_zero():
    mean, variance, operator, target = problem()
    negative = np.where(np.arange(N) == 4, -0.5, variance).astype(np.float32)
    with pytest.raises(DataError, match=r"negative variance -0.5 at \(sample, point\) \(0, 4\)"):
        condition(mean, negative, operator, target)
    expected = condition(mean, np.maximum(negative, 0), operator, target)
    np.testing.assert_allclose(jax.jit(condition)(mean, negative, operator, target)[0], expected[0], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mean": np.zeros(N)}, SpecError, r"mean has shape \(20,\)"),
        ({"covariance": np.ones((BATCH, N + 1))}, SpecError, r"covariance has shape \(3, 21\)"),
        ({"covariance": LowRank(np.ones((BATCH, N)), np.ones((BATCH, 4)))}, SpecError, "factor"),
        ({"operator": np.ones(N)}, SpecError, r"operator has shape \(20,\)"),
        ({"operator": np.ones((2, 3, N))}, SpecError, r"operator has shape \(2, 3, 20\)"),
        ({"target": np.zeros(3)}, SpecError, r"target has shape \(3,\), but \(3, 3\)"),
        ({"tolerance": np.zeros(2)}, SpecError, "tolerance has shape"),
        ({"tolerance": -0.1}, ConfigError, "standard deviation is 0 or more"),
        ({"tolerance": np.nan}, ConfigError, "tolerance is nan"),
        ({"precision": "float16"}, ConfigError, "precision is 'float16'"),
        ({"mean": np.full((BATCH, N), np.nan)}, DataError, "mean holds NaN"),
        ({"target": np.full((BATCH, 3), np.inf)}, DataError, "target holds NaN or infinite"),
        ({"covariance": np.tile(np.tri(N), (BATCH, 1, 1))}, DataError, "not symmetric"),
        ({"operator": np.zeros((3, N))}, ConfigError, "Row 0 of the operator is zero"),
    ],
)
def test_what_does_not_fit_is_said(changes, error, message):
    mean, covariance, operator, target = problem()
    given = {"mean": mean, "covariance": covariance, "operator": operator, "target": target, **changes}
    with pytest.raises(error, match=message):
        condition(**given)


# --- projections ------------------------------------------------------------------------------------------------------


def test_projection_is_the_nearest_point():
    mean, variance, operator, target = problem()
    nearest = mean - (np.linalg.pinv(operator) @ (mean @ operator.T - target).T).T
    np.testing.assert_allclose(project_linear(mean, operator, target), nearest, atol=2e-6)
    oblique = project_linear(mean, operator, target, variance)
    np.testing.assert_allclose(oblique, brute_force(mean, variance, operator, target)[0], atol=2e-6)
    np.testing.assert_allclose(project_linear(oblique, operator, target), oblique, atol=1e-6)
    with pytest.raises(ConfigError, match="contradict"):
        project_linear(mean, np.ones((2, N), np.float32), np.array([[0, 1.0]] * BATCH, np.float32))


def test_smoothing_evens_out_what_neighbors_do_not_share():
    x = np.linspace(0, 1, 101)
    line = 2 * x - 1
    noisy = (line + 0.01 * np.random.default_rng(0).normal(size=101))[None].astype(np.float32)
    mean, covariance = smooth(noisy, np.full((1, 101), 1e-4, np.float32))
    assert np.abs(np.asarray(mean)[0] - line).mean() < 0.7 * np.abs(noisy[0] - line).mean()
    assert np.all(np.linalg.eigvalsh(np.asarray(covariance[0], np.float64)) > 0)
    straight, _ = smooth(line[None].astype(np.float32), np.full((1, 101), 1e-4, np.float32))
    np.testing.assert_allclose(straight[0], line, atol=1e-6)
    with pytest.raises(ConfigError, match="correlation"):
        smooth(noisy, np.ones_like(noisy), 1.5)
    with pytest.raises(SpecError, match="variance"):
        smooth(noisy, np.ones((1, 101, 101)))
    gradient = jax.grad(lambda v: jnp.sum(smooth(noisy, v)[0] ** 2))(jnp.zeros((1, 101)).at[0, 3].set(1e-4))
    assert np.isfinite(gradient).all()


# --- the authors' own numbers -----------------------------------------------------------------------------------------

SOFT = {"pme": 0.0, "stefan": 1e-4}  # what "w/diff" of the files takes as tolerance of the mass
UPDATES = ("probconserv", "hardc", "probconserv_diff")


@pytest.fixture(scope="module")
def files(shared_data):
    import xarray as xr

    folder = shared_data / "probconserv"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")

    def opened(name):
        return {kind: xr.load_dataset(folder / f"{name}_{kind}.nc") for kind in ("predictions", "expected_updates")}

    return {name: opened(name) for name in SOFT}, json.loads((folder / "metrics.json").read_text())


def updated(problem, update, mean, variance, mass, x):
    """Any leading axes; in blocks, as "w/diff" takes a full matrix per sample."""
    shape, operator = mean.shape, trapezoid(x).astype(np.float32)
    flat = [array.reshape(-1, array.shape[-1]) for array in (mean, variance, np.asarray(mass)[..., None])]
    results = []
    for at in range(0, len(flat[0]), 50):
        mean, variance, target = (array[at : at + 50] for array in flat)
        if update == "hardc":
            results.append((project_linear(mean, operator, target), variance))
            continue
        prior = smooth(mean, variance) if update == "probconserv_diff" else (mean, variance)
        tolerance = SOFT[problem] if update == "probconserv_diff" else 0.0
        results.append(condition(*prior, operator, target, tolerance, return_diagonal=True))
    return [np.concatenate([np.asarray(part) for part in parts]).reshape(shape) for parts in zip(*results)]


@pytest.mark.parametrize(
    ("name", "update"),
    [
        pytest.param(name, update, marks=[pytest.mark.slow] * ((name, update) == ("pme", "probconserv_diff")))
        for name in SOFT
        for update in UPDATES
    ],
)
def test_updates_are_the_authors(files, name, update):
    data, expected = files[0][name].values()
    data = data.sel(function=expected.function)
    for network in ("anp", "physnp"):
        if f"{network}_{update}_mean" not in expected:
            continue
        prior = data[f"{network}_mean"].values, data[f"{network}_std"].values ** 2
        mean, variance = updated(name, update, *prior, data.mass_rhs.values, data.x.values)
        np.testing.assert_allclose(mean, expected[f"{network}_{update}_mean"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(variance, expected[f"{network}_{update}_var"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(SOFT))
def test_covariances_are_the_authors(files, name):
    data, expected = files[0][name].values()
    one = data.sel(function=expected.function.values[:1]).sel(time=float(data.t_paper), method="nearest")
    mean, variance, mass = one.anp_mean.values, one.anp_std.values**2, one.mass_rhs.values[:, None]
    operator = trapezoid(data.x.values).astype(np.float32)
    _, covariance = condition(mean, variance, operator, mass)
    np.testing.assert_allclose(covariance[0], expected.anp_probconserv_cov, atol=1e-7)
    _, covariance = condition(*smooth(mean, variance), operator, mass, SOFT[name])
    np.testing.assert_allclose(covariance[0], expected.anp_probconserv_diff_cov, atol=1e-7)


def mixed(files, name, update, every=1):
    """Moments of the updated draws of all functions (every so many), and which functions they are."""
    data, _ = files[0][name].values()
    data = data.isel(function=slice(None, None, every))
    mass = data.mass_rhs.sel(time=float(data.t_paper), method="nearest").values
    means, variances = data.anp_sample_mean.values, data.anp_sample_std.values**2
    mass = np.broadcast_to(mass[:, None], means.shape[:2])
    means, variances = updated(name, update, means, variances, mass, data.x.values)
    floor = variances if update == "hardc" else np.maximum(variances, 1e-8)
    return data, *gaussian_mixture(means.swapaxes(0, 1), floor.swapaxes(0, 1))


def check_mixture(files, name, update, every):
    data, mean, variance = mixed(files, name, update, every)
    expected = files[0][name]["expected_updates"]
    both = np.intersect1d(data.function, expected.function)
    assert len(both) >= 10
    place = [list(data.function.values).index(function) for function in both]
    wanted = expected.sel(function=both)
    np.testing.assert_allclose(mean[place], wanted[f"mix16_{update}_mean"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(variance[place] ** 0.5, wanted[f"mix16_{update}_std"], atol=1e-6, rtol=0)
    return data, mean, variance


def check_scores(data, mean, variance, wanted):
    """Against figures `{"m=1": {"CE": [mean, standard error], "LL": ..., "MSE": ...}}`."""
    at = data.sel(time=float(data.t_paper), method="nearest")
    truth, mass = at.truth.values.astype(np.float64), at.mass_rhs.values[:, None]
    mean, variance = mean.astype(np.float64), variance.astype(np.float64)
    scores = {
        "CE": (mean @ trapezoid(data.x.values).T - mass)[:, 0],
        "LL": log_likelihood(mean, variance, truth).mean(-1),
        "MSE": ((mean - truth) ** 2).mean(-1),
    }
    for group, figures in wanted.items():
        key, number = group.split("=")
        chosen = np.isclose(data[key], float(number))
        assert chosen.sum() == 50
        # CE of an exact constraint is the rounding of float32: 1e-8 of masses up to 1.
        for score, (rtol, atol) in {"CE": (1e-5, 5e-9), "LL": (1e-6, 0), "MSE": (1e-5, 0)}.items():
            values = scores[score][chosen]
            came = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(came, figures[score], rtol=10 * rtol, atol=atol, err_msg=f"{group} {score}")


@pytest.mark.parametrize(("update", "every"), [("probconserv", 1), ("hardc", 1), ("probconserv_diff", 10)])
@pytest.mark.parametrize("name", list(SOFT))
def test_mixtures_of_updated_draws_are_the_authors(files, name, update, every):
    data, mean, variance = check_mixture(files, name, update, every)
    if every == 1:
        check_scores(data, mean, variance, files[1][name][f"anp/{update}/mix16"])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SOFT))
def test_all_smoothed_draws_are_the_authors(files, name):
    data, mean, variance = check_mixture(files, name, "probconserv_diff", 1)
    check_scores(data, mean, variance, files[1][name]["anp/probconserv_diff/mix16"])


@pytest.mark.parametrize("name", list(SOFT))
def test_scores_of_the_stored_moments_are_those_noted(files, name):
    data, figures = files[0][name]["predictions"], files[1][name]
    at = data.sel(time=float(data.t_paper), method="nearest")
    checked = 0
    for network in ("anp", "physnp", "softc"):
        if f"{network}_mean" not in data:
            continue
        moments = at[f"{network}_mean"].values, at[f"{network}_std"].values ** 2
        check_scores(data, *moments, figures[f"{network}/raw/mixture of per-draw updates"])
        for update in UPDATES:
            if f"{network}/{update}/update of the mixture moments" in figures:
                after = updated(name, update, *moments, at.mass_rhs.values, data.x.values)
                check_scores(data, *after, figures[f"{network}/{update}/update of the mixture moments"])
                checked += 1
    assert checked == 4
