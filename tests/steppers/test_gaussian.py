"""Gaussian steppers: variances that add up, draws, conditioning in every step, and saving."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constraint_cases import CASES, GRIDS, context, frames
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Gaussian, Grid, Spec, Window
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.rollout import rollout, rollout_chunks
from physml.steppers import Distribution, GaussianConfig, ResidualConfig
from physml.steppers.describe import build_stepper

LATITUDES = (-60.0, -20.0, 20.0, 60.0)
SPEC = Spec(
    Grid((Axis("latitude", LATITUDES, (0.5, 0.94, 0.94, 0.5)), Axis.uniform("longitude", 6, 360.0))),
    (Channel("u"), Channel("v")),
)  # fmt: skip
NORMALIZER = Normalizer(SPEC, [1.0, -2.0], [2.0, 3.0], [0.5, 0.25])
KEY = jax.random.key(0)
CONDITIONS = [name for name, case in CASES.items() if hasattr(case.constraint, "condition")]
ATOMS = ("linear: cells", "mass: additive")  # quick also where nothing is masked
QUICK = (*ATOMS, "linear: three rows", "mass: multiplicative", "mass: sources", "mass: per level", "mass: positive")


class Says(nnx.Module):
    """Increments and (before the softplus) widths that differ from cell to cell, whatever goes in."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        self.output = nnx.Param(jnp.asarray(random.normal(size=(*SPEC.grid.shape, 4)), jnp.float32))

    def __call__(self, fields, scalars):
        return jnp.broadcast_to(self.output[...], (fields.shape[0], *self.output.shape))


def gaussian(constraints=(), **options):
    built = tuple(constraint.build(SPEC) for constraint in constraints)
    return GaussianConfig(**options).build(SPEC, Says(), NORMALIZER, built)


def window_of(batch=2, length=1, mask=None, seed=1):
    values = np.random.default_rng(seed).normal(size=(batch, length, *SPEC.grid.shape, 2)) + 3
    values = values if mask is None else values * mask[:, None]
    return Window.of(values.astype(np.float32), SPEC, mask=mask)


def mass(fields, channel=0):
    cells = np.asarray(SPEC.grid.weights(), np.float64)
    return (np.asarray(fields, np.float64)[..., channel] * cells).mean((-2, -1))


def run(stepper, window, steps, key=None):
    return nnx.jit(lambda stepper, window: rollout(stepper, window, steps, key))(stepper, window)


def test_means_and_variances_of_a_rollout_add_up():
    stepper, window = gaussian(floor=0.1), window_of()
    shift, width = np.split(np.asarray(stepper.model.output[...], np.float64), 2, axis=-1)
    steps = np.arange(1, 4).reshape(3, 1, 1, 1)
    mean = window.frames[:, :1] + steps * shift * [0.5, 0.25]
    variance = np.broadcast_to(steps * ((0.1 + np.log1p(np.exp(width))) * [0.5, 0.25]) ** 2, mean.shape)
    found = run(Distribution(stepper), window, 3)
    assert isinstance(found, Gaussian)
    assert_allclose(found.mean, mean, rtol=1e-5)
    assert_allclose(found.variance, variance, rtol=1e-5)
    assert_allclose(found.std, np.sqrt(variance), rtol=1e-5)
    assert_array_equal(run(stepper, window, 3), found.mean)  # every other caller sees the mean


def test_jit_is_eager_and_the_dtype_follows_the_state():
    stepper, window = gaussian((physml.MassFixer("u"),)), window_of()
    found, eager = run(Distribution(stepper), window, 2), rollout(Distribution(stepper), window, 2)
    assert_allclose(found.mean, eager.mean, rtol=1e-6)
    assert_allclose(found.variance, eager.variance, rtol=1e-6)
    with jax.enable_x64(True):
        wide = dataclasses.replace(window, frames=window.frames.astype(np.float64))
        double = rollout(Distribution(stepper), wide, 2)
    assert double.mean.dtype == double.variance.dtype == np.float64
    assert_allclose(double.mean, eager.mean, rtol=1e-6)


def test_chunks_hold_the_standard_deviation():
    stepper, window = gaussian(), window_of()
    whole = run(Distribution(stepper), window, 5)
    pieces = list(rollout_chunks(Distribution(stepper), window, 5, 2))
    assert_allclose(np.concatenate([p.frames for p in pieces], 1), whole.mean, rtol=1e-6)
    assert_allclose(np.concatenate([p.std for p in pieces], 1), whole.std, rtol=1e-6)
    assert next(rollout_chunks(stepper, window, 2, 2)).std is None


def test_draws_have_the_mean_and_variance_of_the_distribution():
    window = window_of(1)
    many = jax.tree.map(lambda a: np.repeat(a, 4000, 0), window)
    drawn = run(gaussian().sampled(), many, 3, KEY)
    told = run(Distribution(gaussian()), window, 3)
    deviation = (np.asarray(drawn).mean(0) - told.mean[0]) / np.asarray(told.std[0])
    assert np.abs(deviation).max() < 5 / np.sqrt(4000)  # of 144 means
    assert_allclose(np.asarray(drawn).var(0), told.variance[0], rtol=5 * np.sqrt(2 / 4000))
    again = run(gaussian().sampled(), many, 3, jax.random.key(1))
    assert np.abs(np.asarray(again) - drawn).min() > 0
    with pytest.raises(ConfigError, match="no random key"):
        rollout(gaussian(sample=True), window, 1)


def test_a_distribution_never_draws():
    told, window = run(Distribution(gaussian()), window_of(), 2), window_of()
    assert_array_equal(run(Distribution(gaussian(sample=True)), window, 2, KEY).mean, told.mean)


@pytest.mark.parametrize("masked", [False, True])
def test_each_step_is_conditioned_as_by_hand(masked):
    """Against the dense update of Hansen et al. 2023 in float64."""
    mask = np.ones((2, *SPEC.grid.shape, 2), np.float32)
    mask[:, 1, 2:4] = 0
    window = window_of(mask=mask if masked else None)
    free = run(Distribution(gaussian()), window, 1)
    fixed = run(Distribution(gaussian((physml.MassFixer("u"),))), window, 1)
    exists = (mask if masked else np.ones_like(mask))[..., 0]
    cells = np.broadcast_to(SPEC.grid.weights(), exists.shape) * exists
    for i in range(2):
        row = (cells[i] / cells[i].sum()).ravel().astype(np.float64)
        mean, covariance = (np.asarray(part[i, 0, ..., 0], np.float64) for part in (free.mean, free.variance))
        covariance = np.diag(covariance.ravel())
        gain = covariance @ row / (row @ covariance @ row)
        target = row @ np.asarray(window.frames[i, 0, ..., 0], np.float64).ravel()
        expected = mean.ravel() - gain * (row @ mean.ravel() - target)
        conditioned = np.diag(covariance - np.outer(gain, row @ covariance))
        assert_allclose(np.ravel(fixed.mean[i, 0, ..., 0]), expected, rtol=2e-5, atol=1e-6)
        assert_allclose(np.ravel(fixed.variance[i, 0, ..., 0]), conditioned, rtol=1e-5, atol=1e-9)
    assert_array_equal(fixed.mean[..., 1], free.mean[..., 1])
    assert_array_equal(fixed.variance[..., 1], free.variance[..., 1])


def test_uncertain_cells_take_the_correction():
    stepper = gaussian((physml.MassFixer("u"),))
    width = jnp.full((*SPEC.grid.shape, 2), -20.0).at[2, 3].set(5.0)
    stepper.model.output[...] = stepper.model.output[...].at[..., 2:].set(width)
    window = window_of()
    change = np.asarray(run(stepper, window, 1))[:, 0, ..., 0] - window.frames[:, 0, ..., 0]
    change = change - np.asarray(stepper.model.output[..., 0]) * 0.5
    alone = np.zeros(SPEC.grid.shape, bool)
    alone[2, 3] = True
    assert np.abs(change[:, alone]).min() > 0.1
    assert np.abs(change[:, ~alone]).max() < 2e-6  # rounding of values of order 5
    even = gaussian((physml.MassFixer("u"),), conserve="project")
    even.model.output[...] = stepper.model.output[...]
    change = np.asarray(run(even, window, 1))[:, 0, ..., 0] - window.frames[:, 0, ..., 0]
    change = change - np.asarray(stepper.model.output[..., 0]) * 0.5
    assert_allclose(change, change[:, :1, :1] + 0 * change, atol=2e-6)


@pytest.mark.parametrize("conserve", ["condition", "project"])
def test_mass_is_kept_over_a_long_rollout(conserve):
    stepper, window = gaussian((physml.MassFixer(("u", "v")),), conserve=conserve), window_of()
    found = run(Distribution(stepper), window, 1000)
    for channel in range(2):
        size = np.abs(np.asarray(found.mean)[..., channel]).mean((-2, -1))
        drift = np.abs(mass(found.mean, channel) - mass(window.frames, channel)[:, :1]) / size
        assert drift.max() <= 1e-6
    assert np.isfinite(found.variance).all()
    assert (np.asarray(found.variance) > 0).all()


def test_every_member_keeps_its_own_mass():
    steppers = [build(seed) for seed in range(2)]
    members = physml.constrain(physml.stack_members(steppers), physml.MassFixer("u"))
    window = window_of()
    tiled = jax.tree.map(lambda a: np.tile(a, (2, *[1] * (a.ndim - 1))), window)
    apart = run(members.apart(), tiled, 5)
    assert np.abs(np.asarray(apart[:2]) - apart[2:]).max() > 1e-3
    assert_allclose(mass(apart), np.tile(mass(tiled.frames)[:, :1], (1, 5)), rtol=1e-6)
    drawn = run(gaussian((physml.MassFixer("u"),)).sampled(), tiled, 5, KEY)
    assert np.abs(np.asarray(drawn[:2]) - drawn[2:]).max() > 1e-3
    assert_allclose(mass(drawn), np.tile(mass(tiled.frames)[:, :1], (1, 5)), rtol=1e-6)


def build(seed=0, **options):
    return build_stepper(GaussianConfig(**options), FNOConfig(modes=(2, 2), width=4, depth=1), SPEC, NORMALIZER,
                         seed=seed)  # fmt: skip


def test_draws_are_of_the_conditioned_distribution():
    """Their variance is the posterior's, and their covariance with the total vanishes."""
    window = jax.tree.map(lambda a: np.repeat(a, 4000, 0), window_of(1))
    fixed = gaussian((physml.MassFixer("u"),))
    told = run(Distribution(fixed), window_of(1), 1)
    drawn = np.asarray(run(fixed.sampled(), window, 1, KEY))
    assert_allclose(drawn.var(0)[..., 0], told.variance[0, ..., 0], rtol=5 * np.sqrt(2 / 4000))
    assert mass(drawn).std() < 1e-6


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        pytest.param(name, masked, marks=[] if name in QUICK and (masked or name in ATOMS) else [pytest.mark.slow])
        for name in CONDITIONS
        for masked in (False, True)
    ],
)
def test_conditioning_meets_the_law(name, masked):
    case = CASES[name]
    grid = GRIDS[case.grid]
    step = context(grid, mask=masked, **dict(case.fields))
    frame, previous = frames(grid, mask=step.mask)
    law = case.constraint.build(step.spec)
    variance = np.random.default_rng(2).exponential(size=frame.shape).astype(np.float32) * 1e-10
    condition = jax.jit(law.condition)
    mean, kept = condition(frame, variance, previous, step)
    assert np.abs(jax.jit(law.violation)(mean, previous, step)).max() <= 1e-6
    assert (np.asarray(kept) >= 0).all()
    assert (np.asarray(kept) <= variance).all()
    assert np.asarray(kept).sum() < variance.sum()
    if not getattr(law, "positive", False):
        again, _ = condition(mean, variance, previous, step)
        assert_allclose(again, mean, rtol=1e-5, atol=1e-5)


def test_without_variance_the_correction_is_spread_by_the_method():
    step, law = context(GRIDS["walls"]), physml.MassFixer("rho", "gradient")
    frame, previous = frames(GRIDS["walls"])
    mean, variance = law.condition(frame, np.zeros_like(frame), previous, step)
    assert_allclose(mean, law.project(frame, previous, step), rtol=1e-6)
    assert not np.any(variance)


def test_a_domain_without_cells_stays_as_it_is():
    grid = GRIDS["periodic"]
    step = dataclasses.replace(context(grid), mask=np.zeros((2, *grid.shape, 4), np.float32))
    frame, previous = frames(grid)
    mean, variance = physml.MassFixer("rho").condition(frame, np.ones_like(frame), previous, step)
    assert_array_equal(mean, frame)
    assert_array_equal(variance, np.ones_like(frame))


def test_conditioning_is_differentiable():
    step, law = context(GRIDS["sphere"], mask=True), physml.MassFixer(("rho", "q"))
    frame, previous = frames(GRIDS["sphere"], mask=step.mask)
    variance = np.random.default_rng(2).exponential(size=frame.shape).astype(np.float32) + 0.1

    def value(mean, variance):
        return sum(jnp.sum(part**2) for part in law.condition(mean, variance, previous, step))

    slopes = jax.grad(value, (0, 1))(jnp.asarray(frame), jnp.asarray(variance))
    direction = np.random.default_rng(3).normal(size=frame.shape).astype(np.float32) * (variance / 2)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (frame, variance, direction)]
        for i in range(2):
            moved = [[*wide[:2]], [*wide[:2]]]
            moved[0][i], moved[1][i] = wide[i] + 1e-4 * wide[2], wide[i] - 1e-4 * wide[2]
            expected = (value(*moved[0]) - value(*moved[1])) / 2e-4
            assert_allclose(np.sum(np.float64(slopes[i]) * wide[2]), expected, rtol=1e-3)


def test_masked_cells_have_no_variance():
    mask = np.ones((2, *SPEC.grid.shape, 2), np.float32)
    mask[:, 0, :2] = 0
    found = run(Distribution(gaussian()), window_of(mask=mask), 2)
    hidden = np.broadcast_to(mask[:, None] == 0, found.mean.shape)
    assert not np.any(np.asarray(found.variance)[hidden])
    assert (np.asarray(found.variance)[~hidden] > 0).all()


def test_save_and_load(tmp_path):
    stepper = physml.constrain(build(history=2, floor=0.01), physml.MassFixer("u"))
    window = window_of(length=2)
    physml.save(stepper, tmp_path / "model")
    loaded = physml.load(tmp_path / "model")
    assert loaded.config == stepper.config
    expected, found = (run(Distribution(s), window, 2) for s in (stepper, loaded))
    assert_array_equal(found.mean, expected.mean)
    assert_array_equal(found.variance, expected.variance)
    physml.save(stepper.sampled(), tmp_path / "draws")
    assert physml.load(tmp_path / "draws").config.sample


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="floor is 0"):
        GaussianConfig(floor=0)
    with pytest.raises(ConfigError, match="conserve"):
        GaussianConfig(conserve="mean")
    with pytest.raises(ConfigError, match="history"):
        GaussianConfig(history=0)
    narrow = ResidualConfig().signature(SPEC)
    model = FNOConfig(modes=(2, 2), width=4, depth=1).build(narrow, nnx.Rngs(0))
    with pytest.raises(SpecError, match="4 channels"):
        GaussianConfig().build(SPEC, model, NORMALIZER)
    with pytest.raises(ConfigError, match="predicts no variance"):
        Distribution(ResidualConfig().build(SPEC, model, NORMALIZER))
