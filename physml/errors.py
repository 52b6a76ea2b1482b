"""Typed errors. Each message says what came, what was expected and what to do next.

Catch `PhysmlError` to catch them all. The command line prints the message as one line and exits with 2; with
1 after a DivergedError, with 75 after an Interrupted.
"""

import difflib
import os
from collections.abc import Iterable

LISTED = 20  # names of a folder in a message


class PhysmlError(Exception):
    """Root of every error that physml raises on purpose."""


class ConfigError(PhysmlError, ValueError):
    """An option, an experiment field or a combination of them that cannot work."""


class SpecError(PhysmlError, ValueError):
    """Names, units, grids or shapes that do not fit each other."""


class DataError(PhysmlError, ValueError):
    """A data file that is missing, damaged, incomplete, or holds values that are not allowed."""


class CheckpointError(PhysmlError, ValueError):
    """A saved run or model that is missing, damaged, or does not fit the program that reads it."""


class ConversionError(PhysmlError, ValueError):
    """Foreign weights that do not match the model they are converted to."""


class DivergedError(PhysmlError, ArithmeticError):
    """Training or a rollout left the finite numbers."""


class Interrupted(PhysmlError):
    """A training or rollout stopped on request (SIGTERM, SIGINT), its state saved; the command line exits with 75.

    75 is EX_TEMPFAIL of sysexits.h: try again later, with `--resume auto`.
    """

    exit_code = 75


class DependencyError(PhysmlError, ImportError):
    """An optional package is absent; the message names the extra to install."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """ " Did you mean 'x'? Valid: ..." for an unknown `name`; to be put at the end of a message."""
    valid = sorted(map(str, valid))
    return f"{_nearest(str(name), valid)} Valid: {', '.join(valid) or 'none'}."


def suggest_path(path: str, suffixes: tuple[str, ...] = ()) -> str:
    """As `suggest`, for a path that is not there: what its folder has, without hidden files and other suffixes."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return " Its folder is not there either."
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    names = [name for name in names if not suffixes or name.endswith(suffixes)]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    found = f" Its folder has {', '.join(names[:LISTED])}{more}." if names else ""
    return _nearest(os.path.basename(path), names) + found


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """Of its message, 200 letters at most; the kind of an error that has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def nearest_paths(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The dotted paths that have most in common with a regular expression, longest common pieces first."""
    words = "".join(letter for letter in pattern if letter.isalnum() or letter in "._")

    def common(path: str) -> int:
        blocks = difflib.SequenceMatcher(None, words, path, autojunk=False).get_matching_blocks()
        return sum(block.size**2 for block in blocks)

    return sorted(paths, key=lambda path: (-common(path), len(path), path))[:count]
