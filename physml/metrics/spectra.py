"""Energy by wavenumber, and how far the spectrum of a prediction is from the true one.

Shells: the wavenumber |k| of a mode is rounded to the nearest multiple of the spacing 2 pi / L, L the longest axis. The
energy of all shells adds up to half the mean square of the field (Parseval). Along an axis that is not periodic the
least-squares linear trend is removed and a Hann window of unit mean square applied first, so that the jump between the
ends does not fill the small scales (Errico 1985, Mon. Wea. Rev. 113, 1554); Parseval then holds for the windowed field.

Latitude and longitude are measured in kilometers at the middle latitude of a limited area. Where the latitudes span
more than 90 degrees there is no plane: the spectrum is zonal then, by wavenumber along each circle, averaged with cell
areas. Longitudes that do not go all around have the wavenumbers of their span: over 90 degrees the multiples of four.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from physml.errors import SpecError
from physml.fields import ArrayLike, Axis, Grid
from physml.metrics.metric import Measure, check_even
from physml.parallel.fft import rfftn

KILOMETERS_PER_DEGREE = 6371.0 * np.pi / 180
NOISE = 1e-12  # share of the energy outside shell 0 below which a shell is rounding of a float32 transform
ROUNDING = 1e-16  # share of all energy that rounding of a float32 field itself has in a shell
DIRECTIONS = {"latitude": ("latitude", "lat"), "longitude": ("longitude", "lon")}


@dataclass(frozen=True)
class Shells:
    """How modes fall into shells; made once per grid by `shells`.

    Attributes:
        axes: positions of the transformed axes among the spatial axes.
        index: shell of every mode of a half-complex transform, flattened.
        multiplicity: 2 for a mode that stands for its conjugate too, else 1, flattened.
        wavenumbers: center of each shell.
        resolved: shells 1..resolved are complete: no axis has its Nyquist wavenumber below them.
        unit: unit of the wavenumbers.
    """

    axes: tuple[int, ...]
    index: np.ndarray
    multiplicity: np.ndarray
    wavenumbers: np.ndarray
    resolved: int
    unit: str


@functools.lru_cache(maxsize=32)
def shells(grid: Grid) -> Shells:
    """The shells of a grid. Raises SpecError when space has no axis longer than three points, or uneven ones."""
    axes, lengths, unit = _plane(grid)
    if not axes:
        raise SpecError(f"A grid of {grid.shape} points has no spectrum: an axis of at least four points is needed.")
    for i in axes:
        check_even(grid.axes[i], "A spectrum", "leave spectra out")
    sizes = [len(grid.axes[i]) for i in axes]
    steps = [2 * np.pi / length for length in lengths]
    parts = [np.fft.fftfreq(n, 1 / n) * step for n, step in zip(sizes, steps)]
    parts[-1] = np.arange(sizes[-1] // 2 + 1) * steps[-1]
    magnitude = np.sqrt(sum(part**2 for part in np.meshgrid(*parts, indexing="ij")))
    index = np.rint(magnitude / min(steps)).astype(np.int32)
    last = np.full(parts[-1].shape, 2.0, np.float32)
    last[0] = 1.0
    if sizes[-1] % 2 == 0:
        last[-1] = 1.0
    nyquist = min((n // 2) * step for n, step in zip(sizes, steps))
    return Shells(
        axes, index.ravel(), np.broadcast_to(last, index.shape).ravel(), np.arange(index.max() + 1) * min(steps),
        int(np.floor(nyquist / min(steps) + 1e-9)), unit,
    )  # fmt: skip


def _plane(grid: Grid) -> tuple[tuple[int, ...], list[float], str]:
    """The axes of the transform, their lengths and the unit of the wavenumbers."""
    names = {i: _direction(axis) for i, axis in enumerate(grid.axes)}
    axes = tuple(i for i, axis in enumerate(grid.axes) if len(axis) > 3)
    latitude = next((axis for i, axis in enumerate(grid.axes) if names[i] == "latitude"), None)
    if latitude is None or "longitude" not in names.values():
        units = {grid.axes[i].unit for i in axes}
        unit = units.pop() if len(units) == 1 else ""
        return axes, [grid.axes[i].length for i in axes], f"rad {unit}-1" if unit else ""
    if abs(latitude.centers[-1] - latitude.centers[0]) > 90:
        zonal = next(i for i in names if names[i] == "longitude")
        longitude = grid.axes[zonal]
        span = 2 * np.pi if longitude.periodic else np.deg2rad(abs(longitude.length))
        return (zonal,), [span], "waves around the circle"
    middle = np.cos(np.deg2rad((latitude.centers[0] + latitude.centers[-1]) / 2))
    scale = {"latitude": KILOMETERS_PER_DEGREE, "longitude": KILOMETERS_PER_DEGREE * middle}
    axes = tuple(i for i in axes if names[i])
    return axes, [abs(grid.axes[i].length) * scale[names[i]] for i in axes], "rad km-1"


def _direction(axis: Axis) -> str:
    return next((name for name, known in DIRECTIONS.items() if axis.name.lower() in known), "")


def energy_spectrum(
    fields: Float[ArrayLike, "batch lead *space channel"], grid: Grid
) -> Float[ArrayLike, "batch lead channel wavenumber"]:
    """Half the square of each channel by wavenumber shell; the sum over shells is half its mean square. Jittable.

    Cells must all exist; axes that are not transformed are averaged with cell areas.
    """
    plan = shells(grid)
    fields = jnp.asarray(fields)
    fields = fields.astype(jnp.promote_types(fields.dtype, jnp.float32))
    for i in plan.axes:
        if not grid.axes[i].periodic:
            fields = _window(_detrend(fields, 2 + i), 2 + i)
    axes = tuple(2 + i for i in plan.axes)
    points = np.prod([fields.shape[i] for i in axes])
    # The mean goes around the transform, which would round the small scales to its size.
    mean = fields.mean(axes, keepdims=True)
    zero = tuple(slice(1) if i in axes else slice(None) for i in range(fields.ndim))
    modes = rfftn(fields - mean, axes).at[zero].add(points * mean)
    power = (jnp.abs(modes) / points) ** 2 / 2
    others = tuple(i for i in range(2, fields.ndim - 1) if i not in axes)
    if others:
        kept = [n if 2 + i in others else 1 for i, n in enumerate(grid.shape)]
        area = grid.weights().mean(plan.axes, keepdims=True).reshape(1, 1, *kept, 1)
        power = (power * area).sum(others) / area.sum()
    power = power.reshape(*power.shape[:2], -1, power.shape[-1]) * plan.multiplicity[:, None]
    summed = jax.ops.segment_sum(jnp.moveaxis(power, 2, 0), plan.index, len(plan.wavenumbers))
    return jnp.moveaxis(summed, 0, -1)


def _detrend(fields, axis: int):
    """Removes the mean and the least-squares slope of every line along `axis`."""
    shape = [1] * fields.ndim
    shape[axis] = fields.shape[axis]
    x = np.arange(fields.shape[axis]) - (fields.shape[axis] - 1) / 2
    x = (x / np.sqrt((x**2).sum())).reshape(shape).astype(np.float32)
    fields = fields - fields.mean(axis, keepdims=True)
    return fields - x * (fields * x).sum(axis, keepdims=True)


def _window(fields, axis: int):
    n = fields.shape[axis]
    window = np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2
    window = (window / np.sqrt((window**2).mean())).astype(np.float32)
    return fields * window.reshape([-1 if i == axis else 1 for i in range(fields.ndim)])


def spectra(prediction, truth, measure: Measure):
    """(energy of p, energy of t) by shell: `(batch, lead, channel, wavenumber)` each; NaN where cells are masked."""
    pair = energy_spectrum(prediction, measure.grid), energy_spectrum(truth, measure.grid)
    return tuple(jnp.full_like(part, jnp.nan) for part in pair) if measure.masked else pair


def noise_level(energy):
    """Energy below which a shell of a float32 spectrum `(..., wavenumber)` may be rounding: 1e-12 of that of the
    deviations from the spatial mean, 1e-16 with the mean."""
    xp = energy.__array_namespace__()
    return xp.maximum(NOISE * energy[..., 1:].sum(-1), ROUNDING * energy.sum(-1))


def log_spectral_error(resolved_energy, true_energy):
    """Root mean square over shells of log10(E_p / E_t): 0.3 is a factor of two. Spectra are averaged over pairs first.

    Shells 1 to the first incomplete one count, as far as the truth has more energy than rounding in them.
    """
    counts = (true_energy > noise_level(true_energy)[..., None]) & (np.arange(true_energy.shape[-1]) > 0)
    ratio = jnp.where(counts, resolved_energy, 1.0) / jnp.where(counts, true_energy, 1.0)
    squares = jnp.where(counts, jnp.log10(ratio) ** 2, 0.0)
    score = jnp.sqrt(squares.sum(-1) / counts.sum(-1))
    return jnp.where(jnp.isnan(true_energy).any(-1) | jnp.isnan(resolved_energy).any(-1), jnp.nan, score)


def resolved_spectra(prediction, truth, measure: Measure):
    """`spectra` up to the last complete shell: what `log_spectral_error` compares."""
    last = shells(measure.grid).resolved + 1
    return tuple(part[..., :last] for part in spectra(prediction, truth, measure))
