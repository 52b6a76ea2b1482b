"""Fields on another number of points, by their Fourier series."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.errors import ConfigError
from physml.fields import ArrayLike


def fourier_resample(
    x: Float[ArrayLike, "batch *space channel"], shape: Sequence[int]
) -> Float[Array, "batch *places channel"]:
    """The real part of the Fourier series of `x` at the points of another grid of the same extent.

    Of each axis of n points the frequencies -(n // 2), ..., (n - 1) // 2 are kept as far as the new grid of m points
    has them too: -(m // 2), ..., (m - 1) // 2. The highest frequency of an even axis, which has no partner of the
    opposite sign, counts once as in `numpy.fft.fftshift` with zeros around it. Exact for fields that both grids resolve
    below that frequency; axes that are not periodic ring near their ends.

    As products with small constant matrices, in float32 or better; a field that is on `shape` already is returned as
    it is. Raises ConfigError when the number of axes differs.
    """
    x = jnp.asarray(x)
    if len(shape) != x.ndim - 2:
        raise ConfigError(f"A field with {x.ndim - 2} spatial axes cannot be resampled to the shape {tuple(shape)}.")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    real, imaginary = wide, None
    for axis, (before, after) in enumerate(zip(x.shape[1:-1], shape, strict=True), start=1):
        if before == after:
            continue
        cosine, sine = (None if part is None else jnp.asarray(part, wide.dtype) for part in _matrices(before, after))
        # Only frequencies without a partner make imaginary parts: often there are none at all.
        parts = [(cosine, real, 1), (sine, imaginary, -1)], [(sine, real, 1), (cosine, imaginary, 1)]
        real, imaginary = (_total(terms, axis) for terms in parts)
    return real.astype(x.dtype)


def _total(terms, axis: int):
    products = [
        sign * jnp.moveaxis(jnp.tensordot(matrix, field, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
        for matrix, field, sign in terms
        if matrix is not None and field is not None
    ]
    return sum(products[1:], products[0]) if products else None


@functools.lru_cache(maxsize=64)
def _matrices(before: int, after: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Real and imaginary part `(after, before)` of the matrix from values to values; None for a part that vanishes."""
    low, high = -min(before // 2, after // 2), min((before - 1) // 2, (after - 1) // 2)
    frequencies = np.arange(low, high + 1)
    forward = np.exp(-2j * np.pi * (np.outer(frequencies, np.arange(before)) % before) / before) / before
    back = np.exp(2j * np.pi * (np.outer(np.arange(after), frequencies) % after) / after)
    matrix = back @ forward
    return matrix.real, matrix.imag if np.abs(matrix.imag).max() > 1e-12 else None
