"""PDE-Refiner of pdearena: its network -> `physml.models.modern_unet`, its predictions -> `physml.steppers.refiner`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.arena import flat, unflat
from physml.convert.families import (
    Family,
    Tensors,
    arguments,
    construct,
    inputs_of,
    outputs_of,
    pick,
    refuse,
    take,
    unit_grid,
)
from physml.convert.modern_unet import adopt, count_parameters, load, network
from physml.errors import ConversionError
from physml.fields import Signature
from physml.models.modern_unet import ModernUNet, ModernUNetConfig
from physml.steppers.refiner import NoiseSchedule, denoise, frames_of, increment_of, refine

NETWORKS = {"Unetmod-1d-64": {"hidden_channels": 64, "norm": True}}  # entries of the source's registry
# What does not act on a prediction: how the source trains and scores.
TRAINING = (
    "criterion", "ema_decay", "lr", "max_num_steps", "num_refinement_steps", "min_noise_std", "predict_difference",
    "difference_weight", "time_gap", "model", "upstream", "upstream_class", "arch", "input_shape", "diffusers_version",
)  # fmt: skip


def config_of(config: Mapping[str, Any]) -> tuple[ModernUNetConfig, Signature]:
    """The config and signature of the network in a recorded upstream config.

    "pde" holds the counts of fields, "net" the arguments of the network, or "name" says which entry of the source's
    registry it is. Inputs are the history and the noisy target; scalars the refinement step and the parameters.
    """
    kwargs = arguments(config)
    pde = dict(take(kwargs, "pde"))
    name, given = take(kwargs, "name", None), take(kwargs, "net", None)
    if given is None and name not in NETWORKS:
        raise ConversionError(
            f"The config names the network {name!r}: give its arguments as 'net', or {list(NETWORKS)}."
        )
    net = dict(NETWORKS[name] if given is None else given)
    frame = take(pde, "n_scalar_components") + 2 * take(pde, "n_vector_components")
    history, future = take(kwargs, "time_history"), take(kwargs, "time_future")
    net.setdefault("activation", take(kwargs, "activation", "gelu"))
    scalars = 1 + count_parameters(take(kwargs, "param_conditioning", None))
    shape = tuple(config.get("input_shape", kwargs.get("input_shape", ())))[3:]
    ndim = int(take(pde, "n_spatial_dim", len(shape) or 1))
    built = network(net, take(kwargs, "padding_mode", "zeros"))
    if net.pop("n_dims", ndim) != ndim:
        raise ConversionError(f"The network and the equation have different numbers of axes: n_dims is not {ndim}.")
    refuse(net, {})
    refuse({key: value for key, value in kwargs.items() if key not in TRAINING}, {})
    shape = shape or (2 ** (len(built.multipliers) - 1) * 8,) * ndim
    return built, Signature(unit_grid(shape), (history + future) * frame, scalars, future * frame)


def schedule_of(config: Mapping[str, Any]) -> tuple[NoiseSchedule, float | None]:
    """The noise, and what increments are divided by; None where frames are predicted themselves."""
    kwargs = arguments(config)
    schedule = NoiseSchedule(int(kwargs.get("num_refinement_steps", 4)), float(kwargs.get("min_noise_std", 4e-7)))
    weight = float(kwargs.get("difference_weight", 1.0)) if kwargs.get("predict_difference", False) else None
    return schedule, weight


def build(config: Mapping[str, Any], tensors: Tensors) -> ModernUNet:
    """The network with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    load(model, tensors)
    return model


def replay(model: ModernUNet, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded: a call of the network, a prediction step by step, a training problem."""
    schedule, weight = schedule_of(config)
    steps = schedule.refinements
    x, y, noise_init, train_noise, net_x = map(
        flat, inputs_of(io, "in.x", "in.y", "in.noise_init", "in.train_noise", "in.net_x")
    )
    condition, net_time, train_k = inputs_of(io, "in.cond", "in.net_time", "in.train_k")
    noises = jnp.stack([flat(noise) for noise in inputs_of(io, *(f"in.noise_step{j}" for j in range(steps)))])
    frame = io["in.x"].shape[2]
    last = x[..., -frame:]
    condition = jnp.asarray(condition.reshape(len(x), -1))

    network = nnx.jit(model)  # one program for all calls
    found = refine(network, schedule, x, condition, noise_init, noises)
    predicted = found.result if weight is None else frames_of(found.result, last, weight)
    target = y if weight is None else increment_of(y, last, weight)
    train = denoise(network, schedule, x, target, condition, train_k.astype(int), train_noise)
    network_out = network(net_x, jnp.concatenate([net_time[:, None], condition], axis=1))
    fields = {
        "out.net": network_out, "out.predict": predicted, "out.train.net_in": train.inputs,
        "out.train.pred": train.prediction, "out.train.target": train.target,
    }  # fmt: skip
    for j in range(steps + 1):
        fields |= {
            f"out.predict_step{j}.y_noised_in": found.samples[j],
            f"out.predict_step{j}.net_out": found.outputs[j],
        }
    available = {name: lambda value=value: unflat(value, frame) for name, value in fields.items()}
    available["out.train.loss"] = lambda: train.loss[None]
    return pick(available, outputs_of(config, io))


PDEREFINER_FAMILY = Family(build, replay, adopt=adopt, prefer=("ema",))  # the source scores its averaged weights
