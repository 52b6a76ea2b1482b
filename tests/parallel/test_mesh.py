"""The layout: where arrays live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from physml.errors import ConfigError
from physml.parallel import mesh
from physml.parallel.mesh import Layout, over_members


def test_every_session_has_four_devices():
    assert jax.device_count() >= 4


@pytest.mark.parametrize(
    ("layout", "devices", "sizes"),
    [
        (Layout(), 4, (1, 4, 1)), (Layout(data=2), 4, (1, 2, 1)), (Layout(data=-1, space=2), 4, (1, 2, 2)),
        (Layout(member=2), 8, (2, 4, 1)), (Layout(data=1), 1, (1, 1, 1)),
    ],
)  # fmt: skip
def test_sizes_fill_the_devices(layout, devices, sizes):
    assert layout.sizes(devices) == sizes


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(data=8), "needs 8 devices, but there are 4"), (Layout(space=3), "multiple of 3 devices"),
        (Layout(data=-1, space=-1), "at most one is -1"), (Layout(data=0), "positive"),
        (Layout(member=-2), "positive"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        layout.sizes(4)


def test_windows_are_split_along_the_batch(tiny):
    window = tiny.window(tiny.spec(static=("land",), parameters=("nu",)), batch=8)
    placed = Layout(data=4).place(window)
    assert placed.spec == window.spec
    assert placed.mask is None
    for ours, theirs in zip(jax.tree.leaves(window), jax.tree.leaves(placed), strict=True):
        assert theirs.sharding.spec == PartitionSpec("data")
        np.testing.assert_array_equal(ours, theirs)
    shards = sorted(placed.frames.addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.shape[0] for shard in shards] == [2, 2, 2, 2]
    np.testing.assert_array_equal(shards[1].data, window.frames[2:4])


def test_parameters_are_on_every_device():
    tree = Layout(data=4).replicate({"a": jnp.arange(3.0), "key": jax.random.key(1)})
    assert all(leaf.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(tree))


def test_axes_that_are_not_split_keep_copies(tiny):
    placed = Layout(data=2, space=2).place(tiny.window(tiny.spec(), batch=4))
    assert len(placed.frames.addressable_shards) == 4
    assert {shard.data.shape[0] for shard in placed.frames.addressable_shards} == {2}


@pytest.mark.parametrize(("batch", "nearest"), [(6, "4 or 8"), (3, "Use 4")])
def test_a_batch_that_does_not_divide_names_its_neighbors(batch, nearest):
    layout = Layout(data=4)
    layout.check_batch(8)
    with pytest.raises(ConfigError, match=nearest):
        layout.check_batch(batch)


def test_training_moves_gradients_not_activations(tiny):
    """The compiled update of a pointwise network over four devices reduces gradients and gathers nothing."""
    from physml.normalize import Normalizer
    from physml.objectives import OneStep
    from physml.steppers import ResidualConfig
    from physml.training import OptimizerConfig, TrainingConfig
    from physml.training.update import build_update, initial_state, split

    spec = tiny.spec()
    stepper = ResidualConfig().build(spec, tiny.model(2, 2), Normalizer.identity(spec))
    for fields in ({}, {"accumulate": 2}, {"updates_per_call": 2}):
        layout = Layout(data=4)
        config = TrainingConfig(batch=8, optimizer=OptimizerConfig(), **fields)
        parts, params, rest = split(stepper)
        with layout.use():
            transform, update = build_update(OneStep(), parts, config, 10, layout.replicated())
            state = layout.replicate(initial_state(params, transform, config))
            windows = (layout.place(tiny.window(spec, batch=8)),) * config.updates_per_call
            key = layout.replicate(jax.random.key(0))
            program = update.lower(state, layout.replicate(rest), key, windows, np.int32(1)).compile().as_text()
        assert "all-reduce" in program
        assert "all-gather" not in program
        assert "all-to-all" not in program
        assert "collective-permute" not in program


@pytest.mark.parametrize("by", ["one after the other", "vmap, as on accelerators"])
@pytest.mark.parametrize("layout", [Layout(member=4, data=1), Layout(member=2, data=2)], ids=str)
def test_members_on_devices_of_their_own_send_nothing_to_each_other(layout, by, monkeypatch):
    """Gradients of a convolution and a transform, whose rules of `vmap` and partitioning would gather members."""
    if "vmap" in by:
        monkeypatch.setattr(mesh, "_in_turn", jax.vmap)
    from physml.layers.convolution import convolve
    from physml.parallel.fft import rfftn

    def loss(weight, fields, scale):
        smooth = convolve(fields, weight, ((1, 1), (1, 1)))
        return scale * jnp.square(jnp.abs(rfftn(smooth, (1, 2)))).mean()

    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 3, 2, 2)).astype(np.float32)
    fields = random.standard_normal((4, 4, 6, 6, 2)).astype(np.float32)
    each = over_members(jax.value_and_grad(loss), (0, 0, None))
    expected = jax.vmap(jax.value_and_grad(loss), (0, 0, None))(weight, fields, 2.0)
    with layout.use():
        places = (PartitionSpec("member"), PartitionSpec("member", "data"))
        placed = jax.device_put((weight, fields), tuple(NamedSharding(layout.mesh, place) for place in places))
        compiled = jax.jit(each).lower(*placed, 2.0).compile()
        found = compiled(*placed, 2.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.sharding.spec[0] == "member"
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6 * float(np.abs(theirs).max()))
    for message in ("all-gather", "all-to-all", "collective-permute"):
        assert message not in compiled.as_text()
    assert ("all-reduce" in compiled.as_text()) == (layout.data > 1)  # the mean over the batch
