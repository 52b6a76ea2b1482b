"""How stable a rollout was, from the ledger that it carries."""

import numpy as np
import xarray as xr

from physml.errors import DataError
from physml.forecast.ledgers import SPECTRUM_STEP
from physml.metrics.spectra import NOISE

PREFIX = "ledger_energy_"


def stability(prediction: xr.Dataset) -> dict[str, dict[str, float | None]]:
    """By variable of a forecast, the median over its trajectories (and members):

    - "energy drift": change of the area-weighted mean square from the initial state to the last good frame, relative to
      the initial one;
    - "small scales": energy in the upper half of the resolved wavenumbers, last over first spectrum; None without
      spectra, or where the initial state has no such energy.

    Raises DataError for a dataset that `physml.forecast` did not make.
    """
    completed = _completed(prediction)
    result = {}
    for name in _variables(prediction):
        energy = _folded(prediction[PREFIX + name], ("lead",))
        initial = np.ravel(np.asarray(prediction[PREFIX + name].attrs["initial"], np.float64))
        last = np.where(completed > 0, energy[np.arange(len(energy)), np.maximum(completed - 1, 0)], initial)
        with np.errstate(divide="ignore", invalid="ignore"):
            drift = (last - initial) / initial
        result[name] = {"energy drift": _median(drift), "small scales": _small_scales(prediction, name, completed)}
    return result


def blow_ups(prediction: xr.Dataset) -> dict[str, int | None]:
    """How many trajectories (times members) diverged, and the first and the median step at which they did.

    Raises DataError for a dataset that `physml.forecast` did not make.
    """
    completed = _completed(prediction)
    asked = int(prediction.attrs.get("steps_asked", prediction.sizes["lead"]))
    steps = completed[completed < asked] + 1
    found = (int(steps.min()), int(np.median(steps))) if len(steps) else (None, None)
    return {"trajectories": len(completed), "diverged": len(steps), "first at step": found[0], "median": found[1]}


def _completed(prediction: xr.Dataset) -> np.ndarray:
    if "steps_completed" not in prediction or not _variables(prediction):
        raise DataError("The dataset holds no ledger: it is no forecast. Make one with physml.forecast or rollout.")
    return np.ravel(prediction["steps_completed"].values)


def _variables(prediction: xr.Dataset) -> list[str]:
    return [str(name).removeprefix(PREFIX) for name in prediction.data_vars if str(name).startswith(PREFIX)]


def _folded(array: xr.DataArray, last: tuple[str, ...]) -> np.ndarray:
    """All leading dimensions in one."""
    array = array.transpose(..., *last)
    return np.asarray(array.values, np.float64).reshape(-1, *array.shape[-len(last) :])


def _small_scales(prediction: xr.Dataset, name: str, completed: np.ndarray) -> float | None:
    variable = f"ledger_spectrum_{name}"
    if variable not in prediction:
        return None
    resolved = int(prediction["wavenumber"].attrs["resolved_shells"])
    spectra = _folded(prediction[variable], (SPECTRUM_STEP, "wavenumber"))
    steps = prediction[SPECTRUM_STEP].values
    row = np.searchsorted(steps, completed, side="right") - 1  # the last one of a good frame
    high = spectra[:, :, resolved // 2 + 1 : resolved + 1].sum(-1)
    first, last = high[:, 0], high[np.arange(len(high)), row]
    there = first > NOISE * spectra[:, 0].sum(-1)
    return _median(np.divide(last, first, out=np.full(len(high), np.nan), where=there & (row > 0)))


def _median(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(f"{np.median(values):.4g}") if len(values) else None
