"""The only door between labelled data (xarray) and windows (arrays).

In: `spec_of` derives names, units and grid; `to_window` and `Reader` cut arrays in the order of the spec, whatever the
order and direction of the dimensions in the file. Out: `from_frames` puts names, units, coordinates and attributes back
on.

A channel is a variable of the dataset, or one level of it: channel `z_850` is variable `z` at level 850.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data.channels import base_of, entry_labels, entry_of, missing_variable, source_of, time_of, unit_of
from physml.data.reader import Reader, stack
from physml.errors import ConfigError, DataError, SpecError, suggest
from physml.fields import Channel, Grid, Spec, Window

GROUPS = {"channels": "variables", "forcing": "forcing", "static": "static", "parameters": "parameters"}  # of a spec


def spec_of(
    ds: xr.Dataset,
    variables: str | Sequence[str] | None = None,
    forcing: str | Sequence[str] = (),
    static: str | Sequence[str] = (),
    parameters: str | Sequence[str] = (),
    *,
    flatten: str | Sequence[str] = (),
    space: str | Sequence[str] = (),
    periodic: str | Sequence[str] | None = None,
    time_step: float | None = None,
    mask: str | None = None,
) -> Spec:
    """Names, units and grid of `ds`. A single name needs no list.

    Args:
        ds: data with any order and direction of dimensions.
        variables: predicted fields; all that vary in time (or, without a time dimension, all) when None or empty.
        forcing: prescribed fields with time. static: prescribed fields without. parameters: scalars, per trajectory or
            global.
        flatten: dimensions whose entries become channels of their own, for example ("level",): z -> z_500, z_850.
        space: order of the spatial axes; level, latitude, longitude, x, y, z when empty.
        periodic: names of the periodic axes, overriding what the file says. Longitudes that go all around are periodic
            anyway.
        time_step: in the unit of time; derived from the time axis when None.
        mask: variable that is 0 where fields do not exist, besides NaN.

    Raises DataError for a variable that is not there, SpecError for variables on different grids, ConfigError for a
    field that is named twice.
    """
    groups = (variables, forcing, static, parameters, flatten, space, periodic)
    variables, forcing, static, parameters, flatten, space, periodic = (
        (group,) if isinstance(group, str) else group for group in groups
    )
    source = source_of(ds)
    dims = {role: dim for dim in ds.dims for role in [ax.role(ds, dim)]}
    flat = {dims.get(name, name) for name in flatten}
    if unknown := flat - set(ds.dims):
        raise DataError(
            f"{source} has no dimension {sorted(unknown)[0]!r} to flatten." + suggest(min(unknown), ds.dims)
        )
    for name in (*(variables or ()), *forcing, *static, *parameters, *([mask] if mask else [])):
        if base_of(ds, name) is None:
            raise missing_variable(ds, name)
    chosen = list(variables or _predicted(ds, {*forcing, *static, *parameters, mask}, flat, source))
    grid, _ = _grid(ds, chosen, flat, space, periodic, source)
    times = ck.clock(ds, time_of(ds, base_of(ds, chosen[0])))
    step = float(time_step) if time_step is not None else ck.time_step(times, source)
    spec = Spec(
        grid,
        _channels(ds, chosen, flat),
        _channels(ds, forcing, flat),
        _channels(ds, static, flat),
        _channels(ds, parameters, set()),
        step,
        times.unit,
        mask,
    )
    _check_distinct(spec)
    return spec


def _check_distinct(spec: Spec) -> None:
    """Raises ConfigError for a field that is in two groups of a spec, or in one twice."""
    seen: dict[str, str] = {}
    for name, group in ((channel.name, group) for key, group in GROUPS.items() for channel in getattr(spec, key)):
        if seen.get(name) == group:
            raise ConfigError(f"{name!r} is in {group} twice. Name it once.")
        if name in seen:
            raise ConfigError(
                f"{name!r} is in both {seen[name]} and {group}. What is predicted reaches the model anyway, and what "
                "is prescribed is not predicted: name it in one of them."
            )
        seen[name] = group


MASKED_BY = "masked_by"  # attribute of forecasts: the variable that is 0 where they have no fields


def with_mask_of(ds: xr.Dataset, spec: Spec) -> Spec:
    """`spec`, without its mask where `ds` does not hold that variable: NaN alone tell then where fields exist."""
    return spec if spec.mask is None or base_of(ds, spec.mask) else dataclasses.replace(spec, mask=None)


def to_window(ds: xr.Dataset, spec: Spec) -> Window:
    """Every frame of every trajectory as one batched window of host arrays (float32), in the order of `spec`.

    NaN that stay at one place (land) become `mask`, with 0 in the frames, as do cells where the variable `spec.mask` is
    0, whose numbers are kept. Raises SpecError when units or grid differ from `spec`, DataError for missing variables,
    NaN elsewhere, and for time that is not regular.
    """
    reader = Reader(ds, spec)
    reader.check_units()
    reader.check_step()
    runs = ck.segments(reader.times, spec.time_step)
    if len(runs) > 1:
        raise DataError(
            f"{reader.source}: the time axis jumps after {reader.times.labels[runs[0][-1]]}, so it is not one window. "
            "Select one run of regular frames, or use physml.data.XarrayDataset, which makes each run a trajectory."
        )
    windows = [reader.read(i, range(reader.frames)) for i in range(reader.trajectories)]
    return stack(windows)


def from_frames(
    frames: np.ndarray,
    spec: Spec,
    like: xr.Dataset,
    times: np.ndarray | None = None,
    *,
    leads: np.ndarray | None = None,
    dim: str = "lead",
) -> xr.Dataset:
    """The inverse door: `frames (batch, lead, *space, channel)` as a dataset with the labels of `like`.

    Dimensions are `trajectory`, `lead`, then the spatial dimensions under the names, order and direction of `like`.
    Coordinate `lead` is timedelta64 (or numbers for nondimensional time) since the last frame of `like`; `time` is the
    valid time. Units and attributes come from `like`. Channels `z_500`, `z_850` become `z` again when `like` has it on
    levels.

    Args:
        times: valid times `(lead,)`, or `(batch, lead)` for several starts; the frames after the last one of `like`
            when None.
        leads: lead times `(lead,)`, of frames one step apart when None.
        dim: "lead", or "time" for frames that are not a forecast; `time` is then the dimension.
    """
    frames = np.asarray(frames)
    expected = (*spec.grid.shape, len(spec.channels))
    if frames.ndim != 3 + spec.grid.ndim or frames.shape[2:] != expected:
        raise SpecError(
            f"frames have shape {frames.shape}, but (batch, {dim}, {', '.join(map(str, expected))}) was expected."
        )
    like_clock = ck.clock(like, time_of(like, base_of(like, spec.names[0])))
    count = frames.shape[1]
    coords = _time_coordinates(like_clock, spec, times, leads, count, dim)
    variables: dict[str, xr.Variable] = {}
    for name, channels in _by_variable(like, spec).items():
        variable, extra = _labelled_variable(frames, spec, like, name, channels, dim)
        variables[name] = variable
        coords.update(extra)
    coords.update(_trajectory_coordinate(like, frames.shape[0]))
    result = xr.Dataset(variables, coords, dict(like.attrs))
    result.encoding = {}
    return result


# --- deriving a spec --------------------------------------------------------------------------------------------------


def _predicted(ds: xr.Dataset, taken: set[str | None], flat: set[str], source: str) -> list[str]:
    """Fields of `ds` that vary in time (all fields when none does), in the order of the file.

    Where none lies in space, those that vary in time: the state of a system of ordinary differential equations.
    """
    names = [str(n) for n, v in ds.data_vars.items() if v.dtype.kind in "iuf" and str(n) not in taken]
    fields = {n: ax.roles(ds, [d for d in ds[n].dims if d not in flat]) for n in names}
    in_space = [n for n, r in fields.items() if ax.space_of(r)]
    moving = [n for n, r in fields.items() if "time" in r]
    chosen = [n for n in moving if n in in_space] or in_space or moving
    if not chosen:
        raise DataError(
            f"{source} has no numeric variable on a grid. It has {sorted(map(str, ds.variables)) or 'nothing'}."
        )
    return chosen


def _grid(ds, names, flat, space, periodic, source) -> tuple[Grid, dict[str, str]]:
    """The grid that all `names` share. Raises SpecError when they do not."""
    first: tuple[str, dict[str, str]] | None = None
    for name in names:
        base = base_of(ds, name)
        drop = flat if base == name else {entry_of(ds, base, name[len(base) + 1 :])[0]}
        dims = {
            r: d
            for r, d in ax.roles(ds, [d for d in ds[base].dims if d not in drop]).items()
            if r not in ("trajectory", "time")
        }
        if first is None:
            first = (name, dims)
        elif dims != first[1]:
            raise SpecError(
                f"{source}: {first[0]!r} is on {tuple(first[1].values())}, but {name!r} is on {tuple(dims.values())}. "
                "Choose variables on "
                "one grid"
                + (", or flatten=('level',) to make levels channels." if "level" in {*first[1], *dims} else ".")
            )
    dims = first[1]
    order = ax.space_of(dims, space)
    if space and set(space) != set(dims):
        raise SpecError(f"{source}: space={tuple(space)}, but the spatial axes are {ax.space_of(dims)}.")
    if periodic and (unknown := set(periodic) - set(dims) - set(dims.values())):
        raise SpecError(f"{source}: periodic names {min(unknown)!r}." + suggest(min(unknown), dims))

    def is_periodic(name):
        if periodic is None:
            return None
        return name in periodic or dims[name] in periodic or (name == "longitude" and None)

    return Grid(tuple(ax.axis_of(ds, dims[name], name, is_periodic(name), source) for name in order)), dims


def _channels(ds: xr.Dataset, names: Sequence[str], flat: set[str]) -> tuple[Channel, ...]:
    result = []
    for name in names:
        dim = next((d for d in ds[name].dims if d in flat), None) if name in ds.variables else None
        labels = [f"{name}_{label}" for label in entry_labels(ds, dim)] if dim else [name]
        result += [Channel(label, unit_of(ds, label)) for label in labels]
    return tuple(result)


# --- writing labels ---------------------------------------------------------------------------------------------------


def _by_variable(like: xr.Dataset, spec: Spec) -> dict[str, list[int]]:
    """Output variable -> channels. Levels are put together again when the variables of `like` have the same levels."""
    result: dict[str, list[int]] = {}
    for i, name in enumerate(spec.names):
        result.setdefault(base_of(like, name) or name, []).append(i)
    levels = {
        tuple(spec.names[i][len(base) + 1 :] for i in members)
        for base, members in result.items()
        if base not in spec.names
    }
    if len(levels) > 1:
        return {name: [i] for i, name in enumerate(spec.names)}
    return result


def _labelled_variable(frames, spec, like, name, channels, dim) -> tuple[xr.Variable, dict[str, xr.Variable]]:
    base = base_of(like, name)
    roles = ax.roles(like, like.variables[base].dims) if base else {}
    flat = (
        entry_of(like, base, spec.names[channels[0]][len(base) + 1 :])
        if base and base != spec.names[channels[0]]
        else None
    )
    values = [_restore(frames[..., i], spec, like, roles) for i in channels]
    names = [roles.get(axis.name, axis.name) for axis in spec.grid.axes]
    coords = {n: _axis_coordinate(like, n, axis) for n, axis in zip(names, spec.grid.axes, strict=True)}
    attrs = dict(like.variables[base].attrs) if base else {}
    if not attrs.get("units") and spec.channels[channels[0]].unit:
        attrs["units"] = spec.channels[channels[0]].unit
    if flat and name == base:
        entries = [entry_of(like, base, spec.names[i][len(base) + 1 :])[1] for i in channels]
        level = flat[0]
        if level in like.variables:
            coords[level] = _plain_coordinate(like, level).isel({level: entries})
        order = ("trajectory", dim, *[d for d in like.variables[base].dims if d == level or d in names])
        variable = xr.Variable(("trajectory", dim, level, *names), np.stack(values, 2), attrs)
        return variable.transpose(*order), coords
    variable = xr.Variable(("trajectory", dim, *names), values[0], attrs)
    order = [d for d in (like.variables[base].dims if base else ()) if d in names]
    return variable.transpose("trajectory", dim, *(order or names)), coords


def _restore(values: np.ndarray, spec: Spec, like: xr.Dataset, roles: dict[str, str]) -> np.ndarray:
    """Puts every axis of `(batch, lead, *space)` back into the order of `like`."""
    for i, axis in enumerate(spec.grid.axes):
        dim = roles.get(axis.name)
        if dim is None:
            continue
        position = ax.positions(like, dim, axis, source_of(like))
        values = np.take(values, np.argsort(np.arange(len(axis))[position]), axis=2 + i)
    return values


def _axis_coordinate(like: xr.Dataset, dim: str, axis) -> xr.Variable:
    if dim in like.variables:
        return _plain_coordinate(like, dim)
    attrs = {"units": axis.unit} if axis.unit else {}
    return xr.Variable((dim,), np.asarray(axis.centers), attrs)


def _plain_coordinate(like: xr.Dataset, dim: str) -> xr.Variable:
    """The coordinate without how its file stores it, which another format may not know."""
    variable = like.variables[dim].copy(deep=False)
    variable.encoding = {}
    return variable


def _time_coordinates(times: ck.Clock, spec: Spec, valid, leads, count: int, dim: str) -> dict[str, xr.Variable]:
    if valid is None:
        valid = ck.after(times, count, spec.time_step)
    valid = np.asarray(valid)
    attrs = ck.valid_attrs(times)
    if dim == "time":
        return {"time": xr.Variable(("time",), valid, {k: v for k, v in attrs.items() if k == "units"})}
    leads = ck.lead_labels(times, count, spec.time_step) if leads is None else leads
    lead = xr.Variable((dim,), leads, {"long_name": "lead time"})
    dims = (dim,) if valid.ndim == 1 else ("trajectory", dim)
    return {dim: lead, "time": xr.Variable(dims, valid, attrs)}


def _trajectory_coordinate(like: xr.Dataset, batch: int) -> dict[str, xr.Variable]:
    for dim in like.dims:
        if ax.role(like, dim) == "trajectory" and like.sizes[dim] == batch and dim in like.variables:
            return {"trajectory": xr.Variable(("trajectory",), like.variables[dim].values, like.variables[dim].attrs)}
    return {}
