"""Generated data as a dataset: solved once into the cache, then read like any other file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physml.coding import from_dict
from physml.data.generate import Recipe, ensure
from physml.errors import ConfigError
from physml.files import cache_folder
from physml.progress import Progress
from physml.solvers import make_solver


@dataclass(frozen=True)
class Counts:
    """Trajectories of each split."""

    train: int = 32
    valid: int = 4
    test: int = 4


@dataclass(frozen=True)
class SyntheticConfig:
    """Trajectories of a solver of `physml.solvers.SOLVERS`; the splits never share one.

    Attributes:
        name: the solver, e.g. "kolmogorov"; `physml data list` shows them.
        points: stored points per axis; the solver's own choice if not given.
        trajectories: how many in each split.
        steps: stored steps of every trajectory; the solver's own choice if not given.
        test_steps: the same for the test split, where long forecasts are scored.
        time_step: time between frames; the solver's own choice if not given.
        seed: the same seed gives the same data.
        options: other fields of the solver, e.g. {"viscosity": 0.005, "solver_points": 128}.
        cache: folder of the files; `PHYSML_CACHE` or ~/.cache/physml if not given.

    Parameters that are drawn per trajectory (a pair such as "viscosity": (0.005, 0.02)) condition the model.
    Raises ConfigError for names and values that the solver refuses.
    """

    name: str
    points: int | None = None
    trajectories: Counts = Counts()
    steps: int | None = None
    test_steps: int | None = None
    time_step: float | None = None
    seed: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    cache: str | None = None

    def __post_init__(self):
        if isinstance(self.trajectories, Mapping):
            object.__setattr__(self, "trajectories", from_dict(Counts, self.trajectories, "trajectories"))
        twice = sorted({"points", "time_step"} & set(self.options))
        if twice and any(getattr(self, name) is not None for name in twice):
            raise ConfigError(f"{twice[0]} is given twice: as a field and in options. Drop one of them.")
        self.recipes()

    @property
    def solver(self) -> Any:
        """The solver's config."""
        own = {"points": self.points, "time_step": self.time_step}
        return make_solver(self.name, **self.options, **{key: value for key, value in own.items() if value is not None})

    def recipes(self) -> dict[str, Recipe]:
        """What is generated for each split; a split of zero trajectories is left out."""
        solver = self.solver
        steps = solver.usual_steps if self.steps is None else self.steps  # 0 for a steady problem
        long = steps if self.test_steps is None else self.test_steps
        counts = dataclasses.asdict(self.trajectories)
        return {
            split: Recipe(solver, count, long if split == "test" else steps, self.seed, split)
            for split, count in counts.items()
            if count != 0
        }

    def path(self, split: str) -> Path:
        """The file of one split. Its name holds a digest of everything that decides its content."""
        recipe = self.recipes()[split]
        digest = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(self.cache).expanduser() if self.cache else cache_folder()
        return folder / "generated" / f"{self.name}-{split}-{digest}.nc"

    def open(self, progress: Progress | None = None) -> dict[str, Any]:
        """The splits as `XarrayDataset`s, by name; generates what is not in the cache yet.

        Several processes may open the same config at once: one generates, the others wait.
        Raises DivergedError when a trajectory leaves the finite numbers, DataError when the cache cannot be written.
        """
        from physml.data import XarrayDataset, open_dataset
        from physml.data.labelled import spec_of

        solver = self.solver
        channels, static = ([channel.name for channel in fields] for fields in (solver.channels, solver.statics))
        splits = {}
        for split, recipe in self.recipes().items():
            data = open_dataset(ensure(recipe, self.path(split), progress))
            mask = "mask" if "mask" in static else None
            spec = spec_of(data, channels, static=static, parameters=solver.drawn, mask=mask)
            splits[split] = XarrayDataset(data, spec)
        return splits
