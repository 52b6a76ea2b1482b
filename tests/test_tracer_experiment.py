"""The tracer benchmark: its data obey the budget that its scores measure, and it runs from end to end."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.steppers import PersistenceConfig

PATH = Path(__file__).parents[1] / "experiments" / "tracer.py"


@pytest.fixture(scope="module")
def tracer():
    spec = importlib.util.spec_from_file_location("tracer_experiment", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tracer):
    return tracer.dataset(2, 9, 420.0, 0)


def means(data):
    """Of the tracer, and what the sources have brought so far: `(trajectory, frame)`."""
    windows = [data.read(i, range(9)) for i in range(2)]
    weights = data.spec.grid.weights().astype(np.float64)
    co2 = [(weights * w.frames[..., 0].astype(np.float64)).mean((1, 2)) for w in windows]
    source = [(weights * w.forcing[..., 2].astype(np.float64)).mean((1, 2)) for w in windows]
    return np.array(co2), 21600 * np.cumsum(np.array(source)[:, 1:], axis=1)


def test_the_total_of_the_data_changes_by_the_sources_alone(data):
    co2, brought = means(data)
    assert_allclose(co2[:, 0], [422.5, 427.5], rtol=1e-6)  # the middles of two parts of 10 ppm
    assert np.abs(brought[:, -1]).min() > 1e-3
    assert_allclose(co2[:, 1:] - co2[:, :1], brought, atol=5e-5)  # frames are float32 numbers of 400
    frames = data.read(0, range(9)).frames
    assert frames[0].std() > 0.3
    assert np.abs(frames[8] - frames[0]).max() > 0.3


def test_scores_of_persistence_are_those_by_hand(tracer, data):
    found = tracer.scores(PersistenceConfig().build(data.spec), data, 8)
    co2, brought = means(data)
    assert_allclose(found["drift"], np.abs(co2[:, :1] / (co2[:, :1] + brought) - 1).max(0), rtol=1e-3, atol=1e-8)
    weights = data.spec.grid.weights().astype(np.float64)
    squared, r2 = [], []
    for i in range(2):
        frames = data.read(i, range(9)).frames[..., 0].astype(np.float64)
        squared.append((weights * (frames[0] - frames[8]) ** 2).mean())
        r2.append(1 - squared[-1] / (weights * (frames[8] - co2[i, 8]) ** 2).mean())
    assert_allclose(found["rmse"][-1], np.sqrt(squared).mean(), rtol=1e-5)
    assert_allclose(found["r2"][-1], np.mean(r2), rtol=1e-5)


@pytest.mark.slow
def test_the_ladder_runs(tracer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tracer.py", "--quick", "--out", str(tmp_path)])
    tracer.main()
    rows = [line.split("|") for line in (tmp_path / "tracer.md").read_text().splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["none", "centered", "+ flux", "+ fixer"]
    assert float(rows[-1][2]) <= 1e-6 < float(rows[0][2])
    assert (tmp_path / "tracer.png").stat().st_size > 10_000
