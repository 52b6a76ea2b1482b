"""Sample number -> (trajectory, start, stride): pure index arithmetic, so that a position is one integer."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from physml.errors import ConfigError


class Sample(NamedTuple):
    """Where one window lies: frames `start, start + stride, ...` of `trajectory`."""

    trajectory: int
    start: int
    stride: int


@dataclass(frozen=True)
class Samples:
    """All windows of `frames` frames that fit into trajectories of the given lengths.

    Numbers run over strides, then trajectories, then starts. A window never leaves its trajectory.

    Attributes:
        lengths: frames per trajectory.
        frames: frames per window.
        strides: distances of frames inside a window.
        every: distance of the starts of neighboring windows.
    """

    lengths: tuple[int, ...]
    frames: int
    strides: tuple[int, ...] = (1,)
    every: int = 1

    def __post_init__(self):
        if self.frames < 1 or self.every < 1 or not self.strides or min(self.strides) < 1:
            raise ConfigError(
                f"Windows of {self.frames} frames with strides {self.strides}, every {self.every} frames: all must be "
                "at least 1."
            )
        per_stride = [
            np.maximum(
                0, (np.asarray(self.lengths, np.int64) - (self.frames - 1) * stride + self.every - 1) // self.every
            )
            for stride in self.strides
        ]
        # cumulative number of samples up to and including (stride, trajectory)
        object.__setattr__(self, "_ends", np.cumsum(np.concatenate([np.zeros(0, np.int64), *per_stride])))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        trajectories, starts, strides = self.locate(np.array([number]))
        return Sample(int(trajectories[0]), int(starts[0]), int(strides[0]))

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(trajectories, starts, strides) of many sample numbers."""
        cell = np.searchsorted(self._ends, numbers, side="right")
        before = np.where(cell > 0, self._ends[np.maximum(cell - 1, 0)], 0)
        stride, trajectory = np.divmod(cell, max(len(self.lengths), 1))
        return trajectory, (np.asarray(numbers) - before) * self.every, np.asarray(self.strides)[stride]
