"""Which closures and steppers obey what physics does not notice?

    python experiments/invariance.py             trains three small networks; ends with a table
    python experiments/invariance.py --quick     a few updates, to see that it runs

Relative difference between "transform, then predict" and "predict, then transform" (the worst of four flows) for a
moving frame of reference, right angles, mirrors and other units: the exact part of the list of Spalart 2023,
arXiv:2308.00837. Closures give a stress of the velocity and keep their random weights: their structure decides. The
networks learn steps of decaying two-dimensional turbulence, 32 x 32 cells, with the viscosity drawn per trajectory and
given to all; solvers march the same flows, whose frames hold the velocity (shallow water: its own flows).

Expect the tensor basis (Pope 1975) to pass all at 1e-6 and the network of raw velocities none; networks that learn
steps to pass none, and to know nothing of moving frames (persistence shows that error); solvers to pass right angles,
mirrors and units to rounding, and moving frames as well as they resolve the flow, or not at all where they hold the
vorticity alone and so lose the mean velocity. Written to --out: invariance.csv.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml import OneStep, SyntheticConfig
from physml.data import fit_normalizer
from physml.evaluate.invariance import Quantity, check_invariances, velocity
from physml.fields import stack
from physml.layers.perceptron import Activation, Perceptron
from physml.layers.tensor_basis import TensorBasis, velocity_gradient
from physml.models import FNOConfig, IFactFormerConfig
from physml.parallel.mesh import Layout
from physml.solvers import DecayingNavierStokes, ShallowWater, StaggeredFlow
from physml.steppers import PersistenceConfig, ResidualConfig
from physml.steppers.corrected import march
from physml.training import OptimizerConfig, TrainingConfig, fit

CHECKS = ("galilean", "rotation", "reflection", "dimensional")
FLOW = (velocity("u", "v"), Quantity("viscosity", dimensions="L2 T-1"))
STRESS = (Quantity(("xx", "xy", "yx", "yy"), ("x", "y"), "L2 T-2"),)
LAYER = (
    Quantity("height", dimensions="L"), velocity("u", "v"), Quantity("gravity", dimensions="L T-2"),
    Quantity("viscosity", dimensions="L2 T-1"),
)  # fmt: skip
MODELS = {
    "FNO": FNOConfig(width=24, modes=(12, 12), depth=3),
    "FNO, no positions": FNOConfig(width=24, modes=(12, 12), depth=3, positions=False),
    "IFactFormer": IFactFormerConfig(width=32, heads=2, head_width=24, iterations=4, whole_waves=True),
}


def turbulence(points: int, trajectories: int) -> SyntheticConfig:
    options = {"viscosity": (0.01, 0.02), "forcing_scale": 0.0, "drag": 0.0, "precision": "float32", "warmup": 0.5}
    counts = {"train": trajectories, "valid": 0, "test": 4}
    return SyntheticConfig(
        "staggered_flow", points=points, trajectories=counts, steps=12, time_step=0.2, options=options
    )


def shallow_water(points: int) -> SyntheticConfig:
    same = {"gravity": (1.0, 1.0), "viscosity": (2e-3, 2e-3)}  # intervals: they become parameters of the data
    options = same | {"solver_points": points, "coriolis": 0.0, "initial_modes": 4, "substeps": 40}
    counts = {"train": 1, "valid": 0, "test": 4}
    return SyntheticConfig("shallow_water", points=points, trajectories=counts, steps=2, time_step=0.2, options=options)


def first_frames(data):
    """The first frame of each trajectory, as one window."""
    return stack([data.read(i, range(1)) for i in range(len(data.lengths))])


def trained(data, model, updates: int):
    config, spec = ResidualConfig(), data["train"].spec
    network = model.build(config.signature(spec), nnx.Rngs(0))
    stepper = config.build(spec, network, fit_normalizer(data["train"]))
    training = TrainingConfig(
        steps=updates, batch=16, updates_per_call=1, checkpoint_every=0,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, clip=1.0),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return fit(stepper, {"train": data["train"]}, OneStep(), training, Layout(), folder, resume="never").stepper


def stress_of_velocity(network):
    return lambda window: network(jnp.asarray(window.frames)[:, -1])


def stress_of_gradient(network):
    """Grid spacing and gradient give the scale; velocity components and directions in the order x, y."""

    def stress(window):
        axes = window.spec.grid.axes
        order = tuple([axis.name for axis in axes].index(name) for name in "xy")
        gradient = velocity_gradient(window.frames[:, -1], tuple(axes[i].spacing for i in order), order)
        scale = axes[0].spacing ** 2 * jnp.sum(gradient**2, (-2, -1), keepdims=True)
        return (scale * network(gradient)).reshape(*gradient.shape[:-2], 4)

    return stress


def marched(solver):
    """A step of the solver on the grid and with the time step of the window."""

    def step(window):
        spec = window.spec
        own = dataclasses.replace(solver, length=spec.grid.axes[0].length, time_step=spec.time_step)
        return march(own, jnp.asarray(window.frames)[:, -1], window.context(0, 1))

    return step


def check(name: str, predict, window, quantities, **options) -> dict:
    table = check_invariances(predict, window, quantities, names=CHECKS, **options)
    errors = {kind: float(table.error.sel(invariance=kind).max()) for kind in CHECKS}
    print(f"{name:32}" + "".join(f"{errors[kind]:14.1e}" for kind in CHECKS), flush=True)
    return {"what": name, **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/invariance"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.updates, options.trajectories = 5, 4

    data = turbulence(options.points, options.trajectories).open()
    window = first_frames(data["test"])
    print(f"{'':32}" + "".join(f"{kind:>14}" for kind in CHECKS))
    raw = Perceptron((2, 32, 32, 4), Activation("silu"), rngs=nnx.Rngs(0))
    basis = TensorBasis(2, 32, rngs=nnx.Rngs(0))
    rows = [
        check("closure of raw velocity", stress_of_velocity(raw), window, FLOW, output=STRESS),
        check("closure by tensor basis", stress_of_gradient(basis), window, FLOW, output=STRESS),
    ]
    persistence = PersistenceConfig().build(window.spec, None, None)
    rows.append(check("persistence", persistence, window, FLOW))
    rows += [check(name, trained(data, model, options.updates), window, FLOW) for name, model in MODELS.items()]

    still = {"forcing_scale": 0.0, "drag": 0.0}
    solvers = {
        "finite volumes": StaggeredFlow(points=options.points, time_step=0.2, **still),
        "the same, forced": StaggeredFlow(points=options.points, time_step=0.2, drag=0.0),
        "spectral vorticity": DecayingNavierStokes(
            points=options.points, solver_points=2 * options.points, time_step=0.2, store="velocity", substeps=40
        ),
    }
    for name, solver in solvers.items():
        rows.append(check(f"solver, {name}", marched(solver), window, FLOW, steps=1))
    water = first_frames(shallow_water(options.points).open()["test"])
    solver = ShallowWater(points=options.points, solver_points=options.points, coriolis=0.0, substeps=40)
    rows.append(check("solver, spectral shallow water", marched(solver), water, LAYER, steps=1))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), water)
        rows.append(check("the same, 64 bits", marched(solver), double, LAYER, steps=1))

    options.out.mkdir(parents=True, exist_ok=True)
    lines = [",".join(("what", *CHECKS)), *(f'"{r["what"]}",' + ",".join(f"{r[k]:.3e}" for k in CHECKS) for r in rows)]
    (options.out / "invariance.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
