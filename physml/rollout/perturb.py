"""Ensembles of initial states: random fields of a given size added to what a rollout begins from."""

import functools
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from physml.errors import ConfigError, SpecError
from physml.fields import Grid, Window
from physml.rollout.scan import check_kind

KINDS = ("smooth", "white")


def perturbed(
    window: Window, key, members: int, scale, *, kind: Literal["smooth", "white"] = "smooth", length: float = 0.1
) -> Window:
    """The window with frames `(member, batch, time, *space, channel)`: each member's differ by a random field.

    The field is normal with mean zero and standard deviation `scale` at every point, the same in all frames of the
    history (it is an error of the state, not of its tendency), and independent between channels, samples and members.
    No member is left as it was: all are drawn alike, as scores of ensembles suppose.

    Args:
        key: typed PRNG key.
        scale: standard deviation in the units of the channels, a number or `(channel,)`: that of the analysis error, or
            a part of the scale of the data.
        kind: "white" draws every point by itself, "smooth" lets neighbors agree: correlation
            exp(-(distance / length)^2 / 2).
        length: of "smooth", as a part of the extent of each axis (counted in cells: on a sphere not in kilometers).

    Raises ConfigError for what cannot be drawn, SpecError when `scale` has not one number per channel.
    """
    check_kind(window)
    if members < 1 or kind not in KINDS or not 0 < length <= 1:
        raise ConfigError(
            f"members={members}, kind={kind!r} and length={length} were given, but at least 1 member, one of "
            f"{', '.join(KINDS)} and a length in (0, 1] were expected."
        )
    scale, channels = np.asarray(scale, np.float32), len(window.spec.channels)
    if scale.shape not in ((), (channels,)):
        raise SpecError(
            f"scale has shape {scale.shape}, but one number was expected, or one per channel {list(window.spec.names)}."
        )
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise ConfigError(f"scale is {scale}, but a standard deviation is finite and 0 or more.")
    frames = jnp.asarray(window.frames)
    lengths = (length,) * window.spec.grid.ndim if kind == "smooth" else None
    noise = _noise(key, (members, frames.shape[0]), window.spec.grid, channels, lengths).astype(frames.dtype)
    noise = noise * scale if window.mask is None else noise * scale * (jnp.asarray(window.mask) > 0)
    return replace(window, frames=frames + noise[:, :, None])


@functools.partial(jax.jit, static_argnames=("leading", "grid", "channels", "lengths"))
def _noise(key, leading: tuple[int, ...], grid: Grid, channels: int, lengths):
    """Normal fields `(*leading, *space, channel)` of variance one."""
    if lengths is None:
        return jax.random.normal(key, (*leading, *grid.shape, channels))
    # Beyond the end of an axis that does not wrap round there are as many points again, which are cut off.
    sizes = [n if periodic else 2 * n for n, periodic in zip(grid.shape, grid.periodic, strict=True)]
    noise = jax.random.normal(key, (*leading, *sizes, channels))
    for axis, (size, points, part) in enumerate(zip(sizes, grid.shape, lengths, strict=True), start=len(leading)):
        images = (np.arange(size) + size * np.arange(-4, 5)[:, None]) / points  # wraps round
        power = np.maximum(np.fft.fft(np.exp(-((images / part) ** 2) / 2).sum(0)).real, 0)
        response = np.sqrt(power / power.mean()).astype(np.float32)  # of variance one, and correlated as asked
        response = response.reshape(-1, *(1,) * (noise.ndim - axis - 1))
        noise = jnp.fft.ifft(jnp.fft.fft(noise, axis=axis) * response, axis=axis).real
        noise = jax.lax.slice_in_dim(noise, 0, points, axis=axis)
    return noise
