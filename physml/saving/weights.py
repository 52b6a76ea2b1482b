"""The numbers of a module as safetensors bytes, and back into a module of the same structure, bit for bit."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from physml.errors import CheckpointError
from physml.fields import is_key
from physml.normalize import Statistic

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32,
    "F64": np.float64,
}  # fmt: skip
_NAMES = {np.dtype(value): name for name, value in _DTYPES.items()}
_KEY = "prng_key:"  # marks typed PRNG keys, stored as their uint32 data


def _leaves(state) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _value(leaf):
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def serialize(module) -> bytes:
    """safetensors bytes of every variable of a module."""
    return to_bytes({name: _value(leaf) for name, leaf in _leaves(nnx.state(module)).items()})


def to_bytes(arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """safetensors bytes of named arrays; typed PRNG keys are marked in the header. `read_weights` inverts it.

    Raises CheckpointError for a dtype that cannot be kept.
    """
    tensors, marks = {}, dict(metadata or {})
    for name, value in arrays.items():
        if is_key(value):
            marks[name] = _KEY + str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        array = np.ascontiguousarray(jax.device_get(value)).reshape(np.shape(value))
        if array.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {array.dtype}, which cannot be saved. Store it as real numbers.")
        tensors[name] = array
    return _bytes(tensors, marks)


def _bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The safetensors layout: header length, JSON header, data; sorted, so that equal models give equal files."""
    header: dict[str, Any] = {"__metadata__": {"format": "physml", **metadata}}
    start = 0
    for name in sorted(tensors):
        array = tensors[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].tobytes() for name in sorted(tensors))])


def read_weights(path: Path, checksum: str | None) -> dict[str, np.ndarray]:
    """Arrays by name. Raises CheckpointError when the file is missing, truncated, damaged or exchanged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}: {error}. Copy the whole folder.") from error
    try:
        tensors = safetensors.deserialize(content)
        length = int.from_bytes(content[:8], "little")
        marks = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}. Copy or save it again.") from error
    if checksum and hashlib.sha256(content).hexdigest() != checksum:
        raise CheckpointError(
            f"{path} does not have the checksum in config.json: it is damaged, or was exchanged. Copy or save it again."
        )
    arrays = {}
    for name, item in tensors:
        if item["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has the unknown dtype {item['dtype']}.")
        array = np.frombuffer(bytes(item["data"]), _DTYPES[item["dtype"]]).reshape(item["shape"])
        if marks.get(name, "").startswith(_KEY):
            array = jax.random.wrap_key_data(array, impl=marks[name].removeprefix(_KEY))
        arrays[name] = array
    return arrays


def fill(build, arrays: dict[str, np.ndarray], source: str, moved: bool):
    """Builds the module without computing initial numbers, checks every array against it, and puts them in."""
    graph, state = _abstract(build)
    leaves = _leaves(state)
    if moved:  # buffers that depend on the grid keep the numbers they were built with
        graph, state = nnx.split(build())
        leaves = _leaves(state)
        kept = {name for name, leaf in leaves.items() if _follows_grid(leaf, arrays.get(name))}
        arrays = {name: _value(leaves[name]) if name in kept else value for name, value in arrays.items()}
    _compare(leaves, arrays, source)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        value = arrays[".".join(map(str, path))]
        value = value if isinstance(value, np.ndarray) and not isinstance(leaf, nnx.Variable) else jnp.asarray(value)
        filled.append((path, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _follows_grid(leaf, saved) -> bool:
    """Whether a buffer, not a parameter or statistic, belongs to the grid that the module was built on."""
    if not isinstance(leaf, nnx.Variable):
        return True
    return not isinstance(leaf, nnx.Param | Statistic) and np.shape(_value(leaf)) != np.shape(saved)


def _abstract(build):
    """Structure and shapes of what `build` builds."""
    graphs = []

    def trace():
        graph, state = nnx.split(build())
        graphs.append(graph)
        return state

    state = jax.eval_shape(trace)
    if all(isinstance(leaf, nnx.Variable) for leaf in _leaves(state).values()):
        with contextlib.suppress(TypeError):  # a plain array among the attributes: a tracer here
            hash(graphs[0])
            return graphs[0], state
    return nnx.split(build())


def _compare(leaves: dict[str, Any], arrays: dict[str, np.ndarray], source: str) -> None:
    rows = [(name, "missing", _shape(_value(leaves[name])), "-") for name in sorted(leaves.keys() - arrays.keys())]
    rows += [(name, "unexpected", "-", _shape(arrays[name])) for name in sorted(arrays.keys() - leaves.keys())]
    for name in sorted(leaves.keys() & arrays.keys()):
        want, have = _value(leaves[name]), arrays[name]
        if tuple(want.shape) != tuple(have.shape):
            rows.append((name, "shape", _shape(want), _shape(have)))
        elif want.dtype != have.dtype:
            rows.append((name, "dtype", _shape(want), _shape(have)))
    if rows:
        table = [("array", "problem", "expected", "found"), *rows[:10]]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        text = "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in table)
        more = f"\n  ... and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise CheckpointError(
            f"{source} does not fit the model that its config describes ({len(rows)} differences):\n{text}{more}\n"
            "Load it with the config it was saved with, or save the model again."
        )


def _shape(value) -> str:
    return f"{value.dtype} {tuple(value.shape)}"
