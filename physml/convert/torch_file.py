"""Tensors out of `.safetensors`, `.pt`, `.pth` and `.ckpt` files, as numpy arrays, without PyTorch; nothing is run.

A PyTorch file is a pickle, and a pickle is a program. The unpickler here knows tensors and plain containers; whatever
else the pickle asks for becomes an inert `Opaque` if it names a deep-learning library (constructor arguments in a
`_metadata` entry, say), and a ConversionError if it names anything else. Neither is ever imported or called.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from physml.errors import ConversionError

SAFETENSORS_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
TORCH_TYPES = {
    "float64": np.float64, "double": np.float64, "float32": np.float32, "float": np.float32, "float16": np.float16,
    "half": np.float16, "bfloat16": ml_dtypes.bfloat16, "complex64": np.complex64, "cfloat": np.complex64,
    "complex128": np.complex128, "cdouble": np.complex128, "int64": np.int64, "long": np.int64, "int32": np.int32,
    "int": np.int32, "int16": np.int16, "short": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
STORAGE_TYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "ComplexFloatStorage": np.complex64, "ComplexDoubleStorage": np.complex128,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_, "UntypedStorage": np.uint8,
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
NESTED = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights")
WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and by torch.compile
# May be named by a pickle, never built. Training frameworks keep settings beside the weights.
HARMLESS = (
    "torch", "neuralop", "tltorch", "tensorly", "tensorly_torch", "numpy", "lightning", "lightning_fabric", "omegaconf",
    "pdearena", "pytorch_lightning", "torchmetrics",
)  # fmt: skip
PLAIN = {  # of the standard library, likewise
    *(("builtins", name) for name in ("bool", "dict", "float", "int", "list", "long", "str", "tuple", "unicode")),
    ("argparse", "Namespace"), ("collections", "Counter"), ("collections", "defaultdict"), ("functools", "partial"),
    ("pathlib", "Path"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("typing", "Any"),
}  # fmt: skip


def read_tensors(path: str | Path, prefer: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The state dict in a weights file, name -> array (read-only, in the dtype of the file).

    The format is told by the content, not by the suffix. A state dict nested in a checkpoint (`{"state_dict": ...}`) is
    found, but one under a name of `prefer` (averaged weights, say) comes first; `module.` before all names is removed,
    an entry `_metadata` is dropped. Raises ConversionError for a file that is missing, damaged, or holds anything but
    tensors.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"Cannot read the weights {path}: {error.strerror or error}.") from error
    if zipfile.is_zipfile(io.BytesIO(data)):
        tree = _read_zip(path, data)
    elif _looks_like_safetensors(data):
        return _unwrap(_read_safetensors(path, data))
    else:
        tree = _read_legacy(path, data)
    return state_dict(tree, path, prefer)


def state_dict(tree: Any, path: str | Path = "the checkpoint", prefer: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The one mapping of names to tensors in what a checkpoint file holds, or the first of `prefer` that holds any.

    Raises ConversionError when there is none.
    """
    if not isinstance(tree, Mapping):
        raise ConversionError(
            f"{path} holds a {type(tree).__name__}, but a state dict (names -> tensors) was expected."
        )
    for name in prefer:
        if isinstance(tree.get(name), Mapping) and _holds_tensors(tree[name]):
            return state_dict(tree[name], path)
    if not any(isinstance(value, np.ndarray) for value in tree.values()):
        found = [key for key in NESTED if isinstance(tree.get(key), Mapping)]
        found = found or [key for key, value in tree.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        if not found:
            raise ConversionError(f"{path} holds no tensors: its entries are {list(tree)[:10]}.")
        return state_dict(tree[found[0]], path)
    tensors = {str(key): value for key, value in tree.items() if key != "_metadata"}
    strange = {key: value for key, value in tensors.items() if not isinstance(value, np.ndarray)}
    if strange:
        rows = [f"{key}: {value!r}"[:100] for key, value in strange.items()][:10]
        raise ConversionError(f"{path} holds {len(strange)} entries that are no tensors: " + "; ".join(rows) + ".")
    return _unwrap(tensors)


def _holds_tensors(tree: Mapping) -> bool:
    return any(isinstance(value, np.ndarray) for value in tree.values())


def _unwrap(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return _unwrap({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors


def _damaged(path, what: str) -> ConversionError:
    return ConversionError(f"The weights {path} are damaged: {what}. Download or copy the file again.")


# ---- safetensors ----


def _looks_like_safetensors(data: bytes) -> bool:
    return len(data) > 8 and data[8:9] == b"{"


def _read_safetensors(path: Path, data: bytes) -> dict[str, np.ndarray]:
    (length,) = struct.unpack("<Q", data[:8])
    if 8 + length > len(data):
        raise _damaged(path, f"its header of {length} bytes does not fit into {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _safetensor(path, name, entry, data, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConversionError):
            raise
        raise _damaged(path, f"its header cannot be read ({error})") from error


def _safetensor(path: Path, name: str, entry: dict, data: bytes, base: int) -> np.ndarray:
    if entry["dtype"] not in SAFETENSORS_TYPES:
        raise ConversionError(f"{path}: tensor {name!r} has the unknown dtype {entry['dtype']!r}.")
    dtype, shape = np.dtype(SAFETENSORS_TYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
    start, stop = (base + int(offset) for offset in entry["data_offsets"])
    count = math.prod(shape)
    if not base <= start <= stop <= len(data) or stop - start != count * dtype.itemsize or min(shape, default=0) < 0:
        raise _damaged(path, f"tensor {name!r} of shape {shape} lies outside the file, which may be cut off")
    return np.frombuffer(data, dtype, count, start).reshape(shape)


# ---- PyTorch: the pickle ----


@dataclass
class Storage:
    """A block of numbers, filled once its bytes are found."""

    dtype: np.dtype
    count: int
    data: np.ndarray | None = None


@dataclass
class Lazy:
    """A view into a storage, made an array by `_resolve`."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype


class Opaque:
    """Stands for an object that is neither a tensor nor a plain container: swallows what the pickle does to it."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


def _tensor(storage, offset, size, stride, *_) -> Lazy:
    if not isinstance(storage, Storage):
        raise ConversionError("A tensor has no storage: sparse, quantized and meta tensors are not supported.")
    return Lazy(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)), storage.dtype)


def _tensor_of_type(storage, offset, size, stride, requires_grad=False, hooks=None, dtype=None, *_) -> Lazy:
    lazy = _tensor(storage, offset, size, stride)
    return Lazy(storage, lazy.offset, lazy.size, lazy.stride, dtype if isinstance(dtype, np.dtype) else storage.dtype)


def _subclass(build, kind, arguments, state=None) -> Lazy:
    if build not in (_tensor, _tensor_of_type):
        raise ConversionError(
            "A tensor subclass is not rebuilt from a tensor: convert it to a plain tensor and save again."
        )
    return build(*arguments)


BUILDERS = {
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "device"): lambda *names: "device",
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers only."""

    def __init__(self, stream, path, storages: dict[str, Storage]):
        super().__init__(stream, encoding="utf-8")
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in BUILDERS:
            return BUILDERS[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_TYPES:
            return np.dtype(STORAGE_TYPES[name])
        if module == "torch" and name in TORCH_TYPES:
            return np.dtype(TORCH_TYPES[name])
        if module.split(".")[0] in HARMLESS or (module.replace("__builtin__", "builtins"), name) in PLAIN:
            return type(name, (Opaque,), {})
        raise ConversionError(
            f"{self.path} asks for {module}.{name}, which no weights need: the file may be hostile. Nothing of it was "
            "run. Save only the state dict (torch.save(model.state_dict(), path)) or use a .safetensors file."
        )

    def persistent_load(self, identity: Any) -> Storage:
        kind, dtype, key, _, count, *_ = identity
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ConversionError(f"{self.path} refers to {identity!r}"[:200] + ", which is no tensor storage.")
        return self.storages.setdefault(str(key), Storage(dtype, int(count)))


def _unpickle(stream, path, storages: dict[str, Storage]) -> Any:
    try:
        return _Unpickler(stream, path, storages).load()
    except ConversionError:
        raise
    # A damaged pickle can fail in any way at all: whatever it is, the file is unusable.
    except Exception as error:
        raise _damaged(path, f"its pickle cannot be read ({type(error).__name__}: {error})") from error


def _resolve(tree: Any, path) -> Any:
    """Lazy tensors become arrays, at every depth of dicts, lists and tuples."""
    if isinstance(tree, Lazy):
        return _view(tree, path)
    if isinstance(tree, Mapping):
        return {key: _resolve(value, path) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_resolve(value, path) for value in tree]
    return tree


def _view(lazy: Lazy, path) -> np.ndarray:
    data = lazy.storage.data
    if data is None:
        raise _damaged(path, "a tensor's numbers are missing")
    data = data.view(np.uint8)[: len(data.view(np.uint8)) // lazy.dtype.itemsize * lazy.dtype.itemsize].view(lazy.dtype)
    last = lazy.offset + sum((n - 1) * step for n, step in zip(lazy.size, lazy.stride, strict=True))
    if min((lazy.offset, *lazy.size, *lazy.stride)) < 0 or (math.prod(lazy.size) and last >= len(data)):
        raise _damaged(path, f"a tensor of shape {lazy.size} reaches beyond its storage of {len(data)} numbers")
    if not math.prod(lazy.size):
        return np.zeros(lazy.size, lazy.dtype)
    strides = tuple(step * data.itemsize for step in lazy.stride)
    return np.lib.stride_tricks.as_strided(data[lazy.offset :], lazy.size, strides, writeable=False)


# ---- PyTorch: the two containers ----


def _read_zip(path: Path, data: bytes) -> Any:
    """PyTorch 1.6 and later: a zip archive of `data.pkl` and one file per storage, not compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(names) != 1:
                raise ConversionError(
                    f"{path} is a zip archive, but not one that torch.save wrote: it has no data.pkl."
                )
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ConversionError(f"{path} is compressed, which torch.save never does. Unpack it first.")
            base = names[0].removesuffix("data.pkl")
            order = (
                ">" if f"{base}byteorder" in archive.namelist() and archive.read(f"{base}byteorder") == b"big" else "<"
            )
            storages: dict[str, Storage] = {}
            tree = _unpickle(io.BytesIO(archive.read(names[0])), path, storages)
            for key, storage in storages.items():
                _fill(storage, archive.read(f"{base}data/{key}"), order, path)
    except ConversionError:
        raise
    except Exception as error:  # zipfile lets decoding errors of many kinds through
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return _resolve(tree, path)


def _read_legacy(path: Path, data: bytes) -> Any:
    """Before PyTorch 1.6: pickles one after another, then the raw storages."""
    stream, storages = io.BytesIO(data), {}
    if not data or _unpickle(stream, path, {}) != LEGACY_MAGIC:
        raise ConversionError(
            f"{path} is neither a .safetensors file nor one that torch.save wrote. Export the weights again, best as "
            ".safetensors."
        )
    _unpickle(stream, path, {})  # protocol version
    system = _unpickle(stream, path, {})
    tree = _unpickle(stream, path, storages)
    order = "<" if not isinstance(system, Mapping) or system.get("little_endian", True) else ">"
    for key in _unpickle(stream, path, {}):
        head = stream.read(8)
        storage = storages.get(str(key))
        if len(head) < 8 or storage is None:
            raise _damaged(path, "it ends before all storages are read")
        (count,) = struct.unpack(f"{order}q", head)
        _fill(storage, stream.read(max(count, 0) * storage.dtype.itemsize), order, path)
    return _resolve(tree, path)


def _fill(storage: Storage, raw: bytes, order: str, path) -> None:
    if len(raw) < storage.count * storage.dtype.itemsize:
        raise _damaged(path, f"a storage has {len(raw)} bytes instead of {storage.count * storage.dtype.itemsize}")
    array = np.frombuffer(raw, storage.dtype, storage.count)
    if order == ">" and storage.dtype.itemsize > 1:
        width = storage.dtype.itemsize // (2 if storage.dtype.kind == "c" else 1)
        array = np.frombuffer(raw, f">u{width}").astype(f"<u{width}").view(storage.dtype)[: storage.count]
    storage.data = array
