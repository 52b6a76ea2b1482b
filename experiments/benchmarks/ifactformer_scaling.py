"""How does the cost of factorized attention grow with the axes, against attention over all points?

python experiments/benchmarks/ifactformer_scaling.py          two minutes on two cores; --rounds 3 for a quick look

One attention block (width 32, 4 heads of 16, float32, one sample) on grids n x 32 with n = 16 ... 256, and on n x n x n
with n = 8 ... 32; full attention has the same width, heads and maps, with one softmax over all points. Operations are
those of the compiled program, so they do not depend on other load; times are medians of runs that take turns. Expected:
with each point more on an axis the factorized forms add about 2 * 64 operations per point of the grid (the kernel's
row), whatever the other axes; full attention adds 276 times the product of the others.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from physml.fields import Axis  # noqa: E402
from physml.layers.factorized_attention import FactorizedAttention  # noqa: E402

WIDTH, HEADS, HEAD_WIDTH = 32, 4, 16
LARGEST_FULL = 4096  # points: the tables of all pairs of four heads take 256 MiB


def factorized(shape, form):
    layer = FactorizedAttention(
        len(shape), WIDTH, HEADS, HEAD_WIDTH, form=form, kernel_width=3 * HEAD_WIDTH, rngs=nnx.Rngs(0)
    )
    axes = [Axis.uniform(name, n, periodic=False) for name, n in zip("xyz", shape)]
    tables = layer.tables(axes, [False] * len(shape))
    return lambda u: layer(u, tables)


def full(shape):
    """Softmax attention over all points with as many channels, between linear maps as in the factorized block."""
    random, channels = np.random.default_rng(0), HEADS * HEAD_WIDTH

    def matrix(a, b):
        return jnp.asarray(random.standard_normal((a, b)) / np.sqrt(a), jnp.float32)

    maps, mix, last = [matrix(WIDTH, channels) for _ in range(3)], matrix(channels, WIDTH), matrix(WIDTH, WIDTH)

    def attend(u):
        flat = u.reshape(1, -1, WIDTH)
        query, key, value = ((flat @ weight).reshape(1, -1, HEADS, HEAD_WIDTH) for weight in maps)
        weights = jax.nn.softmax(jnp.einsum("bihc,bjhc->bhij", query, key) / np.sqrt(HEAD_WIDTH), axis=-1)
        mixed = jnp.einsum("bhij,bjhc->bihc", weights, value).reshape(1, -1, channels)
        return (jax.nn.gelu(mixed @ mix) @ last).reshape(u.shape)

    return attend


def measure(shapes, rounds):
    """`{kind: [(points, operations, seconds, seconds of a gradient)]}`, None where full attention is too large."""
    kinds = {
        "parallel": lambda s: factorized(s, "parallel"),
        "chained": lambda s: factorized(s, "chained"),
        "full": full,
    }
    programs = {}
    for shape in shapes:
        u = jnp.asarray(np.random.default_rng(0).standard_normal((1, *shape, WIDTH)), jnp.float32)
        for kind, make in kinds.items():
            if kind == "full" and np.prod(shape) > LARGEST_FULL:
                continue
            call = make(shape)
            forward = jax.jit(call).lower(u).compile()
            gradient = jax.jit(jax.grad(lambda u, call=call: jnp.sum(call(u) ** 2))).lower(u).compile()
            programs[kind, shape] = forward, gradient, u, [], []
    for _ in range(rounds):
        for forward, gradient, u, *times in programs.values():
            for program, spent in zip((forward, gradient), times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program(u))
                spent.append(time.perf_counter() - start)
    rows = {kind: [] for kind in kinds}
    for (kind, shape), (forward, _, _, *times) in programs.items():
        operations = forward.cost_analysis()["flops"]
        rows[kind].append((shape, int(np.prod(shape)), operations, *(statistics.median(spent) for spent in times)))
    return rows


def slope(x, y):
    """Exponent of a power law through the points."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="write the numbers here as well")
    options = parser.parse_args()
    sets = {
        "n x 32": [(n, 32) for n in (16, 32, 64, 128, 256)],
        "n x n x n": [(n, n, n) for n in (8, 12, 16, 24, 32)],
    }
    result = {}
    for name, shapes in sets.items():
        rows = measure(shapes, options.rounds)
        result[name] = rows
        print(f"\n{name}\n| form | n | points | operations per point | forward ms | gradient ms |\n" + "|---" * 6 + "|")
        for kind, entries in rows.items():
            for shape, points, operations, forward, gradient in entries:
                print(
                    f"| {kind} | {shape[0]} | {points} | {operations / points:.0f} | {1e3 * forward:.2f} | "
                    f"{1e3 * gradient:.2f} |"
                )
        for kind, entries in rows.items():
            n, points, operations, forward, gradient = zip(*((e[0][0], *e[1:]) for e in entries), strict=True)
            added = np.diff(np.array(operations) / points) / np.diff(n)
            print(
                f"{kind}: exponent in n of operations {slope(n, operations):.2f}, forward {slope(n, forward):.2f}, "
                f"gradient {slope(n, gradient):.2f}; operations per point added by one more n: "
                + ", ".join(f"{value:.0f}" for value in added)
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
