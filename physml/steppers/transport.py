"""Steps of tracers with a rising background and prescribed sources, as the carbon dioxide of the atmosphere.

Benson et al. 2024, arXiv:2408.11032 (CarbonBench): centered inputs and prescribed surface fluxes; the mass fixer beside
them is `physml.MassFixer(..., sources=...)`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from physml.constraints.names import channels_of, check_known, positions
from physml.constraints.sums import over_space, valid_cells
from physml.errors import ConfigError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.plain import Residual, ResidualConfig, check_fits


@dataclass(frozen=True)
class TransportConfig(ResidualConfig):
    """The network predicts increments from tracers without their mean; what sources bring is added to its prediction.

    Without options it is `residual`.

    Attributes:
        center: names of channels of whose normalized input the mean of the last frame is subtracted, of every sample,
            with the sizes of cells as weights: the network does not see how high the background is, only differences.
        sources: names of forcing fields, in units of the channel per `time_unit`, valid at the predicted frame; times
            the length of the step they are added to the frame, before constraints.
        into: channels that the sources go into, one for each; empty: those of `center`.
    """

    center: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    into: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("center", "sources", "into"):
            object.__setattr__(self, name, channels_of(getattr(self, name)))
        super().__post_init__()
        if len(self.sources) != len(self.receiving):
            raise ConfigError(
                f"sources={self.sources} go into channels {self.receiving or '()'}, but each needs one of its own. "
                "Name the channels with `into`."
            )

    @property
    def receiving(self) -> tuple[str, ...]:
        """Channels that the sources go into, in their order."""
        return self.into or (self.center if self.sources else ())

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network. Raises SpecError for channels and forcing that the data lacks."""
        positions(spec, (*self.center, *self.receiving))
        check_known("forcing field", self.sources, spec.forcing)
        return super().signature(spec)

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Transport":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return Transport(self, spec, model, normalizer, constraints)


class Transport(Residual):
    """State: the last `history` frames, `(batch, history, *space, channel)` in physical units."""

    def inputs(self, frames, context: Context):
        """Without the means of the newest frame."""
        fields, scalars = super().inputs(frames, context)
        places = positions(self.spec, self.config.center)
        if not places:
            return fields, scalars
        channels, places = len(self.spec.channels), np.array(places)
        last = (self.history - 1) * channels
        cells, exists = valid_cells(context, list(places), fields)
        size = over_space(cells)
        mean = over_space(cells * fields[..., last + places]) / jnp.where(size > 0, size, 1)
        for frame in range(self.history):
            fields = fields.at[..., frame * channels + places].add(jnp.where(exists, -mean, 0).astype(fields.dtype))
        return fields, scalars

    def predict(self, previous, output, context: Context):
        frame = super().predict(previous, output, context)
        if not self.config.sources:
            return frame
        forcing = [channel.name for channel in self.spec.forcing]
        sources = jnp.asarray(context.forcing)[..., np.array([forcing.index(name) for name in self.config.sources])]
        lead = context.lead.reshape(-1, *[1] * (frame.ndim - 1))
        # One by one, because several sources may go into the same channel.
        for i, place in enumerate(positions(self.spec, self.config.receiving)):
            frame = frame.at[..., place].add(sources[..., i] * lead[..., 0])
        return frame
