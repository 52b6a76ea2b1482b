"""Baselines of CFDBench (Luo et al. 2023, arXiv:2310.05963). Supported: Fno2d -> `physml.models.classic_fno`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from physml.convert.apply import Rule, as_pairs, fill, pointwise, rule
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
from physml.errors import ConversionError
from physml.fields import Signature
from physml.models.classic_fno import ClassicFNO, ClassicFNOConfig

SUPPORTED = ("Fno2d",)


def config_of(config: Mapping[str, Any]) -> tuple[ClassicFNOConfig, Signature]:
    """The config and signature of the model that a recorded upstream config describes.

    Fields are the `in_chan` flow variables and the mask; scalars are the case parameters.
    """
    kind = config.get("upstream_class") or ("Fno2d" if "modes1" in arguments(config) else "unknown")
    if kind not in SUPPORTED:
        raise ConversionError(f"CFDBench {kind} is not supported yet; supported: {', '.join(SUPPORTED)}.")
    kwargs = arguments(config)
    modes = (take(kwargs, "modes1", 12), take(kwargs, "modes2", 12))
    padding = take(kwargs, "padding", None) or 0
    inputs, outputs, scalars = take(kwargs, "in_chan"), take(kwargs, "out_chan"), take(kwargs, "n_case_params")
    built = ClassicFNOConfig(
        width=take(kwargs, "hidden_dim", 20),
        modes=modes,
        depth=take(kwargs, "num_layers", 4),
        padding=padding,
        allow_excess_modes=True,
    )
    for name in ("loss_fn", "upstream", "upstream_class", "tensors"):
        kwargs.pop(name, None)
    refuse(kwargs, {})
    shape = config.get("tensors", {}).get("io", {}).get("in.inputs", (0, 0, 2 * modes[0], 2 * modes[1]))[2:]
    return built, Signature(unit_grid(shape), inputs + 1, scalars, outputs)


def build(config: Mapping[str, Any], tensors: Tensors) -> ClassicFNO:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    fill(model, tensors, rules(model))
    return model


def rules(model: ClassicFNO) -> list[Rule]:
    """Which upstream tensors make which parameter."""
    table = _linear("lifting", "fc0") + _linear("projection.first", "fc1") + _linear("projection.second", "fc2")
    for i in range(len(model.blocks)):
        blocks = (f"blocks.{i}.conv0.weights1", f"blocks.{i}.conv0.weights2")
        table.append(rule(f"blocks.{i}.convolution.weight", *blocks, change=_join))
        table += _linear(f"blocks.{i}.linear", f"blocks.{i}.w0")
    return table


def _linear(ours: str, theirs: str) -> list[Rule]:
    return [rule(f"{ours}.weight", f"{theirs}.weight", change=pointwise), rule(f"{ours}.bias", f"{theirs}.bias")]


def _join(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Blocks of frequencies 0 .. m-1 and -m .. -1, each (in, out, m, last) complex -> (2m, last, in, out, 2)."""
    return np.moveaxis(np.concatenate([as_pairs(negative), as_pairs(positive)], axis=2), (0, 1), (-3, -2))


def replay(model: ClassicFNO, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    inputs, scalars, mask = inputs_of(io, "in.inputs", "in.case_params", "in.mask")
    fields = jnp.moveaxis(jnp.concatenate([inputs, mask[:, None]], axis=1), 1, -1)
    lifted = model.lift(fields, scalars)
    hidden, states = model.pad(lifted), []
    for block in model.blocks:
        hidden = block(hidden)
        states.append(hidden)
    y = jnp.moveaxis(model.project(model.crop(hidden, fields.shape[1:-1])), -1, 1) * mask[:, None]
    available = {
        "mid.fc0": lambda: jnp.moveaxis(lifted, 0, 1),
        "mid.block0": lambda: jnp.moveaxis(states[0], 0, 1),
        "mid.blocks_out": lambda: jnp.moveaxis(hidden, 0, 1),
        "out.y": lambda: y,
    }
    if "in.label" in io:
        label = inputs_of(io, "in.label")[0] * mask[:, None]
        available |= {f"out.loss.{name}": lambda value=value: value for name, value in losses(y, label).items()}
    return pick(available, outputs_of(config, io))


def losses(prediction, label) -> dict[str, Any]:
    """The four scores of CFDBench over the whole batch, each `(1,)`; nmse is relative to the label's mean square."""
    square, absolute = jnp.mean((prediction - label) ** 2), jnp.mean(jnp.abs(prediction - label))
    scores = {"mse": square, "rmse": jnp.sqrt(square), "mae": absolute, "nmse": square / jnp.mean(label**2)}
    return {name: value[None] for name, value in scores.items()}


CFDBENCH_FAMILY = Family(build, replay)
