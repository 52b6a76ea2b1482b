"""What a run writes down as it goes: metrics.jsonl, one JSON object per line, and a tracker."""

import json
import math
import os
from pathlib import Path
from typing import Any

from physml.files import read_records, write_text


class Journal:
    """Records of a run, in memory and in FOLDER/metrics.jsonl.

    Beginning at `step` drops what an interrupted run wrote after it, so that every step is recorded once. A line holds
    "kind" ("train" or "valid"), "step" and numbers; a number that is not finite is null.
    """

    def __init__(self, folder: str | Path, step: int, tracker: Any = None, write: bool = True):
        self.path = Path(folder) / "metrics.jsonl"
        found = read_records(self.path) if step else []
        self.records = [record for record in found if record.get("step", step + 1) <= step]
        self.tracker, self._file = (tracker, None) if write else (None, None)
        if write:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
            self._file = self.path.open("a")

    def add(self, kind: str, step: int, values: dict[str, float]) -> None:
        record = {"kind": kind, "step": step, **{name: _plain(value) for name, value in values.items()}}
        self.records.append(record)
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self.tracker:
            self.tracker.log(step, {name: float(value) for name, value in values.items()})

    def sync(self) -> None:
        """Everything recorded is on disk. A checkpoint must not outlive its records."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self.sync()
            self._file.close()
        if self.tracker:
            self.tracker.finish()


def _plain(value: Any) -> float | int | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None
