"""Rollouts against steppers whose every frame is known; chunks against one scan; the ledger and its watchdog."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import ConfigError, DivergedError, SpecError
from physml.fields import Grid
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.rollout import (
    Bounds,
    Watchdog,
    direct_leads,
    ensemble,
    ensemble_devices,
    perturbed,
    rollout,
    rollout_chunks,
    rollout_stride,
)  # fmt: skip
from physml.steppers import DirectConfig, IntervalConfig, ResidualConfig, stack_members
from physml.steppers.floors import ClimatologyConfig, LinearInverseConfig
from physml.steppers.intervals import Interval

chunks = importlib.import_module("physml.rollout.chunks")


class Shift(nnx.Module):
    """Advection by one cell of a periodic axis per step: exact, and it conserves everything."""

    def __init__(self, spec, factor=1.0, noise=0.0, break_at=None):
        self.spec, self.history, self.noise, self.break_at = spec, 1, noise, break_at
        self.factor = nnx.Param(jnp.asarray(factor, jnp.float32))

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        state = self.factor[...] * jnp.roll(state, 1, axis=1)
        if self.noise:
            state = state + self.noise * jax.random.normal(context.key, state.shape)
        if self.break_at is not None:
            sample, step, place, value = self.break_at
            now = jnp.isclose(context.time, step * self.spec.time_step)[sample]
            state = jnp.where(now, state.at[(sample, *place)].set(jnp.asarray(value)), state)
        return state

    def decode(self, state):
        return state


class Clock(nnx.Module):
    """Shows what a step is told: time, lead, calendar, forcing, parameters, static."""

    def __init__(self, spec, history):
        self.spec, self.history = spec, history

    def encode(self, frames, context):
        return frames[:, 0] if self.history else jnp.zeros((context.time.shape[0], *self.spec.grid.shape, 2))

    def advance(self, state, context):
        told = context.time + 100 * context.lead + context.calendar.sum(-1) + context.parameters.sum(-1)
        return (
            told[:, None, None, None]
            + context.forcing.sum(-1, keepdims=True)
            + context.static.sum(-1, keepdims=True)
            + 0 * state
        )

    def decode(self, state):
        return state


def jitted(stepper, window, steps, key=None, **options):
    graph, state = nnx.split(stepper)
    return jax.jit(lambda s, w: rollout(nnx.merge(graph, s), w, steps, key, **options))(state, window)


def seen_by_advance(monkeypatch, look):
    """`look` is called with what the compiled loop of chunks is called with."""
    real = chunks._advance
    monkeypatch.setattr(chunks, "_advance", lambda *a: lambda *given: (look(*given), real(*a)(*given))[1])


def together(pieces):
    return np.concatenate([piece.frames for piece in pieces], axis=1)


def conditioned(tiny, total=40):
    spec = tiny.spec(forcing=("sun",), static=("land",), parameters=("viscosity",), time_step=0.1)
    random = np.random.default_rng(0)
    return spec, tiny.window(
        spec,
        times=(np.arange(total, dtype=np.float32) * np.float32(0.1))[None].repeat(3, 0),
        calendar=random.random((3, total, 2)).astype(np.float32),
        forcing=random.random((3, total, 8, 6, 1)).astype(np.float32),
        static=random.random((3, 8, 6, 1)).astype(np.float32),
        parameters=random.random((3, 1)).astype(np.float32),
    )


def test_advection_is_exact(spec, window):
    frames = rollout(Shift(spec), window, 20)
    for step in range(20):
        assert_array_equal(frames[:, step], np.roll(window.frames[:, 0], step + 1, axis=1))


@pytest.mark.parametrize(("remat", "steps"), [("step", 3), (True, 3), ("sqrt", 2), ("sqrt", 9), ("sqrt", 11)])
def test_remat_changes_neither_values_nor_gradients(tiny, spec, window, steps, remat):
    stepper = ResidualConfig().build(spec, tiny.model(2, 2), Normalizer.identity(spec))
    graph, state = nnx.split(stepper)

    def loss(state, remat):
        return (rollout(nnx.merge(graph, state), window, steps, remat=remat) ** 2).mean()

    plain, other = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(state, r) for r in ("none", remat))
    assert_allclose(other[0], plain[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), other[1], plain[1]
    )  # float32 sums of 1728 terms


@pytest.mark.parametrize("remat", ["step", "sqrt"])
def test_recomputed_steps_have_their_own_clock_and_key(tiny, remat):
    spec, window = conditioned(tiny)
    clock, noisy = Clock(spec, 1), Shift(spec, noise=1.0)
    for steps in (5, 11):  # not squares: "sqrt" has steps after its groups
        assert_allclose(jitted(clock, window, steps, remat=remat), jitted(clock, window, steps), rtol=1e-6)
        key = jax.random.key(1)
        assert_allclose(jitted(noisy, window, steps, key, remat=remat), jitted(noisy, window, steps, key), rtol=1e-5)


def test_sqrt_remat_needs_less_memory(tiny):
    spec = tiny.spec((32, 32))
    window = tiny.window(spec, batch=1)
    graph, state = nnx.split(ResidualConfig().build(spec, tiny.model(2, 2, 32), Normalizer.identity(spec)))

    def loss(state, remat):
        return (rollout(nnx.merge(graph, state), window, 400, remat=remat)[:, -1] ** 2).mean()

    def temporaries(remat):
        compiled = jax.jit(jax.grad(loss), static_argnums=1).lower(state, remat).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, step, sqrt = (temporaries(remat) for remat in ("none", "step", "sqrt"))
    states = 400 * 32 * 32 * 2 * 4  # the frames themselves and their cotangents are there in any case
    assert none > 3 * step
    assert step - sqrt > 0.8 * states


@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_chunks_are_one_scan_bit_for_bit(tiny, spec, window, chunk):
    stepper = ResidualConfig(history=2).build(spec, tiny.model(4, 2), Normalizer(spec, [0, 0], [1, 2], [0.1, 0.2]))
    pieces = list(rollout_chunks(stepper, window, 21, chunk))
    assert [piece.start for piece in pieces] == list(range(0, 21, chunk))
    assert_array_equal(together(pieces), jitted(stepper, window, 21))


def test_chunks_of_a_stochastic_stepper_are_one_scan(spec, window):
    key = jax.random.key(3)
    frames = jitted(Shift(spec, noise=0.1), window, 10, key)
    assert_array_equal(together(rollout_chunks(Shift(spec, noise=0.1), window, 10, 4, key)), frames)
    assert np.abs(frames - jitted(Shift(spec, noise=0.1), window, 10, jax.random.key(4))).max() > 0.1


@pytest.mark.parametrize("history", [0, 1, 3])
def test_chunks_see_the_same_clock_and_forcing(tiny, history):
    spec, window = conditioned(tiny)
    frames = jitted(Clock(spec, history), window, 30)
    assert_array_equal(together(rollout_chunks(Clock(spec, history), window, 30, 7)), frames)
    asked = []

    def forcing(first, last):
        asked.append((first, last))
        return window.forcing[:, history + first : history + last]

    short = dataclasses.replace(window, forcing=window.forcing[:, :1])
    pieces = rollout_chunks(Clock(spec, history), short, 30, 7, forcing=forcing)
    assert_array_equal(together(pieces), frames)
    assert asked[-1] == (28, 30)


def test_members_share_the_forcing_of_their_trajectories(tiny, monkeypatch):
    """It reaches the device once, not for each member."""
    spec, window = conditioned(tiny)
    members, sent = jax.tree.map(lambda a: np.concatenate([a] * 2), window), []
    expected = together(rollout_chunks(Clock(spec, 1), members, 10, 4))
    seen_by_advance(monkeypatch, lambda numbers, piece, *_: sent.append(piece.forcing.shape[0]))
    shared = rollout_chunks(Clock(spec, 1), members, 10, 4, forcing=lambda i, j: window.forcing[:, 1 + i : 1 + j])
    assert_array_equal(together(shared), expected)
    assert set(sent) == {3}


def test_chunks_go_on_past_the_given_times(tiny, spec, window):
    clock = dataclasses.replace(spec, time_step=0.25)
    window = dataclasses.replace(window, spec=clock, times=window.times * np.float32(0.25))
    frames = together(rollout_chunks(Clock(clock, 1), window, 12, 5))
    assert_allclose(frames[0, :, 0, 0, 0], 0.25 * np.arange(1, 13) + 25, rtol=1e-6)
    assert_array_equal(frames, jitted(Clock(clock, 1), window, 12))


def test_any_length_needs_one_trace_and_leaves_the_input_alone(spec, window, chunk_traces):
    stepper, before = Shift(spec, factor=0.999), window.frames.copy()
    for steps in (5, 8, 11, 30):
        list(rollout_chunks(stepper, window, steps, 4))
    list(rollout_chunks(Shift(spec, factor=0.5), window, 9, 4))  # other numbers, same program
    assert chunk_traces["loop"] <= 1
    on_device = jax.tree.map(jnp.asarray, window)
    list(rollout_chunks(stepper, on_device, 8, 4))
    assert_array_equal(window.frames, before)
    assert_array_equal(on_device.frames, before)


def test_short_rollouts_share_few_traces(spec, window, chunk_traces):
    """Buffers of 8, 16 and 32 steps, and one beginning."""
    stepper = Shift(spec, factor=0.9)
    found = {steps: together(rollout_chunks(stepper, window, steps, 50)) for steps in (5, 6, 8, 13, 16, 30, 17, 7)}
    assert chunk_traces["loop"] <= 3
    assert chunk_traces["start"] <= 1
    for steps, frames in found.items():
        assert_array_equal(frames, found[30][:, :steps])


def test_the_next_chunk_is_started_before_the_last_one_is_handed_out(spec, window, monkeypatch):
    started = []
    seen_by_advance(monkeypatch, lambda *_: started.append(1))
    pieces = rollout_chunks(Shift(spec), window, 12, 4)
    next(pieces)
    assert len(started) == 2


def test_the_ledger_of_a_conserving_stepper_is_flat(tiny):
    spec = tiny.spec((16, 12), ("u",))
    window = tiny.window(spec)
    window = dataclasses.replace(window, frames=window.frames + 1000)
    for piece in rollout_chunks(Shift(spec), window, 50, 20):
        start = np.asarray(window.frames[:, 0], np.float64)
        for name, value, tolerance in (
            ("mean", start.mean((1, 2)), 1e-6 * 1000),
            ("variance", start.var((1, 2)), 1e-5),
            ("energy", (start**2).mean((1, 2)) / 2, 2e-6 * 1e6),
            ("minimum", start.min((1, 2)), 0),
            ("maximum", start.max((1, 2)), 0),
        ):
            kept = np.asarray(getattr(piece.ledger, name))
            assert kept.shape == (3, piece.frames.shape[1], 1)
            assert_allclose(kept, np.broadcast_to(value[:, None], kept.shape), rtol=1e-6, atol=tolerance)
            assert np.ptp(kept, axis=1).max() <= tolerance
        assert np.asarray(piece.ledger.finite).all()
        assert_allclose(piece.initial.mean, start.mean((1, 2)), rtol=1e-6)


def test_the_ledger_weighs_cells_and_leaves_out_masked_ones(tiny):
    spec = tiny.spec((4, 3), ("u",))
    axis = dataclasses.replace(spec.grid.axes[0], weights=(0.4, 0.8, 1.2, 1.6))
    spec = spec.on(dataclasses.replace(spec.grid, axes=(axis, spec.grid.axes[1])))
    frames = np.arange(12, dtype=np.float32).reshape(1, 1, 4, 3, 1)
    mask = np.ones((1, 4, 3, 1), np.float32)
    mask[0, 3, 2] = 0
    from physml.rollout.ledger import measure

    weights = np.array([0.4, 0.8, 1.2, 1.6])[:, None] * mask[0, ..., 0]
    kept = measure(jnp.asarray(frames[:, 0]), spec, jnp.asarray(mask))
    values = frames[0, 0, ..., 0]
    mean = (weights * values).sum() / weights.sum()
    assert_allclose(kept.mean, [[mean]], rtol=1e-6)
    assert_allclose(kept.variance, [[(weights * (values - mean) ** 2).sum() / weights.sum()]], rtol=1e-6)
    assert float(kept.maximum[0, 0]) == 10  # cell 11 is masked


def watch(stepper, window, steps=12, chunk=5, limit=100.0, **options):
    dog = None
    for piece in rollout_chunks(stepper, window, steps, chunk):
        dog = dog or Watchdog(stepper.spec, Bounds.of(stepper, piece.initial, limit), **options)
        dog.read(piece.start, piece.frames, piece.ledger)
    return dog


def test_the_watchdog_names_step_variable_and_place(spec, window):
    dog = watch(Shift(spec, break_at=(1, 7, (3, 2, 1), np.nan)), window)
    event = dog.events[1]
    assert (event.sample, event.step, event.channel, event.place) == (1, 7, "v", (3, 2))
    assert list(dog.events) == [1]
    assert_array_equal(dog.good, [12, 6, 12])
    assert not dog.everything_failed
    for part in ("step 7", "trajectory 1", "'v' is nan", "(3, 2)", "x=0.375", "y=0.333333", "6 steps before are good"):
        assert part in event.message, event.message
    with pytest.raises(DivergedError, match="step 7"):
        dog.raise_first(list(dog.events.values()))


def test_the_watchdog_sees_values_far_out_of_range(spec, window):
    assert not watch(Shift(spec, factor=1.01), window).events
    event = watch(Shift(spec, break_at=(2, 3, (5, 1, 0), 1e6)), window).events[2]
    assert (event.step, event.channel, event.place, event.value) == (3, "u", (5, 1), 1e6)
    assert "outside" in event.message
    assert not watch(Shift(spec, break_at=(2, 3, (5, 1, 0), 1e6)), window, limit=None).events
    growing = watch(Shift(spec, factor=10.0), window)
    assert growing.everything_failed
    assert {event.step for event in growing.events.values()} <= {2, 3}


def test_the_training_range_widens_what_is_allowed(tiny, spec, window):
    small = dataclasses.replace(window, frames=window.frames * np.float32(1e-3))
    stepper = Shift(spec, break_at=(0, 2, (0, 0, 0), 5.0))
    assert watch(stepper, small).events  # 5 is far outside the initial state's range ...
    stepper.normalizer = Normalizer(spec, [2.0, 2.0], [1.0, 1.0], [1.0, 1.0])
    assert not watch(stepper, small).events  # ... but well inside the training data
    still = dataclasses.replace(window, frames=window.frames * 0)
    assert not watch(Shift(spec, break_at=(0, 2, (0, 0, 0), 5.0)), still).events  # nothing is known of the scale
    with pytest.raises(ConfigError, match="limit is -1"):
        watch(stepper, small, limit=-1)


def test_what_tells_nothing_of_the_scale_bounds_nothing(spec, window):
    stepper = Shift(spec, break_at=(0, 2, (0, 0, 0), 305.0))
    nearly = dataclasses.replace(window, frames=np.float32(300) + window.frames * np.float32(1e-2))
    assert not watch(stepper, nearly).events
    small = dataclasses.replace(window, frames=window.frames * np.float32(1e-3))
    stepper = Shift(spec, break_at=(0, 2, (0, 0, 0), 5.0))
    stepper.normalizer = Normalizer.identity(spec)  # nothing was fitted
    assert watch(stepper, small).events


def test_a_start_far_from_the_training_data_may_go_on_as_it_is(spec, window):
    stepper = Shift(spec, break_at=(0, 2, (0, 0, 0), 5.0))
    stepper.normalizer = Normalizer(spec, [0.0, 0.0], [1e-3, 1e-3], [1.0, 1.0])
    assert not watch(stepper, window).events


def test_a_number_that_is_not_finite_is_named_before_a_large_one(spec, window):
    stepper = Shift(spec, break_at=(1, 7, (3, 2), (1e6, np.nan)))
    assert watch(stepper, window).events[1].channel == "v"
    assert watch(Shift(spec, break_at=(1, 7, (3, 2), (1e6, 1.0))), window).events[1].channel == "u"


def test_the_first_of_several_failures_is_raised(spec, window):
    events = [
        watch(Shift(spec, break_at=(i, step, (3, 2, 1), np.nan)), window).events[i] for i, step in ((0, 7), (1, 3))
    ]
    with pytest.raises(DivergedError, match="step 3"):
        Watchdog.raise_first(None, events)


def test_ensembles_are_their_members(spec, window):
    stepper, keys = Shift(spec, noise=0.1), jax.random.split(jax.random.key(0), 3)
    frames = ensemble(stepper, window, 4, keys)
    assert frames.shape == (3, 3, 4, 8, 6, 2)
    for i in range(3):
        assert_array_equal(frames[i], jitted(stepper, window, 4, keys[i]))
    parameters = stack_members([Shift(spec, factor=f) for f in (0.5, 1.0, 2.0)])
    frames = ensemble(parameters, window, 2)
    assert_allclose(frames[:, :, 1], [f**2 * np.roll(window.frames[:, 0], 2, 1) for f in (0.5, 1, 2)], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_devices_share_the_members(tiny, spec, window, count):
    assert jax.local_device_count() == 4
    keys = jax.random.split(jax.random.key(0), count)
    spread = ensemble_devices(Shift(spec, noise=0.1), window, 4, keys)
    assert spread.shape == (count, 3, 4, 8, 6, 2)
    assert_allclose(spread, ensemble(Shift(spec, noise=0.1), window, 4, keys), rtol=1e-6, atol=1e-6)
    steppers = [Shift(spec, factor=1 + 0.1 * i) for i in range(count)]
    stacked = stack_members(steppers)
    spread = ensemble_devices(stacked, window, 4)
    assert_allclose(spread, ensemble(stacked, window, 4), rtol=1e-6)
    assert_allclose(spread[-1], jitted(steppers[-1], window, 4), rtol=1e-6)


def test_what_cannot_be_rolled_out_is_said(tiny, spec, window):
    stepper = ResidualConfig(history=5).build(spec, tiny.model(10, 2), Normalizer.identity(spec))
    with pytest.raises(SpecError, match="needs 5 frames of history, but the window holds 4"):
        rollout(stepper, window, 2)
    with pytest.raises(SpecError, match="needs 5 frames"):
        rollout_chunks(stepper, window, 2, 1)
    forced, forced_window = conditioned(tiny, total=6)
    with pytest.raises(SpecError, match=r"\['sun'\] is given for 6 frames, but 11 are needed"):
        rollout(Clock(forced, 1), forced_window, 10)
    with pytest.raises(ConfigError, match="remat is 'all'"):
        rollout(Shift(spec), window, 2, remat="all")
    with pytest.raises(ConfigError, match="at least 1"):
        rollout_chunks(Shift(spec), window, 0, 1)
    with pytest.raises(ConfigError, match="there are none"):
        ensemble(Shift(spec), window, 2)
    with pytest.raises(ConfigError, match=r"'keys': 3, 'steppers': 2"):
        ensemble(stack_members([Shift(spec)] * 2), window, 2, jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ConfigError, match="built differently"):
        stack_members([Shift(spec), Shift(spec, noise=1.0)])


class Season(nnx.Module):
    """Says the sine of the year, as pointwise networks are told it, or the forcing."""

    def __init__(self, forcing=False):
        self.forcing = forcing

    def __call__(self, fields, scalars):
        told = fields[..., -1:] if self.forcing else scalars[:, None, None, :1]
        return jnp.broadcast_to(told, (*fields.shape[:-1], 2))


def seasonal(tiny, days, **kind):
    """A stepper that reads the calendar, and windows of one frame with the calendar and the times of so many."""
    spec = tiny.spec()
    year = 0.02 * np.arange(days, dtype=np.float32)
    calendar = np.broadcast_to(np.stack([year, np.zeros_like(year)], -1), (3, days, 2))
    stepper = DirectConfig(calendar=True, **kind).build(spec, Season(), Normalizer.identity(spec))
    return stepper, tiny.window(spec, frames=1, calendar=calendar), np.sin(2 * np.pi * year)


def test_the_calendar_of_what_is_predicted_is_read(tiny):
    """Also where times are given for the history alone."""
    stepper, window, sine = seasonal(tiny, 7, lead=True, longest_lead=6)
    assert_allclose(rollout(stepper, window, 6)[0, :, 0, 0, 0], sine[1:], atol=1e-6)
    assert_allclose(direct_leads(stepper, window, [6, 0, 2])[0, :, 0, 0, 0], sine[[6, 0, 2]], atol=1e-6)
    assert_allclose(rollout_stride(stepper, window, 2, 3)[0, :, 0, 0, 0], sine[[3, 6]], atol=1e-6)
    assert_allclose(together(rollout_chunks(stepper, window, 6, 4))[0, :, 0, 0, 0], sine[1:], atol=1e-6)


def test_a_calendar_that_ends_too_early_is_refused(tiny):
    """It would stand still at its last date."""
    stepper, window, _ = seasonal(tiny, 6, lead=True, longest_lead=6)
    for call in (
        lambda: rollout(stepper, window, 6),
        lambda: rollout(stack_members([stepper, stepper]), window, 6),
        lambda: rollout_chunks(stepper, window, 6, 4),
        lambda: rollout_chunks(stack_members([stepper]).apart(), window, 6, 4, forcing=lambda *_: window.forcing),
        lambda: direct_leads(stepper, window, [1, 6]),
        lambda: rollout_stride(stepper, window, 2, 3),
    ):
        with pytest.raises(SpecError, match="reads the calendar, which is given for 6 frames, but 7 are needed"):
            call()


def test_floors_whose_calendar_ends_too_early_are_refused(tiny):
    """Unless they know neither seasons nor hours."""
    _, window, _ = seasonal(tiny, 6)
    seasons = ClimatologyConfig(days=366, hours=1)
    for config in (seasons, ClimatologyConfig(days=1, hours=4), LinearInverseConfig(lags=1, climatology=seasons)):
        with pytest.raises(SpecError, match="reads the calendar, which is given for 6 frames, but 7 are needed"):
            rollout(config.build(window.spec), window, 6)
    still = ClimatologyConfig(days=1, hours=1).build(window.spec)
    assert rollout(still, window, 6).shape[1] == 6


def test_forcing_that_ends_too_early_is_refused_whatever_the_times(tiny):
    """And one that is given for all frames is read there, where times are given for the history alone."""
    spec = tiny.spec(forcing=("sun",))
    stepper = DirectConfig(lead=True, longest_lead=6).build(spec, Season(forcing=True), Normalizer.identity(spec))
    forcing = np.broadcast_to(np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1), (3, 7, 8, 6, 1))
    window = tiny.window(spec, frames=1, forcing=forcing)
    assert_array_equal(rollout(stepper, window, 6)[0, :, 0, 0, 0], np.arange(1, 7))
    assert_array_equal(rollout_stride(stepper, window, 2, 3)[0, :, 0, 0, 0], [3, 6])
    assert_array_equal(direct_leads(stepper, window, [6, 0])[0, :, 0, 0, 0], [6, 0])
    short = tiny.window(spec, frames=9, forcing=forcing[:, :6])
    for call in (lambda: rollout_stride(stepper, short, 2, 3), lambda: direct_leads(stepper, short, [6])):
        with pytest.raises(SpecError, match=r"Forcing \['sun'\] is given for 6 frames, but 7 are needed"):
            call()


def test_rollouts_outside_of_jit_are_compiled_once(tiny, spec, window):
    """For other weights, windows, keys and leads; gradients go through them as before."""
    traces, single = [], DirectConfig(lead=True, longest_lead=9)

    class Counted(nnx.Module):
        def __init__(self, factor):
            self.factor = nnx.Param(jnp.float32(factor))

        def __call__(self, fields, scalars):
            traces.append(1)
            return self.factor[...] * fields

    def stepper(factor):
        return single.build(spec, Counted(factor), Normalizer.identity(spec))

    def run(factor, window, seed, leads):
        model, key = stepper(factor), jax.random.key(seed)
        traces.clear()  # building traces too
        found = (
            rollout(model, window, 3, key)[:, 2],
            rollout_stride(model, window, 3, 2)[:, 2],
            direct_leads(model, window, leads, key)[:, 1],
        )
        return found, len(traces)

    assert run(0.5, window, 0, [1, 2])[1] == 3
    other = dataclasses.replace(window, frames=2 * window.frames)
    found, traced = run(3.0, other, 1, [4, 9])
    assert traced == 0
    for frames, power in zip(found, (3, 3, 1)):
        assert_allclose(frames, 3.0**power * other.frames[:, 0], rtol=1e-6)
    for frames in (1, 2, 3):  # of which the history is used, and no more
        assert run(3.0, dataclasses.replace(window, frames=window.frames[:, :frames]), 1, [4, 9])[1] == 0
    slope = jax.grad(lambda u: rollout(stepper(3.0), dataclasses.replace(window, frames=u), 2)[:, 1].sum())
    assert_allclose(slope(window.frames)[:, 0], 9.0, rtol=1e-6)
    weights = jax.grad(lambda f: (rollout(Shift(spec, f), window, 2)[:, 1] ** 2).sum())(3.0)
    assert_allclose(weights, 4 * 3**3 * (window.frames[:, 0] ** 2).sum(), rtol=1e-4)


def test_steppers_that_cannot_be_hashed_are_compiled_anew(spec, window, chunk_traces):
    unhashable, expected = Shift(spec), rollout(Shift(spec), window, 4)
    unhashable.notes = ["no", "hash"]
    assert_array_equal(rollout(unhashable, window, 4), expected)
    assert_array_equal(together(rollout_chunks(unhashable, window, 4, 2)), expected)
    assert chunk_traces == {"start": 1, "loop": 1}  # once for both pieces


def test_lists_in_configs_compile_nothing_twice(spec, window, chunk_traces):
    """They are settled as tuples: what holds them is remembered as what holds tuples."""
    normalizer = Normalizer(spec, [0.0] * 2, [1.0] * 2, [1.0] * 2, intervals={1: [1.0] * 2, 2: [1.0] * 2})
    traces = []

    def run(modes, intervals):
        config = IntervalConfig(intervals=intervals)
        model = FNOConfig(width=4, depth=1, modes=modes).build(config.signature(spec), nnx.Rngs(0))
        stepper = config.build(spec, model, normalizer)
        before = len(traces)
        return rollout(stepper, window, 2), together(rollout_chunks(stepper, window, 2, 2)), len(traces) - before

    advance = Interval.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interval, "advance", lambda *given: (traces.append(1), advance(*given))[1])
        *expected, first = run((3, 3), (1, 2))
        *found, again = run([3, 3], [1, 2])
    assert first > 0
    assert again == 0
    assert chunk_traces == {"start": 1, "loop": 1}
    assert_array_equal(found, expected)


def test_strides_are_whole_numbers_of_any_type(spec, window):
    expected = rollout(Shift(spec), window, 3)
    for stride in (1, 1.0, np.int64(1), np.float32(1)):
        assert_array_equal(rollout_stride(Shift(spec), window, 3, stride), expected)
    for stride in (1.5, 0, -1.0, np.nan):
        with pytest.raises(ConfigError, match=f"stride is {stride}, but it counts frames"):
            rollout_stride(Shift(spec), window, 3, stride)


def test_perturbations_have_the_size_and_the_correlation_asked_for(tiny, spec, window):
    """Unit variance at every point; smooth fields correlate as exp(-(d / length)^2 / 2), on both kinds of axes."""
    still = dataclasses.replace(window, frames=np.zeros_like(window.frames))
    scale = np.array([2.0, 0.5], np.float32)
    for kind, length in (("white", 0.1), ("smooth", 0.15)):
        found = perturbed(still, jax.random.key(1), 3000, scale, kind=kind, length=length).frames
        assert found.shape == (3000, *window.frames.shape)
        assert_array_equal(found[:, :, 0], found[:, :, -1])  # one error for the whole history
        drawn = np.asarray(found[:, :, 0], np.float64).reshape(-1, *found.shape[3:])
        assert_allclose(drawn.std(0), np.broadcast_to(scale, drawn.shape[1:]), rtol=0.04)
        assert np.abs(drawn.mean(0) / scale).max() < 0.04
        size = drawn.shape[1]
        next_one = (drawn[:, 0] * drawn[:, 1]).mean(0) / scale**2
        expected = np.exp(-((1 / size / length) ** 2) / 2) if kind == "smooth" else 0.0
        assert_allclose(next_one, expected, atol=0.05)
        seam = (drawn[:, 0] * drawn[:, -1]).mean(0) / scale**2  # the last one is the next one of a periodic axis only
        assert_allclose(seam, expected, atol=0.05)
        if kind == "smooth":
            walls = spec.on(Grid(tuple(dataclasses.replace(axis, periodic=False) for axis in spec.grid.axes)))
            apart = perturbed(dataclasses.replace(still, spec=walls), jax.random.key(1), 3000, scale, length=length)
            drawn = np.asarray(apart.frames[:, :, 0], np.float64).reshape(-1, *found.shape[3:])
            assert np.abs((drawn[:, 0] * drawn[:, -1]).mean(0) / scale**2).max() < 0.05
        assert abs((drawn[..., 0] * drawn[..., 1]).mean()) < 0.05  # channels are independent


def test_perturbations_make_an_ensemble(spec, window):
    start = perturbed(window, jax.random.key(0), 4, 0.1)
    frames = ensemble(Shift(spec), start, 3)
    assert frames.shape == (4, 3, 3, 8, 6, 2)
    assert_allclose(frames[2, :, 2], np.roll(start.frames[2, :, 0], 3, 1), rtol=1e-6)
    assert_allclose(ensemble_devices(Shift(spec), start, 3), frames, rtol=1e-6)
    both = ensemble(stack_members([Shift(spec, factor=f) for f in (0.5, 1.0, 2.0, 1.0)]), start, 3)
    assert_allclose(both[0], frames[0] * 0.5 ** np.arange(1, 4)[:, None, None, None], rtol=1e-6)
    land = np.ones((3, 8, 6, 2), np.float32)
    land[:, 2] = 0
    masked = perturbed(dataclasses.replace(window, mask=land), jax.random.key(0), 2, 1.0).frames
    assert_array_equal(masked[:, :, :, 2], np.broadcast_to(window.frames[None, :, :, 2], masked[:, :, :, 2].shape))
    for options, error, message in (
        ({"members": 0, "scale": 1.0}, ConfigError, "members=0"),
        ({"members": 2, "scale": -1.0}, ConfigError, "scale is -1"),
        ({"members": 2, "scale": 1.0, "kind": "pink"}, ConfigError, "kind='pink'"),
        ({"members": 2, "scale": [1.0, 1.0, 1.0]}, SpecError, "one per channel"),
    ):
        with pytest.raises(error, match=message):
            perturbed(window, jax.random.key(0), **options)


def test_stacked_steppers_are_one_stepper(spec, window):
    """Its rollout is the mean of separate rollouts; apart, each runs on its own part of the batch."""
    members = stack_members([Shift(spec, factor=f) for f in (0.5, 1.0, 2.0)])
    each = ensemble(members, window, 4)
    assert_allclose(rollout(members, window, 4), each.mean(0), rtol=1e-6)
    tiled = jax.tree.map(lambda a: np.concatenate([a] * 3), window)
    assert_allclose(rollout(members.apart(), tiled, 4).reshape(each.shape), each, rtol=1e-6)
    noisy = stack_members([Shift(spec, noise=0.1)] * 2)
    first, second = rollout(noisy.apart(), jax.tree.map(lambda a: np.concatenate([a] * 2), window), 1,
                            jax.random.key(0)).reshape(2, -1)  # fmt: skip
    assert np.corrcoef(first - second, first)[0, 1] != 0
    assert not np.array_equal(first, second)
    with pytest.raises(ConfigError, match="batch of 3 cannot be shared by 2"):
        rollout(noisy.apart(), window, 1, jax.random.key(0))


def test_a_dataset_is_no_window(tiny):
    """Nor is an array: what takes windows says so, and what takes datasets."""
    import xarray as xr

    data, stepper = xr.Dataset({"u": ("x", np.zeros(8))}), Shift(tiny.spec())
    for call in (
        lambda given: rollout(stepper, given, 5),
        lambda given: rollout_chunks(stepper, given, 5, 2),
        lambda given: rollout_stride(stepper, given, 5, 1),
        lambda given: direct_leads(stepper, given, [1]),
        lambda given: ensemble(stepper, given, 5, jax.random.split(jax.random.key(0))),
        lambda given: ensemble_devices(stepper, given, 5, jax.random.split(jax.random.key(0))),
        lambda given: perturbed(given, jax.random.key(0), 3, 0.1),
    ):
        for given, kind in ((data, "Dataset"), (data.u, "DataArray"), (np.zeros(8), "ndarray")):
            with pytest.raises(ConfigError, match=f"{kind}.*physml.data.to_window.*physml.forecast"):
                call(given)
