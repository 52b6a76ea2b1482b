"""What is particular to the factorized FNO: axes one by one, shared weights, noise in training, layers in a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.models.ffno import FFNOConfig, standard_positions

CONFIG = FFNOConfig(width=6, modes=(4,), depth=2, expansion=2, projection=8)
NONE = np.zeros((1, 0), np.float32)


def signature(*shape):
    return Signature(Grid(tuple(Axis.uniform(name, n) for name, n in zip("xyz", shape))), 1, 0, 1)


def build(config=CONFIG, shape=(9, 8)):
    return config.build(signature(*shape), nnx.Rngs(0))


def fields(*shape):
    return np.random.default_rng(0).standard_normal((1, *shape, 1)).astype(np.float32)


@pytest.mark.parametrize("mixing", ["full", "low-pass", "none"])
def test_without_positions_it_commutes_with_translation(mixing):
    config = dataclasses.replace(CONFIG, mixing=mixing)
    for positions in (False, True):
        model, x = build(dataclasses.replace(config, positions=positions)), fields(9, 8)
        moved = model(np.roll(x, 3, axis=1), NONE)
        assert np.allclose(moved, np.roll(model(x, NONE), 3, axis=1), atol=1e-4) is not positions


def test_a_line_is_mixed_along_itself_alone():
    """One layer moves what happens at a point along the axes through it, not to other points."""
    model, x = build(dataclasses.replace(CONFIG, depth=1)), fields(9, 8)
    changed = x.copy()
    changed[0, 4, 5] += 1
    felt = np.abs(np.asarray(model(changed, NONE) - model(x, NONE)))[0, :, :, 0] > 1e-6
    assert felt[4].any()
    assert felt[:, 5].any()
    felt[4], felt[:, 5] = False, False
    assert not felt.any()


@pytest.mark.parametrize("shared", [False, True])
def test_layers_in_a_loop_are_layers_in_turn(shared):
    config = dataclasses.replace(CONFIG, depth=9, share_fourier=shared)
    model, seen = build(config), {}
    hidden = model.lift(fields(9, 8), NONE)
    in_turn = model.run(hidden, visit=lambda i, state: seen.update({i: state}))
    np.testing.assert_allclose(model.run(hidden), in_turn, rtol=1e-4, atol=1e-5)
    assert list(seen) == list(range(9))


def test_deep_networks_are_not_longer_programs():
    def length(depth):
        graph, state = nnx.split(build(dataclasses.replace(CONFIG, depth=depth)))
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, NONE))
        return len(run.lower(state, fields(9, 8)).as_text())

    assert length(24) < 1.1 * length(8)


def test_noise_and_dropout_act_in_training_only():
    key, x = jax.random.key(0), fields(9, 8)
    for options in ({"noise": 0.1}, {"dropout": 0.2}, {"input_dropout": 0.2}):
        model = build(dataclasses.replace(CONFIG, **options))
        assert model.dropout > 0  # so that a stepper hands it the key
        plain = model(x, NONE)
        np.testing.assert_array_equal(model(x, NONE, key=key), plain)
        model.train()
        drawn = model(x, NONE, key=key)
        assert float(jnp.abs(drawn - plain).max()) > 1e-4
        np.testing.assert_array_equal(model(x, NONE, key=key), drawn)
        assert not np.array_equal(model(x, NONE, key=jax.random.key(1)), drawn)
        np.testing.assert_array_equal(model(x, NONE), plain)
        model.eval()
        np.testing.assert_array_equal(model(x, NONE, key=key), plain)


def test_positions_have_unit_variance_over_the_grid():
    positions = standard_positions((5, 1, 3)).reshape(-1, 3)
    np.testing.assert_allclose(positions.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(positions.std(0, ddof=1), [1, 0, 1])


def test_lengths_alone_scale_a_weight_normalized_map():
    model, x = build(), fields(9, 8)
    before = model(x, NONE)
    model.lifting.direction[...] = 3 * model.lifting.direction[...]
    np.testing.assert_allclose(model(x, NONE), before, rtol=1e-4, atol=1e-5)
    model.readout.length[...], model.readout.bias[...] = 2 * model.readout.length[...], 2 * model.readout.bias[...]
    np.testing.assert_allclose(model(x, NONE), 2 * before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": (6,)}, r"at most \(5, 5\)"),
        ({"modes": (2, 2, 2)}, "has 3 numbers, but the grid has 2 axes"),
        ({"mixing": "high-pass"}, "Did you mean 'low-pass'"),
        ({"dropout": 1.0}, "below 1"),
        ({"noise": -0.1}, "not negative"),
        ({"depth": 0}, "must be positive"),
        ({"spectral": "dft"}, "spectral is 'dft'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(dataclasses.replace(CONFIG, **options))


def test_a_coarser_grid_that_lacks_the_modes_is_refused():
    with pytest.raises(ConfigError, match=r"grid of \(9, 5\) points"):
        build()(fields(9, 5), NONE)
