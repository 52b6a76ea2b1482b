"""Convolutions: what lies beyond the edge, and gradients that are right however they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.layers import convolution


@pytest.mark.parametrize(("boundary", "mode"), [("periodic", "wrap"), ("zero", "constant"), ("replicate", "edge")])
def test_the_field_beyond_the_edge(boundary, mode):
    """A mean over three points sees the padding that numpy makes."""
    layer = convolution.Convolution(1, 1, 3, [boundary], rngs=nnx.Rngs(0))
    layer.weight[...] = jnp.ones((3, 1, 1)) / 3
    layer.bias[...] = jnp.zeros(1)
    x = np.arange(5.0, dtype=np.float32)
    padded = np.pad(x, 1, mode=mode)
    expected = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    np.testing.assert_allclose(layer(jnp.asarray(x)[None, :, None])[0, :, 0], expected, rtol=1e-6)


def test_periodic_convolution_commutes_with_shifts():
    layer = convolution.Convolution(2, 3, 3, ["periodic", "periodic"], dilation=2, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (1, 8, 6, 2))
    shifted = jnp.roll(layer(x), (3, -2), (1, 2))
    np.testing.assert_allclose(layer(jnp.roll(x, (3, -2), (1, 2))), shifted, atol=1e-6)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("dilation", "kernel", "padding"), [(1, 3, (1, 1)), (2, 3, (2, 2)), (1, 5, (0, 0)), (2, 3, (1, 3))]
)
def test_convolve_has_the_gradients_of_the_plain_convolution(ndim, dilation, kernel, padding):
    shape = (9, 7, 8)[:ndim]
    keys = jax.random.split(jax.random.key(ndim), 3)
    x = jax.random.normal(keys[0], (2, *shape, 3))
    weight = jax.random.normal(keys[1], (*(kernel,) * ndim, 3, 4))
    pads = (padding,) * ndim
    space = "DHW"[3 - ndim :]

    def plain(x, weight):
        return jax.lax.conv_general_dilated(
            x, weight, (1,) * ndim, pads, rhs_dilation=(dilation,) * ndim,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        )  # fmt: skip

    expected, pull = jax.vjp(plain, x, weight)
    value, pull_ours = jax.vjp(lambda x, w: convolution.convolve(x, w, pads, dilation), x, weight)
    np.testing.assert_array_equal(value, expected)
    cotangent = jax.random.normal(keys[2], expected.shape)
    for ours, theirs in zip(pull_ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))
