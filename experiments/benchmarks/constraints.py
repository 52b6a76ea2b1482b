"""What does a constraint cost beside a step of the network?

python experiments/benchmarks/constraints.py [--rounds 100]     a minute on 2 cores; expect at most 1.05 for mass fixers
                                                                and linear laws, 1.15 for Leray projections

FNO of width 32 with 16 modes and 4 blocks on 64 x 64 points, float32. In turn in one process: the compiled step of the
free stepper and of the constrained ones; medians of the ratios within a round.
"""

import argparse

from turns import compare, markdown  # first: it sets the number of threads

# ruff: isort: split
import jax
import numpy as np
from flax import nnx

from physml.constraints import DivergenceFree, Linear, MassFixer, Positivity, QuadraticInvariant
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.rollout import rollout
from physml.steppers import ResidualConfig
from physml.steppers.constrained import constrain
from physml.steppers.describe import build_stepper

NAMES, SIZE = ("rho", "u", "v"), 64
CONSTRAINTS = {
    "free": (),
    "mass": (MassFixer("rho"),),
    "mass of 3 channels": (MassFixer(NAMES),),
    "mass, multiplicative": (MassFixer("rho", "multiplicative"),),
    "mass, gradient": (MassFixer("rho", "gradient"),),
    "mass, positive": (MassFixer("rho", positive=True),),
    "positivity": (Positivity("rho"),),
    "linear, mean": (Linear("rho"),),
    "linear, diagonal variance": (Linear("rho", "trapezoid", variance=tuple(1 + np.arange(SIZE * SIZE) % 7)),),
    "Leray projection": (DivergenceFree(("u", "v")),),
    "energy": (QuadraticInvariant(("u", "v")),),
    "enstrophy": (QuadraticInvariant(("u", "v"), "enstrophy"),),
}


def functions(batch: int) -> dict:
    """One step of each stepper."""
    spec = Spec(Grid(tuple(Axis.uniform(name, SIZE) for name in "xy")), tuple(map(Channel, NAMES)))
    model = FNOConfig(width=32, modes=(16, 16), depth=4)
    free = build_stepper(ResidualConfig(), model, spec, Normalizer.identity(spec))
    frames = 1 + 0.3 * np.random.default_rng(0).standard_normal((batch, 1, SIZE, SIZE, len(NAMES)))
    window = jax.device_put(Window.of(frames.astype("f4"), spec))

    def of(constraints):
        graph, numbers = nnx.split(constrain(free, *constraints))
        step = jax.jit(lambda n, w: rollout(nnx.merge(graph, n), w, 1))
        return lambda: step(numbers, window).block_until_ready()

    return {name: of(constraints) for name, constraints in CONSTRAINTS.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    cases = {f"batch {batch}": functions(batch) for batch in (1, 16)}
    print(markdown(compare(cases, rounds, base="free")))
