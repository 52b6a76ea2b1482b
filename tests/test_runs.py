"""Run folders: what is trained in the place of another, goes on, and says what it is."""

import dataclasses
import json

import numpy as np
import pytest

import physml
from physml import api, coding
from physml.data import SyntheticConfig
from physml.errors import ConfigError, DataError
from physml.experiment import Evaluation, Experiment
from physml.models import FNOConfig
from physml.runs import claimed, open_run
from physml.training import TrainingConfig

TINY = Experiment(
    name="tiny",
    data=SyntheticConfig(
        "burgers", points=16, trajectories={"train": 2, "valid": 1, "test": 1}, steps=6, options={"solver_points": 32}
    ),
    model=FNOConfig(width=4, modes=(4,), depth=1),
    training=TrainingConfig(steps=4, batch=4, checkpoint_every=2, log_every=1),
    evaluation=Evaluation(steps=3, metrics=("rmse",)),
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHYSML_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def train(folder, *overrides, experiment=TINY, **options):
    return api.train(experiment, overrides, folder=folder, scored=False, **options)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(run):
    return json.loads((run.folder / "model" / "config.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        "training.monitor=nope",
        "training.optimizer.groups=[{pattern: nothing, learning_rate: 0}]",
        "training.optimizer.learning_rate=1e30",
    ],
)
def test_what_replaces_a_run_and_never_begins_gives_it_back(tmp_path, change):
    run = train(tmp_path)
    before = content(run.folder)
    with pytest.raises((ConfigError, physml.errors.DivergedError)):
        train(tmp_path, change, "training.optimizer.schedule=constant", "training.log_every=4", overwrite=True)
    assert content(run.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    train(tmp_path, "seed=1", overwrite=True)
    found = open_run(tmp_path / "tiny")
    assert found.experiment.seed == 1
    assert found.history[-1]["step"] == found.experiment.training.steps
    assert {record["kind"] for record in found.history} >= {"train"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_run_that_a_killed_process_set_aside_comes_back(tmp_path):
    run = train(tmp_path)
    before = content(run.folder)
    run.folder.rename(tmp_path / ".tiny.old")  # killed between setting it aside and the first record
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ConfigError, match="already holds a run"), claimed(tmp_path / "tiny", TINY, "never", False):
        pass
    assert content(tmp_path / "tiny") == before
    (tmp_path / ".tiny.old").mkdir()  # killed later: what replaces it has begun
    train(tmp_path, "training.steps=6", resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_of_others_is_left_alone(tmp_path):
    for name in ("tiny", ".tiny.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not a run folder"), claimed(tmp_path / "tiny", TINY, "never", True):
        pass
    assert sorted(map(str, content(tmp_path))) == [".tiny.old/notes.txt", "tiny/notes.txt"]


def test_a_run_goes_on_for_longer(tmp_path):
    train(tmp_path)
    more = ("training.steps=6", "training.validate_every=3", "training.keep=3")
    longer = train(tmp_path, *more, resume="auto")
    assert longer.experiment.training.steps == 6
    assert (longer.folder / "checkpoints" / "6").is_dir()
    with pytest.raises(ConfigError, match=r"other settings of \['seed', 'training.batch'\]"):
        train(tmp_path, "training.batch=8", "seed=3", resume="auto")


def test_a_run_resumes_itself_only(tmp_path):
    run = train(tmp_path)
    for resume in (str(run.folder), "Auto"):
        with pytest.raises(ConfigError, match="'auto' or 'never' was expected.*start_from"):
            train(tmp_path, resume=resume, overwrite=True)
    assert (run.folder / "model").is_dir()


def test_saved_models_say_how_they_were_trained(tmp_path):
    run = train(tmp_path)
    assert config_of(run)["extra"] == {"run": "tiny", "seed": 0, "step": 4}
    members = train(tmp_path, experiment=dataclasses.replace(TINY, name="two", seeds=(3, 7)))
    extra = config_of(members)["extra"]
    assert extra == {"run": "two", "seeds": [3, 7], "diverged": {}, "step": 4}
    assert "seeds" in (members.folder / "model" / "README.md").read_text()


def test_trackers_are_told_the_experiment(tmp_path):
    class Tracker:
        def start(self, config):
            self.config = config

        def log(self, step, values):
            pass

        def finish(self):
            pass

    for seeds in ((), (3, 7)):
        tracker, experiment = Tracker(), dataclasses.replace(TINY, name=f"of{len(seeds)}", seeds=seeds)
        train(tmp_path, experiment=experiment, tracker=tracker)
        assert coding.from_dict(Experiment, json.loads(json.dumps(tracker.config))) == experiment


def test_damaged_scores_are_said_to_be(tmp_path):
    run = api.train(TINY, folder=tmp_path)
    assert np.isfinite(run.scores["score"].sel(model="tiny")).all()
    path = run.folder / "scores.nc"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="scores.nc"):
        _ = open_run(run.folder).scores
