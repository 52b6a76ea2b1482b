"""PDE-Refiner's schedule, training problem and sampler: laws that hold for any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from physml.errors import ConfigError
from physml.steppers.refiner import NoiseSchedule, denoise, denoising_loss, frames_of, increment_of, refine

SCHEDULE = NoiseSchedule(refinements=3, minimum=4e-7)
RANDOM = np.random.default_rng(0)
HISTORY, TARGET, START = (RANDOM.standard_normal((2, 8, n)).astype(np.float32) for n in (4, 2, 2))
NOISES = RANDOM.standard_normal((3, 2, 8, 2)).astype(np.float32)
NONE = np.zeros((2, 0), np.float32)


def test_schedule_runs_from_almost_no_noise_to_nothing_but_noise():
    np.testing.assert_allclose(SCHEDULE.betas, [4e-7, 5.4288352e-5, 7.368063e-3, 1], rtol=1e-6)
    assert SCHEDULE.signal[-1] == 0
    assert np.all(np.diff(SCHEDULE.signal) < 0)
    assert SCHEDULE.signal[0] == np.float32(1) - np.float32(4e-7)  # as float32 has it: 1 - 4.17e-7
    np.testing.assert_allclose(SCHEDULE.times, [0, 1000 / 3, 2000 / 3, 1000], rtol=1e-6)


@pytest.mark.parametrize("options", [{"refinements": 0}, {"minimum": 0.0}, {"minimum": 1.0}])
def test_schedules_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match="at least one refinement"):
        NoiseSchedule(**options)


def test_increments_are_from_the_last_frame_for_every_frame():
    last = HISTORY[..., :1]
    increment = increment_of(TARGET, last, 0.3)
    np.testing.assert_allclose(increment[..., 1], (TARGET[..., 1] - last[..., 0]) / 0.3, rtol=1e-6)
    np.testing.assert_allclose(frames_of(increment, last, 0.3), TARGET, atol=1e-6)


def exact(fields, scalars):
    """The network that knows the target: its velocity follows from the noisy target and the step."""
    signal = jnp.asarray(SCHEDULE.signal)[jnp.round(scalars[:, 0] * 3 / 1000).astype(int)].reshape(-1, 1, 1)
    noise = (fields[..., 4:] - jnp.sqrt(signal) * TARGET) / jnp.sqrt(1 - signal)
    return jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * TARGET


def test_a_perfect_network_is_refined_to_the_target():
    found = refine(exact, SCHEDULE, HISTORY, NONE, START, NOISES)
    np.testing.assert_allclose(found.result, TARGET, atol=1e-6)
    np.testing.assert_array_equal(found.samples[0], START)
    assert found.samples.shape == found.outputs.shape == (4, *TARGET.shape)
    # The noise that is left when step k is read has the variance 1 - signal; only fresh noise is random by then.
    for j, k in ((1, 2), (2, 1), (3, 0)):
        left = np.std(found.samples[j] - np.sqrt(SCHEDULE.signal[k]) * TARGET)
        np.testing.assert_allclose(left, np.sqrt(1 - SCHEDULE.signal[k]), rtol=0.5)


def test_a_perfect_network_has_no_loss_at_any_step():
    for step in range(4):
        found = denoise(exact, SCHEDULE, HISTORY, TARGET, NONE, np.full(2, step), NOISES[0])
        np.testing.assert_allclose(found.loss, 0, atol=1e-6)
        np.testing.assert_array_equal(found.inputs[..., :4], HISTORY)


def test_the_last_step_is_the_plain_one_step_problem():
    found = denoise(exact, SCHEDULE, HISTORY, TARGET, NONE, np.array([3, 3]), NOISES[0])
    np.testing.assert_array_equal(found.inputs[..., 4:], NOISES[0])
    np.testing.assert_array_equal(found.target, -TARGET)


def test_loss_sums_channels_and_averages_the_rest():
    error = np.zeros((2, 8, 3), np.float32)
    error[..., 0], error[..., 1] = 1, 2
    np.testing.assert_allclose(denoising_loss(error, np.zeros_like(error)), 5)


def test_steps_and_parameters_reach_the_network_as_scalars_and_gradients_come_back():
    seen = []

    def network(fields, scalars):
        seen.append(scalars.shape)
        return fields[..., 4:] * scalars[:, 1].reshape(-1, 1, 1) + 0.001 * scalars[:, 0].reshape(-1, 1, 1)

    parameters = np.full((2, 1), 0.1, np.float32)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(refine(network, SCHEDULE, HISTORY, p, START, NOISES).result ** 2)))(
        parameters
    )
    assert set(seen) == {(2, 2)}
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient)
