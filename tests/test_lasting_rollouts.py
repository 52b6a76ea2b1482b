"""Rollouts that are stopped and go on bit for bit at constant memory, their diagnostics; all steppers in the shell."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import every_stepper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import cli, saving
from physml.data import open_dataset, spec_of
from physml.errors import CheckpointError, ConfigError, DataError, DivergedError, Interrupted, SpecError
from physml.forecast import blow_ups, forecast, loop, stability, stores
from physml.forecast import start as starting
from physml.forecast.resume import MARK
from physml.metrics import energy_spectrum
from physml.normalize import Normalizer
from physml.rollout import named, restore, rollout_chunks
from physml.steppers import STEPPERS

SUFFIXES = (".zarr", ".nc")


class Odd(nnx.Module):
    """A state of many kinds: frames, a spectrum, a counter, a key, half precision. `breaks`: (trajectory, step)."""

    def __init__(self, spec, breaks=None, factor=1.0):
        self.spec, self.history, self.breaks, self.factor = spec, 2, breaks, factor

    def encode(self, frames, context):
        low = {"memory": jnp.fft.rfft(frames[:, 0], axis=1), "half": frames[:, 0].astype(jnp.bfloat16)}
        return {"frame": frames[:, -1], "count": 0, "key": jax.random.key(7), "low": [low, jnp.float32(0.5)]}

    def advance(self, state, context):
        key, own = jax.random.split(state["key"])
        noise = jax.random.normal(context.key, state["frame"].shape) + jax.random.normal(own, state["frame"].shape)
        low, weight = state["low"]
        old = jnp.fft.irfft(low["memory"], n=state["frame"].shape[1], axis=1)
        frame = jnp.roll(state["frame"], 1, 1) * self.factor + 0.01 * noise * jnp.cos(0.1 * state["count"])
        frame = frame + 0.01 * weight * old + 0.01 * low["half"].astype(jnp.float32)
        if self.breaks is not None:
            bad = jnp.arange(frame.shape[0]) == self.breaks[0]
            bad = bad & (state["count"] + 1 >= self.breaks[1])
            frame = jnp.where(bad[:, None, None], jnp.nan, frame)
        low = {"memory": jnp.fft.rfft(state["frame"], axis=1), "half": frame.astype(jnp.bfloat16)}
        return {"frame": frame, "count": state["count"] + 1, "key": key, "low": [low, weight]}

    def decode(self, state):
        return state["frame"]


class Stop(Exception):
    pass


def stop_at(step):
    """A progress that ends the program at a step, as an error somewhere else would."""

    def progress(done, total):
        if done >= step:
            raise Stop

    return progress


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    frames = random.standard_normal((3, 4, 16)).astype("f4") + 1
    return xr.Dataset({"u": (("trajectory", "time", "x"), frames)}, {"x": np.arange(16) / 16, "time": np.arange(4.0)})


@pytest.fixture(autouse=True)
def save_often(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)


def same(path, reference):
    opened = xr.open_zarr(path, consolidated=False) if path.suffix == ".zarr" else xr.open_dataset(path)
    with opened as found:
        found = found.load()[list(reference.data_vars)].assign_attrs({MARK: ""})  # which memory does not need
        xr.testing.assert_identical(found, reference.assign_attrs({MARK: ""}))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("stop", "saved"), [(4, 4), (9, 8), (36, 36)])
def test_a_continued_rollout_is_an_uninterrupted_one(data, tmp_path, suffix, stop, saved):
    stepper, path = Odd(spec_of(data)), tmp_path / f"f{suffix}"
    options = {"chunk": 2, "key": jax.random.key(3), "spectrum_every": 5}
    whole = forecast(stepper, data, 37, out=tmp_path / f"whole{suffix}", **options).load()
    with pytest.raises(Stop):
        forecast(stepper, data, 37, out=path, progress=stop_at(stop), **options)
    assert sorted(os.listdir(tmp_path)) == sorted([f"f{suffix}.partial", f"whole{suffix}"])
    told = []
    forecast(stepper, data, 37, out=path, resume="auto", progress=lambda done, _: told.append(done), **options).close()
    assert told[0] == saved + min(2, 37 - saved)  # what was done is not done again
    assert sorted(os.listdir(tmp_path)) == sorted([f"f{suffix}", f"whole{suffix}"])
    same(path, whole)
    xr.testing.assert_equal(forecast(stepper, data, 37, **options), whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_finished_rollout_is_found_finished(data, tmp_path, suffix):
    stepper, path = Odd(spec_of(data)), tmp_path / f"f{suffix}"
    with forecast(stepper, data, 6, out=path) as first:
        whole = first.load()
    told = []
    again = forecast(stepper, data, 6, out=path, resume="auto", progress=lambda *done: told.append(done))
    xr.testing.assert_identical(again.load(), whole)
    again.close()
    assert not told
    for steps, start in ((7, data), (6, data + np.float32(1))):
        with pytest.raises(
            CheckpointError, match="made with another (steps: 6 there, 7 now|initial state).*overwrite=True"
        ):
            forecast(stepper, start, steps, out=path, resume="auto")
    with pytest.raises(ConfigError, match="exists"):
        forecast(stepper, data, 6, out=path)


def test_two_processes_do_not_write_one_output(data, tmp_path):
    """The second one is refused while the first is at work, and finds it finished afterwards."""
    stepper, path = Odd(spec_of(data)), tmp_path / "f.zarr"

    def meet(done, total):
        for resume in ("never", "auto"):
            with pytest.raises(DataError, match=r"Another process is writing .*f\.zarr"):
                forecast(stepper, data, 6, out=path, resume=resume, overwrite=resume == "never")

    with forecast(stepper, data, 6, out=path, chunk=2, progress=meet) as first:
        whole = first.load()
    assert os.listdir(tmp_path) == ["f.zarr"]
    with forecast(stepper, data, 6, out=path, chunk=2, resume="auto") as second:
        xr.testing.assert_identical(second.load(), whole)


def test_it_may_be_stopped_many_times(data, tmp_path):
    stepper, path, options = Odd(spec_of(data)), tmp_path / "f.zarr", {"chunk": 3, "spectrum_every": 1}
    whole = forecast(stepper, data, 30, out=tmp_path / "whole.zarr", **options).load()
    for stop in (6, 12, 15, 27):
        with pytest.raises(Stop):
            forecast(stepper, data, 30, out=path, resume="auto", progress=stop_at(stop), **options)
    forecast(stepper, data, 30, out=path, resume="auto", **options).close()
    same(path, whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_trajectory_that_was_lost_stays_lost(data, tmp_path, suffix):
    stepper, path = Odd(spec_of(data), breaks=(1, 5)), tmp_path / f"f{suffix}"
    whole = forecast(stepper, data, 20, out=tmp_path / f"whole{suffix}", chunk=2, on_divergence="stop").load()
    with pytest.raises(Stop):
        forecast(stepper, data, 20, out=path, chunk=2, on_divergence="stop", progress=stop_at(8))
    forecast(stepper, data, 20, out=path, chunk=2, on_divergence="stop", resume="auto").close()
    same(path, whole)
    assert_array_equal(whole.steps_completed, [20, 4, 20])
    assert "step 5 (trajectory 1)" in whole.attrs["divergence"]
    assert np.isnan(whole.u[1, 4:]).all()


def test_a_divergence_leaves_nothing_to_continue(data, tmp_path):
    with pytest.raises(DivergedError):
        forecast(Odd(spec_of(data), breaks=(1, 9)), data, 20, out=tmp_path / "f.zarr", chunk=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(data, tmp_path, number):
    stepper, path = Odd(spec_of(data)), tmp_path / "f.nc"
    before = signal.getsignal(number)

    def send(done, total):
        if done == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"after step 6 of 20 on {number.name}.*f.nc.partial.*--resume auto"):
        forecast(stepper, data, 20, out=path, chunk=3, progress=send)
    assert signal.getsignal(number) is before
    forecast(stepper, data, 20, out=path, chunk=3, resume="auto").close()
    same(path, forecast(stepper, data, 20, chunk=3))


def test_another_key_of_perturbed_members_is_called_so(data, tmp_path):
    stepper = Odd(spec_of(data))
    stepper.normalizer = Normalizer.identity(stepper.spec)
    options = {"out": tmp_path / "f.zarr", "members": 2, "perturb": 0.1, "chunk": 2}
    with pytest.raises(Stop):
        forecast(stepper, data, 20, key=jax.random.key(0), progress=stop_at(4), **options)
    with pytest.raises(CheckpointError, match="was begun with another key"):
        forecast(stepper, data, 20, key=jax.random.key(1), resume="auto", **options)


def test_only_the_same_rollout_is_continued(data, tmp_path):
    stepper, path = Odd(spec_of(data)), tmp_path / "f.zarr"
    options = {"out": path, "chunk": 2}
    with pytest.raises(Stop):
        forecast(stepper, data, 20, progress=stop_at(4), **options)
    for changed, what in (
        ({"stepper": STEPPERS["persistence"]().build(spec_of(data))}, "model: Odd@.* there, persistence@"),
        ({"initial": data.isel(time=slice(0, 3))}, "initial state"),
        ({"initial": data + np.float32(1)}, "initial state"),
        ({"steps": 30}, "steps: 20 there, 30 now"),
        ({"chunk": 4}, "chunk"),
        ({"key": jax.random.key(1)}, "key"),
        ({"limit": 5.0}, "limit"),
        ({"on_divergence": "flag"}, "on_divergence"),
        ({"spectrum_every": 3}, "spectrum_every"),
        ({"store_every": 2}, "store_every: 1 there, 2 now"),
    ):
        arguments = {"stepper": stepper, "initial": data, "steps": 20, **options, **changed}
        with pytest.raises(CheckpointError, match=f"was begun with another {what}"):
            forecast(**arguments, resume="auto")
    with pytest.raises(ConfigError, match="unfinished rollout.*resume='auto'.*overwrite=True"):
        forecast(stepper, data, 20, **options)
    with pytest.raises(ConfigError, match="resume='auto' and the path"):
        forecast(stepper, data, 20, resume="auto")
    with pytest.raises(ConfigError, match="resume is 'yes'"):
        forecast(stepper, data, 20, resume="yes", **options)
    state = path.with_name("f.zarr.partial") / "state.safetensors"
    content = state.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content.replace(b'\\"step\\"', b'\\"stop\\"')):
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated or damaged|is damaged"):
            forecast(stepper, data, 20, resume="auto", **options)
    state.write_bytes(content)
    forecast(stepper, data, 20, resume="auto", **options)
    assert os.listdir(tmp_path) == ["f.zarr"]
    with pytest.raises(Stop):
        forecast(stepper, data, 20, overwrite=True, progress=stop_at(4), **options)
    forecast(stepper, data, 8, overwrite=True, **options)  # starts anew
    assert os.listdir(tmp_path) == ["f.zarr"]


class Pushed(nnx.Module):
    """A random walk of the forcing."""

    def __init__(self, spec):
        self.spec, self.history = spec, 1

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        return state + context.forcing

    def decode(self, state):
        return state


@pytest.mark.parametrize("small", [True, False], ids=["every step", "some steps"])
def test_other_forcing_later_on_is_another_rollout(data, tmp_path, monkeypatch, small):
    monkeypatch.setattr(starting, "BLOCK", 200)
    if not small:
        monkeypatch.setattr(starting, "SMALL", 0)

    def forcing(late):
        values = np.ones((40, 16), "f4")
        values[20] = late
        return xr.Dataset({"f": (("time", "x"), values)}, {"time": np.arange(40.0), "x": data.x})

    stepper = Pushed(spec_of(data.assign(f=data.u.isel(trajectory=0)), ["u"], forcing=["f"]))
    initial, path = data.isel(time=[0]), tmp_path / "f.zarr"
    options = {"out": path, "chunk": 2, "limit": None}
    with pytest.raises(Stop):
        forecast(stepper, initial, 20, forcing=forcing(1), progress=stop_at(4), **options)
    with pytest.raises(CheckpointError, match="was begun with another forcing"):
        forecast(stepper, initial, 20, forcing=forcing(9), resume="auto", **options)
    with pytest.raises(CheckpointError, match="was begun with another steps"):
        forecast(stepper, initial, 12, forcing=forcing(1), resume="auto", **options)
    state = tmp_path / "f.zarr.partial/state.safetensors"
    content = state.read_bytes()
    for older in (b"1", b"2"):
        state.write_bytes(content.replace(b'\\"format\\": 3', b'\\"format\\": ' + older))
        with pytest.raises(CheckpointError, match="begun with an older physml.*energy.*forcing"):
            forecast(stepper, initial, 20, forcing=forcing(1), resume="auto", **options)
    state.write_bytes(content)
    with forecast(stepper, initial, 20, forcing=forcing(1), resume="auto", **options) as result:
        assert_allclose(result.u[:, -1], initial.u[:, 0] + 20, rtol=1e-6)
    with pytest.raises(CheckpointError, match="made with another forcing"):
        forecast(stepper, initial, 20, forcing=forcing(9), resume="auto", **options)


def test_much_forcing_is_not_read_before_the_start(data, tmp_path, monkeypatch):
    monkeypatch.setattr(starting, "SMALL", 2**12)
    frames = np.random.default_rng(0).standard_normal((2001, 16)).astype("f4")
    forcing = xr.Dataset({"f": (("time", "x"), frames)}, {"time": np.arange(2001.0), "x": data.x})
    spec = spec_of(data.assign(f=data.u.isel(trajectory=0)), ["u"], forcing=["f"])
    begun = starting.start_of(Pushed(spec), data.isel(time=[0]), 2000, forcing, None)
    read, real = [], starting.Forcing._read
    monkeypatch.setattr(starting.Forcing, "_read", lambda self, *span: read.append(span) or real(self, *span))
    assert begun.forcing.digest()
    assert sum(last - first for first, last in read) <= starting.SAMPLES + 1
    assert (1999, 2000) in read


def test_states_of_other_structures_are_told(data):
    stepper, frames = Odd(spec_of(data)), jnp.ones((3, 2, 16, 1))
    state = stepper.encode(frames, None)
    state = jax.tree.map(jnp.asarray, state)
    arrays = named(state)
    back = restore(state, arrays)
    jax.tree.map(lambda a, b: assert_array_equal(_plain(a), _plain(b)), back, state)
    assert jax.tree.map(lambda a: a.dtype, back) == jax.tree.map(lambda a: a.dtype, state)
    name = "state['frame']"
    for changed, match in (
        ({k: v for k, v in arrays.items() if k != name}, "lacks state"),
        ({**arrays, "state['more']": arrays[name]}, "unknown state"),
        ({**arrays, name: arrays[name][:1]}, r"float32 \(1, 16, 1\) there, but float32 \(3, 16, 1\) here"),
        ({**arrays, name: arrays[name].astype(np.float16)}, "float16"),
    ):
        with pytest.raises(CheckpointError, match=match):
            restore(state, changed)


def _plain(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_twenty_thousand_steps_need_the_memory_of_five_thousand(tmp_path):
    """Two fields of 64 x 64: 490 MB more are written, and the peak may not grow by a tenth of that.

    It settles in the first thousands of steps, while buffers of the store are filled.
    """
    program = f"""
import resource, sys
import numpy as np, xarray as xr
from physml.data import open_dataset, spec_of
from physml.forecast import forecast
from physml.steppers import STEPPERS
fields = np.random.default_rng(0).random((1, 2, 64, 64)).astype("f4")
data = xr.Dataset({{n: (("trajectory", "time", "x", "y"), fields) for n in "uv"}})
stepper = STEPPERS["persistence"]().build(spec_of(data))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
forecast(stepper, data, 5000, out="{tmp_path}/a.zarr", spectrum_every=100).close()
before = peak()
result = forecast(stepper, data, 20000, out="{tmp_path}/b.zarr", spectrum_every=100)
assert result.u.shape == (1, 20000, 64, 64) and float(result.v[0, -1, 5, 5]) == fields[0, -1, 5, 5]
print(before, peak())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after - before < 49, (before, after)


def test_a_finished_store_opens_without_a_warning_and_goes_on_where_finishing_broke_off(data, tmp_path, monkeypatch):
    """Its metadata are consolidated last: a process that was killed then left them beside arrays that still change."""
    stepper, path, put = STEPPERS["extrapolation"]().build(spec_of(data, ["u"])), tmp_path / "f.zarr", stores.Zarr._put
    initial = data.isel(time=[0, 1])
    whole = forecast(stepper, initial, 9, limit=None)

    def killed(store):
        raise Stop

    monkeypatch.setattr(stores.Zarr, "_put", killed)
    with pytest.raises(Stop):
        forecast(stepper, initial, 9, out=path, chunk=2, limit=None)
    assert "consolidated_metadata" in json.loads((tmp_path / "f.zarr.partial/data.zarr/zarr.json").read_text())
    monkeypatch.setattr(stores.Zarr, "_put", put)
    forecast(stepper, initial, 9, out=path, chunk=2, limit=None, resume="auto").close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(path) as listed, xr.open_zarr(path, consolidated=False) as read:
            xr.testing.assert_identical(listed.load()[list(read.data_vars)], read.load())
            xr.testing.assert_equal(listed, whole)
        with forecast(stepper, initial, 9, out=path, chunk=2, limit=None, resume="auto") as again:
            xr.testing.assert_equal(again.load(), whole)


def test_spectra_are_those_of_the_frames(tiny):
    spec = tiny.spec((16, 12), ("u", "v"))
    window = tiny.window(spec)
    stepper = STEPPERS["extrapolation"]().build(spec)
    for chunk, every in ((5, 3), (7, 1), (2, 5)):
        pieces = list(rollout_chunks(stepper, window, 30, chunk, spectrum_every=every))
        found = np.concatenate([piece.ledger.spectrum for piece in pieces], 1)
        frames = np.concatenate([piece.frames for piece in pieces], 1)[:, every - 1 :: every]
        assert_allclose(found, energy_spectrum(frames, spec.grid), rtol=1e-4, atol=1e-9)
        assert_allclose(found.sum(-1), 0.5 * (frames**2).mean((2, 3)), rtol=1e-4)  # Parseval
        energy = np.concatenate([piece.ledger.energy for piece in pieces], 1)[:, every - 1 :: every]
        assert_allclose(energy, found.sum(-1), rtol=1e-4)  # one energy, not twice the other
        start = energy_spectrum(window.frames[:, 1:2], spec.grid)[:, 0]
        assert_allclose(pieces[0].initial.spectrum, start, rtol=1e-4, atol=1e-9)
    with pytest.raises(ConfigError, match="spectrum_every 0"):
        rollout_chunks(stepper, window, 30, 5, spectrum_every=0)


def test_forecasts_of_similar_lengths_are_compiled_once(data, chunk_traces):
    """With energy spectra of fifty to a hundred of their steps."""
    stepper = STEPPERS["persistence"]().build(spec_of(data))
    shares = forecast(stepper, data, 300, spectrum_every="auto").sizes["spectrum_step"]
    assert shares == 76  # every fourth, and the initial state
    traces = dict(chunk_traces)
    for steps in (350, 256, 399):
        forecast(stepper, data, steps, spectrum_every="auto")
    assert chunk_traces == traces
    forecast(stepper, data, 9)
    traces = dict(chunk_traces)
    assert forecast(stepper, data, 14).sizes["lead"] == 14
    assert chunk_traces == traces


@pytest.mark.parametrize("out", [None, "f.zarr", "f.nc"])
def test_the_summary_tells_how_a_rollout_ends(data, tmp_path, out):
    """Every step takes 2 % off the amplitude of an otherwise still field: energy falls as 0.98^(2 n) in all shells."""

    class Fading(nnx.Module):
        def __init__(self, spec):
            self.spec, self.history = spec, 1

        def encode(self, frames, context):
            return frames[:, -1]

        def advance(self, state, context):
            worse = jnp.where(jnp.isclose(context.time, 8.0)[:, None, None], jnp.nan, 0)
            return 0.98 * state + worse.at[:2].set(0)

        def decode(self, state):
            return state

    path = out and tmp_path / out
    result = forecast(Fading(spec_of(data)), data, 12, out=path, chunk=5, spectrum_every=4, on_divergence="stop")
    assert result.ledger_spectrum_u.dims == ("trajectory", "spectrum_step", "wavenumber")
    assert_array_equal(result.spectrum_step, [0, 4, 8, 12])
    assert_array_equal(result.spectrum_lead, [0, 4, 8, 12])
    assert_allclose(result.wavenumber, 2 * np.pi * np.arange(9), rtol=1e-6)
    assert blow_ups(result) == {"trajectories": 3, "diverged": 1, "first at step": 8, "median": 8}
    found = stability(result)["u"]
    assert_allclose(found["energy drift"], 0.98**24 - 1, rtol=1e-3)
    assert_allclose(found["small scales"], 0.98**24, rtol=1e-3)
    plain = forecast(Fading(spec_of(data)), data, 3)
    assert stability(plain)["u"]["small scales"] is None
    assert blow_ups(plain)["first at step"] is None
    with pytest.raises(DataError, match="holds no ledger"):
        stability(data)
    point = data.isel(x=slice(0, 3))
    stepper = Fading(spec_of(point))
    with pytest.raises(SpecError, match="at least four points"):
        forecast(stepper, point, 3, spectrum_every=1)
    assert "spectrum_step" not in forecast(stepper, point, 3, spectrum_every="auto").dims
    assert forecast(Fading(spec_of(data)), data, 3, spectrum_every="auto").sizes["spectrum_step"] == 4
    with pytest.raises(ConfigError, match="spectrum_every is 0"):
        forecast(stepper, point, 3, spectrum_every=0)


@pytest.mark.parametrize("out", [None, "f.zarr", "f.nc"])
def test_the_summary_follows_selections(data, tmp_path, out):
    """Every trajectory of every member drifts at a rate of its own: the summary of a part is that of its median."""

    class Drifting(nnx.Module):
        def __init__(self, spec):
            self.spec, self.history = spec, 1

        def encode(self, frames, context):
            return frames[:, -1], 1 + 0.01 * jnp.arange(1, len(frames) + 1)[:, None, None]

        def advance(self, state, context):
            return state[0] * state[1], state[1]

        def decode(self, state):
            return state[0]

    rates = (1 + 0.01 * np.arange(1, 10).reshape(3, 3)) ** 2
    members = xr.concat([data + m for m in (0, 3, 10)], "member")
    path = out and tmp_path / out
    result = forecast(Drifting(spec_of(data)), members, 6, out=path, chunk=4, spectrum_every=1)
    if path:
        result.close()
        result = open_dataset(path)
        assert result.steps_completed.dims == ("trajectory", "member")

    def told(part, name="energy drift"):
        return stability(part)["u"][name]

    assert_allclose(told(result), np.median(rates**6) - 1, rtol=1e-3)
    for member in range(3):
        one = result.isel(member=member)
        assert_allclose(told(one), np.median(rates[member] ** 6) - 1, rtol=1e-3)
        assert_allclose(told(one, "small scales"), np.median(rates[member] ** 6), rtol=1e-3)
        assert_allclose(told(one.isel(trajectory=2)), rates[member, 2] ** 6 - 1, rtol=1e-3)
        assert_allclose(told(one.isel(trajectory=[2])), rates[member, 2] ** 6 - 1, rtol=1e-3)
        assert blow_ups(one)["trajectories"] == 3
    assert_allclose(told(result.isel(trajectory=[2, 0], member=[1])), np.median(rates[1, [0, 2]] ** 6) - 1, rtol=1e-3)
    one = result.isel(member=1, trajectory=1)
    assert_allclose(told(one.isel(lead=slice(0, 3)), "small scales"), rates[1, 1] ** 3, rtol=1e-3)
    for lead, last in ((slice(0, 3), 3), (slice(2, 5), 5), ([-1], 6), (2, 3), (slice(None, None, -2), 6)):
        assert_allclose(told(one.isel(lead=lead)), rates[1, 1] ** last - 1, rtol=1e-3)
    energy = result.ledger_energy_u.mean("member").isel(lead=-1) / result.ledger_initial_energy_u.mean("member") - 1
    assert_allclose(told(result.mean("member")), np.median(energy), rtol=1e-3)
    assert blow_ups(one.isel(lead=0))["diverged"] == 0
    for part in (result.mean("lead"), result.isel(lead=[]), result.drop_vars("ledger_initial_energy_u")):
        with pytest.raises(DataError, match="no lead|older physml"):
            stability(part)


def test_a_lost_trajectory_is_summarized_up_to_its_end_whatever_is_selected(data):
    result = forecast(Odd(spec_of(data), breaks=(1, 5)), data, 9, on_divergence="flag")
    lost, energy = result.isel(trajectory=[1]), result.ledger_energy_u[1]
    first = float(result.ledger_initial_energy_u[1])
    for part, last in ((lost, 3), (lost.isel(lead=slice(2, None)), 3), (lost.isel(lead=[0, 2, 7]), 2)):
        assert_allclose(stability(part)["u"]["energy drift"], float(energy[last]) / first - 1, rtol=1e-3)


def call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_every_stepper_has_a_row():
    assert set(every_stepper.OPTIONS) == set(STEPPERS)
    assert len(every_stepper.names()) == len(STEPPERS)


@pytest.mark.parametrize("name", every_stepper.names())
def test_every_stepper_rolls_out_and_goes_on_from_the_shell(capsys, tmp_path, name, monkeypatch):
    saving.save(every_stepper.stepper_of(name), tmp_path / "model")
    every_stepper.data_of(name).to_netcdf(tmp_path / "start.nc")
    words = ["rollout", tmp_path / "model", "--data", tmp_path / "start.nc", "--start", "#6", "--steps", 9, "--json"]
    words += ["--chunk", 2, "--seed", 4, "--out"]
    code, out, err = call(capsys, *words, tmp_path / "whole.zarr")
    assert code == 0, err
    told = json.loads(out)
    assert told["steps completed"] == [9, 9]
    assert told["blow-ups"]["diverged"] == 0
    assert {"energy drift", "small scales"} == set(next(iter(told["stability"].values())))

    real = loop.Loop._write_ledger

    def interrupted(self, waiting):
        if waiting[-1].start == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, waiting)

    monkeypatch.setattr(loop.Loop, "_write_ledger", interrupted)
    code, _, err = call(capsys, *words, tmp_path / "parts.zarr")
    assert code == 75
    assert "after step 6 of 9 on SIGTERM" in json.loads(err)["error"]
    monkeypatch.setattr(loop.Loop, "_write_ledger", real)
    code, _, err = call(capsys, *words, tmp_path / "parts.zarr", "--resume", "auto")
    assert code == 0, err
    with xr.open_zarr(tmp_path / "whole.zarr", consolidated=False) as whole:
        same(tmp_path / "parts.zarr", whole.load())
    code, out, err = call(capsys, *words, tmp_path / "parts.zarr", "--resume", "auto")
    assert code == 0, err
    assert json.loads(out)["steps completed"] == [9, 9]


@pytest.mark.parametrize("suffix", [pytest.param(s, marks=[pytest.mark.slow] * (s == ".nc")) for s in SUFFIXES])
def test_a_killed_process_is_continued(tmp_path, suffix):
    """SIGKILL while frames are written: nothing can be tidied up."""
    saving.save(every_stepper.stepper_of("extrapolation"), tmp_path / "model")
    every_stepper.data_of("extrapolation").to_netcdf(tmp_path / "start.nc")
    out = tmp_path / f"parts{suffix}"
    words = ["rollout", "model", "--initial", "start.nc", "--steps", "4000", "--chunk", "10", "--quiet", "--out"]
    words = [sys.executable, "-c", "from physml.cli import main; main()", *words, out.name, "--on-divergence", "flag"]
    state = out.with_name(f"{out.name}.partial") / "state.safetensors"
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not state.is_file():
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    assert not out.exists()
    stepper, told = saving.load(tmp_path / "model"), []
    options = {"chunk": 10, "on_divergence": "flag", "key": jax.random.key(0), "spectrum_every": 64}
    with xr.open_dataset(tmp_path / "start.nc") as start:
        initial = start.load()
    progress = {"progress": lambda done, _: told.append(done)}
    forecast(stepper, initial, 4000, out=out, resume="auto", **options, **progress).close()
    assert told[0] > 64
    same(out, forecast(stepper, initial, 4000, **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", 0], "--steps is 0"),
        (["--perturb-kind", "white"], "nothing is perturbed"),
        (["--out", "f.grib"], "ends in '.grib'"),
        (["--out", "no/such/f.zarr"], "is no folder"),
        (["--members", 2, "--perturb", -1], "size above 0"),
        (["--spectrum-every", -1], "counts steps"),
        (["--store-every", 3], "Take 102 steps"),
        (["--limit", 0], "limit is 0"),
        (["--at", "99"], "the dataset spans"),
        (["--at", "#0"], "needs 2 frames of history"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(capsys, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    saving.save(every_stepper.stepper_of("extrapolation"), "model")
    every_stepper.data_of("extrapolation").to_netcdf("start.nc")
    words = ["rollout", "model", "--initial", "start.nc", "--json", "--dry-run"]
    assert call(capsys, *words)[0] == 0
    code, _, err = call(capsys, *words, *options)
    assert (code, said in err) == (2, True), err
    assert sorted(os.listdir()) == ["model", "start.nc"]


def test_a_run_starts_from_its_own_test_split(capsys, tmp_path):
    from physml import Experiment, SyntheticConfig
    from physml.experiment import to_yaml

    few = {"train": 1, "valid": 0, "test": 2}
    own = SyntheticConfig("burgers", points=32, trajectories=few, steps=6, cache=str(tmp_path / "cache"))
    test = own.open()["test"]
    stepper = STEPPERS["extrapolation"]().build(test.spec)
    saving.save(stepper, tmp_path / "run/model")
    words = ["rollout", tmp_path / "run", "--steps", 3, "--out", tmp_path / "f.nc", "--json", "--on-divergence", "flag"]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "give --initial FILE" in err
    (tmp_path / "run/config.yaml").write_text(to_yaml(Experiment(data=own)))
    code, out, err = call(capsys, *words, "--trajectory", 1)
    assert code == 0, err
    assert json.loads(out)["sizes"]["lead"] == 3
    for number in (2, -1):
        code, _, err = call(capsys, *words, "--trajectory", number, "--overwrite")
        assert code == 2, err
        assert f"--trajectory is {number}, but the dataset has 2: 0 to 1" in err
    frames = test.read(1, range(2)).frames[..., 0]
    with xr.open_dataset(tmp_path / "f.nc") as found:
        assert_allclose(found[test.spec.names[0]][0, 0], 2 * frames[1] - frames[0], rtol=1e-5, atol=1e-6)
