"""Energy spectra: Parseval, single waves, known power laws, open boundaries."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import SpecError
from physml.fields import Axis, Channel, Grid, Spec
from physml.metrics import METRICS, Measure, energy_spectrum
from physml.metrics.spectra import log_spectral_error, shells


@pytest.mark.parametrize("shape", [(16,), (15,), (12, 10), (9, 14), (8, 6, 7), (8, 9, 6)])
def test_shells_add_up_to_half_the_mean_square(shape, tiny):
    grid = tiny.spec(shape).grid
    fields = np.random.default_rng(1).standard_normal((2, 3, *shape, 2)).astype(np.float32)
    energy = np.asarray(energy_spectrum(fields, grid))
    space = tuple(range(2, 2 + len(shape)))
    assert_allclose(energy.sum(-1), 0.5 * (fields**2).mean(space), rtol=1e-5)
    assert energy.shape[-1] == len(shells(grid).wavenumbers)


@pytest.mark.parametrize("waves", [1, 3, 7])
def test_a_wave_lands_in_its_shell(waves):
    length = 5.0
    grid = Grid((Axis.uniform("x", 32, length), Axis.uniform("y", 32, length)))
    x = np.arange(32) / 32
    field = np.cos(2 * np.pi * waves * x)[None, None, None, :, None] * np.ones((1, 1, 32, 1, 1))
    energy = np.asarray(energy_spectrum(field.astype(np.float32), grid))[0, 0, 0]
    assert_allclose(energy[waves], 0.25, rtol=1e-5)  # half of the mean square of a cosine
    assert_allclose(energy.sum(), 0.25, rtol=1e-5)
    assert_allclose(shells(grid).wavenumbers[waves], 2 * np.pi * waves / length)
    assert shells(grid).resolved == 16


def test_unequal_sides_share_physical_wavenumbers():
    grid = Grid((Axis.uniform("x", 32, 2.0), Axis.uniform("y", 16, 1.0)))
    y = np.arange(16) / 16
    field = np.cos(2 * np.pi * 3 * y)[None, None, None, :, None] * np.ones((1, 1, 32, 1, 1))
    energy = np.asarray(energy_spectrum(field.astype(np.float32), grid))[0, 0, 0]
    assert energy.argmax() == 6  # shells are 2 pi / 2 apart, the wave has 2 pi 3 / 1
    assert_allclose(shells(grid).wavenumbers[6], 6 * np.pi)


def test_reference_formula_in_two_dimensions(tiny):
    grid = tiny.spec((10, 10)).grid
    field = np.random.default_rng(3).standard_normal((10, 10))
    modes = np.abs(np.fft.fft2(field) / 100) ** 2 / 2
    k = np.fft.fftfreq(10, 0.1)
    shell = np.rint(np.sqrt(k[:, None] ** 2 + k[None] ** 2)).astype(int)
    expected = np.bincount(shell.ravel(), modes.ravel())
    got = np.asarray(energy_spectrum(field[None, None, ..., None].astype(np.float32), grid))[0, 0, 0]
    assert_allclose(got, expected, rtol=1e-4, atol=1e-8)


def test_a_large_mean_leaves_the_small_scales_alone(tiny):
    """As of surface pressure: the smallest scales have 1e-15 of the energy of the mean, 1e-11 of that of the waves."""
    grid, points = tiny.spec((64, 60)).grid, 64 * 60
    k = np.hypot(np.fft.fftfreq(64, 1 / 64)[:, None], np.fft.rfftfreq(60, 1 / 60))
    phases = np.exp(2j * np.pi * np.random.default_rng(0).random(k.shape))
    waves = np.fft.irfft2(300 * points * phases / np.maximum(k, 1) ** 4, (64, 60))
    field = (101325 + waves).astype(np.float32)
    modes = np.abs(np.fft.rfft2(field.astype(float)) / points) ** 2 / 2
    expected = np.bincount(shells(grid).index, modes.ravel() * shells(grid).multiplicity)[:31]
    energy = np.asarray(energy_spectrum(field[None, None, ..., None], grid))[0, 0, 0]
    assert_allclose(energy[:31], expected, rtol=2e-3)  # float32, up to the last complete shell
    assert_allclose(energy.sum(), 0.5 * (field.astype(float) ** 2).mean(), rtol=1e-6)
    blurred = np.where(np.arange(31) > 15, 0.1 * expected, expected)
    assert_allclose(log_spectral_error(blurred, expected), np.sqrt(0.5))


def test_a_trend_between_open_ends_does_not_fill_the_small_scales():
    axis = Axis("x", tuple(np.arange(64.0)))
    x = np.arange(64)
    wave = np.sin(2 * np.pi * 4 * x / 64)
    ramp = (wave + 10 * x / 64).astype(np.float32)[None, None, :, None]
    energy = np.asarray(energy_spectrum(ramp, Grid((axis,))))[0, 0, 0]
    naive = np.abs(np.fft.rfft(ramp.ravel()) / 64) ** 2
    assert energy[12:].sum() < 1e-3 * naive[12:].sum()
    assert energy.argmax() == 4
    # The Hann window keeps the mean square of what varies slowly against it.
    assert_allclose(energy.sum(), 0.25, rtol=0.1)


def test_limited_area_is_measured_in_kilometers_and_globe_zonally():
    latitude = Axis("latitude", tuple(np.arange(30.0, 71.0, 2.5)), unit="degrees_north")
    longitude = Axis("longitude", tuple(np.arange(-70.0, 11.0, 2.5)), unit="degrees_east")
    plan = shells(Grid((latitude, longitude)))
    width = 33 * 2.5 * 111.195 * np.cos(np.deg2rad(50))
    assert plan.unit == "rad km-1"
    assert_allclose(plan.wavenumbers[1], 2 * np.pi / width, rtol=1e-4)
    lat = np.linspace(-87.5, 87.5, 8)
    cosine = np.cos(np.deg2rad(lat))
    globe = Grid(
        (
            Axis("latitude", tuple(lat), tuple(cosine / cosine.mean())),
            Axis("longitude", tuple(np.arange(0, 360, 22.5)), periodic=True),
        )
    )
    wave = np.cos(5 * np.deg2rad(np.arange(0, 360, 22.5)))
    field = (wave * (1 + lat[:, None] / 90)).astype(np.float32)[None, None, ..., None]
    energy = np.asarray(energy_spectrum(field, globe))[0, 0, 0]
    assert_allclose(energy[5], 0.25 * np.average((1 + lat / 90) ** 2, weights=cosine), rtol=1e-5)
    assert_allclose(shells(globe).wavenumbers, np.arange(9))


def test_part_of_a_circle_counts_waves_around_the_whole():
    """Three waves over 90 degrees are twelve around the circle."""
    latitude, longitude = (
        Axis("latitude", tuple(np.linspace(-60, 60, 13))),
        Axis("longitude", tuple(np.arange(36) * 2.5)),
    )
    grid = Grid((latitude, longitude))
    wave = np.broadcast_to(np.cos(2 * np.pi * 3 * np.arange(36) / 36), (13, 36)).astype(np.float32)
    energy = np.asarray(energy_spectrum(wave[None, None, ..., None], grid))[0, 0, 0]
    plan = shells(grid)
    assert plan.unit == "waves around the circle"
    assert_allclose(plan.wavenumbers[energy.argmax()], 12)


def test_log_spectral_error_knows_a_factor(tiny):
    spec = tiny.spec((32, 32), ("u",))
    truth = np.random.default_rng(0).standard_normal((3, 2, 32, 32, 1)).astype(np.float32)
    measure = Measure.of(spec)
    got = METRICS["log_spectral_error"](np.sqrt(np.float32(10)) * truth, truth, measure)
    assert_allclose(got, 1.0, rtol=1e-4)  # energy ten times too high is one decade
    shifted = np.roll(truth, 5, axis=2)
    assert_allclose(METRICS["log_spectral_error"](shifted, truth, measure), 0, atol=1e-3)


def test_shells_without_energy_do_not_count():
    true = np.array([5.0, 1.0, 1e-20, 0.0])
    assert_allclose(log_spectral_error(np.array([0.0, 10.0, 1.0, 1.0]), true), 1.0)
    assert np.isinf(log_spectral_error(np.array([0.0, 0.0, 1.0, 1.0]), true))
    rounded = np.array([5e9, 1.0, 1e-7, 1e-7])  # a field of 1e5 +- 1
    assert_allclose(log_spectral_error(np.array([5e9, 10.0, 1.0, 1.0]), rounded), 1.0)
    assert np.isnan(log_spectral_error(rounded, np.array([5e9, 1e-7, 1e-7, 0])))  # constant up to rounding
    assert np.isnan(log_spectral_error(np.array([0.0, np.nan, 1.0, 1.0]), true))


def test_masked_fields_have_no_spectrum(tiny):
    spec = tiny.spec((8, 8), ("u",))
    field = np.ones((1, 1, 8, 8, 1), np.float32)
    mask = np.ones((8, 8, 1), np.float32)
    mask[0, 0] = 0
    assert np.isnan(METRICS["log_spectral_error"](field, field, Measure.of(spec, mask))).all()


def test_space_without_extent_is_refused():
    with pytest.raises(SpecError, match="at least four points"):
        shells(Spec(Grid(()), (Channel("x"),)).grid)
