"""One training of APEBench's own code on given data: the other side of experiments/apebench_native.py, which calls it.

    python -m venv .venv-apebench && .venv-apebench/bin/pip install apebench==0.1.1        (or: make apebench)
    .venv-apebench/bin/python experiments/apebench_peer.py --scenario ks --data ks.npz --net "FNO;12;18;4;gelu" --out F

apebench needs an exponax that physml cannot use, hence the environment of its own; nothing of physml is imported here.
Networks, optimizer, schedule, batches, loss and metrics are those of apebench and its packages; only the trajectories
come from `--data`. F (npz) gets the predicted test trajectories of every seed and how long training took.
"""

import argparse
import json
import time
from pathlib import Path

import apebench
import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import numpy as np

SCENARIOS = apebench.scenarios.difficulty
FAMILIES = {"advection": SCENARIOS.Advection, "burgers": SCENARIOS.Burgers, "ks": SCENARIOS.KuramotoSivashinsky}


def scenario_of(name: str, methods: dict | None = None, **settings):
    """The scenario "ks" or "advection@10.5" (with that difficulty) with settings, and with `methods` of its own."""
    family, _, difficulty = name.partition("@")
    kind = type("Given", (FAMILIES[family],), methods or {})
    return kind(**({"advection_gamma": float(difficulty)} if difficulty else {}), **settings)


class Clock:
    """A training callback that notes when the first tenth of the updates is done: compilation lies before."""

    def __init__(self, updates: int):
        self.first, self.start = max(updates // 10, 1), None

    def __call__(self, update, model, data):
        if update == self.first:
            leaves = [getattr(leaf, "val", leaf) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
            jax.block_until_ready(leaves)  # under vmap a leaf is a tracer around its values
            self.start = time.perf_counter()


def train(arguments) -> None:
    with np.load(arguments.data) as file:
        trajectories, initial = jnp.asarray(file["train"]), jnp.asarray(file["test"][:, 0])
        steps = file["test"].shape[1] - 1
    schedule = f"adam;{arguments.updates};warmup_cosine;0.0;1e-3;{arguments.warmup}"
    clock = Clock(arguments.updates)
    given = {"get_train_data": lambda self: trajectories, "get_callback_fn": lambda self: clock}
    scenario = scenario_of(arguments.scenario, given, optim_config=schedule, batch_size=arguments.batch)

    def fit(seed):
        first, order = jax.random.split(jax.random.PRNGKey(seed))
        stepper = scenario.get_neural_stepper(task_config="predict", network_config=arguments.net, key=first)
        trainer = scenario.get_trainer(train_config=arguments.train)
        trained, losses, _ = trainer(stepper, order, record_loss_every=100, spawn_tqdm=False)
        return trained, losses

    together = len(arguments.seeds) > 1
    start, busy = time.perf_counter(), time.process_time()
    model, losses = eqx.filter_vmap(fit)(jnp.asarray(arguments.seeds)) if together else fit(arguments.seeds[0])
    arrays, static = eqx.partition(model, eqx.is_array)
    jax.block_until_ready((arrays, losses))
    end, busy = time.perf_counter(), time.process_time() - busy

    @jax.jit
    def roll(arrays, initial):
        return jax.vmap(ex.rollout(eqx.combine(arrays, static), steps))(initial)

    frames = jax.vmap(roll, (0, None))(arrays, initial) if together else roll(arrays, initial)[None]
    jax.block_until_ready(frames)
    result = {
        "seconds": end - start,
        "processor_seconds": busy,
        "milliseconds": 1e3 * (end - clock.start) / (arguments.updates - clock.first),
        "rollout_seconds": time.perf_counter() - end,
        "parameters": scenario.get_parameter_count(arguments.net),
    }
    np.savez(arguments.out, frames=np.asarray(frames), result=json.dumps(result))


def solve(arguments) -> None:
    """Trajectories of apebench's reference solver from the first test frames of `--data`."""
    with np.load(arguments.data) as file:
        initial, steps = jnp.asarray(file["test"][:, 0]), file["test"].shape[1] - 1
    stepper = scenario_of(arguments.scenario).get_ref_stepper()
    frames = jax.jit(jax.vmap(ex.rollout(stepper, steps)))(initial)
    np.savez(arguments.out, frames=np.asarray(frames)[None], result="{}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", required=True, help=f"one of {', '.join(FAMILIES)}, as in advection@10.5")
    parser.add_argument("--data", type=Path, required=True, help="npz with train and test (sample, time, channel, x)")
    parser.add_argument("--net", help="apebench's network string; without one the reference solver runs instead")
    parser.add_argument("--train", default="one", help="one, or sup;K for K unrolled steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="several are trained together, by vmap")
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--warmup", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    (train if arguments.net else solve)(arguments)


if __name__ == "__main__":
    main()
