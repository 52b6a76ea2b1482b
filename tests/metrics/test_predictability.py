"""Agreement of members and what their spread tells, on ensembles whose answer is known by hand."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec
from physml.metrics import METRICS, Measure
from physml.metrics.predictability import decorrelation_time, member_correlation, spread_error

POINTS = 32
SPEC = Spec(Grid((Axis.uniform("x", POINTS, 2 * np.pi),)), (Channel("u"),), time_step=0.5)
X = np.arange(POINTS) * 2 * np.pi / POINTS


def mixed(angles):
    """Two members cos(a) sin(x) +- sin(a) cos(x) + 3, for `angles (batch, lead)`: their correlation is cos(2 a)."""
    angles = np.asarray(angles, np.float32)[None, ..., None, None]
    sign = np.array([1, -1]).reshape(2, 1, 1, 1, 1)
    wave = np.cos(angles) * np.sin(X)[:, None] + sign * np.sin(angles) * np.cos(X)[:, None]
    return (wave + 3).astype(np.float32)


def test_two_waves_out_of_phase_correlate_as_their_angle():
    angles = np.linspace(0, np.pi / 2, 7).reshape(1, 7)
    assert_allclose(member_correlation(mixed(angles), SPEC)[0, :, 0], np.cos(2 * angles[0]), atol=1e-6)


def test_pairs_are_averaged_and_scale_and_offset_do_not_count():
    """sin, 5 sin + 2 and cos: correlations 1, 0 and 0."""
    members = np.stack([np.sin(X), 5 * np.sin(X) + 2, np.cos(X)]).astype(np.float32).reshape(3, 1, 1, POINTS, 1)
    assert_allclose(member_correlation(members, SPEC), 1 / 3, atol=1e-6)
    members[2] = 7.0  # a constant member agrees with none
    assert_allclose(member_correlation(members, SPEC), 1 / 3, atol=1e-6)


def test_it_is_the_mean_of_the_metric_over_pairs():
    members = np.random.default_rng(0).standard_normal((5, 3, 4, POINTS, 1)).astype(np.float32)
    metric, measure = METRICS["correlation"], Measure.of(SPEC)
    pairs = [metric.statistic(members[i], members[j], measure)[0] for i in range(5) for j in range(i)]
    found = jax.jit(lambda m: member_correlation(m, SPEC))(members)
    assert_allclose(found, np.mean(pairs, 0), atol=1e-6)


def test_time_of_disagreement():
    """cos(2 a) falls below 0.8 between a = 0.32 and 0.33: sample 0 at its third lead, sample 1 never."""
    angles = [[0.1, 0.3, 0.33, 0.6], [0.0, 0.1, 0.2, 0.3]]
    times, capped = decorrelation_time(mixed(angles), SPEC)
    assert_allclose(times, [[1.5], [2.0]])
    assert_array_equal(capped, [[False], [True]])
    times, capped = decorrelation_time(mixed(angles), SPEC, 0.9)  # cos(0.6) = 0.83
    assert_allclose(times, [[1.0], [2.0]])
    assert not capped.any()
    above, below = np.cos(0.6), np.cos(0.66)
    times, _ = decorrelation_time(mixed(angles), SPEC, interpolate=True)
    assert_allclose(times[0, 0], 1.0 + 0.5 * (above - 0.8) / (above - below), rtol=1e-5)


def test_members_that_fail_disagree():
    members = mixed([[0.1, 0.1, 0.1]])
    members[0, 0, 1] = np.nan
    times, capped = decorrelation_time(members, SPEC)
    assert_allclose(times, [[1.0]])
    assert not capped.any()


def test_spread_and_error():
    """Members truth + e +- s in sample i: spread sqrt(2) s, error e; correlation 1, -1 and 0 by lead."""
    spread = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 1]], np.float32)[..., None, None]
    error = np.array([[2, 3, 1], [4, 2, 2], [6, 1, 3]], np.float32)[..., None, None]
    truth = np.broadcast_to(np.sin(X)[:, None], (3, 3, POINTS, 1)).astype(np.float32)
    found = spread_error(np.stack([truth + error + spread, truth + error - spread]), truth, SPEC)
    assert_allclose(found.spread, np.sqrt(2) * spread[..., 0], rtol=1e-5)
    assert_allclose(found.error, error[..., 0], rtol=1e-5)
    assert_allclose(found.correlation[:, 0], [1, -1, 0], atol=1e-4)


def test_equal_spread_tells_nothing():
    truth = np.zeros((3, 1, POINTS, 1), np.float32)
    error = np.array([1.0, 2.0, 4.0], np.float32).reshape(3, 1, 1, 1)
    assert_array_equal(spread_error(np.stack([truth + error + 1, truth + error - 1]), truth, SPEC).correlation, [[0.0]])


def test_equal_samples_tell_nothing():
    """Sums over the batch leave rounding, which correlates with itself."""
    random = np.random.default_rng(6)
    for count in (3, 7):
        members = np.repeat(280 + random.normal(size=(4, 1, 16, POINTS, 1)), count, 1).astype(np.float32)
        truth = np.repeat(280 + random.normal(size=(1, 16, POINTS, 1)), count, 0).astype(np.float32)
        assert_array_equal(spread_error(members, truth, SPEC).correlation, np.zeros((16, 1)))


def test_masked_cells_do_not_count():
    members, mask = mixed([[0.2, 0.4]] * 3), np.ones((POINTS, 1), np.float32)
    mask[3:9] = 0
    spoiled = np.where(mask > 0, members, 100.0).astype(np.float32) * np.array([1, -1]).reshape(2, 1, 1, 1, 1)
    spoiled = np.where(mask > 0, members, spoiled).astype(np.float32)
    assert_allclose(member_correlation(spoiled, SPEC, mask), member_correlation(members, SPEC, mask), atol=1e-6)
    assert_allclose(
        spread_error(spoiled, members[0], SPEC, mask).spread, spread_error(members, members[0], SPEC, mask).spread
    )


def test_what_cannot_be_compared_is_refused():
    members = mixed([[0.1]])
    with pytest.raises(ConfigError, match="1 member was given"):
        decorrelation_time(members[:1], SPEC)
    with pytest.raises(ConfigError, match="needs 3"):
        spread_error(members, members[0], SPEC)
    with pytest.raises(SpecError, match="was expected"):
        decorrelation_time(members[..., :5, :], SPEC)
    with pytest.raises(SpecError, match="truth holds"):
        spread_error(members, np.repeat(members[0], 2, axis=0), SPEC)
