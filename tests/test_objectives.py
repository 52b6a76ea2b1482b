"""Objectives on a stepper whose loss and gradient are known by hand: u -> a u."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.metrics.losses import H1, MSE, RelativeLp
from physml.models.resnet import ResNetConfig
from physml.normalize import Normalizer
from physml.objectives import (
    OBJECTIVES,
    ConstraintPenalty,
    Curriculum,
    NoisyInputs,
    OneStep,
    Penalized,
    Pushforward,
    SpectralPower,
    Unrolled,
    scoring,
)
from physml.steppers import DirectConfig, ResidualConfig

SPEC = Spec(Grid((Axis.uniform("x", 4),)), (Channel("u"),))
A, U0, TRUTH = 0.8, 2.0, 1.5
LEADS = [(A**k * U0 - TRUTH) ** 2 for k in (1, 2, 3)]


class Scale(nnx.Module):
    def __init__(self, factor, noise=0.0):
        self.factor = nnx.Param(jnp.float32(factor))
        self.noise = noise

    def __call__(self, fields, scalars):
        return self.factor[...] * fields


def stepper(factor=A, normalizer=None, config=None):
    return (config or DirectConfig()).build(SPEC, Scale(factor), normalizer or Normalizer.identity(SPEC))


def constant_window(frames=4, first=U0):
    values = np.full((2, frames, 4, 1), TRUTH, "f4")
    values[:, 0] = first
    return Window.of(values, SPEC)


def gradient(objective, window=None, **built):
    """d loss / d a."""
    graphdef, params, rest = nnx.split(stepper(**built), nnx.Param, ...)

    def loss(params):
        return objective(nnx.merge(graphdef, params, rest), window or constant_window(), jax.random.key(0))[0]

    return float(jax.jit(jax.grad(loss))(params)["model"]["factor"][...])


def value(objective, window=None, **built):
    return objective(stepper(**built), window or constant_window(), jax.random.key(0))


def test_one_step_loss_and_gradient():
    loss, aux = value(OneStep())
    assert_allclose(loss, LEADS[0], rtol=1e-6)
    assert_allclose(aux["channel"], [LEADS[0]], rtol=1e-6)
    assert_allclose(gradient(OneStep()), 2 * (A * U0 - TRUTH) * U0, rtol=1e-5)


@pytest.mark.parametrize("objective", [Unrolled(steps=3), Pushforward(steps=2), NoisyInputs(OneStep(), 0.1)], ids=repr)
def test_notebooks_call_objectives_compiled_once(objective, monkeypatch):
    traces, call = [], Scale.__call__
    monkeypatch.setattr(Scale, "__call__", lambda self, *fields: traces.append(1) or call(self, *fields))
    own, window, key, compiled = stepper(), constant_window(), jax.random.key(3), nnx.jit(objective)
    expected = objective(own, window, key)
    found, before = compiled(own, window, key), len(traces)
    again = compiled(own, window, key)
    assert len(traces) == before
    for loss, aux in (found, again):
        assert_allclose(loss, expected[0], rtol=1e-6)
        assert aux.keys() == expected[1].keys()


def test_unrolled_loss_and_gradient_reach_back_through_every_step():
    objective = Unrolled(steps=3)
    loss, aux = value(objective)
    assert_allclose(loss, np.mean(LEADS), rtol=1e-5)
    assert_allclose(aux["lead"], LEADS, rtol=1e-5)
    expected = np.mean([2 * (A**k * U0 - TRUTH) * k * A ** (k - 1) * U0 for k in (1, 2, 3)])
    assert_allclose(gradient(objective), expected, rtol=1e-5)


def test_a_warm_up_of_fixed_length_leaves_the_gradient_of_the_last_step_alone():
    """With u2 = a^2 u0 held constant, d/da (a u2 - t)^2 = 2 (a u2 - t) u2."""
    objective = Unrolled(steps=3, differentiate=1)
    assert_allclose(value(objective)[0], LEADS[2], rtol=1e-5)
    before = A**2 * U0
    expected = 2 * (A * before - TRUTH) * before
    assert_allclose(gradient(objective), expected, rtol=1e-5)
    assert_allclose(gradient(OneStep(), constant_window(first=before)), expected, rtol=1e-5)


def test_a_warm_up_keeps_the_last_steps():
    """Two of three: u1 = a u0 is constant, leads 2 and 3 are scored."""
    u1 = A * U0
    expected = np.mean([2 * (A**k * u1 - TRUTH) * k * A ** (k - 1) * u1 for k in (1, 2)])
    assert_allclose(gradient(Unrolled(steps=3, differentiate=2)), expected, rtol=1e-5)
    assert_allclose(gradient(Unrolled(steps=3, differentiate=3)), gradient(Unrolled(steps=3)), rtol=1e-6)


def test_truncated_gradients_are_the_sum_of_those_of_their_groups():
    """All leads count, but each group of steps starts from a state that is held constant."""
    objective = Unrolled(steps=3, truncate=2)
    loss, aux = value(objective)
    assert_allclose(aux["lead"], LEADS, rtol=1e-5)
    u2 = A**2 * U0
    first = [2 * (A**k * U0 - TRUTH) * k * A ** (k - 1) * U0 for k in (1, 2)]
    second = 2 * (A * u2 - TRUTH) * u2
    assert_allclose(gradient(objective), (sum(first) + second) / 3, rtol=1e-5)
    pieces = [gradient(OneStep(), constant_window(first=A**k * U0)) for k in range(3)]
    assert_allclose(gradient(Unrolled(steps=3, truncate=1)), np.mean(pieces), rtol=1e-5)
    assert_allclose(gradient(Unrolled(steps=3, truncate=3)), gradient(Unrolled(steps=3)), rtol=1e-6)
    # after a warm-up the groups begin with the first scored step
    pieces = [gradient(OneStep(), constant_window(first=A**k * U0)) for k in (1, 2)]
    assert_allclose(gradient(Unrolled(steps=3, differentiate=2, truncate=1)), np.mean(pieces), rtol=1e-5)


class Growth:
    """Nothing may change."""

    def violation(self, frame, previous, context):
        return (frame - previous).mean((1, 2))[:, None]


@pytest.mark.parametrize("differentiate", [3, 2])
def test_a_penalty_does_not_reach_through_the_cut_either(differentiate):
    """d/da of (a u - u)^2 where u, the frame that the step starts from, is given."""
    objective = Unrolled(3, differentiate, truncate=1)
    penalized = Penalized(objective, (ConstraintPenalty(Growth()),))
    given = [A**k * U0 for k in range(3 - differentiate, 3)]
    expected = np.mean([2 * (A * u - u) * u for u in given])
    assert_allclose(gradient(penalized) - gradient(objective), expected, rtol=1e-5)


def test_pushforward_draws_the_length_of_its_warm_up():
    """Truth stands still from the first frame on, so a warm-up of n steps gives u = a^(n + 1) t, always against t."""
    objective, window = Pushforward(steps=2), constant_window(first=TRUTH)
    lengths = {round(((A ** (n + 1) - 1) * TRUTH) ** 2, 5): n for n in range(3)}
    call = jax.jit(lambda key: objective(stepper(), window, key)[0])
    drawn = [lengths[round(float(call(jax.random.key(i))), 5)] for i in range(60)]
    counts = np.bincount(drawn, minlength=3)
    assert counts.sum() == 60
    assert counts.min() >= 8  # 20 are expected; below 8 once in 10 000
    longest = value(Unrolled(steps=3, differentiate=1), window)[0]
    assert_allclose(objective(stepper(), window, None)[0], longest, rtol=1e-6)
    assert_allclose(objective.validation(stepper(), window, None)[0], longest, rtol=1e-6)
    with pytest.raises(SpecError, match="4 \\(steps\\)"):
        value(Pushforward(steps=3))


class Began(nnx.Module):
    """Frames show the time that `encode` was told."""

    history = 1

    def __init__(self, spec):
        self.spec, self.normalizer = spec, Normalizer.identity(spec)

    def encode(self, frames, context):
        return 0 * frames[:, -1] + context.time[:, None, None]

    def advance(self, state, context):
        return state

    def decode(self, state):
        return state


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_rollout_that_begins_later_is_told_when(start):
    times = np.array([[0, 1, 2, 3], [10, 11, 12, 13]], "f4")
    window = dataclasses.replace(constant_window(), times=times)
    found = scoring.predict(Began(SPEC), window, None, 3, skip=2, start=start).frames
    assert_allclose(found[:, 0, 0, 0], window.context(start, 1).time)
    assert_allclose(window.context(start, 1).time, times[:, start + 1])


def test_pushforward_gradients_stop_at_the_warm_up():
    """Of whatever length: with u = a^n u0 held constant, d/da (a u - t)^2 = 2 (a u - t) u. Also under vmap."""
    window, objective = constant_window(first=TRUTH), Pushforward(steps=2)
    graphdef, params, rest = nnx.split(stepper(), nnx.Param, ...)

    def loss(params, key):
        return objective(nnx.merge(graphdef, params, rest), window, key)[0]

    keys = jax.random.split(jax.random.key(3), 12)
    both = jax.vmap(jax.value_and_grad(loss), (None, 0))
    values, gradients = jax.jit(both)(params, keys)
    before = (TRUTH - np.sqrt(np.asarray(values))) / A
    assert len(np.unique(before.round(4))) == 3
    assert_allclose(gradients["model"]["factor"][...], 2 * (A * before - TRUTH) * before, rtol=1e-4)


def test_memory_of_recomputed_steps_hardly_grows_with_their_number():
    """What is kept per step is its state, which is small beside the hidden fields of one step."""
    spec = Spec(Grid((Axis.uniform("x", 32),)), (Channel("u"),))
    config = ResNetConfig(width=32, depth=2)
    built = ResidualConfig().build(
        spec, config.build(ResidualConfig().signature(spec), nnx.Rngs(0)), Normalizer.identity(spec)
    )
    graphdef, params, rest = nnx.split(built, nnx.Param, ...)

    def memory(objective):
        def loss(params, frames):
            return objective(nnx.merge(graphdef, params, rest), Window.of(frames, spec), jax.random.key(0))[0]

        frames = jax.ShapeDtypeStruct((8, objective.frames(1), 32, 1), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(params, frames).compile().memory_analysis().temp_size_in_bytes

    assert memory(Unrolled(20, remat=True)) < 1.5 * memory(Unrolled(5, remat=True))
    assert memory(Unrolled(20)) > 2 * memory(Unrolled(5))


def test_leads_are_weighted():
    assert_allclose(value(Unrolled(steps=2, weights=(3.0, 1.0)))[0], (3 * LEADS[0] + LEADS[1]) / 4, rtol=1e-5)
    expected = (LEADS[0] + 0.5 * LEADS[1] + 0.25 * LEADS[2]) / 1.75
    assert_allclose(value(Unrolled(steps=3, discount=0.5))[0], expected, rtol=1e-5)


def test_recomputing_changes_nothing():
    assert_allclose(gradient(Unrolled(steps=3, remat=True)), gradient(Unrolled(steps=3)), rtol=1e-6)


def test_spaces_are_units():
    normalizer = Normalizer(SPEC, [1.0], [4.0], [0.5])
    config = ResidualConfig()
    # model input (2 - 1) / 4 = 0.25, output 0.8 * 0.25 = 0.2, frame 2 + 0.2 * 0.5 = 2.1
    error = 2.1 - TRUTH
    for space, unit in (("physical", 1), ("normalized", 4), ("increment", 0.5)):
        loss, _ = value(OneStep(space=space), normalizer=normalizer, config=config)
        assert_allclose(loss, (error / unit) ** 2, rtol=1e-5)
    # relative to the size of the true increment, 2 -> 1.5
    loss, _ = value(OneStep(RelativeLp(), "increment"), normalizer=normalizer, config=config)
    assert_allclose(loss, 0.6 / 0.5, rtol=1e-5)


def test_later_increments_start_from_the_true_frame():
    """A relative loss of increments at lead 2: truth stands still, so its increment is 0 and the error 2 a u - t."""
    normalizer = Normalizer(SPEC, [0.0], [1.0], [1.0])
    window = Window.of(np.array([1.0, 2.0, 4.0], "f4").reshape(1, 3, 1, 1) * np.ones((1, 3, 4, 1), "f4"), SPEC)
    _, aux = value(Unrolled(2, loss=RelativeLp(), space="increment"), window, normalizer=normalizer, factor=1.0)
    assert_allclose(aux["lead"], [1.0 / 1.0, 3.0 / 2.0], rtol=1e-5)


def test_history_zero_learns_an_operator(tiny):
    spec = tiny.spec((6,), ("u",), static=("coefficient",))
    static = np.linspace(1, 2, 12, dtype="f4").reshape(2, 6, 1)
    window = Window.of(3 * static[:, None], spec, static=static)
    operator = DirectConfig(history=0).build(spec, Scale(2.0), Normalizer.identity(spec))
    loss, _ = OneStep()(operator, window, jax.random.key(0))
    assert_allclose(loss, np.mean(static**2), rtol=1e-5)
    assert OneStep().frames(0) == 1
    with pytest.raises(ConfigError, match="history 0"):
        OneStep(space="increment")(operator, window, jax.random.key(0))


def test_many_steps_are_one_scan():
    """The program does not grow with the number of steps."""

    def size(objective):
        graphdef, state = nnx.split(stepper())
        window = constant_window(objective.frames(1))
        return len(str(jax.make_jaxpr(lambda s: objective(nnx.merge(graphdef, s), window, jax.random.key(0)))(state)))

    assert size(Unrolled(200)) < 1.1 * size(Unrolled(3))
    assert size(Unrolled(200, differentiate=100)) < 1.1 * size(Unrolled(4, differentiate=2))


def test_frozen_steps_keep_nothing_for_the_backward_pass():
    """Residuals of the gradient: those of the differentiated steps only."""

    def stored(objective):
        graphdef, params, rest = nnx.split(stepper(), nnx.Param, ...)
        window = constant_window(objective.frames(1))
        _, backward = jax.vjp(lambda p: objective(nnx.merge(graphdef, p, rest), window, jax.random.key(0))[0], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    full, part, short = (stored(o) for o in (Unrolled(64), Unrolled(64, differentiate=2), Unrolled(2)))
    assert full > 10 * short
    assert part < 3 * short + 66 * 8  # the window itself may be kept


def test_each_step_has_its_own_key():
    class NoisyStepper(type(stepper())):
        def advance(self, state, context):
            noise = jax.random.normal(context.key, ())
            return super().advance(state, context) + noise

    noisy = NoisyStepper(DirectConfig(), SPEC, Scale(1.0), Normalizer.identity(SPEC))
    _, first = Unrolled(3)(noisy, constant_window(), jax.random.key(0))
    _, again = Unrolled(3)(noisy, constant_window(), jax.random.key(0))
    _, other = Unrolled(3)(noisy, constant_window(), jax.random.key(1))
    assert_allclose(first["lead"], again["lead"])
    assert abs(first["lead"] - other["lead"]).max() > 1e-3
    _, tail = Unrolled(3, differentiate=1)(noisy, constant_window(), jax.random.key(0))
    assert_allclose(tail["lead"], first["lead"][2:], rtol=1e-6)  # the same noise in the frozen steps


def test_masked_cells_do_not_train():
    mask = np.ones((2, 4, 1), "f4")
    mask[:, 2] = 0
    frames = constant_window().frames * mask[:, None]
    masked = Window.of(frames, SPEC, mask=mask)
    assert_allclose(value(OneStep(), masked)[0], LEADS[0], rtol=1e-6)


def test_the_error_of_a_channel_is_that_of_the_samples_which_have_it():
    """As in a mixture: the first sample has both channels, the other three only u."""
    spec = Spec(SPEC.grid, (Channel("u"), Channel("v"), Channel("w")))
    frames = np.random.default_rng(0).normal(size=(4, 3, 4, 3)).astype("f4")
    mask = np.ones((4, 4, 3), "f4")
    mask[1:, :, 1] = mask[..., 2] = 0
    built = DirectConfig().build(spec, Scale(A), Normalizer.identity(spec))
    mixed = Window.of(frames * mask[:, None], spec, mask=mask)
    alone = Window.of(frames[:1], spec)
    for objective in (OneStep(), Unrolled(2), OneStep("relative")):
        total, aux = objective(built, mixed, None)
        _, own = objective(built, alone, None)
        assert_allclose(aux["channel"][1], own["channel"][1], rtol=1e-6)
        assert aux["channel"][2] == 0
        assert_allclose(aux["present"], [1, 0.25, 0])
        assert_allclose(aux["weight"], 1.25)
        assert_allclose((aux["channel"] * aux["present"]).sum() / aux["present"].sum(), total, rtol=1e-6)
        if "lead" in aux:
            assert_allclose(aux["lead"].mean(), total, rtol=1e-6)
        assert "present" not in own


def test_bad_arguments_are_named():
    with pytest.raises(SpecError, match="1 \\(history\\) \\+ 9 \\(steps\\)"):
        value(Unrolled(9))
    for wrong in (
        {"steps": 0}, {"differentiate": 0}, {"steps": 2, "differentiate": 3}, {"weights": (1.0,)}, {"discount": 0.0},
        {"discount": np.nan}, {"discount": np.inf}, {"steps": 2, "weights": (np.nan, 1.0)}, {"weights": (np.inf,)},
        {"weights": (1.0, 1.0), "discount": 0.5}, {"loss": "mze"}, {"space": "fourier"}, {"truncate": 0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Unrolled(**wrong)
    for wrong in ({"steps": 0}, {"differentiate": 0}, {"loss": "mze"}):
        with pytest.raises(ConfigError):
            Pushforward(**wrong)
    assert OneStep("mse") == OneStep(MSE())
    assert list(OBJECTIVES) == sorted(OBJECTIVES)
    assert {"all_to_all", "one_step", "random_interval", "unrolled"} < set(OBJECTIVES)


def test_objectives_have_a_plain_form_that_names_their_loss():
    from physml import coding

    objective = Unrolled(3, differentiate=1, loss=H1(boundary="periodic"), weights=(2.0,))
    plain = coding.to_dict(objective, OBJECTIVES)
    assert plain["name"] == "unrolled"
    assert plain["loss"]["name"] == "h1"
    assert coding.from_dict(OBJECTIVES, plain) == objective
    changed = coding.override(plain, ["loss=relative", "loss.p=1"])
    assert coding.from_dict(OBJECTIVES, changed).loss == RelativeLp(p=1)


def test_nested_objectives_survive_yaml_and_take_overrides():
    from physml.experiment import Experiment, load_experiment, to_yaml

    penalties = (SpectralPower(cut=0.75),)
    nested = Curriculum(NoisyInputs(Penalized(Unrolled(loss=H1()), penalties), std=0.2, walk=True), (3, 5), (10,))
    experiment = Experiment(objective=nested)
    assert coding_of(to_yaml(experiment)).objective == nested
    changed = load_experiment(experiment, ["objective.steps=[1, 2, 4]", "objective.objective.std=0.5"])
    assert changed.objective.steps == (1, 2, 4)
    assert changed.objective.objective.std == 0.5
    assert changed.objective.objective.objective.penalties == penalties
    other = load_experiment(
        experiment, ["objective=penalized", "objective.penalties=[spectral_power]", "objective.objective=pushforward"]
    )
    assert other.objective == Penalized(Pushforward(), (SpectralPower(),))
    with pytest.raises(ConfigError, match="objective.objective"):
        load_experiment(experiment, ["objective=noisy_inputs", "objective.objective=curriculum"])


def coding_of(text):
    import yaml

    from physml import coding
    from physml.experiment import Experiment

    return coding.from_dict(Experiment, yaml.safe_load(text))
