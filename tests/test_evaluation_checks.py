"""What an evaluation cannot do is said before a training that ends with it."""

import contextlib
import dataclasses

import every_stepper
import numpy as np
import pytest
import xarray as xr

from physml import api
from physml.data import DataConfig, SyntheticConfig, XarrayDataset
from physml.data.synthetic import Counts
from physml.errors import ConfigError, DataError
from physml.evaluate import check_evaluation
from physml.experiment import Evaluation, Experiment
from physml.models import FNOConfig
from physml.steppers import DirectConfig
from physml.training import TrainingConfig


@pytest.fixture
def burgers(tmp_path):
    """Trajectories of five frames, for one update."""
    data = SyntheticConfig(
        "burgers", points=16, steps=4, trajectories={"train": 2, "valid": 1, "test": 2}, options={"solver_points": 32},
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    model, training = FNOConfig(modes=(2,), width=4, depth=1), TrainingConfig(steps=1, batch=4)
    return Experiment(data=data, model=model, training=training)


@pytest.mark.parametrize(
    ("evaluation", "seeds", "error"),
    [
        ({"steps": 9, "starts": 1}, (), (DataError, "need trajectories of 10 frames, but the longest has 5")),
        ({"floors": ("extrapolation",), "steps": 4, "starts": 1}, (), (DataError, "2 frames of history")),
        ({"metrics": ("crps_fair",)}, (), (ConfigError, "scores ensembles")),
        ({"metrics": ("acc",)}, (), (ConfigError, "compares with a climatology")),
        ({"spectrum_leads": (5,)}, (), (ConfigError, "leads count from 1 to 2")),
        ({"members": 3}, (), (ConfigError, "draws no random numbers")),
        ({"members": 4}, (0, 1), (ConfigError, "draws no random numbers")),
        ({"members": 3}, (0, 1), (ConfigError, "ensemble of 2: use a multiple")),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_training(tmp_path, burgers, evaluation, seeds, error):
    evaluation = Evaluation(**{"steps": 2, "floors": ("persistence",), **evaluation})
    experiment = dataclasses.replace(burgers, seeds=seeds, evaluation=evaluation)
    with pytest.raises(error[0], match=error[1]):
        api.train(experiment, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_leads_without_truth_are_not_rolled_out(tmp_path, burgers, caplog):
    experiment = dataclasses.replace(burgers, evaluation=Evaluation(steps=500, floors=("extrapolation",)))
    with caplog.at_level("WARNING", "physml"):
        run = api.train(experiment, folder=tmp_path / "runs")
    assert run.scores.sizes["lead"] == 3  # of 5 frames two are history of the floor
    assert "steps is 500, but the trajectories scored on have truth for 3" in caplog.text


@pytest.mark.parametrize(("frame", "split"), [(21, "valid"), (27, "test")])
def test_a_gap_in_a_later_split_is_found_before_training(tmp_path, frame, split):
    """It was found when the split was scored, after the whole training."""
    u = np.random.default_rng(0).normal(size=(30, 8)).astype("f4")
    u[frame, 3] = np.nan
    coords = {"time": np.arange(30.0), "x": np.arange(8) / 8}
    xr.Dataset({"u": (("time", "x"), u)}, coords).to_netcdf(tmp_path / "u.nc")
    experiment = Experiment(
        data=DataConfig(str(tmp_path / "u.nc"), train=(0, 18), valid=(18, 24), test=(24, 30)),
        model=FNOConfig(modes=(2,), width=4, depth=1), training=TrainingConfig(steps=1, batch=4),
        evaluation=Evaluation(steps=2),
    )  # fmt: skip
    with pytest.raises(DataError, match=f"u.nc: variable 'u' has NaN at time index {frame} "):
        api.train(experiment, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def without_time(tmp_path):
    """Coefficient to solution: trajectories of a single frame, and a stepper that starts from none."""
    data = SyntheticConfig("darcy_flow", 8, Counts(8, 2, 3), options={"modes": 8}, cache=str(tmp_path / "cache"))
    return Experiment(
        data=data, model=FNOConfig(modes=(2, 2), width=4, depth=1), stepper=DirectConfig(history=0),
        training=TrainingConfig(steps=1, batch=4), evaluation=Evaluation(steps=1, metrics=("rmse",)),
    )  # fmt: skip


@pytest.mark.parametrize("floors", [None, ("climatology",), ()])
def test_a_problem_without_time_is_scored_beside_the_mean_of_its_solutions(tmp_path, without_time, floors):
    evaluation = dataclasses.replace(without_time.evaluation, floors=floors)
    run = api.train(dataclasses.replace(without_time, evaluation=evaluation), folder=tmp_path / "runs")
    assert list(run.scores.model.values) == ["run", *(["climatology"] if floors is None else floors)]
    assert np.isfinite(run.scores.score).all()


def test_a_floor_that_needs_a_frame_is_refused_where_there_is_none(tmp_path, without_time):
    evaluation = dataclasses.replace(without_time.evaluation, floors=("persistence",))
    with pytest.raises(ConfigError, match="'persistence' starts from a frame.*Use floors="):
        api.train(dataclasses.replace(without_time, evaluation=evaluation), folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="'residual' is no floor"):
        Evaluation(floors=("residual",))


@pytest.mark.parametrize("name", every_stepper.OPTIONS)
def test_which_steppers_draw_random_numbers_is_known_before_training(name):
    stepper = every_stepper.stepper_of(name)
    data = XarrayDataset(every_stepper.data_of(name), stepper.spec)
    random = name in ("refiner", "gaussian")
    with contextlib.nullcontext() if random else pytest.raises(ConfigError, match="draws no random numbers"):
        check_evaluation(stepper, data, 2, members=2)
    check_evaluation(stepper, data, 2, members=2, seeds=2)
