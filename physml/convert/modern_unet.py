"""Modern U-Nets of pdearena and of divelab's AIRS, plain and conditioned, 1-D to 3-D -> `physml.models.modern_unet`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.apply import Rule, fill, kernel, matrix, transposed_kernel, weight_and_bias
from physml.convert.arena import PADDING, channels, network_tensors, replay_recorded, signature_of
from physml.convert.families import (
    Family,
    Tensors,
    arguments,
    construct,
    refuse,
    take,
    unit_grid,
)
from physml.errors import ConversionError
from physml.fields import Signature
from physml.models.modern_unet import ModernUNet, ModernUNetConfig

REMARKS = ("upstream", "upstream_class", "arch", "name", "input_shape")


def config_of(config: Mapping[str, Any]) -> tuple[ModernUNetConfig, Signature]:
    """The config and signature of the model that a recorded upstream config describes.

    The conditioned classes are told by their name or by arguments that only they have; scalars are the time and the
    parameters that param_conditioning counts.
    """
    kwargs = arguments(config)
    name = str(config.get("upstream_class", kwargs.get("upstream_class", "")))
    if "Fourier" in name:
        raise ConversionError(
            f"{name} has Fourier layers, which modern_unet has not: only its Unet classes are supported."
        )
    conditioned = "cond" in name or bool({"param_conditioning", "use_scale_shift_norm", "mul_pdes"} & kwargs.keys())
    several = take(kwargs, "mul_pdes", False)
    parameters = count_parameters("scalar" if several else take(kwargs, "param_conditioning", None))
    inputs, outputs = channels(kwargs)
    shape = tuple(config.get("input_shape", kwargs.get("input_shape", ())))[3:]
    ndim = take(kwargs, "n_dims", len(shape) or 2)
    built = network(kwargs, take(kwargs, "padding_mode", "zeros"))
    kwargs = {key: value for key, value in kwargs.items() if key not in REMARKS}
    refuse(kwargs, {})
    shape = shape or (2 ** (len(built.multipliers) - 1) * 8,) * ndim
    if len(shape) != ndim:
        raise ConversionError(f"n_dims={ndim}, but input_shape has {len(shape)} axes of space.")
    return built, Signature(unit_grid(shape), inputs, conditioned * (1 + parameters), outputs)


def count_parameters(conditioning: str | None) -> int:
    """Parameters of the equation in "scalar" (one), "scalar_2" (two), ... or None."""
    if conditioning is None:
        return 0
    kind, _, number = str(conditioning).partition("_")
    if kind != "scalar" or not (number or "1").isdigit():
        raise ConversionError(
            f"param_conditioning={conditioning!r} is not supported: None, 'scalar' and 'scalar_N' are."
        )
    return int(number or 1)


def network(kwargs: dict[str, Any], padding: str) -> ModernUNetConfig:
    """Removes the arguments that say how the network is built."""
    if padding not in PADDING:
        raise ConversionError(f"padding_mode={padding!r} is not supported: only {sorted(PADDING)} are.")
    multipliers = tuple(int(factor) for factor in take(kwargs, "ch_mults", (1, 2, 2, 4)))
    attention = tuple(bool(attends) for attends in take(kwargs, "is_attn", (False,) * 4))
    return ModernUNetConfig(
        width=take(kwargs, "hidden_channels"),
        multipliers=multipliers,
        blocks=take(kwargs, "n_blocks", 2),
        # The source's default has four entries and reads as many as there are levels.
        attention=attention[: len(multipliers)] if any(attention) else (),
        middle_attention=bool(take(kwargs, "mid_attn", False)),
        norm=bool(take(kwargs, "norm", False)),
        pointwise_ends=bool(take(kwargs, "use1x1", False)),
        activation=take(kwargs, "activation", "gelu"),
        boundary=PADDING[padding],
        modulation="scale_shift" if take(kwargs, "use_scale_shift_norm", False) else "add",
    )


def build(config: Mapping[str, Any], tensors: Tensors) -> ModernUNet:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    load(model, tensors)
    return model


def adopt(config: ModernUNetConfig, signature: Signature, tensors: Tensors) -> ModernUNet:
    """The model of a known config. See `Family.adopt`."""
    model = config.build(signature_of(signature, tensors), nnx.Rngs(0))
    load(model, tensors)
    return model


def load(model: ModernUNet, tensors: Tensors) -> None:
    """Fills the model from upstream weights."""
    tensors = network_tensors(tensors)
    # Saved with the weights, but not applied by the source.
    unused = [name for name in tensors if name.endswith((".attn.norm.weight", ".attn.norm.bias"))]
    fill(model, tensors, rules(model, tensors), ignored=unused)


def rules(model: ModernUNet, tensors: Tensors) -> list[Rule]:
    """Which upstream tensors make which parameter."""
    config, table = model.config, []
    levels, blocks = len(config.multipliers), config.blocks
    table += weight_and_bias("first", "image_proj", kernel) + weight_and_bias("last", "final", kernel)
    if config.norm:
        table += weight_and_bias("norm", "norm")
    for i in range(model.signature.scalars):
        # The class with one parameter at most has no number in its names.
        theirs = "time_embed" if i == 0 else f"pde_emb.{i - 1}" if "pde_emb.0.0.weight" in tensors else "pde_emb"
        for part, j in (("first", 0), ("second", 2)):
            table += weight_and_bias(f"embedding.perceptrons.{i}.{part}", f"{theirs}.{j}", matrix)
    for i, block in enumerate(model.downs):
        table += _block(f"downs.{i}", f"down.{i + i // blocks}", block)
    for level in range(levels - 1):
        table += weight_and_bias(f"coarsen.{level}", f"down.{blocks + level * (blocks + 1)}.conv", kernel)
    for i, block in enumerate(model.ups):
        table += _block(f"ups.{i}", f"up.{i + i // (blocks + 1)}", block)
    for level in range(levels - 1):
        theirs = f"up.{(levels - 1 - level) * (blocks + 2) - 1}.conv"
        table += weight_and_bias(f"refine.{level}", theirs, transposed_kernel)
    for i, block in enumerate(model.middle):
        table += _block(f"middle.{i}", "middle", block, residual=f"res{i + 1}")
    return table


def _block(ours: str, theirs: str, block, residual: str = "res") -> list[Rule]:
    inner = f"{theirs}.{residual}"
    table = weight_and_bias(f"{ours}.first", f"{inner}.conv1", kernel)
    table += weight_and_bias(f"{ours}.second", f"{inner}.conv2", kernel)
    for i, norm in enumerate(block.norms):
        table += [] if norm is None else weight_and_bias(f"{ours}.norms.{i}", f"{inner}.norm{i + 1}")
    if block.shortcut is not None:
        table += weight_and_bias(f"{ours}.shortcut", f"{inner}.shortcut", matrix)
    if block.condition is not None:
        table += weight_and_bias(f"{ours}.condition", f"{inner}.cond_emb", matrix)
    if block.attention is not None:
        table += weight_and_bias(f"{ours}.attention.projection", f"{theirs}.attn.projection", matrix)
        table += weight_and_bias(f"{ours}.attention.output", f"{theirs}.attn.output", matrix)
    return table


def replay(model: ModernUNet, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    return replay_recorded(model, _record, config, io)


@nnx.jit
def _record(model: ModernUNet, fields, scalars) -> dict[str, jnp.ndarray]:
    first, embedding = model.lift(fields), model.embed(scalars)
    coarse, skips = model.descend(first, embedding)
    middle = model.turn(coarse, embedding)
    last = model.normalize(model.ascend(middle, skips, embedding))
    return {
        "mid.image_proj": first, "mid.down0": skips[1], "mid.middle": middle, "mid.final_norm": last,
        "out.y": model(fields, scalars),
    }  # fmt: skip


MODERN_UNET_FAMILY = Family(build, replay, adopt=adopt)
