"""Generated files: the same recipe gives the same bytes, whatever happens on the way."""

import errno
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from physml.data import generate as generating
from physml.data.generate import Recipe, generate, resolve
from physml.data.labelled import spec_of
from physml.errors import ConfigError, DataError, DivergedError
from physml.files import exclusive
from physml.solvers import Kolmogorov, KuramotoSivashinsky
from physml.verbs.data import Generate

KS = KuramotoSivashinsky(points=32, solver_points=32, length=16.0, warmup=1.0, substeps=4, initial_modes=4)
FLOW = Kolmogorov(
    points=12, solver_points=18, forcing_mode=2, warmup=0.4, substeps=4, initial_modes=4, viscosity=(0.05, 0.1)
)


class Count:
    """Remembers what it is told; acts when half is done."""

    def __init__(self, act=lambda: None):
        self.seen, self.act = [], act

    def update(self, done, total, **values):
        self.seen.append((done, total))
        if 2 * done >= total:
            self.act()

    def message(self, text):
        pass


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    progress = Count()
    first = generate(KS, tmp_path / "a.nc", 5, steps=7, seed=3, batch=2, progress=progress)
    second = generate(KS, tmp_path / "b.nc", 5, steps=7, seed=3, workers=1)
    assert first.read_bytes() == second.read_bytes()
    other = generate(KS, tmp_path / "c.nc", 5, steps=7, seed=4)
    assert other.read_bytes() != first.read_bytes()
    assert leftovers(tmp_path) == ["a.nc", "b.nc", "c.nc"]
    done, total = zip(*progress.seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1] == 3 * 2 * (5 + 7)  # chunks, trajectories in each, warm-up and stored steps


def test_more_trajectories_begin_with_the_same_ones(tmp_path):
    few = xr.open_dataset(generate(KS, tmp_path / "few.nc", 2, steps=3))
    many = xr.open_dataset(generate(KS, tmp_path / "many.nc", 5, steps=3))
    np.testing.assert_array_equal(many.u[:2], few.u)


def test_a_file_explains_itself(tmp_path):
    """Names, units, provenance; the command in it makes the same file again."""
    path = generate(FLOW, tmp_path / "flow.nc", 2, steps=4, split="valid")
    data = xr.open_dataset(path)
    assert data.vorticity.dims == ("trajectory", "time", "y", "x")
    assert data.vorticity.dtype == np.float32
    assert data.vorticity.attrs["units"] == "1"
    np.testing.assert_allclose(data.time, np.arange(5) * 0.2)
    np.testing.assert_allclose(data.x, np.arange(12) * 2 * np.pi / 12)
    assert ((data.viscosity > 0.05) & (data.viscosity < 0.1)).all()
    assert (data.drag == 0.1).all()
    assert json.loads(data.attrs["recipe"])["solver"]["viscosity"] == [0.05, 0.1]
    assert "exponax" in data.attrs["source"]
    assert "sin(2 pi forcing_mode y / length)" in data.attrs["equation"]

    words = shlex.split(data.attrs["history"])
    assert words[:3] == ["physml", "data", "generate"]
    flags = dict(zip(words[4::2], words[5::2], strict=True)) | {"--set": None}
    changed = [value for flag, value in zip(words[4::2], words[5::2], strict=True) if flag == "--set"]
    again = generate(
        resolve(words[3], changed), tmp_path / "again.nc", int(flags["--trajectories"]), steps=int(flags["--steps"]),
        seed=int(flags["--seed"]), split=flags["--split"],
    )  # fmt: skip
    assert again.read_bytes() == path.read_bytes()


def test_the_reader_sees_periodic_axes_and_parameters(tmp_path):
    data = xr.open_dataset(generate(FLOW, tmp_path / "flow.nc", 1, steps=2))
    spec = spec_of(data, parameters=("viscosity",))
    assert spec.names == ("vorticity",)
    assert spec.grid.periodic == (True, True)
    assert spec.time_step == pytest.approx(0.2)
    assert [axis.length for axis in spec.grid.axes] == pytest.approx([2 * np.pi] * 2)


def test_zarr_holds_the_same_numbers(tmp_path):
    file = xr.open_dataset(generate(FLOW, tmp_path / "flow.nc", 3, steps=4, batch=2))
    folder = xr.open_zarr(generate(FLOW, tmp_path / "flow.zarr", 3, steps=4, batch=2), consolidated=False)
    xr.testing.assert_identical(folder.load(), file.load())
    assert leftovers(tmp_path) == ["flow.nc", "flow.zarr"]


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_generate import KS, Count
from physml.data.generate import generate

def wait():
    print("half", flush=True)
    time.sleep(600)

generate(KS, {out!r}, 6, steps=5, batch=1, workers=1, progress=Count(wait))
"""


def test_a_killed_run_continues_and_gives_the_same_bytes(tmp_path, monkeypatch):
    out = tmp_path / "ks.nc"
    script = SCRIPT.format(tests=__file__.rpartition("/")[0], out=str(out))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "half"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    chunks = sorted((tmp_path / "ks.nc.partial").glob("chunk_*.npz"))
    assert not out.exists()
    assert 2 <= len(chunks) < 6
    chunks[0].write_bytes(chunks[0].read_bytes()[:100])  # as a full disk might leave it

    solved = []
    run = generating.Ensemble.run
    monkeypatch.setattr(
        generating.Ensemble, "run", lambda self, first, *rest: solved.append(first) or run(self, first, *rest)
    )
    generate(KS, out, 6, steps=5, batch=1)
    assert sorted(solved) == [0, *range(len(chunks), 6)]  # the damaged chunk and the missing ones, nothing else
    assert leftovers(tmp_path) == ["ks.nc"]
    monkeypatch.undo()
    assert out.read_bytes() == generate(KS, tmp_path / "whole.nc", 6, steps=5).read_bytes()


def test_unfinished_work_of_other_settings_is_not_mixed_in(tmp_path):
    def stop():
        raise KeyboardInterrupt

    out = tmp_path / "ks.nc"
    with pytest.raises(KeyboardInterrupt):
        generate(KS, out, 4, steps=5, batch=1, progress=Count(stop))
    assert leftovers(tmp_path) == ["ks.nc.partial"]
    with pytest.raises(DataError, match=r"ks.nc.partial.*seed is 0 there, 1 here.*overwrite"):
        generate(KS, out, 4, steps=5, batch=1, seed=1)
    looking = Generate(name="kuramoto_sivashinsky", out=out, trajectories=4, dry_run=True)
    with pytest.raises(DataError, match="unfinished work with other settings"):
        looking.run()
    assert replace(looking, overwrite=True).run()["would write"] == str(out)
    assert leftovers(tmp_path) == ["ks.nc.partial"]
    generate(KS, out, 4, steps=5, batch=1, seed=1, overwrite=True)
    assert leftovers(tmp_path) == ["ks.nc"]
    assert xr.open_dataset(out).attrs["seed"] == 1


@pytest.mark.parametrize("name", ["ks.nc", "ks.zarr"])
def test_an_existing_output_is_replaced_only_on_demand(tmp_path, name):
    out = generate(KS, tmp_path / name, 1, steps=2)
    with pytest.raises(DataError, match="exists already.*overwrite"):
        generate(KS, out, 2, steps=2)
    assert xr.open_dataset(out).sizes["trajectory"] == 1
    generate(KS, out, 2, steps=2, overwrite=True)
    assert xr.open_dataset(out).sizes["trajectory"] == 2
    assert leftovers(tmp_path) == [name]


def test_one_at_a_time_where_there_are_locks(tmp_path, monkeypatch):
    out = tmp_path / "f.nc"
    with (
        exclusive(out),
        pytest.raises(DataError, match=r"Another process is writing .*f\.nc"),
        exclusive(out, wait=False),
    ):
        pass
    assert not list(tmp_path.iterdir())

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(out, wait=False), exclusive(out, wait=False):
        out.write_text("both")
    assert list(tmp_path.iterdir()) == [out]


def test_divergence_leaves_nothing_behind(tmp_path):
    wild = Kolmogorov(points=8, solver_points=18, initial_modes=4, initial_speed=1e4, substeps=1, warmup=0.0)
    with pytest.raises(DivergedError, match="trajectory 0 is not finite at time"):
        generate(wild, tmp_path / "wild.nc", 2, steps=20)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("solver", "out", "fields", "error", "parts"),
    [
        ("kolmogorof", "a.nc", {}, ConfigError, ["kolmogorof", "Did you mean 'kolmogorov'"]),
        (KS, "a.txt", {}, ConfigError, ["a.txt", ".nc or .zarr"]),
        (KS, "a.nc", {"format": "netcfd"}, ConfigError, ["netcfd", "Did you mean 'netcdf'"]),
        (KS, "a.nc", {"trajectories": 0}, ConfigError, ["trajectories is 0"]),
        (KS, "a.nc", {"steps": 0}, ConfigError, ["steps is 0"]),
        (KS, "a.nc", {"seed": -1}, ConfigError, ["seed is -1"]),
        (KS, "a.nc", {"split": "tests"}, ConfigError, ["tests", "Did you mean 'test'"]),
        (KS, "a.nc", {"batch": 0}, ConfigError, ["batch is 0"]),
        (KS, "a.nc", {"workers": 0}, ConfigError, ["workers is 0"]),
        (KS, "/proc/nowhere/a.nc", {}, DataError, ["/proc/nowhere/a.nc", "cannot be written"]),
    ],
)
def test_a_mistake_is_named(tmp_path, solver, out, fields, error, parts):
    with pytest.raises(error) as caught:
        generate(solver, tmp_path / out, **{"steps": 2, **fields})
    assert all(part in str(caught.value) for part in parts), caught.value
    assert leftovers(tmp_path) == []


def test_assignments_change_fields():
    solver = resolve("kolmogorov", ["viscosity=1e-3", "points=32", "drag=[0.1, 0.2]"])
    assert solver == Kolmogorov(viscosity=1e-3, points=32, drag=(0.1, 0.2))
    assert resolve(solver, ["points=16"]).points == 16
    with pytest.raises(ConfigError, match="viscocity.*Did you mean 'viscosity'"):
        resolve("kolmogorov", ["viscocity=1"])
    assert "--set viscosity=0.001" in Recipe(solver, 1, 1).command
