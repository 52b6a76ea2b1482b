"""What the converters of pdearena and of its descendants share: layouts of tensors, names and checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from physml.convert.families import Tensors, arguments, inputs_of, outputs_of, pick, take
from physml.errors import ConversionError
from physml.fields import Signature

PADDING = {"zeros": "zero", "circular": "periodic", "replicate": "replicate", "reflect": "reflect"}


def channels(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Removes the arguments that say which fields go in and out; the number of channels of each, history included.

    A vector counts two components also in one and three dimensions, as the source has it.
    """
    both = {kind: take(kwargs, f"n_{kind}_components", None) for kind in ("scalar", "vector")}
    count = {
        (way, kind): take(kwargs, f"n_{way}_{kind}_components", both[kind])
        for way in ("input", "output")
        for kind in ("scalar", "vector")
    }
    missing = [f"n_{way}_{kind}_components" for (way, kind), number in count.items() if number is None]
    if missing:
        raise ConversionError(f"The config lacks {missing}; it has {sorted(kwargs)}.")
    history, future = take(kwargs, "time_history"), take(kwargs, "time_future")
    inputs, outputs = (count[way, "scalar"] + 2 * count[way, "vector"] for way in ("input", "output"))
    return history * inputs, future * outputs


def flat(frames: np.ndarray) -> jnp.ndarray:
    """(batch, time, channel, *space) -> (batch, *space, time * channel), times slowest."""
    return jnp.moveaxis(jnp.reshape(frames, (frames.shape[0], -1, *frames.shape[3:])), 1, -1)


def unflat(fields, channel: int):
    """(batch, *space, time * channel) -> (batch, time, channel, *space)."""
    fields = jnp.moveaxis(jnp.asarray(fields), -1, 1)
    return fields.reshape(fields.shape[0], -1, channel, *fields.shape[2:])


def frames(io: Tensors, scalars: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Recorded inputs as (fields, scalars): frames of "in.x"; "in.time" and, for more scalars, "in.z"."""
    (x,) = inputs_of(io, "in.x")
    names = ("in.time", "in.z")[: min(scalars, 2)]
    columns = [value.reshape(len(x), -1) for value in inputs_of(io, *names)]
    return flat(x), jnp.asarray(np.concatenate([np.zeros((len(x), 0), np.float32), *columns], axis=1))


def replay_recorded(model, record, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """What was recorded, from `record(model, fields, scalars)`: hidden fields by name, and the result as "out.y"."""
    recorded = record(model, *frames(io, model.signature.scalars))
    available = {name: lambda value=value: jnp.moveaxis(value, -1, 1) for name, value in recorded.items()}
    available["out.y"] = lambda: unframed(recorded["out.y"], config)
    return pick(available, outputs_of(config, io))


def unframed(fields, config: Mapping[str, Any]):
    """The network's result as the source returns it."""
    kwargs = arguments(config)
    return unflat(fields, channels(kwargs)[1] // int(arguments(config)["time_future"]))


def signature_of(signature: Signature, tensors: Tensors) -> Signature:
    """`signature` with as many inputs and outputs as the first and last convolution of a network have."""
    tensors = network_tensors(tensors)
    ends = [tensors.get(f"{name}.weight") for name in ("image_proj", "final")]
    if any(np.ndim(end) < 3 for end in ends):
        raise ConversionError("The weights have no convolutions 'image_proj' and 'final': they are of another network.")
    return dataclasses.replace(signature, inputs=ends[0].shape[1], outputs=ends[1].shape[0])


def network_tensors(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors of the network alone.

    Lightning puts "model." before their names and keeps the normalizer's buffers beside them.
    """
    network = {name: value for name, value in tensors.items() if not name.startswith(("normalizer.", "ema."))}
    if network and all(name.startswith("model.") for name in network):
        network = {name.removeprefix("model."): value for name, value in network.items()}
    return network
