"""Rename rules -> parameters.

Every foreign tensor is used and every parameter filled, or a ConversionError lists the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.errors import ConversionError

ROWS = 10  # of a table of differences


def same(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Rule:
    """Which foreign tensors make one parameter.

    Attributes:
        target: path of the parameter in the model, dotted: "blocks.0.skip.weight".
        sources: names of the foreign tensors.
        change: from these to the parameter's layout.
    """

    target: str
    sources: tuple[str, ...]
    change: Callable[..., np.ndarray] = same


def rule(target: str, *sources: str, change: Callable[..., np.ndarray] = same) -> Rule:
    """`Rule` with the sources as arguments."""
    return Rule(target, sources, change)


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The trained parameters of a model by dotted path."""
    return _by_path(nnx.state(model, nnx.Param))


def _by_path(state) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def fill(
    model: nnx.Module, tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], *, ignored: Sequence[str] = ()
) -> None:
    """Sets every parameter and running statistic of `model` from `tensors`, in place.

    Other variables (buffers) are set where a rule names them, and keep what they were built with elsewhere. `ignored`
    are foreign tensors that the model has no use for. Raises ConversionError with at most ten rows when a
    tensor is missing or left over, a parameter stays empty, a shape differs, or a number is not finite.
    """
    tensors = {name: value for name, value in tensors.items() if name != "_metadata"}
    state = nnx.state(model, nnx.Variable)
    known, used, rows, values = _by_path(state), set(ignored), [], {}
    wanted = [name for name, variable in known.items() if isinstance(variable, nnx.Param | nnx.BatchStat)]
    for item in rules:
        used |= set(item.sources)
        missing = [name for name in item.sources if name not in tensors]
        if missing:
            rows += [f"missing: {name} (for {item.target})" for name in missing]
        elif item.target not in known:
            rows.append(f"no such parameter: {item.target} (for {', '.join(item.sources)})")
        else:
            rows += _convert(item, tensors, known[item.target].shape, values)
    rows += [f"unexpected: {name} {np.shape(tensors[name])}" for name in tensors if name not in used]
    filled = {item.target for item in rules}
    rows += [f"not filled: {name} {known[name].shape}" for name in wanted if name not in filled]
    if rows:
        more = f"\n  and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
        raise ConversionError(
            f"The weights do not fit the model ({len(rows)} differences):\n  " + "\n  ".join(rows[:ROWS]) + more + "\n"
            "Check that the config is the one the weights were trained with."
        )
    for name, value in values.items():
        known[name][...] = jnp.asarray(value)
    nnx.update(model, state)


def _convert(item: Rule, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...], values: dict) -> list[str]:
    """Adds the converted array to `values`; returns what is wrong with it."""
    sources = [np.asarray(tensors[name]) for name in item.sources]
    label = ", ".join(f"{name} {source.shape}" for name, source in zip(item.sources, sources))
    try:
        array = item.change(*sources)
    except (ValueError, IndexError) as error:
        return [f"shape: {label} cannot become {item.target} {shape} ({error})"]
    if array.shape != shape:
        return [f"shape: {label} becomes {array.shape}, but {item.target} is {shape}"]
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        return [f"not finite: {label} holds NaN or infinite numbers"]
    values[item.target] = array
    return []


def as_pairs(array: np.ndarray) -> np.ndarray:
    """A complex tensor as real and imaginary part in a trailing axis; others as they are."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array


def weight_and_bias(ours: str, theirs: str, change: Callable[..., np.ndarray] = same) -> list[Rule]:
    """The rules of a layer's weight, which is changed, and of its bias."""
    return [rule(f"{ours}.weight", f"{theirs}.weight", change=change), rule(f"{ours}.bias", f"{theirs}.bias")]


def kernel(weight: np.ndarray) -> np.ndarray:
    """(out, in, *kernel) -> (*kernel, in, out)."""
    return np.moveaxis(weight, (1, 0), (-2, -1))


def transposed_kernel(weight: np.ndarray) -> np.ndarray:
    """(in, out, *kernel) of a transposed convolution -> (*kernel, in, out)."""
    return np.moveaxis(weight, (0, 1), (-2, -1))


def matrix(weight: np.ndarray) -> np.ndarray:
    """(out, in), with or without axes of length one -> (in, out)."""
    return weight.reshape(weight.shape[:2]).T


def pointwise(array: np.ndarray) -> np.ndarray:
    """The matrix `(out, in)` of a convolution with kernels of one point, `(out, in, 1, ...)`."""
    return array.reshape(array.shape[:2]) if array.size == array.shape[0] * array.shape[1] else array


def vector(array: np.ndarray) -> np.ndarray:
    """One number per channel, whatever axes of length one surround them."""
    return array.reshape(-1) if array.size == max(array.shape, default=1) else array
