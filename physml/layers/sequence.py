"""Blocks of a network, one after another."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.custom_derivatives import SymbolicZero


def apply_in_turn(blocks: Sequence[nnx.Module], x, *, remat: bool = False):
    """`blocks[-1](... blocks[0](x))`, where blocks keep shape and dtype; `remat` recomputes them when differentiated.

    On CPU, leading blocks that are equal but for their weights run in a loop while nothing is differentiated. XLA fuses
    the elementwise work of a block into each of its readers, down to the first block, and so computes it several times
    over; the end of a loop body stops that (a 64 x 64 FNO of four blocks takes 0.7 of the time). Derivatives are those
    of the plain sequence: a loop would have to copy what the backward pass needs into stacks.
    """
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    equal = next((i for i, graph in enumerate(graphs) if graph != graphs[0]), len(graphs))

    def step(graph, state, x):
        return nnx.merge(graph, state)(x)

    recomputed = jax.checkpoint(step, static_argnums=0) if remat else step

    def plain(states, x):
        for graph, state in zip(graphs, states, strict=True):
            x = recomputed(graph, state, x)
        return x

    def looped(states, x):
        stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states[:equal])
        x, _ = jax.lax.scan(lambda x, state: (step(graphs[0], state, x), None), x, stacked)
        for graph, state in zip(graphs[equal:], states[equal:], strict=True):
            x = step(graph, state, x)
        return x

    if equal < 2:
        return plain(states, x)
    evaluate = jax.custom_jvp(lambda states, x: jax.lax.platform_dependent(states, x, cpu=looped, default=plain))
    evaluate.defjvp(lambda primals, tangents: _jvp(plain, primals, tangents), symbolic_zeros=True)
    return evaluate(states, x)


def _jvp(function, primals, tangents):
    """`jax.jvp` that spends nothing on arguments whose tangent is known to be zero."""
    leaves, tree = jax.tree.flatten(primals)
    along = jax.tree.leaves(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    active = [i for i, leaf in enumerate(along) if not isinstance(leaf, SymbolicZero)]

    def partial(*values):
        given = dict(zip(active, values, strict=True))
        return function(*jax.tree.unflatten(tree, [given.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(partial, [leaves[i] for i in active], [along[i] for i in active])
