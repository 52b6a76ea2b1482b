"""Leaderboards: scores as the benchmarks define them, entries that are made once, pages and tables of them."""

import csv
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose

from physml import cli
from physml.benchmarks import BENCHMARKS, CONTENDERS, benchmark, protocol, run, suites
from physml.benchmarks.contenders import size_of
from physml.benchmarks.leaderboard import read_entries, write_leaderboard
from physml.benchmarks.protocol import Published, Task
from physml.data import SyntheticConfig
from physml.data.synthetic import Counts
from physml.errors import ConfigError, DataError, DivergedError
from physml.evaluate import evaluate_stepper
from physml.fields import Axis, Grid, Signature
from physml.objectives import OneStep
from physml.steppers import STEPPERS


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """Kuramoto-Sivashinsky in 32 points, few and short trajectories, in a cache of the module's own."""
    cache = tmp_path_factory.mktemp("cache")
    return SyntheticConfig(
        "kuramoto_sivashinsky", 32, Counts(3, 1, 2), 12, 8, cache=str(cache),
        options={"solver_points": 32, "length": 16.0, "warmup": 1.0, "substeps": 4, "initial_modes": 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def suite(waves):
    """A benchmark of one small task and four updates."""
    small = dataclasses.replace(
        BENCHMARKS["pdearena"], tasks=lambda root, points: (Task("waves", waves, 4),),
        published=(
            Published("waves", "theirs", 0.5, "their paper"),
            Published("waves", "pointwise", 0.9, "their paper", floor=True),
        ),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BENCHMARKS, "small", small)
        patch.setattr(run, "MOST", 4)
        patch.setattr(run, "FEWEST", 4)
        yield small


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory):
    """The leaderboard of one network and one seed; not to be written to."""
    return benchmark("small", models=["fno"], seeds=1, budget=0.01, out=tmp_path_factory.mktemp("finished") / "board")


def entries_of(folder):
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("entry.json"))


def test_a_leaderboard_is_made_once_and_grows(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "board")
    floors = [f"waves/{name}" for name in ("climatology", "extrapolation", "persistence")]
    assert entries_of(out) == sorted([*floors, "waves/fno/seed0"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.nc") if path.parent != out}
    share = json.loads((out / "plan.json").read_text())["seconds"]
    assert benchmark("small", models=["fno"], seeds=2, budget=5.0, out=out) == out
    assert entries_of(out) == sorted([*floors, "waves/fno/seed0", "waves/fno/seed1"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((out / "plan.json").read_text())["seconds"] == share

    with xr.open_dataset(out / "leaderboard.nc") as board:
        one_step = board.one_step.sel(score_name="scaled_l2", task="waves")
        assert np.isfinite(one_step.sel(model="fno")).all()
        assert one_step.sel(model="fno").std() > 0  # seeds differ
        assert board.rollout.sizes["lead"] == 4
        assert board.parameters.sel(task="waves", model="fno") > 1000
    with (out / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [float(r["value"]) for r in rows if (r["model"], r["score"], r["kind"]) == ("fno", "scaled_l2", "one_step")]
    assert_allclose(ours, one_step.sel(model="fno"), rtol=1e-6)
    assert [(r["model"], r["floor"]) for r in rows if r["source"]] == [("theirs", "False"), ("pointwise", "True")]
    page = (out / "leaderboard.html").read_text()
    for text in ("their paper", "pointwise (floor)", "persistence (identity)", "Worst case of fno", "data:image/png"):
        assert text in page
    assert "http" not in page.replace("http-equiv", "")

    with pytest.raises(ConfigError, match=r"other settings \(size\).*overwrite"):
        benchmark("small", models=["fno"], size="published", out=out)


def test_scores_are_those_of_the_rollouts(suite, finished, waves):
    """One step over all pairs and rollouts from the first frame, computed again from the fields themselves."""
    test = waves.open()["test"]
    frames = np.stack([test.read(i, range(9)).frames[..., 0] for i in range(2)]).astype(float)

    def relative(a, b):
        return np.mean(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1))

    floor = {entry.model: entry for entry in read_entries(finished, suite)["waves"]}["persistence"]
    assert_allclose(floor.one_step["scaled_l2"], relative(frames[:, :-1], frames[:, 1:]), rtol=1e-5)
    expected = [relative(frames[:, 0], frames[:, lead]) for lead in range(1, 5)]
    assert_allclose(floor.rollout["scaled_l2"][0], expected, rtol=1e-5)
    error = np.mean((frames[:, 0] - frames[:, 4]) ** 2, -1)
    with xr.open_dataset(finished / "waves" / "persistence" / "worst.nc") as worst:
        assert worst.attrs["trajectory"] == np.argmax(np.sqrt(error / np.mean(frames[:, 4] ** 2, -1)))
        assert_allclose(worst["u_forecast"][-1], frames[worst.attrs["trajectory"], 0], rtol=1e-6)


def test_the_command_line_makes_a_leaderboard(finished, tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["benchmark", *map(str, words)])
        return stop.value.code or 0, *capsys.readouterr()

    out = tmp_path / "board"
    words = ("small", "--models", "fno", "--seeds", 1, "--budget", 0.01, "--out", out, "--json")
    code, shown, _ = call(*words, "--dry-run")
    assert (code, json.loads(shown)["models"], out.exists()) == (0, ["fno"], False)
    shutil.copytree(finished, out)
    shutil.rmtree(out / "waves" / "persistence")  # the one thing to do
    code, shown, _ = call(*words)
    assert code == 0
    best = json.loads(shown)["best at one step"]["waves"]
    assert list(best.values()) == sorted(best.values())
    assert set(best) == {"fno", "persistence", "extrapolation", "climatology"}
    code, _, error = call("pdearina", "--out", tmp_path / "other")
    assert code == 2
    assert "Did you mean 'pdearena'" in error


@pytest.mark.slow
def test_an_interrupted_leaderboard_is_finished(suite, tmp_path, monkeypatch):
    """What was finished before stays; a folder without entry.json is done again."""
    out = tmp_path / "board"
    score, calls = run._score, []

    def fails(*arguments):
        calls.append(arguments[4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        score(*arguments)

    monkeypatch.setattr(run, "_score", fails)
    with pytest.raises(KeyboardInterrupt):
        benchmark("small", models=["fno"], seeds=1, budget=0.01, out=out)
    assert len(entries_of(out)) == 2
    monkeypatch.setattr(run, "_score", lambda *arguments: calls.append(arguments[4]) or score(*arguments))
    benchmark("small", models=["fno"], seeds=1, budget=0.01, out=out)
    assert calls == ["persistence", "extrapolation", "climatology", "climatology", "fno"]


def test_a_run_that_diverges_is_an_entry(suite, finished, tmp_path, monkeypatch):
    def diverges(*arguments, **options):
        raise DivergedError("The loss is nan after step 3.")

    monkeypatch.setattr(run.api, "train", diverges)
    monkeypatch.setattr(run, "_affordable", lambda *arguments: 4)
    out = shutil.copytree(finished, tmp_path / "board")
    benchmark("small", models=["ffno"], seeds=2, budget=0.01, out=out)
    assert "2, 2 diverged" in (out / "leaderboard.html").read_text()
    last = read_entries(out, suite)["waves"]
    assert [entry.model for entry in last if not entry.floor] == ["fno", "ffno"]


def test_nmse_pools_what_the_definition_pools(waves):
    """MSE / mean square of the label over the whole set, not a mean of ratios."""
    test = waves.open()["test"]
    stepper = STEPPERS["persistence"]().fit(test)
    scores = evaluate_stepper(stepper, test, 3, metrics=protocol.NMSE.metrics, per_start=True, starts=1)
    frames = np.stack([test.read(i, range(9)).frames for i in range(2)]).astype(float)
    expected = [np.mean((frames[:, 0] - frames[:, k]) ** 2) / np.mean(frames[:, k] ** 2) for k in (1, 2, 3)]
    assert_allclose(protocol.NMSE(scores, "model"), expected, rtol=1e-5)
    each = [np.mean((frames[i, 0] - frames[i, 2]) ** 2) / np.mean(frames[i, 2] ** 2) for i in range(2)]
    assert_allclose(protocol.NMSE.per_start(scores, "model")[1], each, rtol=1e-5)
    ratio = [np.abs(frames[i, 0] - frames[i, 1]).mean() / np.abs(frames[i, 1]).mean() for i in range(2)]
    scores = evaluate_stepper(stepper, test, 1, metrics=protocol.RELATIVE_L1.metrics, per_start=True, starts=1)
    assert_allclose(protocol.RELATIVE_L1(scores, "model"), np.median(ratio), rtol=1e-5)


def test_nmse_of_two_channels_is_a_ratio_of_sums():
    table = xr.DataArray(
        [[[2.0], [1.0]], [[0.5], [0.1]]], dims=("metric", "channel", "lead"),
        coords={"metric": ["rmse", "nrmse_pooled"], "channel": ["u", "v"]},
    )  # fmt: skip
    assert_allclose(protocol.NMSE.of(table), (4.0 + 1.0) / (16.0 + 100.0))
    assert_allclose(protocol.NMSE.of(0 * table), 0.0)


@pytest.mark.parametrize("size", ["embedded", pytest.param("published", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_can_be_built(name, size):
    """On periodic and walled grids, with and without scalars; no frame is added twice."""
    for periodic in (True, False):
        grid = Grid((Axis.uniform("y", 64, periodic=periodic), Axis.uniform("x", 64, periodic=periodic)))
        config = CONTENDERS[name].config(grid, size)
        assert getattr(config, "frame", None) is None
        count = size_of(config, Signature(grid, 3, 5, 2))
        assert 1e3 < count < (4e6 if size == "embedded" else 1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cfdbensh"}, "no benchmark 'cfdbensh'.*Did you mean 'cfdbench'"),
        ({"models": ["fna"]}, "no contender 'fna'.*fno"),
        ({"models": ["fno", "fno"]}, "twice"),
        ({"tasks": ["wave"]}, "no task 'wave'.*waves"),
        ({"seeds": 0}, "at least one seed"),
        ({"budget": float("nan")}, "budget nan"),
        ({"size": "huge"}, "no size 'huge'"),
        ({"models": ["scot"]}, "scot cannot enter task 'waves'.*two spatial axes"),
        ({"data": "/nowhere/at/all"}, "There is no /nowhere/at/all"),
        ({"points": 8}, "at least 16"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(suite, tmp_path, options, message):
    options = {"name": "small", "models": ["fno"], "out": tmp_path / "board", **options}
    with pytest.raises((ConfigError, DataError), match=message):
        benchmark(**options)
    assert not list(tmp_path.rglob("entry.json"))


def test_foreign_folders_and_damage_are_named(suite, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no leaderboard"):
        benchmark("small", models=["fno"], out=tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan.json is damaged"):
        benchmark("small", models=["fno"], out=tmp_path)
    broken = tmp_path / "board" / "waves" / "fno" / "seed0"
    broken.mkdir(parents=True)
    (broken / "entry.json").write_text("no json")
    with pytest.raises(DataError, match=r"entry.json is damaged"):
        write_leaderboard(tmp_path / "board", suite, "small")


SAMPLES = pathlib.Path(__file__).parent / "data" / "samples"


@pytest.mark.parametrize(
    ("name", "folder", "tasks"),
    [
        ("cfdbench", "cfdbench", ["cavity", "tube", "dam", "cylinder"]),
        ("pdearena", "pdearena", ["KuramotoSivashinsky1D", "NavierStokes2D", "NavierStokes2D-conditioned"]),
        ("well", "the_well", ["shear_flow"]),
    ],
)
def test_the_data_of_the_benchmarks_are_found(name, folder, tasks):
    """Every data set in a folder is a task whose splits open."""
    found = run.Options(name, str(SAMPLES / folder)).chosen()
    names = [task.name for task in found]
    assert set(tasks) <= set(names), names
    for task in found:
        if task.name in tasks:
            splits = task.data.open()
            assert {"train", "test"} <= set(splits)
            assert run._stepper_config(task).signature(splits["train"].spec).outputs >= 1


@pytest.mark.slow
def test_weather_is_scored_against_the_climatology(tmp_path, monkeypatch):
    """Three days in the real layout: fields on levels and without, ACC; the climatology has a relative RMSE of 1."""
    store = SAMPLES / "weatherbench2" / "2020-6h-16x8_equiangular_conservative.zarr"
    (task,) = run.Options("weather", str(store)).chosen()
    data = dataclasses.replace(
        task.data, train=("2020-01-01", "2020-01-02"), valid=(), test=("2020-01-03", "2020-01-03")
    )
    small = dataclasses.replace(task, data=data, steps=2, starts=1)
    monkeypatch.setitem(
        BENCHMARKS, "weather", dataclasses.replace(BENCHMARKS["weather"], tasks=lambda root, points: (small,))
    )
    monkeypatch.setattr(run, "MOST", 4)
    monkeypatch.setattr(run, "FEWEST", 4)
    out = benchmark("weather", store, models=["ffno"], size="embedded", seeds=1, budget=0.01, out=tmp_path / "board")
    entries = {entry.model: entry for entry in read_entries(out, BENCHMARKS["weather"])[task.name]}
    assert_allclose(entries["climatology"].rollout["relative_rmse"], 1.0, rtol=1e-5)
    assert all(np.isfinite(entry.one_step["acc"]).all() for entry in entries.values())
    with xr.open_dataset(out / task.name / "ffno" / "seed0" / "rollout.nc", decode_timedelta=True) as scores:
        assert list(scores.channel.values) == [
            "geopotential_500", "geopotential_850", "temperature_500", "temperature_850", "2m_temperature"
        ]  # fmt: skip


@pytest.mark.slow
def test_a_problem_without_time(tmp_path, monkeypatch):
    """Darcy flow: coefficient to solution, beside the mean of the training solutions."""
    data = SyntheticConfig("darcy_flow", 8, Counts(12, 2, 6), options={"modes": 8}, cache=str(tmp_path / "cache"))
    task = Task("darcy", data, 1, history=0, objective=OneStep(loss="h1"))
    monkeypatch.setitem(
        BENCHMARKS, "darcy", dataclasses.replace(BENCHMARKS["darcy"], tasks=lambda root, points: (task,))
    )
    monkeypatch.setattr(run, "MOST", 4)
    monkeypatch.setattr(run, "FEWEST", 4)
    out = benchmark("darcy", models=["fno"], seeds=1, budget=0.01, out=tmp_path / "board")
    entries = {entry.model: entry for entry in read_entries(out, BENCHMARKS["darcy"])["darcy"]}
    splits = data.open()
    mean = np.mean([splits["train"].read(i, range(1)).frames[0] for i in range(12)], axis=0)
    truth = np.stack([splits["test"].read(i, range(1)).frames[0] for i in range(6)])
    expected = np.mean([np.linalg.norm(mean - u) / np.linalg.norm(u) for u in truth])
    assert_allclose(entries["climatology"].one_step["scaled_l2"], expected, rtol=1e-4)
    assert np.isfinite(entries["fno"].one_step["h1"]).all()
    assert "rollout" not in (out / "leaderboard.html").read_text().replace("Rollouts", "").split("<table")[1]


def test_conditions_reach_the_networks():
    """Parameters that vary and fields without time go in; what is constant by construction is not scored."""
    (flow,) = (task for task in run.Options("well", str(SAMPLES / "the_well")).chosen() if task.name == "shear_flow")
    spec = flow.data.open()["train"].spec
    assert [channel.name for channel in spec.static] == ["mask_field"]
    assert {channel.name for channel in spec.parameters} <= {"Re", "Sc"}
    tasks = {task.name: task for task in run.Options("poseidon", str(SAMPLES / "poseidon")).chosen()}
    for name, channels, history in (("NS-Sines", ("u", "v"), 1), ("Poisson-Gauss", ("u",), 0), ("CE-RP", (), 1)):
        assert (tasks[name].data.variables, tasks[name].history) == (channels, history)
    for task in tasks.values():  # the samples are too short for the splits of the benchmark
        whole = dataclasses.replace(
            task.data, split_by="trajectory", train=(0, 1), valid=(), test=(), options={"normalize": True}
        )
        train = whole.open()["train"]
        assert run._stepper_config(task).signature(train.spec).inputs >= 1
        assert np.isfinite(train.read(0, range(1)).frames).all()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_generate_its_data(name):
    """The recipes of all tasks are sound; those of CFDBench are made by `prepare`."""
    tasks = run.Options(name).chosen()
    assert tasks
    for task in tasks:
        assert task.prepare is not None or {"train", "test"} <= set(task.data.recipes())


@pytest.mark.slow
def test_cases_are_generated_trained_on_and_scored(tmp_path, monkeypatch):
    """CFDBench without data, tiny: the protocol from nothing to a page."""
    monkeypatch.setenv("PHYSML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suites, "EMBEDDED_CASES", 4)
    monkeypatch.setattr(run, "MOST", 4)
    monkeypatch.setattr(run, "FEWEST", 4)
    out = benchmark("cfdbench", points=16, tasks=["tube"], models=["deeponet"], seeds=1, budget=0.01,
                    out=tmp_path / "board")  # fmt: skip
    assert not (tmp_path / "cache" / "generated" / "cfdbench-16" / "cavity").exists()
    (entries,) = read_entries(out, BENCHMARKS["cfdbench"]).values()
    assert {entry.model for entry in entries} == {"deeponet", "persistence", "extrapolation"}
    assert all(np.isfinite(entry.one_step["nmse"]).all() for entry in entries)
    page = (out / "leaderboard.html").read_text()
    assert "figure 7" in page
    assert "Generated data" in page


def test_invalid_numbers_of_others_are_not_quoted():
    """The FNO and TFNO columns of The Well measured a pointwise map; they must never appear as results."""
    quoted = [other for suite in BENCHMARKS.values() for other in suite.published]
    assert not [other for other in quoted if "Ohana" in other.source and "FNO" in other.model and not other.floor]
    assert all(other.source and np.isfinite(other.value) for other in quoted)
