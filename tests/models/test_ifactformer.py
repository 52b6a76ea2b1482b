"""What is particular to IFactFormer: coordinates, periods, frames that are packed, iterations with shared weights."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Axis, Grid, Signature
from physml.layers.factorized_attention import Frozen
from physml.models.ifactformer import IFactFormerConfig

CONFIG = IFactFormerConfig(width=12, heads=2, head_width=4, iterations=3)
RANDOM = np.random.default_rng(0)


def grid(*lines, periodic=False):
    return Grid(tuple(Axis(name, tuple(map(float, line)), periodic=periodic) for name, line in zip("xyz", lines)))


def build(config, grid, inputs=2, scalars=0):
    model = config.build(Signature(grid, inputs, scalars, 1), nnx.Rngs(0))
    for layer in model.layers:  # kernels start so near zero that nothing else would be seen of them
        for kernel in layer.attention.kernels:
            for part in (kernel.query, kernel.key):
                part.weight[...] = 50 * part.weight[...]
    return model


def run(model, fields, scalars=()):
    return np.asarray(model(fields, np.asarray([list(scalars)] * len(fields), np.float32).reshape(len(fields), -1)))


X, Y = np.linspace(0, 3, 6), np.cos(np.linspace(np.pi, 0, 5))  # walls at both ends of y, points crowded there
FIELDS = RANDOM.standard_normal((1, 6, 5, 2)).astype(np.float32)


@pytest.mark.parametrize("form", ["parallel", "chained"])
def test_points_are_where_the_grid_says(form):
    config = dataclasses.replace(CONFIG, form=form)
    crowded, uniform = (run(build(config, grid(X, y)), FIELDS) for y in (Y, np.linspace(-1, 1, 5)))
    assert np.abs(crowded - uniform).max() > 1e-2


def test_whole_waves_close_the_period():
    """A periodic axis may be cut anywhere: whole periods more on some points are the same place."""
    x = np.arange(6) / 2
    shifted = x + 3.0  # one period
    for whole in (True, False):
        config = dataclasses.replace(CONFIG, whole_waves=whole)
        here, there = (run(build(config, grid(line, Y, periodic=True)), FIELDS) for line in (x, shifted))
        assert np.allclose(here, there, atol=1e-4) is whole


def test_what_belongs_to_no_frame_joins_every_frame():
    """Two frames of one channel, a forcing, a scalar: each frame enters with the other two, as a frame of three."""
    config = dataclasses.replace(CONFIG, history=2, frame_channels=1)
    joined = build(config, grid(X, Y), inputs=3, scalars=1)
    frames = build(dataclasses.replace(config, frame_channels=3), grid(X, Y), inputs=6)
    old, new, forcing = (RANDOM.standard_normal((1, 6, 5, 1)).astype(np.float32) for _ in range(3))
    scalar = np.full_like(old, 0.7)
    given = run(joined, np.concatenate([old, new, forcing], axis=-1), [0.7])
    packed = np.concatenate([old, forcing, scalar, new, forcing, scalar], axis=-1)
    np.testing.assert_allclose(given, run(frames, packed), atol=1e-5)


def test_uneven_shares_of_the_entry_reach_every_input():
    model = build(CONFIG, grid(X, Y), inputs=4)  # six hidden channels for four inputs
    fields = RANDOM.standard_normal((1, 6, 5, 4)).astype(np.float32)
    for channel in range(4):
        changed = fields.copy()
        changed[..., channel] += 1
        assert np.abs(run(model, changed) - run(model, fields)).max() > 1e-3


def test_iterations_share_weights_and_the_drawn_waves_are_not_trained():
    counts = [dataclasses.replace(CONFIG, iterations=n).parameters(Signature(grid(X, Y), 2, 0, 1)) for n in (1, 10)]
    assert counts[0] == counts[1]
    model = build(CONFIG, grid(X, Y))
    frozen = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, Frozen))}
    assert frozen == {"layers.0.positions.waves", *(f"layers.0.attention.kernels.{i}.inverse" for i in range(2))}


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({"width": 7}, 2, "must be even"),
        ({"kernel_multiplier": 1, "head_width": 3}, 2, "set rotary=False"),
        ({"history": 2}, 3, "3 inputs are not history=2 frames"),
        ({"history": 2, "frame_channels": 2}, 3, "of 2 channels"),
        ({}, 9, "width to at least 18"),
        ({"form": "serial"}, 2, "form is 'serial'"),
        ({"iterations": 0}, 2, "must be positive"),
    ],
)
def test_bad_options_are_named(options, inputs, message):
    with pytest.raises(ConfigError, match=message):
        build(dataclasses.replace(CONFIG, **options), grid(X, Y), inputs=inputs)
