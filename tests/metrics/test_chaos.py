"""High-correlation time: first lead below the threshold, capped and flagged at the end."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from physml.errors import ConfigError
from physml.metrics import high_correlation_time


def test_first_lead_below_counts_even_if_it_recovers():
    correlation = np.array([0.99, 0.85, 0.79, 0.99, 0.5])
    times, capped = high_correlation_time(correlation, np.arange(1, 6) * 0.2, (0.8, 0.9, 0.95))
    assert_allclose(times, [0.6, 0.4, 0.4])
    assert not capped.any()


def test_never_below_is_capped_and_flagged():
    times, capped = high_correlation_time(np.array([0.99, 0.97, 0.94]), np.array([1.0, 2.0, 3.0]))
    assert_allclose(times, [3, 3, 3])
    assert_array_equal(capped, [True, True, False])


def test_interpolation_places_the_crossing():
    correlation = np.array([[0.9, 0.7], [0.6, 0.5]])
    times, _ = high_correlation_time(correlation, np.array([2.0, 4.0]), (0.8,), interpolate=True)
    assert_allclose(times[:, 0], [3.0, 1.0])  # from 1 at time zero to 0.6 at time 2
    constant, capped = high_correlation_time(np.ones(2), np.array([2.0, 4.0]), (0.8,), interpolate=True)
    assert constant == 4.0
    assert capped.all()


@pytest.mark.parametrize("interpolate", [False, True])
def test_nan_counts_as_lost(interpolate):
    correlation = np.array([0.99, np.nan, np.nan])
    times, capped = high_correlation_time(correlation, np.array([1.0, 2.0, 3.0]), (0.8,), interpolate=interpolate)
    assert times[0] == (1.0 if interpolate else 2.0)
    assert not capped[0]


def test_times_must_fit():
    with pytest.raises(ConfigError, match="one ascending, positive time"):
        high_correlation_time(np.ones(3), np.array([0.0, 1.0, 2.0]))
    with pytest.raises(ConfigError, match="3 correlations and 2"):
        high_correlation_time(np.ones(3), np.array([1.0, 2.0]))


def test_one_threshold_may_be_a_number():
    correlation, times = np.array([[0.9, 0.7], [0.85, 0.82]]), np.array([2.0, 4.0])
    found, capped = high_correlation_time(correlation, times, 0.8)
    assert_array_equal(found, [[4.0], [4.0]])
    assert_array_equal(capped, [[False], [True]])
    for wrong in ("0.8", "high", None, (), (0.8, 80)):
        with pytest.raises(ConfigError, match="correlations were expected"):
            high_correlation_time(correlation, times, wrong)
