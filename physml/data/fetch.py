"""Downloading data sets: resumed where they broke off, checked, and moved into place when they are whole."""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from physml.data import cards
from physml.data.remote import describe_failure, file_system, identity, is_url
from physml.errors import ConfigError, DataError, DependencyError
from physml.files import exclusive, write_text
from physml.progress import Progress, Silent

CHECKSUMS = "SHA256SUMS"  # in the format of the program sha256sum
PIECE = 2**22  # bytes asked for at once
SPARE = 2**26  # bytes of disk to leave free
ATTEMPTS = 3  # at every piece; progress starts the count anew
PAUSE = 0.5  # seconds before another attempt, twice as long every time


@dataclass(frozen=True)
class Item:
    """One file to download.

    Attributes:
        url: fsspec URL.
        name: where it goes below the output folder, with / between folders.
        sha256: what it must hash to; None where that is not known.
    """

    url: str
    name: str
    sha256: str | None = None


def fetch(
    name: str,
    out: str | os.PathLike,
    *,
    files: Sequence[str] = (),
    sha256: str | None = None,
    storage_options: dict | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Downloads the files of a card, or of one URL, into a folder.

    A file that broke off leaves NAME.partial, from which the next call goes on, unless it has changed at its source. A
    file that is there with the right checksum is not fetched again. Checksums are written to SHA256SUMS, which
    `sha256sum --check` understands; a known one that does not fit is an error and the file is thrown away.

    Args:
        name: a card (`physml data list`), a part of one such as "the_well/shear_flow", or an fsspec URL.
        out: the folder.
        files: patterns such as "data/train/*"; all files of the card when empty.
        sha256: of a single URL.
        storage_options: for the file system of a URL.
        progress: told of bytes.
        dry_run: finds out what would be fetched, and fetches nothing.

    Returns the files with sizes and checksums. Raises ConfigError for unknown names, DependencyError when the extra
    `hub` is needed, DataError when the source cannot be reached, the disk is too small, or a checksum is wrong.
    """
    progress = progress or Silent()
    if is_url(name):
        items, where = [Item(name, _url_name(name), sha256)], name
    else:
        source = cards.source(name)
        if sha256 is not None:
            raise ConfigError("--sha256 is for a single URL; the checksums of a card are its own.")
        items, where = _items(source, tuple(files), Path(out)), source.hub or source.page or min(source.urls)
    folder = Path(out).expanduser()
    for item in items:
        _target(folder, item.name)
    sizes = [_size(item, storage_options, where, folder) for item in items]
    if dry_run:
        plan = {item.name: size for item, (size, _) in zip(items, sizes, strict=True)}
        return {"would fetch": plan, "bytes": sum(size or 0 for size, _ in sizes), "into": str(folder)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}. Choose a folder that you may write to.") from error
    known = _known_checksums(folder)
    _check_space(folder, items, [size for size, _ in sizes])
    result = {}
    for number, (item, (size, version)) in enumerate(zip(items, sizes, strict=True)):
        progress.stage(f"{item.name} ({number + 1}/{len(items)})")
        target = _target(folder, item.name)
        with exclusive(target):
            expected = item.sha256 or known.get(item.name)
            done = target.is_file() and size in (None, target.stat().st_size) and hash_file(target) == expected
            if not done:
                _download(item, target, size, version, storage_options, where, progress)
            digest = expected if done else _checked(item, target)
        known[item.name] = digest
        _write_checksums(folder, known)
        result[item.name] = {"bytes": target.stat().st_size, "sha256": digest}
    return {"data": str(folder), "files": result}


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what to fetch ----------------------------------------------------------------------------------------------------


def _items(source: cards.Source, patterns: tuple[str, ...], out: Path) -> list[Item]:
    if source.urls:
        items = [Item(url, _url_name(url), digest) for url, digest in source.urls.items()]
        items = [item for item in items if source.wants(item.name, patterns)]
        available: Iterable[str] = map(_url_name, source.urls)
    elif source.hub:
        found = _hub_files(source, out)
        kind = "datasets/" if source.kind == "dataset" else ""
        items = [
            Item(f"hf://{kind}{source.hub}/{name}", name, digest)
            for name, digest in found.items()
            if source.wants(name, patterns)
        ]
        available = found
    else:
        raise ConfigError(f"{source.name} cannot be fetched by a program. {_by_hand(source, out)}")
    if not items:
        raise ConfigError(
            f"No file of {source.name} matches {', '.join(patterns or source.files)}. It has "
            f"{', '.join(list(available)[:10]) or 'none'}."
        )
    return items


def _hub_files(source: cards.Source, out: Path) -> dict[str, str | None]:
    """File -> SHA-256 (large files have one at the hub) of a repository."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DependencyError(
            f"{source.name} lies on the Hugging Face hub: pip install 'physml[hub]'. {_by_hand(source, out)}"
        ) from error
    try:
        info = HfApi().repo_info(source.hub, repo_type=source.kind, files_metadata=True)
    except Exception as error:  # of the hub, of its transport and of the network
        raise DataError(
            f"The Hugging Face hub cannot be reached or does not give {source.hub} ({describe_failure(error)}). "
            f"{_by_hand(source, out)}"
        ) from error
    return {file.rfilename: (file.lfs.sha256 if file.lfs else None) for file in info.siblings or []}


def _by_hand(source: cards.Source, out: Path) -> str:
    """What to download, from where, and where to put it."""
    kind = "datasets/" if source.kind == "dataset" else ""
    page = f"https://huggingface.co/{kind}{source.hub}" if source.hub else source.page
    what = f"the files {', '.join(source.files)}" if source.files else "its files"
    note = f" {source.note}" if source.note else ""
    return f"By hand: download {what} from {page} and put them into {out}, in the same folders.{note}"


def _url_name(url: str) -> str:
    path = urlsplit(url.split("::")[0]).path if "://" in url.split("::")[0] else url.split("::")[0]
    name = PurePosixPath(unquote(path)).name
    if not name:
        raise ConfigError(f"{url} does not end in the name of a file. Give the address of one file.")
    return name


def _target(folder: Path, name: str) -> Path:
    """Where a file goes. Raises DataError for names that lead out of the folder."""
    parts = name.split("/")
    unsafe = "\\" in name or "\0" in name or ":" in name or any(part in ("", ".", "..") for part in parts)
    if unsafe or parts[-1] == CHECKSUMS or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"The source offers a file called {name!r}, which is no name inside {folder}. It is refused.")
    return folder / name


def _size(item: Item, options: dict | None, where: str, folder: Path) -> tuple[int | None, str]:
    """Bytes, where the source tells, and a mark that changes when the file does."""
    try:
        system, path = file_system(item.url, options)
        info = system.info(path)
    except Exception as error:  # every file system has its own exceptions
        raise _unreachable(item, where, folder / item.name, error) from error
    size = info.get("size")
    return (int(size) if size is not None else None), identity(info) or item.sha256 or ""


def _unreachable(item: Item, where: str, target: Path, error: Exception) -> DataError:
    return DataError(
        f"{item.url} cannot be reached ({describe_failure(error)}). Try again later, or download {item.name} from "
        f"{where} by hand and put it at {target}."
    )


# --- downloading ------------------------------------------------------------------------------------------------------


def _check_space(folder: Path, items: list[Item], sizes: list[int | None]) -> None:
    missing = 0
    for item, size in zip(items, sizes, strict=True):
        target = folder / item.name
        there = target.stat().st_size if target.is_file() else 0
        partial = target.with_name(target.name + ".partial")
        there = max(there, partial.stat().st_size if partial.is_file() else 0)
        missing += max((size or 0) - there, 0)
    free = shutil.disk_usage(folder).free
    if missing + SPARE > free:
        raise DataError(
            f"{folder} has {free / 2**30:.1f} GiB free, but {missing / 2**30:.1f} GiB are to be fetched. Free some "
            "space, name another folder, or choose files with --files."
        )


def _download(
    item: Item, target: Path, size: int | None, version: str, options: dict | None, where: str, progress: Progress
) -> None:
    """To NAME.partial, piece by piece; NAME.version tells of which file the pieces are."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, mark = (target.with_name(target.name + end) for end in (".partial", ".version"))
    if not (version and mark.is_file() and mark.read_text() == version):
        partial.unlink(missing_ok=True)
    mark.write_text(version)
    try:
        with partial.open("ab") as file:
            if size is None:
                file.truncate(0)
                _stream(item, file, options)
            else:
                _pieces(item, file, size, options, progress)
            os.fsync(file.fileno())
    except DataError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"The disk of {target.parent} is full. Free some space and call again.") from error
        raise _unreachable(item, where, target, error) from error
    except Exception as error:  # every file system has its own exceptions
        raise _unreachable(item, where, target, error) from error
    os.replace(partial, target)
    mark.unlink(missing_ok=True)


def _pieces(item: Item, file: Any, size: int, options: dict | None, progress: Progress) -> None:
    system, path = file_system(item.url, options)
    at = file.tell()
    if at > size:
        file.truncate(0)
        at = 0
    failures = 0
    while at < size:
        try:
            piece = system.cat_file(path, start=at, end=min(at + PIECE, size))
            if not piece:
                raise OSError(f"nothing came from byte {at} on")
        except FileNotFoundError:
            raise
        except Exception:  # a lost connection: every file system has its own exceptions
            failures += 1
            if failures >= ATTEMPTS:
                raise
            time.sleep(PAUSE * 2**failures)
            continue
        if at + len(piece) > size:
            piece = _without_range(item, piece, at, size)
        file.write(piece)
        file.flush()
        at, failures = at + len(piece), 0
        progress.update(at, size)


def _without_range(item: Item, whole: bytes, at: int, size: int) -> bytes:
    """A server that knows no ranges sends the whole file."""
    if len(whole) != size:
        raise DataError(
            f"{item.url} changed while it was fetched: {len(whole)} bytes came instead of {size}. Call again."
        )
    return whole[at:]


def _stream(item: Item, file: Any, options: dict | None) -> None:
    system, path = file_system(item.url, options)
    with system.open(path, "rb", block_size=0) as remote:
        shutil.copyfileobj(remote, file, PIECE)


# --- checksums --------------------------------------------------------------------------------------------------------


def _checked(item: Item, target: Path) -> str:
    digest = hash_file(target)
    if item.sha256 is not None and digest != item.sha256.lower():
        target.unlink()
        raise DataError(
            f"{item.url} has the SHA-256 {digest}, but {item.sha256.lower()} was expected. The file was damaged on the "
            "way or replaced at its source; it was thrown away. Fetch it again."
        )
    return digest


def _known_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (row.partition("  ") for row in rows) if name}


def _write_checksums(folder: Path, known: dict[str, str]) -> None:
    rows = "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items()))
    write_text(folder / CHECKSUMS, rows)
