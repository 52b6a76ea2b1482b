"""Flows in the layout of CFDBench: `<root>/<problem>/<subset>/case<NNNN>/{u.npy, v.npy, case.json}`.

`generate_cases` makes a set of our own, which `physml.open_dataset(root, problem=...)` opens like the published one.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from physml import coding
from physml.data.cfdbench import GEOMETRY, PARAMETERS, SUBSETS
from physml.data.generate import FORMAT_VERSION, generate
from physml.errors import ConfigError, DataError, suggest
from physml.files import exclusive, replace
from physml.progress import Progress
from physml.solvers import SOLVERS, make_solver

RECIPE = "recipe.json"  # beside the cases of a subset: what they were generated with


def generate_cases(
    root: str | os.PathLike,
    problems: Sequence[str] = tuple(PARAMETERS),
    subsets: Sequence[str] = SUBSETS,
    cases: int | None = None,
    points: int = 64,
    steps: int | None = None,
    seed: int = 0,
    *,
    options: dict[str, Any] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Solves the cases of the chosen problems and subsets and writes them below `root`; returns it.

    A subset that is there already, made with the same settings, is kept. A subset appears only when it is complete; an
    interrupted call continues in `<subset>.nc.partial`.

    Args:
        root: folder, made if need be.
        problems: of cavity, tube, dam, cylinder.
        subsets: of prop, bc, geo.
        cases: how many of every subset, spread over its table; all of them if not given, and never more than there are.
        points: stored cells per axis, and those of the solver; the cylinder takes twice as many to solve. Below 64
            points the largest Reynolds number of the cavity shrinks as points^2, so that its layers span a cell.
        steps: stored steps of every case (`steps + 1` frames); the solver's own choice if not given.
        seed: decides the disturbances behind the cylinder; nothing else is random.
        options: other fields of the solvers, such as {"largest_reynolds": 100.0, "time_step": 0.01}.
        overwrite: replace subsets made with other settings. What `generate_cases` did not make is never replaced.
        workers, progress: as in `physml.data.generate.generate`.

    Raises ConfigError for names and settings that cannot work, DataError for a subset that is there with other
    settings, DivergedError when a case leaves the finite numbers.
    """
    root = Path(root)
    for name, given, valid in (("problem", problems, tuple(PARAMETERS)), ("subset", subsets, SUBSETS)):
        for value in [given] if isinstance(given, str) else given:
            if value not in valid:
                raise ConfigError(f"CFDBench has no {name} {value!r}." + suggest(str(value), valid))
    if cases is not None and cases < 1:
        raise ConfigError(f"cases is {cases}, but every subset needs at least one.")
    problems = [problems] if isinstance(problems, str) else problems
    for problem in problems:
        usual: dict[str, Any] = {"points": points, "solver_points": 2 * points if problem == "cylinder" else points}
        if problem == "cavity" and points < 64:
            usual["largest_reynolds"] = SOLVERS["cavity"].largest_reynolds * (points / 64) ** 2
        for subset in [subsets] if isinstance(subsets, str) else subsets:
            solver = make_solver(problem, **{**usual, "subset": subset, **(options or {})})
            table = len(solver.cases["viscosity"])
            count = table if cases is None else min(cases, table)
            settings = {
                "solver": coding.to_dict(solver, SOLVERS), "cases": count, "seed": seed,
                "steps": solver.usual_steps if steps is None else steps, "format_version": FORMAT_VERSION,
            }  # fmt: skip
            folder = root / problem / subset
            with exclusive(folder):
                if _is_there(folder, json.loads(json.dumps(settings)), overwrite):
                    continue
                file = folder.with_name(f"{subset}.nc")
                generate(
                    solver, file, count, seed=seed, steps=settings["steps"], workers=workers, overwrite=True,
                    progress=progress,
                )  # fmt: skip
                with xr.open_dataset(file) as ds:
                    _write(ds, folder, problem, settings)
                file.unlink()
    return root


def write_cases(ds: xr.Dataset, root: str | os.PathLike, problem: str, subset: str) -> Path:
    """Writes the trajectories of a generated flow as `<root>/<problem>/<subset>/case<NNNN>`; returns that folder.

    Args:
        ds: `u` and `v` `(trajectory, time, y, x)` in m s-1, times in s, and the parameters of the problem (numbers, or
            one for each trajectory), as `physml data generate` stores them: for the cylinder `center_x` and `center_y`
            count from the lower left corner.
        root: folder, made if need be.
        problem: cavity, tube, dam or cylinder.
        subset: prop, bc or geo.

    Raises ConfigError for other names, DataError for what `ds` lacks, and when the folder exists.
    """
    for name, value, valid in (("problem", problem, tuple(PARAMETERS)), ("subset", subset, SUBSETS)):
        if value not in valid:
            raise ConfigError(f"CFDBench has no {name} {value!r}." + suggest(str(value), valid))
    folder = Path(root) / problem / subset
    with exclusive(folder):
        if folder.exists():
            raise DataError(f"{folder} exists already. Choose another root, or remove it first.")
        _write(ds, folder, problem, None)
    return folder


def _is_there(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the subset was made with these settings. Raises DataError for anything else that is in its place."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / RECIPE).read_text())
    except (OSError, ValueError):
        raise DataError(
            f"{folder} exists, but was not made by generate_cases. Choose another root, or remove it."
        ) from None
    if found == settings:
        return True
    if not overwrite:
        keys = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
        raise DataError(
            f"{folder} holds cases made with other settings (they differ in {', '.join(keys)}). Choose another root, "
            "or pass overwrite=True to replace them."
        )
    return False


def _write(ds: xr.Dataset, folder: Path, problem: str, settings: dict[str, Any] | None) -> None:
    """All cases into a folder beside `folder`, which then takes its place."""
    missing = {"u", "v", "time", *_needed(problem)} - set(ds.variables)
    if missing:
        raise DataError(f"A case of the {problem} needs {sorted(missing)[0]!r}, which these data do not have.")
    times = ds["time"].values.astype(np.float64)
    if len(times) < 2:
        raise DataError("A case needs at least two frames, but these data have one.")
    partial = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    shape = (ds.sizes["y"], ds.sizes["x"])
    for i in range(ds.sizes["trajectory"]):
        numbers = {name: float(ds[name].values.reshape(-1)[i if ds[name].ndim else 0]) for name in _needed(problem)}
        case = partial / f"case{i:04d}"
        case.mkdir(parents=True)
        for name in ("u", "v"):
            values = ds[name].isel(trajectory=i).transpose("time", "y", "x").values
            np.save(case / f"{name}.npy", np.ascontiguousarray(values, np.float32))
        described = {**_described(problem, numbers, shape), "time_step": round(float(times[1] - times[0]), 12)}
        (case / "case.json").write_text(json.dumps(described, indent=1) + "\n")
    if settings is not None:
        (partial / RECIPE).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    replace(partial, folder)


def _needed(problem: str) -> tuple[str, ...]:
    given = ("barrier_width", "barrier_height") if problem == "dam" else ()
    return (*PARAMETERS[problem], *given)


def _described(problem: str, numbers: dict[str, float], shape: tuple[int, int]) -> dict[str, float]:
    """The numbers of case.json; see `GEOMETRY`. The origin of the cylinder's coordinates is its center."""
    if problem == "dam":
        return {**numbers, "dx": numbers["width"] / shape[1], "dy": numbers["height"] / shape[0]}
    if problem == "cylinder":
        x, y = numbers.pop("center_x"), numbers.pop("center_y")
        limits = dict(zip(GEOMETRY["cylinder"], (-x, numbers["width"] - x, -y, numbers["height"] - y), strict=True))
        return {name: value for name, value in numbers.items() if name not in ("height", "width")} | limits
    return numbers
