"""Dataset cards: what a data set is, under which terms, and where its files come from.

A card is a folder `datasets/NAME` with CARD.md (the headings of `HEADINGS`) and, where its files can be fetched,
source.yaml. Cards lie beside the package in a checkout and inside it once installed.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from physml.errors import ConfigError, DataError, suggest

HEADINGS = (
    "Equation", "Variables and units", "Grid and boundary", "Parameters", "Splits", "Size", "License", "Citation",
    "How to get it", "Baseline scores",
)  # fmt: skip
FOLDERS = (Path(__file__).parents[1] / "datasets", Path(__file__).parents[2] / "datasets")  # installed, checkout


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from, as its source.yaml says.

    Attributes:
        name: of the data set, or of one part of it (`the_well/shear_flow`).
        urls: fsspec URLs of single files; {url: sha256 or None}.
        hub: id of a repository on the Hugging Face hub, or None. kind: "dataset" or "model".
        files: patterns of the files of the repository to fetch; all when empty.
        page: where a person finds the files.
        note: what is left to do by hand.
    """

    name: str
    urls: dict[str, str | None] = field(default_factory=dict, hash=False)
    hub: str | None = None
    kind: str = "dataset"
    files: tuple[str, ...] = ()
    page: str = ""
    note: str = ""

    def wants(self, file: str, patterns: tuple[str, ...]) -> bool:
        """Whether a file of the repository is to be fetched."""
        return all(not some or any(fnmatchcase(file, p) for p in some) for some in (self.files, patterns))


def folder() -> Path:
    """The folder of all cards. Raises DataError when it was not installed."""
    found = next((path for path in FOLDERS if any(path.glob("*/CARD.md"))), None)
    if found is None:
        raise DataError(f"The dataset cards are missing: {FOLDERS[0]} does not exist. Install physml again.")
    return found


def names() -> list[str]:
    """All cards."""
    return sorted(path.parent.name for path in folder().glob("*/CARD.md"))


def text(name: str) -> str:
    """The card. Raises ConfigError for an unknown name."""
    if name not in names():
        raise ConfigError(f"There is no dataset card {name!r}." + suggest(name, names()))
    return (folder() / name / "CARD.md").read_text(encoding="utf-8")


def sections(name: str) -> dict[str, str]:
    """The title of a card ("title") and its text by heading."""
    result, heading = {"title": ""}, None
    for line in text(name).splitlines():
        if line.startswith("# ") and not result["title"]:
            result["title"] = line[2:].strip()
        elif line.startswith("## "):
            heading = line[3:].strip()
            result[heading] = ""
        elif heading:
            result[heading] += line + "\n"
    return {key: value.strip() for key, value in result.items()}


def summaries() -> dict[str, dict[str, str]]:
    """Name -> one line each of what it is, its size and its license."""
    result = {}
    for name in names():
        parts = sections(name)
        result[name] = {
            "about": parts["title"],
            "size": first_sentence(parts.get("Size", "")),
            "license": first_sentence(parts.get("License", "")),
        }
    return result


def first_sentence(passage: str) -> str:
    """Of the first paragraph, on one line."""
    line = " ".join(passage.split("\n\n")[0].split())
    end = line.find(". ")
    return (line if end < 0 else line[:end]).removesuffix(".")


def sources() -> dict[str, Source]:
    """Everything that can be fetched or says where it is: name, or name/part -> source."""
    result = {}
    for name in names():
        path = folder() / name / "source.yaml"
        if path.is_file():
            result.update(read_source(name, path))
    return result


def source(name: str) -> Source:
    """The source of a card or of a part of it.

    Raises ConfigError for an unknown name, one that is generated, and one whose parts must be chosen from.
    """
    known = sources()
    card, _, part = name.partition("/")
    if name in known:
        return known[name]
    parts = sorted(key for key in known if key.startswith(f"{card}/"))
    if part in ("", None) and parts:
        raise ConfigError(f"{name} has several parts. Choose one of them: {', '.join(parts)}.")
    if parts:
        raise ConfigError(f"{card} has no part {part!r}." + suggest(name, parts))
    if name in names():
        how = " ".join(sections(name).get("How to get it", "").split())
        raise ConfigError(f"The files of {name} cannot be fetched. Its card says how to get them: {how}")
    close = difflib.get_close_matches(name, [*known, *names()], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"There is no dataset card {name!r}, and it is no URL.{hint} Can be fetched: "
        f"{', '.join(dict.fromkeys(key.partition('/')[0] for key in known))}; "
        "or give a URL such as https://host/file.nc."
    )


def read_source(name: str, path: Path) -> dict[str, Source]:
    """The sources of one source.yaml. Raises DataError where it is not as it should be."""
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(stored, dict):
        raise DataError(f"{path} should hold keys such as hub or urls.")
    parts = stored.get("parts")
    if parts is None:
        return {name: _source(name, stored, path)}
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"{path}: parts should be a list of names, but it is {parts!r}.")
    shared = {key: value for key, value in stored.items() if key != "parts"}
    return {f"{name}/{part}": _source(f"{name}/{part}", shared, path, part) for part in parts}


def _source(name: str, stored: dict[str, Any], path: Path, part: str = "") -> Source:
    known = {f.name for f in dataclasses.fields(Source)} - {"name"}
    if unknown := set(stored) - known:
        raise DataError(f"{path} has an unknown key {min(unknown)!r}." + suggest(min(unknown), known))
    urls, files = stored.get("urls", {}), stored.get("files", [])
    if not isinstance(urls, dict) or not all(isinstance(item, str) for item in (*urls, *files)):
        raise DataError(f"{path}: urls should map addresses to sha256 or null, and files should be a list of patterns.")
    texts = {
        key: str(stored[key]).replace("{part}", part).strip() for key in known - {"urls", "files"} if key in stored
    }
    if not (urls or texts.get("hub") or texts.get("page")):
        raise DataError(f"{path}: {name} has neither urls, hub nor page.")
    return Source(name, urls=urls, files=tuple(files), **texts)
