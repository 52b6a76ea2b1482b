"""The training problem of a refiner: losses known by hand, gradients, refusals, and training from the command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose

from physml import cli, coding
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.normalize import Normalizer
from physml.objectives import OBJECTIVES, Denoising
from physml.steppers import ResidualConfig
from physml.steppers.refiner import RefinerConfig

SPEC = Spec(Grid((Axis.uniform("x", 4),)), (Channel("u"), Channel("v")))
CONFIG = RefinerConfig(weight=0.5, longest_time=1000.0)
TARGET = (1.2, -1.6)  # increment / scale / weight
NORMALIZER = Normalizer(SPEC, [1.0, -2.0], [2.0, 3.0], [0.5, 0.25])
KEY = jax.random.key(0)


class Knows(nnx.Module):
    """The true velocity, plus `bias`, plus `by_step` at each step of the refinement."""

    def __init__(self, bias=(0.0, 0.0), by_step=(0.0,) * 4):
        self.bias, self.by_step = nnx.Param(jnp.asarray(bias, jnp.float32)), tuple(by_step)

    def __call__(self, fields, scalars):
        step = jnp.round(scalars[:, 0] * 3 / 1000).astype(int)
        signal = jnp.asarray(CONFIG.schedule.signal)[step].reshape(-1, 1, 1)
        noise = (fields[..., -2:] - jnp.sqrt(signal) * jnp.asarray(TARGET)) / jnp.sqrt(1 - signal)
        exact = jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * jnp.asarray(TARGET)
        return exact + self.bias[...] + jnp.asarray(self.by_step)[step].reshape(-1, 1, 1)


def refiner(config=CONFIG, **knows):
    return config.build(SPEC, Knows(**knows), NORMALIZER)


@jax.jit
def value(stepper, window, key=KEY):
    return Denoising()(stepper, window, key)


def rising(batch=2, frames=3):
    """Frames that grow by 1.2 * 0.5 * 0.5 and -1.6 * 0.25 * 0.5 per step."""
    steps = np.arange(frames, dtype=np.float32).reshape(1, -1, 1, 1) * np.array([0.3, -0.2], np.float32)
    return Window.of(np.broadcast_to(steps, (batch, frames, 4, 2)).astype(np.float32), SPEC)


def test_the_true_velocity_has_no_loss_and_a_bias_its_square():
    assert_allclose(value(refiner(), rising(64))[0], 0, atol=1e-6)
    loss, aux = value(refiner(bias=(0.5, 2.0)), rising(64))
    assert_allclose(aux["channel"], [0.25, 4.0], rtol=1e-3)
    assert_allclose(loss, 4.25, rtol=1e-3)


def test_every_step_is_drawn_as_often_as_any_other():
    for step in range(4):
        knows = {"by_step": np.eye(4)[step]}
        share = value(refiner(**knows), rising(4096))[1]["channel"][0]
        assert_allclose(share, 0.25, atol=0.03)  # four standard deviations of the draw


def test_noise_is_new_for_every_key_cell_channel_and_sample():
    """A network that is silent has the loss of the velocity itself: a + (1 - a) target^2, averaged over steps."""

    class Silent(nnx.Module):
        def __init__(self):
            self.unused = nnx.Param(jnp.zeros(()))

        def __call__(self, fields, scalars):
            return jnp.zeros_like(fields[..., -2:])

    stepper = CONFIG.build(SPEC, Silent(), NORMALIZER)
    signal = CONFIG.schedule.signal
    expected = [(signal + (1 - signal) * square).mean() for square in np.square(TARGET)]
    assert_allclose(value(stepper, rising(8192))[1]["channel"], expected, rtol=0.03)
    first, again, other = (float(value(stepper, rising(2), jax.random.key(i))[0]) for i in (0, 0, 1))
    assert first == again
    assert abs(first - other) > 1e-3


def test_gradients_reach_every_parameter(tiny):
    spec = tiny.spec(channels=("u",), static=("land",), parameters=("viscosity",))
    random = np.random.default_rng(0)
    window = tiny.window(
        spec, static=random.random((3, 8, 6, 1), np.float32), parameters=random.random((3, 1), np.float32)
    )
    config = RefinerConfig(history=2, longest_time=1.0)
    signature = config.signature(spec)
    stepper = config.build(spec, tiny.model(signature.inputs + signature.scalars, 1), Normalizer.identity(spec))
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)

    def loss(params):
        return Denoising()(nnx.merge(graph, params, rest), window, KEY)[0]

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        assert np.abs(np.asarray(gradient[...])).max() > 0, path
    with jax.disable_jit():
        eager = loss(params)
    assert_allclose(jax.jit(loss)(params), eager, rtol=1e-5)


def test_the_gradient_of_a_bias_is_twice_the_bias():
    graph, params, rest = nnx.split(refiner(bias=(0.5, 2.0)), nnx.Param, ...)
    gradient = jax.grad(lambda p: Denoising()(nnx.merge(graph, p, rest), rising(), KEY)[0])(params)
    assert_allclose(gradient["model"]["bias"][...], [1.0, 4.0], rtol=1e-3)


def test_cells_count_by_their_area():
    """The velocity is wrong in the second cell alone."""
    weights = (0.2, 0.4, 0.6, 1.2)
    uneven = SPEC.on(Grid((Axis("latitude", (0, 1, 2, 3), weights),)))
    bias = np.array([[0, 0], [0.5, 2.0], [0, 0], [0, 0]])
    stepper = CONFIG.build(uneven, Knows(bias), NORMALIZER)
    loss, aux = value(stepper, dataclasses.replace(rising(64), spec=uneven))
    assert_allclose(loss, 4.25 * 0.4 / 2.4, rtol=1e-3)
    assert_allclose(aux["channel"], np.array([0.25, 4.0]) * 0.4 / 2.4, rtol=1e-3)


def test_masked_cells_do_not_train():
    mask = np.ones((2, 4, 2), np.float32)
    mask[:, 1] = 0
    window = rising()
    masked = dataclasses.replace(window, frames=window.frames * mask[:, None], mask=mask)
    assert_allclose(value(refiner(), masked)[0], 0, atol=1e-6)
    assert_allclose(value(refiner(bias=(0.5, 2.0)), masked)[0], 4.25, rtol=1e-3)


def test_channels_count_where_they_are():
    mask = np.ones((2, 4, 2), np.float32)
    mask[1, :, 1] = 0
    window = rising()
    masked = dataclasses.replace(window, frames=window.frames * mask[:, None], mask=mask)
    loss, aux = value(refiner(bias=(0.5, 2.0)), masked)
    assert_allclose(aux["channel"], [0.25, 4.0], rtol=1e-3)
    assert_allclose(aux["present"], [1, 0.5])
    assert_allclose(loss, 0.25 + 4.0 / 2, rtol=1e-3)  # every sample counts with what it has


def test_running_statistics_move():
    class Normed(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

        def __call__(self, fields, scalars):
            return self.norm(fields[..., -2:])

    stepper = CONFIG.build(SPEC, Normed(), NORMALIZER)
    stepper.train()
    before = np.array(stepper.model.norm.mean[...])
    Denoising()(stepper, rising(), KEY)
    assert np.abs(np.asarray(stepper.model.norm.mean[...]) - before).max() > 1e-4


def test_what_cannot_work_is_refused():
    with pytest.raises(SpecError, match="holds 1 frames"):
        Denoising()(refiner(), rising(frames=1), KEY)
    with pytest.raises(ConfigError, match="key is None"):
        Denoising()(refiner(), rising(), None)


def test_other_steppers_are_refused(tiny, spec, window):
    stepper = ResidualConfig().build(spec, tiny.model(2, 2), Normalizer.identity(spec))
    with pytest.raises(ConfigError, match=r"stepper is a Residual.*RefinerConfig.*one_step"):
        Denoising()(stepper, window, KEY)


def test_it_has_a_plain_form():
    assert coding.from_dict(OBJECTIVES, coding.to_dict(Denoising(), OBJECTIVES)) == Denoising()
    assert Denoising().frames(3) == 4


EXPERIMENT = """
from physml import Experiment, Evaluation, SyntheticConfig, TrainingConfig
from physml.models import MODELS
config = Experiment(
    name="plain",
    data=SyntheticConfig("burgers", points=32, trajectories={"train": 4, "valid": 2, "test": 2}, steps=8),
    model=MODELS["modern_unet"](width=8, multipliers=(1,), blocks=1),
    training=TrainingConfig(steps=40, batch=8, validate_every=20),
    evaluation=Evaluation(steps=3, floors=(), metrics=("rmse",), batch=4, starts=1),
)
"""


def call(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words), "--quiet"])
    assert not stop.value.code


@pytest.mark.slow
def test_a_refiner_is_trained_scored_and_rolled_out_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYSML_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain.py").write_text(EXPERIMENT)
    chosen = ("stepper=refiner", "stepper.refinements=2", "objective=denoising", "training.average=0.995")
    call("train", tmp_path / "plain.py", *(w for c in chosen for w in ("--set", c)), "--out", tmp_path / "runs")
    run = tmp_path / "runs" / "plain"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["valid/loss"] for record in records if "valid/loss" in record]
    assert losses[-1] < losses[0]
    with xr.open_dataset(run / "scores.nc") as scores:
        assert np.isfinite(scores["score"]).all()
        first = scores["score"].values
    call("evaluate", run)
    with xr.open_dataset(run / "scores.nc") as scores:
        assert_allclose(scores["score"].values, first)  # the seed of the run: the same noise again
    data = next((tmp_path / "cache" / "generated").glob("burgers-test-*.nc"))
    for seed in (0, 1):
        out = tmp_path / f"{seed}.nc"
        call("rollout", run, "--initial", data, "--steps", 2, "--out", out, "--seed", seed, "--members", 2)
    first, other = (xr.open_dataset(tmp_path / f"{seed}.nc").load()["u"] for seed in (0, 1))
    assert first.sizes["member"] == 2
    assert float(first.std("member").max()) > 0
    assert float(abs(first - other).max()) > 0
