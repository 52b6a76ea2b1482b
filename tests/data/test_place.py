"""Files and folders, local and at URLs, are addressed alike and never left."""

import fsspec
import pytest

from physml.data.place import Place
from physml.errors import DataError


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A folder with files, on disk or in memory."""
    root = str(tmp_path / "set") if request.param == "local" else f"memory://{tmp_path.name}/set"
    for name in ("case10/a.txt", "case2/a.txt", "case1/b.txt", "c.npy", ".hidden"):
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(name.encode())
    return Place(root)


def test_names_files_and_content(place):
    assert place.name() == "set"
    assert place.names() == ["c.npy", "case1", "case2", "case10"]
    assert [p.name() for p in place.files(".npy", ".txt")] == ["c.npy"]
    assert [p.name() for p in place.below("case1").files(".npy", ".txt")] == ["b.txt"]
    case = place.below("case2")
    assert case.is_folder()
    assert not case.is_file()
    file = case.below("a.txt")
    assert file.is_file()
    assert not file.is_folder()
    assert file.read() == b"case2/a.txt"
    assert file.size() == 11
    assert file.parent().parent().names() == place.names()


def test_what_is_missing_or_too_long_is_named(place):
    nothing = place.below("case3")
    assert not nothing.is_folder()
    assert not nothing.is_file()
    for ask in (nothing.names, nothing.read, nothing.size):
        with pytest.raises(DataError, match="case3"):
            ask()
    with pytest.raises(DataError, match="longer than 5 bytes"):
        Place(place.below("case1", "b.txt").path).read(limit=5)


@pytest.mark.parametrize("part", ["..", ".", "", "/etc", "a/../..", "..\\a"])
def test_nothing_outside_is_named(place, part):
    with pytest.raises(DataError, match="not a name inside"):
        place.below(part)


def test_unknown_protocols_are_named():
    with pytest.raises(DataError, match="nonsense://"):
        Place("nonsense://a/b").is_file()


def test_chained_urls_keep_their_inner_part(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("set/c.txt", "hello")
    place = Place(f"zip://set::file://{tmp_path}/a.zip")
    assert place.is_folder()
    assert place.names() == ["c.txt"]
    assert place.below("c.txt").read() == b"hello"
