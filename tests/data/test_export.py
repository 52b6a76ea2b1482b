"""What is written reads back equal: netCDF, both versions of zarr, and the layouts of benchmarks."""

import tracemalloc
from pathlib import Path

import dask
import dask.array
import h5py
import numpy as np
import pytest
import xarray as xr

import physml
from physml.data import the_well
from physml.data.export import save_dataset
from physml.data.place import Place
from physml.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples"
WELL, ARENA = SAMPLES / "the_well/shear_flow", SAMPLES / "pdearena"
LAYOUTS = [
    (WELL, "the_well"),
    (WELL / "data/valid/shear_flow_Reynolds_1e4_Schmidt_1e0.hdf5", "the_well"),
    *((ARENA / name, "pdearena") for name in ("NavierStokes2D", "NavierStokes2D-conditioned", "KuramotoSivashinsky1D")),
    (ARENA / "KuramotoSivashinsky1D/KS_train_3.h5", "pdearena"),
    (ARENA / "NavierStokes2D/NavierStokes2D_train_197910_0.50000_2.h5", "pdearena"),
    (ARENA / "ShallowWater-2D", "pdearena"),
    (ARENA / "ShallowWater-2D/train.zarr", "pdearena"),
]
WAYS = [("a.nc", {}), ("a.zarr", {"zarr_format": 2}), ("a.zarr", {"zarr_format": 3})]


@pytest.fixture
def fields():
    random = np.random.default_rng(0)
    values = random.standard_normal((3, 5, 8, 6)).astype("f4")
    values[:, :, 2, 3] = np.nan
    return xr.Dataset(
        {
            "u": (("trajectory", "time", "x", "y"), values, {"units": "m s-1", "flag": True, "range": (0, 1)}),
            "level": (("trajectory", "time", "x", "y"), (values * 10).astype("f8")),
            "count": (("trajectory",), np.array([1, 2, 3], "i8"), {"extra": {"a": [1, None]}}),
            "name": (("trajectory",), ["one", "two", "drei"]),
        },
        {
            "time": ("time", np.arange("2001-01-01", "2001-01-06", dtype="datetime64[D]").astype("datetime64[ns]")),
            "x": ("x", np.linspace(0, 1, 8), {"periodic": np.int8(1)}),
        },
        {"title": "waves", "numbers": np.array([1.5, 2.5]), "nothing": None},
    )


@pytest.mark.parametrize(("name", "options"), WAYS)
@pytest.mark.parametrize("chunks", [None, {"trajectory": 1, "time": 2}])
def test_round_trip_is_exact(tmp_path, fields, name, options, chunks):
    path = save_dataset(fields.chunk(chunks) if chunks else fields, tmp_path / name, **options)
    back = xr.open_dataset(path, engine="netcdf4") if path.suffix == ".nc" else xr.open_zarr(path)
    xr.testing.assert_equal(back.compute(), fields)
    for key in fields.variables:
        if fields[key].dtype.kind == "f":
            assert back[key].dtype == fields[key].dtype
    assert back["u"].attrs["units"] == "m s-1"
    assert back["u"].attrs["flag"] == 1
    assert back.attrs["title"] == "waves"
    assert back.attrs["Conventions"].startswith("CF-")
    assert list(back.attrs["numbers"]) == [1.5, 2.5]
    if chunks:
        stored = back["u"].encoding.get("chunks") or back["u"].encoding["chunksizes"]
        assert tuple(stored) == (1, 2, 8, 6)
    again = save_dataset(physml.open_dataset(path), tmp_path / f"again-{name}", **options)
    xr.testing.assert_equal(physml.open_dataset(again).compute(), physml.open_dataset(path).compute())


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_a_large_dataset_is_never_whole_in_memory(tmp_path, name):
    values = dask.array.random.default_rng(0).random((64, 256, 512), chunks=(1, 256, 512))  # 64 MiB
    ds = xr.Dataset({"u": (("time", "x", "y"), values)})
    save_dataset(ds.isel(time=[0]), tmp_path / f"first-{name}")  # imports
    with dask.config.set(scheduler="synchronous"):
        tracemalloc.start()
        save_dataset(ds, tmp_path / name)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 16 * 2**20


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_chunks_of_joined_files_may_differ(tmp_path, fields, name):
    uneven = fields.chunk({"time": (2, 1, 2)})
    xr.testing.assert_equal(
        physml.open_dataset(save_dataset(uneven, tmp_path / name))
        .compute()["u"]
        .drop_vars("trajectory", errors="ignore"),
        fields["u"],
    )


def test_nothing_is_lost_and_nothing_is_half_written(tmp_path, fields):
    path = save_dataset(fields, tmp_path / "a.nc")
    before = path.read_bytes()
    with pytest.raises(DataError, match="exists"):
        save_dataset(fields, path)

    def fail(block):
        raise RuntimeError("disk gone")

    broken = fields.assign(u=(fields["u"].dims, dask.array.zeros((3, 5, 8, 6)).map_blocks(fail, dtype="f4")))
    for name in ("a.nc", "b.nc", "b.zarr"):
        with pytest.raises(RuntimeError, match="disk gone"):
            save_dataset(broken, tmp_path / name, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nc"]
    save_dataset(fields.isel(time=[0]), path, overwrite=True)
    assert xr.open_dataset(path).sizes["time"] == 1


def test_what_cannot_be_written_is_named(tmp_path, fields):
    with pytest.raises(ConfigError, match=r"does not tell its format"):
        save_dataset(fields, tmp_path / "a.hdf")
    with pytest.raises(ConfigError, match="no output format 'netcd'"):
        save_dataset(fields, tmp_path / "a", to="netcd")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_dataset(fields, tmp_path / "file" / "a.nc")


# --- layouts of benchmarks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sample", "to"), LAYOUTS, ids=lambda value: getattr(value, "name", value))
def test_samples_of_benchmarks_survive_exactly(tmp_path, sample, to):
    before = physml.open_dataset(sample)
    suffix = "" if sample.is_dir() else sample.suffix
    after = physml.open_dataset(save_dataset(before, tmp_path / f"copy{suffix}", to))
    xr.testing.assert_identical(after.compute(), before.compute())  # numbers, names, coordinates, attributes
    assert {n: v.dtype for n, v in after.variables.items()} == {n: v.dtype for n, v in before.variables.items()}
    assert after.attrs["format"] == to


def test_the_well_is_written_as_its_authors_do(tmp_path):
    """Groups, names, types and attributes of the sample's file, which the authors' reader opens."""
    source = next((WELL / "data/valid").iterdir())
    copy = save_dataset(physml.open_dataset(source), tmp_path / "a.hdf5", "the_well")

    def outline(path):
        with h5py.File(path) as file:
            nodes = {"/": file}
            file.visititems(lambda name, node: nodes.update({name: node}))
            return {
                name: (
                    getattr(node, "shape", None),
                    str(getattr(node, "dtype", None)),
                    {key: str(np.asarray(value)) for key, value in node.attrs.items() if name != "/"},
                )
                for name, node in nodes.items()
            }, {key: str(np.asarray(value)) for key, value in file.attrs.items()}

    (written, root), (authors, expected) = outline(copy), outline(source)
    assert written == authors
    assert {key: root[key] for key in expected} == expected
    np.testing.assert_array_equal(the_well.boundaries(Place(copy)), the_well.boundaries(Place(source)))


def make_well(**attrs):
    random = np.random.default_rng(0)
    names = ["u", "flow_y", "flow_x", *(f"s_{a}{b}" for a in "yx" for b in "yx"), "flow_z"]
    fields = {n: (("trajectory", "time", "y", "x"), random.standard_normal((3, 5, 4, 6)).astype("f4")) for n in names}
    return xr.Dataset(
        {
            **fields,
            "wall": (("y", "x"), np.arange(24.0).reshape(4, 6)),
            "profile": (("trajectory", "y"), random.standard_normal((3, 4))),
            "Re": (("trajectory",), np.array([1.0, 2.0, 2.0], "f4")),
            "parameter_u": (("trajectory",), np.array([7, 7, 7])),
            "drive": (("trajectory", "time"), random.standard_normal((3, 5))),
            "gravity": ((), 9.81),
        },
        {"time": np.arange(5) * 0.1, "y": np.linspace(0, 1, 4), "x": np.arange(6) / 6},
        {"boundary_conditions": "y: WALL (low end), OPEN (high end); x: PERIODIC", **attrs},
    )


def test_all_orders_constants_and_boundaries_go_into_the_well(tmp_path):
    ds = make_well()
    path = save_dataset(ds, tmp_path / "made", "the_well")
    back = physml.open_dataset(path, split="train").compute()
    for name in ds.data_vars:
        wanted = ds[name] if name != "gravity" else ds[name].expand_dims(trajectory=3)
        np.testing.assert_array_equal(back[name].values, wanted.values, err_msg=name)
        assert back[name].dims == wanted.dims
        assert back[name].dtype == ds[name].dtype
    np.testing.assert_array_equal(the_well.boundaries(Place(path)), [[0, 1], [2, 2]])
    assert back.attrs["boundary_conditions"] == ds.attrs["boundary_conditions"]
    assert back.attrs["title"] == "The Well: made"
    with h5py.File(next(path.rglob("*.hdf5"))) as file:
        assert {group: list(file[group].attrs["field_names"]) for group in the_well.GROUPS} == {
            "t0_fields": ["u", "flow_z", "wall", "profile"],
            "t1_fields": ["flow"],
            "t2_fields": ["s"],
        }
        assert file["t2_fields/s"].shape == (3, 5, 4, 6, 2, 2)
        assert file["t0_fields/profile"].attrs["dim_varying"].tolist() == [True, False]
        assert list(file.attrs["simulation_parameters"]) == ["u", "gravity"]  # those of the file, not of a trajectory


def test_lengths_and_times_of_trajectories_go_into_the_well(tmp_path):
    ds = make_well()[["u", "Re"]]
    lengths = np.array([5, 3, 5])
    ds["u"] = ds["u"].where(ds["time"] < 0.1 * xr.DataArray(lengths, dims="trajectory") - 0.05)
    ds["u"] = ds["u"].transpose("trajectory", "time", "y", "x")
    ds["frames"] = ("trajectory", lengths)
    ds = ds.assign_coords(split=("trajectory", ["train", "train", "test"])).drop_vars("time")
    times = np.where(np.arange(5) < lengths[:, None], np.arange(5) + 10.0 * np.arange(3)[:, None], np.nan)
    ds["times"] = (("trajectory", "time"), times)
    back = physml.open_dataset(save_dataset(ds, tmp_path / "a", "the_well")).compute()
    for name in ("u", "Re", "times", "split", "frames"):
        np.testing.assert_array_equal(back[name], ds[name], err_msg=name)


def test_a_sphere_goes_into_the_well_and_back(tmp_path):
    theta = np.linspace(0.1, 3.0, 5).astype("f4")
    latitude = 90 - np.rad2deg(theta.astype("f8"))
    dims = ("trajectory", "time", "latitude", "longitude")
    ds = xr.Dataset(
        {f"wind_{angle}": (dims, np.ones((1, 2, 5, 8), "f4")) for angle in ("theta", "phi")},
        {"time": [0.0, 1.0], "latitude": latitude, "longitude": np.arange(8) * 45.0},
    )
    path = save_dataset(ds, tmp_path / "sphere.hdf5", "the_well")
    back = physml.open_dataset(path)
    np.testing.assert_array_equal(back.latitude, latitude)
    np.testing.assert_allclose(back.longitude, ds.longitude, rtol=1e-15)
    with h5py.File(path) as file:
        assert list(file["dimensions"].attrs["spatial_dims"]) == ["theta", "phi"]
        assert file["dimensions/theta"].dtype == np.float32
        assert list(file["t1_fields"]) == ["wind"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    from physml.data.generate import generate, resolve

    folder = tmp_path_factory.mktemp("generated")
    for name, options in (
        ("kolmogorov", ["points=16", "solver_points=24", "warmup=0"]),
        ("burgers", ["points=32", "solver_points=64"]),
    ):
        generate(resolve(name, options), folder / f"{name}.nc", 2, steps=3)
    return folder


@pytest.mark.parametrize(("name", "to"), [("kolmogorov", "the_well"), ("burgers", "the_well"), ("burgers", "pdearena")])
def test_generated_data_go_into_layouts_that_can_hold_them(generated, tmp_path, name, to):
    ds = physml.open_dataset(generated / f"{name}.nc")
    back = physml.open_dataset(save_dataset(ds, tmp_path / name, to))
    field = "vorticity" if name == "kolmogorov" else "u"
    np.testing.assert_array_equal(back[field].values, ds[field].values)
    assert back[field].dims == ds[field].dims
    assert back["v" if to == "pdearena" else "viscosity"].values.tolist() == ds["viscosity"].values.tolist()
    np.testing.assert_allclose(back.time, ds.time, rtol=1e-14)
    assert back.x.attrs["periodic"] == 1
    assert back.x.attrs["period"] == pytest.approx(float(ds.x.attrs["period"]))
    assert set(back.split.values) == {"train"}


def test_what_a_layout_cannot_hold_is_named(tmp_path, fields, generated):
    kolmogorov = physml.open_dataset(generated / "kolmogorov.nc")
    burgers = physml.open_dataset(generated / "burgers.nc")
    well = make_well()
    smoke = physml.open_dataset(ARENA / "NavierStokes2D")
    cases = [
        (fields, "the_well", "a", "'name' is text"),
        (fields.drop_vars("name"), "the_well", "a", "'time' is dates"),
        (well.assign_coords(split=("trajectory", ["train", "dev", "test"])), "the_well", "a", "no split 'dev'"),
        (well.assign_coords(split=("trajectory", ["train"] * 3)), "the_well", "a.hdf5", "does not tell its split"),
        (well.assign_coords(trajectory=["a", "b", "c"]), "the_well", "a", "labels such as 'a'"),
        (well[["Re"]], "the_well", "a", "one to three spatial dimensions"),
        (make_well(boundary_conditions="x: WALL or, in other files, x: OPEN"), "the_well", "a", "file by file"),
        (well.isel(trajectory=slice(0)), "the_well", "a", "0 trajectories"),
        (kolmogorov, "pdearena", "a", "no layout for vorticity on"),
        (burgers.assign(drag=1.0), "pdearena", "a", "no place for 'drag'"),
        (burgers.assign_coords(x=burgers.x**2), "pdearena", "a", "'x' are not even"),
        (burgers.assign_coords(x=("x", burgers.x.values, {"periodic": 0})), "pdearena", "a", "'x' is not"),
        (smoke, "pdearena", "a.h5", "need several"),
        (physml.open_dataset(ARENA / "ShallowWater-2D"), "pdearena", "a.h5", "folder of zarr stores"),
    ]
    for ds, to, name, said in cases:
        with pytest.raises(DataError, match=said):
            save_dataset(ds, tmp_path / name, to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["the_well", "pdearena"])
def test_layouts_are_written_slab_by_slab(tmp_path, to):
    values = dask.array.random.default_rng(0).random((2, 32, 256, 512), chunks=(1, 1, 256, 512))  # 64 MiB
    names = ("u", "vx", "vy")
    ds = xr.Dataset({n: (("trajectory", "time", "x", "y"), values) for n in names}, {"time": np.arange(32.0)})
    ds = ds.assign(dt=("trajectory", [1.0, 1.0]), dx=("trajectory", [1.0, 1.0]), dy=("trajectory", [1.0, 1.0]))
    save_dataset(ds.isel(time=[0, 1]), tmp_path / "first", to)  # imports
    with dask.config.set(scheduler="synchronous"):
        tracemalloc.start()
        path = save_dataset(ds, tmp_path / "a", to)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 32 * 2**20
    np.testing.assert_array_equal(physml.open_dataset(path)["u"][1, 31].values, ds["u"][1, 31].values)
