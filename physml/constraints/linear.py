"""Linear constraints of frames, G u = b."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from physml.constraints.conditioning import posterior
from physml.constraints.names import channels_of, check_known, field_of, positions
from physml.constraints.operators import right_rule, trapezoid
from physml.constraints.sums import gain, over_space, settle, total, valid_cells
from physml.errors import ConfigError, SpecError, suggest
from physml.fields import ArrayLike, Axis, Context, Grid, Spec

RULES = ("cells", "right", "trapezoid")


@dataclass(frozen=True)
class Linear:
    """Projects channels to the nearest values with G u = b.

    Masked cells take no part. Under jit, rows for which no variance is left stay unmet, and targets that contradict
    each other are met in the sense of least squares.

    Attributes:
        channels: names.
        operator: rows of numbers, each as long as points times channels, ordered as frames are: space in storage order,
            channels fastest. Or the name of a rule that every channel obeys by itself: "cells" (mean over the cells),
            "trapezoid" or "right" (integral by that rule over the centers of the axes, in their units).
        target: b: one number or name of a parameter of the data for all rows, or one each; a rule has one row per
            channel. Empty: what the previous frame has.
        variance: how easily values move: name of a static or forcing field, or numbers, one per point or one per point
            and channel. Empty: all alike. The correction is spread in proportion, an oblique projection. Values of
            variance zero stay.

    `build` raises SpecError for names and shapes that the data do not have, and ConfigError for rows that depend on
    each other or that no variance is left to correct.
    """

    channels: str | tuple[str, ...]
    operator: str | tuple[tuple[float, ...], ...] = "cells"
    target: float | str | tuple[float | str, ...] = ()
    variance: str | tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "channels", channels_of(self.channels))
        if not isinstance(self.operator, str):
            rows = tuple(tuple(map(float, row)) for row in self.operator)
            object.__setattr__(self, "operator", rows)
        if not isinstance(self.variance, str):
            object.__setattr__(self, "variance", tuple(map(float, self.variance)))
        if isinstance(self.target, list):
            object.__setattr__(self, "target", tuple(self.target))
        if not self.channels:
            raise ConfigError('channels is empty, so nothing would be corrected. Name some, e.g. Linear("rho").')
        if isinstance(self.operator, str) and self.operator not in RULES:
            raise ConfigError(f"operator is {self.operator!r}, which is no rule.{suggest(self.operator, RULES)}")
        if not self.operator:
            raise ConfigError("operator has no rows, so nothing would be corrected. Give some, or name a rule.")
        if isinstance(self.variance, tuple) and not all(0 <= value < math.inf for value in self.variance):
            raise ConfigError("variance holds numbers that are negative or not finite. Give variances, 0 or more.")

    def build(self, spec: Spec) -> "Linear":
        """Itself. Raises SpecError and ConfigError as the class says."""
        positions(spec, self.channels)
        points, width = math.prod(spec.grid.shape), len(self.channels)
        if not self.rule:
            lengths = {len(row) for row in self.operator}
            if lengths != {points * width}:
                raise SpecError(
                    f"operator has rows of {' and '.join(map(str, sorted(lengths)))} numbers, but {points * width} "
                    f"were expected: {points} points times {width} channels. Give one number for each."
                )
        rows = width if self.rule else len(self.operator)
        if len(self.targets) not in (0, rows) and not isinstance(self.target, (int, float, str)):
            raise SpecError(f"There are {len(self.targets)} targets for {rows} rows. Give one for all, or one each.")
        check_known("parameter", [name for name in self.targets if isinstance(name, str)], spec.parameters)
        if isinstance(self.variance, str) and self.variance:
            check_known("forcing or static field", [self.variance], spec.forcing, spec.static)
        if isinstance(self.variance, tuple) and len(self.variance) not in (0, points, points * width):
            raise SpecError(
                f"variance has {len(self.variance)} numbers, but {points} (one per point) or {points * width} (one per "
                "point and channel) were expected. Give one of those, or a field."
            )
        self._check_rank(spec)
        return self

    @property
    def rule(self) -> str:
        return self.operator if isinstance(self.operator, str) else ""

    @property
    def targets(self) -> tuple[float | str, ...]:
        return self.target if isinstance(self.target, tuple) else (self.target,)

    def _check_rank(self, spec: Spec):
        points, width = math.prod(spec.grid.shape), len(self.channels)
        variance = np.ones((points, width))
        if isinstance(self.variance, tuple) and self.variance:
            variance = np.broadcast_to(np.reshape(self.variance, (points, -1)), (points, width))
        if self.rule:  # rows of different channels never depend on each other
            correctable = bool(((rule_weights(self.rule, spec.grid).T != 0) & (variance > 0)).any(0).all())
        else:
            rows = np.asarray(self.operator)
            if not np.isfinite(rows).all():
                raise ConfigError("operator holds numbers that are not finite. Correct them.")
            rank = np.linalg.matrix_rank(_unit_rows(rows))
            if rank < len(rows):
                raise ConfigError(
                    f"The operator has {len(rows)} rows but rank {rank}: some are zero or follow from others. "
                    "Leave those out."
                )
            correctable = np.linalg.matrix_rank(_unit_rows(rows * np.sqrt(variance.ravel()))) == len(rows)
        if not correctable:
            raise ConfigError(
                "The variance is zero where a row of the operator needs a correction. Give more points a variance."
            )

    def violation(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch laws"]:
        """G u - b relative to the sum of its terms' sizes, one law per row: for a rule, per channel."""
        parts = _Parts(self, frame, previous, context)
        excess, size = parts.excess(parts.values), parts.sum(jnp.abs(parts.terms(parts.values)))
        size = jnp.maximum(size, jnp.abs(parts.sum(parts.terms(parts.before)) + parts.target))
        return (excess / jnp.where(size > 0, size, 1)).reshape(excess.shape[0], -1)

    def project(
        self, frame: Float[ArrayLike, "batch *space channel"], previous, context: Context
    ) -> Float[Array, "batch *space channel"]:
        """`frame` with G u = b."""
        parts = _Parts(self, frame, previous, context)
        return parts.put(parts.corrected(parts.own_variance())[0], frame)

    def condition(
        self,
        mean: Float[ArrayLike, "batch *space channel"],
        variance: Float[ArrayLike, "batch *space channel"],
        previous,
        context: Context,
    ) -> tuple[Float[Array, "batch *space channel"], Float[Array, "batch *space channel"]]:
        """Mean and variance of a Gaussian frame whose numbers are independent, given G u = b.

        `physml.constraints.condition`; covariances that the constraints make are left out. The frame's variance stands
        in for the option `variance`, by which only what it cannot correct is corrected.
        """
        parts = _Parts(self, mean, previous, context)
        values, kept = parts.corrected(parts.of(variance))
        return self.project(parts.put(values, mean), previous, context), parts.put(kept, variance)


class _Parts:
    """What one projection works with.

    Where every column of values has one row to obey (`single`): values `(batch, *space, column)`, rows and target
    broadcast to them; columns are channels, or all points and channels are one. Otherwise values `(batch, n)`, rows
    `(1 or batch, m, n)` and target `(batch, m)`. The rows have to give what they give of the values `before`, plus
    the target; one of the two is zero.
    """

    def __init__(self, law: Linear, frame, previous, context: Context):
        self.law, self.context, self.frame = law, context, jnp.asarray(frame)
        self.places = positions(context.spec, law.channels)
        self.cells, self.exists = valid_cells(context, self.places, self.frame)
        self.single = bool(law.rule) or len(law.operator) == 1
        self.values = self.of(frame)
        self.rows = self._rows()
        if law.targets:
            self.before = jnp.zeros_like(self.values)
            self.target = self._given() * (self.sum(jnp.abs(self.terms(jnp.ones_like(self.values)))) > 0)
        else:
            self.before, self.target = self.of(previous), 0

    def of(self, frame):
        """The values of the channels, 0 where they do not exist."""
        return self._arranged(jnp.where(self.exists, jnp.asarray(frame)[..., jnp.asarray(self.places)], 0))

    def put(self, values, frame):
        """`frame` with values of the channels."""
        frame = jnp.asarray(frame)
        values = values.reshape(*frame.shape[:-1], len(self.places)).astype(frame.dtype)
        return frame.at[..., self.places].set(jnp.where(self.exists, values, frame[..., self.places]))

    def terms(self, values):
        """Those of G u."""
        return self.rows * (values if self.single else values[:, None])

    def sum(self, *terms):
        """All of them, like the target."""
        return over_space(*terms) if self.single else total(jnp.concatenate(terms, -1))

    def excess(self, values):
        """G u minus what it has to be."""
        return self.sum(self.terms(values), -self.terms(self.before)) - self.target

    def own_variance(self):
        """Of the law, like the values; of batch size 1 where it is the same for all."""
        law = self.law
        if not law.variance:
            return jnp.ones((1, *self.values.shape[1:]), self.values.dtype)
        if isinstance(law.variance, str):
            field = jnp.maximum(field_of(law.variance, self.frame, self.context), 0)
        else:
            field = jnp.asarray(law.variance).reshape(1, *self.frame.shape[1:-1], -1)
        return self._arranged(jnp.broadcast_to(field, (*field.shape[:-1], len(self.places))))

    def corrected(self, variance):
        """Values that obey, and what is left of their variances."""
        if not self.single:
            target = self.sum(self.terms(self.before)) + self.target
            return posterior("diagonal", "float64", self.values, variance, self.rows, target, jnp.zeros(()))
        # One row takes no more than compensated sums.
        taken, possible = gain(self.rows, variance)
        values = self.values - self.excess(self.values) * taken
        missing = jnp.where(possible, -self.excess(values), 0)
        sign = jnp.where(self.rows < 0, -1, 1)
        values = settle(values * sign, missing, jnp.abs(self.rows) * (variance > 0)) * sign
        return values, variance * jnp.maximum(1 - self.rows * taken, 0)

    def _arranged(self, values):
        values = values.astype(self.cells.dtype)
        if self.law.rule:
            return values
        return values.reshape(values.shape[0], -1, *[1] * self.single)

    def _rows(self):
        law, grid = self.law, self.context.spec.grid
        if law.rule:
            rows = rule_weights(law.rule, grid).reshape(1, *grid.shape, 1)
        else:
            rows = np.asarray(law.operator)[None]
            rows = rows[:, 0, :, None] if self.single else rows
        rows = jnp.asarray(rows, self.cells.dtype)
        if self.context.mask is None:
            return rows
        exists = self._arranged(self.exists) > 0
        rows = jnp.where(exists if self.single else exists[:, None], rows, 0)
        if law.rule != "cells":
            return rows
        size = over_space(rows)
        return rows / jnp.where(size > 0, size, 1)

    def _given(self):
        names = [channel.name for channel in self.context.spec.parameters]
        count = len(self.places) if self.law.rule else len(self.law.operator)
        parameters = jnp.asarray(self.context.parameters)
        numbers = [
            parameters[:, names.index(entry)] if isinstance(entry, str) else jnp.full_like(parameters[:, 0], entry)
            for entry in self.law.targets * (count // len(self.law.targets))
        ]
        target = jnp.stack(numbers, -1).astype(self.cells.dtype)
        return target.reshape(-1, *[1] * (self.values.ndim - 2), count) if self.single else target


def rule_weights(rule: str, grid: Grid) -> np.ndarray:
    """The row `(1, points)` of a rule of `RULES`: products of those of the axes, in storage order.

    A periodic axis has one more interval, from its last point to its first, as long as the others are on average. An
    axis of one point counts as 1.
    """
    if rule == "cells":
        cells = grid.weights().astype(np.float64).reshape(1, -1)
        return cells / cells.sum()
    row = np.ones((1, 1))
    for axis in grid.axes:
        row = np.kron(row, _axis_weights(rule, axis))
    return row


def _axis_weights(rule: str, axis: Axis):
    if len(axis) == 1:
        return np.ones((1, 1))
    of_points = {"trapezoid": trapezoid, "right": right_rule}[rule]
    if not axis.periodic:
        return of_points(np.asarray(axis.centers))
    weights = of_points(np.asarray((*axis.centers, axis.centers[-1] + axis.spacing)))
    weights[:, 0] += weights[:, -1]
    return weights[:, :-1]


def _unit_rows(rows):
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(size > 0, size, 1)
