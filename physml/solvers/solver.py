"""What every reference solver is: the contract between `physml.solvers.SOLVERS` and `physml.data.generate`."""

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import jax
from jaxtyping import Float

from physml.errors import ConfigError, DependencyError
from physml.fields import ArrayLike, Channel, Grid

Step = Callable[[Any], Any]  # state -> state one stored step later
Range = float | tuple[float, float]  # a number, or the interval it is drawn from, uniformly, once per trajectory
STEADY = 0  # `usual_steps` of a problem without time: the initial state is the solution


class Solver:
    """Base of the frozen configs. A state is any pytree of arrays of one trajectory; `jax.vmap` makes batches.

    All methods are pure and can be jitted, mapped and differentiated; they compute in the precision of the state, and
    the parameters may be traced.

    Attributes:
        axes: names of the stored spatial axes.
        channels: stored fields that change with time (all fields of a steady problem that are to be predicted).
        statics: stored fields that do not: masks, coefficients, topography.
        parameters: names of config fields that are numbers of a trajectory; a pair of them is an interval to draw from.
        meanings: channel or static -> what it is, in words.
        units: parameter -> its unit, where it has one.
        equation, boundary, scheme: what is solved and how, for the file.
        packages: distributions that the numbers depend on besides jax.
        usual_steps: stored steps where none are asked for; `STEADY` for a problem without time.
        time_unit: "" where time has no unit.
        advice: what to do when a trajectory leaves the finite numbers.
        time_step: time between stored frames. warmup: time dropped before the first of them.
        precision: of the computation. Files hold float32.
    """

    axes: ClassVar[tuple[str, ...]]
    channels: ClassVar[tuple[Channel, ...]]
    statics: ClassVar[tuple[Channel, ...]] = ()
    parameters: ClassVar[tuple[str, ...]] = ()
    meanings: ClassVar[dict[str, str]] = {}
    units: ClassVar[dict[str, str]] = {}
    equation: ClassVar[str]
    boundary: ClassVar[str]
    scheme: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    usual_steps: ClassVar[int]
    time_unit: ClassVar[str] = ""
    advice: ClassVar[str] = "Raise substeps or the number of points."
    time_step = 1.0
    warmup = 0.0
    precision = "float64"

    @property
    def grid(self) -> Grid:
        """The stored grid."""
        raise NotImplementedError

    @property
    def cells(self) -> int:
        """Grid points that are solved: decides how many trajectories are worth solving at once."""
        raise NotImplementedError

    @property
    def drawn(self) -> tuple[str, ...]:
        """The parameters that differ between trajectories."""
        return tuple(name for name in self.parameters if isinstance(getattr(self, name), tuple))

    def draw(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """The numbers `drawn` of trajectory `index` (traced), which owns `key`."""
        keys = jax.random.split(key, len(self.parameters)) if self.parameters else ()
        return {
            name: jax.random.uniform(keys[i], (), float, *getattr(self, name))
            for i, name in enumerate(self.parameters)
            if name in self.drawn
        }

    def initial(self, key: jax.Array, **parameters: Any) -> Any:
        """The state that the warm-up starts from. `parameters`: those of `draw`; the config's own otherwise."""
        raise NotImplementedError

    def stepper(self, **parameters: Any) -> Step:
        """One stored step; `parameters` as in `initial`."""
        raise NotImplementedError

    def observe(self, state: Any) -> Float[ArrayLike, "*space channel"]:
        """The channels of a state on the stored grid."""
        raise NotImplementedError

    def resume(self, frame: Float[ArrayLike, "*space channel"], **parameters: Any) -> Any:
        """The state that `observe` shows as `frame`, to go on from; `parameters` as in `stepper`.

        What the solver cannot hold is left out: the divergence of an incompressible flow, the mean of a velocity that
        is solved as vorticity. Finer solvers (`solver_points` above `points`) start without what the frame does not
        resolve. Raises ConfigError where frames do not hold all of a state.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot start from stored frames: they do not hold all of its state. Use a solver "
            "of a periodic box (kolmogorov, burgers, euler, staggered_flow, ...), or of ordinary differential "
            "equations."
        )

    def observe_static(self, state: Any) -> Float[ArrayLike, "*space static"]:
        """The statics of a state on the stored grid; called only where there are some."""
        raise NotImplementedError

    def values(self, given: dict[str, Any], *names: str) -> dict[str, Any]:
        """`names` as given, those of the config otherwise.

        Raises ConfigError for other names, and for one that is neither given nor a single number in the config.
        """
        if unknown := set(given) - set(names):
            raise ConfigError(f"stepper has no parameter {sorted(unknown)}. Valid: {', '.join(names)}.")
        values = {name: given.get(name, getattr(self, name)) for name in names}
        for name, value in values.items():
            if isinstance(value, tuple):
                raise ConfigError(f"{name} is drawn from {value} for every trajectory: pass stepper({name}=number).")
        return values


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises ConfigError: `name is value, but it must be expected`."""
    if not holds:
        raise ConfigError(f"{name} is {value}, but it must be {expected}.")


def check_time(solver: Solver) -> None:
    """Raises ConfigError unless time_step, substeps and warmup can work."""
    require(0 < solver.time_step < math.inf, "time_step", solver.time_step, "positive")
    require(solver.substeps >= 1, "substeps", solver.substeps, "at least 1")
    require(0 <= solver.warmup < math.inf, "warmup", solver.warmup, "zero or positive")


def check_cells(solver: Solver) -> None:
    """Raises ConfigError unless stored cells are whole numbers of the solver's cells, at least four of them."""
    for name in ("points", "solver_points"):
        require(getattr(solver, name) >= 4, name, getattr(solver, name), "at least 4")
    if solver.solver_points % solver.points:
        raise ConfigError(
            f"points is {solver.points}, but stored cells are whole numbers of the solver's {solver.solver_points}. "
            f"Use solver_points={solver.points * max(1, round(solver.solver_points / solver.points))}."
        )


def block_mean(field: Float[ArrayLike, "*cells"], ratio: int, dims: int) -> Float[ArrayLike, "*stored"]:
    """Means over blocks of `ratio` cells along each of the first `dims` axes."""
    blocks = [size for points in field.shape[:dims] for size in (points // ratio, ratio)]
    return field.reshape(*blocks, *field.shape[dims:]).mean(axis=tuple(range(1, 2 * dims, 2)))


def interval(value: Range) -> tuple[float, float]:
    """Both ends; a number is its own interval."""
    return value if isinstance(value, tuple) else (value, value)


def check_parameters(solver: Solver, **bounds: str | tuple[float, float]) -> None:
    """Raises ConfigError unless every parameter is a number, or an increasing pair, in its range.

    `bounds`: parameter -> "positive", "finite" or an open interval where "zero or positive" is not meant.
    """
    for name in solver.parameters:
        value, bound = getattr(solver, name), bounds.get(name, "zero or positive")
        low, high = interval(value)
        if isinstance(bound, tuple):
            inside = bound[0] < low and high < bound[1]
            bound = f"above {bound[0]:g}" + (f" and below {bound[1]:g}" if bound[1] < math.inf else "")
        else:
            inside = {"positive": low > 0, "finite": low > -math.inf, "zero or positive": low >= 0}[bound]
        require(inside and low <= high < math.inf, name, value, f"{bound}, or an increasing pair of such numbers")


def adopt(solver: Solver, choice: str | None, table: dict[str, dict[str, Any]], field: str) -> None:
    """Puts the numbers `table[choice]` into the frozen config, for use in `__post_init__`.

    Raises ConfigError when one of them is given too, with another value.
    """
    for name, value in (table[choice] if choice else {}).items():
        given, usual = getattr(solver, name), type(solver).__dataclass_fields__[name].default
        if given not in (usual, value):
            raise ConfigError(f"{field}={choice!r} sets {name} to {value}, but {name}={given} is given. Drop one.")
        object.__setattr__(solver, name, value)


def borrowed(module: str, extra: str) -> ModuleType:
    """The module of an optional package. Raises DependencyError, naming the extra to install, where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DependencyError(f"{package} is not installed. Run `pip install 'physml[{extra}]'`.") from error
