"""Do constraints keep rollouts of 2000 steps from drifting, and what do they cost in error?

    python experiments/drift.py                          shallow water, all three networks
    python experiments/drift.py --system euler           compressible gas in conserved variables; or advection
    python experiments/drift.py --quick                  a few minutes, mostly compiling, to see that it runs

FNO, scOT and SineNet learn single steps on a periodic square, then forecast from states that they have not seen, as
they are and with `physml.constrain(stepper, MassFixer(...))`, which needs no training. What is conserved: the tracer
(advection), the volume (shallow water), mass, both momenta and energy (Euler). Relative drift is the change of the mean
since the start, over the mean size of the true field; sums in 64 bits, the worst of the test states. It is followed for
as long as all forecasts are bounded: no field ten times the size of the true one, for those are rounded ten times as
coarsely. Expect at most 1e-6 with the constraint, and an error at most 1.01 times that without, at every lead at which
there is truth and both are finite. Leads without truth are not scored: --truth gives their number (advection: exact,
all of them). --method says how the correction is spread; "additive", the same everywhere, is the smallest there is, and
can only bring the first step closer to a truth with the same total. Eight test states tell the ratio of errors to
about 1 %; --tests 64 --steps 200 tells it better, from the networks that are there.

Written to --out/SYSTEM: drift.md (tables), drift.png (drift against step), drift.csv, and report.html, whose section
"Drift" shows the means of both. Trained networks are kept there and not trained again.
"""

import argparse
import csv
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

import physml
from physml import MassFixer, OptimizerConfig, SyntheticConfig, TrainingConfig
from physml.data import XarrayDataset, fit_normalizer, from_array
from physml.data.labelled import spec_of
from physml.evaluate import evaluate_stepper
from physml.fields import stack
from physml.models import FNOConfig, ScOTConfig, SineNetConfig
from physml.objectives import NoisyInputs, OneStep
from physml.parallel.mesh import Layout
from physml.report.drawing import finish, new_figure, png
from physml.rollout import rollout_chunks
from physml.saving import build_stepper
from physml.steppers import ResidualConfig
from physml.steppers.describe import parameter_count
from physml.training import fit

MODELS = {
    "FNO": FNOConfig(width=24, modes=(12, 12), depth=3, positions=False),
    "scOT": ScOTConfig(width=24, depths=(2, 2), heads=(2, 4), skip_blocks=(1, 0), patch=2, window=8),
    "SineNet": SineNetConfig(width=6, waves=3),
}
CONSERVED = {
    "advection": ("tracer",),
    "shallow_water": ("height",),
    "euler": ("density", "momentum_x", "momentum_y", "energy"),
}
GAMMA = 1.4


@dataclass(frozen=True)
class Size:
    points: int
    trajectories: int
    tests: int
    truth: int  # test frames after the first
    steps: int = 20  # of the training trajectories


# --- data -------------------------------------------------------------------------------------------------------------


def open_splits(system: str, size: Size) -> dict[str, XarrayDataset]:
    if system == "advection":
        return {"train": advection(size.points, size.trajectories, size.steps, 0),
                "test": advection(size.points, size.tests, size.truth, 1)}  # fmt: skip
    options = {
        "shallow_water": {
            "solver_points": max(2 * size.points, 32), "substeps": 16, "coriolis": 1.0, "initial_modes": 4,
            "initial_waves": 0.05, "viscosity": 2e-3,
        },
        "euler": {"solver_points": 2 * size.points, "initial_state": "kelvin_helmholtz", "gamma": GAMMA},
    }[system]  # fmt: skip
    config = SyntheticConfig(
        system,
        points=size.points,
        trajectories={"train": size.trajectories, "valid": 0, "test": size.tests},
        steps=size.steps,
        test_steps=size.truth,
        time_step={"shallow_water": 0.2, "euler": 0.02}[system],
        options={**options, "precision": "float32"},
    )
    splits = config.open()
    return {name: in_conserved(split) for name, split in splits.items()} if system == "euler" else splits


def advection(points: int, trajectories: int, steps: int, seed: int) -> XarrayDataset:
    """A tracer that moves by (0.6, 0.35) cells a frame, exactly: each Fourier mode turns. The mean differs."""
    random = np.random.default_rng(seed)
    k = np.fft.fftfreq(points, 1 / points)
    kx, ky = k[:, None], k[None, :]
    amplitude = np.exp(-(kx**2 + ky**2) / 8) * (np.abs(kx) < points / 2) * (np.abs(ky) < points / 2)
    noise = np.fft.fft2(random.normal(size=(trajectories, points, points)))
    noise[:, 0, 0] = 0
    fields = np.fft.ifft2(amplitude * noise).real
    fields /= 3 * fields.std((1, 2), keepdims=True)
    start = np.fft.fft2(random.uniform(0.5, 1.5, (trajectories, 1, 1)) * (1 + fields))
    frames = np.empty((trajectories, steps + 1, points, points), np.float32)
    for step in range(steps + 1):
        frames[:, step] = np.fft.ifft2(start * np.exp(-2j * np.pi * step * (0.6 * kx + 0.35 * ky) / points)).real
    data = from_array(frames, ("trajectory", "time", "x", "y"), names=("tracer",), periodic=("x", "y"))
    return XarrayDataset(data, spec_of(data))


def in_conserved(split: XarrayDataset) -> XarrayDataset:
    """Density, momentum and energy in place of density, velocity and pressure."""
    gas = split.ds
    density, u, v, pressure = (gas[name].astype("float64") for name in ("density", "u", "v", "pressure"))
    fields = {
        "density": density,
        "momentum_x": density * u,
        "momentum_y": density * v,
        "energy": pressure / (GAMMA - 1) + density * (u**2 + v**2) / 2,
    }
    data = xr.Dataset({name: field.astype("float32") for name, field in fields.items()}, attrs=gas.attrs)
    data = data.assign_coords({name: gas[name] for name in gas.coords})
    periodic = [axis.name for axis in split.spec.grid.axes if axis.periodic]
    return XarrayDataset(data, spec_of(data, tuple(fields), periodic=periodic))


# --- networks ---------------------------------------------------------------------------------------------------------


def trained(name: str, splits: dict[str, XarrayDataset], updates: int, noise: float, seed: int, folder: Path):
    if (folder / "spec.json").is_file():
        return physml.load(folder)
    train, config = splits["train"], ResidualConfig()
    stepper = build_stepper(config, MODELS[name], train.spec, fit_normalizer(train), seed=seed)
    training = TrainingConfig(
        steps=updates, batch=16, updates_per_call=1, checkpoint_every=0,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, weight_decay=1e-4, clip=1.0),
    )  # fmt: skip
    # Noise on the inputs teaches the step to lead back: most networks of this size would not last 2000 steps without.
    objective, began = NoisyInputs(OneStep(space="increment"), std=noise), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run = fit(stepper, {"train": train}, objective, training, Layout(), scratch, seed=seed, resume="never")
    stepper = run.stepper
    print(f"{name}: {parameter_count(stepper):,} parameters, {time.perf_counter() - began:.0f} s", flush=True)
    physml.save(stepper, folder)
    return stepper


# --- rollouts ---------------------------------------------------------------------------------------------------------


def follow(stepper, window, truth: np.ndarray, steps: int, laws: list[int]) -> dict[str, np.ndarray]:
    """Relative drift `(step, law)`, NaN once forecasts are no longer bounded, and pooled error `(step,)` in standard
    deviations, NaN where not finite or not known."""
    start = np.asarray(window.frames[:, 0], np.float64)
    space = tuple(range(1, start.ndim - 1))
    # The size is that of the true frames: a momentum may be zero everywhere at first.
    mean, size = (
        start.mean(space)[:, laws],
        np.abs(truth.astype(np.float64)).mean((1, *(a + 1 for a in space)))[:, laws],
    )
    scale = truth.astype(np.float64).std((0, 1, *(axis + 1 for axis in space)))
    drift, error = np.full((steps, len(laws)), np.nan), np.full(steps, np.nan)
    bounded = np.zeros(steps, bool)
    for chunk in rollout_chunks(stepper, window, steps, min(steps, 100)):
        frames = chunk.frames.astype(np.float64)
        rows = slice(chunk.start, chunk.start + frames.shape[1])
        with np.errstate(all="ignore"):
            totals, own = (
                array.mean(tuple(axis + 1 for axis in space))[..., laws] for array in (frames, np.abs(frames))
            )
            drift[rows] = np.max(np.abs(totals - mean[:, None]) / size[:, None], axis=0)
            bounded[rows] = (own <= 10 * size[:, None]).all((0, 2))
            known = truth[:, rows]
            off = (frames[:, : known.shape[1]] - known) / scale
            error[chunk.start : chunk.start + known.shape[1]] = np.sqrt(
                np.mean(off**2, axis=(0, *(axis + 1 for axis in space), -1))
            )
    drift[np.argmin(np.append(bounded, False)) :] = np.nan
    return {"drift": drift, "error": error}


def figure(found: dict, names: tuple[str, ...], path: Path) -> None:
    image = new_figure(4.2 * len(found), 3.6)
    panels = image.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (model, runs) in zip(panels, found.items(), strict=True):
        for i, name in enumerate(names):
            for kind, style in (("free", "--"), ("constrained", "-")):
                values = np.maximum(runs[kind]["drift"][:, i], 1e-10)  # what is exactly kept has no logarithm
                label = f"{name}, {kind}" if model == next(iter(found)) else None
                axes.semilogy(np.arange(1, len(values) + 1), values, style, color=f"C{i}", linewidth=1.4, label=label)
        axes.axhline(1e-6, color="#444444", linewidth=0.8, linestyle=":")
        axes.set(title=model, xlabel="step")
    panels[0].set_ylabel("relative drift")
    panels[0].legend(fontsize=8, frameon=False)
    finish(image, panels[0])
    path.write_bytes(png(image))


def table(found: dict, names: tuple[str, ...]) -> tuple[str, list[dict]]:
    """Markdown, and the same numbers as rows."""
    rows = []
    for model, runs in found.items():
        errors = [runs[kind]["error"] for kind in ("constrained", "free")]
        both = np.isfinite(errors[0]) & np.isfinite(errors[1])
        ratio = np.where(both, errors[0] / np.where(both, errors[1], 1), np.nan)
        for i, name in enumerate(names):
            row = {"model": model, "quantity": name}
            for kind in ("free", "constrained"):
                drift = runs[kind]["drift"][:, i]
                row[f"drift {kind}"] = np.nanmax(drift) if np.isfinite(drift).any() else np.nan
                row[f"bounded steps {kind}"] = int(np.argmax(np.isnan(np.append(drift, np.nan))))
            row |= {"ratio": np.nanmax(ratio), "at lead": int(np.nanargmax(ratio)) + 1, "median": np.nanmedian(ratio)}
            above = np.flatnonzero(ratio > 1.01)
            row["above from"] = int(above[0]) + 1 if above.size else "never"
            row |= {"leads": int(both.sum()), "error one": errors[0][0], "error last": errors[0][both][-1]}
            rows.append(row)
    head = ("model", "quantity", "drift, free", "drift, constrained", "bounded steps", "error ratio, largest", "median",
            "above 1.01 from", "leads", "error at lead 1, last")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = (
            r["model"], r["quantity"], f"{r['drift free']:.1e}", f"{r['drift constrained']:.1e}",
            f"{r['bounded steps free']}, {r['bounded steps constrained']}", f"{r['ratio']:.4f} (lead {r['at lead']})",
            f"{r['median']:.4f}", r["above from"], r["leads"], f"{r['error one']:.2e}, {r['error last']:.2e}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=list(CONSERVED), default="shallow_water")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--noise", type=float, default=0.5, help="on inputs in training, in units of increments")
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--tests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--method", choices=("additive", "gradient", "multiplicative"), default="additive")
    parser.add_argument("--truth", type=int, help="test frames (200; advection: as many as steps)")
    parser.add_argument("--seed", type=int, default=0, help="of first weights and the order of the data")
    parser.add_argument("--out", type=Path, default=Path("runs/drift"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.updates, options.trajectories, options.tests = 20, 8, 2
        options.steps, options.truth, options.out = 200, 20, options.out.with_name(options.out.name + "-quick")
    truth = options.truth or (options.steps if options.system == "advection" else 200)
    size = Size(options.points, options.trajectories, options.tests, min(truth, options.steps))
    splits, names = open_splits(options.system, size), CONSERVED[options.system]
    test, folder = splits["test"], options.out / options.system
    folder.mkdir(parents=True, exist_ok=True)
    laws = [test.spec.index(name) for name in names]
    whole = stack([test.read(i, range(size.truth + 1)) for i in range(size.tests)])
    window, later = whole.slice(0, 1), np.asarray(whole.frames[:, 1:])

    found, scores = {}, []
    for name in options.models:
        sizes = f"{options.points}points-{options.trajectories}trajectories-{options.updates}updates"
        place = folder / f"{name}-{sizes}-noise{options.noise:g}-seed{options.seed}"
        free = trained(name, splits, options.updates, options.noise, options.seed, place)
        steppers = {"free": free, "constrained": physml.constrain(free, MassFixer(names, options.method))}
        found[name] = {k: follow(s, window, later, options.steps, laws) for k, s in steppers.items()}
        for kind, stepper in steppers.items():
            scores.append(
                evaluate_stepper(
                    stepper, test, size.truth, starts=1, metrics=("rmse", "nrmse", "correlation"), draws=100,
                    name=f"{name}, {kind}",
                )
            )  # fmt: skip
    text, rows = table(found, names)
    print(text)
    (folder / "drift.md").write_text(
        f"# Drift over {options.steps} steps: {options.system}, {options.points} x {options.points} points, "
        f"{options.updates} updates with noise {options.noise:g}, {options.tests} test states, truth for {size.truth} "
        f"leads, {options.method} fixer\n\n{text}\n"
    )
    with (folder / "drift.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure(found, names, folder / "drift.png")
    physml.report(scores, folder / "report.html", title=f"Drift with and without a constraint, {options.system}")
    late = [r["model"] for r in rows if not (r["drift constrained"] <= 1e-6 and r["ratio"] <= 1.01)]
    print(f"\nMissed by: {', '.join(dict.fromkeys(late)) or 'none'}. Written to {folder}.")


if __name__ == "__main__":
    main()
