"""Progress of a long job: a bar on a terminal, plain lines now and then elsewhere (log files get no control codes)."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What long jobs report to. Calls are cheap: they may come at every step."""

    def update(self, done: int, total: int, **values: Any) -> None:
        """`done` of `total` units; `values` such as loss or rate are shown beside."""
        ...

    def message(self, text: str) -> None:
        """One line for the reader, e.g. that the first step compiles."""
        ...

    def stage(self, what: str) -> None:
        """Another job begins; counting starts anew."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, done: int, total: int, **values: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def stage(self, what: str) -> None:
        pass


class Lines:
    """One line at the start, at most one every `seconds`, and one at the end."""

    def __init__(self, what: str, seconds: float = 10.0, stream: TextIO | None = None):
        self.what, self.seconds, self.stream = what, seconds, stream or sys.stderr
        self.start = self.shown = None
        self.first = 0

    def update(self, done: int, total: int, **values: Any) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start, self.first = now, done
        if done < total and self.shown is not None and now - self.shown < self.seconds:
            return
        self.shown = now
        left = (now - self.start) / max(done - self.first, 1) * (total - done)
        eta = f", {left:.0f} s left" if self.first < done < total else ""
        shown = "".join(f", {name} {_format(value)}" for name, value in values.items() if value is not None)
        self.message(f"{self.what}: {done}/{total}{shown}{eta}")

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def stage(self, what: str) -> None:
        self.what, self.start, self.shown = what, None, None


class Bar:
    """A rich bar with rate and time left."""

    def __init__(self, bar: Any, what: str):
        self.bar = bar
        self.stage(what)

    def update(self, done: int, total: int, **values: Any) -> None:
        now = time.monotonic()
        if done < total and now - self.shown < 0.1:
            return
        self.shown = now
        text = "  ".join(f"{name} {_format(value)}" for name, value in values.items() if value is not None)
        self.bar.update(self.task, completed=done, total=total, values=text)

    def message(self, text: str) -> None:
        self.bar.console.print(text)

    def stage(self, what: str) -> None:
        self.task = self.bar.add_task(what, total=None, values="")
        self.shown = 0.0


@contextlib.contextmanager
def open_progress(what: str, quiet: bool = False) -> Iterator[Progress]:
    """The progress that suits where stderr goes."""
    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield Lines(what)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )  # fmt: skip
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            yield Bar(bar, what)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
