"""Groups of parameters: who belongs where, at which rate and with which decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.coding import from_dict, to_dict
from physml.convert.poseidon_scot import rules
from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.models.poseidon_scot import ScOTConfig
from physml.training.finetuning import POSEIDON_FINETUNING, POSEIDON_GROUPS
from physml.training.optimizers import OPTIMIZERS, OptimizerConfig, ParameterGroup


def params():
    return {"first": {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "last": {"weight": jnp.ones((2, 2))}}


def step(config, gradient=0.0):
    tree = params()
    transform = config.build(10)
    gradients = jax.tree.map(lambda leaf: gradient * jnp.ones_like(leaf), tree)
    changes, _ = jax.jit(transform.update)(gradients, transform.init(tree), tree)
    return jax.tree.map(lambda leaf: float(leaf.ravel()[0]), changes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_and_decays_of_groups(name):
    """Without a gradient only the decoupled decay moves a parameter: by minus rate times decay."""
    groups = (ParameterGroup("last", learning_rate=0.5), ParameterGroup("bias", weight_decay=0.0))
    config = OptimizerConfig(name, learning_rate=0.1, schedule="constant", weight_decay=0.2, groups=groups)
    moved = step(config)
    if name == "adam":  # there the decay is part of the gradient, whose size Adam takes away
        assert_allclose([moved["first"]["weight"], moved["last"]["weight"]], [-0.1, -0.5], rtol=1e-4)
    else:
        assert_allclose([moved["first"]["weight"], moved["last"]["weight"]], [-0.02, -0.1], rtol=1e-5)
    assert moved["first"]["bias"] == 0


def test_a_rate_of_zero_freezes_and_the_first_match_counts():
    groups = (ParameterGroup(r"first\.", learning_rate=0.0), ParameterGroup("weight", learning_rate=0.3))
    moved = step(OptimizerConfig(learning_rate=0.1, schedule="constant", groups=groups), gradient=1.0)
    assert moved["first"] == {"weight": 0, "bias": 0}
    assert_allclose(moved["last"]["weight"], -0.3, rtol=1e-5)


def test_decays_of_matrices_spare_stacked_vectors():
    tree = {
        "norm": {"scale": jnp.ones((3, 2)), "weight": jnp.ones((3, 2))},
        "mlp": {"query_bias": jnp.ones((3, 2)), "weight": jnp.ones((3, 2, 2))},
    }
    transform = OptimizerConfig(weight_decay=0.1, decay="matrices").build(10)
    zero = jax.tree.map(jnp.zeros_like, tree)
    changes, _ = transform.update(zero, transform.init(tree), tree)
    assert not np.any(changes["norm"]["scale"])
    assert not np.any(changes["mlp"]["query_bias"])
    assert not np.any(changes["norm"]["weight"])
    assert np.all(changes["mlp"]["weight"] < 0)


def test_groups_without_members_are_errors_that_show_names():
    for groups in ((ParameterGroup("middle"),), (ParameterGroup("."), ParameterGroup("last"))):
        with pytest.raises(ConfigError, match=r"No parameter is left for the groups \['(middle|last)'\].*first\.bias"):
            OptimizerConfig(groups=groups).build(10).init(params())
    with pytest.raises(ConfigError, match="regular expression"):
        ParameterGroup("(")
    with pytest.raises(ConfigError, match="0 or more"):
        ParameterGroup("a", learning_rate=-1.0)


def test_scaling_keeps_the_ratios_of_rates():
    groups = (ParameterGroup("a", learning_rate=4e-3, weight_decay=0.1), ParameterGroup("b", learning_rate=0.0))
    scaled = OptimizerConfig(learning_rate=1e-3, groups=(*groups, ParameterGroup("c"))).scaled(0.5)
    assert scaled.learning_rate == 5e-4
    assert [group.learning_rate for group in scaled.groups] == [2e-3, 0.0, None]
    assert [group.weight_decay for group in scaled.groups] == [0.1, None, None]


def test_groups_survive_a_config_file():
    assert from_dict(OptimizerConfig, to_dict(POSEIDON_FINETUNING)) == POSEIDON_FINETUNING


def test_poseidons_parameters_are_in_the_groups_of_its_authors():
    """Of every parameter the names it has at the authors' decide, as in their trainer."""
    config = ScOTConfig(
        4, (2, 1), (1, 1), (1, 1), patch=2, window=2, skip="convnext", position_embedding=True, mask_token=True
    )
    axes = (Axis.uniform("x", 8), Axis.uniform("y", 8))
    model = nnx.eval_shape(lambda: config.build(Signature(Grid(axes), 2, 1, 2), nnx.Rngs(0)))
    seen = set()
    for item in rules(model):
        expected = {theirs(name) for name in item.sources}
        assert len(expected) == 1, item
        group = POSEIDON_FINETUNING.group_of(f"model.{item.target}")
        seen.add(group)
        assert group == expected.pop(), item
    assert seen == {0, 1, 2, None}
    # ... the rates and decays of these groups:
    rates = [(group.learning_rate, group.weight_decay) for group in POSEIDON_GROUPS]
    assert rates == [(5e-4, None), (5e-4, 0.0), (None, 0.0)]
    assert (POSEIDON_FINETUNING.learning_rate, POSEIDON_FINETUNING.weight_decay) == (5e-5, 1e-6)


def theirs(name: str) -> int | None:
    if "embeddings" in name or "patch_recovery" in name:
        return 0
    norms = ("layernorm_before", "layernorm_after", "downsample.norm", "upsample.norm")
    if any(norm in name for norm in norms) or (name.startswith("residual_blocks") and ".norm." in name):
        return 1
    return 2 if "bias" in name else None
