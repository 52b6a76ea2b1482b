"""Sums add over batches, groups and draws; the bootstrap covers what it should."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError
from physml.metrics import METRICS, Measure
from physml.metrics.aggregate import Sums, across_processes, interval, resample


@pytest.fixture
def parts():
    random = np.random.default_rng(0)
    return random.uniform(1, 2, (12, 3, 2)).astype(np.float32), random.uniform(1, 2, (12, 3, 2, 5)).astype(np.float32)


def test_chunks_add_up_to_the_whole(parts):
    groups = np.repeat(np.arange(4), 3)
    whole = Sums.of(parts, groups, 4)
    chunks = [Sums.of(tuple(p[i:j] for p in parts), groups[i:j], 4) for i, j in ((0, 5), (5, 10), (10, 12))]
    merged = chunks[0] + chunks[1] + chunks[2]
    for a, b, part in zip(merged.means(), whole.means(), parts):
        assert_allclose(a, b, rtol=1e-12)
        assert_allclose(a, part.mean(0), rtol=1e-6)


def test_chunked_scores_equal_whole_scores(spec, tiny):
    truth = tiny.window(spec, batch=7, frames=3).frames
    prediction = truth + np.random.default_rng(2).standard_normal(truth.shape).astype(np.float32)
    measure = Measure.of(spec)
    for name in ("rmse", "vrmse", "nrmse_pooled", "correlation", "log_spectral_error"):
        metric = METRICS[name]
        statistic = jax.jit(metric.statistic)
        sums = [
            Sums.of(statistic(prediction[i:j], truth[i:j], measure), np.zeros(j - i, int), 1)
            for i, j in ((0, 3), (3, 6), (6, 7))
        ]
        got = metric.finish(*(sums[0] + sums[1] + sums[2]).means())
        assert_allclose(got, jax.jit(metric.__call__)(prediction, truth, measure), rtol=1e-5)


def test_weight_zero_hides_anything(parts):
    weights = np.ones((12, 3))
    weights[5:, 2] = 0
    spoiled = parts[0].copy()
    spoiled[5:, 2] = np.nan
    (mean,) = Sums.of((spoiled,), np.zeros(12, int), 1, weights).means()
    assert_allclose(mean[2], parts[0][:5, 2].mean(0), rtol=1e-6)
    assert_allclose(mean[:2], parts[0][:, :2].mean(0), rtol=1e-6)


def test_draws_are_means_of_the_drawn_groups(parts):
    sums = Sums.of(parts[:1], np.repeat(np.arange(4), 3), 4)
    (means,) = sums.means(np.array([[2.0, 0, 0, 2], [1, 1, 1, 1]]))
    assert_allclose(means[0], parts[0][[0, 1, 2, 9, 10, 11]].mean(0), rtol=1e-6)
    assert_allclose(means[1], parts[0].mean(0), rtol=1e-6)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    hits = 0
    for trial in range(100):
        values = np.random.default_rng(trial).standard_normal((40, 1, 1))
        low, high = interval(lambda m: m, Sums.of((values,), np.arange(40), 40), resample(40, 200, trial))
        hits += (low <= 0 <= high).item()
    assert 85 <= hits <= 100  # 95 % nominal; binomial spread 2.2, percentile intervals a little narrow


def test_groups_widen_the_interval_of_dependent_pairs():
    level = np.repeat(np.random.default_rng(0).standard_normal(20), 10)[:, None, None]  # ten equal pairs per group
    alone = interval(lambda m: m, Sums.of((level,), np.arange(200), 200), resample(200, 300))
    grouped = interval(lambda m: m, Sums.of((level,), np.repeat(np.arange(20), 10), 20), resample(20, 300))
    assert (grouped[1] - grouped[0]) > 2 * (alone[1] - alone[0])  # sqrt(10) in theory


def test_one_group_has_no_interval(parts):
    low, high = interval(lambda m: m, Sums.of(parts[:1], np.zeros(12, int), 1), resample(1, 10))
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_one_process_keeps_its_sums(parts):
    sums = Sums.of(parts, np.zeros(12, int), 1)
    assert across_processes(sums) is sums


def test_empty_bootstrap_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        resample(0, 10)
