"""`physml train` and what fine-tuning shares with it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from physml.verbs.common import Assignments, Common, headline, in_files, progress_of


@dataclass(frozen=True, kw_only=True)
class TrainingVerb(Common):
    """Options of every training."""

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
    dry_run: bool = False
    """Check the experiment, the run folder and data that lie in files, and build the network's shapes, without training
    or generating data."""

    def train(self, experiment: Any) -> dict[str, Any]:
        """Trains an experiment as the options say."""
        from physml.experiment import to_dict

        if self.name:
            experiment = dataclasses.replace(experiment, name=self.name)
        if self.dry_run:
            experiment, found = self._check(experiment)
            return {"would train": str(self.out / experiment.name), **found, "experiment": to_dict(experiment)}
        from physml import api
        from physml.training import tracking

        tracker = None if self.track == "none" else tracking.TRACKERS[self.track](self.out / experiment.name)
        with progress_of(self, "generating") as progress:
            run = api.train(
                experiment,
                folder=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                progress=progress,
                tracker=tracker,
            )
        page = run.folder / "report.html"
        report = str(page) if page.is_file() else "none: the data have no split 'test' to score on"
        result = {"run": str(run.folder), "report": report}
        if run.loaded:
            result["loaded"] = str(run.loaded)
        return {**result, "scores": headline(run.scores)} if (run.folder / "scores.nc").is_file() else result

    def _check(self, experiment: Any) -> tuple[Any, dict[str, Any]]:
        """The complete experiment and what it would train on. Raises what training would, as far as no data have to be
        generated or read for that.
        """
        from physml import api
        from physml.runs import check_folder
        from physml.steppers.describe import parameter_count
        from physml.training import plan

        experiment, _, layout = api.prepare(experiment)
        check_folder(self.out / experiment.name, experiment, self.resume, self.overwrite)
        if not in_files(experiment.data):
            return experiment, {"data": "generated when training starts, so not checked"}
        splits = experiment.data.open()
        api.check_splits(splits)
        found = {"data": {name: _size(split) for name, split in splits.items()}}
        stepper = _shaped(experiment, splits["train"])
        if parameters := parameter_count(stepper):
            validate = api.validation_of(experiment, stepper, splits, layout)
            plan(stepper, splits, experiment.objective, experiment.training, layout, validate)
        api.check_scoring(experiment, stepper, splits)
        return experiment, {**found, "parameters": parameters}


def _size(split: Any) -> str:
    return f"{len(split.lengths)} trajectories, {sum(split.lengths)} frames on a grid {split.spec.grid.shape}"


def _shaped(experiment: Any, train_split: Any) -> Any:
    """The stepper, of whose numbers nothing is computed. Raises ConfigError where its parts do not fit each other or
    the data.
    """
    from flax import nnx

    from physml import api
    from physml.normalize import Normalizer

    spec = train_split.spec
    if experiment.stepper.signature(spec) is None:
        return experiment.stepper.build(spec)  # a floor
    normalizer = Normalizer.identity(spec, intervals=getattr(experiment.stepper, "intervals", ()))
    plain = dataclasses.replace(experiment, start_from=None, lora=None)
    return nnx.eval_shape(lambda: api.first_stepper(plain, train_split, normalizer=normalizer)[0])


@dataclass(frozen=True, kw_only=True)
class Train(TrainingVerb):
    """Train a surrogate, score it on the test split beside its floors, and write a report.

    Example: physml train experiments/demo.py --set model.width=24 --name narrow
    """

    experiment: tyro.conf.Positional[str] = "experiments/demo.py"
    """A .py file that defines `config`, or a .yaml file."""

    def run(self) -> dict[str, Any]:
        from physml.experiment import load_experiment
        from physml.parallel.mesh import start_distributed

        start_distributed()
        return self.train(load_experiment(self.experiment, self.set))
