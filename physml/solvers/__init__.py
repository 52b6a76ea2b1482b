"""Reference solvers: where generated data comes from.

`SOLVERS` maps a name to a frozen config. Each config draws an initial state, gives a pure step function, and says how
the state of the solver is stored; `physml.data.generate` turns that into files.
"""

from typing import Any

from physml.coding import from_dict
from physml.solvers.dispersive import Advection, KortewegDeVries
from physml.solvers.fourier import resample, velocity_of
from physml.solvers.periodic import Burgers, DecayingNavierStokes, Kolmogorov, KuramotoSivashinsky

SOLVERS = {
    "advection": Advection,
    "burgers": Burgers,
    "decaying_navier_stokes": DecayingNavierStokes,
    "kolmogorov": Kolmogorov,
    "korteweg_de_vries": KortewegDeVries,
    "kuramoto_sivashinsky": KuramotoSivashinsky,
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
    "SOLVERS", "Advection", "Burgers", "DecayingNavierStokes", "Kolmogorov", "KortewegDeVries", "KuramotoSivashinsky",
    "make_solver", "name_of", "resample", "velocity_of",
]  # fmt: skip
