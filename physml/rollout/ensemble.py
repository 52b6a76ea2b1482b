"""Ensembles: the same start with other random keys, or with the parameters of other members."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Window
from physml.rollout.scan import rollout


def stack_members(steppers: list):
    """One stepper whose numbers carry a leading member axis, from steppers of one architecture.

    Raises ConfigError when the architectures differ.
    """
    if not steppers:
        raise ConfigError("There are no members to stack.")
    graphs, states = zip(*(nnx.split(stepper) for stepper in steppers), strict=True)
    for i, graph in enumerate(graphs):
        if graph != graphs[0]:
            raise ConfigError(f"Member {i} is built differently from member 0. Stack steppers of one config and spec.")
    return nnx.merge(graphs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def ensemble(stepper, window: Window, steps: int, keys=None, *, stacked: bool = False, remat: bool | str = "none"):
    """Rollouts of several members from one window, `(member, batch, lead, ...)`, side by side on one device.

    Args:
        keys: typed PRNG keys `(member,)` of a stochastic stepper.
        stacked: the numbers of `stepper` carry a leading member axis, see `stack_members`.

    Raises ConfigError when neither keys nor stacked numbers make members, or when their counts differ.
    """
    graph, state = nnx.split(stepper)
    members(state, keys, stacked)
    return _vmapped(graph, steps, stacked, keys is not None, remat)(state, window, keys)


def ensemble_devices(
    stepper, window: Window, steps: int, keys=None, *, stacked: bool = False, remat: bool | str = "none", devices=None
):
    """The same, members spread over the local accelerators with `jax.pmap`; every device does its share with `vmap`.

    A number of members that does not divide over the devices is filled up with repeats, which are dropped again.
    """
    graph, state = nnx.split(stepper)
    count = members(state, keys, stacked)
    devices = tuple(devices or jax.local_devices())[:count]
    share = -(-count // len(devices))
    take = jnp.minimum(jnp.arange(len(devices) * share), count - 1)

    def spread(array):
        return array[take].reshape(len(devices), share, *array.shape[1:])

    state = jax.tree.map(spread, state) if stacked else state
    keys = None if keys is None else spread(keys)
    frames = _pmapped(graph, steps, stacked, keys is not None, remat, devices)(state, window, keys)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], frames)


def members(state, keys, stacked: bool) -> int:
    """How many members there are. Raises ConfigError when that is not clear."""
    counts = set() if keys is None else {len(keys)}
    if stacked:
        counts |= {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(state)}
    if len(counts) != 1 or 0 in counts:
        raise ConfigError(
            f"An ensemble needs keys (one per member) or a stepper with stacked numbers (stack_members), of one count; "
            f"the counts are {sorted(counts) or 'none'}."
        )
    return counts.pop()


def _member(graph, steps: int, stacked: bool, keyed: bool, remat):
    def run(state, window, key):
        return rollout(nnx.merge(graph, state), window, steps, key, remat=remat)

    return jax.vmap(run, in_axes=(0 if stacked else None, None, 0 if keyed else None))


@functools.lru_cache(maxsize=32)  # the functions must be the same objects, or every call would compile again
def _vmapped(graph, steps, stacked, keyed, remat):
    return jax.jit(_member(graph, steps, stacked, keyed, remat))


@functools.lru_cache(maxsize=32)
def _pmapped(graph, steps, stacked, keyed, remat, devices):
    axes = (0 if stacked else None, None, 0 if keyed else None)
    return jax.pmap(_member(graph, steps, stacked, keyed, remat), in_axes=axes, devices=devices)
