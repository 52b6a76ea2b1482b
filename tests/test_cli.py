"""The command line, driven in this process as a user would drive it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from physml import cli, open_dataset
from physml.evaluate import predictability
from physml.files import exclusive
from physml.models import MODELS
from physml.report.page import number
from physml.verbs.common import headline

ALL = {**cli.VERBS, **{f"data {name}": verb for name, verb in cli.DATA_VERBS.items()}}
TINY = """
from physml import Experiment, Evaluation, OneStep, SyntheticConfig, TrainingConfig
from physml.models import MODELS
config = Experiment(
    name="tiny",
    data=SyntheticConfig("burgers", points=32, trajectories={"train": 4, "valid": 2, "test": 2}, steps=12),
    model=MODELS["fno"](width=8, modes=(8,), depth=2),
    training=TrainingConfig(steps=6, batch=4, checkpoint_every=3),
    evaluation=Evaluation(steps=5, floors=("persistence",), batch=4),
)
"""


def call(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny run, trained through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(TINY)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(folder / "tiny.py"), "--out", str(folder / "runs"), "--quiet"])
    assert not stop.value.code
    return folder


@pytest.mark.parametrize("words", ALL)
def test_every_verb_teaches(capsys, words):
    code, out, _ = call(capsys, *words.split(), "--help")
    assert code == 0
    assert f"Example: physml {words}" in " ".join(out.split())
    for option in ("--dry-run", "--json", "--quiet", "--debug"):
        assert option in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "absent.py"], "absent.py"),
        (["train", "--set", "training.stepz=5"], "steps"),
        (["train", "--set", "model.width=wide"], "model.width"),
        (["finetune", "absent", "experiments/demo.py"], "absent"),
        (["finetune", "poseidon-t", "experiments/demo.py"], "weights"),
        (["finetune", "runs", "experiments/demo.py", "--set", "lora.rank=0"], "lora.rank"),
        (["rollout", "absent", "--initial", "absent.nc"], "absent"),
        (["evaluate", "absent.nc"], "There is no absent.nc"),
        (["evaluate", "README.md"], "--truth FILE"),
        (["report", "absent"], "config.yaml"),
        (["convert", "fnoo", "--config", "c.json", "--weights", "w.safetensors", "--out", "o"], "fno"),
        (["models", "fnoo"], "fno"),
        (["data", "generate", "burger", "--out", "x.nc"], "burgers"),
        (["data", "info", "absent.nc"], "absent.nc"),
        (["data", "fetch", "the_wel", "--out", "x"], "the_well"),
        (["data", "fetch", "darcy", "--out", "x"], "neuraloperator"),
        (["data", "convert", "a.nc", "b"], "does not tell its format"),
        (["data", "stats", "absent.nc"], "absent.nc"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, monkeypatch, words, said):
    monkeypatch.chdir(Path(__file__).parents[1])
    code, out, err = call(capsys, *words)
    assert code == 2
    assert said in err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("physml: ")
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("words", [["trian"], ["train", "--stepz", "3"], ["data", "generate", "burgers"]])
def test_bad_usage_exits_with_two(capsys, words):
    assert call(capsys, *words)[0] == 2


def test_a_run_describes_itself(trained):
    run = trained / "runs/tiny"
    files = "config.yaml spec.json environment.json metrics.jsonl scores.nc scores.json sample.nc"
    for name in files.split():
        assert (run / name).is_file(), name
    assert (run / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert (run / "model/model.safetensors").is_file()
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == sorted({row["step"] for row in losses if "loss" in row})


def test_an_existing_run_is_kept(capsys, trained):
    before = (trained / "runs/tiny/model/model.safetensors").read_bytes()
    code, _, err = call(capsys, "train", trained / "tiny.py", "--out", trained / "runs")
    assert code == 2
    assert "--resume auto" in err
    code, _, err = call(
        capsys, "train", trained / "tiny.py", "--out", trained / "runs", "--resume", "auto", "--set", "seed=7"
    )
    assert code == 2
    assert "seed" in err
    with exclusive(trained / "runs/tiny"):  # as a process that trains into it has it
        for words in (["--resume", "auto"], ["--overwrite"]):
            code, _, err = call(capsys, "train", trained / "tiny.py", "--out", trained / "runs", *words)
            assert code == 2
            assert "Another process is writing" in err
    assert (trained / "runs/tiny/model/model.safetensors").read_bytes() == before


def test_a_run_that_was_refused_at_its_start_is_begun_anew(capsys, trained, tmp_path):
    words = ["train", trained / "tiny.py", "--out", tmp_path, "--quiet"]
    pairs = "objective={name: all_to_all, snapshots: 4}"
    code, _, err = call(capsys, *words, "--set", pairs, "--set", "stepper={name: direct, lead: true}")
    assert code == 2
    assert "longest_lead=3" in err
    assert (tmp_path / "tiny/config.yaml").is_file()
    words[-1] = "--json"
    code, out, err = call(capsys, *words, "--set", "data.trajectories.test=0")  # other settings, as the message asks
    assert code == 0, err
    assert json.loads(out)["report"] == "none: the data have no split 'test' to score on"
    assert call(capsys, *words)[0] == 2  # now there is something to lose


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from physml import Experiment\nconfig = Experiment(nam=1)\n", "line 2: TypeError"),
        ("config = (\n", "line 1: SyntaxError"),
        ("import physml.nothing\n", "line 1: ModuleNotFoundError"),
        ("from physml import Experiment\nconfig = Experiment(name='a/b')\n", "folder name without slashes"),
    ],
)
def test_an_experiment_file_that_cannot_run_is_the_users(capsys, tmp_path, text, said):
    (tmp_path / "broken.py").write_text(text)
    code, _, err = call(capsys, "train", tmp_path / "broken.py")
    assert code == 2
    assert said in err
    assert "defect" not in err


def test_a_constraint_goes_on_and_off_in_one_word(capsys, trained, tmp_path):
    """And is saved with the weights of a run whose experiment has it."""
    run = trained / "runs/tiny"
    steps = ["--steps", "40", "--quiet", "--on-divergence", "flag", "--out"]
    words = ["finetune", run, trained / "tiny.py", "--out", tmp_path, "--name", "fixed", "--set", "training.steps=2"]
    code, _, err = call(capsys, *words, "--set", "constraints=[{name: mass, channels: [u]}]", "--quiet")
    assert code == 0, err

    def drift(model, *options):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.nc"
        code, _, err = call(capsys, "rollout", model, *steps, out, *options)
        assert code == 0, err
        with xr.open_dataset(out) as data:
            mean, size = data.u.astype(float).mean("x"), np.abs(data.u.astype(float)).mean("x")
            return float((np.abs(mean - mean.isel(lead=0, drop=True)) / size).max())

    assert drift(run) > 1e-5
    assert drift(run, "--constraint", "mass:u") < 1e-6
    assert drift(tmp_path / "fixed") < 1e-6
    assert drift(tmp_path / "fixed", "--constraint", "none") > 1e-5
    code, _, err = call(capsys, "rollout", run, *steps, tmp_path / "w.nc", "--constraint", "mass:w")
    assert code == 2
    assert "no channel 'w'" in err


def test_finetuning_says_what_it_loaded(capsys, trained, tmp_path):
    other = TINY.replace('model=MODELS["fno"](width=8, modes=(8,), depth=2),', "").replace("points=32", "points=16")
    (tmp_path / "other.py").write_text(other)
    words = ["finetune", trained / "runs/tiny", tmp_path / "other.py", "--out", tmp_path, "--name", "tuned", "--json"]
    words += ["--set", "lora.rank=2", "--set", "training.steps=2"]
    code, out, _ = call(capsys, *words, "--dry-run")
    assert code == 0
    assert json.loads(out)["experiment"]["model"]["width"] == 8  # of the source
    assert not (tmp_path / "tuned").exists()
    code, out, err = call(capsys, *words)
    assert code == 0, err
    result = json.loads(out)
    assert "normalizer: saved" in result["loaded"]
    assert "(32,) points there, (16,) here" in result["loaded"]
    written = json.loads((tmp_path / "tuned/start_from.json").read_text())
    assert written["numbers"][0] == written["numbers"][1]
    assert "lora" in json.loads((tmp_path / "tuned/model/config.json").read_text())
    deeper = "model={name: fno, width: 8, modes: [8], depth: 3}"
    code, _, err = call(capsys, *words, "--overwrite", "--strict", "--set", deeper)
    assert code == 2
    assert "strict" in err
    assert "model.blocks.2" in err


def test_python_runs_the_package():
    """`python -m physml`, where the command itself is not on the path."""
    from physml import __version__

    found = subprocess.run([sys.executable, "-m", "physml", "--version"], check=True, capture_output=True, timeout=60)
    assert found.stdout.decode().strip() == __version__


@pytest.mark.slow
def test_a_terminated_training_exits_with_75_and_goes_on(trained, tmp_path):
    """As a batch system does it: SIGTERM, then the same command with --resume auto."""
    words = [sys.executable, "-c", "from physml.cli import main; main()", "train", trained / "tiny.py", "--quiet"]
    words += ["--set", "training.log_every=1", "--set", "training.steps=1500", "--set", "training.checkpoint_every=400"]
    environment = {**os.environ, "PHYSML_COMPILE_CACHE": "off"}

    def command(folder, *more):
        return [str(word) for word in (*words, "--out", tmp_path / folder, *more)]

    log = tmp_path / "parts/tiny/metrics.jsonl"
    with subprocess.Popen(command("parts"), env=environment, stderr=subprocess.PIPE, text=True) as training:
        while training.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 20):
            time.sleep(0.01)
        training.send_signal(signal.SIGTERM)
        _, said = training.communicate(timeout=120)
    assert training.returncode == 75, said
    assert "--resume auto" in said
    assert not (tmp_path / "parts/tiny/model").exists()
    for folder in ("parts", "whole"):
        subprocess.run(command(folder, "--resume", "auto"), env=environment, check=True, timeout=300)
    parts, whole = ((tmp_path / folder / "tiny/model/model.safetensors").read_bytes() for folder in ("parts", "whole"))
    assert parts == whole


def test_rollout_evaluate_report_follow(capsys, trained, tmp_path):
    data = tmp_path / "burgers.nc"
    words = ["data", "generate", "burgers", "--out", data, "--trajectories", 2, "--steps", 12, "--set", "points=32"]
    assert call(capsys, *words, "--quiet")[0] == 0
    code, out, _ = call(capsys, "data", "info", data, "--json")
    assert code == 0
    assert "trajectory" in json.dumps(json.loads(out))
    words = ["data", "convert", data, tmp_path / "copy.zarr", "--option", "decode_times=false"]
    assert call(capsys, *words)[0] == 0
    xr.testing.assert_equal(open_dataset(tmp_path / "copy.zarr").compute(), open_dataset(data).compute())
    assert "exists" in call(capsys, *words)[2]
    assert call(capsys, "data", "stats", data, "--json")[0] == 0

    out_path = tmp_path / "forecast.nc"
    words = ["rollout", trained / "runs/tiny", "--initial", data, "--at", "#3", "--steps", 6, "--out", out_path]
    assert call(capsys, *words, "--dry-run")[0] == 0
    assert not out_path.exists()
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["sizes"]["lead"] == 6

    scores = tmp_path / "scores.nc"
    code, out, err = call(capsys, "evaluate", out_path, "--truth", data, "--out", scores, "--json")
    assert code == 0, err
    assert scores.is_file()
    assert "rmse" in json.dumps(json.loads(out))

    normal = tmp_path / "normal.nc"
    open_dataset(data).mean(("trajectory", "time")).to_netcdf(normal)
    words = ["evaluate", out_path, "--truth", data, "--metric", "acc", "--climatology", normal]
    code, out, err = call(capsys, *words, "--floor", "climatology", "--out", scores, "--overwrite", "--json")
    assert code == 0, err
    assert set(json.loads(out)["scores"]) == {"model", "climatology"}
    assert "acc" in json.loads(out)["scores"]["model"]["u"]
    with xr.open_dataset(scores) as ds:
        assert list(ds["metric"].values) == ["acc"]
        assert np.isfinite(ds["score"].sel(model="model")).all()
    code, _, err = call(capsys, "evaluate", out_path, "--truth", data, "--metric", "acc")
    assert code == 2
    assert "climatology" in err
    code, _, err = call(capsys, "evaluate", trained / "runs/tiny", "--climatology", normal)
    assert code == 2
    advice = "evaluation.metrics=[rmse]"
    assert f"--set '{advice}'" in err
    assert call(capsys, "evaluate", trained / "runs/tiny", "--set", advice, "--dry-run")[0] == 0

    page = tmp_path / "page.html"
    code, _, err = call(capsys, "report", trained / "runs/tiny", trained / "runs/tiny", "--out", page)
    assert code == 0, err
    assert page.is_file()


def test_data_verbs_work_from_anywhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "data", "list", "--json")
    assert code == 0, err
    listed = json.loads(out)
    assert set(listed["cards"]["the_well"]) == {"about", "size", "license"}
    assert {"the_well", "grib", "netcdf"} <= set(listed["formats"])
    code, out, _ = call(capsys, "data", "info", "the_well")
    assert code == 0
    assert "Ohana, R. et al., 2024" in out
    code, out, _ = call(capsys, "data", "info", "the_well", "--json")
    assert "the_well/shear_flow" in json.loads(out)["can be fetched"]
    (tmp_path / "the_well").mkdir()  # a path of that name comes first
    code, _, err = call(capsys, "data", "info", "the_well")
    assert code == 2
    assert "holds no netCDF file" in err


def test_fetch_and_convert_say_what_they_would_do_and_do_it(capsys, tmp_path):
    source = xr.Dataset({"u": (("trajectory", "time", "x"), [[[1.0, 2.0, 4.0]]])})
    source.to_netcdf(tmp_path / "a.nc")
    url = f"file://{tmp_path}/a.nc"
    code, out, err = call(capsys, "data", "fetch", url, "--out", tmp_path / "in", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["would fetch"] == {"a.nc": (tmp_path / "a.nc").stat().st_size}
    assert not (tmp_path / "in").exists()
    code, out, err = call(capsys, "data", "fetch", url, "--out", tmp_path / "in", "--quiet")
    assert code == 0, err
    assert err == ""
    assert "sha256" in out
    code, _, err = call(capsys, "data", "fetch", url, "--out", tmp_path / "in", "--sha256", "0" * 64, "--json")
    assert code == 2
    assert "was expected" in json.loads(err)["error"]

    fetched, copy = tmp_path / "in2/a.nc", tmp_path / "well"
    assert call(capsys, "data", "fetch", url, "--out", tmp_path / "in2")[0] == 0
    words = ["data", "convert", fetched, copy, "--to", "the_well"]
    code, out, err = call(capsys, *words, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["as"] == "the_well"
    assert not copy.exists()
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] > 0
    assert open_dataset(copy)["u"].values.tolist() == [[[1.0, 2.0, 4.0]]]
    assert "exists" in call(capsys, *words)[2]
    assert call(capsys, *words, "--overwrite")[0] == 0


def test_convert_makes_a_model_that_load_opens(capsys, tmp_path):
    import physml

    case = Path(__file__).parent / "golden/fno/fno1d"
    words = ["convert", "fno", "--config", case / "config.json", "--weights", case / "weights.safetensors"]
    code, _, err = call(capsys, *words, "--out", tmp_path / "fno", "--json")
    assert code == 0, err
    assert physml.load(tmp_path / "fno") is not None


def test_doctor_and_listings(capsys):
    for words in (["doctor"], ["models"], ["models", "fno"], ["data", "list"]):
        code, out, err = call(capsys, *words, "--json")
        assert code == 0, err
        assert json.loads(out)


@pytest.mark.parametrize(
    ("unit", "shown"), [("s", ["129600 s", ">= 3600 s", np.nan]), ("", [129600.0, ">= 3600.0", np.nan])]
)
def test_high_correlation_times_have_their_unit(unit, shown):
    dims = ("model", "channel", "threshold")
    times, capped = np.array([[[129600.0, 3600, np.nan]]]), np.array([[[False, True, False]]])
    scores = xr.Dataset(
        {
            "score": (("model", "metric", "channel", "lead"), np.ones((1, 1, 1, 2))),
            "correlation_time": (dims, times, {"units": unit}),
            "correlation_time_capped": (dims, capped),
        },
        {"model": ["m"], "metric": ["rmse"], "channel": ["u"], "step": ("lead", [1, 2]), "threshold": [0.8, 0.9, 0.95]},
    )
    found = headline(scores)["m"]["u"]["high-correlation time"]
    np.testing.assert_equal(found, dict(zip(["> 0.8", "> 0.9", "> 0.95"], shown, strict=True)))


@pytest.mark.parametrize("name", MODELS)
def test_the_options_of_a_model_can_be_read(capsys, name):
    """They came as one escaped string."""
    code, out, err = call(capsys, "models", name)
    assert code == 0, err
    assert "about: |-\n" in out
    assert "\\n" not in out
    assert "Literal = " not in out


SCORES = "scores.nc scores.json sample.nc metrics.csv metrics.json report.html"


def test_scores_of_another_split_stand_beside_those_of_the_test_split(capsys, trained, tmp_path):
    run = shutil.copytree(trained / "runs/tiny", tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    code, out, err = call(capsys, "evaluate", run, "--split", "train", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["split"] == "train"
    assert result["report"] == str(run / "report-train.html")
    for name, content in before.items():
        assert (run / name).read_bytes() == content, name
    new = {f"{stem}-train.{kind}" for stem, kind in (name.split(".") for name in SCORES.split())}
    assert {path.name for path in run.iterdir() if path.is_file()} == {*before, *new}
    for split, mark in (("test", ""), ("train", "-train")):
        scores = json.loads((run / f"scores{mark}.json").read_text())
        assert scores["attributes"]["split"] == split
        page = (run / f"report{mark}.html").read_text()
        assert f"Score on the {split} split" in page
        assert f"metrics{mark}.csv and metrics{mark}.json beside" in page
    shown = scores["models"]["tiny"]["metrics"]["rmse"]["u"]["score"][0]
    assert number(shown) in page  # of the training split
    code, _, err = call(capsys, "evaluate", run, "--split", "valid", "--set", "data.trajectories.valid=0")
    assert code == 2
    assert "needs the split 'valid', but its data have train, test." in err


@pytest.mark.parametrize(
    ("subject", "words", "said"),
    [
        ("f.nc", ["--set", "evaluation.steps=2"], "--set is for a run"),
        ("f.nc", ["--split", "train"], "--split is for a run"),
        ("runs/tiny", ["--set", "model.width=999"], "model.width=999 cannot be"),
        ("runs/tiny", ["--set", "evaluation.steps=4", "--set", "seed=3"], "seed=3 cannot be"),
        ("runs/tiny", ["--trajectory", "0"], "--trajectory is for a forecast"),
        ("runs/tiny", ["--overwrite"], "--overwrite is for a forecast"),
    ],
)
def test_evaluate_ignores_no_option(capsys, trained, monkeypatch, subject, words, said):
    monkeypatch.chdir(trained)
    code, _, err = call(capsys, "evaluate", subject, *(["--truth", "t.nc"] if subject == "f.nc" else []), *words)
    assert code == 2
    assert said in err


def test_a_forecast_of_one_trajectory_is_scored_against_its_own(capsys, tmp_path):
    u = np.random.default_rng(0).standard_normal((2, 8, 16)).astype(np.float32)
    dims, x = ("trajectory", "time", "x"), np.arange(16) / 16
    xr.Dataset({"u": (dims, u)}, {"time": np.arange(8.0), "x": x}).to_netcdf(tmp_path / "truth.nc")
    ahead = u[1:, 3:6].copy()
    ahead[0, 2] = np.nan
    times = {"lead": [1.0, 2.0, 3.0], "time": ("lead", [3.0, 4.0, 5.0])}
    forecast = xr.Dataset({"u": (("trajectory", "lead", "x"), ahead)}, {**times, "x": x})
    forecast.to_netcdf(tmp_path / "forecast.nc")
    words = ["evaluate", tmp_path / "forecast.nc", "--truth", tmp_path / "truth.nc", "--metric", "rmse", "--json"]
    code, out, err = call(capsys, *words, "--trajectory", "1")
    assert code == 0, err
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["scores"]["model"]["u"]["rmse"] == {"step 1": 0.0, "step 2": 0.0, "step 3": None}
    _, out, _ = call(capsys, *words, "--trajectory", "0")
    assert json.loads(out)["scores"]["model"]["u"]["rmse"]["step 1"] > 1
    for more, said in (([], "--trajectory"), (["--trajectory", "2"], "0 to 1")):
        code, _, err = call(capsys, *words, *more)
        assert code == 2
        assert said in err
    # What is there already is replaced when it is asked for, and never what the scores are of.
    out, words = tmp_path / "scores.nc", [*words, "--trajectory", "1", "--out"]
    assert [call(capsys, *words, out, *more)[0] for more in ([], [], ["--overwrite"])] == [0, 2, 0]
    before = (tmp_path / "truth.nc").read_bytes()
    code, _, err = call(capsys, *words, tmp_path / "truth.nc", "--overwrite")
    assert code == 2
    assert "read for these scores" in err
    assert (tmp_path / "truth.nc").read_bytes() == before


SEA = """
from physml import DataConfig, Evaluation, Experiment, TrainingConfig
from physml.models import MODELS
config = Experiment(
    name="sea",
    data=DataConfig(
        "PATH", variables=("sst",), forcing=("sun",), train=("2001-01-01", "2001-01-20"),
        valid=("2001-01-21", "2001-01-24"), test=("2001-01-25", "2001-01-30"),
    ),
    model=MODELS["resnet"](width=4, depth=1),
    training=TrainingConfig(steps=2, batch=4),
    evaluation=Evaluation(steps=2, starts=1, floors=()),
)
"""


def test_fields_with_land_and_forcing_roll_out_from_any_time(capsys, tmp_path):
    random = np.random.default_rng(0)
    dims = ("time", "latitude", "longitude")
    days = np.datetime64("2001-01-01", "ns") + np.arange(30) * np.timedelta64(1, "D")
    sst, sun = random.standard_normal((2, 30, 8, 16)).astype(np.float32)
    sst[:, :2, :5] = np.nan
    space = {"latitude": np.linspace(-70, 70, 8), "longitude": np.arange(16) * 22.5}
    path = tmp_path / "sea.nc"
    xr.Dataset({"sst": (dims, sst), "sun": (dims, sun)}, {"time": days, **space}).to_netcdf(path)
    (tmp_path / "sea.py").write_text(SEA.replace("PATH", str(path)))
    code, _, err = call(capsys, "train", tmp_path / "sea.py", "--out", tmp_path, "--quiet")
    assert code == 0, err
    words = ["rollout", tmp_path / "sea", "--initial", path, "--at", "2001-01-05", "--out", tmp_path / "ahead.nc"]
    code, _, err = call(capsys, *words, "--steps", 6, "--quiet")
    assert code == 0, err
    with xr.open_dataset(tmp_path / "ahead.nc", decode_timedelta=True) as ahead:
        assert ahead.time.values[0] == np.datetime64("2001-01-06")
        assert (np.isnan(ahead.sst) == np.isnan(sst[0])).all()
    code, _, err = call(capsys, *words, "--steps", 26, "--overwrite")
    assert code == 2
    assert "take at most 25 steps" in err


def test_ensembles_say_from_when_on_they_are_inaccurate_and_are_scored(capsys, trained, tmp_path):
    data, ahead, scores = tmp_path / "burgers.nc", tmp_path / "ahead.zarr", tmp_path / "scores.nc"
    words = ["data", "generate", "burgers", "--out", data, "--trajectories", 2, "--steps", 12, "--set", "points=32"]
    assert call(capsys, *words, "--quiet")[0] == 0
    words = ["rollout", trained / "runs/tiny", "--initial", data, "--at", "#3", "--steps", 6, "--out", ahead, "--json"]
    code, out, err = call(capsys, *words, "--members", 4, "--perturb", 0.01)
    assert code == 0, err
    agreed = predictability(open_dataset(ahead))
    times, capped = agreed["inaccurate_from_u"].values, agreed["inaccurate_from_u_capped"].values
    mean = (times / np.timedelta64(1, "s") if times.dtype.kind == "m" else times).mean()
    shown = json.loads(out)["likely inaccurate from"]["u"]
    assert shown.startswith(">= ") == capped.any()
    assert float(shown.removeprefix(">= ").removesuffix(" s")) == pytest.approx(mean, rel=1e-4)
    single = call(capsys, *words, "--overwrite", "--out", tmp_path / "single.zarr")[1]
    assert "likely inaccurate from" not in json.loads(single)

    words = ["evaluate", ahead, "--truth", data, "--floor", "persistence", "--out", scores, "--json"]
    code, out, err = call(capsys, *words)
    assert code == 0, err
    with xr.open_dataset(scores, decode_timedelta=True) as ds:
        cells, expected = json.loads(out)["scores"], ds.load().sel(model="model", channel="u")
    for metric in ("crps_fair", "spread_skill"):
        first = expected["score"].sel(metric=metric).isel(lead=0)
        assert cells["model"]["u"][metric]["step 1"] == pytest.approx(float(first), rel=1e-4)
    assert "spread_skill" not in cells["persistence"]["u"]
    for threshold, shown in cells["model"]["u"]["high-correlation time"].items():
        one = expected.sel(threshold=float(threshold.removeprefix("> ")))
        assert str(shown).startswith(">= ") == bool(one["correlation_time_capped"])

    page = tmp_path / "page.html"
    assert call(capsys, "report", scores, "--out", page, "--dry-run")[0] == 0
    assert not page.exists()
    code, _, err = call(capsys, "report", scores, "--out", page)
    assert code == 0, err
    assert "rmse" in page.read_text().lower()
    for wrong, said in ((data, "holds no scores"), (tmp_path / "none.nc", "no scores at")):
        code, _, err = call(capsys, "report", wrong, "--out", page, "--dry-run")
        assert code == 2
        assert said in err


def test_a_page_is_html(capsys, trained):
    code, _, err = call(capsys, "report", trained / "runs/tiny", "--out", trained / "runs/tiny/scores.nc")
    assert code == 2
    assert "ends in .html" in err


def test_a_page_that_cannot_be_written_is_the_users(capsys, trained):
    out = trained / "tiny.py" / "report.html"
    code, _, err = call(capsys, "report", trained / "runs/tiny", "--out", out)
    assert code == 2
    assert "cannot be written" in err


def test_statistics_tell_how_far_they_are(capsys, tmp_path):
    xr.Dataset({"u": (("time", "x"), np.ones((20, 16)))}).to_netcdf(tmp_path / "a.nc")
    code, _, err = call(capsys, "data", "stats", tmp_path / "a.nc")
    assert code == 0, err
    assert "reading: 20/20" in err


@pytest.mark.parametrize(("given", "place"), [("", "home/.cache/physml"), ("~/x", "home/x"), ("here", "here")])
def test_compiled_programs_lie_in_the_cache(monkeypatch, tmp_path, given, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PHYSML_CACHE", given)
    monkeypatch.delenv("PHYSML_COMPILE_CACHE", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli._compile_cache()
    assert (tmp_path / os.environ["JAX_COMPILATION_CACHE_DIR"]) == tmp_path / place / "compiled"


def test_a_page_shows_another_split_under_its_own_title(capsys, trained, tmp_path):
    run = shutil.copytree(trained / "runs/tiny", tmp_path / "tiny")
    assert call(capsys, "evaluate", run, "--split", "train")[0] == 0
    words = ["report", run, "--out", tmp_path / "page.html", "--split", "train", "--title", "Learned by heart"]
    code, _, err = call(capsys, *words)
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "<title>Learned by heart</title>" in page
    assert "Score on the train split" in page
