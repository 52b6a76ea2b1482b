"""What is particular to the plain convolutional network: it sees exactly as far as it says."""

import jax
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.models.conv_net import ConvNetConfig

SIGNATURE = Signature(Grid((Axis.uniform("x", 160),)), 1, 0, 1)


@pytest.mark.parametrize(
    ("options", "reach"),
    [({}, 11), ({"depth": 2}, 3), ({"depth": 0}, 1), ({"depth": 3, "dilations": (1, 4), "kernel": 5}, 20)],
)
def test_a_point_is_felt_as_far_as_the_config_says(options, reach):
    config = ConvNetConfig(**{"width": 8, "activation": "tanh", **options})
    assert config.reach == reach
    model = config.build(SIGNATURE, nnx.Rngs(0))
    fields = np.random.default_rng(0).standard_normal((1, 160, 1)).astype(np.float32)
    slope = jax.grad(lambda fields: model(fields, np.zeros((1, 0), np.float32))[0, 80, 0])(fields)[0, :, 0]
    felt = np.flatnonzero(np.asarray(slope)) - 80
    assert (felt.min(), felt.max()) == (-reach, reach)


def test_without_hidden_fields_it_is_linear():
    model = ConvNetConfig(depth=0).build(SIGNATURE, nnx.Rngs(0))
    none, fields = np.zeros((1, 0), np.float32), np.random.default_rng(0).standard_normal((1, 160, 1))
    once, twice, nothing = (np.asarray(model((k * fields).astype(np.float32), none)) for k in (1, 2, 0))
    np.testing.assert_allclose(twice - once, once - nothing, atol=1e-5)


@pytest.mark.parametrize("options", [{"depth": -1}, {"width": 0}, {"activation": "rleu"}, {"dilations": ()}])
def test_impossible_choices_are_refused(options):
    with pytest.raises(ConfigError):
        ConvNetConfig(**options)
