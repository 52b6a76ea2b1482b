"""What do eight seeds trained at once cost, against eight times one? The networks of APEBench, in one dimension.

python experiments/benchmarks/members.py [--seeds 8 --points 160 --batch 20 --rounds 15 --calls 4 --networks conv fno]

Compiled updates (forward, gradient, Adam) on batches that stay on the device, four to a call: one seed on one device,
and all seeds in one program, spread over all devices as training does, in turn in one process. The ratio of the time of
all to that of one should be at most 0.7 times the number of seeds. Medians over rounds, the least times, and processor
time, which tells of other jobs on the machine, and how many cores one seed keeps busy. A minute.
XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two devices of a CPU.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models import MODELS
from physml.normalize import Normalizer
from physml.objectives import OneStep
from physml.parallel.mesh import Layout
from physml.steppers import ResidualConfig, stack_members
from physml.steppers.describe import build_stepper
from physml.training import OptimizerConfig, TrainingConfig
from physml.training.members import spread_members
from physml.training.update import build_update, initial_state, split

NETWORKS = {
    "conv": MODELS["conv_net"](width=34, depth=10),
    "fno": MODELS["classic_fno"](width=18, modes=(12,), depth=4, projection=18),
    "resnet": MODELS["resnet"](width=26, depth=8, activation="relu"),
    "unet": MODELS["classic_unet"](width=12, levels=2),
}


def prepare(network, seeds: int, points: int, batch: int, config: TrainingConfig):
    """`run(calls)` -> (seconds, processor seconds) per update; of one stepper where `seeds` is 0."""
    spec = Spec(Grid((Axis.uniform("x", points),)), (Channel("u"),))
    steppers = [
        build_stepper(ResidualConfig(), network, spec, Normalizer.identity(spec), seed=seed)
        for seed in range(max(seeds, 1))
    ]
    parts, params, rest = split(stack_members(steppers).stacked if seeds else steppers[0])
    layout = spread_members(Layout(), seeds) if seeds else Layout(data=1)
    own = NamedSharding(layout.mesh, PartitionSpec("member"))
    places = (own, NamedSharding(layout.mesh, PartitionSpec(None, "member"))) if seeds else None
    transform, update = build_update(OneStep(), parts, config, config.steps, places, members=bool(seeds))

    def start(params, statistics):
        return initial_state(params, transform, config, statistics)

    state = (jax.vmap(start) if seeds else start)(params, parts.statistics(rest))
    frames = np.random.default_rng(0).standard_normal((max(seeds, 1) * batch, 2, points, 1)).astype(np.float32)
    window = Window.of(frames, spec)
    keys = jax.random.key(0)
    if seeds:
        window = jax.tree.map(lambda a: np.asarray(a).reshape(seeds, batch, *a.shape[1:]), window)
        keys = jax.random.split(keys, seeds)
        state, rest, keys, window = jax.device_put((state, rest, keys, window), own)
    windows = (window if seeds else jax.device_put(window),) * config.updates_per_call
    count = np.int32(len(windows))

    def run(calls: int) -> tuple[float, float]:
        nonlocal state
        wall, cpu = time.perf_counter(), time.process_time()
        with layout.use():
            for _ in range(calls):
                state, metrics = update(state, rest, keys, windows, count)
        jax.block_until_ready((state, metrics))
        updates = calls * len(windows)
        return (time.perf_counter() - wall) / updates, (time.process_time() - cpu) / updates

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("seeds", 8), ("points", 160), ("batch", 20), ("rounds", 15), ("calls", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--updates-per-call", type=int, default=4)
    parser.add_argument("--networks", nargs="+", default=sorted(NETWORKS), choices=sorted(NETWORKS))
    options = parser.parse_args()
    config = TrainingConfig(updates_per_call=options.updates_per_call, optimizer=OptimizerConfig("adam"))
    result = {"device": jax.devices()[0].device_kind, **vars(options), "bound": round(0.7 * options.seeds, 2)}
    for name in options.networks:
        runs = {
            what: prepare(NETWORKS[name], seeds, options.points, options.batch, config)
            for what, seeds in (("one", 0), ("all", options.seeds))
        }
        times = {what: [] for what in runs}
        for run in runs.values():
            run(1)
        for _ in range(options.rounds):
            for what, run in runs.items():
                times[what].append(run(options.calls))
        entry = {}
        for position, clock in enumerate(("wall", "cpu")):
            for summary, reduce in (("median", statistics.median), ("least", min)):
                one, every = (1e3 * reduce(t[position] for t in times[what]) for what in ("one", "all"))
                entry[f"{clock}, {summary}"] = {
                    "one_ms": round(one, 2), "all_ms": round(every, 2), "ratio": round(every / one, 2),
                }  # fmt: skip
        result[name] = entry
        print(name, json.dumps(entry), flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
