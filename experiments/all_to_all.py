"""Does pretraining on all pairs of frames pay on flows of another kind, and do all pairs beat neighbors?

    python experiments/all_to_all.py             about 45 minutes on one quiet core; ends with three tables
    python experiments/all_to_all.py --quick     tiny networks, a few updates: shows that it runs

Decaying vorticity on a periodic 32 x 32 grid (viscosity 1e-3, 8 snapshots). A small scOT is pretrained with `AllToAll`
on two families of random initial states, large eddies and small ones, and fine-tuned on a third one, Gaussian vortices,
with 4, 16 and 64 trajectories; a scOT and an FNO of the same size start from scratch. The error is the paper's:
relative L1 of the last snapshot, median over test trajectories, forecast in one step (Herde et al. 2024,
arXiv:2405.19101). The same scOT trained on neighboring snapshots only is rolled out to the last one: once after as
many passes over the trajectories (epochs, the paper's measure of training; all pairs are 36 in a trajectory, neighbors
7) and once after as many updates. Expect an accuracy gain of the fine-tuned scOT over FNO of 2 or more at 16
trajectories, and errors of neighbors 1.3 times those of all pairs or more after as many passes.
"""

import argparse
import dataclasses
import tempfile
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.data import XarrayDataset, fit_normalizer, from_array
from physml.data.labelled import spec_of
from physml.fields import stack
from physml.metrics import efficiency_gain
from physml.models import FNOConfig
from physml.models.poseidon_scot import ScOTConfig
from physml.objectives import AllToAll, OneStep
from physml.objectives.pairs import ordered_pairs
from physml.parallel.mesh import Layout
from physml.rollout import direct_leads, rollout
from physml.solvers import DecayingNavierStokes
from physml.solvers.ensemble import Ensemble, precision
from physml.steppers import DirectConfig
from physml.training import OptimizerConfig, TrainingConfig, fit
from physml.training.finetuning import POSEIDON_FINETUNING

LEADS = 7
PAIRS = len(ordered_pairs(LEADS + 1))  # of a trajectory
COUNTS = (4, 16, 64)
STEPPER = DirectConfig(lead=True, longest_lead=LEADS)
SCOT = ScOTConfig(width=32, depths=(2, 2, 1), heads=(2, 4, 8), skip_blocks=(1, 1, 0), patch=4, window=8)
FNO = FNOConfig(width=28, modes=(12, 12), depth=4)
TINY = ScOTConfig(width=8, depths=(1, 1), heads=(1, 2), skip_blocks=(0, 0), patch=4, window=8)
ALL = AllToAll(LEADS + 1, loss="slice_normalized")
NEIGHBORS = OneStep("slice_normalized")
FLOW = DecayingNavierStokes(
    points=32, solver_points=64, length=1.0, viscosity=1e-3, time_step=0.05, substeps=4, initial_speed=0.5,
    precision="float32",
)  # fmt: skip


@dataclass(frozen=True)
class Vortices(DecayingNavierStokes):
    """Starts from 12 Gaussian vortices at random places, of either sign and random width."""

    def initial(self, key, **parameters):
        places, signs, widths = jax.random.split(key, 3)
        center = jax.random.uniform(places, (12, 2)) * self.length
        strength = jax.random.normal(signs, (12,))
        width = jax.random.uniform(widths, (12,), minval=0.04, maxval=0.1) * self.length
        x = jnp.arange(self.solver_points) * self.length / self.solver_points
        distance = (x[:, None] - center.reshape(1, -1) + self.length / 2) % self.length - self.length / 2
        bump = jnp.exp(-((distance.reshape(-1, 12, 2) / width[:, None]) ** 2))
        vorticity = jnp.einsum("yn,xn,n->yx", bump[..., 0], bump[..., 1], strength)
        vorticity = vorticity - vorticity.mean()
        return (vorticity * 5 / jnp.sqrt((vorticity**2).mean()))[..., None]


FAMILIES = {
    "large eddies": dataclasses.replace(FLOW, initial_modes=4),
    "small eddies": dataclasses.replace(FLOW, initial_modes=8),
    "vortices": Vortices(**{f.name: getattr(FLOW, f.name) for f in dataclasses.fields(FLOW)}),
}


def solve(family: str, count: int, split: str) -> np.ndarray:
    """Vorticity `(trajectory, time, y, x, 1)`."""
    solver, batch = FAMILIES[family], min(count, 32)
    with precision(solver):
        ensemble = Ensemble(solver, LEADS, batch, 0, split)
        runs = [ensemble.run(first, batch).frames for first in range(0, count, batch)]
    return np.concatenate(runs)[:count]


def dataset(frames: np.ndarray) -> XarrayDataset:
    dims = ("trajectory", "time", "y", "x", "channel")
    coords = {"x": np.arange(32) / 32, "y": np.arange(32) / 32}
    ds = from_array(frames, dims, ("vorticity",), coords, periodic=("x", "y"), time_step=FLOW.time_step)
    return XarrayDataset(ds, spec_of(ds, ["vorticity"]))


def fresh(model, data):
    signature = STEPPER.signature(data.spec)
    return STEPPER.build(data.spec, model.build(signature, nnx.Rngs(0)), fit_normalizer(data))


def train(stepper, frames, valid, objective, updates: int, optimizer=None):
    """The stepper with the best weights by validation."""
    optimizer = optimizer or OptimizerConfig(learning_rate=1e-3, warmup=0.05, weight_decay=1e-4, clip=5.0)
    training = TrainingConfig(
        steps=updates, batch=16, optimizer=optimizer, validate_every=max(updates // 10, 1), validate_windows=64,
        checkpoint_every=0, updates_per_call=1,
    )  # fmt: skip
    data = {"train": dataset(frames), "valid": dataset(valid)}
    with tempfile.TemporaryDirectory() as folder:
        return fit(stepper, data, objective, training, Layout(), folder, resume="never").stepper


def errors(stepper, frames: np.ndarray) -> tuple[float, float]:
    """Median relative L1 error of the last snapshot in one step, and by steps of one snapshot."""
    data = dataset(frames)
    whole = stack([data.read(i, range(1 + LEADS)) for i in range(len(frames))])
    window, truth = whole.slice(0, 1), whole.frames[:, -1]  # axes in the order of the data's spec
    forecasts = (
        jax.jit(lambda w: direct_leads(stepper, w, [LEADS]))(window)[:, -1],
        jax.jit(lambda w: rollout(stepper, w, LEADS))(window)[:, -1],
    )
    sizes = np.abs(truth).sum((1, 2, 3))
    return tuple(float(np.median(np.abs(np.asarray(f) - truth).sum((1, 2, 3)) / sizes)) for f in forecasts)


def main(updates: int, quick: bool, rate: float, trajectories: int, only_pretraining: bool) -> None:
    many, few, counts = (8, 4, (2, 4)) if quick else (trajectories, 32, COUNTS)
    tests, short = (4 if quick else 64), max(updates // 10, 1)
    scot, fno = (TINY, FNOConfig(width=4, modes=(4, 4), depth=1)) if quick else (SCOT, FNO)
    first = np.concatenate([solve(family, many, "train") for family in ("large eddies", "small eddies")])
    watch = np.concatenate([solve(family, few, "valid") for family in ("large eddies", "small eddies")])
    new, new_watch, new_test = (
        solve("vortices", n, s) for n, s in ((counts[-1], "train"), (few, "valid"), (tests, "test"))
    )
    print(f"Data: {len(first)} trajectories to pretrain on, up to {counts[-1]} to fine-tune on.", flush=True)

    passes = max(updates * LEADS // PAIRS, 1)  # updates in which neighbors are seen as often as all pairs in `updates`
    trained = {
        "all pairs": train(fresh(scot, dataset(first)), first, watch, ALL, updates),
        f"neighbors, {passes}": train(fresh(scot, dataset(first)), first, watch, NEIGHBORS, passes),
        f"neighbors, {updates}": train(fresh(scot, dataset(first)), first, watch, NEIGHBORS, updates),
    }
    print(f"\nLast snapshot of the families trained on ({updates} updates)\n{'':29}{'one step':>10}{'7 steps':>10}")
    found = {}
    for family in ("large eddies", "small eddies"):
        truth = solve(family, tests, "test")
        for name, stepper in trained.items():
            found[family, name] = errors(stepper, truth)
            shown = f"{found[family, name][0]:.4f}" if name == "all pairs" else "-"
            print(f"{family:13}{name:16}{shown:>10}{found[family, name][1]:>10.4f}")
        for name in list(trained)[1:]:
            ratio = found[family, name][1] / np.array(found[family, "all pairs"])
            print(f"{family:13}{name} updates / all pairs: {ratio[0]:.2f} (one step), {ratio[1]:.2f} (7 steps)")

    if only_pretraining:
        return
    pretrained = trained["all pairs"]
    # The authors' rates for fine-tuning: ten times more for what meets the new flow first.
    gentle = POSEIDON_FINETUNING.scaled(rate / POSEIDON_FINETUNING.learning_rate)
    table = {"scOT, pretrained": [errors(pretrained, new_test)], "scOT, from scratch": [], "FNO, from scratch": []}
    print(f"\nVortices, after {short} updates: error in one step (in 7)")
    print(f"{'trajectories':22}{'0':>18}" + "".join(f"{count:>18}" for count in counts), flush=True)
    for name, rows in table.items():
        for count in counts:
            some = new[:count]
            if name == "scOT, pretrained":
                stepper = train(pretrained, some, new_watch, ALL, short, gentle)
            else:
                stepper = train(fresh(fno if "FNO" in name else scot, dataset(some)), some, new_watch, ALL, short)
            rows.append(errors(stepper, new_test))
        cells = "".join(f"{f'{direct:.4f} ({steps:.4f})':>18}" for direct, steps in rows)
        print(f"{name:22}{'' if len(rows) > len(counts) else ' ' * 18}{cells}", flush=True)

    at = counts[1]
    print(f"\nOver FNO: EG (samples to reach its error at {counts[-1]}), AG({at})")
    for name in ("scOT, pretrained", "scOT, from scratch"):
        for way, how in enumerate(("one step", f"{LEADS} steps")):
            own, reference = ([row[way] for row in table[n][-len(counts) :]] for n in (name, "FNO, from scratch"))
            gain = efficiency_gain(counts, own, counts, reference, at=at)
            bound = "at least " if gain.is_bound else ""
            print(f"{name:22}{how:10}EG {bound}{gain.samples:.2f}   AG {gain.accuracy:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10000, help="of pretraining; fine-tuning takes a tenth")
    parser.add_argument("--trajectories", type=int, default=256, help="of each family, to pretrain on")
    parser.add_argument("--pretraining", action="store_true", help="stop before fine-tuning")
    parser.add_argument("--quick", action="store_true", help="a few trajectories and updates")
    parser.add_argument("--rate", type=float, default=5e-5, help="of the trunk in fine-tuning")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as compiled:  # runs of one network with other data share their programs
        jax.config.update("jax_compilation_cache_dir", compiled)
        updates = 20 if given.quick else given.updates
        main(updates, given.quick, given.rate, given.trajectories, given.pretraining)
