"""Optimizers and schedules against their definitions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError
from physml.training.optimizers import OPTIMIZERS, OptimizerConfig, ParameterGroup, TrainingConfig


def rates(config, steps):
    schedule = config.rate(steps)
    return np.array([float(schedule(i)) for i in range(steps)])


def test_constant_and_cosine():
    assert_allclose(rates(OptimizerConfig(schedule="constant", learning_rate=0.1), 5), 0.1)
    got = rates(OptimizerConfig(schedule="cosine", learning_rate=0.1, final=0.1), 100)
    assert_allclose(got, 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(100) / 100))), rtol=1e-4)


def test_warmup_counts_steps_or_is_a_fraction():
    for warmup in (10, 0.1):
        got = rates(OptimizerConfig(schedule="cosine", learning_rate=1.0, warmup=warmup), 100)
        assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-5)
        assert got[10] == got.max() == 1.0
        assert got[-1] < 1e-3


def test_step_decay_halves():
    got = rates(OptimizerConfig(schedule="step", learning_rate=1.0, every=0.2), 100)
    assert_allclose(got, 0.5 ** (np.arange(100) // 20), rtol=1e-6)
    with_warmup = rates(OptimizerConfig(schedule="step", learning_rate=1.0, every=20, warmup=5), 45)
    assert_allclose(with_warmup[[4, 5, 24, 25, 44]], [1, 1, 1, 0.5, 0.5], rtol=1e-6)


def test_one_cycle_rises_and_falls():
    config = OptimizerConfig(schedule="one_cycle", learning_rate=1.0)
    got = rates(config, 100)
    assert abs(got.argmax() - 30) <= 1
    assert_allclose(got[0], 1 / 25, rtol=1e-3)
    assert (np.diff(got[31:]) < 0).all()
    assert_allclose(float(config.rate(100)(100)), 1e-4 / 25, rtol=1e-2)
    assert_allclose(got[15], (1 + 1 / 25) / 2, rtol=1e-3)  # half way along a cosine ...
    assert got[3] < 1 / 25 + 0.03  # ... which begins flat


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_first_update_moves_against_the_gradient(name):
    config = OptimizerConfig(name=name, schedule="constant", learning_rate=0.1)
    transform = config.build(10)
    params = {"w": jnp.array([[1.0, 2.0]])}
    gradient = {"w": jnp.array([[0.5, -0.25]])}
    changes, _ = transform.update(gradient, transform.init(params), params)
    # adam, adamw and lion move by the rate in the direction of the sign, sgd by rate times gradient
    expected = -0.1 * (gradient["w"] if name == "sgd" else jnp.sign(gradient["w"]))
    assert_allclose(changes["w"], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_decay_is_decoupled_and_masked(name):
    params = {"bias": jnp.ones(3), "kernel": jnp.ones((3, 3))}
    zero = {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 3))}
    for decay, bias in (("all", -0.01), ("matrices", 0.0)):
        config = OptimizerConfig(name=name, schedule="constant", learning_rate=0.1, weight_decay=0.1, decay=decay)
        transform = config.build(10)
        changes, _ = transform.update(zero, transform.init(params), params)
        assert_allclose(changes["kernel"], -0.01, rtol=1e-5)
        assert_allclose(changes["bias"], bias, atol=1e-9)


def test_adam_takes_decay_into_the_gradient():
    params = {"w": jnp.full((2, 2), 3.0)}
    transform = OptimizerConfig("adam", 0.1, "constant", weight_decay=0.1).build(10)
    changes, _ = transform.update({"w": jnp.zeros((2, 2))}, transform.init(params), params)
    assert_allclose(changes["w"], -0.1, rtol=1e-4)  # sign of the penalty's gradient, as in torch.optim.Adam


def test_clipping_bounds_the_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    config = OptimizerConfig("sgd", 1.0, "constant", clip=5.0, beta1=0.0)
    changes, _ = config.build(3).update(gradient, config.build(3).init(params), params)
    assert_allclose(optax.tree.norm(changes), 5.0, rtol=1e-5)
    assert_allclose(changes["a"] / changes["b"], 0.75, rtol=1e-5)


def test_clipping_is_of_the_gradient_whatever_the_rate():
    params, gradient = {"a": jnp.zeros(2)}, {"a": jnp.array([30.0, 40.0])}
    transform = OptimizerConfig("sgd", 0.1, "constant", clip=5.0, beta1=0.0).build(3)
    changes, _ = transform.update(gradient, transform.init(params), params)
    assert_allclose(changes["a"], [-0.3, -0.4], rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_epsilon_stands_beside_the_root_of_the_second_moment(name):
    params = {"a": jnp.zeros(2)}
    transform = OptimizerConfig(name, 0.1, "constant", epsilon=1.0).build(3)
    changes, _ = transform.update({"a": jnp.array([1.0, -3.0])}, transform.init(params), params)
    assert_allclose(changes["a"], [-0.1 * 1 / 2, 0.1 * 3 / 4], rtol=1e-5)


def test_lion_keeps_more_of_the_past_than_it_steps_by():
    """Chen et al. 2023, arXiv:2302.06675: the step is the sign of beta1 m + (1 - beta1) g, then m moves by beta2."""
    params = {"a": jnp.zeros(1)}
    transform = OptimizerConfig("lion", 0.1, "constant", beta1=0.9, beta2=0.99).build(3)
    state = transform.init(params)
    for gradient, change in ((1.0, -0.1), (-1.0, 0.1)):  # 0.9 * 0.01 - 0.1 < 0
        changes, state = transform.update({"a": jnp.array([gradient])}, state, params)
        assert_allclose(changes["a"], change, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamax"}, "Did you mean 'adam"), ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": float("nan")}, "learning_rate"),
        ({"every": 3}, "every"), ({"schedule": "step"}, "every"), ({"schedule": "one_cycle", "warmup": 3}, "rise"),
        ({"weight_decay": -1.0}, "weight_decay"), ({"decay": "kernels"}, "decay"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'.*a number"), ({"clip": None}, "clip is None"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"epsilon": -1e-8}, "epsilon -1e-08"),
        ({"groups": [1]}, r"groups\[0\] is 1.*ParameterGroup"),
    ],
)  # fmt: skip
def test_wrong_optimizers_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps"), ({"batch": 0}, "batch"), ({"batch": 6, "accumulate": 4}, "Use a batch of 8"),
        ({"average": 1.0}, "average"), ({"precision": "float16"}, "precision"), ({"nonfinite": "ignore"}, "nonfinite"),
        ({"patience": 3}, "validate_every"), ({"monitor_mode": "low"}, "monitor_mode"), ({"keep": 0}, "keep"),
        ({"steps": "100"}, "steps is '100'.*an integer"), ({"steps": 10.5}, "steps is 10.5"),
        ({"updates_per_call": 2.5}, "updates_per_call is 2.5"), ({"batch": 8.0}, r"batch is 8.0.*an integer \(8\)"),
    ],
)  # fmt: skip
def test_wrong_trainings_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**fields)


def test_values_of_the_wrong_kind_are_settled_where_they_are_plain():
    config = OptimizerConfig(learning_rate="1e-3", clip=np.float32(2), groups=[ParameterGroup("bias", weight_decay=0)])
    assert (config.learning_rate, config.clip, type(config.groups)) == (1e-3, 2.0, tuple)
    assert TrainingConfig(steps=np.int64(3), epochs=2) == TrainingConfig(steps=3, epochs=2.0)
    with pytest.raises(ConfigError, match="learning_rate is 'fast'"):
        ParameterGroup("bias", learning_rate="fast")


def test_epochs_count_windows():
    config = TrainingConfig(steps=7, batch=8)
    assert config.total_steps(100) == 7
    assert dataclasses.replace(config, epochs=2).total_steps(100) == 25
    assert dataclasses.replace(config, epochs=2).total_steps(101) == 26
