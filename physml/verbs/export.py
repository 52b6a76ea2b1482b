"""`physml export`: a model as a program that runs without physml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from physml.verbs.common import Common, size_of


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write a program (StableHLO, by jax.export) that predicts without physml: weights, normalizer, constraints inside.

    Example: physml export runs/demo --out exported
    Example: physml export runs/demo --steps 20 --batch 4 --platforms cuda
    """

    model: tyro.conf.Positional[str]
    """A run, or a folder made by `physml.save`."""
    out: Path | None = None
    """Folder of the program; MODEL/exported if not given."""
    batch: str = "symbolic"
    """symbolic: any number of samples at once; or the only number."""
    steps: int = 1
    """Frames that one call predicts."""
    platforms: str = "cpu,cuda,tpu"
    """What it may run on, with commas between: cpu, cuda, rocm, tpu."""
    overwrite: bool = False
    """Replace an earlier export."""

    def run(self) -> dict[str, Any]:
        import json

        from physml import saving
        from physml.errors import ConfigError
        from physml.saving.exported import check_export, export

        if self.batch != "symbolic" and not (self.batch.isdigit() and int(self.batch)):
            raise ConfigError(f"--batch is {self.batch!r}, but a positive number or symbolic was expected.")
        out = self.out or Path(self.model) / "exported"
        stepper = saving.load(self.model)
        batch = "symbolic" if self.batch == "symbolic" else int(self.batch)
        platforms = tuple(name.strip() for name in self.platforms.split(",") if name.strip())
        check_export(stepper, out, self.steps, batch, platforms, self.overwrite)
        if self.dry_run:
            return {"would write": str(out), "steps": self.steps, "batch": self.batch, "platforms": self.platforms}
        export(stepper, out, steps=self.steps, batch=batch, platforms=platforms, overwrite=self.overwrite)
        about = json.loads((out / "signature.json").read_text())
        inputs = {entry["name"]: str(tuple(entry["shape"])) for entry in about["inputs"]}
        return {"program": str(out), "inputs": inputs, "output": str(tuple(about["output"]["shape"])),
                "megabytes": round(size_of(out) / 1e6, 2)}  # fmt: skip
