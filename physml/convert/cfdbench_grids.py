"""UNet and ResNet of CFDBench -> `physml.models.classic_unet` and `cfdbench_resnet`.

Fields are the flow variables and the mask, which also multiplies the result; scalars are the case parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from physml.convert.apply import Rule, fill, kernel, rule, transposed_kernel, weight_and_bias
from physml.convert.cfdbench_cases import case_of, constructor, points, scores
from physml.convert.families import Tensors, construct, outputs_of, pick, refuse, take, unit_grid
from physml.errors import ConversionError
from physml.fields import Signature
from physml.models.cfdbench_resnet import CFDBenchResNet, CFDBenchResNetConfig
from physml.models.classic_unet import ClassicUNet, ClassicUNetConfig


def config_of_unet(config: Mapping[str, Any]) -> tuple[ClassicUNetConfig, Signature]:
    """The config and signature of a UNet."""
    kwargs = constructor(config)
    inputs, outputs = take(kwargs, "in_chan"), take(kwargs, "out_chan")
    scalars, bilinear = take(kwargs, "n_case_params", 5), take(kwargs, "bilinear", False)
    conditioning = take(kwargs, "insert_case_params_at", "hidden")
    if conditioning not in ("hidden", "input"):
        raise ConversionError(
            f"insert_case_params_at={conditioning!r} is not supported: only 'hidden' and 'input' are."
        )
    if bilinear and conditioning == "hidden":
        raise ConversionError(
            "bilinear=True with insert_case_params_at='hidden' is not supported: the source itself fails with it, as "
            "its case parameters have twice the channels of the coarsest grid."
        )
    built = ClassicUNetConfig(
        width=take(kwargs, "dim", 8),
        conditioning=conditioning,
        upsampling="bilinear" if bilinear else "transposed",
        boundary="replicate",
        mask=inputs,
    )
    refuse(kwargs, {})
    return built, Signature(unit_grid(points(config) or (64, 64)), inputs + 1, scalars, outputs)


def build_unet(config: Mapping[str, Any], tensors: Tensors) -> ClassicUNet:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of_unet, config)
    table = weight_and_bias("readout", "out_conv.conv", kernel)
    for i in range(len(model.down)):
        table += _pair(f"down.{i}", f"down{i}.maxpool_conv.1" if i else "in_conv")
    for i, step in enumerate(model.up):
        table += _pair(f"up.{i}.pair", f"up{i + 1}.conv")
        if step.grow is not None:
            table.append(rule(f"up.{i}.grow.weight", f"up{i + 1}.up.weight", change=transposed_kernel))
            table.append(rule(f"up.{i}.grow.bias", f"up{i + 1}.up.bias"))
    if model.conditions is not None:
        table.append(rule("conditions.weight", "case_params_fc.weight", change=np.transpose))
        table.append(rule("conditions.bias", "case_params_fc.bias"))
    fill(model, tensors, table, ignored=[name for name in tensors if name.endswith(".num_batches_tracked")])
    return model


def _pair(ours: str, theirs: str) -> list[Rule]:
    table = []
    for i, name in enumerate(("first", "second")):
        place = f"{theirs}.conv{i + 1}"
        table += weight_and_bias(f"{ours}.{name}", f"{place}.0", kernel)
        for here, there in (
            ("weight", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("variance", "running_var")
        ):  # fmt: skip
            table.append(rule(f"{ours}.norms.{i}.{here}", f"{place}.1.{there}"))
    return table


def replay_unet(model: ClassicUNet, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    fields, scalars, mask = case_of(io)
    down = model.descend(fields, scalars)
    states = {"in_conv": down[0], **{f"down{i}": x for i, x in enumerate(down) if i}}
    if model.conditions is not None:  # what is recorded has no case parameters yet
        states[f"down{len(down) - 1}"] = down[-1] - model.conditions(jnp.asarray(scalars))[:, None, None]
    states |= {f"up{i}": x for i, x in enumerate(model.ascend(down[-1], down[:-1]), start=1)}
    y = jnp.moveaxis(model(fields, scalars), -1, 1)
    available = {f"mid.{name}": lambda x=x: jnp.moveaxis(x, -1, 1) for name, x in states.items()}
    return pick(available | {"out.y": lambda: y} | scores(y, io, mask), outputs_of(config, io))


def config_of_resnet(config: Mapping[str, Any]) -> tuple[CFDBenchResNetConfig, Signature]:
    """The config and signature of a ResNet."""
    kwargs = constructor(config)
    inputs, outputs, scalars = take(kwargs, "in_chan"), take(kwargs, "out_chan"), take(kwargs, "n_case_params", 5)
    kernel, padding, stride = take(kwargs, "kernel_size", 7), take(kwargs, "padding", 3), take(kwargs, "stride", 1)
    if kernel != 2 * padding + 1 or stride != 1:
        raise ConversionError(
            f"kernel_size={kernel}, padding={padding} and stride={stride} do not keep the grid, as the sums of the "
            f"source need: kernel_size must be 2 * padding + 1, and stride 1."
        )
    built = CFDBenchResNetConfig(
        width=take(kwargs, "hidden_chan", 32),
        depth=take(kwargs, "num_blocks", 4),
        kernel=kernel,
        boundary="replicate",
        mask=inputs,
    )
    refuse(kwargs, {})
    return built, Signature(unit_grid(points(config) or (64, 64)), inputs + 1, scalars, outputs)


def build_resnet(config: Mapping[str, Any], tensors: Tensors) -> CFDBenchResNet:
    """The model with upstream weights. The source's batch normalization, which it never applies, is left out."""
    model = construct(config_of_resnet, config)
    table = []
    for i, block in enumerate(model.blocks):
        table += weight_and_bias(f"blocks.{i}.first", f"blocks.{i}.conv1", kernel)
        table += weight_and_bias(f"blocks.{i}.second", f"blocks.{i}.conv2", kernel)
        if block.shortcut is not None:
            table += weight_and_bias(f"blocks.{i}.shortcut", f"blocks.{i}.res_conv", kernel)
    fill(model, tensors, table, ignored=[name for name in tensors if ".bn1." in name or ".bn2." in name])
    return model


def replay_resnet(model: CFDBenchResNet, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    fields, scalars, mask = case_of(io)
    blocks, y = model.run(fields, scalars), jnp.moveaxis(model(fields, scalars), -1, 1)
    available = {f"mid.block{i}": lambda x=x: jnp.moveaxis(x, -1, 1) for i, x in enumerate(blocks)}
    return pick(available | {"out.y": lambda: y} | scores(y, io, mask), outputs_of(config, io))
