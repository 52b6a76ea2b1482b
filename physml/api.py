"""The verbs on runs: train one, open one. A run is a folder that describes itself.

runs/NAME/{config.yaml, spec.json, environment.json, log.txt, metrics.jsonl, checkpoints/STEP/, model/, scores.nc,
           scores.json, sample.nc, report.html}
"""

import dataclasses
import functools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import xarray as xr

import physml
from physml import saving
from physml.data import MixtureConfig, SyntheticConfig, XarrayDataset, fit_normalizer
from physml.errors import CheckpointError, ConfigError
from physml.evaluate import evaluate_stepper, save_scores
from physml.experiment import Experiment, load_experiment, to_dict, to_yaml
from physml.progress import Silent
from physml.report import report
from physml.saving import build_stepper
from physml.steppers import STEPPERS
from physml.training import fit

log = logging.getLogger("physml")


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
    def scores(self) -> xr.Dataset:
        """Scores on the test split: dims `(model, metric, channel, lead)`."""
        path = self.folder / "scores.nc"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no scores.nc: run `physml evaluate {self.folder}` first.")
        with xr.open_dataset(path) as scores:
            return scores.load()


def open_run(folder: str | Path) -> Run:
    """A run on disk. Raises CheckpointError when the folder is none."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is no run folder: it holds no config.yaml. Runs are made by `physml train`.")
    return Run(folder)


def train(
    source: Experiment | str | Path,
    overrides: Iterable[str] = (),
    *,
    name: str | None = None,
    folder: str | Path = "runs",
    resume: str = "never",
    overwrite: bool = False,
    progress: Any = None,
    tracker: Any = None,
    splits: dict[str, Any] | None = None,
    scored: bool = True,
) -> Run:
    """Trains, scores on the test split and writes a report.

    Args:
        source: an experiment, or a .py or .yaml file that holds one.
        overrides: assignments such as "model.width=32".
        name: folder of the run; the experiment's own name if not given.
        folder: where runs are kept.
        resume: "auto" continues the newest complete checkpoint of the same run, "never" refuses an existing run.
        overwrite: replace an existing run.
        progress: receives the state of the training, see `physml.training.Progress`.
        tracker: receives the logged numbers, see `physml.training.tracking`.
        splits: the experiment's data, where they are open already.
        scored: whether to score and report; False leaves that to the caller.

    Raises ConfigError, DataError or SpecError for input that does not fit, DivergedError when the loss is not finite,
    Interrupted after SIGTERM or SIGINT (the state is saved; resume with `resume="auto"`).
    """
    experiment = load_experiment(source, overrides)
    if name:
        experiment = dataclasses.replace(experiment, name=name)
    if experiment.data is None:
        raise ConfigError("The experiment has no data: set `data` to a DataConfig or a SyntheticConfig.")
    path = Path(folder) / experiment.name
    experiment.layout.check_batch(experiment.training.batch)
    progress = progress or Silent()
    splits = open_data(experiment, progress) if splits is None else splits
    with experiment.layout.use():
        stepper = initial_stepper(experiment, splits["train"])
        _claim(path, experiment, resume, overwrite)
        _describe(path, experiment, stepper)
        if parameter_count(stepper):
            progress.stage("training")
            stepper = fit(
                stepper, splits, experiment.objective, experiment.training, experiment.layout, path,
                seed=experiment.seed, progress=progress, tracker=tracker, resume=resume,
            ).stepper  # fmt: skip
        run = Run(path)
        if jax.process_index() == 0:
            saving.save(stepper, path / "model", overwrite=True)
            if scored and "test" in splits:
                progress.message("Scoring on the test split ...")
                score(run, splits, stepper)
                report([path], path / "report.html")
    return run


def open_data(experiment: Experiment, progress: Any = None) -> dict[str, XarrayDataset]:
    """The splits of an experiment; generates those that are solved and not in the cache yet."""
    if isinstance(experiment.data, SyntheticConfig | MixtureConfig):
        return experiment.data.open(progress)
    return experiment.data.open()


def initial_stepper(experiment: Experiment, train_split: XarrayDataset) -> Any:
    """The stepper before training: fitted normalizer, fresh or given weights; without a network a fitted floor."""
    spec = train_split.spec
    if experiment.stepper.signature(spec) is None:
        return fit_floor(experiment.stepper, train_split)
    if experiment.model is None:
        raise ConfigError("The experiment has no model: set `model`, e.g. model=FNOConfig(modes=(16, 16)).")
    if experiment.start_from:
        stepper = saving.load(experiment.start_from)
        stepper.spec.check_same(spec, mine=experiment.start_from, theirs="the training data")
        return stepper
    normalizer = fit_normalizer(train_split, experiment.normalization)
    constraints = tuple(constraint.build(spec) for constraint in experiment.constraints)
    return build_stepper(experiment.stepper, experiment.model, spec, normalizer, constraints, seed=experiment.seed)


def fit_floor(config: Any, train_split: XarrayDataset) -> Any:
    """A floor with its default options, fitted to the training split where it has something to fit."""
    if hasattr(config, "fit"):
        return config.fit(train_split)
    return config.build(train_split.spec, None, None)


def score(run: Run, splits: dict[str, XarrayDataset], stepper: Any = None, split: str = "test") -> xr.Dataset:
    """Scores a run and its floors on one split; writes scores.nc, scores.json and sample.nc into the run folder."""
    settings = run.experiment.evaluation
    floors = {name: fit_floor(STEPPERS[name](), splits["train"]) for name in settings.floors}
    scores = evaluate_stepper(
        stepper if stepper is not None else run.stepper,
        splits[split],
        settings.steps,
        starts=settings.starts or None,
        batch=settings.batch,
        floors=floors,
        metrics=settings.metrics or None,
        spectrum_leads=settings.spectrum_leads or None,
        sample=run.folder / "sample.nc",
        name=run.experiment.name,
    )
    save_scores(scores, run.folder)
    return scores


def parameter_count(module: Any) -> int:
    """Trainable numbers of a model or stepper."""
    from flax import nnx

    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


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


def _claim(path: Path, experiment: Experiment, resume: str, overwrite: bool) -> None:
    """Makes the run folder, or refuses one that holds something else."""
    if jax.process_index() != 0:
        return
    config = path / "config.yaml"
    if path.exists() and overwrite and resume != "auto":
        if any(path.iterdir()) and not config.is_file():
            raise ConfigError(f"{path} is not a run folder, so it is not overwritten. Choose another --name.")
        shutil.rmtree(path)
    if config.is_file():
        if resume != "auto":
            raise ConfigError(
                f"{path} already holds a run. Continue it with --resume auto, replace it with --overwrite, "
                "or choose another --name."
            )
        before = to_dict(load_experiment(config))
        changed = [key for key, value in to_dict(experiment).items() if before.get(key) != value]
        allowed = {"layout", "evaluation"}  # a run continues on other devices, and may be scored otherwise
        if set(changed) - allowed:
            raise ConfigError(
                f"{path} was started with other settings of {sorted(set(changed) - allowed)}: it cannot be continued "
                "with these. Use the same settings, or choose another --name."
            )
    elif path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path} exists and is not a run folder. Choose another --name.")
    path.mkdir(parents=True, exist_ok=True)


def _describe(path: Path, experiment: Experiment, stepper: Any) -> None:
    if jax.process_index() != 0:
        return
    saving.write_text(path / "config.yaml", to_yaml(experiment))
    saving.write_text(path / "spec.json", json.dumps(stepper.spec.to_dict()))
    saving.write_text(path / "environment.json", json.dumps({"version": physml.__version__, **environment()}, indent=1))
