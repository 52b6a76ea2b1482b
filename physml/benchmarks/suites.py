"""`BENCHMARKS`: the protocols of the field, on their own data or on generated stand-ins of the same equations."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from physml.benchmarks import protocol
from physml.benchmarks.protocol import Published, Suite, Task
from physml.data import DataConfig, SyntheticConfig, open_dataset
from physml.data.cfdbench import PARAMETERS, SUBSETS
from physml.data.formats import recognize
from physml.data.synthetic import Counts
from physml.errors import DataError
from physml.files import cache_folder
from physml.metrics.losses import H1
from physml.objectives import OneStep
from physml.progress import Progress

OWN_SPLITS = {"split_by": "format", "train": ("train",), "valid": ("valid",), "test": ("test",)}
PROBLEMS = tuple(PARAMETERS)
EMBEDDED_CASES = 14  # of each of three subsets
EMBEDDED_OPTIONS = {"tube": {"time_step": 0.02}}  # without a front, the flow through a tube is soon steady


# --- CFDBench ---------------------------------------------------------------------------------------------------------


def _cfdbench(root: Path | None, points: int | None) -> tuple[Task, ...]:
    if root is None:
        points = points or 32
        root = cache_folder() / "generated" / f"cfdbench-{points}"
        return tuple(
            _case_task(root, problem, SUBSETS, functools.partial(_generate_cases, root, problem, points))
            for problem in PROBLEMS
        )
    found = [name for name in PROBLEMS if (root / name).is_dir()]
    if not found:
        raise DataError(f"{root} holds none of the folders {', '.join(PROBLEMS)}. Give the root of CFDBench.")
    return tuple(_case_task(root, name, [s for s in SUBSETS if (root / name / s).is_dir()]) for name in found)


def _case_task(root: Path, problem: str, subsets: Sequence[str], prepare: Any = None) -> Task:
    def data(steady: bool) -> DataConfig:
        options = {"problem": problem, "subset": "_".join(subsets), "steady": steady}
        return DataConfig(
            str(root), "cfdbench", variables=("u", "v"), static=("mask",), parameters=PARAMETERS[problem],
            options=options, **OWN_SPLITS,
        )  # fmt: skip

    return Task(problem, data(steady=True), 20, data(steady=False), prepare=prepare)


def _generate_cases(root: Path, problem: str, points: int, progress: Progress) -> None:
    from physml.data.cfdbench_writer import generate_cases

    progress.stage(f"generating {problem}")
    generate_cases(
        root, problem, cases=EMBEDDED_CASES, points=points, options=EMBEDDED_OPTIONS.get(problem), overwrite=True,
        progress=progress,
    )  # fmt: skip


CFDBENCH = Suite(
    "CFDBench",
    "Splits by case. One step: all pairs of the test cases before each becomes steady. Rollouts: 20 steps from the "
    "first frame, the prediction fed back. NMSE = mean squared error / mean square of the truth over all cells, "
    "pairs and both velocities. The parameters of a case are given to every network as numbers, the mask as a "
    "field.",
    _cfdbench,
    protocol.NMSE,
    ("fno", "unet", "deeponet", "ffn"),
    "the four flows by an own solver, single-phase, Reynolds numbers capped",
    more=(protocol.RMSE, protocol.CORRELATION),
    floors=("persistence", "extrapolation"),
    published=tuple(
        Published(task, model, value, "Luo et al. 2023 (arXiv:2310.05963), figure 7, read off; 64 x 64")
        for task, rows in {
            "cavity": {"identity": 1.4e-3, "FNO": 5e-4, "U-Net": 4e-4},
            "tube": {"identity": 0.11, "FNO": 5e-3, "U-Net": 3e-3},
            "dam": {"identity": 3.1e-3, "Auto-EDeepONet": 2.7e-3, "U-Net": 3.2e-3},
            "cylinder": {"identity": 1.5e-2, "FNO": 2e-5, "U-Net": 2e-5},
        }.items()
        for model, value in rows.items()
    ),
)


# --- one folder, or several of one format -----------------------------------------------------------------------------


def _found(root: Path, format: str, one_file_each: bool = False) -> dict[str, Path]:
    """Data sets of a format: `root` itself, or what is directly in it (always where each is one file)."""
    if recognize(root) == format and not (one_file_each and root.is_dir()):
        return {root.stem: root}
    inside = sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    found = {path.stem: path for path in inside if recognize(path) == format}
    if not found:
        raise DataError(f"{root} holds no data of the format {format}. Give one data set, or a folder of several.")
    return found


def _conditions(path: Path, format: str) -> dict[str, tuple[str, ...]]:
    """Fields without time as `static`, numbers that differ between trajectories as `parameters`."""
    ds = open_dataset(path, format)
    fields = {str(name): v for name, v in ds.data_vars.items() if v.dtype.kind in "iufb"}
    static = (name for name, v in fields.items() if "time" not in v.dims and set(v.dims) - {"trajectory"})
    numbers = {name: v.values for name, v in fields.items() if v.dims == ("trajectory",) and name != "frames"}
    varying = (name for name, values in numbers.items() if np.isfinite(values).all() and np.ptp(values) > 0)
    return {"static": tuple(static), "parameters": tuple(varying)}


def _generated(name: str, points: int | None, counts: Counts, steps: int, **options: Any) -> SyntheticConfig:
    return SyntheticConfig(name, points, counts, steps, max(steps, 21), options=options)


def _pdearena(root: Path | None, points: int | None) -> tuple[Task, ...]:
    if root is not None:
        return tuple(
            Task(name, DataConfig(str(path), "pdearena", **_conditions(path, "pdearena"), **OWN_SPLITS), 10)
            for name, path in _found(root, "pdearena").items()
        )
    counts = Counts(32, 4, 8)
    waves = _generated("kuramoto_sivashinsky", 64, counts, 140, solver_points=64)
    return (
        Task("smoke", _generated("smoke", points or 32, counts, 20), 10),
        Task("kuramoto_sivashinsky", waves, 40),
        Task("shallow_water", _generated("shallow_water", points or 32, counts, 20), 10),
    )


PDEARENA = Suite(
    "PDEArena",
    "Splits of the files. One step: every pair of neighboring frames of the test trajectories. Rollouts: from the "
    "first frame. SMSE = mean squared error summed over channels; scaled L2 = relative L2 error, mean over "
    "channels.",
    _pdearena,
    protocol.SCALED_L2,
    ("fno", "modern_unet", "sinenet", "unet"),
    "buoyant smoke, Kuramoto-Sivashinsky, shallow water in a periodic plane",
    more=(protocol.SMSE, protocol.CORRELATION),
    published=tuple(
        Published("ShallowWater-2D", f"SineNet-8, {padding} padding", value, "quoted by a third party", lead)
        for padding, values in {"zero": (0.0150, 0.0419), "circular": (0.0102, 0.0178)}.items()
        for lead, value in zip((1, 10), values, strict=True)
    ),
)


STEADY_SETS = {  # of Poseidon: what is given and what is to be found
    "SE-AF": {"static": ("airfoil",), "variables": ("rho",)},
    "Poisson-Gauss": {"static": ("source",), "variables": ("u",)},
    "Helmholtz": {"static": ("a", "bc"), "variables": ("u",)},
}


def _poseidon_task(name: str, path: Path) -> Task:
    """Channels that are constant by construction (density and pressure of incompressible flow) are left out."""
    if name in STEADY_SETS:
        data = DataConfig(str(path), "poseidon", options={"normalize": True}, **STEADY_SETS[name], **OWN_SPLITS)
        return Task(name, data, 1, history=0, objective=OneStep())
    fields: dict[str, tuple[str, ...]] = {}
    if name.startswith(("NS-", "FNS-")):
        fields = {"variables": ("u", "v", "tracer") if "Tracer" in name else ("u", "v")}
    if name.startswith("FNS-"):
        fields["static"] = ("forcing",)
    if name.startswith("Wave-"):
        fields = {"variables": ("u",), "static": ("c",)}
    if name == "GCE-RT":
        fields = {"variables": ("rho", "u", "v", "p"), "forcing": ("g",)}
    return Task(name, DataConfig(str(path), "poseidon", options={"normalize": True}, **fields, **OWN_SPLITS), 20)


def _poseidon(root: Path | None, points: int | None) -> tuple[Task, ...]:
    if root is not None:
        return tuple(_poseidon_task(name, path) for name, path in _found(root, "poseidon", one_file_each=True).items())
    counts, size = Counts(48, 6, 12), points or 32
    gas = {"solver_points": 2 * size, "precision": "float32"}
    flow = {"store": "velocity", "substeps": 20, **gas}
    return (
        Task("NS", _generated("decaying_navier_stokes", size, counts, 20, **flow), 20),
        Task("CE-RP", _generated("euler", size, counts, 20, initial_state="riemann", **gas), 20),
        Task("CE-KH", _generated("euler", size, counts, 20, initial_state="kelvin_helmholtz", **gas), 20),
    )


POSEIDON = Suite(
    "Poseidon",
    "Splits by position. Relative L1 error, mean over channels, median over the test trajectories; at one step and "
    "along a rollout from the first frame, whose last lead is the final time that the paper scores.",
    _poseidon,
    protocol.RELATIVE_L1,
    ("fno", "scot", "modern_unet"),
    "decaying turbulence and compressible flow (Riemann problems, Kelvin-Helmholtz)",
    more=(protocol.SCALED_L2, protocol.CORRELATION),
)

THE_WELL_ONE_STEP = {
    "acoustic_scattering_maze": (0.0351, 0.0153),
    "active_matter": (0.2489, 0.1034),
    "convective_envelope_rsg": (0.0555, 0.0799),
    "euler_multi_quadrants_periodicBC": (0.1834, 0.1531),
    "gray_scott_reaction_diffusion": (0.2252, 0.1761),
    "helmholtz_staircase": (0.01931, 0.02758),
    "MHD_64": (0.1798, 0.1633),
    "planetswe": (0.3620, 0.3724),
    "rayleigh_benard": (1.4860, 0.6699),
    "shear_flow": (3.447, 0.8080),
    "supernova_explosion_64": (0.3063, 0.3181),
    "turbulence_gravity_cooling": (0.6753, 0.2096),
    "turbulent_radiative_layer_2D": (0.2418, 0.1956),
    "turbulent_radiative_layer_3D": (0.3728, 0.3667),
    "viscoelastic_instability": (0.4185, 0.2499),
}


def _well(root: Path | None, points: int | None) -> tuple[Task, ...]:
    if root is not None:
        return tuple(
            Task(name, DataConfig(str(path), "the_well", **_conditions(path, "the_well"), **OWN_SPLITS), 30)
            for name, path in _found(root, "the_well").items()
        )
    counts, size = Counts(32, 4, 8), points or 32
    return (
        Task("gray_scott", _generated("gray_scott", size, counts, 40, length=0.5, solver_points=96), 30),
        Task("euler_quadrants", _generated("euler", size, counts, 40, solver_points=2 * size, precision="float32"), 30),
    )


WELL = Suite(
    "The Well",
    "Splits of the files. VRMSE = root of (mean squared error / variance over space), mean over fields and pairs; 1"
    " is the error of the spatial mean. One step: all pairs of the test files; rollouts of 30 steps from the first "
    "frame.",
    _well,
    protocol.VRMSE,
    ("fno", "unet", "modern_unet"),
    "Gray-Scott patterns and Euler quadrants",
    more=(protocol.SCALED_L2, protocol.CORRELATION),
    published=tuple(
        Published(task, model, value, "Ohana et al. 2024 (arXiv:2412.00568), repository; 4 frames of history")
        for task, values in THE_WELL_ONE_STEP.items()
        for model, value in zip(("U-Net", "CNextU-Net"), values, strict=True)
    ),
)


def _darcy(root: Path | None, points: int | None) -> tuple[Task, ...]:
    objective = OneStep(loss=H1())
    if root is None:
        data = SyntheticConfig("darcy_flow", points or 16, Counts(1000, 50, 50))
        return (Task("darcy", data, 1, history=0, objective=objective),)
    files = {split: root / f"darcy_{split}.nc" for split in ("train_16", "test_16", "test_32")}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        raise DataError(f"{root} lacks {', '.join(missing)}. datasets/darcy/CARD.md says how to make them.")

    def data(test: str) -> DataConfig:
        return DataConfig(
            variables=("u",), static=("a",), space=("y", "x"), train=(str(files["train_16"]),), valid=(),
            test=(str(files[test]),), split_by="file",
        )  # fmt: skip

    return (Task("darcy_16", data("test_16"), 1, history=0, objective=objective),)


DARCY = Suite(
    "Darcy flow",
    "Coefficient to solution, no time. Relative L2 error and relative H1 error, mean over the test problems. "
    "Trained with the H1 loss.",
    _darcy,
    protocol.SCALED_L2,
    ("fno", "unet", "ffno"),
    "Darcy flow with two-valued coefficients by an own solver",
    more=(protocol.H1,),
    floors=("climatology",),
    published=(
        Published("darcy_16", "FNO, neuraloperator 2.0.0", 0.0955, "measured here, 100 epochs; datasets/darcy/CARD.md"),
    ),
)

WEATHER_CHANNELS = {"variables": ("geopotential", "temperature", "2m_temperature"), "levels": (500, 850)}


def _weather(root: Path | None, points: int | None) -> tuple[Task, ...]:
    if root is None:
        flow = _generated("shallow_water_sphere", points or 32, Counts(16, 2, 4), 40)
        return (Task("shallow_water_sphere", flow, 20),)
    data = DataConfig(
        str(root), "weatherbench2", flatten=("level",), static=("land_sea_mask",), train=("1979", "2018"),
        valid=("2019",), test=("2020",), **WEATHER_CHANNELS,
    )  # fmt: skip
    return (Task(root.stem, data, 20, starts=61),)


WEATHER = Suite(
    "Weather",
    "Trained on 1979-2018, validated on 2019, scored on 2020 (WeatherBench 2), with cell areas as weights and squared "
    "errors averaged over starts before the root. RMSE in units of that of the climatology of the training years, mean "
    "over fields; ACC against the same climatology. RMSE in the unit of each field is in rollout.nc of every run.",
    _weather,
    protocol.RELATIVE_RMSE,
    ("fno", "modern_unet", "scot"),
    "barotropically unstable jets of the shallow-water equations on the sphere (extra `sphere`)",
    more=(protocol.ACC, protocol.RMSE),
)

BENCHMARKS: dict[str, Suite] = {
    "cfdbench": CFDBENCH,
    "darcy": DARCY,
    "pdearena": PDEARENA,
    "poseidon": POSEIDON,
    "weather": WEATHER,
    "well": WELL,
}
