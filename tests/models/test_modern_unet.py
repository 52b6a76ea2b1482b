"""The modern U-Net beyond its recorded outputs: options, grids, its start, names of foreign weights."""

import numpy as np
import pytest
from flax import nnx

from physml.convert import FAMILIES
from physml.convert.modern_unet import config_of, rules
from physml.errors import ConfigError, ConversionError
from physml.fields import Axis, Grid, Signature
from physml.models.modern_unet import ModernUNetConfig


def signature(*shape, periodic=True, scalars=0):
    axes = tuple(Axis.uniform(name, n, periodic=periodic) for name, n in zip("xyz", shape))
    return Signature(Grid(axes), 2, scalars, 1)


def build(*shape, periodic=True, scalars=0, **options):
    config = ModernUNetConfig(**{"width": 8, "multipliers": (1, 2), "blocks": 1, **options})
    return config.build(signature(*shape, periodic=periodic, scalars=scalars), nnx.Rngs(0))


def test_widths_multiply_up():
    assert ModernUNetConfig().widths == (64, 64 * 2, 64 * 4, 64 * 16)


def test_the_plain_network_starts_alive_and_the_conditioned_one_as_zero():
    fields = np.random.default_rng(0).standard_normal((2, 8, 2)).astype(np.float32)
    assert np.any(build(8)(fields, np.zeros((2, 0), np.float32)))
    conditioned = build(8, scalars=1)
    assert not np.any(conditioned(fields, np.ones((2, 1), np.float32)))
    assert not np.any(conditioned.ups[0].second.weight[...])
    assert np.any(conditioned.ups[0].first.weight[...])


def test_boundaries_follow_the_grid_unless_one_is_given():
    assert build(8, 6).first.boundaries == ("periodic", "periodic")
    assert build(8, 6, periodic=False).coarsen[0].boundaries == ("zero", "zero")
    assert build(8, 6, boundary="zero").downs[0].first.boundaries == ("zero", "zero")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 12}, "multiple of 8"),
        ({"multipliers": ()}, "must not be empty"),
        ({"blocks": 0}, "must be positive"),
        ({"attention": (True,)}, "1 entries for 4 levels"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"boundary": "circular"}, "boundary is 'circular'"),
        ({"modulation": "adagn"}, "modulation is 'adagn'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ModernUNetConfig(**options)


def test_grids_that_cannot_be_halved_are_refused():
    with pytest.raises(ConfigError, match=r"3 levels needs a multiple of 4 .*\(10, 12\)"):
        build(10, 12, multipliers=(1, 1, 2))
    with pytest.raises(ConfigError, match="multiple of 2"):
        build(8)(np.zeros((1, 9, 2), np.float32), np.zeros((1, 0), np.float32))


def test_names_of_foreign_weights_count_blocks_and_resamplers_in_one_list():
    """Three levels of two blocks: down 0-1, coarser 2, 3-4, coarser 5, 6-7; up 0-2, finer 3, 4-6, finer 7, 8-10."""
    sources = {item.target: item.sources[0] for item in rules(build(8, multipliers=(1, 1, 1), blocks=2), {})}
    assert sources["downs.2.first.weight"] == "down.3.res.conv1.weight"
    assert sources["coarsen.1.weight"] == "down.5.conv.weight"
    assert sources["ups.3.second.bias"] == "up.4.res.conv2.bias"
    assert (sources["refine.1.weight"], sources["refine.0.weight"]) == ("up.3.conv.weight", "up.7.conv.weight")
    assert sources["middle.1.first.weight"] == "middle.res2.conv1.weight"


UPSTREAM = {
    "n_input_scalar_components": 1, "n_input_vector_components": 0, "n_output_scalar_components": 1,
    "n_output_vector_components": 0, "time_history": 2, "time_future": 1, "hidden_channels": 8, "norm": True,
    "activation": "gelu", "ch_mults": [1, 2], "n_blocks": 1,
}  # fmt: skip


def test_old_names_of_arguments_mean_the_same():
    old = {"n_scalar_components": 1, "n_vector_components": 1, "time_history": 3, "time_future": 2}
    built, found = config_of({**old, "hidden_channels": 8, "activation": "relu", "mul_pdes": True})
    assert (found.inputs, found.outputs, found.scalars, found.grid.ndim) == (9, 6, 2, 2)
    assert (built.norm, built.multipliers, built.boundary) == (False, (1, 2, 2, 4), "zero")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upstream_class": "twod_unet.FourierUnet"}, "Fourier layers"),
        ({"param_conditioning": "vector"}, "param_conditioning='vector'"),
        ({"padding_mode": "same"}, "padding_mode='same'"),
        ({"modes1": 8}, "does not know: .*modes1"),
        ({"hidden_channels": 12}, "multiple of 8"),
        ({}, "missing: image_proj.weight"),
    ],
)
def test_foreign_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        FAMILIES["modern_unet"].build({**UPSTREAM, **change}, {})
