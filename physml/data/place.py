"""Where a dataset lies: a file or a folder, local or at an fsspec URL, addressed alike."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from physml.data import netcdf, remote
from physml.errors import DataError

SMALL = 2**24  # bytes: no description of a case, list of statistics or index is larger


class Place:
    """One path and what lies below it. Nothing outside of it is ever opened: parts with ".." are refused.

    Attributes:
        path: as it was given, "~" expanded; the paths of `below` and `files` can be opened in its stead.
        storage_options: for the file system of a URL.
    """

    def __init__(self, path: str | os.PathLike, storage_options: dict | None = None):
        self.path, self.storage_options = os.path.expanduser(os.fspath(path)), storage_options

    def __str__(self) -> str:
        return self.path

    @cached_property
    def _located(self) -> tuple[Any, str]:
        system, root = netcdf.file_system(self.path, self.storage_options)
        return system, root.rstrip("/") or "/"

    def below(self, *parts: str) -> "Place":
        """A file or folder inside. Raises DataError for a part that leads out."""
        for part in parts:
            if part in ("", ".", "..") or "\\" in part or part.startswith("/") or ".." in part.split("/"):
                raise DataError(f"{self.path}: {part!r} is not a name inside this folder.")
        if "::" in self.path:
            first, *rest = self.path.split("::")
            return Place("::".join(["/".join([first.rstrip("/"), *parts]), *rest]), self.storage_options)
        return Place("/".join([self.path.rstrip("/"), *parts]), self.storage_options)

    def name(self) -> str:
        """The last part of the path."""
        return os.path.basename(self._located[1])

    def parent(self) -> "Place":
        return Place(os.path.dirname(os.path.abspath(self.path)) if "://" not in self.path else
                     self.path.rstrip("/").rpartition("/")[0], self.storage_options)  # fmt: skip

    def is_folder(self) -> bool:
        system, root = self._located
        with netcdf.reaching(self.path):
            return remote.is_there(system, root, folder=True)

    def is_file(self) -> bool:
        system, root = self._located
        with netcdf.reaching(self.path):
            return remote.is_there(system, root, folder=False)

    def names(self) -> list[str]:
        """What a folder holds, sorted, hidden names left out; numbers inside names count as numbers (case2, case10)."""
        return sorted((name for name in self._list() if not name.startswith(".")), key=_natural)

    def files(self, *suffixes: str) -> list["Place"]:
        """The files of a folder that end with one of the suffixes, in the order of `names`."""
        return [place for name in self.names() if name.endswith(suffixes) and (place := self.below(name)).is_file()]

    def read(self, limit: int = SMALL) -> bytes:
        """The whole of a small file. Raises DataError when it is missing, unreadable or longer than `limit`."""
        with self.opened() as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise DataError(f"{self.path} is longer than {limit} bytes, which is no size for what it should hold.")
        return content

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """A binary file object. Raises DataError when there is none."""
        with netcdf.reaching(self.path, "read"):
            file = remote.open_file(self.path, self.storage_options)
        with file:
            try:
                yield file
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error}.") from error

    def size(self) -> int:
        system, root = self._located
        with netcdf.reaching(self.path):
            return int(system.size(root))

    def _list(self) -> list[str]:
        system, root = self._located
        with netcdf.reaching(self.path, "listed"):
            return [os.path.basename(str(entry).rstrip("/")) for entry in system.ls(root, detail=False)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for letter in [*name, ""]:
        if letter.isdigit() and letter.isascii():
            digits += letter
            continue
        if digits:
            parts.append((0, int(digits[:18])))
            digits = ""
        parts.append((1, letter))
    return parts
