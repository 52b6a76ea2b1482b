"""Two real processes on loopback train as one does."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from physml.errors import ConfigError
from physml.parallel.mesh import Layout, start_distributed

TRAINING = pathlib.Path(__file__).resolve().parent.parent / "training"
sys.path.insert(0, str(TRAINING))

import problem  # noqa: E402

FIELDS = {"steps": 10, "validate_every": 4, "checkpoint_every": 4, "log_every": 1}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_two(folder, fields, name="SIGTERM", step=10**6):
    """Exit codes and outputs of two processes that train with one device each."""
    return both([sys.executable, str(TRAINING / "worker.py"), str(folder), name, str(step), json.dumps(fields)])


def both(command):
    """Exit codes and outputs of a command in two processes with one device each."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    common = {
        **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
        "PHYSML_COORDINATOR": f"127.0.0.1:{free_port()}", "PHYSML_PROCESSES": "2", "PHYSML_TIMEOUT": "120",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            command, env={**common, "PHYSML_PROCESS": str(number)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:  # jax catches SIGTERM in a multi-process run: a hung worker would ignore it
                worker.kill()
    return [worker.returncode for worker in workers], outputs


def numbers(records, kind, name):
    return [record[name] for record in records if record["kind"] == kind]


def test_two_processes_train_save_and_stop_together(tmp_path):
    from physml.training import fit

    def one_process(folder, layout, **options):
        arguments = (problem.build_stepper(), problem.datasets(), problem.OBJECTIVE, problem.config(**FIELDS))
        return fit(*arguments, layout, folder, **options)

    single = one_process(tmp_path / "single", Layout(data=2))

    # A signal to one process stops both at the same step, and their checkpoint is whole.
    codes, outputs = run_two(tmp_path / "double", FIELDS, "SIGTERM", step=6)
    assert codes == [75, 75], outputs
    stopped = json.loads((tmp_path / "double" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 6 <= stopped < 10
    assert all(f"after step {stopped} of 10" in output for output in outputs), outputs

    # Two processes go on from there.
    codes, outputs = run_two(tmp_path / "double", FIELDS)
    assert codes == [0, 0], outputs
    records = [json.loads(line) for line in (tmp_path / "double" / "metrics.jsonl").read_text().splitlines()]
    assert numbers(records, "train", "step") == list(range(1, 11))  # process 0 alone writes
    np.testing.assert_allclose(numbers(records, "train", "loss"), numbers(single.history, "train", "loss"), rtol=1e-5)
    np.testing.assert_allclose(
        numbers(records, "valid", "valid/loss"), numbers(single.history, "valid", "valid/loss"), rtol=1e-5
    )

    # What two processes wrote, one process with four devices reads and continues.
    again = one_process(
        tmp_path / "single again", Layout(data=4), resume=str(tmp_path / "double" / "checkpoints" / "8")
    )
    np.testing.assert_allclose(
        numbers(again.history, "train", "loss"), numbers(records, "train", "loss")[8:], rtol=1e-5
    )


EXPERIMENT = """
from physml import Evaluation, Experiment, SyntheticConfig, TrainingConfig
from physml.evaluate.validation import RolloutValidation
from physml.models import FNOConfig
config = Experiment(
    name="both",
    data=SyntheticConfig("burgers", points=16, trajectories={"train": 4, "valid": 2, "test": 2}, steps=6),
    model=FNOConfig(width=4, modes=(4,), depth=1),
    training=TrainingConfig(steps=4, batch=4, validate_every=2, checkpoint_every=2),
    validation=RolloutValidation(steps=2),
    evaluation=Evaluation(steps=2, starts=1),
)
"""


TWICE = """
import sys
from physml.api import train
from physml.parallel.mesh import start_distributed
start_distributed()
print(train(sys.argv[1], folder=sys.argv[2]).folder, "is trained")
train(sys.argv[1], folder=sys.argv[2])
"""


def test_two_processes_train_a_run_and_refuse_it_together(tmp_path):
    (tmp_path / "both.py").write_text(EXPERIMENT)
    codes, outputs = both([sys.executable, "-c", TWICE, str(tmp_path / "both.py"), str(tmp_path / "runs")])
    assert codes == [1, 1], outputs
    assert all("runs/both is trained" in output for output in outputs), outputs
    assert (tmp_path / "runs/both/report.html").is_file()
    # Process 0 alone looks at the folder; the other one would wait for it.
    assert all("ConfigError" in output and "already holds a run" in output for output in outputs), outputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "PHYSML_PROCESSES must be a whole number, but it is None"),
        ({"PHYSML_PROCESSES": "two"}, "it is 'two'"),
        ({"PHYSML_PROCESSES": "2", "PHYSML_PROCESS": "2"}, "numbered 0 to 1"),
    ],
)
def test_incomplete_descriptions_are_named(monkeypatch, settings, message):
    monkeypatch.setenv("PHYSML_COORDINATOR", "127.0.0.1:1")
    for name in ("PHYSML_PROCESSES", "PHYSML_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        start_distributed()


def test_nothing_happens_without_a_description(monkeypatch):
    monkeypatch.delenv("PHYSML_COORDINATOR", raising=False)
    monkeypatch.delenv("PHYSML_DISTRIBUTED", raising=False)
    start_distributed()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
