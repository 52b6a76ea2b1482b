"""CFDBench: velocities of four two-dimensional flows on one grid each, one folder for each case.

On disk: `<root>/<problem>/<subset>/case<NNNN>/{u.npy, v.npy, case.json}` with the problems cavity, tube, dam, cylinder
and the subsets prop, bc, geo. `u` and `v` are `(time, y, x)`, float32 or float64; no pressure, times or coordinates are
stored. Published at Hugging Face, chen-yingfa/CFDBench.
"""

import dataclasses
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from physml.data import members
from physml.data.npy import Npy
from physml.data.place import Place
from physml.errors import ConfigError, DataError, first_line, suggest

FLUID = ("density", "viscosity", "height", "width")
PARAMETERS = {  # as the networks of the benchmark take them
    "cavity": ("vel_top", *FLUID),
    "tube": ("vel_in", *FLUID),
    "dam": ("velocity", *FLUID),
    "cylinder": ("vel_in", *FLUID, "center_x", "center_y", "radius"),
}
GEOMETRY = {
    "dam": ("dx", "dy", "barrier_width", "barrier_height"),
    "cylinder": ("x_min", "x_max", "y_min", "y_max"),
}
TOLD_BY = {"vel_top": "cavity", "velocity": "dam", "radius": "cylinder", "vel_in": "tube"}
SUBSETS = ("prop", "bc", "geo")
BOUNDARIES = {
    "cavity": "walls; the top one moves with vel_top",
    "tube": "left: inflow with vel_in; top and bottom: walls; right: outflow",
    "dam": "left: inflow with `velocity` below barrier_height; a barrier stands on the bottom at x = 0.5 m",
    "cylinder": "left: inflow with vel_in; top and bottom: walls; right: outflow; no slip at the cylinder",
}
UNITS = {"density": "kg m-3", "viscosity": "Pa s", "vel_top": "m s-1", "vel_in": "m s-1", "velocity": "m s-1"}
STEADY = 0.001  # m s-1: mean change of speed under which the code of the benchmark drops the rest of a case
SPLITS = ("train", "valid", "test")
Choice = Literal["upstream", "paper", "none"]


def recognizes(place: Place) -> bool:
    """Whether this is the root or the folder of one problem: they hold `<subset>/case<NNNN>/`."""
    if not place.is_folder():
        return False
    names = set(place.names())
    for folder in [place, *(place.below(name) for name in PARAMETERS if name in names)]:
        inside = names if folder is place else set(folder.names())
        for subset in (name for name in SUBSETS if name in inside):
            if cases := _cases(folder.below(subset)):
                return bool({"case.json", "u.npy"} & set(cases[0].names()))
    return False


def open_dataset(
    place: Place,
    *,
    split: str | None = None,
    problem: str | None = None,
    subset: str = "prop_bc_geo",
    mask: Literal["upstream", "geometric"] = "upstream",
    padding: Choice = "upstream",
    dt: Literal["autoregressive", "static"] = "autoregressive",
    steady: bool = False,
    normalize_parameters: bool = False,
) -> xr.Dataset:
    """`u` and `v` (m s-1, `(trajectory, time, y, x)`), `mask` (1 = fluid) and the parameters of every case, lazily.

    `x` and `y` are in units of the width and height of each case, because cases differ in size: cell centers, row 0 at
    the bottom; padding lies outside of 0..1. `time` is in seconds. `case` and `split` on `trajectory` tell where each
    one belongs. Cases that are shorter than the longest end with NaN; `frames` then counts the real frames.

    Args:
        place: the root, or the folder of one problem.
        split: "train", "valid" (or "dev"), "test": cases in the order of the benchmark, which shuffles them once.
            None: all, in the order prop, bc, geo.
        problem: which one of a root that holds several.
        subset: which of prop, bc, geo, joined by "_"; the split depends on it.
        mask: "upstream" as the benchmark makes it (the barrier of the dam counts as fluid; the border of the cylinder
            flow, except the right side, does not); "geometric" leaves out obstacles and padding, nothing else.
        padding: "upstream" adds a column on the left and a row below and above to tube and dam, filled with the
            inflow and zeros. "paper" does so for the cylinder too, and counts its center from the corner, as the code
            of the 2023 paper does. "none" adds nothing.
        dt: of the cylinder, whose frames are 0.001 s apart in the autoregressive set and 0.1 s in the static one; 0.1 s
            elsewhere. A `time_step` in case.json, which the published files do not have, comes before all of these.
        steady: cuts every case where it becomes steady, see `steady_frames`. Reads all frames at once.
        normalize_parameters: density -> (d - 5) / 4, viscosity -> (mu - 0.00238) / 0.005, velocities -> v / 50 - 0.5.

    Raises ConfigError for options that do not exist, DataError for missing, damaged or inconsistent cases.
    """
    _check_choice("mask", mask, ("upstream", "geometric"))
    _check_choice("padding", padding, ("upstream", "paper", "none"))
    _check_choice("dt", dt, ("autoregressive", "static"))
    split = "valid" if split == "dev" else split
    if split is not None:
        _check_choice("split", split, SPLITS)
    folder = _folder_of(place, problem)
    chosen = _split(_places(folder, subset), split, folder)
    kind = problem or _kind(chosen[0][0])
    with ThreadPoolExecutor(8) as pool:  # a remote store answers slowly
        cases = list(pool.map(lambda item: _Case.read(item[0], kind, padding), chosen))
    _check_alike(cases)
    ds = _dataset(cases, kind, padding, mask, normalize_parameters)
    step = cases[0].time_step or (0.001 if kind == "cylinder" and dt == "autoregressive" else 0.1)
    if steady:
        ds.encoding["source"] = str(folder)
        frames = steady_frames(ds).values.tolist()
        cut = [dataclasses.replace(case, frames=n) for case, n in zip(cases, frames, strict=True)]
        ds = _dataset(cut, kind, padding, mask, normalize_parameters)
    times = np.round(np.arange(ds.sizes["time"]) * step, 9)
    ds = ds.assign_coords(split=("trajectory", np.array([name for _, name in chosen])))
    return ds.assign_coords(time=("time", times, {"units": "s"})).assign_attrs(
        title=f"CFDBench, {kind}", problem=kind, time_step=step, boundary_conditions=BOUNDARIES[kind],
        parameters=list(PARAMETERS[kind]), source="Hugging Face: chen-yingfa/CFDBench",
    )  # fmt: skip


def steady_frames(ds: xr.Dataset, steps: int = 1) -> xr.DataArray:
    """How many frames of every case come before it is steady; pairs of input and target number `frames - steps`.

    Pairs lie `steps` frames apart. They end before the first frame i with mean ||U_i| - |U_i+steps|| < 0.001 m s-1 over
    all cells. Reads the cases one after the other. Raises DataError for NaN in a pair.
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}, but pairs lie at least one frame apart.")
    result = []
    for i in range(ds.sizes["trajectory"]):
        frames = int(ds["frames"][i]) if "frames" in ds else ds.sizes["time"]
        case = ds.isel(trajectory=i, time=slice(frames))
        speed = np.hypot(case["u"].values, case["v"].values)
        change = np.abs(speed[:-steps] - speed[steps:]).mean(axis=(1, 2))
        still = np.flatnonzero(change < STEADY)
        pairs = int(still[0]) if len(still) else len(change)
        if np.isnan(change[:pairs]).any():
            name = str(ds["case"].values[i])
            raise DataError(
                f"{ds.encoding.get('source', 'CFDBench')}: {name} has NaN in frame "
                f"{int(np.argmax(np.isnan(change)))} or the one after. Drop the case."
            )
        result.append(min(pairs + steps, frames))
    return xr.DataArray(np.array(result, np.int64), dims="trajectory", name="frames")


# --- finding cases ----------------------------------------------------------------------------------------------------


def _check_choice(option: str, value, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"CFDBench has no {option}={value!r}." + suggest(str(value), valid))


def _folder_of(place: Place, problem: str | None) -> Place:
    if problem is not None:
        _check_choice("problem", problem, tuple(PARAMETERS))
    names = place.names()
    if any(subset in names for subset in SUBSETS):
        return place
    found = [name for name in PARAMETERS if name in names]
    if problem is None and len(found) > 1:
        raise ConfigError(f"{place} holds {len(found)} problems: {', '.join(found)}. Choose one: problem={found[0]!r}.")
    if not found or (problem is not None and problem not in found):
        wanted = problem or "prop, bc, geo, nor one of " + ", ".join(PARAMETERS)
        raise DataError(f"{place} has no folder {wanted}. Give the root of CFDBench or the folder of one problem.")
    return place.below(problem or found[0])


def _places(folder: Place, subset: str) -> list[Place]:
    """The folders of all cases in the order of the benchmark, before it shuffles them."""
    parts = subset.split("_")
    for part in parts:
        _check_choice("subset", part, SUBSETS)
    names, result = folder.names(), []
    for part in (name for name in SUBSETS if name in parts):
        if part not in names:
            rest = "_".join(name for name in SUBSETS if name in names) or "prop"
            raise DataError(f"{folder} has no folder {part!r}. Download it, or leave it out: subset={rest!r}.")
        if not (cases := _cases(folder.below(part))):
            raise DataError(f"{folder.below(part)} holds no folder case0000, case0001, ... Download it again.")
        result += cases
    return result


def _cases(folder: Place) -> list[Place]:
    numbers = {name: int(found[1]) for name in folder.names() if (found := re.fullmatch(r"case(\d{1,9})", name, re.A))}
    return [folder.below(name) for name in sorted(numbers, key=numbers.__getitem__)]


def _split(cases: list[Place], split: str | None, folder: Place) -> list[tuple[Place, str]]:
    """Cases with the split of each; those of one split come in the order of the benchmark."""
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    train, valid = round(0.8 * len(cases)), round(0.1 * len(cases))
    names = ["train"] * train + ["valid"] * valid + ["test"] * len(cases)
    of = {index: names[at] for at, index in enumerate(order)}
    chosen = order if split is not None else range(len(cases))
    result = [(cases[i], of[i]) for i in chosen if split in (None, of[i])]
    if not result:
        raise DataError(f"{folder}: the split {split!r} of {len(cases)} cases is empty. Download all cases.")
    return result


# --- one case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One case: its numbers, and how its arrays become frames of the grid with padding."""

    name: str
    numbers: dict[str, float]
    arrays: dict[str, Npy]
    frames: int
    time_step: float | None  # None where the file does not tell, as published

    @staticmethod
    def read(place: Place, kind: str, padding: Choice) -> "_Case":
        path = place.below("case.json")
        description = _description(path)
        numbers = _numbers(path, description, kind)
        time_step = None if "time_step" not in description else _number(path, "time_step", description["time_step"])
        if time_step is not None and not time_step > 0:
            raise DataError(f"{path}: 'time_step' is {time_step:g}, but it should be positive. Correct the file.")
        if kind == "cylinder" and padding == "paper":
            numbers |= {"center_x": -numbers["x_min"], "center_y": -numbers["y_min"]}
        u, v = (Npy.read(place.below(name), ("time", "y", "x")) for name in ("u.npy", "v.npy"))
        if u.shape != v.shape:
            raise DataError(f"{v.place} has shape {v.shape}, but u.npy has {u.shape}. Download the case again.")
        return _Case("/".join(place.path.rstrip("/").split("/")[-2:]), numbers, {"u": u, "v": v}, u.shape[0], time_step)


def _description(path: Place) -> dict:
    try:
        found = json.loads(path.read(2**16))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON text: {first_line(error)}. Download it again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} should hold names with numbers, such as {{'density': 1.0}}. Download it again.")
    return found


def _kind(case: Place) -> str:
    """The problem, told by the parameters of a case: folders may have any name."""
    path = case.below("case.json")
    found = _description(path)
    for key, kind in TOLD_BY.items():
        if key in found:
            return kind
    raise DataError(f"{path} has none of {', '.join(TOLD_BY)}, which tell the problem. Download it again.")


def _numbers(path: Place, found: dict, kind: str) -> dict[str, float]:
    """All parameters of a case and its geometry. Raises DataError for what is missing or is not finite."""
    if kind == "cylinder":
        found = {"center_x": 0.0, "center_y": 0.0, **found}
        derived = {"height": ("y_max", "y_min"), "width": ("x_max", "x_min")}
    else:
        derived = {}
    numbers = {}
    for name in (*PARAMETERS[kind], *GEOMETRY.get(kind, ())):
        if name in derived:
            continue
        if name not in found:
            raise DataError(f"{path} has no {name!r}, which a case of the {kind} needs." + suggest(name, list(found)))
        numbers[name] = _number(path, name, found[name])
    numbers |= {name: numbers[high] - numbers[low] for name, (high, low) in derived.items()}
    for name in ("height", "width", "dx", "dy", "barrier_height"):
        if not numbers.get(name, 1) > 0:
            raise DataError(f"{path}: {name!r} is {numbers[name]:g}, but it should be positive. Correct the file.")
    return numbers


def _number(path: Place, name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise DataError(f"{path}: {name!r} is {str(value)[:40]!r}, but it should be a finite number. Correct it.")
    return float(value)


# --- the grid with padding and mask -----------------------------------------------------------------------------------


def _check_alike(cases: list[_Case]) -> None:
    first = cases[0].arrays["u"]
    for case in cases:
        own = case.arrays["u"]
        if own.shape[1:] != first.shape[1:]:
            raise DataError(
                f"{own.place} has {own.shape[1]} x {own.shape[2]} cells, but {first.place} has {first.shape[1]} x "
                f"{first.shape[2]}. Put cases of different grids into different folders."
            )
        if case.time_step != cases[0].time_step:
            raise DataError(
                f"{own.place.path.rpartition('/')[0]} has time_step {case.time_step}, but {cases[0].name} has "
                f"{cases[0].time_step}. Put cases with different frame intervals into different folders."
            )


def _dataset(cases: list[_Case], kind: str, padding: Choice, mask: str, normalize: bool) -> xr.Dataset:
    padded = padding != "none" and (kind in ("tube", "dam") or (kind == "cylinder" and padding == "paper"))
    (_, height, width), border = cases[0].arrays["u"].shape, int(padded)
    frames = [case.frames for case in cases]
    grid = (height + 2 * border, width + border)
    variables: dict[str, xr.Variable] = {}
    for name, text in (("u", "velocity to the right"), ("v", "velocity upwards")):
        dtype = np.result_type(*(case.arrays[name].dtype for case in cases)).newbyteorder("=")

        def read(at: int, start: int, stop: int, name=name, dtype=dtype) -> np.ndarray:
            result = np.full((stop - start, *grid), np.nan, dtype)
            real = min(stop, cases[at].frames) - start
            if real > 0:
                values = cases[at].arrays[name].rows(start, start + real)
                result[:real] = _pad(values, cases[at].numbers, kind, name) if padded else values
            return result

        attrs = {"units": "m s-1", "long_name": text}
        variables[name] = members.stack(len(cases), (max(frames), *grid), dtype, ("time", "y", "x"), read, attrs)
    shared = kind in ("cavity", "tube") or (kind == "dam" and mask == "upstream")
    masks = [_mask(case.numbers, kind, (height, width), mask, padded) for case in (cases[:1] if shared else cases)]
    dims = ("y", "x") if shared else ("trajectory", "y", "x")
    variables["mask"] = xr.Variable(dims, masks[0] if shared else np.stack(masks), {"long_name": "1 = fluid"})
    for name in (*PARAMETERS[kind], *GEOMETRY.get(kind, ())):
        values = np.array([case.numbers[name] for case in cases])
        scale = {"density": (5, 4), "viscosity": (0.00238, 0.005), PARAMETERS[kind][0]: (25, 50)}.get(name)
        scaled = normalize and scale is not None
        values = (values - scale[0]) / scale[1] if scaled else values
        variables[name] = xr.Variable("trajectory", values, {"units": "1" if scaled else UNITS.get(name, "m")})
    if min(frames) < max(frames):
        variables["frames"] = xr.Variable("trajectory", np.array(frames))
    coords = {
        "case": ("trajectory", np.array([case.name for case in cases])),
        "y": (
            "y",
            (np.arange(grid[0]) + 0.5 - border) / height,
            {"units": "1", "long_name": "y / height", "periodic": 0},
        ),
        "x": (
            "x",
            (np.arange(grid[1]) + 0.5 - border) / width,
            {"units": "1", "long_name": "x / width", "periodic": 0},
        ),
    }
    return xr.Dataset(variables, coords)


def _pad(values: np.ndarray, numbers: dict[str, float], kind: str, name: str) -> np.ndarray:
    """With a column of inflow on the left and rows of zeros below and above."""
    result = np.pad(values, ((0, 0), (1, 1), (1, 0)))
    if name == "u" and kind == "dam":
        rows = min(values.shape[1], int(min(numbers["barrier_height"] / numbers["dy"], 1e9)))
        result[:, 1 : 1 + rows, 0] = numbers["velocity"]
    elif name == "u":
        result[:, 1:-1, 0] = numbers["vel_in"]
    return result


def _mask(numbers: dict[str, float], kind: str, shape: tuple[int, int], mask: str, padded: bool) -> np.ndarray:
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1]) + 0.5
    fluid = np.ones(shape, bool)
    if kind == "dam" and mask == "geometric":
        x, y = columns * numbers["dx"], rows * numbers["dy"]
        fluid = ~((x >= 0.5) & (x <= 0.5 + numbers["barrier_width"]) & (y <= numbers["barrier_height"]))
    if kind == "cylinder":
        # The paper counts the center from the lower left corner, the current code from the origin of x_min, y_min.
        x = columns * (numbers["width"] / shape[1]) + (0 if padded else numbers["x_min"]) - numbers["center_x"]
        y = rows * (numbers["height"] / shape[0]) + (0 if padded else numbers["y_min"]) - numbers["center_y"]
        fluid = np.hypot(x, y) > numbers["radius"]
        if mask == "upstream" and not padded:
            fluid[[0, -1]], fluid[:, 0] = False, False
    return (np.pad(fluid, ((1, 1), (1, 0))) if padded else fluid).astype(np.int8)
