"""Attention factorized over axes: exact phases, kernels, and a cost that grows with the sum of the axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.fields import Axis
from physml.layers.factorized_attention import FactorizedAttention, rotary, rotate, turns


def axes_of(shape, periodic=False):
    return [Axis.uniform(name, n, 2.0, periodic=periodic) for name, n in zip("xyz", shape)]


def attention(shape, form="parallel", heads=2, width=3):
    return FactorizedAttention(len(shape), 4, heads, width, form=form, kernel_width=6, rngs=nnx.Rngs(0))


def tables_of(layer, shape):
    return layer.tables(axes_of(shape), [False] * len(shape))


def test_phases_are_right_however_many_turns_there_are():
    """A float32 product of 1e6 turns has lost the turn; the pieces have not."""
    random = np.random.default_rng(0)
    coordinates, frequencies = random.uniform(-1e3, 1e3, 50), random.standard_normal(7).astype(np.float32) * 1e3
    exact = coordinates[:, None] * frequencies.astype(float)
    exact -= np.round(exact)
    error = np.abs(np.asarray(turns(coordinates, jnp.asarray(frequencies))) - exact)
    assert np.minimum(error, 1 - error).max() < 1e-6  # a sum of eight rounded float32 numbers below one
    plain = coordinates.astype(np.float32)[:, None] * frequencies
    assert np.abs(plain - np.round(plain) - exact).max() > 1e-2


def test_rotated_products_depend_on_distances_alone():
    inverse, random = jnp.asarray([1.0, 0.1, 0.01]), np.random.default_rng(0)
    query, key = (jnp.asarray(random.standard_normal((1, 1, 1, 6)), jnp.float32) for _ in range(2))
    for distance in (0.0, 0.3):
        products = []
        for start in (0.0, 5.0):
            axis = Axis("x", (start, start + distance))
            cosine, sine = rotary(axis, inverse, whole=False)
            table = [(cosine[i : i + 1], sine[i : i + 1]) for i in range(2)]
            products.append(float(jnp.sum(rotate(query, table[0]) * rotate(key, table[1]))))
        np.testing.assert_allclose(*products, rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in ((5,), (4, 3))), (3, 4, 2)], ids=str
)
@pytest.mark.parametrize("form", ["parallel", "chained"])
def test_products_along_axes_are_the_contractions_of_the_definition(shape, form):
    layer, random = attention(shape, form), np.random.default_rng(0)
    u = jnp.asarray(random.standard_normal((2, *shape, 4)), jnp.float32)
    tables = tables_of(layer, shape)
    field = layer.norm(u)
    kernels = layer.of_axes(field, tables)
    letters = "xyz"[: len(shape)]
    values = (field @ layer.value[...].T).reshape(*field.shape[:-1], 2, 3)
    rules = [f"bhi{a},b{letters}hc->b{letters.replace(a, 'i')}hc" for a in letters]
    chain, results = values, []
    for rule, kernel in zip(rules, kernels, strict=True):
        results.append(jnp.einsum(rule, kernel, values))
        chain = jnp.einsum(rule, kernel, chain)
    space, mixed = tuple(range(1, u.ndim - 1)), 0
    for weight, phi in zip(layer.mix[...], results if form == "parallel" else [chain], strict=True):
        phi = phi.reshape(*u.shape[:-1], -1)
        phi = (phi - phi.mean(space, keepdims=True)) / jnp.sqrt(phi.var(space, keepdims=True) + 1e-5)
        mixed = mixed + phi @ weight.T
    expected = layer.last(jax.nn.gelu(mixed, approximate=False))
    np.testing.assert_allclose(layer(u, tables), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["parallel", "chained"])
def test_work_per_point_grows_linearly_with_each_axis(form):
    """Every doubling of an axis adds twice what the last one did, and nothing depends on the product of the axes."""

    def work(points, axis):
        shape = [8, 8]
        shape[axis] = points
        layer = attention(shape, form, heads=4, width=8)
        tables = tables_of(layer, shape)
        call = jax.jit(lambda u: layer(u, tables)).lower(jnp.zeros((1, *shape, 4)))
        return call.compile().cost_analysis()["flops"] / np.prod(shape)

    for axis in (0, 1):
        few, some, many = (work(points, axis) for points in (32, 64, 128))
        np.testing.assert_allclose(many - some, 2 * (some - few), rtol=0.05)
        assert some - few < 2.5 * 32 * 2 * 4 * 8  # two operations per value channel and point of the axis
