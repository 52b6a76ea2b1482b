"""What is particular to the Fourier neural operators: modes and grids, options, positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.models.classic_fno import ClassicFNOConfig
from physml.models.fno import FNOConfig, per_axis


def signature(*shape, inputs=1):
    return Signature(Grid(tuple(Axis.uniform(n, k) for n, k in zip("xyz", shape))), inputs, 0, 1)


def fields(*shape, inputs=1, seed=0):
    return np.random.default_rng(seed).standard_normal((1, *shape, inputs)).astype(np.float32), np.zeros(
        (1, 0), np.float32
    )


def test_modes_larger_than_the_grid_are_refused_with_what_fits():
    with pytest.raises(ConfigError, match=r"at most \(10, 16\).*allow_excess_modes"):
        FNOConfig(modes=(16,)).build(signature(10, 64), nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"at most \(5, 12\)"):
        ClassicFNOConfig(modes=(12,)).build(signature(10, 64), nnx.Rngs(0))


def test_padding_makes_room_for_modes():
    model = FNOConfig(width=4, modes=(14,), domain_padding=(0.2,)).build(signature(10), nnx.Rngs(0))
    assert model(*fields(10)).shape[1] == 10
    with pytest.raises(ConfigError, match="modes"):
        FNOConfig(width=4, modes=(14,)).build(signature(10), nnx.Rngs(0))


def test_excess_modes_are_unused():
    """The weights that a grid has no frequency for do not matter on it."""
    config = FNOConfig(width=4, modes=(9, 9), depth=1, allow_excess_modes=True)
    model, inputs = config.build(signature(6, 6), nnx.Rngs(0)), fields(6, 6)
    before = model(*inputs)
    weight = model.blocks[0].convolution.weight
    weight[...] = weight[...].at[0].set(1e3).at[-2:].set(1e3).at[:, 4:].set(1e3)
    np.testing.assert_array_equal(model(*inputs), before)
    weight[...] = weight[...].at[1].set(1e3)
    assert not np.allclose(model(*inputs), before)


def test_without_positions_it_commutes_with_translation():
    """On a periodic domain only the positions break the symmetry."""
    inputs = fields(9, 8)
    for positions in (False, True):
        model = FNOConfig(width=4, modes=(4,), depth=2, positions=positions).build(signature(9, 8), nnx.Rngs(0))
        moved = model(np.roll(inputs[0], 3, axis=1), inputs[1])
        assert np.allclose(moved, np.roll(model(*inputs), 3, axis=1), atol=1e-5) is not positions


def test_resolution_does_not_change_the_operator():
    """A smooth field sampled twice as finely gives the same function at the common points."""
    config = FNOConfig(width=6, modes=(8, 8), depth=2)
    model = config.build(signature(32, 32), nnx.Rngs(0))
    outputs = []
    for n in (32, 64):
        x, y = np.meshgrid(np.arange(n) / n, np.arange(n) / n, indexing="ij")
        smooth = (np.sin(2 * np.pi * x) * np.cos(2 * np.pi * y))[None, ..., None].astype(np.float32)
        outputs.append(model(smooth, np.zeros((1, 0), np.float32)))
    # Pointwise layers alias what exceeds the coarse grid, so agreement is close, not exact.
    assert np.abs(outputs[1][:, ::2, ::2] - outputs[0]).max() < 0.02 * np.abs(outputs[0]).max()


def test_classic_blocks_that_overlap_let_the_negative_one_win():
    """2 m > n: the 2021 code writes frequencies 0 .. m-1 first and -m .. -1 over them."""
    config = ClassicFNOConfig(width=2, modes=(3, 2), depth=1, allow_excess_modes=True)
    model, inputs = config.build(signature(5, 6), nnx.Rngs(0)), fields(5, 6)
    before = model(*inputs)
    weight = model.blocks[0].convolution.weight  # rows: -3, -2, -1, 0, 1, 2; on five points 2 = -3
    weight[...] = weight[...].at[5].set(1e3)
    np.testing.assert_array_equal(model(*inputs), before)
    weight[...] = weight[...].at[0].set(1e3)
    assert not np.allclose(model(*inputs), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"modes": (4, 4, 4)}, "has 3 numbers, but the grid has 2 axes: give one, or 2."),
        ({"skip": "soft_gating"}, "Did you mean 'soft-gating'"),
        ({"norm": "layer"}, "norm is 'layer'.* Valid: group_norm, instance_norm, none"),
        ({"width": 0}, "positive width"),
        ({"spectral": "dft"}, "spectral is 'dft'"),
        ({"factorization": "tucker", "rank": (2, 2)}, "the weights have 4 axes"),
        ({"dtype": "float16"}, "Did you mean 'bfloat16'"),
        ({"domain_padding": (-0.1,)}, "must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FNOConfig(width=4, modes=(4,), depth=1), **options).build(signature(8, 8), nnx.Rngs(0))


def test_double_precision_inputs_are_computed_in_double_precision():
    import jax

    with jax.enable_x64(True):
        model = FNOConfig(width=4, modes=(4,), depth=1).build(signature(8), nnx.Rngs(0))
        out = model(np.ones((1, 8, 1)), np.zeros((1, 0)))
        assert out.dtype == jnp.float64


def test_the_number_of_modes_is_asked_for_in_words_that_fit():
    with pytest.raises(ConfigError, match=r"modes=\(4, 4\) has 2 numbers, but the grid has one axis: give one\."):
        per_axis("modes", (4, 4), 1)
