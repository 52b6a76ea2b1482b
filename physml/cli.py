"""The command line: thin verbs over the Python API. Nothing numerical is imported before a verb runs.

Exit codes: 0 done; 1 failed (training or a rollout left the finite numbers, or a defect); 2 bad usage or bad input;
75 interrupted with its state saved (resume with `--resume auto`).
"""

import dataclasses
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

INTERRUPTED = 75
Assignments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Words = tyro.conf.Positional[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Common:
    dry_run: bool = False
    """Check everything and say what would be done, without doing it."""
    json: bool = False
    """Print the result as one JSON object."""
    quiet: bool = False
    """No progress."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train a surrogate, score it on the test split beside its floors, and write a report.

    Example: physml train experiments/demo.py --set model.width=24 --name narrow
    """

    experiment: tyro.conf.Positional[str] = "experiments/demo.py"
    """A .py file that defines `config`, or a .yaml file."""
    set: Assignments = ()
    """Override a field, e.g. --set training.steps=500; may be repeated."""
    name: str | None = None
    """Folder of the run inside --out."""
    out: Path = Path("runs")
    """Folder that keeps the runs."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the newest complete checkpoint of this run, if there is one."""
    overwrite: bool = False
    """Replace an existing run of this name."""
    track: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Also log to a tracker (extra `track`)."""

    def run(self) -> dict[str, Any]:
        from physml.experiment import load_experiment, to_dict
        from physml.parallel.mesh import start_distributed

        start_distributed()
        experiment = load_experiment(self.experiment, self.set)
        if self.name:
            experiment = dataclasses.replace(experiment, name=self.name)
        if self.dry_run:
            return {"would train": str(self.out / experiment.name), "experiment": to_dict(experiment)}
        from physml import api
        from physml.training import tracking

        tracker = None if self.track == "none" else tracking.TRACKERS[self.track](self.out / experiment.name)
        with _progress(self, "generating") as progress:
            run = api.train(
                experiment,
                folder=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                progress=progress,
                tracker=tracker,
            )
        result = {"run": str(run.folder), "report": str(run.folder / "report.html")}
        return {**result, "scores": _headline(run.scores)} if (run.folder / "scores.nc").is_file() else result


@dataclass(frozen=True, kw_only=True)
class Rollout(Common):
    """Forecast with a saved model, from the last frames of a dataset.

    Example: physml rollout runs/demo --initial start.nc --steps 200 --out forecast.zarr
    """

    model: tyro.conf.Positional[str]
    """A run, or a folder made by `physml.save`."""
    initial: str = tyro.MISSING
    """Dataset whose last frames the forecast starts from."""
    steps: int = 100
    """Number of frames to predict."""
    out: Path = Path("forecast.zarr")
    """Where the forecast is streamed to: .zarr or .nc."""
    at: str | None = None
    """Start at this time (a date or a number) or frame (#12) instead of the last one."""
    trajectory: int | None = None
    """Take one trajectory of the dataset instead of all."""
    forcing: str | None = None
    """Dataset of prescribed fields over the forecast, when they are not in --initial."""
    chunk: int | None = None
    """Frames held in memory at once."""
    on_divergence: Literal["raise", "stop", "flag"] = "stop"
    """What to do when a trajectory leaves the finite numbers."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> dict[str, Any]:
        from physml import saving
        from physml.data import open_dataset
        from physml.errors import ConfigError
        from physml.forecast import forecast

        stepper = saving.load(self.model)
        initial = _start(open_dataset(self.initial), self.at, self.trajectory)
        if self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}, but at least 1 frame must be predicted.")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} exists. Choose another --out, or give --overwrite.")
        if self.dry_run:
            return {"would write": str(self.out), "steps": self.steps, "from": dict(initial.sizes)}
        forcing = open_dataset(self.forcing) if self.forcing else None
        with _progress(self, "rolling out") as progress:
            prediction = forecast(
                stepper, initial, self.steps, out=self.out, forcing=forcing, chunk=self.chunk, overwrite=self.overwrite,
                on_divergence=self.on_divergence, progress=progress.update,
            )  # fmt: skip
        sizes = {str(name): int(size) for name, size in prediction.sizes.items()}
        completed = [int(steps) for steps in prediction["steps_completed"].values.ravel()]
        return {"forecast": str(self.out), "sizes": sizes, "steps completed": completed}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Score a run on its own test split, or a stored forecast against the truth.

    Example: physml evaluate runs/demo
    Example: physml evaluate forecast.zarr --truth truth.nc --out scores.nc
    """

    subject: tyro.conf.Positional[str]
    """A run, or a forecast file."""
    truth: str | None = None
    """Dataset with the true fields; needed for a forecast file."""
    out: Path | None = None
    """Scores of a forecast file are written here; those of a run go into its folder."""
    set: Assignments = ()
    """For a run: override a field of its evaluation, e.g. --set evaluation.steps=50."""
    split: Literal["test", "valid", "train"] = "test"
    """For a run: the split to score on."""

    def run(self) -> dict[str, Any]:
        from physml.errors import ConfigError

        if (Path(self.subject) / "config.yaml").is_file():
            return self._run_folder()
        if self.truth is None:
            raise ConfigError(f"{self.subject} is no run folder, so it is read as a forecast: give --truth FILE.")
        if self.out is not None and self.out.suffix != ".nc":
            raise ConfigError(f"--out is {self.out}, but scores are netCDF: end it in .nc.")
        from physml.data import open_dataset
        from physml.evaluate import evaluate
        from physml.metrics.table import write_netcdf

        prediction, truth = open_dataset(self.subject), open_dataset(self.truth)
        if self.dry_run:
            return {"would score": self.subject, "against": self.truth}
        scores = evaluate(prediction, truth)
        if self.out:
            write_netcdf(scores, self.out)
        return {"scores": _headline(scores), "out": str(self.out) if self.out else None}

    def _run_folder(self) -> dict[str, Any]:
        from physml import api
        from physml.experiment import load_experiment
        from physml.report import report

        run = api.open_run(self.subject)
        experiment = load_experiment(run.experiment, self.set)
        if self.dry_run:
            return {"would score": self.subject, "split": self.split, "steps": experiment.evaluation.steps}
        run.__dict__["experiment"] = experiment
        scores = api.score(run, experiment.data.open(), split=self.split)
        report([run.folder], run.folder / "report.html")
        return {"scores": _headline(scores), "report": str(run.folder / "report.html")}


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """One self-contained page about one run, or comparing several.

    Example: physml report runs/narrow runs/wide --out comparison.html
    """

    runs: Words
    """Run folders."""
    out: Path = Path("report.html")
    """The page."""

    def run(self) -> dict[str, Any]:
        from physml import api
        from physml.errors import ConfigError

        if not self.runs:
            raise ConfigError("Name at least one run folder.")
        folders = [api.open_run(run).folder for run in self.runs]
        if self.dry_run:
            return {"would write": str(self.out), "runs": list(map(str, folders))}
        from physml.report import report

        return {"report": str(report(folders, self.out))}


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
            rows = {name: _first_line(sys.modules[config.__module__]) for name, config in MODELS.items()}
            return {"models": rows, "families that `physml convert` reads": sorted(FAMILIES)}
        if self.name not in MODELS:
            raise ConfigError(f"There is no model {self.name!r}." + suggest(self.name, MODELS))
        config = MODELS[self.name]
        options = {f.name: f"{getattr(f.type, '__name__', f.type)} = {f.default!r}" for f in dataclasses.fields(config)}
        return {"model": self.name, "about": config.__doc__, "options": options}


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

        from physml import api
        from physml.data import cache_folder
        from physml.parallel.mesh import Layout

        result = api.environment()
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


@dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Solve an equation for many initial states and store the trajectories; continues where it was interrupted.

    Example: physml data generate kolmogorov --out kolmogorov.nc --trajectories 16 --seed 0
    """

    name: tyro.conf.Positional[str]
    """The equation; `physml data list` shows them."""
    out: Path = tyro.MISSING
    """A .nc file or a .zarr folder."""
    trajectories: int = 16
    """How many."""
    steps: int | None = None
    """Frames per trajectory; the equation's own choice if not given."""
    seed: int = 0
    """The same seed gives the same bytes."""
    split: Literal["train", "valid", "test"] = "train"
    """Splits of one seed never share a trajectory."""
    set: Assignments = ()
    """Override a field of the solver, e.g. --set viscosity=0.002; may be repeated."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> dict[str, Any]:
        from physml import coding
        from physml.data.generate import generate, resolve
        from physml.solvers import SOLVERS

        config = resolve(self.name, self.set)
        if self.dry_run:
            return {
                "would write": str(self.out),
                "trajectories": self.trajectories,
                "solver": coding.to_dict(config, SOLVERS),
            }
        with _progress(self, "generating") as progress:
            path = generate(
                config, self.out, self.trajectories, seed=self.seed, steps=self.steps, split=self.split,
                overwrite=self.overwrite, progress=progress,
            )  # fmt: skip
        return {"data": str(path), "trajectories": self.trajectories, "bytes": _size(Path(path))}


@dataclass(frozen=True, kw_only=True)
class DataList(Common):
    """List the equations that can be generated, the formats that can be read, and the dataset cards.

    Example: physml data list
    """

    def run(self) -> dict[str, Any]:
        from physml.data import FORMATS
        from physml.solvers import SOLVERS

        cards = sorted(path.parent.name for path in Path("datasets").glob("*/CARD.md"))
        return {
            "generated": {name: _first_line(config) for name, config in SOLVERS.items()},
            "formats": {name: _first_line(format.open) for name, format in FORMATS.items()},
            "cards": cards,
        }


@dataclass(frozen=True, kw_only=True)
class Info(Common):
    """Describe a dataset: variables, units, grid, times, missing values.

    Example: physml data info kolmogorov.nc
    """

    path: tyro.conf.Positional[str]
    """File, folder or URL."""
    format: str | None = None
    """Detected from the content if not given."""
    option: Assignments = ()
    """An option of the format, e.g. --option split=train; may be repeated."""

    def run(self) -> dict[str, Any]:
        from physml.data import describe

        return describe(_open(self.path, self.format, self.option))


@dataclass(frozen=True, kw_only=True)
class Stats(Common):
    """Mean, deviation and increment deviation of every channel, in one streaming pass.

    Example: physml data stats kolmogorov.nc --variables vorticity
    """

    path: tyro.conf.Positional[str]
    """File, folder or URL."""
    variables: tuple[str, ...] = ()
    """Channels; all gridded variables if not given."""
    format: str | None = None
    """Detected from the content if not given."""
    option: Assignments = ()
    """An option of the format, e.g. --option split=train; may be repeated."""

    def run(self) -> dict[str, Any]:
        from physml.data import XarrayDataset, labelled, statistics

        dataset = _open(self.path, self.format, self.option)
        return statistics(XarrayDataset(dataset, labelled.spec_of(dataset, variables=self.variables or None)))


@dataclass(frozen=True, kw_only=True)
class DataConvert(Common):
    """Write a dataset of any readable format as netCDF or zarr, chunk by chunk.

    Example: physml data convert cfdbench/cavity cavity.zarr
    """

    source: tyro.conf.Positional[str]
    """File, folder or URL."""
    out: tyro.conf.Positional[Path]
    """A .nc file or a .zarr folder."""
    to: Literal["netcdf", "zarr"] | None = None
    """Told by the suffix if not given."""
    format: str | None = None
    """Of the source; detected from the content if not given."""
    option: Assignments = ()
    """An option of the source's format, e.g. --option split=train; may be repeated."""
    zarr_format: Literal[2, 3] = 3
    """2 for readers that are older than zarr 3."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> dict[str, Any]:
        from physml.data.export import save_dataset

        dataset = _open(self.source, self.format, self.option)
        sizes = {str(dim): size for dim, size in dataset.sizes.items()}
        if self.dry_run:
            return {"would write": str(self.out), "sizes": sizes, "variables": list(map(str, dataset.data_vars))}
        path = save_dataset(dataset, self.out, self.to, zarr_format=self.zarr_format, overwrite=self.overwrite)
        return {"data": str(path), "sizes": sizes, "bytes": _size(path)}


VERBS = {
    "train": Train,
    "rollout": Rollout,
    "evaluate": Evaluate,
    "report": Report,
    "convert": Convert,
    "models": Models,
    "doctor": Doctor,
}
DATA_VERBS = {"generate": Generate, "list": DataList, "info": Info, "stats": Stats, "convert": DataConvert}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Generate, list, inspect, convert: `physml data generate|list|info|stats|convert`."""

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
        about = "Datasets: generate, list, inspect, convert."
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
            return _fail(verb, str(error), INTERRUPTED)
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
    if verb.json:
        print(json.dumps(result, default=str))
        return
    import yaml

    print(
        yaml.safe_dump(json.loads(json.dumps(result, default=str)), sort_keys=False, width=120, allow_unicode=True),
        end="",
    )


def _compile_cache() -> None:
    """Keeps compiled programs below JAX_COMPILATION_CACHE_DIR or PHYSML_CACHE; PHYSML_COMPILE_CACHE=off: nowhere."""
    if os.environ.get("PHYSML_COMPILE_CACHE") == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = Path(os.environ.get("PHYSML_CACHE", Path.home() / ".cache" / "physml"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")


def _progress(verb: Common, what: str):
    from physml.progress import open_progress

    return open_progress(what, quiet=verb.quiet or verb.json)


def _open(path: str, format: str | None, options: Assignments) -> Any:
    from physml import coding
    from physml.data import open_dataset

    return open_dataset(path, format, **coding.override({}, options))


def _start(data: Any, at: str | None, trajectory: int | None) -> Any:
    """The frames up to the chosen start."""
    from physml.errors import DataError

    if trajectory is not None:
        count = data.sizes.get("trajectory", 1)
        if not 0 <= trajectory < count:
            raise DataError(f"--trajectory is {trajectory}, but the dataset has {count}: 0 to {count - 1}.")
        if "trajectory" in data.dims:
            data = data.isel(trajectory=[trajectory])
    if at is None or "time" not in data.dims:
        return data
    if at.startswith("#"):
        count = data.sizes["time"]
        if not at[1:].isdigit() or int(at[1:]) >= count:
            raise DataError(f"--at is {at}, but the dataset has frames #0 to #{count - 1}.")
        return data.isel(time=slice(0, int(at[1:]) + 1))
    kind = data["time"].dtype.kind
    try:
        until = data.sel(time=slice(None, float(at) if kind in "fiu" else at))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--at is {at!r}, which is no time of the dataset: {error}") from error
    if until.sizes["time"] == 0:
        first, last = data["time"].values[0], data["time"].values[-1]
        raise DataError(f"--at is {at!r}, but the dataset spans {first} to {last}.")
    return until


def _headline(scores: Any) -> dict[str, Any]:
    """What fits on a screen: RMSE and correlation at first, middle and last lead, and how long correlation lasts."""
    last = scores.sizes["lead"] - 1
    leads = sorted({0, last // 2, last})
    result: dict[str, Any] = {}
    for model in scores["model"].values:
        rows = result[str(model)] = {}
        for channel in scores["channel"].values:
            cell = rows[str(channel)] = {}
            for metric in ("rmse", "correlation"):
                if metric in scores["metric"]:
                    values = scores["score"].sel(model=model, metric=metric, channel=channel)
                    cell[metric] = {f"step {int(scores['step'][i])}": _short(values[i]) for i in leads}
            times = scores["correlation_time"].sel(model=model, channel=channel)
            cell["high-correlation time"] = {
                f"> {float(t):g}": _short(times.sel(threshold=t)) for t in times["threshold"]
            }
    return result


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


if __name__ == "__main__":
    main()
