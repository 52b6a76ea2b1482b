"""Running statistics of batch normalization are part of a training's state, like the optimizer's moments."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from worker import Trap

from physml.data.loader import Loader
from physml.errors import Interrupted
from physml.layers.batch_norm import BatchNorm
from physml.normalize import Normalizer
from physml.objectives import OneStep, Unrolled
from physml.parallel.mesh import Layout
from physml.steppers import ResidualConfig
from physml.training import fit

MOMENTUM = 0.1


class Net(nnx.Module):
    """Statistics of the normalized input itself, so that they can be computed by hand."""

    def __init__(self):
        self.norm = BatchNorm(2)
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def __call__(self, fields, scalars):
        return self.linear(self.norm(fields)).astype(fields.dtype)


def stepper():
    return ResidualConfig().build(problem.SPEC, Net(), Normalizer(problem.SPEC, [0.1, 0], [0.7] * 2, [0.3] * 2))


def train(folder, layout=None, objective=None, progress=None, **fields):
    return fit(
        stepper(), problem.datasets(), objective or OneStep(), problem.config(**fields), layout or Layout(), folder,
        progress=progress,
    )  # fmt: skip


def statistics(fitted):
    norm = fitted.stepper.model.norm
    return np.asarray(norm.mean[...]), np.asarray(norm.variance[...])


def by_hand(steps: int, batch: int = 8, parts: int = 1):
    """Running statistics after `steps` updates from true frames."""
    mean, variance = np.zeros(2), np.ones(2)
    windows = iter(Loader(problem.datasets()["train"], 2, batch, seed=0).at(0))
    for _ in range(steps):
        fields = (next(windows).frames[:, 0] - [0.1, 0]) / 0.7
        shares = [fields[i::parts].reshape(-1, 2) for i in range(parts)]
        mean = mean + MOMENTUM * (np.mean([share.mean(0) for share in shares], 0) - mean)
        variance = variance + MOMENTUM * (np.mean([share.var(0, ddof=1) for share in shares], 0) - variance)
    return mean, variance


@pytest.mark.parametrize(
    ("fields", "parts"),
    [({}, 1), ({"updates_per_call": 4}, 1), ({"accumulate": 2}, 2), ({"precision": "bfloat16"}, 1)],
    ids=["plain", "scanned", "accumulated", "bfloat16"],
)
def test_they_follow_the_batches(tmp_path, fields, parts):
    fitted = train(tmp_path, steps=8, select="last", **fields)
    half = fields.get("precision") == "bfloat16"  # the model sees rounded fields
    for ours, expected in zip(statistics(fitted), by_hand(8, parts=parts), strict=True):
        assert_allclose(ours, expected, rtol=2e-3 if half else 1e-5, atol=2e-3 if half else 1e-6)


def test_the_batch_of_four_devices_is_one(tmp_path):
    one, four = (train(tmp_path / str(n), Layout(data=n), steps=6) for n in (1, 4))
    for a, b in zip(statistics(one), statistics(four), strict=True):
        assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # the mean of whole waves is zero


def test_interrupted_and_resumed_is_uninterrupted(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", progress=Trap(signal.SIGTERM, 11))
    parts = train(tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(nnx.state(whole.stepper)), jax.tree.leaves(nnx.state(parts.stepper)), strict=True):
        assert_array_equal(a, b)


def test_every_step_of_a_rollout_moves_them(tmp_path):
    """Two unrolled steps: the second one sees predicted frames, and moves the statistics once more."""
    fitted = train(tmp_path, objective=Unrolled(steps=2, remat=True), steps=1, select="last")
    window = next(iter(Loader(problem.datasets()["train"], 3, 8, seed=0).at(0)))
    by_steps = stepper()
    by_steps.train()
    state = by_steps.encode(window.frames[:, :1], window.context(0, 1))
    for step in range(2):
        state = by_steps.advance(state, window.context(step, 1))
    norm = by_steps.model.norm
    assert_allclose(statistics(fitted), (norm.mean[...], norm.variance[...]), rtol=1e-5, atol=1e-6)


def test_frozen_first_steps_move_them_too(tmp_path):
    fitted = train(tmp_path, objective=Unrolled(steps=2, differentiate=1), steps=4)
    assert not np.allclose(statistics(fitted)[1], by_hand(4)[1], rtol=1e-3)
    assert np.isfinite(jnp.concatenate(statistics(fitted))).all()


def test_an_update_that_is_skipped_leaves_them(tmp_path):
    data = problem.datasets() | {"train": problem.Waves(spoil=[(0, slice(None))])}
    config = problem.config(nonfinite="skip", steps=12)
    fitted = fit(stepper(), data, OneStep(), config, Layout(), tmp_path)
    assert fitted.history[-1].get("skipped", 1) > 0
    assert all(np.isfinite(part).all() for part in statistics(fitted))
