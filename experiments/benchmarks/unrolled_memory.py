"""How much more memory does the gradient of a rollout of 20 steps take than that of 5, when steps are recomputed?

python experiments/benchmarks/unrolled_memory.py [--points 64 --width 32 --batch 8]

Temporary memory that XLA plans for the compiled gradient of `Unrolled(steps)`, with and without `remat`; nothing is
run. With `remat` 20 steps should take at most 1.5 times what 5 take: what grows is one state per step and the frames
that are scored. Some minutes on 2 cores, all of it compilation.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.models.fno import FNOConfig
from physml.models.modern_unet import ModernUNetConfig
from physml.normalize import Normalizer
from physml.objectives import Unrolled
from physml.steppers import ResidualConfig


def gradient_memory(stepper, objective, batch: int) -> int:
    """Bytes of temporary memory of the compiled gradient with respect to all parameters."""
    graphdef, params, rest = nnx.split(stepper, nnx.Param, ...)
    spec = stepper.spec
    shape = (batch, objective.frames(stepper.history), *spec.grid.shape, len(spec.channels))

    def loss(params, frames):
        return objective(nnx.merge(graphdef, params, rest), Window.of(frames, spec), jax.random.key(0))[0]

    compiled = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def build(config, points: int):
    axes = tuple(Axis.uniform(name, points) for name in "xy")
    spec = Spec(Grid(axes), (Channel("u"), Channel("v")))
    stepper = ResidualConfig()
    model = config.build(stepper.signature(spec), nnx.Rngs(0))
    return stepper.build(spec, model, Normalizer.identity(spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    networks = {
        "FNO": FNOConfig(width=options.width, modes=(16, 16)),
        "U-Net": ModernUNetConfig(width=options.width // 2),
    }
    print("| network | remat | 1 step, MB | 5 steps, MB | 20 steps, MB | 20 over 5 |\n|---|---|---|---|---|---|")
    for name, config in networks.items():
        stepper = build(config, options.points)
        for remat in (False, True):
            sizes = [gradient_memory(stepper, Unrolled(n, remat=remat), options.batch) for n in (1, 5, 20)]
            cells = " | ".join(f"{size / 1e6:.1f}" for size in sizes)
            print(f"| {name} | {remat} | {cells} | {sizes[2] / sizes[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
