"""The points of a fixed grid, for networks that read all of them."""

import numpy as np
from jaxtyping import Float

from physml.errors import ConfigError


def check_grid(name: str, shape: tuple[int, ...], fields) -> None:
    """Raises ConfigError where `fields (batch, *space, channel)` are not on the grid a network was built for."""
    if tuple(fields.shape[1:-1]) != shape:
        raise ConfigError(
            f"This {name} reads every point of a grid of {shape} points, but the fields have "
            f"{tuple(fields.shape[1:-1])}. Interpolate them to that grid, or train a network for theirs."
        )


def indices(shape: tuple[int, ...]) -> Float[np.ndarray, "point axis"]:
    """Index along each axis of every point, row-major, float64."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, len(shape)).astype(float)
