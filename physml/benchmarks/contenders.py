"""The networks of a benchmark: a name, the config that suits a grid, and how fast it learns.

Two sizes: "embedded" trains in a minute or so on a processor core at 32 x 32; "published" is near what the benchmarks'
papers use and wants an accelerator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from physml.errors import ConfigError, suggest
from physml.fields import Grid, Signature
from physml.models.auto_deeponet import AutoDeepONetConfig
from physml.models.auto_ffn import AutoFFNConfig
from physml.models.cfdbench_resnet import CFDBenchResNetConfig
from physml.models.classic_unet import ClassicUNetConfig
from physml.models.ffno import FFNOConfig
from physml.models.fno import FNOConfig
from physml.models.ifactformer import IFactFormerConfig
from physml.models.modern_unet import ModernUNetConfig
from physml.models.poseidon_scot import ScOTConfig
from physml.models.sinenet import SineNetConfig

Size = Literal["embedded", "published"]


@dataclass(frozen=True)
class Contender:
    """A network that can enter a benchmark.

    Attributes:
        config: grid and size -> model config, for a stepper that adds the output to the last frame (or takes it as it
            is): no contender adds the frame itself.
        learning_rate: peak of the cosine schedule.
        batch: windows per update.
    """

    config: Callable[[Grid, Size], Any]
    learning_rate: float = 1e-3
    batch: int = 16


def _modes(grid: Grid, most: int) -> tuple[int, ...]:
    return tuple(min(most, n // 2) for n in grid.shape)


def _fno(grid: Grid, size: Size) -> FNOConfig:
    padding = tuple(0.0 if periodic else 0.125 for periodic in grid.periodic)
    padding = padding if any(padding) else ()
    if size == "embedded":
        return FNOConfig(width=20, modes=_modes(grid, 16), domain_padding=padding)
    return FNOConfig(width=64, modes=_modes(grid, 32), domain_padding=padding)


def _ffno(grid: Grid, size: Size) -> FFNOConfig:
    if size == "embedded":
        return FFNOConfig(width=24, modes=_modes(grid, 8), depth=4, projection=64)
    return FFNOConfig(width=64, modes=_modes(grid, 16), depth=24)


def _unet(grid: Grid, size: Size) -> ClassicUNetConfig:
    return ClassicUNetConfig(width=6 if size == "embedded" else 12, frame=None)


def _modern_unet(grid: Grid, size: Size) -> ModernUNetConfig:
    if size == "embedded":
        return ModernUNetConfig(width=8, multipliers=(1, 2, 2), blocks=1)
    return ModernUNetConfig(width=64)


def _sinenet(grid: Grid, size: Size) -> SineNetConfig:
    return SineNetConfig(width=8, waves=2) if size == "embedded" else SineNetConfig()


def _scot(grid: Grid, size: Size) -> ScOTConfig:
    if size == "embedded":
        return ScOTConfig(width=24, depths=(2, 2), heads=(2, 4), skip_blocks=(1, 0), patch=4, window=4)
    return ScOTConfig()


def _resnet(grid: Grid, size: Size) -> CFDBenchResNetConfig:
    if size == "embedded":
        return CFDBenchResNetConfig(width=8, inner=16, kernel=5, dropout=0.0, frame=None)
    return CFDBenchResNetConfig(frame=None)


def _ifactformer(grid: Grid, size: Size) -> IFactFormerConfig:
    if size == "embedded":
        return IFactFormerConfig(width=24, heads=2, head_width=16, iterations=4)
    return IFactFormerConfig()


CONTENDERS: dict[str, Contender] = {
    "deeponet": Contender(lambda grid, size: AutoDeepONetConfig(frame=None)),
    "ffn": Contender(lambda grid, size: AutoFFNConfig(frame=None)),
    "ffno": Contender(_ffno),
    "fno": Contender(_fno, learning_rate=2e-3),
    "ifactformer": Contender(_ifactformer),
    "modern_unet": Contender(_modern_unet),
    "resnet": Contender(_resnet),
    "scot": Contender(_scot),
    "sinenet": Contender(_sinenet),
    "unet": Contender(_unet),
}


def contender(name: str) -> Contender:
    """Raises ConfigError, with the nearest name, when there is none."""
    if name not in CONTENDERS:
        raise ConfigError(f"There is no contender {name!r}." + suggest(name, CONTENDERS))
    return CONTENDERS[name]


def size_of(config: Any, signature: Signature) -> int:
    """Trained numbers of the network. Raises ConfigError when it cannot be built for these shapes."""
    import jax
    from flax import nnx

    model = nnx.eval_shape(lambda: config.build(signature, nnx.Rngs(0)))  # refuses what does not fit, computes nothing
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
