"""AutoDeepONet, AutoEDeepONet and AutoFfn of CFDBench -> `physml.models.auto_deeponet` and `auto_ffn`.

These networks read the first flow variable alone and give its next frame; the mask goes unused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.apply import fill, matrix, rule, weight_and_bias
from physml.convert.cfdbench_cases import constructor, points, scores
from physml.convert.families import Tensors, construct, inputs_of, outputs_of, pick, refuse, take, unit_grid
from physml.errors import ConversionError
from physml.fields import Signature
from physml.models.auto_deeponet import AutoDeepONet, AutoDeepONetConfig
from physml.models.auto_ffn import AutoFFN, AutoFFNConfig

ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "gelu": "gelu", "swish": "silu"}
GRIDS, CASES = ((64, 64), (66, 65)), (5, 8)  # of the published data: points, numbers of case parameters


def _activation(kwargs: dict[str, Any]) -> str:
    name = take(kwargs, "act_name", "relu")
    if name not in ACTIVATIONS:
        raise ConversionError(f"act_name={name!r} is not supported: only {sorted(ACTIVATIONS)} are.")
    return ACTIVATIONS[name]


def _grid(config: Mapping[str, Any], total: int, scalars: int | None) -> tuple[tuple[int, int], int]:
    """Points of the grid and number of case parameters of a network that reads `total` numbers.

    `scalars` None: they are among the `total`. A config that names no grid must be one of the published data.
    """
    shape = points(config)
    fits = [
        (grid, count)
        for grid in ([shape] if shape else GRIDS)
        for count in ([total - grid[0] * grid[1]] if shape and scalars is None else CASES if scalars is None else [0])
        if grid[0] * grid[1] + count == total and count >= 0
    ]
    if not fits:
        raise ConversionError(
            f"The network reads {total} numbers, which is no {f'field of {shape}' if shape else 'published field'} "
            'points (and its case parameters). Name the grid in the config: "grid": [rows, columns].'
        )
    shape, count = fits[0]
    return shape, count if scalars is None else scalars


def config_of_deeponet(config: Mapping[str, Any]) -> tuple[AutoDeepONetConfig, Signature]:
    """The config and signature of an AutoDeepONet or AutoEDeepONet; the first input channel is the only one."""
    kwargs = constructor(config)
    separate = "dim_branch1" in kwargs
    if separate:
        shape, scalars = _grid(config, take(kwargs, "dim_branch1"), take(kwargs, "dim_branch2"))
    else:
        shape, scalars = _grid(config, take(kwargs, "branch_dim"), None)
    if take(kwargs, "trunk_dim", 2) != 2:
        raise ConversionError("trunk_dim must be 2: the trunk reads row and column.")
    kwargs.pop("num_label_samples", None)  # of no use to the source's network either
    built = AutoDeepONetConfig(
        width=take(kwargs, "width", 100),
        branch_depth=take(kwargs, "branch_depth", 4),
        trunk_depth=take(kwargs, "trunk_depth", 4),
        branches="separate" if separate else "joint",
        activation=_activation(kwargs),
        standardize=take(kwargs, "act_norm", False),
        activate_output=take(kwargs, "act_on_output", False),
    )
    refuse(kwargs, {})
    return built, Signature(unit_grid(shape), 1, scalars, 1)


def build_deeponet(config: Mapping[str, Any], tensors: Tensors) -> AutoDeepONet:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of_deeponet, config)
    separate = model.conditions is not None
    names = {"branch": "branch1", "conditions": "branch2"} if separate else {"branch": "branch_net"}
    table = [rule("bias", "bias")]
    for ours, theirs in {**names, "trunk": "trunk_net"}.items():
        for i in range(len(getattr(model, ours).maps)):
            table += weight_and_bias(f"{ours}.maps.{i}", f"{theirs}.layers.{2 * i}", matrix)
    fill(model, tensors, table)
    return model


def replay_deeponet(model: AutoDeepONet, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    inputs, scalars = inputs_of(io, "in.inputs", "in.case_params")
    fields = jnp.asarray(inputs[:, 0, ..., None])
    y = jnp.moveaxis(model(fields, scalars), -1, 1)
    available = {
        "mid.branch": lambda: model.coefficients(fields, scalars),
        "mid.trunk": lambda: model.functions(fields.dtype),
        "out.y": lambda: y,
    }
    if model.conditions is not None:
        available |= {
            "mid.branch1": lambda: model.branch(fields.reshape(len(fields), -1)),
            "mid.branch2": lambda: model.conditions(scalars),
            # The source's forward pass gives it flat, its `generate` as a field.
            "out.y": lambda: y if np.ndim(io.get("out.y", 0)) == 4 else y.reshape(len(y), -1),
        }
    return pick(available | scores(y, io), outputs_of(config, io))


def config_of_ffn(config: Mapping[str, Any]) -> tuple[AutoFFNConfig, Signature]:
    """The config and signature of an AutoFfn; the first input channel is the only one.

    "mix_batch" in the config says whether batches are to be mixed as in the source's forward pass; by default not.
    """
    kwargs = constructor(config)
    shape, scalars = _grid(config, take(kwargs, "input_field_dim"), take(kwargs, "num_case_params"))
    if take(kwargs, "query_dim", 2) != 2:
        raise ConversionError("query_dim must be 2: the network reads row and column.")
    kwargs.pop("num_label_samples", None)
    mix = kwargs.pop("mix_batch", config.get("mix_batch", False))
    built = AutoFFNConfig(
        width=take(kwargs, "width", 100),
        depth=take(kwargs, "depth", 8),
        activation=_activation(kwargs),
        standardize=take(kwargs, "act_norm", False),
        mix_batch=mix,
    )
    refuse(kwargs, {})
    return built, Signature(unit_grid(shape), 1, scalars, 1)


def build_ffn(config: Mapping[str, Any], tensors: Tensors) -> AutoFFN:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of_ffn, config)
    table = weight_and_bias("entry", "ffn.layers.0", matrix)
    for i in range(len(model.rest.maps)):
        table += weight_and_bias(f"rest.maps.{i}", f"ffn.layers.{2 * i + 2}", matrix)
    fill(model, tensors, table)
    return model


def replay_ffn(model: AutoFFN, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded, batches mixed as in the source's forward pass. See `Family.replay`."""
    inputs, scalars = inputs_of(io, "in.inputs", "in.case_params")
    fields, model = jnp.asarray(inputs[:, 0, ..., None]), mixing(model)
    y = jnp.moveaxis(model(fields, scalars), -1, 1)
    available = {"mid.ffn": lambda: model.change(fields, scalars).reshape(-1, 1), "out.y": lambda: y}
    return pick(available | scores(y, io), outputs_of(config, io))


def mixing(model: AutoFFN) -> AutoFFN:
    """The same weights with the source's mixing of batches."""
    other = nnx.clone(model)
    other.config = dataclasses.replace(model.config, mix_batch=True)
    return other
