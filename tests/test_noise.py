"""Noise on the inputs: where it goes, how large it is, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import ConfigError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.normalize import Normalizer
from physml.objectives import Curriculum, Denoising, NoisyInputs, OneStep, Pushforward, Unrolled
from physml.steppers import DirectConfig, ResidualConfig

SPEC = Spec(Grid((Axis.uniform("x", 64),)), (Channel("u"), Channel("v")))
SCALE, INCREMENT = np.array([2.0, 5.0]), np.array([0.5, 0.1])
BATCH = 64


class Take(nnx.Module):
    """Gives the channels of frame `index` of the history times a parameter."""

    def __init__(self, index):
        self.index, self.factor = index, nnx.Param(jnp.ones(()))

    def __call__(self, fields, scalars):
        return self.factor[...] * fields[..., 2 * self.index : 2 * self.index + 2]


def stepper(history=1, index=0):
    return DirectConfig(history).build(SPEC, Take(index), Normalizer(SPEC, [0.0, 0.0], SCALE, INCREMENT))


def still(frames=4, mask=None):
    values = np.broadcast_to(np.float32([1.0, 3.0]), (BATCH, frames, 64, 2))
    return Window.of(values * (1 if mask is None else mask[:, None]), SPEC, mask=mask)


def variance(objective, built=None, window=None, key=0):
    """Mean square difference from a truth that stands still, per channel: the variance of the noise."""
    built, window = built or stepper(), window or still()
    return np.asarray(jax.jit(lambda key: objective(built, window, key)[1]["channel"])(jax.random.key(key)))


@pytest.mark.parametrize(("unit", "size"), [("increment", INCREMENT), ("normalized", SCALE)])
def test_noise_has_its_size_in_units_of_each_channel(unit, size):
    measured = variance(NoisyInputs(OneStep(space="physical"), std=0.3, unit=unit))
    assert_allclose(measured, (0.3 * size) ** 2, rtol=0.1)  # 4096 numbers: 2 % of scatter


def test_a_walk_grows_over_the_history():
    for walk, shares in ((True, (1 / 3, 2 / 3, 1)), (False, (1, 1, 1))):
        objective = NoisyInputs(OneStep(space="physical"), std=0.3, walk=walk)
        for index, share in enumerate(shares):
            assert_allclose(variance(objective, stepper(3, index)), share * (0.3 * INCREMENT) ** 2, rtol=0.1)


def test_noise_is_drawn_anew_by_key_and_only_once_per_rollout():
    objective = NoisyInputs(Unrolled(3, space="physical"))
    _, aux = objective(stepper(), still(), jax.random.key(0))
    assert_allclose(aux["lead"], aux["lead"][:1].repeat(3), rtol=1e-5)  # the identity carries it along
    assert_array_equal(variance(objective), variance(objective))
    assert np.all(variance(objective) != variance(objective, key=1))


def test_the_truth_stays_and_increments_lead_back_to_it():
    """A residual network that sees the noise can remove it: the best factor is minus the increment's scale."""

    class Remove(nnx.Module):
        def __call__(self, fields, scalars):
            return (still().frames[0, 0] / SCALE - fields) * SCALE / INCREMENT

    built = ResidualConfig().build(SPEC, Remove(), Normalizer(SPEC, [0.0, 0.0], SCALE, INCREMENT))
    assert np.all(variance(NoisyInputs(std=1.0), built) < 1e-10)
    window = still()
    before = window.frames.copy()
    variance(NoisyInputs(std=1.0), window=window)
    assert_array_equal(window.frames, before)


def test_masked_cells_stay_zero():
    mask = np.ones((BATCH, 64, 2), "f4")
    mask[:, 10:20] = 0
    seen = []

    class Spy(type(stepper())):
        def advance(self, state, context):
            jax.debug.callback(lambda frames: seen.append(np.asarray(frames)), state)
            return super().advance(state, context)

    built = Spy(DirectConfig(), SPEC, Take(0), Normalizer(SPEC, [0.0, 0.0], SCALE, INCREMENT))
    jax.block_until_ready(NoisyInputs()(built, still(mask=mask), jax.random.key(0))[0])
    jax.effects_barrier()
    (state,) = seen
    assert np.all(state[:, :, 10:20] == 0)
    assert np.std(state[:, :, :10, 0]) > 0


def test_gradients_reach_the_parameters():
    graphdef, params, rest = nnx.split(stepper(), nnx.Param, ...)
    window = still()

    def loss(params):
        return NoisyInputs(OneStep(space="physical"), std=2.0)(
            nnx.merge(graphdef, params, rest), window, jax.random.key(0)
        )[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    # mean (f (u + n) - u)^2 at f = 1: value mean n^2, slope 2 mean n (u + n), about 2 mean n^2
    assert_allclose(gradient["model"]["factor"][...], 2 * value, rtol=0.15)


def test_validation_is_without_noise():
    assert NoisyInputs(Unrolled(3)).validation == Unrolled(3)
    assert NoisyInputs(Pushforward(2)).validation == Unrolled(3, differentiate=1)
    assert NoisyInputs(Unrolled(3)).frames(2) == 5


def test_what_cannot_work_is_refused():
    for wrong in ({"std": 0.0}, {"std": -1.0}, {"unit": "kelvin"}, {"objective": Curriculum()}, {"objective": 3}):
        with pytest.raises(ConfigError):
            NoisyInputs(**wrong)
    with pytest.raises(ConfigError, match="cannot hold Denoising, which learns from noise of its own"):
        NoisyInputs(Denoising())
    with pytest.raises(ConfigError, match="needs a key"):
        NoisyInputs()(stepper(), still(), None)

    class Elsewhere(OneStep):
        def __call__(self, stepper, window, key):
            return jnp.zeros(()), {}

    with pytest.raises(ConfigError, match="Elsewhere does not start"):
        NoisyInputs(Elsewhere())(stepper(), still(), jax.random.key(0))


def test_steppers_without_history_are_refused(tiny):
    spec = tiny.spec((6,), ("u",), static=("coefficient",))
    window = tiny.window(spec, static=np.ones((3, 6, 1), "f4"))
    built = DirectConfig(history=0).build(spec, tiny.model(1, 1), Normalizer.identity(spec))
    with pytest.raises(ConfigError, match="history 0"):
        NoisyInputs()(built, window, jax.random.key(0))
