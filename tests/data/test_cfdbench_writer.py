"""Flows of our own in the layout of CFDBench: what is written opens like the published set."""

import json

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data.cfdbench import GEOMETRY, PARAMETERS
from physml.data.cfdbench_writer import RECIPE, generate_cases, write_cases
from physml.errors import ConfigError, DataError
from physml.solvers import make_solver

NUMBERS = {
    "cavity": {"vel_top": 10.0, "density": 1.0, "viscosity": 1e-4, "height": 0.01, "width": 0.02},
    "tube": {"vel_in": 1.0, "density": 100.0, "viscosity": 0.1, "height": 0.1, "width": 1.0},
    "dam": {
        "velocity": 0.2, "density": 100.0, "viscosity": 0.1, "height": 0.4, "width": 1.5, "barrier_width": 0.06,
        "barrier_height": 0.1,
    },
    "cylinder": {
        "vel_in": 1.0, "density": 10.0, "viscosity": 1e-3, "height": 0.12, "width": 0.22, "center_x": 0.05,
        "center_y": 0.06, "radius": 0.01,
    },
}  # fmt: skip


def made_up(problem, count=3, points=64, frames=4):
    shape = (count, frames, points, points)
    u, v = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    dims = ("trajectory", "time", "y", "x")
    numbers = {name: ("trajectory", value * np.linspace(1, 1.1, count)) for name, value in NUMBERS[problem].items()}
    return xr.Dataset({"u": (dims, u), "v": (dims, v), **numbers}, {"time": 0.25 * np.arange(frames)})


@pytest.mark.parametrize("problem", PARAMETERS)
def test_what_is_written_opens_again(tmp_path, problem):
    ds = made_up(problem)
    folder = write_cases(ds, tmp_path, problem, "geo")
    assert folder == tmp_path / problem / "geo"
    again = physml.open_dataset(tmp_path, problem=problem, subset="geo", padding="none")
    assert_array_equal(again.u, ds.u)
    assert_array_equal(again.v, ds.v)
    assert_allclose(again.time, ds.time)
    assert again.attrs["time_step"] == 0.25
    moved = ("center_x", "center_y")  # the origin of the cylinder is its center
    for name in set(NUMBERS[problem]) - {*moved}:
        assert_allclose(again[name], ds[name], rtol=1e-12)
    if problem == "cylinder":
        assert_allclose(-again.x_min, ds.center_x)
        assert_allclose(again.y_max, ds.height - ds.center_y)
    described = json.loads((folder / "case0002" / "case.json").read_text())
    expected = {*PARAMETERS[problem], *GEOMETRY.get(problem, ())} - {*moved}
    assert set(described) == (expected - {"height", "width"} if problem == "cylinder" else expected) | {"time_step"}
    padded = physml.open_dataset(tmp_path, problem=problem, subset="geo")
    assert padded.sizes["y"] == {"tube": 66, "dam": 66}.get(problem, 64)


@pytest.mark.parametrize(
    "problem", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("cavity", "dam"))) for name in PARAMETERS]
)
def test_generated_cases_open_like_the_published_ones(tmp_path, problem):
    """At 32 x 32: parameters of the table, the mask of the reader, the interval of frames, and a flow that moves."""
    seen = []

    class Watch:
        def update(self, done, total, **values):
            seen.append(done)

        def message(self, text):
            pass

    options = {"warmup": 0.01} if problem == "cylinder" else {}
    arguments = {"problems": [problem], "subsets": ("bc",), "cases": 3, "points": 32, "steps": 2, "options": options}
    generate_cases(tmp_path, **arguments, progress=Watch())
    ds = physml.open_dataset(tmp_path, problem=problem, subset="bc", mask="geometric", padding="none")
    assert ds.u.shape == (3, 3, 32, 32)
    assert np.isfinite(ds.u.values).all()
    first = PARAMETERS[problem][0]
    solver = make_solver(problem, subset="bc")
    assert_allclose(ds[first], solver.cases[first][:3])
    assert ds.attrs["time_step"] == solver.time_step
    mask = ds.mask.values if "trajectory" in ds.mask.dims else np.stack([ds.mask.values] * 3)
    if problem in ("dam", "cylinder"):
        assert (mask == 0).any()
    else:
        assert (mask == 1).all()
    for i in range(3):
        still = np.asarray(ds.u[i, -1])[mask[i] == 0]
        assert (still == 0).all()
    change = ((ds.u[:, 2] - ds.u[:, 1]) ** 2).sum(("x", "y")) / (ds.u[:, 2] ** 2).sum(("x", "y"))
    assert (change > 1e-5).all()
    assert sorted(path.name for path in (tmp_path / problem).iterdir()) == ["bc"]
    train = physml.open_dataset(tmp_path, problem=problem, subset="bc", split="train")
    assert train.sizes["trajectory"] == 2  # round(0.8 * 3)

    before, seen[:] = (tmp_path / problem / "bc" / "case0000" / "u.npy").stat().st_mtime_ns, []
    generate_cases(tmp_path, **arguments, progress=Watch())
    assert (tmp_path / problem / "bc" / "case0000" / "u.npy").stat().st_mtime_ns == before
    assert seen == []
    with pytest.raises(DataError, match=r"holds cases made with other settings \(they differ in cases\).*overwrite"):
        generate_cases(tmp_path, **{**arguments, "cases": 2})


def test_what_others_made_is_never_replaced(tmp_path):
    write_cases(made_up("tube"), tmp_path, "tube", "bc")
    with pytest.raises(DataError, match="was not made by generate_cases"):
        generate_cases(tmp_path, "tube", "bc", cases=1, points=16, steps=1, overwrite=True)
    with pytest.raises(DataError, match="exists already"):
        write_cases(made_up("tube"), tmp_path, "tube", "bc")
    assert not (tmp_path / "tube" / "bc" / RECIPE).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"problems": ["tub"]}, "no problem 'tub'. Did you mean 'tube'"),
        ({"subsets": "pro"}, "no subset 'pro'. Did you mean 'prop'"),
        ({"cases": 0}, "cases is 0"),
        ({"options": {"largest_reynold": 3.0}}, "largest_reynold"),
    ],
)
def test_a_mistake_is_named(tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        generate_cases(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_data_that_lack_something(tmp_path):
    with pytest.raises(DataError, match="needs 'density'"):
        write_cases(made_up("cavity").drop_vars("density"), tmp_path, "cavity", "bc")
    with pytest.raises(DataError, match="at least two frames"):
        write_cases(made_up("cavity").isel(time=[0]), tmp_path, "cavity", "bc")
    with pytest.raises(ConfigError, match="no subset 'all'"):
        write_cases(made_up("cavity"), tmp_path, "cavity", "all")


def test_frame_intervals_must_agree(tmp_path):
    write_cases(made_up("cavity"), tmp_path, "cavity", "bc")
    path = tmp_path / "cavity" / "bc" / "case0001" / "case.json"
    described = json.loads(path.read_text())
    for value, words in ((0.5, "has time_step 0.5, but"), (-1, "'time_step' is -1"), ("x", "'time_step' is 'x'")):
        path.write_text(json.dumps({**described, "time_step": value}))
        with pytest.raises(DataError, match=words):
            physml.open_dataset(tmp_path, problem="cavity", subset="bc")
