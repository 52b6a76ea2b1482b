"""All-to-all training on the exact flow map of u' = -rate u, and forecasts at leads of any length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import coding, saving
from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.metrics import efficiency_gain
from physml.metrics.losses import MAE, RelativeLp
from physml.models import ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import OBJECTIVES, AllToAll, OneStep, ordered_pairs
from physml.objectives.pairs import pick
from physml.rollout import direct_leads, rollout, rollout_stride
from physml.steppers import BundledConfig, DirectConfig, FluxConfig, GaussianConfig, ResidualConfig
from physml.training.validation import count_windows

STEP, RATE = 0.5, 0.3
SPEC = Spec(Grid((Axis.uniform("x", 4),)), (Channel("u"),), time_step=STEP)


class Decay(nnx.Module):
    """exp(-rate lead) u, the exact flow map, times `factor`; the lead comes in time steps."""

    def __init__(self, rate=RATE, factor=1.0):
        self.rate, self.factor = nnx.Param(jnp.float32(rate)), nnx.Param(jnp.float32(factor))

    def __call__(self, fields, scalars):
        return self.factor[...] * jnp.exp(-self.rate[...] * STEP * scalars[:, :1, None]) * fields


def stepper(model=None, spec=SPEC, **config):
    config = DirectConfig(**{"lead": True, "longest_lead": 20, **config})
    return config.build(spec, model or Decay(), Normalizer.identity(spec))


def decaying(frames, batch=3, spec=SPEC, **fields):
    start = np.random.default_rng(0).uniform(0.5, 2, (batch, 1, 4, 1))
    times = STEP * np.arange(frames)
    values = start * np.exp(-RATE * times)[None, :, None, None]
    return Window.of(values.astype("f4"), spec, **fields)


def value(objective, window, key=0, model=None, **config):
    return float(objective(stepper(model, **config), window, jax.random.key(key))[0])


def test_every_ordered_pair_is_there_once():
    pairs = ordered_pairs(11)
    assert len(pairs) == 66
    assert {tuple(pair) for pair in pairs.tolist()} == {(i, j) for i in range(11) for j in range(i, 11)}
    assert len(ordered_pairs(11, zero_lead=False)) == 55
    assert (np.diff(ordered_pairs(4, zero_lead=False)) > 0).all()


@pytest.mark.parametrize("pairs", [0, pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_exact_flow_map_has_no_error(pairs):
    """The semigroup property: one map serves all pairs. Float32 exponentials of numbers of order 1."""
    assert value(AllToAll(7, pairs=pairs), decaying(7)) < 1e-12
    assert value(AllToAll(4, stride=2, pairs=pairs), decaying(7)) < 1e-12
    assert value(AllToAll(7, pairs=pairs), decaying(7), model=Decay(2 * RATE)) > 1e-4


def test_all_pairs_give_the_mean_over_pairs():
    window, model = decaying(5), Decay(0.1, 0.9)
    u = np.asarray(window.frames, float)
    for zero_lead in (True, False):
        errors = [
            (0.9 * np.exp(-0.1 * STEP * (j - i)) * u[:, i] - u[:, j]) ** 2 for i, j in ordered_pairs(5, zero_lead)
        ]
        assert_allclose(
            value(AllToAll(5, pairs=0, zero_lead=zero_lead), window, model=model), np.mean(errors), rtol=1e-5
        )


def test_zero_lead_alone_sees_a_wrong_identity():
    """A network that is right at every lead but zero: exact on 10 of the 15 pairs of 5 snapshots."""

    class Wrong(Decay):
        def __call__(self, fields, scalars):
            return super().__call__(fields, scalars) + (scalars[:, :1, None] == 0)

    assert value(AllToAll(5, pairs=0, zero_lead=False), decaying(5), model=Wrong()) < 1e-12
    assert_allclose(value(AllToAll(5, pairs=0, loss=MAE()), decaying(5), model=Wrong()), 5 / 15, rtol=1e-6)


def test_pairs_are_drawn_uniformly_and_for_every_sample_and_key():
    """12000 draws of 6 pairs: each expects 2000 with a deviation of 41; 5 of them."""
    objective, table = AllToAll(3), {tuple(pair): 0 for pair in ordered_pairs(3).tolist()}
    index = objective._frames(1, 12000, jax.random.key(1))
    assert index.shape == (12000, 1, 2)
    for pair, count in zip(*np.unique(np.asarray(index)[:, 0], axis=0, return_counts=True), strict=True):
        table[tuple(pair.tolist())] = count
    assert max(abs(count - 2000) for count in table.values()) < 205
    again, other = (objective._frames(1, 12000, jax.random.key(key)) for key in (1, 2))
    assert_array_equal(index, again)
    assert (np.asarray(index) != np.asarray(other)).any()


def test_several_pairs_of_a_window_differ():
    index = np.asarray(AllToAll(3, pairs=5)._frames(1, 50, jax.random.key(0)))
    assert all(len(np.unique(own, axis=0)) == 5 for own in index)
    everything = np.asarray(AllToAll(3, pairs=6)._frames(1, 2, jax.random.key(0)))[0]
    assert_array_equal(np.unique(everything, axis=0), ordered_pairs(3))


def test_the_history_ends_at_the_earlier_frame():
    index = np.asarray(AllToAll(2, stride=3, pairs=0, zero_lead=False)._frames(2, 1, None))
    assert_array_equal(index, [[[0, 1, 4]]])
    assert AllToAll(2, stride=3).frames(2) == 5


def test_context_is_that_of_the_later_frame():
    spec = dataclasses.replace(SPEC, forcing=(Channel("f"),), parameters=(Channel("p"),))
    frames = np.arange(6, dtype="f4")
    forcing = np.broadcast_to((10 * frames)[None, :, None, None], (2, 6, 4, 1))
    calendar = np.broadcast_to((frames / 10)[None, :, None], (2, 6, 2))
    mask = np.stack([np.full((4, 1), i, "f4") for i in (1, 0)])
    window = decaying(
        6, 2, spec, forcing=forcing, calendar=calendar, parameters=np.array([[1.0], [2.0]], "f4"), mask=mask
    )
    picked = pick(window, jnp.asarray([[[1, 4], [2, 2]], [[0, 5], [3, 4]]]))
    context = picked.context(0, 1)
    assert_allclose(context.lead, np.array([3, 0, 5, 1]) * STEP)
    assert_allclose(context.time, np.array([4, 2, 5, 4]) * STEP)
    assert_allclose(context.forcing[:, 0, 0], [40, 20, 50, 40])
    assert_allclose(context.calendar[:, 0], [0.4, 0.2, 0.5, 0.4], rtol=1e-6)
    assert_allclose(context.parameters[:, 0], [1, 1, 2, 2])
    assert_allclose(context.mask[:, 0, 0], [1, 1, 0, 0])


def test_jit_and_gradient_agree_with_eager():
    objective, window = AllToAll(5, pairs=3, loss=RelativeLp()), decaying(5)
    graph, params, rest = nnx.split(stepper(Decay(0.2)), nnx.Param, ...)

    def loss(params):
        return objective(nnx.merge(graph, params, rest), window, jax.random.key(3))[0]

    assert_allclose(jax.jit(loss)(params), loss(params), rtol=1e-6)
    slope = jax.jit(jax.grad(loss))(params)["model"]["rate"][...]
    h = 1e-2
    higher, lower = (value(objective, window, 3, Decay(0.2 + s)) for s in (h, -h))
    assert_allclose(slope, (higher - lower) / (2 * h), rtol=1e-2)  # second differences of a float32 loss


def test_direct_forecasts_at_any_lead():
    window, exact = decaying(2), np.asarray(decaying(1).frames, float)
    leads = [0, 0.5, 3, 20]
    frames = direct_leads(stepper(), window, leads)
    assert_allclose(frames, exact * np.exp(-RATE * STEP * np.array(leads))[:, None, None], rtol=1e-5)
    jitted = jax.jit(lambda w: direct_leads(stepper(), w, leads))(window)
    assert_allclose(jitted, frames, rtol=1e-6)
    by_steps = rollout_stride(stepper(), window, 4, 5)
    assert_allclose(by_steps, exact * np.exp(-RATE * STEP * 5 * np.arange(1, 5))[:, None, None], rtol=1e-5)
    assert_allclose(rollout_stride(stepper(), window, 3, 1), rollout(stepper(), window, 3))


def test_direct_forecasts_see_the_forcing_of_their_lead():
    spec = dataclasses.replace(SPEC, forcing=(Channel("f"),))

    class Copy(nnx.Module):
        def __call__(self, fields, scalars):
            return fields[..., 1:]

    forcing = np.broadcast_to(np.arange(8, dtype="f4")[None, :, None, None], (1, 8, 4, 1))
    window = dataclasses.replace(decaying(8, 1, spec, forcing=forcing), frames=decaying(1, 1).frames)
    model = stepper(Copy(), spec)
    assert_allclose(direct_leads(model, window, [0, 2, 7])[0, :, 0, 0], [0, 2, 7])
    assert_allclose(rollout_stride(model, window, 2, 3)[0, :, 0, 0], [3, 6])
    with pytest.raises(SpecError, match="9 are needed"):
        direct_leads(model, window, [8])
    with pytest.raises(SpecError, match="10 are needed"):
        rollout_stride(model, window, 3, 3)
    with pytest.raises(ConfigError, match="Between frames, at lead 0.5"):
        direct_leads(model, window, [0.5])


class Told(nnx.Module):
    """Says the time of a step, and draws a number in the first cell."""

    config, history = DirectConfig(lead=True, longest_lead=20), 1

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        told = jnp.broadcast_to(context.time[:, None, None], state.shape)
        return told if context.key is None else told.at[:, 0].set(jax.random.normal(context.key, told[:, 0].shape))

    def decode(self, state):
        return state


def test_direct_forecasts_are_told_their_time_and_draw_for_each_lead():
    """Time counts from the beginning of the window; equal leads are two draws, and those of other keys differ."""
    window, leads = decaying(2, times=np.float32([[7.0, 7.5]] * 3)), [3, 0, 3, 2.5]
    keys = (*jax.random.split(jax.random.key(0)), None)
    keyed = [np.asarray(direct_leads(Told(), window, leads, key)) for key in keys]
    for frames in keyed:
        assert_allclose(frames[:, :, 1, 0], np.tile([8.5, 7.0, 8.5, 8.25], (3, 1)))
    drawn = np.stack([keyed[0][:, :, 0, 0], keyed[1][:, :, 0, 0]])
    assert len(np.unique(drawn)) == drawn.size
    alone = direct_leads(Told(), window, leads[:1], keys[0])
    assert_array_equal(alone[:, 0], keyed[0][:, 0])


def test_leads_that_were_never_seen_are_refused():
    window = decaying(2)
    with pytest.raises(ConfigError, match="lead of 21 time steps .* trained for 0 to 20"):
        direct_leads(stepper(), window, [3, 21])
    with pytest.raises(ConfigError, match="lead of -1"):
        direct_leads(stepper(), window, [-1])
    with pytest.raises(ConfigError, match="lead of 30"):
        rollout_stride(stepper(), window, 2, 30)
    with pytest.raises(ConfigError, match="leads are empty"):
        direct_leads(stepper(), window, [])
    deaf = DirectConfig().build(SPEC, _Same(), Normalizer.identity(SPEC))
    with pytest.raises(SpecError, match="does not tell its network the length"):
        direct_leads(deaf, window, [1])


@pytest.mark.parametrize(
    "config",
    [
        DirectConfig(lead=True),
        ResidualConfig(lead=True),
        BundledConfig(bundle=3, lead=True),
        FluxConfig(lead=True),
        GaussianConfig(lead=True),
    ],
)
def test_steppers_of_one_step_have_seen_that_lead_alone(config):
    class Repeated(nnx.Module):
        def __call__(self, fields, scalars):
            return jnp.repeat(fields[..., :1], config.signature(SPEC).outputs, -1)

    one, window = config.build(SPEC, Repeated(), Normalizer.identity(SPEC)), decaying(3)
    assert_allclose(direct_leads(one, window, [1, 1.0])[:, 1], rollout(one, window, 1)[:, 0], rtol=1e-6)
    for lead in (0, 0.5, 2):
        with pytest.raises(ConfigError, match=f"lead of {lead} .* trained for steps of 1 only"):
            direct_leads(one, window, [1, lead])


class _Same(nnx.Module):
    def __call__(self, fields, scalars):
        return fields[..., :1]


def test_a_lead_beyond_the_trained_ones_stays_refused_after_saving(tmp_path):
    config = DirectConfig(lead=True, longest_lead=3)
    model = ResNetConfig(width=4, depth=1).build(config.signature(SPEC), nnx.Rngs(0))
    trained = config.build(SPEC, model, Normalizer.identity(SPEC))
    loaded = saving.load(saving.save(trained, tmp_path / "model"))
    window = decaying(1)
    assert_array_equal(direct_leads(loaded, window, [0, 3]), direct_leads(trained, window, [0, 3]))
    with pytest.raises(ConfigError, match="trained for 0 to 3"):
        direct_leads(loaded, window, [4])


def test_steppers_that_do_not_fit_are_refused():
    window = decaying(7)
    for config, message in (
        (DirectConfig(), "does not tell"),
        (DirectConfig(lead=True), "leads of up to 6 time steps, but the stepper is meant for 1"),
    ):
        with pytest.raises(SpecError, match=message):
            AllToAll(7)(config.build(SPEC, _Same(), Normalizer.identity(SPEC)), window, jax.random.key(0))
    with pytest.raises(SpecError, match="holds 7 frames, but the 8 of AllToAll are needed"):
        value(AllToAll(8), window)
    with pytest.raises(ConfigError, match="got no key"):
        AllToAll(7)(stepper(), window, None)
    assert float(AllToAll(7, pairs=0)(stepper(), window, None)[0]) < 1e-12
    with pytest.raises(ConfigError, match="longest_lead is 3 with lead=False"):
        DirectConfig(longest_lead=3)
    residual = ResidualConfig(lead=True, longest_lead=6).build(SPEC, _Same(), Normalizer.identity(SPEC))
    assert np.isfinite(AllToAll(7)(residual, window, jax.random.key(0))[0])


def test_windows_longer_than_trajectories_are_a_data_error():
    class Short:
        lengths = (5, 6)

    assert count_windows(Short, AllToAll(6).frames(1), "training") == 1
    with pytest.raises(DataError, match="no window of 8 frames: its 2 trajectories have 5 to 6 frames"):
        count_windows(Short, AllToAll(8).frames(1), "training")


def test_bad_options_are_named_and_good_ones_have_a_plain_form():
    for wrong in ({"snapshots": 1}, {"stride": 0}, {"pairs": -1}, {"snapshots": 3, "pairs": 7}, {"space": "increment"}):
        with pytest.raises(ConfigError):
            AllToAll(**wrong)
    objective = AllToAll(11, 2, 4, zero_lead=False, loss="mae")
    plain = coding.to_dict(objective, OBJECTIVES)
    assert plain["name"] == "all_to_all"
    assert coding.from_dict(OBJECTIVES, plain) == objective


def test_one_pair_of_neighbors_is_one_step():
    """Two snapshots without zero lead have a single pair."""
    window, model = decaying(2), Decay(0.7)
    one = OneStep()(stepper(model), window, jax.random.key(0))[0]
    assert_allclose(value(AllToAll(2, zero_lead=False), window, model=model), one, rtol=1e-6)


def test_efficiency_gain_by_hand():
    """Errors 8 / n and 32 / n: four times fewer samples everywhere, a quarter of the error everywhere."""
    samples = np.array([4, 16, 64])
    gain = efficiency_gain(samples, 8 / samples, samples, 32 / samples)
    assert_allclose(gain[:2], [4, 4])
    assert not gain.is_bound
    # target 32 / 1024 lies between 64 and 256 of 8 / n: log-log interpolation is exact on a power law
    longer = np.array([64, 1024])
    gain = efficiency_gain([64, 512], [8 / 64, 8 / 512], longer, 32 / longer, at=128)
    assert_allclose(gain[:2], [4, 4])
    assert gain == efficiency_gain([64, 512], [8 / 64, 8 / 512], longer, 32 / longer, at=128.0)


def test_efficiency_gain_at_its_limits():
    never = efficiency_gain([4, 16], [2.0, 1.5], [4, 16], [2.0, 1.0])
    assert never == (0.0, pytest.approx(1 / 1.5), False)
    at_once = efficiency_gain([4, 16], [0.5, 0.4], [4, 64], [2.0, 1.0])
    assert at_once == (16.0, pytest.approx(4.0), True)  # at 4, the largest count of both
    bumpy = efficiency_gain([1, 10, 100], [1.0, 3.0, 1.0], [1, 100], [5.0, 1.0])
    assert bumpy.samples == 100
    for wrong, message in (
        (([4], [1.0, 2.0], [4], [1.0]), "same length"),
        (([4, 4], [1.0, 2.0], [4], [1.0]), "must rise"),
        (([4], [0.0], [4], [1.0]), "positive"),
        (([4], [1.0], [4], [float("nan")]), "reference_errors"),
        (([4], [1.0], [8], [1.0]), "give `at`"),
    ):
        with pytest.raises(ConfigError, match=message):
            efficiency_gain(*wrong)
    with pytest.raises(ConfigError, match="at is 9"):
        efficiency_gain([4, 8], [1.0, 1.0], [4, 16], [1.0, 1.0], at=9)
