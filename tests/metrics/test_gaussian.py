"""Scores of Gaussian predictions: against scipy, and what they must be for simple ones."""

import jax.numpy as jnp
import numpy as np
import scipy.stats

from physml.metrics import gaussian


def test_log_likelihood_is_the_mean_log_density():
    random = np.random.default_rng(0)
    mean, truth, variance = random.normal(size=(4, 7)), random.normal(size=(4, 7)), 0.1 + random.random((4, 7))
    expected = scipy.stats.norm(mean, np.sqrt(variance)).logpdf(truth).mean(-1)
    np.testing.assert_allclose(gaussian.log_likelihood(mean, variance, truth), expected)
    narrow = [jnp.asarray(array, jnp.float32) for array in (mean, variance, truth)]
    np.testing.assert_allclose(gaussian.log_likelihood(*narrow), expected, rtol=1e-5)


def test_certainty_excludes_everything_else():
    variance = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, -1.0]])
    scores = gaussian.log_likelihood(np.zeros((3, 2)), variance, np.zeros((3, 2)))
    np.testing.assert_allclose(scores, [-np.log(2 * np.pi) / 2, -np.inf, -np.inf])


def test_conservation_errors_have_signs():
    operator = np.array([[0.5, 1, 0.5]])
    errors = gaussian.conservation_error(np.ones((2, 3)), operator, np.array([[1.5], [2.25]]))
    np.testing.assert_allclose(errors, [[0.5], [-0.25]])


def test_square_error_is_over_points():
    np.testing.assert_allclose(gaussian.square_error(np.array([[1.0, 3.0]]), np.zeros((1, 2))), [5])


def test_a_mixture_has_the_moments_of_its_samples():
    means, variances = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [2.0], [3.0]])
    mean, variance = gaussian.mixture(means, variances)
    np.testing.assert_allclose([mean[0], variance[0]], [2, 2 + 4])  # the variance of 0, 2 and 4 is 4, unbiased
    np.testing.assert_allclose(gaussian.mixture(means[:1], variances[:1]), [means[0], variances[0]])
