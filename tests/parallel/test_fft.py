"""Laws of the FFT helper: it is numpy's FFT, and on a mesh no sample leaves its device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from physml.errors import ConfigError
from physml.parallel.fft import irfftn, rfftn
from physml.parallel.mesh import Layout


def field(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("space", [(7,), (6, 5), (4, 3, 6)])
def test_is_the_fft_of_numpy_and_inverts(space, norm):
    x, axes = field(2, *space, 3), tuple(range(1, 1 + len(space)))
    spectrum = rfftn(x, axes, norm=norm)
    np.testing.assert_allclose(spectrum, np.fft.rfftn(x, axes=axes, norm=norm), atol=2e-5)
    np.testing.assert_allclose(irfftn(spectrum, space, axes, norm=norm), x, atol=2e-6)


def test_half_precision_is_transformed_in_float32():
    x = jnp.asarray(field(2, 8), jnp.bfloat16)
    spectrum = rfftn(x, (1,))
    assert spectrum.dtype == jnp.complex64
    np.testing.assert_allclose(spectrum, np.fft.rfft(np.asarray(x, np.float32)), atol=1e-5)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        x = field(2, 9, dtype=np.float64)
        np.testing.assert_allclose(rfftn(x, (1,)), np.fft.rfft(x), atol=1e-13)


def test_rejects_bad_axes_and_norms():
    x = field(2, 4, 4)
    with pytest.raises(ConfigError, match="batch axis"):
        rfftn(x, (0, 1))
    with pytest.raises(ConfigError, match="different axes"):
        rfftn(x, (1, 1))
    with pytest.raises(ConfigError, match="'Forward'.*'forward'"):
        rfftn(x, (1,), norm="Forward")


def loss(x):
    spectrum = rfftn(x, (1, 2))
    return jnp.sum(irfftn(spectrum * (1 + jnp.arange(spectrum.shape[2]))[:, None], x.shape[1:3], (1, 2)) ** 3)


def test_split_batch_is_transformed_where_it_is():
    """The trap: plain `jnp.fft` gathers the whole batch on every device, forward and backward."""
    layout, x = Layout(data=4), field(8, 6, 5, 2)
    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(x)
    with layout.use():
        split = jax.device_put(x, layout.window_sharding())
        compiled = step.lower(split).compile()
        assert "all-gather" not in compiled.as_text()
        assert "all-to-all" not in compiled.as_text()
        got, got_gradient = step(split)
    assert got_gradient.sharding.is_equivalent_to(layout.window_sharding(), x.ndim)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, rtol=1e-4, atol=1e-3)


def test_plain_fft_does_gather():
    """Without this failing case the assertion above would prove nothing. (jax 0.12 no longer gathers a split batch.)"""
    if jax.__version_info__ >= (0, 12):
        pytest.skip("XLA keeps a split batch split from jax 0.12 on")
    layout = Layout(data=4)
    with layout.use():
        split = jax.device_put(field(8, 6, 5, 2), layout.window_sharding())
        compiled = jax.jit(lambda x: jnp.fft.rfftn(x, axes=(1, 2))).lower(split).compile()
    assert "all-gather" in compiled.as_text()


@pytest.mark.parametrize("batch", [3, 1])
def test_batch_that_does_not_divide_falls_back(batch):
    x = field(batch, 6, 5, 2)
    with Layout(data=4).use():
        np.testing.assert_allclose(jax.jit(loss)(x), loss(x), rtol=1e-5)


def test_works_under_vmap_scan_and_shard_map():
    layout, x = Layout(data=4), field(3, 8, 6, 5, 2)
    expected = np.stack([np.fft.rfftn(member, axes=(1, 2)) for member in x])
    with layout.use():
        mapped = jax.jit(jax.vmap(lambda u: rfftn(u, (1, 2))))(x)
        _, scanned = jax.jit(lambda x: jax.lax.scan(lambda c, u: (c, rfftn(u, (1, 2))), 0, x))(x)
        split = jax.sharding.PartitionSpec(None, "data")
        inner = jax.shard_map(jax.vmap(lambda u: rfftn(u, (1, 2))), mesh=layout.mesh, in_specs=split, out_specs=split)
        manual = jax.jit(inner)(x)
    for result in (mapped, scanned, manual):
        np.testing.assert_allclose(result, expected, atol=2e-5)
