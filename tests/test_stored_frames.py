"""Rollouts that store every n-th frame: those of the whole rollout, bit for bit, and what is told of the others."""

import importlib
import json
import os

import every_stepper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_array_equal

from physml import cli, saving
from physml.data import spec_of, to_window
from physml.errors import CheckpointError, ConfigError, DivergedError, SpecError
from physml.forecast import blow_ups, forecast, stability
from physml.forecast.resume import MARK
from physml.rollout import named, rollout_chunks
from physml.steppers import STEPPERS

PLACES = (None, "f.zarr", "f.nc")


class Walk(nnx.Module):
    """A random walk; trajectory `who` holds `bad` at cell 3 from step `step` on (`breaks` is all three)."""

    def __init__(self, spec, breaks=None, history=1):
        self.spec, self.breaks, self.history = spec, breaks, history

    def encode(self, frames, context):
        return frames[:, -1], jnp.int32(0)

    def advance(self, state, context):
        frame, count = state
        frame = jnp.roll(frame, 1, 1) + 0.1 * jax.random.normal(context.key, frame.shape)
        if self.breaks is not None:
            who, step, bad = self.breaks
            lost = (jnp.arange(frame.shape[0]) == who) | (who < 0)
            frame = frame.at[:, 3].set(jnp.where((lost & (count + 1 >= step))[:, None], bad, frame[:, 3]))
        return frame, count + 1

    def decode(self, state):
        return state[0]


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    frames = random.standard_normal((3, 4, 16)).astype("f4") + 1
    return xr.Dataset({"u": (("trajectory", "time", "x"), frames)}, {"x": np.arange(16) / 16, "time": np.arange(4.0)})


def thinned(whole, every):
    return whole.isel(lead=slice(every - 1, None, every))


def same(found, expected):
    """Without the identity, which memory does not need."""
    with found:
        loaded = found.load()[list(expected.data_vars)]
        loaded.attrs.pop(MARK, None)
        xr.testing.assert_identical(loaded, expected)


@pytest.mark.parametrize(("chunk", "every"), [(1, 3), (6, 3), (7, 2), (100, 4), (5, 24)])
def test_chunks_keep_the_frames_that_are_stored_and_the_ledger_of_all(data, chunk, every):
    stepper, window, key = Walk(spec_of(data)), to_window(data, spec_of(data)), jax.random.key(1)
    (whole,) = rollout_chunks(stepper, window, 24, 24, key, spectrum_every=24)
    pieces = list(rollout_chunks(stepper, window, 24, chunk, key, store_every=every, spectrum_every=24))
    assert {piece.start % every for piece in pieces} == {0}
    assert_array_equal(np.concatenate([piece.frames for piece in pieces], 1), whole.frames[:, every - 1 :: every])
    assert_array_equal(np.concatenate([piece.ledger.maximum for piece in pieces], 1), whole.ledger.maximum)
    assert_array_equal(pieces[-1].ledger.spectrum, whole.ledger.spectrum)


def test_what_is_resumed_begins_at_a_frame_that_is_stored(data):
    stepper, window, key = Walk(spec_of(data)), to_window(data, spec_of(data)), jax.random.key(1)
    (whole,) = rollout_chunks(stepper, window, 8, 8, key)
    states = [named(chunk.state) for chunk in rollout_chunks(stepper, window, 4, 1, key)]
    (rest,) = rollout_chunks(stepper, window, 8, 8, key, store_every=2, resume=(4, states[3]))
    assert_array_equal(rest.frames, whole.frames[:, [5, 7]])
    with pytest.raises(ConfigError, match="after step 3, but frames are kept .* store_every=2"):
        rollout_chunks(stepper, window, 8, 8, key, store_every=2, resume=(3, states[2]))


def test_frames_that_are_not_stored_take_no_memory(data):
    chunks = importlib.import_module("physml.rollout.chunks")
    wide = xr.Dataset({"u": (("trajectory", "time", "x"), np.ones((1, 1, 4096), "f4"))}, {"x": np.arange(4096.0)})
    stepper, window = Walk(spec_of(wide)), to_window(wide, spec_of(wide))
    graph, numbers = nnx.split(stepper)
    fixed, key = jax.tree.map(jnp.asarray, window), jax.random.key(0)
    carry, initial = chunks._begin(graph, False)(numbers, fixed, key)

    def size(stored):
        program = (
            chunks._advance(graph, 256, stored, 0).lower(numbers, fixed, carry, 0, 256, key, initial.mean).compile()
        )
        return program.memory_analysis().output_size_in_bytes

    frame = 4 * 4096
    assert size(1) > 256 * frame
    assert size(64) < 16 * frame


@pytest.mark.parametrize("out", PLACES)
def test_what_is_stored_is_part_of_the_whole(data, tmp_path, out):
    stepper, options = Walk(spec_of(data)), {"key": jax.random.key(3), "spectrum_every": 8, "chunk": 7}
    whole = forecast(stepper, data, 40, **options)
    found = forecast(stepper, data, 40, out=out and tmp_path / out, store_every=4, **options)
    assert_array_equal(found.lead, np.arange(4.0, 41, 4))
    assert_array_equal(found.time, 3 + np.arange(4.0, 41, 4))
    assert found.steps_completed.values.tolist() == [40] * 3
    assert stability(found) == stability(thinned(whole, 4))
    same(found, thinned(whole, 4))


@pytest.mark.parametrize("out", PLACES)
def test_dates_members_and_deviations_are_those_of_stored_steps(data, tmp_path, out):
    dated = data.isel(trajectory=0).assign_coords(
        time=np.datetime64("2018-02-27", "ns") + np.arange(4) * np.timedelta64(6, "h")
    )
    stepper, options = Walk(spec_of(dated)), {"key": jax.random.key(3), "members": 3}
    whole = forecast(stepper, dated, 12, **options)
    found = forecast(stepper, dated, 12, out=out and tmp_path / out, store_every=4, **options)
    assert found.lead.values.astype("timedelta64[h]").astype(int).tolist() == [24, 48, 72]
    assert str(found.time.values[-1])[:13] == "2018-03-02T18"
    same(found, thinned(whole, 4))


def test_gaussian_steppers_keep_the_deviations_of_stored_steps():
    stepper, start = every_stepper.stepper_of("gaussian"), every_stepper.data_of("gaussian")
    whole = forecast(stepper, start, 6, limit=None)
    found = forecast(stepper, start, 6, limit=None, store_every=3)
    assert any(str(name).endswith("_std") for name in found.data_vars)
    same(found, thinned(whole, 3))


class Stop(Exception):
    pass


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_it_goes_on_where_it_stopped(data, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(importlib.import_module("physml.forecast.loop"), "SAVE_EVERY", 2)
    stepper, path = Walk(spec_of(data)), tmp_path / f"f{suffix}"
    options = {"key": jax.random.key(3), "spectrum_every": 6, "chunk": 5, "store_every": 3}

    def stop(done, steps):
        if done >= 30:
            raise Stop

    with pytest.raises(Stop):
        forecast(stepper, data, 60, out=path, progress=stop, **options)
    with pytest.raises(CheckpointError, match="another store_every: 3 there, 1 now"):
        forecast(stepper, data, 60, out=path, resume="auto", **(options | {"store_every": 1}))
    told = []
    forecast(stepper, data, 60, out=path, resume="auto", progress=lambda done, _: told.append(done), **options).close()
    assert told[0] == 30
    same(forecast(stepper, data, 60, out=path, resume="auto", **options), forecast(stepper, data, 60, **options))
    with pytest.raises(CheckpointError, match="made with another store_every: 3 there, 6 now"):
        forecast(stepper, data, 60, out=path, resume="auto", **(options | {"store_every": 6}))


@pytest.mark.parametrize("out", PLACES)
@pytest.mark.parametrize(("step", "kept"), [(10, 2), (12, 2), (13, 3)])
def test_divergences_between_stored_frames_are_seen_at_their_step(data, tmp_path, out, step, kept):
    """Trajectory 1 alone; then all: the rollout ends with the last stored frame that is good."""
    options = {"key": jax.random.key(3), "store_every": 4, "on_divergence": "stop", "chunk": 8}
    where = out and tmp_path / out
    with forecast(Walk(spec_of(data), (1, step, 1e9)), data, 24, out=where, **options) as found:
        assert found.steps_completed.values.tolist() == [24, step - 1, 24]
        assert found.sizes["lead"] == 6
        assert np.isfinite(found.u[1]).all("x").values.tolist() == [True] * kept + [False] * (6 - kept)
        assert np.isfinite(found.u[0]).all()
        assert blow_ups(found)["first at step"] == step
    with forecast(Walk(spec_of(data), (-1, step, np.nan)), data, 24, out=where, overwrite=True, **options) as found:
        assert found.sizes["lead"] == found.ledger_mean_u.sizes["lead"] == kept
        assert found.attrs["stopped_early"] == 1
        assert np.isfinite(found.u).all()
        assert found.steps_completed.values.tolist() == [step - 1] * 3


@pytest.mark.parametrize(
    ("bad", "said"), [(1e9, r"'u' is 1e\+09, outside"), (-1e9, r"'u' is -1e\+09"), (np.nan, "'u' is nan")]
)
def test_a_cell_is_named_where_its_frame_is_stored(data, bad, said):
    options = {"key": jax.random.key(3), "store_every": 4}
    with pytest.raises(DivergedError, match=rf"at step 8 .*{said}.* at index \(3,\) \(x=0.1875\)"):
        forecast(Walk(spec_of(data), (1, 8, bad)), data, 24, **options)
    with pytest.raises(
        DivergedError, match=rf"at step 7 .*{said}.*, in a frame that was not stored. The 6 steps before"
    ):
        forecast(Walk(spec_of(data), (1, 7, bad)), data, 24, **options)
    with pytest.raises(DivergedError, match="Nothing can be kept"):
        forecast(Walk(spec_of(data), (-1, 3, bad)), data, 24, on_divergence="stop", **options)


def test_the_first_chunk_holds_a_frame_however_far_they_are_apart(data):
    """Or all members would be the same there."""
    stepper = Walk(spec_of(data))
    found = forecast(stepper, data, 600, key=jax.random.key(3), members=2, store_every=300, limit=None)
    assert found.sizes["lead"] == 2


def test_frames_further_apart_than_a_step_are_no_history(data):
    found = forecast(Walk(spec_of(data)), data, 12, key=jax.random.key(3), store_every=4)
    with pytest.raises(SpecError, match="4 apart, but 1 was expected. Use data with"):
        forecast(Walk(spec_of(data), history=2), found, 2, key=jax.random.key(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"store_every": 7}, "of 24 steps the last 3 would be computed and not kept. Take 28 steps"),
        ({"store_every": 25}, "Take 25 steps"),
        ({"store_every": 0}, "at least 1"),
        ({"store_every": 2.0}, "store_every is 2.0, but a whole number"),
        ({"store_every": None}, "store_every is None, but it counts"),
        ({"store_every": 4, "spectrum_every": 6}, "Use a multiple of 4"),
    ],
)
def test_distances_that_lose_frames_are_refused(data, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        forecast(Walk(spec_of(data)), data, 24, out=tmp_path / "f.zarr", **options)
    assert os.listdir(tmp_path) == []


def test_spectra_are_of_stored_frames(data):
    found = forecast(Walk(spec_of(data)), data, 300, key=jax.random.key(0), store_every=3, spectrum_every="auto")
    assert found.spectrum_step.values.tolist() == list(range(0, 301, 6))


def test_the_shell_stores_every_few_frames(capsys, tmp_path):
    saving.save(
        STEPPERS["extrapolation"]().build(every_stepper.data_of("extrapolation").pipe(spec_of)), tmp_path / "model"
    )
    every_stepper.data_of("extrapolation").to_netcdf(tmp_path / "start.nc")
    words = ["rollout", tmp_path / "model", "--initial", tmp_path / "start.nc", "--store-every", 4]
    words += ["--steps", 12, "--out", tmp_path / "f.nc", "--on-divergence", "flag", "--json"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["sizes"]["lead"] == 3
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in [*words[:-1], "--overwrite", "--dry-run", "--steps", 13]])
    assert stop.value.code == 2
    assert "Take 16 steps" in capsys.readouterr().err
