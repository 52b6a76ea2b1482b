"""Floors: exact on data they describe exactly, and equal to the published numbers on reanalysis."""

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import ConfigError, DataError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window, stack
from physml.rollout import rollout
from physml.steppers import FLOORS, STEPPERS
from physml.steppers.eofs import linear_propagator, streaming_eofs
from physml.steppers.floors import ClimatologyConfig, LinearInverseConfig, PersistenceConfig, _anomaly_scale, blocks

DAY = 86400.0


@dataclasses.dataclass
class Arrays:
    """A dataset in memory: `frames` holds one array (time, *space, channel) per trajectory."""

    spec: Spec
    frames: list
    calendars: list | None = None
    mask: np.ndarray | None = None

    @property
    def lengths(self):
        return tuple(len(f) for f in self.frames)

    def read(self, trajectory, frames):
        cut = slice(frames.start, frames.stop)
        calendar = self.calendars and self.calendars[trajectory][None, cut]
        mask = None if self.mask is None else self.mask[None]
        window = Window.of(self.frames[trajectory][None, cut], self.spec, calendar=calendar, mask=mask)
        return jax.tree.map(lambda a: np.asarray(a)[0], window)


def calendar_of(times):
    """Fractions of year and day of datetime64 times."""
    year, day = times.astype("M8[Y]"), times.astype("M8[D]")
    length = (year + 1).astype("M8[D]") - year.astype("M8[D]")
    hours = (times - day) / np.timedelta64(1, "D")
    return np.stack([((day - year.astype("M8[D]")) / np.timedelta64(1, "D") + hours) / length.astype(int), hours], -1)


def dated(spec, values, start, step):
    times = np.datetime64(start, "s") + np.arange(len(values)) * np.timedelta64(int(step), "s")
    spec = dataclasses.replace(spec, time_step=float(step), time_unit="s")
    return Arrays(spec, [values.astype(np.float32)], [calendar_of(times).astype(np.float32)]), times


def test_persistence_and_extrapolation_are_exact(tiny, spec):
    window = tiny.window(spec)
    data = Arrays(spec, list(window.frames))
    still = rollout(PersistenceConfig().fit(data), window, 4)
    assert_array_equal(still, np.repeat(window.frames[:, :1], 4, 1))
    ramp = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1, 1) * window.frames[:, :1]
    line = dataclasses.replace(window, frames=ramp[:, :2])
    moved = rollout(STEPPERS["extrapolation"]().fit(data), line, 4)
    assert_allclose(moved, ramp[:, 2:], atol=1e-5)  # float32, four doublings


def test_climatology_of_nondimensional_time_is_the_mean_of_each_cell(tiny, spec):
    window = tiny.window(spec, frames=7)
    stepper = ClimatologyConfig().fit(Arrays(spec, list(window.frames)))
    assert stepper.mean.shape == (1, 1, 8, 6, 2)
    assert_allclose(rollout(stepper, window, 2)[0, 1], window.frames.mean((0, 1)), atol=1e-6)


def test_climatology_follows_the_season_through_leap_years(tiny):
    spec = tiny.spec((2,), ("u",))
    days = 4 * 365 + 1
    angle = lambda times: 2 * np.pi * calendar_of(times)[:, 0]  # noqa: E731
    dates = np.datetime64("2001-01-01", "s") + np.arange(days) * np.timedelta64(86400, "s")
    values = np.cos(angle(dates))[:, None, None] * np.array([[10.0], [-3.0]]) + 280
    data, times = dated(spec, values, "2001-01-01", DAY)
    stepper = ClimatologyConfig().fit(data)
    assert stepper.config == ClimatologyConfig(days=366, hours=1)
    # Smoothing a cosine damps it by the mean of the cosine under the kernel.
    d = np.arange(-30, 31)
    kernel = 1 - (d / 31) ** 2
    damping = (kernel * np.cos(2 * np.pi * d / 365.25)).sum() / kernel.sum()
    expected = 280 + damping * (values - 280)
    mean = stepper.at(calendar_of(times).astype(np.float32))
    assert_allclose(mean, expected, atol=0.12)  # of 10: years of 365 and 366 days share one table
    for date, slot in (("2003-12-31", 364), ("2004-12-31", 365), ("2004-02-29", 59), ("2003-03-01", 59)):
        calendar = calendar_of(np.array([date], "M8[s]")).astype(np.float32)
        assert_array_equal(stepper.at(calendar)[0], stepper.mean[...][slot, 0])


def test_climatology_of_less_than_a_year_follows_the_day(tiny):
    spec = tiny.spec((3,), ("t",))
    hour = np.arange(24 * 5) % 24
    values = np.sin(2 * np.pi * hour / 24)[:, None, None] * np.ones((1, 3, 1)) + (np.arange(120) // 24)[:, None, None]
    data, _ = dated(spec, values, "2019-03-01", 3600)
    stepper = ClimatologyConfig().fit(data)
    assert (stepper.config.days, stepper.config.hours) == (1, 24)
    window = stack([data.read(0, range(20, 50))])
    predicted = rollout(stepper, window, 29)
    expected = np.sin(2 * np.pi * hour[21:50] / 24) + 2  # mean of 0..4
    assert_allclose(predicted[0, :, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(("days", "slots"), [(364, 1), (365, 366)])
def test_a_year_of_data_has_seasons(tiny, days, slots):
    data, _ = dated(tiny.spec((2,)), np.zeros((days, 2, 2)), "2001-01-01", DAY)
    assert ClimatologyConfig().resolve(data).days == slots


def test_anomalies_are_scaled_by_the_root_of_the_area_and_hidden_cells_by_nothing(tiny):
    """So that the squares that EOFs explain are means over the sphere."""
    grid = Grid((Axis("latitude", tuple(np.linspace(-60, 60, 5)), tuple(np.cos(np.deg2rad(np.linspace(-60, 60, 5))))),))
    spec = Spec(grid, (Channel("u"),))
    mask = np.ones((5, 1), "f4")
    mask[1] = 0
    values = np.random.default_rng(0).normal(0, 3, (400, 5, 1)).astype("f4")
    data = Arrays(spec, [values], mask=mask)
    scale = _anomaly_scale(data, ClimatologyConfig().fit(data))[:, 0]
    expected = np.sqrt(np.asarray(grid.weights())) * mask[:, 0]
    assert_allclose(scale / scale[2], expected / expected[2], rtol=1e-5)


def test_climatology_ignores_masked_cells(tiny, spec):
    window, mask = tiny.window(spec), np.ones((8, 6, 2), np.float32)
    mask[0] = 0
    data = Arrays(spec, list(window.frames * mask), mask=mask)
    assert_array_equal(np.asarray(ClimatologyConfig().fit(data).mean[...])[0, 0, 0], 0)


def wave_data(tiny, trajectories=3, frames=60):
    """Two standing waves that rotate at different speeds: exactly linear, rank four."""
    spec = tiny.spec((16,), ("u",))
    x = np.arange(16) / 16 * 2 * np.pi
    time = np.arange(frames)[:, None]
    random = np.random.default_rng(0)
    trains = []
    for _ in range(trajectories):
        a, b = random.uniform(0, 6, 2)
        trains.append((np.cos(x - 0.3 * time + a) + 0.5 * np.cos(2 * x + 0.5 * time + b))[..., None].astype(np.float32))
    return Arrays(spec, trains)


def test_linear_inverse_model_is_exact_for_linear_dynamics(tiny):
    data = wave_data(tiny)
    stepper = LinearInverseConfig(modes=4, lags=1, ridge=0.0).fit(Arrays(data.spec, data.frames[:2]))
    window = stack([data.read(2, range(60))])
    # The time mean of two training trajectories is not exactly zero, which limits the accuracy.
    assert_allclose(rollout(stepper, window, 20)[0], window.frames[0, 1:21], atol=0.05)
    still = np.abs(window.frames[0, 1:21] - window.frames[0, :1]).max()
    assert still > 1.0


def test_linear_inverse_model_starts_from_its_own_history(tiny):
    """The anomalies of past frames refer to the climatology of their own day."""
    spec = tiny.spec((4,), ("u",))
    random = np.random.default_rng(0)
    times = np.datetime64("2001-01-01", "s") + np.arange(1200) * np.timedelta64(86400, "s")
    season = 30 * np.cos(2 * np.pi * calendar_of(times)[:, 0])[:, None] * np.arange(1, 5)
    noise = np.zeros((1200, 4))
    for i in range(1, 1200):
        noise[i] = 0.8 * noise[i - 1] + random.standard_normal(4)
    data, _ = dated(spec, (season + noise)[..., None], "2001-01-01", DAY)
    stepper = LinearInverseConfig(modes=4, lags=2).fit(data)
    window = stack([data.read(0, range(i, i + 3)) for i in range(1190)])
    state = stepper.encode(window.frames[:, :2], window.context(0, 2))
    lag = np.asarray(state[0][:, 4:]), np.asarray(state[0][:, :4])  # components of frame 0 and of frame 1
    assert_allclose(lag[0][1:], lag[1][:-1], atol=5e-4 * np.abs(lag[0]).max())


def test_long_rollouts_of_the_linear_model_stay_bounded(tiny):
    growing = np.exp(0.02 * np.arange(200))[:, None] * np.random.default_rng(0).standard_normal((1, 5))
    operator = linear_propagator([growing @ np.eye(5)[:, :1]], 1, 0.0)
    assert abs(np.linalg.eigvals(operator)).max() <= 1 + 1e-9
    data = wave_data(tiny)
    stepper = LinearInverseConfig(modes=4, lags=2).fit(data)
    window = stack([data.read(0, range(2))])
    assert np.abs(np.asarray(rollout(stepper, window, 1000))).max() < 3


def test_streamed_eofs_equal_those_in_one_piece():
    random = np.random.default_rng(0)
    rows = random.standard_normal((200, 12)) @ np.diag(np.linspace(3, 0.5, 12)) @ random.standard_normal((12, 30))
    whole = np.linalg.svd(rows, full_matrices=False)[2][:5]
    for rank, pieces in ((64, 7), (16, 20), (256, 1)):
        found = streaming_eofs(np.array_split(rows, pieces), 5, rank)
        assert_allclose(np.abs((found * whole).sum(1)), 1, atol=1e-8)
    assert len(streaming_eofs([rows], 40, 64)) == 12  # there are no more directions than that


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_every_floor_is_a_stepper(tiny, name):
    data = wave_data(tiny)
    config = FLOORS[name](modes=4) if name == "linear_inverse" else FLOORS[name]()
    assert config.signature(data.spec) is None
    stepper = config.fit(data)
    window = stack([data.read(t, range(5)) for t in range(3)])
    graph, state = nnx.split(stepper)
    run = lambda s: rollout(nnx.merge(graph, s), window, 3)  # noqa: E731
    with jax.disable_jit():
        eager = run(state)
    assert eager.shape == (3, 3, 16, 1)
    assert_allclose(jax.jit(run)(state), eager, atol=1e-5)
    empty = stepper.config.build(data.spec)  # of the same shapes: what a saved floor is loaded into
    shapes = [jax.tree.map(np.shape, nnx.state(s)) for s in (stepper, empty)]
    assert shapes[0] == shapes[1]
    with pytest.raises(ConfigError, match="neither a model nor constraints"):
        config.build(data.spec, tiny.model(1, 1))


def test_what_cannot_be_fitted_is_said(tiny, spec):
    data = wave_data(tiny, frames=5)
    with pytest.raises(DataError, match="too few to fit a linear model"):
        LinearInverseConfig().fit(data)
    with pytest.raises(DataError, match="training split is empty"):
        ClimatologyConfig().fit(Arrays(spec, []))
    still = Arrays(data.spec, [np.ones((50, 16, 1), np.float32)])
    with pytest.raises(DataError, match="constant in time"):
        LinearInverseConfig(modes=2).fit(still)
    data.frames[1][3, 2] = np.nan
    with pytest.raises(DataError, match="Trajectory 1 holds NaN"):
        list(blocks(data))
    fitted = ClimatologyConfig().fit(wave_data(tiny))
    with pytest.raises(SpecError, match="fitted cell by cell"):
        fitted.on_grid(Grid((Axis.uniform("x", 32),)))
    for bad in ({"days": 12}, {"half_width": 0.0}, {"hours": 0}):
        with pytest.raises(ConfigError):
            ClimatologyConfig(**bad)


def reanalysis(path, name, scale=1.0):
    with xr.open_dataset(path) as ds:
        field = ds[name].sortby("latitude").load() * scale
    latitude, longitude = field.latitude.values, field.longitude.values
    weights = np.cos(np.deg2rad(latitude))
    axes = (
        Axis("latitude", tuple(latitude.tolist()), tuple((weights / weights.mean()).tolist())),
        Axis("longitude", tuple(longitude.tolist())),
    )
    spec = Spec(Grid(axes), (Channel(name),))

    def split(**selection):
        part = field.sel(**selection) if "time" in selection else field.isel(time=selection["frames"])
        times = part.time.values
        return dated(spec, part.values[..., None], times[0], (times[1] - times[0]) / np.timedelta64(1, "s"))[0]

    return split


def errors(stepper, data, leads, weighted=True):
    """Root mean square errors; each lead over all start frames that have a truth there."""
    history, result = stepper.history, []
    graph, state = nnx.split(stepper)
    run = jax.jit(lambda s, w, steps: rollout(nnx.merge(graph, s), w, steps), static_argnums=2)
    weights = data.spec.grid.weights()[..., None] if weighted else 1.0
    for lead in leads:
        starts = range(data.lengths[0] - history - lead + 1)
        window = stack([data.read(0, range(i, i + history + lead)) for i in starts])
        last = np.asarray(run(state, window, lead)[:, -1], np.float64)
        result.append(float(np.sqrt((weights * (last - window.frames[:, -1]) ** 2).mean())))
    return result


def test_floors_of_sea_level_pressure(shared_data):
    """Published figures: train 2001-2007, test 2009-2010, area weighted, hPa. The linear one has hardly any ridge."""
    split = reanalysis(shared_data / "reanalysis" / "ncep_slp_natl_daily_2001-2010.nc", "slp", 0.01)
    train, test = split(time=slice("2001", "2007")), split(time=slice("2009", "2010"))
    floors = {name: FLOORS[name]() for name in ("persistence", "climatology")}
    floors["linear_inverse"] = LinearInverseConfig(ridge=1.5e-3)
    expected = {
        "persistence": (6.149, 9.062, 10.334),
        "climatology": (9.737, 9.732, 9.730),
        "linear_inverse": (4.615, 7.293, 8.503),
    }
    for name, values in expected.items():
        assert_allclose(errors(floors[name].fit(train), test, (1, 2, 3)), values, atol=2e-3, err_msg=name)
    default = errors(LinearInverseConfig().fit(train), test, (1, 2, 3))
    assert np.all(np.array(default) < np.array(expected["linear_inverse"]) + 0.01)


def test_floors_of_hourly_temperature(shared_data):
    """Published figures: train on the first 600 hours, every cell alike, K."""
    split = reanalysis(shared_data / "reanalysis" / "era5_t2m_uk_hourly_2019-03.nc", "t2m")
    train, test = split(frames=slice(0, 600)), split(frames=slice(600, None))
    persistence, climatology = FLOORS["persistence"]().fit(train), FLOORS["climatology"]().fit(train)
    assert_allclose(errors(persistence, test, (1, 3, 6), weighted=False), (0.582, 1.581, 2.741), atol=1e-3)
    assert_allclose(errors(climatology, test, (1, 6), weighted=False), 1.87, atol=0.02)
