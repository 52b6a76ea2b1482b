"""First differences on plane grids, of Fourier series or between cells, and what of a velocity is a gradient."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import slice_in_dim
from jaxtyping import Array, Float

from physml.constraints.boundary import sides_of
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Grid
from physml.parallel.fft import irfftn, rfftn
from physml.parallel.mesh import over_batch

AXES = ("x", "y", "z")
ANGLES = ("lat", "latitude", "lon", "longitude")
PASSES = 3  # of the iteration: each starts from the rounded result of the one before
MOST_ITERATIONS = 400  # of conjugate gradients in a pass; some twenty are usual


class Differences:
    """Differences of fields `(batch, *space)` along the axes of a velocity `(batch, component, *space)`.

    Between cells: a face has the mean of the two cells beside it, and zero at walls and obstacles; the difference is
    that of the upper and the lower face by the length of the cell. Where all axes are periodic with equal cells and
    without obstacles, it is the derivative of the Fourier series instead, zero for Nyquist modes.

    Attributes:
        places: the axis of each component, counted from the end.
        smallest: length of the shortest cell.
        spectral: whether differences are those of Fourier series.
    """

    def __init__(self, grid: Grid, axes: tuple[int, ...], exists: Any = None, open: Any = (), series: bool = True):
        """
        Args:
            axes: number of the axis along which each component of the velocity points.
            exists: `(batch, *space)`, False in obstacles; None without any.
            open: sides such as "x low" through which the outermost cell flows.
            series: whether Fourier series are taken where they can be.

        Raises SpecError for cells of unknown size, and for open sides that do not exist.
        """
        self.exists, self.volumes = exists, grid.weights()
        self.places = tuple(axis - grid.ndim for axis in axes)
        self.axes = {place: grid.axes[place] for place in self.places}
        self.lengths = {place: cell_lengths(axis) for place, axis in self.axes.items()}
        self.open = {(axis - grid.ndim, end) for axis, end in sides_of(tuple(open), grid)}
        self.smallest = min(float(lengths.min()) for lengths in self.lengths.values())
        even = all(np.ptp(lengths) <= 1e-5 * lengths.max() for lengths in self.lengths.values())
        self.plain = even and not self.open and exists is None
        self.spectral = series and self.plain and all(axis.periodic for axis in self.axes.values())

    def slope(self, field: Float[Array, " batch *space"], place: int) -> Float[Array, " batch *space"]:
        """The difference along one of `places`."""
        if self.spectral:
            return self._inverse(1j * self._waves(place, field.dtype) * rfftn(field, self.places), field.dtype)
        periodic = self.axes[place].periodic

        def beside(values):
            values = (
                jnp.concatenate([values[_end(place, -1)], values, values[_end(place, 0)]], place)
                if periodic
                else values
            )
            count = values.shape[place]
            return slice_in_dim(values, 0, count - 1, axis=place), slice_in_dim(values, 1, count, axis=place)

        faces = sum(beside(field)) / 2
        if self.exists is not None:
            lower, upper = beside(self.exists)
            faces = jnp.where(lower & upper, faces, 0)
        if not periodic:
            ends = [field[_end(place, at)] * ((place, end) in self.open) for at, end in ((0, "low"), (-1, "high"))]
            faces = jnp.concatenate([ends[0], faces, ends[1]], place)
        return jnp.diff(faces, axis=place) / _column(self.lengths[place], place, field.dtype)

    def divergence(self, velocity: Float[Array, " batch component *space"]) -> Float[Array, " batch *space"]:
        """The sum over components of the differences along their axes."""
        if self.spectral:
            spectrum = rfftn(velocity, self.places)
            terms = [self._waves(place, velocity.dtype) * spectrum[:, i] for i, place in enumerate(self.places)]
            return self._inverse(1j * sum(terms), velocity.dtype)
        return sum(self.slope(velocity[:, i], place) for i, place in enumerate(self.places))

    def curl(self, velocity: Float[Array, "batch component *space"]) -> Float[Array, "batch turn *space"]:
        """The vorticity: one number on a plane, as many as components in space.

        Walls and obstacles hold the fluid beside them: the velocity is odd about them.
        """
        places = self.places
        pairs = [(0, 1)] if len(places) == 2 else [(1, 2), (2, 0), (0, 1)]
        turns = [self.slope(velocity[:, j], places[i]) - self.slope(velocity[:, i], places[j]) for i, j in pairs]
        return jnp.stack(turns, axis=1)

    def potential_part(
        self, velocity: Float[Array, "batch component *space"]
    ) -> Float[Array, "batch component *space"]:
        """The gradient that is in `velocity`: without it, no divergence is left.

        The gradient is the adjoint of minus the divergence under the cell sizes, so that this is an orthogonal
        projection. Direct where cells are equal and there are neither obstacles nor open sides; else by conjugate
        gradients, with the direct solution as preconditioner.
        """
        if self.spectral:
            spectrum = rfftn(velocity, self.places)
            waves = [self.smallest * self._waves(place, velocity.dtype) for place in self.places]
            square = sum(wave**2 for wave in waves)
            potential = sum(wave * spectrum[:, i] for i, wave in enumerate(waves)) / jnp.where(square > 0, square, 1)
            return self._inverse(jnp.stack([wave * potential for wave in waves], 1), velocity.dtype)
        if not self.plain:
            return self._by_iteration(velocity)
        rest = velocity
        for _ in range(2):  # the second time for what the transforms have rounded
            rest = rest - self._gradient(self._solve_box(self.divergence(rest)), rest)
        return velocity - rest

    def _by_iteration(self, velocity):
        """A linear map that is its own adjoint under the cell sizes: derivatives are the map of derivatives, whatever
        the iteration does."""
        volumes = jnp.asarray(self.volumes, velocity.dtype)

        def mapped(_, velocity):
            return self._searched(velocity)

        def adjoint(_, slopes):
            return volumes * self._searched(slopes / volumes)

        return jax.lax.custom_linear_solve(lambda velocity: velocity, velocity, mapped, adjoint)

    def _searched(self, velocity):
        """`potential_part` to rounding, as long as the iterations suffice."""
        relative, absolute = (1e-3, 1e-7) if velocity.dtype.itemsize == 4 else (1e-6, 1e-14)
        axes = range(1, velocity.ndim)
        largest = jnp.max(jnp.abs(velocity), axis=axes, keepdims=True)
        largest = jnp.where(largest > 0, largest, 1)
        size = jnp.sqrt(jnp.mean(jnp.square(velocity / largest), axis=axes, keepdims=True))
        scale = largest * jnp.where(size > 0, size, 1)
        volumes = jnp.asarray(self.volumes, velocity.dtype)
        start = rest = velocity / scale

        def operator(potential):
            return -volumes * self.divergence(self._gradient(potential, start))

        for _ in range(PASSES):
            source = -volumes * self.divergence(rest)
            least = absolute * math.sqrt(self.volumes.size) / self.smallest
            potential = conjugate_gradients(operator, source, self._precondition, relative, least, MOST_ITERATIONS)
            rest = rest - self._gradient(potential, start)
        return scale * (start - rest)

    def _precondition(self, source):
        return -self._solve_box(source, whole=True)

    def _gradient(self, potential, like):
        """Of a potential `(batch, *space)`, with the shape of the velocity `like`."""
        volumes = jnp.asarray(self.volumes, potential.dtype)
        return -jax.linear_transpose(self.divergence, like)(volumes * potential)[0] / volumes

    def _solve_box(self, source, whole: bool = False):
        """The potential whose gradient has the divergence `source` in a box of equal cells, by transforms.

        Modes that no difference sees vanish; with `whole` they count as the longest wave that one sees.
        """
        return over_batch(functools.partial(self._solve_boxes, whole=whole))(source)

    def _solve_boxes(self, source, whole: bool):
        from physml.solvers.mac import cosine_transform, inverse_cosine_transform

        wrapped = [place for place in self.places if self.axes[place].periodic]
        walled = [place for place in self.places if place not in wrapped]
        spectrum = source
        for place in walled:
            spectrum = jnp.moveaxis(cosine_transform(jnp.moveaxis(spectrum, place, -1)), -1, place)
        if wrapped:
            spectrum = rfftn(spectrum, wrapped)
        squares = []
        for place in self.places:
            points, length = self.shape[place], self.lengths[place].mean()
            waves = wave_numbers(points if place in wrapped else 2 * points, length, series=False)
            squares.append(waves[: spectrum.shape[place]] ** 2)
        longest = min([float(square[square > 0].min()) for square in squares if square.any()], default=1.0)
        symbol = sum(_column(square, place, source.dtype) for square, place in zip(squares, self.places, strict=True))
        unseen = -1 / longest if whole else 0.0
        spectrum = spectrum * jnp.where(symbol > 0, -1 / jnp.where(symbol > 0, symbol, 1), unseen)
        if wrapped:
            spectrum = irfftn(spectrum, [self.shape[place] for place in wrapped], wrapped)
        for place in walled:
            spectrum = jnp.moveaxis(inverse_cosine_transform(jnp.moveaxis(spectrum, place, -1)), -1, place)
        return spectrum.astype(source.dtype)

    @property
    def shape(self) -> dict[int, int]:
        return {place: len(axis) for place, axis in self.axes.items()}

    def _waves(self, place: int, dtype):
        """Wavenumbers of the spectrum of `rfftn` over `places`."""
        points = self.shape[place]
        waves = wave_numbers(points, self.lengths[place].mean(), series=True)
        return _column(waves[: points // 2 + 1] if place == self.places[-1] else waves, place, dtype)

    def _inverse(self, spectrum, dtype):
        return irfftn(spectrum, list(self.shape.values()), self.places).astype(dtype)


def conjugate_gradients(
    operator: Callable,
    source: Float[Array, " batch *space"],
    precondition: Callable,
    relative: float,
    least: Any,
    most: int,
) -> Float[Array, " batch *space"]:
    """x with operator(x) = source, for a symmetric operator that is nowhere negative, as is `precondition`.

    Every sample for itself, unlike `jax.scipy.sparse.linalg.cg`, whose sums run over the batch (and which cannot be
    mapped over one that is spread over devices by explicit axes): one that is not finite spoils no other. Stops when
    the root sum of squares of every remainder is below `relative` times that of the source, or below `least`, or after
    `most` iterations.
    """

    def dot(a, b):
        return jnp.sum(a * b, axis=range(1, a.ndim), keepdims=True)

    limit = jnp.maximum(relative**2 * dot(source, source), jnp.square(jnp.asarray(least, source.dtype)))

    def unfinished(loop):
        return (loop[-1] < most) & jnp.any(dot(loop[1], loop[1]) > limit)

    def step(loop):
        solution, remainder, direction, product, count = loop
        moved = operator(direction)
        curvature = dot(direction, moved)
        going = (dot(remainder, remainder) > limit) & (curvature > 0)
        length = jnp.where(going, product / jnp.where(going, curvature, 1), 0)
        solution, remainder = solution + length * direction, remainder - length * moved
        conditioned = precondition(remainder)
        new = dot(remainder, conditioned)
        direction = conditioned + jnp.where(going, new / jnp.where(product > 0, product, 1), 0) * direction
        return solution, remainder, direction, new, count + 1

    first = precondition(source)
    start = jnp.zeros_like(source), source, first, dot(source, first), jnp.int32(0)
    return jax.lax.while_loop(unfinished, step, start)[0]


def wave_numbers(points: int, length: float, *, series: bool) -> np.ndarray:
    """What differences multiply the modes of `fft` by, without i: of the Fourier series, or between cells.

    `length` is that of a cell. Zero for Nyquist modes, whose odd derivatives are not real.
    """
    angles = 2 * np.pi * np.fft.fftfreq(points)
    waves = (angles if series else np.sin(angles)) / length
    return np.where(2 * np.abs(np.fft.fftfreq(points)) == 1, 0, waves)


def cell_lengths(axis: Axis) -> np.ndarray:
    """Of every cell along the axis, in its unit.

    Raises SpecError where centers are uneven and weights do not tell the lengths.
    """
    centers, weights = np.asarray(axis.centers, float), np.asarray(axis.weights or np.ones(len(axis)), float)
    gaps = np.diff(centers)
    if not axis.weights and len(gaps) and np.ptp(gaps) > 1e-3 * gaps.mean():
        raise SpecError(
            f"The centers along {axis.name!r} are unevenly spaced, and nothing says how long the cells are. "
            "Give the axis their relative sizes as `weights`."
        )
    return axis.spacing * weights / weights.mean()


def check_components(velocity: tuple[str, ...], axes: tuple[str, ...], counts: tuple[int, ...]) -> None:
    """Raises ConfigError unless components are different, as many as one of `counts`, with an axis each if any."""
    if len(velocity) not in counts or len(set(velocity)) != len(velocity):
        raise ConfigError(f"velocity is {velocity}, but {' or '.join(map(str, counts))} different channels are needed.")
    if axes and (len(axes) != len(velocity) or len(set(axes)) != len(axes)):
        raise ConfigError(f"axes is {axes}, but each of the components {velocity} points along an axis of its own.")


def component_axes(velocity: tuple[str, ...], axes: tuple[str, ...], grid: Grid) -> tuple[int, ...]:
    """The number of the axis along which each component points: `axes` if named, else x, y and z in this order.

    Raises SpecError for axes that the grid lacks or that are angles, and when axes without a component are left.
    """
    names = [axis.name for axis in grid.axes]
    wanted = axes or AXES[: len(velocity)]
    if missing := [name for name in wanted if name not in names]:
        raise SpecError(
            f"The components {velocity} point along {wanted}, but the grid has the axes {names} and lacks {missing}. "
            "Name the axis of each component in `axes`."
        )
    if curved := [name for name in names if name.lower() in ANGLES]:
        raise SpecError(
            f"The axes {curved} are angles on a sphere, where differences are not those of a plane. "
            "Use data on a plane grid."
        )
    if not axes and len(velocity) < len(names):
        raise SpecError(
            f"The grid has the axes {names}, but the velocity only the components {velocity}. Name all components, "
            "or in `axes` the axes that they point along: then every layer is on its own."
        )
    return tuple(names.index(name) for name in wanted)


def _end(place: int, at: int) -> tuple:
    """The index of the first (0) or last (-1) entry along an axis counted from the end, which is kept."""
    return (..., slice(0, 1) if at == 0 else slice(-1, None), *[slice(None)] * (-place - 1))


def _column(values: np.ndarray, place: int, dtype) -> Array:
    """Numbers along an axis counted from the end."""
    return jnp.asarray(values, dtype).reshape(-1, *[1] * (-place - 1))
