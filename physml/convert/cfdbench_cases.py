"""What the converters of CFDBench share: constructor arguments, recorded cases, scores."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from physml.convert.families import Tensors, arguments, inputs_of

REMARKS = ("loss_fn", "upstream", "upstream_class", "arch", "seed", "tensors", "grid", "input_shape")


def constructor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments without the loss, which belongs to no network, and without remarks."""
    return {name: value for name, value in arguments(config).items() if name not in REMARKS}


def points(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the grid that a config names: "grid", "input_shape", or its recorded inputs."""
    recorded = config.get("tensors", {}).get("io", {}).get("in.inputs", ())
    shape = tuple(config.get("grid") or config.get("input_shape") or recorded)[-2:]
    return tuple(map(int, shape)) or None


def case_of(io: Tensors):
    """(fields, scalars, mask) of recorded inputs; the mask is the last channel of the fields as well."""
    inputs, scalars, mask = inputs_of(io, "in.inputs", "in.case_params", "in.mask")
    return jnp.moveaxis(jnp.concatenate([inputs, mask[:, None]], axis=1), 1, -1), scalars, mask


def scores(prediction, io: Tensors, mask=None) -> dict[str, Any]:
    """The recorded scores of `prediction (batch, channel, *space)` against the label, which is masked if a mask is
    given and cut to as many channels."""
    if "in.label" not in io:
        return {}
    label = inputs_of(io, "in.label")[0][:, : prediction.shape[1]]
    label = label if mask is None else label * mask[:, None]
    return {f"out.loss.{name}": lambda value=value: value for name, value in losses(prediction, label).items()}


def losses(prediction, label) -> dict[str, Any]:
    """The four scores of CFDBench over the whole batch, each `(1,)`; nmse is relative to the label's mean square."""
    square, absolute = jnp.mean((prediction - label) ** 2), jnp.mean(jnp.abs(prediction - label))
    values = {"mse": square, "rmse": jnp.sqrt(square), "mae": absolute, "nmse": square / jnp.mean(label**2)}
    return {name: value[None] for name, value in values.items()}
