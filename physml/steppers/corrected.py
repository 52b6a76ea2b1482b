"""A coarse solver whose steps a network corrects.

Um et al. 2020, arXiv:2007.00016 (solver in the loop); the learned correction of Kochkov et al. 2021,
doi:10.1073/pnas.2101784118. Gradients flow through the solver: train with `Unrolled`.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from physml.coding import check_fields, check_positive, tagged
from physml.errors import ConfigError, SpecError
from physml.fields import Channel, Context, Grid, Signature, Spec
from physml.normalize import Normalizer
from physml.parallel.mesh import over_batch
from physml.steppers.packing import count, pack
from physml.steppers.plain import Direct, check_fits


def solvers() -> Mapping[str, type]:
    """`physml.solvers.SOLVERS`, imported when it is first needed."""
    from physml.solvers import SOLVERS

    return SOLVERS


@dataclass(frozen=True)
class CorrectedConfig:
    """The frame that a coarse solver makes of the last one, plus what the network adds.

    The network reads the last `history` frames and the solver's new one. Parameters of the solver that the data has too
    are taken from there, trajectory by trajectory.

    Attributes:
        solver: config of `physml.solvers.SOLVERS`, with the grid, channels and time step of the data.
        history: frames that go in.
        scale: size of the correction where the network says 1, relative to the increments of the data. The smaller, the
            closer is a fresh stepper to the solver.
    """

    solver: Any = tagged(solvers)
    history: int = 1
    scale: float = 0.1

    def __post_init__(self):
        check_resumable(self.solver)
        check_fields(self)
        check_positive(self, "history", "scale")

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network. Raises SpecError where the solver does not fit the data."""
        check_solver(self.solver, spec)
        return Signature(spec.grid, *count(spec, self.history + 1, False, False), len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Corrected":
        """Raises SpecError where model, normalizer or solver do not fit `spec`, ConfigError without the first two."""
        check_fits(self, spec, model, normalizer)
        return Corrected(self, spec, model, normalizer, constraints)


class Hybrid(Direct):
    """What steppers with a solver inside share. They belong to its grid."""

    def encode(self, frames, context: Context):
        """In float32 at least: no solver steps in half precision."""
        frames = super().encode(frames, context)
        return frames.astype(jnp.promote_types(frames.dtype, jnp.float32))

    def network(self, frames, context: Context):
        """What the network says to `frames` `(batch, frame, *space, channel)` in physical units."""
        fields, scalars = pack(frames, context, self.normalizer, frames.shape[1], False, False)
        return self.ask(fields, scalars, context)

    def repeat(self, advance, value, times: int):
        """`value = advance(stepper, value)` so many times, compiled once."""
        if times == 1:
            return advance(self, value)
        graph, running, rest = nnx.split(self, nnx.BatchStat, ...)

        def body(carry, _):
            running, value = carry
            stepper = nnx.merge(graph, running, rest)
            value = advance(stepper, value)
            return (nnx.state(stepper, nnx.BatchStat), value), None

        (running, value), _ = jax.lax.scan(body, (running, value), length=times)
        if jax.tree.leaves(running):
            nnx.update(self, running)  # batch normalization in training mode has moved them
        return value

    def on_grid(self, grid: Grid) -> "Hybrid":
        """Itself on its own grid. Raises SpecError for any other."""
        if grid == self.spec.grid:
            return self
        raise SpecError(
            f"{type(self).__name__} holds a solver of {self.spec.grid.shape} points and what it lacks there, so it "
            f"cannot move to {grid.shape} points. Train another one with a solver on that grid."
        )


class Corrected(Hybrid):
    """State: the last `history` frames, `(batch, history, *space, channel)` in physical units."""

    def advance(self, state, context: Context):
        previous = state[:, -1]
        coarse = march(self.config.solver, previous, context)
        output = self.network(jnp.concatenate([state, coarse[:, None]], axis=1), context)
        frame = coarse + self.config.scale * self.normalizer.increment(output)
        frame = self.finish(frame, previous, context)
        return jnp.concatenate([state[:, 1:], frame[:, None]], axis=1)


# --- solvers in steppers ----------------------------------------------------------------------------------------------


def check_resumable(solver, *, whole: bool = False) -> None:
    """Raises ConfigError for what is no solver, and unless it goes on from frames and a loss can be differentiated
    through its steps.

    `whole`: also unless frames hold every point of the solver, so that observing and resuming changes nothing.
    """
    from physml.solvers.fourier import Spectral
    from physml.solvers.solver import STEADY, Solver

    if not isinstance(solver, Solver):
        name = next((name for name, kind in solvers().items() if solver in (name, kind)), "burgers")
        raise ConfigError(
            f"solver is {solver!r} ({type(solver).__name__}), but the config of a solver was expected. Pass "
            f"make_solver({name!r}, ...) of physml.solvers."
        )
    name = type(solver).__name__
    if type(solver).resume is Solver.resume or solver.statics or solver.usual_steps == STEADY:
        Solver.resume(solver, None)  # says so
    if getattr(solver, "substeps", 1) is None:
        raise ConfigError(
            f"{name} chooses its substeps as it goes, which has no gradient. Set substeps to a number, e.g. 8."
        )
    points = getattr(solver, "points", None)
    if getattr(solver, "solver_points", points) != points and (whole or not isinstance(solver, Spectral)):
        raise ConfigError(
            f"{name} stores {points} of its {solver.solver_points} points per axis, so it cannot go on from a frame. "
            f"Set solver_points={points}."
        )


def check_solver(solver, spec: Spec) -> None:
    """Raises SpecError unless the solver makes frames like those of `spec`, between the same boundaries and from
    parameters in its own units; ConfigError for a number it lacks.
    """
    axes = {axis.name: axis for axis in solver.grid.axes}
    names = [axis.name for axis in spec.grid.axes]
    grid = Grid(tuple(axes[name] for name in names)) if set(names) == set(axes) else solver.grid
    parameters = tuple(Channel(channel.name, solver.units.get(channel.name, "")) for channel in spec.parameters)
    time = solver.time_step, solver.time_unit or spec.time_unit
    try:
        Spec(grid, solver.channels, spec.forcing, spec.static, parameters, *time).check_same(spec, mine="the solver")
    except SpecError as error:
        raise SpecError(
            f"{error} Where the data are right, it is the solver's `options` that must say so (points, length, "
            "time_step, store='velocity', ...)."
        ) from None
    for mine, theirs in zip(grid.axes, spec.grid.axes, strict=True):
        if mine.periodic != theirs.periodic:
            found = ("periodic", "not in") if mine.periodic else ("not periodic", "it is in")
            around = tuple(axis.name for axis in grid.axes if axis.periodic)
            raise SpecError(
                f"Axis {mine.name!r} is {found[0]} in the solver, but {found[1]} the data. Give the solver the "
                "boundary of the data (for euler: boundary='periodic' or 'wall'), or, where the file does not say what "
                f"is true, name the periodic axes: DataConfig(periodic={around})."
            )
    if missing := sorted(set(solver.drawn) - {channel.name for channel in spec.parameters}):
        raise ConfigError(
            f"The solver draws {missing[0]} from {getattr(solver, missing[0])} for every trajectory, but the data has "
            f"no parameter of that name. Give {missing[0]} as a number."
        )


def axis_order(solver, spec: Spec) -> tuple[int, ...]:
    """Where the axes of the solver are among those of the data, which may come in another order."""
    names = [axis.name for axis in spec.grid.axes]
    return tuple(names.index(name) for name in solver.axes)


def turned(field, order: tuple[int, ...], *, back: bool = False):
    """`field` `(*space, ...)` of the data with the axes of the solver first, or back again."""
    order = tuple(order.index(i) for i in range(len(order))) if back else order
    return jnp.transpose(field, (*order, *range(len(order), jnp.ndim(field))))


def shared_parameters(solver, context: Context) -> dict[str, jax.Array]:
    """Numbers `(batch,)` of the solver that the data gives."""
    names = [channel.name for channel in context.spec.parameters]
    return {name: context.parameters[:, names.index(name)] for name in solver.parameters if name in names}


def march(solver, frames, context: Context):
    """One stored step: the solver's next frames `(batch, *space, channel)` after `frames`."""
    order, numbers = axis_order(solver, context.spec), shared_parameters(solver, context)

    def next_frame(frame, numbers):
        step = solver.stepper(**numbers) if numbers else _usual_step(solver, bool(jax.config.jax_enable_x64))
        state = step(solver.resume(turned(frame, order), **numbers))
        return turned(solver.observe(state), order, back=True)

    return over_batch(jax.vmap(next_frame))(frames, numbers)


@functools.lru_cache(maxsize=32)
def _usual_step(solver, double: bool):
    """The step with the solver's own parameters: coefficients of its scheme are computed once, not in every step.

    In a thread of its own, which is in no trace and under no mesh, so that they are plain numbers wherever the first
    step is taken.
    """

    def build():
        with jax.enable_x64(double):
            return solver.stepper()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(build).result()
