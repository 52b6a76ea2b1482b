"""Our FNO beside the neuraloperator package on small Darcy flow: same sizes, epochs, batch, optimizer and schedule.

    make peers
    PHYSML_DARCY=/data/darcy .venv-peers/bin/python experiments/darcy_peer.py --epochs 100 --seeds 3

Every training runs in a process of its own, ours and theirs in turn. Both sets of predictions are scored by the same
code (relative L2; relative H1 with periodic central differences, as neuraloperator defines it) on 16 x 16 and, never
seen in training, on 32 x 32 points.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, MODES, DEPTH, BATCH, RATE, DECAY = 24, 16, 4, 8, 5e-3, 1e-4


def read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Coefficient and solution, each (sample, y, x) float32."""
    import xarray as xr

    with xr.open_dataset(folder / f"darcy_{name}.nc") as data:
        return tuple(data[v].transpose("sample", "y", "x").values.astype(np.float32) for v in ("a", "u"))


def ours(folder: Path, epochs: int, seed: int) -> dict:
    import dataclasses

    import jax
    from flax import nnx

    from physml import Layout, Normalizer
    from physml.experiment import load_experiment
    from physml.fields import stack
    from physml.rollout import rollout
    from physml.saving import build_stepper
    from physml.training import fit

    experiment = load_experiment(Path(__file__).with_name("darcy.py"))
    data = dataclasses.replace(experiment.data, test=(str(folder / "darcy_test_16.nc"),))
    splits = dataclasses.replace(data, train=(str(folder / "darcy_train_16.nc"),)).open()
    spec = splits["train"].spec
    normalizer = Normalizer.fit(splits["train"].windows(), "zscore")
    stepper = build_stepper(experiment.stepper, experiment.model, spec, normalizer, seed=seed)
    settings = dataclasses.replace(experiment.training, epochs=epochs, checkpoint_every=0)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(stepper.model, nnx.Param)))
    clock = Clock(epochs * 125)
    with tempfile.TemporaryDirectory() as run:
        layout = Layout(data=1)
        done = fit(stepper, {"train": splits["train"]}, experiment.objective, settings, layout, run, seed=seed,
                   progress=clock, resume="never")  # fmt: skip
    predictions = {}
    for points in (16, 32):
        files = dataclasses.replace(data, train=(), valid=(), test=(str(folder / f"darcy_test_{points}.nc"),)).open()
        window = stack([files["test"].read(i, range(1)) for i in range(len(files["test"].lengths))])
        there = done.stepper.on_grid(files["test"].spec.grid)
        frames = np.asarray(rollout(there, window, 1))[:, 0, ..., 0]
        first = [axis.name for axis in window.spec.grid.axes][0]
        predictions[f"u{points}"] = frames if first == "y" else frames.swapaxes(1, 2)
    return {"parameters": parameters, "epoch_seconds": clock.per_epoch(125), **predictions}


class Clock:
    """Seconds per update without the first updates, which compile."""

    def __init__(self, total: int):
        self.total, self.marks = total, []

    def update(self, done: int, total: int, **values) -> None:
        self.marks.append((done, time.perf_counter()))

    def message(self, text: str) -> None:
        pass

    def per_epoch(self, updates: int) -> float:
        marks = [mark for mark in self.marks if mark[0] >= self.total // 10]
        return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0]) * updates


def theirs(folder: Path, epochs: int, seed: int) -> dict:
    import torch
    from neuralop.losses import H1Loss
    from neuralop.models import FNO
    from neuralop.training import AdamW

    torch.manual_seed(seed)
    torch.set_num_threads(2)
    a, u = (torch.from_numpy(field)[:, None] for field in read(folder, "train_16"))
    center_a, scale_a, center_u, scale_u = a.mean(), a.std(), u.mean(), u.std()
    model = FNO(n_modes=(MODES, MODES), in_channels=1, out_channels=1, hidden_channels=WIDTH, n_layers=DEPTH)
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(epochs // 5, 1), 0.5)
    loss = H1Loss(d=2)
    x, y = (a - center_a) / scale_a, (u - center_u) / scale_u
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(model(x[index]), y[index]).backward()
            optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    predictions = {}
    with torch.no_grad():
        for points in (16, 32):
            a, _ = read(folder, f"test_{points}")
            output = model((torch.from_numpy(a)[:, None] - center_a) / scale_a) * scale_u + center_u
            predictions[f"u{points}"] = output[:, 0].numpy()
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "epoch_seconds": float(np.mean(seconds[epochs // 10 :])), **predictions}


def scores(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean over samples of |p - t| / |t| in L2, and in H1 with periodic central differences on the unit square."""

    def square(field, derivatives):
        total = (field**2).mean((1, 2))
        for axis in (1, 2) if derivatives else ():
            slope = (np.roll(field, -1, axis) - np.roll(field, 1, axis)) * field.shape[axis] / 2
            total = total + (slope**2).mean((1, 2))
        return np.sqrt(total)

    return {
        name: float((square(prediction - truth, h1) / square(truth, h1)).mean()) for name, h1 in (("l2", 0), ("h1", 1))
    }


def work(arguments) -> None:
    result = {"ours": ours, "theirs": theirs}[arguments.worker](arguments.data, arguments.epochs, arguments.seed)
    for points in (16, 32):
        _, truth = read(arguments.data, f"test_{points}")
        result |= {f"{k}_{points}": v for k, v in scores(result.pop(f"u{points}"), truth).items()}
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    arguments.out.write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PHYSML_DARCY", "datasets/darcy/data")))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("darcy_peer.json"))
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    rows = []
    for seed in range(arguments.seeds):
        for who in ("ours", "theirs"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "result.json"
                words = ["--worker", who, "--seed", seed, "--epochs", arguments.epochs, "--data", arguments.data]
                subprocess.run([sys.executable, __file__, *map(str, words), "--out", str(out)], check=True)
                rows.append({"who": who, "seed": seed, **json.loads(out.read_text())})
            print(json.dumps(rows[-1]), flush=True)
    names = ("l2_16", "h1_16", "l2_32", "h1_32", "epoch_seconds", "peak_mib", "parameters")
    print("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for who in ("ours", "theirs"):
        mine = [row for row in rows if row["who"] == who]
        print(f"| {who} | " + " | ".join(f"{np.mean([row[n] for row in mine]):.4g}" for n in names) + " |")
    arguments.out.write_text(json.dumps({"epochs": arguments.epochs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
