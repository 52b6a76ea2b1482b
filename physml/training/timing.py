"""How long an update takes, measured before a run is planned."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from physml.data.loader import Loader
from physml.parallel.mesh import Layout
from physml.training.optimizers import TrainingConfig
from physml.training.update import build_update, initial_state, split


def seconds_per_update(
    stepper, dataset, objective, config: TrainingConfig, layout: Layout, least: float = 1.0
) -> float:
    """Seconds of one update with its data, without compilation: the median of calls that take `least` seconds in all.

    The stepper keeps its weights.
    """
    parts, params, rest = split(stepper, config.optimizer)
    with layout.use():
        transform, update = build_update(objective, parts, config, config.steps, layout.replicated())
        state = layout.replicate(initial_state(params, transform, config, parts.statistics(rest)))
        fixed, key = layout.replicate(jax.tree.map(jnp.array, rest)), layout.replicate(jax.random.key(0))
        loader = iter(Loader(dataset, objective.frames(stepper.history), config.batch, seed=0, threads=config.threads))
        times, count = [], config.updates_per_call
        while sum(times[1:]) < least:
            start = time.perf_counter()
            windows = tuple(layout.place(next(loader)) for _ in range(count))
            state, _ = jax.block_until_ready(update(state, fixed, key, windows, np.int32(count)))
            times.append(time.perf_counter() - start)
    return float(np.median(times[1:])) / count
