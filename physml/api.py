"""The verbs on runs: train one, open one. A run is a folder that describes itself.

runs/NAME/{config.yaml, spec.json, start_from.json, environment.json, log.txt, metrics.jsonl, checkpoints/STEP/, model/,
           scores.nc, scores.json, sample.nc, report.html}; scores of other splits in scores-SPLIT.nc and so on
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
import re
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
from physml.convert.named import load
from physml.data import MixtureConfig, SyntheticConfig, XarrayDataset, fit_normalizer
from physml.data.store import exclusive
from physml.errors import CheckpointError, ConfigError
from physml.evaluate import RolloutScores, evaluate_stepper, save_scores
from physml.experiment import Experiment, load_experiment, to_dict, to_yaml
from physml.layers.lora import adapted, add_lora, parameters, trained_share
from physml.metrics.table import file_of
from physml.parallel.mesh import Layout, on_first_process
from physml.progress import Silent
from physml.report import report
from physml.saving import LoadReport, build_stepper
from physml.steppers import STEPPERS, Members
from physml.steppers.describe import parameter_count
from physml.training import fit, fit_members, spread_members

START = "start_from.json"  # in a run folder: what was loaded before training
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
    def loaded(self) -> LoadReport | None:
        """What became of the weights that training started from; None where it started from none."""
        path = self.folder / START
        return LoadReport.from_dict(json.loads(path.read_text())) if path.is_file() else None

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

    Raises ConfigError, DataError or SpecError for input that does not fit, DataError while another process trains into
    the same folder, DivergedError when the loss is not finite, Interrupted after SIGTERM or SIGINT (the state is saved;
    resume with `resume="auto"`).
    """
    experiment = load_experiment(source, overrides)
    if name:
        experiment = dataclasses.replace(experiment, name=name)
    path, progress = Path(folder) / experiment.name, progress or Silent()
    experiment, source, layout = prepare(experiment)
    seeds = experiment.seeds
    splits = open_data(experiment, progress) if splits is None else splits
    check_splits(splits)
    with layout.use(), contextlib.ExitStack() as held:
        stepper, loaded = first_stepper(_of_seed(experiment, 0), splits["train"], _member(source, 0))
        validate = _validation(experiment, stepper, splits, layout)
        if seeds and not parameter_count(stepper):
            raise ConfigError("seeds asks for an ensemble, but the stepper has no network: all would be the same.")

        def claim():
            held.enter_context(exclusive(path, wait=False))
            _claim(path, experiment, resume, overwrite)
            _describe(path, experiment, stepper, loaded)

        on_first_process(claim)
        if parameter_count(stepper):
            progress.stage("training")
            arguments = (splits, experiment.objective, experiment.training, layout, path)
            options = {"validate": validate, "progress": progress, "tracker": tracker, "resume": resume}
            if seeds:
                others = [
                    first_stepper(_of_seed(experiment, i), splits["train"], _member(source, i), stepper.normalizer)[0]
                    for i in range(1, len(seeds))
                ]
                stepper = fit_members([stepper, *others], *arguments, seeds=seeds, **options).stepper
            else:
                stepper = fit(stepper, *arguments, seed=experiment.seed, **options).stepper
        run = Run(path)
        if jax.process_index() == 0:
            saving.save(stepper, path / "model", overwrite=True)
            if scored and "test" in splits:
                progress.message("Scoring on the test split ...")
                score(run, splits, stepper)
                report([path], path / "report.html")
    return run


def prepare(experiment: Experiment) -> tuple[Experiment, Any, Layout]:
    """What is known before any data are opened: the complete experiment, what it starts from, its devices.

    Raises ConfigError for parts that do not fit each other.
    """
    if experiment.data is None:
        raise ConfigError("The experiment has no data: set `data` to a DataConfig or a SyntheticConfig.")
    layout, seeds = experiment.layout, experiment.seeds
    layout = spread_members(layout, len(seeds)) if seeds else layout
    layout.check_batch(experiment.training.batch)
    source = open_source(experiment)
    return complete(experiment, source), source, layout


def check_splits(splits: dict[str, Any]) -> None:
    """Raises ConfigError where there is nothing to train on."""
    if "train" not in splits:
        raise ConfigError(f"The data have no split 'train', only {', '.join(splits) or 'none'}. Give `data` one.")


def _of_seed(experiment: Experiment, number: int) -> Experiment:
    """The experiment of one member; itself where it is no ensemble."""
    return dataclasses.replace(experiment, seed=experiment.seeds[number], seeds=()) if experiment.seeds else experiment


def open_data(experiment: Experiment, progress: Any = None) -> dict[str, XarrayDataset]:
    """The splits of an experiment; generates those that are solved and not in the cache yet."""
    if isinstance(experiment.data, SyntheticConfig | MixtureConfig):
        return experiment.data.open(progress)
    return experiment.data.open()


def initial_stepper(experiment: Experiment, train_split: XarrayDataset) -> Any:
    """The stepper before training: fitted normalizer, fresh or given weights; without a network a fitted floor."""
    source = open_source(experiment)
    return first_stepper(complete(experiment, source), train_split, _member(source, 0))[0]


def open_source(experiment: Experiment) -> Any:
    """The stepper or bare model that `start_from` names; None where it names none.

    Raises ConfigError for an ensemble where the experiment does not train as many seeds.
    """
    start = experiment.start_from
    source = None if start is None else load(start.path, weights=start.weights or None)
    if isinstance(source, Members) and source.count != len(experiment.seeds):
        raise ConfigError(
            f"start_from={start.path!r} is an ensemble of {source.count}, and the experiment trains "
            f"{len(experiment.seeds) or 1}. Give `seeds` as many numbers, and each member starts from its own; or "
            f"start from one of them: physml.save(physml.load({start.path!r}).member(0), FOLDER)."
        )
    return source


def _member(source: Any, number: int) -> Any:
    """What the member of an ensemble starts from: its own one of an ensemble, or what all start from."""
    return source.member(number) if isinstance(source, Members) else source


def complete(experiment: Experiment, source: Any) -> Experiment:
    """The experiment with model and stepper of `source` where it names no model itself.

    Raises ConfigError where a stepper is named that is not the one of the source, since one of both would be ignored,
    and for `lora` without a source.
    """
    if experiment.lora and source is None:
        raise ConfigError("lora changes trained weights a little, but start_from names none. Set start_from.")
    if source is None or experiment.model is not None:
        return experiment
    model = source if not hasattr(source, "spec") else getattr(source, "model", None)
    if model is None:
        raise ConfigError(f"start_from={experiment.start_from.path!r} has no network: nothing can be taken from it.")
    config = getattr(source, "config", None) if model is not source else experiment.stepper
    if experiment.stepper not in (config, Experiment().stepper):
        raise ConfigError(
            f"The experiment has no model, so model and stepper are those of {experiment.start_from.path}, but its own "
            f"stepper is another one: {experiment.stepper}, not {config}. Name the model too, or leave the stepper out."
        )
    return dataclasses.replace(experiment, model=model.config, stepper=config)


def first_stepper(
    experiment: Experiment, train_split: XarrayDataset, source: Any = None, normalizer: Any = None
) -> tuple[Any, LoadReport | None]:
    """As `initial_stepper`, of a complete experiment, with a report of what was loaded from `source`."""
    spec, start, lora = train_split.spec, experiment.start_from, experiment.lora
    if experiment.stepper.signature(spec) is None:
        if start or lora:
            raise ConfigError(
                f"{type(experiment.stepper).__name__} has no network: start_from and lora cannot go with it."
            )
        return fit_floor(experiment.stepper, train_split), None
    if experiment.model is None:
        raise ConfigError("The experiment has no model: set `model`, e.g. model=FNOConfig(modes=(16, 16)).")
    intervals = getattr(experiment.stepper, "intervals", ())
    if normalizer is None:
        normalizer = fit_normalizer(train_split, experiment.normalization, intervals=intervals)
    stepper = build_stepper(
        experiment.stepper, experiment.model, spec, normalizer, experiment.constraints, seed=experiment.seed
    )
    if source is None:
        return stepper, None
    loaded = saving.load_into(stepper, source, start.path, strict=start.strict, normalizer=start.normalizer)
    log.info("%s", loaded)
    _check_untrained(experiment, stepper, loaded)
    if lora:
        stepper = add_lora(stepper, lora, experiment.seed)
        log.info("LoRA in %d layers: training changes %s of %s numbers.", len(adapted(stepper)),
                 *(f"{count:,}" for count in trained_share(stepper)))  # fmt: skip
    return stepper, loaded


def _check_untrained(experiment: Experiment, stepper: Any, loaded: LoadReport) -> None:
    """Raises ConfigError where random numbers that the checkpoint did not fill would be frozen."""
    lora, own = experiment.lora, parameters(stepper)
    frozen = [
        path
        for path in loaded.untrained
        if path in own
        and (
            experiment.training.optimizer.freezes(path)
            or (lora and not (lora.train and re.search(lora.train, path)))
        )
    ]  # fmt: skip
    if frozen:
        advice = "name them in lora.train" if lora else "take them out of the groups whose rate is 0"
        raise ConfigError(
            f"{loaded.source} does not fill {', '.join(frozen[:5])}{' and others' if len(frozen) > 5 else ''}: they "
            f"would stay random, because they are frozen. To train them, {advice}."
        )


def _validation(
    experiment: Experiment, stepper: Any, splits: dict[str, XarrayDataset], layout: Layout
) -> RolloutScores | None:
    if experiment.validation is None:
        return None
    if splits.get("valid") is None:
        raise ConfigError("The experiment has a validation by rollouts, but its data has no split 'valid'. Add one.")
    return RolloutScores(experiment.validation, stepper, splits["valid"], layout, experiment.seed)


def fit_floor(config: Any, train_split: XarrayDataset) -> Any:
    """A floor with its default options, fitted to the training split where it has something to fit."""
    if hasattr(config, "fit"):
        return config.fit(train_split)
    return config.build(train_split.spec, None, None)


def score(run: Run, splits: dict[str, XarrayDataset], stepper: Any = None, split: str = "test") -> xr.Dataset:
    """Scores a run and its floors on one split; writes scores.nc, scores.json and sample.nc into the run folder, for
    another split than test scores-SPLIT.nc, scores-SPLIT.json and sample-SPLIT.nc.

    Raises ConfigError for a split that the data lack.
    """
    settings = run.experiment.evaluation
    for needed in (split, *(["train"] if settings.floors else [])):
        if needed not in splits:
            raise ConfigError(
                f"Scoring {run.folder} on its split {split!r} needs the split {needed!r}, but its data have "
                f"{', '.join(splits) or 'none'}. Choose one of these, or give `data` that split."
            )
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
        key=jax.random.key(run.experiment.seed),
        sample=run.folder / file_of("sample.nc", split),
        name=run.experiment.name,
    )
    scores.attrs["split"] = split
    save_scores(scores, run.folder)
    return scores


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


def check_folder(path: Path, experiment: Experiment, resume: str, overwrite: bool) -> None:
    """Raises ConfigError for a run folder that holds something else."""
    config = path / "config.yaml"
    if not path.exists() or not any(path.iterdir()):
        return
    if not config.is_file():
        what = "so it is not overwritten" if overwrite else "so no run is begun there"
        raise ConfigError(f"{path} is not a run folder, {what}. Choose another --name.")
    if (overwrite and resume != "auto") or not _begun(path):
        return
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


def _claim(path: Path, experiment: Experiment, resume: str, overwrite: bool) -> None:
    """Makes the run folder, in the place of an older one where that is asked for."""
    check_folder(path, experiment, resume, overwrite)
    if path.exists() and overwrite and resume != "auto":
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)


def _begun(path: Path) -> bool:
    """Whether a run folder has anything to lose; one whose training was refused at its start has not."""
    records = path / "metrics.jsonl"
    recorded = records.is_file() and records.stat().st_size > 0
    return recorded or (path / "model").exists() or any((path / "checkpoints").glob("*"))


def _describe(path: Path, experiment: Experiment, stepper: Any, loaded: LoadReport | None) -> None:
    saving.write_text(path / "config.yaml", to_yaml(experiment))
    (path / START).unlink(missing_ok=True)
    if loaded is not None:
        saving.write_text(path / START, json.dumps(loaded.to_dict(), indent=1))
    saving.write_text(path / "spec.json", json.dumps(stepper.spec.to_dict()))
    saving.write_text(path / "environment.json", json.dumps({"version": physml.__version__, **environment()}, indent=1))
