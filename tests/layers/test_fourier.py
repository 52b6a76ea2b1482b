"""Fourier resampling against the definition by FFT."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.errors import ConfigError
from physml.layers.fourier import fourier_resample


def by_fft(x, shape):
    """Centered spectrum, cut or filled with zeros around it; the real part."""
    spectrum = np.fft.fftshift(np.fft.fft2(x, axes=(1, 2)), axes=(1, 2))
    for axis, after in enumerate(shape, start=1):
        before = spectrum.shape[axis]
        low = after // 2 - before // 2
        if low >= 0 and after >= before:
            pads = [(0, 0)] * 4
            pads[axis] = (low, after - before - low)
            spectrum = np.pad(spectrum, pads)
        else:
            spectrum = np.take(spectrum, range(-low, -low + after), axis=axis)
    back = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(1, 2)), axes=(1, 2)).real
    return back * (np.prod(shape) / (x.shape[1] * x.shape[2]))


@pytest.mark.parametrize("shape", [(8, 8), (12, 12), (4, 4), (5, 12), (9, 3), (8, 11)], ids=str)
def test_is_the_definition(shape):
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    assert_allclose(fourier_resample(x, shape), by_fft(x, shape), atol=3e-6)


def test_resolved_waves_are_exact():
    def wave(points):
        u = np.arange(points) / points
        return (np.sin(2 * np.pi * 2 * u)[:, None] * np.cos(2 * np.pi * u)[None])[None, ..., None].astype(np.float32)

    for before, after in ((8, 20), (21, 9), (16, 7)):
        assert_allclose(fourier_resample(wave(before), (after, after)), wave(after), atol=2e-6)


def test_other_numbers_of_axes_are_refused():
    with pytest.raises(ConfigError, match="2 spatial axes"):
        fourier_resample(np.zeros((1, 4, 4, 1), np.float32), (8,))
