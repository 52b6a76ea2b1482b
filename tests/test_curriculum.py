"""Growing rollouts: which stage is when, what carries over, and that a stopped run goes on as if it had not been."""

import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

sys.path.insert(0, str(Path(__file__).parent / "training"))
import problem
from worker import Trap

from physml.errors import ConfigError, DataError, Interrupted
from physml.objectives import Curriculum, NoisyInputs, OneStep, Pushforward, Unrolled
from physml.parallel.mesh import Layout
from physml.training import fit
from physml.training.optimizers import ParameterGroup

CURRICULUM = Curriculum(Unrolled(), steps=(1, 2, 4), updates=(5, 4), rates=(1.0, 0.5, 0.25))


def train(folder, objective=CURRICULUM, datasets=None, progress=None, layout=None, **fields):
    fields = {"steps": 14, "log_every": 1, "validate_every": 7, "checkpoint_every": 6, **fields}
    return fit(
        problem.build_stepper(), datasets or problem.datasets(), objective, problem.config(**fields),
        layout or Layout(data=1), folder, progress=progress,
    )  # fmt: skip


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait")} for line in lines]


def numbers(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result.stepper)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curriculum")
    return folder, train(folder)


def test_stages_cover_the_training():
    stages = CURRICULUM.stages(20, batch=8)
    assert [(s.objective.steps, s.start, s.stop, s.batch, s.rate) for s in stages] == [
        (1, 0, 5, 8, 1.0), (2, 5, 9, 8, 0.5), (4, 9, 20, 8, 0.25),
    ]  # fmt: skip
    equal = Curriculum(steps=(1, 2, 3)).stages(10, 8)
    assert [(s.start, s.stop) for s in equal] == [(0, 3), (3, 6), (6, 10)]
    carbon = Curriculum(steps=tuple(range(3, 32, 2)), updates=(100,), shrink=True).stages(2000, 64)
    assert [s.start for s in carbon] == list(range(0, 1500, 100))
    assert [s.batch for s in carbon][:3] == [16, 10, 8]
    assert carbon[-1].batch == 2
    assert [s.batch for s in Curriculum(steps=(1, 3, 31), shrink=True).stages(9, 64, unit=8)] == [32, 16, 8]


def test_steps_change_inside_wrapped_objectives():
    noisy = Curriculum(NoisyInputs(Pushforward(differentiate=2), std=0.3), (1, 3))
    assert noisy.stages(10, 8)[1].objective == NoisyInputs(Pushforward(3, differentiate=2), std=0.3)
    assert noisy.validation == Unrolled(5, differentiate=2)
    assert Curriculum(steps=(1, 5, 3)).frames(2) == 7
    assert Curriculum(steps=(1, 5), validation_steps=2).validation == Unrolled(2)
    with pytest.raises(ConfigError, match="Curriculum cannot hold a Curriculum.*Give it one objective"):
        Curriculum(Curriculum())
    with pytest.raises(ConfigError, match="Put the NoisyInputs into the Curriculum"):
        NoisyInputs(Curriculum(), std=0.1)


def test_training_goes_through_the_stages(uninterrupted):
    folder, result = uninterrupted
    rows = [row for row in records(folder) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert [row["stage"] for row in rows] == [1] * 5 + [2] * 4 + [3] * 5
    schedule = problem.config(steps=14).optimizer.rate(14)
    factors = np.repeat([1.0, 0.5, 0.25], [5, 4, 5])
    assert_allclose([row["learning_rate"] for row in rows], factors * [schedule(i) for i in range(14)], rtol=1e-5)


def test_validation_uses_one_objective_throughout(uninterrupted):
    """The recorded best value is the loss of four steps, with the weights that come back."""
    from physml.fields import stack

    _, result = uninterrupted
    data = problem.datasets()["valid"]
    windows = [data.read(t, range(s, s + 5)) for t, length in enumerate(data.lengths) for s in range(length - 4)]
    loss, _ = Unrolled(4)(result.stepper, stack(windows), None)
    assert_allclose(loss, result.best["value"], rtol=1e-5)
    assert "stage" not in next(row for row in result.history if row["kind"] == "valid")


def test_one_stage_is_the_plain_training(tmp_path):
    plain = train(tmp_path / "plain", Unrolled(2))
    staged = train(tmp_path / "staged", Curriculum(Unrolled(), (2,)))
    for a, b in zip(numbers(plain), numbers(staged), strict=True):
        assert_array_equal(a, b)
    assert records(tmp_path / "plain") == records(tmp_path / "staged")


def test_equal_stages_carry_everything_over(tmp_path):
    """Optimizer, average, schedule, noise and order of the data: two stages of the same length are one."""
    plain = train(tmp_path / "plain", Unrolled(2))
    staged = train(tmp_path / "staged", Curriculum(Unrolled(), (2, 2), (6,)))
    for a, b in zip(numbers(plain), numbers(staged), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("step", [5, 7, 9])  # 5 and 9 are the ends of stages
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, uninterrupted, step):
    folder, expected = uninterrupted
    with pytest.raises(Interrupted):
        train(tmp_path, progress=Trap(signal.SIGTERM, step - 1))  # reported while the next step runs
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    result = train(tmp_path)
    for a, b in zip(numbers(result), numbers(expected), strict=True):
        assert_array_equal(a, b)
    assert records(tmp_path) == records(folder)


def test_several_updates_per_call_end_with_the_stage(tmp_path):
    fields = {"updates_per_call": 3, "accumulate": 2, "optimizer": {"schedule": "constant"}}
    expected = train(tmp_path / "whole", **fields)
    rows = [row for row in expected.history if row["kind"] == "train"]
    assert [row["stage"] for row in rows] == [1] * 5 + [2] * 4 + [3] * 5
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", progress=Trap(signal.SIGTERM, 6), **fields)
    result = train(tmp_path / "parts", **fields)
    for a, b in zip(numbers(result), numbers(expected), strict=True):
        assert_array_equal(a, b)


def test_every_stage_is_traced_once_and_windows_have_its_length(tmp_path):
    traced = []

    class Spy(Unrolled):
        def __call__(self, stepper, window, key):
            traced.append((self.steps, window.frames.shape[:2]))
            return super().__call__(stepper, window, key)

    data = {"train": problem.Waves()}
    train(tmp_path, Curriculum(Spy(), (1, 3), (4,), shrink=True), data, validate_every=0)
    later = [(3, (2, 4))]  # looked at before the first update
    assert traced == [*later, (1, (4, 2)), (3, (2, 4))]


def test_batches_shrink_to_what_devices_share(tmp_path):
    result = train(tmp_path, Curriculum(Unrolled(), (1, 3), shrink=True), layout=Layout(data=4), steps=4)
    assert result.step == 4


def test_groups_keep_their_ratio():
    from physml.training.loop import plan_stages

    groups = (ParameterGroup("kernel", learning_rate=4e-3), ParameterGroup("bias", learning_rate=0.0))
    config = problem.config(steps=14, optimizer={"groups": groups})
    rates = [c.optimizer.groups[0].learning_rate for _, c in plan_stages(CURRICULUM, config, Layout(data=1), 14)]
    assert_allclose(rates, [4e-3, 2e-3, 1e-3])


@pytest.mark.parametrize(
    ("objective", "fields", "error", "message"),
    [
        (Curriculum(steps=(1, 12)), {}, DataError, "training split has no window of 13 frames.*9 to 12"),
        (Curriculum(steps=(1, 7)), {}, DataError, "validation split has no window of 8 frames"),
        (Curriculum(steps=(1, 2), updates=(14,)), {}, ConfigError, "14 updates, but .* 2 stages begin after"),
        (Curriculum(steps=tuple(range(1, 6))), {"steps": 4}, ConfigError, "5 stages begin after"),
        (Curriculum(steps=(1, 2)), {"epochs": 2}, ConfigError, "training.epochs is 2"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_it_starts(tmp_path, objective, fields, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path, objective, **fields)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_bad_fields_are_named():
    for wrong in (
        {"steps": ()}, {"steps": (0, 2)}, {"updates": (1, 2)}, {"updates": (0,)}, {"rates": (1.0,)},
        {"rates": (1.0, 1.0, 1.0, 0.0)}, {"objective": OneStep()}, {"objective": Curriculum()},
        {"validation_steps": -1},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Curriculum(**wrong)


def test_its_own_call_is_that_of_the_last_stage():
    from physml.fields import stack

    data = problem.datasets()["train"]
    window = stack([data.read(0, range(5))])
    stepper = problem.build_stepper()
    assert_array_equal(CURRICULUM(stepper, window, None)[0], Unrolled(4)(stepper, window, None)[0])


@pytest.mark.parametrize(("objective", "stops"), [(Curriculum(Unrolled(), (1, 2), (6,)), 8), (Unrolled(2), 4)])
def test_patience_counts_in_the_last_stage_alone(tmp_path, objective, stops):
    """No score is better than the first; earlier stages are trained to their end all the same."""
    fields = {"steps": 12, "validate_every": 2, "monitor": "constant", "patience": 1, "optimizer": {}}
    result = fit(
        problem.build_stepper(), problem.datasets(), objective, problem.config(**fields), Layout(data=1), tmp_path,
        validate=lambda stepper: {"constant": 1.0},
    )  # fmt: skip
    assert result.step == stops
