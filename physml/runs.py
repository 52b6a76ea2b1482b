"""A run on disk: a folder that describes itself.

runs/NAME/{config.yaml, spec.json, start_from.json, environment.json, metrics.jsonl, checkpoints/STEP/, model/,
           scores.nc, scores.json, metrics.csv, metrics.json, sample.nc, report.html}; scores of other splits in
           scores-SPLIT.nc and so on
"""

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import xarray as xr

import physml
from physml import saving
from physml.errors import CheckpointError, ConfigError
from physml.experiment import Experiment, load_experiment, to_dict, to_yaml
from physml.files import read_records, write_text
from physml.metrics.table import load_scores
from physml.saving import LoadReport

START = "start_from.json"  # what was loaded before training
RECORDS = "metrics.jsonl"
MAY_CHANGE = ("steps", "epochs", "checkpoint_every", "keep", "log_every", "validate_every", "patience", "threads")


@dataclass(frozen=True)
class Run:
    """A finished or running experiment on disk."""

    folder: Path

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The resolved experiment."""
        return load_experiment(self.folder / "config.yaml")

    @functools.cached_property
    def stepper(self) -> Any:
        """The trained stepper: model, normalizer and constraints."""
        return saving.load(self.folder)

    @functools.cached_property
    def loaded(self) -> LoadReport | None:
        """What became of the weights that training started from; None where it started from none."""
        path = self.folder / START
        return LoadReport.from_dict(json.loads(path.read_text())) if path.is_file() else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl so far: "kind" ("train" or "valid"), "step" and numbers (None: not finite)."""
        return read_records(self.folder / RECORDS)

    @functools.cached_property
    def scores(self) -> xr.Dataset:
        """Scores on the test split: dims `(model, metric, channel, lead)`."""
        if not (self.folder / "scores.nc").is_file():
            raise CheckpointError(f"{self.folder} has no scores.nc: run `physml evaluate {self.folder}` first.")
        return load_scores(self.folder)


def open_run(folder: str | Path) -> Run:
    """A run on disk. Raises CheckpointError when the folder is none."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is no run folder: it holds no config.yaml. Runs are made by `physml train`.")
    return Run(folder)


def check_folder(path: Path, experiment: Experiment, resume: str, overwrite: bool) -> None:
    """Raises ConfigError for a run folder that holds something else, or that cannot be written."""
    config = path / "config.yaml"
    _check_writable(path)
    if not path.exists():
        return
    if _of_others(path):
        what = "so it is not overwritten" if overwrite else "so no run is begun there"
        raise ConfigError(f"{path} is not a run folder, {what}. Choose another --name.")
    if (overwrite and resume != "auto") or not _begun(path):
        return
    if resume != "auto":
        raise ConfigError(
            f"{path} already holds a run. Continue it with --resume auto, replace it with --overwrite, "
            "or choose another --name."
        )
    before, now = (_settled(to_dict(given)) for given in (load_experiment(config), experiment))
    if changed := sorted(name for name in before | now if before.get(name) != now.get(name)):
        raise ConfigError(
            f"{path} was started with other settings of {changed}: it cannot be continued with these. Use the same "
            "settings, or choose another --name."
        )


def _settled(experiment: dict[str, Any]) -> dict[str, Any]:
    """What a run may not change when it is continued, by dotted name: it may on other devices, for longer, with other
    reports, and be scored otherwise."""
    training = {f"training.{name}": value for name, value in experiment["training"].items() if name not in MAY_CHANGE}
    others = {name: value for name, value in experiment.items() if name not in ("layout", "evaluation", "training")}
    return {**others, **training}


def _of_others(path: Path) -> bool:
    """Whether a folder holds something that is no run."""
    return path.exists() and any(path.iterdir()) and not (path / "config.yaml").is_file()


def _check_writable(path: Path) -> None:
    """Makes a folder where `path` would be made, and takes it away again: permissions do not tell everything."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".physml-", dir=there)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose a folder that you may write to."
        ) from error


@contextlib.contextmanager
def claimed(path: Path, experiment: Experiment, resume: str, overwrite: bool) -> Iterator[None]:
    """Makes the run folder, in the place of an older run where that is asked for.

    The older one is set aside, comes back where the training in its place ends before it has anything to keep, and is
    removed in the end. What a killed process has left aside comes back here too.
    """
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and _begun(path):
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir() and not _of_others(path):
        shutil.rmtree(path, ignore_errors=True)
        os.replace(old, path)
    check_folder(path, experiment, resume, overwrite)
    aside = path.exists() and overwrite and resume != "auto"
    if aside:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if aside and _begun(path):
            shutil.rmtree(old, ignore_errors=True)
        elif aside:
            shutil.rmtree(path, ignore_errors=True)
            os.replace(old, path)


def _begun(path: Path) -> bool:
    """Whether a run folder has anything to lose; one whose training was refused at its start has not."""
    records = path / RECORDS
    recorded = records.is_file() and records.stat().st_size > 0
    return recorded or (path / "model").exists() or any((path / "checkpoints").glob("*"))


def describe(path: Path, experiment: Experiment, stepper: Any, loaded: LoadReport | None) -> None:
    """Writes what a run is of: its settings, its fields, its surroundings, and what it started from."""
    write_text(path / "config.yaml", to_yaml(experiment))
    (path / START).unlink(missing_ok=True)
    if loaded is not None:
        write_text(path / START, json.dumps(loaded.to_dict(), indent=1))
    write_text(path / "spec.json", json.dumps(stepper.spec.to_dict()))
    write_text(path / "environment.json", json.dumps({"version": physml.__version__, **environment()}, indent=1))


def environment() -> dict[str, Any]:
    """Versions, devices and git state: what a result depends on besides its config."""
    packages = ("physml", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "xarray", "exponax")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "git": _git_state(),
        "command": sys.argv,
    }


def _git_state() -> dict[str, Any] | None:
    def git(*words):
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()[:50]}
    except (OSError, subprocess.SubprocessError):
        return None
