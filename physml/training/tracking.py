"""Where logged numbers go besides metrics.jsonl: one small protocol and three adapters (extra `track`)."""

import importlib
from pathlib import Path
from typing import Any, Protocol

from physml.errors import DependencyError


class Tracker(Protocol):
    """Receives what the loop logs, on process 0 only."""

    def start(self, config: dict[str, Any]) -> None:
        """Before the first step; `config` is plain data: of `physml.train` the whole experiment."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one step. Steps rise, except after a resume, when they may begin again earlier."""
        ...

    def finish(self) -> None:
        """After the last step, also when training fails."""
        ...


class TensorBoard:
    """Event files in FOLDER/tensorboard. Raises DependencyError without tensorboardX."""

    def __init__(self, folder: str | Path):
        self.module = _import("tensorboardX")
        self.folder = Path(folder) / "tensorboard"

    def start(self, config: dict[str, Any]) -> None:
        self.writer = self.module.SummaryWriter(str(self.folder))
        self.writer.add_text("config", str(config))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run named after the folder. Raises DependencyError without wandb."""

    def __init__(self, folder: str | Path):
        self.module = _import("wandb")
        self.folder = Path(folder)

    def start(self, config: dict[str, Any]) -> None:
        # The name is also the identity, so that a resumed run continues its curves.
        name = self.folder.name
        self.run = self.module.init(
            project="physml", name=name, id=name, dir=str(self.folder), config=config, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run named after the folder. Raises DependencyError without mlflow."""

    def __init__(self, folder: str | Path):
        self.module = _import("mlflow")
        self.folder = Path(folder)

    def start(self, config: dict[str, Any]) -> None:
        self.module.start_run(run_name=self.folder.name)
        self.module.log_dict(config, "config.json")

    def log(self, step: int, values: dict[str, float]) -> None:
        # "/" makes groups, "=" and other signs are refused by the server.
        self.module.log_metrics({name.replace("=", "_"): value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        self.module.end_run()


TRACKERS = {"mlflow": MLflow, "tensorboard": TensorBoard, "wandb": Wandb}


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(f"{name} is not installed. Run `pip install 'physml[track]'`.") from error
