"""The command line: thin verbs over the Python API. Nothing numerical is imported before a verb runs.

Exit codes: 0 done; 1 failed (training or a rollout left the finite numbers, or a defect); 2 bad usage or bad input;
75 interrupted with its state saved (resume with `--resume auto`), 130 interrupted otherwise.
"""

import dataclasses
import inspect
import json
import logging
import os
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from physml.verbs.benchmark import Benchmark
from physml.verbs.common import Assignments, Common, Words, first_line, frames_until, headline, progress_of, split_names
from physml.verbs.data import VERBS as DATA_VERBS
from physml.verbs.export import Export
from physml.verbs.finetune import Finetune
from physml.verbs.rollout import Rollout
from physml.verbs.train import Train


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Score a run on its own test split, or a stored forecast against the truth.

    Example: physml evaluate runs/demo
    Example: physml evaluate runs/demo --split train
    Example: physml evaluate forecast.zarr --truth truth.nc --out scores.nc
    Example: physml evaluate forecast.zarr --truth truth.nc --climatology climatology.nc --floor climatology
    """

    subject: tyro.conf.Positional[str]
    """A run, or a forecast file."""
    truth: str | None = None
    """Dataset with the true fields; needed for a forecast file."""
    out: Path | None = None
    """Scores of a forecast file are written here; those of a run go into its folder."""
    overwrite: bool = False
    """Replace the file --out."""
    set: Assignments = ()
    """For a run: override a field of its evaluation or data, e.g. --set evaluation.steps=50."""
    split: Literal["test", "valid", "train"] = "test"
    """For a run: the split to score on; others than test leave scores-SPLIT.nc and report-SPLIT.html."""
    trajectory: int | None = None
    """For a forecast file: the trajectory of the truth, from 0, that a forecast of one trajectory started from."""
    climatology: str | None = None
    """For a forecast file: dataset of the mean state, e.g. by dayofyear and hour, for ACC and skill."""
    floor: Assignments = ()
    """For a forecast file: score `persistence` or `climatology` beside it; may be repeated."""
    metric: Assignments = ()
    """For a forecast file: a score by name, e.g. rmse; all that apply by default; may be repeated."""
    scheduler: str | None = None
    """For a forecast file: address of a dask.distributed cluster, e.g. tcp://HOST:8786; threads by default."""

    def run(self) -> dict[str, Any]:
        from physml.errors import ConfigError

        if (Path(self.subject) / "config.yaml").is_file():
            return self._run_folder()
        if self.truth is None:
            if "://" not in self.subject and not Path(self.subject).exists():
                raise ConfigError(f"There is no {self.subject}. Name the folder of a run, or the file of a forecast.")
            raise ConfigError(f"{self.subject} is no run folder, so it is read as a forecast: give --truth FILE.")
        if self.set or self.split != "test":
            given = "--set" if self.set else "--split"
            raise ConfigError(f"{given} is for a run, but {self.subject} is a forecast, scored against --truth.")
        if self.out is not None and self.out.suffix != ".nc":
            raise ConfigError(f"--out is {self.out}, but scores are netCDF: end it in .nc.")
        if self.out is not None and self.out.exists():
            if not self.overwrite:
                raise ConfigError(f"{self.out} exists. Choose another --out, or pass --overwrite.")
            read = [Path(name).resolve() for name in (self.subject, self.truth, self.climatology) if name]
            if self.out.resolve() in read:
                raise ConfigError(f"--out is {self.out}, which is read for these scores. Choose another --out.")
        from physml.data import open_dataset
        from physml.evaluate import evaluate
        from physml.metrics.table import write_netcdf

        prediction, truth = open_dataset(self.subject), frames_until(open_dataset(self.truth), None, self.trajectory)
        climatology = None if self.climatology is None else open_dataset(self.climatology)
        if self.dry_run:
            return {"would score": self.subject, "against": self.truth}
        scores = evaluate(
            prediction, truth, metrics=self.metric or None, climatology=climatology, floors=self.floor,
            scheduler=self.scheduler,
        )  # fmt: skip
        if self.out:
            write_netcdf(scores, self.out)
        return {"scores": headline(scores), "out": str(self.out) if self.out else None}

    def _run_folder(self) -> dict[str, Any]:
        from physml.api import check_split, score
        from physml.errors import ConfigError
        from physml.experiment import load_experiment
        from physml.metrics.table import file_of
        from physml.report import report
        from physml.runs import open_run

        for name in ("truth", "out", "climatology", "floor", "metric", "scheduler", "trajectory", "overwrite"):
            if getattr(self, name) not in (None, ()) and getattr(self, name) is not False:
                raise ConfigError(
                    f"--{name} is for a forecast file, but {self.subject} is a run, which is scored as its "
                    "configuration says. Change that with --set, e.g. --set 'evaluation.metrics=[rmse]'."
                )
        for assignment in self.set:
            if assignment.partition("=")[0].strip().split(".")[0] not in ("evaluation", "data"):
                raise ConfigError(
                    f"--set {assignment} cannot be: {self.subject} is trained already. When it is scored, only fields "
                    "of `evaluation` and `data` can be set."
                )
        run = open_run(self.subject)
        experiment = load_experiment(run.experiment, self.set)
        if self.dry_run:
            check_split(run, split_names(experiment.data), run.stepper, self.split, experiment.evaluation)
            return {"would score": self.subject, "split": self.split, "steps": experiment.evaluation.steps}
        with progress_of(self, "generating") as progress:
            splits = experiment.data.open(progress)
        scores = score(run, splits, split=self.split, evaluation=experiment.evaluation)
        page = report([run.folder], run.folder / file_of("report.html", self.split), split=self.split)
        return {"scores": headline(scores), "split": self.split, "report": str(page)}


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """One self-contained page about one run, or comparing several.

    Example: physml report runs/narrow runs/wide --out comparison.html
    Example: physml report scores.nc
    """

    runs: Words
    """Run folders, or files of scores (.nc) as `physml evaluate --out` writes them."""
    out: Path = Path("report.html")
    """The page, which ends in .html, or a folder for report.html; an older page there is replaced."""
    split: Literal["test", "valid", "train"] = "test"
    """Whose scores of run folders are shown, as `physml evaluate RUN --split` leaves them."""
    title: str | None = None
    """Of the page; the names of the runs if not given."""

    def run(self) -> dict[str, Any]:
        from physml.errors import ConfigError
        from physml.metrics.table import load_scores
        from physml.runs import open_run

        if not self.runs:
            raise ConfigError("Name at least one run folder, or file of scores.")
        if self.out.suffix not in ("", ".html"):
            raise ConfigError(f"--out is {self.out}, but a page ends in .html.")
        folders = [Path(run) if run.endswith(".nc") else open_run(run).folder for run in self.runs]
        for file in (folder for folder in folders if folder.suffix == ".nc" and not folder.is_dir()):
            load_scores(file)
        if self.dry_run:
            return {"would write": str(self.out), "runs": list(map(str, folders))}
        from physml.report import report

        return {"report": str(report(folders, self.out, title=self.title, split=self.split))}


@dataclass(frozen=True, kw_only=True)
class Convert(Common):
    """Turn the weights of an architecture's authors into a physml model.

    Example: physml convert fno --config config.json --weights weights.safetensors --out models/fno
    """

    family: tyro.conf.Positional[str]
    """Whose code the weights are from; `physml models` lists the families."""
    config: Path = tyro.MISSING
    """JSON with the constructor's arguments."""
    weights: Path = tyro.MISSING
    """.safetensors, or .pt/.pth/.ckpt (read without running anything in it)."""
    out: Path = tyro.MISSING
    """Folder of the new model."""
    overwrite: bool = False
    """Replace an existing folder."""

    def run(self) -> dict[str, Any]:
        from physml.convert import convert

        return convert(self.family, self.config, self.weights, self.out, overwrite=self.overwrite, dry_run=self.dry_run)


@dataclass(frozen=True, kw_only=True)
class Models(Common):
    """List the architectures, or show the options of one.

    Example: physml models fno
    """

    name: tyro.conf.Positional[str | None] = None
    """The architecture to show."""

    def run(self) -> dict[str, Any]:
        from physml.convert import FAMILIES
        from physml.errors import ConfigError, suggest
        from physml.models import MODELS

        if self.name is None:
            rows = {name: first_line(sys.modules[config.__module__]) for name, config in MODELS.items()}
            return {"models": rows, "families that `physml convert` reads": sorted(FAMILIES)}
        if self.name not in MODELS:
            raise ConfigError(f"There is no model {self.name!r}." + suggest(self.name, MODELS))
        config = MODELS[self.name]
        hints = typing.get_type_hints(config)
        options = {f.name: f"{_type_name(hints[f.name])} = {f.default!r}" for f in dataclasses.fields(config)}
        return {"model": self.name, "about": inspect.cleandoc(config.__doc__), "options": options}


def _type_name(hint: Any) -> str:
    """As it is written: `int`, `tuple[int, ...]`, `Literal['gelu', 'relu']`."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Check this machine: versions, devices, a compile, collectives, folders.

    Example: physml doctor --json
    """

    def run(self) -> dict[str, Any]:
        if self.dry_run:
            return {"would check": ["versions", "devices", "compile", "collective", "cache"]}
        import time

        import jax
        import jax.numpy as jnp

        from physml.files import cache_folder
        from physml.parallel.mesh import Layout
        from physml.runs import environment

        result = environment()
        start = time.perf_counter()
        total = jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))).block_until_ready()
        result["compile and run"] = f"{time.perf_counter() - start:.2f} s"
        layout = Layout()
        ones = jax.device_put(jnp.ones(layout.mesh.size), layout.window_sharding())
        summed = jax.jit(jnp.sum, out_shardings=layout.replicated())(ones)
        result["collective"] = "ok" if int(summed) == layout.mesh.size and float(total) == 64**3 else "WRONG RESULT"
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        result["cache"] = f"{cache} ({'writable' if os.access(cache, os.W_OK) else 'NOT WRITABLE'})"
        return result


VERBS = {
    "train": Train,
    "finetune": Finetune,
    "rollout": Rollout,
    "evaluate": Evaluate,
    "report": Report,
    "benchmark": Benchmark,
    "convert": Convert,
    "export": Export,
    "models": Models,
    "doctor": Doctor,
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Generate, fetch, list, inspect, convert: `physml data generate|fetch|list|info|stats|convert`."""

    words: Words = field(default=())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `physml` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        from physml import __version__

        print(__version__)
        sys.exit(0)
    if arguments[:1] == ["data"]:
        verbs, program, rest = DATA_VERBS, "physml data", arguments[1:]
        about = "Datasets: generate, fetch, list, inspect, convert."
    else:
        verbs, program, rest = {**VERBS, "data": Data}, "physml", arguments
        about = "Neural surrogates for PDEs and climate: generate data, train, roll out, score, report."
    verb = tyro.extras.subcommand_cli_from_dict(
        verbs, prog=program, description=about, args=rest or ["--help"],
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )  # fmt: skip
    sys.exit(_execute(verb))


def _execute(verb: Common) -> int:
    logging.basicConfig(level=logging.WARNING if verb.quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from physml.errors import DivergedError, PhysmlError

    try:
        _compile_cache()
        result = verb.run()
    except KeyboardInterrupt:
        return _fail(verb, "interrupted", 130)
    except Exception as error:
        if verb.debug:
            raise
        from physml.errors import Interrupted

        if isinstance(error, Interrupted):
            return _fail(verb, str(error), Interrupted.exit_code)
        if isinstance(error, PhysmlError):
            return _fail(verb, str(error), 1 if isinstance(error, DivergedError) else 2)
        return _fail(verb, f"{type(error).__name__}: {error} (a defect; --debug shows where)", 1)
    _show(verb, result)
    return 0


def _fail(verb: Common, message: str, code: int) -> int:
    line = " ".join(message.split())
    print(json.dumps({"error": line, "code": code}) if verb.json else f"physml: {line}", file=sys.stderr)
    return code


def _show(verb: Common, result: dict[str, Any]) -> None:
    written = json.dumps(result, default=str)
    if verb.json:  # which knows no NaN and no infinity
        print(json.dumps(json.loads(written, parse_constant=lambda name: None if name == "NaN" else name)))
        return
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as they are."""

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    print(yaml.dump(json.loads(written), Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True), end="")


def _compile_cache() -> None:
    """Keeps compiled programs below JAX_COMPILATION_CACHE_DIR or PHYSML_CACHE; PHYSML_COMPILE_CACHE=off: nowhere."""
    if os.environ.get("PHYSML_COMPILE_CACHE") == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    from physml.files import cache_folder

    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder() / "compiled")


if __name__ == "__main__":
    main()
