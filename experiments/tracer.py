"""What keeps a learned transport of carbon dioxide right: centered input, prescribed sources, a mass fixer?

    python experiments/tracer.py                 about an hour on a quiet core; writes runs/tracer/tracer.md, .png
    python experiments/tracer.py --quick         a minute, to see that it runs

A mixing ratio (ppm) on 32 x 64 cells of the sphere, a frame every 6 hours, moved by winds of random eddies that change,
with emissions that never rest and others that come and go (finite volumes, van Leer's limiter, mass exact). The ladder
follows CarbonBench (Benson et al. 2024, arXiv:2408.11032); every rung has the same U-Net and the same updates:

    none          increments from normalized fields; sources are an input like the winds
    centered      the tracer without its mean
    + flux        and the prescribed sources are added by the stepper, so that the network learns transport only
    + fixer       and the total is that of the frame before plus the sources (put on after training)

Scores of forecasts of 90 and 360 steps: root mean square error, R2 = 1 - squared error / variance in space, and the
largest distance of the total from the prescribed budget, relative to it. "Later" trajectories have a background that is
`--shift` ppm higher than any in training. Expect a drift below 1e-6 with the fixer, and R2 to fall by 0.1 or more in
later years without centering only.
"""

import argparse
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import physml
from physml import OptimizerConfig, TrainingConfig
from physml.data import XarrayDataset, fit_normalizer, spec_of
from physml.fields import stack
from physml.models import ModernUNetConfig
from physml.objectives import OneStep, Unrolled
from physml.parallel.mesh import Layout
from physml.rollout import rollout
from physml.solvers.tracer import Sphere, cell_winds, eddy_stream, face_fluxes, rotation_stream, stable_step, transport
from physml.steppers import TransportConfig
from physml.steppers.describe import build_stepper, parameter_count
from physml.training import fit

ROWS, STEP, DAY = 32, 21600.0, 86400.0
SPIN_UP = 120  # frames until the sources have left their mark
BACKGROUND, RANGE = 400.0, 10.0  # ppm
LEADS = (90, 360)
RUNGS = {
    "none": TransportConfig(),
    "centered": TransportConfig(center="co2"),
    "+ flux": TransportConfig(center="co2", sources="source"),
}
MODEL = ModernUNetConfig(width=16, multipliers=(1, 2, 2), blocks=1)
TINY = ModernUNetConfig(width=8, multipliers=(1, 2), blocks=1)


# --- data -------------------------------------------------------------------------------------------------------------


def sphere_positions(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Points of the unit sphere, `(latitude, longitude, 3)`."""
    east, north = np.meshgrid(longitude, latitude)
    return np.stack([np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)], axis=-1)


def patches(key, count: int, radius: float) -> jax.Array:
    """Gaussian patches of random height on random places, `(latitude, longitude)`."""
    first, second = jax.random.split(key)
    middle = jax.random.normal(first, (count, 3))
    middle = middle / jnp.linalg.norm(middle, axis=1, keepdims=True)
    squared = jnp.sum((sphere_positions(*Sphere(ROWS).centers)[..., None, :] - middle) ** 2, axis=-1)
    return jnp.sum(jax.random.uniform(second, (count,), minval=0.5) * jnp.exp(-squared / radius**2), axis=-1)


def trajectory(key, background, frames: int, substeps: int):
    """(tracer, u, v, source), each `(frames, latitude, longitude)`, and whether all steps were stable.

    Winds and sources of a frame are those of the step that led to it, means over that step. The emissions are at the
    same places in every trajectory.
    """
    keys = jax.random.split(key, 5)
    corner = sphere_positions(*Sphere(ROWS).corners)
    eddies = [eddy_stream(k, corner, 8.0) for k in keys[:3]]
    steady, turn = patches(jax.random.key(1), 8, 0.15), patches(jax.random.key(2), 6, 0.4)
    phase = jax.random.uniform(keys[3], (3,), maxval=2 * math.pi)
    strength = jax.random.uniform(keys[4], (2,), minval=0.7, maxval=1.3)
    areas = Sphere(ROWS).areas
    mass = jnp.broadcast_to(areas, (ROWS, 2 * ROWS))

    def step(tracer, number):
        angle = 2 * math.pi * (number + 0.5) * STEP / (20 * DAY)
        stream = rotation_stream(corner, 12.0, 0.0) + eddies[0]
        stream = stream + jnp.cos(angle + phase[0]) * eddies[1] + jnp.sin(angle + phase[1]) * eddies[2]
        season = jnp.cos(angle / 4 + phase[2])
        source = (2.0 * strength[0] * steady + 1.0 * strength[1] * season * turn) / DAY
        winds = face_fluxes(stream)
        stable = stable_step(mass, winds) >= STEP / substeps
        moved = jax.tree.map(lambda wind: wind * STEP / substeps, winds)

        def substep(_, tracer):
            return transport(tracer, mass, moved, source * STEP / substeps)[0]

        tracer = jax.lax.fori_loop(0, substeps, substep, tracer)
        return tracer, (tracer, *cell_winds(winds), source, stable)

    tracer = jnp.zeros((ROWS, 2 * ROWS))
    _, (tracer, u, v, source, stable) = jax.lax.scan(step, tracer, jnp.arange(SPIN_UP + frames))
    tracer, u, v, source = (field[SPIN_UP:] for field in (tracer, u, v, source))
    mean = jnp.sum(mass * tracer[0]) / jnp.sum(mass)  # a constant stays constant: it can be put on afterwards
    return tracer - mean + background, u, v, source, jnp.all(stable)


def dataset(count: int, frames: int, lowest: float, seed: int) -> XarrayDataset:
    """`count` trajectories whose first frames have means from `lowest` to `RANGE` ppm above."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), count)
        backgrounds = lowest + RANGE * (jnp.arange(count) + 0.5) / count
        run = jax.jit(trajectory, static_argnums=(2, 3))
        parts = [run(key, mean, frames, 6) for key, mean in zip(keys, backgrounds, strict=True)]
    if not all(bool(part[-1]) for part in parts):
        raise SystemExit("The winds are too fast for the substeps.")
    latitude, longitude = (np.degrees(centers) for centers in Sphere(ROWS).centers)
    dims = ("trajectory", "time", "latitude", "longitude")
    units = {"co2": "ppm", "u": "m s-1", "v": "m s-1", "source": "ppm s-1"}
    variables = {
        name: (dims, np.stack([part[i] for part in parts]).astype(np.float32), {"units": unit})
        for i, (name, unit) in enumerate(units.items())
    }
    coords = {
        "time": ("time", np.arange(frames) * STEP, {"units": "s"}),
        "latitude": ("latitude", latitude, {"units": "degrees_north"}),
        "longitude": ("longitude", longitude, {"units": "degrees_east"}),
    }
    data = xr.Dataset(variables, coords)
    return XarrayDataset(data, spec_of(data, ["co2"], forcing=["u", "v", "source"]))


# --- training and scores ----------------------------------------------------------------------------------------------


def train(config: TransportConfig, data, model, updates: int, unroll: int, seed: int):
    """The stepper after one-step training, then a fifth as long with gradients through `unroll` steps."""
    stepper = build_stepper(config, model, data["train"].spec, fit_normalizer(data["train"]), seed=seed)
    stages = [(OneStep(space="increment"), updates, 2e-3)]
    if unroll > 1:
        stages.append((Unrolled(unroll, space="normalized"), max(updates // 5, 1), 2e-4))
    for objective, count, rate in stages:
        training = TrainingConfig(
            steps=count, batch=8, updates_per_call=1, checkpoint_every=0, validate_every=0,
            optimizer=OptimizerConfig(learning_rate=rate, warmup=0.05, weight_decay=1e-4, clip=1.0),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            stepper = fit(stepper, data, objective, training, Layout(), folder, seed=seed, resume="never").stepper
    return stepper


def scores(stepper, data: XarrayDataset, steps: int) -> dict[str, np.ndarray]:
    """Per lead 1 to `steps`: "rmse" and "r2", means over trajectories, and "drift", the largest of them."""
    window = stack([data.read(i, range(steps + 1)) for i in range(len(data.lengths))])
    frames = np.asarray(jax.jit(lambda w: rollout(stepper, w, steps))(window), np.float64)[..., 0]
    weights = window.spec.grid.weights().astype(np.float64)
    weights /= weights.mean()
    truth = np.asarray(window.frames, np.float64)[..., 0]

    def mean(field):
        return (weights * field).mean((-2, -1))

    squared = mean((frames - truth[:, 1:]) ** 2)
    variance = mean((truth - mean(truth)[..., None, None])[:, 1:] ** 2)
    source = mean(np.asarray(window.forcing, np.float64)[:, 1:, ..., 2]) * STEP
    budget = mean(truth[:, :1]) + source.cumsum(1)
    with np.errstate(invalid="ignore"):
        return {
            "rmse": np.sqrt(squared).mean(0),
            "r2": (1 - squared / variance).mean(0),
            "drift": np.abs(mean(frames) / budget - 1).max(0),
        }


def table(results: dict, leads: tuple[int, ...]) -> str:
    """Markdown, one row per rung."""
    titles = ["rung", "drift", *[f"{what} {lead}" for lead in leads for what in ("RMSE", "R2", "later R2", "R2 drop")]]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for rung, parts in results.items():
        cells = [f"{max(part['drift'].max() for part in parts.values()):.1e}"]
        for lead in leads:
            seen, later = (parts[name]["r2"][lead - 1] for name in ("seen", "later"))
            cells += [f"{parts['seen']['rmse'][lead - 1]:.3f}", f"{seen:.3f}", f"{later:.3f}", f"{seen - later:.3f}"]
        lines.append("| " + " | ".join([rung, *cells]) + " |")
    return "\n".join(lines)


def figure(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for number, (rung, parts) in enumerate(results.items()):
        for name, style in (("seen", "-"), ("later", ":")):
            leads = np.arange(1, len(parts[name]["r2"]) + 1) * STEP / DAY
            for ax, what in zip(axes, ("rmse", "r2", "drift"), strict=True):
                label = rung if name == "seen" else None
                ax.plot(leads, np.abs(parts[name][what]) if what == "drift" else parts[name][what], style,
                        color=f"C{number}", label=label)  # fmt: skip
    for ax, title in zip(axes, ("RMSE, ppm", "R2 in space", "distance from the budget"), strict=True):
        ax.set(xlabel="days", title=title)
    axes[0].set_yscale("log")
    axes[1].set_ylim(-0.5, 1.02)
    axes[2].set_yscale("log")
    axes[0].legend(title="dotted: later years", fontsize="small")
    panels.savefig(path, dpi=130)
    plt.close(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2500, help="of each of the three networks")
    parser.add_argument("--unroll", type=int, default=4, help="steps of the rollouts of the last updates; 1: none")
    parser.add_argument("--width", type=int, default=MODEL.width, help="of the U-Net; 16 makes 0.47 million parameters")
    parser.add_argument("--trajectories", type=int, default=12, help="to train on, of 300 frames")
    parser.add_argument("--shift", type=float, default=30.0, help="ppm by which later years lie higher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/tracer"))
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few updates and short forecasts")
    given = parser.parse_args()
    model, leads, frames, tests = ModernUNetConfig(given.width, MODEL.multipliers, MODEL.blocks), LEADS, 300, 4
    if given.quick:
        given.updates, given.trajectories, given.unroll = 20, 2, 2
        model, leads, frames, tests = TINY, (10, 40), 60, 2
    given.out.mkdir(parents=True, exist_ok=True)

    data = {"train": dataset(given.trajectories, frames, BACKGROUND, given.seed)}
    ranges = {"seen": BACKGROUND, "later": BACKGROUND + RANGE + given.shift}
    forecasts = {name: dataset(tests, leads[-1] + 1, low, given.seed + 1000) for name, low in ranges.items()}
    results = {}
    for rung, config in RUNGS.items():
        stepper = train(config, data, model, given.updates, given.unroll, given.seed)
        results[rung] = {name: scores(stepper, test, leads[-1]) for name, test in forecasts.items()}
        print(f"{rung}: {parameter_count(stepper):,} parameters, R2 {results[rung]['seen']['r2'][leads[-1] - 1]:.3f}",
              flush=True)  # fmt: skip
    fixed = physml.constrain(stepper, physml.MassFixer("co2", "multiplicative", sources="source"))
    results["+ fixer"] = {name: scores(fixed, test, leads[-1]) for name, test in forecasts.items()}

    text = table(results, leads)
    (given.out / "tracer.md").write_text(text + "\n")
    figure(results, given.out / "tracer.png")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
