"""The loss over a split: what every window and every channel counts, whatever the batches."""

import dataclasses

import jax
import numpy as np
import problem
import pytest
from numpy.testing import assert_allclose

from physml.fields import stack
from physml.metrics.losses import MSE
from physml.objectives import OneStep
from physml.parallel.mesh import Layout
from physml.training.update import build_loss, split
from physml.training.validation import Validation, batches


class Lacking(problem.Waves):
    """Waves of which only one trajectory has the channel v."""

    own = 0

    def read(self, trajectory, frames):
        window = super().read(trajectory, frames)
        mask = np.ones(window.frames.shape[1:], "f4")
        mask[:, 1] = trajectory == self.own
        return dataclasses.replace(window, frames=window.frames * mask, mask=mask)


def validate(objective, data, batch, layout):
    parts, params, rest = split(problem.build_stepper())
    loss = build_loss(objective, parts, problem.config(batch=8))
    with layout.use():
        validation = Validation(data, 2, batch, 0, loss, layout, layout.replicate(jax.random.key(0)))
        return validation(*layout.replicate((params, rest)))


@pytest.mark.parametrize("devices", [1, 4])
def test_a_loss_that_sums_does_not_depend_on_the_batches(devices):
    """11 windows: batches of 8 and 3, or 4, 4 and 3. On four devices the last three are read four times each."""
    data, summed = problem.Waves((12,)), OneStep(MSE(reduction="sum"))
    for batch in (8, 4):
        found = validate(summed, data, batch, Layout(data=devices))
        mean = validate(OneStep(), data, batch, Layout(data=devices))
        assert_allclose(found["valid/loss"], 2 * 8 * mean["valid/loss"], rtol=1e-5)  # channels, samples of a batch
        assert_allclose(found["valid/loss/v"], mean["valid/loss/v"], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_channels_count_by_the_windows_that_have_them(devices):
    """Of ten windows five have v: four in the first batch, one in the second, none in the third."""
    data = Lacking((6, 6))
    found = validate(OneStep(), data, 4, Layout(data=devices))
    whole = stack([data.read(0, range(i, i + 2)) for i in range(5)])
    errors = OneStep()(problem.build_stepper(), whole, None)[1]["channel"]
    assert_allclose(found["valid/loss/v"], errors[1], rtol=1e-5)
    assert np.isfinite(found["valid/loss/u"])
    data.own = None
    assert np.isnan(validate(OneStep(), data, 4, Layout(data=devices))["valid/loss/v"])  # nothing to measure


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("loss", [MSE(channels=(1.0, 3.0)), MSE(reduction="sum")])
def test_a_loss_of_windows_that_lack_channels_does_not_depend_on_the_batches(loss, devices):
    data, layout = Lacking((6, 6)), Layout(data=devices)
    whole = stack([data.read(trajectory, range(i, i + 2)) for trajectory in (0, 1) for i in range(5)])
    expected = OneStep(loss)(problem.build_stepper(), whole, None)[0]
    expected *= 0.8 if loss.reduction == "sum" else 1  # that of batches of 8
    for batch in (4, 5):
        assert_allclose(validate(OneStep(loss), data, batch, layout)["valid/loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("members", [(), (2,)])
def test_every_batch_draws_its_own_numbers_the_same_at_every_call(members):
    drawn = []

    def loss(params, rest, window, key):
        drawn.append(jax.vmap(jax.random.uniform)(key) if members else jax.random.uniform(key))
        return drawn[-1], {}

    keys = jax.random.split(jax.random.key(0), members) if members else jax.random.key(0)
    validation = Validation(problem.Waves((12,)), 2, 4, 0, loss, Layout(data=1), keys)
    once, again = validation({}, {}), validation({}, {})
    assert np.unique(drawn[:3]).size == 3 * max(members, default=1)
    assert_allclose(np.array(drawn[:3]), drawn[3:], rtol=0)
    assert_allclose(once["valid/loss"], np.average(drawn[:3], axis=0, weights=(4, 4, 3)), rtol=1e-6)
    assert_allclose(again["valid/loss"], once["valid/loss"], rtol=0)


@pytest.mark.parametrize("count", [3, 7, 11, 15])
def test_no_batch_is_larger_than_those_of_training(count):
    """On four devices a tail of 7 windows is placed as 4, 2 (twice) and 1 (four times), not as 28."""
    sizes, seen = [], []

    def loss(params, rest, window, key):
        sizes.append(len(window.frames))
        seen.append(window.frames.mean())
        return seen[-1], {}

    data, layout = problem.Waves((count + 1,)), Layout(data=4)
    validation = Validation(data, 2, 8, 0, loss, layout, jax.random.key(0))
    whole = stack([data.read(0, range(i, i + 2)) for i in range(count)])
    assert_allclose(validation({}, {})["valid/loss"], whole.frames.mean(), atol=1e-6)
    assert set(sizes) <= {4, 8}


@pytest.mark.parametrize("devices", [1, 4, 5, 6, 8])
def test_sizes_of_batches_suit_the_devices(devices):
    for count in range(1, 50):
        sizes = batches(count, 4 * devices, devices)
        assert sum(sizes) == count
        assert max(sizes) <= 4 * devices
        assert all(size % devices == 0 or devices % size == 0 for size in sizes)
    assert batches(127, 64, 8) == [64, 56, 4, 2, 1]


def test_windows_are_spread_over_the_split():
    def chosen(limit):
        return Validation(problem.Waves((5, 6)), 2, 4, limit, None, Layout(data=1), jax.random.key(0)).numbers

    assert chosen(3) == [0, 3, 6]
    assert chosen(0) == chosen(100) == list(range(9))
