"""How fast is scOT on this CPU, how long does it compile, and what does recomputing blocks save?

    python experiments/benchmarks/scot_speed.py              needs the extra `peers` (torch, transformers)
    python experiments/benchmarks/scot_speed.py compile      no peers: compile time of size B, lowering of size L
    python experiments/benchmarks/scot_speed.py memory       no peers: memory of a training step, with and without remat

Speed: Poseidon-T, 128 x 128 points, batch 4, float32, 2 threads: a forward pass, and a training step of AdamW with the
mean absolute error. The peer is as near to scOT as the Swin V2 of `transformers` comes: four of its `Swinv2Stage`s with
the same depths, channels, heads and windows (patch merging among them) as encoder, the same stages without merging as
decoder, two of its `ConvNextLayer`s on each of three skips, and around them linear layers as scOT's: patch embedding,
un-merging, transposed convolution, 5 x 5 convolution. It differs in its norms, which are not conditioned on time and so
have half the numbers, and in two dense layers of position bias less per block being evaluated for repeated offsets. The
weights are not the same; the shapes of all large products are.

Both take turns, so that other load hits them alike; reported are medians, and the median of the ratios of neighboring
runs. CPU time counts all threads and depends less on other load. Expected: at most 0.8 of PyTorch's time for both (the
authors' own code took 336 ms forward and 760 ms per step on two quiet cores); B compiles within 60 s; remat halves the
memory.
"""

# ruff: noqa: E402
import argparse
import dataclasses
import json
import sys
import time

from turns import THREADS, compare  # isort: split

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from physml.models.named import NAMED

BATCH, RATE = 4, 1e-4


def peer(fields, target):
    """The network of `transformers` blocks that the docstring describes. Returns forward, step, parameters."""
    import torch
    from torch import nn
    from transformers.models.convnext.modeling_convnext import ConvNextConfig, ConvNextLayer
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Config, Swinv2PatchMerging, Swinv2Stage

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ours, channels = NAMED["poseidon-t"].config, fields.shape[-1]
    grid = fields.shape[1] // ours.patch
    config = Swinv2Config(
        image_size=fields.shape[1], patch_size=ours.patch, num_channels=channels, embed_dim=ours.width,
        depths=list(ours.depths), num_heads=list(ours.heads), window_size=ours.window, mlp_ratio=ours.mlp_ratio,
        drop_path_rate=0.0,
    )  # fmt: skip

    def stage(number, merging):
        return Swinv2Stage(
            config=config, dim=ours.channels(number), input_resolution=(grid >> number, grid >> number),
            depth=ours.depths[number], num_heads=ours.heads[number], drop_path=[0.0] * ours.depths[number],
            downsample=Swinv2PatchMerging if merging else None,
        )  # fmt: skip

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            last = len(ours.depths) - 1
            self.embed = nn.Conv2d(channels, ours.width, ours.patch, ours.patch)
            self.norm = nn.LayerNorm(ours.width)
            self.encoder = nn.ModuleList(stage(i, i < last) for i in range(last + 1))
            self.decoder = nn.ModuleList(stage(i, False) for i in reversed(range(last + 1)))
            self.skips = nn.ModuleList(
                nn.ModuleList(ConvNextLayer(ConvNextConfig(), dim=ours.channels(i)) for _ in range(blocks))
                for i, blocks in enumerate(ours.skip_blocks)
            )
            self.up = nn.ModuleList(
                nn.ModuleList(
                    [
                        nn.Linear(2 * c, 4 * c, bias=False),
                        nn.LayerNorm(c),
                        nn.Linear(c, c, bias=False),
                    ]
                )
                for c in (ours.channels(i - 1) for i in reversed(range(1, last + 1)))
            )
            self.recover = nn.ConvTranspose2d(ours.width, channels, ours.patch, ours.patch)
            self.mix = nn.Conv2d(channels, channels, 5, padding=2, bias=False)

        def forward(self, x):
            x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
            kept = []
            for i, encode in enumerate(self.encoder):
                size = grid >> i
                # The stage returns its result, its result before merging, and sizes.
                x, before = encode(x, (size, size))[:2]
                b, n, c = before.shape
                skip = before.transpose(1, 2).reshape(b, c, size, size)
                for block in self.skips[i]:
                    skip = block(skip)
                kept.append(skip.flatten(2).transpose(1, 2))
            x = kept.pop()
            for k, decode in enumerate(self.decoder):
                size = grid >> (len(self.decoder) - 1 - k)
                x = decode(x + kept.pop() if k else x, (size, size))[0]
                if k < len(self.up):
                    widen, norm, mix = self.up[k]
                    b, n, c = x.shape
                    x = widen(x).reshape(b, size, size, 2, 2, c // 2).permute(0, 1, 3, 2, 4, 5)
                    x = mix(norm(x.reshape(b, 4 * n, c // 2)))
            x = x.transpose(1, 2).reshape(len(x), ours.width, grid, grid)
            return self.mix(self.recover(x))

    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    u, v = (torch.from_numpy(np.moveaxis(a, -1, 1).copy()) for a in (fields, target))

    def forward():
        with torch.inference_mode():
            return model(u).numpy()

    def step():
        optimizer.zero_grad()
        loss = (model(u) - v).abs().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return forward, step, sum(p.numel() for p in model.parameters())


def abstract(name: str, **options):
    """`(step, its abstract arguments, graph, rest)` of a named size; nothing is allocated."""
    named = NAMED[name]
    config = dataclasses.replace(named.config, **options)
    model = nnx.eval_shape(lambda: config.build(named.signature, nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(RATE)

    def step(params, state, fields, scalars, target):
        def loss(params):
            return jnp.abs(nnx.merge(graph, params, rest)(fields, scalars) - target).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state, value

    field = jax.ShapeDtypeStruct((BATCH, 128, 128, 4), jnp.float32)
    time_ = jax.ShapeDtypeStruct((BATCH, 1), jnp.float32)
    arguments = params, jax.eval_shape(optimizer.init, params), field, time_, field
    return jax.jit(step, donate_argnums=(0, 1)), arguments, optimizer


def ours(fields, target):
    """Poseidon-T. Returns forward, step, seconds of compiling the step, parameters."""
    named = NAMED["poseidon-t"]
    model = named.build(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    scalars = jnp.ones((BATCH, 1))
    u, v = jax.device_put((fields, target))
    apply = jax.jit(lambda params, u: nnx.merge(graph, params, rest)(u, scalars))
    step, arguments, optimizer = abstract("poseidon-t")
    live = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    seconds = time.perf_counter() - start

    def forward():
        return np.asarray(apply(params, u))

    def update():
        *live[:], loss = compiled(*live, u, scalars, v)
        return float(loss)

    return forward, update, seconds, named.parameters


def speed(rounds: int) -> list[dict]:
    random = np.random.default_rng(0)
    fields, target = (random.standard_normal((BATCH, 128, 128, 4)).astype(np.float32) for _ in range(2))
    forward, step, count = peer(fields, target)
    own_forward, own_step, seconds, own_count = ours(fields, target)
    print(
        f"parameters: {own_count:,} here, {count:,} in the peer; the step compiled in {seconds:.0f} s", file=sys.stderr
    )
    cases = {"forward": {"torch": forward, "physml": own_forward}, "step": {"torch": step, "physml": own_step}}
    return compare(cases, rounds)


def compile_times() -> list[dict]:
    rows = []
    for name in ("poseidon-b", "poseidon-l"):
        start, cpu = time.perf_counter(), time.process_time()
        step, arguments, _ = abstract(name)
        lowered = step.lower(*arguments)
        row = {"size": name, "lowered_s": round(time.perf_counter() - start, 1)}
        if name == "poseidon-b":
            lowered.compile()
            row |= {"compiled_s": round(time.perf_counter() - start, 1), "cpu_s": round(time.process_time() - cpu, 1)}
        rows.append(row)
    return rows


def memory() -> list[dict]:
    rows = []
    for remat in (False, True):
        step, arguments, _ = abstract("poseidon-t", remat=remat)
        used = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        rows.append({"size": "poseidon-t", "remat": remat, "temporary_MiB": round(used / 2**20)})
    rows[-1]["ratio"] = round(rows[1]["temporary_MiB"] / rows[0]["temporary_MiB"], 2)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("speed", "compile", "memory"), default="speed")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    result = {"speed": lambda: speed(given.rounds), "compile": compile_times, "memory": memory}[given.what]()
    print("\n".join(json.dumps(row) for row in result))
