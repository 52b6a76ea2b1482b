"""`physml train` and what fine-tuning shares with it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from physml.verbs.common import Assignments, Common, headline, progress_of


@dataclass(frozen=True, kw_only=True)
class Training(Common):
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

    def train(self, experiment: Any) -> dict[str, Any]:
        """Trains an experiment as the options say."""
        from physml.experiment import to_dict

        if self.name:
            experiment = dataclasses.replace(experiment, name=self.name)
        if self.dry_run:
            return {"would train": str(self.out / experiment.name), "experiment": to_dict(experiment)}
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
        result = {"run": str(run.folder), "report": str(run.folder / "report.html")}
        if run.loaded:
            result["loaded"] = str(run.loaded)
        return {**result, "scores": headline(run.scores)} if (run.folder / "scores.nc").is_file() else result


@dataclass(frozen=True, kw_only=True)
class Train(Training):
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
