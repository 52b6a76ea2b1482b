"""The state of a stepper, any pytree, as named arrays and back; the structure is that of a fresh `encode`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from physml.errors import CheckpointError
from physml.fields import is_key

ROOT = "state"


def named(state) -> dict[str, Any]:
    """Arrays by their place in the pytree, on the host; typed PRNG keys stay keys, complex numbers become pairs."""
    return {name: _plain(leaf) for name, leaf in _leaves(state).items()}


def restore(fresh, arrays: Mapping[str, Any]):
    """The pytree of `fresh` with the numbers of `arrays`.

    Raises CheckpointError naming the first array that is missing, superfluous, or of another shape or dtype.
    """
    leaves = _leaves(fresh)
    for name in sorted(leaves.keys() ^ arrays.keys()):
        kind = "lacks" if name in leaves else "holds the unknown"
        raise _other(f"it {kind} {name}")
    result = []
    for name, leaf in leaves.items():
        want, have = jax.eval_shape(_plain_abstract, leaf), arrays[name]
        if tuple(want.shape) != tuple(have.shape) or want.dtype != have.dtype:
            raise _other(f"{name} is {have.dtype} {tuple(have.shape)} there, but {want.dtype} {tuple(want.shape)} here")
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            have = np.ascontiguousarray(have).view(leaf.dtype)[..., 0]
        result.append(jnp.asarray(have))
    return jax.tree.unflatten(jax.tree.structure(fresh), result)


def _leaves(state) -> dict[str, Any]:
    return {ROOT + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _plain(leaf):
    if is_key(leaf):
        return leaf
    array = np.asarray(leaf)
    return np.stack([array.real, array.imag], -1) if np.iscomplexobj(array) else array


def _plain_abstract(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.stack([leaf.real, leaf.imag], -1)
    return leaf


def _other(difference: str) -> CheckpointError:
    return CheckpointError(
        f"The saved state is not one of this stepper: {difference}. Continue with the model it was saved with, or "
        "start anew."
    )
