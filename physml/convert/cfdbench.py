"""Baselines of CFDBench (Luo et al. 2023, arXiv:2310.05963; repository luo-yining/CFDBench).

Fno2d -> `classic_fno` (here), AutoDeepONet and AutoEDeepONet -> `auto_deeponet`, AutoFfn -> `auto_ffn` (in
`cfdbench_points`), UNet -> `classic_unet`, ResNet -> `cfdbench_resnet` (in `cfdbench_grids`).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert import cfdbench_grids, cfdbench_points
from physml.convert.apply import Rule, as_pairs, fill, pointwise, rule, weight_and_bias
from physml.convert.cfdbench_cases import case_of, constructor, points, scores
from physml.convert.families import (
    Family,
    Tensors,
    arguments,
    construct,
    outputs_of,
    pick,
    refuse,
    take,
    unit_grid,
)
from physml.errors import ConversionError, suggest
from physml.fields import Signature
from physml.models.classic_fno import ClassicFNO, ClassicFNOConfig


def config_of(config: Mapping[str, Any]) -> tuple[ClassicFNOConfig, Signature]:
    """The config and signature of the Fno2d that a recorded upstream config describes.

    Fields are the `in_chan` flow variables and the mask; scalars are the case parameters.
    """
    kwargs = constructor(config)
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
    refuse(kwargs, {})
    shape = points(config) or (2 * modes[0], 2 * modes[1])
    return built, Signature(unit_grid(shape), inputs + 1, scalars, outputs)


def build_fno(config: Mapping[str, Any], tensors: Tensors) -> ClassicFNO:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    fill(model, tensors, rules(model))
    return model


def rules(model: ClassicFNO) -> list[Rule]:
    """Which upstream tensors make which parameter."""
    table = (
        weight_and_bias("lifting", "fc0", pointwise)
        + weight_and_bias("projection.first", "fc1", pointwise)
        + weight_and_bias("projection.second", "fc2", pointwise)
    )
    for i in range(len(model.blocks)):
        blocks = (f"blocks.{i}.conv0.weights1", f"blocks.{i}.conv0.weights2")
        table.append(rule(f"blocks.{i}.convolution.weight", *blocks, change=_join))
        table += weight_and_bias(f"blocks.{i}.linear", f"blocks.{i}.w0", pointwise)
    return table


def _join(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Blocks of frequencies 0 .. m-1 and -m .. -1, each (in, out, m, last) complex -> (2m, last, in, out, 2)."""
    return np.moveaxis(np.concatenate([as_pairs(negative), as_pairs(positive)], axis=2), (0, 1), (-3, -2))


def replay_fno(model: ClassicFNO, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    fields, scalars, mask = case_of(io)
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
    return pick(available | scores(y, io, mask), outputs_of(config, io))


# How each class of the source is built and replayed, and an argument that no other class has.
CLASSES = {
    "AutoDeepONet": (cfdbench_points.build_deeponet, cfdbench_points.replay_deeponet, "branch_dim"),
    "AutoEDeepONet": (cfdbench_points.build_deeponet, cfdbench_points.replay_deeponet, "dim_branch1"),
    "AutoFfn": (cfdbench_points.build_ffn, cfdbench_points.replay_ffn, "input_field_dim"),
    "Fno2d": (build_fno, replay_fno, "modes1"),
    "ResNet": (cfdbench_grids.build_resnet, cfdbench_grids.replay_resnet, "hidden_chan"),
    "UNet": (cfdbench_grids.build_unet, cfdbench_grids.replay_unet, "insert_case_params_at"),
}


def class_of(config: Mapping[str, Any]) -> str:
    """Name of the source's class: "upstream_class", or told from the arguments. Raises ConversionError."""
    named = config.get("upstream_class")
    found = [name for name, (*_, mark) in CLASSES.items() if mark in arguments(config)]
    if named not in CLASSES and (named or len(found) != 1):
        raise ConversionError(
            f"There is no converter for the CFDBench class {named!r}." + suggest(named or "", CLASSES)
            + ' Set "upstream_class" in the config.'
        )  # fmt: skip
    return named or found[0]


def build(config: Mapping[str, Any], tensors: Tensors) -> nnx.Module:
    """The model with upstream weights. See `Family.build`."""
    return CLASSES[class_of(config)][0](config, tensors)


def replay(model: nnx.Module, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    return CLASSES[class_of(config)][1](model, config, io)


CFDBENCH_FAMILY = Family(build, replay)
