"""Generated data behaves like any dataset, and is solved only once."""

import subprocess
import sys

import numpy as np
import pytest

from physml import coding
from physml.data import SyntheticConfig, cache_folder
from physml.data import synthetic as module
from physml.errors import ConfigError

TINY = {"solver_points": 32, "length": 16.0, "warmup": 1.0, "substeps": 4, "initial_modes": 4}


def tiny(folder, **fields):
    fields = {"points": 16, "trajectories": {"train": 3, "valid": 1, "test": 2}, "steps": 4, "options": TINY, **fields}
    return SyntheticConfig("kuramoto_sivashinsky", cache=str(folder), **fields)


def test_splits_open_as_datasets(tmp_path):
    splits = tiny(tmp_path, test_steps=6, time_step=0.1).open()
    assert {name: data.lengths for name, data in splits.items()} == {"train": (5, 5, 5), "valid": (5,), "test": (7, 7)}
    spec = splits["train"].spec
    assert (spec.names, spec.grid.shape, spec.grid.periodic) == (("u",), (16,), (True,))
    assert spec.time_step == pytest.approx(0.1)
    assert all(data.spec == spec for data in splits.values())
    window = splits["test"].read(1, range(2, 5))
    assert window.frames.shape == (3, 16, 1)
    assert window.frames.dtype == np.float32
    starts = np.stack(
        [data.read(i, range(1)).frames.ravel() for data in splits.values() for i in range(len(data.lengths))]
    )
    assert abs(np.corrcoef(starts) - np.eye(6)).max() < 0.999  # no trajectory twice


def test_drawn_parameters_condition_the_model(tmp_path):
    config = tiny(tmp_path, options={**TINY, "viscosity": (0.8, 1.2)}, trajectories={"train": 2, "valid": 0, "test": 0})
    splits = config.open()
    assert list(splits) == ["train"]
    assert [channel.name for channel in splits["train"].spec.parameters] == ["viscosity"]
    values = [float(splits["train"].read(i, range(2)).parameters[0]) for i in range(2)]
    assert values[0] != values[1]
    assert all(0.8 < value < 1.2 for value in values)


def test_the_cache_is_used_and_keyed_by_everything(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    config.open()
    files = sorted(tmp_path.rglob("*.nc"))
    assert len(files) == 3
    monkeypatch.setattr("physml.data.generate.Ensemble", None)  # nothing may be solved again
    tiny(tmp_path).open()
    changes = [{"seed": 1}, {"steps": 5}, {"points": 8}, {"time_step": 0.3}, {"options": {**TINY, "viscosity": 1.1}}]
    paths = {tiny(tmp_path, **change).path("train") for change in changes}
    assert len(paths | {config.path("train")}) == 6
    more_tests = tiny(tmp_path, trajectories={"train": 3, "valid": 1, "test": 5})
    assert more_tests.path("train") == config.path("train")
    assert more_tests.path("test") != config.path("test")
    before = config.path("train")
    monkeypatch.setattr("physml.data.generate.FORMAT_VERSION", -1)
    assert config.path("train") != before


def test_processes_that_open_at_once_agree(tmp_path):
    """Two processes want the same data: each gets it whole, and nothing else is left."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_synthetic import tiny; data = tiny(sys.argv[2]).open();"
        "print(float(abs(data['train'].read(2, range(5)).frames).sum()), len(data['test'].lengths))"
    )
    command = [sys.executable, "-c", script, __file__.rpartition("/")[0], str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sorted(path.suffix for path in (tmp_path / "generated").iterdir()) == [".nc"] * 3


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYSML_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert SyntheticConfig("burgers").path("train").is_relative_to(tmp_path / "here")
    monkeypatch.delenv("PHYSML_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "physml")


def test_configs_survive_the_way_through_plain_containers(tmp_path):
    config = tiny(tmp_path, options={**TINY, "viscosity": (0.8, 1.2)})
    assert config.trajectories == module.Counts(3, 1, 2)
    assert coding.from_dict(SyntheticConfig, coding.to_dict(config)) == config
    assert hash(config) == hash(tiny(tmp_path, options={**TINY, "viscosity": (0.8, 1.2)}))


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("ks", {}, ["'ks'", "kuramoto_sivashinsky"]),
        ("burgers", {"options": {"viscocity": 1.0}}, ["viscocity", "Did you mean 'viscosity'"]),
        ("burgers", {"points": 64, "options": {"points": 32}}, ["points is given twice"]),
        ("burgers", {"points": 5000}, ["points is 5000", "1024"]),
        ("burgers", {"trajectories": {"training": 3}}, ["training", "Did you mean 'train'"]),
        ("burgers", {"trajectories": {"train": -3}}, ["trajectories is -3"]),
        ("burgers", {"steps": 0}, ["steps is 0"]),
    ],
)
def test_a_mistake_is_named(name, fields, parts):
    with pytest.raises(ConfigError) as caught:
        SyntheticConfig(name, **fields)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_masks_and_parameters_of_a_flow_with_walls_reach_the_windows(tmp_path):
    counts, options = {"train": 2, "valid": 0, "test": 1}, {"solver_points": 32, "velocity": (0.1, 0.2)}
    config = SyntheticConfig("dam", 16, counts, 2, options=options, cache=str(tmp_path))
    window = config.open()["train"].read(1, range(2))
    assert window.spec.names == ("u", "v")
    assert [channel.name for channel in window.spec.static] == ["mask"]
    assert 0 < window.mask.mean() < 1  # the barrier
    np.testing.assert_array_equal(window.mask, np.repeat(window.static, 2, axis=-1) > 0)
    assert len(window.parameters) == len(config.solver.drawn) > 0
