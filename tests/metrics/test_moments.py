"""Metrics from sums: equal to the definitions on whole frames, wherever space is cut; ensembles and SEEPS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scoringrules
from numpy.testing import assert_allclose

from physml.fields import Axis, Channel, Grid, Spec
from physml.metrics import FORECAST_METRICS, METRICS, Measure, crps, moments
from physml.metrics.ensemble import member_distance, rank_shares, variance
from physml.metrics.weather import seeps

SHIFT = 270.0


@pytest.fixture
def fields():
    """Prediction, truth and climatology `(pair, cell)` like temperatures in K, float32."""
    noise = np.random.default_rng(0).standard_normal((3, 6, 48)).astype(np.float32)
    return 280 + 5 * noise[0] + noise[1], 280 + 5 * noise[0], 279 + 3 * noise[2]


def score(name, prediction, truth, area, climatology=None, cuts=(), **options):
    """One score over all pairs from `pair_sums` of pieces of space."""
    members = prediction if prediction.ndim == 3 else prediction[None]
    edges = [0, *cuts, truth.shape[1]]
    pieces = []
    for a, b in zip(edges, edges[1:]):
        normal = None if climatology is None else climatology[:, a:b]
        pieces.append(moments.pair_sums(members[..., a:b], truth[:, a:b], area[a:b], SHIFT, normal, **options))
    sums = {key: sum(piece[key] for piece in pieces)[:, None, None] for key in pieces[0]}
    metric = FORECAST_METRICS[name]
    parts = metric.parts(moments.Moments(sums, np.array([SHIFT]), len(members)))
    return float(np.asarray(metric.finish(*(part.mean(0) for part in parts)))[0, 0])


@pytest.mark.parametrize("name", sorted(moments.PARTS))
def test_sums_give_the_metric_of_whole_frames(name, fields):
    area = np.linspace(0.5, 1.5, 48)
    prediction, truth, climatology = fields
    spec = Spec(Grid((Axis("y", tuple(range(48)), tuple(area)),)), (Channel("t"),))
    shape = (6, 1, 48, 1)
    measure = Measure.of(spec, None, climatology.astype(np.float64).reshape(shape))
    expected = METRICS[name](prediction.reshape(shape), truth.reshape(shape), measure)
    got = score(name, prediction, truth, area, climatology)
    # float32 frames near 280 in the reference
    assert_allclose(got, expected[0, 0], rtol=2e-5)
    assert_allclose(score(name, prediction, truth, area, climatology, cuts=(1, 17, 40)), got, rtol=1e-6)


def test_small_variations_on_a_large_offset_keep_their_correlation():
    rng = np.random.default_rng(1)
    signal, noise = rng.standard_normal((2, 1, 2000))
    prediction, truth = 1e5 + 0.01 * (signal + noise), 1e5 + 0.01 * signal
    sums = moments.pair_sums(prediction[None], truth, np.ones(2000), 1e5)
    found = moments.Moments({k: v[:, None, None] for k, v in sums.items()}, np.array([1e5]))
    expected = np.corrcoef((prediction - 1e5)[0], (truth - 1e5)[0])[0, 1]
    assert_allclose(moments.PARTS["correlation"](found)[0], expected, rtol=1e-9)
    flat = moments.pair_sums(prediction[None], np.full_like(truth, 99e3), np.ones(2000), 1e5)
    found = moments.Moments({k: v[:, None, None] for k, v in flat.items()}, np.array([1e5]))
    assert moments.PARTS["correlation"](found)[0] == 0  # a constant frame correlates with nothing


def test_missing_truth_does_not_count_and_missing_forecasts_do(fields):
    prediction, truth, climatology = fields
    area = np.linspace(0.5, 1.5, 48)
    gaps = truth.copy()
    gaps[:, 30:] = np.nan
    for name in ("rmse", "mae", "bias", "acc", "correlation", "vrmse", "nrmse"):
        short = score(name, prediction[:, :30], truth[:, :30], area[:30], climatology[:, :30])
        assert_allclose(score(name, prediction, gaps, area, climatology), short, rtol=1e-6)
    broken = prediction.copy()
    broken[2, 35] = np.nan
    assert np.isnan(score("rmse", broken, truth, area))
    assert np.isfinite(score("rmse", broken, gaps, area))


@pytest.mark.parametrize("members", [1, 2, 7, 50])
def test_crps_is_that_of_scoringrules(members):
    rng = np.random.default_rng(2)
    ensemble, truth = rng.standard_normal((members, 40)), rng.standard_normal(40)
    kinds = {False: "qd", True: "fair"}  # the quantile decomposition is that of the empirical distribution
    for fair in (False, True):
        if fair and members == 1:
            assert np.isnan(crps(ensemble, truth, fair=True)).all()
            continue
        expected = scoringrules.crps_ensemble(truth, ensemble.T, estimator=kinds[fair])
        assert_allclose(crps(ensemble, truth, fair=fair), expected, rtol=1e-9, atol=1e-12)
        found = crps(jnp.asarray(ensemble, jnp.float32), jnp.asarray(truth, jnp.float32), fair=fair)
        assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_distances_of_members_on_a_large_offset():
    ensemble = (101325 + 10 * np.random.default_rng(5).standard_normal((12, 500))).astype(np.float32)
    expected = np.abs(ensemble[:, None].astype(float) - ensemble).sum((0, 1)) / (12 * 11)
    assert_allclose(member_distance(ensemble), expected, rtol=1e-6)
    assert_allclose(member_distance(jnp.asarray(ensemble)), expected, rtol=1e-6)
    assert "dot_general" not in str(jax.make_jaxpr(member_distance)(ensemble))  # TF32 would lose it all


def test_ensemble_scores_from_sums():
    rng = np.random.default_rng(3)
    ensemble = (280 + rng.standard_normal((5, 4, 60))).astype(np.float32)
    truth = (280 + rng.standard_normal((4, 60))).astype(np.float32)
    area = np.linspace(0.5, 1.5, 60)
    wide = ensemble.astype(np.float64)

    def mean(field):
        return (field * area).sum() / area.sum() / 4

    assert_allclose(score("crps", ensemble, truth, area, cuts=(7, 31)), mean(crps(wide, truth)), rtol=1e-6)
    assert_allclose(score("crps_fair", ensemble, truth, area), mean(crps(wide, truth, fair=True)), rtol=1e-6)
    assert_allclose(score("spread", ensemble, truth, area) ** 2, mean(wide.var(0, ddof=1)), rtol=1e-6)
    skill = mean((wide.mean(0) - truth) ** 2)
    assert_allclose(score("rmse", ensemble, truth, area) ** 2, skill, rtol=1e-6)
    expected = np.sqrt(6 / 5 * mean(wide.var(0, ddof=1)) / skill)
    assert_allclose(score("spread_skill", ensemble, truth, area, cuts=(20,)), expected, rtol=1e-6)
    one = score("crps", ensemble[0], truth, area)
    assert_allclose(one, score("mae", ensemble[0], truth, area), rtol=1e-12)
    assert np.isnan(score("spread", ensemble[0], truth, area))


def test_members_from_one_distribution_have_spread_skill_one():
    draws = np.random.default_rng(4).standard_normal((5, 200, 500))
    assert_allclose(score("spread_skill", SHIFT + draws[:4], SHIFT + draws[4], np.ones(500)), 1, atol=0.01)
    assert np.isnan(member_distance(draws[:1])).all()
    assert np.isnan(variance(draws[:1])).all()


def test_ranks_by_hand():
    """Three members: below, between, tied with one of them (two ranks share), tied with all, above, and missing."""
    ensemble = np.array([[1.0, 2.0, 3.0]] * 6 + [[1.0, np.nan, 3.0]]).T
    ensemble[:, 3] = 5.0
    truth = np.array([0.0, 1.5, 2.0, 5.0, 9.0, np.nan, 2.0])
    expected = np.array(
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0.25] * 4, [0, 0, 0, 1], [np.nan] * 4, [np.nan] * 4]
    ).T
    assert_allclose(rank_shares(ensemble, truth), expected)
    assert_allclose(rank_shares(jnp.asarray(ensemble), jnp.asarray(truth)), expected)


def test_rank_histograms_add_and_are_flat_for_members_like_the_truth():
    draws = np.random.default_rng(5).standard_normal((4, 50, 400))
    area = np.linspace(0.5, 1.5, 400)
    pieces = [moments.pair_sums(draws[:3, :, cut], draws[3][:, cut], area[cut]) for cut in (slice(90), slice(90, 400))]
    sums = {key: sum(piece[key] for piece in pieces)[:, None, None] for key in pieces[0]}
    ranks = moments.Moments(sums, np.zeros(1), 3).ranks
    assert ranks.shape == (50, 1, 1, 4)
    assert_allclose(ranks.sum(-1), 1, rtol=1e-12)
    assert_allclose(ranks.mean(0).ravel(), 0.25, atol=0.01)
    shares = rank_shares(draws[:3], draws[3])
    assert_allclose(ranks[:, 0, 0], ((shares * area).sum(-1) / area.sum()).T, rtol=1e-12)


def test_seeps_is_the_table_of_rodwell():
    """Rodwell et al. 2010, eq. 15, for p1 = 0.4: forecast category down, observed category across."""
    p1 = 0.4
    table = 0.5 * np.array([
        [0, 1 / (1 - p1), 4 / (1 - p1)],
        [1 / p1, 0, 3 / (1 - p1)],
        [1 / p1 + 3 / (2 + p1), 3 / (2 + p1), 0],
    ])  # fmt: skip
    amounts = np.array([0.0, 1e-3, 9e-3])
    forecast, observed = np.meshgrid(amounts, amounts, indexing="ij")
    assert_allclose(seeps(forecast, observed, np.full((3, 3), 5e-3), p1), table)
    # Random forecasts with the climatological frequencies (p1, 2/3 and 1/3 of the wet ones) score 1, constant ones too.
    odds = np.array([p1, (1 - p1) * 2 / 3, (1 - p1) / 3])
    assert_allclose(odds @ table @ odds, 1)
    assert_allclose(table @ odds, 1)
    assert np.isnan(seeps(forecast, observed, np.full((3, 3), 5e-3), 0.9)).all()
    assert np.isnan(seeps(np.nan, 0.0, 5e-3, p1))


def test_seeps_counts_cells_with_a_defined_dry_fraction():
    area, dry = np.array([1.0, 2.0, 4.0]), np.array([0.4, 0.4, 0.95])
    truth, forecast = np.array([[0.0, 0.0, 0.0]]), np.array([[0.0, 1e-3, 1e-3]])
    threshold = np.full((1, 3), 5e-3)
    got = score("seeps", forecast, truth, area, categories=(threshold, dry))
    assert_allclose(got, (2 * 0.5 / 0.4) / 3, rtol=1e-6)
