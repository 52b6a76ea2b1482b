import json
import random
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, cfdbench, npy
from physml.data.cfdbench import PARAMETERS, steady_frames
from physml.data.formats import recognize
from physml.data.npy import Npy
from physml.data.place import Place
from physml.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples"
ROOT = SAMPLES / "cfdbench"
CASE = {"vel_top": 2.0, "density": 1.0, "viscosity": 1e-5, "height": 0.1, "width": 0.2}


def F(s, t, c, x, y):
    """The field of the samples."""
    return np.sin(2 * np.pi * (x + c / 8 + s / 16)) * np.cos(2 * np.pi * y) + 0.1 * t


def write_case(folder: Path, u, v=None, **changes) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "u.npy", u)
    np.save(folder / "v.npy", u if v is None else v)
    (folder / "case.json").write_text(json.dumps({**CASE, **changes}))
    return folder


@pytest.fixture
def cavity(tmp_path):
    """The path of a copy of the cavity sample."""
    shutil.copytree(ROOT / "cavity", tmp_path / "cavity")
    return tmp_path / "cavity"


@pytest.mark.parametrize(
    ("problem", "sizes", "cells", "u", "v", "fluid", "parameters"),
    [
        ("cavity", (40, 5, 5), (16, 16), 0.382683, 0.270598, 256, [-0.3, -1, -0.474, 0.01, 0.01]),
        ("tube", (40, 5, 5), (18, 17), 0.653282, 0.653282, 256, [-0.498, 23.75, -0.276, 0.1, 1]),
        ("dam", (40, 5, 5), (18, 17), 0.653282, 0.653282, 256, [-0.496, 23.75, 19.524, 0.4, 1.5]),
        ("cylinder", (56, 7, 7), (16, 16), 0.382683, 0.270598, 208, [-0.48, 1.25, -0.276, 0.12, 0.22, 0, 0, 0.01]),
    ],
)
def test_values_are_those_of_the_code_of_the_benchmark(problem, sizes, cells, u, v, fluid, parameters):
    splits = {s: physml.open_dataset(ROOT / problem, split=s, normalize_parameters=True) for s in cfdbench.SPLITS}
    assert [ds.sizes["trajectory"] * ds.sizes["time"] for ds in splits.values()] == list(sizes)
    pairs = [int((steady_frames(ds) - 1).sum()) for ds in splits.values()]
    assert pairs == {"cylinder": [48, 6, 6]}.get(problem, [32, 4, 4])
    assert splits["train"].case.values[0] == "geo/case0000"
    assert splits["valid"].case.values.tolist() == ["geo/case0002"]
    assert splits["test"].case.values.tolist() == ["bc/case0003"]
    train = splits["train"]
    assert train.u.dims == train.v.dims == ("trajectory", "time", "y", "x")
    assert (train.sizes["y"], train.sizes["x"]) == cells
    assert_allclose(train.u[0, 0, 3, 4], u, atol=1e-6)
    if problem != "dam":  # only u is recorded for the dam
        assert_allclose(train.v[0, 0, 3, 4], v, atol=1e-6)
    mask = train.mask[0] if "trajectory" in train.mask.dims else train.mask
    assert int(mask.sum()) == fluid
    assert train.attrs["parameters"] == list(PARAMETERS[problem])
    assert_allclose([float(train[name][0]) for name in train.attrs["parameters"]], parameters, atol=1e-12)


def test_a_published_grid_follows_its_formula():
    ds = physml.open_dataset(ROOT / "cavity64", subset="bc")
    assert ds.u.shape == (1, 4, 64, 64)
    t, y, x = np.arange(4)[:, None, None], np.arange(64)[:, None] / 64, np.arange(64) / 64
    assert_allclose(ds.u[0], F(0, t, 0, x, y), atol=1e-6)
    assert_allclose(ds.v[0], F(0, t, 1, x, y), atol=1e-6)
    assert ds.attrs["problem"] == "cavity"  # told by the content, not by the name of the folder


def test_labels_say_what_the_file_does_not(cavity):
    ds = physml.open_dataset(cavity)
    assert ds.u.attrs["units"] == "m s-1"
    assert ds.time.attrs["units"] == "s"
    assert_allclose(ds.time, [0, 0.1, 0.2, 0.3, 0.4])
    assert_allclose(ds.x[[0, -1]], [0.5 / 16, 15.5 / 16])  # cell centers in units of the width
    assert ds.x.attrs == ds.y.attrs | {"long_name": "x / width"}
    assert ds.x.attrs["periodic"] == 0
    assert ds.case.values.tolist()[:4] == ["prop/case0000", "prop/case0001", "prop/case0002", "bc/case0000"]
    assert dict(zip(ds.case.values, ds.split.values, strict=True))["bc/case0003"] == "test"
    assert float(ds.vel_top[3]) == 10.0
    assert "top" in ds.attrs["boundary_conditions"]
    assert ds.attrs["format"] == "cfdbench"


def test_time_steps_of_the_cylinder():
    for dt, step in (("autoregressive", 0.001), ("static", 0.1)):
        ds = physml.open_dataset(ROOT / "cylinder", dt=dt)
        assert ds.attrs["time_step"] == step
        assert_allclose(np.diff(ds.time), step)


def test_splits_shuffle_cases_once_and_leave_the_global_state_alone(tmp_path):
    for i in (10, 2, 1, 0, 3, 11):  # six cases, sorted as numbers
        write_case(tmp_path / "cavity" / "bc" / f"case{i}", np.zeros((2, 3, 3), "f4"))
    random.seed(7)
    before = random.getstate()
    parts = {s: cfdbench.open_dataset(Place(tmp_path), subset="bc", split=s) for s in ("train", "dev")}
    assert random.getstate() == before
    expected = [f"bc/case{i}" for i in (0, 1, 2, 3, 10, 11)]
    assert cfdbench.open_dataset(Place(tmp_path), subset="bc").case.values.tolist() == expected
    random.seed(0)
    random.shuffle(expected)
    random.setstate(before)
    assert parts["train"].case.values.tolist() == expected[:5]  # round(4.8), round(0.6): 5, 1, 0
    assert parts["dev"].case.values.tolist() == expected[5:]
    with pytest.raises(DataError, match="split 'test' of 6 cases is empty"):
        cfdbench.open_dataset(Place(tmp_path), subset="bc", split="test")


def test_padding_of_the_tube():
    plain, ds = (physml.open_dataset(ROOT / "tube", padding=p) for p in ("none", "upstream"))
    assert plain.u.shape[2:] == (16, 16)
    assert_array_equal(ds.u[:, :, 1:-1, 1:], plain.u)
    assert_array_equal(ds.u[:, :, 1:-1, 0], np.broadcast_to(ds.vel_in.values[:, None, None], (10, 5, 16)).astype("f4"))
    assert float(abs(ds.u[:, :, [0, -1]]).max()) == float(abs(ds.v[..., 0]).max()) == 0
    assert_array_equal(ds.v[:, :, 1:-1, 1:], plain.v)
    assert_array_equal(ds.mask[1:-1, 1:], 1)
    assert int(plain.mask.sum()) == 256
    assert_allclose(ds.x[:2], [-0.5 / 16, 0.5 / 16])
    assert_allclose(ds.y[[0, 1, -1]], [-0.5 / 16, 0.5 / 16, 16.5 / 16])


def test_the_barrier_of_the_dam():
    ds = physml.open_dataset(ROOT / "dam")
    rows = int(0.1 / 0.025)
    assert_allclose(ds.u[3, :, 1 : 1 + rows, 0], 0.2)
    assert float(abs(ds.u[3, :, 1 + rows :, 0]).max()) == 0
    assert ds.mask.dims == ("y", "x")  # upstream never masks the barrier
    geometric = physml.open_dataset(ROOT / "dam", mask="geometric", padding="none").mask[3]
    x, y = (np.arange(16) + 0.5) * 0.09375, (np.arange(16)[:, None] + 0.5) * 0.025
    barrier = (x >= 0.5) & (x <= 0.55) & (y <= 0.1)
    assert_array_equal(geometric, ~barrier)
    assert barrier.sum() > 0


def test_variants_of_the_cylinder():
    head = physml.open_dataset(ROOT / "cylinder")
    assert int(head.mask[0, [0, -1]].sum()) == int(head.mask[0, :, 0].sum()) == 0
    assert int(head.mask[0, :, -1].sum()) == 14
    disc = physml.open_dataset(ROOT / "cylinder", mask="geometric")
    assert_array_equal(disc.mask[:, 1:-1, 1:], head.mask[:, 1:-1, 1:])
    assert int(disc.mask[0, 0].sum()) == 16
    paper = physml.open_dataset(ROOT / "cylinder", padding="paper")
    assert paper.u.shape[2:] == (18, 17)
    assert_allclose([paper.center_x[0], paper.center_y[0]], [0.06, 0.06])
    assert_array_equal(paper.mask[:, 1:-1, 1:], disc.mask)
    assert_allclose(paper.u[0, :, 1:-1, 0], paper.vel_in[0])


def test_opening_reads_no_field(monkeypatch):
    ranges = []
    original = npy._part
    monkeypatch.setattr(npy, "_part", lambda place, a, b: ranges.append((a, b)) or original(place, a, b))
    ds = cfdbench.open_dataset(Place(ROOT / "cavity"))
    assert set(ranges) == {(0, npy.HEADER)}
    assert not isinstance(ds.u.variable._data, np.ndarray)
    ranges.clear()
    part = ds.u.isel(trajectory=3, time=[2, 1], x=slice(4, None, 2))
    assert ranges == []
    values = part.values
    assert [stop - start for start, stop in ranges] == [2 * 16 * 16 * 4]  # two frames of one case
    assert_array_equal(values, ds.u.values[3][[2, 1]][:, :, 4::2])
    assert ds.u.isel(time=slice(0, 0)).values.shape == (10, 0, 16, 16)


def test_shorter_cases_end_with_nan(tmp_path):
    random = np.random.default_rng(0)
    fields = [random.normal(size=(n, 4, 6)) for n in (3, 5)]
    for i, u in enumerate(fields):
        write_case(tmp_path / "cavity" / "prop" / f"case{i:04}", u)
    ds = physml.open_dataset(tmp_path / "cavity", subset="prop")
    assert ds.u.dtype == np.float64
    assert ds.frames.values.tolist() == [3, 5]
    assert_array_equal(ds.u[0, :3], fields[0])
    assert np.isnan(ds.u[0, 3:]).all()
    assert_array_equal(ds.u[1], fields[1])


def test_cases_are_cut_where_they_become_steady(tmp_path):
    u = np.ones((6, 4, 4), "f4") * np.array([1, 2, 3, 4, 4.0005, 9])[:, None, None]
    write_case(tmp_path / "bc" / "case0000", u, 0 * u)
    write_case(tmp_path / "bc" / "case0001", -3 * u, 0 * u)
    ds = physml.open_dataset(tmp_path, subset="bc")
    assert steady_frames(ds).values.tolist() == [4, 6]  # pairs 0-1, 1-2, 2-3; the second moves by 0.0015
    assert steady_frames(ds, 2).values.tolist() == [6, 6]
    cut = physml.open_dataset(tmp_path, subset="bc", steady=True)
    assert cut.frames.values.tolist() == [4, 6]
    assert np.isnan(cut.u[0, 4:]).all()
    assert_array_equal(cut.u[0, :4], u[:4])
    assert steady_frames(cut).values.tolist() == [4, 6]
    with pytest.raises(ConfigError, match="steps is 0"):
        steady_frames(ds, 0)
    u[1, 2, 2] = np.nan
    np.save(tmp_path / "bc" / "case0001" / "u.npy", u)
    assert np.isnan(physml.open_dataset(tmp_path, subset="bc").u[1, 1]).sum() == 1
    with pytest.raises(DataError, match="bc/case0001 has NaN in frame 0 or the one after"):
        physml.open_dataset(tmp_path, subset="bc", steady=True)


def test_remote_cases_are_read_by_ranges():
    memory = fsspec.filesystem("memory")
    memory.put(str(ROOT / "tube"), "/cfd/tube", recursive=True)
    try:
        assert recognize("memory://cfd") == recognize("memory://cfd/tube") == "cfdbench"
        remote, local = (
            physml.open_dataset("memory://cfd", split="train"),
            physml.open_dataset(ROOT / "tube", split="train"),
        )
        assert remote.drop_vars("case").identical(local.drop_vars("case"))
        assert remote.case.values.tolist() == local.case.values.tolist()
    finally:
        memory.rm("/cfd", recursive=True)


def test_recognition(tmp_path, make):
    for path in (ROOT, ROOT / "cavity", ROOT / "cavity64", ROOT / "dam"):
        assert recognize(path) == "cfdbench"
    for path in (SAMPLES, SAMPLES / "poseidon", SAMPLES / "pdebench", ROOT / "cavity" / "bc" / "case0000" / "u.npy"):
        assert not cfdbench.recognizes(Place(path))
    make.waves().to_netcdf(tmp_path / "a.nc")
    assert not cfdbench.recognizes(Place(tmp_path))
    (tmp_path / "bc").mkdir()
    assert not cfdbench.recognizes(Place(tmp_path))
    (tmp_path / "bc" / "case0000").mkdir()
    assert not cfdbench.recognizes(Place(tmp_path))


@pytest.mark.parametrize("problem", list(PARAMETERS))
def test_training_reads_windows(problem):
    config = DataConfig(
        path=str(ROOT), split_by="format", train=("train",), valid=("valid",), test=("test",), variables=("u", "v"),
        parameters=PARAMETERS[problem], mask="mask", options={"problem": problem},
    )  # fmt: skip
    splits = config.open()
    assert [len(s.lengths) for s in splits.values()] == [8, 1, 1]
    window = splits["train"].read(1, range(2, 4))
    ds = physml.open_dataset(ROOT, problem=problem, split="train")
    assert window.spec.names == ("u", "v")
    assert window.spec.grid.shape == (ds.sizes["x"], ds.sizes["y"])
    assert_allclose(window.frames[..., 0], ds.u[1, 2:4].transpose("time", "x", "y"))
    mask = ds.mask[1] if "trajectory" in ds.mask.dims else ds.mask
    assert_array_equal(window.mask[..., 1], mask.transpose("x", "y"))
    assert_allclose(window.parameters, [ds[name][1] for name in PARAMETERS[problem]], rtol=1e-6)
    assert splits["train"].spec.time_step == (0.001 if problem == "cylinder" else 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": "cavern"}, "no problem='cavern'.*'cavity'"),
        ({}, "holds 4 problems: cavity, tube, dam, cylinder. Choose one"),
        ({"problem": "dam", "subset": "prop_foo"}, "no subset='foo'"),
        ({"problem": "dam", "split": "training"}, "no split='training'. Did you mean 'train'"),
        ({"problem": "dam", "mask": "none"}, "no mask='none'"),
        ({"problem": "dam", "padding": "head"}, "no padding='head'"),
        ({"problem": "dam", "dt": "slow"}, "no dt='slow'"),
        ({"dts": "slow"}, "no option 'dts'"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ConfigError, match=message):
        physml.open_dataset(ROOT, **options)


def test_what_is_not_there_is_named(cavity):
    with pytest.raises(DataError, match="has no folder dam"):
        cfdbench.open_dataset(Place(cavity.parent), problem="dam")
    with pytest.raises(DataError, match="no folder prop, bc, geo, nor one of cavity"):
        cfdbench.open_dataset(Place(SAMPLES))
    with pytest.raises(DataError, match="cavity64 has no folder 'prop'. Download it, or leave it out: subset='bc'"):
        physml.open_dataset(ROOT / "cavity64")
    shutil.rmtree(cavity / "geo")
    (cavity / "geo").mkdir()
    with pytest.raises(DataError, match="geo holds no folder case0000"):
        physml.open_dataset(cavity)
    with pytest.raises(DataError, match="There is no file"):
        cfdbench.open_dataset(Place(cavity / "nothing"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON text"),
        ("[" * 100_000, "is no JSON text|is longer than"),
        ('{"a": ' * 9000, "is no JSON text|is longer than"),
        (" " * 2**16 + "{}", "is longer than 65536 bytes"),
        ("[1]", "should hold names with numbers"),
        ('{"a": 1}', "tell the problem|has no 'vel_top'"),
        (json.dumps({**CASE, "density": "1.0"}), "'density' is '1.0', but it should be a finite number"),
        (json.dumps({**CASE, "density": None}), "'density' is 'None'"),
        (json.dumps({**CASE, "density": True}), "'density' is 'True'"),
        (json.dumps({**CASE, "viscosity": float("nan")}), "'viscosity' is 'nan'"),
        (json.dumps({**CASE, "viscosity": float("-inf")}), "'viscosity' is '-inf'"),
        (json.dumps({**CASE, "viscosity": 10**400}), "'viscosity' is '1000"),
        (json.dumps({**CASE, "height": 0}), "'height' is 0, but it should be positive"),
        (json.dumps({k: v for k, v in CASE.items() if k != "density"} | {"densty": 1}), "has no 'density'.*'densty'"),
    ],
)
@pytest.mark.parametrize("case", ["prop/case0000", "bc/case0002"])
def test_descriptions_that_are_wrong(cavity, case, content, message):
    (cavity / case / "case.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        physml.open_dataset(cavity)
    assert str(cavity / case / "case.json") in str(error.value)


def test_unknown_keys_are_left_alone(cavity):
    file = cavity / "bc" / "case0000" / "case.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": "made up", "more": [1]}))
    (cavity / "README.md").write_text("read me")
    (cavity / "bc" / "case_list.txt").write_text("0")
    assert physml.open_dataset(cavity).identical(physml.open_dataset(ROOT / "cavity"))


def test_integers_and_the_center_of_the_cylinder(tmp_path):
    shutil.copytree(ROOT / "cylinder", tmp_path / "cylinder")
    file = tmp_path / "cylinder" / "bc" / "case0000" / "case.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "center_x": 0.02, "center_y": 0, "vel_in": 3}))
    ds = physml.open_dataset(tmp_path, mask="geometric")
    assert [float(ds[name][3]) for name in ("center_x", "center_y", "vel_in")] == [0.02, 0, 3]
    x, y = -0.06 + (np.arange(16) + 0.5) * 0.22 / 16, -0.06 + (np.arange(16)[:, None] + 0.5) * 0.12 / 16
    assert_array_equal(ds.mask[3], (x - 0.02) ** 2 + y**2 > 0.01**2)


class Pickled:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def saved(array, folder: Path, **options) -> bytes:
    np.save(folder / "new.npy", array, **options)
    return (folder / "new.npy").read_bytes()


@pytest.mark.parametrize(
    ("make_content", "message"),
    [
        (lambda folder, good: b"", "u.npy is not a numpy array"),
        (lambda folder, good: good[:60], "u.npy is not a numpy array"),
        (lambda folder, good: good[:-1], "u.npy has .* bytes, but its header needs"),
        (lambda folder, good: good + b"1", "u.npy has .* bytes, but its header needs"),
        (lambda folder, good: b"PK\x03\x04" + good, "u.npy is not a numpy array"),
        (lambda folder, good: good[:6] + b"\x09" + good[7:], "u.npy is not a numpy array"),
        (lambda folder, good: saved(np.array([Pickled()], object), folder, allow_pickle=True), "u.npy holds object"),
        (lambda folder, good: saved(np.zeros((5, 16, 16), "i4"), folder), "u.npy holds int32"),
        (lambda folder, good: saved(np.zeros((5, 16, 16), "f2"), folder), "u.npy holds float16"),
        (lambda folder, good: saved(np.zeros((5, 16), "f4"), folder), r"u.npy holds float32 of shape \(5, 16\)"),
        (lambda folder, good: saved(np.zeros((0, 16, 16), "f4"), folder), r"shape \(0, 16, 16\)"),
        (lambda folder, good: saved(np.asfortranarray(np.zeros((5, 16, 16))), folder), "in Fortran order"),
        (lambda folder, good: saved(np.zeros((4, 16, 16), "f4"), folder), "v.npy has shape .*, but u.npy has"),
        (lambda folder, good: saved(np.zeros((5, 16, 8), "f4"), folder), "v.npy has shape .*, but u.npy has"),
    ],
)
def test_arrays_that_are_wrong(cavity, tmp_path, make_content, message):
    file = cavity / "geo" / "case0001" / "u.npy"
    file.write_bytes(make_content(tmp_path, file.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        physml.open_dataset(cavity)
    assert str(file.parent) in str(error.value)


def test_grids_must_agree_and_files_must_stay(cavity):
    case = cavity / "geo" / "case0001"
    ds = physml.open_dataset(cavity)
    (case / "v.npy").write_bytes((case / "v.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="v.npy became shorter"):
        ds.v.load()
    (case / "v.npy").unlink()
    with pytest.raises(DataError, match="There is no file .*v.npy"):
        physml.open_dataset(cavity)
    for name in ("u", "v"):
        np.save(case / f"{name}.npy", np.zeros((5, 8, 16), "f4"))
    with pytest.raises(DataError, match="8 x 16 cells, but .* has 16 x 16"):
        physml.open_dataset(cavity)


def test_other_byte_orders_and_nan(cavity):
    file = cavity / "geo" / "case0001" / "u.npy"
    values = np.load(file)
    values[0, 0, 0] = np.nan
    np.save(file, values.astype(">f4"))
    assert_array_equal(physml.open_dataset(cavity).u[8], values)


def test_many_cases_open_without_reading_their_fields(tmp_path, monkeypatch):
    for i in range(200):
        write_case(tmp_path / "bc" / f"case{i:04}", np.full((2, 4, 4), i, "f4"))
    read = []
    rows = Npy.rows
    monkeypatch.setattr(Npy, "rows", lambda self, *span: read.append(self.place) or rows(self, *span))
    ds = cfdbench.open_dataset(Place(tmp_path), subset="bc")
    assert ds.sizes["trajectory"] == 200
    assert not read
    assert_array_equal(ds.u[[3, 150], 1, 2, 2], [3, 150])
    assert {place.parent().name() for place in read} == {"case0003", "case0150"}


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    outcomes = set()
    for seed in seeds:
        source = ROOT / list(PARAMETERS)[seed % 4]
        copy = damage(source, tmp_path / "x" / source.name, seed)
        outcomes.add(survives(copy, "cfdbench", steady=seed % 3 == 0))
    assert outcomes == {"opened", "DataError"}
