"""FNO and TFNO of the neuraloperator library (release 2.0.0, MIT license) -> `physml.models.fno`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.apply import Rule, as_pairs, fill, pointwise, rule, vector
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
from physml.models.fno import FNO, FNOConfig

# Arguments without a counterpart here, and the values under which they change nothing (dropout is off when a model is
# used).
NEUTRAL = {
    "complex_data": (False,), "resolution_scaling_factor": (None, 1, 1.0), "fno_block_precision": ("full",),
    "max_n_modes": (None,), "fixed_rank_modes": (False, None), "separable": (False,), "data_channels": (None,),
    "implementation": ("factorized", "reconstructed"), "decomposition_kwargs": (None, {}),
    "enforce_hermitian_symmetry": (None, True),
}  # fmt: skip
SKIPS = {"linear": "linear", "identity": "identity", "soft-gating": "soft-gating", None: "none"}


def config_of(config: Mapping[str, Any]) -> tuple[FNOConfig, Signature]:
    """The config and signature of the model that a recorded upstream config describes.

    The grid is that of "input_shape" where given, else as many points as modes: weights do not depend on it.
    "legacy_shift" says whether odd axes behave as in release 2.0.0; by default where the config names that release.
    """
    kwargs = arguments(config)
    tucker = config.get("upstream_class", "FNO") == "TFNO"
    modes = take(kwargs, "n_modes")
    modes = (modes,) if isinstance(modes, int) else tuple(int(m) for m in modes)
    padding = take(kwargs, "domain_padding", None) or ()
    padding = tuple(padding) if isinstance(padding, (list, tuple)) else (float(padding),)
    factorization = str(take(kwargs, "factorization", "Tucker" if tucker else None) or "dense").lower()
    factorization = factorization.removeprefix("complex")
    if factorization not in ("dense", "tucker"):
        raise ConversionError(f"factorization={factorization!r} is not supported: only dense and Tucker weights are.")
    rank = take(kwargs, "rank", 0.1 if tucker else 1.0)
    if rank == "same":
        rank = 1.0
    activation = take(kwargs, "activation", None)
    nonlinearity = take(kwargs, "non_linearity", None)
    positions = take(kwargs, "positional_embedding", "grid")
    if positions not in ("grid", None):
        raise ConversionError(f"positional_embedding={positions!r} is not supported: only 'grid' and None are.")
    inputs, outputs = take(kwargs, "in_channels"), take(kwargs, "out_channels")
    use_mlp, expansion = take(kwargs, "use_channel_mlp", True), take(kwargs, "channel_mlp_expansion", 0.5)
    take(kwargs, "channel_mlp_dropout", 0)
    legacy = take(kwargs, "legacy_shift", config.get("legacy_shift", "2.0.0" in str(config.get("upstream", ""))))
    built = FNOConfig(
        width=take(kwargs, "hidden_channels"),
        modes=modes,
        depth=take(kwargs, "n_layers", 4),
        lifting_ratio=take(kwargs, "lifting_channel_ratio", 2),
        projection_ratio=take(kwargs, "projection_channel_ratio", 2),
        activation=str(activation or nonlinearity or "gelu").removeprefix("F."),
        norm=take(kwargs, "norm", None) or "none",
        skip=_skip("fno_skip", take(kwargs, "fno_skip", "linear")),
        channel_mlp_expansion=expansion if use_mlp else 0.0,
        channel_mlp_skip=_skip("channel_mlp_skip", take(kwargs, "channel_mlp_skip", "soft-gating")),
        preactivation=take(kwargs, "preactivation", False),
        stabilizer=take(kwargs, "stabilizer", None) or "none",
        domain_padding=padding,
        positions=positions == "grid",
        factorization=factorization,
        rank=tuple(rank) if isinstance(rank, (list, tuple)) else float(rank),
        legacy_shift=bool(legacy),
        allow_excess_modes=True,
    )
    if "kwargs" not in config:
        kwargs = {
            key: value for key, value in kwargs.items() if key not in ("input_shape", "upstream", "upstream_class")
        }
    refuse(kwargs, NEUTRAL)
    shape = tuple(config.get("input_shape", (0, 0, *modes)))[2:]
    if len(shape) != len(modes):
        raise ConversionError(f"input_shape has {len(shape)} spatial axes, but n_modes={modes} has {len(modes)}.")
    return built, Signature(unit_grid(shape), inputs, 0, outputs)


def _skip(name: str, kind: str | None) -> str:
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind not in SKIPS:
        raise ConversionError(f"{name}={kind!r} is not supported: only {list(SKIPS)} are.")
    return SKIPS[kind]


def build(config: Mapping[str, Any], tensors: Tensors) -> FNO:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    fill(model, tensors, rules(model))
    return model


def rules(model: FNO) -> list[Rule]:
    """Which upstream tensors make which parameter."""
    table = _mlp("lifting", "lifting", model.lifting) + _mlp("projection", "projection", model.projection)
    for i, block in enumerate(model.blocks):
        ours, convolution = f"blocks.{i}", f"fno_blocks.convs.{i}"
        table.append(rule(f"{ours}.convolution.bias", f"{convolution}.bias", change=vector))
        if block.convolution.factors is None:
            table.append(rule(f"{ours}.convolution.weight", f"{convolution}.weight.tensor", change=_modes_first))
        else:
            table.append(rule(f"{ours}.convolution.core", f"{convolution}.weight.core", change=as_pairs))
            table += [
                rule(f"{ours}.convolution.factors.{j}", f"{convolution}.weight.factors.factor_{j}", change=as_pairs)
                for j in range(len(block.convolution.factors))
            ]
        table += _skip_rules(f"{ours}.skip", f"fno_blocks.fno_skips.{i}", model.config.skip)
        if block.mlp is not None:
            table += _mlp(f"{ours}.mlp", f"fno_blocks.channel_mlp.{i}", block.mlp)
            table += _skip_rules(f"{ours}.mlp_skip", f"fno_blocks.channel_mlp_skips.{i}", model.config.channel_mlp_skip)
        if model.config.norm == "group_norm":
            for j in range(2):
                for name in ("weight", "bias"):
                    table.append(rule(f"{ours}.norms.{j}.{name}", f"fno_blocks.norm.{2 * i + j}.{name}"))
    return table


def _modes_first(weight: np.ndarray) -> np.ndarray:
    """(in, out, *modes) complex -> (*modes, in, out, 2)."""
    return np.moveaxis(as_pairs(weight), (0, 1), (-3, -2))


def _mlp(ours: str, theirs: str, mlp) -> list[Rule]:
    layers = ["first"] if mlp.second is None else ["first", "second"]
    return [
        rule(f"{ours}.{layer}.{name}", f"{theirs}.fcs.{j}.{name}", change=pointwise if name == "weight" else vector)
        for j, layer in enumerate(layers)
        for name in ("weight", "bias")
    ]


def _skip_rules(ours: str, theirs: str, kind: str) -> list[Rule]:
    if kind == "linear":
        return [rule(f"{ours}.weight", f"{theirs}.conv.weight", change=pointwise)]
    return [rule(f"{ours}.weight", f"{theirs}.weight", change=vector)] if kind == "soft-gating" else []


def replay(model: FNO, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    (x,) = inputs_of(io, "in.x")
    fields, scalars = jnp.moveaxis(x, 1, -1), jnp.zeros((len(x), 0), jnp.float32)

    def run(shifted: FNO):
        lifted = shifted.lift(fields, scalars)
        hidden, spectral = shifted.pad(lifted), []
        for block in shifted.blocks:
            spectral.append(block.convolution(block.stabilize(block.enter(hidden))))
            hidden = block(hidden)
        last = shifted.crop(hidden, fields.shape[1:-1])
        return lifted, spectral[0], spectral[-1], last, jnp.moveaxis(shifted.project(last), -1, 1)

    recorded = run(model)
    names = ("mid.lifting", "mid.conv0", "mid.last_spectral", "mid.projection_in")
    available = {name: lambda i=i: jnp.moveaxis(recorded[i], 0, 1) for i, name in enumerate(names)}
    available["out.y"] = lambda: recorded[-1]
    available["out.y_ifftshift"] = lambda: run(with_shift(model, legacy=False))[-1]
    return pick(available, outputs_of(config, io))


def with_shift(model: FNO, *, legacy: bool) -> FNO:
    """The same weights with the behavior of release 2.0.0 on odd axes, or without it."""
    other = nnx.clone(model)
    for block in other.blocks:
        block.convolution.legacy_shift = legacy
    return other


FNO_FAMILY = Family(build, replay)
