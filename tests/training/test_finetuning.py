"""Starting from trained weights: what is frozen, what is loaded and reported, and what training goes by."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml import Experiment, SyntheticConfig, TrainingConfig, api
from physml.errors import CheckpointError, ConfigError, DataError
from physml.evaluate import RolloutScores, RolloutValidation, evaluate_stepper
from physml.experiment import Evaluation, load_experiment, to_yaml
from physml.fields import Axis, Channel, Grid, Spec
from physml.layers.lora import LoRA, parameters
from physml.models import MODELS
from physml.normalize import Normalizer
from physml.parallel.mesh import Layout
from physml.saving import LoadReport, StartFrom, build_stepper, load_into
from physml.steppers import STEPPERS, DirectConfig, IntervalConfig, ResidualConfig
from physml.steppers.describe import parameter_count
from physml.training import OptimizerConfig, fit
from physml.training.optimizers import ParameterGroup
from physml.training.update import initial_state, split

FROZEN = (ParameterGroup(r"layers\.0", learning_rate=0.0),)


def numbers(stepper):
    return {path: np.array(variable[...]) for path, variable in parameters(stepper).items()}


# Frozen groups


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_frozen_parameters_stay_bit_for_bit(tmp_path, name):
    """No update, no decay, no moving average: only the rest learns."""
    optimizer = {"name": name, "weight_decay": 0.3, "groups": FROZEN}
    stepper = problem.build_stepper()
    result = fit(
        stepper, problem.datasets(), problem.OBJECTIVE, problem.config(steps=6, optimizer=optimizer), Layout(), tmp_path
    )
    before, after = numbers(stepper), numbers(result.stepper)
    for path in before:
        assert np.array_equal(before[path], after[path]) == ("layers.0" in path), path


def test_frozen_parameters_take_no_memory():
    config = problem.config(optimizer={"groups": FROZEN})
    parts, params, rest = split(problem.build_stepper(), config.optimizer)
    state = initial_state(params, config.optimizer.build(10), config)
    trained = 8 * 2 + 2  # the last layer
    for tree, copies in ((state["params"], 1), (state["average"], 1), (state["optimizer"], 2)):
        sizes = [leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim]
        assert sum(sizes) == copies * trained
    whole = parts.merge(params, rest)
    for a, b in zip(numbers(whole).values(), numbers(problem.build_stepper()).values(), strict=True):
        assert_array_equal(a, b)


def test_frozen_gradients_do_not_count_in_the_norm(tmp_path):
    def first(groups, clip):
        config = problem.config(steps=1, optimizer={"groups": groups, "clip": clip})
        result = fit(problem.build_stepper(), problem.datasets(), problem.OBJECTIVE, config, Layout(),
                     tmp_path / str(len(groups)))  # fmt: skip
        return result.history[0]["gradient"]

    assert first(FROZEN, 1.0) < first((), 1.0)


def test_groups_that_cannot_work_name_the_nearest_paths():
    stepper = problem.build_stepper()
    with pytest.raises(ConfigError, match=r"\['layer\\\\\.1'\].*none matches.*model\.layers\.1\.bias"):
        split(stepper, OptimizerConfig(groups=(ParameterGroup(r"layer\.1", learning_rate=0.0),)))
    taken = (ParameterGroup("model", learning_rate=0.0), ParameterGroup(r"layers\.1"))
    with pytest.raises(ConfigError, match="earlier groups take all.*Move it to the front"):
        split(stepper, OptimizerConfig(groups=taken))
    with pytest.raises(ConfigError, match="All 42 parameters of Residual are frozen.*learning rate above 0"):
        split(stepper, OptimizerConfig(groups=(ParameterGroup("model", learning_rate=0.0),)))


# Partial loading

FNO = MODELS["fno"](width=4, modes=(4,), depth=1, channel_mlp_expansion=0.0)


def spec_of(points=8, channels="uv", time_step=1.0):
    return Spec(Grid((Axis.uniform("x", points),)), tuple(map(Channel, channels)), time_step=time_step)


def make(spec, model=FNO, stepper=ResidualConfig(), seed=0, scale=2.0):  # noqa: B008
    n = len(spec.channels)
    return build_stepper(stepper, model, spec, Normalizer(spec, [0.5] * n, [scale] * n, [0.1] * n), seed=seed)


def test_the_same_model_is_loaded_whole():
    source, stepper = make(spec_of(), seed=1), make(spec_of(), scale=3.0)
    report = load_into(stepper, source, "there", strict=True)
    assert report.complete
    assert report.normalizer == "saved"
    assert report.numbers[0] == report.numbers[1] == parameter_count(stepper)
    for a, b in zip(*(jax.tree.leaves(nnx.state(s)) for s in (source, stepper)), strict=True):
        assert_array_equal(a, b)


def test_other_channels_are_reported_by_hand():
    source, stepper = make(spec_of(), seed=1), make(spec_of(channels="uvw"))
    before, there = numbers(stepper), numbers(source)
    report = load_into(stepper, source, "there")
    after = numbers(stepper)
    # Two channels and one coordinate came in; three and one do now. The lifting has 8 hidden channels, as the readout.
    assert report.reshaped == (
        ("model.lifting.first.weight", (8, 3), (8, 4)),
        ("model.projection.second.bias", (2,), (3,)),
        ("model.projection.second.weight", (2, 8), (3, 8)),
    )
    assert report.fresh == report.unused == ()
    assert set(report.loaded) == set(before) - set(report.untrained)
    for path in before:
        assert_array_equal(after[path], (before if path in report.untrained else there)[path])
    assert report.normalizer == "data"
    assert "['u', 'v'], but the data has ['u', 'v', 'w']" in report.notes[0]
    assert_allclose(stepper.normalizer.frames.scale[...], 2.0)
    text = str(report)
    assert "model.lifting.first.weight: (8, 3) there, (8, 4) here" in text
    count = sum(there[path].size for path in report.loaded)
    assert f"{count:,} of {parameter_count(stepper):,} numbers" in text
    assert LoadReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_other_depth_grid_and_stepper():
    source = make(spec_of(), seed=1, scale=5.0)
    deeper = make(spec_of(12), dataclasses.replace(FNO, depth=2), DirectConfig())
    report = load_into(deeper, source, "there")
    assert report.fresh
    assert all(path.startswith("model.blocks.1.") for path in report.fresh)
    assert report.unused == report.reshaped == ()
    assert report.normalizer == "saved"  # the channels are the same
    assert_allclose(deeper.normalizer.frames.scale[...], 5.0)
    assert any("(8,) points there, (12,) here" in note for note in report.notes)
    assert any("residual" in note and "direct" in note for note in report.notes)
    back = load_into(make(spec_of()), deeper, "there")
    assert back.unused == report.fresh


def test_normalizers_are_kept_on_wish_and_where_they_hold():
    source = make(spec_of(), seed=1, scale=5.0)
    assert load_into(make(spec_of()), source, "there", normalizer="data").normalizer == "data"
    slower = make(spec_of(time_step=2.0))  # increments over another time have another scale
    assert load_into(slower, source, "there").normalizer == "data"
    assert_allclose(slower.normalizer.frames.scale[...], 2.0)


def test_scales_of_other_intervals_are_not_taken_over():
    """Both hold three numbers, but of steps of another length."""

    def stepped(intervals, scale):
        spec, increments = spec_of(channels="u"), {steps: [scale * steps] for steps in intervals}
        normalizer = Normalizer(spec, [0.0], [scale], [scale], intervals=increments)
        return build_stepper(IntervalConfig(intervals), FNO, spec, normalizer, seed=0)

    source, other, same = stepped((1, 2, 4), 0.5), stepped((1, 3, 6), 1.0), stepped((1, 2, 4), 1.0)
    report = load_into(other, source, "there")
    assert report.complete
    assert report.normalizer == "data"
    assert "intervals: (1, 2, 4) there, (1, 3, 6) here" in report.notes
    assert_array_equal(other.normalizer.interval_increments[...], [[1.0], [3.0], [6.0]])
    assert load_into(same, source, "there").normalizer == "saved"
    assert_array_equal(same.normalizer.interval_increments[...], [[0.5], [1.0], [2.0]])


@pytest.mark.parametrize(("there", "here"), [(False, True), (True, False), (False, False)])
def test_gaps_in_either_data_stay_allowed(there, here):
    source, stepper = make(spec_of(), seed=1, scale=5.0), make(spec_of())
    for own, gaps in ((source.normalizer, there), (stepper.normalizer, here)):
        own.masked[...] = jnp.full_like(own.masked[...], gaps)
    assert load_into(stepper, source, "there").normalizer == "saved"
    assert_allclose(stepper.normalizer.frames.scale[...], 5.0)
    assert bool(stepper.normalizer.masked[...].all()) == (there or here)


def test_a_bare_model_goes_into_the_stepper():
    source, stepper = make(spec_of(), seed=1), make(spec_of())
    report = load_into(stepper, source.model, "there")
    assert report.complete
    assert report.normalizer == "data"
    assert_array_equal(stepper.model.lifting.first.weight[...], source.model.lifting.first.weight[...])


def test_what_does_not_fit_is_said_and_changes_nothing():
    stepper = make(spec_of(channels="uvw"))
    before = numbers(stepper)
    with pytest.raises(CheckpointError, match=r"(?s)strict:\n.*lifting\.first\.weight: \(8, 3\) there"):
        load_into(stepper, make(spec_of(), seed=1), "there", strict=True)
    with pytest.raises(CheckpointError, match="Nothing of there fits FNO.*widths"):
        load_into(stepper, problem.build_stepper(), "there")
    for path, value in numbers(stepper).items():
        assert_array_equal(value, before[path])
    with pytest.raises(ConfigError, match="empty path"):
        StartFrom("")
    with pytest.raises(ConfigError, match="normalizer is 'both'. Valid: data, saved"):
        StartFrom("a", normalizer="both")


def test_running_statistics_are_loaded():
    scot = MODELS["poseidon_scot"](4, (1, 1), (1, 1), (1, 0), patch=2, window=2, skip="resnet")
    square = Spec(Grid((Axis.uniform("x", 8), Axis.uniform("y", 8))), (Channel("u"),))
    source, stepper = make(square, scot, seed=1), make(square, scot)
    running = jax.tree.leaves(nnx.state(source, nnx.BatchStat))
    assert running
    for _, leaf in nnx.to_flat_state(nnx.state(source, nnx.BatchStat)):
        leaf[...] = leaf[...] + 0.25
    assert load_into(stepper, source, "there").complete
    for a, b in zip(*(jax.tree.leaves(nnx.state(s, nnx.BatchStat)) for s in (source, stepper)), strict=True):
        assert_array_equal(a, b)


# Runs


TINY = Experiment(
    name="first",
    data=SyntheticConfig("burgers", points=16, trajectories={"train": 4, "valid": 2, "test": 1}, steps=10),
    model=MODELS["fno"](width=4, modes=(4,), depth=1),
    training=TrainingConfig(steps=3, batch=4, updates_per_call=1),
    evaluation=Evaluation(steps=2, floors=(), starts=1),
)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return api.train(TINY, folder=tmp_path_factory.mktemp("runs"), scored=False)


def test_a_run_starts_from_another_and_says_so(first, tmp_path):
    finer = dataclasses.replace(TINY, name="second", start_from=str(first.folder),
                                data=dataclasses.replace(TINY.data, points=32))  # fmt: skip
    run = api.train(finer, folder=tmp_path, scored=False)
    assert run.loaded.complete
    assert run.loaded.source == str(first.folder)
    assert run.experiment.start_from == StartFrom(str(first.folder))
    assert first.loaded is None
    start = api.initial_stepper(finer, finer.data.open()["train"])
    for path, value in numbers(first.stepper).items():
        assert_array_equal(numbers(start)[path], value)


def test_members_start_from_their_own(first, tmp_path):
    both = dataclasses.replace(TINY, name="both", seeds=(3, 1))
    source = api.train(both, folder=tmp_path, scored=False)
    still = dataclasses.replace(TINY.training, optimizer=OptimizerConfig("sgd", 1e-30))
    again = dataclasses.replace(both, name="again", start_from=str(source.folder), seeds=(8, 9), training=still)
    run = api.train(again, folder=tmp_path, scored=False)
    for path, value in numbers(source.stepper).items():
        assert_array_equal(numbers(run.stepper)[path], value)
    for seeds in ((), (1, 2, 3)):
        with pytest.raises(ConfigError, match=r"ensemble of 2.*trains [13]\. Give `seeds`.*\.member\(0\)"):
            api.open_source(dataclasses.replace(again, seeds=seeds))
    physml.save(source.stepper.member(1), tmp_path / "one")
    alone = dataclasses.replace(again, seeds=(), start_from=str(tmp_path / "one"))
    start = api.initial_stepper(alone, alone.data.open()["train"])
    for path, value in numbers(source.stepper.member(1)).items():
        assert_array_equal(numbers(start)[path], value)


def test_without_a_model_both_come_from_the_source(first):
    bare = dataclasses.replace(TINY, model=None, start_from=str(first.folder))
    full = api.complete(bare, api.open_source(bare))
    assert full.model == TINY.model
    assert full.stepper == TINY.stepper
    other = dataclasses.replace(bare, stepper=DirectConfig(history=2))
    with pytest.raises(ConfigError, match="Name the model too"):
        api.complete(other, api.open_source(other))


def test_start_from_in_files(tmp_path):
    for given in ("", "runs/a", StartFrom("b", weights="w", strict=True, normalizer="data")):
        experiment = Experiment(start_from=given)
        (tmp_path / "e.yaml").write_text(to_yaml(experiment))
        assert load_experiment(tmp_path / "e.yaml") == experiment
    assert load_experiment(Experiment(), ["start_from=runs/a"]).start_from == StartFrom("runs/a")
    (tmp_path / "old.yaml").write_text("start_from: ''\n")
    assert load_experiment(tmp_path / "old.yaml").start_from is None


def test_fresh_numbers_are_never_frozen(first):
    wider = dataclasses.replace(TINY, start_from=str(first.folder), stepper=ResidualConfig(history=2))
    split_ = wider.data.open()["train"]
    groups = (ParameterGroup("lifting", learning_rate=0.0),)
    training = dataclasses.replace(TINY.training, optimizer=OptimizerConfig(groups=groups))
    with pytest.raises(ConfigError, match=r"model\.lifting\.first\.weight.*stay random.*groups whose rate is 0"):
        api.initial_stepper(dataclasses.replace(wider, training=training), split_)
    with pytest.raises(ConfigError, match=r"weight \(\(.*there, \(.*here\).*lora\.train.*leave `model` out"):
        api.initial_stepper(dataclasses.replace(wider, lora=LoRA()), split_)
    stepper = api.initial_stepper(dataclasses.replace(wider, lora=LoRA(r"blocks", train=r"lifting\.first")), split_)
    assert parameter_count(stepper)


def test_floors_have_nothing_to_start_from(first):
    floor = dataclasses.replace(TINY, stepper=STEPPERS["persistence"](), start_from=str(first.folder))
    with pytest.raises(ConfigError, match="no network"):
        api.initial_stepper(floor, floor.data.open()["train"])


# Validation by rollouts


def test_rollout_scores_are_those_of_the_evaluation():
    stepper, data = problem.build_stepper(), problem.datasets()["train"]
    config = RolloutValidation(
        steps=4, starts=2, trajectories=0, metrics=("rmse", "nrmse", "correlation", "correlation_time"), batch=4
    )
    with Layout().use():
        found = RolloutScores(config, stepper, data, Layout())(stepper)  # 6 starts: the last batch is not full
    scores = evaluate_stepper(stepper, data, 4, starts=2, metrics=["rmse", "nrmse", "correlation"], thresholds=(0.8,))
    for name in ("rmse", "nrmse", "correlation"):
        expected = scores["score"].sel(model="model", metric=name)
        assert_allclose(found[f"rollout/{name}"], float(expected.mean()), rtol=1e-5)
        assert_allclose(found[f"rollout/{name}/v"], float(expected.sel(channel="v").mean()), rtol=1e-5)
    times = scores["correlation_time"].sel(model="model", threshold=0.8)
    assert_allclose(found["rollout/correlation_time"], float(times.mean()))


@pytest.mark.parametrize(("trajectories", "expected"), [(2, {0, 3}), (4, {0, 1, 3, 4}), (0, set(range(6)))])
def test_rollout_scores_are_those_of_trajectories_all_over_the_split(trajectories, expected):
    config = RolloutValidation(steps=2, starts=2, trajectories=trajectories)
    plan = RolloutScores(config, problem.build_stepper(), problem.Waves((6,) * 6), Layout()).plan
    assert plan == [(trajectory, frame) for trajectory in sorted(expected) for frame in (1, 4)]


def test_every_batch_of_rollouts_draws_its_own_numbers_the_same_at_every_call(monkeypatch):
    """Trajectories are equal: with the same numbers for all, one would score as four do."""
    stepper, data, layout = problem.build_stepper(), problem.Waves((3,) * 4), Layout(data=1)
    data.frames = data.frames[:1] * 4
    advance = type(stepper).advance
    monkeypatch.setattr(
        type(stepper), "advance", lambda self, state, c: advance(self, state, c) + jax.random.normal(c.key)
    )
    with layout.use():
        one, four = (
            RolloutScores(RolloutValidation(steps=1, trajectories=count, batch=1), stepper, data, layout)
            for count in (1, 4)
        )
        assert four(stepper) == four(stepper)
        assert abs(four(stepper)["rollout/nrmse"] - one(stepper)["rollout/nrmse"]) > 0.01


def test_validations_are_compiled_once(monkeypatch, tmp_path):
    stepper, traced, counts = problem.build_stepper(), [], []
    advance = type(stepper).advance
    monkeypatch.setattr(type(stepper), "advance", lambda self, *a: traced.append(1) or advance(self, *a))
    config = problem.config(steps=6, validate_every=2, monitor="rollout/nrmse")
    data = problem.datasets()
    with Layout().use():
        scores = RolloutScores(RolloutValidation(steps=3, starts=3, batch=4), stepper, data["train"], Layout())

    def validate(stepper):
        values = scores(stepper)
        counts.append(len(traced))
        return values

    result = fit(stepper, data, problem.OBJECTIVE, config, Layout(), tmp_path, validate=validate)
    assert len(counts) == 3
    assert len(set(counts)) == 1
    values = [record["rollout/nrmse"] for record in result.history if record["kind"] == "valid"]
    assert len(set(values)) == 3


def test_training_stops_by_a_rollout_metric_and_keeps_the_best(tmp_path):
    """A rate that grows far too large: the rollout gets worse long before the last step."""
    experiment = dataclasses.replace(
        TINY,
        validation=RolloutValidation(steps=4, metrics=("rmse",)),
        training=TrainingConfig(
            steps=60, batch=4, updates_per_call=1, validate_every=2, patience=3, monitor="rollout/rmse",
            optimizer=OptimizerConfig(learning_rate=0.5, warmup=60, schedule="constant"),
        ),
    )  # fmt: skip
    run = api.train(experiment, folder=tmp_path, scored=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["rollout/rmse"] for line in lines if line["kind"] == "valid"}
    finite = {step: value for step, value in scores.items() if value is not None}
    best = min(finite, key=finite.get)
    assert max(scores) == best + 2 * 3 < 60
    valid = experiment.data.open()["valid"]
    check = evaluate_stepper(run.stepper, valid, 4, starts=1, metrics=["rmse"])
    assert_allclose(float(check["score"].sel(metric="rmse").mean()), finite[best], rtol=1e-4)


@pytest.mark.parametrize("monitor", ["rollout/rmse/w", "rollout/rmse/u", "valid/loss/u"])
def test_a_monitor_that_is_not_recorded_is_refused_before_the_first_update(tmp_path, monitor):
    """Burgers has one channel, whose score is the whole one."""
    training = dataclasses.replace(TINY.training, monitor=monitor)
    experiment = dataclasses.replace(TINY, validation=RolloutValidation(steps=2, metrics=("rmse",)), training=training)
    with pytest.raises(ConfigError, match="validation gives.*rollout/rmse.*valid/loss"):
        api.train(experiment, folder=tmp_path, scored=False)
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_a_rollout_that_blows_up_is_a_bad_score(tmp_path):
    scores = iter([np.inf, 2.0, np.nan])
    config = problem.config(steps=6, validate_every=2, monitor="rollout/rmse")
    result = fit(problem.build_stepper(), problem.datasets(), problem.OBJECTIVE, config, Layout(), tmp_path,
                 validate=lambda stepper: {"rollout/rmse": next(scores)})  # fmt: skip
    assert result.best == {"step": 4, "value": 2.0}


def test_rollouts_that_blow_up_use_up_the_patience(tmp_path):
    scores = iter([np.inf, np.nan, 1.0])
    config = problem.config(steps=6, validate_every=2, monitor="rollout/rmse", patience=2)
    result = fit(problem.build_stepper(), problem.datasets(), problem.OBJECTIVE, config, Layout(), tmp_path,
                 validate=lambda stepper: {"rollout/rmse": next(scores)})  # fmt: skip
    assert (result.step, result.best) == (4, None)


def test_validations_that_cannot_work():
    watching = TrainingConfig(monitor="rollout/nrmse")
    with pytest.raises(ConfigError, match="no validation by rollouts"):
        Experiment(training=watching)
    with pytest.raises(ConfigError, match="add 'nrmse'"):
        Experiment(training=watching, validation=RolloutValidation(metrics=("rmse",)))
    with pytest.raises(ConfigError, match="monitor_mode to 'max'"):
        Experiment(training=TrainingConfig(monitor="rollout/correlation"),
                   validation=RolloutValidation(metrics=("correlation",)))  # fmt: skip
    with pytest.raises(ConfigError, match="a bias has a sign.*rollout/mae"):
        Experiment(training=TrainingConfig(monitor="rollout/bias"), validation=RolloutValidation(metrics=("bias",)))
    for bad in ({"steps": 0}, {"threshold": 1.5}, {"metrics": ()}, {"metrics": ("rsme",)}, {"metrics": ("acc",)}):
        with pytest.raises(ConfigError, match="validation"):
            RolloutValidation(**bad)
    with pytest.raises(ConfigError, match="steps is '5'.*an integer"):
        RolloutValidation(steps="5")
    stepper, data = problem.build_stepper(), problem.datasets()["train"]
    with pytest.raises(DataError, match="frames"):
        RolloutScores(RolloutValidation(steps=50), stepper, data, Layout())
    experiment = dataclasses.replace(TINY, validation=RolloutValidation(steps=4))
    splits = {"train": TINY.data.open()["train"]}
    with pytest.raises(ConfigError, match="'valid'"):
        api.train(experiment, splits=splits)
