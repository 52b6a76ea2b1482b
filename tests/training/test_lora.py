"""Low-rank adaptation: exact at the start, small in what it trains, plain again once it is folded in."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from worker import Trap

from physml import Experiment, OneStep, SyntheticConfig, TrainingConfig, api, saving
from physml.errors import ConfigError, Interrupted
from physml.experiment import load_experiment, to_yaml
from physml.fields import Axis, Channel, Grid, Spec
from physml.layers.dense import Dense
from physml.layers.lora import LoRA, adapted, add_lora, is_frozen, merge_lora, parameters, trained_share
from physml.layers.pointwise import Linear
from physml.models import MODELS
from physml.normalize import Normalizer
from physml.parallel.mesh import Layout
from physml.steppers import ResidualConfig
from physml.steppers.describe import parameter_count
from physml.training import OptimizerConfig, fit
from physml.training.optimizers import ParameterGroup
from physml.training.update import initial_state, split

PLANE = Spec(Grid((Axis.uniform("x", 8), Axis.uniform("y", 8))), (Channel("u"), Channel("v")))
SCOT = MODELS["poseidon_scot"](8, (2, 1), (1, 2), (1, 0), patch=2, window=2)
FNO = MODELS["fno"](width=8, modes=(4,), depth=2)
UNET = MODELS["modern_unet"](width=8, multipliers=(1, 2), blocks=1, middle_attention=True)
IFACT = MODELS["ifactformer"](width=8, heads=2, head_width=4, iterations=2)
FFN = MODELS["auto_ffn"](frame=None)  # reads the weight of a layer itself


def make(model, spec=PLANE, seed=0):
    n = len(spec.channels)
    stepper = ResidualConfig()
    return saving.build_stepper(stepper, model, spec, Normalizer(spec, [0.1] * n, [0.7] * n, [0.3] * n), seed=seed)


def inputs(stepper):
    signature = stepper.config.signature(stepper.spec)
    fields = jax.random.normal(jax.random.key(1), (2, *signature.grid.shape, signature.inputs))
    return fields, jnp.zeros((2, signature.scalars))


def output(stepper):
    graph, state = nnx.split(stepper.model)
    return np.asarray(jax.jit(lambda state, given: nnx.merge(graph, state)(*given))(state, inputs(stepper)))


def shaken(stepper, size=0.02):
    """As if it had been trained a little."""
    for i, layer in enumerate(adapted(stepper).values()):
        layer.up[...] = size * jax.random.normal(jax.random.key(i), layer.up.shape)
    return stepper


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=type(model).__name__, marks=[pytest.mark.slow] * (model in (SCOT, UNET)))
        for model in (SCOT, FNO, UNET, IFACT, FFN)
    ],
)
def test_exact_at_first_and_after_merging(tmp_path, model):
    stepper = make(model)
    before = output(stepper)
    tuned = add_lora(stepper, LoRA(rank=2))
    # The same numbers are computed, but XLA may fuse, and so round, otherwise.
    assert_allclose(output(tuned), before, atol=1e-6 * np.abs(before).max(), rtol=0)
    if model is FNO:  # one operation after the other: nothing is fused
        assert_array_equal(tuned.model(*inputs(tuned)), stepper.model(*inputs(stepper)))
    assert not adapted(stepper)
    assert not any(map(is_frozen, parameters(stepper).values()))
    moved = output(shaken(tuned))
    assert np.abs(moved - before).max() > 1e-4
    merged = merge_lora(tuned)
    assert nnx.graphdef(merged) == nnx.graphdef(stepper)
    assert_allclose(output(merged), moved, atol=1e-6 * np.abs(moved).max(), rtol=0)
    config = json.loads((saving.save(merged, tmp_path / "plain") / "config.json").read_text())
    assert "lora" not in config
    for a, b in zip(*(jax.tree.leaves(nnx.state(s)) for s in (saving.load(tmp_path / "plain"), merged)), strict=True):
        assert_array_equal(a, b)


def test_the_change_by_hand():
    """W + alpha / rank A B, for both kinds of layers and for stacked weights."""
    key = jax.random.key(0)
    for layer, x in ((Dense(6, 4, rngs=nnx.Rngs(0)), jax.random.normal(key, (3, 6))),
                     (Linear(6, 4, rngs=nnx.Rngs(0)), jax.random.normal(key, (6, 3)))):  # fmt: skip
        holder = nnx.Module()
        holder.layer = layer
        tuned = add_lora(holder, LoRA(rank=2, alpha=6.0)).layer
        tuned.up[...] = jax.random.normal(key, tuned.up.shape)
        factors = (tuned.down, tuned.up) if isinstance(layer, Dense) else (tuned.up, tuned.down)
        weight = np.asarray(layer.weight[...]) + 3.0 * np.asarray(factors[0][...]) @ np.asarray(factors[1][...])
        product = x @ weight if isinstance(layer, Dense) else weight @ x
        bias = layer.bias[...] if isinstance(layer, Dense) else layer.bias[...][:, None]
        assert_allclose(tuned(x), product + bias, rtol=1e-5, atol=1e-5)
        assert_allclose(tuned.weight, weight, rtol=1e-6, atol=1e-6)
    stacked = adapted(add_lora(make(SCOT), LoRA("encoder.*qkv", rank=2)))
    shapes = {path: (layer.down.shape, layer.up.shape) for path, layer in stacked.items()}
    assert shapes["model.encoder.0.blocks.blocks.attention.qkv"] == ((2, 8, 2), (2, 2, 24))
    narrow = add_lora(make(FNO), LoRA("lifting.first", rank=100))  # 4 channels come in
    (layer,) = adapted(narrow).values()
    assert layer.down.shape == (4, 4)


def test_only_the_change_is_trained_and_counted():
    tuned = add_lora(make(FNO), LoRA("blocks", rank=2, train=r"projection\.second"))
    live = {path for path, variable in parameters(tuned).items() if not is_frozen(variable)}
    layers = adapted(tuned)
    assert set(layers) == {f"model.blocks.{i}.{name}" for i in (0, 1) for name in ("mlp.first", "mlp.second", "skip")}
    own = {f"{path}.{name}" for path in layers for name in ("down", "up")}
    assert live == own | {"model.projection.second.weight", "model.projection.second.bias"}
    # skip 8 -> 8, perceptron 8 -> 4 -> 8, twice; the readout has 16 hidden channels.
    count = 2 * 2 * ((8 + 8) + (8 + 4) + (4 + 8)) + 16 * 2 + 2
    assert trained_share(tuned) == (count, parameter_count(tuned))
    config = TrainingConfig(optimizer=OptimizerConfig("adam"))
    _, params, _ = split(tuned)
    moments = initial_state(params, config.optimizer.build(10), config)["optimizer"]
    assert sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim) == 2 * count


def test_patterns_that_find_nothing_name_the_nearest_layers():
    for model, pattern, nearest in ((FNO, r"blocks\.\d\.attention", "model.blocks.0"), (SCOT, "qvk", "attention.qkv")):
        with pytest.raises(ConfigError, match=f"No linear layer matches.*{nearest}"):
            add_lora(make(model), LoRA(pattern))
    with pytest.raises(ConfigError, match=r"lora\.train='recover_'.*recovery"):
        add_lora(make(SCOT), LoRA(train="recover_"))
    with pytest.raises(ConfigError, match=r"ClassicUNet has no linear layer.*optimizer\.groups"):
        add_lora(make(MODELS["classic_unet"](width=4, levels=2, frame=None)), LoRA())
    with pytest.raises(ConfigError, match="merge_lora"):
        add_lora(add_lora(make(FNO), LoRA()), LoRA())
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"pattern": "("}, {"train": "("}):
        with pytest.raises(ConfigError, match=r"lora\."):
            LoRA(**bad)


def test_a_saved_stepper_keeps_its_changes_and_what_is_frozen(tmp_path):
    tuned = shaken(add_lora(make(SCOT), LoRA("attention", rank=3, alpha=6.0, train="recovery|norm")))
    back = saving.load(saving.save(tuned, tmp_path / "tuned"))
    assert nnx.graphdef(back) == nnx.graphdef(tuned)
    for a, b in zip(*(jax.tree.leaves(nnx.state(s)) for s in (tuned, back)), strict=True):
        assert_array_equal(a, b)
    model = tuned.model
    saving.save_model(model, model.config, model.signature, tmp_path / "model")
    assert nnx.graphdef(saving.load(tmp_path / "model")) == nnx.graphdef(model)


# Training

TINY = Experiment(
    name="first",
    data=SyntheticConfig("burgers", points=16, trajectories={"train": 4, "valid": 2, "test": 1}, steps=10),
    model=MODELS["fno"](width=4, modes=(4,), depth=1),
    training=TrainingConfig(steps=3, batch=4, updates_per_call=1),
)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return api.train(TINY, folder=tmp_path_factory.mktemp("runs"), scored=False)


def test_an_experiment_trains_the_change_only(first, tmp_path, caplog):
    caplog.set_level("INFO")
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    training = dataclasses.replace(TINY.training, steps=6, optimizer=optimizer, precision="bfloat16", average=0.9)
    tuning = dataclasses.replace(
        TINY, name="tuned", start_from=str(first.folder), lora=LoRA("blocks", rank=2), training=training
    )
    run = api.train(tuning, folder=tmp_path, scored=False)
    before, after = parameters(first.stepper), parameters(run.stepper)
    own = {f"{path}.{name}" for path in adapted(run.stepper) for name in ("down", "up")}
    for path, variable in after.items():
        if path not in own:
            assert_array_equal(variable[...], before[path.replace(".base.", ".")][...])
    assert all(np.any(after[path][...]) for path in own)
    assert load_experiment(run.folder / "config.yaml").lora == LoRA("blocks", rank=2)
    assert "training changes" in caplog.text
    expected = output(run.stepper)
    assert_allclose(output(merge_lora(run.stepper)), expected, atol=1e-6 * np.abs(expected).max(), rtol=0)
    # A tuned run can be started from again: its changes are folded in.
    again = api.initial_stepper(dataclasses.replace(tuning, start_from=str(run.folder)), TINY.data.open()["train"])
    assert_allclose(output(again), expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


def test_a_stopped_training_of_changes_resumes_bit_for_bit(tmp_path):
    stepper = add_lora(make(TINY.model, problem.SPEC), LoRA(rank=2))
    config = problem.config(steps=12)

    def train(folder, progress=None):
        return fit(stepper, problem.datasets(), OneStep(), config, Layout(), folder, progress=progress).stepper

    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", Trap(signal.SIGTERM, 7))
    for a, b in zip(*map(jax.tree.leaves, (whole, train(tmp_path / "parts"))), strict=True):
        assert_array_equal(a, b)


def test_groups_give_changes_rates_of_their_own(tmp_path):
    stepper = add_lora(make(TINY.model, problem.SPEC), LoRA(rank=2))
    groups = (ParameterGroup(r"\.up$", learning_rate=0.1), ParameterGroup(r"\.down$", learning_rate=0.0))
    config = problem.config(steps=2, optimizer={"groups": groups})
    trained = fit(stepper, problem.datasets(), OneStep(), config, Layout(), tmp_path).stepper
    before, after = parameters(stepper), parameters(trained)
    for path in after:
        same = np.array_equal(before[path][...], after[path][...])
        assert same != path.endswith(".up"), path


def test_lora_in_files_needs_something_to_start_from(tmp_path):
    with pytest.raises(ConfigError, match="Set start_from"):
        api.train(dataclasses.replace(TINY, lora=LoRA()), folder=tmp_path)
    experiment = load_experiment(Experiment(start_from="runs/a"), ["lora.rank=4", "lora.train=recovery"])
    assert experiment.lora == LoRA(rank=4, train="recovery")
    (tmp_path / "e.yaml").write_text(to_yaml(experiment))
    assert load_experiment(tmp_path / "e.yaml") == experiment
