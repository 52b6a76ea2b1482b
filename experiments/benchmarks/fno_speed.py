"""How fast is the FNO on this CPU, against neuraloperator (PyTorch) with the same weights?

python experiments/benchmarks/fno_speed.py          needs the extra `peers`; one minute on two cores

FNO in 2-D: 64 x 64 points, width 32, 16 modes, 4 blocks, batch 16, float32, 2 threads. Forward pass and AdamW training
step of both libraries take turns, so that other load on the machine hits them alike; reported are medians, the ratio of
medians, and the median of the ratios of neighboring runs. CPU time counts all threads and depends less on other load.
Expected: forward at most 0.6 of PyTorch's time, step at most 0.8.
"""

# ruff: noqa: E402
import argparse
import json
import time

from turns import THREADS, compare, markdown, of_torch  # isort: split

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from physml.convert import FAMILIES

POINTS, WIDTH, MODES, DEPTH, BATCH, INPUTS, OUTPUTS = 64, 32, 16, 4, 16, 3, 1
KWARGS = {
    "n_modes": (MODES, MODES),
    "in_channels": INPUTS,
    "out_channels": OUTPUTS,
    "hidden_channels": WIDTH,
    "n_layers": DEPTH,
}


def peer(x, y):
    """neuraloperator: its weights, one forward pass, one training step."""
    import torch
    from neuralop.models import FNO

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = FNO(**KWARGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    return of_torch(model, optimizer, x, y)


def ours(weights, path, x, y):
    """physml with the same weights. Returns forward, step and the seconds that compiling the step took."""
    config = {"kwargs": KWARGS, "input_shape": (1, INPUTS, POINTS, POINTS)}
    model = FAMILIES["fno"].build(config, weights)
    for block in model.blocks:
        block.convolution.path = path
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(1e-3, weight_decay=1e-4)
    scalars = jnp.zeros((BATCH, 0))
    fields, target = jax.device_put((x, y))
    apply = jax.jit(lambda params, x: nnx.merge(graph, params, rest)(x, scalars))

    def update(params, state, x, y):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graph, p, rest)(x, scalars) - y) ** 2))(
            params
        )
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    live = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
    start = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*live, fields, target).compile()
    seconds = time.perf_counter() - start

    def forward():
        return np.asarray(apply(params, fields))

    def step():
        *live[:], loss = compiled(*live, fields, target)
        return float(loss)

    return forward, step, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--paths", nargs="+", default=["auto", "fft"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((BATCH, POINTS, POINTS, c)).astype(np.float32) for c in (INPUTS, OUTPUTS))
    weights, forward, step = peer(x, y)
    forwards, steps, compiling, reference = {"torch": forward}, {"torch": step}, {}, forward()
    first = [step() for _ in range(3)]
    for path in arguments.paths:
        forwards[path], steps[path], compiling[path] = ours(weights, path, x, y)
        error = np.abs(forwards[path]() - reference).max() / np.abs(reference).max()
        assert error < 1e-5, f"{path}: outputs differ by {error:.1e} of their range, so the times compare nothing"
        losses = [steps[path]() for _ in first]
        assert np.allclose(losses, first, rtol=1e-4), f"{path}: losses {losses}, but {first} in PyTorch"
    table = compare({"forward": forwards, "step": steps}, arguments.rounds)
    for row in table:
        row["compile_s"] = round(compiling[row["who"]], 1) if row["what"] == "step" and row["who"] in compiling else ""
    print(json.dumps(table) if arguments.json else markdown(table))


if __name__ == "__main__":
    main()
