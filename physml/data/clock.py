"""The time axis of a dataset: numbers for windows, labels for people.

Calendar times (datetime64, or cftime for calendars such as noleap and 360_day) become seconds; plain numbers stay as
they are, unless their `units` name a duration. Months are regular though their lengths differ: the step is then the
mean month.
"""

import re
from dataclasses import dataclass

import numpy as np
import xarray as xr

from physml.errors import DataError

DURATIONS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
DAY = 86400.0
MONTHS_PER_YEAR = 12


@dataclass(frozen=True)
class Clock:
    """Times of the frames along one axis.

    Attributes:
        labels: the times as the file gives them: datetime64, cftime objects, timedelta64 or numbers.
        values: float64 since the first frame, in `unit`.
        unit: "s" for calendar times and durations, "" for nondimensional time.
        calendar: `(time, 2)` float32 fractions of the year and of the day; None without a calendar.
        units: what labels that are numbers count, as the file says.
    """

    labels: np.ndarray
    values: np.ndarray
    unit: str
    calendar: np.ndarray | None
    units: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> float:
        """How much of `unit` labels that are numbers count: 3600 for hours."""
        return DURATIONS.get(self.units.strip().lower(), 1.0)


def clock(ds: xr.Dataset, dim: str | None) -> Clock:
    """The clock of dimension `dim`; frame numbers where it has no coordinate, one instant where `dim` is None."""
    if dim is None:
        return _of_scalar(ds)
    coordinate = ds.variables.get(dim)
    valid = ds.variables.get("time")
    if valid is not None and valid.dims == (dim,):  # the valid times of a forecast, whose dimension is its lead
        coordinate = valid
    if coordinate is None or coordinate.ndim != 1 or coordinate.dtype.kind not in "iufMmO":
        step = float(ds.attrs.get("time_step", 1.0))
        numbers = np.arange(ds.sizes[dim]) * step
        return Clock(numbers, numbers, "", None)
    return of_labels(np.asarray(coordinate.values), str(coordinate.attrs.get("units", "")))


def _of_scalar(ds: xr.Dataset) -> Clock:
    for name in ("time", "valid_time"):
        if name in ds.variables and ds.variables[name].ndim == 0 and ds.variables[name].dtype.kind in "MO":
            return of_labels(np.asarray(ds.variables[name].values).reshape(1))
    return Clock(np.zeros(1), np.zeros(1), "", None)


def of_labels(labels: np.ndarray, units: str = "") -> Clock:
    """A clock from a one-dimensional array of times."""
    labels = np.asarray(labels)
    if labels.dtype.kind == "M":
        return Clock(labels, (labels - labels[:1]) / np.timedelta64(1, "s"), "s", _calendar_of_datetime64(labels))
    if labels.dtype.kind == "m":
        return Clock(labels, (labels - labels[:1]) / np.timedelta64(1, "s"), "s", None)
    if labels.dtype.kind == "O":
        values = np.array([(t - labels[0]).total_seconds() for t in labels], np.float64)
        return Clock(labels, values, "s", _calendar_of_cftime(labels))
    factor = DURATIONS.get(units.strip().lower())
    numbers = labels.astype(np.float64)
    values = (numbers - numbers[:1]) * (factor or 1.0)
    return Clock(labels, values, "s" if factor else "", None, units)


def elapsed(times: Clock, labels: np.ndarray) -> np.ndarray:
    """Where other `labels` of the same kind (see `kind_of`) and units lie on the axis of `times.values`."""
    return of_labels(np.concatenate([times.labels[:1], labels]), times.units).values[1:]


def kind_of(labels: np.ndarray) -> str:
    """What the labels are, in words; those of two kinds cannot be compared."""
    if labels.dtype.kind == "O":
        return f"dates of the calendar {getattr(labels[0], 'calendar', 'standard')}"
    return {"M": "dates", "m": "durations"}.get(labels.dtype.kind, "plain numbers")


def parse(text: str, times: Clock):
    """The label that `text` names among those of `times`: a number, a duration (a number counts seconds), or an
    instant, where a date is its midnight. Raises ValueError for anything else.
    """
    kind = times.labels.dtype.kind
    if kind == "M":
        return np.datetime64(text).astype(times.labels.dtype)
    if kind == "m":
        number, unit = re.fullmatch(r"([-+.\d]*)\s*(.*)", text.strip().lower()).groups()
        if unit and unit not in DURATIONS:
            raise ValueError(f"{unit!r} is no unit of time: use one of {', '.join(DURATIONS)}")
        return np.timedelta64(round(float(number) * DURATIONS[unit or "s"] * 1e9), "ns").astype(times.labels.dtype)
    if kind != "O":
        return float(text)
    like = times.labels[0]
    year, *rest = (int(part) for part in re.split("[-T: ]", text))
    names = ("month", "day", "hour", "minute", "second")
    if len(rest) > len(names):
        raise ValueError(f"{text} has more parts than a year and {', '.join(names)}")
    begin = like.replace(year=year, month=1, day=1, hour=0, minute=0, second=0, microsecond=0)
    return begin.replace(**dict(zip(names, rest, strict=False)))


def nearest(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Position of the number in `values`, in any order, that is nearest to each one in `wanted`."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    right = np.clip(np.searchsorted(ascending, wanted), 0, len(values) - 1)
    left = np.maximum(right - 1, 0)
    closer = np.abs(ascending[left] - wanted) < np.abs(ascending[right] - wanted)
    return order[np.where(closer, left, right)]


def _calendar_of_datetime64(labels: np.ndarray) -> np.ndarray:
    years = labels.astype("datetime64[Y]")
    begin, end = years.astype("datetime64[s]"), (years + 1).astype("datetime64[s]")
    seconds = labels.astype("datetime64[s]")
    year = (seconds - begin) / (end - begin)
    day = (seconds - labels.astype("datetime64[D]").astype("datetime64[s]")) / np.timedelta64(1, "D")
    return np.stack([year, day], -1).astype(np.float32)


def _calendar_of_cftime(labels: np.ndarray) -> np.ndarray:
    rows = []
    for t in labels:
        begin = t.replace(month=1, day=1, hour=0, minute=0, second=0, microsecond=0)
        length = (begin.replace(year=begin.year + 1) - begin).total_seconds()
        midnight = t.replace(hour=0, minute=0, second=0, microsecond=0)
        rows.append(((t - begin).total_seconds() / length, (t - midnight).total_seconds() / DAY))
    return np.array(rows, np.float32).reshape(-1, 2)


def time_step(times: Clock, source: str = "the data") -> float:
    """Regular distance of frames, in `times.unit`: the median step; the mean month where frames are months apart.

    1 for a single frame. Raises DataError when times repeat or run backwards.
    """
    if len(times) < 2:
        return 1.0
    steps = np.diff(times.values)
    if (steps <= 0).any():
        at = int(np.argmax(steps <= 0))
        raise DataError(
            f"{source}: time does not increase at frame {at + 1}: {times.labels[at]} is followed by "
            f"{times.labels[at + 1]}. "
            "Sort the frames and drop repeated ones."
        )
    months = _month_steps(times)
    if months is not None:
        return round(float(np.median(months)) * _mean_month(times), 3)
    return float(f"{_typical(steps):.7g}")  # rounded, so that every slice of one file gives an equal number


def _typical(steps: np.ndarray) -> float:
    middle = float(np.median(steps))
    return float(steps.mean()) if (np.abs(steps - middle) <= 0.01 * middle).all() else middle


def segments(times: Clock, step: float) -> list[range]:
    """Runs of frames that are `step` apart: winter-only daily data give one run per winter.

    Raises DataError when hardly any frames are regular.
    """
    if len(times) < 2:
        return [range(len(times))]
    steps = np.diff(times.values)
    months = _month_steps(times)
    regular = months == np.median(months) if months is not None else np.abs(steps - step) <= 0.01 * step
    if regular.sum() < len(steps) / 2:
        raise DataError(
            f"The time axis is irregular: steps range from {steps.min():g} to {steps.max():g} {times.unit} and fewer "
            "than half "
            f"are near {step:g}. Interpolate the data to a regular time step."
        )
    bounds = [0, *(np.flatnonzero(~regular) + 1).tolist(), len(times)]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def after(times: Clock, count: int, step: float) -> np.ndarray:
    """Labels of `count` frames after the last one of `times`, each a `step` (in `times.unit`) later."""
    last = times.labels[-1]
    index = np.arange(1, count + 1)
    kind = times.labels.dtype.kind
    if times.calendar is not None and (months := _whole_months(times, step)):
        return np.array([_add_months(last, int(months * i)) for i in index], times.labels.dtype)
    if kind == "M" or kind == "m":
        return (last + np.round(index * step * 1e6).astype("timedelta64[us]")).astype(times.labels.dtype)
    if kind == "O":
        import datetime

        return np.array([last + datetime.timedelta(seconds=float(i * step)) for i in index], object)
    return float(last) + index * (step / times.scale)


def valid_attrs(times: Clock) -> dict[str, str]:
    """Attributes of a coordinate of valid times that go on from `times`."""
    units = {"units": times.units} if times.units else {}
    return {"standard_name": "time", "long_name": "valid time", **units}


def lead_labels(times: Clock, count: int, step: float) -> np.ndarray:
    """Lead times `step, 2 * step, ...`: timedelta64[ns] where time is in seconds, else numbers."""
    leads = np.arange(1, count + 1) * step
    return np.round(leads * 1e9).astype("timedelta64[ns]") if times.unit == "s" else leads


def _mean_month(times: Clock) -> float:
    days = {"noleap": 365.0, "365_day": 365.0, "360_day": 360.0, "all_leap": 366.0, "366_day": 366.0}
    calendar = getattr(times.labels[0], "calendar", "standard")
    return days.get(calendar, 365.2425) / MONTHS_PER_YEAR * DAY


def _months(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(months since year 0, day of the month)."""
    if labels.dtype.kind == "M":
        months = labels.astype("datetime64[M]")
        return months.astype(int), (labels.astype("datetime64[D]") - months.astype("datetime64[D]")).astype(int) + 1
    return np.array([t.year * 12 + t.month for t in labels]), np.array([t.day for t in labels])


def _month_steps(times: Clock) -> np.ndarray | None:
    """Steps in whole months, or None when the frames are not months apart."""
    if times.calendar is None or len(times) < 2 or np.diff(times.values).min() < 27 * DAY:
        return None
    number, day = _months(times.labels)
    if np.ptp(day) > 3 or (np.diff(number) < 1).any():
        return None
    return np.diff(number)


def _whole_months(times: Clock, step: float) -> int:
    """How many mean months `step` is; zero when it is not a whole number of them."""
    months = step / _mean_month(times)
    is_360 = getattr(times.labels[0], "calendar", "") == "360_day"  # there, months are plain 30 days
    return round(months) if not is_360 and months > 0.5 and abs(months - round(months)) < 1e-5 else 0


def _add_months(label, months: int):
    if isinstance(label, np.datetime64):
        month = label.astype("datetime64[M]")
        moved = (month + months).astype(label.dtype) + (label - month.astype(label.dtype))
        last = (month + months + 1).astype(label.dtype) - np.timedelta64(1, "D")  # 31 January -> 28 February
        return min(moved, last)
    number = label.year * 12 + label.month - 1 + months
    year, month = divmod(number, 12)
    for day in range(label.day, label.day - 4, -1):
        try:
            return label.replace(year=year, month=month + 1, day=day)
        except ValueError:
            continue
    raise DataError(f"There is no time {months} months after {label}.")
