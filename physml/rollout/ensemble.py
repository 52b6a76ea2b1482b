"""Ensembles of rollouts: other random keys, the parameters of other members, or other initial states."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Window
from physml.rollout.scan import check_kind, remembered, rollout


def ensemble(stepper, window: Window, steps: int, keys=None, *, remat: bool | str = "none"):
    """Rollouts of several members, `(member, batch, lead, ...)`, side by side on one device.

    Members differ in what is given one for each of them; any of these may go together:

    Args:
        stepper: an ensemble of them (`physml.steppers.stack_members`, training with `seeds`) has parameters for each.
        window: `perturbed` gives it frames for each.
        keys: typed PRNG keys `(member,)` of a stochastic stepper.

    Raises ConfigError when none of them makes members, or when their counts differ.
    """
    graph, state, axes, _ = _plan(stepper, window, keys)
    return _vmapped(graph, steps, axes, remat)(state, window.frames, _without_frames(window), keys)


def ensemble_devices(stepper, window: Window, steps: int, keys=None, *, remat: bool | str = "none", devices=None):
    """The same, members spread over the local accelerators with `jax.pmap`; every device does its share with `vmap`.

    A number of members that does not divide over the devices is filled up with repeats, which are dropped again.
    """
    graph, state, axes, count = _plan(stepper, window, keys)
    devices = tuple(devices or jax.local_devices())[:count]
    share = -(-count // len(devices))
    take = jnp.minimum(jnp.arange(len(devices) * share), count - 1)

    def spread(tree, axis):
        if axis is None:
            return tree
        return jax.tree.map(lambda a: jnp.asarray(a)[take].reshape(len(devices), share, *a.shape[1:]), tree)

    state, frames, keys = map(spread, (state, window.frames, keys), axes)
    frames = _pmapped(graph, steps, axes, remat, devices)(state, frames, _without_frames(window), keys)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], frames)


def _plan(stepper, window: Window, keys):
    """(graph, numbers, member axes of numbers, frames and keys, how many members there are)."""
    check_kind(window)
    inner = getattr(stepper, "stacked", None)
    graph, state = nnx.split(stepper if inner is None else inner)
    batched = window.frames.ndim == 4 + window.spec.grid.ndim
    counts = {
        **({} if keys is None else {"keys": len(keys)}),
        **({} if inner is None else {"steppers": stepper.count}),
        **({"initial states": window.frames.shape[0]} if batched else {}),
    }
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ConfigError(
            f"An ensemble needs keys, steppers (stack_members) or initial states (perturbed), all of one count, but "
            f"there are {counts or 'none'}. Give one of each per member."
        )
    axes = (None if inner is None else 0, 0 if batched else None, None if keys is None else 0)
    return graph, state, axes, next(iter(counts.values()))


def _without_frames(window: Window) -> Window:
    return replace(window, frames=None)


def _member(graph, steps: int, axes, remat):
    def run(state, frames, window, key):
        return rollout(nnx.merge(graph, state), replace(window, frames=frames), steps, key, remat=remat)

    state, frames, keys = axes
    return jax.vmap(run, in_axes=(state, frames, None, keys))


@remembered
def _vmapped(graph, steps, axes, remat):
    return jax.jit(_member(graph, steps, axes, remat))


@remembered
def _pmapped(graph, steps, axes, remat, devices):
    state, frames, keys = axes
    return jax.pmap(_member(graph, steps, axes, remat), in_axes=(state, frames, None, keys), devices=devices)
