"""Ensembles as one stepper: members keep their own rollouts, and what one of them skips all of them skip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.errors import CheckpointError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.normalize import Normalizer
from physml.rollout import rollout, rollout_chunks
from physml.rollout.state import named
from physml.steppers import BundledConfig, GaussianConfig, IntervalConfig, stack_members

SPEC = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"),), time_step=1.0)
NORMALIZER = Normalizer(SPEC, [0.0], [1.0], [0.3], intervals={1: [0.3], 3: [0.7]})
KINDS = {"bundled": (BundledConfig(bundle=3), 3), "averaged": (IntervalConfig((1, 3), average=True), 1)}


class Sine(nnx.Module):
    """Its sine marks the network in a program."""

    def __init__(self, factor, outputs):
        self.factor, self.outputs = nnx.Param(jnp.float32(factor)), outputs

    def __call__(self, fields, scalars):
        return jnp.concatenate([jnp.sin((k + 1) * self.factor[...] * fields) for k in range(self.outputs)], -1)


def ensemble_of(kind):
    config, outputs = KINDS[kind]
    return stack_members([config.build(SPEC, Sine(factor, outputs), NORMALIZER) for factor in (0.5, 2.0)])


def windows(batch):
    return Window.of(np.random.default_rng(0).standard_normal((batch, 1, 8, 1)).astype("f4"), SPEC)


def calls(jaxpr, conditional=False):
    """Of every sine whether it is computed on a condition."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sin":
            yield conditional
        for part in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if inner := getattr(part, "jaxpr", part if hasattr(part, "eqns") else None):
                yield from calls(inner, conditional or equation.primitive.name == "cond")


@pytest.mark.parametrize(("kind", "always"), [("bundled", 0), ("averaged", 1)])
def test_networks_of_members_are_called_when_one_would_be(kind, always):
    """`always`: sines of every step, those of the interval 1."""
    members = ensemble_of(kind)
    for stepper in (members, members.apart(), members.member(0)):
        program = jax.make_jaxpr(functools.partial(rollout, stepper, steps=7))(windows(2))
        found = list(calls(program.jaxpr))
        assert found.count(False) == always
        assert found.count(True) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_of_members_are_those_of_each_alone(kind):
    members, window = ensemble_of(kind), windows(4)
    parts = [jax.tree.map(lambda a: a[:2], window), jax.tree.map(lambda a: a[2:], window)]

    @jax.jit
    def everything(window, parts):
        apart = [rollout(members.member(i), part, 7) for i, part in enumerate(parts)]
        same = [rollout(members.member(i), parts[0], 7) for i in range(2)]
        return rollout(members.apart(), window, 7), apart, rollout(members, parts[0], 7), same

    together, apart, mean, same = everything(window, parts)
    assert_allclose(together, np.concatenate(apart), rtol=1e-5, atol=1e-6)
    assert_allclose(mean, np.mean(same, 0), rtol=1e-5, atol=1e-6)
    assert np.abs(same[0] - same[1]).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_of_members_are_continued_within_a_bundle(kind):
    stepper, window = ensemble_of(kind).apart(), windows(4)
    first, second = rollout_chunks(stepper, window, 7, 4)
    (again,) = rollout_chunks(stepper, window, 7, 4, resume=(4, named(first.state)))
    assert np.array_equal(again.frames, second.frames)
    assert_allclose(np.concatenate([first.frames, second.frames], 1), rollout(stepper, window, 7), rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="not one of this stepper"):
        next(rollout_chunks(ensemble_of(kind).member(0), window, 7, 4, resume=(4, named(first.state))))


def test_every_member_moves_to_another_grid_with_its_own_weights():
    finer = Grid((Axis.uniform("x", 16),))
    members = ensemble_of("bundled")
    moved = members.on_grid(finer)
    assert moved.spec.grid == finer
    for i in range(2):
        assert moved.member(i).spec.grid == finer
        assert moved.member(i).model.factor[...] == members.member(i).model.factor[...]


def test_equal_members_draw_their_own_numbers():
    noisy = GaussianConfig(sample=True).build(SPEC, Sine(1.0, 2), NORMALIZER)
    members, window = stack_members([noisy, noisy]), windows(1)
    both = jax.tree.map(lambda a: np.concatenate([a, a]), window)
    first, second = rollout(members.apart(), both, 2, jax.random.key(0))
    assert np.abs(first - second).max() > 0.01
