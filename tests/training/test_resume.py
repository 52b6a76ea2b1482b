"""A run that is stopped and resumed is, bit for bit, the run that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import problem
import pytest
from orbax.checkpoint import v1 as ocp
from worker import Trap

from physml.errors import CheckpointError, Interrupted
from physml.parallel.mesh import Layout
from physml.training import fit

TIMING = ("samples_per_second", "data_wait")
PLAIN = {}
SCANNED = {"updates_per_call": 3, "accumulate": 2, "steps": 20}


def train(folder, fields=None, progress=None, layout=None, **options):
    return fit(
        problem.build_stepper(), problem.datasets(), problem.OBJECTIVE, problem.config(**(fields or {})),
        layout or Layout(), folder, progress=progress, **options,
    )  # fmt: skip


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def final_state(folder):
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    return jax.tree.map(np.asarray, ocp.load_checkpointables(folder / "checkpoints" / str(newest), {"state": None}))


def assert_identical(folder, reference):
    ours, theirs = final_state(folder), final_state(reference)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert {"params", "average", "optimizer", "key", "rest", "step"} <= set(ours["state"])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert records(folder) == records(reference)


@pytest.fixture(scope="module", params=[PLAIN, SCANNED], ids=["one by one", "scanned and accumulated"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, request.param, train(folder, request.param)


@pytest.mark.parametrize(
    "steps", [*(pytest.param(steps, marks=pytest.mark.slow) for steps in ((1,), (2, 3, 15))), (8,)]
)
def test_resume_at_several_steps(tmp_path, uninterrupted, steps):
    reference, fields, expected = uninterrupted
    for step in steps:
        with pytest.raises(Interrupted, match=r"Training stopped after step \d+ of \d+ on SIGTERM.*saved in"):
            train(tmp_path, fields, Trap(signal.SIGTERM, step))
    result = train(tmp_path, fields)
    assert_identical(tmp_path, reference)
    assert result.best == expected.best
    for a, b in zip(*(jax.tree.leaves(r.stepper) for r in (result, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "step"), [pytest.param("SIGTERM", 11, marks=pytest.mark.slow), ("SIGKILL", 13)])
def test_a_killed_process_resumes(tmp_path, uninterrupted, name, step):
    reference, fields, _ = uninterrupted
    command = [sys.executable, str(Path(__file__).parent / "worker.py"), tmp_path, name, str(step), json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
        # a half-written line, as a killed process may leave
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')
    else:
        assert done.returncode == 75, done.stderr
        assert name in done.stdout
    train(tmp_path, fields)
    assert_identical(tmp_path, reference)


def test_an_interrupt_from_the_keyboard_saves_too(tmp_path):
    # step 4 is reported while step 5 runs
    with pytest.raises(Interrupted, match="after step 5 of 24 on SIGINT") as caught:
        train(tmp_path, progress=Trap(signal.SIGINT, 4))
    assert caught.value.exit_code == 75
    assert (tmp_path / "checkpoints" / "5").is_dir()


@pytest.fixture
def interruptible():
    """SIGINT as Python handles it, also where the shell started the tests with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_signal_is_not_held_back(tmp_path, interruptible):
    class Impatient(Trap):
        def update(self, done, total, **values):
            if done == 2:
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.01)  # Python merges signals that it has not handled yet
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=Impatient(signal.SIGINT, 2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_best_before_the_stop_stays_the_best(tmp_path):
    """Also its checkpoint and the patience that is used up."""
    fields = {"steps": 20, "validate_every": 3, "monitor": "mine", "patience": 3, "keep": 1, "checkpoint_every": 0}
    scores = iter([1.0, 2.0, 3.0, 4.0])

    def validate(stepper):
        return {"mine": next(scores)}

    with pytest.raises(Interrupted):
        train(tmp_path, fields, Trap(signal.SIGTERM, 7), validate=validate)
    result = train(tmp_path, fields, validate=validate)
    assert result.best == {"step": 3, "value": 1.0}
    assert result.step == 12  # validations at 6, 9 and 12 were worse
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"3"}


def test_checkpoints_move_between_layouts(tmp_path, uninterrupted):
    reference, fields, expected = uninterrupted
    with pytest.raises(Interrupted):
        train(tmp_path, fields, Trap(signal.SIGTERM, 9), layout=Layout(data=1))
    result = train(tmp_path, fields, layout=Layout(data=4))
    losses = [
        [record["loss"] for record in run if record["kind"] == "train"] for run in (result.history, expected.history)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_finished_run_is_not_trained_again(tmp_path, uninterrupted):
    reference, fields, expected = uninterrupted
    before = records(reference)
    again = train(reference, fields)
    assert records(reference) == before
    assert again.step == expected.step
    for a, b in zip(*(jax.tree.leaves(r.stepper) for r in (again, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_never_refuses_an_existing_run(uninterrupted):
    reference, fields, expected = uninterrupted
    with pytest.raises(CheckpointError, match=f"up to step {expected.step}.*auto"):
        train(reference, fields, resume="never")


def test_another_seed_is_refused(uninterrupted):
    reference, fields, _ = uninterrupted
    with pytest.raises(CheckpointError, match="seed 0.*seed 5"):
        train(reference, fields, seed=5)


def test_another_number_of_steps_changes_the_schedule_and_says_so(tmp_path, caplog):
    train(tmp_path, {"steps": 2})
    train(tmp_path, {"steps": 2})
    assert "planned" not in caplog.text
    rates = [line["learning_rate"] for line in train(tmp_path, {"steps": 4}).history if "learning_rate" in line]
    assert "was planned for 2 updates and goes on to 4: the learning rate follows the new schedule" in caplog.text
    np.testing.assert_allclose(rates, [0.01, 0.005, 0.005, 0.01 * (2 - 2**0.5) / 4], rtol=1e-5)  # half a cosine each


def test_resume_from_a_path(tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    with pytest.raises(Interrupted):
        train(first, {"keep": 5}, Trap(signal.SIGTERM, 12))
    train(other, resume=str(first))
    train(first)
    assert final_state(other).keys() == final_state(first).keys()
    for a, b in zip(*(jax.tree.leaves(final_state(f)) for f in (other, first)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="cannot continue"):
        train(other, resume=str(first))
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        train(tmp_path / "new", resume=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no complete checkpoint 17"):
        train(tmp_path / "new", resume=str(first / "checkpoints" / "17"))


def test_what_goes_on_in_another_folder_has_a_best_of_its_own(tmp_path):
    """The best of the first run, which was never reached again, stays where its checkpoint is."""
    fields = {"steps": 12, "validate_every": 3, "monitor": "mine", "keep": 1}
    scores, weights = iter([1.0, 2.0, 3.0, 4.0]), []

    def validate(stepper):
        weights.append([np.array(leaf) for leaf in jax.tree.leaves(stepper)])
        return {"mine": next(scores)}

    with pytest.raises(Interrupted):
        train(tmp_path / "first", fields, Trap(signal.SIGTERM, 7), validate=validate)
    result = train(tmp_path / "other", fields, resume=str(tmp_path / "first"), validate=validate)
    assert result.best == {"step": 9, "value": 3.0}
    for a, b in zip(jax.tree.leaves(result.stepper), weights[2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_rewinding_a_run_drops_what_came_later(tmp_path):
    train(tmp_path, {"keep": 9})
    before, state = records(tmp_path), final_state(tmp_path)
    train(tmp_path, {"keep": 9}, resume=str(tmp_path / "checkpoints" / "10"))
    assert records(tmp_path) == before
    for a, b in zip(jax.tree.leaves(final_state(tmp_path)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
