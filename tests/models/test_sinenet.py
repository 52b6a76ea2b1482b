"""SineNet beyond its recorded outputs: published sizes, variants, grids, symmetry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.convert import FAMILIES
from physml.errors import ConfigError, ConversionError
from physml.fields import Axis, Grid, Signature
from physml.models.named import NAMED
from physml.models.sinenet import SineNetConfig


def signature(*shape, periodic=True, scalars=0):
    axes = tuple(Axis.uniform(name, n, periodic=periodic) for name, n in zip("xyz", shape))
    return Signature(Grid(axes), 2, scalars, 1)


def build(*shape, periodic=True, scalars=0, **options):
    config = SineNetConfig(**{"width": 3, "growth": 1.2, "waves": 1, **options})
    return config.build(signature(*shape, periodic=periodic, scalars=scalars), nnx.Rngs(0))


def run(model, fields, scalars=None):
    scalars = np.zeros((len(fields), 0), np.float32) if scalars is None else scalars
    return np.asarray(nnx.jit(lambda m, f, s: m(f, s))(model, fields, scalars))


@pytest.mark.parametrize(
    "name", [name for name, named in NAMED.items() if named.family in ("sinenet", "modern_unet", "pderefiner")]
)
def test_published_sizes_count_as_published(name):
    """Counted from abstract shapes: nothing is allocated."""
    named = NAMED[name]
    model = nnx.eval_shape(lambda: named.build(nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == named.parameters == named.config.parameters(named.signature)


def test_widths_are_those_of_the_paper():
    assert SineNetConfig().widths == (64, 91, 129, 185, 263)


def test_on_a_periodic_grid_it_commutes_with_shifts_of_whole_coarse_cells():
    model = build(32, 48)
    fields = np.random.default_rng(0).standard_normal((1, 32, 48, 2)).astype(np.float32)
    moved = run(model, np.roll(fields, (16, -32), (1, 2)))
    np.testing.assert_allclose(moved, np.roll(run(model, fields), (16, -32), (1, 2)), atol=1e-5)
    walls = run(build(32, 48, periodic=False), np.roll(fields, (16, -32), (1, 2)))
    assert np.abs(walls - np.roll(run(build(32, 48, periodic=False), fields), (16, -32), (1, 2))).max() > 1e-3


def test_waves_in_a_loop_are_waves_one_after_another():
    model = build(32, waves=8)
    fields = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 2)), jnp.float32)
    graph, state = nnx.split(model.waves.blocks)
    x = model.lift(fields)
    for i in range(8):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(x, None)
    np.testing.assert_allclose(run(model, fields), model.last(x), rtol=1e-4, atol=1e-5)


def test_tangled_waves_do_not_read_their_input_again():
    shapes = [build(32, disentangled=on).waves.blocks.downs[1].pair.first.weight.shape for on in (True, False)]
    assert [shape[-2] for shape in shapes] == [3 + 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"waves": 0}, "must be positive"),
        ({"growth": 0.2}, "leave a channel"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"pool": "mean"}, "pool is 'mean'"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
        ({"boundary": "circular"}, "boundary is 'circular'"),
        ({"modulation": "film"}, "modulation is 'film'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        SineNetConfig(**options)


def test_grids_that_do_not_fit_are_refused_at_once_and_later():
    with pytest.raises(ConfigError, match=r"\(24, 32\).*multiple of 16"):
        build(24, 32)
    with pytest.raises(ConfigError, match=r"at least \(32, 32\)"):
        build(16, 32)
    build(16, 32, periodic=False)
    with pytest.raises(ConfigError, match="multiple of 16"):
        build(32, 32)(np.zeros((1, 40, 32, 2), np.float32), np.zeros((1, 0), np.float32))


UPSTREAM = {
    "n_input_scalar_components": 1, "n_input_vector_components": 0, "n_output_scalar_components": 1,
    "n_output_vector_components": 0, "time_history": 2, "time_future": 1, "hidden_channels": 3, "mult": 1.2,
    "num_waves": 1, "padding_mode": "zeros",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding_mode": "same"}, "padding_mode='same'"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"down_pool": False}, "down_pool=False"),
        ({"param_conditioning": "vector"}, "param_conditioning='vector'"),
        ({"depth": 2}, "does not know: .*depth"),
        ({"n_input_scalar_components": None}, "lacks .*n_input_scalar_components"),
        ({}, "missing: image_proj.weight"),
    ],
)
def test_foreign_configs_that_do_not_fit_are_refused(change, message):
    kwargs = {name: value for name, value in {**UPSTREAM, **change}.items() if value is not None}
    with pytest.raises(ConversionError, match=message):
        FAMILIES["sinenet"].build(kwargs, {})
