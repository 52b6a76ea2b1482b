"""Journal and trackers: what is written, and what is said when a package is absent."""

import json
import sys
import types

import pytest

from physml.errors import DependencyError
from physml.training.journal import Journal
from physml.training.tracking import TRACKERS


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_journal_goes_on_where_it_resumes(tmp_path):
    journal = Journal(tmp_path, 0)
    for step in (1, 2, 3):
        journal.add("train", step, {"loss": step / 2, "skipped": 0})
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # cut off by a kill
    journal = Journal(tmp_path, 2)
    assert [record["step"] for record in journal.records] == [1, 2]
    journal.add("train", 3, {"loss": float("nan"), "skipped": 1})
    journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[-1] == {"kind": "train", "step": 3, "loss": None, "skipped": 1}


def test_a_new_run_begins_an_empty_journal(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    Journal(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_other_processes_keep_their_hands_off_the_file(tmp_path):
    journal = Journal(tmp_path / "run", 0, tracker=pytest.fail, write=False)
    journal.add("train", 1, {"loss": 1.0})
    journal.close()
    assert journal.records == [{"kind": "train", "step": 1, "loss": 1.0}]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_an_absent_package_names_the_extra(tmp_path, monkeypatch, name):
    for module in ("tensorboardX", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=r"physml\[track\]"):
        TRACKERS[name](tmp_path / "run")


class Recorder(types.ModuleType):
    """Stands for a tracking package and remembers its calls."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "module", "log"),
    [
        ("tensorboard", "tensorboardX", ("add_scalar", ("loss", 0.5, 7), {})),
        ("wandb", "wandb", ("log", ({"loss": 0.5},), {"step": 7})),
        ("mlflow", "mlflow", ("log_metrics", ({"loss": 0.5},), {"step": 7})),
    ],
)
def test_adapters_pass_numbers_on(tmp_path, monkeypatch, name, module, log):
    recorder = Recorder(module)
    recorder.info = types.SimpleNamespace(run_id="5")
    recorder.exceptions = types.SimpleNamespace(MlflowException=KeyError)
    monkeypatch.setitem(sys.modules, module, recorder)
    tracker = TRACKERS[name](tmp_path / "run")
    tracker.start({"seed": 0})
    tracker.log(7, {"loss": 0.5})
    tracker.finish()
    assert log in recorder.calls
    assert len(recorder.calls) >= 3


def test_a_resumed_run_goes_on_at_its_tracker_and_another_does_not(tmp_path, monkeypatch):
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    for folder in ("a/run", "a/run", "b/run"):
        TRACKERS["wandb"](tmp_path / folder).start({})
    first, resumed, other = (options["id"] for name, _, options in recorder.calls if name == "init")
    assert first == resumed != other


def test_a_run_that_mlflow_lost_begins_anew(tmp_path, monkeypatch):
    class Lost(Exception):
        pass

    known = []

    def start_run(run_name, run_id=None):
        if run_id not in (None, *known):
            raise Lost
        if run_id is None:
            known.append(f"number {len(known)}")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or known[-1]))

    module = types.SimpleNamespace(
        start_run=start_run, log_dict=lambda *_: None, exceptions=types.SimpleNamespace(MlflowException=Lost)
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for _ in range(2):
        TRACKERS["mlflow"](tmp_path).start({})
    assert known == ["number 0"]
    known[:] = ["of others"]
    TRACKERS["mlflow"](tmp_path).start({})
    assert known == ["of others", "number 1"]
    assert (tmp_path / "mlflow.id").read_text() == "number 1"
