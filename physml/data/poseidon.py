"""The 21 data sets of Poseidon, one file each: `<set>.nc` (netCDF-4) or `Helmholtz.h5`. Herde et al. 2024,
arXiv:2405.19101.

The axes of the arrays count, not the names of their dimensions. The sets are one table, `SETS`; `PRETRAINING` and
`DOWNSTREAM` (15 tasks) name their roles.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from physml.data import members
from physml.data.derived import derive
from physml.data.hdf5 import Hdf5, common_sizes, component
from physml.data.place import Place
from physml.errors import ConfigError, DataError, suggest

XY = ("x", "y")
AXES = {"n": "trajectory", "t": "time", "c": "channel", "x": "x", "y": "y"}
ABSENT = {"rho": 1.0, "p": 0.0}  # channels of incompressible flow that are constant and in no file
SAMPLE = "Sample_"  # groups of Helmholtz.h5
LONGEST = 4096  # points along an axis; more come from a damaged header


@dataclass(frozen=True)
class Set:
    """One data set.

    Attributes:
        arrays: array of the file -> its axes (of `AXES`) and the fields along its axis c ("_": not used).
        channels: what models see, in their order -> mean and standard deviation; a field that is none may be absent.
            The mean of the pressure of the CE sets is the constant that the authors subtract.
        sizes: trajectories in all, for validation, for testing.
        norm: frames that lead times are divided by; 0 for a steady set.
        stride, longest: frames per step of the all-to-all pairs, and the steps of their long variant.
        periodic: whether space is. Where it is not, no boundary condition is stated.
        inputs: channels that are given, not predicted, in steady sets.
        file: its name, if it is not that of the set.
    """

    arrays: Mapping[str, tuple[str, str]]
    channels: Mapping[str, tuple[float, float]]
    sizes: tuple[int, int, int]
    norm: int = 20
    stride: int = 2
    longest: int = 10
    periodic: bool = False
    inputs: tuple[str, ...] = ()
    file: str = ""


FLUID = {"rho": (0.80, 0.31), "u": (0.0, 0.391), "v": (0.0, 0.356), "p": (0.0, 0.185)}
WAVE = {"solution": ("ntxy", "u"), "c": ("nxy", "c")}


def _incompressible(total: int = 20000, axes: str = "ntcxy") -> Set:
    return Set({"velocity": (axes, "u v tracer")}, FLUID, (total, 120, 240), periodic=True)


def _compressible(pressure: float) -> Set:
    channels = {**FLUID, "p": (pressure, 0.185)}
    return Set({"data": ("ntcxy", "rho u v p tracer")}, channels, (10000, 120, 240), periodic=True)


SETS: dict[str, Set] = {
    "ACE": Set(
        {"solution": ("ntxy", "u")}, {"u": (0.002484262, 0.65351176)}, (15000, 60, 240), norm=19, longest=9,
    ),
    "CE-CRP": _compressible(0.553),
    "CE-Gauss": _compressible(2.513),
    "CE-KH": _compressible(1.0),
    "CE-RM": Set(
        {"solution": ("ntcxy", "rho u v p")},
        {"rho": (1.1964245, 0.5543239), "u": (-7.164812e-6, 0.24304213), "v": (2.8968952e-6, 0.2430597),
         "p": (1.5648036, 0.89639103)},
        (1260, 100, 130),
    ),
    "CE-RP": _compressible(0.215),
    "CE-RPUI": _compressible(1.33),
    "FNS-KF": Set(
        {"solution": ("ntcxy", "u v")},
        {**FLUID, "u": (-2.2424793e-13, 0.22017328), "v": (4.1510376e-12, 0.22078253),
         "forcing": (-1.2996679e-9, 0.0707106739)},
        (20000, 120, 240), periodic=True,
    ),
    "GCE-RT": Set(
        {"solution": ("ntcxy", "rho u v p _ g")},
        {"rho": (0.8970493, 0.12857835), "u": (4.0316996e-13, 0.014896976), "v": (-1.3858967e-13, 0.014896975),
         "p": (0.7133829, 0.21293919), "g": (-1.7055787, 0.40131348)},
        (1260, 100, 130), norm=10, stride=1,
    ),
    "Helmholtz": Set(
        {"a": ("nxy", "a"), "bc": ("n", "bc"), "u": ("nxy", "u")},
        {"a": (1.0, 1.0), "bc": (0.0, 1.0), "u": (0.1152391567, 0.8279975746)},
        (19675, 128, 512), norm=0, inputs=("a", "bc"), file="Helmholtz.h5",
    ),
    "NS-BB": _incompressible(),
    "NS-Gauss": _incompressible(),
    "NS-PwC": _incompressible(),
    "NS-SL": _incompressible(40000, "ntcyx"),
    "NS-SVS": _incompressible(),
    "NS-Sines": _incompressible(),
    "NS-Tracer-PwC": Set(
        {"velocity": ("ntcxy", "u v tracer")}, {**FLUID, "tracer": (0.19586183, 0.37)}, (20000, 120, 240),
        periodic=True, file="NS-PwC.nc",
    ),
    "Poisson-Gauss": Set(
        {"source": ("nxy", "source"), "solution": ("nxy", "u")},
        {"source": (0.0148221424, 4.7551388), "u": (0.0005603458, 0.0240122613)},
        (20000, 120, 240), norm=0, inputs=("source",),
    ),
    "SE-AF": Set(
        {"solution": ("ncxy", "airfoil rho")}, {"airfoil": (0.0, 1.0), "rho": (0.92984116, 0.10864315)},
        (10869, 120, 240), norm=0, inputs=("airfoil",),
    ),
    "Wave-Gauss": Set(
        WAVE, {"u": (0.0334376316, 0.1171879068), "c": (2618.4593933, 601.51658913)}, (10512, 60, 240),
        norm=15, longest=7,
    ),
    "Wave-Layer": Set(
        WAVE, {"u": (0.034674432, 0.104424218), "c": (3498.564438, 647.843959)}, (10512, 60, 240),
    ),
}  # fmt: skip
PRETRAINING = ("NS-Sines", "NS-Gauss", "CE-RP", "CE-CRP", "CE-KH", "CE-Gauss")
DOWNSTREAM = tuple(name for name in SETS if name not in PRETRAINING)


def recognizes(place: Place) -> bool:
    """A file with the name and the arrays of a set, or a folder that holds one."""
    if place.is_folder():
        return any(_holds(file, name) for name, file in _inside(place).items())
    return any(_file(name) == place.name() and _holds(place, name) for name in SETS)


def open_dataset(
    place: Place, *, split: str | None = None, set: str | None = None, normalize: bool = False
) -> xr.Dataset:
    """Fields as the file has them, not normalized, with dimensions `trajectory, time, x, y` (128 x 128 points).

    Variables are `rho u v p tracer g` of fluids (without rho and p, which are constant, in incompressible flow;
    `tracer` where the file has one; `forcing(x, y)` of FNS-KF is computed, no file has it), `u` and `c(trajectory, x,
    y)` of waves, `u` of ACE. Steady sets have no time: `source, u` of Poisson-Gauss, `a, u` and the parameter `bc` of
    Helmholtz, `rho`, `airfoil` (1 inside it) and `mask` (0 there) of SE-AF. Channel 4 of GCE-RT, which no model uses,
    is left out. NS-SL is stored with y first, and turned. The files state neither units nor coordinates:
    x and y are centers of cells of a unit square, time is the fraction frame / 20 (GCE-RT 10, Wave-Gauss 15, ACE 19).

    Args:
        place: the file of a set, or a folder with it.
        split: "train", "valid" or "test", by position in the full set: the last trajectories are for testing, those
            before them for validation. A part of a set, from its beginning, only has "train". None: all there is.
        set: a key of `SETS`; told by the name of the file when None, where NS-PwC.nc is NS-PwC, not NS-Tracer-PwC.
        normalize: gives what `normalized` gives.

    Raises DataError for a file that is damaged, has other arrays, or is too small for the split; ConfigError for an
    unknown set or split.
    """
    name, file = _find(place, set)
    ds = _dataset(Hdf5(file), name)
    ds.attrs = {
        "set": name,
        "title": f"Poseidon {name}",
        "source": f"Hugging Face camlab-ethz/{_file(name).partition('.')[0]}",
        "references": "Herde et al. 2024, arXiv:2405.19101",
        "boundary_conditions": "periodic" if SETS[name].periodic else "not stated in the file",
    }
    if split is not None:
        ds = ds.isel(trajectory=_part(split, name, ds.sizes["trajectory"], str(file)))
    ds.encoding["source"] = str(file)
    return normalized(ds) if normalize else ds


def normalized(ds: xr.Dataset) -> xr.Dataset:
    """The channels as the models of the authors see them, lazily, from what `open_dataset` gives (or a part of it).

    One float32 variable per channel, in their order, normalized; the constant ones (rho = 1 and p = 0 of
    incompressible flow) are there too. The attribute `in_loss` of a channel is 0 where the authors leave it out of loss
    and scores; `inputs` and `outputs` of the dataset name the channels that are given and predicted. In SE-AF rho is 1
    inside the airfoil. `mask` is kept.
    """
    name = ds.attrs.get("set")
    if name not in SETS:
        raise DataError("This is no data set of Poseidon: its attribute `set` names none. Open it with `open_dataset`.")
    own = SETS[name]
    if missing := [key for key in own.channels if key not in ds.variables and key not in ABSENT]:
        raise DataError(f"{name} needs {missing[0]!r}, but only {list(ds.data_vars)} are left. Keep all fields.")
    field = next(ds.variables[key] for key in own.channels if key in ds.variables)
    variables = {}
    for key, (mean, std) in own.channels.items():
        parts = [ds.variables[key]] if key in ds.variables else []
        # A constant, and a number per trajectory, become fields with the dimensions of the first one.
        like = parts[0] if parts and parts[0].ndim > 1 else field
        if (name, key) == ("SE-AF", "rho"):
            parts.append(ds.variables["airfoil"])
        attrs = {"units": "1", "in_loss": int(key != "p" or bool(parts))}
        variables[key] = derive(_Scale(mean, std, ABSENT.get(key, 0.0)), parts, like, attrs=attrs)
    if "mask" in ds.variables:
        variables["mask"] = ds.variables["mask"]
    inputs = list(own.inputs or own.channels)
    outputs = [key for key in own.channels if key not in own.inputs]
    result = xr.Dataset(variables, ds.coords, {**ds.attrs, "inputs": inputs, "outputs": outputs})
    result.encoding = dict(ds.encoding)
    return result


def pairs(set: str, longest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The all-to-all training pairs of one trajectory: frames `(pair, 2)`, first <= second, and normalized lead times.

    36 pairs on every second frame up to 14 (GCE-RT: every frame up to 7); `longest` goes to frame 20 (ACE 18, GCE-RT
    10, Wave-Gauss 14). Raises ConfigError for steady sets.
    """
    own = SETS[_known(set)]
    if not own.norm:
        raise ConfigError(f"{set} is steady: it has no pairs of times. Train from its inputs to its outputs.")
    steps = np.arange((own.longest if longest else 7) + 1)
    first, second = np.meshgrid(steps, steps, indexing="ij")
    frames = own.stride * np.stack([first, second], -1)[first <= second]
    return frames, (frames[:, 1] - frames[:, 0]) / own.norm


# --- which file -------------------------------------------------------------------------------------------------------


def _known(name: str) -> str:
    if name not in SETS:
        raise ConfigError(f"Poseidon has no set {name!r}." + suggest(str(name), SETS))
    return name


def _file(name: str) -> str:
    return SETS[name].file or f"{name}.nc"


def _inside(folder: Place) -> dict[str, Place]:
    """The sets whose files lie in a folder; NS-Tracer-PwC has to be asked for."""
    present = {*folder.names()}
    return {name: folder.below(_file(name)) for name in SETS if _file(name) in present and name != "NS-Tracer-PwC"}


def _holds(file: Place, name: str) -> bool:
    try:
        hdf5 = Hdf5(file)
        return all(hdf5.has(f"{SAMPLE}0/{key}" if name == "Helmholtz" else key) for key in SETS[name].arrays)
    except DataError:
        return False


def _find(place: Place, name: str | None) -> tuple[str, Place]:
    if name is not None:
        return _known(name), place.below(_file(name)) if place.is_folder() else place
    if not place.is_folder():
        if named := [name for name in SETS if _file(name) == place.name()]:
            return named[0], place
        raise DataError(f"{place}: this is the name of no set. Say which one it is, as in set='NS-Sines'.")
    found = _inside(place)
    if not found:
        raise DataError(
            f"{place} holds no file of a set, such as NS-Sines.nc. Assemble the parts of a set to one file."
        )
    if len(found) > 1:
        raise DataError(f"{place} holds the sets {', '.join(found)}. Choose one with set=...")
    return next(iter(found.items()))


def _part(split: str, name: str, count: int, source: str) -> slice:
    total, valid, test = SETS[name].sizes
    ends = {"train": total - valid - test, "valid": total - test, "test": total}
    if split not in ends:
        raise ConfigError(f"Poseidon has no split {split!r}." + suggest(split, ends))
    begin, end = {"train": 0, "valid": ends["train"], "test": ends["valid"]}[split], ends[split]
    if split != "train" and count < end:
        raise DataError(
            f"{source} holds {count} of the {total} trajectories of {name}, but split {split!r} is {begin}..{end - 1}. "
            "Use the full file, or split='train'."
        )
    return slice(begin, end)


# --- what is in it ----------------------------------------------------------------------------------------------------


def _dataset(hdf5: Hdf5, name: str) -> xr.Dataset:
    own, variables = SETS[name], {}
    samples = _samples(hdf5) if name == "Helmholtz" else None
    for key, (axes, names) in own.arrays.items():
        dims = tuple(AXES[axis] for axis in axes)
        array = hdf5.variable(key, dims) if samples is None else _stacked(hdf5, key, dims, samples)
        for position, field in enumerate(names.split()):
            if field == "_" or (field not in own.channels and position >= array.sizes["channel"]):
                continue
            variables[field] = _pick(hdf5, key, array, field, position)
    if "airfoil" in variables:
        shape = variables["airfoil"]
        variables["mask"] = derive(_outside, [shape], shape, attrs={"units": "1"}, dtype="i1")
    sizes = common_sizes(hdf5, variables)
    for dim, size in sizes.items():
        if dim != "trajectory" and size > LONGEST:
            raise DataError(f"{hdf5}: its fields have {size} entries along {dim!r}. Download the file again.")
    if "forcing" in own.channels:
        variables["forcing"] = _forcing(sizes)
    ring = {"periodic": 1, "period": 1.0} if own.periodic else {"periodic": 0}
    coords = {d: xr.Variable(d, (np.arange(sizes[d]) + 0.5) / sizes[d], {"units": "1", **ring}) for d in XY}
    if own.norm:
        attrs = {"units": "1", "long_name": f"frame / {own.norm}"}
        coords["time"] = xr.Variable("time", np.arange(sizes["time"]) / own.norm, attrs)
    return xr.Dataset(variables, coords)


def _pick(hdf5: Hdf5, key: str, array: xr.Variable, field: str, position: int) -> xr.Variable:
    """One field of an array, with x before y."""
    if "channel" in array.dims:
        if position >= array.sizes["channel"]:
            raise DataError(
                f"{hdf5}: {key!r} has {array.sizes['channel']} channels, but {field!r} is number {position}. "
                "Check that the file is of this set, or generate it again."
            )
        array = component(array, "channel", position)
    if array.dims[-2:] == ("y", "x"):
        array = derive(_same, [array], array, (*array.dims[:-2], *XY), dtype=array.dtype)
    return xr.Variable(array.dims, array._data, {}, array.encoding)


def _forcing(sizes: Mapping[str, int]) -> xr.Variable:
    """0.1 sin(2 pi (x + y)) of Kolmogorov flow. For the authors both ends of the unit interval are points."""
    x, y = (np.linspace(0, 1, sizes[dim]) for dim in XY)
    return xr.Variable(XY, (0.1 * np.sin(2 * np.pi * (x[:, None] + y))).astype(np.float32), {"units": "1"})


def _samples(hdf5: Hdf5) -> int:
    groups = {key for key in hdf5.keys("/") if key.startswith(SAMPLE) and key[len(SAMPLE) :].isdecimal()}
    gap = next(i for i in range(len(groups) + 1) if f"{SAMPLE}{i}" not in groups)
    if not groups or gap < len(groups):
        raise DataError(f"{hdf5} has {len(groups)} groups {SAMPLE}<i>, but no {SAMPLE}{gap}. Download the file again.")
    return len(groups)


def _stacked(hdf5: Hdf5, key: str, dims: tuple[str, ...], samples: int) -> xr.Variable:
    """One key of all groups as one array, the group along its first axis."""
    first = hdf5.variable(f"{SAMPLE}0/{key}", dims[1:])
    shape = first.shape or (1,)  # a number counts as a row of one

    def read(sample: int, start: int, stop: int) -> np.ndarray:
        path = f"{SAMPLE}{sample}/{key}"
        values = hdf5.values(path)
        if values.shape != first.shape:
            raise DataError(f"{hdf5}: {path!r} has shape {values.shape}, but the first has {first.shape}. Check it.")
        return np.atleast_1d(values)[start:stop]

    array = members.stack(samples, shape, first.dtype, dims[1:] or ("row",), read)
    return array if first.shape else component(array, "row", 0)


@dataclass(frozen=True)
class _Scale:
    mean: float
    std: float
    constant: float

    def __call__(self, field: xr.Variable | None = None, airfoil: xr.Variable | None = None) -> xr.Variable:
        """In float32, as the authors do."""
        raw = xr.Variable((), np.float32(self.constant)) if field is None else field.astype(np.float32)
        scaled = (raw - np.float32(self.mean)) / np.float32(self.std)
        return scaled if airfoil is None else scaled.where(_outside(airfoil), np.float32(1))


def _same(field: xr.Variable) -> xr.Variable:
    return field


def _outside(airfoil: xr.Variable) -> xr.Variable:
    return airfoil.astype(np.float32) != 1
