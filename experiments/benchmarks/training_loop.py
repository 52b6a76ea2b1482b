"""What does the training loop cost on top of its compiled update?

python experiments/benchmarks/training_loop.py [--points 64 --width 32 --modes 16 --batch 16 --steps 96 --rounds 3]

The bare update runs on one batch that stays on the device, and is waited for once per `steps`. The whole loop reads and
shuffles windows, places them, records every step, and saves a checkpoint every 48 steps. Both run in turn in one
process; the ratio of the median times per step should be at most 1.10. Seconds of processor time are given too: they
tell the same story on a machine that others use. About 4 minutes on 2 cores.
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import numpy as np

from physml.data import XarrayDataset, from_array, spec_of
from physml.models.fno import FNOConfig
from physml.normalize import Normalizer
from physml.objectives import OneStep
from physml.parallel.mesh import Layout
from physml.steppers import ResidualConfig
from physml.training import OptimizerConfig, TrainingConfig, fit
from physml.training.update import build_update, initial_state, split


class Stopwatch:
    """A progress that notes when each step was reported."""

    def __init__(self):
        self.times = []

    def update(self, done, total, **values):
        self.times.append((done, now()))

    def message(self, text):
        pass


def problem(points: int, width: int, modes: int):
    """A dataset of random fields and an untrained FNO stepper: only time counts here."""
    random = np.random.default_rng(0)
    fields = random.standard_normal((8, 20, points, points)).astype(np.float32)
    ds = from_array(fields, ("trajectory", "time", "x", "y"), periodic=("x", "y"))
    spec = spec_of(ds)
    dataset = XarrayDataset(ds, spec)
    from flax import nnx

    stepper = ResidualConfig()
    model = FNOConfig(width=width, modes=(modes, modes)).build(stepper.signature(spec), nnx.Rngs(0))
    return dataset, stepper.build(spec, model, Normalizer.identity(spec))


def bare(stepper, dataset, config: TrainingConfig, layout: Layout):
    """A function that runs `steps` updates and returns (seconds, processor seconds) per step."""
    from physml.data import Loader

    parts, params, rest = split(stepper)
    objective = OneStep()
    with layout.use():
        transform, update = build_update(objective, parts, config, config.steps, layout.replicated())
        state = layout.replicate(initial_state(params, transform, config))
        rest, key = layout.replicate(rest), layout.replicate(jax.random.key(0))
        window = layout.place(next(Loader(dataset, objective.frames(1), config.batch, seed=0)))
        windows = (window,) * config.updates_per_call
        count = np.int32(len(windows))
        state, _ = jax.block_until_ready(update(state, rest, key, windows, count))

    def measure() -> tuple[float, float]:
        nonlocal state
        with layout.use():
            start = now()
            for _ in range(config.steps // config.updates_per_call):
                state, _ = update(state, rest, key, windows, count)
            jax.block_until_ready(state)
        return per_step(start, now(), config.steps)

    return measure


def whole(stepper, dataset, config: TrainingConfig, layout: Layout) -> tuple[float, float]:
    """The same of a run: from the report of the first call until `fit` returns, the last save included."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        fit(stepper, {"train": dataset}, OneStep(), config, layout, folder, progress=watch)
        end = now()
    first, start = watch.times[0]
    return per_step(start, end, config.steps - first)


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def per_step(start, end, steps: int) -> tuple[float, float]:
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("points", 64), ("width", 32), ("modes", 16), ("batch", 16), ("steps", 96), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--updates-per-call", type=int, default=4)
    options = parser.parse_args()
    layout = Layout()
    dataset, stepper = problem(options.points, options.width, options.modes)
    config = TrainingConfig(
        steps=options.steps, batch=options.batch, log_every=1, checkpoint_every=48, average=0.999,
        updates_per_call=options.updates_per_call, optimizer=OptimizerConfig(weight_decay=1e-4, clip=1.0),
    )  # fmt: skip
    measure = bare(stepper, dataset, config, layout)
    times = {"bare": [], "whole": []}
    for _ in range(options.rounds):
        times["bare"].append(measure())
        times["whole"].append(whole(stepper, dataset, config, layout))
    result = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), **vars(options)}
    for position, what in enumerate(("wall", "cpu")):
        milliseconds = {name: [1e3 * round_[position] for round_ in rounds] for name, rounds in times.items()}
        medians = {name: statistics.median(values) for name, values in milliseconds.items()}
        result[what] = {
            "ratio": round(medians["whole"] / medians["bare"], 3),
            **{f"{name}_ms": [round(value, 1) for value in values] for name, values in milliseconds.items()},
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
