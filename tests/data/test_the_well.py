import contextlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, hdf5, the_well
from physml.data.formats import recognize
from physml.data.place import Place
from physml.data.sampling import Samples
from physml.errors import DataError, PhysmlError

SAMPLES = Path(__file__).parent / "samples"
SHEAR = SAMPLES / "the_well" / "shear_flow"
CHANNELS = ("tracer", "pressure", "velocity_x", "velocity_y", "strain_xx", "strain_xy", "strain_yx", "strain_yy")
FIRST = [-0.46194, -0.46194, -0.191342, 0.191342, 0.46194, 0.46194, 0.191342, -0.191342]
SCORED = [-1.347446, -1.347446, -0.835301, -0.111019, 0.401126, 0.401126, -0.111019, -0.835301]


def write(path, *, spatial=("x", "y"), shape=(4, 3), trajectories=2, steps=5, time=None, parameters=None, **attrs):
    """A file with `h = 100 trajectory + 10 step + index of the first axis`, periodic along the first axis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f.attrs.update(dataset_name="made", grid_type="cartesian", n_spatial_dims=len(spatial))
        f.attrs.update(n_trajectories=trajectories, simulation_parameters=list(parameters or {}))
        f.attrs.update({**(parameters or {}), **attrs})
        dims = f.create_group("dimensions")
        dims.attrs["spatial_dims"] = list(spatial)
        dims["time"] = np.arange(steps) * 0.5 if time is None else time
        dims["time"].attrs["sample_varying"] = np.ndim(time) == 2
        for name, size in zip(spatial, shape, strict=True):
            dims[name] = np.arange(size) / size
        for group in ("t0_fields", "t1_fields", "t2_fields", "scalars"):
            f.create_group(group).attrs["field_names"] = []
        index = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        h = 100 * np.arange(trajectories)[:, None] + 10 * np.arange(steps)
        add(f, "t0_fields", "h", h.reshape(trajectories, steps, *[1] * len(shape)) + np.broadcast_to(index, shape))
        boundary(f, "first", [spatial[0]], "PERIODIC", np.eye(shape[0])[0] + np.eye(shape[0])[-1] > 0)
    return path


def add(f, group, name, values, **flags):
    f[group].attrs["field_names"] = [*f[group].attrs["field_names"], name]
    f[group][name] = np.asarray(values, "f4")
    f[group][name].attrs.update(flags)


def boundary(f, name, dims, kind, mask=None):
    group = f.create_group(f"boundary_conditions/{name}")
    group.attrs.update(associated_dims=dims, bc_type=kind, sample_varying=False, time_varying=False)
    if mask is not None:
        group["mask"] = mask


def test_samples_open_as_their_authors_read_them():
    ds = physml.open_dataset(SHEAR, split="train")
    assert dict(ds.sizes) == {"trajectory": 5, "time": 6, "x": 16, "y": 12}
    assert tuple(n for n, v in ds.data_vars.items() if "time" in v.dims) == ("tracer", "pressure", *CHANNELS[2:])
    assert ds.attrs["format"] == "the_well"
    first = [float(ds[name][0, 0, 3, 4]) for name in CHANNELS]
    assert_allclose(first, FIRST, atol=1e-6)
    assert ds.mask_field.dims == ("trajectory", "x", "y")
    assert ds.mask_field[0].shape == (16, 12)
    assert [float(ds.Re[0]), float(ds.Sc[0])] == [1e4, 1.0]
    assert sorted(set(ds.Re.values.tolist())) == [1e4, 5e4]
    assert_allclose(ds.x, np.arange(16) / 16)
    assert ds.x.attrs == {"periodic": 1, "period": pytest.approx(1.0)}
    assert_allclose(ds.time, np.arange(6) * 0.1, atol=1e-6)
    assert_array_equal(the_well.boundaries(Place(SHEAR)), [[2, 2], [2, 2]])
    assert ds.attrs["boundary_conditions"] == "x: PERIODIC; y: PERIODIC"


def test_every_value_of_the_sample_is_the_field_that_was_written():
    ds = physml.open_dataset(SHEAR, split="test")
    t, x, y = np.meshgrid(np.arange(6), np.arange(16) / 16, np.arange(12) / 12, indexing="ij")
    for c, name in enumerate(CHANNELS):
        error = [
            np.abs(ds[name][0] - (np.sin(2 * np.pi * (x + c / 8 + s / 16)) * np.cos(2 * np.pi * y) + 0.1 * t)).max()
            for s in range(8)
        ]
        assert min(error) < 1e-6  # float32


def test_z_scores():
    facts = the_well.statistics(Place(SHEAR))
    assert set(facts) == set(the_well.STATISTICS)
    scores = [
        (value - facts["mean"][name]) / max(facts["std"][name], the_well.SMALLEST_STD)
        for name, value in zip(CHANNELS, FIRST, strict=True)
    ]
    assert_allclose(scores, SCORED, atol=2e-6)
    assert set(facts["std_delta"]) == set(CHANNELS)
    assert set(facts["std"]) == {*CHANNELS, "mask_field"}  # a constant field has no increments


def test_training_reads_as_many_windows_as_the_authors():
    config = DataConfig(
        str(SHEAR), variables=CHANNELS, static=("mask_field",), parameters=("Re", "Sc"), split_by="format",
        train=("train",), valid=("valid",), test=("test",),
    )  # fmt: skip
    splits = config.open()
    assert {name: len(Samples(s.lengths, 3)) for name, s in splits.items()} == {"train": 20, "valid": 4, "test": 4}
    window = splits["train"].read(0, range(3))
    assert window.frames.shape == (3, 16, 12, 8)
    assert_allclose(window.frames[0, 3, 4], FIRST, atol=1e-6)
    assert window.static.shape == (16, 12, 1)
    assert_allclose(window.parameters, [1e4, 1])
    assert [axis.periodic for axis in splits["train"].spec.grid.axes] == [True, True]
    assert splits["train"].spec.time_step == pytest.approx(0.1, rel=1e-5)


def test_places_and_splits():
    assert physml.open_dataset(SHEAR).split.values.tolist() == ["train"] * 5 + ["valid", "test"]
    for place in (SHEAR / "data", SHEAR / "data" / "train"):
        assert physml.open_dataset(place, split="train").sizes["trajectory"] == 5
    file = next((SHEAR / "data" / "test").iterdir())
    assert physml.open_dataset(file).mask_field.dims == ("x", "y")
    with pytest.raises(DataError, match="no split 'validation'. Did you mean 'valid'"):
        physml.open_dataset(SHEAR, split="validation")


def test_opening_reads_no_field(monkeypatch):
    read = hdf5.Array._read

    def watched(array, key):
        assert "boundary_conditions" in array.key, "a field was read"
        return read(array, key)

    monkeypatch.setattr(hdf5.Array, "_read", watched)
    ds = the_well.open_dataset(Place(SHEAR))
    assert all(not isinstance(ds[name].variable._data, np.ndarray) for name in (*CHANNELS, "mask_field"))


def test_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(SHEAR), "/well_of_test", recursive=True)
    ds = physml.open_dataset("memory://well_of_test", split="train")
    assert_allclose(ds.tracer[4], physml.open_dataset(SHEAR, split="train").tracer[4])
    assert the_well.statistics(Place("memory://well_of_test"))["mean"]["tracer"] == pytest.approx(0.25)


def test_only_the_well_is_recognized(tmp_path, make):
    assert recognize(SHEAR) == recognize(SHEAR / "data" / "valid") == "the_well"
    for other in SAMPLES.iterdir():
        for path in [other, *other.iterdir()]:
            assert the_well.recognizes(Place(path)) == (other.name == "the_well" and path != other)
    make.waves().to_netcdf(tmp_path / "plain.nc")
    shutil.copy(tmp_path / "plain.nc", tmp_path / "plain.h5")
    assert recognize(tmp_path / "plain.h5") is None
    assert recognize(tmp_path) is None


def test_missing_axes_constant_and_moving_scalars(tmp_path):
    path = write(tmp_path / "a.hdf5", parameters={"nu": 0.5, "kind": "slow"})
    with h5py.File(path, "a") as f:
        add(
            f, "t0_fields", "profile", np.arange(4), sample_varying=False, time_varying=False, dim_varying=[True, False]
        )
        add(f, "t0_fields", "forcing", np.arange(5), sample_varying=False, dim_varying=[False, False])
        add(f, "t1_fields", "wind", np.arange(4).reshape(2, 2), time_varying=False, dim_varying=[False, False])
        add(f, "scalars", "gravity", 9.81, sample_varying=False, time_varying=False)
        add(f, "scalars", "seed", [3, 4], sample_varying=True, time_varying=False)
        add(f, "scalars", "inflow", np.arange(10).reshape(2, 5), sample_varying=True, time_varying=True)
        f["t0_fields/unlisted"] = np.zeros(3)
        f.create_group("extra").attrs["key"] = 1
    ds = physml.open_dataset(path)
    assert ds.profile.dims == ("x",)
    assert ds.forcing.dims == ("time",)
    assert_array_equal(ds.wind_y, [1, 3])
    assert ds.inflow.dims == ("trajectory", "time")
    assert_array_equal(ds.seed, [3, 4])
    assert_allclose(ds.gravity, [9.81] * 2)
    assert_allclose(ds.nu, [0.5] * 2)
    assert not {"unlisted", "extra", "kind"} & set(ds.variables)
    assert "split" not in ds.coords


def test_parameters_named_like_fields_or_axes_keep_apart(tmp_path):
    ds = physml.open_dataset(write(tmp_path / "a.hdf5", parameters={"h": 3.0, "x": 4.0, "time": 5.0}))
    assert [float(ds[f"parameter_{name}"][1]) for name in ("h", "x", "time")] == [3, 4, 5]
    assert ds.h.ndim == 4


def test_three_dimensions_and_float64(tmp_path):
    path = write(tmp_path / "a.hdf5", spatial=("x", "y", "z"), shape=(4, 3, 2))
    with h5py.File(path, "a") as f:
        stress = np.arange(2 * 5 * 4 * 3 * 2 * 9).reshape(2, 5, 4, 3, 2, 3, 3)
        add(f, "t2_fields", "stress", stress)
        del f["t0_fields/h"]
        f["t0_fields/h"] = np.full((2, 5, 4, 3, 2), np.pi)
    ds = physml.open_dataset(path)
    assert ds.h.dtype == np.float64
    assert_array_equal(ds.stress_zx, stress[..., 2, 0])
    assert_array_equal(ds.stress_yz[1], stress[1, ..., 1, 2])


def test_nan_does_not_break_opening(tmp_path):
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as f:
        f["t0_fields/h"][0, :, 1, 1] = np.nan
    ds = physml.open_dataset(path)
    assert np.isnan(ds.h[0, 0, 1, 1])


def test_shorter_files_are_padded_and_counted(tmp_path):
    write(tmp_path / "data/train/a.hdf5", steps=5, parameters={"nu": 1.0})
    write(tmp_path / "data/train/b.hdf5", steps=3, trajectories=1, parameters={"nu": 2.0, "mu": 7.0})
    ds = physml.open_dataset(tmp_path)
    assert_array_equal(ds.frames, [5, 5, 3])
    assert_array_equal(ds.nu, [1, 1, 2])
    assert_array_equal(ds.mu, [np.nan, np.nan, 7])
    assert_array_equal(ds.time, np.arange(5) * 0.5)
    assert_array_equal(ds.h[2, :, 2, 0], [2, 12, 22, np.nan, np.nan])
    assert_array_equal(ds.h[[2, 0, 1], 4:0:-2, 1:3, [0, 2]].values[1, 1], [[21, 21], [22, 22]])
    splits = DataConfig(str(tmp_path), split_by="format", train=("train",), valid=(), test=()).open()
    assert splits["train"].lengths == (5, 5, 3)
    assert splits["train"].read(2, range(1, 3)).frames.shape == (2, 4, 3, 1)


def test_other_times_in_other_files_become_a_table(tmp_path):
    write(tmp_path / "a.hdf5", time=np.array([0.0, 1, 2]), steps=3)
    write(tmp_path / "b.hdf5", time=np.array([[0.0, 2, 4], [0, 3, 6]]), steps=3)
    ds = physml.open_dataset(tmp_path)
    assert "time" not in ds.coords
    assert_array_equal(ds.times, [[0, 1, 2], [0, 1, 2], [0, 2, 4], [0, 3, 6]])
    train = DataConfig(str(tmp_path), train=(0, 3), valid=(3, 4), test=(), split_by="trajectory").open()["train"]
    assert train.spec.time_step == 1


def test_constant_fields_of_each_file_stay_with_its_trajectories(tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        with h5py.File(write(tmp_path / f"{name}.hdf5"), "a") as f:
            add(f, "t0_fields", "depth", np.full((4, 3), value), sample_varying=False, time_varying=False)
    ds = physml.open_dataset(tmp_path)
    assert_array_equal(ds.depth[:, 0, 0], [1, 1, 2, 2])
    assert_array_equal(ds.depth.sel(x=0.25)[3], [2, 2, 2])


def test_spheres_have_latitudes(tmp_path):
    path = write(tmp_path / "a.hdf5", spatial=("theta", "phi"), shape=(4, 8), grid_type="spherical")
    with h5py.File(path, "a") as f:
        f["dimensions/theta"][:] = (np.arange(4) + 0.5) * np.pi / 4
        f["dimensions/phi"][:] = np.arange(8) * np.pi / 4
        add(f, "t1_fields", "wind", np.zeros((2, 5, 4, 8, 2)))
        del f["boundary_conditions/first"]
        boundary(f, "around", ["phi"], "periodic")
    ds = physml.open_dataset(path)
    assert ds.h.dims == ("trajectory", "time", "latitude", "longitude")
    assert_allclose(ds.latitude, [67.5, 22.5, -22.5, -67.5])
    assert_allclose(ds.longitude, np.arange(8) * 45)
    assert ds.longitude.attrs["period"] == 360
    assert {"wind_theta", "wind_phi"} <= set(ds.data_vars)
    axes = DataConfig(str(path), train=(0, 1), valid=(), test=(), split_by="trajectory").open()["train"].spec.grid.axes
    assert [axis.periodic for axis in axes] == [False, True]
    assert len(axes[0].weights) == 4


def test_boundaries(tmp_path):
    path = write(tmp_path / "a.hdf5", spatial=("x", "y", "z"), shape=(4, 3, 2))
    with h5py.File(path, "a") as f:
        del f["boundary_conditions"]
        boundary(f, "floor", ["y"], "wall", [True, False, False])
        boundary(f, "x", ["x"], "Periodic")
        plane = np.zeros((3, 2), bool)
        plane[:, 0] = True
        plane[0, 1] = True
        boundary(f, "yz", ["y", "z"], "WALL", plane)  # whole at z low, and at y low, but not at z high
    assert_array_equal(the_well.boundaries(Place(path)), [[2, 2], [0, 1], [0, 1]])
    ds = physml.open_dataset(path)
    assert ds.attrs["boundary_conditions"] == (
        "x: PERIODIC; y: WALL (low end), OPEN (high end); z: WALL (low end), OPEN (high end)"
    )
    assert [ds[dim].attrs["periodic"] for dim in "xyz"] == [1, 0, 0]
    with h5py.File(write(tmp_path / "silent.hdf5"), "a") as f:
        del f["boundary_conditions"]
    assert "periodic" not in physml.open_dataset(tmp_path / "silent.hdf5").x.attrs


def broken(change):
    return pytest.param(change, id=change.__name__.strip("_"))


def _delete_space(f):
    del f["dimensions/x"]


def _delete_time(f):
    del f["dimensions/time"]


def _delete_field(f):
    del f["t0_fields/h"]


def _short_field(f):
    del f["t0_fields/h"]
    f["t0_fields/h"] = np.zeros((2, 4, 4, 3))


def _flat_field(f):
    f["t0_fields/h"].attrs["time_varying"] = False


def _text_flag(f):
    f["t0_fields/h"].attrs["time_varying"] = "no"


def _odd_flags(f):
    f["t0_fields/h"].attrs["dim_varying"] = [True]


def _no_trajectory(f):
    del f["t0_fields/h"]
    f["t0_fields/h"] = np.zeros((0, 5, 4, 3))


def _too_many_trajectories(f):
    f.attrs["n_trajectories"] = 10**12


def _dimensions_missing(f):
    del f["dimensions"]


def _external(f):
    del f["t0_fields/h"]
    f["t0_fields/h"] = h5py.ExternalLink("/etc/passwd", "h")


def _strings(f):
    del f["t0_fields/h"]
    f["t0_fields/h"] = np.full((2, 5, 4, 3), b"x")


def _three_components(f):
    add(f, "t1_fields", "wind", np.zeros((2, 5, 4, 3, 3)))


def _twice(f):
    add(f, "t1_fields", "h", np.zeros((2, 5, 4, 3, 2)))
    add(f, "t0_fields", "h_x", np.zeros((2, 5, 4, 3)))


def _strange_boundary(f):
    f["boundary_conditions/first"].attrs["bc_type"] = "LEAKY"


def _boundary_elsewhere(f):
    f["boundary_conditions/first"].attrs["associated_dims"] = ["q"]


def _scalar_shape(f):
    add(f, "scalars", "g", [1, 2, 3], sample_varying=True, time_varying=False)


def _odd_numbers(f):
    f.attrs["n_spatial_dims"] = [2, 2]


def _no_names(f):
    f["t0_fields"].attrs["field_names"] = []


@pytest.mark.parametrize(
    "change",
    [
        broken(change)
        for change in (
            _delete_space, _delete_time, _delete_field, _short_field, _flat_field, _text_flag, _odd_flags,
            _no_trajectory, _too_many_trajectories, _dimensions_missing, _external, _strings, _three_components, _twice,
            _strange_boundary, _boundary_elsewhere, _scalar_shape, _no_names, _odd_numbers,
        )
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, change):
    path = write(tmp_path / "broken.hdf5")
    with h5py.File(path, "a") as f:
        change(f)
    with pytest.raises(DataError, match="broken.hdf5"):
        physml.open_dataset(path, format="the_well")


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("dataset_name", {"dataset_name": "other"}),
        ("grid", {"shape": (4, 5)}),
        ("axes", {"spatial": ("x", "z")}),
        ("grid_type", {"grid_type": "spherical"}),
    ],
)
def test_files_that_differ_are_named(tmp_path, what, options):
    write(tmp_path / "a.hdf5")
    write(tmp_path / "b.hdf5", **options)
    with pytest.raises(DataError, match=f"b.hdf5 and .*a.hdf5 differ in {what}"):
        physml.open_dataset(tmp_path, format="the_well")


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(DataError, match="no file"):
        physml.open_dataset(tmp_path / "absent", format="the_well")
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no .hdf5"):
        physml.open_dataset(tmp_path, format="the_well")
    shutil.copytree(SHEAR, tmp_path / "copy")
    file = next((tmp_path / "copy/data/train").iterdir())
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match=f"{file.name} cannot be read: it is damaged or incomplete"):
        physml.open_dataset(tmp_path / "copy")


@pytest.mark.parametrize(
    "text",
    [
        "mean: [1", "", "[]", "mean: 3", "mean: {tracer: [1, 2]}", "mean: {velocity: 3}", "mean: {tracer: text}",
        "mean: {strain: [[1, 2], [3]]}", "mean: &a {<<: *a}", "mean: !!python/object/apply:os.system [ls]",
        "mean: {tracer: null}", "[" * 5000, "x" * 2**21,
    ],
)  # fmt: skip
def test_broken_statistics(tmp_path, text):
    write(tmp_path / "data/train/a.hdf5")
    shutil.copytree(SHEAR, tmp_path / "copy")
    (tmp_path / "copy" / "stats.yaml").write_text(text)
    with pytest.raises(DataError, match="stats.yaml"):
        the_well.statistics(Place(tmp_path / "copy"))


def test_many_files_open(tmp_path):
    write(tmp_path / "f0.hdf5")
    for i in range(1, 60):
        shutil.copy(tmp_path / "f0.hdf5", tmp_path / f"f{i}.hdf5")
    ds = the_well.open_dataset(Place(tmp_path))
    assert ds.sizes["trajectory"] == 120
    assert float(ds.h[119, 4, 3, 0]) == 143


def test_a_heap_of_zeros_does_not_hang(tmp_path):
    target = tmp_path / "heap.hdf5"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = bytearray(next((SHEAR / "data" / "test").iterdir()).read_bytes())
    at = content.index(b"GCOL") + 16
    content[at : at + 64] = bytes(64)
    target.write_bytes(content)
    with pytest.raises(DataError, match="a heap is overwritten"):
        physml.open_dataset(tmp_path / "heap.hdf5", format="the_well")


@SEEDS
def test_damage_ends_in_a_typed_error(tmp_path, seeds):
    outcomes = set()
    for seed in seeds:
        outcomes.add(survives(damage(SHEAR, tmp_path / "fuzzed", seed), "the_well"))
        for read in (the_well.recognizes, the_well.statistics, the_well.boundaries):
            with contextlib.suppress(PhysmlError):
                read(Place(tmp_path / "fuzzed"))
    assert outcomes == {"opened", "DataError"}


def test_joined_reading_equals_concatenation(tmp_path):
    for i, n in enumerate((1, 3, 2)):
        write(tmp_path / f"f{i}.hdf5", trajectories=n)
    ds = the_well.open_dataset(Place(tmp_path))
    parts = [the_well.open_dataset(Place(tmp_path / f"f{i}.hdf5")) for i in range(3)]
    whole = xr.concat([part.h for part in parts], "trajectory").load()
    dice = np.random.default_rng(0)
    for _ in range(50):
        index = {
            dim: [
                int(dice.integers(size)), slice(None, None, -1), slice(1, 3), dice.integers(0, size, 3),
                slice(2, 2), slice(0, None, 2),
            ][dice.integers(6)]
            for dim, size in whole.sizes.items()
        }  # fmt: skip
        assert_array_equal(ds.h.isel(index), whole.isel(index))
