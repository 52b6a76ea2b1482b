"""Files at URLs, with a copy on disk of what was read of them: below PHYSML_CACHE/remote, never above a limit.

Blocks of files and objects of zarr stores are kept one by one under the address and the version of the file (its ETag
or time of change), so that what is read again comes from disk and a changed file is read anew. The least recently used
ones go first when there are more than PHYSML_REMOTE_CACHE_GB gigabytes (10; 0 keeps nothing).
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.caching import BlockCache, register_cache

from physml.errors import ConfigError, DataError, first_line
from physml.files import cache_folder, whole

REMOTE = ("http", "https", "s3", "s3a", "gs", "gcs", "hf", "abfs", "abfss", "az")
BLOCK = 2**21  # bytes asked for at once
VERSION = (
    "ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "last_modified", "mtime", "updated",
    "generation", "md5Hash", "blob_id", "oid", "created",
)  # fmt: skip
LIMIT = "PHYSML_REMOTE_CACHE_GB"


def is_url(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path or "::" in path


def is_remote(path: str) -> bool:
    """Whether reading a path goes over a network that a copy on disk saves. Chained URLs (::) are left alone."""
    return "::" not in path and path.partition("://")[0] in REMOTE and "://" in path


def file_system(url: str, storage_options: dict | None):
    """The fsspec file system of a path or URL, and the path in it. Raises DataError when there is no such protocol."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **(storage_options or {}))
    except (ValueError, ImportError) as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}.get(
            url.partition("://")[0]
        )
        install = f" pip install {package}" if package and isinstance(error, ImportError) else ""
        raise DataError(f"{url} cannot be reached: {first_line(error)}{install}") from error


def describe_failure(error: BaseException) -> str:
    """Kind and message, on one line; of what is behind it where fsspec calls every failure a missing file."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return describe_failure(error.__cause__)
    kind, message = type(error).__name__, first_line(error)
    return kind if message == kind else f"{kind}: {message}"


def identity(info: dict[str, Any]) -> str:
    """What changes when a file does, out of what its file system tells; "" where that is not enough to know."""
    told = {key: str(info[key]) for key in VERSION if info.get(key) is not None}
    return json.dumps({**told, "size": info.get("size")}, sort_keys=True) if told else ""


def is_there(system: Any, path: str, folder: bool) -> bool:
    """Whether a file, or a folder, is there. Asks HTTP servers for headers only: their pages are taken as folders."""
    if getattr(system, "protocol", None) not in (("http", "https"), "http", "https"):
        return system.isdir(path) if folder else system.isfile(path)
    try:
        info = system.info(path)
    except FileNotFoundError as error:
        # fsspec says so of any failure. Some servers answer 403 for what they do not have.
        if error.__cause__ is None or getattr(error.__cause__, "status", None) in (403, 404, 410):
            return False
        raise OSError(describe_failure(error)) from error
    page = info.get("mimetype") == "text/html"
    return page and system.isdir(path) if folder else not page


def open_file(url: str, storage_options: dict | None = None) -> Any:
    """A binary file object to read from. Blocks of remote files come from the copy on disk where it has them."""
    system, path = file_system(url, storage_options)
    folder = _entry(url, system, path) if is_remote(url) else None
    if folder is None:
        file = system.open(path, "rb")
    else:
        options = {"folder": folder, "limit": cache_limit()}
        file = system.open(path, "rb", block_size=BLOCK, cache_type=DiskBlocks.name, cache_options=options)
    with contextlib.suppress(AttributeError):
        file.kept_alive = system  # the file system of an archive closes the archive when it goes
    return file


def zarr_store(url: str, storage_options: dict | None, header: str) -> Any:
    """A zarr store at a URL, its objects kept on disk under the version of its file `header`; None: nothing is kept."""
    system, root = file_system(url, storage_options)
    folder = _entry(url, system, f"{root.rstrip('/')}/{header}") if is_remote(url) else None
    if folder is None:
        return None
    from zarr.storage import FsspecStore

    from physml.data.kept import KeptStore

    return KeptStore(FsspecStore.from_url(url, storage_options=storage_options, read_only=True), folder, cache_limit())


# --- the copy on disk -------------------------------------------------------------------------------------------------


def cache_limit() -> int:
    """Bytes that the copy may take. Raises ConfigError for a limit that is no number."""
    text = os.environ.get(LIMIT, "10")
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e9:
        raise ConfigError(f"{LIMIT} is {text!r}, but a number of gigabytes, 0 or more, was expected.")
    return int(limit * 1e9)


def cache_root() -> Path:
    """Where copies lie."""
    return cache_folder() / "remote"


def _entry(url: str, system: Any, path: str) -> Path | None:
    """The folder of one version of a remote file, without those of older versions; None where nothing can be kept."""
    system.invalidate_cache(path)  # file systems remember what they were told of a file
    if cache_limit() == 0 or not (version := identity(system.info(path))):
        return None
    home = cache_root() / hashlib.sha256(url.encode()).hexdigest()[:32]
    folder = home / hashlib.sha256(version.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for old in home.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder
    return None  # the disk cannot be written: read without a copy


def recall(file: Path) -> bytes | None:
    """What is kept under a name, which counts as used now."""
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        os.utime(file)
        return content
    return None


def keep(file: Path, content: bytes, limit: int) -> None:
    """Keeps bytes under a name, whole or not at all, and lets go of others where the limit asks for it.

    A disk that is full or cannot be written is no error: the bytes are only not kept.
    """
    if len(content) > limit:
        return
    with contextlib.suppress(OSError, DataError):
        _BOUND.make_room(file.parents[2], len(content), limit)
        with whole(file) as partial:
            partial.write_bytes(content)


class _Bound:
    """Adds up what is kept; counts again, for what other processes did, after every twentieth of the limit."""

    def __init__(self):
        self.lock = threading.Lock()
        self.root, self.total, self.fresh = None, 0, 0

    def make_room(self, root: Path, size: int, limit: int) -> None:
        with self.lock:
            if self.root != root or self.total + size > limit or self.fresh > limit // 20:
                self.root, self.fresh = root, 0
                self.total = _shrink(root, limit - size)
            self.total += size
            self.fresh += size


def _shrink(root: Path, limit: int) -> int:
    """Bytes below a folder after the least recently used files went, down to nine tenths, if there were too many."""
    files = []
    for folder, _, names in os.walk(root):  # which passes over what other writers take away meanwhile
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    if total <= limit:
        return total
    for _, size, path in sorted(files):
        if total <= 0.9 * limit:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
    return total


_BOUND = _Bound()


class DiskBlocks(BlockCache):
    """fsspec's cache of the blocks of one file, over copies of them on disk."""

    name = "physml-disk"

    def __init__(self, blocksize: int, fetcher: Callable, size: int, *, folder: Path, limit: int):
        super().__init__(blocksize, fetcher, size, maxblocks=8)
        self.folder, self.limit = folder, limit

    def _fetch_block(self, block_number: int) -> bytes:
        file = self.folder / f"{block_number}-{self.blocksize}"
        length = min(self.blocksize, self.size - block_number * self.blocksize)
        content = recall(file)
        if content is None or len(content) != length:
            content = super()._fetch_block(block_number)
            if len(content) == length:
                keep(file, content, self.limit)
        return content


register_cache(DiskBlocks, clobber=True)
