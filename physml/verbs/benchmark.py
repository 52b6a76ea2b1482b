"""`physml benchmark`: a leaderboard under the protocol of the field."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from physml.verbs.common import Common, progress_of


@dataclass(frozen=True, kw_only=True)
class Benchmark(Common):
    """Train and score models under a benchmark's own protocol, and write a leaderboard; continues where it stopped.

    Example: physml benchmark cfdbench --budget 30
    Example: physml benchmark pdearena --data NavierStokes-2D --models fno,sinenet --budget 600
    """

    name: tyro.conf.Positional[str]
    """Whose protocol: cfdbench, darcy, pdearena, poseidon, weather or well."""
    data: Path | None = None
    """Folder of the benchmark's data; without it, an embedded version is generated."""
    models: str = ""
    """Names with commas between; the benchmark's own choice if not given."""
    seeds: int = 3
    """Runs of each model."""
    budget: float = 60.0
    """Minutes of training, shared equally by all runs; compilation and scoring come on top."""
    tasks: str = ""
    """Parts of the benchmark, with commas between, e.g. cavity,tube; all if not given."""
    size: Literal["embedded", "published"] | None = None
    """Of the networks; embedded for generated data, published for others, if not given."""
    points: int | None = None
    """Per axis of generated data."""
    out: Path | None = None
    """Folder of the leaderboard; benchmarks/NAME if not given."""
    overwrite: bool = False
    """Forget the leaderboard that is there."""

    def run(self) -> dict[str, Any]:
        from physml.benchmarks import BENCHMARKS, benchmark

        with progress_of(self, "preparing") as progress:
            out = benchmark(
                self.name, self.data, models=_names(self.models), seeds=self.seeds, budget=self.budget, size=self.size,
                points=self.points, tasks=_names(self.tasks), out=self.out, overwrite=self.overwrite,
                dry_run=self.dry_run, progress=progress,
            )  # fmt: skip
        if self.dry_run:
            suite = BENCHMARKS[self.name]
            data = str(self.data) if self.data else f"generated: {suite.embedded}"
            return {"would write": str(out / "leaderboard.html"), "data": data,
                    "models": list(_names(self.models) or suite.models), "floors": list(suite.floors)}  # fmt: skip
        return {"leaderboard": str(out / "leaderboard.html"), "best at one step": _best(out)}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _best(out: Path) -> dict[str, Any]:
    """By task: the headline score of every model, lowest first."""
    import xarray as xr

    with xr.open_dataset(out / "leaderboard.nc") as board:
        table = board["one_step"].isel(score_name=0).mean("seed")
        result = {}
        for task in map(str, table["task"].values):
            values = {str(model): float(table.sel(task=task, model=model)) for model in table["model"].values}
            finite = sorted((value, model) for model, value in values.items() if value == value)
            result[task] = {model: float(f"{value:.4g}") for value, model in finite}
    return result
