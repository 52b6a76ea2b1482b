"""What does a step of PDE-Refiner cost, against as many bare calls of its network?

python experiments/benchmarks/refiner.py [--rounds 15]     a minute on 2 cores; expect ratios of at most 1.05

K = 3, so a step is four calls and the arithmetic of the noise between them. In turn in one process: a compiled step of
the stepper with its random numbers, and four calls of the compiled network alone; medians of the ratios within a round.
"""

import argparse

from turns import compare, markdown  # first: it sets the number of threads

# ruff: isort: split
import jax
import numpy as np
from flax import nnx

from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models import FNOConfig, ModernUNetConfig
from physml.normalize import Normalizer
from physml.rollout import rollout
from physml.steppers import RefinerConfig
from physml.steppers.describe import build_stepper

CASES = {
    "modern U-Net, KS, 128 points, batch 32": (1, 128, 32, ModernUNetConfig(width=16, multipliers=(1, 2, 2), blocks=1)),
    "modern U-Net, 64 x 64, batch 4": (2, 64, 4, ModernUNetConfig(width=16, multipliers=(1, 2, 2), blocks=1)),
    "FNO, 64 x 64, batch 4": (2, 64, 4, FNOConfig(width=32, modes=(16,), depth=4)),
}


def functions(dims: int, points: int, batch: int, model) -> dict:
    """One step of the refiner, and its network called as often."""
    spec = Spec(Grid(tuple(Axis.uniform(name, points, periodic=True) for name in "yx"[:dims])), (Channel("u"),))
    config = RefinerConfig()
    stepper = build_stepper(config, model, spec, Normalizer.identity(spec))
    window = Window.of(np.random.default_rng(0).standard_normal((batch, 1, *spec.grid.shape, 1)).astype("f4"), spec)
    window = jax.device_put(window)
    graph, numbers = nnx.split(stepper)
    net, weights = nnx.split(stepper.model)
    step = jax.jit(lambda n, w, key: rollout(nnx.merge(graph, n), w, 1, key))
    call = jax.jit(lambda n, fields, scalars: nnx.merge(net, n)(fields, scalars))
    fields = jax.numpy.concatenate([window.frames[:, 0]] * 2, axis=-1)
    scalars, key = jax.numpy.ones((batch, 1)), jax.random.key(0)

    def bare():
        for _ in range(config.refinements + 1):
            call(weights, fields, scalars).block_until_ready()

    return {"network": bare, "refiner": lambda: step(numbers, window, key).block_until_ready()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(markdown(compare({name: functions(*case) for name, case in CASES.items()}, rounds, base="network")))
