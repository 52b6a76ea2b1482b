"""Weights files: every dtype and layout that torch writes is read exactly, and nothing in a file is ever run.

The files were written by torch 2.13 with `files/make.py`.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from physml.convert.torch_file import read_tensors
from physml.errors import ConversionError

FILES = Path(__file__).parent / "files"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize("name", ["kinds.pt", "kinds_legacy.pt"])
def test_every_kind_of_tensor_is_read_exactly(name):
    tensors = read_tensors(FILES / name)
    for dtype in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8"):
        assert tensors[dtype].dtype.name == dtype
        np.testing.assert_array_equal(tensors[dtype].astype(np.float32), BASE)
    np.testing.assert_array_equal(tensors["complex64"], BASE - 1j * BASE)
    np.testing.assert_array_equal(tensors["bool"], BASE > 3)
    np.testing.assert_array_equal(tensors["transposed"], BASE.T)
    np.testing.assert_array_equal(tensors["strided"], BASE[1::2, 1::3])
    np.testing.assert_array_equal(tensors["expanded"], np.zeros((3, 2)))
    np.testing.assert_array_equal(tensors["shared"], BASE[2])
    np.testing.assert_array_equal(tensors["parameter"], BASE[:, 0])
    assert tensors["scalar"] == 2.5
    assert tensors["empty"].shape == (0, 3)


def test_nested_state_dicts_and_wrappers_are_opened():
    tensors = read_tensors(FILES / "nested.ckpt")
    assert sorted(tensors) == ["bias", "weight"]
    np.testing.assert_array_equal(tensors["weight"], np.arange(6.0).reshape(3, 2))


def test_metadata_with_python_objects_is_dropped():
    assert sorted(read_tensors(FILES / "metadata.pt")) == ["bias", "weight"]


def test_a_pickled_module_is_refused():
    with pytest.raises(ConversionError, match="state dict"):
        read_tensors(FILES / "module.pt")


class Payload:
    """Unpickled by a plain unpickler, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("container", ["zip", "bare"])
def test_hostile_pickles_are_refused_and_not_run(tmp_path, protocol, container):
    mark = tmp_path / "executed"
    content = pickle.dumps({"weight": Payload(mark)}, protocol=protocol)
    if container == "zip":
        path = archive(tmp_path / "hostile.pt", content)
    else:
        path = tmp_path / "hostile.pt"
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"system.*Nothing of it was run"):
        read_tensors(path)
    assert not mark.exists()
    pickle.loads(content)  # the payload is real
    assert mark.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"csubprocess\nPopen\n(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.",
        b"(S'true'\nios\nsystem\n.",  # the INST opcode
        b"cphysml.convert.torch_file\nread_tensors\n(S'x'\ntR.",
    ],
)
def test_no_callable_gets_through(tmp_path, code):
    with pytest.raises(ConversionError):
        read_tensors(archive(tmp_path / "x.pt", code))


@pytest.mark.parametrize("name", ["kinds.pt", "kinds_legacy.pt"])
def test_truncated_files_are_refused(tmp_path, name):
    content = (FILES / name).read_bytes()
    for length in (0, 3, 30, len(content) // 3, len(content) // 2, len(content) - 50):
        path = tmp_path / name
        path.write_bytes(content[:length])
        with pytest.raises(ConversionError, match=str(path)):
            read_tensors(path)


@pytest.mark.parametrize("name", ["kinds.pt", "kinds_legacy.pt"])
def test_flipped_bytes_never_raise_anything_else(tmp_path, name):
    content, random = bytearray((FILES / name).read_bytes()), np.random.default_rng(0)
    refusals = []
    for _ in range(150):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 3):
            damaged[position] = random.integers(256)
        path = tmp_path / name
        path.write_bytes(damaged)
        try:
            read_tensors(path)  # a flip in the numbers themselves cannot be noticed
        except ConversionError as error:
            refusals.append(str(error))
    assert len(refusals) > 15  # much of a small file is structure
    assert all(str(path) in text for text in refusals)


def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path):
    class Reach:
        def __reduce__(self):
            return rebuild, (Stored(), 2, (3, 10**9), (1, 7), False, {})

    class Stored:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            return ("storage", FloatStorage, "0", "cpu", 4) if isinstance(thing, Stored) else None

        def save_global(self, thing, name=None):
            names = {rebuild: "ctorch._utils\n_rebuild_tensor_v2\n", FloatStorage: "ctorch\nFloatStorage\n"}
            self.write(names[thing].encode())

    def rebuild():
        pass

    def FloatStorage():
        pass

    Pickler.dispatch = {**pickle._Pickler.dispatch, type(rebuild): Pickler.save_global}
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"weight": Reach()})
    path = archive(tmp_path / "reach.pt", stream.getvalue())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(16))
    with pytest.raises(ConversionError, match="reaches beyond its storage of 4 numbers"):
        read_tensors(path)


def safetensors(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_with_bfloat16(tmp_path):
    header = {"__metadata__": {"x": "y"}, "module.a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    tensors = read_tensors(safetensors(tmp_path / "a.safetensors", header, b"\x80\x3f\x00\x40"))
    np.testing.assert_array_equal(tensors["a"].astype(np.float32), [1.0, 2.0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}, "outside the file"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "outside the file"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "outside the file"),
        ({"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype 'F33'"),
        ({"shape": [2]}, "header cannot be read"),
        (7, "header cannot be read"),
    ],
)
def test_bad_safetensors_headers_are_refused(tmp_path, entry, message):
    with pytest.raises(ConversionError, match=message):
        read_tensors(safetensors(tmp_path / "a.safetensors", {"a": entry}, bytes(8)))


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="No such file"):
        read_tensors(tmp_path / "absent.pt")
    path = tmp_path / "text.pt"
    path.write_text("not weights at all, only a text of some length")
    with pytest.raises(ConversionError):
        read_tensors(path)
