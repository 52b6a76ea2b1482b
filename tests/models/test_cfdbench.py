"""What is particular to the networks of CFDBench: fixed grids, frames they add to, masks, batch statistics."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.models.auto_deeponet import AutoDeepONetConfig
from physml.models.auto_ffn import AutoFFNConfig
from physml.models.cfdbench_resnet import CFDBenchResNetConfig
from physml.models.classic_unet import ClassicUNetConfig

SMALL = {
    "auto_deeponet": AutoDeepONetConfig(width=6, branch_depth=2, trunk_depth=2),
    "auto_ffn": AutoFFNConfig(width=6, depth=2),
    "cfdbench_resnet": CFDBenchResNetConfig(width=4, inner=6, depth=1, kernel=3),
    "classic_unet": ClassicUNetConfig(width=4, levels=2),
}
each = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)


def build(config, shape=(6, 5), inputs=3, scalars=2, outputs=1, periodic=False):
    axes = tuple(Axis.uniform(name, n, periodic=periodic) for name, n in zip("xyz", shape))
    return config.build(Signature(Grid(axes), inputs, scalars, outputs), nnx.Rngs(0))


def given(shape=(6, 5), inputs=3, scalars=2, batch=2, seed=0):
    random = np.random.default_rng(seed)
    sizes = (batch, *shape, inputs), (batch, scalars)
    return [random.standard_normal(size).astype(np.float32) for size in sizes]


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=name, marks=[pytest.mark.slow] * (name == "classic_unet")) for name, c in SMALL.items()],
)
def test_outputs_are_added_to_the_stated_frame_and_masked(config):
    fields, scalars = given()
    fields[..., 2] = np.random.default_rng(1).integers(0, 2, fields.shape[:-1])
    bare = build(dataclasses.replace(config, frame=None))(fields, scalars)
    second = build(dataclasses.replace(config, frame=1))(fields, scalars)
    np.testing.assert_allclose(second, bare + fields[..., 1:2], atol=1e-5)
    masked = build(dataclasses.replace(config, frame=1, mask=2))(fields, scalars)
    np.testing.assert_allclose(masked, second * fields[..., 2:], atol=1e-5)


@each
def test_frames_and_masks_that_are_not_there_are_refused(config):
    with pytest.raises(ConfigError, match="Lower frame"):
        build(dataclasses.replace(config, frame=3))
    with pytest.raises(ConfigError, match="there are 3 inputs"):
        build(dataclasses.replace(config, mask=3))
    with pytest.raises(ConfigError, match="must be positive|positive"):
        build(dataclasses.replace(config, width=0))


@pytest.mark.parametrize("name", ["auto_deeponet", "auto_ffn"])
def test_networks_that_read_every_point_name_both_grids(name):
    with pytest.raises(ConfigError, match=r"grid of \(6, 5\) points, but the fields have \(7, 5\)"):
        build(SMALL[name])(*given((7, 5)))


def test_separate_branches_need_scalars():
    with pytest.raises(ConfigError, match="Use branches='joint'"):
        build(dataclasses.replace(SMALL["auto_deeponet"], branches="separate"), scalars=0)


def test_separate_branches_multiply():
    """Doubling what the second branch gives doubles the sum of functions."""
    config = dataclasses.replace(SMALL["auto_deeponet"], branches="separate", frame=None)
    model, inputs = build(config), given()
    before = np.asarray(model(*inputs))
    last = model.conditions.maps[-1]
    last.weight[...], last.bias[...] = 2 * last.weight[...], 2 * last.bias[...]
    np.testing.assert_allclose(model(*inputs), 2 * before, rtol=1e-4, atol=1e-6)  # the bias starts at zero


def test_standardized_activations_follow_the_scale_of_their_input():
    """act((x - m) / s) s + m commutes with stretching and shifting its input; plain ones do not."""
    from physml.layers.perceptron import Activation

    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    for standardize in (True, False):
        act = Activation("tanh", standardize=standardize)
        assert np.allclose(act(5 * x + 2), 5 * act(x) + 2, atol=1e-4) is standardize
    constant = np.full((1, 4), 3.0, np.float32)
    np.testing.assert_array_equal(Activation("tanh", standardize=True)(constant), constant)


def test_published_mixing_of_batches_is_a_choice():
    model, (fields, scalars) = build(SMALL["auto_ffn"]), given(batch=3)
    mixed = build(dataclasses.replace(SMALL["auto_ffn"], mix_batch=True))
    alone = model(fields[:1], scalars[:1])
    np.testing.assert_allclose(model(fields, scalars)[:1], alone, atol=1e-5)
    np.testing.assert_allclose(mixed(fields[:1], scalars[:1]), alone, atol=1e-5)
    assert not np.allclose(mixed(fields, scalars)[:1], alone, atol=1e-2)


def test_unet_learns_batch_statistics_in_training_and_uses_them_afterwards():
    model, inputs = build(SMALL["classic_unet"]), given(batch=4)
    plain = np.asarray(model(*inputs))
    before = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    model.train()
    trained = np.asarray(model(*inputs))
    after = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not np.allclose(trained, plain, atol=1e-3)
    model.eval()
    assert not np.allclose(model(*inputs), plain, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
def test_recomputing_moves_the_batch_statistics_once(upsampling):
    states = []
    for remat in (False, True):
        model = build(dataclasses.replace(SMALL["classic_unet"], upsampling=upsampling, remat=remat))
        model.train()
        nnx.jit(nnx.grad(lambda model, *inputs: model(*inputs).mean()))(model, *given())
        states.append(jax.tree.leaves(nnx.state(model, nnx.BatchStat)))
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_periodic_axes_wrap_round():
    shape = (8, 8)
    for name in ("cfdbench_resnet", "classic_unet"):
        fields, scalars = given(shape)
        for periodic in (True, False):
            model = build(SMALL[name], shape, periodic=periodic)
            moved = model(np.roll(fields, 4, axis=1), scalars)
            assert np.allclose(moved, np.roll(model(fields, scalars), 4, axis=1), atol=1e-4) is periodic


def test_resnet_drops_in_training_only():
    model, inputs, key = build(SMALL["cfdbench_resnet"]), given(), jax.random.key(0)
    plain = model(*inputs)
    np.testing.assert_array_equal(model(*inputs, key=key), plain)
    model.train()
    assert not np.allclose(model(*inputs, key=key), plain, atol=1e-3)
    np.testing.assert_array_equal(model(*inputs), plain)
