"""Which data, which fields, which split: `DataConfig`."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import netcdf
from physml.data.channels import resolve
from physml.data.dataset import XarrayDataset
from physml.data.labelled import source_of, spec_of
from physml.data.opening import read_files
from physml.data.remote import is_url
from physml.data.splits import check_apart, check_disjoint, cut_time, cut_trajectory, frames_of, own_split
from physml.errors import ConfigError, DataError, SpecError, suggest
from physml.fields import Axis, Spec

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class DataConfig:
    """Where the data are, which fields take which part, and how they split into train, valid and test.

    A split is given by bounds, meaning depending on `split_by`:

    - "time": labels, both included ("2001", "2007"); frame numbers (0, 600) or fractions (0.0, 0.8), the end excluded;
    - "trajectory": numbers (0, 800) or fractions (0.0, 0.8), the end excluded; or one file that lists numbers (.txt,
      .json, .npy);
    - "file": one or more paths (`path` is then not needed);
    - "format": the split that the format itself has, such as ("train",) or ("valid",): its option `split`;
    - "auto": "file" without `path`, "time" where a bound is text or there is one trajectory, else "trajectory".

    Attributes:
        path: file, folder, glob, URL, or several of them.
        format: a key of `physml.data.FORMATS`; told by the content when empty.
        variables: predicted fields; empty means all that vary in time. `z_850` is variable z at level 850.
        forcing: prescribed fields with time. static: prescribed fields without. parameters: scalars of a trajectory.
        train, valid, test: the splits; an empty one is left out.
        split_seed: shuffles trajectories before they are split by numbers or fractions; None keeps the order of the
            file.
        region: axis -> (low, high), both included, such as {"longitude": (-40, 10)}.
        levels: levels to keep, in the unit of the file; empty keeps all.
        flatten: dimensions that become channels, such as ("level",).
        time_stride: keeps every n-th frame. space_stride: keeps every n-th point of every axis of the grid.
        coarsen: averages blocks of n points along every axis of the grid, by the areas of their cells (points left over
            at the end are dropped). Neither touches dimensions that become channels, nor levels that `levels` names.
        space: order of the spatial axes; level, latitude, longitude, x, y, z when empty.
        periodic: names of the periodic axes; what the file says when None.
        time_step: distance of frames; from the time axis when None.
        mask: variable that is 0 where fields do not exist, besides NaN.
        rename: dimensions or variables to rename, old -> new.
        options: of the format, such as {"mask": "geometric"}; see its card.
        group: group inside the file. decode_times: False to use times as plain numbers.
    """

    path: str | tuple[str, ...] = ""
    format: str = ""
    variables: tuple[str, ...] = ()
    forcing: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    split_by: Literal["auto", "time", "trajectory", "file", "format"] = "auto"
    train: tuple[str | int | float, ...] = (0.0, 0.8)
    valid: tuple[str | int | float, ...] = (0.8, 0.9)
    test: tuple[str | int | float, ...] = (0.9, 1.0)
    split_seed: int | None = None
    region: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    levels: tuple[float, ...] = ()
    flatten: tuple[str, ...] = ()
    time_stride: int = 1
    space_stride: int = 1
    coarsen: int = 1
    space: tuple[str, ...] = ()
    periodic: tuple[str, ...] | None = None
    time_step: float | None = None
    mask: str | None = None
    rename: dict[str, str] = field(default_factory=dict, hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    group: str | None = None
    decode_times: bool = True

    def __post_init__(self):
        for name in ("time_stride", "space_stride", "coarsen"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it counts points: give 1 (all) or more.")
        if self.coarsen > 1 and self.space_stride > 1:
            raise ConfigError(
                f"coarsen={self.coarsen} and space_stride={self.space_stride} both thin out the grid. Give one of them."
            )
        if taken := {"path", "format", "rename"} & set(self.options):
            raise ConfigError(f"options has {min(taken)!r}, which is a field of the data itself: set {min(taken)}.")

    def open(self, progress: Any = None) -> dict[str, XarrayDataset]:
        """The splits as datasets that share one spec; files leave nothing for `progress` to tell.

        Raises DataError, SpecError or ConfigError that says what does not fit.
        """
        splits = {name: tuple(getattr(self, name)) for name in SPLITS if len(getattr(self, name))}
        if not splits:
            raise ConfigError("No split is given. Set train, valid and test.")
        if self.split_by == "format":
            own = {name: own_split(name, bounds) for name, bounds in splits.items()}
            check_apart({name: list(option.values()) for name, option in own.items()}, "the split of the format")
            parts = {name: self.select(self.read(self.path, **option)) for name, option in own.items()}
        elif self._by_file(splits):
            check_apart({name: self._files(bounds) for name, bounds in splits.items()}, "the file")
            parts = {name: self.select(self.read(bounds)) for name, bounds in splits.items()}
        else:
            whole = self.select(self.read(self.path))
            by_time = self._by_time(whole, splits)
            if by_time:
                parts = {name: cut_time(whole, name, bounds) for name, bounds in splits.items()}
            else:
                parts = {name: cut_trajectory(whole, name, bounds, self.split_seed) for name, bounds in splits.items()}
            check_disjoint(parts, whole, by_time)
        return self._datasets(parts)

    def read(self, path, **options) -> xr.Dataset:
        """Opens `path` with the options of this config, before any selection."""
        plain = {"group": self.group} if self.group is not None else {}
        plain |= {} if self.decode_times else {"decode_times": False}
        return read_files(path, self.format or None, self.rename or None, **{**plain, **self.options, **options})

    def _files(self, path) -> list[str]:
        """The files of a path, each under one name."""
        files = netcdf.expand(path, self.options.get("storage_options"))
        return [file if is_url(file) else os.path.realpath(file) for file in files]

    def spec(self, ds: xr.Dataset) -> Spec:
        """The spec of selected data."""
        return spec_of(
            ds, self.variables or None, self.forcing, self.static, self.parameters,
            flatten=self.flatten, space=self.space, periodic=self.periodic, time_step=self.time_step,
            mask=self.mask,
        )  # fmt: skip

    def select(self, ds: xr.Dataset) -> xr.Dataset:
        """Region, levels, strides and block means."""
        source = source_of(ds)
        if unknown := set(self.region) - {ax.role(ds, d) for d in ds.dims} - set(ds.dims):
            raise DataError(f"{source} has no axis {min(unknown)!r}." + suggest(min(unknown), map(str, ds.dims)))
        if self.levels and "level" not in {ax.role(ds, dim) for dim in ds.dims}:
            raise DataError(
                f"levels is {self.levels}, but {source} has no levels: its dimensions are "
                f"{', '.join(map(str, ds.dims))}. Leave levels out, or rename its dimension of levels to 'level'."
            )
        time = ax.time_dim(ds)
        if time is not None and ds.sizes[time] == 0:
            raise DataError(f"{source} holds 0 frames along {time!r}. Generate or download it again, or leave it out.")
        for dim in list(ds.dims):
            name = ax.role(ds, dim)
            if dim == time:
                ds = ds.isel({dim: slice(None, None, self.time_stride)}) if self.time_stride > 1 else ds
                continue
            if name == "trajectory":
                continue
            bounds = self.region.get(str(dim), self.region.get(name))
            if bounds is not None:
                ds = ds.isel({dim: ax.inside(ds, dim, name, bounds, source)})
            if name == "level" and self.levels:
                ds = ds.isel({dim: ax.entries(ds, dim, self.levels, source)})
        ds.encoding["source"] = source
        if self.space_stride > 1:
            ds = ds.isel({dim: slice(None, None, self.space_stride) for dim in self._thinned(ds)})
        if self.coarsen > 1:
            ds = _block_mean(ds, self._thinned(ds), self.coarsen)
        ds.encoding["source"] = source
        return ds

    def _thinned(self, ds: xr.Dataset) -> dict[str, Axis]:
        """The dimensions of the grid on which `space_stride` and `coarsen` act."""
        spec = dataclasses.replace(self, time_step=1.0).spec(ds)  # steps of time do not matter here
        dims = resolve(ds, spec.channels[:1], spec)[0].dims
        axes = {dims[axis.name]: axis for axis in spec.grid.axes if not (self.levels and axis.name == "level")}
        if not axes:
            raise ConfigError(f"{source_of(ds)} has no grid to thin out: leave coarsen and space_stride at 1.")
        return axes

    def _by_file(self, splits) -> bool:
        if self.split_by == "file":
            return True
        if self.path:
            return False
        if self.split_by == "auto" and all(isinstance(b, str) for bounds in splits.values() for b in bounds):
            return True
        raise ConfigError("data.path is empty. Give a file, a folder, a glob or a URL, or a path for every split.")

    def _by_time(self, ds: xr.Dataset, splits) -> bool:
        if self.split_by != "auto":
            return self.split_by == "time"
        texts = [b for bounds in splits.values() for b in bounds if isinstance(b, str)]
        if texts:
            return not any(t.endswith((".txt", ".json", ".npy")) for t in texts)
        return ds.sizes.get("trajectory", 1) == 1 and ax.time_dim(ds) is not None

    def _datasets(self, parts: dict[str, xr.Dataset]) -> dict[str, XarrayDataset]:
        """One spec for all splits; a split on another grid (a zero-shot test) keeps its own grid."""
        result: dict[str, XarrayDataset] = {}
        first = None
        for name, ds in parts.items():
            own = self.spec(ds)
            if first is None:
                first = own
            if len(frames_of(ds)) < 2:  # one frame has no step of its own
                own = dataclasses.replace(own, time_step=first.time_step, time_unit=first.time_unit)
            first.on(own.grid).check_same(own, mine=f"split {next(iter(parts))!r}", theirs=f"split {name!r}")
            try:
                first.check_same(own)
                own = first
            except SpecError:
                own = first.on(own.grid)
            result[name] = XarrayDataset(ds, own)
        return result


def _block_mean(ds: xr.Dataset, axes: dict[str, Axis], size: int) -> xr.Dataset:
    """Means over blocks of `size` cells along dimensions, by the sizes of the cells that have a value."""
    source = source_of(ds)
    for dim in axes:
        if ds.sizes[dim] < size:
            raise ConfigError(f"coarsen={size}, but {source} has only {ds.sizes[dim]} points along {dim!r}.")
    uneven = {dim: _in_file_order(ds, dim, axis, axis.weights) for dim, axis in axes.items() if axis.weights}
    for dim, axis in axes.items():
        if axis.name == "longitude" and dim in ds.coords:  # 350 and 0 are neighbors: their middle is not 175
            ds = ds.assign_coords({dim: _in_file_order(ds, dim, axis, axis.centers).assign_attrs(ds[dim].attrs)})

    def mean(array):
        return array.coarsen(dict.fromkeys((d for d in axes if d in array.dims), size), boundary="trim").mean()

    ds = netcdf.in_chunks(ds)  # so that nothing is read yet
    result = ds.coarsen(dict.fromkeys(axes, size), boundary="trim").mean(keep_attrs=True)
    for name, array in ds.data_vars.items():
        cells = [sizes for dim, sizes in uneven.items() if dim in array.dims]
        if cells and array.dtype.kind in "iufb":
            area = math.prod(cells)
            result[name].data = (mean(array * area) / mean(area.where(array.notnull()))).transpose(*array.dims).data
    return result


def _in_file_order(ds: xr.Dataset, dim: str, axis: Axis, values: tuple[float, ...]) -> xr.DataArray:
    """What an axis has for each of its cells, as the file has them along `dim`."""
    ordered = np.empty(len(axis))
    ordered[ax.positions(ds, dim, axis)] = values
    return xr.DataArray(ordered, dims=dim)
