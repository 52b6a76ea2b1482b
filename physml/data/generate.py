"""Trajectories of the reference solvers, written to files: reproducible, resumable, never half-written.

The bytes of a file follow from the solver's config, the number of trajectories and steps, the seed and the split, on
one kind of machine and one set of package versions. Trajectory i has a random key of its own, so it does not depend on
how many there are, nor on how many are solved at once.
"""

import dataclasses
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from physml import coding
from physml.data import store
from physml.errors import ConfigError, DataError, DivergedError, suggest
from physml.fields import Axis
from physml.files import exclusive, replace, whole, write_text
from physml.progress import Progress, Silent
from physml.solvers import SOLVERS, name_of
from physml.solvers.ensemble import SPLITS, Ensemble, Trajectories, precision, usual_batch, usual_workers, warmup_steps
from physml.solvers.solver import STEADY

FORMAT_VERSION = 2  # raise it whenever the same recipe gives other files: caches are keyed by it
LARGEST_SEED = 2**32
SETTINGS = "settings.json"  # of unfinished work


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is generated.

    Attributes:
        solver: a config of `physml.solvers.SOLVERS`.
        trajectories: how many.
        steps: stored steps of each; a file holds `steps + 1` frames. 0 for a steady problem, whose file has no time.
        seed: 0 to 2**32 - 1.
        split: "train", "valid" or "test": the same seed gives disjoint trajectories in each.
    """

    solver: Any
    trajectories: int
    steps: int
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        name_of(self.solver)
        steady = self.solver.usual_steps == STEADY
        for name in ("trajectories",) if steady else ("trajectories", "steps"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but it must be a whole number, at least 1.")
        if steady and self.steps != STEADY:
            raise ConfigError(f"steps is {self.steps!r}, but {name_of(self.solver)} has no time: leave steps out.")
        if type(self.seed) is not int or not 0 <= self.seed < LARGEST_SEED:
            raise ConfigError(f"seed is {self.seed!r}, but it must be a whole number from 0 to {LARGEST_SEED - 1}.")
        if self.split not in SPLITS:
            raise ConfigError(f"There is no split {self.split!r}." + suggest(self.split, SPLITS))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, enough to make the same file again."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "solver"}
        return {"solver": coding.to_dict(self.solver, SOLVERS), **plain, "format_version": FORMAT_VERSION}

    @property
    def command(self) -> str:
        """The command line that generates the same trajectories."""
        mine, usual = dataclasses.asdict(self.solver), dataclasses.asdict(type(self.solver)())
        words = ["physml data generate", name_of(self.solver), "--out FILE", f"--trajectories {self.trajectories}"]
        words += [f"--steps {self.steps}", f"--seed {self.seed}", f"--split {self.split}"]
        words += [f"--set {name}={_plain(mine[name])}" for name in mine if mine[name] != usual[name]]
        return " ".join(words)


def resolve(solver: Any, assignments: Iterable[str] = ()) -> Any:
    """The solver config of a registry name (or a config) with `"viscosity=0.002"`-like assignments put in.

    Raises ConfigError for unknown names and fields, with the nearest valid ones.
    """
    plain = {"name": solver} if isinstance(solver, str) else coding.to_dict(solver, SOLVERS)
    return coding.from_dict(SOLVERS, coding.override(plain, assignments), "solver")


def generate(
    solver: Any,
    out: str | os.PathLike,
    trajectories: int = 16,
    *,
    seed: int = 0,
    steps: int | None = None,
    split: str = "train",
    batch: int | None = None,
    workers: int | None = None,
    format: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Solves for random initial states and writes the trajectories to `out`; returns its path.

    An interrupted call leaves `OUT.partial`; the same call continues there and gives the same bytes. `out` appears only
    when it is complete.

    Args:
        solver: a name of `physml.solvers.SOLVERS`, or a config of them.
        out: a .nc file (CF netCDF4) or a .zarr folder.
        trajectories: how many.
        seed: the same seed gives the same bytes.
        steps: stored steps of each trajectory (`steps + 1` frames); the solver's `usual_steps` if not given.
        split: "train", "valid" or "test": the same seed gives disjoint trajectories in each.
        batch: trajectories solved at once; chosen by the size of the grid if not given. Does not change the result.
        workers: batches solved at the same time; as many as there are CPU cores, one on an accelerator, if not given.
        format: "netcdf" or "zarr", if the name of `out` does not tell.
        overwrite: replace an existing `out`, and drop unfinished work with other settings.
        progress: told of every block of steps; see `physml.progress`.

    Raises ConfigError for settings that cannot work, DataError when `out` exists, DivergedError when a trajectory
    leaves the finite numbers (naming trajectory and time).
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}, but at least one is needed.")
    recipe = recipe_of(solver, trajectories, steps, seed, split)
    out = Path(out)
    writer = store.writer_of(out, format)
    with exclusive(out):
        check_output(recipe, out, overwrite, format, batch)
        _produce(recipe, out, writer, batch, workers, progress or Silent())
    return out


def recipe_of(solver: Any, trajectories: int, steps: int | None, seed: int, split: str) -> Recipe:
    """What `generate` makes of these. Raises ConfigError for settings that cannot work."""
    solver = resolve(solver)
    return Recipe(solver, trajectories, solver.usual_steps if steps is None else steps, seed, split)


def check_output(
    recipe: Recipe, out: Path, overwrite: bool, format: str | None = None, batch: int | None = None
) -> None:
    """Raises ConfigError for a name that does not tell its format, DataError where `out`, or unfinished work with other
    settings, exists and is to stay."""
    store.writer_of(out, format)
    if overwrite:
        return
    if out.exists():
        raise DataError(f"{out} exists already. Choose another name, or pass overwrite (--overwrite) to replace it.")
    partial, settings = _unfinished(out), _settings(recipe, batch)
    found = _settings_in(partial)
    if found not in (None, settings):
        raise DataError(
            f"{partial} holds unfinished work with other settings ({_difference(found, settings)}). Repeat that "
            "command to finish it, or pass overwrite (--overwrite) to drop it."
        )


def ensure(recipe: Recipe, out: Path, progress: Progress | None = None) -> Path:
    """Generates `out` unless it is there. Safe when several processes ask at once: one works, the others wait."""
    if not out.exists():
        with exclusive(out):
            if not out.exists():
                _produce(recipe, out, store.writer_of(out), None, None, progress or Silent())
    return out


def _produce(
    recipe: Recipe,
    out: Path,
    writer: Callable,
    batch: int | None,
    workers: int | None,
    progress: Progress,
) -> None:
    partial, settings = _unfinished(out), _settings(recipe, batch)
    if _settings_in(partial) != settings:
        if partial.exists():
            shutil.rmtree(partial)
        write_text(partial / SETTINGS, json.dumps(settings, indent=1))
    count, batch = _chunks(recipe, batch)
    paths = [partial / f"chunk_{i:05d}.npz" for i in range(count)]
    shape = (batch, recipe.steps + 1, *recipe.solver.grid.shape, len(recipe.solver.channels))
    try:
        _solve_missing(recipe, paths, shape, workers, progress)
    except DivergedError:
        shutil.rmtree(partial)  # the same settings would diverge again
        raise
    finished = partial / f"finished{out.suffix}"
    writer(finished, _labels(recipe), _slices(recipe, paths, shape))
    replace(finished, out)
    shutil.rmtree(partial)


def _chunks(recipe: Recipe, batch: int | None) -> tuple[int, int]:
    """Number of chunks and trajectories in each (the last one is filled up with trajectories that are thrown away)."""
    batch = usual_batch(recipe.solver) if batch is None else batch
    if batch < 1:
        raise ConfigError(f"batch is {batch}, but at least one trajectory must be solved at once.")
    count = -(-recipe.trajectories // batch)
    return count, -(-recipe.trajectories // count)


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _settings(recipe: Recipe, batch: int | None) -> dict[str, Any]:
    """What unfinished work must agree in, as JSON holds it."""
    return json.loads(json.dumps({**recipe.to_dict(), "batch": _chunks(recipe, batch)[1]}))


def _settings_in(partial: Path) -> dict[str, Any] | None:
    """Those of unfinished work; None where there is none, or it was killed before they were written."""
    try:
        return json.loads((partial / SETTINGS).read_text())
    except (OSError, ValueError):
        return None


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
    return f"{path} is {found} there, {wanted} here"


def _solve_missing(
    recipe: Recipe, paths: list[Path], shape: tuple[int, ...], workers: int | None, progress: Progress
) -> None:
    """Solves the chunks that are not on disk yet. Progress counts steps of trajectories.

    One trajectory does not keep several CPU cores busy, so as many chunks are solved at the same time, in threads.
    """
    solver, batch = recipe.solver, shape[0]
    each = max(1, warmup_steps(solver) + recipe.steps) * batch
    missing = [number for number, path in enumerate(paths) if _read_chunk(path, shape) is None]
    done = {number: 0 if number in missing else each for number in range(len(paths))}
    lock, stop = threading.Lock(), threading.Event()
    with precision(solver):
        ensemble = Ensemble(solver, recipe.steps, batch, recipe.seed, recipe.split)

    def report(number: int, steps: int) -> None:
        if stop.is_set():
            raise InterruptedError
        with lock:
            done[number] = steps * batch
            progress.update(sum(done.values()), each * len(paths))

    def solve(number: int) -> None:
        first = number * batch
        with precision(solver):  # settings of jax belong to a thread
            solved = ensemble.run(first, recipe.trajectories - first, lambda steps: report(number, steps))
        with whole(paths[number]) as path:
            _save_chunk(path, solved)
        report(number, each // batch)

    progress.update(sum(done.values()), each * len(paths))
    with ThreadPoolExecutor(min(usual_workers() if workers is None else workers, max(1, len(missing)))) as pool:
        results = [pool.submit(solve, number) for number in missing]
        try:
            for result in results:
                result.result()
        finally:  # an error or Ctrl-C: the others stop after their block
            stop.set()
            pool.shutdown(cancel_futures=True)


def _save_chunk(path: Path, solved: Trajectories) -> None:
    static = {} if solved.static is None else {"static": solved.static}
    with path.open("wb") as file:
        np.savez(file, frames=solved.frames, **static, **{f"parameter_{name}": v for name, v in solved.drawn.items()})


def _read_chunk(path: Path, shape: tuple[int, ...]) -> Trajectories | None:
    """A chunk; None when it is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parameters = {
                name.removeprefix("parameter_"): file[name] for name in file.files if name[:10] == "parameter_"
            }
            chunk = Trajectories(file["frames"], parameters, file.get("static"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return chunk if chunk.frames.shape == shape and chunk.frames.dtype == np.float32 else None


def _slices(recipe: Recipe, paths: list[Path], shape: tuple[int, ...]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """First trajectory and arrays by variable, chunk by chunk."""
    solver = recipe.solver
    for number, path in enumerate(paths):
        chunk = _read_chunk(path, shape)
        if chunk is None:
            raise DataError(f"{path} was changed while the trajectories were being generated. Run the command again.")
        first = number * shape[0]
        keep = min(shape[0], recipe.trajectories - first)
        frames = chunk.frames[:keep, 0] if solver.usual_steps == STEADY else chunk.frames[:keep]
        arrays = {channel.name: frames[..., i] for i, channel in enumerate(solver.channels)}
        arrays |= {channel.name: chunk.static[:keep, ..., i] for i, channel in enumerate(solver.statics)}
        for name in solver.parameters:
            fixed = name not in chunk.drawn
            arrays[name] = np.full(keep, getattr(solver, name), np.float64) if fixed else chunk.drawn[name][:keep]
        yield first, arrays


def _labels(recipe: Recipe) -> store.Labels:
    """Dimensions, coordinates and provenance of the file; nothing in it depends on when or where it was made."""
    from importlib.metadata import version

    solver = recipe.solver
    coordinates = {"trajectory": (np.arange(recipe.trajectories), {"long_name": "trajectory"})}
    moving = ("trajectory", "time", *solver.axes)
    if solver.usual_steps == STEADY:
        moving = ("trajectory", *solver.axes)
    else:
        unit = {"units": solver.time_unit} if solver.time_unit else {}
        times = np.arange(recipe.steps + 1) * solver.time_step
        coordinates["time"] = (times, {"long_name": "time", "axis": "T", **unit})
    for axis in solver.grid.axes:
        coordinates[axis.name] = (np.asarray(axis.centers), _axis_attributes(axis))
    variables = {}
    for fields, dims in ((solver.channels, moving), (solver.statics, ("trajectory", *solver.axes))):
        for channel in fields:
            attributes = {"long_name": solver.meanings[channel.name], "units": channel.unit or "1"}
            variables[channel.name] = (dims, np.float32, attributes)
    for name in solver.parameters:
        attributes = {"long_name": name.replace("_", " "), "units": solver.units.get(name, "1")}
        variables[name] = (("trajectory",), np.float64, attributes)
    about = {
        "Conventions": "CF-1.11",
        "title": f"{name_of(solver).replace('_', ' ')}: {recipe.split} trajectories",
        "equation": solver.equation,
        "boundary_conditions": solver.boundary,
        "solver": name_of(solver),
        "scheme": solver.scheme,
        "recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "seed": np.int64(recipe.seed),
        "split": recipe.split,
        **({} if solver.usual_steps == STEADY else {"time_step": float(solver.time_step)}),
        "source": ", ".join(f"{name} {version(name)}" for name in ("physml", *solver.packages, "jax")),
        "history": recipe.command,
    }
    return store.Labels(coordinates, variables, about)


def _axis_attributes(axis: Axis) -> dict[str, Any]:
    names = {"longitude": "X", "latitude": "Y", "level": "Z"}
    attributes = {"axis": names.get(axis.name, axis.name.upper()), "periodic": np.int32(axis.periodic)}
    if axis.periodic:
        attributes["period"] = float(axis.length)
    if axis.name in names:
        attributes["standard_name"] = axis.name
    return {**attributes, "units": axis.unit} if axis.unit else attributes


def _plain(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value
