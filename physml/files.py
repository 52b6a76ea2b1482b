"""Files and folders that appear whole or not at all, and have one writer at a time; logs that grow line by line."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from physml.errors import DataError


def cache_folder() -> Path:
    """Where physml keeps what it can make again: `PHYSML_CACHE`, or ~/.cache/physml."""
    return Path(os.environ.get("PHYSML_CACHE") or Path.home() / ".cache" / "physml").expanduser()


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path of the same name to write a file or a folder to: it takes the place of `path` when the block ends well.

    Raises DataError where nothing can be written beside `path`. An error in the block leaves what was there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield folder / path.name
        replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file (UTF-8) that appears whole or not at all. Raises DataError where it cannot be written."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one per line, without the line that a killed process left unfinished.

    Empty where there is no log.
    """
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def replace(finished: Path, out: Path) -> None:
    """Moves a finished file or folder to `out`. A folder there is set aside, put back on failure, and removed last."""
    if not out.is_dir() or out.is_symlink():
        os.replace(finished, out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(out, old)
    try:
        os.replace(finished, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def exclusive(out: Path, *, wait: bool = True) -> Iterator[None]:
    """Lets one process at a time work on `out`; the others wait. The lock ends with the process, however it ends.

    Raises DataError when the folder of `out` cannot be written, and without `wait` when another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system: files still appear whole, two processes only do the work twice
        yield
        return
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = lock.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                file.close()
                raise DataError(
                    f"Another process is writing {out}. Wait until it has ended, or choose another name."
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break  # a file system without locks
            # Whoever had it before may have removed the file: only a lock on the file that others will open counts.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                    break
            file.close()
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error}. Choose a folder that you may write to.")
