"""The four flows of CFDBench in SI units, one fluid: lid-driven cavity, tube, dam, cylinder. Solved by `mac`.

Parameters are named as in the files of CFDBench (Luo et al. 2023, arXiv:2310.05963). A flow starts impulsively: at the
first frame the walls, the lid and the inflow have their velocity already, and the fluid has what an impulse gives it.
x and y are stored in units of width and height, because cases differ in size; row 0 is at the bottom.

CFDBench solves tube and dam as air and water; here they are filled with one fluid, without gravity.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import ArrayLike, Axis, Channel, Grid
from physml.solvers import mac
from physml.solvers.mac import Box, Flow
from physml.solvers.solver import Range, Solver, Step, block_mean, check_cells, check_parameters, interval, require

SMALLEST_REYNOLDS = 20.0  # of the cases of "prop": slower ones are steady within a frame and cost the most
BARRIER_X = 0.5  # m from the inflow, as in CFDBench
GOLDEN = (math.sqrt(5) - 1) / 2


class FlowState(NamedTuple):
    """The flow, and the stored mask `(y, x)`: 1 fluid, 0 obstacle."""

    flow: Flow
    mask: jax.Array


@dataclass(frozen=True)
class WallFlow(Solver):
    """What the four flows share.

    `subset` takes the parameters from a table instead, as the subsets of CFDBench do: "bc" varies the velocity of the
    boundary, "prop" density and viscosity, "geo" sizes; what it does not vary is the number in the config, or `usual`
    where that is an interval. Trajectory i is then row i of the table (which begins again at its end), in every split:
    divide the cases, not the splits. Rows are ordered so that the first few spread over the table.
    """

    points: int = 64
    solver_points: int = 64
    warmup: float = 0.0
    subset: Literal["", "prop", "bc", "geo"] = ""
    advection: Literal["central", "limited"] = "limited"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    channels: ClassVar[tuple[Channel, ...]] = (Channel("u", "m s-1"), Channel("v", "m s-1"))
    statics: ClassVar[tuple[Channel, ...]] = (Channel("mask"),)
    meanings: ClassVar[dict[str, str]] = {
        "u": "velocity to the right", "v": "velocity upwards", "mask": "1 fluid, 0 obstacle",
    }  # fmt: skip
    units: ClassVar[dict[str, str]] = {
        "vel_top": "m s-1", "vel_in": "m s-1", "velocity": "m s-1", "density": "kg m-3", "viscosity": "Pa s",
        "height": "m", "width": "m", "barrier_width": "m", "barrier_height": "m", "center_x": "m", "center_y": "m",
        "radius": "m",
    }  # fmt: skip
    equation: ClassVar[str] = "density (u_t + u . grad(u)) = -grad(p) + viscosity laplace(u), div u = 0"
    scheme: ClassVar[str] = "staggered finite volumes, SSP Runge-Kutta 3, projection by cosine transforms"
    usual_steps: ClassVar[int] = 50
    time_unit: ClassVar[str] = "s"
    advice: ClassVar[str] = "Raise solver_points, or lower the Reynolds number."
    usual: ClassVar[dict[str, float]]  # the base case of the subsets
    tables: ClassVar[dict[str, dict[str, np.ndarray]]]  # subset -> parameter -> its values; all combinations are cases

    def __post_init__(self):
        check_fields(self)
        check_cells(self)
        require(0 < self.time_step < math.inf, "time_step", self.time_step, "positive")
        require(0 <= self.warmup < math.inf, "warmup", self.warmup, "zero or positive")
        require(0 < self.largest_reynolds < math.inf, "largest_reynolds", self.largest_reynolds, "positive")
        check_parameters(self, **dict.fromkeys(self.parameters, "positive"))
        if self.subset:
            if not len(self.cases[self.parameters[0]]):
                raise ConfigError(
                    f"No case of {self.subset!r} has a Reynolds number from {SMALLEST_REYNOLDS:g} to "
                    f"{self.largest_reynolds:g}. Raise largest_reynolds."
                )
        else:
            ends = {name: interval(getattr(self, name)) for name in self.parameters}
            most = self.reynolds({name: ends[name][name != "viscosity"] for name in ends})
            if most > self.largest_reynolds * (1 + 1e-9):
                raise ConfigError(
                    f"The Reynolds number reaches {most:.6g}, but largest_reynolds is {self.largest_reynolds:g}: the "
                    "grid would not resolve it. Raise viscosity, or largest_reynolds together with solver_points."
                )
        self._check_obstacle()

    def _check_obstacle(self) -> None:
        """Raises ConfigError for an obstacle that leaves the box or falls between the cells."""

    def reynolds(self, numbers: dict[str, Any]) -> Any:
        """Of parameters by name."""
        return numbers["density"] * numbers[self.parameters[0]] * self.size(numbers) / numbers["viscosity"]

    @staticmethod
    def size(numbers: dict[str, Any]) -> Any:
        """The length of the Reynolds number."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        return Grid(tuple(Axis.cells(name, self.points, 1.0, unit="1") for name in self.axes))

    @property
    def cells(self) -> int:
        return self.solver_points**2

    @property
    def boundary(self) -> str:
        raise NotImplementedError

    @property
    def cases(self) -> dict[str, np.ndarray]:
        """The table of `subset`: one number per case for every parameter.

        "prop" leaves out the cases with Reynolds numbers below SMALLEST_REYNOLDS or above `largest_reynolds`. The
        others keep all cases, and one fluid: its viscosity is raised until the largest number is `largest_reynolds`.
        """
        own = {name: getattr(self, name) for name in self.parameters}
        base = {name: self.usual[name] if isinstance(value, tuple) else value for name, value in own.items()}
        varied = self.tables[self.subset]
        rows = np.array(list(itertools.product(*varied.values())))
        table = {name: np.full(len(rows), value, float) for name, value in base.items()}
        table |= {name: rows[:, i] for i, name in enumerate(varied)}
        numbers = self.reynolds(table)
        if self.subset == "prop":
            keep = (numbers >= SMALLEST_REYNOLDS * (1 - 1e-9)) & (numbers <= self.largest_reynolds * (1 + 1e-9))
            table = {name: column[keep] for name, column in table.items()}
        else:
            excess = numbers.max() / self.largest_reynolds
            table["viscosity"] = table["viscosity"] * (excess if excess > 1 + 1e-9 else 1.0)
        places = np.argsort(np.argsort(np.arange(len(table["viscosity"])) * GOLDEN % 1, kind="stable"), kind="stable")
        return {name: column[places] for name, column in table.items()}

    @property
    def drawn(self) -> tuple[str, ...]:
        """The parameters that differ between trajectories, or, in a subset, from the config."""
        if not self.subset:
            return super().drawn
        return tuple(name for name, column in self.cases.items() if {getattr(self, name)} != {*column.tolist()})

    def draw(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """The numbers `drawn` of trajectory `index`: random, or row `index` of the table of `subset`."""
        if not self.subset:
            return super().draw(key, index)
        cases, drawn = self.cases, self.drawn
        return {name: jnp.asarray(cases[name], float)[index % len(cases[name])] for name in drawn}

    def box(self, numbers: dict[str, Any]) -> Box:
        """The rectangle with its fluid and boundary."""
        raise NotImplementedError

    def solid(self, numbers: dict[str, Any], x: Any, y: Any, dx: Any = 0.0, dy: Any = 0.0) -> Any:
        """Whether a place (m, from the lower left corner) lies in the obstacle, or within dx and dy of it."""
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(x), jnp.shape(y)), bool)

    def impulse(self, numbers: dict[str, Any], key: jax.Array) -> Flow:
        """What the fluid does before walls and obstacles stop it."""
        return mac.rest(self.solver_points, self.solver_points)

    def initial(self, key: jax.Array, **parameters: Any) -> FlowState:
        """The flow right after the start."""
        numbers = self.values(parameters, *self.parameters)
        centers = (jnp.arange(self.points) + 0.5) / self.points
        solid = self.solid(numbers, centers * numbers["width"], centers[:, None] * numbers["height"])
        flow = mac.start(self.box(numbers), self.impulse(numbers, key))
        return FlowState(flow, 1 - solid.astype(flow.u.dtype))

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. All `parameters` may be given, also traced. Differentiable forward, not backward."""
        box = self.box(self.values(parameters, *self.parameters))
        return lambda state: state._replace(flow=mac.advance(box, state.flow, self.time_step)[0])

    def observe(self, state: FlowState) -> Float[ArrayLike, "y x 2"]:
        """u and v, means over the stored cells; zero in the obstacle."""
        means = block_mean(mac.centered(state.flow), self.solver_points // self.points, 2)
        return means * state.mask[..., None]

    def observe_static(self, state: FlowState) -> Float[ArrayLike, "y x 1"]:
        return state.mask[..., None]

    def _box(self, numbers: dict[str, Any], obstacle: bool = False, **sides: Any) -> Box:
        n = self.solver_points
        dx, dy = numbers["width"] / n, numbers["height"] / n
        faces, middles = jnp.arange(n + 1.0), jnp.arange(n) + 0.5
        solid = None
        if obstacle:  # up to half a cell away: the outermost faces without flow then lie on its surface, on average
            near = (0.499999 * dx, 0.499999 * dy)
            solid = (
                self.solid(numbers, faces * dx, middles[:, None] * dy, *near),
                self.solid(numbers, middles * dx, faces[:, None] * dy, *near),
            )
        viscosity, speed = numbers["viscosity"] / numbers["density"], numbers[self.parameters[0]]
        return Box(dx, dy, viscosity, solid=solid, advection=self.advection, speed=speed, **sides)


@dataclass(frozen=True)
class Cavity(WallFlow):
    """A box whose lid slides to the right; the fluid starts at rest. Reynolds number: of the longer side.

    Attributes:
        points: stored points per axis. solver_points: those of the solver, a multiple.
        warmup: time dropped before the first frame, in s.
        subset: a table of cases, see `WallFlow`; "" draws the intervals.
        advection: "central" or "limited" (no overshoots where the grid is coarse).
        precision: of the computation. Files hold float32.
        vel_top: speed of the lid, number or interval, in m s-1; like all that follow.
        density, viscosity: kg m-3, Pa s. height, width: m.
        time_step: time between stored frames, in s.
        largest_reynolds: what the grid is trusted with; see `WallFlow.cases`.
    """

    vel_top: Range = (1.0, 50.0)
    density: Range = 1.0
    viscosity: Range = 1e-4
    height: Range = 0.01
    width: Range = 0.01
    time_step: float = 1e-4
    largest_reynolds: float = 5000.0

    parameters: ClassVar[tuple[str, ...]] = ("vel_top", "density", "viscosity", "height", "width")
    boundary: ClassVar[str] = "walls; the top one moves to the right with vel_top"
    usual: ClassVar[dict[str, float]] = {
        "vel_top": 10.0, "density": 1.0, "viscosity": 1e-4, "height": 0.01, "width": 0.01,
    }  # fmt: skip
    tables: ClassVar[dict[str, dict[str, np.ndarray]]] = {
        "bc": {"vel_top": np.linspace(1, 50, 50)},
        "prop": {
            "density": np.array([0.1, 0.5, *range(1, 11)]),
            "viscosity": np.array([1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2]),
        },
        "geo": {"height": np.linspace(0.01, 0.05, 5), "width": np.linspace(0.01, 0.05, 5)},
    }

    @staticmethod
    def size(numbers: dict[str, Any]) -> Any:
        return np.maximum(numbers["height"], numbers["width"])

    def box(self, numbers: dict[str, Any]) -> Box:
        return self._box(numbers, top=mac.wall(numbers["vel_top"]))


@dataclass(frozen=True)
class Tube(WallFlow):
    """A channel: uniform inflow on the left, walls below and above. Reynolds number: of the height.

    At the first frame all fluid moves with vel_in; layers of slow fluid then grow along the walls, up to the parabola
    6 vel_in y (1 - y), with y in units of the height.

    Attributes: as in `Cavity`, with vel_in, the speed of the inflow.
    """

    vel_in: Range = (0.1, 5.0)
    density: Range = 100.0
    viscosity: Range = 0.1
    height: Range = 0.1
    width: Range = 1.0
    time_step: float = 0.01
    largest_reynolds: float = 1000.0

    parameters: ClassVar[tuple[str, ...]] = ("vel_in", "density", "viscosity", "height", "width")
    boundary: ClassVar[str] = "left: inflow with vel_in; top and bottom: walls; right: outflow"
    usual: ClassVar[dict[str, float]] = {
        "vel_in": 1.0, "density": 100.0, "viscosity": 0.1, "height": 0.1, "width": 1.0,
    }  # fmt: skip
    tables: ClassVar[dict[str, dict[str, np.ndarray]]] = {
        "bc": {"vel_in": np.linspace(0.1, 5, 50)},
        "prop": {"density": np.linspace(10, 1000, 10), "viscosity": np.linspace(0.01, 1, 10)},
        "geo": {"height": np.linspace(0.06, 0.14, 5), "width": np.linspace(0.6, 1.4, 5)},
    }

    @staticmethod
    def size(numbers: dict[str, Any]) -> Any:
        return numbers["height"]

    def box(self, numbers: dict[str, Any]) -> Box:
        return self._box(numbers, left=mac.inflow(numbers["vel_in"]), right=mac.outflow())

    def impulse(self, numbers: dict[str, Any], key: jax.Array) -> Flow:
        return mac.rest(self.solver_points, self.solver_points, numbers["vel_in"])


@dataclass(frozen=True)
class Dam(WallFlow):
    """A jet along the bottom meets a barrier that stands 0.5 m from the inflow. Reynolds number: of the barrier.

    The inflow on the left covers the cells whose centers are lower than the barrier; above it is a wall. The top is
    free of friction, the bottom a wall, and the fluid leaves on the right.

    Attributes: as in `Cavity`, with velocity, the speed of the inflow, and barrier_width, barrier_height in m.
    """

    velocity: Range = (0.05, 2.0)
    density: Range = 100.0
    viscosity: Range = 0.1
    height: Range = 0.4
    width: Range = 1.5
    barrier_width: Range = 0.05
    barrier_height: Range = 0.1
    time_step: float = 0.1
    largest_reynolds: float = 1000.0

    parameters: ClassVar[tuple[str, ...]] = (
        "velocity", "density", "viscosity", "height", "width", "barrier_width", "barrier_height",
    )  # fmt: skip
    boundary: ClassVar[str] = (
        "left: inflow with `velocity` below barrier_height, wall above; top: free slip; bottom: wall; right: outflow; "
        "no slip at the barrier, which stands on the bottom at x = 0.5 m"
    )
    usual: ClassVar[dict[str, float]] = {
        "velocity": 0.2, "density": 100.0, "viscosity": 0.1, "height": 0.4, "width": 1.5, "barrier_width": 0.05,
        "barrier_height": 0.1,
    }  # fmt: skip
    tables: ClassVar[dict[str, dict[str, np.ndarray]]] = {
        "bc": {"velocity": np.linspace(0.05, 2, 70)},
        "prop": {"density": np.linspace(10, 1000, 10), "viscosity": np.linspace(0.01, 1, 10)},
        "geo": {"barrier_width": np.linspace(0.05, 0.15, 5), "barrier_height": np.linspace(0.06, 0.15, 10)},
    }

    def _check_obstacle(self) -> None:
        ends = {name: interval(getattr(self, name)) for name in self.parameters}
        if BARRIER_X + ends["barrier_width"][1] >= ends["width"][0] or ends["barrier_height"][1] >= ends["height"][0]:
            raise ConfigError(
                f"The barrier reaches x = {BARRIER_X + ends['barrier_width'][1]:g} m and y = "
                f"{ends['barrier_height'][1]:g} m, but the box only {ends['width'][0]:g} and {ends['height'][0]:g} m. "
                "Raise width or height, or make the barrier smaller."
            )
        _check_cells(self, "barrier_width", "width", 1)
        _check_cells(self, "barrier_height", "height", 2)

    @staticmethod
    def size(numbers: dict[str, Any]) -> Any:
        return numbers["barrier_height"]

    def solid(self, numbers: dict[str, Any], x: Any, y: Any, dx: Any = 0.0, dy: Any = 0.0) -> Any:
        beside = (x >= BARRIER_X - dx) & (x <= BARRIER_X + numbers["barrier_width"] + dx)
        return beside & (y <= numbers["barrier_height"] + dy)

    def box(self, numbers: dict[str, Any]) -> Box:
        y = (jnp.arange(self.solver_points) + 0.5) * numbers["height"] / self.solver_points
        profile = jnp.where(y < numbers["barrier_height"], numbers["velocity"], 0.0)
        return self._box(numbers, True, left=mac.inflow(profile), right=mac.outflow(), top=mac.free_slip())


@dataclass(frozen=True)
class Cylinder(WallFlow):
    """A cylinder across a channel; above a Reynolds number (of the diameter) of about 50 it sheds vortices.

    The warm-up lets the wake develop, started by a random disturbance of a tenth of vel_in behind the cylinder.

    Attributes: as in `Cavity`, with vel_in, the speed of the inflow, and radius and the position of the center, from
    the lower left corner, in m.
    """

    solver_points: int = 128
    warmup: float = 0.5
    vel_in: Range = (0.3, 1.5)
    density: Range = 10.0
    viscosity: Range = 1e-3
    height: Range = 0.12
    width: Range = 0.22
    center_x: Range = 0.06
    center_y: Range = 0.06
    radius: Range = 0.01
    time_step: float = 0.005
    largest_reynolds: float = 300.0

    parameters: ClassVar[tuple[str, ...]] = (
        "vel_in", "density", "viscosity", "height", "width", "center_x", "center_y", "radius",
    )  # fmt: skip
    boundary: ClassVar[str] = "left: inflow with vel_in; top and bottom: walls; right: outflow; no slip at the cylinder"
    usual: ClassVar[dict[str, float]] = {
        "vel_in": 1.0, "density": 10.0, "viscosity": 1e-3, "height": 0.12, "width": 0.22, "center_x": 0.06,
        "center_y": 0.06, "radius": 0.01,
    }  # fmt: skip
    tables: ClassVar[dict[str, dict[str, np.ndarray]]] = {
        "bc": {"vel_in": np.linspace(0.3, 1.5, 50)},
        "prop": {"density": np.linspace(2, 20, 10), "viscosity": np.linspace(5e-4, 5e-3, 10)},
        "geo": {"center_x": np.linspace(0.04, 0.08, 5), "radius": np.linspace(0.008, 0.014, 5)},
    }

    def _check_obstacle(self) -> None:
        ends = {name: interval(getattr(self, name)) for name in self.parameters}
        radius = ends["radius"][1]
        for center, side in (("center_x", "width"), ("center_y", "height")):
            if ends[center][0] <= radius or ends[center][1] + radius >= ends[side][0]:
                raise ConfigError(
                    f"{center} is {getattr(self, center)}, but a cylinder of radius {radius:g} m must lie within 0 to "
                    f"{ends[side][0]:g} m. Move it, or lower the radius."
                )
            _check_cells(self, "radius", side, 1)

    @staticmethod
    def size(numbers: dict[str, Any]) -> Any:
        return 2 * numbers["radius"]

    def solid(self, numbers: dict[str, Any], x: Any, y: Any, dx: Any = 0.0, dy: Any = 0.0) -> Any:
        radius = numbers["radius"]
        return jnp.hypot((x - numbers["center_x"]) / (radius + dx), (y - numbers["center_y"]) / (radius + dy)) <= 1

    def box(self, numbers: dict[str, Any]) -> Box:
        return self._box(numbers, True, left=mac.inflow(numbers["vel_in"]), right=mac.outflow())

    def impulse(self, numbers: dict[str, Any], key: jax.Array) -> Flow:
        n, radius = self.solver_points, numbers["radius"]
        flow = mac.rest(n, n, numbers["vel_in"])
        x, y = (jnp.arange(n) + 0.5) * (numbers["width"] / n), jnp.arange(n + 1)[:, None] * (numbers["height"] / n)
        distance = jnp.hypot(x - numbers["center_x"] - 3 * radius, y - numbers["center_y"]) / radius
        amplitude = 0.1 * numbers["vel_in"] * jax.random.normal(key, (), float)
        return flow._replace(v=flow.v + amplitude * jnp.exp(-(distance**2)))


def _check_cells(solver: WallFlow, length: str, side: str, least: int) -> None:
    """Raises ConfigError for an obstacle so thin that fluid would pass between the faces of the grid."""
    cell = interval(getattr(solver, side))[1] / solver.solver_points
    smallest = interval(getattr(solver, length))[0]
    if smallest < least * cell * (1 - 1e-9):
        raise ConfigError(
            f"{length} is {getattr(solver, length)}, but {least} cells of {cell:g} m are the least that stop the flow. "
            f"Raise solver_points to at least {math.ceil(least * cell * solver.solver_points / smallest)}."
        )
