"""Where logged numbers go besides metrics.jsonl: one small protocol and three adapters (extra `track`)."""

import importlib
import uuid
from pathlib import Path
from typing import Any, Protocol

from physml.errors import DependencyError
from physml.files import write_text


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
    """A Weights & Biases run named after the folder, which remembers it in wandb.id: resumed, its curves go on.

    Raises DependencyError without wandb.
    """

    def __init__(self, folder: str | Path):
        self.module = _import("wandb")
        self.folder = Path(folder)

    def start(self, config: dict[str, Any]) -> None:
        identity = _text(self.folder / "wandb.id") or uuid.uuid4().hex
        self.run = self.module.init(
            project="physml", name=self.folder.name, id=identity, dir=str(self.folder), config=config, resume="allow"
        )
        write_text(self.folder / "wandb.id", identity)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run named after the folder, which remembers it in mlflow.id: resumed, its curves go on.

    A run that the server no longer has begins anew. Raises DependencyError without mlflow.
    """

    def __init__(self, folder: str | Path):
        self.module = _import("mlflow")
        self.folder = Path(folder)

    def start(self, config: dict[str, Any]) -> None:
        identity = _text(self.folder / "mlflow.id")
        try:
            run = self.module.start_run(run_id=identity, run_name=self.folder.name)
        except self.module.exceptions.MlflowException:
            if identity is None:
                raise
            run = self.module.start_run(run_name=self.folder.name)
        write_text(self.folder / "mlflow.id", run.info.run_id)
        self.module.log_dict(config, "config.json")

    def log(self, step: int, values: dict[str, float]) -> None:
        # "/" makes groups, "=" and other signs are refused by the server.
        self.module.log_metrics({name.replace("=", "_"): value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        self.module.end_run()


TRACKERS = {"mlflow": MLflow, "tensorboard": TensorBoard, "wandb": Wandb}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(f"{name} is not installed. Run `pip install 'physml[track]'`.") from error
