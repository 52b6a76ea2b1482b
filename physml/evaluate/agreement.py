"""Until when the members of a labelled forecast agree, without any truth."""

import numpy as np
import xarray as xr

from physml.errors import ConfigError, SpecError
from physml.evaluate.blocks import BLOCK
from physml.evaluate.labels import MEMBER, TIME, TRAJECTORY, Forecast, choose_channels
from physml.evaluate.sources import Source
from physml.fields import Spec
from physml.metrics import Measure, high_correlation_time
from physml.metrics.ensemble import variance
from physml.metrics.predictability import member_correlation

NAME = "forecast"


def predictability(forecast: xr.Dataset, threshold: float = 0.8) -> xr.Dataset:
    """How well the members of an ensemble forecast agree, and from when on it is likely inaccurate.

    `forecast` is what `physml.forecast(..., members=8)` gives, or an ensemble under other usual names, opened lazily or
    not; it is read in blocks. Its mean and standard deviation cell by cell are `forecast.mean("member")` and
    `forecast.std("member", ddof=1)`. Cells that are NaN at the first lead in all members do not count.

    Returns, for every field (levels are fields of their own, `z_500`):

    - `inaccurate_from_NAME (trajectory)`: the first lead at which the correlation below is below the threshold, in
      units of `lead`, see `physml.metrics.predictability.decorrelation_time`;
    - `inaccurate_from_NAME_capped (trajectory)`: true where members agree to the end, and that is a lower bound;
    - `correlation_NAME (trajectory, lead)`: of two members over cells, the mean over all pairs;
    - `spread_NAME (trajectory, lead)`: root of the area mean of the variance over members, in units of the field.

    Raises ConfigError for a forecast of less than two members, SpecError for one without space or leads.
    """
    found = Forecast(NAME, forecast)
    if found.members < 2:
        raise ConfigError(
            f"The forecast has dimensions {dict(forecast.sizes)}, but members are compared with each other: two or "
            f"more along {MEMBER!r} are needed, e.g. of physml.forecast(..., members=8)."
        )
    spec, _ = choose_channels({NAME: found.fields}, found.fields.isel({MEMBER: 0}, drop=True))
    if np.prod(spec.grid.shape) < 2:
        raise SpecError(f"Members are correlated over cells, but the forecast has {spec.grid.shape} of them.")
    source = Source(found.fields, spec, (MEMBER,))
    parts = [_compared(source, spec, found, trajectory) for trajectory in range(found.trajectories)]
    correlation, spread = (np.stack(values) for values in zip(*parts, strict=True))
    leads = np.arange(1, found.leads + 1)
    steps, capped = high_correlation_time(np.moveaxis(correlation, 1, -1), leads, threshold)
    times = (leads if found.lead is None else found.lead)[steps[..., 0].astype(int) - 1]

    start, lead = found.dims
    result = xr.Dataset(coords={name: c for name, c in forecast.coords.items() if {*c.dims} <= {start, lead}})
    result = result.assign_attrs(threshold=threshold, members=found.members)
    first, at = ((start,), slice(None)) if start else ((), 0)
    for i, channel in enumerate(spec.channels):
        name = channel.name
        result[f"inaccurate_from_{name}"] = first, times[at, i], _unit_of_lead(forecast, lead)
        result[f"inaccurate_from_{name}_capped"] = first, capped[at, i, 0]
        result[f"correlation_{name}"] = (*first, lead), correlation[at, ..., i]
        result[f"spread_{name}"] = (*first, lead), spread[at, ..., i], {"units": channel.unit} if channel.unit else {}
    return result


def _compared(source: Source, spec: Spec, found: Forecast, trajectory: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlation and spread `(lead, channel)` of one trajectory, in blocks of leads."""
    every, tile = tuple(range(len(spec.channels))), (slice(None),) * len(spec.grid.axes)
    length = max(1, BLOCK // (4 * found.members * len(every) * int(np.prod(spec.grid.shape))))
    mask, parts = None, []
    for start in range(0, found.leads, length):
        leads = np.arange(start, min(start + length, found.leads))
        index = {MEMBER: np.arange(found.members), TRAJECTORY: [trajectory], TIME: leads}
        values = np.moveaxis(source.read(every, tile, **index), 0, -1).astype(np.float32)
        missing = np.isnan(values[:, 0, 0]).all(0) if mask is None else None
        mask = np.where(missing, 0, 1) if mask is None and missing.any() else mask
        spread = np.sqrt(Measure.of(spec, mask).mean(variance(values)))
        parts.append((member_correlation(values, spec, mask)[0], spread[0]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _unit_of_lead(forecast: xr.Dataset, lead: str) -> dict[str, str]:
    unit = forecast[lead].attrs.get("units") if lead in forecast.variables else None
    return {"units": unit} if unit else {}
