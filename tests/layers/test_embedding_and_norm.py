"""Group norm, modulation, sinusoidal embedding and attention between points, against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.layers.attention import SpatialAttention
from physml.layers.group_norm import GroupNorm, modulate
from physml.layers.scalar_embedding import ScalarEmbedding, sinusoidal

FIELD = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_each_group_of_each_sample_is_standardized(groups):
    norm = GroupNorm(8, groups)
    norm.weight[...], norm.bias[...] = jnp.full(8, 2.0), jnp.full(8, 0.5)
    parts = FIELD.reshape(2, 15, groups, -1).astype(np.float64)
    parts = (parts - parts.mean((1, 3), keepdims=True)) / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(FIELD), 2 * parts.reshape(FIELD.shape) + 0.5, atol=1e-5)
    assert norm(jnp.asarray(FIELD, jnp.bfloat16)).dtype == jnp.bfloat16


def test_groups_must_be_equal():
    with pytest.raises(ConfigError, match="12 channels .* in 8 equal groups"):
        GroupNorm(12, 8)


def test_modulation_scales_by_the_first_half_and_shifts_by_the_second():
    factors = np.arange(32, dtype=np.float32).reshape(2, 16) / 10
    expected = FIELD * (1 + factors[:, None, None, :8]) + factors[:, None, None, 8:]
    np.testing.assert_allclose(modulate(FIELD, factors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 8, 9])
def test_waves_by_the_formula(channels):
    values, half = np.array([0.0, 0.3, 7.0], np.float32), channels // 2
    angles = values[:, None] * 10000.0 ** (-np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((3, channels % 2))], axis=1)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(values), channels), expected, atol=2e-6)


def test_scalars_have_perceptrons_of_their_own_that_add_up():
    embedding = ScalarEmbedding(2, 4, rngs=nnx.Rngs(0))
    scalars = jnp.asarray([[0.5, 2.0], [1.0, -1.0]])
    parts = [embedding.perceptrons[i](sinusoidal(scalars[:, i], 4)) for i in range(2)]
    np.testing.assert_allclose(embedding(scalars), parts[0] + parts[1], rtol=1e-6)
    assert embedding(scalars).shape == (2, 16)


@pytest.mark.parametrize(("heads", "width"), [(1, 0), (2, 3)])
def test_attention_weights_of_a_key_add_up_to_one(heads, width):
    """The definition, point by point, in float64."""
    layer = SpatialAttention(8, heads, width, rngs=nnx.Rngs(0))
    size = width or 8
    projected = np.asarray(layer.projection(FIELD), np.float64).reshape(2, 15, heads, 3, size)
    query, key, value = np.moveaxis(projected, 3, 0)
    weights = np.exp(np.einsum("bihd,bjhd->bhij", query, key) / np.sqrt(size))
    weights /= weights.sum(axis=2, keepdims=True)
    mixed = np.einsum("bhij,bjhd->bihd", weights, value).reshape(2, 5, 3, heads * size)
    np.testing.assert_allclose(layer(FIELD), FIELD + layer.output(mixed.astype(np.float32)), atol=1e-5)


@pytest.mark.peers
def test_group_norm_is_pytorchs():
    import torch

    theirs = torch.nn.GroupNorm(4, 8)
    torch.nn.init.normal_(theirs.weight)
    ours = GroupNorm(8, 4)
    ours.weight[...] = jnp.asarray(theirs.weight.detach().numpy())
    expected = theirs(torch.from_numpy(FIELD).permute(0, 3, 1, 2)).detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours(FIELD), expected, atol=1e-5)
