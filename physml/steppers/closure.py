"""A network inside the equation that a coarse solver solves: u_t = solver(u) + network(u).

Both parts take turns within a stored step. Symmetrically (Strang 1968, doi:10.1137/0705041) the splitting is of second
order in the length of a turn, one after the other (Lie) of first; the turns of the network are a midpoint and an Euler
step. Works with every solver that goes on from its frames, spectral or finite-volume; gradients flow through it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from physml.coding import check_fields, check_positive, tagged
from physml.errors import ConfigError, SpecError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.corrected import Hybrid, check_resumable, check_solver, march, solvers
from physml.steppers.packing import count
from physml.steppers.plain import check_fits


@dataclass(frozen=True)
class ClosureConfig:
    """The network gives a tendency that is missing in a coarse solver, from the frame of the moment.

    Parameters of the solver that the data has too are taken from there, trajectory by trajectory.

    Attributes:
        solver: config of `physml.solvers.SOLVERS`, with the grid, channels and time step of the data.
        turns: how often solver and network take turns in a stored step. The solver's substeps are shared out evenly:
            a multiple of `turns` ("lie") or `2 turns` ("strang").
        splitting: "strang" calls the network twice a turn, "lie" once.
        form: "source" adds what the network says; "flux" adds minus its divergence, by central differences on a
            periodic grid, so that the sum over space of every channel is left to the solver.
        scale: change of a frame within a stored step where the network says 1, relative to the increments of the data
            (for "flux": if that was its slope over one grid spacing).
    """

    solver: Any = tagged(solvers)
    turns: int = 1
    splitting: Literal["strang", "lie"] = "strang"
    form: Literal["source", "flux"] = "source"
    scale: float = 0.1

    history: ClassVar[int] = 1

    def __post_init__(self):
        check_resumable(self.solver, whole=True)
        check_fields(self)
        check_positive(self, "turns", "scale")
        if self.solver.substeps % self.shares:
            raise ConfigError(
                f"The solver takes {self.solver.substeps} substeps, but turns={self.turns} with "
                f"splitting={self.splitting!r} shares them out to {self.shares}. "
                f"Set its substeps to a multiple of {self.shares}."
            )

    @property
    def shares(self) -> int:
        """Equal parts of the solver's step."""
        return self.turns * (2 if self.splitting == "strang" else 1)

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network. Raises SpecError where the solver does not fit the data."""
        check_solver(self.solver, spec)
        if self.form == "flux" and not (spec.grid.ndim and all(spec.grid.periodic)):
            raise SpecError(f"form='flux' needs periodic axes, but the data has {spec.grid.axes}. Use form='source'.")
        fluxes = spec.grid.ndim if self.form == "flux" else 1
        return Signature(spec.grid, *count(spec, 1, False, False), fluxes * len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Closure":
        """Raises SpecError where model, normalizer or solver do not fit `spec`, ConfigError without the first two."""
        check_fits(self, spec, model, normalizer)
        return Closure(self, spec, model, normalizer, constraints)


class Closure(Hybrid):
    """State: the last frame, `(batch, 1, *space, channel)` in physical units.

    The network's output channels: those of the data; for "flux" all of them along the first axis, then the next.
    """

    def advance(self, state, context: Context):
        config = self.config
        previous, strang = state[:, -1], config.splitting == "strang"
        solver = dataclasses.replace(
            config.solver,
            time_step=config.solver.time_step / config.shares,
            substeps=config.solver.substeps // config.shares,
        )

        def turn(stepper, frame):
            frame = march(solver, frame, context) if strang else frame
            return march(solver, stepper.close(frame, context), context)

        frame = self.repeat(turn, previous, config.turns)
        return self.finish(frame, previous, context)[:, None]

    def close(self, frame, context: Context):
        """The frame after a turn of the network."""
        part = self.config.scale / self.config.turns
        if self.config.splitting == "lie":
            return frame + part * self.tendency(frame, context)
        middle = frame + part / 2 * self.tendency(frame, context)
        return frame + part * self.tendency(middle, context)

    def tendency(self, frame, context: Context):
        """What the network changes per stored step, in physical units and without `scale`."""
        output = self.network(frame[:, None], context)
        if self.config.form == "source":
            return self.normalizer.increment(output)
        fluxes = jnp.split(output, self.spec.grid.ndim, axis=-1)
        slopes = [jnp.roll(f, 1, axis) - jnp.roll(f, -1, axis) for axis, f in enumerate(fluxes, start=1)]
        return self.normalizer.increment(sum(slopes) / 2)
