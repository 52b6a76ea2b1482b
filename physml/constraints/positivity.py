"""Values below a floor are raised to it, and the others give what that took."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from physml.constraints.names import channels_of, positions
from physml.constraints.sums import over_space, settle, valid_cells
from physml.errors import ConfigError
from physml.fields import ArrayLike, Context, Spec


@dataclass(frozen=True)
class Positivity:
    """No value of the channels lies below `floor`, and their totals stay those of the frame that came.

    What lies above the floor is scaled down by one factor. Where the mean itself lies below the floor both cannot be
    had: then the field becomes the floor everywhere.

    Attributes:
        channels: names.
        floor: least value, in the unit of the channels.
    """

    channels: str | tuple[str, ...]
    floor: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "channels", channels_of(self.channels))
        if not self.channels:
            raise ConfigError('channels is empty, so nothing would be positive. Name some, e.g. Positivity("rho").')

    def build(self, spec: Spec) -> "Positivity":
        """Itself. Raises SpecError for a channel that `spec` does not have."""
        positions(spec, self.channels)
        return self

    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """What lies below the floor, relative to the mean distance from it; one law per channel."""
        above, weights, _ = self._above(frame, context)
        below = over_space(weights * jnp.maximum(-above, 0))
        size = over_space(weights * jnp.abs(above))
        return (below / jnp.where(size > 0, size, 1)).reshape(below.shape[0], -1)

    def project(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch *space channel"]:
        """`frame` without values below the floor, unchanged where there are none."""
        frame = jnp.asarray(frame)
        above, weights, exists = self._above(frame, context)
        mean = over_space(weights * above)
        kept = jnp.maximum(above, 0)
        now = over_space(weights * kept)
        kept = kept * jnp.maximum(mean / jnp.where(now > 0, now, 1), 0)
        kept = settle(kept, jnp.where(mean >= 0, over_space(weights * above, -weights * kept), 0), weights)
        any_below = jnp.any((above < 0) & exists, axis=range(1, frame.ndim - 1), keepdims=True)
        places = positions(context.spec, self.channels)
        values = jnp.where(any_below & exists, self.floor + kept, frame[..., places])
        return frame.at[..., places].set(values.astype(frame.dtype))

    def _above(self, frame, context):
        places = positions(context.spec, self.channels)
        cells, exists = valid_cells(context, places, frame)
        size = over_space(cells)
        return jnp.where(exists, frame[..., places] - self.floor, 0), cells / jnp.where(size > 0, size, 1), exists
