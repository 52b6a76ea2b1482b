"""Equal blocks of a network with their parameters in one array each."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LOOP_FROM = 8  # blocks from which compiling them one by one takes longer than it saves


class Stack(nnx.Module):
    """`depth` blocks, equal but for their numbers. Every parameter has a leading axis, one entry for each block.

    From `LOOP_FROM` blocks on they run in a loop, so that time and size of a compilation do not grow with their number;
    fewer blocks run one after another, which spares the copies of a loop. Blocks that are recomputed always run in one,
    whose end keeps XLA from computing early, and holding, what the backward pass needs late.

    Attributes:
        blocks: one module that holds the parameters of all.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
        self.depth = depth
        self.blocks = _build(build, jax.random.split(rngs.params(), depth))

    def __call__(
        self,
        x: Any,
        apply: Callable[..., Any],
        variants: Sequence[Any],
        numbers: Any = None,
        *,
        remat: bool = False,
        visit: Callable[[int, Any], None] | None = None,
    ) -> Any:
        """`x` after `apply(block, x, variant, number)` of every block in turn.

        `variants` are static and repeat: block i gets `variants[i % len(variants)]`. `numbers` is a pytree of arrays,
        entry i of which is for block i. `remat` recomputes each block in the backward pass. `visit(i, x)` sees the
        result of every block (then there is no loop).
        """
        graph, state = nnx.split(self.blocks)
        period = len(variants)

        def step(variant):
            def run(x, state, number):
                return apply(nnx.merge(graph, state), x, variant, number)

            return jax.checkpoint(run) if remat else run

        steps, loops = [step(variant) for variant in variants], 0
        if self.depth >= (period + 1 if remat else LOOP_FROM) and visit is None:
            loops = self.depth // period

            def body(x, entries):
                for j, one in enumerate(steps):
                    x = one(x, *_entry(entries, j))
                return x, None

            grouped = jax.tree.map(
                lambda leaf: jnp.reshape(leaf[: loops * period], (loops, period, *leaf.shape[1:])), (state, numbers)
            )
            x, _ = jax.lax.scan(body, x, grouped)
        for i in range(loops * period, self.depth):
            x = steps[i % period](x, *_entry((state, numbers), i))
            if visit is not None:
                visit(i, x)
        return x


def _build(build, keys):
    if isinstance(keys, jax.core.Tracer):
        return nnx.vmap(lambda key: build(nnx.Rngs(params=key)))(keys)
    # The same block by block, on the host: mapped draws would be compiled for every shape anew.
    graphs, states = zip(*(nnx.split(build(nnx.Rngs(params=key))) for key in keys), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves])), *states)
    return nnx.merge(graphs[0], stacked)


def _entry(tree, i: int):
    return jax.tree.map(lambda leaf: leaf[i], tree)
