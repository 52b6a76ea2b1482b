"""Which data, which fields, which split: `DataConfig`, and what a path opens to."""

import dataclasses
import inspect
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.data import clock as ck
from physml.data import netcdf
from physml.data.channels import resolve
from physml.data.dataset import XarrayDataset
from physml.data.formats import FORMATS, recognize
from physml.data.labelled import source_of, spec_of
from physml.data.place import Place
from physml.data.remote import is_url
from physml.errors import ConfigError, DataError, SpecError, suggest
from physml.fields import Axis, Spec

SPLITS = ("train", "valid", "test")


def read_files(path, format: str | None = None, rename: dict[str, str] | None = None, **options) -> xr.Dataset:
    """Opens a path lazily, with dimensions as in the file except that `trajectory` and `time` have those names."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"There is no data format {format!r}." + suggest(format, FORMATS))
    storage = options.get("storage_options")
    format = format or recognize(path, storage)
    if format is not None and FORMATS[format].recognizes is not None:
        ds = _read_benchmark(path, format, options)
    else:
        ds = _read_plain(netcdf.expand(path, storage), format, options)
    source = source_of(ds)
    if rename:
        if unknown := set(rename) - set(ds.variables) - set(ds.dims):
            raise DataError(
                f"{source} has no {min(unknown)!r} to rename." + suggest(min(unknown), [*ds.variables, *ds.dims])
            )
        try:
            ds = ds.rename(rename)
        except ValueError as error:  # xarray has one for every kind of clash
            raise DataError(
                f"{source} cannot be renamed by {rename}: {error}. Choose names that it does not have yet: it has "
                f"{', '.join(sorted({*map(str, ds.variables), *map(str, ds.dims)}))}."
            ) from error
    ds = netcdf.name_dimensions(ds)
    ds.encoding["source"] = source
    return ds


def _read_plain(files: list[str], format: str | None, options: dict) -> xr.Dataset:
    def opener(file):
        own = format or netcdf.detect(file, options.get("storage_options"))
        _check_options(own, options)
        return FORMATS[own].open(file, **options)

    return opener(files[0]) if len(files) == 1 else netcdf.open_many(files, opener)


def _read_benchmark(path, format: str, options: dict) -> xr.Dataset:
    """The data set at one place."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"{format} is opened from one file or folder, but {netcdf.as_text(path)} was given.")
    place = Place(path, options.pop("storage_options", None))
    chunks = options.pop("chunks", None)
    _check_options(format, options)
    ds = FORMATS[format].open(place, **options)
    ds.attrs.setdefault("format", format)
    ds.encoding["source"] = str(place)
    return ds.chunk(chunks) if chunks else ds


def _check_options(format: str, options: dict) -> None:
    """Raises ConfigError for options that the format does not have."""
    _, *known = inspect.signature(FORMATS[format].open).parameters
    if unknown := set(options) - set(known):
        raise ConfigError(f"{format} has no option {min(unknown)!r}." + suggest(min(unknown), known))


def open_dataset(path, format: str | None = None, **options) -> xr.Dataset:
    """Opens data lazily: a file, a folder, a glob, a list of them, or an fsspec URL.

    netCDF and zarr: fields get dimensions `trajectory`, `time`, then space (names, order and direction as in the file);
    `time` is left out where the file has none. Several files are joined along time, or along trajectory where their
    times are equal. The formats of benchmarks: dimensions `trajectory, time, <space>` as far as the data have them,
    spatial ones named `x y z` or `level latitude longitude`, components as `velocity_x`.

    Args:
        path: where the data are.
        format: a key of `FORMATS`; told by the content when None.
        options: `rename={"old": "new"}` for dimensions and variables with unusual names, `storage_options` for URLs,
            `chunks` (dask; the chunks of the file by default); `decode_times=False` and `group` for netCDF and zarr;
            else those of the format, such as `split="train"`.

    Raises DataError when the path is missing, is of no known format, is damaged, or mixes grids.
    """
    ds = read_files(path, format, **options)
    source = source_of(ds)
    ds = ds if options.get("chunks") else netcdf.in_chunks(ds)
    if ds.attrs.get("format") not in FORMATS:
        ds = _with_leading(ds)
    ds.encoding["source"] = source
    return ds


def _with_leading(ds: xr.Dataset) -> xr.Dataset:
    """With dimensions `trajectory, time` before the others."""
    if "time" in ds.coords and ds["time"].ndim == 0:
        ds = ds.expand_dims("time")
    if "trajectory" not in ds.dims:
        fields = [n for n, v in ds.data_vars.items() if v.ndim and ("time" in v.dims or "time" not in ds.dims)]
        ds = ds.assign({name: ds[name].expand_dims("trajectory") for name in fields})
    leading = [dim for dim in ("trajectory", "time") if dim in ds.dims]
    return ds.transpose(*leading, ...)


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

    def open(self) -> dict[str, XarrayDataset]:
        """The splits as datasets that share one spec. Raises DataError, SpecError or ConfigError that says what does
        not fit.
        """
        splits = {name: tuple(getattr(self, name)) for name in SPLITS if len(getattr(self, name))}
        if not splits:
            raise ConfigError("No split is given. Set train, valid and test.")
        if self.split_by == "format":
            own = {name: _own_split(name, bounds) for name, bounds in splits.items()}
            _check_apart({name: list(option.values()) for name, option in own.items()}, "the split of the format")
            parts = {name: self.select(self.read(self.path, **option)) for name, option in own.items()}
        elif self._by_file(splits):
            _check_apart({name: self._files(bounds) for name, bounds in splits.items()}, "the file")
            parts = {name: self.select(self.read(bounds)) for name, bounds in splits.items()}
        else:
            whole = self.select(self.read(self.path))
            by_time = self._by_time(whole, splits)
            cut = _cut_time if by_time else self._cut_trajectory
            parts = {name: cut(whole, name, bounds) for name, bounds in splits.items()}
            _check_disjoint(parts, whole, by_time)
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

    def _cut_trajectory(self, ds: xr.Dataset, name: str, bounds: tuple) -> xr.Dataset:
        source, total = source_of(ds), ds.sizes.get("trajectory", 1)
        order = np.arange(total)
        if self.split_seed is not None:
            order = np.random.default_rng(self.split_seed).permutation(total)
        if len(bounds) == 1 and isinstance(bounds[0], str):
            chosen = _listed(bounds[0], total)
        else:
            low, high = _numbers(bounds, total, name, "trajectories")
            chosen = np.sort(order[low:high])
        if "trajectory" not in ds.dims:
            if len(chosen) == 0:
                raise DataError(
                    f"{source} has one trajectory, so split {name!r} by trajectory is empty. Use split_by='time'."
                )
            return ds
        if len(chosen) == 0:
            raise DataError(f"Split {name!r} = {bounds} holds none of the {total} trajectories of {source}.")
        if "trajectory" not in ds.dims:
            return ds
        ds = ds.isel(trajectory=ax.as_slice(chosen)).assign_coords(
            {} if "trajectory" in ds.variables else {"trajectory": ("trajectory", chosen)}
        )
        ds.encoding["source"] = source
        return ds

    def _datasets(self, parts: dict[str, xr.Dataset]) -> dict[str, XarrayDataset]:
        """One spec for all splits; a split on another grid (a zero-shot test) keeps its own grid."""
        result: dict[str, XarrayDataset] = {}
        first = None
        for name, ds in parts.items():
            own = self.spec(ds)
            if first is None:
                first = own
            if len(_frames(ds)) < 2:  # one frame has no step of its own
                own = dataclasses.replace(own, time_step=first.time_step, time_unit=first.time_unit)
            first.on(own.grid).check_same(own, mine=f"split {next(iter(parts))!r}", theirs=f"split {name!r}")
            try:
                first.check_same(own)
                own = first
            except SpecError:
                own = first.on(own.grid)
            result[name] = XarrayDataset(ds, own, self.mask)
        return result


def _own_split(name: str, bounds: tuple) -> dict[str, str]:
    if len(bounds) != 1 or not isinstance(bounds[0], str):
        raise ConfigError(f"Split {name!r} = {bounds}, but split_by='format' wants a name of the format: ('{name}',).")
    return {"split": bounds[0]}


def _frames(ds: xr.Dataset) -> ck.Clock:
    return ck.clock(ds, ax.time_dim(ds))


def _cut_time(ds: xr.Dataset, name: str, bounds: tuple) -> xr.Dataset:
    source = source_of(ds)
    times = _frames(ds)
    dim = ax.time_dim(ds)
    if dim is None:
        raise DataError(f"{source} has no time dimension to split. Use split_by='trajectory' or one path per split.")
    if any(isinstance(bound, str) for bound in bounds):
        chosen = _between(ds, dim, times, bounds, name, source)
    else:
        _check_not_years(bounds, times, name)
        chosen = range(*_numbers(bounds, len(times), name, "frames"))
    if len(chosen) == 0:
        raise DataError(f"Split {name!r} = {bounds} holds no frame of {source}, whose times are {_extent(times)}.")
    ds = ds.isel({dim: slice(chosen[0], chosen[-1] + 1)})
    ds.encoding["source"] = source
    return ds


def _check_not_years(bounds: tuple, times: ck.Clock, name: str) -> None:
    """Raises ConfigError for numbers that are years of the data: 2001 unquoted would silently mean frame 2001."""
    if times.calendar is None or any(isinstance(bound, float) for bound in bounds):
        return
    years = [int(str(label)[:4]) for label in (times.labels[0], times.labels[-1])]
    if all(years[0] <= bound <= years[1] for bound in bounds):
        raise ConfigError(
            f"Split {name!r} = {bounds} are numbers, which count frames, but they look like years of the data "
            f"({_extent(times)}). Quote them: ('{bounds[0]}', '{bounds[-1]}')."
        )


def _extent(times: ck.Clock) -> str:
    return f"{times.labels[0]} .. {times.labels[-1]} ({len(times)} frames)"


def _between(ds: xr.Dataset, dim: str, times: ck.Clock, bounds: tuple, name: str, source: str) -> np.ndarray:
    """Frames whose labels lie in [low, high], partial dates such as "2001" included whole, as in `xr.Dataset.sel`."""
    if len(bounds) not in (1, 2):
        raise ConfigError(f"Split {name!r} = {bounds}, but one or two times were expected.")
    low, high = (bounds[0], bounds[-1])
    index = xr.DataArray(np.arange(len(times)), dims=dim, coords={dim: ds[dim].variable})
    try:
        if times.calendar is None:
            low, high = float(low), float(high)
        return index.sel({dim: slice(low, high)}).values
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"Split {name!r} = {bounds} cannot be read as times ({error}). {source} has {_extent(times)}; write for "
            "example "
            f"('{str(times.labels[0])[:10]}', '{str(times.labels[-1])[:10]}')."
        ) from error


def _numbers(bounds: tuple, total: int, name: str, what: str) -> tuple[int, int]:
    """Half-open bounds from numbers or fractions."""
    if len(bounds) != 2 or any(isinstance(b, str) for b in bounds):
        raise ConfigError(f"Split {name!r} = {bounds}, but (first, end) as two numbers or two fractions was expected.")
    low, high = bounds
    if isinstance(low, float) or isinstance(high, float):
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"Split {name!r} = {bounds}: fractions must satisfy 0 <= first <= end <= 1.")
        return round(low * total), round(high * total)
    if not 0 <= low < high <= total:
        raise ConfigError(
            f"Split {name!r} = {bounds} does not lie in the {total} {what} that there are: use 0 <= first < end <= "
            f"{total}."
        )
    return int(low), int(high)


def _listed(path: str, total: int) -> np.ndarray:
    """Trajectory numbers from a text file (one per line), a JSON list or a .npy array."""
    try:
        if path.endswith(".npy"):
            numbers = np.load(path, allow_pickle=False)
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            numbers = np.array(json.loads(text) if path.endswith(".json") else text.split(), dtype=np.int64)
    except FileNotFoundError as error:
        raise DataError(f"There is no index file {path}.") from error
    except (ValueError, OverflowError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a list of whole numbers: {error}.") from error
    numbers = np.asarray(numbers).ravel()
    if numbers.dtype.kind not in "iu":
        raise DataError(f"{path} holds {numbers.dtype} numbers; trajectory numbers are integers.")
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= total):
        raise DataError(f"{path} lists trajectory {int(numbers.max())}, but the data have {total} (0..{total - 1}).")
    return numbers.astype(np.int64)


def _check_disjoint(parts: dict[str, xr.Dataset], whole: xr.Dataset, by_time: bool) -> None:
    """Raises ConfigError when two splits share frames or trajectories: scores would be too good."""
    seen: dict[object, str] = {}
    dim = ax.time_dim(whole) if by_time else "trajectory"
    if dim is None or dim not in next(iter(parts.values())).variables:
        return
    for name, ds in parts.items():
        for label in np.asarray(ds[dim].values).tolist():
            if seen.setdefault(label, name) != name:
                text = f"frame {ds[dim].values[0]}" if by_time else f"trajectory {label}"
                raise ConfigError(f"Splits {seen[label]!r} and {name!r} overlap: both hold {text}. Make them disjoint.")


def _check_apart(members: dict[str, list[str]], what: str) -> None:
    """Raises ConfigError when two splits name the same: scores would be too good."""
    seen: dict[str, str] = {}
    for split, names in members.items():
        for name in names:
            if seen.setdefault(name, split) != split:
                raise ConfigError(
                    f"Splits {seen[name]!r} and {split!r} overlap: both hold {what} {name!r}. Make them disjoint."
                )


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
