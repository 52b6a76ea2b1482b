"""Pooling and interpolation: values known by hand, and those of PyTorch at other sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from physml.errors import ConfigError
from physml.layers import interpolation

FIELD = np.random.default_rng(0).standard_normal((2, 6, 9, 3)).astype(np.float32)


def test_pooling_by_hand():
    x = jnp.asarray([1.0, 3, 2, -4, 7])[None, :, None]  # the fifth cell fills no box
    np.testing.assert_allclose(interpolation.average_pool(x)[0, :, 0], [2, -1])
    np.testing.assert_allclose(interpolation.max_pool(x)[0, :, 0], [3, 2])
    assert interpolation.average_pool(jnp.asarray(FIELD), (2, 3)).shape == (2, 3, 3, 3)


def test_interpolation_keeps_constants_and_inner_straight_lines():
    line = jnp.arange(8.0)[None, :, None]
    np.testing.assert_allclose(
        interpolation.double(line, "bilinear")[0, 4:-4, 0], np.arange(4, 12) / 2 - 0.25, rtol=1e-6
    )
    for method in interpolation.TAPS:
        np.testing.assert_allclose(interpolation.double(jnp.full((1, 3, 4, 1), 2.0), method), 2.0, rtol=1e-6)


def test_periodic_interpolation_commutes_with_shifts():
    for method in interpolation.TAPS:
        moved = interpolation.double(jnp.roll(FIELD, (1, 2), (1, 2)), method, ["periodic"] * 2)
        np.testing.assert_allclose(
            moved, jnp.roll(interpolation.double(FIELD, method, ["periodic"] * 2), (2, 4), (1, 2)), atol=1e-6
        )


def test_corners_stay_where_they_are():
    fine = interpolation.interpolate_corners(jnp.asarray(FIELD), (11, 17))
    np.testing.assert_allclose(fine[:, ::2, ::2], FIELD, atol=1e-6)
    np.testing.assert_allclose(fine[:, 1, 0], (FIELD[:, 0, 0] + FIELD[:, 1, 0]) / 2, atol=1e-6)


def test_unknown_methods_are_named():
    with pytest.raises(ConfigError, match="Did you mean 'bicubic'"):
        interpolation.double(jnp.asarray(FIELD), "cubic")


@pytest.mark.peers
def test_pooling_and_interpolation_are_pytorchs():
    import torch
    from torch.nn import functional

    x = torch.from_numpy(FIELD).permute(0, 3, 1, 2)

    def same(ours, theirs):
        np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-6)

    field = jnp.asarray(FIELD)
    for method in ("bicubic", "bilinear", "nearest"):
        same(interpolation.double(field, method), functional.interpolate(x, scale_factor=2, mode=method))
        wrapped = functional.interpolate(functional.pad(x, (2, 2, 2, 2), mode="circular"), scale_factor=2, mode=method)
        same(interpolation.double(field, method, ["periodic"] * 2), wrapped[..., 4:-4, 4:-4])
    for shape in ((12, 18), (7, 5), (6, 1)):
        theirs = functional.interpolate(x, shape, mode="bilinear", align_corners=True)
        same(interpolation.interpolate_corners(field, shape), theirs)
    same(interpolation.average_pool(field), functional.avg_pool2d(x, 2))
    same(interpolation.max_pool(field, (3, 2)), functional.max_pool2d(x, (3, 2)))
