"""The layout: where arrays live."""

import jax
import pytest

from physml.errors import ConfigError
from physml.parallel.mesh import Layout


def test_every_session_has_four_devices():
    assert jax.device_count() >= 4


@pytest.mark.parametrize(
    ("layout", "devices", "sizes"),
    [(Layout(), 4, (1, 4, 1)), (Layout(data=2), 4, (1, 2, 1)), (Layout(data=-1, space=2), 4, (1, 2, 2))],
)
def test_sizes_fill_the_devices(layout, devices, sizes):
    assert layout.sizes(devices) == sizes


@pytest.mark.parametrize(
    "layout", [Layout(data=8), Layout(data=-1, space=3), Layout(data=-1, space=-1), Layout(data=0)]
)
def test_sizes_that_do_not_fit_are_refused(layout):
    with pytest.raises(ConfigError):
        layout.sizes(4)
