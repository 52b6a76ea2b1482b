"""Penalties by hand: violated laws and lost energy, on the frames of one and the same rollout."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.normalize import Normalizer
from physml.objectives import (
    AllToAll,
    ConstraintPenalty,
    Curriculum,
    Denoising,
    NoisyInputs,
    OneStep,
    Penalized,
    Pushforward,
    RandomInterval,
    SpectralPower,
    Unrolled,
    ordered_pairs,
)
from physml.objectives.scoring import Prediction
from physml.steppers import DirectConfig, IntervalConfig

POINTS = 16
SPEC = Spec(Grid((Axis.uniform("x", POINTS),)), (Channel("u"),), time_step=0.5)
X = 2 * np.pi * np.arange(POINTS) / POINTS
A = 0.8


class Scale(nnx.Module):
    def __init__(self, factor):
        self.factor = nnx.Param(jnp.float32(factor))

    def __call__(self, fields, scalars):
        return self.factor[...] * fields


def call(objective, stepper, window, key=None):
    """Compiled: much quicker than one operation after another."""
    return jax.jit(lambda: objective(stepper, window, key))()


@dataclass(frozen=True)
class Growth:
    """A toy law: the mean may not change from frame to frame. Second law: the clock, to see the context."""

    clock: bool = False

    def violation(self, frame, previous, context):
        change = (frame - previous).mean((1, 2))[:, None]
        return jnp.concatenate([change, context.time[:, None]], axis=1) if self.clock else change

    def project(self, frame, previous, context):
        return frame - (frame - previous).mean((1, 2), keepdims=True)


class GrowthConfig:
    def build(self, spec):
        return Growth()


def stepper(factor=A):
    return DirectConfig().build(SPEC, Scale(factor), Normalizer.identity(SPEC))


def window(frames=5, value=2.0):
    return Window.of(np.full((3, frames, POINTS, 1), value, "f4"), SPEC)


def test_a_constraint_is_violated_by_every_scored_step():
    penalty = ConstraintPenalty(Growth(), weight=3.0, scale=2.0)
    plain, penalized = Unrolled(3), Penalized(Unrolled(3), (penalty,))
    changes = [2.0 * (A ** (k + 1) - A**k) for k in range(3)]
    expected = np.mean(np.square(np.array(changes) / 2.0))
    base, _ = call(plain, stepper(), window())
    value, aux = call(penalized, stepper(), window())
    assert_allclose(aux["part"]["constraint"], expected, rtol=1e-5)
    assert_allclose(aux["part"]["data"], base, rtol=1e-6)
    assert_allclose(value, base + 3.0 * expected, rtol=1e-5)
    assert set(aux) == {"part", "channel", "lead"}


def test_after_a_warm_up_the_first_frame_has_the_one_before_it():
    penalized = Penalized(Unrolled(3, differentiate=2), (ConstraintPenalty(GrowthConfig()),))
    _, aux = call(penalized, stepper(), window())
    changes = [2.0 * (A ** (k + 1) - A**k) for k in (1, 2)]
    assert_allclose(aux["part"]["constraint"], np.mean(np.square(changes)), rtol=1e-5)


@pytest.mark.parametrize("objective", [Unrolled(4, differentiate=2), Pushforward(2, differentiate=2)])
def test_laws_see_the_clock_of_their_frame(objective):
    penalized = Penalized(objective, (ConstraintPenalty(Growth(clock=True)),))
    _, aux = call(penalized, stepper(1.0), window(), jax.random.key(0))
    assert_allclose(aux["part"]["constraint"], (1.5**2 + 2.0**2) / 4, rtol=1e-5)  # frames 3 and 4 at 0.5 apart


def test_a_projected_step_costs_nothing():
    built = DirectConfig().build(SPEC, Scale(A), Normalizer.identity(SPEC), (Growth(),))
    _, aux = call(Penalized(Unrolled(3), (ConstraintPenalty(Growth()),)), built, window())
    assert_allclose(aux["part"]["constraint"], 0, atol=1e-12)


def test_gradients_of_the_penalty_flow_through_the_rollout():
    graphdef, params, rest = nnx.split(stepper(), nnx.Param, ...)

    def slope(objective):
        def loss(params):
            return objective(nnx.merge(graphdef, params, rest), window(), jax.random.key(0))[0]

        return float(jax.jit(jax.grad(loss))(params)["model"]["factor"][...])

    added = slope(Penalized(Unrolled(2), (ConstraintPenalty(Growth(), weight=0.5),))) - slope(Unrolled(2))
    by_hand = jax.grad(lambda a: 0.5 * ((2 * (a - 1)) ** 2 + (2 * (a**2 - a)) ** 2) / 2)(A)
    assert_allclose(added, by_hand, rtol=1e-4)


def power(predicted, truth, spec=SPEC, **options):
    """The penalty of one predicted frame."""
    frames = [np.asarray(f, "f4").reshape(1, 1, *spec.grid.shape, 1) for f in (truth, predicted)]
    return float(SpectralPower(**options)(Window.of(frames[0], spec), Prediction(frames[1], frames[1]), 1))


def test_spectral_power_counts_every_scale_alike():
    truth = 5 + np.sin(X) + 1e-2 * np.sin(3 * X)
    assert power(truth, truth) == 0
    assert power(truth + 7, truth) < 1e-5  # the mean is not a scale
    shells = POINTS // 2
    assert_allclose(power(5 + np.sin(X), truth), 0.99 / shells, rtol=0.02)  # 1e-4 of energy over a floor of 1e-6
    assert_allclose(power(5 + 2 * np.sin(X) + 1e-2 * np.sin(3 * X), truth), 3 / shells, rtol=1e-3)
    assert_allclose(power(-3 * truth, -3 * 2 * truth), power(truth, 2 * truth), rtol=1e-4)


def test_shells_above_the_cut_do_not_count():
    truth = np.sin(X) + 0.1 * np.sin(7 * X)
    assert power(np.sin(X), truth, cut=0.75) < 1e-6
    assert_allclose(power(np.sin(X), truth), 1 / 8, rtol=1e-3)
    lost = np.sin(X) + 0.1 * np.sin(6 * X)
    assert_allclose(power(np.sin(X), lost, cut=0.75), 1 / 6, rtol=1e-3)


def test_energy_that_should_not_be_there_is_bounded_by_the_floor():
    truth = np.sin(X)
    assert_allclose(power(truth + 1e-3 * np.sin(5 * X), truth, floor=1e-4), 1e-6 / 1e-4 / 8, rtol=0.02)
    constant = np.ones(POINTS)
    assert power(constant, constant) == 0
    gradient = jax.grad(
        lambda f: SpectralPower()(Window.of(np.ones((1, 1, POINTS, 1), "f4"), SPEC), Prediction(f, f), 1)
    )(jnp.ones((1, 1, POINTS, 1)))
    assert np.isfinite(gradient).all()


def test_the_floor_is_a_share_of_all_energy():
    truth = np.sin(X) + np.sin(2 * X)
    assert_allclose(power(truth + 1e-2 * np.sin(5 * X), truth, floor=1e-2), 0.25e-4 / 0.5e-2 / 8, rtol=1e-3)


def test_a_truth_that_is_rounding_in_space_costs_nothing():
    for shape, periodic in (((10, 14), True), ((16,), False)):
        axes = (Axis.uniform(name, n, periodic=periodic) for name, n in zip("yx", shape))
        spec = Spec(Grid(tuple(axes)), (Channel("u"),))
        x = np.arange(shape[-1]) / shape[-1]
        fields = [np.full(shape, 300.3), np.full(shape, 0.1)]
        fields += [] if periodic else [0.1 + x]  # spectra leave out the trend between open ends
        for field in fields:
            assert power(field * (1 + 1e-3 * np.sin(2 * np.pi * x)), field, spec) == 0
            assert power(field + np.cos(2 * np.pi * 2 * x), field + np.sin(2 * np.pi * 2 * x), spec) < 1


def test_uneven_points_have_no_spectrum():
    def along(centers, periodic=False):
        return Spec(Grid((Axis("x", tuple(map(float, centers)), periodic=periodic),)), (Channel("u"),))

    field = np.sin(np.arange(6.0))
    with pytest.raises(SpecError, match="along 'x' are 1 to 4 apart.*even grid"):
        power(field, field, along((0, 1, 3, 7, 8, 9)))
    assert power(field, field, along(360 * np.arange(6, dtype="f4") / 6, periodic=True)) == 0
    assert power(field, field, along(1e3 + 0.1 * np.arange(6, dtype="f4"))) == 0  # float32 leaves 0.1 % of the spacing


def test_spectral_power_in_an_objective_pulls_up_what_was_damped():
    waves = np.broadcast_to(np.sin(X)[None, None, :, None], (2, 3, POINTS, 1)).astype("f4")
    data = Window.of(waves, SPEC)
    value, aux = call(Penalized(Unrolled(2), (SpectralPower(weight=0.1),)), stepper(), data)
    expected = np.mean([1 - A**2, 1 - A**4]) / 8
    assert_allclose(aux["part"]["spectral_power"], expected, rtol=1e-3)
    assert_allclose(value, aux["part"]["data"] + 0.1 * expected, rtol=1e-3)


def test_penalties_see_the_pairs_and_intervals_that_were_drawn():
    """The mean of a step of lead l falls by 2 (1 - A), whatever l; the clock is that of the later frame."""
    pairs = AllToAll(4, pairs=0, zero_lead=False)
    told = DirectConfig(lead=True, longest_lead=3).build(SPEC, Scale(A), Normalizer.identity(SPEC))
    data = window(7)  # longer than the pairs
    base, plain = call(pairs, told, data, jax.random.key(0))
    value, aux = call(Penalized(pairs, (ConstraintPenalty(Growth(), weight=3.0),)), told, data, jax.random.key(0))
    assert_allclose(aux["part"]["constraint"], (2 * (1 - A)) ** 2, rtol=1e-5)
    assert_allclose(value, base + 3 * aux["part"]["constraint"], rtol=1e-5)
    assert_allclose(aux["channel"], plain["channel"], rtol=1e-6)
    same = DirectConfig(lead=True, longest_lead=3).build(SPEC, Scale(1.0), Normalizer.identity(SPEC))
    _, aux = call(Penalized(pairs, (ConstraintPenalty(Growth(clock=True)),)), same, data, jax.random.key(0))
    later = ordered_pairs(4, zero_lead=False)[:, 1] * SPEC.time_step
    assert_allclose(aux["part"]["constraint"], np.mean(later**2) / 2, rtol=1e-5)

    scales = {1: [1.0], 2: [2.0]}
    normalizer = Normalizer(SPEC, [0.0], [1.0], [1.0], intervals=scales)
    stepped = IntervalConfig(intervals=(1, 2)).build(SPEC, Scale(0.1), normalizer)
    drawn, key = RandomInterval((1, 2), steps=2), jax.random.key(1)
    penalized = Penalized(drawn, (ConstraintPenalty(Growth()), SpectralPower()))
    frames = np.broadcast_to(2 + np.sin(X)[None, None, :, None], (64, 6, POINTS, 1)).astype("f4")
    data = Window.of(frames, SPEC)
    value, aux = call(penalized, stepped, data, key)
    found, given = drawn.draw(stepped, data, key)
    frames, previous = (np.asarray(part) for part in drawn.predict(stepped, found, given))
    assert_allclose(aux["part"]["constraint"], np.mean((frames - previous).mean((2, 3)) ** 2), rtol=1e-5)
    assert {2, 4} == {round(float(time) / SPEC.time_step) for time in found.times[:, -1]}
    assert_allclose(aux["part"]["data"], call(drawn, stepped, data, key)[0], rtol=1e-6)
    parts = aux["part"]
    assert_allclose(value, parts["data"] + parts["constraint"] + 0.1 * parts["spectral_power"], rtol=1e-5)


def test_penalties_add_up_and_nest_with_noise():
    penalties = (ConstraintPenalty(Growth()), SpectralPower())
    noisy = NoisyInputs(Penalized(OneStep(), penalties), std=0.5)
    other = Penalized(NoisyInputs(OneStep(), std=0.5), penalties)
    results = [call(objective, stepper(), window(), jax.random.key(0)) for objective in (noisy, other)]
    assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert set(results[0][1]["part"]) == {"data", "constraint", "spectral_power"}
    assert Penalized(NoisyInputs(Unrolled(2)), penalties).validation == Unrolled(2)


def test_penalties_of_one_name_are_one_part():
    penalty = ConstraintPenalty(Growth())
    once, twice = (
        call(Penalized(OneStep(), penalties), stepper(), window())[1]["part"]["constraint"]
        for penalties in ((penalty,), (penalty, ConstraintPenalty(Growth(), weight=3.0)))
    )
    assert once > 0
    assert_allclose(twice, 2 * once, rtol=1e-6)  # the parts are without their weights


def test_grids_without_a_spectrum_are_refused():
    masked = Window.of(window().frames, SPEC, mask=np.ones((3, POINTS, 1), "f4"))
    with pytest.raises(SpecError, match="mask"):
        Penalized(OneStep(), (SpectralPower(),))(stepper(), masked, None)
    spec = Spec(Grid((Axis.uniform("x", 3),)), (Channel("u"),))
    with pytest.raises(SpecError, match="no spectrum"):
        power(np.ones(3), np.ones(3), spec)


def test_what_cannot_work_is_refused():
    class NoFrames:
        def frames(self, history):
            return history + 1

        def __call__(self, stepper, window, key):
            return jnp.zeros(()), {}

    for wrong, message in (
        ({"penalties": ()}, "one or more in a tuple"), ({"objective": Curriculum()}, "Put the Penalized into"),
        ({"objective": NoisyInputs(NoFrames())}, "NoFrames does not offer"),
        ({"objective": Denoising()}, "Denoising does not offer"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Penalized(**{"penalties": (SpectralPower(),), **wrong})
    for wrong in ({"cut": 1.5}, {"cut": 0.0}, {"weight": 0.0}, {"floor": 0.0}):
        with pytest.raises(ConfigError):
            SpectralPower(**wrong)
    for wrong in ({}, {"constraint": 3}, {"constraint": Growth(), "scale": 0.0}):
        with pytest.raises(ConfigError):
            ConstraintPenalty(**wrong)
