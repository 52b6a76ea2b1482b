"""Does a closure or a stepper obey what physics does not notice: moving frames, turned and mirrored axes, other units?

Each check transforms what goes in and predicts, predicts and transforms what comes out, and returns the relative
difference. They are the exact part of the list of Spalart 2023, "An old-fashioned framework for machine learning in
turbulence modeling", arXiv:2308.00837.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from physml.errors import ConfigError, SpecError
from physml.evaluate.quantities import UNITS, Prediction, Quantity, Roles, relative_error, velocity
from physml.fields import Axis, Grid, Window

__all__ = [
    "INVARIANCES", "Quantity", "assert_invariances", "check_invariances", "dimensional", "galilean",
    "pointwise_rotation", "reflection", "rotation", "velocity",
]  # fmt: skip

# --- the checks -------------------------------------------------------------------------------------------------------


def galilean(
    predict: Any,
    window: Window,
    quantities: Sequence[Quantity],
    *,
    output: Sequence[Quantity] = (),
    cells: int = 1,
    steps: int | None = None,
    key: Any = None,
) -> Float[np.ndarray, " batch"]:
    """The same flow seen by somebody who moves: velocities grow by a constant, and the flow drifts past.

    Frames of several times, and predictions of later ones, need a periodic grid: the constant is `cells` whole cells of
    every axis per time step, so that nothing is interpolated. For a function of one frame of the same time it is the
    root mean square of the velocity instead, and nothing drifts. Arguments and errors as in `rotation`; also SpecError
    without a velocity among `quantities`, and for static fields and masks, which do not move along.
    """
    call = Prediction.of(predict, steps, key)
    roles = Roles(window.spec, quantities, output)
    moving = [(q, where) for q, where in roles.of["channels"] if q.velocity]
    if not moving:
        raise SpecError("No quantity of the frames is a velocity, so there is nothing to boost. Set velocity=True.")
    if window.spec.static or window.mask is not None:
        raise SpecError(
            "Static fields and masks rest in one frame of reference only. Leave 'galilean' out of the names."
        )
    axes = window.spec.grid.axes
    names = [axis.name for axis in axes]
    drifts = call.steps > 0 or window.length > 1
    if drifts:
        if not all(window.spec.grid.periodic) or not _regular(window):
            raise SpecError(
                f"A flow that drifts past needs periodic axes and regular times, but the grid is {list(axes)}. "
                "Check a function of one frame, or leave 'galilean' out of the names."
            )
        speeds = {axis.name: cells * axis.spacing / window.spec.time_step for axis in axes}
        roll = {i + 1: cells for i in range(len(axes))}
    else:
        size = float(np.sqrt(np.mean(np.square(np.asarray(window.frames)[..., moving[0][1]]))))
        speeds, roll = dict.fromkeys(names, size or 1.0), {}

    def seen(values, places, times):
        """Boosted and drifted `values (batch, time, *space, channel)`, the first of time step `times[0]`."""
        values = np.array(values)
        for i, time in enumerate(times):
            for axis, count in roll.items():
                values[:, i] = np.roll(values[:, i], count * time, axis)
        for quantity, where in places:
            if quantity.velocity:
                values[..., where] += np.asarray(_along(quantity, speeds), values.dtype)
        return values

    moved = dataclasses.replace(
        window,
        frames=seen(window.frames, roles.of["channels"], range(window.length)),
        forcing=seen(window.forcing, roles.of["forcing"], range(np.shape(window.forcing)[1])),
    )
    arrival = call.arrival(window)
    base = call(window, roles)
    expected = seen(base[:, None], [], [arrival])[:, 0]
    found = call(moved, roles)
    for quantity, where in roles.output:  # taken off again: the boost is no part of the flow that errors relate to
        if quantity.velocity:
            found[..., where] -= np.asarray(_along(quantity, speeds))
    return relative_error(found, expected, roles)


def rotation(
    predict: Any,
    window: Window,
    quantities: Sequence[Quantity],
    *,
    output: Sequence[Quantity] = (),
    turns: int = 1,
    plane: tuple[str, str] | None = None,
    steps: int | None = None,
    key: Any = None,
) -> Float[np.ndarray, " batch"]:
    """The flow turned by `turns` right angles, grid and components.

    Args:
        predict: a stepper, or a function `window -> (batch, *space, output channel)`, e.g. a closure of the last frame.
        window: frames of a trajectory; a function may use as many of them as it likes.
        quantities: what every channel, forcing and static field and parameter of `window.spec` is.
        output: what the channels of a function's result are, in their order; those of the frames where left out.
        plane: two axes, the first of which turns to the second; the worst of all pairs where left out.
        steps: of a stepper, 1 by default; time steps that a function's result is ahead of the last frame, 0 by default.
        key: of a stochastic stepper. Its noise does not turn along: make it small or leave it out.

    Returns, for each sample, the norm of the difference over the norm of the expected field, of the quantity where that
    is largest; infinite where something else than the expected zero came. Raises SpecError for quantities that do not
    fit the data, and for grids that do not look the same after the turn.
    """
    axes = [axis.name for axis in window.spec.grid.axes]
    planes = [plane] if plane else list(itertools.combinations(axes, 2))
    if not planes:
        raise SpecError(f"A grid of {len(axes)} axes has no plane to turn in. Leave 'rotation' out of the names.")
    call = Prediction.of(predict, steps, key)
    errors = []
    for first, second in planes:
        a, b = (_axis(window.spec.grid, name) for name in (first, second))
        _check_alike(*(window.spec.grid.axes[i] for i in (a, b)))
        turn = np.eye(len(axes), dtype=int)
        turn[[a, b]] = 0
        turn[b, a], turn[a, b] = 1, -1
        turn = np.linalg.matrix_power(turn, turns % 4)
        errors.append(_orthogonal(call, window, Roles(window.spec, quantities, output), turn, axes))
    return np.max(errors, axis=0)


def reflection(
    predict: Any,
    window: Window,
    quantities: Sequence[Quantity],
    *,
    output: Sequence[Quantity] = (),
    axis: str | None = None,
    steps: int | None = None,
    key: Any = None,
) -> Float[np.ndarray, " batch"]:
    """The flow in a mirror across `axis`, or the worst of all axes; arguments and errors as in `rotation`."""
    axes = [one.name for one in window.spec.grid.axes]
    call = Prediction.of(predict, steps, key)
    errors = []
    for name in [axis] if axis else axes:
        place = _axis(window.spec.grid, name)
        _check_symmetric(window.spec.grid.axes[place])
        mirror = np.eye(len(axes), dtype=int)
        mirror[place, place] = -1
        errors.append(_orthogonal(call, window, Roles(window.spec, quantities, output), mirror, axes))
    return np.max(errors, axis=0)


def pointwise_rotation(
    predict: Any,
    window: Window,
    quantities: Sequence[Quantity],
    *,
    output: Sequence[Quantity] = (),
    seed: int = 0,
    steps: int | None = None,
    key: Any = None,
) -> Float[np.ndarray, " batch"]:
    """Components turned by a random angle while the grid stays: for functions that look at one point at a time.

    Right angles let pass what a function of, say, the sum of fourth powers would do. Arguments and errors as in
    `rotation`; the axes of components need not be those of the grid.
    """
    axes = list(dict.fromkeys(name for q in (*quantities, *output) for name in q.axes))
    if len(axes) < 2:
        raise SpecError("There are no vectors or tensors of two components or more to turn. Name their axes.")
    turn, triangle = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(axes),) * 2))
    turn = turn * np.sign(np.diag(triangle))
    turn[0] *= np.sign(np.linalg.det(turn))
    call = Prediction.of(predict, steps, key)
    return _orthogonal(call, window, Roles(window.spec, quantities, output), turn, axes, space=False)


def dimensional(
    predict: Any,
    window: Window,
    quantities: Sequence[Quantity],
    *,
    output: Sequence[Quantity] = (),
    units: dict[str, float] = UNITS,
    steps: int | None = None,
    key: Any = None,
) -> Float[np.ndarray, " batch"]:
    """The same flow in other units: lengths are `units["L"]` times the numbers they were, times `units["T"]`, ...

    Fields, parameters, grid, times and time step all change; what predicts must read them from the window it is given.
    A network that was fitted to data in one set of units does not pass. Arguments and errors as in `rotation`; also
    SpecError for axes in degrees.
    """
    if set(units) != set(UNITS):
        raise ConfigError(f"units has {sorted(units)}, but a number for each of {', '.join(UNITS)} was expected.")
    spec, call = window.spec, Prediction.of(predict, steps, key)
    roles = Roles(spec, quantities, output)
    angles = [axis.name for axis in spec.grid.axes if axis.unit.startswith("degree") or axis.unit in ("rad", "radian")]
    if angles:
        raise SpecError(f"Axis {angles[0]!r} is an angle, which has no unit of length. Leave 'dimensional' out.")
    axes = tuple(dataclasses.replace(a, centers=tuple(c * units["L"] for c in a.centers)) for a in spec.grid.axes)

    def scaled(values, places):
        values = np.array(values)
        for quantity, where in places:
            values[..., where] = values[..., where] * np.asarray(quantity.factor(units), values.dtype)
        return values

    arrays = {"frames": "channels", "forcing": "forcing", "static": "static", "parameters": "parameters"}
    other = dataclasses.replace(
        window,
        **{name: scaled(getattr(window, name), roles.of[group]) for name, group in arrays.items()},
        times=np.asarray(window.times) * np.asarray(units["T"], np.asarray(window.times).dtype),
        spec=dataclasses.replace(spec, grid=Grid(axes), time_step=spec.time_step * units["T"]),
    )
    return relative_error(call(other, roles), scaled(call(window, roles), roles.output), roles)


INVARIANCES: dict[str, Callable[..., Float[np.ndarray, " batch"]]] = {
    "dimensional": dimensional,
    "galilean": galilean,
    "pointwise_rotation": pointwise_rotation,
    "reflection": reflection,
    "rotation": rotation,
}
USUAL = ("dimensional", "galilean", "reflection", "rotation")


def check_invariances(
    predict: Any,
    window: Window,
    quantities: Sequence[Quantity],
    *,
    output: Sequence[Quantity] = (),
    names: Sequence[str] = USUAL,
    tolerance: float = 1e-6,
    steps: int | None = None,
    key: Any = None,
) -> xr.Dataset:
    """A table: `error (invariance, sample)` of the checks `names` of `INVARIANCES`, and whether each `holds`.

    Other arguments and errors as in `rotation`. A check that does not apply to the data raises SpecError: leave it out.
    """
    if unknown := sorted(set(names) - set(INVARIANCES)):
        raise ConfigError(f"There is no invariance {unknown[0]!r}. Valid: {', '.join(INVARIANCES)}.")
    call = Prediction.of(predict, steps, key)
    errors = np.stack([INVARIANCES[name](call, window, quantities, output=output) for name in names])
    return xr.Dataset(
        {"error": (("invariance", "sample"), errors), "holds": ("invariance", (errors <= tolerance).all(1))},
        {"invariance": list(names)},
        {"tolerance": tolerance},
    )


def assert_invariances(predict: Any, window: Window, quantities: Sequence[Quantity], **options: Any) -> xr.Dataset:
    """`check_invariances`. Raises AssertionError that names what does not hold, and by how much."""
    table = check_invariances(predict, window, quantities, **options)
    broken = [f"{name} ({float(table.error.sel(invariance=name).max()):.2g})"
              for name in table.invariance.values if not table.holds.sel(invariance=name)]  # fmt: skip
    if broken:
        raise AssertionError(
            f"Not invariant: {', '.join(broken)}; relative errors up to {table.attrs['tolerance']:g} are allowed."
        )
    return table


# --- what they share --------------------------------------------------------------------------------------------------


def _orthogonal(call, window: Window, roles: Roles, matrix, axes: list[str], *, space: bool = True) -> np.ndarray:
    """The error under an orthogonal `matrix` over `axes`: a signed permutation where the grid goes along (`space`)."""

    def moved(values, places, first: int | None, sign: bool = True):
        """`first`: number of the first space axis; None for fields without space."""
        values = np.array(values)
        if space and first is not None:
            source = np.argmax(np.abs(matrix), axis=1)
            order = [*range(first), *(first + source), *range(first + len(axes), values.ndim)]
            flipped = [first + i for i, j in enumerate(source) if matrix[i, j] < 0]
            values = np.flip(np.transpose(values, order), flipped).copy()
        for quantity, where in places:
            turned = _components(quantity, matrix if sign else np.abs(matrix), axes)
            factor = np.linalg.det(matrix) if quantity.axial and sign else 1.0
            values[..., where] = (factor * (values[..., where] @ turned.T)).astype(values.dtype)
        return values

    other = dataclasses.replace(
        window,
        frames=moved(window.frames, roles.of["channels"], 2),
        forcing=moved(window.forcing, roles.of["forcing"], 2),
        static=moved(window.static, roles.of["static"], 1),
        parameters=moved(window.parameters, roles.of["parameters"], None),
        mask=None if window.mask is None else moved(window.mask, roles.of["channels"], 1, sign=False),
    )
    return relative_error(call(other, roles), moved(call(window, roles), roles.output, 1), roles)


def _components(quantity: Quantity, matrix: np.ndarray, axes: list[str]) -> np.ndarray:
    """How the components of a quantity mix. Raises SpecError where they would need components it does not have."""
    if quantity.rank == 0:
        return np.eye(len(quantity.channels))
    if missing := sorted(set(quantity.axes) - set(axes)):
        raise SpecError(f"{list(quantity.channels)} has components along {missing[0]!r}, which is no axis: {axes}.")
    where = [axes.index(name) for name in quantity.axes]
    part = matrix[np.ix_(where, where)].astype(float)
    if not np.allclose(part @ part.T, np.eye(len(where))):
        raise SpecError(
            f"{list(quantity.channels)} has components along {list(quantity.axes)} only, but the turn leads out of "
            f"these to others of {axes}. Turn in a plane of its own, or name the components that are missing."
        )
    return part if quantity.rank == 1 else np.kron(part, part)


def _along(quantity: Quantity, speeds: dict[str, float]) -> list[float]:
    if missing := sorted(set(quantity.axes) - set(speeds)):
        raise SpecError(f"{list(quantity.channels)} has components along {missing[0]!r}, no axis of {list(speeds)}.")
    return [speeds[name] for name in quantity.axes]


def _axis(grid: Grid, name: str) -> int:
    names = [axis.name for axis in grid.axes]
    if name not in names:
        raise SpecError(f"There is no axis {name!r} in {names}.")
    return names.index(name)


def _check_symmetric(axis: Axis) -> None:
    gaps, weights = np.diff(axis.centers), np.asarray(axis.weights)
    if not np.allclose(gaps, gaps[::-1], rtol=1e-4) or not np.allclose(weights, weights[::-1], rtol=1e-4):
        raise SpecError(f"Axis {axis.name!r} is not the same from both ends: it has no mirror image on its own grid.")


def _check_alike(first: Axis, second: Axis) -> None:
    for axis in (first, second):
        _check_symmetric(axis)
    same = len(first) == len(second) and first.periodic == second.periodic and first.unit == second.unit
    same = same and np.allclose(np.diff(first.centers), np.diff(second.centers), rtol=1e-4)
    if not (same and np.allclose(first.weights, second.weights)):
        raise SpecError(
            f"Axes {first!r} and {second!r} differ: a turn by a right angle does not fit on the grid. Use a square "
            "box, or leave 'rotation' out of the names."
        )


def _regular(window: Window) -> bool:
    steps = np.diff(np.asarray(window.times), axis=1)
    return bool(np.allclose(steps, window.spec.time_step, rtol=1e-4))
