"""A stepper whose velocity cannot diverge: the network predicts a stream function in place of its two components."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.constraints.differences import Differences, check_components, component_axes, wave_numbers
from physml.constraints.names import channels_of
from physml.errors import SpecError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer
from physml.parallel.fft import irfftn, rfftn
from physml.steppers.packing import count
from physml.steppers.plain import Residual, ResidualConfig, check_fits


@dataclass(frozen=True)
class StreamFunctionConfig(ResidualConfig):
    """The network predicts increments, that of the velocity as the curl of a stream function: u += d psi / dy,
    v -= d psi / dx.

    The velocity keeps the divergence it had, and its mean on periodic axes; nothing flows through walls. The divergence
    is that of the constraint `DivergenceFree` (of the Fourier series where both axes are periodic, else the net outflow
    of cells), whose projection changes nothing but what rounding adds up to over many steps. Outputs: the stream
    function, then the other channels in their order. It comes in units in which every wave has the velocity of the
    same size, so that outputs of order one make increments of the size that those of the data have.

    Attributes:
        velocity: channels of the two components.
        axes: the axis along which each component points; without, x and y.
    """

    velocity: tuple[str, ...] = ("u", "v")
    axes: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("velocity", "axes"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        super().__post_init__()
        check_components(self.velocity, self.axes, (2,))

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network: one output less than there are channels. Raises SpecError for a grid that has no
        equal cells on plane axes, or names that the data do not have."""
        for name in self.velocity:
            spec.index(name)
        if not self.differences(spec).plain:
            raise SpecError(
                "A stream function needs cells of equal size along both axes, but the grid is "
                f"{list(spec.grid.axes)}. Use ResidualConfig with the constraint DivergenceFree."
            )
        inputs, scalars = count(spec, self.history, self.calendar, self.lead)
        return Signature(spec.grid, inputs, scalars, len(spec.channels) - 1)

    def differences(self, spec: Spec) -> Differences:
        """Those of the divergence that vanishes."""
        return Differences(spec.grid, component_axes(self.velocity, self.axes, spec.grid))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "StreamFunction":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return StreamFunction(self, spec, model, normalizer, constraints)


class StreamFunction(Residual):
    """State: the last `history` frames, `(batch, history, *space, channel)` in physical units.

    Raises SpecError for masked data: the values of a stream function on obstacles are not known.
    """

    def predict(self, previous, output, context: Context):
        if context.mask is not None:
            raise SpecError(
                "There are masked cells, around which a stream function does not lead the flow. "
                "Use ResidualConfig with the constraint DivergenceFree."
            )
        spec, velocity = self.spec, self.config.velocity
        places = jnp.asarray([spec.index(name) for name in velocity])
        others = [i for i, name in enumerate(spec.names) if name not in velocity]
        scale = jnp.sqrt(jnp.sum(jnp.square(self.normalizer.increments[...][places])))
        flow = scale * jnp.moveaxis(unit_curl(output[..., 0], self.config.differences(spec)), 1, -1)
        increment = jnp.zeros_like(previous).at[..., places].set(flow.astype(previous.dtype))
        if others:
            rest = output[..., 1:] * self.normalizer.increments[...][jnp.asarray(others)]
            increment = increment.at[..., jnp.asarray(others)].set(rest.astype(previous.dtype))
        return previous + increment


def unit_curl(
    stream: Float[Array, " batch *space"], differences: Differences
) -> Float[Array, " batch component *space"]:
    """The curl of a stream function whose waves are each multiplied by the length that gives the flow their own size.

    The mean square of the flow is that of `stream`, except for what no difference sees: means and Nyquist modes. Walls
    are zeros of the stream function.
    """
    field, waves = stream, []
    for place in differences.places:
        axis = differences.axes[place]
        if not axis.periodic:
            field = jnp.concatenate([field, -jnp.flip(field, place)], place)
        numbers = wave_numbers(field.shape[place], differences.lengths[place].mean(), series=differences.spectral)
        waves.append(numbers.reshape(-1, *[1] * (-place - 1)))
    shape = [field.shape[place] for place in differences.places]
    spectrum = rfftn(field, differences.places)
    halved = differences.places[-1]
    waves[-1] = waves[-1][: spectrum.shape[halved]]
    size = np.sqrt(waves[0] ** 2 + waves[1] ** 2)
    size = np.where(size > 0, size, 1)
    factors = [jnp.asarray(1j * wave / size, spectrum.dtype) for wave in (waves[1], -waves[0])]
    flow = irfftn(jnp.stack([factor * spectrum for factor in factors], 1), shape, differences.places)
    for place in differences.places:
        flow = flow[(..., slice(0, stream.shape[place]), *[slice(None)] * (-place - 1))]
    return flow.astype(stream.dtype)
