"""Losses: known values, weights, masks, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec
from physml.metrics.losses import H1, LOSSES, MAE, MSE, RelativeLp, derivative, resolve


@pytest.fixture
def pair(spec):
    random = np.random.default_rng(1)
    shape = (3, 2, *spec.grid.shape, 2)
    return random.standard_normal(shape).astype("f4"), random.standard_normal(shape).astype("f4")


def line(n, length=1.0, periodic=True):
    return Spec(Grid((Axis.uniform("x", n, length, periodic),)), (Channel("u"),))


def test_mse_of_a_constant_offset(spec, pair):
    prediction, _ = pair
    truth = prediction - np.array([1.0, 3.0], "f4")
    assert_allclose(MSE()(prediction, truth, spec), (1 + 9) / 2, rtol=1e-5)
    assert_allclose(MAE()(prediction, truth, spec), (1 + 3) / 2, rtol=1e-5)
    assert_allclose(MSE(channels=(3.0, 1.0))(prediction, truth, spec), (3 * 1 + 9) / 4, rtol=1e-5)
    # three samples, two channels, mean over the two frames
    assert_allclose(MSE(reduction="sum")(prediction, truth, spec), 3 * (1 + 9), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_relative_loss_is_the_ratio_of_norms_of_each_sample_and_channel(spec, pair, p):
    prediction, truth = pair
    flat = [a.reshape(3, 2, -1, 2) for a in (prediction - truth, truth)]
    error, size = (np.linalg.norm(a, ord=p, axis=2) for a in flat)
    assert_allclose(RelativeLp(p=p)(prediction, truth, spec), (error / size).mean(), rtol=1e-5)
    assert_allclose(RelativeLp(p=p, reduction="sum")(prediction, truth, spec), (error / size).mean(1).sum(), rtol=1e-5)


def test_joint_norm_spans_the_channels(spec, pair):
    prediction, truth = pair
    truth[..., 1] = 0  # a vanishing component must not blow up
    error = np.linalg.norm((prediction - truth).reshape(6, -1), axis=1)
    size = np.linalg.norm(truth.reshape(6, -1), axis=1)
    assert_allclose(RelativeLp(joint=True)(prediction, truth, spec), (error / size).mean(), rtol=1e-5)
    # the weight 0 takes the second channel out of both norms
    only = RelativeLp(joint=True, channels=(1.0, 0.0))(prediction, truth, spec)
    assert_allclose(only, RelativeLp(channels=(1.0, 0.0))(prediction, truth, spec), rtol=1e-5)


def test_h1_of_a_wave_is_its_analytic_norm():
    """u = sin(2 pi x): central differences on n points give the slope 2 pi times sin(h)/h, h = 2 pi / n."""
    n = 32
    x = np.arange(n) / n
    truth = np.sin(2 * np.pi * x, dtype="f4").reshape(1, 1, n, 1)
    noise = 0.1 * np.sin(6 * np.pi * x, dtype="f4").reshape(1, 1, n, 1)
    slope = [np.sin(2 * np.pi * k / n) * n for k in (1, 3)]
    expected = np.sqrt(0.01 * (1 + slope[1] ** 2) / (1 + slope[0] ** 2))
    assert_allclose(H1()(truth + noise, truth, line(n)), expected, rtol=1e-4)
    # the unit of length changes the share of the derivative only with spacing="physical"
    assert_allclose(H1()(truth + noise, truth, line(n, 50.0)), expected, rtol=1e-4)
    far = np.sqrt(0.01 * (1 + (slope[1] / 50) ** 2) / (1 + (slope[0] / 50) ** 2))
    assert_allclose(H1(spacing="physical")(truth + noise, truth, line(n, 50.0)), far, rtol=1e-4)


def test_physical_slopes_need_even_points():
    """On quadratically stretched points the mean spacing would give a sixth of the squared slope of a Gaussian."""
    x = np.linspace(0, 1, 128) ** 2 * 8
    stretched = Spec(Grid((Axis("x", tuple(x)),)), (Channel("u"),), 1.0)
    field = np.exp(-((x / 0.5) ** 2)).astype(np.float32)[None, None, :, None]
    with pytest.raises(SpecError, match="spacing='physical' needs evenly spaced points, but those along 'x'.*'unit'"):
        H1(spacing="physical")(field, 2 * field, stretched)
    assert_allclose(H1()(field, 2 * field, stretched), 0.5, rtol=1e-5)


def test_one_sided_ends_are_exact_for_a_parabola_and_cubics():
    x = jnp.arange(8) / 8.0
    for power, interior in ((1, slice(None)), (2, slice(None)), (3, np.array([0, -1]))):
        got = derivative((x**power)[None, None, :, None], 2, 1 / 8, periodic=False)[0, 0, :, 0]
        assert_allclose(got[interior], (power * x ** (power - 1))[interior], atol=1e-5)


def test_h1_follows_the_periodicity_of_the_axis(pair):
    n = 8
    ramp = np.linspace(0, 1, n, dtype="f4").reshape(1, 1, n, 1)
    truth = np.ones_like(ramp)
    open_end = H1()(truth + ramp, truth, line(n, periodic=False))
    assert_allclose(open_end, H1(boundary="one-sided")(truth + ramp, truth, line(n)), rtol=1e-6)
    closed = H1()(truth + ramp, truth, line(n))
    assert closed > 1.5 * open_end  # the jump from 1 to 0 counts only on a periodic axis
    assert_allclose(H1(boundary="periodic")(truth + ramp, truth, line(n, periodic=False)), closed, rtol=1e-6)


@pytest.mark.parametrize("loss", [MSE(), MAE(), RelativeLp(), RelativeLp(p=1), H1(), H1(boundary="one-sided")])
def test_what_the_mask_hides_has_no_influence(spec, pair, loss):
    prediction, truth = pair
    mask = np.ones((3, *spec.grid.shape, 2), "f4")
    mask[:, 2:4, 1:3] = 0
    mask[0, ..., 1] = 0
    value = loss(prediction, truth, spec, mask)
    hidden = (mask == 0)[:, None]
    assert_allclose(loss(np.where(hidden, 99, prediction), np.where(hidden, -7, truth), spec, mask), value, rtol=1e-5)
    errors = loss.errors(prediction, truth, spec, mask)
    assert_allclose(errors[0, :, 1], 0)
    # the hidden channel of sample 0 does not pull the mean down
    shown = np.array([[1, 0], [1, 1], [1, 1]])[:, None]
    assert_allclose(value, (errors * shown).sum() / (2 * shown.sum()), rtol=1e-5)


def test_cells_count_by_their_area():
    axis = Axis("latitude", (0.0, 60.0), weights=(4 / 3, 2 / 3))
    spec = Spec(Grid((axis,)), (Channel("t"),))
    truth = np.zeros((1, 1, 2, 1), "f4")
    prediction = np.array([1.0, 2.0], "f4").reshape(1, 1, 2, 1)
    assert_allclose(MSE()(prediction, truth, spec), (4 / 3 + 4 * 2 / 3) / 2, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_is_finite_where_prediction_equals_truth(spec, pair, name):
    loss = resolve(name)
    prediction, truth = pair
    assert np.isfinite(jax.grad(lambda u: loss(u, truth, spec))(jnp.asarray(truth))).all()
    gradient = jax.jit(jax.grad(lambda u: loss(u, truth, spec)))(jnp.asarray(prediction))
    step = 1e-2 * gradient / jnp.linalg.norm(gradient)
    slope = (loss(prediction + step, truth, spec) - loss(prediction - step, truth, spec)) / 2e-2
    assert_allclose(slope, jnp.linalg.norm(gradient), rtol=2e-2)


def test_bfloat16_frames_are_summed_in_float32(spec, pair):
    prediction, truth = (jnp.asarray(a, jnp.bfloat16) for a in pair)
    value = MSE()(prediction, truth, spec)
    assert value.dtype == jnp.float32
    assert_allclose(value, MSE()(prediction.astype("f4"), truth.astype("f4"), spec), rtol=1e-6)


def test_a_state_without_space_has_a_loss():
    spec = Spec(Grid(()), (Channel("x"), Channel("y"), Channel("z")))
    assert_allclose(MSE()(np.ones((2, 1, 3)), np.zeros((2, 1, 3)), spec), 1)


def test_bad_arguments_are_named(spec, pair):
    with pytest.raises(ConfigError, match="Did you mean 'relative'"):
        resolve("relativ")
    with pytest.raises(ConfigError, match="2 channels"):
        MSE(channels=(1.0, 2.0, 3.0))(*pair, spec)
    with pytest.raises(ConfigError, match="2 channels"):
        RelativeLp(joint=True, channels=(1.0, 2.0, 3.0))(*pair, spec)
    with pytest.raises(SpecError, match="prediction"):
        MSE()(pair[0][:, :, :4], pair[1], spec)
    short, frames = line(3, periodic=False), np.ones((1, 1, 3, 1))
    with pytest.raises(ConfigError, match="one-sided"):
        H1()(frames, frames, short)
    for wrong in ({"p": 3}, {"reduction": "max"}, {"channels": (-1.0,)}):
        with pytest.raises(ConfigError):
            dataclasses.replace(RelativeLp(), **wrong)
    for wrong in ({"p": 1}, {"spacing": "km"}, {"boundary": "open"}):
        with pytest.raises(ConfigError):
            dataclasses.replace(H1(), **wrong)
