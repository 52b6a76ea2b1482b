"""`physml rollout`: any saved model with any stepper, for as many steps as asked, streamed and watched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from physml.verbs.common import Common, at_least, check_trajectory, frames_until, in_files, progress_of


@dataclass(frozen=True, kw_only=True)
class Rollout(Common):
    """Forecast with a saved model, from the last frames of a dataset.

    Example: physml rollout runs/demo --initial start.nc --steps 10000 --out forecast.zarr
    Example: physml rollout runs/demo --steps 10000 --out forecast.zarr --resume auto
    """

    model: tyro.conf.Positional[str]
    """A run, or a folder made by `physml.save`."""
    initial: Annotated[str | None, tyro.conf.arg(aliases=("--data",))] = None
    """Dataset whose last frames the forecast starts from; without it, for a run, its own test split: the first frames
    of one trajectory."""
    steps: int = 100
    """Number of frames to predict."""
    out: Path = Path("forecast.zarr")
    """Where the forecast is streamed to: .zarr or .nc."""
    at: Annotated[str | None, tyro.conf.arg(aliases=("--start",))] = None
    """Start at this time (a date or a number) or frame (#12) instead of the last one."""
    trajectory: int | None = None
    """Take one trajectory of the dataset instead of all (of a run's own test split: instead of the first)."""
    forcing: str | None = None
    """Dataset of prescribed fields over the forecast, when they are not in --initial."""
    masked: Literal["auto", "yes", "no"] = "auto"
    """Whether NaN at the start, and zeros of the mask of training, mean cells without a field; auto: as in the training
    data. yes also lets --initial lack variables, as parts of a mixture may."""
    chunk: int | None = None
    """Frames held in memory at once."""
    seed: int = 0
    """Of the random numbers of a stochastic stepper, e.g. a refiner."""
    members: int | None = None
    """Members of an ensemble, along the dimension `member`; a model of several seeds gives its own without it."""
    perturb: float | None = None
    """Random fields added to the initial state of every member, in standard deviations of the training data."""
    perturb_kind: Literal["smooth", "white"] = "smooth"
    """Whether neighboring points of these fields agree."""
    store_every: int = 1
    """Steps from one stored frame to the next; all are computed and watched."""
    spectrum_every: int | None = None
    """Steps from one stored energy spectrum to the next (0: none); by default fifty to a hundred are stored."""
    on_divergence: Literal["raise", "stop", "flag"] = "stop"
    """What to do when a trajectory leaves the finite numbers."""
    limit: float = 100.0
    """Standard deviations beyond the training data and the initial state that count as diverged; inf: only numbers that
    are not finite do."""
    constraint: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Physics to project onto after every step, NAME:CHANNELS[:OPTION=VALUE], e.g. mass:rho; may be repeated. `none`
    takes off those that the model was saved with."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue an unfinished rollout to --out, if there is one, and leave a finished one as it is; exit code 75
    says that an unfinished one was left."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> dict[str, Any]:
        import jax

        from physml import saving
        from physml.data import open_dataset
        from physml.errors import ConfigError
        from physml.forecast import blow_ups, check_forecast, forecast, stability
        from physml.forecast.stores import check_out

        stepper = saving.load(self.model)
        if not hasattr(stepper, "advance"):
            raise ConfigError(f"{self.model} is a bare model without names and units. Roll out a saved stepper.")
        if self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}, but at least 1 frame must be predicted.")
        stepper = self._constrained(stepper)
        experiment = self._experiment()
        if self.forcing and not stepper.spec.forcing:
            raise ConfigError(f"--forcing is {self.forcing}, but {self.model} takes no forcing. Leave it out.")
        if self.dry_run and experiment is not None and not in_files(experiment.data):
            if not (self.resume == "auto" and self.out.exists()):
                check_out(self.out, self.overwrite, self.resume)
            start = "data that are generated when the rollout starts, so not checked"
            return {"would write": str(self.out), "steps": self.steps, "from": start}
        initial, forcing = self._initial(experiment, stepper.history)
        forcing = open_dataset(self.forcing) if self.forcing else forcing
        options = {
            "out": self.out, "forcing": forcing, "chunk": self.chunk, "overwrite": self.overwrite,
            "on_divergence": self.on_divergence, "key": jax.random.key(self.seed), "members": self.members,
            "perturb": self.perturb, "perturb_kind": self.perturb_kind, "resume": self.resume,
            "store_every": self.store_every, "limit": self.limit,
            "masked": {"auto": None, "yes": True, "no": False}[self.masked],
            "spectrum_every": "auto" if self.spectrum_every is None else self.spectrum_every or None,
        }  # fmt: skip
        if self.dry_run:
            check_forecast(stepper, initial, self.steps, **options)
            return {"would write": str(self.out), "steps": self.steps, "from": dict(initial.sizes)}
        with progress_of(self, "rolling out") as progress:
            prediction = forecast(stepper, initial, self.steps, **options, progress=progress.update)
        sizes = {str(name): int(size) for name, size in prediction.sizes.items()}
        agreement = self._agreement(prediction, stepper)
        completed = [int(steps) for steps in prediction["steps_completed"].values.ravel()]
        return {
            "forecast": str(self.out), "sizes": sizes, "steps completed": completed, "blow-ups": blow_ups(prediction),
            "stability": stability(prediction), **agreement,
        }  # fmt: skip

    def _agreement(self, prediction: Any, stepper: Any) -> dict[str, Any]:
        """From when on the members of an ensemble say that it is likely inaccurate, the mean over trajectories."""
        import math

        from physml.evaluate import predictability
        from physml.metrics.table import seconds_or_numbers

        if prediction.sizes.get("member", 1) < 2 or math.prod(stepper.spec.grid.shape) < 2:
            return {}
        found, result = predictability(prediction), {}
        for name in (name for name in found.data_vars if f"{name}_capped" in found.data_vars):
            times = found[name].values
            mean, unit = sum(seconds_or_numbers(times)) / len(times), " s" if times.dtype.kind == "m" else ""
            shown = f"{mean:.5g}{unit}"
            result[name.removeprefix("inaccurate_from_")] = at_least(shown, bool(found[f"{name}_capped"].any()))
        return {"likely inaccurate from": result}

    def _constrained(self, stepper: Any) -> Any:
        if not self.constraint:
            return stepper
        from physml.constraints.text import from_text
        from physml.steppers.constrained import constrain

        named = [from_text(text) for text in self.constraint if text != "none"]
        return constrain(stepper, *named, keep="none" not in self.constraint)

    def _experiment(self) -> Any:
        """The one whose data the forecast starts from; None with --initial."""
        from physml.errors import ConfigError

        if self.initial is not None:
            return None
        if not (Path(self.model) / "config.yaml").is_file():
            raise ConfigError(f"{self.model} is no run with data of its own: give --initial FILE to start from.")
        from physml.runs import open_run

        return open_run(self.model).experiment

    def _initial(self, experiment: Any, history: int) -> tuple[Any, Any]:
        """Where the forecast starts, and where its forcing may come from."""
        from physml.data import open_dataset
        from physml.errors import ConfigError

        if self.initial is not None:
            data = open_dataset(self.initial)
            start = frames_until(data, self.at, self.trajectory)
            return start, None if self.at is None else frames_until(data, None, self.trajectory)
        with progress_of(self, "generating") as progress:
            splits = experiment.data.open(progress)
        if "test" not in splits:
            raise ConfigError(f"The data of {self.model} has no test split: give --initial FILE to start from.")
        if not hasattr(splits["test"], "to_xarray"):
            raise ConfigError(f"The data of {self.model} are a mixture of several: give --initial FILE to start from.")
        trajectory = self.trajectory or 0
        check_trajectory(trajectory, len(splits["test"].lengths))
        whole = splits["test"].to_xarray(trajectory)
        if self.at is not None:
            return frames_until(whole, self.at, None), whole
        if "time" not in whole.dims:
            return whole, None
        return whole.isel(time=slice(0, max(history, 1))), whole
