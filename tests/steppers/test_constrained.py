"""Constraints put on a stepper that exists already."""

import jax
import numpy as np
import pytest
from flax import nnx

import physml
from physml.constraints.text import from_text
from physml.errors import ConfigError, SpecError
from physml.models.fno import FNOConfig
from physml.rollout import rollout
from physml.steppers import PersistenceConfig, ResidualConfig
from physml.steppers.describe import build_stepper, configs


@pytest.fixture
def stepper(spec, window):
    normalizer = physml.Normalizer.fit([jax.tree.map(lambda x: x[0], window)])
    return build_stepper(ResidualConfig(), FNOConfig(modes=(3, 3), width=8, depth=1), spec, normalizer)


def mass(frames, channel=0):
    return np.asarray(frames, np.float64)[..., channel].mean((-2, -1))


def test_a_rollout_keeps_the_mass_from_the_first_step_on(stepper, window):
    steps, start = 300, window.slice(0, 1)
    run = nnx.jit(lambda stepper, window: rollout(stepper, window, steps))
    free = run(stepper, start)
    fixed = run(physml.constrain(stepper, physml.MassFixer("u")), start)
    target = mass(start.frames)[:, :1]

    def drift(frames):  # relative to the values, which an untrained network lets grow
        return np.abs(mass(frames) - target) / np.abs(np.asarray(frames)[..., 0]).mean((-2, -1))

    assert drift(free)[:, -1].max() > 1e-2
    assert drift(fixed).max() <= 1e-6


def test_constraints_go_on_and_off(stepper):
    assert stepper.constraints is None
    once = physml.constrain(stepper, physml.MassFixer("u"))
    twice = physml.constrain(once, physml.Positivity("v"))
    assert stepper.constraints is None
    assert list(twice.constraints) == [physml.MassFixer("u"), physml.Positivity("v")]
    assert physml.constrain(twice, keep=False).constraints is None
    assert list(physml.constrain(twice, physml.MassFixer("v"), keep=False).constraints) == [physml.MassFixer("v")]


def test_constraints_are_saved_with_the_weights(stepper, window, tmp_path):
    fixed = physml.constrain(stepper, physml.MassFixer(("u", "v"), "multiplicative", positive=True))
    physml.save(fixed, tmp_path / "model")
    loaded = physml.load(tmp_path / "model")
    assert list(loaded.constraints) == list(fixed.constraints)
    assert configs(loaded)["constraints"][0]["method"] == "multiplicative"
    np.testing.assert_array_equal(rollout(loaded, window.slice(0, 1), 2), rollout(fixed, window.slice(0, 1), 2))


def test_members_are_constrained_one_by_one(stepper, spec, window):
    other = build_stepper(
        ResidualConfig(), FNOConfig(modes=(3, 3), width=8, depth=1), spec, stepper.normalizer, seed=1
    )  # fmt: skip
    both = physml.constrain(physml.stack_members([stepper, other]), physml.MassFixer("u"))
    assert list(both.constraints) == [physml.MassFixer("u")]
    predicted = rollout(both, window.slice(0, 1), 4)
    target = mass(window.frames)[:, 0].reshape(-1, *[1] * (mass(predicted).ndim - 1))
    np.testing.assert_allclose(mass(predicted), np.broadcast_to(target, mass(predicted).shape), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("mass:rho", physml.MassFixer("rho")),
        ("mass:co2,ch4:method=multiplicative:positive=true",
         physml.MassFixer(("co2", "ch4"), "multiplicative", positive=True)),
        ("positivity:rho:floor=0.5", physml.Positivity("rho", 0.5)),
    ],
)  # fmt: skip
def test_text(text, constraint):
    assert from_text(text) == constraint


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mas:rho", "no constraint 'mas'.*Did you mean 'mass'"),
        ("mass:rho:gradient", "method=multiplicative"),
        ("mass:rho:methd=gradient", "method"),
        ("mass:rho:method=gradual", "gradient"),
        ("mass", "channels"),
    ],
)
def test_wrong_text(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        from_text(text)


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        (physml.MassFixer("w"), "no channel 'w'"),
        (physml.MassFixer("u", density="air"), "no field 'air'"),
        (physml.MassFixer("u", density="u"), "its own density"),
        (physml.MassFixer("u", sources="flux"), "no forcing field 'flux'"),
        (physml.MassFixer("u", total="m"), "no parameter 'm'"),
        (physml.MassFixer("u", separately="z"), "no axis 'z'"),
        (physml.MassFixer("u", separately=("x", "y")), "every axis"),
    ],
)
def test_names_that_the_data_do_not_have(stepper, constraint, sentence):
    with pytest.raises(SpecError, match=sentence):
        physml.constrain(stepper, constraint)


def test_what_cannot_be_constrained(spec, stepper):
    with pytest.raises(ConfigError, match="takes no constraints"):
        physml.constrain(PersistenceConfig().build(spec), physml.MassFixer("u"))
    with pytest.raises(ConfigError, match="no constraint"):
        physml.constrain(stepper, "mass:u")


@pytest.mark.parametrize(
    "options",
    [{"channels": ()}, {"sources": ("a", "b")}, {"total": "m", "sources": "a"}, {"total": "m", "separately": "x"},
     {"method": "gradual"}],
)  # fmt: skip
def test_contradictory_options(options):
    with pytest.raises(ConfigError):
        physml.MassFixer(**{"channels": ("a", "b", "c"), **options})
