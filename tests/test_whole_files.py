import contextlib
import os
import stat
import threading

import pytest

from physml.errors import DataError
from physml.files import exclusive, whole, write_text


def test_text_is_written_whole(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "one")
    write_text(tmp_path / "new" / "a.txt", "zwölf")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "zwölf"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    def fill(path, text):
        if kind == "folder":
            path.mkdir()
        (path / "content" if kind == "folder" else path).write_text(text)

    def content():
        return (tmp_path / "out" / "content" if kind == "folder" else tmp_path / "out").read_text()

    for text in ("old", "new"):
        with whole(tmp_path / "out") as partial:
            fill(partial, text)
            assert partial.name == "out"
        assert content() == text
    with pytest.raises(FileNotFoundError), whole(tmp_path / "out"):
        pass  # nothing was written
    with contextlib.suppress(ZeroDivisionError), whole(tmp_path / "out") as partial:
        fill(partial, "half")
        raise ZeroDivisionError
    assert content() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_comes_back_where_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    rename = os.replace

    def fail(source, target):
        if ".partial" in os.fspath(source):
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"), whole(tmp_path / "out") as partial:
        partial.mkdir()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_what_is_written_has_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with whole(tmp_path / "folder") as partial:
            partial.mkdir()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("parent", ["file", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, parent):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="a.txt cannot be written.*Choose a folder"):
        write_text(tmp_path / parent / "a.txt", "x")
    with (
        pytest.raises(DataError, match="a.txt cannot be written.*Choose a folder"),
        exclusive(tmp_path / parent / "a.txt"),
    ):
        pass


def test_writers_wait_for_each_other_or_are_refused(tmp_path):
    order = []

    def second():
        with exclusive(tmp_path / "out"):
            order.append("second")

    other = threading.Thread(target=second)
    with exclusive(tmp_path / "out"):
        other.start()
        with pytest.raises(DataError, match="Another process is writing"), exclusive(tmp_path / "out", wait=False):
            pass
        other.join(0.2)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
    assert os.listdir(tmp_path) == []
