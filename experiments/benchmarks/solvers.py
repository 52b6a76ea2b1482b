"""What do the adapters of physml.solvers cost over the bare solver package?

python experiments/benchmarks/solvers.py      about a minute on two cores; the ratio should be near 1

Steps per second of exponax's own stepper, called in a loop, and of the physml step function around it (channels last,
state kept in Fourier space between the substeps), with equal time steps. Both run in one process, in turns.
"""

import argparse
import statistics
import time

import exponax
import jax
import jax.numpy as jnp
from jax import lax

from physml.solvers import Burgers, DecayingNavierStokes, Kolmogorov, KuramotoSivashinsky

TAU = 2 * jnp.pi


def cases():
    """(name, physml solver, equivalent exponax stepper); one stored step of physml is `substeps` of exponax."""
    burgers = Burgers(points=1024, solver_points=1024, substeps=200, time_step=0.2)
    ks = KuramotoSivashinsky(substeps=200, time_step=5.0)
    decaying = DecayingNavierStokes(points=64, solver_points=64, substeps=20, time_step=0.1)
    kolmogorov = Kolmogorov(points=64, solver_points=64, substeps=20, time_step=0.1)
    stepper = exponax.stepper
    forced = stepper.KolmogorovFlowVorticity(
        2, TAU, 64, 0.005, diffusivity=1e-2, drag=-0.1, injection_mode=4, injection_scale=-1.0, order=4
    )
    unforced = stepper.NavierStokesVorticity(2, TAU, 64, 0.005, diffusivity=4e-3, order=4)
    return [
        ("Burgers 1024", burgers, stepper.Burgers(1, TAU, 1024, 0.001, diffusivity=0.01, conservative=True, order=4)),
        ("Kuramoto-Sivashinsky 256", ks, stepper.KuramotoSivashinskyConservative(1, 64.0, 256, 0.025, order=4)),
        ("decaying Navier-Stokes 64^2", decaying, unforced),
        ("Kolmogorov 64^2", kolmogorov, forced),
    ]


def seconds(function, state) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(state))
    return time.perf_counter() - start


def measure(solver, bare, rounds: int) -> tuple[float, float, float]:
    """Steps per second of physml and of exponax, and the median ratio of their times in the same round."""
    state = solver.initial(jax.random.key(0))
    native = jnp.moveaxis(state, -1, 0)
    physml = jax.jit(solver.stepper())
    exponax_only = jax.jit(lambda u: lax.fori_loop(0, solver.substeps, lambda _, v: bare(v), u))
    seconds(physml, state), seconds(exponax_only, native)  # compile
    pairs = [(seconds(physml, state), seconds(exponax_only, native)) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return solver.substeps / ours, solver.substeps / theirs, statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--precision", choices=("float32", "float64"), default="float64")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}, {options.precision}, median of {options.rounds} rounds")
    print("| solver | physml, steps/s | exponax, steps/s | time ratio |\n|---|---|---|---|")
    with jax.enable_x64(options.precision == "float64"):
        for name, solver, bare in cases():
            ours, theirs, ratio = measure(solver, bare, options.rounds)
            print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
