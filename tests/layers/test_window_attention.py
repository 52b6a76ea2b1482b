"""Windows, masks, position bias and cosine attention against their definitions, written out in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.layers.window_attention import HIDDEN_PAIR, PositionBias, WindowAttention, Windows, attend

GRIDS = [
    Windows((6, 4), (3, 2)),
    Windows((5, 7), (3, 4), (1, 2)),
    Windows((6, 6), (3, 3), (1, 1), (True, False)),
    Windows((4, 4), (4, 4)),
]


@pytest.mark.parametrize("windows", GRIDS, ids=str)
def test_joining_undoes_partitioning(windows):
    x = np.random.default_rng(0).standard_normal((2, *windows.shape, 3)).astype(np.float32)
    parts = windows.partition(x)
    assert parts.shape == (2, np.prod(windows.count), np.prod(windows.size), 3)
    np.testing.assert_array_equal(windows.join(parts), x)


@pytest.mark.parametrize("windows", GRIDS, ids=str)
def test_tokens_see_each_other_only_where_they_are_neighbors(windows):
    """Two tokens of a window are hidden from each other if and only if the shift brought them round an open edge."""
    rows, columns = windows.padded
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    whole = Windows((rows, columns), windows.size, windows.shift)
    parts = np.asarray(whole.partition(jnp.asarray(places[None], jnp.float32)))[0].astype(int)
    mask = windows.mask()
    for window, tokens in enumerate(parts):
        far = np.zeros((len(tokens), len(tokens)), bool)
        for axis in range(2):
            open_ = not (windows.wrap[axis] and windows.shape[axis] == windows.padded[axis])
            place = tokens[:, axis]
            far |= open_ & (np.abs(place[:, None] - place) >= windows.size[axis])
        expected = np.where(far, HIDDEN_PAIR, 0)
        assert_allclose(0 if mask is None else mask[window], expected)


@pytest.mark.parametrize("size", [(3, 2), (1, 4), (1, 1)])
def test_position_bias_of_every_pair(size):
    bias = PositionBias(2, size, rngs=nnx.Rngs(0))
    table, first, second = bias(), bias.mlp.first, bias.mlp.second
    tokens = list(itertools.product(range(size[0]), range(size[1])))
    for (p, query), (q, key) in itertools.product(enumerate(tokens), repeat=2):
        u = np.array([8 * (a - b) / max(n - 1, 1) for a, b, n in zip(query, key, size, strict=True)])
        u = np.sign(u) * np.log2(np.abs(u) + 1) / 3
        hidden = np.maximum(u @ np.asarray(first.weight[...]) + np.asarray(first.bias[...]), 0)
        assert_allclose(table[:, p, q], 16 / (1 + np.exp(-hidden @ np.asarray(second.weight[...]))), rtol=1e-5)


def case(mask=True):
    random = np.random.default_rng(0)
    query, key, value = (random.standard_normal((2, 3, 2, 5, 4)).astype(np.float32) for _ in range(3))
    hidden = np.where(random.random((3, 5, 5)) < 0.3, HIDDEN_PAIR, 0).astype(np.float32) if mask else None
    return query, key, value, np.full((2, 1, 1), 3, np.float32), random.standard_normal((2, 5, 5)), hidden


def plain(query, key, value, scale, bias, mask):
    scores = jnp.einsum("bwhqc,bwhkc->bwhqk", query, key) * scale + bias
    return jax.nn.softmax(scores if mask is None else scores + mask[:, None]) @ value


@pytest.mark.parametrize("mask", [True, False])
def test_written_gradient_of_attention_is_the_derived_one(mask):
    *arrays, hidden = case(mask)
    assert_allclose(attend(*arrays, hidden), plain(*arrays, hidden), rtol=1e-5, atol=1e-6)
    weights = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    gradients = (
        jax.grad(lambda *a, f=f: jnp.sum(f(*a, hidden) * weights), range(5))(*map(jnp.asarray, arrays))
        for f in (attend, plain)
    )
    for ours, derived in zip(*gradients, strict=True):
        assert_allclose(ours, derived, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_tangents_and_curvatures_of_attention_are_the_derived_ones(mask):
    """Mapped over two directions, too."""
    *arrays, hidden = case(mask)
    random = np.random.default_rng(2)
    directions = [random.standard_normal((2, *array.shape)).astype(np.float32) for array in arrays]

    def derive(attention):
        def loss(*arrays):
            return jnp.sum(jnp.sin(attention(*arrays, hidden)))

        def along(*directions):
            tangent = jax.jvp(lambda *arrays: attention(*arrays, hidden), arrays, directions)[1]
            return tangent, jax.jvp(jax.grad(loss, range(5)), arrays, directions)[1]

        return jax.jit(jax.vmap(along))(*directions), jax.jit(along)(*(direction[0] for direction in directions))

    arrays = tuple(jnp.asarray(array, jnp.float32) for array in arrays)
    for ours, derived in zip(*(jax.tree.leaves(derive(f)) for f in (attend, plain)), strict=True):
        assert_allclose(ours, derived, rtol=1e-3, atol=1e-4 * np.abs(derived).max())


def test_dropped_weights_count_nothing():
    *arrays, hidden = case()
    ones = jnp.ones((2, 3, 2, 5, 5))
    assert_allclose(attend(*arrays, hidden, ones), attend(*arrays, hidden), rtol=1e-5, atol=1e-6)
    assert not np.any(attend(*arrays, hidden, 0 * ones))


def test_tokens_of_zeros_have_finite_gradients():
    """Places behind the end of the grid have keys of length zero, where a norm has no derivative."""
    attention = WindowAttention(4, 2, (2, 2), bias=False, rngs=nnx.Rngs(0))
    gradient = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2))(attention, jnp.zeros((1, 1, 4, 4)).at[0, 0, 0].set(1.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
