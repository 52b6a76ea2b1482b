"""Prescribed values: where they are set, what they are, and what stays."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from physml.coding import from_dict, to_dict
from physml.constraints import CONSTRAINTS, Boundary, no_slip
from physml.constraints.text import from_text
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window

GRID = Grid((Axis.cells("y", 5), Axis.cells("x", 6)))
CHANNEL = Grid((Axis.cells("y", 5), Axis.uniform("x", 6)))
NAMES = ("u", "v", "t")


def around(grid=GRID, **fields):
    spec = Spec(grid, tuple(map(Channel, NAMES)), (Channel("inflow"),), (Channel("mask"), Channel("rock")))
    random = np.random.default_rng(0)
    rock = (random.random((2, *grid.shape, 1)) > 0.8).astype(np.float32)
    forcing = random.normal(size=(2, 2, *grid.shape, 1)).astype(np.float32)
    static = np.concatenate([1 - rock, rock], -1)
    window = Window.of(np.zeros((2, 2, *grid.shape, 3), np.float32), spec, forcing=forcing, static=static, **fields)
    return window.context(0, 1)


def noise(grid=GRID, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *grid.shape, 3)).astype(np.float32)


def test_each_channel_has_its_values_on_the_named_sides():
    context, frame, previous = around(), noise(), noise(seed=1)
    law = Boundary(("t", "u", "v"), ("x low", "y high"), ("previous", "inflow", 2.5)).build(context.spec)
    fixed = np.asarray(law.project(frame, previous, context))
    there = np.zeros(GRID.shape, bool)
    there[:, 0] = there[-1] = True
    assert_array_equal(fixed[:, ~there], frame[:, ~there])
    assert_array_equal(fixed[:, there, 2], previous[:, there, 2])
    assert_array_equal(fixed[:, there, 0], np.asarray(context.forcing)[:, there, 0])
    assert_array_equal(fixed[:, there, 1], 2.5)


def test_no_slip_is_on_every_wall_and_in_obstacles():
    context, frame = around(CHANNEL), noise(CHANNEL)
    fixed = np.asarray(no_slip(obstacle="mask").build(context.spec).project(frame, frame, context))
    there = np.array(context.static[..., 1] == 1)
    there[:, [0, -1]] = True  # the axis x is periodic
    assert_array_equal(fixed[there, :2], 0)
    assert_array_equal(fixed[~there], frame[~there])
    assert_array_equal(fixed[..., 2], frame[..., 2])
    other = no_slip(obstacle="rock", solid=1).build(context.spec)
    assert_array_equal(other.project(frame, frame, context), fixed)


def test_an_obstacle_alone_may_have_a_temperature():
    context, frame = around(), noise()
    fixed = np.asarray(Boundary("t", value=300.0, obstacle="mask").build(context.spec).project(frame, frame, context))
    rock = context.static[..., 1] == 1
    assert_array_equal(fixed[rock, 2], 300)
    assert_array_equal(fixed[~rock], frame[~rock])


def test_the_violation_is_a_relative_distance():
    context = around()
    frame = np.full((2, *GRID.shape, 3), 2.0, np.float32)
    law = Boundary(("u", "t"), "x low", (0.0, 2.0)).build(context.spec)
    assert_allclose(law.violation(frame, frame, context), [[1.0, 0.0]] * 2)  # as large as the field itself
    frame[:, :, 0, 0] = 1
    size = np.sqrt((25 * 4 + 5 * 1) / 30)
    assert_allclose(law.violation(frame, frame, context)[:, 0], 1 / size, rtol=1e-6)


def test_the_last_one_wins_in_corners():
    context, frame = around(), noise()
    wall = no_slip().build(context.spec)
    lid = Boundary("u", "y high", 1.0).build(context.spec)
    fixed = np.asarray(lid.project(wall.project(frame, frame, context), frame, context))
    assert_array_equal(fixed[:, -1, :, 0], 1)
    assert_array_equal(fixed[:, :-1, [0, -1], :2], 0)


def test_what_diverged_at_the_side_is_replaced():
    context, frame = around(), noise()
    frame[:, 0] = np.nan
    assert np.isfinite(no_slip(NAMES).build(context.spec).project(frame, frame, context)).all()


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"channels": "w", "sides": "walls"}, GRID, "no channel 'w'"),
        ({"channels": "u", "sides": "z low"}, GRID, "no axis 'z'"),
        ({"channels": "u", "sides": "x low"}, CHANNEL, "'x' is periodic"),
        ({"channels": "u", "sides": "walls"}, Grid((Axis.uniform("x", 4), Axis.uniform("y", 4))), "no walls"),
        ({"channels": "u", "sides": "walls", "value": "inflo"}, GRID, "Did you mean 'inflow'"),
        ({"channels": "u", "obstacle": "stone"}, GRID, "no forcing or static field 'stone'"),
    ],
)
def test_data_that_do_not_fit(options, grid, message):
    with pytest.raises(SpecError, match=message):
        Boundary(**options).build(around(grid).spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, "is empty"),
        ({"channels": "u"}, "Neither sides nor an obstacle"),
        ({"channels": "u", "sides": "x middle"}, "no side"),
        ({"channels": "u", "sides": "low"}, "no side"),
        ({"channels": ("u", "v"), "sides": "walls", "value": (1.0, 2.0, 3.0)}, "3 values for 2 channels"),
        ({"channels": "u", "sides": "walls", "value": float("nan")}, "must be finite"),
        ({"channels": "u", "obstacle": "rock", "solid": 2}, "solid"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Boundary(**options)


def test_text():
    law = from_text("boundary:u,t:sides=[x low, x high]:value=[0, inflow]")
    assert law == Boundary(("u", "t"), ("x low", "x high"), (0.0, "inflow"))
    assert from_dict(CONSTRAINTS, to_dict(law, CONSTRAINTS)) == law
