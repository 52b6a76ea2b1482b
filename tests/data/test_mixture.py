"""Several datasets as one: channels that a part lacks are masked, and parts are drawn by their weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml import coding
from physml.data import DataConfig, Loader, Mixture, MixtureConfig, SyntheticConfig, XarrayDataset, spec_of, statistics
from physml.data.sampling import Mixed, Shuffled
from physml.errors import ConfigError, DataError, SpecError
from physml.evaluate import RolloutScores, RolloutValidation, evaluate_stepper
from physml.experiment import DATA, Evaluation, Experiment
from physml.models import MODELS
from physml.normalize import Normalizer
from physml.objectives import OneStep
from physml.parallel.mesh import Layout
from physml.steppers import DirectConfig, ResidualConfig
from physml.training import TrainingConfig


def flow(names, trajectories=2, frames=6, parameters=(), x=8, y=6, seed=0, scale=1.0, step=0.5, axes="xy"):
    """Smooth traveling waves of the given channels."""
    random = np.random.default_rng(seed)
    space = np.arange(x)[:, None] / x + np.arange(y) / y
    time = np.arange(frames)[:, None, None]
    fields = {}
    for name in names:
        phases = random.random(trajectories)
        values = np.stack([scale * np.sin(2 * np.pi * (space - 0.1 * time + phase)) for phase in phases])
        fields[name] = (("trajectory", "time", *axes), values.astype("f4"))
    for name in parameters:
        fields[name] = (("trajectory",), random.random(trajectories).astype("f4") + 1)
    coords = {"time": step * np.arange(frames)}
    coords |= {axis: (axis, np.arange(n) / n, {"periodic": 1}) for axis, n in zip(axes, (x, y), strict=True)}
    return xr.Dataset(fields, coords)


def opened(names, parameters=(), **kwargs):
    ds = flow(names, parameters=parameters, **kwargs)
    return XarrayDataset(ds, spec_of(ds, tuple(names), parameters=tuple(parameters)))


@pytest.fixture
def mixture():
    """(u, p) with viscosity, and (p, w) with gravity."""
    return Mixture({"a": opened("up", ["viscosity"]), "b": opened("pw", ["gravity"], trajectories=3, frames=5, seed=1)})


def test_a_mixture_has_all_channels_and_masks_those_that_a_part_lacks(mixture):
    spec = mixture.spec
    assert spec.names == ("u", "p", "w")
    assert [c.name for c in spec.parameters] == ["viscosity", "gravity"]
    assert mixture.lengths == (6, 6, 5, 5, 5)
    assert mixture.part_of == ("a", "a", "b", "b", "b")
    a, b = mixture.parts.values()
    window, own = mixture.read(1, range(1, 4)), a.read(1, range(1, 4))
    assert window.spec == spec
    assert_array_equal(window.frames[..., :2], own.frames)
    assert_array_equal(window.frames[..., 2], 0)
    assert_array_equal(window.mask, np.broadcast_to([1, 1, 0], (8, 6, 3)))
    assert_array_equal(window.parameters, [own.parameters[0], 0])
    window, own = mixture.read(4, range(2)), b.read(2, range(2))
    assert_array_equal(window.frames[..., 1:], own.frames)
    assert_array_equal(window.mask, np.broadcast_to([0, 1, 1], (8, 6, 3)))
    assert_array_equal(window.parameters, [0, own.parameters[0]])
    with pytest.raises(DataError, match="There is no trajectory 5: the mixture has 5"):
        mixture.read(5, range(1))


def test_batches_of_several_parts_keep_their_order(mixture):
    trajectories, starts = np.array([4, 0, 2, 1]), np.array([1, 2, 0, 0])
    batch = mixture.read_batch(trajectories, starts, np.ones(4, int), 3)
    for row, (trajectory, start) in enumerate(zip(trajectories, starts, strict=True)):
        alone = mixture.read(trajectory, range(start, start + 3))
        jax.tree.map(lambda leaf, whole, row=row: assert_array_equal(whole[row], leaf), alone, batch)


def test_forcing_and_static_fields_are_joined_too():
    ds = flow("u")
    ds["wind"], ds["height"] = ds.u * 2, ds.u[0, 0] + 3
    first = XarrayDataset(ds, spec_of(ds, ("u",), forcing=("wind",)))
    second = XarrayDataset(ds, spec_of(ds, ("u",), static=("height",)))
    mixture = Mixture({"a": first, "b": second})
    a, b = mixture.read(0, range(2)), mixture.read(2, range(2))
    assert_array_equal(a.forcing, first.read(0, range(2)).forcing)
    assert_array_equal(a.static, np.zeros((8, 6, 1)))
    assert_array_equal(b.forcing, np.zeros((2, 8, 6, 1)))
    assert_array_equal(b.static, second.read(0, range(2)).static)


def test_masks_of_the_parts_stay():
    ds = flow("u").where(lambda d: d.x < 0.5)
    mixture = Mixture({"land": XarrayDataset(ds, spec_of(ds)), "sea": opened("uw")})
    assert_array_equal(mixture.read(0, range(2)).mask[..., 0].mean(1), [1] * 4 + [0] * 4)
    assert_array_equal(mixture.read(0, range(2)).mask[..., 1], 0)
    assert_array_equal(mixture.read(2, range(2)).mask, 1)


def test_statistics_and_normalizer_leave_out_what_is_not_there(mixture):
    facts = statistics(mixture)
    both = np.concatenate([mixture.parts[name].ds.p.values.ravel() for name in "ab"])
    assert facts["u"]["std"] == pytest.approx(float(mixture.parts["a"].ds.u.std()), rel=1e-5)
    assert facts["p"]["std"] == pytest.approx(float(both.std()), rel=1e-5)
    assert facts["w"]["min"] == pytest.approx(float(mixture.parts["b"].ds.w.min()))
    assert facts["u"]["missing"] == pytest.approx(15 / 27)
    normalizer = Normalizer.fit(mixture.windows())
    assert_allclose(normalizer.frames.scale[...][0], facts["u"]["std"], rtol=1e-6)
    assert_allclose(normalizer.increments[...][2], facts["w"]["increment_rms"], rtol=1e-6)


def test_errors_of_masked_channels_do_not_count(mixture):
    window = mixture.read_batch(np.array([0, 3]), np.array([0, 0]), np.ones(2, int), 2)
    normalizer = Normalizer.fit(mixture.windows())
    model = MODELS["fno"](width=8, modes=(2, 2), depth=1)
    config = DirectConfig()
    stepper = config.build(mixture.spec, model.build(config.signature(mixture.spec), nnx.Rngs(0)), normalizer, ())
    objective = OneStep()

    def loss(frames):
        return objective(stepper, dataclasses.replace(window, frames=frames), None)[0]

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(window.frames))
    assert np.isfinite(gradient).all()
    for row, (absent, present) in enumerate([(2, 0), (0, 2)]):
        assert_array_equal(gradient[row, ..., absent], 0)
        assert np.abs(gradient[row, 0, ..., present]).max() > 0
        assert np.abs(gradient[row, 1, ..., present]).max() > 0
    # Only w predicts w: with windows of the first part alone, nothing of its readout is trained.
    first = mixture.read_batch(np.array([0, 1]), np.array([0, 0]), np.ones(2, int), 2)
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)
    slopes = jax.jit(jax.grad(lambda p: objective(nnx.merge(graph, p, rest), first, None)[0]))(params)
    outputs = [leaf for leaf in jax.tree.leaves(slopes) if leaf.shape[-1:] == (3,)]
    assert outputs
    for leaf in outputs:
        assert_array_equal(leaf[..., 2], 0)
        assert np.abs(leaf[..., 0]).max() > 0


class Still(nnx.Module):
    """Every frame is the first."""

    history = 1

    def __init__(self, spec):
        self.spec = spec

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        return state

    def decode(self, state):
        return state


def test_scores_of_rollouts_leave_out_channels_that_a_part_lacks(mixture):
    config = RolloutValidation(steps=2, starts=1, trajectories=0, metrics=("rmse",), batch=4)
    found = RolloutScores(config, Still(mixture.spec), mixture, Layout())(Still(mixture.spec))
    for i, name in enumerate(mixture.spec.names):
        squares = []
        for trajectory in range(5):
            window = mixture.read(trajectory, range(3))
            if window.mask[..., i].any():
                squares.append(((window.frames[1:, ..., i] - window.frames[0, ..., i]) ** 2).mean((1, 2)))
        expected = np.sqrt(np.mean(squares, 0)).mean()
        assert_allclose(found[f"rollout/rmse/{name}"], expected, rtol=1e-5)


def test_scores_of_rollouts_are_means_over_the_channels_that_are_there(mixture):
    """Of the part without `w` alone: its mean was no number, so that no checkpoint was ever the best."""
    metrics = ("rmse", "correlation", "correlation_time")
    config = RolloutValidation(steps=2, starts=1, trajectories=0, metrics=metrics, batch=4)
    alone = Mixture({"a": mixture.parts["a"], "b": opened("pw", ["gravity"], trajectories=1, frames=2)})
    found = RolloutScores(config, Still(alone.spec), alone, Layout())(Still(alone.spec))
    for name in metrics:
        assert np.isnan(found[f"rollout/{name}/w"])
        assert_allclose(found[f"rollout/{name}"], np.mean([found[f"rollout/{name}/{c}"] for c in "up"]), rtol=1e-6)


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 3.0}, {"a": 0.9, "b": 0.1}, {}])
def test_shares_follow_the_weights_and_every_window_of_a_part_takes_its_turn(weights):
    parts = {"a": opened("u", trajectories=6, frames=22), "b": opened("w", trajectories=3, frames=12)}
    loader = Loader(Mixture(parts, weights=weights), 3, 16, seed=0)
    drawn = np.concatenate([loader.numbers(step) for step in range(200)])
    in_a = loader.samples.locate(drawn)[0] < 6
    expected = weights["a"] / sum(weights.values()) if weights else 120 / 150
    assert abs(in_a.mean() - expected) < 0.005
    for mine, count in ((drawn[in_a], 120), (drawn[~in_a], 30)):
        times = np.bincount(np.unique(mine, return_inverse=True)[1], minlength=count)
        assert len(times) == count
        assert times.max() - times.min() <= 2  # one for the epoch under way, one for the round


def test_shares_are_exact_in_expectation():
    orders = [Shuffled(50, 0), Shuffled(70, 1), Shuffled(90, 2)]
    numbers = np.split(np.arange(210), [50, 120])
    drawn = np.mean([Mixed(orders, numbers, (3, 5, 9), seed).drawn(10) for seed in range(4000)], axis=0)
    assert_allclose(drawn, 10 * np.array([3, 5, 9]) / 17, atol=0.04)  # five standard errors
    mixed = Mixed(orders, numbers, (3, 5, 9), 7)
    totals = np.array([mixed.drawn(n * mixed.round) for n in range(200)])
    assert (np.diff(totals, axis=0) >= 0).all()
    assert_array_equal(totals.sum(1), mixed.round * np.arange(200))
    counts = np.bincount(np.searchsorted([50, 120], mixed.at(np.arange(3 * mixed.round)), side="right"))
    assert_array_equal(counts, mixed.drawn(3 * mixed.round))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_mixture_resumes_and_is_shared_by_processes(mixture, processes):
    mixture = Mixture(mixture.parts, weights={"a": 2, "b": 1})
    straight = [window for _, window in zip(range(12), Loader(mixture, 3, 8, seed=3), strict=False)]
    shares = [
        [window for _, window in zip(range(5), loader.at(7), strict=False)]
        for loader in (
            Loader(mixture, 3, 8, seed=3, process_index=p, process_count=processes) for p in range(processes)
        )
    ]
    for step, expected in enumerate(straight[7:]):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[share[step] for share in shares])
        jax.tree.map(assert_array_equal, joined, expected)


def test_parts_are_streamed_when_they_do_not_fit(tmp_path):
    flow("u", trajectories=1, frames=600).to_zarr(
        tmp_path / "a.zarr", encoding={"u": {"chunks": (1, 10, 8, 6)}}, zarr_format=2
    )
    config = DataConfig(str(tmp_path / "a.zarr"), train=(0, 600), valid=(), test=())
    streamed = Mixture({"a": config.open()["train"], "b": opened("w")}, weights={"a": 5, "b": 1})
    loader = Loader(streamed, 2, 24, seed=0, memory=80_000)
    assert streamed.parts["a"]._stream is not None
    assert streamed.parts["b"]._arrays is not None
    for step, window in zip(range(30), loader, strict=False):
        trajectory, start, _ = loader.samples.locate(loader.numbers(step))
        for row in range(24):
            alone = streamed.read(trajectory[row], range(start[row], start[row] + 2))
            assert_array_equal(window.frames[row], alone.frames)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": 12}, "a is on a grid of .8, 6. points, but b is on .12, 6."),
        ({"axes": "yx", "x": 8, "y": 6}, "a has axis 'x' where b has axis? ?'y'|a is on a grid|Axis"),
        ({"step": 0.25}, "a steps 0.5 , but frames of b are 0.25  apart"),
    ],
)
def test_parts_that_do_not_fit_are_refused(other, message):
    with pytest.raises(SpecError, match=message):
        Mixture({"a": opened("u"), "b": opened("u", **other)})


def test_units_must_agree_and_time_steps_may_differ():
    ds = flow("u")
    kelvin, celsius = (ds.assign(u=ds.u.assign_attrs(units=unit)) for unit in ("K", "degC"))
    with pytest.raises(SpecError, match="'u' is in 'K' in a, but in 'degC' in b"):
        Mixture({"a": XarrayDataset(kelvin, spec_of(kelvin)), "b": XarrayDataset(celsius, spec_of(celsius))})
    parts = {"a": opened("u"), "b": opened("u", step=0.25)}
    mixture = Mixture(parts, same_time_step=False)
    assert mixture.spec.time_step == 0.5
    assert_array_equal(mixture.read(2, range(3)).times, [0, 0.25, 0.5])
    lead = mixture.read_batch(np.array([0, 2]), np.array([0, 0]), np.ones(2, int), 3).context(0, 1).lead
    assert_allclose(lead, [0.5, 0.25])


def test_configs_say_what_is_wrong():
    part = DataConfig("nowhere")
    with pytest.raises(ConfigError, match="no parts"):
        MixtureConfig()
    with pytest.raises(ConfigError, match="'wave', which is no part.*wake"):
        MixtureConfig({"wake": part}, {"wave": 1.0})
    with pytest.raises(ConfigError, match="no number for part 'b'"):
        MixtureConfig({"a": part, "b": part}, {"a": 1.0})
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match="weight of part 'a' is"):
            MixtureConfig({"a": part}, {"a": bad})
    with pytest.raises(DataError, match="Part 'b' has no window of 6 frames: its longest trajectory has 5"):
        Loader(Mixture({"a": opened("u"), "b": opened("u", frames=5)}), 6, 2, seed=0)


def test_a_mixture_reads_back_from_plain_containers():
    config = MixtureConfig({"a": DataConfig("a.nc"), "b": SyntheticConfig("burgers")}, {"a": 1.0, "b": 2.0})
    assert coding.from_dict(DATA, coding.to_dict(config, DATA), "data") == config
    with pytest.raises(ConfigError, match="data.parts.a"):
        coding.from_dict(DATA, {"type": "mixture", "parts": {"a": {"type": "files", "pth": "x"}}}, "data")


def two_flows(cache):
    """Kuramoto-Sivashinsky (u), and twice as strong in a file of its own (v)."""
    first = SyntheticConfig(
        "kuramoto_sivashinsky", steps=6, points=16, time_step=0.2, cache=str(cache),
        trajectories={"train": 4, "valid": 2, "test": 2},
        options={"solver_points": 32, "length": 16.0, "initial_modes": 4, "warmup": 1.0, "substeps": 4},
    )  # fmt: skip
    splits = first.open()
    ds = xr.concat([splits[name].to_xarray() for name in ("train", "valid", "test")], "trajectory", data_vars="minimal")
    ds = ds[["u"]].rename(u="v") * 2
    ds.assign_coords(trajectory=np.arange(8), x=ds.x.assign_attrs(splits["train"].ds.x.attrs)).to_netcdf(cache / "v.nc")
    return first, DataConfig(
        str(cache / "v.nc"), split_by="trajectory", train=(0, 4), valid=(4, 6), test=(6, 8),
        time_step=splits["train"].spec.time_step,
    )  # fmt: skip


@pytest.mark.slow
def test_training_on_a_mixture_end_to_end(tmp_path):
    first, second = two_flows(tmp_path)
    config = Experiment(
        name="mixed", data=MixtureConfig({"solved": first, "file": second}, {"solved": 1.0, "file": 2.0}),
        model=MODELS["fno"](width=8, modes=(4,), depth=1), stepper=ResidualConfig(),
        training=TrainingConfig(steps=4, batch=4), evaluation=Evaluation(steps=2, metrics=("rmse", "correlation")),
    )  # fmt: skip
    run = physml.train(config, folder=tmp_path / "runs")
    assert run.experiment == config
    assert run.stepper.spec.names == ("u", "v")
    losses = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses
    assert np.isfinite([record["loss"] for record in losses if "loss" in record]).all()
    scores = run.scores.score.sel(model="mixed", metric="rmse")
    assert np.isfinite(scores).all()
    # Each channel is scored where it exists only: its own trajectories alone give the same.
    test = config.data.open()["test"]
    for part, channel, other in (("solved", "u", "v"), ("file", "v", "u")):
        alone = evaluate_stepper(run.stepper, Mixture({part: test.parts[part]}, test.spec), 2, metrics=["rmse"])
        expected = alone.score.sel(metric="rmse", model="model")
        assert_allclose(scores.sel(channel=channel), expected.sel(channel=channel), rtol=1e-5)
        assert np.isnan(expected.sel(channel=other)).all()
