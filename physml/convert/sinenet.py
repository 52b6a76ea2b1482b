"""SineNet of divelab's AIRS (OpenPDE), plain and conditioned -> `physml.models.sinenet`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.apply import Rule, fill, kernel, matrix, rule, weight_and_bias
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
from physml.models.sinenet import LEVELS, SineNet, SineNetConfig, Wave

# Arguments that change nothing here: `num_layers` is fixed to 4 by the authors' forward pass, pooling and interpolation
# have no working alternative there, `par1` is only printed.
NEUTRAL = {"num_layers": (LEVELS,), "down_pool": (True,), "up_interpolation": (True,)}


def config_of(config: Mapping[str, Any]) -> tuple[SineNetConfig, Signature]:
    """The config and signature of the model that a recorded upstream config describes.

    The conditioned class is told by its name or by arguments that only it has; scalars are the time and, with
    param_conditioning="scalar", one parameter.
    """
    kwargs = arguments(config)
    name = str(config.get("upstream_class", ""))
    conditioned = "cond" in name or bool({"param_conditioning", "use_scale_shift_norm"} & kwargs.keys())
    parameters = take(kwargs, "param_conditioning", None)
    if parameters not in (None, "scalar"):
        raise ConversionError(
            f"param_conditioning={parameters!r} is not supported by the source: None and 'scalar' are."
        )
    inputs, outputs = channels(kwargs)
    interpolation = str(take(kwargs, "interpolation_mode", "bicubic"))
    padding = take(kwargs, "padding_mode")
    if padding not in PADDING:
        raise ConversionError(f"padding_mode={padding!r} is not supported: only {sorted(PADDING)} are.")
    built = SineNetConfig(
        width=take(kwargs, "hidden_channels"),
        growth=take(kwargs, "mult", 2),
        waves=take(kwargs, "num_waves", 2),
        blocks=take(kwargs, "num_blocks", 1),
        disentangled=bool(take(kwargs, "disentangle", True)),
        residual=bool(take(kwargs, "residual", True)),
        wave_residual=bool(take(kwargs, "wave_residual", True)),
        norm=bool(take(kwargs, "norm", True)),
        activation=take(kwargs, "activation", "gelu"),
        pool="average" if take(kwargs, "avg_pool", True) else "max",
        interpolation="nearest" if interpolation == "nearest-exact" else interpolation,
        boundary=PADDING[padding],
        modulation="scale_shift" if take(kwargs, "use_scale_shift_norm", False) else "add",
    )
    kwargs.pop("par1", None)
    shape = tuple(take(kwargs, "input_shape", config.get("input_shape", (0, 0, 0, 128, 128))))[3:]
    for remark in ("upstream", "upstream_class", "arch", "name"):
        kwargs.pop(remark, None)
    refuse(kwargs, NEUTRAL)
    return built, Signature(unit_grid(shape), inputs, conditioned * (1 + (parameters is not None)), outputs)


def build(config: Mapping[str, Any], tensors: Tensors) -> SineNet:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    fill(model, network_tensors(tensors), rules(model))
    return model


def adopt(config: SineNetConfig, signature: Signature, tensors: Tensors) -> SineNet:
    """The model of a known config. See `Family.adopt`."""
    model = config.build(signature_of(signature, tensors), nnx.Rngs(0))
    fill(model, network_tensors(tensors), rules(model))
    return model


def rules(model: SineNet) -> list[Rule]:
    """Which upstream tensors make which parameter."""
    config, table = model.config, []
    for ours, theirs in (("first", "image_proj"), ("last", "final")):
        table += weight_and_bias(ours, theirs, kernel)
    if model.embedding is not None:
        for i, theirs in enumerate(("time_embed", "pde_emb")[: model.signature.scalars]):
            for part, j in (("first", 0), ("second", 2)):
                table += weight_and_bias(f"embedding.perceptrons.{i}.{part}", f"{theirs}.{j}", matrix)
    for way in ("down", "up"):
        for level in range(LEVELS):
            ours = f"waves.blocks.{way}s.{level}"
            theirs = [f"{way}.{wave}.{level}" for wave in range(config.waves)]
            table += _pair(f"{ours}.pair", [f"{name}.conv.0" for name in theirs], config, model.embedding is not None)
            if config.residual:
                table += _layers(f"{ours}.shortcut", [f"{name}.shortcut" for name in theirs], _stack(matrix))
            if config.blocks > 1:
                rest = [f"{name}.conv.{block}" for name in theirs for block in range(1, config.blocks)]
                shape = (config.waves, config.blocks - 1)
                table += _pair(f"{ours}.rest.blocks", rest, config, model.embedding is not None, shape)
    return table


def _pair(ours: str, theirs: list[str], config: SineNetConfig, conditioned: bool, shape=()) -> list[Rule]:
    table = []
    for i, part in enumerate(("first", "second")):
        table += _layers(f"{ours}.{part}", [f"{name}.conv{i + 1}" for name in theirs], _stack(kernel, shape), shape)
        if config.norm:
            table += _layers(
                f"{ours}.norms.{i}", [f"{name}.norm{i + 1}" for name in theirs], _stack(np.asarray, shape), shape
            )
    if conditioned:
        table += _layers(f"{ours}.condition", [f"{name}.cond_emb" for name in theirs], _stack(matrix, shape), shape)
    return table


def _layers(ours: str, theirs: list[str], change, shape=()) -> list[Rule]:
    return [
        rule(f"{ours}.weight", *(f"{name}.weight" for name in theirs), change=change),
        rule(f"{ours}.bias", *(f"{name}.bias" for name in theirs), change=_stack(np.asarray, shape)),
    ]


def _stack(change, shape=()):
    """Many tensors as one with a leading axis, or with leading axes of that `shape`."""

    def together(*arrays):
        result = np.stack([change(array) for array in arrays])
        return result.reshape(*shape, *result.shape[1:]) if shape else result

    return together


def replay(model: SineNet, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    return replay_recorded(model, _record, config, io)


@nnx.jit
def _record(model: SineNet, fields, scalars) -> dict[str, jnp.ndarray]:
    first, embedding = model.lift(fields), model.embed(scalars)
    graph, state = nnx.split(model.waves.blocks)
    wave: Wave = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    skips, own = [first], first
    for level in range(LEVELS):
        own, hidden = wave.down(level, own, skips[-1], embedding)
        skips.append(hidden)
    up = wave.up(0, skips[-1], skips[-2], embedding)
    last = model.waves(first, lambda wave, x, *_: wave(x, embedding), (None,))
    return {
        "mid.image_proj": first, "mid.wave0.down0.h": skips[1], "mid.wave0.up0": up, "mid.final_in": last,
        "out.y": model(fields, scalars),
    }  # fmt: skip


SINENET_FAMILY = Family(build, replay, adopt=adopt)
