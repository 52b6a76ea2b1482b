"""Low-rank adaptation: a trained network learns anew through a few numbers beside each of its linear maps.

Hu et al. 2021, arXiv:2106.09685: `x W` becomes `x W + (alpha / rank) (x A) B` with W frozen and B zero at first.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import ConfigError, nearest_paths
from physml.layers.dense import Dense
from physml.layers.pointwise import Linear, uniform

FROZEN = "frozen"  # in the metadata of a parameter: the optimizer never sees it


@dataclass(frozen=True)
class LoRA:
    """Which linear maps are adapted, and by how much.

    Attributes:
        pattern: regular expression, searched in the dotted path of a linear layer ("model.encoder.0.blocks.attention");
            the default takes all of them. Layers are `Dense`, or `Linear` over leading channels.
        rank: columns of A; a layer with fewer inputs or outputs takes that number.
        alpha: weight of the change is alpha / rank; None: 1.
        train: regular expression for the paths of other parameters that learn too, in full: what a new problem has of
            its own, such as "embedding|recovery"; empty: none.
    """

    pattern: str = "."
    rank: int = 8
    alpha: float | None = None
    train: str = ""

    def __post_init__(self):
        for name in ("pattern", "train"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(
                    f"lora.{name} is {getattr(self, name)!r}, which is no regular expression: {error}. Escape special "
                    "characters, as in 'blocks\\.0'."
                ) from error
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}, but at least 1 column is needed.")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha is {self.alpha}, but it must be positive.")

    @property
    def scale(self) -> float:
        """Of the change."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoRADense(nnx.Module):
    """A `Dense` and its change: `base(x) + scale (x @ down) @ up`.

    Attributes:
        base: the layer as it was.
        down: A, `(inputs, rank)`, behind the leading axes of stacked weights.
        up: B, `(rank, outputs)`; zero at first, so that nothing changes.
    """

    def __init__(self, base: Dense, rank: int, scale: float, *, rngs: nnx.Rngs):
        *stacked, inputs, outputs = base.weight.shape
        self.base, self.scale, self.rank = base, scale, min(rank, inputs, outputs)
        self.down = nnx.Param(uniform(rngs, (*stacked, inputs, self.rank), inputs))
        self.up = nnx.Param(jnp.zeros((*stacked, self.rank, outputs), jnp.float32))

    @property
    def weight(self) -> Array:
        """The effective weight, for models that read it."""
        return self.base.weight[...] + self.scale * (self.down[...] @ self.up[...])

    @property
    def bias(self):
        return self.base.bias

    def __call__(self, x: Float[Array, "*any inputs"]) -> Float[Array, "*any outputs"]:
        flat = x.reshape(-1, x.shape[-1])
        change = (flat @ self.down[...].astype(x.dtype)) @ (self.scale * self.up[...]).astype(x.dtype)
        return self.base(x) + change.reshape(*x.shape[:-1], -1)

    def change(self) -> np.ndarray:
        """What is added to the weight of `base`, in float64."""
        return self.scale * (np.asarray(self.down[...], np.float64) @ np.asarray(self.up[...], np.float64))


class LoRALinear(nnx.Module):
    """A `Linear` and its change: `base(x) + scale up @ (down @ x)` over the leading channel axis.

    Attributes:
        base: the layer as it was.
        down: A, `(rank, inputs)`, behind the leading axes of stacked weights.
        up: B, `(outputs, rank)`; zero at first, so that nothing changes.
    """

    def __init__(self, base: Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        *stacked, outputs, inputs = base.weight.shape
        self.base, self.scale, self.rank = base, scale, min(rank, inputs, outputs)
        self.down = nnx.Param(uniform(rngs, (*stacked, self.rank, inputs), inputs))
        self.up = nnx.Param(jnp.zeros((*stacked, outputs, self.rank), jnp.float32))

    @property
    def weight(self) -> Array:
        """The effective weight, for models that read it."""
        return self.base.weight[...] + self.scale * (self.up[...] @ self.down[...])

    @property
    def bias(self):
        return self.base.bias

    def __call__(self, x: Float[Array, "inputs batch *space"]) -> Float[Array, "outputs batch *space"]:
        inner = self.down[...].astype(x.dtype) @ x.reshape(x.shape[0], -1)
        change = (self.scale * self.up[...]).astype(x.dtype) @ inner
        return self.base(x) + change.reshape(-1, *x.shape[1:])

    def change(self) -> np.ndarray:
        """What is added to the weight of `base`, in float64."""
        return self.scale * (np.asarray(self.up[...], np.float64) @ np.asarray(self.down[...], np.float64))


ADAPTERS = {Dense: LoRADense, Linear: LoRALinear}


def add_lora(module: Any, lora: LoRA, seed: int = 0) -> Any:
    """A copy of a stepper or model whose linear layers that match are adapted, all else frozen but `lora.train`.

    Until it is trained its output is that of `module`: exactly, unless a compiler fuses, and so rounds, the additional
    products otherwise. Raises ConfigError, with paths, where the pattern finds no linear layer or `train` no parameter,
    and for a module that is adapted already.
    """
    module = nnx.clone(module)
    if adapted(module):
        raise ConfigError(f"{type(module).__name__} has LoRA layers already. Fold them in first: merge_lora(stepper).")
    layers = {path: layer for path, layer in _modules(module) if type(layer) in ADAPTERS}
    chosen = {path: (lora.rank, lora.scale) for path in layers if re.search(lora.pattern, path)}
    if not layers:
        raise ConfigError(
            f"{type(getattr(module, 'model', module)).__name__} has no linear layer (Dense, Linear), so LoRA has "
            "nothing to adapt. Fine-tune it in full, or freeze parts of it with optimizer.groups."
        )
    if not chosen:
        raise ConfigError(
            f"No linear layer matches the LoRA pattern {lora.pattern!r}. The nearest of {len(layers)} are "
            f"{', '.join(nearest_paths(lora.pattern, layers))}."
        )
    others = list(parameters(module))
    trained = [path for path in others if lora.train and re.search(lora.train, path)]
    if lora.train and not trained:
        raise ConfigError(
            f"No parameter matches lora.train={lora.train!r}. The nearest of {len(others)} are "
            f"{', '.join(nearest_paths(lora.train, others))}."
        )
    return _adapt(module, chosen, trained, seed)


def merge_lora(module: Any) -> Any:
    """A copy with every change folded into its weight: plain layers again, nothing frozen.

    Outputs agree to rounding. A module without LoRA layers is only copied.
    """
    module = nnx.clone(module)
    folded = {}
    for _, layer in adapted(module).items():
        weight = layer.base.weight
        weight[...] = jnp.asarray(np.asarray(weight[...], np.float64) + layer.change(), weight.dtype)
        folded[id(layer)] = layer.base
    if folded:
        _replace(module, folded)
        for variable in parameters(module).values():
            if is_frozen(variable):
                variable.del_metadata(FROZEN)
    return module


def describe_lora(module: Any) -> dict[str, Any] | None:
    """Plain data from which `restore_lora` adapts an equal unadapted module alike; None without LoRA layers."""
    layers = adapted(module)
    if not layers:
        return None
    own = {f"{path}.{name}" for path in layers for name in ("down", "up")}
    trained = [path for path, variable in parameters(module).items() if not is_frozen(variable) and path not in own]
    return {
        "layers": {path: {"rank": layer.rank, "scale": layer.scale} for path, layer in layers.items()},
        "trained": [path.replace(".base.", ".") for path in trained],
    }


def restore_lora(module: Any, description: dict[str, Any]) -> Any:
    """The module with LoRA layers where `describe_lora` found them; their numbers are fresh.

    Raises ConfigError for a path without a linear layer.
    """
    chosen = {path: (int(item["rank"]), float(item["scale"])) for path, item in description["layers"].items()}
    absent = set(chosen) - {path for path, layer in _modules(module) if type(layer) in ADAPTERS}
    if absent:
        raise ConfigError(f"There is no linear layer at {sorted(absent)}, which LoRA is to adapt.")
    return _adapt(module, chosen, description["trained"], 0)


def is_frozen(variable: nnx.Variable) -> bool:
    """Whether training leaves a parameter alone."""
    return bool(variable.get_metadata().get(FROZEN, False))


def adapted(module: Any) -> dict[str, LoRADense | LoRALinear]:
    """The LoRA layers by dotted path."""
    return {path: layer for path, layer in _modules(module) if isinstance(layer, tuple(ADAPTERS.values()))}


def parameters(module: Any) -> dict[str, nnx.Param]:
    """The parameters by dotted path."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def trained_share(module: Any) -> tuple[int, int]:
    """How many numbers training changes, and how many there are."""
    sizes = [(is_frozen(variable), int(np.prod(variable.shape))) for variable in parameters(module).values()]
    return sum(size for frozen, size in sizes if not frozen), sum(size for _, size in sizes)


def _adapt(module: Any, chosen: dict[str, tuple[int, float]], trained: list[str], seed: int) -> Any:
    trained, rngs = set(trained), nnx.Rngs(params=jax.random.key(seed))
    for path, variable in parameters(module).items():
        if path not in trained:
            variable.set_metadata(**{FROZEN: True})
    layers = dict(_modules(module))
    replaced = {}
    for path, (rank, scale) in chosen.items():
        layer = layers[path]
        replaced[id(layer)] = ADAPTERS[type(layer)](layer, rank, scale, rngs=rngs)
    _replace(module, replaced)
    return module


def _modules(module: Any) -> list[tuple[str, nnx.Module]]:
    return sorted((".".join(map(str, path)), found) for path, found in nnx.iter_modules(module))


def _replace(module: Any, others: dict[int, nnx.Module]) -> None:
    """Puts `others[id(child)]` in the place of every child, also of one that is held in several places."""
    for _, parent in list(nnx.iter_modules(module)):
        for name, child in list(vars(parent).items()):
            if id(child) in others:
                if isinstance(parent, nnx.List):
                    parent[int(name)] = others[id(child)]
                else:
                    setattr(parent, name, others[id(child)])
