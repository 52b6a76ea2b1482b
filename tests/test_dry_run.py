"""A dry run refuses what the real one would, and writes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from physml import cli


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Holds waves.nc and an experiment on it."""
    random = np.random.default_rng(0)
    fields = {name: (("time", "x"), random.normal(size=(20, 16)).astype("f4")) for name in ("u", "v")}
    coords = {"time": np.arange(20.0), "x": ("x", np.arange(16) / 16, {"periodic": 1})}
    xr.Dataset(fields, coords).to_netcdf(tmp_path / "waves.nc")
    experiment = {
        "name": "waves",
        "data": {"type": "files", "path": "waves.nc", "variables": ["u"], "forcing": ["v"]},
        "model": {"name": "fno", "width": 4, "modes": [4], "depth": 1},
        "training": {"steps": 2, "batch": 4},
    }
    (tmp_path / "waves.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def untrained(folder, own=False, **changes):
    """A run on waves.nc or other data, whose model was never trained: one for waves.nc, or for its `own` data."""
    from physml import api, saving
    from physml.experiment import load_experiment, to_yaml

    experiment = load_experiment(folder / "waves.yaml", [f"{name}={value}" for name, value in changes.items()])
    original = experiment if own else load_experiment(folder / "waves.yaml")
    run = folder / "runs/waves"
    run.mkdir(parents=True)
    saving.save(api.initial_stepper(original, original.data.open()["train"]), run / "model")
    (run / "config.yaml").write_text(to_yaml(experiment))
    return run


def listing(folder) -> list:
    """Every file below, and when it was changed; folders by name."""
    return [(str(path), path.is_file() and path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]


def call(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words), "--dry-run", "--json"])
    return stop.value.code or 0, *capsys.readouterr()


def test_training_says_what_it_would_train_on(capsys, folder):
    code, out, err = call(capsys, "train", "waves.yaml")
    assert code == 0, err
    found = json.loads(out)
    assert found["data"] == {
        "train": "1 trajectories, 16 frames on a grid (16,)",
        "valid": "1 trajectories, 2 frames on a grid (16,)",
        "test": "1 trajectories, 2 frames on a grid (16,)",
    }
    assert found["parameters"] > 0
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=nope.nc", "no file nope.nc"),
        ("data.variables=[w]", "no variable 'w'"),
        ("data.train=[]", "no split 'train'"),
        ("data=null", "has no data"),
        ("model=null", "has no model"),
        ("model.modes=[40]", "modes"),
        ("stepper.history=16", "no window of 17 frames"),
        ("start_from=nope", "nope"),
        ("constraints=[{name: mass, channels: [w]}]", "w"),
        ("layout.data=3", "3"),
        ("seed=-1", "whole numbers from 0 on"),
        ("evaluation.members=3", "draws no random numbers"),
        ("evaluation.metrics=[acc]", "compares with a climatology"),
        ("evaluation.starts=1", "need trajectories of 21 frames"),
        ("seeds=[1,1]", "each may be there once"),
        ("training.monitor=nope", "the validation gives ['valid/loss']"),
        ("training.optimizer.groups=[{pattern: nothing, learning_rate: 0}]", "nothing"),
        ("objective={name: curriculum, steps: [1, 2, 3]}", "curriculum"),
    ],
)
def test_training_checks_what_it_can(capsys, folder, change, message):
    code, _, err = call(capsys, "train", "waves.yaml", "--set", change)
    assert code == 2, err
    assert message in json.loads(err)["error"]


def test_training_refuses_a_folder_as_the_real_one(capsys, folder):
    run = folder / "runs/waves"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        code, _, err = call(capsys, "train", "waves.yaml", *more)
        assert code == 2
        assert "not a run folder" in err
    (run / "config.yaml").write_text((folder / "waves.yaml").read_text())
    (run / "metrics.jsonl").write_text("{}\n")
    code, _, err = call(capsys, "train", "waves.yaml")
    assert code == 2
    assert "already holds a run" in err
    assert call(capsys, "train", "waves.yaml", "--overwrite")[0] == 0
    assert call(capsys, "train", "waves.yaml", "--resume", "auto")[0] == 0
    code, _, err = call(capsys, "train", "waves.yaml", "--resume", "auto", "--set", "model.width=8")
    assert code == 2
    assert "other settings of ['model']" in err
    assert call(capsys, "train", "waves.yaml", "--resume", "auto", "--set", "training.steps=9")[0] == 0
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl", "notes.txt"]


@pytest.mark.parametrize("out", ["/proc/nowhere", "waves.nc/runs"])
def test_training_needs_a_folder_that_can_be_written(capsys, folder, out):
    code, _, err = call(capsys, "train", "waves.yaml", "--out", out)
    assert code == 2
    assert f"{out}/waves cannot be written" in err
    assert call(capsys, "train", "waves.yaml", "--out", "new/runs")[0] == 0
    assert not (folder / "new").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["waves.nc", "waves.yaml"]


def test_generated_data_are_not_generated(capsys, folder):
    change = "data={type: synthetic, name: burgers, cache: here}"
    code, out, err = call(capsys, "train", "waves.yaml", "--set", change)
    assert code == 0, err
    assert "generated when training starts" in json.loads(out)["data"]
    assert not (folder / "here").exists()


@pytest.mark.parametrize(("to", "message"), [("pdearena", "has no layout for u on"), ("the_well", "'when' is dates")])
def test_converting_checks_the_layout(capsys, folder, to, message):
    dates = ("time", np.datetime64("2001-01-01", "ns") + np.arange(20))
    with xr.open_dataset("waves.nc") as ds:
        ds.assign(when=dates).to_netcdf("dated.nc")
    code, _, err = call(capsys, "data", "convert", "dated.nc", "out", "--to", to)
    assert code == 2
    assert message in json.loads(err)["error"]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("suffix", [".nc", ".nc4", ".netcdf", ".zarr"])
def test_one_table_of_suffixes_holds_for_every_output(capsys, folder, suffix):
    run = untrained(folder)
    outs = [f"{name}{suffix}" for name in ("made", "converted", "forecast")]
    for words in (
        ["data", "generate", "burgers", "--out", outs[0]],
        ["data", "convert", "waves.nc", outs[1]],
        ["rollout", run, "--initial", "waves.nc", "--at", "#0", "--steps", 3, "--out", outs[2]],
    ):
        code, _, err = call(capsys, *words)
        assert code == 0, err


@pytest.mark.parametrize(("option", "message"), [("split=train", "no option 'split'"), ("format=zarr", "by itself")])
def test_options_that_a_file_lacks(capsys, folder, option, message):
    code, _, err = call(capsys, "data", "info", "waves.nc", "--option", option)
    assert code == 2
    assert message in json.loads(err)["error"]


def test_statistics_of_a_variable_that_is_named_twice(capsys, folder):
    code, _, err = call(capsys, "data", "stats", "waves.nc", "--variables", "u", "u")
    assert code == 2
    assert "'u' is in variables twice" in json.loads(err)["error"]


def test_statistics_are_not_computed(capsys, folder):
    code, out, err = call(capsys, "data", "stats", "waves.nc", "--variables", "u")
    assert code == 0, err
    assert json.loads(out) == {"would read": "waves.nc", "channels": ["u"], "trajectories": 1, "frames": 20}
    assert sorted(path.name for path in folder.iterdir()) == ["waves.nc", "waves.yaml"]


def test_a_rollout_generates_no_data(capsys, folder):
    run = untrained(folder, data="{type: synthetic, name: burgers, cache: here}")
    code, out, err = call(capsys, "rollout", run, "--steps", 3)
    assert code == 0, err
    assert "generated when the rollout starts" in json.loads(out)["from"]
    assert not (folder / "here").exists()
    code, _, err = call(capsys, "rollout", run, "--steps", 3, "--out", "x.foo")
    assert code == 2
    assert ".zarr" in json.loads(err)["error"]


def test_data_that_were_generated_before_are_checked(capsys, folder):
    data = (
        "{type: synthetic, name: burgers, cache: here, points: 16, steps: 4, trajectories: {train: 1, valid: 1, "
        "test: 2}, options: {solver_points: 16, substeps: 1}}"
    )
    run = untrained(folder, own=True, data=data)
    before = listing(folder)
    words = ("train", "waves.yaml", "--out", "other", "--set", f"data={data}")
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert json.loads(out)["data"]["test"] == "2 trajectories, 10 frames on a grid (16,)"
    code, _, err = call(capsys, *words, "--set", "stepper.history=9")
    assert code == 2
    assert "10 frames" in json.loads(err)["error"]
    code, out, err = call(capsys, "rollout", run, "--steps", 3, "--trajectory", 1)
    assert code == 0, err
    assert json.loads(out)["from"] == {"trajectory": 1, "time": 1, "x": 16}
    for words, message in (
        (("--trajectory", 2), "has 2: 0 to 1"), (("--members", 0), "members=0"), (("--perturb", 0.1), "how many"),
    ):  # fmt: skip
        code, _, err = call(capsys, "rollout", run, "--steps", 3, *words)
        assert code == 2
        assert message in json.loads(err)["error"]
    assert listing(folder) == before


@pytest.mark.parametrize("data", ["{type: synthetic, name: burgers, cache: here, trajectories: {valid: 0}}", None])
def test_evaluating_needs_the_split(capsys, folder, data):
    changes = {"data.valid": "[]"} if data is None else {"data": data}
    run = untrained(folder, **changes)
    assert call(capsys, "evaluate", run)[0] == 0
    code, _, err = call(capsys, "evaluate", run, "--split", "valid")
    assert code == 2
    assert "needs the split 'valid', but its data have train, test." in json.loads(err)["error"]
    assert not (folder / "here").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.foo"], "does not tell its format"),
        (["x.nc", "--trajectories", 0], "trajectories is 0"),
        (["x.nc", "--steps", 0], "steps is 0"),
        (["x.nc", "--seed", -1], "seed is -1"),
        (["waves.nc"], "exists already"),
    ],
)
def test_generating_is_refused_as_the_real_one(capsys, folder, words, message):
    code, _, err = call(capsys, "data", "generate", "burgers", "--out", *words)
    assert code == 2
    assert message in json.loads(err)["error"]


def test_no_verb_writes_anything(capsys, folder, monkeypatch):
    monkeypatch.setenv("PHYSML_CACHE", str(folder / "cache"))
    run = untrained(folder)
    generated = "{type: synthetic, name: burgers}"
    case = Path(__file__).parent / "golden/fno/fno1d"
    weights = ["--config", case / "config.json", "--weights", case / "weights.safetensors"]
    calls = {
        "train": [["waves.yaml", "--name", "new"], ["waves.yaml", "--name", "other", "--set", f"data={generated}"]],
        "finetune": [[run, "waves.yaml", "--name", "tuned"]],
        "rollout": [[run, "--steps", 1], [run, "--initial", "waves.nc", "--at", "#0", "--steps", 3]],
        "evaluate": [[run], [run, "--set", f"data={generated}"], ["waves.nc", "--truth", "waves.nc", "--out", "s.nc"]],
        "report": [[run]],
        "benchmark": [["darcy"], ["cfdbench"]],
        "convert": [["fno", *weights, "--out", "converted"]],
        "export": [[run]],
        "models": [[], ["fno"]],
        "doctor": [[]],
        "data generate": [["burgers", "--out", "burgers.nc"]],
        "data fetch": [[f"file://{folder}/waves.nc", "--out", "fetched"]],
        "data list": [[]],
        "data info": [["waves.nc"]],
        "data stats": [["waves.nc"]],
        "data convert": [["waves.nc", "waves.zarr"]],
    }
    assert set(calls) == {*cli.VERBS, *(f"data {name}" for name in cli.DATA_VERBS)}
    before = listing(folder)
    for verb, variants in calls.items():
        for words in variants:
            code, _, err = call(capsys, *verb.split(), *words)
            assert code == 0, (verb, words, err)
            assert listing(folder) == before, (verb, words)
