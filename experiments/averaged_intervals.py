"""Does a forecast gain from averaging over rollouts with different intervals, as Stormer's does?

    python experiments/averaged_intervals.py             about an hour on one core; ends with a table
    python experiments/averaged_intervals.py --quick     a tiny network, a few updates: shows that it runs

Shallow water on the sphere, random eddies, 32 x 64 points, a frame every 3 hours (needs the extra `sphere`). One scOT
learns steps of one frame only; another one of the same size learns steps of 1, 2 and 4 frames, drawn at random, with
increments scaled for each (`RandomInterval`; Nguyen et al. 2023, arXiv:2312.03876). The second is rolled out with each
interval, and with the mean over intervals that `averaged` switches on. Errors are area-weighted root mean squares in
units of each channel's standard deviation, over all channels. Expect the mean over intervals to lower the error at the
longest lead by 5 % or more against the fixed interval.
"""

import argparse
import tempfile

import jax
import numpy as np
from flax import nnx

from physml import SyntheticConfig
from physml.data import fit_normalizer
from physml.fields import stack
from physml.models.poseidon_scot import ScOTConfig
from physml.objectives import RandomInterval
from physml.parallel.mesh import Layout
from physml.rollout import rollout, rollout_stride
from physml.steppers import IntervalConfig, averaged
from physml.training import OptimizerConfig, TrainingConfig, fit

INTERVALS = (1, 2, 4)
MODEL = ScOTConfig(width=24, depths=(2, 2, 1), heads=(2, 4, 8), skip_blocks=(1, 1, 0), patch=2, window=8)
TINY = ScOTConfig(width=8, depths=(1, 1), heads=(1, 2), skip_blocks=(0, 0), patch=4, window=8)


def train(data, model, intervals: tuple[int, ...], updates: int, steps: int = 1):
    """The stepper after one-step training, then a quarter as long with gradients through `steps` steps."""
    config, spec = IntervalConfig(intervals=intervals), data["train"].spec
    normalizer = fit_normalizer(data["train"], intervals=intervals)
    stepper = config.build(spec, model.build(config.signature(spec), nnx.Rngs(0)), normalizer)
    for unroll, share, rate in ((1, 1.0, 2e-3), *([(steps, 0.25, 2e-4)] if steps > 1 else [])):
        count = max(int(share * updates), 1)
        training = TrainingConfig(
            steps=count, batch=8, updates_per_call=1, checkpoint_every=0, validate_every=max(count // 8, 1),
            validate_windows=64,
            optimizer=OptimizerConfig(learning_rate=rate, warmup=0.05, weight_decay=1e-4, clip=1.0),
        )  # fmt: skip
        objective = RandomInterval(intervals, steps=unroll)
        with tempfile.TemporaryDirectory() as folder:
            stepper = fit(stepper, data, objective, training, Layout(), folder, resume="never").stepper
    return stepper


def score(forecast, window, stepper) -> np.ndarray:
    """Error at every lead of `forecast(window)`, which has as many frames as the window has after its first."""
    frames = np.asarray(jax.jit(forecast)(window))
    stride = (window.frames.shape[1] - 1) // frames.shape[1]
    truth = np.asarray(window.frames)[:, stride::stride]
    weights = window.spec.grid.weights()[..., None]
    scaled = (frames - truth) / np.asarray(stepper.normalizer.frames.scale[...])
    return np.sqrt((weights * scaled**2).mean((0, 2, 3, 4)))


def main(updates: int, quick: bool, steps: int, leads: int, hours: float) -> None:
    counts = {"train": 2, "valid": 1, "test": 1} if quick else {"train": 48, "valid": 4, "test": 8}
    data = SyntheticConfig(
        "shallow_water_sphere", points=32, trajectories=counts, steps=max(leads, 24), time_step=3600.0 * hours,
        options={"family": "eddies", "speed": 20.0, "modes": 8, "substeps": 12, "viscosity": 1e6, "warmup": 86400.0,
                 "precision": "float32"},
    ).open()  # fmt: skip
    test = data["test"]
    window = stack([test.read(i, range(leads + 1)) for i in range(len(test.lengths))])
    print(f"Data: {sum(data['train'].lengths)} frames to train on, {len(test.lengths)} forecasts of {leads} frames.")

    model = TINY if quick else MODEL
    fixed = train(data, model, (1,), updates, steps)
    random = train(data, model, INTERVALS, updates, steps)
    mean = averaged(random)
    rows = {"persistence": None, "fixed interval 1": score(lambda w: rollout(fixed, w, leads), window, fixed)}
    still = np.repeat(window.frames[:, :1], leads, axis=1)
    rows["persistence"] = score(lambda w: still, window, fixed)
    for interval in INTERVALS:
        own = score(lambda w, h=interval: rollout_stride(random, w, leads // h, h), window, random)
        rows[f"random, steps of {interval}"] = np.repeat(own, interval)  # shown where the interval divides the lead
    rows["random, averaged"] = score(lambda w: rollout(mean, w, leads), window, random)

    shown = range(INTERVALS[-1], leads + 1, max(leads // 5 // INTERVALS[-1], 1) * INTERVALS[-1])
    print(f"\nRMSE in standard deviations by lead in frames\n{'':22}" + "".join(f"{lead:>9}" for lead in shown))
    for name, values in rows.items():
        print(f"{name:22}" + "".join(f"{values[lead - 1]:>9.4f}" for lead in shown))
    last = shown[-1] - 1
    for name in ("fixed interval 1", "random, steps of 1"):
        print(f"At lead {last + 1}, averaged / {name}: {rows['random, averaged'][last] / rows[name][last]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4000, help="of each of the two networks")
    parser.add_argument("--steps", type=int, default=4, help="of the rollouts of fine-tuning; 1: none")
    parser.add_argument("--leads", type=int, default=24, help="frames to forecast, a multiple of 4")
    parser.add_argument("--hours", type=float, default=3.0, help="between frames")
    parser.add_argument("--quick", action="store_true", help="a few trajectories and updates")
    given = parser.parse_args()
    main(8 if given.quick else given.updates, given.quick, given.steps, given.leads, given.hours)
