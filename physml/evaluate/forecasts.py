"""Scores of labelled forecasts: xarray in, aligned with the truth by valid time."""

from collections.abc import Sequence

import jax
import numpy as np
import xarray as xr

from physml.data.labelled import Reader, spec_of
from physml.errors import ConfigError, DataError, SpecError, suggest
from physml.evaluate.scores import Setting, assemble
from physml.evaluate.statistics import (
    Tally,
    choose_metrics,
    choose_spectrum_leads,
    field_statistics,
    finite_frames,
    has_spectrum,
    pair_statistics,
)
from physml.fields import Spec
from physml.metrics import METRICS, THRESHOLDS, Measure

LEAD, TIME, TRAJECTORY, MEMBER = "lead", "time", "trajectory", "member"
LEDGER = "ledger_"  # variables of a forecast that watch its totals
SEASONS = ("dayofyear", "month", "hour")  # dimensions that a climatology may have


def evaluate_forecasts(
    predictions: dict[str, xr.Dataset],
    truth: xr.Dataset,
    *,
    metrics: Sequence[str] | dict | None = None,
    climatology: xr.Dataset | None = None,
    floors: Sequence[str] = (),
    inputs: xr.Dataset | np.ndarray | None = None,
    spectrum_leads: Sequence[int] | None = None,
    thresholds: tuple[float, ...] = THRESHOLDS,
    batch: int = 16,
    draws: int = 500,
    level: float = 0.95,
) -> xr.Dataset:
    """Scores forecasts by name against the truth at their valid times. See `physml.evaluate`."""
    names = _common_variables(predictions, truth)
    spec = _truth_spec(truth, names, next(iter(predictions.values())))
    sources = {name: _Forecast(name, ds[names], spec) for name, ds in predictions.items()}
    first = next(iter(sources.values()))
    for other in sources.values():
        first.check_same_leads(other)
    first.check_inputs(inputs)
    climate = None if climatology is None else _Climatology(climatology, spec)
    floors = _known_floors(floors, climate)
    masked = Reader(truth, spec).masked
    spectral = has_spectrum(spec.grid, masked)
    chosen = choose_metrics(metrics, climatology=climate is not None, spectrum=spectral)
    kept = choose_spectrum_leads(spectrum_leads, first.leads) if spectral else ()
    setting = Setting(spec, chosen, first.steps, kept, thresholds, "trajectory", draws, level)
    tallies, of_truth = _score(sources, _Truth(truth, spec, first), climate, floors, setting, batch)
    attrs = {"starts": first.trajectories, "floors": ", ".join(floors), "climatology": "given" if climate else "none"}
    return assemble(tallies, of_truth, setting, attrs)


def _common_variables(predictions: dict[str, xr.Dataset], truth: xr.Dataset) -> list[str]:
    """The predicted fields. Raises SpecError when a prediction lacks one of another, DataError when the truth does."""
    if not predictions:
        raise ConfigError("There is no prediction to evaluate: pass a dataset, or a dict name -> dataset.")
    first = next(iter(predictions.values()))
    names = [str(n) for n, v in first.data_vars.items() if {LEAD, TIME} & set(v.dims) and not str(n).startswith(LEDGER)]
    if not names:
        dims = {str(n): v.dims for n, v in first.data_vars.items()}
        raise SpecError(f"The prediction holds no field with a dimension {LEAD!r} or {TIME!r}: it has {dims}.")
    found = [name for name in names if name in truth.data_vars]
    if not found:
        raise DataError(
            f"The truth has none of the predicted variables {names}." + suggest(names[0], map(str, truth.data_vars))
        )
    for label, ds in predictions.items():
        if missing := [n for n in found if n not in ds.data_vars]:
            raise SpecError(
                f"The prediction {label!r} lacks {missing[0]!r}." + suggest(missing[0], map(str, ds.data_vars))
            )
        if MEMBER in ds.dims:
            raise SpecError(
                f"The prediction {label!r} is an ensemble of {ds.sizes[MEMBER]} members. Score one member, or their "
                "mean: "
                f"prediction.mean({MEMBER!r}, keep_attrs=True)."
            )
    return found


def _truth_spec(truth: xr.Dataset, names: list[str], prediction: xr.Dataset) -> Spec:
    spec = spec_of(truth, names)
    levels = [dim for dim in truth[names[0]].dims if dim == "level"]
    return spec_of(truth, names, flatten=("level",)) if levels and "level" in prediction.dims else spec


class _Forecast:
    """One prediction: its times, and its frames in the order of the truth's spec."""

    def __init__(self, name: str, ds: xr.Dataset, spec: Spec):
        self.name = name
        if LEAD not in ds.dims and TIME in ds.dims:
            ds = ds.assign_coords({LEAD: (TIME, np.arange(1, ds.sizes[TIME] + 1))}).swap_dims({TIME: LEAD})
            self.has_lead = False
        else:
            self.has_lead = LEAD in ds.coords
        if LEAD not in ds.dims:
            raise SpecError(
                f"The prediction {name!r} has dimensions {dict(ds.sizes)}, but {LEAD!r} or {TIME!r} was expected."
            )
        if TIME not in ds.coords:
            raise SpecError(
                f"The prediction {name!r} has no coordinate {TIME!r} (valid time), so it cannot be aligned with the "
                "truth. "
                f"Assign one along {LEAD!r}: the times that the frames are predictions of."
            )
        self.leads = ds.sizes[LEAD]
        if self.leads == 0:
            raise SpecError(f"The prediction {name!r} holds no frames: its {LEAD!r} has length zero.")
        self.lead = np.asarray(ds[LEAD].values) if self.has_lead else None
        self.trajectories = ds.sizes.get(TRAJECTORY, 1)
        valid = np.asarray(ds[TIME].values)
        self.valid = np.broadcast_to(valid, (self.trajectories, self.leads)) if valid.ndim < 2 else valid
        self.steps = self._steps(spec)
        self.readers = [self._reader(part, spec) for part in _finite_parts(ds)]
        for reader in self.readers[:1]:
            reader.check_units()

    def _steps(self, spec: Spec) -> np.ndarray:
        """Leads in frames, from 1. Raises SpecError when an initial frame would be scored."""
        if not self.has_lead:
            return np.arange(1, self.leads + 1)
        lead = self.lead / np.timedelta64(1, "s") if self.lead.dtype.kind == "m" else self.lead.astype(float)
        if (lead <= 0).any():
            raise SpecError(
                f"The prediction {self.name!r} holds lead {self.lead[lead <= 0][0]}: that frame went into the "
                "forecast, and "
                f"scoring it would compare the input with itself. Drop it, e.g. prediction.isel({LEAD}=slice(1, None))."
            )
        if (np.diff(lead) <= 0).any():
            raise SpecError(f"The leads of the prediction {self.name!r} do not ascend: {self.lead[:5]}. Sort them.")
        steps = lead / spec.time_step
        if np.abs(steps - steps.round()).max() > 0.01:
            raise SpecError(
                f"The leads of the prediction {self.name!r} are {self.lead[:3]}..., which are not multiples of the "
                "time step of the "
                f"truth, {spec.time_step:g} {spec.time_unit}."
            )
        return steps.round().astype(int)

    @property
    def start(self) -> np.ndarray | None:
        """Time of the last input frame, `(trajectory,)`; None when the prediction does not say."""
        if not self.has_lead:
            return None
        lead = self.lead.astype("timedelta64[ns]") if self.lead.dtype.kind == "m" else self.lead
        return self.valid[:, 0] - lead[0]

    def check_same_leads(self, other: "_Forecast") -> None:
        """Raises SpecError when two predictions are not made for the same times."""
        if self.valid.shape != other.valid.shape or not (self.valid == other.valid).all():
            raise SpecError(
                f"The predictions {self.name!r} and {other.name!r} have different valid times or trajectories: "
                f"{self.valid.shape} from {self.valid.flat[0]} and {other.valid.shape} from {other.valid.flat[0]}. "
                "Score models on the same starts and leads, or one at a time."
            )

    def check_inputs(self, inputs) -> None:
        """Raises SpecError when a frame that went in is among those to be scored, or when that cannot be known."""
        if inputs is None and not self.has_lead:
            raise SpecError(
                f"The prediction {self.name!r} has times but no coordinate {LEAD!r}, so it does not say where the "
                "inputs end. Give "
                f"it a coordinate {LEAD!r} (time since the last input), or pass `inputs=`: the frames, or times, that "
                "went in."
            )
        if inputs is None:
            return
        times = np.asarray(inputs[TIME].values if isinstance(inputs, xr.Dataset) else inputs)
        if times.ndim == 0 or (times.ndim == 1 and self.trajectories > 1 and len(times) == self.trajectories):
            last = np.broadcast_to(times, (self.trajectories,))
        else:
            last = np.broadcast_to(times.max(-1), (self.trajectories,))
        for trajectory, end in enumerate(last):
            if (seen := self.valid[trajectory][self.valid[trajectory] <= end]).size:
                raise SpecError(
                    f"The prediction {self.name!r} holds frames valid at {seen[0]}..{seen[-1]}, but its inputs reach "
                    f"to {end} "
                    f"(trajectory {trajectory}): input and target times overlap. Score only frames after the inputs."
                )

    def _reader(self, ds: xr.Dataset, spec: Spec) -> Reader:
        plain = ds.drop_vars([n for n in (LEAD, TIME) if n in ds.coords]).rename({LEAD: TIME})
        plain.attrs["time_step"] = spec.time_step
        return Reader(plain, spec)

    def read(self, trajectory: int) -> np.ndarray:
        """`(lead, *space, channel)`; NaN or infinite where the prediction is."""
        values, finite = (reader.read(trajectory, range(self.leads)).frames for reader in self.readers)
        return np.where(finite > 0, values, np.nan).astype(np.float32)


def _finite_parts(ds: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """The fields with 0 where they are not finite, and 1 where they are: a diverged forecast must be scored, not
    refused."""

    def apply(function):
        return ds.map(lambda v: function(v) if LEAD in v.dims else v, keep_attrs=True)

    return apply(lambda v: v.where(np.isfinite(v), 0.0)), apply(lambda v: np.isfinite(v).astype(np.float32))


class _Truth:
    """The frames of the truth at the valid times of a forecast."""

    def __init__(self, ds: xr.Dataset, spec: Spec, forecast: _Forecast):
        self.reader = Reader(ds, spec)
        self.forecast = forecast
        if self.reader.trajectories not in (1, forecast.trajectories):
            raise SpecError(
                f"The prediction has {forecast.trajectories} trajectories, but the truth has "
                f"{self.reader.trajectories}. Select the "
                "trajectories of the truth that the forecast started from."
            )
        self.labels = self.reader.times.labels
        self.index = np.stack([self._find(valid, "the prediction") for valid in forecast.valid])

    def _find(self, times: np.ndarray, what: str) -> np.ndarray:
        """Positions of `times` in the truth. Raises DataError naming the first that is missing."""
        labels = self.labels
        kinds = [array.dtype.kind if array.dtype.kind in "MO" else "f" for array in (times, labels)]
        if kinds[0] != kinds[1]:
            raise SpecError(
                f"The times of {what} are of type {times.dtype}, those of the truth {labels.dtype}: both need one "
                "calendar."
            )
        position = np.clip(np.searchsorted(labels, times), 0, len(labels) - 1)
        if times.dtype.kind in "iuf":
            before = np.clip(position - 1, 0, len(labels) - 1)
            position = np.where(np.abs(labels[before] - times) < np.abs(labels[position] - times), before, position)
            wrong = np.abs(labels[position] - times) > 0.01 * self.reader.spec.time_step
        else:
            wrong = labels[position] != times
        if wrong.any():
            raise DataError(
                f"The truth has no frame at {times[wrong][0]} ({wrong.sum()} of {len(times)} leads of {what}); it "
                "covers "
                f"{labels[0]}..{labels[-1]}. Shorten the forecast with .isel({LEAD}=...), or open more data."
            )
        return position

    def _frames(self, trajectory: int, index: np.ndarray) -> np.ndarray:
        own = trajectory if self.reader.trajectories > 1 else 0
        if len(index) > 1 and (np.diff(index) == 1).all():
            return self.reader.read(own, range(index[0], index[-1] + 1)).frames
        return np.concatenate([self.reader.read(own, range(i, i + 1)).frames for i in index])

    def read(self, trajectory: int) -> np.ndarray:
        """`(lead, *space, channel)`."""
        return self._frames(trajectory, self.index[trajectory])

    def mask(self, trajectory: int) -> np.ndarray | None:
        return self.reader.mask(trajectory if self.reader.trajectories > 1 else 0)

    def persistence(self, trajectory: int) -> np.ndarray:
        """The last input frame at every lead."""
        start = self.forecast.start
        if start is None:
            raise ConfigError(
                f"The floor 'persistence' needs to know the last input: give the prediction a coordinate {LEAD!r}."
            )
        frame = self._frames(trajectory, self._find(start[trajectory : trajectory + 1], "the last inputs"))
        return np.repeat(frame, self.forecast.leads, axis=0)


class _Climatology:
    """A climatology with any of the dimensions dayofyear, month and hour, or none of them."""

    def __init__(self, ds: xr.Dataset, spec: Spec):
        self.seasons = [dim for dim in SEASONS if dim in ds.dims]
        self.sizes = [ds.sizes[dim] for dim in self.seasons]
        flat = ds.drop_vars([dim for dim in self.seasons if dim in ds.coords])
        flat = flat.stack({TIME: self.seasons}, create_index=False) if self.seasons else flat.expand_dims(TIME)
        self.reader = Reader(flat.drop_vars([n for n in (TIME,) if n in flat.coords]), spec)
        self.reader.check_units()
        whole = {"dayofyear": 366, "month": 12}
        for dim, size in zip(self.seasons, self.sizes):
            if size != whole.get(dim, size):
                raise SpecError(
                    f"The climatology has {size} entries along {dim!r}, but {whole[dim]} were expected, the first for "
                    "1 January."
                )

    def read(self, valid: np.ndarray) -> np.ndarray:
        """`(lead, *space, channel)` at the valid times."""
        index = np.zeros(len(valid), int)
        if self.seasons:
            accessor = xr.DataArray(valid, dims="t").dt
            for dim, size in zip(self.seasons, self.sizes):
                values = accessor.hour.values * size // 24 if dim == "hour" else getattr(accessor, dim).values - 1
                index = index * size + values
        return np.concatenate([self.reader.read(0, range(i, i + 1)).frames for i in index])


def _known_floors(floors: Sequence[str], climate) -> tuple[str, ...]:
    for name in floors:
        if name not in ("persistence", "climatology"):
            raise ConfigError(
                f"{name!r} is no floor of labelled forecasts." + suggest(name, ("persistence", "climatology"))
            )
        if name == "climatology" and climate is None:
            raise ConfigError("The floor 'climatology' needs one: pass `climatology=`.")
    return tuple(floors)


def _score(sources, truth: _Truth, climate, floors, setting: Setting, batch: int):
    count = truth.forecast.trajectories
    metrics = {**setting.metrics, "correlation": METRICS["correlation"]}
    tallies = {name: Tally(count, setting.spectrum_leads) for name in (*sources, *floors)}
    of_truth = Tally(count, setting.spectrum_leads)

    @jax.jit
    def pair(frames, target, climatology, mask):
        measure = Measure.of(setting.spec, mask, climatology)
        parts, pairs = pair_statistics(frames, target, measure, metrics)
        finite = finite_frames(frames if mask is None else frames * (mask[:, None] > 0))
        parts |= field_statistics(frames, measure, setting.spectrum_leads)
        return {**parts, "finite": (finite[..., None].astype("float32"),)}, pairs

    @jax.jit
    def alone(target, mask):
        return field_statistics(target, Measure.of(setting.spec, mask), setting.spectrum_leads)

    size = min(batch, count)
    for begin in range(0, count, size):
        real = range(begin, min(begin + size, count))
        rows = [*real, *[real[0]] * (size - len(real))]  # the last batch keeps its shape, so nothing is traced again
        weights = np.zeros((size, truth.forecast.leads))
        weights[: len(real)] = 1
        target = np.stack([truth.read(i) for i in rows])
        masks = [truth.mask(i) for i in rows]
        mask = None if masks[0] is None else np.stack(masks)
        normal = None if climate is None else np.stack([climate.read(truth.forecast.valid[i]) for i in rows])
        frames = {name: np.stack([source.read(i) for i in rows]) for name, source in sources.items()}
        if "persistence" in floors:
            frames["persistence"] = np.stack([truth.persistence(i) for i in rows])
        if "climatology" in floors:
            frames["climatology"] = normal
        index = np.asarray(rows)
        of_truth.add(jax.device_get(alone(target, mask)), {}, index, weights)
        for name, values in frames.items():
            tallies[name].add(*jax.device_get(pair(values, target, normal, mask)), index, weights)
    return tallies, of_truth
