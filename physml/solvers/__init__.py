"""Reference solvers: where generated data comes from.

`SOLVERS` maps a name to a frozen config. Each config draws an initial state, gives a pure step function, and says how
the state of the solver is stored; `physml.data.generate` turns that into files.
"""

from typing import Any

from physml.coding import from_dict
from physml.solvers.cfdbench_flows import Cavity, Cylinder, Dam, Tube
from physml.solvers.chaos import Chen, HenonHeiles, Lorenz63, Lorenz84, Lorenz96, Rossler, Thomas
from physml.solvers.darcy import DarcyFlow
from physml.solvers.dispersive import Advection, KortewegDeVries
from physml.solvers.euler import Euler
from physml.solvers.fourier import resample, velocity_of, vorticity_of
from physml.solvers.periodic import Burgers, DecayingNavierStokes, Kolmogorov, KuramotoSivashinsky
from physml.solvers.porous import Heat, PorousMedium, Stefan
from physml.solvers.quasigeostrophic import Quasigeostrophic
from physml.solvers.reaction import GrayScott
from physml.solvers.shallow_water import ShallowWater, ShallowWaterSphere
from physml.solvers.smoke import Smoke
from physml.solvers.staggered import StaggeredFlow
from physml.solvers.tracer import TracerSphere
from physml.solvers.waves import Acoustic, Wave

SOLVERS = {
    "acoustic": Acoustic,
    "advection": Advection,
    "burgers": Burgers,
    "cavity": Cavity,
    "chen": Chen,
    "cylinder": Cylinder,
    "dam": Dam,
    "darcy_flow": DarcyFlow,
    "decaying_navier_stokes": DecayingNavierStokes,
    "euler": Euler,
    "gray_scott": GrayScott,
    "heat": Heat,
    "henon_heiles": HenonHeiles,
    "kolmogorov": Kolmogorov,
    "korteweg_de_vries": KortewegDeVries,
    "kuramoto_sivashinsky": KuramotoSivashinsky,
    "lorenz63": Lorenz63,
    "lorenz84": Lorenz84,
    "lorenz96": Lorenz96,
    "porous_medium": PorousMedium,
    "quasigeostrophic": Quasigeostrophic,
    "rossler": Rossler,
    "shallow_water": ShallowWater,
    "shallow_water_sphere": ShallowWaterSphere,
    "smoke": Smoke,
    "staggered_flow": StaggeredFlow,
    "stefan": Stefan,
    "thomas": Thomas,
    "tracer_sphere": TracerSphere,
    "tube": Tube,
    "wave": Wave,
}


def make_solver(name: str, /, **fields: Any):
    """The config `SOLVERS[name]` with `fields` changed.

    Raises ConfigError for an unknown name or field (with the nearest valid one), a wrong type, or impossible values.
    """
    return from_dict(SOLVERS, {"name": name, **fields}, "solver")


def name_of(solver: Any) -> str:
    """The registry name of a solver config."""
    from physml.coding import name_of as registered

    return registered(solver, SOLVERS, "solver")


__all__ = [
    "Acoustic", "Advection", "Burgers", "Cavity", "Chen", "Cylinder", "Dam", "DarcyFlow", "DecayingNavierStokes",
    "Euler", "GrayScott", "Heat", "HenonHeiles", "Kolmogorov", "KortewegDeVries", "KuramotoSivashinsky", "Lorenz63",
    "Lorenz84", "Lorenz96", "PorousMedium", "Quasigeostrophic", "Rossler", "SOLVERS", "ShallowWater",
    "ShallowWaterSphere", "Smoke", "StaggeredFlow", "Stefan", "Thomas", "TracerSphere", "Tube", "Wave", "make_solver",
    "name_of", "resample", "velocity_of", "vorticity_of",
]  # fmt: skip
