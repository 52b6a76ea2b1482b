"""Scores of uncertainty: closed forms against another library, coverage of what is calibrated and of what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import scoringrules
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.errors import ConfigError
from physml.metrics import calibration, gaussian_mixture
from physml.metrics.ensemble import rank_shares

RANDOM = np.random.default_rng(0)
MEAN, TRUTH = RANDOM.normal(size=(2, 3, 40))
VARIANCE = RANDOM.exponential(size=(3, 40))


@pytest.fixture(params=["numpy", "jax"])
def arrays(request):
    if request.param == "numpy":
        return MEAN, VARIANCE, TRUTH
    return tuple(jnp.asarray(a, jnp.float32) for a in (MEAN, VARIANCE, TRUTH))


def test_closed_forms_agree_with_other_libraries(arrays):
    rtol = 1e-12 if isinstance(arrays[0], np.ndarray) else 2e-5
    std = np.sqrt(VARIANCE)
    assert_allclose(calibration.gaussian_crps(*arrays), scoringrules.crps_normal(TRUTH, MEAN, std), rtol, 1e-6)
    assert_allclose(calibration.log_likelihood(*arrays), scipy.stats.norm.logpdf(TRUTH, MEAN, std), rtol, 1e-6)
    expected = np.abs(2 * scipy.stats.norm.cdf(TRUTH, MEAN, std) - 1)
    assert_allclose(calibration.central_level(*arrays), expected, rtol=rtol, atol=1e-6)


def test_without_variance_the_crps_is_the_absolute_error():
    zero = np.zeros_like(MEAN)
    assert_array_equal(calibration.gaussian_crps(MEAN, zero, TRUTH), np.abs(TRUTH - MEAN))
    assert_array_equal(calibration.central_level(MEAN, zero, TRUTH), 1)
    assert_array_equal(calibration.central_level(MEAN, zero, MEAN), 0)
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    slope = jax.grad(lambda v: calibration.gaussian_crps(zeros, v, ones).sum())(jnp.asarray([1e-12, 1, 4]))
    assert np.isfinite(slope).all()


def test_the_curve_of_what_is_calibrated_is_straight():
    count = 40_000
    truth = RANDOM.normal(size=count) * 2 + 1
    one, four = np.ones(count), 4 * np.ones(count)
    levels = np.array(calibration.LEVELS)
    right = calibration.calibration_curve(calibration.central_level(one, four, truth))
    assert_allclose(right, levels, atol=5 * 0.5 / np.sqrt(count))
    assert calibration.calibration_error(right) < 0.01
    sure = calibration.calibration_curve(calibration.central_level(one, one, truth))
    expected = 2 * scipy.stats.norm.cdf(scipy.stats.norm.ppf((1 + levels) / 2) / 2) - 1
    assert_allclose(sure, expected, atol=5 * 0.5 / np.sqrt(count))
    assert calibration.coverage(one, one, truth, 0.9) == pytest.approx(expected[8], abs=0.0125)


@pytest.mark.parametrize("members", [1, 2, 5, 20])
def test_the_truth_is_one_more_member(members):
    """Of M exchangeable members an interval of level 1 - 2 k / (M + 1) and, interpolated, any narrower one covers."""
    draws = RANDOM.normal(size=(members + 1, 40_000))
    levels = [level for level in calibration.LEVELS if level <= (members - 1) / (members + 1)]
    cells = calibration.ensemble_central_level(draws[1:], draws[0])
    ranks = rank_shares(draws[1:], draws[0]).mean(-1)
    if levels:
        curve = calibration.calibration_curve(cells, levels)
        # Exact at levels 1 - 2 k / (M + 1): a gap of M members is hit as often as any other, but not evenly filled.
        assert_allclose(curve, levels, atol=0.01 + 0.2 / members)
        assert_allclose([calibration.coverage_from_ranks(ranks, level) for level in levels], levels, atol=0.0125)
    outside = (draws[0] < draws[1:].min(0)) | (draws[0] > draws[1:].max(0))
    assert_array_equal(np.asarray(cells) == 1, outside)
    exact = (members - 1) / (members + 1)
    if exact:
        inside = calibration.calibration_curve(cells, (exact + 1e-9,))[0]
        assert inside == pytest.approx(1 - outside.mean(), abs=1e-12)
        assert calibration.coverage_from_ranks(ranks, exact) == pytest.approx(inside, abs=1e-12)


def test_intervals_within_the_middle_rank_share_it():
    """Two members: a level of 1 / 3 is the middle rank, that of zero is empty."""
    ranks = np.array([0.2, 0.5, 0.3])
    levels = {0.1: 0.15, 1 / 3: 0.5, 0.5: 0.5 + 0.5 / 4, 2 / 3: 0.75}
    assert_allclose([calibration.coverage_from_ranks(ranks, level) for level in levels], list(levels.values()))


def test_jax_and_numpy_agree_on_ensembles_and_ties():
    ensemble = RANDOM.integers(0, 4, (5, 200)).astype(np.float32)
    truth = RANDOM.integers(0, 4, 200).astype(np.float32)
    found = calibration.ensemble_central_level(ensemble, truth)
    assert_allclose(jax.jit(calibration.ensemble_central_level)(ensemble, jnp.asarray(truth)), found, atol=1e-6)
    assert ((found >= 0) & (found <= 1)).all()
    assert calibration.ensemble_central_level(np.full((5, 1), 2.0), np.array([2.0])) == [0]
    lacking = calibration.ensemble_central_level(np.array([[1.0], [np.nan]]), np.array([1.0]))
    assert np.isnan(lacking).all()


def test_weights_and_gaps():
    levels = np.array([0.2, 0.8, np.nan])
    assert_allclose(calibration.calibration_curve(levels, (0.5,), weights=np.array([3, 1, 9])), [0.75])
    assert np.isnan(calibration.calibration_curve(np.full(3, np.nan), (0.5,))).all()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        calibration.calibration_curve(levels, (0.5, 90))


def forecasts(std=2.0, starts=3, noise=2.0, members=None):
    """A truth of known noise round zero, and a forecast of zero with standard deviation `std`."""
    space = {"lat": np.linspace(-60, 60, 24), "lon": np.arange(0, 360, 10.0)}
    shape, times = (24, 36), np.arange(12.0)
    truth = RANDOM.normal(size=(12, *shape)) * noise + 5
    truth = xr.Dataset({"u": (("time", "lat", "lon"), truth), "v": (("time", "lat", "lon"), -truth)},
                       {"time": times, **space})  # fmt: skip
    lead, start = np.array([1.0, 2.0, 3.0]), np.arange(starts) * 3.0 + 1
    dims = ("trajectory", "lead", "lat", "lon")
    full = np.zeros((starts, 3, *shape))
    names = {"u": 5 + full, "v": full - 5, "u_std": std + full, "v_std": std + full}
    found = {name: (dims, values) for name, values in names.items()}
    coords = {"time": (("trajectory", "lead"), start[:, None] + lead), "lead": lead, **space}
    return xr.Dataset(found, coords), truth


def test_forecasts_with_standard_deviations_are_scored():
    prediction, truth = forecasts()
    scores = physml.evaluate(prediction, truth).score.sel(model="model")
    assert list(scores.channel.values) == ["u", "v"]
    one = scores.mean("lead").sel(channel="u")
    area = np.cos(np.deg2rad(truth.lat.values))[:, None] * np.ones(36)
    cells = truth.u.values[2:11]
    expected = scipy.stats.norm.logpdf(cells, 5, 2)
    assert_allclose(one.sel(metric="log_likelihood"), np.average(expected.mean(0), weights=area), rtol=1e-3)
    expected = scoringrules.crps_normal(cells, 5.0, 2.0)
    assert_allclose(one.sel(metric="gaussian_crps"), np.average(expected.mean(0), weights=area), rtol=1e-3)
    for level, score in ((0.5, "coverage_50"), (0.9, "coverage_90")):
        inside = np.abs(cells - 5) < 2 * scipy.stats.norm.ppf((1 + level) / 2)
        assert_allclose(one.sel(metric=score), np.average(inside.mean(0), weights=area), rtol=1e-3)
        assert_allclose(one.sel(metric=score), level, atol=0.03)


def test_land_does_not_count_and_other_models_have_no_uncertainty():
    prediction, truth = forecasts()
    truth["u"] = truth.u.where(truth.lat > 0)
    prediction["u_std"] = prediction.u_std.where(prediction.lat > 0)
    plain = prediction.drop_vars(["u_std", "v_std"])
    scores = physml.evaluate({"sure": prediction, "plain": plain}, truth, metrics=["coverage_90", "log_likelihood"])
    assert_allclose(scores.score.sel(model="sure", metric="coverage_90"), 0.9, atol=0.05)
    assert np.isfinite(scores.score.sel(model="sure")).all()
    assert np.isnan(scores.score.sel(model="plain")).all()
    with pytest.raises(ConfigError, match="NAME_std"):
        physml.evaluate(plain, truth, metrics=["log_likelihood"])
    with pytest.raises(ConfigError, match="two members"):
        physml.evaluate(plain, truth, metrics=["coverage_90"])


def test_ensembles_have_coverage():
    prediction, truth = forecasts()
    plain = prediction.drop_vars(["u_std", "v_std"])
    drawn = xr.concat([plain + RANDOM.normal(size=(3, 3, 24, 36)) * 2 for _ in range(19)], "member")
    drawn["v"] = -drawn.u
    scores = physml.evaluate(drawn, truth, metrics=["coverage_50", "coverage_90", "crps"]).score
    assert_allclose(scores.sel(metric="coverage_90"), 0.9, atol=0.04)
    assert_allclose(scores.sel(metric="coverage_50"), 0.5, atol=0.05)


def test_a_mixture_has_the_moments_of_its_samples():
    means, variances = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [2.0], [3.0]])
    mean, variance = gaussian_mixture(means, variances)
    assert_allclose([mean[0], variance[0]], [2, 2 + 4])  # the variance of 0, 2 and 4 is 4, unbiased
    assert_allclose(gaussian_mixture(means[:1], variances[:1]), [means[0], variances[0]])
