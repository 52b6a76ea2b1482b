"""Plain HDF5 as lazy variables; nothing outside the file is opened, whatever the file asks for."""

import pickle

import fsspec
import h5py
import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

from physml.data import netcdf
from physml.data.hdf5 import Hdf5, component
from physml.data.place import Place
from physml.errors import DataError

FIELD = np.arange(2 * 3 * 4 * 2, dtype="f4").reshape(2, 3, 4, 2)
DIMS = ("trajectory", "time", "x", "part")


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("group/field", data=FIELD, chunks=(1, 2, 4, 2), compression="gzip")
        file["names"] = ["u", "v"]
        file["empty"] = np.zeros((0, 3))
        file.attrs.update({"nu": np.float64(0.1), "title": "wave", "bytes": b"abc", "names": ["a", "b"], "n": [1, 2]})
    return tmp_path / "a.h5"


def test_fields_are_lazy_and_indexed_like_arrays(path):
    variable = Hdf5(Place(path)).variable("group/field", DIMS, {"units": "m"})
    assert not isinstance(variable._data, np.ndarray)
    assert variable.attrs == {"units": "m"}
    assert variable.encoding["preferred_chunks"] == {"trajectory": 1, "time": 2, "x": 4, "part": 2}
    assert_array_equal(variable.values, FIELD)
    for key in (np.s_[1, ::-1, 1:3], np.s_[[1, 0], 2], np.s_[:, [2, 0, 2], ..., -1:]):
        assert_array_equal(variable[key].values, FIELD[key])
    part = component(variable, "part", 1)
    assert not isinstance(part._data, np.ndarray)
    assert part.encoding["preferred_chunks"] == {"trajectory": 1, "time": 2, "x": 4}
    assert_array_equal(part.values, FIELD[..., 1])
    chunked = netcdf.in_chunks(xr.Dataset({"u": part}))
    assert chunked["u"].chunksizes == {"trajectory": (1, 1), "time": (2, 1), "x": (4,)}
    assert_array_equal(chunked["u"], FIELD[..., 1])


def test_variables_travel_to_other_processes(path):
    variable = Hdf5(Place(path)).variable("group/field", DIMS)
    assert_array_equal(pickle.loads(pickle.dumps(variable)).values, FIELD)


def test_files_at_urls_are_read_alike(path):
    with fsspec.open("memory://hdf5/a.h5", "wb") as file:
        file.write(path.read_bytes())
    assert_array_equal(Hdf5(Place("memory://hdf5/a.h5")).variable("group/field", DIMS)[1].values, FIELD[1])


def test_keys_shapes_attributes(path):
    file = Hdf5(Place(path))
    assert sorted(file.keys()) == ["empty", "group", "names"]
    assert file.keys("group") == ["field"]
    assert file.has("group/field")
    assert not file.has("group/other")
    assert file.is_group("group")
    assert not file.is_group("names")
    assert file.shape("group/field") == FIELD.shape
    found = file.attributes()
    assert_array_equal(found.pop("n"), [1, 2])
    assert found == {"nu": 0.1, "title": "wave", "bytes": "abc", "names": ["a", "b"]}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda f: f.variable("group/fields", DIMS), "has no 'group/fields'. Did you mean 'field'"),
        (lambda f: f.variable("group", DIMS), "is a group"),
        (lambda f: f.keys("group/field"), "is an array"),
        (lambda f: f.values("group/field/deeper"), "has no 'group/field/deeper'"),
        (lambda f: f.variable("group/field", DIMS[:3]), "its axes should be"),
        (lambda f: f.variable("empty", ("a", "b")), "is empty"),
        (lambda f: f.values("names"), "not plain numbers"),
        (lambda f: f.values("group/field", limit=10), "would take 192 bytes"),
    ],
)
def test_what_does_not_fit_is_named(path, ask, message):
    with pytest.raises(DataError, match=message) as caught:
        ask(Hdf5(Place(path)))
    assert "a.h5" in str(caught.value)


def test_other_files_are_never_opened(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.ones(3)
    (tmp_path / "raw").write_bytes(b"\0" * 24)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["external"] = h5py.ExternalLink("other.h5", "/x")
        file["soft"] = h5py.SoftLink("/external")
        file.create_dataset("raw", (3,), "f8", external=[(str(tmp_path / "raw"), 0, 24)])
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", shape=(3,))
        file.create_virtual_dataset("virtual", layout)
    hostile = Hdf5(Place(tmp_path / "a.h5"))
    for key, message in (
        ("external", "is a link"),
        ("soft", "is a link"),
        ("raw", "other files"),
        ("virtual", "other files"),
    ):
        with pytest.raises(DataError, match=message):
            hostile.variable(key, ("x",))


def test_chunks_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("physml.data.hdf5.LARGEST_CHUNK", 1000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (1000,), "f8", chunks=(500,), compression="gzip")
    with pytest.raises(DataError, match="unpacks to more than"):
        Hdf5(Place(tmp_path / "a.h5")).variable("x", ("x",))


def test_damaged_files_are_named(path):
    content = path.read_bytes()
    for name, damaged in {"short.h5": content[: len(content) // 2], "text.h5": b"hello", "none.h5": b""}.items():
        (path.parent / name).write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            Hdf5(Place(path.parent / name)).variable("group/field", DIMS)[0].values  # noqa: B018
    with pytest.raises(DataError, match=r"There is no file .*Did you mean 'a.h5'"):
        Hdf5(Place(path.parent / "b.h5"))


def test_a_chunk_that_cannot_be_unpacked_is_an_error_of_reading(path):
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        chunk = file["group/field"].id.get_chunk_info(0)
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    variable = Hdf5(Place(path)).variable("group/field", DIMS)
    with pytest.raises(DataError, match="damaged or incomplete"):
        variable[0, 0].values  # noqa: B018


def test_an_overwritten_heap_does_not_hang(tmp_path):
    """Zeros in the heap of texts make the HDF5 library loop forever."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["u"] = np.ones(3)
        file.attrs["names"] = ["first", "second"]
    assert Hdf5(Place(tmp_path / "a.h5")).attributes() == {"names": ["first", "second"]}
    content = bytearray((tmp_path / "a.h5").read_bytes())
    at = content.index(b"GCOL") + 16
    content[at : at + 64] = bytes(64)
    (tmp_path / "b.h5").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.h5.*heap"):
        Hdf5(Place(tmp_path / "b.h5"))
    with pytest.raises(DataError, match=r"b\.h5.*heap"):
        netcdf.open_netcdf(str(tmp_path / "b.h5"))
