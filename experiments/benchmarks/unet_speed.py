"""How fast are SineNet and the modern U-Net on this CPU, against plain PyTorch networks with the same weights?

python experiments/benchmarks/unet_speed.py --rounds 10          needs the extra `peers`; some minutes on two cores

SineNet-8 at width 16 (64 x 64 points) and the modern U-Net at width 64 with multipliers (1, 2, 2) (32 x 32 points),
batch 2, float32, 2 threads. Forward pass and AdamW training step of both libraries take turns, so that other load hits
them alike; reported are medians of elapsed and processor time, their ratios, and the seconds to trace and compile a
step. `--full` compiles the training step of the published sinenet-8 (width 64, 128 x 128) from abstract shapes, without
running it. `--unrolled` runs waves one after another.
"""

# ruff: noqa: E402
import argparse
import json
import sys
import time

from turns import THREADS, compare, of_torch  # isort: split

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from physml.convert import FAMILIES
from physml.models.named import NAMED

BATCH = 2
FIELDS = {
    "n_input_scalar_components": 1, "n_input_vector_components": 1, "n_output_scalar_components": 1,
    "n_output_vector_components": 1, "time_history": 4, "time_future": 1,
}  # fmt: skip
CASES = {
    "sinenet": (64, {"hidden_channels": 16, "mult": 1.425, "num_waves": 8, "padding_mode": "circular"}),
    "modern_unet": (32, {"hidden_channels": 64, "ch_mults": (1, 2, 2), "norm": True, "activation": "gelu"}),
}


def peer(family, kwargs, x, y):
    """The PyTorch network: its weights, one forward pass, one training step."""
    import torch
    from torch_unets import ModernUNet, SineNet

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = {"sinenet": SineNet, "modern_unet": ModernUNet}[family](x.shape[-1], y.shape[-1], **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-5)
    return of_torch(model, optimizer, x, y)


def ours(family, kwargs, weights, x, y):
    """physml with the same weights: forward, step and the seconds that tracing and compiling the step took."""
    config = {"kwargs": {**FIELDS, **kwargs}, "input_shape": (1, 4, 3, *x.shape[1:-1])}
    model = FAMILIES[family].build(config, weights)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(1e-4, weight_decay=1e-5)
    scalars = jnp.zeros((BATCH, 0))
    predict = jax.jit(lambda params, x: nnx.merge(graph, params, rest)(x, scalars))
    state = [params, optimizer.init(params)]
    start = time.perf_counter()
    compiled = update_of(graph, rest, optimizer).lower(*state, x, scalars, y).compile()
    seconds = time.perf_counter() - start

    def step():
        *state[:], loss = compiled(*state, x, scalars, y)
        return float(loss)

    return lambda: np.asarray(predict(params, x)), step, seconds


def update_of(graph, rest, optimizer):
    @jax.jit
    def update(params, moments, x, scalars, y):
        def loss_of(params):
            return jnp.mean((nnx.merge(graph, params, rest)(x, scalars) - y) ** 2)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        change, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, change), moments, loss

    return update


def compile_published(name: str) -> dict:
    """Seconds to trace and to compile the training step of a published size, from abstract shapes."""
    named, optimizer = NAMED[name], optax.adamw(2e-4, weight_decay=1e-5)
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: named.build(nnx.Rngs(0))), nnx.Param, ...)
    shapes = [
        jax.ShapeDtypeStruct((4, *named.signature.grid.shape, n), jnp.float32)
        for n in (named.signature.inputs, named.signature.outputs)
    ]
    scalars = jax.ShapeDtypeStruct((4, named.signature.scalars), jnp.float32)
    clocks = [(time.perf_counter(), time.process_time())]
    lowered = update_of(graph, rest, optimizer).lower(
        params, jax.eval_shape(optimizer.init, params), shapes[0], scalars, shapes[1]
    )
    clocks.append((time.perf_counter(), time.process_time()))
    memory = lowered.compile().memory_analysis()
    clocks.append((time.perf_counter(), time.process_time()))
    seconds = [[round(after - before, 1) for before, after in zip(*pair)] for pair in zip(clocks, clocks[1:])]
    return {
        "trace s, elapsed and processor": seconds[0],
        "compile s, elapsed and processor": seconds[1],
        "temporary MB": round(memory.temp_size_in_bytes / 1e6),
    }


def measure(family: str, rounds: int) -> dict:
    points, kwargs = CASES[family]
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((BATCH, points, points, n)).astype(np.float32) for n in (12, 3))
    weights, *theirs = peer(family, kwargs, x, y)
    *mine, compiling = ours(family, kwargs, weights, x, y)
    difference = np.abs(theirs[0]() - mine[0]()).max() / np.abs(theirs[0]()).max()
    found = {"compile step s": compiling, "largest difference": float(difference)}
    cases = {what: {"torch": theirs[i], "physml": mine[i]} for i, what in enumerate(("forward", "step"))}
    return found | {"times": compare(cases, rounds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=list(CASES), help="one network")
    parser.add_argument("--full", action="store_true", help="compile the published sinenet-8 instead")
    parser.add_argument("--unrolled", action="store_true", help="no loop over waves")
    options = parser.parse_args()
    if options.unrolled:
        import physml.layers.stack

        physml.layers.stack.LOOP_FROM = sys.maxsize
    if options.full:
        print(json.dumps({"sinenet-8": compile_published("sinenet-8-circular")}, indent=1))
        return
    for family in [options.only] if options.only else CASES:
        print(json.dumps({family: measure(family, options.rounds)}, indent=1))


if __name__ == "__main__":
    main()
