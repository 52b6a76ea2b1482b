"""The slice-normalized loss against its definition."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.coding import from_dict, to_dict
from physml.errors import ConfigError
from physml.fields import Axis, Channel, Grid, Spec
from physml.metrics.losses import LOSSES, SliceNormalized, replace_masked
from physml.objectives import OBJECTIVES, OneStep

SPEC = Spec(Grid((Axis.uniform("x", 5), Axis.uniform("y", 4))), tuple(Channel(name) for name in "ruvp"))
RANDOM = np.random.default_rng(0)
PREDICTION, TRUTH = RANDOM.standard_normal((2, 3, 2, 5, 4, 4)).astype(np.float32)


def definition(prediction, truth, p, slices):
    ratios = []
    for time in range(truth.shape[1]):
        for a, b in zip(slices, slices[1:], strict=False):
            error = np.abs(prediction[:, time, ..., a:b] - truth[:, time, ..., a:b]) ** p
            ratios.append(error.mean() / (np.mean(np.abs(truth[:, time, ..., a:b]) ** p) + 1e-10))
    return np.mean(ratios)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("slices", [(0, 1, 3, 4), (0, 4), (), (1, 2)])
def test_is_the_mean_ratio_of_batch_means(p, slices):
    expected = definition(PREDICTION, TRUTH, p, slices or (0, 1, 2, 3, 4))
    assert_allclose(SliceNormalized(p=p, slices=slices)(PREDICTION, TRUTH, SPEC), expected, rtol=1e-5)


def test_hidden_places_count_as_predicted():
    mask = np.ones((3, 5, 4, 4), np.float32)
    mask[1, ..., 3] = 0
    loss = SliceNormalized(slices=(0, 1, 3, 4))
    filled = np.where(mask[:, None] > 0, PREDICTION, TRUTH)
    assert_allclose(loss(PREDICTION, TRUTH, SPEC, mask), definition(filled, TRUTH, 1, (0, 1, 3, 4)), rtol=1e-5)
    np.testing.assert_array_equal(replace_masked(PREDICTION, TRUTH, mask[:, None]), filled)


def test_is_chosen_by_name_and_written_to_config_files():
    assert OneStep("slice_normalized").loss == SliceNormalized()
    objective = OneStep(SliceNormalized(p=2, slices=(0, 1, 3)))
    assert from_dict(OBJECTIVES, to_dict(objective, OBJECTIVES)) == objective
    assert LOSSES["slice_normalized"] is SliceNormalized


@pytest.mark.parametrize("options", [{"p": 3}, {"slices": (1,)}, {"slices": (0, 2, 1)}, {"channels": (1.0,) * 4}])
def test_choices_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError):
        SliceNormalized(**options)


def test_slices_beyond_the_channels_are_refused():
    with pytest.raises(ConfigError, match="4 channels"):
        SliceNormalized(slices=(0, 5))(PREDICTION, TRUTH, SPEC)
