"""Architectures in sizes that have a name, as their authors trained and published them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from physml.fields import Axis, Grid, Signature
from physml.models.modern_unet import ModernUNetConfig
from physml.models.poseidon_scot import ScOTConfig
from physml.models.sinenet import SineNetConfig


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


def _sinenet(parameters: int, **choices) -> Named:
    """Four frames of smoke density and two velocities in, one out, on 128 x 128 points. Zhang et al. 2024."""
    axes = tuple(Axis.uniform(name, 128, periodic=choices["boundary"] == "periodic") for name in "xy")
    return Named(
        SineNetConfig(**choices), Signature(Grid(axes), inputs=12, scalars=0, outputs=3), parameters, "sinenet"
    )


def _modern_unet(parameters: int, scalars: int = 0, **choices) -> Named:
    """As `_sinenet`, but in a box with walls: the U-Nets of Gupta & Brandstetter 2022."""
    axes = tuple(Axis.uniform(name, 128, periodic=False) for name in "xy")
    config = ModernUNetConfig(boundary="zero", **choices)
    return Named(config, Signature(Grid(axes), inputs=12, scalars=scalars, outputs=3), parameters, "modern_unet")


def _refiner() -> Named:
    """Kuramoto-Sivashinsky on 256 points; last frame and noisy target in; step, time step and spacing as scalars."""
    signature = Signature(Grid((Axis.uniform("x", 256, 64.0),)), inputs=2, scalars=3, outputs=1)
    return Named(ModernUNetConfig(boundary="periodic"), signature, 53_924_225, "pderefiner")


NAMED: Mapping[str, Named] = {
    "modern-unet-64": _modern_unet(144_263_683),
    "modern-unet-attention-64": _modern_unet(148_462_083, middle_attention=True),
    "pde-refiner-ks": _refiner(),
    "poseidon-b": _poseidon(96, 8, 157_729_988),
    "poseidon-l": _poseidon(192, 8, 628_575_524),
    "poseidon-t": _poseidon(48, 4, 20_774_444),
    "sinenet-2": _sinenet(35_499_989, waves=2, growth=1.8075, boundary="zero"),
    "sinenet-4": _sinenet(35_493_699, waves=4, growth=1.611, boundary="zero"),
    "sinenet-6": _sinenet(35_475_499, waves=6, growth=1.5, boundary="zero"),
    "sinenet-8": _sinenet(35_490_219, waves=8, growth=1.425, boundary="zero"),
    "sinenet-8-circular": _sinenet(35_490_219, waves=8, growth=1.425, boundary="periodic"),
    "sinenet-8-tangled": _sinenet(32_831_403, waves=8, growth=1.425, disentangled=False, boundary="zero"),
    "sinenet-unet-8": _sinenet(28_628_084, waves=1, blocks=8, growth=1.425, boundary="zero"),
}
