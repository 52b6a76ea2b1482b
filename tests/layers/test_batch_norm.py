"""Batch normalization: statistics of the batch in training, of many batches when used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.layers.batch_norm import BatchNorm
from physml.parallel.mesh import Layout


def fields(batch=3, shape=(4, 5), channels=2, seed=0):
    random = np.random.default_rng(seed)
    return (3 + 2 * random.standard_normal((batch, *shape, channels))).astype(np.float32)


def test_training_standardizes_the_batch_and_moves_the_running_statistics():
    norm, x = BatchNorm(2), fields()
    norm.train()
    y = np.asarray(norm(x))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_use_applies_the_running_statistics_and_leaves_them():
    norm, x = BatchNorm(2), fields()
    norm.mean[...], norm.variance[...] = jnp.array([1.0, -2.0]), jnp.array([4.0, 0.25])
    norm.weight[...], norm.bias[...] = jnp.array([1.5, 0.5]), jnp.array([0.1, 0.2])
    expected = (x - [1, -2]) / np.sqrt(np.array([4, 0.25]) + 1e-5) * [1.5, 0.5] + [0.1, 0.2]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], [1, -2])
    norm.train()
    norm.eval()
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_float32_for_bfloat16_fields():
    """8 bits cannot add up 40 000 numbers near 3."""
    norm, x = BatchNorm(1), jnp.asarray(fields(4, (100, 100), 1), jnp.bfloat16)
    norm.train()
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == jnp.float32
    np.testing.assert_allclose(norm.mean[0], 0.1 * np.asarray(x, np.float64).mean(), rtol=1e-5)


def test_a_batch_split_over_devices_counts_as_one():
    norm, x = BatchNorm(2), fields(8)
    graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            norm = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, stats))  # variables of this trace
            norm.train()
            return jnp.sum(norm(x) ** 3), nnx.state(norm, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = step(params, stats, x)
    layout = Layout(data=4)
    with layout.use():
        state, split = layout.replicate((params, stats)), jax.device_put(x, layout.window_sharding())
        assert "all-gather" not in step.lower(*state, split).compile().as_text()
        got = step(*state, split)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_one_number_per_channel_has_no_variance():
    norm = BatchNorm(2)
    norm.train()
    with pytest.raises(ConfigError, match="larger batches or a finer grid"):
        norm(np.ones((1, 1, 1, 2), np.float32))


@pytest.mark.peers
def test_training_and_use_are_those_of_torch():
    import torch

    ours, theirs = BatchNorm(3), torch.nn.BatchNorm2d(3)
    ours.train()
    for seed in range(3):
        x = fields(channels=3, seed=seed)
        y = theirs(torch.tensor(np.moveaxis(x, -1, 1)))
        np.testing.assert_allclose(ours(x), np.moveaxis(y.detach().numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(ours.variance[...], theirs.running_var, rtol=1e-5)
    ours.eval()
    y = theirs.eval()(torch.tensor(np.moveaxis(x, -1, 1)))
    np.testing.assert_allclose(ours(x), np.moveaxis(y.detach().numpy(), 1, -1), atol=1e-5)
