"""Totals of a pass over a dataset, kept in a small file beside the data and used again while the data are the same."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from physml.contracts import Dataset
from physml.data.dataset import windows_of
from physml.data.remote import file_system, is_url
from physml.errors import DataError, PhysmlError
from physml.files import cache_folder, write_text
from physml.normalize import Totals
from physml.progress import Progress, Silent

FORMAT = 2  # 1 counted first frames of above 8 MiB twice
FILES = 200_000  # a store of more files is not watched: looking at them would take longer than it saves
PROBES = 4  # frames of a trajectory whose numbers take part in the key


def totals(
    dataset: Dataset,
    store: bool = True,
    chunk: int | None = None,
    intervals: tuple[int, ...] = (),
    progress: Progress | None = None,
) -> Totals:
    """What one streaming pass gathers (`physml.normalize.Totals`); with `store` from a file if it was gathered before.
    `progress` is told the frames that are read.

    The file `.SOURCE.physml-DIGEST.json` lies beside the data, or below `physml.data.cache_folder()` where that folder
    cannot be written or is remote. Its name holds a digest of what was selected: spec, times, trajectories, parameters,
    the numbers of a few frames, and `intervals` where there are some. Inside stand path, size and time of change (of
    remote files the identity that the file system gives) of every file of the data: when one differs, the pass is
    repeated. Data in memory, or of unknown files, are never stored. A damaged file is replaced, with a warning.
    """
    before = _identity(dataset, intervals) if store else None
    if before is None:
        return _gather(dataset, chunk, intervals, progress)
    places = _places(before)
    for place in places:
        if (found := _load(place, before, dataset, intervals)) is not None:
            return found
    result = _gather(dataset, chunk, intervals, progress)
    if _identity(dataset, intervals) == before:  # nothing was written meanwhile
        _save(places, before, result)
    return result


def _gather(dataset: Dataset, chunk: int | None, intervals: tuple[int, ...], progress: Progress | None) -> Totals:
    result, progress = Totals(dataset.spec, intervals), progress or Silent()
    for window in windows_of(dataset, chunk):
        result.add(window)
        progress.update(result.frames, sum(dataset.lengths))
    return result


def _load(place: Path, identity: dict, dataset: Dataset, intervals: tuple[int, ...]) -> Totals | None:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content["checksum"] != _digest(content["totals"]):
            raise ValueError("its checksum does not fit")
        if content["identity"] != identity:
            return None
        return Totals.from_dict(content["totals"], dataset.spec, intervals)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(
            f"{place} is damaged ({error!r}): the statistics are computed anew and the file is replaced.", stacklevel=4
        )
        return None


def _save(places: list[Path], identity: dict, result: Totals) -> None:
    numbers = result.to_dict()
    text = json.dumps({"identity": identity, "totals": numbers, "checksum": _digest(numbers)})
    for place in places:
        try:
            write_text(place, text)
            return
        except (OSError, DataError):
            continue  # a folder that cannot be written


def _places(identity: dict) -> list[Path]:
    """Where the file may lie, the best place first."""
    digest = identity["selection"][:16]
    first = identity["files"][0][0]
    cached = cache_folder() / "statistics" / f"{Path(first).name}.physml-{digest}.json"
    if is_url(first):
        return [cached]
    beside = Path(identity["source"])
    return [beside.with_name(f".{beside.name}.physml-{digest}.json"), cached]


def _identity(dataset: Dataset, intervals: tuple[int, ...] = ()) -> dict | None:
    """What decides the totals, in plain containers; None where the files are not known."""
    if intervals:
        plain = _identity(dataset)
        return plain and {**plain, "selection": _digest([plain["selection"], list(intervals)])}
    if hasattr(dataset, "parts"):
        parts = [_identity(part) for part in dataset.parts.values()]
        if any(part is None for part in parts):
            return None
        selection = _digest([dataset.spec.to_dict(), [part["selection"] for part in parts]])
        files = [file for part in parts for file in part["files"]]
        return {"format": FORMAT, "source": parts[0]["source"], "selection": selection, "files": files}
    ds = getattr(dataset, "ds", None)
    source = None if ds is None else ds.encoding.get("source")
    if not source or not hasattr(dataset, "reader"):
        return None
    paths = ds.encoding.get("files") or (str(source),)
    try:
        files = [file for path in paths for file in _watched(path)]
    except (OSError, PhysmlError, LookupError):
        return None
    if not files or len(files) > FILES:
        return None
    return {"format": FORMAT, "source": os.path.abspath(paths[0]), "selection": _selection(dataset), "files": files}


def _watched(path: str) -> Iterator[list]:
    """[path, size, time of change or another mark] of every file behind a path."""
    if is_url(path):
        system, root = file_system(path, None)
        for name, info in sorted(system.find(root, detail=True).items()):
            marks = {key: str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info}
            if not marks:
                raise LookupError(f"{name} has nothing that tells its version")
            yield [f"{path}#{name}", info.get("size"), marks]
        return
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(path):
        yield _stat(path)
        return
    if not os.path.isdir(path):
        raise OSError(f"{path} is gone")
    for count, (folder, _, names) in enumerate(sorted(os.walk(path))):
        if count > FILES:
            raise OSError("too many folders")
        for name in sorted(names):
            if not (name.startswith(".") and ".physml-" in name):
                yield _stat(os.path.join(folder, name))


def _stat(path: str) -> list:
    found = os.stat(path)
    return [path, found.st_size, found.st_mtime_ns]


def _selection(dataset: Any) -> str:
    """A digest of everything between the files and the windows."""
    reader, ds = dataset.reader, dataset.ds
    state = hashlib.sha256(_digest([FORMAT, dataset.spec.to_dict(), dataset.lengths]).encode())
    state.update(repr(np.asarray(reader.times.labels).tolist()).encode())
    state.update(reader.parameters.tobytes())
    if "trajectory" in ds.variables:
        state.update(repr(np.asarray(ds["trajectory"].values).tolist()).encode())
    count = len(dataset.lengths)
    for trajectory in sorted({0, count // 2, count - 1} if count else ()):
        last = dataset.lengths[trajectory] - 1
        for frame in sorted({last * i // (PROBES - 1) for i in range(PROBES)}):
            window = dataset.read(trajectory, range(frame, frame + 1))
            for array in (window.frames, window.forcing, window.static, window.mask):
                state.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
