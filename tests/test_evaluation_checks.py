"""What an evaluation cannot do is said before a training that ends with it."""

import contextlib

import every_stepper
import pytest

from physml import api
from physml.data import SyntheticConfig, XarrayDataset
from physml.errors import ConfigError, DataError
from physml.evaluate import check_evaluation
from physml.experiment import Evaluation, Experiment
from physml.models import FNOConfig
from physml.training import TrainingConfig


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
def test_an_evaluation_that_cannot_work_is_refused_before_training(tmp_path, evaluation, seeds, error):
    data = SyntheticConfig(
        "burgers", points=16, steps=4, trajectories={"train": 2, "valid": 1, "test": 2}, options={"solver_points": 32},
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    experiment = Experiment(
        data=data, model=FNOConfig(modes=(2,), width=4, depth=1), training=TrainingConfig(steps=1, batch=4),
        seeds=seeds, evaluation=Evaluation(**{"steps": 2, "floors": ("persistence",), **evaluation}),
    )  # fmt: skip
    with pytest.raises(error[0], match=error[1]):
        api.train(experiment, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", every_stepper.OPTIONS)
def test_which_steppers_draw_random_numbers_is_known_before_training(name):
    stepper = every_stepper.stepper_of(name)
    data = XarrayDataset(every_stepper.data_of(name), stepper.spec)
    random = name in ("refiner", "gaussian")
    with contextlib.nullcontext() if random else pytest.raises(ConfigError, match="draws no random numbers"):
        check_evaluation(stepper, data, 2, members=2)
    check_evaluation(stepper, data, 2, members=2, seeds=2)
