"""Seeds trained at once: each is what it would be alone, and none holds up the others."""

import dataclasses
import json
import signal

import jax
import numpy as np
import problem
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from orbax.checkpoint import v1 as ocp
from worker import Trap

import physml
from physml import api
from physml.data import SyntheticConfig
from physml.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from physml.experiment import Evaluation, Experiment, load_experiment
from physml.models.fno import FNOConfig
from physml.parallel import mesh
from physml.parallel.mesh import Layout
from physml.steppers import STEPPERS
from physml.training import TrainingConfig, fit, fit_members
from physml.training.members import spread_members

SEEDS = (3, 0, 7)
TIMING = ("samples_per_second", "data_wait")


def train(folder, fields=None, seeds=SEEDS, steppers=None, datasets=None, layout=None, **options):
    return fit_members(
        steppers or [problem.build_stepper(seed) for seed in seeds], datasets or problem.datasets(), problem.OBJECTIVE,
        problem.config(**(fields or {})), layout or Layout(), folder, seeds=seeds, **options,
    )  # fmt: skip


def alone(folder, seed, fields=None, datasets=None, **options):
    return fit(
        problem.build_stepper(seed), datasets or problem.datasets(), problem.OBJECTIVE,
        problem.config(**(fields or {})), Layout(), folder, seed=seed, **options,
    )  # fmt: skip


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def column(history, name, kind="train"):
    return [record[name] for record in history if record["kind"] == kind]


def numbers(stepper):
    return jax.tree.leaves(nnx.state(stepper))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="one by one"),
        pytest.param(
            {"updates_per_call": 3, "accumulate": 2, "steps": 20}, id="scanned and accumulated", marks=pytest.mark.slow
        ),
        pytest.param({"average": 0.0, "select": "last"}, id="last weights", marks=pytest.mark.slow),
        pytest.param({"by": jax.vmap}, id="by vmap, as on accelerators"),
    ],
)
def test_a_member_is_the_run_with_its_seed(tmp_path, fields, monkeypatch):
    """Losses step by step, validations, the best step and the weights; to rounding of float32 sums."""
    if by := fields.get("by"):
        monkeypatch.setattr(mesh, "_in_turn", by)
    fields = {name: value for name, value in fields.items() if name != "by"}
    together = train(tmp_path / "members", fields)
    assert together.seeds == SEEDS
    for i, seed in enumerate(SEEDS):
        single = alone(tmp_path / str(seed), seed, fields)
        assert_allclose(column(together.history, f"seed{seed}/loss"), column(single.history, "loss"), rtol=2e-5)
        ours, theirs = (
            column(h, name, "valid")
            for h, name in ((together.history, f"seed{seed}/valid/loss"), (single.history, "valid/loss"))
        )
        assert_allclose(ours, theirs, rtol=2e-5)
        assert together.best[seed]["step"] == single.best["step"]
        for a, b in zip(numbers(together.stepper.member(i)), numbers(single.stepper), strict=True):
            assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    means = [np.mean([record[f"seed{seed}/loss"] for seed in SEEDS]) for record in together.history if "loss" in record]
    assert_allclose(column(together.history, "loss"), means, rtol=1e-6)


def test_members_differ_in_weights_and_in_the_order_of_the_data(tmp_path):
    """One start for both: what differs after an update is the batch."""
    result = train(tmp_path, {"steps": 1, "average": 0.0}, (1, 2), [problem.build_stepper(0)] * 2)
    first, second = (numbers(result.stepper.member(i)) for i in range(2))
    assert any(np.any(a != b) for a, b in zip(first, second, strict=True))
    assert column(result.history, "seed1/loss") != column(result.history, "seed2/loss")


def test_resume_is_bit_for_bit(tmp_path):
    fields = {"nonfinite": "skip", "steps": 20, "keep": 1}
    train(tmp_path / "whole", fields)
    for step in (3, 12):
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", fields, progress=Trap(signal.SIGTERM, step))
    result = train(tmp_path / "parts", fields)
    assert result.step == 20
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    ours, theirs = (
        ocp.load_checkpointables(tmp_path / name / "checkpoints" / "20", {"state": None}) for name in ("parts", "whole")
    )
    assert {"params", "average", "optimizer", "best", "alive", "key"} <= set(ours["state"])
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match=r"seed \[3, 0, 7\].*\[3, 0, 8\]"):
        train(tmp_path / "parts", fields, (3, 0, 8))


def test_a_member_that_diverges_is_left_out_and_the_others_go_on(tmp_path, caplog):
    steppers = [problem.build_stepper(seed) for seed in SEEDS]
    kernel = steppers[1].model.layers[1].kernel
    kernel[...] = kernel[...] * np.inf
    with caplog.at_level("WARNING", "physml.training"):
        result = train(tmp_path / "members", steppers=steppers)
    assert result.diverged == {0: 1}
    assert result.seeds == (3, 7)
    assert result.stepper.count == 2
    assert "Seed 0 diverged" in caplog.text
    assert set(column(result.history, "seed0/loss")) == {None}
    single = alone(tmp_path / "alone", 7)
    assert_allclose(column(result.history, "seed7/loss"), column(single.history, "loss"), rtol=2e-5)
    for a, b in zip(numbers(result.stepper.member(1)), numbers(single.stepper), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_left_is_an_error(tmp_path):
    spoiled = {"train": problem.Waves(spoil=((0, 3), (1, 4), (2, 5)))}
    with pytest.raises(DivergedError, match="All 3 members diverged.*checkpoint"):
        train(tmp_path, {"validate_every": 0}, datasets=spoiled)


def test_skipped_updates_are_counted_for_each(tmp_path):
    spoiled = {"train": problem.Waves(spoil=((0, 3),))}
    fields = {"nonfinite": "skip", "validate_every": 0}
    result = train(tmp_path / "members", fields, datasets=spoiled)
    for seed in SEEDS:
        single = alone(tmp_path / str(seed), seed, fields, spoiled)
        ours, theirs = column(result.history, f"seed{seed}/loss"), column(single.history, "loss")
        assert [value is None for value in ours] == [value is None for value in theirs]
        assert None in ours
    assert all(np.isfinite(leaf).all() for leaf in numbers(result.stepper))


def test_skipped_updates_in_between_good_ones_fail_no_member(tmp_path):
    spoiled = {"train": problem.Waves(spoil=((0, 3),))}
    fields = {"nonfinite": "skip", "validate_every": 0}
    history = train(tmp_path / "many", fields, datasets=spoiled).history
    bad = [[loss is None for loss in column(history, f"seed{seed}/loss")] for seed in SEEDS]
    longest = max(len(run) for row in bad for run in "".join("x" if b else " " for b in row).split())
    assert max(map(sum, bad)) > longest
    assert train(tmp_path / "few", {**fields, "skip_limit": longest + 1}, datasets=spoiled).diverged == {}


def test_a_member_without_progress_stands_still(tmp_path):
    """Validations of seeds 3, 0 and 7 in turn; the second stops at step 6, the run goes on."""
    values = iter(np.array([[3, 1, 3], [2, 2, 2], [1, 3, 1], [0, 0, 4]], float).ravel())
    fields = {"steps": 8, "validate_every": 2, "monitor": "mine", "patience": 2}
    result = train(tmp_path, fields, validate=lambda stepper: {"mine": next(values)})
    assert result.best == {3: {"step": 8, "value": 0.0}, 0: {"step": 2, "value": 1.0}, 7: {"step": 6, "value": 1.0}}
    assert result.step == 8
    assert [value is None for value in column(result.history, "seed0/loss")] == [False] * 6 + [True] * 2


def test_large_scores_can_be_the_good_ones(tmp_path):
    values = iter(np.array([[1, 3, 2], [3, 1, 2], [2, 2, 4]], float).ravel())
    fields = {"steps": 6, "validate_every": 2, "monitor": "skill", "monitor_mode": "max"}
    result = train(tmp_path, fields, validate=lambda stepper: {"skill": next(values)})
    assert result.best == {3: {"step": 4, "value": 3.0}, 0: {"step": 2, "value": 3.0}, 7: {"step": 6, "value": 4.0}}


def test_a_rollout_that_blows_up_is_a_bad_score_of_its_member(tmp_path):
    values = iter(np.array([[np.inf, 1, np.nan], [2, 2, 3], [3, 0, np.inf]], float).ravel())
    fields = {"steps": 6, "validate_every": 2, "monitor": "rollout/rmse"}
    result = train(tmp_path, fields, validate=lambda stepper: {"rollout/rmse": next(values)})
    assert result.diverged == {}
    assert result.best == {3: {"step": 4, "value": 2.0}, 0: {"step": 6, "value": 0.0}, 7: {"step": 4, "value": 3.0}}


def test_a_member_that_never_had_a_score_has_its_last_weights(tmp_path):
    values = iter(np.array([[1, np.inf, 1], [2, np.inf, 2]], float).ravel())
    fields = {"steps": 4, "validate_every": 2, "monitor": "rollout/rmse"}
    scored = train(tmp_path / "a", fields, validate=lambda stepper: {"rollout/rmse": next(values)})
    last = train(tmp_path / "b", {"steps": 4, "validate_every": 0})
    for i, same in ((0, False), (1, True)):
        pairs = zip(numbers(scored.stepper.member(i)), numbers(last.stepper.member(i)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same


@pytest.mark.parametrize("select", ["best", "last"])
def test_every_checkpoint_holds_the_scores_of_its_step(tmp_path, select):
    """Seeds 3 and 0; the second stops after step 8 of 12 and is best at step 4. Both go on from every checkpoint."""
    scores = np.array([[5, 5], [4, 3], [3, 4], [2, 6], [1, 0], [9, 9]], float)
    fields = {"steps": 12, "validate_every": 2, "checkpoint_every": 2, "keep": 20, "monitor": "mine", "patience": 2}
    fields["select"] = select

    def run(folder, first, **options):
        values = iter(scores[first:].ravel())
        return train(folder, fields, (3, 0), validate=lambda stepper: {"mine": next(values)}, **options)

    whole = run(tmp_path / "whole", 0)
    assert whole.best == {3: {"step": 10, "value": 1.0}, 0: {"step": 4, "value": 3.0}}
    for number in range(1, 6):
        step = 2 * number
        checkpoint = tmp_path / "whole/checkpoints" / str(step)
        with ocp.training.Checkpointer(checkpoint.parent) as saved:
            data = saved.checkpointables_metadata(step).custom_metadata
        assert [best["step"] for best in data["best"]] == [step, min(step, 4)]
        again = run(tmp_path / str(step), number, resume=str(checkpoint))
        assert again.best == whole.best
        for a, b in zip(numbers(again.stepper), numbers(whole.stepper), strict=True):
            assert_array_equal(a, b)


def test_members_are_spread_over_devices(tmp_path):
    one = train(tmp_path / "one", seeds=(0, 1, 2, 3), layout=Layout(member=1, data=1))
    four = train(tmp_path / "four", seeds=(0, 1, 2, 3))
    assert spread_members(Layout(), 4).mesh.shape["member"] == min(4, jax.device_count())
    for seed in range(4):
        assert_allclose(*(column(r.history, f"seed{seed}/loss") for r in (one, four)), rtol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (1, 1)}, r"seeds are \(1, 1\).*different"),
        ({"seeds": (1, -1)}, "none below 0"),
        ({"seeds": (), "steppers": [problem.build_stepper()]}, "seeds are"),
        ({"seeds": (1, 2), "steppers": [problem.build_stepper()]}, "1 steppers for 2 seeds"),
        ({"seeds": (1, 2, 3), "layout": Layout(member=2)}, "3 seeds do not divide over layout.member=2"),
        ({"fields": {"monitor": "mine", "steps": 1}}, "training.monitor is 'mine'"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, **options)


@pytest.mark.slow
def test_an_experiment_with_seeds_is_one_run(tmp_path):
    """Trained, saved, loaded and scored as an ensemble, each member from its own seed; a floor cannot be one."""
    data = SyntheticConfig("burgers", points=16, trajectories={"train": 2, "valid": 1, "test": 1}, steps=8)
    model = FNOConfig(width=4, modes=(3,), depth=1)
    config = Experiment(
        "seeds", data, model, training=TrainingConfig(steps=4, batch=4), seeds=(5, 2), evaluation=Evaluation(steps=2),
    )  # fmt: skip
    run = api.train(config, folder=tmp_path)
    loaded = physml.load(run.folder)
    assert loaded.count == 2
    assert {"crps", "crps_fair", "spread_skill"} <= set(run.scores["metric"].values)
    assert run.scores["rank_histogram"].sizes["rank"] == 3
    assert "Rank histogram" in (run.folder / "report.html").read_text()
    single = api.train(dataclasses.replace(config, name="single", seeds=(), seed=2), folder=tmp_path, scored=False)
    for a, b in zip(numbers(loaded.member(1)), numbers(single.stepper), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert load_experiment(run.folder / "config.yaml") == config
    floor = dataclasses.replace(config, name="floor", model=None, stepper=STEPPERS["persistence"]())
    with pytest.raises(ConfigError, match="no network"):
        api.train(floor, folder=tmp_path)
