"""Scores: forecasts against the truth, floors beside them, intervals over starts.

`evaluate` takes labelled forecasts or a stepper; `evaluate_stepper` does the rollouts itself; `save_scores` and
`load_scores` keep the result in files.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import xarray as xr

from physml.coding import whole_number
from physml.data import XarrayDataset
from physml.data.labelled import MASKED_BY, with_mask_of
from physml.errors import ConfigError, suggest
from physml.evaluate.agreement import predictability
from physml.evaluate.forecasts import evaluate_forecasts
from physml.evaluate.labels import first_leads
from physml.evaluate.planning import check_evaluation, plan_starts
from physml.evaluate.rollouts import evaluate_stepper, sample_dataset
from physml.evaluate.validation import RolloutScores, RolloutValidation
from physml.metrics.table import load_scores, save_scores, to_csv, to_plain, to_rows


def evaluate(
    prediction: Any,
    truth: Any,
    *,
    metrics: str | Sequence[str] | dict | None = None,
    climatology: Any = None,
    floors: Any = (),
    leads: int | None = None,
    name: str = "model",
    **options: Any,
) -> xr.Dataset:
    """Scores per lead and channel, with an interval over trajectories or start dates, floors beside the model.

    Args:
        prediction: a forecast as `physml.forecast` gives it (dims `trajectory, lead, ...`, coordinate `time` = valid
            time) or with starts and leads under other usual names (`init_time` or `time`, `prediction_timedelta`), an
            ensemble of them, a dict of such by name, or a stepper to be rolled out.
        truth: a dataset with a coordinate `time` that holds all valid times; for a stepper also a `contracts.Dataset`.
        metrics: names of `physml.metrics.METRICS` (forecasts: also of `FORECAST_METRICS`) or own `Metric`s by name; all
            that apply by default.
        climatology: for ACC, skill and SEEPS. Forecasts: a dataset with dims among dayofyear (366), month (12) and
            hour, or the mean state. Steppers: a stepper.
        floors: names among "persistence" and "climatology"; for a stepper a dict name -> stepper.
        leads: frames to predict, for a stepper; of forecasts only the first so many are scored.
        name: of the model in the result.
        options: of `evaluate_stepper`; for forecasts `inputs` (frames or times that went in), `spectrum_leads`,
            `thresholds`, `batch`, `draws`, `level`, and `scheduler`: threads of this process, or the address of a
            dask.distributed cluster. Forecasts and truth may be far larger than memory, see `evaluate_forecasts`.

    Returns a dataset with `score (model, metric, channel, lead)`, its interval, and more: see
    `evaluate.scores.assemble`. Raises SpecError when input and target times overlap, when units or grids differ,
    DataError when the truth has none of the valid times, and ConfigError for what is neither forecast, stepper nor
    truth and for options that cannot work.
    """
    leads = None if leads is None else whole_number("leads", leads)
    if hasattr(prediction, "advance"):
        if leads is None:
            raise ConfigError("A stepper is rolled out to be scored: say how far with `leads=`.")
        if not isinstance(truth, xr.Dataset) and not hasattr(truth, "read"):
            raise ConfigError(
                f"evaluate got a {type(truth).__name__} as truth of a stepper, but an xarray Dataset or a Dataset of "
                "physml was expected. Open a file with physml.open_dataset(path)."
            )
        _check_options(evaluate_stepper, options, "a stepper")
        dataset = truth
        if isinstance(truth, xr.Dataset):
            dataset = XarrayDataset(truth, with_mask_of(truth, prediction.spec))
        return evaluate_stepper(
            prediction, dataset, leads, metrics=metrics, climatology=climatology, floors=floors or None, name=name,
            **options
        )  # fmt: skip
    predictions = prediction if isinstance(prediction, dict) else {name: prediction}
    for label, ds in predictions.items():
        if not isinstance(ds, xr.Dataset) or not isinstance(truth, xr.Dataset):
            raise ConfigError(
                f"evaluate got a {type(ds).__name__} called {label!r} and a {type(truth).__name__} as truth, but two "
                "xarray Datasets, or a stepper and a Dataset, were expected."
            )
    _check_options(evaluate_forecasts, options, "a forecast")
    if leads is not None:
        predictions = {label: first_leads(label, ds, leads) for label, ds in predictions.items()}
    return evaluate_forecasts(
        predictions,
        _masked(truth, predictions),
        metrics=metrics,
        climatology=climatology,
        floors=floors or (),
        **options,
    )


def _masked(truth: xr.Dataset, predictions: dict[str, xr.Dataset]) -> xr.Dataset:
    """The truth, NaN where its variable is 0 that masked the forecasts."""
    for name in {ds.attrs[MASKED_BY] for ds in predictions.values() if MASKED_BY in ds.attrs} & {*truth.data_vars}:
        exists = truth[name] != 0
        fields = {key: field for key, field in truth.data_vars.items() if {*exists.dims} <= {*field.dims}}
        moving = {key: field.where(exists) for key, field in fields.items() if key != name and field.dtype.kind == "f"}
        truth = truth.assign(moving)
    return truth


def _check_options(function: Callable, options: dict[str, Any], what: str) -> None:
    """Raises ConfigError for an option that `function` does not have."""
    valid = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in valid:
            raise ConfigError(f"evaluate has no option {name!r} for {what}." + suggest(name, valid))


__all__ = [
    "RolloutScores",
    "RolloutValidation",
    "check_evaluation",
    "evaluate",
    "evaluate_forecasts",
    "evaluate_stepper",
    "load_scores",
    "plan_starts",
    "predictability",
    "sample_dataset",
    "save_scores",
    "to_csv",
    "to_plain",
    "to_rows",
]
