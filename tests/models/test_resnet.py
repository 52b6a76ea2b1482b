"""What is particular to the residual network: it sees a stated distance, and boundaries are those of the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.layers.convolution import Convolution, pad_boundary
from physml.models.resnet import ResNetConfig


def build(periodic=(True, False), **options):
    grid = Grid(tuple(Axis.uniform(n, k, periodic=p) for n, k, p in zip("xy", (16, 12), periodic)))
    config = ResNetConfig(**{"width": 4, "depth": 1, **options})
    return config.build(Signature(grid, 1, 0, 1), nnx.Rngs(0))


def run(model, fields):
    return np.asarray(model(fields, np.zeros((len(fields), 0), np.float32)))


def test_commutes_with_translation_along_periodic_axes_only():
    fields = np.random.default_rng(0).standard_normal((1, 16, 12, 1)).astype(np.float32)
    model = build()
    for axis, commutes in ((1, True), (2, False)):
        moved = np.roll(run(model, fields), 3, axis=axis)
        assert np.allclose(run(model, np.roll(fields, 3, axis=axis)), moved, atol=1e-5) is commutes


def test_a_point_is_felt_as_far_as_the_dilated_kernels_reach():
    fields = np.zeros((1, 16, 12, 1), np.float32)
    model = build(dilations=(2,), depth=1)
    before = run(model, fields)
    fields[0, 8, 6] = 1.0
    felt = np.argwhere(np.abs(run(model, fields) - before)[0, :, :, 0] > 0)
    assert np.abs(felt - [8, 6]).max(axis=0).tolist() == [6, 6] or np.abs(felt - [8, 6]).max() == 6  # 1 + 2 + 2 + 1


@pytest.mark.parametrize(("boundary", "name"), [("periodic", "wrap"), ("replicate", "edge"), ("reflect", "reflect")])
def test_padding_is_what_numpy_calls_it(boundary, name):
    fields = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(pad_boundary(fields, 2, [boundary]), np.pad(fields, [(0, 0), (2, 2), (0, 0)], name))


def test_convolution_is_the_sum_over_its_taps():
    convolution = Convolution(2, 3, 3, ["periodic"], dilation=2, rngs=nnx.Rngs(0))
    fields = np.random.default_rng(0).standard_normal((2, 7, 2)).astype(np.float32)
    weight = np.asarray(convolution.weight[...])
    expected = sum(np.roll(fields, -2 * (i - 1), axis=1) @ weight[i] for i in range(3)) + np.asarray(
        convolution.bias[...]
    )
    np.testing.assert_allclose(convolution(fields), expected, atol=1e-5)


def test_even_kernels_and_unknown_boundaries_are_refused():
    with pytest.raises(ConfigError, match="Use kernel 3 or 5"):
        build(kernel=4)
    with pytest.raises(ConfigError, match="boundary is 'mirror'"):
        build(boundary="mirror")
    with pytest.raises(ConfigError, match="Did you mean 'periodic'"):
        Convolution(1, 1, 3, ["periodical"], rngs=nnx.Rngs(0))


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    grid = Grid((Axis.uniform("x", 12),))
    model = ResNetConfig(width=16, depth=2, dropout=0.25).build(Signature(grid, 1, 0, 1), nnx.Rngs(0))
    x, none = jax.random.normal(jax.random.key(0), (2, 12, 1)), jnp.zeros((2, 0))
    plain, key = model(x, none), jax.random.key(1)
    np.testing.assert_array_equal(model(x, none, key=key), plain)
    model.train()
    dropped = model(x, none, key=key)
    assert float(jnp.abs(dropped - plain).max()) > 1e-4
    np.testing.assert_array_equal(model(x, none, key=key), dropped)
    np.testing.assert_array_equal(model(x, none), plain)
    hidden = jnp.ones((2000, 12, 16))
    kept = model._kept(hidden, key, 0)
    assert kept.shape == (2000, 1, 16)  # whole channels of a sample
    np.testing.assert_allclose(kept.mean(), 1.0, atol=0.02)
    np.testing.assert_allclose((kept == 0).mean(), 0.25, atol=0.02)
    model.eval()
    np.testing.assert_array_equal(model(x, none, key=key), plain)
