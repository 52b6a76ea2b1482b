"""Likelihood training: losses known by hand, gradients, recovery of a known noise, refusals, forecasts with `u_std`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import scoringrules
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml import coding
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.objectives import OBJECTIVES, Curriculum, Likelihood, NoisyInputs, OneStep, Penalized
from physml.objectives.penalized import ConstraintPenalty
from physml.rollout import rollout
from physml.steppers import Distribution, GaussianConfig, ResidualConfig
from physml.steppers.describe import build_stepper

SPEC = Spec(Grid((Axis.uniform("x", 16),)), (Channel("u", "K"), Channel("v")))
NORMALIZER = Normalizer(SPEC, [1.0, -2.0], [2.0, 3.0], [0.5, 0.25])
KEY = jax.random.key(0)


class Constant(nnx.Module):
    """The same increment (in their scale) and width (before the softplus) everywhere."""

    def __init__(self, shift=(0.0, 0.0), width=(0.0, 0.0)):
        self.shift, self.width = (nnx.Param(jnp.asarray(part, jnp.float32)) for part in (shift, width))

    def __call__(self, fields, scalars):
        output = jnp.concatenate([self.shift[...], self.width[...]])
        return jnp.broadcast_to(output, (*fields.shape[:-1], 4))


def gaussian(constraints=(), floor=1e-3, **constant):
    return GaussianConfig(floor=floor).build(SPEC, Constant(**constant), NORMALIZER, constraints)


def walk(batch=4, frames=3, noise=(0.5, 0.25), shift=(0.1, 0.0), seed=0, mask=None):
    """Frames that change by `shift` and independent normal increments."""
    random = np.random.default_rng(seed)
    increments = random.normal(size=(batch, frames, 16, 2)) * noise + shift
    values = np.cumsum(increments, 1)
    values = values if mask is None else values * mask[:, None]
    return Window.of(values.astype(np.float32), SPEC, mask=mask)


def by_hand(stepper, window, score, steps=1):
    """`score(mean, std, truth)` of normalized numbers, by lead and channel."""
    scale = np.array([2.0, 3.0])
    std = (1e-3 + np.log1p(np.exp(np.asarray(stepper.model.width[...])))) * [0.5, 0.25] / scale
    shift = np.asarray(stepper.model.shift[...]) * [0.5, 0.25] / scale
    frames = np.asarray(window.frames, np.float64) / scale
    lead = np.arange(1, steps + 1).reshape(-1, 1, 1)
    return score(frames[:, :1] + lead * shift, np.sqrt(lead) * std, frames[:, 1 : steps + 1])


@pytest.mark.parametrize("steps", [1, 2])
def test_the_loss_is_the_likelihood_of_the_truth(steps):
    stepper, window = gaussian(shift=(0.3, -0.2), width=(0.5, -1.0)), walk()
    loss, aux = jax.jit(lambda s, w: Likelihood(steps)(s, w, KEY))(stepper, window)
    values = by_hand(stepper, window, lambda m, s, t: -scipy.stats.norm.logpdf(t, m, s), steps)
    assert_allclose(loss, values.mean(), rtol=1e-5)
    assert_allclose(aux["channel"], values.mean((0, 1, 2)), rtol=1e-4)
    assert_allclose(aux["lead"], values.mean((0, 2, 3)), rtol=1e-4)
    assert_allclose(aux["part"]["log_likelihood"], -values.mean(), rtol=1e-5)
    square = by_hand(stepper, window, lambda m, s, t: (t - m) ** 2, steps)
    variance = by_hand(stepper, window, lambda m, s, t: s**2 + 0 * t, steps)
    assert_allclose(aux["part"]["square_error"], square.mean(), rtol=1e-5)
    assert_allclose(aux["part"]["variance"], variance.mean(), rtol=1e-5)


def test_the_crps_is_that_of_another_library():
    stepper, window = gaussian(shift=(0.3, -0.2), width=(0.5, -1.0)), walk()
    loss, _ = Likelihood(rule="crps")(stepper, window, KEY)
    expected = by_hand(stepper, window, lambda m, s, t: scoringrules.crps_normal(t, m, s)).mean()
    assert_allclose(loss, expected, rtol=1e-5)


def test_beta_weighs_by_the_variance_but_not_in_validation():
    stepper, window = gaussian(width=(2.0, -1.0)), walk()
    loss, aux = Likelihood(beta=0.5)(stepper, window, KEY)
    values = by_hand(stepper, window, lambda m, s, t: -scipy.stats.norm.logpdf(t, m, s) * s)
    assert_allclose(loss, values.mean(), rtol=1e-5)
    assert Likelihood(beta=0.5).validation == Likelihood()
    assert_allclose(aux["part"]["log_likelihood"], -Likelihood()(stepper, window, KEY)[0], rtol=1e-6)

    # With beta = 1 the gradient of the mean is that of the square error, half of it.
    def slope(objective):
        graph, params = nnx.split(stepper, nnx.Param, ...)[:2]
        rest = nnx.split(stepper, nnx.Param, ...)[2]
        return jax.grad(lambda p: objective(nnx.merge(graph, p, rest), window, KEY)[0])(params)["model"]["shift"][...]

    class Squares(Likelihood):
        def score(self, stepper, window, prediction):
            return OneStep().score(stepper, window, prediction)

    assert_allclose(slope(Likelihood(beta=1.0)), slope(Squares()) / 2, rtol=1e-4)


def test_frames_beyond_the_rollout_do_not_count():
    stepper, long = gaussian(shift=(0.3, -0.2)), walk(frames=6)
    short = dataclasses.replace(long, frames=long.frames[:, :3])
    assert_allclose(Likelihood(2)(stepper, long, KEY)[0], Likelihood(2)(stepper, short, KEY)[0], rtol=1e-6)


def test_area_and_mask_count():
    mask = np.ones((4, 16, 2), np.float32)
    mask[:, 5:] = 0
    window = walk(mask=mask)
    wild = dataclasses.replace(window, frames=np.where(mask[:, None] > 0, window.frames, 1e6).astype(np.float32))
    stepper = gaussian(shift=(0.3, -0.2))
    loss = Likelihood()(stepper, window, KEY)[0]
    values = by_hand(stepper, window, lambda m, s, t: -scipy.stats.norm.logpdf(t, m, s))[:, :, :5]
    assert_allclose(loss, values.mean(), rtol=1e-5)
    assert_allclose(Likelihood()(stepper, wild, KEY)[0], loss, rtol=1e-6)
    sphere = SPEC.on(Grid((Axis("latitude", tuple(range(16)), tuple(np.linspace(0.1, 1, 16))),)))
    stepper = GaussianConfig().build(sphere, Constant(), NORMALIZER, ())
    window = dataclasses.replace(walk(), spec=sphere)
    values = by_hand(stepper, window, lambda m, s, t: -scipy.stats.norm.logpdf(t, m, s)).mean((0, 1, 3))
    assert_allclose(
        Likelihood()(stepper, window, KEY)[0], np.average(values, weights=np.linspace(0.1, 1, 16)), rtol=1e-5
    )


def test_channels_count_where_they_are():
    mask = np.ones((4, 16, 2), np.float32)
    mask[1:, :, 1] = 0
    stepper = gaussian(shift=(0.3, -0.2))
    own = Likelihood()(stepper, walk(1), KEY)[1]["channel"][1]  # of the sample that has v
    _, aux = Likelihood()(stepper, walk(mask=mask), KEY)
    assert_allclose(aux["channel"][1], own, rtol=1e-5)
    assert_allclose(aux["present"], [1, 0.25])
    assert_allclose(aux["weight"], 1.25)


def test_gradients_reach_every_parameter_through_conditioning():
    config, model = GaussianConfig(), FNOConfig(modes=(4,), width=4, depth=1)
    stepper = build_stepper(config, model, SPEC, NORMALIZER, (physml.MassFixer(("u", "v")),))
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)
    for objective in (Likelihood(), Likelihood(2, "crps", remat=True)):
        value = jax.jit(jax.grad(lambda p, o=objective: o(nnx.merge(graph, p, rest), walk(), KEY)[0]))
        for path, slope in jax.tree_util.tree_leaves_with_path(value(params)):
            assert np.isfinite(slope).all(), path
            assert np.any(np.asarray(slope) != 0), path


@pytest.mark.parametrize("objective", [Likelihood(), Likelihood(rule="crps"), Likelihood(beta=0.5), Likelihood(2)])
def test_training_finds_the_noise(objective):
    """The widths become the standard deviation of the increments, the shift their mean."""
    import optax

    noise = np.array([0.8, 0.1])
    window = walk(batch=256, noise=noise, shift=(0.3, -0.05), frames=3)
    graph, params, rest = nnx.split(gaussian(), nnx.Param, ...)
    rule = optax.adam(0.05)

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            slope = jax.grad(lambda p: objective(nnx.merge(graph, p, rest), window, KEY)[0])(params)
            change, state = rule.update(slope, state)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(update, (params, rule.init(params)), length=400)[0][0]

    trained = nnx.merge(graph, train(params), rest)
    told = rollout(Distribution(trained), window, 1)
    used = np.diff(window.frames[:, : objective.steps + 1].astype(np.float64), axis=1)
    expected = used.std((0, 1, 2))
    assert_allclose(expected, noise, rtol=0.03)  # 4096 numbers
    # Sums over two steps weigh their draws differently from a plain standard deviation.
    assert_allclose(told.std[0, 0, 0], expected, rtol=0.03 if objective.steps > 1 else 0.01)
    shift = told.mean[0, 0, 0] - window.frames[0, 0, 0]
    assert_allclose(shift, used.mean((0, 1, 2)), atol=0.03 * noise.max())


def test_it_works_inside_other_objectives():
    stepper, window = gaussian(shift=(0.3, -0.2)), walk()
    alone = Likelihood(2)(stepper, window, KEY)[0]
    penalty = ConstraintPenalty(physml.MassFixer("u"), weight=0.5)
    loss, aux = Penalized(Likelihood(2), (penalty,))(stepper, window, KEY)
    assert float(loss) == pytest.approx(float(alone + 0.5 * aux["part"]["constraint"]))
    assert aux["part"]["constraint"] > 0
    assert float(aux["part"]["data"]) == pytest.approx(float(alone))
    noisy = NoisyInputs(Likelihood(2), std=0.5)(stepper, window, KEY)[0]
    assert float(noisy) > float(alone)
    assert Curriculum(Likelihood(), steps=(1, 2)).frames(1) == 3


def test_what_does_not_fit():
    model = FNOConfig(modes=(4,), width=4, depth=1).build(ResidualConfig().signature(SPEC), nnx.Rngs(0))
    plain = ResidualConfig().build(SPEC, model, NORMALIZER)
    with pytest.raises(ConfigError, match="Residual predicts no variance"):
        Likelihood()(plain, walk(), KEY)
    with pytest.raises(SpecError, match="are needed"):
        Likelihood(3)(gaussian(), walk(), KEY)
    for options in ({"steps": 0}, {"rule": "likelihood"}, {"beta": 2.0}, {"beta": 0.5, "rule": "crps"}):
        with pytest.raises(ConfigError):
            Likelihood(**options)
    objective = Likelihood(2, "crps", remat=True)
    assert coding.from_dict(OBJECTIVES, coding.to_dict(objective, OBJECTIVES)) == objective


@pytest.fixture
def data():
    """Land in one cell."""
    field = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)
    field[:, :, 3] = np.nan
    variables = {name: (("trajectory", "time", "x"), field + i, {"units": unit, "standard_name": "speed"})
                 for i, (name, unit) in enumerate((("u", "K"), ("v", "")))}  # fmt: skip
    return xr.Dataset(variables, {"x": np.arange(16) / 16, "time": np.arange(4.0)})


@pytest.mark.parametrize("suffix", ["", ".nc", ".zarr"])
def test_forecasts_hold_the_standard_deviation(data, tmp_path, suffix):
    stepper = gaussian(shift=(0.3, -0.2), width=(0.5, -1.0))
    out = tmp_path / f"f{suffix}" if suffix else None
    result = physml.forecast(stepper, data, 5, chunk=2, out=out, masked=True).load()
    assert {name for name in result.data_vars if "lead" in result[name].dims and not name.startswith("ledger")} == {
        "u", "v", "u_std", "v_std"
    }  # fmt: skip
    assert result.u_std.attrs == {"long_name": "standard deviation of u", "units": "K"}
    assert result.u_std.dims == result.u.dims
    step = (1e-3 + np.log1p(np.exp(0.5))) * 0.5
    expected = np.where(np.arange(16) == 3, np.nan, step) * np.sqrt(np.arange(1, 6))[:, None]
    assert_allclose(result.u_std, np.broadcast_to(expected, (2, 5, 16)), rtol=1e-5)
    assert_allclose(result.u[:, 4], data.u[:, 3] + 5 * 0.3 * 0.5, rtol=1e-4)


def test_members_are_drawn_and_keep_their_mass(data):
    clean = data.fillna(0.0)
    stepper = physml.constrain(gaussian(), physml.MassFixer("u"))
    result = physml.forecast(stepper, clean, 4, members=3, key=KEY)
    assert "u_std" not in result
    mass = result.u.mean("x")
    assert_allclose(mass, xr.zeros_like(mass) + clean.u[:, 3].mean("x").drop_vars("time"), atol=1e-6)
    assert (result.u.std("member") > 0.01).all()
    again = physml.forecast(stepper, clean, 4, members=3, key=KEY)
    assert_array_equal(again.u, result.u)
    single = physml.forecast(stepper.sampled(), clean, 4)
    assert "u_std" not in single
    scores = physml.evaluate(stepper, clean, leads=2, members=3, metrics=["spread"]).score
    assert (scores > 0).all()


def test_an_ensemble_has_the_moments_of_its_mixture():
    """Variance within members, which adds up over steps, and between their means."""
    shifts, widths = (0.3, -0.2, 0.1), (0.5, -1.0, 0.0)
    members = [gaussian(shift=(s, s), width=(w, w)) for s, w in zip(shifts, widths, strict=True)]
    window = walk()
    told = rollout(Distribution(physml.stack_members(members)), window, 3)
    alone = [rollout(Distribution(member), window, 3) for member in members]
    means, variances = (
        np.stack([np.asarray(getattr(one, name), np.float64) for one in alone]) for name in ("mean", "variance")
    )
    assert_allclose(told.mean, means.mean(0), rtol=1e-5, atol=1e-6)
    assert_allclose(told.variance, variances.mean(0) + means.var(0, ddof=1), rtol=1e-5)
    sampled = physml.stack_members([member.sampled() for member in members])
    assert_array_equal(rollout(Distribution(sampled), window, 3).mean, told.mean)  # never drawn
    model = FNOConfig(modes=(4,), width=4, depth=1).build(ResidualConfig().signature(SPEC), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="Residual predicts no variance"):
        Distribution(physml.stack_members([ResidualConfig().build(SPEC, model, NORMALIZER)] * 2))


def test_a_forecast_of_known_noise_is_calibrated():
    """From training to scores: coverage and likelihood of `physml.evaluate`."""
    frames = walk(batch=40, frames=6, noise=(0.5, 0.25), shift=(0.0, 0.0)).frames
    dims = ("trajectory", "time", "x")
    truth = xr.Dataset({"u": (dims, frames[..., 0], {"units": "K"}), "v": (dims, frames[..., 1])},
                       {"x": np.arange(16) / 16, "time": np.arange(6.0)})  # fmt: skip
    width = float(np.log(np.expm1(1 - 1e-3)))  # a standard deviation of one increment
    pred = physml.forecast(gaussian(width=(width, width)), truth.isel(time=slice(0, 1)), 5)
    scores = physml.evaluate(pred, truth).score.sel(model="model")
    assert_allclose(scores.sel(metric="coverage_90"), 0.9, atol=0.06)  # 640 cells: five standard deviations
    assert_allclose(scores.sel(metric="coverage_50"), 0.5, atol=0.1)
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.25 * np.arange(1, 6))
    assert_allclose(scores.sel(metric="log_likelihood", channel="u"), -entropy, atol=0.15)
