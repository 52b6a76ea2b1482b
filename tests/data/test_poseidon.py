import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, poseidon
from physml.data.formats import recognize
from physml.data.place import Place
from physml.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples"
FILES = sorted((SAMPLES / "poseidon").iterdir())
NAMES = [file.stem for file in FILES]
RHO = 0.645161  # (1 - 0.80) / 0.31


def sample(name):
    return next(file for file in FILES if file.stem == name)


def field(trajectory=0, time=0, channel=0):
    """The field of the samples: coarse points of 1/32, each repeated on 4 x 4 points; rounded to 1/32."""
    x, y = np.arange(32)[:, None] / 32, np.arange(32)[None] / 32
    values = np.sin(2 * np.pi * (x + channel / 8 + trajectory / 16)) * np.cos(2 * np.pi * y) + 0.1 * time
    return np.kron(np.round(values * 32) / 32, np.ones((4, 4)))


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    return path


def small(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def open_set(path, **options):
    return poseidon.open_dataset(Place(path), **options)


@pytest.mark.parametrize(
    ("name", "channels", "first", "second"),
    [
        ("NS-Sines", "rho u v p", [RHO, 0.719309, 1.843399, 0], [RHO, 2.237852, 3.511236, 0]),
        ("NS-PwC", "rho u v p", [RHO, 0.719309, 1.843399, 0], [RHO, 2.237852, 3.511236, 0]),
        (
            "NS-Tracer-PwC", "rho u v p tracer",
            [RHO, 0.719309, 1.843399, 0, 1.244292], [RHO, 2.237852, 3.511236, 0, 2.849022],
        ),
        ("FNS-KF", "rho u v p forcing", [RHO, 1.277403, 2.972382, 0, 1.357375], None),
        ("CE-RP", "rho u v p", [1.552419, 1.678389, 1.843399, 5.763513], [3.467742, 3.196931, 3.511236, 8.972973]),
        ("GCE-RT", "rho u v p g", [-4.789292, 44.052567, 44.052567, -2.029372, 2.614736], None),
        ("Wave-Layer", "u c", [2.361287, -0.726162], [8.047229, -0.726162]),
        ("ACE", "u", [0.426566], [1.335119]),
    ],
)  # fmt: skip
def test_item_three_is_that_of_the_authors(name, channels, first, second):
    """Values that the authors' loaders gave for these files, at point (9, 17)."""
    frames, leads = poseidon.pairs(name)
    assert frames[3].tolist() == ([0, 3] if name == "GCE-RT" else [0, 6])
    assert_allclose(leads[3], {"GCE-RT": 0.3, "ACE": 0.315789}.get(name, 0.3), atol=1e-6)
    ds = open_set(sample(name.replace("Tracer-", "")), set=name, normalize=True)
    assert list(ds.data_vars) == channels.split() == ds.attrs["inputs"] == ds.attrs["outputs"]
    point = ds.isel(trajectory=0, time=frames[3], x=9, y=17)
    values = np.stack([np.broadcast_to(point[c], 2) for c in ds.data_vars], -1)
    assert_allclose(values[0], first, rtol=2e-6, atol=1e-6)
    if second is not None:
        assert_allclose(values[1], second, rtol=2e-6, atol=1e-6)


def test_item_one_of_steady_sets_is_that_of_the_authors():
    airfoil = open_set(sample("SE-AF"), normalize=True).isel(trajectory=1)
    assert (airfoil.attrs["inputs"], airfoil.attrs["outputs"]) == (["airfoil"], ["rho"])
    inside = airfoil.airfoil.values == 1
    assert inside.sum() == 2848
    assert_array_equal(airfoil.mask, ~inside)
    assert_array_equal(airfoil.rho.values[inside], 1)
    raw = open_set(sample("SE-AF")).rho.isel(trajectory=1).values
    assert_allclose(airfoil.rho.values[~inside], (raw[~inside] - 0.92984116) / 0.10864315, rtol=1e-5, atol=1e-6)

    poisson = open_set(sample("Poisson-Gauss"), normalize=True).isel(trajectory=1, x=9, y=17)
    assert (poisson.attrs["inputs"], poisson.attrs["outputs"]) == (["source"], ["u"])
    assert_allclose([poisson.source, poisson.u], [0.102032, 11.68943], rtol=5e-6)

    helmholtz = open_set(sample("Helmholtz"), normalize=True)
    assert (helmholtz.attrs["inputs"], helmholtz.attrs["outputs"]) == (["a", "bc"], ["u"])
    assert helmholtz.bc.shape == (2, 128, 128)
    at = helmholtz.isel(trajectory=1, x=9, y=17)
    assert_allclose([at.a, at.bc, at.u], [0.5, 0.6, 0.72888], rtol=1e-5)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_fields_are_read_unchanged_and_lazily(file):
    ds = open_set(file)
    order = ["trajectory", "time", "x", "y"]
    for name, variable in ds.data_vars.items():
        assert name == "forcing" or not isinstance(variable.variable._data, np.ndarray)
        assert list(variable.dims) == [d for d in order if d in variable.dims]
    for name, variable in poseidon.normalized(ds).data_vars.items():
        assert not isinstance(variable.variable._data, np.ndarray)
        assert name == "mask" or variable.dtype == np.float32
        assert name == "mask" or variable.attrs["in_loss"] == (name != "p" or "p" in ds)
    assert ds.attrs["set"] == file.stem
    assert file.stem in ds.attrs["title"]
    assert recognize(file) == "poseidon"


def test_names_follow_the_channels_of_the_files():
    assert_array_equal(open_set(sample("CE-RP")).tracer.isel(trajectory=0, time=4), field(0, 4, 4).astype("f4"))
    rt = open_set(sample("GCE-RT"))
    assert list(rt.data_vars) == ["rho", "u", "v", "p", "g"]
    with h5py.File(sample("GCE-RT")) as file:
        assert_array_equal(rt.g, file["solution"][:, :, 5])
    assert_array_equal(open_set(sample("NS-PwC")).v.isel(trajectory=0, time=7), field(0, 7, 1).astype("f4"))
    helmholtz = open_set(sample("Helmholtz"))
    assert_allclose(helmholtz.bc, [0.5, 0.6])
    assert helmholtz.bc.dims == ("trajectory",)
    assert_array_equal(helmholtz.a.isel(trajectory=1), 1 + field(1))
    assert_array_equal(helmholtz.u.isel(trajectory=[1, 0], x=[9, 3], y=slice(2, 5))[1], field(2)[[9, 3], 2:5])
    kolmogorov = open_set(sample("FNS-KF")).forcing
    assert (kolmogorov.dims, kolmogorov.dtype) == (("x", "y"), np.float32)
    assert_allclose(kolmogorov[[0, -1], [0, -1]], 0, atol=1e-7)  # both ends are points of the grid


def test_coordinates():
    ns = open_set(sample("NS-Sines"))
    assert_allclose(ns.x, (np.arange(128) + 0.5) / 128)
    assert (ns.y.attrs["units"], ns.y.attrs["periodic"], ns.y.attrs["period"]) == ("1", 1, 1.0)
    assert_allclose(ns.time, np.arange(21) / 20)
    assert_allclose(open_set(sample("GCE-RT")).time, np.arange(11) / 10)
    assert open_set(sample("ACE")).x.attrs["periodic"] == 0
    assert "time" not in open_set(sample("SE-AF")).variables


def test_ns_sl_is_turned(tmp_path):
    stored = small((2, 3, 2, 6, 5))
    ds = open_set(write(tmp_path / "NS-SL.nc", velocity=stored))
    assert ds.u.dims == ("trajectory", "time", "x", "y")
    assert_array_equal(ds.u, stored[:, :, 0].swapaxes(-1, -2))
    assert_array_equal(ds.v[1, 2, 4, 3], stored[1, 2, 1, 3, 4])
    assert_array_equal(ds.v.isel(x=[4, 1], y=2, time=slice(1, None))[0], stored[0, 1:, 1, 2, [4, 1]].T)
    normal = poseidon.normalized(ds)
    assert_allclose(normal.v, stored[:, :, 1].swapaxes(-1, -2) / 0.356, rtol=1e-6)
    assert_allclose(physml.open_dataset(tmp_path / "NS-SL.nc").u, ds.u)


def test_pairs():
    frames, leads = poseidon.pairs("NS-Sines")
    assert len(frames) == 36
    assert (frames[:, 0] <= frames[:, 1]).all()
    assert (frames.max(), len(np.unique(frames, axis=0)), (frames % 2).max()) == (14, 36, 0)
    assert_allclose(leads, (frames[:, 1] - frames[:, 0]) / 20)
    assert frames[:9].tolist() == [[0, 2 * j] for j in range(8)] + [[2, 2]]
    last = {"NS-Sines": 20, "ACE": 18, "GCE-RT": 10, "Wave-Gauss": 14, "Wave-Layer": 20}
    assert {name: poseidon.pairs(name, longest=True)[0].max() for name in last} == last
    assert len(poseidon.pairs("CE-RP", longest=True)[0]) == 66  # of 11 snapshots
    assert poseidon.pairs("GCE-RT")[0].max() == 7
    assert poseidon.pairs("Wave-Gauss")[1].max() == 14 / 15
    with pytest.raises(ConfigError, match="SE-AF is steady"):
        poseidon.pairs("SE-AF")
    with pytest.raises(ConfigError, match="no set 'NS-Sine'. Did you mean 'NS-Sines'"):
        poseidon.pairs("NS-Sine")


def test_the_table_is_complete():
    assert len(poseidon.SETS) == 21
    assert set(poseidon.PRETRAINING) == {"NS-Sines", "NS-Gauss", "CE-RP", "CE-CRP", "CE-KH", "CE-Gauss"}
    assert set(poseidon.DOWNSTREAM) == {
        "NS-PwC", "NS-SVS", "NS-BB", "NS-SL", "NS-Tracer-PwC", "FNS-KF", "CE-RPUI", "CE-RM", "GCE-RT", "Wave-Layer",
        "Wave-Gauss", "ACE", "SE-AF", "Poisson-Gauss", "Helmholtz",
    }  # fmt: skip
    # 77 840 trajectories of pretraining: 4 x 9640 and 2 x 19640
    train = [total - valid - test for total, valid, test in (poseidon.SETS[n].sizes for n in poseidon.PRETRAINING)]
    assert sum(train) == 77840
    assert poseidon.SETS["NS-SL"].sizes[0] == 40000
    offsets = {n: poseidon.SETS[f"CE-{n}"].channels["p"][0] for n in ("Gauss", "KH", "RP", "CRP", "RPUI")}
    assert offsets == {"Gauss": 2.513, "KH": 1.0, "RP": 0.215, "CRP": 0.553, "RPUI": 1.33}


def test_splits_go_by_position(tmp_path):
    path = write(tmp_path / "CE-RM.nc", solution=small((1260, 2, 4, 1, 1)))
    whole = open_set(path).rho.values
    parts = [open_set(path, split=s).rho.values for s in ("train", "valid", "test")]
    assert [len(p) for p in parts] == [1030, 100, 130]
    assert_array_equal(np.concatenate(parts), whole)
    config = DataConfig(str(path), split_by="format", train=("train",), valid=("valid",), test=("test",))
    splits = config.open()
    assert [len(s.lengths) for s in splits.values()] == [1030, 100, 130]
    assert_array_equal(splits["valid"].read(0, range(2)).frames[..., 0], whole[1030])


def test_a_part_of_a_set_only_has_training_data():
    assert_array_equal(open_set(sample("CE-RP"), split="train").rho, open_set(sample("CE-RP")).rho)
    for split, bounds in (("valid", "9640..9759"), ("test", "9760..9999")):
        with pytest.raises(DataError, match=f"CE-RP.nc holds 1 of the 10000 trajectories of CE-RP.*{bounds}"):
            open_set(sample("CE-RP"), split=split)
    with pytest.raises(ConfigError, match="no split 'vald'. Did you mean 'valid'"):
        open_set(sample("CE-RP"), split="vald")


def test_training_reads_windows_and_the_mask():
    config = DataConfig(str(sample("NS-PwC")), split_by="format", train=("train",), valid=(), test=())
    dataset = config.open()["train"]
    assert (dataset.lengths, dataset.spec.names, dataset.spec.time_step) == ((21,), ("u", "v", "tracer"), 0.05)
    assert [axis.periodic for axis in dataset.spec.grid.axes] == [True, True]
    assert_allclose(dataset.read(0, range(3, 5)).frames[1, 9, 17, 0], field(0, 4)[9, 17], rtol=1e-6)
    config = DataConfig(
        str(sample("Wave-Layer")), variables=("u",), static=("c",), split_by="format", train=("train",), valid=(),
        test=(), options={"normalize": True},
    )  # fmt: skip
    window = config.open()["train"].read(0, range(2))
    assert_allclose(window.static[9, 17], [-0.726162], rtol=1e-5)
    config = DataConfig(
        str(sample("SE-AF")), variables=("rho",), static=("airfoil",), mask="mask", split_by="format",
        train=("train",), valid=(), test=(),
    )  # fmt: skip
    assert (config.open()["train"].read(1, range(1)).mask == 0).sum() == 2848
    config = DataConfig(
        str(sample("Helmholtz")), variables=("u",), static=("a",), parameters=("bc",), split_by="format",
        train=("train",), valid=(), test=(),
    )  # fmt: skip
    assert_allclose(config.open()["train"].read(1, range(1)).parameters, [0.6], rtol=1e-6)


def test_normalizing_a_selection_and_dask():
    ds = physml.open_dataset(sample("NS-PwC"), set="NS-Tracer-PwC")
    assert ds.u.chunks
    part = poseidon.normalized(ds.isel(time=[0, 6], x=slice(9, 10)))
    assert part.rho.shape == (1, 2, 1, 128)
    assert_allclose(part.tracer[0, :, 0, 17], [1.244292, 2.849022], rtol=2e-6)
    assert_allclose(part.p, 0)
    with pytest.raises(DataError, match="needs 'tracer'"):
        poseidon.normalized(ds.drop_vars("tracer"))
    with pytest.raises(DataError, match="no data set of Poseidon"):
        poseidon.normalized(xr.Dataset())


def test_a_folder_holds_one_set_or_the_one_asked_for(tmp_path):
    with pytest.raises(DataError, match="holds the sets ACE, CE-RP, .* Choose one"):
        open_set(SAMPLES / "poseidon")
    assert open_set(SAMPLES / "poseidon", set="ACE").attrs["set"] == "ACE"
    assert recognize(SAMPLES / "poseidon") == "poseidon"
    with pytest.raises(DataError, match="CE-KH.nc"):
        open_set(SAMPLES / "poseidon", set="CE-KH")
    with pytest.raises(ConfigError, match="no set 'CE-XX'"):
        open_set(SAMPLES / "poseidon", set="CE-XX")
    with pytest.raises(DataError, match="Assemble the parts"):
        open_set(tmp_path)
    shutil.copy(sample("ACE"), tmp_path / "ACE.nc")
    (tmp_path / "README.md").write_text("parts")
    assert physml.open_dataset(tmp_path).attrs["set"] == "ACE"


def test_a_file_of_another_name_needs_its_set(tmp_path):
    path = tmp_path / "renamed.nc"
    shutil.copy(sample("CE-RP"), path)
    assert recognize(path) is None
    with pytest.raises(DataError, match="name of no set"):
        open_set(path)
    assert "tracer" in physml.open_dataset(path, format="poseidon", set="CE-RP")


def test_other_data_are_not_claimed(tmp_path):
    for folder in SAMPLES.iterdir():
        if folder.name != "poseidon":
            assert not any(poseidon.recognizes(Place(p)) for p in [folder, *folder.rglob("*")][:60])
    xr.Dataset({"u": (("x",), np.zeros(3))}).to_netcdf(tmp_path / "ACE.nc")
    assert recognize(tmp_path / "ACE.nc") is None
    (tmp_path / "NS-BB.nc").write_bytes(b"no")
    assert recognize(tmp_path / "NS-BB.nc") is None
    assert recognize(tmp_path) is None


def test_a_url():
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/poseidon/NS-Sines.nc", sample("NS-Sines").read_bytes())
    for url in ("memory://poseidon/NS-Sines.nc", "memory://poseidon"):
        ds = physml.open_dataset(url)
        assert_array_equal(ds.u.isel(trajectory=0, time=2), field(0, 2).astype("f4"))
    system.rm("/poseidon", recursive=True)


def test_double_precision_nan_and_unknown_keys(tmp_path):
    values = small((2, 3, 5, 4, 4)).astype("f8")
    values[0, 0, 0, 1, 1] = np.nan
    ds = open_set(write(tmp_path / "CE-KH.nc", data=values, extra=np.zeros(3)))
    assert ds.rho.dtype == np.float64
    assert_array_equal(ds.rho, values[:, :, 0])
    normal = poseidon.normalized(ds)
    assert normal.p.dtype == np.float32
    assert_allclose(normal.p, (values[:, :, 3] - 1.0) / 0.185, rtol=1e-4, atol=1e-5)  # float32, numbers near 10
    assert "tracer" not in open_set(write(tmp_path / "CE-RP.nc", data=values[:, :, :4]))


def test_groups_that_are_no_samples_are_ignored(tmp_path):
    path = tmp_path / "Helmholtz.h5"
    shutil.copy(sample("Helmholtz"), path)
    with h5py.File(path, "a") as file:
        file.create_group("Sample_notes")
        file["about"] = 1
    assert open_set(path).sizes["trajectory"] == 2


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("NS-BB", {"solution": np.zeros((1, 2, 2, 4, 4))}, "no 'velocity'"),
        ("NS-BB", {"velocity": np.zeros((1, 2, 1, 4, 4))}, "has 1 channels, but 'v' is number 1"),
        ("NS-BB", {"velocity": np.zeros((2, 2, 4, 4))}, r"'velocity' has shape \(2, 2, 4, 4\)"),
        ("NS-BB", {"velocity": np.zeros((0, 2, 2, 4, 4))}, "is empty"),
        ("NS-BB", {"velocity": np.array([b"text"])}, "not plain numbers"),
        ("NS-Tracer-PwC", {"velocity": np.zeros((1, 2, 2, 4, 4))}, "'tracer' is number 2"),
        ("GCE-RT", {"solution": np.zeros((1, 2, 5, 4, 4))}, "'g' is number 5"),
        ("Wave-Layer", {"solution": np.zeros((2, 2, 4, 4)), "c": np.zeros((3, 4, 4))}, "'c' has 3 entries along 'traj"),
        ("Wave-Layer", {"solution": np.zeros((2, 2, 4, 4))}, "no 'c'"),
        ("Poisson-Gauss", {"source": np.zeros((2, 4, 4)), "solution": np.zeros((2, 4, 5))}, "5 entries along 'y'"),
        ("ACE", {"solution": np.zeros((1, 2, 1, 5000))}, "5000 entries"),
    ],
)
def test_other_layouts_are_refused(tmp_path, name, arrays, message):
    path = write(tmp_path / poseidon._file(name), **arrays)
    with pytest.raises(DataError, match=message) as error:
        open_set(path, set=name)
    assert str(path) in str(error.value)


def test_damaged_helmholtz_is_refused(tmp_path):
    path = tmp_path / "Helmholtz.h5"
    shutil.copy(sample("Helmholtz"), path)
    with h5py.File(path, "a") as file:
        del file["Sample_1/u"]
        file["Sample_1/u"] = np.zeros((3, 3))
        del file["Sample_1/bc"]
        file["Sample_1/bc"] = h5py.ExternalLink("other.h5", "bc")
    ds = open_set(path)
    with pytest.raises(DataError, match=r"Sample_1/u' has shape \(3, 3\)"):
        ds.u.isel(trajectory=1).load()
    with pytest.raises(DataError, match="is a link"):
        ds.bc.load()
    gap = tmp_path / "gap.h5"
    shutil.copy(path, gap)
    with h5py.File(gap, "a") as file:
        file.move("Sample_1", "Sample_2")
    with pytest.raises(DataError, match="no Sample_1"):
        open_set(gap, set="Helmholtz")
    with pytest.raises(DataError, match="0 groups"):
        open_set(write(tmp_path / "none.h5", other=np.zeros(3)), set="Helmholtz")


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(DataError, match="no file"):
        open_set(tmp_path / "ACE.nc")
    (tmp_path / "ACE.nc").write_bytes(sample("ACE").read_bytes()[:10000])
    with pytest.raises(DataError, match="damaged or incomplete"):
        open_set(tmp_path / "ACE.nc")


SMALL = [sample(name) for name in ("ACE", "Helmholtz", "SE-AF", "Poisson-Gauss")]


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    outcomes = set()
    for seed in seeds:
        file = SMALL[seed % len(SMALL)]
        outcomes.add(survives(damage(file, tmp_path / file.name, seed), "poseidon", normalize=seed % 3 == 0))
    assert outcomes == {"opened", "DataError"}
