"""Experiments: strict to read, exact to write, and able to build what they describe."""

import dataclasses
from pathlib import Path

import pytest

from physml.errors import ConfigError
from physml.experiment import Evaluation, Experiment, load_experiment, to_yaml
from physml.objectives import Curriculum
from physml.parallel.mesh import Layout
from physml.saving import StartFrom

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted(path for path in EXPERIMENTS.glob("*.py") if "config = Experiment" in path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_experiments_survive_yaml(path, tmp_path):
    experiment = load_experiment(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(experiment))
    assert load_experiment(copy) == experiment


def test_overrides_reach_nested_fields_and_are_checked():
    experiment = load_experiment(Experiment(), ["training.batch=3", "layout.data=2", "stepper=direct"])
    assert experiment.training.batch == 3
    assert experiment.layout.data == 2
    assert type(experiment.stepper).__name__ == "DirectConfig"
    for bad, said in (("training.bach=3", "batch"), ("seed=one", "seed"), ("stepper.history=-1", "history")):
        with pytest.raises(ConfigError, match=said):
            load_experiment(Experiment(), [bad])


def test_what_python_writes_is_checked_like_what_yaml_holds():
    """Python checks no types: a float for a count failed after the training."""
    for kind, field, said in (
        (Evaluation, {"steps": 3e4}, r"steps is 30000\.0 \(float\).*integer"),
        (Evaluation, {"starts": "2"}, r"starts is '2' \(str\).*integer"),
        (Experiment, {"seed": 1.5}, r"seed is 1\.5 \(float\).*integer"),
        (Experiment, {"seeds": (1, 1)}, r"seeds are \(1, 1\), but each may be there once"),
        (Layout, {"data": "2"}, r"data is '2' \(str\).*integer"),
        (StartFrom, {"path": "a", "strict": "no"}, r"strict is 'no' \(str\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            kind(**field)
    with pytest.raises(ConfigError, match="not registered"):
        load_experiment(Experiment(model=object()))
    written = Experiment(seeds=[0, 1], objective=Curriculum(steps=[1, 2]))
    assert load_experiment(written) == Experiment(seeds=(0, 1), objective=Curriculum(steps=(1, 2)))


def test_evaluation_names_are_checked():
    with pytest.raises(ConfigError, match="persistence"):
        Evaluation(floors=("persistance",))
    with pytest.raises(ConfigError, match="rmse"):
        Evaluation(metrics=("rsme",))
    assert Evaluation(floors="persistence", metrics="rmse") == Evaluation(floors=("persistence",), metrics=("rmse",))


def test_members_of_an_evaluation_are_counted():
    assert load_experiment(Experiment(), ["evaluation.members=4"]).evaluation == Evaluation(members=4)
    with pytest.raises(ConfigError, match="members >= 0"):
        Evaluation(members=-1)


def test_yaml_is_never_executed(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch evil']\n")
    with pytest.raises(ConfigError, match="YAML"):
        load_experiment(path)


def test_a_mistyped_experiment_file_is_found(tmp_path):
    for name in ("waves.yaml", "waves.nc", ".wavs.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"Did you mean 'waves\.yaml'\? Its folder has waves\.yaml\.$"):
        load_experiment(tmp_path / "wavse.yaml")


def test_a_file_without_a_config_says_what_it_has(tmp_path):
    for text, message in (
        ("x = 1", r"there is no `config`\.$"),
        ("from physml import Experiment\nmine = Experiment()", r"there is no `config`\. Rename `mine` to `config`\."),
        ("config = 3", "`config` is of type int"),
    ):
        (tmp_path / "e.py").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_experiment(tmp_path / "e.py")


def test_names_stay_inside_the_runs_folder():
    for name in ("", "../x", "a/b"):
        with pytest.raises(ConfigError, match="name"):
            dataclasses.replace(Experiment(), name=name)
