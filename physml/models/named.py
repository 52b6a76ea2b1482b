"""Architectures in sizes that have a name, as their authors trained and published them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from physml.fields import Axis, Grid, Signature
from physml.models.poseidon_scot import ScOTConfig


@dataclass(frozen=True)
class Named:
    """A published size of an architecture.

    Attributes:
        config: its choices.
        signature: the shapes it was trained for.
        parameters: trained numbers.
        family: of `physml.convert.FAMILIES`, which reads its published weights.
    """

    config: Any
    signature: Signature
    parameters: int
    family: str

    def build(self, rngs: nnx.Rngs):
        """The untrained model."""
        return self.config.build(self.signature, rngs)


def _poseidon(width: int, depth: int, parameters: int) -> Named:
    """Density, two velocities and pressure on 128 x 128 points; one scalar, the lead time. Herde et al. 2024, table."""
    axes = tuple(Axis.uniform(name, 128, periodic=True) for name in "xy")
    config = ScOTConfig(
        width=width, depths=(depth,) * 4, heads=(3, 6, 12, 24), skip_blocks=(2, 2, 2, 0), patch=4, window=16,
        mlp_ratio=4.0, boundary="zero", image_size=(128, 128), scale_start=0.0,
    )  # fmt: skip
    return Named(config, Signature(Grid(axes), inputs=4, scalars=1, outputs=4), parameters, "poseidon_scot")


NAMED: Mapping[str, Named] = {
    "poseidon-b": _poseidon(96, 8, 157_729_988),
    "poseidon-l": _poseidon(192, 8, 628_575_524),
    "poseidon-t": _poseidon(48, 4, 20_774_444),
}
