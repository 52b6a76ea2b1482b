"""The loop: what it learns, writes, returns and refuses."""

import dataclasses
import json

import jax
import numpy as np
import problem
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import api
from physml.data import DataConfig, fit_normalizer
from physml.data.sidecar import totals
from physml.errors import ConfigError, DataError, DivergedError
from physml.experiment import Evaluation, Experiment
from physml.metrics.losses import MSE
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.objectives import Curriculum, OneStep, Unrolled
from physml.parallel.mesh import Layout
from physml.steppers import DirectConfig, stack_members
from physml.training import FitResult, OptimizerConfig, TrainingConfig, fit


def train(
    folder, datasets=None, objective=problem.OBJECTIVE, layout=None, stepper=None, options=None, **fields
) -> FitResult:
    return fit(
        stepper or problem.build_stepper(), datasets or problem.datasets(), objective, problem.config(**fields),
        layout or Layout(), folder, **(options or {}),
    )  # fmt: skip


def losses(result, kind="train", name="loss"):
    return [record[name] for record in result.history if record["kind"] == kind]


class Watch:
    """A progress that remembers."""

    def __init__(self):
        self.updates, self.messages = [], []

    def update(self, done, total, **values):
        self.updates.append((done, total, values))

    def message(self, text):
        self.messages.append(text)


class Tracker:
    def __init__(self):
        self.calls = []

    def start(self, config):
        self.calls.append(("start", json.dumps(config)))

    def log(self, step, values):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, watch, tracker = tmp_path_factory.mktemp("run"), Watch(), Tracker()
    result = train(folder, steps=60, options={"progress": watch, "tracker": tracker})
    return result, folder, watch, tracker


def test_it_learns(trained):
    result, *_ = trained
    assert result.step == 60
    assert np.mean(losses(result)[-5:]) < 0.7 * np.mean(losses(result)[:5])
    assert losses(result, "valid", "valid/loss")[-1] < 0.7 * losses(result)[0]


def test_every_step_is_recorded_once(trained):
    result, folder, *_ = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 61))
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [8, 16, 24, 32, 40, 48, 56, 60]
    first = lines[0]
    assert {"loss", "loss/u", "loss/v", "gradient", "learning_rate", "skipped"} <= set(first)
    assert_allclose((first["loss/u"] + first["loss/v"]) / 2, first["loss"], rtol=1e-5)


def test_progress_and_tracker_see_the_run(trained):
    result, _, watch, tracker = trained
    assert "ompiling" in watch.messages[0]
    assert watch.updates[-1][:2] == (60, 60)
    assert set(watch.updates[-1][2]) == {"loss", "samples/s", "waiting"}
    assert_allclose(watch.updates[-1][2]["loss"], losses(result)[-1])
    assert tracker.calls[0][0] == "start"
    assert tracker.calls[-1] == ("finish",)
    assert [step for step, *_ in tracker.calls[1:-1]] == [record["step"] for record in result.history]


def test_progress_shows_the_last_update_of_a_call_that_is_not_full(tmp_path):
    watch = Watch()
    result = train(tmp_path, steps=5, updates_per_call=4, options={"progress": watch})
    assert_allclose([values["loss"] for *_, values in watch.updates], [losses(result)[3], losses(result)[4]])


def test_a_tracker_that_does_not_start_says_why(tmp_path):
    class Offline(Tracker):
        def start(self, config):
            raise OSError("no network")

        def finish(self):
            raise AttributeError("run")  # what the adapters give that did not start

    with pytest.raises(OSError, match="no network"):
        train(tmp_path, steps=1, options={"tracker": Offline()})


def test_the_returned_stepper_holds_the_averaged_weights(trained):
    """Its validation loss is the recorded one, and it is not what the last raw weights give."""
    result, folder, *_ = trained
    data = problem.datasets()["valid"]
    windows = [data.read(t, range(s, s + 2)) for t, length in enumerate(data.lengths) for s in range(length - 1)]
    from physml.fields import stack

    loss, _ = problem.OBJECTIVE(result.stepper, stack(windows), None)
    assert_allclose(loss, result.best["value"], rtol=1e-5)
    assert result.best["value"] == min(losses(result, "valid", "valid/loss"))
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(nnx.state(result.stepper)))


def test_the_stepper_given_is_left_alone(tmp_path):
    stepper = problem.build_stepper()
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(stepper))]
    train(tmp_path, stepper=stepper, steps=3)
    for a, b in zip(before, jax.tree.leaves(nnx.state(stepper)), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("fields", [{}, {"accumulate": 2, "updates_per_call": 3}])
def test_one_and_four_devices_give_the_same_losses(tmp_path, fields):
    one = train(tmp_path / "one", layout=Layout(data=1), **fields)
    four = train(tmp_path / "four", layout=Layout(data=4), **fields)
    assert_allclose(losses(one), losses(four), rtol=1e-5)
    assert_allclose(*(losses(r, "valid", "valid/loss") for r in (one, four)), rtol=1e-5)


def test_unrolled_training_runs(tmp_path):
    result = train(tmp_path, objective=Unrolled(3, differentiate=1), steps=12)
    assert losses(result)[-1] < losses(result)[0]


KEPT = {
    "steps": 8, "validate_every": 2, "checkpoint_every": 2, "keep": 1, "monitor": "mine", "average": 0.0,
    "optimizer": {"schedule": "constant"},
}  # fmt: skip


def scored(folder, scores, **fields):
    """A training whose four validations give `scores`, and the parameters at each of them."""
    scores, seen = iter(scores), []

    def validate(stepper):
        seen.append(jax.tree.map(np.array, nnx.state(stepper, nnx.Param)))
        return {"mine": next(scores)}

    return train(folder, options={"validate": validate}, **KEPT, **fields), seen


def assert_same(parameters, stepper):
    for a, b in zip(*map(jax.tree.leaves, (parameters, nnx.state(stepper, nnx.Param))), strict=True):
        assert_array_equal(a, b)


def test_the_best_weights_come_back_and_their_checkpoint_stays(tmp_path):
    result, seen = scored(tmp_path, [3.0, 1.0, 2.0, 4.0])
    assert result.best == {"step": 4, "value": 1.0}
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 8]
    assert_same(seen[1], result.stepper)
    last, none = scored(tmp_path, [], select="last")  # of the finished run
    assert none == []
    assert_same(seen[3], last.stepper)


@pytest.mark.parametrize(("mode", "scores"), [("min", [2.0, 1.0, 1.0, 3.0]), ("max", [1.0, 2.0, 2.0, 0.0])])
def test_the_first_of_equal_scores_stays_the_best(tmp_path, mode, scores):
    """Times of correlation are counted in steps: equal ones are usual."""
    result, seen = scored(tmp_path, scores, monitor_mode=mode)
    assert result.best["step"] == 4
    assert_same(seen[1], result.stepper)


def unable(stepper):
    raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("every", "validate", "error", "step"),
    [(0, lambda stepper: {"mine": 1.0}, ConfigError, 6), (4, unable, OSError, 4)],
)
def test_a_validation_that_fails_loses_no_update(tmp_path, every, validate, error, step):
    fields = {"steps": 6, "validate_every": every, "checkpoint_every": 0, "datasets": {"train": problem.Waves()}}
    with pytest.raises(error, match="valid/loss|full"):
        train(tmp_path / "run", **fields, options={"validate": validate})
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    scores = {"validate": lambda stepper: {"mine": 1.0}}
    result = train(tmp_path / "run", **fields, monitor="mine", options=scores)
    assert [record["step"] for record in result.history if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    whole = train(tmp_path / "whole", **fields)
    assert_same(nnx.state(whole.stepper, nnx.Param), result.stepper)


def test_patience_needs_something_to_validate(tmp_path):
    with pytest.raises(ConfigError, match="nothing to validate.*split 'valid'"):
        train(tmp_path, datasets={"train": problem.Waves()}, patience=2)


class Refusing(MSE):
    """A loss that cannot score three steps."""

    def errors(self, prediction, truth, spec, mask=None):
        if prediction.shape[1] == 3:
            raise ConfigError("three steps")
        return super().errors(prediction, truth, spec, mask)


def test_a_stage_that_cannot_work_is_refused_before_the_first(tmp_path):
    stages = Curriculum(Unrolled(2, loss=Refusing()), steps=(1, 3))
    with pytest.raises(ConfigError, match="three steps"):
        train(tmp_path, objective=stages, steps=8, validate_every=0, datasets={"train": problem.Waves()})
    assert (tmp_path / "metrics.jsonl").is_file() is False


def test_large_scores_can_be_the_good_ones(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    result = train(
        tmp_path, steps=6, validate_every=2, monitor="skill", monitor_mode="max",
        options={"validate": lambda stepper: {"skill": next(scores)}},
    )  # fmt: skip
    assert result.best == {"step": 4, "value": 3.0}
    assert "4" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_training_stops_early_without_progress(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    result = train(
        tmp_path, steps=10, validate_every=2, monitor="mine", patience=2,
        options={"validate": lambda stepper: {"mine": next(scores)}},
    )  # fmt: skip
    assert (result.step, result.best["step"]) == (8, 4)


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path):
    for calls in (1, 4):
        folder = tmp_path / str(calls)
        fields = {"checkpoint_every": 4, "validate_every": 0, "steps": 40, "updates_per_call": calls, "average": 0.0}
        optimizer = {"name": "sgd", "learning_rate": 2e3, "clip": 0.0, "beta1": 0.0, "schedule": "constant"}
        with pytest.raises(DivergedError) as caught:
            train(folder, optimizer=optimizer, **fields)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        failed = records[-1]["step"] + 1
        assert f"Step {failed} gave loss" in str(caught.value)
        good = (failed - 1) // 4 * 4
        where = f"checkpoints/{good}" if good else "No checkpoint was written yet"
        assert where in str(caught.value)


def test_bad_data_can_be_skipped_and_is_counted(tmp_path):
    data = {"train": problem.Waves(spoil=((0, 3),))}
    with pytest.raises(DivergedError, match="nonfinite"):
        train(tmp_path / "stop", datasets=data, validate_every=0)
    result = train(tmp_path / "skip", datasets=data, validate_every=0, nonfinite="skip")
    assert result.step == 24
    bad = [record for record in result.history if record["loss"] is None]
    assert 0 < len(bad) < 24
    assert result.history[-1]["skipped"] == len(bad)
    json.loads((tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(result.stepper)))


def test_endless_skipping_is_an_error(tmp_path):
    data = {"train": problem.Waves((4,), spoil=((0, 1), (0, 2)))}
    with pytest.raises(DivergedError, match="Step 5 .*5th time in a row"):
        train(tmp_path, datasets=data, nonfinite="skip", skip_limit=5, validate_every=0)


def test_skipped_updates_in_between_good_ones_are_no_end(tmp_path):
    data = {"train": problem.Waves(spoil=((0, 3),))}
    fields = {"datasets": data, "nonfinite": "skip", "validate_every": 0}
    bad = [record["loss"] is None for record in train(tmp_path / "many", **fields).history]
    longest = max(map(len, "".join("x" if b else " " for b in bad).split()))
    assert sum(bad) > longest
    assert train(tmp_path / "few", skip_limit=longest + 1, **fields).step == len(bad)


def test_a_dataset_that_only_reads_is_enough(tmp_path):
    """Statistics by hand, whatever the pieces; an experiment on splits of one's own."""
    data = problem.Waves((12, 9, 1))
    values = np.concatenate(data.frames)
    increments = np.concatenate([np.diff(frames, axis=0) for frames in data.frames])
    for chunk in (None, 2, 5):
        found = totals(data, chunk=chunk)
        assert found.frames == 22
        assert_allclose(found.moments["channels"].mean, values.mean((0, 1)), atol=1e-6)
        assert_allclose(found.moments["increments"].rms, np.sqrt((increments**2).mean((0, 1))), rtol=1e-5)
    assert_allclose(fit_normalizer(data).increments[...], np.sqrt((increments**2).mean((0, 1))), rtol=1e-5)
    experiment = Experiment(
        data=DataConfig("nowhere"), model=FNOConfig(width=4, modes=(3,), depth=1),
        training=TrainingConfig(steps=2, batch=4), evaluation=Evaluation(steps=3, metrics=("rmse",)),
    )  # fmt: skip
    run = api.train(experiment, folder=tmp_path, splits={"train": data, "test": problem.Waves((8,), seed=1)})
    assert np.isfinite(run.scores["score"]).all()


def test_slow_data_is_mentioned_once(tmp_path):
    import time

    class Slow(problem.Waves):
        def read(self, trajectory, frames):
            time.sleep(0.006)
            return super().read(trajectory, frames)

    watch = Watch()
    train(
        tmp_path, datasets={"train": Slow()}, steps=50, validate_every=0, checkpoint_every=0, threads=0,
        options={"progress": watch},
    )  # fmt: skip
    assert sum("waits for data" in text for text in watch.messages) == 1


def test_validation_counts_every_window_once(tmp_path):
    """11 windows in batches of 8 on four devices: 8, and 3 that are repeated to fill the devices."""
    data = {"train": problem.Waves(), "valid": problem.Waves((12,), seed=3)}
    result = train(tmp_path, datasets=data, steps=1, average=0.0, optimizer={"learning_rate": 1e-12})
    from physml.fields import stack

    windows = stack([data["valid"].read(0, range(i, i + 2)) for i in range(11)])
    loss, aux = problem.OBJECTIVE(problem.build_stepper(), windows, None)
    record = result.history[-1]
    assert_allclose(record["valid/loss"], loss, rtol=1e-5)
    assert_allclose([record["valid/loss/u"], record["valid/loss/v"]], aux["channel"], rtol=1e-5)


def test_epochs_set_the_number_of_steps(tmp_path):
    assert train(tmp_path, epochs=1, validate_every=0).step == 4  # 11 + 8 + 9 windows in batches of 8


def test_bfloat16_trains(tmp_path):
    result = train(tmp_path, precision="bfloat16", steps=40)
    assert np.mean(losses(result)[-5:]) < 0.8 * np.mean(losses(result)[:5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"datasets": {"valid": problem.Waves()}}, DataError, "no \"train\" split, only \\['valid'\\]"),
        ({"datasets": {"train": problem.Waves(())}}, DataError, "0 trajectories have no frames"),
        ({"datasets": {"train": problem.Waves((2, 3))}, "objective": Unrolled(4)}, DataError, "5 frames.*2 to 3"),
        ({"datasets": {"train": problem.Waves(), "valid": problem.Waves((1,))}}, DataError, "validation split"),
        ({"batch": 6}, ConfigError, "batch of 6 .* 4 devices.*4 or 8"),
        ({"batch": 8, "accumulate": 4}, ConfigError, "batch of 2 .* 4 devices"),
        ({"objective": OneStep(MSE(reduction="sum")), "accumulate": 2}, ConfigError, "reduction='sum'"),
        ({"monitor": "valid/lose", "steps": 1}, ConfigError, "valid/loss"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path, **change)


def test_a_stepper_without_parameters_is_refused(tmp_path):
    class Nothing(nnx.Module):
        def __call__(self, fields, scalars):
            return fields

    stepper = DirectConfig().build(problem.SPEC, Nothing(), Normalizer.identity(problem.SPEC))
    with pytest.raises(ConfigError, match="no trainable parameters"):
        train(tmp_path, stepper=stepper)


class Own(nnx.Module):
    """A stepper of the user's own, whose network has another name."""

    def __init__(self):
        inner = problem.build_stepper()
        self.network, self.history, self.spec = inner.model, inner.history, inner.spec


@pytest.mark.parametrize("stepper", [Own(), stack_members([problem.build_stepper(seed) for seed in (0, 1)])])
def test_the_precision_of_a_network_that_is_not_there_is_refused(tmp_path, stepper):
    with pytest.raises(ConfigError, match="no network as `model`.*precision='float32'.*fit_members"):
        train(tmp_path, stepper=stepper, precision="bfloat16")


def test_the_default_configuration_is_frozen_and_hashable():
    assert hash(TrainingConfig()) == hash(TrainingConfig(optimizer=OptimizerConfig()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().steps = 3
