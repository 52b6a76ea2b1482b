"""A tiny one of every registered stepper, and data that it can start from. A new entry of STEPPERS needs a row here."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from physml.data import XarrayDataset, spec_of
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.solvers import make_solver
from physml.steppers import STEPPERS
from physml.steppers.describe import build_stepper

BURGERS = make_solver("burgers", points=32, solver_points=32, viscosity=0.05, time_step=0.05, substeps=4)
FLOW = make_solver("staggered_flow", points=16, initial_modes=3, substeps=2, time_step=0.02, precision="float32")
OPTIONS = {
    "bundled": {"bundle": 3},
    "climatology": {},
    "closure": {"solver": BURGERS},
    "corrected": {"solver": BURGERS, "history": 2},
    "direct": {"history": 2, "lead": True},
    "extrapolation": {},
    "flux": {"upwind": True, "positive": ("u",)},
    "gaussian": {"history": 2},
    "interval": {"intervals": (1, 2)},
    "learned_interpolation": {"solver": FLOW},
    "linear_inverse": {"modes": 2},
    "persistence": {},
    "refiner": {"refinements": 2, "longest_time": 1.0},
    "residual": {"history": 2},
    "stream_function": {"history": 2},
    "temporal_stencil": {"solver": FLOW, "history": 2, "size": 2},
    "transport": {"center": ("u",), "history": 2},
}

SLOW = ("closure", "learned_interpolation", "temporal_stencil")  # to compile; `corrected` stands for them


def names() -> list:
    """Parameters of a test: every registered stepper."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(STEPPERS)]


def solver_of(name: str):
    """The solver that the stepper holds, or one with the channels that it needs."""
    return OPTIONS[name].get("solver", FLOW if name == "stream_function" else BURGERS)


def data_of(name: str, trajectories: int = 2, frames: int = 8) -> xr.Dataset:
    """Smooth waves on the grid of `solver_of(name)`."""
    solver = solver_of(name)
    random, space = np.random.default_rng(0), [axis.name for axis in solver.grid.axes]
    variables = {}
    for channel in solver.channels:
        field = np.ones((trajectories, frames, *[1] * len(space)))
        for i, axis in enumerate(solver.grid.axes):
            shape = (trajectories, 1, *[1] * len(space))
            place = 2 * np.pi * np.asarray(axis.centers) / axis.length
            place = place.reshape([-1 if j == i else 1 for j in range(len(space))])
            time = 0.1 * np.arange(frames).reshape(1, -1, *[1] * len(space))
            field = field * (0.3 + random.uniform(0.1, 0.2, shape) * np.sin(place - time + random.uniform(0, 6, shape)))
        variables[channel.name] = (("trajectory", "time", *space), field.astype(np.float32))
    coords = {axis.name: np.asarray(axis.centers) for axis in solver.grid.axes}
    return xr.Dataset(variables, {**coords, "time": np.arange(frames) * solver.time_step})


def stepper_of(name: str):
    """The stepper on the data of `data_of(name)`."""
    data = data_of(name)
    spec = dataclasses.replace(spec_of(data), grid=solver_of(name).grid)
    config = STEPPERS[name](**OPTIONS[name])
    if config.signature(spec) is None:
        return config.fit(XarrayDataset(data, spec))
    scale = np.full(len(spec.channels), 0.5)
    numbers = {i: 0.1 * i * scale for i in OPTIONS[name].get("intervals", ())}
    extra = {"intervals": numbers} if numbers else {}
    normalizer = Normalizer(spec, 0 * scale, scale, 0.1 * scale, **extra)
    model = FNOConfig(width=4, modes=(4,) * spec.grid.ndim, depth=1)
    stepper = build_stepper(config, model, spec, normalizer)
    assert jnp.isfinite(normalizer.increments[...]).all()
    return stepper
