"""Do our networks emulate APEBench's equations as well as its own code, and faster?

Advection, Burgers and Kuramoto-Sivashinsky in APEBench's difficulty form (Koehler et al. 2024, arXiv:2411.00180): 160
points, 50 trajectories of 50 steps to learn from, 30 of 200 to be scored, Adam with linear rise to 1e-3 and cosine
decay, batches of 20, squared error of one step or of K unrolled ones. Four networks of the same architecture and about
32 000 trained numbers on both sides. The data is made here, once; both sides read the same files.

    make apebench                                                             the environment of the other side
    .venv/bin/python experiments/apebench_native.py --check                   our data against apebench's solvers
    .venv/bin/python experiments/apebench_native.py                           3 scenarios, 4 networks, 3 seeds
    .venv/bin/python experiments/apebench_native.py --nets conv,fno --unroll 1,5 --scenarios burgers
    .venv/bin/python experiments/apebench_native.py --nets conv2,conv,fno \\
        --scenarios advection@0.5,advection@2.5,advection@10.5
    .venv/bin/python experiments/apebench_native.py --table                   what is there so far
    .venv/bin/python experiments/apebench_native.py --quick                   a minute, to see that it runs

Every training runs in a process of its own, ours and theirs in turn, so that other work on the machine slows both. Each
leaves a JSON file under --out; what is there already is not run again. With --together the seeds of an item are trained
at once, by vmap on both sides. Both sets of predictions are scored by the same code: nRMSE, the mean over samples of
|p - u| / |u|; its geometric mean over the first 100 steps; correlation.

Expect nRMSE within the spread of the seeds of theirs and less than 0.9 of their time; a network that sees 3 cells to
each side to fail at an advection of 10.5 cells per step where others do not; and training over 5 unrolled steps to cost
accuracy in the first step and gain it at 30.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

POINTS, BATCH, RATE = 160, 20, 1e-3
TRAIN, TEST = (50, 50), (30, 200)  # trajectories and steps of each
# name -> apebench's network string; conv2 has three convolutions, so it sees 3 cells to each side
NETS = {
    "conv": "Conv;34;10;relu", "resnet": "Res;26;8;relu", "unet": "UNet;12;2;relu", "fno": "FNO;12;18;4;gelu",
    "conv2": "Conv;101;2;relu",
}  # fmt: skip
SCENARIOS = ("advection", "burgers", "ks")
SIDES, TIMES = ("ours", "theirs"), ("seconds", "milliseconds", "processor_seconds")
HERE = Path(__file__).resolve().parent


def difficulties(scenario: str) -> dict[str, Any]:
    """Fields of the solver below. "advection@10.5" moves 10.5 cells per step."""
    family, _, number = scenario.partition("@")
    return {
        "advection": {"linear": (0.0, float(number or -4.0))},
        "burgers": {"linear": (0.0, 0.0, 1.5), "nonlinear": (-1.5, 0.0)},
        "ks": {"linear": (0.0, 0.0, -1.2, 0.0, -15.0), "nonlinear": (0.0, -6.0), "warmup": 500.0},
    }[family]


def make_solver(**fields):
    """A solver of physml for an equation given by difficulties.

    u_t = sum_i a_i d^i u / dx^i + b_1 (u^2)_x / 2 + b_2 (u_x)^2 / 2 on one period with time step 1, where
    linear_i = a_i N^i 2^(i-1) and nonlinear = (b_1 N, b_2 N^2) for N points; ETDRK2, 2/3 rule before products.
    """
    import jax
    import jax.numpy as jnp

    from physml.fields import Channel
    from physml.solvers import fourier

    @dataclass(frozen=True)
    class Difficulty(fourier.Spectral):
        linear: tuple[float, ...]
        nonlinear: tuple[float, float] = (0.0, 0.0)
        points: int = POINTS
        solver_points: int = POINTS
        length: float = 1.0
        time_step: float = 1.0
        substeps: int = 1
        warmup: float = 0.0
        initial_modes: int = 5
        downsampling: str = "fourier"
        precision: str = "float64"

        axes: ClassVar[tuple[str, ...]] = ("x",)
        channels: ClassVar[tuple[Channel, ...]] = (Channel("u"),)
        usual_steps: ClassVar[int] = 200

        def initial(self, key, **parameters):
            """Waves of random amplitude in (-1, 1) and phase, scaled to a largest value of 1."""
            keys = jax.random.split(key)
            amplitude = jax.random.uniform(keys[0], (self.initial_modes,), float, -1, 1)
            phase = jax.random.uniform(keys[1], (self.initial_modes,), float, 0, fourier.TAU)
            waves = jnp.arange(1, self.initial_modes + 1) * fourier.TAU * jnp.arange(self.points)[:, None] / self.points
            u = jnp.cos(waves + phase) @ amplitude
            return (u / jnp.abs(u).max())[:, None]

        def stepper(self, **parameters):
            # exponax 0.2, which physml builds on, cuts the products at 2/3 too; apebench's solver (exponax 0.1) does
            # not, and on 160 points Burgers' shocks differ by 2 % of the largest value for it.
            wave = 2j * np.pi * np.arange(self.points // 2 + 1)
            a = [c / self.points**i / 2 ** (i - 1) for i, c in enumerate(self.linear)]
            convection, gradient = (c / self.points**i for i, c in enumerate(self.nonlinear, start=1))
            symbol = sum(c * wave**i for i, c in enumerate(a))
            kept = np.arange(len(wave)) <= 2 / 3 * (self.points // 2) - 1
            around = symbol[:, None] + np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)  # Kassam & Trefethen 2005
            phi = [np.expm1(around) / around, (np.expm1(around) - around) / around**2]
            factor, (phi_1, phi_2) = np.exp(symbol), (values.mean(1) for values in phi)
            if not symbol.imag.any():
                phi_1, phi_2 = phi_1.real, phi_2.real

            def products(spectrum):
                square = jnp.fft.rfft(jnp.fft.irfft(kept * spectrum, self.points) ** 2)
                slopes = jnp.fft.irfft(kept * wave * spectrum, self.points) ** 2
                return convection / 2 * wave * square + gradient / 2 * jnp.fft.rfft(slopes - slopes.mean())

            def step(state):
                spectrum = jnp.fft.rfft(state[:, 0])
                now = factor * spectrum
                if any(self.nonlinear):
                    first = products(spectrum)
                    now = now + phi_1 * first
                    now = now + phi_2 * (products(now) - first)
                return jnp.fft.irfft(now, self.points)[:, None].astype(state.dtype)

            return step

    return Difficulty(**fields)


def data_of(scenario: str, folder: Path) -> Path:
    """The file of a scenario, made where it is not there yet: train and test, each (sample, time, channel, x)."""
    from physml.solvers.ensemble import Ensemble, precision

    path = folder / f"{scenario}.npz"
    if not path.exists():
        solver = make_solver(**difficulties(scenario))
        splits = {}
        for split, (count, steps) in (("train", TRAIN), ("test", TEST)):
            with precision(solver):
                splits[split] = np.moveaxis(Ensemble(solver, steps, count, 0, split).run(0).frames, -1, 2)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(partial, **splits)
        partial.replace(path)
    return path


def our_model(net: str):
    """The config of our network of one of apebench's network strings."""
    from physml.models import ClassicFNOConfig, ClassicUNetConfig, ConvNetConfig, ResNetConfig

    kind, *numbers, _ = net.split(";")
    sizes = [int(number) for number in numbers]
    if kind == "Conv":
        return ConvNetConfig(*sizes)
    if kind == "Res":
        return ResNetConfig(*sizes, activation="relu", preactivation=False, pointwise_ends=True)
    if kind == "UNet":
        return ClassicUNetConfig(*sizes, norm="group", downsampling="strided", upsampling="overlapping", frame=None)
    modes, width, depth = sizes
    return ClassicFNOConfig(
        width, (modes,), depth, projection=0, positions=False, activation="gelu_tanh", small_start=True
    )


def ours(arguments) -> None:
    """The training of one item on our side; writes what apebench_peer.py writes."""
    import jax
    from flax import nnx

    from physml import Layout, Normalizer, OneStep, OptimizerConfig, TrainingConfig, Unrolled
    from physml.data import XarrayDataset, from_array, spec_of
    from physml.fields import stack
    from physml.rollout import rollout
    from physml.saving import build_stepper
    from physml.steppers import DirectConfig
    from physml.training import fit

    def dataset(frames):
        data = from_array(frames[:, :, 0], ("sample", "time", "x"), periodic=("x",))
        return XarrayDataset(data, spec_of(data))

    with np.load(arguments.data) as file:
        train, test = dataset(file["train"]), dataset(file["test"])
        steps = file["test"].shape[1] - 1
    unroll = 1 if arguments.train == "one" else int(arguments.train.split(";")[1])
    objective = OneStep(space="physical") if unroll == 1 else Unrolled(steps=unroll, space="physical")
    config = TrainingConfig(
        steps=arguments.updates, batch=BATCH, updates_per_call=25, log_every=100, checkpoint_every=0, select="last",
        optimizer=OptimizerConfig("adam", RATE, "cosine", warmup=arguments.warmup),
    )  # fmt: skip
    model = our_model(arguments.net)
    steppers = [
        build_stepper(DirectConfig(), model, train.spec, Normalizer.identity(train.spec), seed=seed)
        for seed in arguments.seeds
    ]
    clock = Clock(arguments.updates)
    options = {"layout": Layout(data=1), "progress": clock, "resume": "never"}
    with tempfile.TemporaryDirectory() as folder:
        start, busy = time.perf_counter(), time.process_time()
        if len(steppers) > 1:
            from physml.training.members import fit_members

            done = fit_members(
                steppers, {"train": train}, objective, config, folder=folder, seeds=arguments.seeds, **options
            )
        else:
            done = fit(
                steppers[0], {"train": train}, objective, config, folder=folder, seed=arguments.seeds[0], **options
            )
        end, busy = time.perf_counter(), time.process_time() - busy
    window = stack([test.read(i, range(1)) for i in range(len(test.lengths))])
    # By seed; training leaves out members that diverged.
    trained = (
        {seed: done.stepper.member(i) for i, seed in enumerate(done.seeds)}
        if len(steppers) > 1
        else {arguments.seeds[0]: done.stepper}
    )
    graph = nnx.graphdef(next(iter(trained.values())))
    roll = jax.jit(lambda state, window: rollout(nnx.merge(graph, state), window, steps))
    lost = np.full((TEST[0], steps, POINTS, 1), np.nan)
    frames = [
        np.asarray(roll(nnx.state(trained[seed]), window)) if seed in trained else lost for seed in arguments.seeds
    ]
    frames = np.moveaxis(np.stack(frames), -1, -2)  # (seed, sample, time, channel, x), as apebench_peer.py has it
    result = {
        "seconds": end - start,
        "processor_seconds": busy,
        "milliseconds": 1e3 * clock.per_update(),
        "rollout_seconds": time.perf_counter() - end,
        "parameters": model.parameters(steppers[0].config.signature(train.spec)),
    }
    np.savez(arguments.out, frames=frames, result=json.dumps(result))


class Clock:
    """Told of progress by `fit`; seconds per update without the first tenth, which holds the compilation."""

    def __init__(self, total: int):
        self.total, self.marks = total, []

    def update(self, done: int, total: int, **values) -> None:
        self.marks.append((done, time.perf_counter()))

    def message(self, text: str) -> None:
        pass

    def per_update(self) -> float:
        marks = [mark for mark in self.marks if mark[0] >= self.total // 10]
        return (marks[-1][1] - marks[0][1]) / max(marks[-1][0] - marks[0][0], 1)


def scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    """Of each step, the mean over samples: nRMSE, and correlation without removing the mean, as apebench has them."""
    predicted, truth = (np.asarray(a, np.float64).reshape(*a.shape[:2], -1) for a in (predicted, truth))
    with np.errstate(over="ignore", invalid="ignore"):
        norm, other = np.linalg.norm(truth, axis=-1), np.linalg.norm(predicted, axis=-1)
        error = np.linalg.norm(predicted - truth, axis=-1) / norm
        correlation = (predicted * truth).sum(-1) / (norm * other)
    return {"nrmse": error.mean(0).tolist(), "correlation": correlation.mean(0).tolist()}


@dataclass(frozen=True)
class Item:
    """One training of each side: seeds together are one item."""

    scenario: str
    net: str
    unroll: int
    seeds: tuple[int, ...]
    updates: int

    def path(self, out: Path, side: str) -> Path:
        seeds = "+".join(map(str, self.seeds))
        return out / f"{self.updates}" / f"{self.scenario}-{self.net}-{self.unroll}-{seeds}-{side}.json"


def run(item: Item, side: str, arguments) -> None:
    """Trains one side of one item in a process of its own and writes its scores."""
    data = data_of(item.scenario, arguments.out / "data")
    path = item.path(arguments.out, side)
    python, script = (
        (sys.executable, [__file__, "--worker"])
        if side == "ours"
        else (str(arguments.peer), [str(HERE / "apebench_peer.py")])
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.npz"
        words = [
            "--scenario" if side == "theirs" else "--scenarios", item.scenario, "--data", data, "--net", NETS[item.net],
            "--train", "one" if item.unroll == 1 else f"sup;{item.unroll}", "--updates", item.updates,
            "--warmup", item.updates // 5, "--out", out,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        words = [python, *script, *map(str, words), "--seeds", *map(str, item.seeds)]
        subprocess.run(words, check=True, env=environment)
        with np.load(out) as file, np.load(data) as given:
            result = json.loads(str(file["result"]))
            result["scores"] = [scores(frames, given["test"][:, 1:]) for frames in file["frames"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"side": side, **vars(item), **result}))
    partial.replace(path)


def check(arguments) -> None:
    """Prints how far our data is from what apebench's own solver makes of the same first frames."""
    print("largest difference from apebench's trajectories, over the largest value, after so many steps")
    for scenario in arguments.scenarios:
        data = data_of(scenario, arguments.out / "data")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "theirs.npz"
            words = [arguments.peer, HERE / "apebench_peer.py", "--scenario", scenario, "--data", data, "--out", out]
            subprocess.run([*map(str, words)], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
            with np.load(out) as file, np.load(data) as given:
                truth = given["test"][:, 1:]
                error = np.abs(file["frames"][0] - truth).max((0, 2, 3)) / np.abs(truth).max((0, 2, 3))
        print(f"{scenario:16}", "  ".join(f"{step}: {error[step - 1]:.1e}" for step in (1, 10, 50, 100, 200)))


def rows_of(out: Path, updates: int) -> dict[tuple, dict[str, list[dict]]]:
    """(scenario, net, unroll) -> side -> one dict per seed: curves, and seconds for each seed."""
    rows: dict[tuple, dict[str, dict[int, dict]]] = {}
    for path in sorted((out / f"{updates}").glob("*.json")):
        item = json.loads(path.read_text())
        sides = rows.setdefault((item["scenario"], item["net"], item["unroll"]), {})
        share = {name: item[name] / len(item["seeds"]) for name in TIMES}
        for seed, curves in zip(item["seeds"], item["scores"]):
            sides.setdefault(item["side"], {})[seed] = {**share, "parameters": item["parameters"], **curves}
    return {key: {side: list(seeds.values()) for side, seeds in sides.items()} for key, sides in rows.items()}


def geometric(curve, steps: int = 100) -> float:
    """Geometric mean over the first steps; infinite for a rollout that left the numbers."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.nan_to_num(np.exp(np.log(curve[:steps]).mean()), nan=np.inf))


def correlated(curve) -> int:
    """Steps until the correlation is below 0.8."""
    below = ~(np.asarray(curve) >= 0.8)
    return int(below.argmax()) if below.any() else len(curve)


def pair(values) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1g}"


def table(out: Path, updates: int) -> None:
    rows = rows_of(out, updates)
    both = {key: sides for key, sides in rows.items() if sides.keys() >= {*SIDES}}
    print(f"{updates} updates; nRMSE: geometric mean over the first 100 steps, mean and deviation over seeds")
    print(
        "distance: of the means, in deviations of the seeds of both. Ours / theirs: nRMSE of the first step; steps till"
    )
    print("the correlation is below 0.8; s of training with compilation; ms per update without; s of processor time\n")
    head = "| scenario | net | unrolled | ours | theirs | distance | first step | correlated "
    head += "| training | update | processor |"
    print(head + "\n" + "|---" * head.count(" | ") + "|---|")
    for (scenario, net, unroll), sides in sorted(both.items()):
        mine, other = ([geometric(row["nrmse"]) for row in sides[side]] for side in SIDES)
        spread = np.sqrt((np.var(mine, ddof=1) + np.var(other, ddof=1)) / 2) if min(len(mine), len(other)) > 1 else 0
        distance = f"{(np.mean(mine) - np.mean(other)) / spread:+.1f}" if spread else "-"
        means = {name: [np.mean([row[name] for row in sides[side]]) for side in SIDES] for name in TIMES}
        first = " / ".join(f"{np.mean([row['nrmse'][0] for row in sides[side]]):.2g}" for side in SIDES)
        kept = " / ".join(f"{np.mean([correlated(row['correlation']) for row in sides[side]]):.0f}" for side in SIDES)
        times = [
            f"{means[name][0]:.3g} / {means[name][1]:.3g} = {means[name][0] / means[name][1]:.2f}" for name in TIMES
        ]
        cells = [scenario, net, unroll, pair(mine), pair(other), distance, first, kept, *times]
        print("| " + " | ".join(map(str, cells)) + " |")
    field(rows)
    unrolling(rows)


def field(rows) -> None:
    """Advection of several speeds: which networks see far enough."""
    speeds = sorted({key[0] for key in rows if "@" in key[0]}, key=lambda name: float(name.partition("@")[2]))
    for side in SIDES if speeds else ():
        print(f"\n{side}: nRMSE by cells of advection per step\n")
        nets = [net for net in NETS if any((speed, net, 1) in rows for speed in speeds)]
        print("| net | " + " | ".join(speeds) + " |\n|---" + "|---" * len(speeds) + "|")
        for net in nets:
            found = [rows.get((speed, net, 1), {}).get(side, []) for speed in speeds]
            print(
                f"| {net} | " + " | ".join(f"{np.mean([geometric(r['nrmse']) for r in f]):.3g}" for f in found) + " |"
            )


def unrolling(rows) -> None:
    """Errors after training over unrolled steps, relative to those after training on one step."""
    keys = [key for key in sorted(rows) if key[2] > 1 and (*key[:2], 1) in rows]
    if keys:
        print("\nnRMSE after unrolled training over that after one-step training (above 1: worse)\n")
        print("| scenario | net | unrolled | side | step 1 | step 30 | step 100 |\n|---|---|---|---|---|---|---|")
    for key, side in itertools.product(keys, SIDES):
        long, one = rows[key].get(side), rows[(*key[:2], 1)].get(side)
        if long and one:
            ratio = np.mean([r["nrmse"] for r in long], 0) / np.mean([r["nrmse"] for r in one], 0)
            cells = [*key, side, *(f"{ratio[step - 1]:.2f}" for step in (1, 30, 100))]
            print("| " + " | ".join(map(str, cells)) + " |")


def plan(arguments) -> list[Item]:
    groups = [tuple(arguments.seeds)] if arguments.together else [(seed,) for seed in arguments.seeds]
    return [
        Item(scenario, net, unroll, seeds, arguments.updates)
        for scenario, unroll, net, seeds in itertools.product(
            arguments.scenarios, arguments.unroll, arguments.nets, groups
        )
    ]


def words(text: str) -> list[str]:
    return text.split(",")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=words, default=list(SCENARIOS), help="advection@G: G cells per step")
    parser.add_argument("--nets", type=words, default=[*NETS][:4], help=f"of {', '.join(NETS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=3000, help="a fifth of them raise the learning rate")
    parser.add_argument("--unroll", type=lambda text: [int(word) for word in words(text)], default=[1])
    parser.add_argument("--together", action="store_true", help="the seeds of an item at once, by vmap, on both sides")
    parser.add_argument("--sides", type=words, default=list(SIDES))
    parser.add_argument("--peer", type=Path, default=Path(".venv-apebench/bin/python"), help="with apebench installed")
    parser.add_argument("--out", type=Path, default=Path("runs/apebench"))
    parser.add_argument("--check", action="store_true", help="compare the data with apebench's solvers and stop")
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--quick", action="store_true", help="one scenario, two networks, one seed, 300 updates")
    for name in ("worker", "data", "net", "train", "warmup"):
        flag = {"action": "store_true"} if name == "worker" else {"type": int if name == "warmup" else str}
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **flag)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.scenarios, arguments.nets, arguments.seeds, arguments.updates = (
            ["advection"],
            ["conv", "fno"],
            [0],
            300,
        )
    if unknown := set(arguments.nets) - set(NETS):
        parser.error(f"there is no network {sorted(unknown)}; choose from {', '.join(NETS)}")
    if unknown := {name for name in arguments.scenarios if name.partition("@")[0] not in SCENARIOS}:
        parser.error(f"there is no scenario {sorted(unknown)}; choose from {', '.join(SCENARIOS)}, advection@NUMBER")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return ours(arguments)
    if arguments.table:
        return table(arguments.out, arguments.updates)
    if not arguments.peer.exists() and ("theirs" in arguments.sides or arguments.check):
        sys.exit(f"{arguments.peer} is not there. Run `make apebench`, or name a Python with apebench by --peer.")
    if arguments.check:
        return check(arguments)
    for number, item in enumerate(plan(arguments)):
        for side in arguments.sides[:: -1 if number % 2 else 1]:
            if item.path(arguments.out, side).exists():
                continue
            start = time.perf_counter()
            run(item, side, arguments)
            row = json.loads(item.path(arguments.out, side).read_text())
            error = np.mean([geometric(curves["nrmse"]) for curves in row["scores"]])
            print(
                f"{item.scenario} {item.net} unrolled {item.unroll} seeds {item.seeds} {side}: nRMSE {error:.3g}, "
                f"training {row['seconds']:.1f} s, {row['milliseconds']:.2f} ms per update, "
                f"in all {time.perf_counter() - start:.1f} s", flush=True,
            )  # fmt: skip
    return table(arguments.out, arguments.updates)


if __name__ == "__main__":
    main()
