"""What a source of foreign models offers, and the options that its converters share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from physml.errors import ConfigError, ConversionError
from physml.fields import Axis, Grid, Signature

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """One source of foreign models.

    Attributes:
        build: `(config, tensors) -> model` with these weights. `config` has the constructor's arguments under "kwargs",
            or is these arguments. Raises ConversionError when anything is left over or missing.
        replay: `(model, config, io) -> outputs`: feeds recorded inputs (names and layout of the source) to the model
            and returns the tensors that were recorded from the source, under the same names.
        inputs: names of recorded inputs, besides those that start with "in.".
        adopt: `(config, signature, tensors) -> model` for a config of ours and weights that come without theirs; the
            numbers of inputs and outputs are those of the weights. None where weights always come with a config.
        prefer: entries of a checkpoint file whose tensors are taken rather than its state dict: averaged weights.
    """

    build: Callable[[dict[str, Any], Tensors], nnx.Module]
    replay: Callable[[nnx.Module, dict[str, Any], Tensors], dict[str, np.ndarray]]
    inputs: tuple[str, ...] = ()
    adopt: Callable[[Any, Signature, Tensors], nnx.Module] | None = None
    prefer: tuple[str, ...] = ()


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the source model, without `_metadata` remarks."""
    kwargs = config.get("kwargs", config)
    if not isinstance(kwargs, Mapping):
        raise ConversionError(f"The config's kwargs are {kwargs!r}, but constructor arguments by name were expected.")
    return dict(kwargs)


def construct(describe: Callable[[Mapping[str, Any]], tuple[Any, Signature]], config: Mapping[str, Any]) -> nnx.Module:
    """The untrained model of a source's config. Raises ConversionError where that config cannot work."""
    try:
        built, signature = describe(config)
        return built.build(signature, nnx.Rngs(0))
    except (ConfigError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"The config describes no model that can be built: {error}") from error


def take(kwargs: dict[str, Any], name: str, default: Any = ...) -> Any:
    """Removes an argument. Raises ConversionError when a required one is absent."""
    if name not in kwargs and default is ...:
        raise ConversionError(f"The config lacks {name!r}; it has {sorted(kwargs)}.")
    return kwargs.pop(name, default)


def refuse(kwargs: dict[str, Any], neutral: Mapping[str, Sequence[Any]]) -> None:
    """Removes arguments that have no counterpart here, where their value changes nothing.

    Raises ConversionError for any other value, and for arguments that are unknown altogether.
    """
    for name, values in neutral.items():
        value = kwargs.pop(name, values[0])
        if value not in values:
            raise ConversionError(f"{name}={value!r} is not supported; only {list(values)} can be converted.")
    if kwargs:
        raise ConversionError(f"The config has arguments that the converter does not know: {sorted(kwargs)}.")


def unit_grid(shape: Sequence[int]) -> Grid:
    """A periodic unit box of that many points."""
    return Grid(tuple(Axis.uniform(name, int(n), periodic=True) for name, n in zip("xyz", shape)))


def outputs_of(config: Mapping[str, Any], io: Tensors) -> list[str]:
    """Names of the recorded outputs: those in `io`, else those that the config lists."""
    names = [name for name in io if not name.startswith("in.")]
    return names or [name for name in config.get("tensors", {}).get("io", {}) if not name.startswith("in.")]


def pick(available: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The recorded outputs as float32 numpy. Raises ConversionError for names that the converter does not compute."""
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ConversionError(f"Cannot recompute {unknown[:10]}; this family has {sorted(available)}.")
    chosen = names or list(available)
    return {name: np.asarray(available[name](), np.float32) for name in chosen}


def inputs_of(io: Tensors, *names: str) -> list[np.ndarray]:
    """Recorded inputs by name. Raises ConversionError when one is absent."""
    missing = [name for name in names if name not in io]
    if missing:
        raise ConversionError(f"The recorded inputs lack {missing}; there are {sorted(io)}.")
    return [np.asarray(io[name], np.float32) for name in names]
