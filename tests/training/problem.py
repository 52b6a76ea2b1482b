"""A learnable problem that fits in a few kilobytes, shared by the tests of training and by the processes they start."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.normalize import Normalizer
from physml.objectives import OneStep
from physml.steppers import ResidualConfig
from physml.training.optimizers import OptimizerConfig, TrainingConfig

SPEC = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"), Channel("v")))


class Waves:
    """Traveling waves in memory; trajectory k has `lengths[k]` frames."""

    def __init__(self, lengths=(12, 9, 10), seed=0, spoil=()):
        self.spec, self.lengths = SPEC, tuple(lengths)
        random = np.random.default_rng(seed)
        x, self.frames = np.arange(8) / 8, []
        for length in lengths:
            phase, time = random.uniform(0, 6, 2), np.arange(length)[:, None, None]
            self.frames.append(np.sin(2 * np.pi * (x[:, None] - 0.07 * time) + phase).astype("f4"))
        for trajectory, frame in spoil:
            self.frames[trajectory][frame] = np.nan

    def read(self, trajectory, frames):
        window = Window.of(self.frames[trajectory][frames.start : frames.stop : frames.step][None], SPEC)
        return dataclasses.replace(
            window,
            **{f: getattr(window, f)[0] for f in ("frames", "times", "calendar", "parameters", "forcing", "static")},
        )


class Pointwise(nnx.Module):
    def __init__(self, inputs, outputs, hidden, rngs):
        self.layers = nnx.List([nnx.Linear(inputs, hidden, rngs=rngs), nnx.Linear(hidden, outputs, rngs=rngs)])

    def __call__(self, fields, scalars):
        return self.layers[1](jnp.tanh(self.layers[0](fields)))


def build_model(inputs, outputs, hidden=8, seed=0):
    return Pointwise(inputs, outputs, hidden, nnx.Rngs(seed))


def build_stepper(seed=0):
    return ResidualConfig().build(SPEC, build_model(2, 2, seed=seed), Normalizer(SPEC, [0.1, 0], [0.7] * 2, [0.3] * 2))


def datasets():
    return {"train": Waves(), "valid": Waves((7, 5), seed=1)}


def config(**fields):
    optimizer = {"learning_rate": 1e-2, "clip": 1.0, **fields.pop("optimizer", {})}
    defaults = {
        "steps": 24, "batch": 8, "log_every": 1, "validate_every": 8, "checkpoint_every": 5, "average": 0.9,
        "threads": 2, "updates_per_call": 1,
    }  # fmt: skip
    return TrainingConfig(**{**defaults, **fields}, optimizer=OptimizerConfig(**optimizer))


OBJECTIVE = OneStep()
