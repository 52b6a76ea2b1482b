import shutil
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, pdebench
from physml.data.formats import recognize
from physml.data.place import Place
from physml.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples"
ROOT = SAMPLES / "pdebench"
ADVECTION = ROOT / "1D/Advection/Train/1D_Advection_Sols_beta0.4.hdf5"
BURGERS = ROOT / "1D/Burgers/Train/1D_Burgers_Sols_Nu0.01.hdf5"
REACTION = ROOT / "1D/ReactionDiffusion/Train/ReacDiff_Nu0.5_Rho1.0.hdf5"
CFD1 = ROOT / "1D/CFD/Train/1D_CFD_Rand_Eta0.01_Zeta0.01_periodic_Train.hdf5"
CFD2 = ROOT / "2D/CFD/2D_Train_Rand/2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5"
DARCY = ROOT / "2D/DarcyFlow/2D_DarcyFlow_beta1.0_Train.hdf5"
SHALLOW = ROOT / "2D/shallow-water/2D_rdb_NA_NA.h5"
DIFF_REACT = ROOT / "2D/diffusion-reaction/2D_diff-react_NA_NA.h5"
DIFF_SORP = ROOT / "1D/diffusion-sorption/1D_diff-sorp_NA_NA.h5"
INCOMPRESSIBLE = ROOT / "2D/NS_incom/ns_incom_inhom_2d_512-0.h5"
FILES = (ADVECTION, BURGERS, REACTION, CFD1, CFD2, DARCY, SHALLOW, DIFF_REACT, DIFF_SORP, INCOMPRESSIBLE)
CFD_FIELDS = ["density", "pressure", "Vx"]


def item(ds: xr.Dataset, number: int, names: list[str]) -> np.ndarray:
    """One item as the reader of the benchmark gives it: (x.., t, channel)."""
    space = [dim for dim in ds[names[0]].dims if dim not in ("trajectory", "time")]
    return np.stack([ds[name][number].transpose(*space, "time").values for name in names], -1)


@pytest.fixture
def edited(tmp_path):
    """`edited(sample, change)`: a copy whose open file was given to `change`."""

    def make(sample: Path, change) -> Path:
        target = tmp_path / sample.name
        shutil.copy(sample, target)
        with h5py.File(target, "a") as file:
            change(file)
        return target

    return make


def replaced(key: str, change):
    """A change that replaces a dataset by another one."""

    def apply(file):
        values = change(file[key][()])
        del file[key]
        file[key] = values

    return apply


@pytest.mark.parametrize(
    ("path", "names", "counts", "shape", "train", "test"),
    [
        (ADVECTION, ["tensor"], (18, 2), (32, 11, 1), 1.380785, 0.955570),
        (BURGERS, ["tensor"], (18, 2), (32, 11, 1), 1.380785, 0.955570),
        (REACTION, ["tensor"], (18, 2), (32, 11, 1), 1.380785, 0.955570),
        (CFD1, CFD_FIELDS, (18, 2), (32, 6, 3), None, None),
        (CFD2, [*CFD_FIELDS, "Vy"], (9, 1), (16, 12, 5, 4), 1.200103, None),
        (DIFF_REACT, ["data_0", "data_1"], (9, 1), (10, 8, 5, 2), None, 0.953281),
        (DIFF_SORP, ["data"], (9, 1), (16, 6, 1), 0.807107, None),
        (SHALLOW, ["data"], (22, 3), (8, 8, 4, 1), None, None),
    ],
)
def test_items_are_those_of_the_reader_of_the_benchmark(path, names, counts, shape, train, test):
    parts = [physml.open_dataset(path, split=split) for split in ("train", "test")]
    assert tuple(ds.sizes["trajectory"] for ds in parts) == counts
    for ds, value in zip(parts, (train, test), strict=True):
        assert item(ds, 0, names).shape == shape
        if value is not None:
            assert_allclose(item(ds, 0, names).flat[37], value, atol=1e-6)


def test_the_other_reader_of_the_benchmark_splits_groups_like_arrays():
    train, test = (physml.open_dataset(SHALLOW, split=split, split_rule="first") for split in ("train", "test"))
    assert (train.sizes["trajectory"], test.sizes["trajectory"]) == (23, 2)
    assert_allclose([item(train, 0, ["data"]).flat[37], item(test, 0, ["data"]).flat[37]], [0.807107, 0.6], atol=1e-6)


def test_darcy_flow_has_no_time():
    ds = physml.open_dataset(DARCY)
    assert ds.tensor.dims == ds.nu.dims == ("trajectory", "x", "y")
    assert ds.nu.shape == (10, 16, 16)
    assert "time" not in ds.dims
    assert [physml.open_dataset(DARCY, split=s).sizes["trajectory"] for s in ("train", "test")] == [9, 1]
    with h5py.File(DARCY) as file:
        assert_array_equal(ds.tensor, file["tensor"][:, 0])
        assert_array_equal(ds.nu, file["nu"])
    assert ds.beta.values.tolist() == [1.0] * 10
    assert ds.x.attrs == {"units": "1", "periodic": 0}


@pytest.mark.parametrize(
    ("path", "rule", "train", "test"),
    [
        (SHALLOW, None, range(22), range(22, 25)),
        (SHALLOW, "last", range(22), range(22, 25)),
        (SHALLOW, "first", range(2, 25), range(2)),
        (DIFF_SORP, None, range(9), range(9, 10)),
        (ADVECTION, None, range(2, 20), range(2)),
        (ADVECTION, "last", range(18), range(18, 20)),
    ],
)
def test_both_published_rules_split_one_file(path, rule, train, test):
    whole = physml.open_dataset(path)
    for split, expected in (("train", train), ("test", test)):
        ds = physml.open_dataset(path, split=split, split_rule=rule)
        assert ds.identical(whole.isel(trajectory=list(expected)))


def test_labels_of_array_files():
    ds = physml.open_dataset(CFD2)
    for name in (*CFD_FIELDS, "Vy"):
        assert ds[name].dims == ("trajectory", "time", "x", "y")
        assert ds[name].attrs["units"] == "1"
    assert [float(ds[name][3]) for name in ("eta", "zeta", "M")] == [0.01, 0.01, 0.1]
    assert ds.attrs["eta"] == 0.01
    assert_allclose(ds.time, [0, 0.05, 0.1, 0.15, 0.2], rtol=1e-6)  # the sixth time is the end of the last interval
    assert (ds.x.attrs["periodic"], ds.y.attrs["periodic"]) == (1, 1)
    assert (ds.x.attrs["period"], ds.y.attrs["period"]) == (1.0, 1.0)
    assert_allclose(ds.y, (np.arange(12) + 0.5) / 12, rtol=1e-6)
    assert ds.attrs["boundary_conditions"] == "periodic"
    assert ds.attrs["format"] == "pdebench"
    titles = {path: physml.open_dataset(path).attrs["title"].removeprefix("PDEBench, ") for path in FILES}
    assert list(titles.values()) == [
        "advection", "Burgers", "reaction-diffusion", "compressible Navier-Stokes in 1D",
        "compressible Navier-Stokes in 2D", "Darcy flow", "shallow water", "diffusion-reaction", "diffusion-sorption",
        "incompressible Navier-Stokes",
    ]  # fmt: skip


def test_labels_of_group_files():
    ds = physml.open_dataset(SHALLOW)
    assert ds.data.dims == ("trajectory", "time", "x", "y")
    assert_allclose(ds.x[[0, -1]], [-2.1875, 2.1875])
    assert ds.x.attrs == ds.y.attrs == {"units": "1", "periodic": 0}
    with h5py.File(SHALLOW) as file:
        assert_array_equal(ds.data[24], file["0024/data"][..., 0])
    ds = physml.open_dataset(DIFF_REACT)
    with h5py.File(DIFF_REACT) as file:
        assert_array_equal(ds.data_1[7, :, 2:9:3], file["0007/data"][:, 2:9:3, :, 1])
    assert physml.open_dataset(DIFF_SORP).data.dims == ("trajectory", "time", "x")


def test_incompressible_flow():
    ds = physml.open_dataset(INCOMPRESSIBLE)
    with h5py.File(INCOMPRESSIBLE) as file:
        for i, axis in enumerate("xy"):
            assert_array_equal(ds[f"velocity_{axis}"], file["velocity"][..., i])
            assert_array_equal(ds[f"force_{axis}"], file["force"][..., i])
        assert_array_equal(ds.particles, file["particles"][..., 0])
        assert_array_equal(ds.time, file["t"][0])
    assert ds.force_x.dims == ("trajectory", "x", "y")
    assert_allclose(ds.x, (np.arange(16) + 0.5) / 16)
    assert ds.attrs["latestIndex"] == 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_opening_reads_no_field(path, monkeypatch):
    ds = pdebench.open_dataset(Place(path), split="train")
    fields = [v for name, v in ds.variables.items() if v.ndim > 2]
    assert fields
    assert not any(isinstance(v._data, np.ndarray) for v in fields)


def test_the_third_dimension_and_double_precision(tmp_path):
    path = tmp_path / "3D_CFD_Rand_M1.0_Eta1e-08_Zeta1e-08_periodic_Train.hdf5"
    values = np.random.default_rng(0).normal(size=(3, 2, 4, 5, 6))
    with h5py.File(path, "w") as file:
        for name in ("density", "pressure", "Vx", "Vy", "Vz"):
            file[name] = values
        for axis, n in zip("xyz", (4, 5, 6), strict=True):
            file[f"{axis}-coordinate"] = (np.arange(n) + 0.5) / n
        file["t-coordinate"] = [0.0, 0.05, 0.1]
        file["unknown"] = [1, 2, 3]
        file.attrs["author"] = "made up"
    assert recognize(path) == "pdebench"
    ds = physml.open_dataset(path)
    assert ds.Vz.dims == ("trajectory", "time", "x", "y", "z")
    assert ds.Vz.dtype == np.float64
    assert_array_equal(ds.density, values)
    assert "eta" not in ds  # coefficients are optional
    assert "author" not in ds.attrs  # text is not read


def test_recognition(tmp_path, make):
    for path in FILES:
        assert recognize(path) == "pdebench"
    others = [
        p for p in SAMPLES.rglob("*") if p.suffix in (".nc", ".h5", ".hdf5", ".npy", ".json") and ROOT not in p.parents
    ]
    assert len(others) > 20
    assert not any(pdebench.recognizes(Place(path)) for path in others if path.suffix in (".nc", ".h5", ".hdf5"))
    assert not any(recognize(path) == "pdebench" for path in others)
    for engine in ("netcdf4", "h5netcdf", "scipy"):
        ds = make.waves().rename(u="velocity", a="particles")
        ds["t"] = ("time", np.arange(7.0))
        ds.to_netcdf(tmp_path / f"{engine}.nc", engine=engine)
        assert recognize(tmp_path / f"{engine}.nc") is None
    assert not pdebench.recognizes(Place(ROOT))
    shutil.copy(SHALLOW, tmp_path / "shallow.hdf5")  # the content decides, not the suffix
    assert "data" in physml.open_dataset(tmp_path / "shallow.hdf5")


def test_remote_files():
    memory = fsspec.filesystem("memory")
    memory.put(str(DIFF_REACT), "/bench/2D_diff-react_NA_NA.h5")
    try:
        path = "memory://bench/2D_diff-react_NA_NA.h5"
        assert recognize(path) == "pdebench"
        remote = physml.open_dataset(path, split="test").compute(scheduler="synchronous")
        assert remote.identical(physml.open_dataset(DIFF_REACT, split="test").compute())
    finally:
        memory.rm("/bench", recursive=True)


def test_training_reads_windows():
    config = DataConfig(
        path=str(CFD2), split_by="format", train=("train",), valid=(), test=("test",), parameters=("eta", "M")
    )
    splits = config.open()
    assert [len(s.lengths) for s in splits.values()] == [9, 1]
    assert splits["train"].spec.names == (*CFD_FIELDS, "Vy")
    assert all(axis.periodic for axis in splits["train"].spec.grid.axes)
    assert splits["train"].spec.time_step == 0.05
    window = splits["train"].read(2, range(1, 4))
    with h5py.File(CFD2) as file:
        assert_array_equal(window.frames[..., 1], file["pressure"][3, 1:4])
    assert_allclose(window.parameters, [0.01, 0.1])
    groups = DataConfig(path=str(SHALLOW), split_by="format", train=("train",), valid=(), test=("test",)).open()
    with h5py.File(SHALLOW) as file:
        assert_array_equal(groups["test"].read(1, range(2)).frames[..., 0], file["0023/data"][:2, ..., 0])
    darcy = DataConfig(path=str(DARCY), variables=("tensor",), static=("nu",), valid=(), options={}).open()["train"]
    assert darcy.read(0, range(1)).static.shape == (16, 16, 1)
    options = {"split_rule": "last"}
    last = DataConfig(path=str(BURGERS), split_by="format", train=("train",), valid=(), test=("test",), options=options)
    with h5py.File(BURGERS) as file:
        assert_array_equal(last.open()["test"].read(0, range(3)).frames[..., 0], file["tensor"][18, :3])
    flow = DataConfig(
        path=str(INCOMPRESSIBLE), static=("force_x", "force_y"), train=(0, 1), valid=(1, 2), test=()
    ).open()
    assert flow["valid"].spec.names == ("velocity_x", "velocity_y", "particles")
    assert flow["valid"].read(0, range(2)).static.shape == (16, 16, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "no split 'valid'"),
        ({"split": "test", "split_rule": "middle"}, "no split_rule 'middle'"),
        ({"rule": "first"}, "no option 'rule'"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ConfigError, match=message):
        physml.open_dataset(ADVECTION, **options)


def test_a_split_that_would_be_empty():
    with pytest.raises(DataError, match="split 'test' of 2 trajectories is empty"):
        physml.open_dataset(INCOMPRESSIBLE, split="test")


def deleted(key: str):
    return lambda file: file.__delitem__(key)


def external(key: str):
    def apply(file):
        del file[key]
        file[key] = h5py.ExternalLink(str(BURGERS), "tensor")

    return apply


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (ADVECTION, deleted("x-coordinate"), "no layout of PDEBench"),
        (ADVECTION, deleted("t-coordinate"), "has no 't-coordinate'"),
        (ADVECTION, replaced("t-coordinate", lambda t: t[:5]), r"'t-coordinate' has shape \(5,\) for 11 frames"),
        (ADVECTION, replaced("x-coordinate", lambda x: x[:5]), r"'x-coordinate' has shape \(5,\)"),
        (ADVECTION, replaced("tensor", lambda u: u[0]), r"'tensor' has shape \(11, 32\)"),
        (ADVECTION, replaced("tensor", lambda u: u[:0]), "'tensor' is empty"),
        (ADVECTION, replaced("tensor", lambda u: np.array([b"text"])), "not plain numbers"),
        (ADVECTION, external("tensor"), "'tensor' is a link, which is not followed"),
        (CFD2, deleted("Vy"), "no 'Vy'"),
        (CFD1, deleted("pressure"), "no 'pressure'"),
        (CFD1, replaced("Vx", lambda u: u[:7]), "'Vx' has 7 entries along 'trajectory', but other fields have 20"),
        (DARCY, replaced("nu", lambda u: u[:, :, :4]), "'nu' has 4 entries along 'y'"),
        (DARCY, replaced("tensor", lambda u: np.repeat(u, 3, 1)), "no 't-coordinate', but 3 frames"),
        (SHALLOW, deleted("0000/data"), "no layout of PDEBench"),
        (SHALLOW, deleted("0000/grid/t"), "has no '0000/grid/t'"),
        (SHALLOW, deleted("0000/grid/y"), "'0000/data' has shape"),
        (SHALLOW, external("0000/data"), "'0000/data' is a link"),
        (SHALLOW, replaced("0000/grid/t", lambda t: t[:2]), r"has shape \(2,\) for 4 frames"),
        (INCOMPRESSIBLE, replaced("t", lambda t: t + np.arange(2)[:, None]), "same times"),
        (INCOMPRESSIBLE, replaced("t", lambda t: t[0]), r"'t' has shape \(5,\)"),
        (INCOMPRESSIBLE, replaced("velocity", lambda u: u[..., :1]), "last axis should be 2"),
        (INCOMPRESSIBLE, replaced("force", lambda u: u[:1]), "'force_x' has 1 entries along 'trajectory'"),
    ],
)
def test_what_is_wrong_is_named(edited, path, change, message):
    copy = edited(path, change)
    with pytest.raises(DataError, match=message) as error:
        physml.open_dataset(copy, format="pdebench")
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("0007/data", lambda u: u[:2]), r"'0007' has shape \(2, 8, 8, 1\), but '0000' has \(4, 8, 8, 1\)"),
        (deleted("0007/data"), "has no '0007/data'"),
        (external("0007"), "'0007/data' is a link"),
    ],
)
def test_groups_are_checked_when_they_are_read(edited, change, message):
    ds = physml.open_dataset(edited(SHALLOW, change))
    assert ds.data[6].values.shape == (4, 8, 8)
    with pytest.raises(DataError, match=message):
        ds.data[7].load()


def test_what_is_optional_and_what_is_too_much(edited):
    def change(file):
        del file["0000"].attrs["config"]
        file["readme"] = [1.0]
        file["0000/extra"] = [1.0]

    assert "config" not in physml.open_dataset(edited(SHALLOW, change)).attrs
    other = edited(ADVECTION, lambda file: file.attrs.update(beta="0.4", more=2, pair=[1.0, 2.0]))
    assert physml.open_dataset(other).attrs["more"] == 2
    assert not {"beta", "pair"} & {*physml.open_dataset(other).attrs, *physml.open_dataset(other)}
    with_nan = edited(ADVECTION, replaced("tensor", lambda u: np.where(u > 0.5, np.nan, u)))
    assert np.isnan(physml.open_dataset(with_nan).tensor).any()
    for name in ("particles", "force"):
        assert "velocity_x" in physml.open_dataset(edited(INCOMPRESSIBLE, deleted(name)))


def test_files_that_are_no_hdf5(tmp_path):
    for content, message in ((b"", "is empty"), (b"abc", "neither netCDF nor zarr"), (b"CDF\x01abc", "is not an HDF5")):
        (tmp_path / "a.hdf5").write_bytes(content)
        with pytest.raises(DataError, match=message):
            physml.open_dataset(tmp_path / "a.hdf5", format="pdebench")
    (tmp_path / "a.hdf5").write_bytes(SHALLOW.read_bytes()[:5000])
    with pytest.raises(DataError, match="damaged or incomplete"):
        physml.open_dataset(tmp_path / "a.hdf5", format="pdebench")


def test_a_thousand_groups_open(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i in range(1000):
            file[f"{i:04}/data"] = np.full((3, 4, 4, 1), i, "f4")
            for axis, n in zip("txy", (3, 4, 4), strict=True):
                file[f"{i:04}/grid/{axis}"] = np.arange(n)[:n] * 1.0
    ds = physml.open_dataset(tmp_path / "a.h5")
    assert_array_equal(ds.data[:, 2, 3, 3], np.arange(1000))


def test_damaged_text_is_no_hang(tmp_path):
    """Zeros in the heap of texts: the HDF5 library would loop for ever."""
    content = bytearray(DIFF_SORP.read_bytes())
    at = content.index(b"sim:")
    content[at - 8 : at + 52] = bytes(60)
    (tmp_path / DIFF_SORP.name).write_bytes(content)
    with pytest.raises(DataError, match="heap is overwritten"):
        physml.open_dataset(tmp_path / DIFF_SORP.name, format="pdebench")


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    outcomes = set()
    for seed in seeds:
        source = FILES[seed % len(FILES)]
        copy = damage(source, tmp_path / "x" / source.name, seed)
        outcomes.add(survives(copy, "pdebench"))
    assert outcomes == {"opened", "DataError"}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_one_set(tmp_path):
    """Parts of the incompressible set; every trajectory is that of its file, and splits are those of the files."""
    for number in range(3):
        shutil.copy(INCOMPRESSIBLE, tmp_path / f"ns_incom_inhom_2d_512-{number}.h5")
        with h5py.File(tmp_path / f"ns_incom_inhom_2d_512-{number}.h5", "a") as file:
            file["particles"][...] = file["particles"][()] + number
    (tmp_path / "notes.txt").write_text("no data")
    assert recognize(tmp_path) == "pdebench"
    one, whole = physml.open_dataset(INCOMPRESSIBLE), physml.open_dataset(tmp_path)
    count = one.sizes["trajectory"]
    assert whole.sizes == {**one.sizes, "trajectory": 3 * count}
    assert whole.attrs["title"] == one.attrs["title"]
    assert_array_equal(whole["time"], one["time"])
    for i in range(3 * count):
        assert_array_equal(whole["particles"][i], one["particles"][i % count] + i // count)
        assert_array_equal(whole["velocity_y"][i], one["velocity_y"][i % count])


def test_several_coefficients_are_parameters(tmp_path):
    for speed in (0.1, 0.4):
        shutil.copy(ADVECTION, tmp_path / f"1D_Advection_Sols_beta{speed}.hdf5")
        with h5py.File(tmp_path / f"1D_Advection_Sols_beta{speed}.hdf5", "a") as file:
            file.attrs["beta"] = speed
    ds = physml.open_dataset(tmp_path)
    count = ds.sizes["trajectory"] // 2
    assert_allclose(ds["beta"], np.repeat([0.1, 0.4], count))
    assert "beta" not in ds.attrs
    parts = DataConfig(
        str(tmp_path), parameters=("beta",), split_by="format", train=("train",), valid=(), test=("test",)
    ).open()
    single = physml.open_dataset(ADVECTION, split="test").sizes["trajectory"]
    assert len(parts["test"].lengths) == 2 * single
    assert parts["train"].read(0, range(2)).parameters == pytest.approx([0.1])


def test_folders_that_are_no_set_are_named(tmp_path, edited):
    with pytest.raises(DataError, match=r"no .hdf5 or .h5 file"):
        pdebench.open_dataset(Place(tmp_path))
    shutil.copy(ADVECTION, tmp_path / "a.hdf5")
    shutil.copy(CFD1, tmp_path / "b.hdf5")
    with pytest.raises(DataError, match=r"b.hdf5 holds density.*a.hdf5 holds tensor.*folder of its own"):
        physml.open_dataset(tmp_path)
    (tmp_path / "b.hdf5").unlink()
    edited(ADVECTION, replaced("x-coordinate", lambda x: x + 1)).rename(tmp_path / "b.hdf5")
    with pytest.raises(DataError, match=r"b.hdf5 has other positions 'x' than .*a.hdf5"):
        physml.open_dataset(tmp_path)
