"""Does refinement keep forecasts of the Kuramoto-Sivashinsky equation correlated for longer than plain regression?

    python experiments/ks_refiner.py                                    three arms, 45 minutes each on a core
    python experiments/ks_refiner.py --gpu --seeds 0 1 2                256 points, 2048 trajectories, 8 M parameters
    python experiments/ks_refiner.py --arms mse refiner --updates 200   a first look

All arms see the same trajectories (length 64, frames 0.8 apart) and train the same modern U-Net for as many updates,
scored with the moving average of its weights (0.995): `mse` predicts increments; `noise` does from inputs with noise;
`refiner` is PDE-Refiner with K = 3 (Lippe et al. 2023, arXiv:2308.05732), which costs four calls a step when it
forecasts. Written to --out: scores.csv, a row per arm and seed; figure.png, correlation and error spectrum.

Expect the refiner's correlation with the truth to stay above 0.8 for 1.1 times as long as that of `mse` (aim: 1.15,
with --gpu 1.25; published about 100 against 75 time units), and its error energy above half the Nyquist wavenumber to
be a tenth or less. The refiner needs the longer training of the two: after 5000 updates the ratio is 1.03. A run
that was interrupted goes on when it is started again. --true-from 32 says what perfect modes from 32 on would be worth.
"""

import argparse
import csv
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from physml import OneStep, OptimizerConfig, SyntheticConfig, TrainingConfig
from physml.data import fit_normalizer
from physml.errors import DivergedError
from physml.evaluate import evaluate_stepper
from physml.fields import stack
from physml.metrics import METRICS, Metric, energy_spectrum, high_correlation_time
from physml.metrics.metric import Measure
from physml.metrics.pointwise import pearson
from physml.metrics.predictability import decorrelation_time, spread_error
from physml.metrics.spectra import shells
from physml.models.modern_unet import ModernUNetConfig
from physml.objectives.denoising import Denoising
from physml.objectives.noise import NoisyInputs
from physml.parallel.mesh import Layout
from physml.rollout import ensemble
from physml.steppers.describe import build_stepper, parameter_count
from physml.steppers.plain import ResidualConfig
from physml.steppers.refiner import RefinerConfig
from physml.training import fit

TIME_STEP, THRESHOLD = 0.8, 0.8  # every fourth frame of 0.2, as published


@dataclass(frozen=True)
class Size:
    """What differs between the two machines; `leads` frames are forecast from the first one of each test trajectory."""

    points: int = 128
    trajectories: int = 64
    tests: int = 256  # an error of 2 in the time; 32 have 4
    leads: int = 150
    model: ModernUNetConfig = ModernUNetConfig(width=16, multipliers=(1, 2, 2), blocks=1)
    batch: int = 128
    updates: int = 20_000
    rate: float = 3e-3
    minimum: float = 1e-4  # of the refiner's noise


GPU = Size(
    points=256, trajectories=2048, tests=128, leads=250, updates=30_000, rate=5e-4, minimum=4e-7,
    model=ModernUNetConfig(width=32, multipliers=(1, 2, 2, 4), blocks=1),
)  # fmt: skip


def arms(noise: float, weight: float, refinements: int, minimum: float) -> dict:
    """Stepper and objective by name. The plain arms read the length of the step, which makes their network, like the
    refiner's, the conditioned one of the paper."""
    plain = ResidualConfig(lead=True)
    return {
        "mse": (plain, OneStep(space="increment")),
        "noise": (plain, NoisyInputs(OneStep(space="increment"), std=noise)),
        "refiner": (RefinerConfig(refinements=refinements, minimum=minimum, weight=weight), Denoising()),
    }


def small_scales(fields, grid):
    """Energy by shell above half the Nyquist wavenumber."""
    return energy_spectrum(fields, grid)[..., shells(grid).resolved // 2 + 1 :]


def distance(predicted, true):
    """Root mean square over those shells of log10(E_p / E_t)."""
    return jnp.sqrt((jnp.log10(predicted / true) ** 2).mean(-1))


SCORES = {
    "correlation": METRICS["correlation"],
    "nrmse": METRICS["nrmse"],
    "small_scale_error": Metric(lambda p, t, measure: (small_scales(p - t, measure.grid).sum(-1),)),
    "small_scale_distance": Metric(
        lambda p, t, measure: (small_scales(p, measure.grid), small_scales(t, measure.grid)), distance
    ),
}


def train(arm, size: Size, splits, normalizer, seed: int, out: Path):
    stepper_config, objective = arm
    stepper = build_stepper(stepper_config, size.model, splits["train"].spec, normalizer, seed=seed)
    training = TrainingConfig(
        steps=size.updates, batch=size.batch, average=0.995, select="last", updates_per_call=8,
        log_every=max(size.updates // 50, 1), checkpoint_every=max(size.updates // 4, 1),
        optimizer=OptimizerConfig("adam", size.rate, warmup=0.02, final=0.01, clip=1.0),
    )  # fmt: skip
    begun = time.perf_counter()
    stepper = fit(stepper, splits, objective, training, Layout(), out, seed=seed, resume="auto").stepper
    return stepper, time.perf_counter() - begun


def score(stepper, test, leads: int, seed: int) -> dict:
    """Figures of one trained stepper, and the curves behind them."""
    begun = time.perf_counter()
    scores = evaluate_stepper(
        stepper, test, leads, starts=1, batch=64, metrics=SCORES, key=jax.random.key(seed), draws=200,
        thresholds=(THRESHOLD,),
    )  # fmt: skip
    value = scores["score"].isel(model=0, channel=0)
    duration = scores.isel(model=0, channel=0, threshold=0)
    return {
        "correlation_time": float(duration["correlation_time"]),
        "low": float(duration["correlation_time_low"]),
        "high": float(duration["correlation_time_high"]),
        "capped": bool(duration["correlation_time_capped"]),
        "one_step_nrmse": float(value.sel(metric="nrmse")[0]),
        "small_scale_error": float(value.sel(metric="small_scale_error")[0]),
        "small_scale_distance": float(value.sel(metric="small_scale_distance")[-1]),
        "scoring_seconds": time.perf_counter() - begun,
        "curve": value.sel(metric="correlation").values,
        "spectrum": one_step_error(stepper, test, seed),
    }


def first_states(test, leads: int, count: int | None = None):
    """The first `1 + leads` frames of the first `count` test trajectories, or all."""
    return stack([test.read(i, range(1 + leads)) for i in range(len(test.lengths))[:count]])


def one_step_error(stepper, test, seed: int) -> np.ndarray:
    """Energy of the error of one step by wavenumber, averaged over starts."""
    window = first_states(test, 1)
    frames = ensemble(stepper, window, 1, jax.random.split(jax.random.key(seed), 1))[0]
    return np.asarray(energy_spectrum(frames - window.frames[:, 1:], window.spec.grid).mean((0, 1, 2)))


def predictability(stepper, test, leads: int, members: int, seed: int) -> dict:
    """Until when members agree, beside until when they are right; whether spread tells error where they part."""
    window = first_states(test, leads, 64)
    frames = ensemble(stepper, window, leads, jax.random.split(jax.random.key(seed), members))
    estimated, _ = decorrelation_time(frames, window.spec, THRESHOLD)
    truth, measure = jnp.asarray(window.frames[:, 1:]), Measure.of(window.spec)
    correlation = np.mean([pearson(member, truth, measure)[0] for member in frames], axis=0)
    times = np.arange(1, leads + 1) * TIME_STEP
    actual, _ = high_correlation_time(np.moveaxis(correlation, 1, -1), times, (THRESHOLD,))
    estimated, actual = estimated[:, 0], actual[:, 0, 0]
    lead = int(np.clip(np.median(actual) / TIME_STEP, 1, leads)) - 1
    varied = estimated.std() > 0 and actual.std() > 0
    return {
        "estimated_time": float(estimated.mean()),
        "actual_time": float(actual.mean()),
        "time_correlation": float(np.corrcoef(estimated, actual)[0, 1]) if varied else float("nan"),
        "spread_error_correlation": float(spread_error(frames, truth, window.spec).correlation[lead, 0]),
    }


def time_with_true_scales(stepper, test, leads: int, first: int, seed: int) -> float:
    """The correlation time if the modes from number `first` on were those of the truth after every step."""
    window = first_states(test, leads)
    truth, frame = np.asarray(window.frames[:, 1:]), window.frames[:, :1]
    measure, correlations = Measure.of(window.spec), []
    for lead in range(leads):
        start = replace(window, frames=frame, times=window.times[:, lead : lead + 2])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), lead), 1)
        modes = np.fft.rfft(np.asarray(ensemble(stepper, start, 1, keys)[0]), axis=2)
        modes[:, :, first:] = np.fft.rfft(truth[:, lead : lead + 1], axis=2)[:, :, first:]
        frame = np.fft.irfft(modes, truth.shape[2], axis=2).astype(np.float32)
        correlations.append(np.mean(pearson(frame, truth[:, lead : lead + 1], measure)[0]))
    times = np.arange(1, leads + 1) * TIME_STEP
    return float(high_correlation_time(np.array(correlations), times, (THRESHOLD,))[0][0])


def figure(results: dict, times, wavenumbers, path: Path) -> None:
    """Correlation by lead time and error spectrum of one step, a line per arm (mean over seeds)."""
    from physml.report.drawing import COLORS, new_figure

    canvas = new_figure(9, 3.5)
    left, right = canvas.subplots(1, 2)
    for color, (name, rows) in zip(COLORS, results.items(), strict=False):
        left.plot(times, np.mean([row["curve"] for row in rows], 0), color=color, label=name)
        right.semilogy(wavenumbers[1:], np.mean([row["spectrum"] for row in rows], 0)[1:], color=color, label=name)
    left.axhline(THRESHOLD, color="gray", linewidth=0.8)
    left.set(xlabel="lead time", ylabel="correlation with the truth", ylim=(0, 1.02))
    right.set(xlabel="wavenumber", ylabel="energy of the one-step error")
    left.legend()
    canvas.savefig(path)


def main(given) -> dict:
    size = GPU if given.gpu else Size()
    chosen = {field: getattr(given, field, None) for field in Size.__dataclass_fields__}
    size = replace(size, **{field: number for field, number in chosen.items() if number})
    if given.width:
        size = replace(size, model=replace(size.model, width=given.width))
    splits = SyntheticConfig(
        "kuramoto_sivashinsky", points=size.points, steps=140, test_steps=1 + size.leads, time_step=TIME_STEP,
        trajectories={"train": size.trajectories, "valid": max(size.trajectories // 16, 1), "test": size.tests},
        options={
            "length": 64.0, "solver_points": 2 * size.points, "substeps": 32,
            **({"viscosity": tuple(given.viscosity)} if given.viscosity else {}),
        },
    ).open()  # fmt: skip
    normalizer, test = fit_normalizer(splits["train"], "zscore"), splits["test"]
    out = given.out or Path("runs") / f"ks_refiner_{size.points}_{size.updates}"
    out.mkdir(parents=True, exist_ok=True)
    every = arms(given.noise, given.weight, given.refinements, size.minimum)
    results: dict[str, list] = {name: [] for name in given.arms}
    for seed in given.seeds:
        for name in given.arms:
            # Everything that can be varied is in the name: a folder with checkpoints is continued.
            refiner = f"_{given.weight:g}_{given.refinements}_{size.minimum:g}"
            options = {"noise": f"_{given.noise:g}", "refiner": refiner}.get(name, "")
            training = f"{size.points}x{size.trajectories}_{size.updates}x{size.batch}_{size.rate:g}"
            training += "_{:g}-{:g}".format(*given.viscosity) if given.viscosity else ""
            folder = out / f"{name}{options}_{size.model.width}_{training}_{seed}"
            try:
                stepper, seconds = train(every[name], size, splits, normalizer, seed, folder)
            except DivergedError as error:
                print(f"{name}, seed {seed}: {error}")
                continue
            row = {"parameters": parameter_count(stepper), "training_seconds": seconds}
            row |= score(stepper, test, size.leads, seed)
            for first in given.true_from:
                row[f"time_true_from_{first}"] = time_with_true_scales(stepper, test, size.leads, first, seed)
            if name == "refiner" and given.members:
                row |= predictability(stepper, test, size.leads, given.members, seed)
            results[name].append({"arm": name, "seed": seed, **row})
            write(results, out / "scores.csv")
            print(" ".join(f"{key}={_short(item)}" for key, item in results[name][-1].items() if np.ndim(item) == 0))
    times, wavenumbers = np.arange(1, size.leads + 1) * TIME_STEP, shells(test.spec.grid).wavenumbers
    figure({name: rows for name, rows in results.items() if rows}, times, wavenumbers, out / "figure.png")
    summarize(results)
    return results


def write(results: dict, path: Path) -> None:
    """One line per arm and seed; numbers only."""
    rows = [{k: v for k, v in row.items() if np.ndim(v) == 0} for rows in results.values() for row in rows]
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def summarize(results: dict) -> None:
    """The table: means over seeds, and how each arm compares with `mse`."""
    columns = ("correlation_time", "one_step_nrmse", "small_scale_error", "small_scale_distance", "training_seconds")
    means = {n: {c: np.mean([row[c] for row in rows]) for c in columns} for n, rows in results.items() if rows}
    print(f"\n{'arm':10}" + "".join(f"{c:>22}" for c in columns) + f"{'time / mse':>14}{'error mse / arm':>18}")
    for name, row in means.items():
        line = f"{name:10}" + "".join(f"{_short(row[c]):>22}" for c in columns)
        if "mse" in means:
            mse = means["mse"]
            line += f"{row['correlation_time'] / mse['correlation_time']:>14.3f}"
            line += f"{mse['small_scale_error'] / row['small_scale_error']:>18.3g}"
        print(line)
    if any(row["capped"] for rows in results.values() for row in rows):
        print("Some forecasts stayed correlated to the end: their times are lower bounds. Give more --leads.")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the large version")
    parser.add_argument("--arms", nargs="+", choices=("mse", "noise", "refiner"), default=["mse", "noise", "refiner"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, help="of each arm")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float, help="of learning")
    parser.add_argument("--width", type=int, help="channels of the network on its finest level")
    parser.add_argument("--points", type=int)
    parser.add_argument("--trajectories", type=int, help="of the training split")
    parser.add_argument(
        "--viscosity", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="drawn for every trajectory and told to the networks, 1 if not given; published: 1, and 0.5 to 1.5",
    )  # fmt: skip
    parser.add_argument("--tests", type=int, help="trajectories to forecast")
    parser.add_argument("--leads", type=int, help="frames to forecast")
    parser.add_argument("--noise", type=float, default=0.03, help="of the arm `noise`, in units of increments")
    parser.add_argument("--weight", type=float, default=1.0, help="RefinerConfig.weight")
    parser.add_argument("--minimum", type=float, help="RefinerConfig.minimum")
    parser.add_argument("--refinements", type=int, default=3, help="K")
    parser.add_argument("--members", type=int, default=8, help="samples of the refiner's ensemble; 0: none")
    parser.add_argument(
        "--true-from", nargs="+", type=int, default=[], metavar="MODE",
        help="also the correlation times with all modes from this number on taken from the truth after every step",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results; runs/ks_refiner_POINTS_UPDATES")
    main(parser.parse_args())
