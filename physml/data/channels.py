"""Where a channel lives in a dataset: a variable, or one entry of it (channel `z_850` is variable `z` at level 850)."""

import re
from dataclasses import dataclass

import numpy as np
import xarray as xr

from physml.data import axes as ax
from physml.errors import DataError, SpecError, suggest
from physml.fields import Channel, Spec

UNIT_SPELLINGS = {
    "1": "",
    "dimensionless": "",
    **dict.fromkeys(("kelvin", "kelvins", "degk", "deg_k"), "K"),
    **dict.fromkeys(("celsius", "degree_celsius", "degrees_celsius", "deg_c", "degree_c", "degrees_c"), "degC"),
    **dict.fromkeys(("pascal", "pascals"), "Pa"),
    **dict.fromkeys(("hectopascal", "hectopascals", "millibar", "millibars", "mbar", "mb"), "hPa"),
    **dict.fromkeys(("meter", "meters", "metre", "metres"), "m"),
}
NEVER_FLAT = ("trajectory", "time", "latitude", "longitude", "x", "y", "z")


@dataclass(frozen=True)
class Field:
    """One variable and the channels it fills.

    Attributes:
        variable: its name. dims: role -> dimension, without the flattened one.
        flat: the dimension whose entries are channels, or None.
        entries: positions along `flat`. positions: the channel that each entry (or the variable) fills.
    """

    variable: str
    dims: dict[str, str]
    flat: str | None
    entries: tuple[int, ...]
    positions: tuple[int, ...]


def source_of(ds: xr.Dataset) -> str:
    """The file a dataset came from, for messages."""
    if source := ds.encoding.get("source"):
        return str(source)
    for variable in ds.variables.values():
        if source := variable.encoding.get("source"):
            return str(source)
    return "The dataset"


def base_of(ds: xr.Dataset, name: str) -> str | None:
    """The variable that holds channel `name`, or None: itself, or `z` for `z_850` when `z` has a level 850."""
    if name in ds.variables:
        return name
    base = name.rpartition("_")[0]
    while base:
        if base in ds.variables and entry_of(ds, base, name[len(base) + 1 :]) is not None:
            return base
        base = base.rpartition("_")[0]
    return None


def entry_of(ds: xr.Dataset, variable: str, label: str) -> tuple[str, int] | None:
    """(dimension, position) of the entry called `label` along a dimension of `variable` that is neither space nor
    time.
    """
    for dim in ds.variables[variable].dims:
        if ax.role(ds, dim) not in NEVER_FLAT and label in (labels := entry_labels(ds, dim)):
            return dim, labels.index(label)
    return None


def entry_labels(ds: xr.Dataset, dim: str) -> list[str]:
    """What the entries of a dimension are called in the names of channels."""
    if dim not in ds.variables:
        return [str(i) for i in range(ds.sizes[dim])]
    values = np.asarray(ds.variables[dim].values)
    return [f"{v:g}" if values.dtype.kind in "iuf" else str(v) for v in values.tolist()]


def unit_of(ds: xr.Dataset, channel: str) -> str:
    """The unit behind a channel in one spelling, so that "m s**-1", "m/s" and "m s-1" compare equal; "1" is empty."""
    base = base_of(ds, channel)
    return "" if base is None else one_spelling(str(ds.variables[base].attrs.get("units", "")))


def one_spelling(unit: str) -> str:
    """CF spelling of simple units; what is not understood stays as it is. Nothing is converted."""
    unit = " ".join(unit.split())
    if (known := UNIT_SPELLINGS.get(unit.lower())) is not None:
        return known
    unit = unit.replace("**", "").replace("^", "")
    if match := re.fullmatch(r"([A-Za-z]+)\s*/\s*([A-Za-z]+)(\d?)", unit):
        return f"{match[1]} {match[2]}-{match[3] or 1}"
    return unit


def time_of(ds: xr.Dataset, variable: str | None) -> str | None:
    """The time dimension of a variable (of the dataset when None), or None."""
    return ax.time_dim(ds) if variable is None else ax.roles(ds, ds.variables[variable].dims).get("time")


def missing_variable(ds: xr.Dataset, name: str) -> DataError:
    """The error for a channel that no variable holds."""
    base = name.rpartition("_")[0]
    while base:
        for dim in ds.variables[base].dims if base in ds.variables else ():
            label = name[len(base) + 1 :]
            if ax.role(ds, dim) not in NEVER_FLAT and _is_number(label) == all(map(_is_number, entry_labels(ds, dim))):
                return DataError(f"{source_of(ds)}: {_missing_entry(ds, base, dim, label)}")
        base = base.rpartition("_")[0]
    known = [known for known in map(str, ds.variables) if not known.startswith("ledger_")]
    return DataError(f"{source_of(ds)} has no variable {name!r}." + suggest(name, known))


def _missing_entry(ds: xr.Dataset, variable: str, dim: str, label: str) -> str:
    labels = entry_labels(ds, dim)
    unit = str(ds.variables[dim].attrs.get("units", "")) if dim in ds.variables else ""
    kind = "levels" if ax.role(ds, dim) == "level" else f"{dim} entries"
    text = f"{variable} has {kind} {', '.join(labels)} {unit}".rstrip() + f"; {label} is missing."
    factors = (100, 1000, 0.01, 0.001) if _is_number(label) else ()
    scaled = [other for factor in factors if (other := f"{float(label) * factor:g}") in labels]
    if scaled:
        text += f" Is {scaled[0]} the same in another unit? Convert the values of {dim!r} then, and its `units`."
    return text


def _is_number(label: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", label) is not None


def resolve(ds: xr.Dataset, channels: tuple[Channel, ...], spec: Spec) -> list[Field]:
    """One `Field` per variable that `channels` need.

    Raises DataError for a variable that is missing or not numeric, SpecError for one that is not on the grid of `spec`.
    """
    grouped: dict[str, list[tuple[int, tuple[str, int] | None]]] = {}
    for position, channel in enumerate(channels):
        base = base_of(ds, channel.name)
        if base is None:
            raise missing_variable(ds, channel.name)
        entry = None if base == channel.name else entry_of(ds, base, channel.name[len(base) + 1 :])
        grouped.setdefault(base, []).append((position, entry))
    wanted = {axis.name for axis in spec.grid.axes}
    return [_field(ds, name, members, wanted) for name, members in grouped.items()]


def _field(ds: xr.Dataset, name: str, members: list, wanted: set[str]) -> Field:
    flat = members[0][1][0] if members[0][1] else None
    variable = ds.variables[name]
    dims = ax.roles(ds, [d for d in variable.dims if d != flat])
    if set(ax.space_of(dims)) != wanted:
        hint = " Give its levels as channels (flatten=('level',))." if "level" in dims else ""
        raise SpecError(
            f"{source_of(ds)}: variable {name!r} has spatial axes {sorted(ax.space_of(dims))}, but {sorted(wanted)} "
            "were "
            f"expected (its dimensions are {variable.dims}).{hint}"
        )
    if variable.dtype.kind not in "iufb":
        raise DataError(f"{source_of(ds)}: variable {name!r} is of type {variable.dtype}, not a real number.")
    entries = tuple(entry[1] for _, entry in members) if flat else ()
    return Field(name, dims, flat, entries, tuple(position for position, _ in members))
