"""Does a coarse solver whose interpolation is learned stay on course for longer when it knows the past of the flow?

Kolmogorov flow, 32 x 32 stored points of a 128 x 128 spectral solve, viscosity 0.005 (--viscosity), drag 0.1. A
finite-volume solver on 32 x 32 cells is given what a small convolutional network (16 channels, 6 layers) says of its
interpolation:

    coarse solver            no network
    learned interpolation    from the velocity of the moment (Kochkov et al. 2021)
    temporal stencil         from features of the last 8 frames (Sun et al. 2023, arXiv:2302.05925)

    python experiments/temporal_stencil.py             --updates, --unroll, --interval, --seeds change it
    python experiments/temporal_stencil.py --quick     a minute, to see that it runs

    python experiments/temporal_stencil.py --viscosity 1e-3 --interval 0.05 --unroll 8 --seeds 2

Scored by the time until the correlation of vorticity with the reference falls below 0.95. Sun et al. report 20 % more
on 64 x 64 cells. The last command, with frames close together, gives 7 %; the first nothing (RESULTS.md).
Finished runs are kept in runs/temporal_stencil and not done again.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import physml
from physml import Evaluation, Experiment, OptimizerConfig, SyntheticConfig, TrainingConfig, Unrolled
from physml.api import initial_stepper
from physml.fields import stack
from physml.metrics.chaos import high_correlation_time
from physml.models import ResNetConfig
from physml.progress import Silent
from physml.rollout import rollout
from physml.runs import open_run
from physml.solvers import make_solver, vorticity_of
from physml.steppers import LearnedInterpolationConfig, TemporalStencilConfig

POINTS, HISTORY = 32, 8
ARMS = ("learned interpolation", "temporal stencil")


def stepper_of(arm: str, interval: float, flow: dict):
    substeps = max(round(interval / 0.025), 1)
    solver = make_solver("staggered_flow", points=POINTS, time_step=interval, substeps=substeps, **flow)
    if arm == "temporal stencil":
        return TemporalStencilConfig(solver, history=HISTORY, size=HISTORY)
    return LearnedInterpolationConfig(solver)


def experiment(arm: str, seed: int, given: argparse.Namespace) -> Experiment:
    """Test trajectories of 30 time units."""
    quick, interval = given.quick, given.interval
    flow = {"viscosity": given.viscosity, "drag": 0.1, "forcing_scale": 1.0}
    data = SyntheticConfig(
        "kolmogorov",
        points=POINTS,
        trajectories={"train": 2 if quick else 16, "valid": 0, "test": 2 if quick else 8},
        steps=40 if quick else round(30 / interval),
        test_steps=60 if quick else round(30 / interval),
        time_step=interval,
        options={
            "solver_points": 128, "substeps": max(round(100 * interval), 1), "warmup": 5.0 if quick else 30.0,
            "store": "velocity", "precision": "float32", **flow,
        },
    )  # fmt: skip
    return Experiment(
        name=f"{arm.replace(' ', '-')}-{given.viscosity:g}-every{interval:g}-{given.unroll}steps-{given.updates}updates"
        f"-seed{seed}" + ("-quick" if quick else ""),
        data=data,
        model=ResNetConfig(width=16, depth=2),
        stepper=stepper_of(arm, interval, flow),
        objective=Unrolled(steps=given.unroll),
        training=TrainingConfig(
            steps=given.updates,
            batch=4,
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.02, clip=1.0, beta2=0.98),
            average=0.995,
            checkpoint_every=0,
        ),
        evaluation=Evaluation(floors=()),
        seed=seed,
    )


def trained(settings: Experiment, splits, folder: Path):
    """The stepper of a finished run and the milliseconds of an update."""
    path = folder / settings.name
    if (path / "model").is_dir():
        return open_run(path).stepper, float("nan")
    clock = Clock()
    run = physml.train(settings, folder=folder, overwrite=True, progress=clock, splits=splits, scored=False)
    return run.stepper, clock.milliseconds()


class Clock(Silent):
    """Time of an update, without the first tenth of them, where compilation is."""

    def __init__(self):
        self.marks = []

    def update(self, done: int, total: int, **values) -> None:
        self.marks.append((done, total, time.perf_counter()))

    def milliseconds(self) -> float:
        late = [(done, mark) for done, total, mark in self.marks if done >= total // 10]
        return 1e3 * (late[-1][1] - late[0][1]) / max(late[-1][0] - late[0][0], 1)


def times(stepper, test, leads: int, interval: float) -> np.ndarray:
    """Until when each forecast stays above 0.95; all arms start from the same frames."""
    starts = [(k, s) for k, n in enumerate(test.lengths) for s in range(HISTORY - 1, n - leads, leads // 2)]
    windows = [test.read(k, range(s - stepper.history + 1, s + leads + 1)) for k, s in starts]

    @jax.jit
    def correlations(window):
        predicted, truth = (
            vorticity_of(jnp.swapaxes(frames, -3, -2))[..., 0]  # data has x first, fields of solvers y
            for frames in (rollout(stepper, window, leads), window.frames[:, stepper.history :])
        )

        def dot(a, b):
            return jnp.sum(a * b, (2, 3))

        return dot(predicted, truth) / jnp.sqrt(dot(predicted, predicted) * dot(truth, truth))

    found = [np.asarray(correlations(stack(windows[i : i + 8]))) for i in range(0, len(windows), 8)]
    reached, capped = high_correlation_time(
        np.concatenate(found), interval * np.arange(1, leads + 1), (0.95,), interpolate=True
    )
    if capped.any():
        print(f"({capped.sum()} of {len(capped)} forecasts never fell below 0.95: their times are lower bounds)")
    return reached[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--viscosity", type=float, default=5e-3)
    parser.add_argument("--interval", type=float, default=0.1, help="time between frames")
    parser.add_argument("--unroll", type=int, default=4, help="steps that the loss is unrolled over")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/temporal_stencil"))
    arguments = parser.parse_args()
    arguments.updates = 20 if arguments.quick else arguments.updates
    leads = 40 if arguments.quick else round(10 / arguments.interval)
    begin = time.perf_counter()
    first = experiment(ARMS[0], 0, arguments)
    splits = first.data.open()
    print(f"data: {time.perf_counter() - begin:.0f} s")
    bare = initial_stepper(first, splits["train"])
    nnx.update(bare.model, jax.tree.map(jnp.zeros_like, nnx.state(bare.model, nnx.Param)))
    rows = [("coarse solver", times(bare, splits["test"], leads, arguments.interval), float("nan"))]
    for arm in ARMS:
        for seed in range(arguments.seeds):
            stepper, cost = trained(experiment(arm, seed, arguments), splits, arguments.folder)
            rows.append((f"{arm}, seed {seed}", times(stepper, splits["test"], leads, arguments.interval), cost))
    print(f"{'':30s}  time above 0.95   standard error   forecasts   ms per update")
    for name, found, cost in rows:
        error = found.std(ddof=1) / len(found) ** 0.5
        print(f"{name:30s} {found.mean():16.2f} {error:16.2f} {len(found):11d} {cost:15.1f}")
    means = [np.mean([found.mean() for name, found, _ in rows if name.startswith(arm)]) for arm in ARMS]
    print(
        f"temporal stencil / learned interpolation: {means[1] / means[0]:.3f}   ({time.perf_counter() - begin:.0f} s)"
    )


if __name__ == "__main__":
    main()
