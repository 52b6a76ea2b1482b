"""Pointwise and weather metrics: laws of each score, and independent numpy/scipy formulas."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from physml.errors import SpecError
from physml.fields import Axis, Channel, Grid, Spec
from physml.metrics import METRICS, Measure
from physml.metrics.metric import check_pair

LATITUDES = np.linspace(30.0, 70.0, 7)


@pytest.fixture
def sphere():
    """Two channels on a limited latitude-longitude grid with cos(latitude) weights."""
    cosine = np.cos(np.deg2rad(LATITUDES))
    latitude = Axis("latitude", tuple(LATITUDES), tuple(cosine / cosine.mean()), unit="degrees_north")
    longitude = Axis("longitude", tuple(np.arange(9.0)), unit="degrees_east")
    return Spec(Grid((latitude, longitude)), (Channel("slp", "Pa"), Channel("t", "K")))


@pytest.fixture
def pair(sphere):
    """(prediction, truth), shape (batch 4, lead 3, 7, 9, channel 2)."""
    random = np.random.default_rng(0)
    truth = random.standard_normal((4, 3, 7, 9, 2)).astype(np.float32) + 3
    return truth + 0.3 * random.standard_normal(truth.shape).astype(np.float32), truth


def score(name, prediction, truth, spec, mask=None, climatology=None):
    return np.asarray(METRICS[name](prediction, truth, Measure.of(spec, mask, climatology)))


def area(spec):
    return (np.cos(np.deg2rad(LATITUDES))[:, None] * np.ones(9)) / np.cos(np.deg2rad(LATITUDES)).mean() / 63


def mean(x, spec):
    return np.einsum("blxyc,xy->blc", np.asarray(x, np.float64), area(spec))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_perfect_prediction_has_the_ideal_score(name, pair, sphere):
    _, truth = pair
    climatology = np.full_like(truth, 2.5)
    got = score(name, truth, truth, sphere, climatology=climatology)
    assert got.shape == (3, 2)
    assert_allclose(got, METRICS[name].ideal, atol=1e-6)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_jit_equals_eager_and_wrong_prediction_is_worse(name, pair, sphere):
    prediction, truth = pair
    measure = Measure.of(sphere, climatology=np.full_like(truth, 2.5))
    # A constant shift is invisible to the centered correlation, so the noise is scored.
    eager = np.asarray(METRICS[name](prediction, truth, measure))
    assert_allclose(jax.jit(METRICS[name].__call__)(prediction, truth, measure), eager, rtol=2e-5, atol=1e-6)
    assert np.all(np.abs(eager - METRICS[name].ideal) > 1e-4)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("rmse", lambda p, t, s: np.sqrt(mean((p - t) ** 2, s).mean(0))),
        ("mae", lambda p, t, s: mean(np.abs(p - t), s).mean(0)),
        ("bias", lambda p, t, s: mean(p - t, s).mean(0)),
        ("relative_l2", lambda p, t, s: np.sqrt(mean((p - t) ** 2, s) / mean(t**2, s)).mean(0)),
        ("nrmse", lambda p, t, s: np.sqrt(mean((p - t) ** 2, s) / mean(t**2, s)).mean(0)),
        ("nrmse_pooled", lambda p, t, s: np.sqrt(mean((p - t) ** 2, s).mean(0) / mean(t**2, s).mean(0))),
        ("skill", lambda p, t, s: 1 - mean((p - t) ** 2, s).mean(0) / mean((t - 2.5) ** 2, s).mean(0)),
    ],
)
def test_scores_equal_numpy(name, formula, pair, sphere):
    prediction, truth = pair
    got = score(name, prediction, truth, sphere, climatology=np.full_like(truth, 2.5))
    # The bias averages 63 cells of +-0.3 to about 1e-2: absolute tolerance of float32 sums.
    assert_allclose(got, formula(*(np.asarray(x, np.float64) for x in pair), sphere), rtol=1e-5, atol=1e-6)


def test_vrmse_is_the_wells_formula(pair, sphere):
    flat = dataclasses.replace(sphere.grid.axes[0], weights=())
    spec = dataclasses.replace(sphere, grid=Grid((flat, sphere.grid.axes[1])))
    prediction, truth = pair
    square = ((prediction - truth) ** 2).mean((2, 3))
    expected = np.sqrt(square / truth.std((2, 3), ddof=1) ** 2).mean(0)  # The Well: unbiased spatial variance
    assert_allclose(score("vrmse", prediction, truth, spec), expected, rtol=1e-5)
    spatial_mean = np.broadcast_to(truth.mean((2, 3), keepdims=True), truth.shape)
    assert_allclose(score("vrmse", spatial_mean, truth, spec), np.sqrt(62 / 63), rtol=1e-5)


def test_correlation_equals_scipy(pair, sphere):
    flat = dataclasses.replace(sphere.grid.axes[0], weights=())
    spec = dataclasses.replace(sphere, grid=Grid((flat, sphere.grid.axes[1])))
    prediction, truth = pair
    pairs = [
        scipy.stats.pearsonr(prediction[b, i, ..., c].ravel(), truth[b, i, ..., c].ravel())[0]
        for b, i, c in np.ndindex(4, 3, 2)
    ]
    expected = np.reshape(pairs, (4, 3, 2)).mean(0)
    assert_allclose(score("correlation", prediction, truth, spec), expected, rtol=1e-5)


@pytest.mark.parametrize("constant", [0.1, 287.3, 101325.0])
def test_nothing_correlates_with_a_constant(constant, pair, sphere):
    truth = np.full_like(pair[1], constant)
    for prediction in (truth, np.nextafter(truth, np.float32(0)), constant + pair[0]):
        assert_allclose(score("correlation", prediction, truth, sphere), 0)
    assert_allclose(score("vrmse", constant + pair[0], truth, sphere), np.inf)
    slight = truth + np.float32(1e-4 * constant) * pair[1]  # still a field
    assert_allclose(score("correlation", slight, slight, sphere), 1, rtol=1e-5)


def test_anomaly_correlation_equals_its_definition(pair, sphere):
    prediction, truth = pair
    climatology = np.random.default_rng(5).standard_normal(truth.shape).astype(np.float32) + 3
    p, t = prediction - climatology, truth - climatology
    expected = (mean(p * t, sphere) / np.sqrt(mean(p**2, sphere) * mean(t**2, sphere))).mean(0)
    assert_allclose(score("acc", prediction, truth, sphere, climatology=climatology), expected, rtol=1e-5)
    pooled = mean(p * t, sphere).mean(0) / np.sqrt(mean(p**2, sphere).mean(0) * mean(t**2, sphere).mean(0))
    assert_allclose(score("acc_pooled", prediction, truth, sphere, climatology=climatology), pooled, rtol=1e-5)


def test_forecast_of_climatology_has_no_skill(pair, sphere):
    _, truth = pair
    climatology = np.full_like(truth, 2.5)
    assert_allclose(score("acc", climatology, truth, sphere, climatology=climatology), 0)
    assert_allclose(score("skill", climatology, truth, sphere, climatology=climatology), 0, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["relative_l2", "nrmse", "nrmse_pooled", "vrmse", "h1", "correlation", "log_spectral_error"]
)
@pytest.mark.parametrize("scale", [1e-4, 1e5])
def test_relative_scores_ignore_the_unit(name, scale, pair, sphere):
    prediction, truth = pair
    scale = np.float32(scale)
    expected = score(name, prediction, truth, sphere)
    assert_allclose(score(name, scale * prediction, scale * truth, sphere), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["rmse", "mae", "bias"])
def test_dimensional_scores_scale_with_the_unit(name, pair, sphere):
    prediction, truth = pair
    assert METRICS[name].dimensional
    expected = 100 * score(name, prediction, truth, sphere)
    assert_allclose(score(name, 100 * prediction, 100 * truth, sphere), expected, rtol=1e-4, atol=1e-4)


def test_area_weights_matter(pair, sphere):
    prediction, truth = pair
    north = prediction.copy()
    north[:, :, -1] += 5  # the smallest cells
    south = prediction.copy()
    south[:, :, 0] += 5  # the largest
    assert np.all(score("rmse", south, truth, sphere) > 1.3 * score("rmse", north, truth, sphere))


@pytest.mark.parametrize("name", ["rmse", "mae", "bias", "relative_l2", "vrmse", "correlation", "acc"])
def test_masked_cells_do_not_count_whatever_they_hold(name, pair, sphere):
    prediction, truth = pair
    mask = np.ones((7, 9, 2), np.float32)
    mask[2:4, 3:, 0] = 0
    hidden, land = prediction.copy(), truth.copy()
    hidden[:, :, mask == 0], land[:, :, mask == 0] = 1e6, np.nan
    climatology = np.full_like(truth, 2.5)
    reference = score(name, prediction, truth, sphere, mask, climatology)
    assert_allclose(score(name, hidden, land, sphere, mask, climatology), reference, rtol=1e-6)
    assert np.all(np.isfinite(reference))
    if name == "rmse":
        where = np.broadcast_to(area(sphere)[..., None], mask.shape) * mask
        expected = np.sqrt(np.einsum("blxyc,xyc->c", (prediction - truth) ** 2, where) / where.sum((0, 1)) / 12)
        assert_allclose(np.sqrt((reference**2).mean(0)), expected, rtol=1e-5)


def test_h1_sees_the_derivative(tiny):
    spec = tiny.spec((64,), ("u",))
    x = np.arange(64) / 64
    truth = np.sin(2 * np.pi * x).astype(np.float32)[None, None, :, None]
    ripple = truth + 0.1 * np.sin(2 * np.pi * 8 * x).astype(np.float32)[None, None, :, None]

    def slope(k):  # central differences multiply sin(2 pi k x) by sin(2 pi k h) / h
        return np.sin(2 * np.pi * k / 64) * 64

    expected = 0.1 * np.sqrt((1 + slope(8) ** 2) / (1 + slope(1) ** 2))
    assert_allclose(score("h1", ripple, truth, spec), expected, rtol=1e-4)
    assert_allclose(score("relative_l2", ripple, truth, spec), 0.1, rtol=1e-4)
    walls = dataclasses.replace(spec, grid=Grid((dataclasses.replace(spec.grid.axes[0], periodic=False),)))
    assert_allclose(score("h1_periodic", ripple, truth, walls), expected, rtol=1e-4)
    assert abs(score("h1", ripple, truth, walls) - expected) > 1e-4


def test_diverged_prediction_is_not_forgiven(pair, sphere):
    prediction, truth = pair
    prediction = prediction.copy()
    prediction[0, 1, 2, 2, 0] = np.nan
    got = score("rmse", prediction, truth, sphere)
    assert np.isnan(got[1, 0])
    assert np.isfinite(got[[0, 2]]).all()
    assert np.isfinite(got[1, 1])


def test_wrong_shapes_and_missing_climatology_are_refused(pair, sphere):
    prediction, truth = pair
    with pytest.raises(SpecError, match="batch, lead, 7, 9, 2"):
        check_pair(prediction[..., :1], truth, sphere)
    with pytest.raises(SpecError, match="climatology"):
        score("acc", prediction, truth, sphere)
