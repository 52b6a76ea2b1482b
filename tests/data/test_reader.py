"""What a reader accepts of labelled arrays, and what it keeps in memory."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_array_equal

from physml.data import XarrayDataset, spec_of, to_window
from physml.data.reader import Reader
from physml.errors import DataError, SpecError


def flow(trajectories=2, frames=6, step=0.5, **more):
    random = np.random.default_rng(0)
    fields = {"u": (("trajectory", "time", "x"), random.standard_normal((trajectories, frames, 8)).astype("f4"))}
    return xr.Dataset({**fields, **more}, {"x": np.arange(8) / 8, "time": step * np.arange(frames)})


@pytest.mark.parametrize("kept", [False, True])
def test_every_trajectory_has_its_own_static_field(kept):
    wall = np.arange(16, dtype="f4").reshape(2, 8)
    data = flow(wall=(("trajectory", "x"), wall))
    reader = Reader(data, spec_of(data, "u", static="wall"))
    if kept:
        reader.keep_static()
    for trajectory in range(2):
        assert_array_equal(reader.read(trajectory, range(2)).static[..., 0], wall[trajectory])


def test_gaps_of_one_trajectory_alone_are_an_error():
    data = flow()
    data.u[1, :, 3] = np.nan
    with pytest.raises(DataError, match="trajectory 1 has NaN, but trajectory 0 has none.*mask"):
        Reader(data, spec_of(data)).read(1, range(3))


def test_a_static_field_may_be_stored_with_time_and_rounded():
    rounding = 1 + 1e-5 * np.random.default_rng(1).standard_normal((6, 8))
    data = flow(wall=(("time", "x"), (5 + np.arange(8)) * rounding))
    wall = to_window(data, spec_of(data, "u", static="wall")).static[0, :, 0]
    assert_array_equal(wall, data.wall[0].astype("f4"))
    data.wall[5, 2] += 0.1
    with pytest.raises(DataError, match="static 'wall' changes with time"):
        to_window(data, spec_of(data, "u", static="wall"))


def test_frames_after_the_end_of_a_trajectory_do_not_count():
    wall = np.ones((2, 6, 8), "f4")
    wall[0, 4:] = 7  # the first trajectory ends before
    data = flow(wall=(("trajectory", "time", "x"), wall), frames_=(("trajectory",), np.array([4, 6])))
    data = data.rename(frames_="frames")
    dataset = XarrayDataset(data, spec_of(data, "u", static="wall"))
    assert dataset.lengths == (4, 6)
    assert_array_equal(dataset.read(0, range(4)).static, 1)


@pytest.mark.parametrize("counts", [[0, 6], [4, 7], [4.0, 6.0]])
def test_lengths_that_cannot_be_are_an_error(counts):
    data = flow()
    data["frames"] = ("trajectory", np.array(counts))
    with pytest.raises(DataError, match="'frames' counts the frames of every trajectory, whole numbers from 1 to 6"):
        XarrayDataset(data, spec_of(data, "u"))


def test_trajectories_of_different_lengths_are_read_one_by_one():
    data = flow(trajectories=4).chunk(trajectory=2, time=3)
    assert [edges.tolist() for edges in Reader(data, spec_of(data, "u")).chunks()] == [[0, 2, 4], [0, 3, 6]]
    data["frames"] = ("trajectory", np.array([6, 6, 5, 6]))
    assert Reader(data, spec_of(data, "u")).chunks()[0].tolist() == [0, 1, 2, 3, 4]


def test_time_steps_agree_to_a_hundredth():
    spec = spec_of(flow())
    Reader(flow(step=0.503), spec).check_step()
    for step, advice in ((0.52, "Use data"), (0.48, "Take every n-th frame")):
        with pytest.raises(SpecError, match=f"{step:g} apart, but 0.5 was expected. {advice}"):
            Reader(flow(step=step), spec).check_step()
