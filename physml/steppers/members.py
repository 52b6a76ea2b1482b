"""Ensembles of steppers of one architecture, as one stepper: every array carries a leading member axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Context, Gaussian
from physml.metrics.calibration import gaussian_mixture


class Members(nnx.Module):
    """`count` steppers that run side by side; as a stepper it predicts the mean of their separate rollouts.

    `apart()` gives every member's own frames, `member(i)` one stepper, `Distribution(members)` mean and variance of the
    mixture of Gaussian steppers. Saved and loaded as one folder.

    Integers without axes in a state are taken for counters of steps and are one for all members: they may not depend on
    a member's numbers.

    Attributes:
        stacked: a stepper whose numbers all have a leading member axis.
    """

    def __init__(self, stacked, count: int):
        self.stacked, self.count = stacked, count
        self.history, self.spec = stacked.history, stacked.spec

    def encode(self, frames, context: Context):
        return self._each("encode", frames, context, shared=True, given=None)

    def advance(self, state, context: Context, **options):
        return self._each("advance", state, context, shared=True, **options)

    def decode(self, state):
        return self._decoded(state).mean(0)

    def distribution(self, state) -> Gaussian:
        """The last frame with the variance of an equal mixture of the members (deep ensembles, Lakshminarayanan et al.
        2017, arXiv:1612.01474, section 2.4; with the unbiased variance of their means)."""
        parts = self._decoded(state, "distribution")
        return Gaussian(*gaussian_mixture(parts.mean, parts.variance))

    def apart(self) -> "Apart":
        """The members side by side along the batch axis, see `Apart`."""
        return Apart(self)

    def member(self, number: int) -> Any:
        """One of the steppers."""
        graph, state = nnx.split(self.stacked)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], state))

    def on_grid(self, grid) -> "Members":
        """The same weights on another grid. Raises SpecError where the architecture does not allow it."""
        return stack_members([self.member(i).on_grid(grid) for i in range(self.count)])

    @property
    def config(self):
        """Of every member, as `model` and `constraints`."""
        return self.stacked.config

    @property
    def model(self):
        return self.stacked.model

    @property
    def constraints(self):
        return self.stacked.constraints

    @property
    def normalizer(self):
        """That of the first member; seeds of one experiment share it."""
        return self.member(0).normalizer

    def _decoded(self, state, method: str = "decode"):
        graph, numbers = nnx.split(self.stacked)

        def call(own, state, counters):
            return getattr(nnx.merge(graph, own), method)(_joined(state, counters))

        return jax.vmap(call, (0, 0, None))(numbers, *_parted(state))

    def _each(self, method: str, state, context: Context, *, shared: bool, given: int | None = 0, **options):
        """`method` of every member. `shared`: one context for all of them; `given`: the member axis of `state`."""
        graph, numbers = nnx.split(self.stacked)
        keys = None if context.key is None else jax.vmap(jax.random.fold_in, (None, 0))(
            context.key, jnp.arange(self.count)
        )  # fmt: skip

        def call(own, state, counters, context, key):
            member, context = nnx.merge(graph, own), dataclasses.replace(context, key=key)
            return _parted(getattr(member, method)(_joined(state, counters), context, **options))

        axes = (0, given, None, None if shared else 0, None if keys is None else 0)
        arguments = (numbers, *_parted(state), dataclasses.replace(context, key=None), keys)
        return _joined(*jax.vmap(call, axes, (0, None))(*arguments))


def _parted(state):
    """(all but the counters, the counters), None in place of the others. A counter with a member axis would make
    `jax.lax.cond` of it compute both branches: a bundled stepper would call its network at every step.
    """

    def pick(counters: bool):
        return jax.tree.map(lambda leaf: leaf if _counts(leaf) == counters else None, state)

    return pick(False), pick(True)


def _counts(leaf) -> bool:
    return jnp.ndim(leaf) == 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)


def _joined(state, counters):
    return jax.tree.map(lambda a, b: b if a is None else a, state, counters, is_leaf=lambda leaf: leaf is None)


class Apart(nnx.Module):
    """A stepper of batches `(member * batch, ...)`, member by member: each runs on its own part of them."""

    def __init__(self, members: Members):
        self.members = members
        self.history, self.spec = members.history, members.spec

    @property
    def normalizer(self):
        return self.members.normalizer

    def encode(self, frames, context: Context):
        return self.members._each("encode", self._split(frames), self._split_context(context), shared=False)

    def advance(self, state, context: Context):
        return self.members._each("advance", state, self._split_context(context), shared=False)

    def decode(self, state):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.members._decoded(state))

    def _split(self, tree):
        count = self.members.count

        def split(leaf):
            if leaf.shape[0] % count:
                raise ConfigError(
                    f"A batch of {leaf.shape[0]} cannot be shared by {count} members. Repeat the window for each."
                )
            return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])

        return jax.tree.map(split, tree)

    def _split_context(self, context: Context) -> Context:
        return dataclasses.replace(self._split(dataclasses.replace(context, key=None)), key=context.key)


def drawn(stepper):
    """A Gaussian stepper, or an ensemble of them, with every step drawn; any other stepper itself."""
    single = stepper.stacked if isinstance(stepper, Members) else stepper
    if not hasattr(single, "sampled"):
        return stepper
    return Members(single.sampled(), stepper.count) if isinstance(stepper, Members) else single.sampled()


def stack_members(steppers: list) -> Members:
    """The ensemble of several steppers of one architecture and spec, e.g. of `physml.load` of several runs.

    Raises ConfigError when the architectures differ.
    """
    if not steppers:
        raise ConfigError("There are no members to stack.")
    graphs, states = zip(*(nnx.split(stepper) for stepper in steppers), strict=True)
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    for i, graph in enumerate(graphs):
        if graph != graphs[0] or shapes[i] != shapes[0]:
            raise ConfigError(f"Member {i} is built differently from member 0. Stack steppers of one config and spec.")
    return Members(nnx.merge(graphs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)), len(steppers))
