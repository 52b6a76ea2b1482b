"""Factorized FNO as ported into divelab/AIRS (OpenPDE/SineNet, module ffno) -> `physml.models.ffno`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from physml.convert.apply import Rule, fill, rule, same
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
from physml.models.ffno import FFNO, FFNOConfig

MIXING = {"full": "full", "low-pass": "low-pass", "no-fourier": "none"}
# Arguments that the source accepts and never uses.
UNUSED = ("activation", "num_freq_bands", "freq_base", "max_accumulations")


def config_of(config: Mapping[str, Any]) -> tuple[FFNOConfig, Signature]:
    """The config and signature of the model that a recorded upstream config describes.

    The grid is that of "input_shape" where given, else the smallest that carries the modes: weights fit any.
    """
    kwargs = arguments(config)
    shape = config.get("input_shape")
    if "kwargs" not in config:
        for name in ("input_shape", "upstream", "arch"):
            kwargs.pop(name, None)
    history, future = take(kwargs, "time_history"), take(kwargs, "time_future")
    channels, outputs = (
        take(kwargs, f"n_{way}_scalar_components") + 2 * take(kwargs, f"n_{way}_vector_components")
        for way in ("input", "output")
    )
    outputs *= future
    if take(kwargs, "use_fourier_position", False):
        raise ConversionError("use_fourier_position=True is not supported: the source itself fails with it.")
    low, high = take(kwargs, "low", 0), take(kwargs, "high", 1)
    if not high > low:
        raise ConversionError(f"low={low} and high={high}: positions must increase along an axis, low below high.")
    normalize = take(kwargs, "should_normalize", True)
    if normalize and outputs != channels and channels != 1:
        raise ConversionError(
            f"should_normalize=True restores {outputs} outputs with the statistics of {channels} input channels: the "
            "source itself fails with it."
        )
    for name in UNUSED:
        kwargs.pop(name, None)
    mixing = take(kwargs, "mode", "full")
    if mixing not in MIXING:
        raise ConversionError(f"mode={mixing!r} is not supported: only {sorted(MIXING)} are.")
    modes = take(kwargs, "modes")
    built = FFNOConfig(
        width=take(kwargs, "width"),
        modes=(modes,),
        depth=take(kwargs, "n_layers", 4),
        expansion=take(kwargs, "factor", 2),
        feedforward_layers=take(kwargs, "n_ff_layers", 2),
        mixing=MIXING[mixing],
        share_fourier=take(kwargs, "share_weight", False),
        share_feedforward=take(kwargs, "share_fork", False),
        gain=float(take(kwargs, "gain", 1)),
        weight_norm=take(kwargs, "ff_weight_norm", False),
        layer_norm=take(kwargs, "layer_norm", False),
        positions=take(kwargs, "use_position", True),
        noise=float(take(kwargs, "noise_std", 0.0)),
        dropout=float(take(kwargs, "dropout", 0.0)),
        input_dropout=float(take(kwargs, "in_dropout", 0.0)),
        normalize=normalize,
    )
    refuse(kwargs, {})
    grid = unit_grid((2 * modes, 2 * modes) if shape is None else shape[-2:])
    return built, Signature(grid, history * channels, 0, outputs)


def build(config: Mapping[str, Any], tensors: Tensors) -> FFNO:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    tensors = {name: value for name, value in tensors.items() if name != "_float"}
    statistics = {name: value for name, value in tensors.items() if name.startswith("normalizer.")}
    table = rules(model, tensors)
    if model.config.normalize:
        center, scale = _statistics(statistics)
        tensors = {**tensors, "normalizer.center": center, "normalizer.scale": scale}
        for name, size in (("entering", model.signature.inputs), ("leaving", model.signature.outputs)):
            for part in ("center", "scale"):
                table.append(rule(f"{name}.{part}", f"normalizer.{part}", change=_repeated(size)))
    ignored = [name for name in tensors if name.startswith("normalizer.") and name in statistics]
    if model.config.mixing != "full":  # the source keeps Fourier weights that it never uses
        ignored += [name for name in tensors if ".fourier_weight." in name]
    fill(model, tensors, table, ignored=ignored)
    return model


def _statistics(found: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every channel from the accumulated sums."""
    missing = [name for name in ("count", "sum", "sum_squared", "std_epsilon") if f"normalizer.{name}" not in found]
    if missing:
        raise ConversionError(f"The weights lack the statistics {missing} of normalizer, but should_normalize=True.")
    count, total, squares, least = (
        np.asarray(found[f"normalizer.{name}"], np.float64) for name in ("count", "sum", "sum_squared", "std_epsilon")
    )
    count = max(float(count), 1.0)
    mean = total / count
    return mean, np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), least)


def _repeated(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Statistics of one frame for `size` channels of several frames."""
    return lambda values: np.tile(values, size // len(values))


def rules(model: FFNO, tensors: Tensors) -> list[Rule]:
    """Which upstream tensors make which parameter.

    Shared weights are listed once for every layer as well: whichever of these names `tensors` has must hold one array.
    """
    config, depth = model.config, model.config.depth
    norm = config.weight_norm
    table = _linear("lifting", ["conv.in_proj"], norm, same_array)
    table += _linear("projection", ["conv.out.0"], norm, same_array) + _linear(
        "readout", ["conv.out.1"], norm, same_array
    )
    each = [f"conv.spectral_layers.{i}" for i in range(depth)]
    ndim = model.signature.grid.ndim
    if config.mixing == "full":
        ours, theirs, change = _place("fourier", config.share_fourier, "conv", each)
        for axis in range(ndim):
            # The source counts axes from the last.
            names = [f"{place}.fourier_weight.{ndim - 1 - axis}" for place in theirs]
            names = _present(names, tensors) if config.share_fourier else names
            table.append(rule(f"{ours}.axes.{axis}.weight", *names, change=_after(change, _modes_first)))
    ours, theirs, change = _place("feedforward", config.share_feedforward, "conv", each)
    theirs = [f"{place}.backcast_ff" for place in theirs]
    if config.share_feedforward:
        theirs = [name for name in theirs if any(key.startswith(f"{name}.") for key in tensors)] or theirs[:1]
    for j in range(config.feedforward_layers):
        table += _linear(f"{ours}.maps.{j}", [f"{name}.layers.{j}.0" for name in theirs], norm, change)
    if config.layer_norm:
        last = [f"{name}.layers.{config.feedforward_layers - 1}.3" for name in theirs]
        table.append(rule(f"{ours}.norm.scale", *(f"{name}.weight" for name in last), change=change))
        table.append(rule(f"{ours}.norm.shift", *(f"{name}.bias" for name in last), change=change))
    return table


def _place(part: str, shared: bool, root: str, each: list[str]) -> tuple[str, list[str], Callable[..., np.ndarray]]:
    """Where a part of the layers is here and there, and what makes one array of the sources."""
    return (
        (part, [root, *each], same_array) if shared else (f"layers.blocks.{part}", each, lambda *all_: np.stack(all_))
    )


def _present(names: Sequence[str], tensors: Tensors) -> list[str]:
    return [name for name in names if name in tensors] or list(names[:1])


def same_array(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """One array that is stored under several names. Raises ValueError where the copies differ."""
    if any(not np.array_equal(first, other) for other in others):
        raise ValueError("weights that all layers share differ from layer to layer")
    return first


def _after(change: Callable[..., np.ndarray], then: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *arrays: then(change(*arrays))


def _linear(ours: str, theirs: Sequence[str], weight_norm: bool, change: Callable[..., np.ndarray]) -> list[Rule]:
    def one(target, name, then=same):
        return rule(f"{ours}.{target}", *(f"{place}.{name}" for place in theirs), change=_after(change, then))

    if not weight_norm:
        return [one("weight", "weight"), one("bias", "bias")]
    return [one("direction", "weight_v"), one("length", "weight_g", lambda g: g[..., 0]), one("bias", "bias")]


def _modes_first(weight: np.ndarray) -> np.ndarray:
    """(..., in, out, modes, 2) -> (..., modes, in, out, 2)."""
    return np.moveaxis(weight, -2, -4)


def replay(model: FFNO, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    (x,) = inputs_of(io, "in.x")
    fields = jnp.moveaxis(x.reshape(len(x), -1, *x.shape[-2:]), 1, -1)
    lifted, added = model.lift(fields, jnp.zeros((len(x), 0))), {}
    model.run(lifted, visit=lambda i, state: added.update({i: state[1]}))
    values = {f"mid.layer{i}.b": jnp.moveaxis(state, 0, -1) for i, state in added.items()}
    values["mid.in_proj"] = jnp.moveaxis(lifted, 0, -1)
    values["out.y"] = jnp.moveaxis(model(fields, jnp.zeros((len(x), 0))), -1, 1)[:, None]
    return pick({name: lambda value=value: value for name, value in values.items()}, outputs_of(config, io))


FFNO_FAMILY = Family(build, replay)
