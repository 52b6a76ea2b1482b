"""Pieces of labelled data as arrays: some channels, starts, times and cells, read only when asked for.

Everything here can be pickled as far as the data can, so that workers of a cluster read for themselves.
"""

import dataclasses
import itertools

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data.channels import Field, resolve, source_of
from physml.errors import DataError, SpecError
from physml.evaluate.labels import MEMBER, TIME, Forecast, check_units, trajectory_labels
from physml.fields import Spec

SEASONS = ("dayofyear", "month", "hour")  # dimensions that a climatology may have
WHOLE = {"dayofyear": 366, "month": 12}  # their number of entries
PARTS = ("threshold", "dry_fraction")  # of the climatology of precipitation categories
Tile = tuple[slice, ...]  # of the spatial axes, in the order of the spec


class Source:
    """The channels of a spec in one dataset, whatever its order and direction of dimensions.

    Raises SpecError when the grid differs from the spec's, DataError when a channel is missing.
    """

    def __init__(self, ds: xr.Dataset, spec: Spec, extra: tuple[str, ...] = ()):
        self.name, self.spec, self.extra = source_of(ds), spec, extra
        plain = ds.isel({dim: 0 for dim in extra if dim in ds.dims}, drop=True)
        self.fields = resolve(plain, spec.channels, spec)
        self.variables = {field.variable: ds.variables[field.variable] for field in self.fields}
        self.places = {
            (field.variable, axis.name): np.arange(len(axis))[
                ax.positions(plain, field.dims[axis.name], axis, self.name)
            ]
            for field in self.fields
            for axis in spec.grid.axes
        }
        self.trajectory_dim = next((f.dims["trajectory"] for f in self.fields if "trajectory" in f.dims), None)
        self.trajectories = ds.sizes[self.trajectory_dim] if self.trajectory_dim else 1

    def read(self, channels: tuple[int, ...], tile: Tile, **index) -> np.ndarray:
        """`(channel, *index, *tile)` in the type of the file, NaN where it is.

        `index`: positions along roles ("trajectory", "time") or extra dimensions; of length one where a field lacks
        them.
        """
        parts: dict[int, np.ndarray] = {}
        for field in self.fields:
            wanted = [i for i, position in enumerate(field.positions) if position in channels]
            if wanted:
                values = self._field(field, wanted, tile, index)
                parts |= {field.positions[i]: row for i, row in zip(wanted, values)}
                if tuple(field.positions[i] for i in wanted) == channels:
                    return values
        return np.stack([parts[channel] for channel in channels])

    def _field(self, field: Field, entries: list[int], tile: Tile, index: dict) -> np.ndarray:
        variable, selection, order, new = self.variables[field.variable], {}, [], []
        if field.flat:
            selection[field.flat] = ax.as_slice(np.asarray(field.entries)[entries])
            order.append(field.flat)
        else:
            new.append(0)
        for i, (role, positions) in enumerate(index.items()):
            dim = role if role in self.extra else field.dims.get(role)
            if dim is None or dim not in variable.dims:
                new.append(1 + i)
            else:
                selection[dim] = ax.as_slice(np.asarray(positions))
                order.append(dim)
        for axis, part in zip(self.spec.grid.axes, tile, strict=True):
            dim = field.dims[axis.name]
            selection[dim] = ax.as_slice(self.places[field.variable, axis.name][part])
            order.append(dim)
        return np.expand_dims(self._load(field.variable, selection, order), new)

    def _load(self, name: str, selection: dict, order: list[str]) -> np.ndarray:
        try:
            picked = self.variables[name].isel(selection).transpose(*order)
            if picked.chunks is not None:  # this piece is one task already: no threads below it
                return np.asarray(picked.data.compute(scheduler="synchronous"))
            return np.asarray(picked.values)
        except MemoryError:
            raise
        except Exception as error:  # every backend has its own exceptions for damaged chunks
            raise DataError(
                f"{self.name}: variable {name!r} cannot be read ({type(error).__name__}: {error}). The file seems "
                "damaged: copy, download or generate it again."
            ) from error

    def chunk(self, channel: int) -> dict[str, int]:
        """Role -> length of the pieces that the field of a channel is stored in; empty where it is not in pieces."""
        field = next(field for field in self.fields if channel in field.positions)
        variable = self.variables[field.variable]
        if variable.chunks is not None:
            lengths = {dim: max(sizes) for dim, sizes in variable.chunksizes.items()}
        else:
            lengths = dict(variable.encoding.get("preferred_chunks", {}))
        roles = {**{dim: role for role, dim in field.dims.items()}, field.flat: "entry", MEMBER: MEMBER}
        return {roles[dim]: length for dim, length in lengths.items() if dim in roles}


def truth_source(ds: xr.Dataset, spec: Spec, forecast: Forecast) -> tuple[Source, np.ndarray]:
    """The truth of a forecast, and the position in it of each trajectory of the forecast `(trajectory,)`.

    They meet by label where both have labels, else by position. Raises SpecError for labels that the truth lacks, and
    without labels for another number of trajectories.
    """
    source, count = Source(ds, spec), forecast.trajectories
    labels = trajectory_labels(ds, source.trajectory_dim, source.trajectories)
    known = {} if labels is None else {label: i for i, label in enumerate(labels.tolist())}
    if forecast.labels is not None and len(known) == source.trajectories:
        wanted = forecast.labels.tolist()
        if missing := [label for label in dict.fromkeys(wanted) if label not in known]:
            raise SpecError(
                f"The prediction {forecast.name!r} holds the trajectories {missing[:8]}, which the truth lacks: it has "
                f"{labels[:8].tolist()}. Open the truth of these, or drop the labels of one side, "
                '.drop_vars("trajectory"), to pair them by position.'
            )
        return source, np.array([known[label] for label in wanted])
    if source.trajectories not in (1, count):
        raise SpecError(
            f"The prediction has {count} trajectories, but the truth has {source.trajectories}. Select the "
            "trajectories of the truth that the forecast started from, e.g. .isel(trajectory=[0]), or --trajectory 0."
        )
    return source, np.arange(count) if source.trajectories > 1 else np.zeros(count, int)


class Climatology:
    """A climatology with any of the dimensions dayofyear, month and hour, or none of them.

    Entries are found by label; along a dimension without coordinate they count from 1 January or midnight on. Raises
    SpecError for several trajectories: which one is the mean state?
    """

    def __init__(self, ds: xr.Dataset, spec: Spec):
        trajectories = ds.sizes.get("trajectory", 1)
        if trajectories > 1:
            raise SpecError(
                f"The climatology has {trajectories} trajectories, but one state was expected: average it, e.g. "
                'with .mean("trajectory").'
            )
        ds = ds.squeeze("trajectory", drop=True) if "trajectory" in ds.dims else ds
        self.seasons = tuple(dim for dim in SEASONS if dim in ds.dims)
        self.labels = {dim: self._labels(ds, dim) for dim in self.seasons}
        self.sizes = dict(ds.sizes)
        self.source = Source(ds.drop_vars([TIME], errors="ignore"), spec, self.seasons)
        check_units(ds, spec)

    def _labels(self, ds: xr.Dataset, dim: str) -> np.ndarray | None:
        size = ds.sizes[dim]
        whole = WHOLE.get(dim, size)
        if size != whole:
            raise SpecError(
                f"The climatology has {size} entries along {dim!r}, but {whole} were expected, the first for 1 January."
            )
        if dim in ds.variables and ds[dim].dtype.kind in "iuf":
            return np.asarray(ds[dim].values)
        return None

    def index(self, valid: np.ndarray) -> np.ndarray:
        """Positions along each season at dates `(time,)`: `(time, season)`. Raises DataError for what it lacks."""
        if not self.seasons:
            return np.zeros((len(valid), 0), int)
        if valid.dtype.kind not in "MO":
            raise SpecError(f"The climatology has {self.seasons}, but the valid times are no dates: {valid[:3]}.")
        clock = xr.DataArray(valid, dims="t").dt
        columns = []
        for dim in self.seasons:
            values, labels = getattr(clock, dim).values, self.labels[dim]
            if labels is None:
                size = self.sizes[dim]
                columns.append(values * size // 24 if dim == "hour" else values - 1)
                continue
            order = np.argsort(labels)
            at = order[np.clip(np.searchsorted(labels, values, sorter=order), 0, len(labels) - 1)]
            wrong = labels[at] != values
            if wrong.any():
                raise DataError(
                    f"The climatology has no {dim} {values[wrong][0]}, where the forecast is valid: it has "
                    f"{labels[:8].tolist()}. Select those times, or interpolate the climatology."
                )
            columns.append(at)
        return np.stack(columns, -1)

    def read(self, channels: tuple[int, ...], tile: Tile, index: np.ndarray) -> np.ndarray:
        """`(channel, time, *tile)` at positions `index (time, season)`."""
        if not self.seasons:
            only = self.source.read(channels, tile)[:, None]
            return np.broadcast_to(only, (only.shape[0], len(index), *only.shape[2:]))
        result = None
        others, first = index[:, 1:], index[:, 0]
        for rest in sorted(set(map(tuple, others.tolist()))):
            rows = np.flatnonzero((others == rest).all(1))
            unique, back = np.unique(first[rows], return_inverse=True)
            picks = {dim: [i] for dim, i in zip(self.seasons[1:], rest)}
            values = self.source.read(channels, tile, **{self.seasons[0]: unique}, **picks)
            values = values.reshape(*values.shape[:2], *values.shape[2 + len(rest) :])
            if result is None:
                result = np.empty((values.shape[0], len(index), *values.shape[2:]), values.dtype)
            result[:, rows] = np.broadcast_to(values, (values.shape[0], len(unique), *values.shape[2:]))[:, back]
        return result


class Categories:
    """Thresholds of SEEPS in a climatology, for the channels that have them: `NAME_seeps_threshold` and
    `NAME_seeps_dry_fraction`."""

    def __init__(self, ds: xr.Dataset, spec: Spec, scheduler):
        names = [c.name for c in spec.channels if {f"{c.name}_seeps_{part}" for part in PARTS} <= set(ds.variables)]
        self.channels = {spec.names.index(name): i for i, name in enumerate(names)}
        if not names:
            return
        kept = tuple(spec.channels[i] for i in self.channels)

        def part(label, data):
            channels = tuple(dataclasses.replace(c, name=f"{c.name}_seeps_{label}", unit="") for c in kept)
            return data, dataclasses.replace(spec, channels=channels)

        self.threshold = Climatology(*part("threshold", ds))
        own = [f"{name}_seeps_dry_fraction" for name in names]
        seasons = [dim for dim in SEASONS if dim in ds.dims]
        dry = ds[own].chunk({}).mean(seasons).compute(scheduler=scheduler)
        whole = tuple(slice(None) for _ in spec.grid.axes)
        self.dry = Source(dry, part("dry_fraction", dry)[1]).read(tuple(range(len(names))), whole)

    def read(self, channel: int, tile: Tile, index: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(threshold `(time, *tile)`, dry fraction `(*tile)`), None for a channel without."""
        own = self.channels.get(channel)
        if own is None:
            return None
        return self.threshold.read((own,), tile, index)[0], self.dry[own][tile]


def tiles(shape: tuple[int, ...], lengths: tuple[int, ...]) -> list[Tile]:
    """All tiles of a grid, each at most `lengths` long."""
    cuts = [[slice(i, min(i + step, size)) for i in range(0, size, step)] for size, step in zip(shape, lengths)]
    return list(itertools.product(*cuts))
