"""How stable a rollout was, from the ledger that it carries."""

import numpy as np
import xarray as xr

from physml.errors import DataError
from physml.forecast.ledgers import SPECTRUM_STEP, TIME_STEP
from physml.metrics.spectra import noise_level

PREFIX, INITIAL = "ledger_energy_", "ledger_initial_energy_"


def stability(prediction: xr.Dataset) -> dict[str, dict[str, float | None]]:
    """By variable of a forecast, or of a selection of it, the median over its trajectories (and members):

    - "energy drift": change of the energy (half the area-weighted mean square) from the initial state to the last good
      frame, relative to the initial one;
    - "small scales": energy in the upper half of the resolved wavenumbers, last over first spectrum; None without
      spectra, or where the initial state has no such energy.

    Raises DataError for a dataset that `physml.forecast` did not make.
    """
    steps, completed = _steps(prediction), _completed(prediction)
    completed = np.minimum(completed, steps.max())
    result = {}
    for name in _variables(prediction):
        energy, initial = _at_least(prediction[PREFIX + name], "lead"), prediction[INITIAL + name].compute()
        last, place = _last(energy, steps, completed, "lead")
        drift = (last.where(place >= 0, initial) - initial) / initial
        result[name] = {"energy drift": _median(drift), "small scales": _small_scales(prediction, name, completed)}
    return result


def blow_ups(prediction: xr.Dataset) -> dict[str, int | None]:
    """How many trajectories (times members) diverged, and the first and the median step at which they did.

    Raises DataError for a dataset that `physml.forecast` did not make.
    """
    completed = _completed(prediction).values.ravel()
    asked = int(prediction.attrs.get("steps_asked", prediction.sizes.get("lead", 1)))
    steps = completed[completed < asked] + 1
    found = (int(steps.min()), int(np.median(steps))) if len(steps) else (None, None)
    return {"trajectories": len(completed), "diverged": len(steps), "first at step": found[0], "median": found[1]}


def _completed(prediction: xr.Dataset) -> xr.DataArray:
    if "steps_completed" not in prediction or not _variables(prediction):
        raise DataError("The dataset holds no ledger: it is no forecast. Make one with physml.forecast or rollout.")
    return prediction["steps_completed"].compute()


def _variables(prediction: xr.Dataset) -> list[str]:
    return [str(name).removeprefix(PREFIX) for name in prediction.data_vars if str(name).startswith(PREFIX)]


def _steps(prediction: xr.Dataset) -> xr.DataArray:
    """The number of the step of every lead."""
    _completed(prediction)
    if TIME_STEP not in prediction or any(INITIAL + name not in prediction for name in _variables(prediction)):
        raise DataError(
            f"The forecast lacks {TIME_STEP} or {INITIAL}VARIABLE, which an older physml did not write. Keep them, or "
            "make the forecast again."
        )
    if "lead" not in prediction.coords or not prediction["lead"].size:
        raise DataError("The forecast has no lead times left, so it has no end. Keep at least one: isel(lead=[-1]).")
    return _at_least(np.rint(prediction["lead"] / prediction[TIME_STEP]), "lead").compute()


def _at_least(array: xr.DataArray, dim: str) -> xr.DataArray:
    return array if dim in array.dims else array.expand_dims(dim)


def _last(array: xr.DataArray, steps: xr.DataArray, completed: xr.DataArray, dim: str) -> tuple[xr.DataArray, ...]:
    """The values of the last one of the `steps` along `dim` that is good, and its place; -1 where none is."""
    good = steps <= completed
    place = xr.where(good, steps, -1).argmax(dim)
    return array.compute().isel({dim: place}), place.where(good.any(dim), -1)


def _small_scales(prediction: xr.Dataset, name: str, completed: xr.DataArray) -> float | None:
    variable = f"ledger_spectrum_{name}"
    if variable not in prediction:
        return None
    resolved = int(prediction["wavenumber"].attrs["resolved_shells"])
    spectra = _at_least(prediction[variable], SPECTRUM_STEP).compute()
    steps = _at_least(prediction[SPECTRUM_STEP], SPECTRUM_STEP).reset_coords(drop=True)
    high = spectra.isel(wavenumber=slice(resolved // 2 + 1, resolved + 1)).sum("wavenumber", skipna=False)
    noise, first = (array.isel({SPECTRUM_STEP: 0}, drop=True) for array in (_noise(spectra), high))
    last, place = _last(high, steps, completed, SPECTRUM_STEP)
    return _median((last / first).where((first > noise) & (place > 0)))


def _noise(spectra: xr.DataArray) -> xr.DataArray:
    return xr.apply_ufunc(noise_level, spectra, input_core_dims=[["wavenumber"]])


def _median(array: xr.DataArray) -> float | None:
    values = array.values[np.isfinite(array.values)]
    return float(f"{np.median(values):.4g}") if len(values) else None
