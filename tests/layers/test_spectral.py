"""Laws of the spectral convolution: both paths equal, equal to a convolution, cut and shifted as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.layers import spectral
from physml.layers.spectral import SpectralConvolution, bands, kept_modes, prefers_matmul, tucker_ranks

GRIDS = [((8,), (6,)), ((7,), (3,)), ((8, 10), (4, 6)), ((7, 9), (5, 4)), ((6, 5), (12, 12)), ((4, 5, 6), (4, 3, 4))]


def layer(modes, path="auto", inputs=2, outputs=3, **options):
    return SpectralConvolution(inputs, outputs, kept_modes(modes), path=path, rngs=nnx.Rngs(0), **options)


def field(shape, inputs=2, batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((inputs, batch, *shape)).astype(np.float32)


def reference(conv: SpectralConvolution, x):
    """Straight from the definition, frequency by frequency, in float64."""
    shape = x.shape[2:]
    weight = np.asarray(conv.weight[...], np.float64)
    weight = weight[..., 0] + 1j * weight[..., 1]
    spectrum = np.fft.rfftn(np.asarray(x, np.float64), axes=range(2, x.ndim))
    out = np.zeros((conv.outputs, *spectrum.shape[1:]), complex)
    plan = bands(shape, conv.kept, excess=conv.excess)
    for index in np.ndindex(*(band.count for band in plan)):
        k = tuple((band.first + i) % band.points for band, i in zip(plan, index, strict=True))
        w = weight[tuple(band.offset + i for band, i in zip(plan, index, strict=True))]
        out[(slice(None), slice(None), *k)] = np.einsum("ib,io->ob", spectrum[(slice(None), slice(None), *k)], w)
    y = np.fft.irfftn(out, s=shape, axes=range(2, x.ndim))
    return y + np.asarray(conv.bias[...]).reshape(-1, *(1,) * (x.ndim - 1))


@pytest.mark.parametrize("path", ["fft", "matmul"])
@pytest.mark.parametrize(("shape", "modes"), GRIDS)
def test_equals_the_definition(shape, modes, path):
    conv, x = layer(modes, path), field(shape)
    np.testing.assert_allclose(jax.jit(lambda x: conv(x))(x), reference(conv, x), atol=5e-6)


@pytest.mark.parametrize(("shape", "modes"), GRIDS)
@pytest.mark.parametrize("options", [{"legacy_shift": True}, {"excess": "end"}])
def test_paths_have_equal_values_and_gradients(shape, modes, options):
    x = field(shape)

    def gradients(path):
        graph, state = nnx.split(layer(modes, path, **options))
        return jax.jit(jax.value_and_grad(lambda s, x: jnp.sum(nnx.merge(graph, s)(x) ** 3), argnums=(0, 1)))(state, x)

    for a, b in zip(jax.tree.leaves(gradients("fft")), jax.tree.leaves(gradients("matmul")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max() + 1e-6)


def test_commutes_with_translation():
    """A convolution does not know where it is: shifting the input shifts the output."""
    conv, x = layer((6, 6)), field((9, 8))
    shifted = conv(jnp.roll(x, (2, 3), axis=(2, 3)))
    np.testing.assert_allclose(shifted, jnp.roll(conv(x), (2, 3), axis=(2, 3)), atol=5e-6)


def test_legacy_shift_displaces_odd_axes_by_one_frequency():
    x = field((7, 8))
    plain, legacy = layer((4, 4))(x), layer((4, 4), legacy_shift=True)(x)
    np.testing.assert_allclose(layer((4, 4), legacy_shift=True)(field((8, 7))), layer((4, 4))(field((8, 7))), atol=1e-6)
    a, b = np.fft.fft2(plain[0, 0] - plain[0, 0].mean()), np.fft.fft2(legacy[0, 0] - legacy[0, 0].mean())
    np.testing.assert_allclose(b[:, 1], np.roll(a[:, 1], -1), atol=1e-4)  # an inner column: no symmetry partner


def test_same_function_on_a_finer_grid():
    """A band-limited field and its samples on twice the points give the same function."""
    conv = layer((6, 6), outputs=2)
    position = [np.arange(n) / n for n in (12, 24)]
    fields = [np.cos(2 * np.pi * (p[:, None] + 2 * p)) + np.sin(2 * np.pi * p[:, None]) for p in position]
    coarse, fine = (conv(np.stack([f, f**2])[:, None].astype(np.float32)) for f in fields)
    np.testing.assert_allclose(fine[:, :, ::2, ::2], coarse, atol=1e-5)


def test_excess_modes_are_cut_on_both_sides_or_behind():
    center, end = bands((5, 6), (8, 9)), bands((5, 6), (8, 9), excess="end")
    assert (center[0].offset, center[0].count, center[0].first) == (1, 5, -2)
    assert (end[0].offset, end[0].count, end[0].first) == (0, 5, -4)  # -4 .. 0, the first block's -4..-1 whole
    assert (center[1].offset, center[1].count) == (0, 4)


def test_tucker_equals_its_dense_weight():
    sizes = (2, 3, 4, 3)
    factored = layer((4, 4), ranks=(2, 2, 3, 2))
    core, *factors = (
        np.asarray(p[...])[..., 0] + 1j * np.asarray(p[...])[..., 1] for p in (factored.core, *factored.factors)
    )
    weight = np.einsum("abcd,ia,ob,kc,ld->klio", core, *factors)
    assert weight.shape == (*sizes[2:], *sizes[:2])
    dense = layer((4, 4))
    dense.weight[...] = jnp.asarray(np.stack([weight.real, weight.imag], -1), jnp.float32)
    dense.bias[...] = factored.bias[...]
    for shape in ((8, 8), (3, 5)):
        np.testing.assert_allclose(factored(field(shape)), dense(field(shape)), atol=5e-6)


def test_tucker_ranks_hold_the_asked_fraction():
    assert tucker_ranks((10, 10, 8, 5), 0.3) == (7, 7, 6, 4)  # recorded from tensorly
    sizes, ranks = (64, 64, 32, 17), tucker_ranks((64, 64, 32, 17), 0.1)
    held = np.prod(ranks) + sum(a * b for a, b in zip(sizes, ranks, strict=True))
    assert abs(held / np.prod(sizes) - 0.1) < 0.01


def test_initial_weights_have_the_stated_variance():
    dense = layer((24, 24), inputs=16, outputs=16).weight[...]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(dense[..., 0] ** 2 + dense[..., 1] ** 2)), np.sqrt(2 / 32), rtol=0.02)


def test_cost_model_takes_the_matrix_path_for_few_modes_only():
    assert prefers_matmul(bands((64, 64), kept_modes((16, 16))))
    assert not prefers_matmul(bands((512, 512), kept_modes((512, 512))))
    assert "auto" in spectral.PATHS


def test_rejects_unknown_paths_and_ranks_of_space():
    with pytest.raises(ConfigError, match="Did you mean 'fft'"):
        layer((4,), path="ffts")
    with pytest.raises(ConfigError, match="1-dimensional, but the field has 2"):
        layer((4,))(field((4, 4)))
