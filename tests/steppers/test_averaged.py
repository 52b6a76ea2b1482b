"""Forecasts averaged over intervals; how the intervals are trained is in tests/test_intervals.py."""

import jax
import numpy as np
from flax import nnx
from numpy.testing import assert_array_equal

from physml.constraints import MassFixer
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.normalize import Normalizer
from physml.steppers import IntervalConfig, averaged


class Noise(nnx.Module):
    """As dropout in training, its output depends on the key."""

    dropout = 0.5

    def __call__(self, fields, scalars, key=None):
        return fields if key is None else jax.random.normal(key, fields.shape)


def test_intervals_are_scaled_by_name_and_keep_their_constraints():
    """The normalizer may know more intervals than the stepper."""
    spec = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"),), time_step=0.5)
    normalizer = Normalizer(spec, [0.0], [1.0], [0.5], intervals={1: [1.0], 2: [2.0], 4: [4.0]})
    law = (MassFixer(("u",)).build(spec),)
    stepper = IntervalConfig((1, 4)).build(spec, Noise(), normalizer, law)
    assert_array_equal(stepper.scale(np.array([2.0, 0.5], "f4")), [[4.0], [1.0]])
    assert tuple(averaged(stepper).constraints) == law
    assert tuple(averaged(averaged(stepper), average=False).constraints) == law


def test_every_interval_draws_its_own_random_numbers():
    """Of one scale, so that equal numbers would be equal increments."""
    spec = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"),), time_step=1.0)
    normalizer = Normalizer(spec, [0.0], [1.0], [0.5], intervals={1: [0.5], 2: [0.5]})
    stepper = IntervalConfig((1, 2), average=True).build(spec, Noise(), normalizer)
    window = Window.of(np.zeros((2, 1, 8, 1), "f4"), spec)
    states = [stepper.encode(window.frames, window.context(0, 1))]
    for step in range(2):
        states.append(stepper.advance(states[-1], window.context(step, 1, jax.random.key(step))))
    latest = np.stack([frames for frames, _ in states])
    short, long = latest[2, :, 0] - latest[1, :, 0], latest[2, :, 1] - latest[0, :, 1]
    assert abs(np.corrcoef(short.ravel(), long.ravel())[0, 1]) < 0.9
    assert min(short.std(), long.std()) > 0.2
