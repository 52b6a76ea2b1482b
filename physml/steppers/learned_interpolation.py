"""A finite-volume solver of incompressible flow whose interpolation a network learns.

Kochkov et al. 2021, doi:10.1073/pnas.2101784118: what flows between coarse cells is interpolated by coefficients that
depend on the flow. Here they are deviations from an upwind scheme with the limiter of van Leer and sum to zero, so that
a network cannot spoil mass, momentum or a uniform flow. Gradients flow through the solver: train with `Unrolled`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from physml.coding import check_fields, check_positive, tagged
from physml.errors import ConfigError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer
from physml.parallel.mesh import over_batch
from physml.steppers.corrected import Hybrid, axis_order, check_solver, shared_parameters, turned
from physml.steppers.packing import count, pack
from physml.steppers.plain import check_fits


def staggered_solvers():
    """The solvers whose interpolation can be learned."""
    from physml.solvers.staggered import StaggeredFlow

    return {"staggered_flow": StaggeredFlow}


@dataclass(frozen=True)
class LearnedInterpolationConfig:
    """The network reads the velocity on the sides of the cells and gives deviations of the interpolation.

    Its outputs are `taps` numbers for each of the four fluxes of `physml.solvers.staggered.transported`, whose mean
    over the taps is taken off. Parameters of the solver that the data has too are taken from there.

    Attributes:
        solver: `staggered_flow` with the grid and time step of the data, whose channels are u and v.
        taps: neighbors, along the flux, that are interpolated between; even.
        calls: network calls in a stored step; each holds for an equal share of the solver's substeps.
        scale: deviation where the network says 1. The smaller, the closer is a fresh stepper to the solver.
    """

    solver: Any = tagged(staggered_solvers)
    taps: int = 4
    calls: int = 1
    scale: float = 0.1

    history: ClassVar[int] = 1

    def __post_init__(self):
        kinds = staggered_solvers()
        if type(self.solver) not in kinds.values():
            raise ConfigError(
                f"{type(self).__name__} learns the interpolation of a finite-volume solver, but solver is "
                f"{type(self.solver).__name__}. Use make_solver({next(iter(kinds))!r}, ...), or the stepper "
                "`corrected` for other solvers."
            )
        check_fields(self)
        check_positive(self, "calls", "scale")
        if self.taps < 2 or self.taps % 2 or self.taps > self.solver.points:
            raise ConfigError(f"taps is {self.taps}, but it must be even, from 2 to the solver's points.")
        if self.solver.substeps % self.calls:
            raise ConfigError(
                f"calls is {self.calls}, but the network's calls share out {self.solver.substeps} substeps of the "
                "solver evenly. Choose a divisor of them."
            )

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network. Raises SpecError where the solver does not fit the data."""
        from physml.solvers.staggered import FLUXES

        check_solver(self.solver, spec)
        inputs, scalars = count(spec, 1, False, False)
        return Signature(spec.grid, inputs + self.features(spec), scalars, FLUXES * self.taps)

    def features(self, spec: Spec) -> int:
        """Inputs besides those of the last frame."""
        return 0

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "LearnedInterpolation":
        """Raises SpecError where model, normalizer or solver do not fit `spec`, ConfigError without the first two."""
        check_fits(self, spec, model, normalizer)
        return LearnedInterpolation(self, spec, model, normalizer, constraints)


class LearnedInterpolation(Hybrid):
    """State: the last `history` frames, `(batch, history, *space, channel)` in physical units.

    Frames hold the velocity at the centers of the cells. Every step begins with that on their sides, without net
    outflow (see `physml.solvers.staggered`), and ends with mask and constraints at the centers.
    """

    def advance(self, state, context: Context):
        config, faces = self.config, self.faces(state)
        earlier = faces[:, :-1]
        steps = config.solver.substeps // config.calls
        time_step = config.solver.time_step / config.solver.substeps
        numbers = shared_parameters(config.solver, context)

        @self._in_solver_order
        def march(faces, deviations, numbers):
            return config.solver.march(faces, steps, time_step, deviations, **numbers)

        def call(stepper, now):
            past = jnp.concatenate([earlier, now[:, None]], axis=1)
            return over_batch(jax.vmap(march))(now, stepper.deviations(past, context), numbers)

        moved = self.repeat(call, faces[:, -1], config.calls)
        frame = over_batch(jax.vmap(self._in_solver_order(config.solver.observe)))(moved)
        frame = self.finish(frame, state[:, -1], context)
        return jnp.concatenate([state[:, 1:], frame[:, None]], axis=1)

    def faces(self, frames):
        """The velocity on the sides of the cells, without divergence, of `frames` `(batch, frame, *space, channel)`."""
        return over_batch(jax.vmap(jax.vmap(self._in_solver_order(self.config.solver.resume))))(frames)

    def deviations(self, faces, context: Context):
        """What is added to the interpolation, `(batch, *space, flux, tap)`; sums over taps are zero."""
        fields, scalars = pack(faces[:, -1:], context, self.normalizer, 1, False, False)
        fields = jnp.concatenate([fields, *self.past(faces)], axis=-1)
        weights = self.config.scale * self.ask(fields, scalars, context)
        weights = weights.reshape(*weights.shape[:-1], -1, self.config.taps)
        return weights - weights.mean(-1, keepdims=True)

    def past(self, faces) -> tuple:
        """Further inputs of the network."""
        return ()

    def _in_solver_order(self, function):
        """`function` of fields of one sample (and a table of numbers), with the axes as the solver has them."""
        order = axis_order(self.config.solver, self.spec)

        def turning(*fields):
            fields = [field if isinstance(field, dict) else turned(field, order) for field in fields]
            return turned(function(*fields), order, back=True)

        return turning
