"""What recorded outputs do not pin: sizes, loops, dropping, masks, other channels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.convert.poseidon_scot import config_of, rules
from physml.errors import ConfigError, ConversionError
from physml.fields import Axis, Grid, Signature
from physml.layers import stack
from physml.models.named import NAMED
from physml.models.poseidon_scot import ScOTConfig, stage_windows, with_channels

SMALL = {"width": 4, "heads": (1,), "patch": 2, "window": 2, "depths": (2,), "skip_blocks": (0,)}


def signature(shape=(8, 8), inputs=2, scalars=1, outputs=1, periodic=False):
    axes = (Axis.uniform(name, n, periodic=periodic) for name, n in zip("xy", shape, strict=True))
    return Signature(Grid(tuple(axes)), inputs, scalars, outputs)


def inputs(shape=(8, 8), channels=2, batch=2):
    random = np.random.default_rng(0)
    return random.standard_normal((batch, *shape, channels)).astype(np.float32), np.ones((batch, 1), np.float32)


@pytest.mark.parametrize(("name", "tensors"), [("poseidon-t", 844), ("poseidon-b", 1580), ("poseidon-l", 1580)])
def test_published_sizes(name, tensors):
    """Counted from shapes alone: nothing is allocated."""
    named = NAMED[name]
    model = nnx.eval_shape(lambda: named.build(nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == named.parameters
    assert named.config.parameters(named.signature) == named.parameters
    assert len({source for rule in rules(model) for source in rule.sources}) == tensors


def test_windows_follow_the_grid_rounded_down():
    """A grid of 9 tokens: the second stage has 5, but windows as for 4, which are not shifted."""
    plain, shifted = stage_windows(4, (9, 9), 1, (False, False))
    assert plain == shifted
    assert (plain.shape, plain.size, plain.padded) == ((5, 5), (4, 4), (8, 8))
    plain, shifted = stage_windows(4, (9, 16), 0, (False, False))
    assert shifted.shift == (2, 2)
    assert stage_windows(16, (32, 8), 0, (False, False))[1].shift == (8, 0)


def test_first_block_of_a_decoder_is_shifted_at_even_depth_and_the_last_never():
    for depth, first in ((1, False), (2, True), (3, False), (4, True)):
        config = ScOTConfig(**{**SMALL, "depths": (depth,)})
        model = nnx.eval_shape(lambda c=config: c.build(signature(), nnx.Rngs(0)))
        for stage, shifts in ((model.encoder[0], [j % 2 == 1 for j in range(depth)]), (model.decoder[0], None)):
            order = [any(stage.windows[j % 2].shift) for j in range(depth)]
            if shifts is not None:
                assert order == shifts
            else:
                assert order[0] == first
                assert not order[-1]


def test_loop_over_blocks_is_blocks_in_turn(monkeypatch):
    config = ScOTConfig(**{**SMALL, "depths": (5,)}, drop_path=0.5)
    model, (fields, scalars) = config.build(signature(), nnx.Rngs(0)), inputs()
    model.train()

    def run(first):
        monkeypatch.setattr(stack, "LOOP_FROM", first)
        return nnx.jit(lambda m, f, s: m(f, s, jax.random.key(1)))(model, fields, scalars)

    assert_allclose(run(2), run(99), rtol=1e-4, atol=1e-6)


def test_dropping_needs_a_key_and_training():
    config = ScOTConfig(**SMALL, dropout=0.3, attention_dropout=0.2, drop_path=0.4)
    model, (fields, scalars) = config.build(signature(), nnx.Rngs(0)), inputs()
    assert model.dropout == 0.4
    key, other = jax.random.key(0), jax.random.key(1)
    still = model(fields, scalars)
    np.testing.assert_array_equal(model(fields, scalars, key), still)
    model.train()
    np.testing.assert_array_equal(model(fields, scalars), still)
    assert not np.array_equal(model(fields, scalars, key), still)
    assert not np.array_equal(model(fields, scalars, key), model(fields, scalars, other))


def test_rates_of_dropped_paths_rise_from_the_first_block_to_the_last():
    config = ScOTConfig(**{**SMALL, "depths": (2, 1), "heads": (1, 1), "skip_blocks": (0, 0)}, drop_path=0.5)
    model = nnx.eval_shape(lambda: config.build(signature(), nnx.Rngs(0)))
    rates = [rate for part in (model.encoder, model.decoder) for stage in part for rate in stage.rates]
    assert_allclose(rates, np.linspace(0, 0.5, 6), rtol=1e-6)


def test_masked_tokens_hide_their_patch():
    model, (fields, scalars) = ScOTConfig(**SMALL, mask_token=True).build(signature(), nnx.Rngs(0)), inputs()
    masked = np.zeros((2, 4, 4), bool)
    masked[:, 1, 2] = True
    other = fields.copy()
    other[:, 2:4, 4:6] += 1
    np.testing.assert_array_equal(model(fields, scalars, masked=masked), model(other, scalars, masked=masked))
    assert not np.array_equal(model(fields, scalars), model(other, scalars))
    with pytest.raises(ConfigError, match="mask_token=True"):
        ScOTConfig(**SMALL).build(signature(), nnx.Rngs(0))(fields, scalars, masked=masked)


def test_periodic_axes_have_no_edge():
    """A field moved by whole windows moves the output, if convolutions and shifted windows wrap."""
    sizes = {**SMALL, "skip_blocks": (1,)}
    fields, scalars = inputs()
    for boundary, moves in (("auto", True), ("zero", False)):
        model = ScOTConfig(**sizes, boundary=boundary).build(signature(periodic=True), nnx.Rngs(0))
        moved = np.roll(model(fields, scalars), 4, axis=1)
        same = np.allclose(model(np.roll(fields, 4, axis=1), scalars), moved, rtol=1e-4, atol=1e-5)
        assert same == moves


def test_authors_start_lets_nothing_pass_at_lead_zero_and_ours_does():
    fields, scalars = inputs()
    for start, passes in ((0.0, False), (1.0, True)):
        model = ScOTConfig(**SMALL, scale_start=start).build(signature(), nnx.Rngs(0))
        assert np.allclose(model(fields, 0 * scalars), model(fields + 1, 0 * scalars)) != passes


def test_residual_adds_the_first_inputs():
    model, (fields, scalars) = ScOTConfig(**SMALL, residual=True).build(signature(), nnx.Rngs(0)), inputs()
    model.recovery.weight[...] *= 0
    model.recovery.bias[...] *= 0
    assert_allclose(model(fields, scalars), fields[..., :1], atol=1e-7)
    with pytest.raises(ConfigError, match="residual=False"):
        ScOTConfig(**SMALL, residual=True).build(signature(outputs=3), nnx.Rngs(0))


def test_other_channels_keep_all_other_weights():
    model = ScOTConfig(**SMALL).build(signature(), nnx.Rngs(0))
    other = with_channels(model, signature(inputs=3, outputs=2), rngs=nnx.Rngs(5), remat=True)
    assert other.config.remat
    before, after = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, other))
    changed = {".".join(map(str, path)) for path in before if not np.array_equal(before[path][...], after[path][...])}
    assert changed == {"embedding.patches.weight", "recovery.weight", "recovery.bias", "recovery.mixing.weight"}
    assert other(*inputs(channels=3)).shape == (2, 8, 8, 2)
    for wanted, options, message in (
        (signature(scalars=2), {}, "conditioned on 1 scalars"),
        (signature(), {"width": 8}, "do not fit"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_channels(model, wanted, rngs=nnx.Rngs(0), **options)


@pytest.mark.slow
def test_recomputing_blocks_saves_memory():
    """Of all blocks but one only the input is kept for the backward pass."""

    def peak(remat):
        config = ScOTConfig(**{**SMALL, "depths": (8,), "window": 8, "width": 8}, remat=remat)
        graph, params, rest = nnx.split(
            nnx.eval_shape(lambda: config.build(signature((32, 32)), nnx.Rngs(0))), nnx.Param, ...
        )
        shapes = jax.ShapeDtypeStruct((2, 32, 32, 2), jnp.float32), jax.ShapeDtypeStruct((2, 1), jnp.float32)
        loss = jax.grad(lambda p, f, s: jnp.mean(nnx.merge(graph, p, rest)(f, s) ** 2))
        return jax.jit(loss).lower(params, *shapes).compile().memory_analysis().temp_size_in_bytes

    assert peak(True) < 0.5 * peak(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (3,)}, "does not divide"), ({"depths": (2, 2)}, "one entry for each stage"),
        ({"boundary": "reflect"}, "boundary"), ({"drop_path": 1.0}, "below 1"), ({"activation": "gelux"}, "gelu"),
        ({"image_size": (8,)}, "rows, columns"),
    ],
)  # fmt: skip
def test_choices_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ScOTConfig(**{**SMALL, **changes})


def test_published_configs_are_read_and_strange_ones_refused():
    published = {
        "architectures": ["ScOT"], "model_type": "swinv2", "hidden_size": 384, "num_layers": 4, "dtype": "float32",
        "transformers_version": "4.29.2", "pretrained_window_sizes": [0, 0, 0, 0], "image_size": 128, "patch_size": 4,
        "num_channels": 4, "num_out_channels": 4, "embed_dim": 48, "depths": [4, 4, 4, 4], "num_heads": [3, 6, 12, 24],
        "skip_connections": [2, 2, 2, 0], "window_size": 16, "mlp_ratio": 4.0, "qkv_bias": True, "drop_path_rate": 0.0,
        "use_conditioning": True, "p": 1, "channel_slice_list_normalized_loss": [0, 1, 3, 4],
    }  # fmt: skip
    config, wanted = config_of(published)
    assert (config, wanted.scalars) == (NAMED["poseidon-t"].config, 1)
    assert not config_of({**published, "use_conditioning": False, "learn_residual": True})[0].residual
    assert config_of({**published, "skip_connections": [True, True, False, 0]})[0].skip_blocks == (1, 1, 0, 0)
    for changes, message in (
        ({"image_size": [128, 64]}, "squares only"),
        ({"pretrained_window_sizes": [8, 8, 8, 8]}, "pretrained_window_sizes"),
        ({"novel_option": 1}, "novel_option"),
    ):
        with pytest.raises(ConversionError, match=message):
            config_of({**published, **changes})


def test_named_configs_equal_the_defaults():
    fields = dataclasses.asdict(NAMED["poseidon-t"].config)
    default = dataclasses.asdict(ScOTConfig())
    assert {name for name in fields if fields[name] != default[name]} == {"boundary", "image_size", "scale_start"}
