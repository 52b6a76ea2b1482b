from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from mutations import SEEDS, damage, survives
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import DataConfig, jax_cfd
from physml.data.formats import recognize
from physml.data.place import Place
from physml.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
FACES = {"u": (1.0, 0.5), "v": (0.5, 1.0)}
ATTRS = {"ndim": 2, "save_grid_size": 8, "domain_size": 2 * np.pi, "stable_time_step": 0.007, "seed": 3}


def simulation(samples=2, times=3, points=8, attrs=None, offsets=True, coords=True, dtype="f4"):
    """The layout of JAX-CFD: [sample,] time, x, y; one coordinate for all components, an offset for each."""
    dims = (("sample",) if samples else ()) + ("time", "x", "y")
    shape = ((samples,) if samples else ()) + (times, points, points)
    rng = np.random.default_rng(0)
    fields = {
        name: (dims, rng.standard_normal(shape).astype(dtype), {"offset": offset} if offsets else {})
        for name, offset in FACES.items()
    }
    axis = (np.arange(points) + 0.5) * 2 * np.pi / points
    grid = {"x": axis, "y": axis} if coords else {}
    ids = {"sample": np.arange(samples)} if samples else {}
    time = 0.007012483601762931 * 8 * np.arange(times)
    return xr.Dataset(fields, {**grid, **ids, "time": time}, ATTRS if attrs is None else attrs)


def save(ds, path, **options):
    ds.to_netcdf(path, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"format": "NETCDF3_64BIT"}, {"engine": "h5netcdf"}])
def test_fields_coordinates_and_offsets(tmp_path, options):
    stored = simulation()
    path = save(stored, tmp_path / "long_eval.nc", **options)
    assert recognize(path) == "jax_cfd"
    ds = jax_cfd.open_dataset(Place(path))
    assert not isinstance(ds.u.variable._data, np.ndarray)
    assert ds.u.dims == ("trajectory", "time", "x", "y")
    for name, offset in FACES.items():
        assert_array_equal(ds[name], stored[name])
        assert tuple(ds[name].attrs["offset"]) == offset
        assert ds[name].attrs["units"] == "1"
    assert_allclose(ds.x, (np.arange(8) + 0.5) * np.pi / 4)
    assert (ds.y.attrs["units"], ds.y.attrs["periodic"]) == ("1", 1)
    assert_allclose(ds.y.attrs["period"], 2 * np.pi)
    assert_allclose(ds.time, stored.time)
    assert (ds.attrs["seed"], ds.attrs["stable_time_step"]) == (3, 0.007)
    assert ds.attrs["boundary_conditions"] == "periodic in x, y"


def test_old_files_give_the_domain_as_a_multiple_of_two_pi(tmp_path):
    attrs = {"ndim": 2, "save_grid_size_x": 8, "save_grid_size_y": 8, "domain_size_multiple": 1}
    path = save(simulation(attrs=attrs, offsets=False), tmp_path / "old.nc")
    ds = physml.open_dataset(path)
    assert ds.attrs["format"] == "jax_cfd"
    assert "offset" not in ds.u.attrs
    assert_allclose(ds.x.attrs["period"], 2 * np.pi)


def test_without_samples_in_three_dimensions_with_a_tracer(tmp_path):
    rng, dims = np.random.default_rng(0), ("time", "x", "y", "z")
    offsets = {"u": (1, 0.5, 0.5), "v": (0.5, 1, 0.5), "w": (0.5, 0.5, 1), "c": (0.5, 0.5, 0.5)}
    fields = {name: (dims, rng.standard_normal((3, 4, 6, 8)), {"offset": at}) for name, at in offsets.items()}
    attrs = {"ndim": 3, "save_grid_size": 4, "domain_size": [1.0, 2.0, 3.0]}
    path = save(xr.Dataset(fields, {"time": np.arange(3.0)}, attrs), tmp_path / "box.nc")
    ds = physml.open_dataset(path)
    assert ds.w.dims == dims
    assert_array_equal(ds.c, fields["c"][1])
    assert ds.u.dtype == np.float64
    assert [ds[dim].attrs["period"] for dim in "xyz"] == [1.0, 2.0, 3.0]
    assert_allclose(ds.z, (np.arange(8) + 0.5) * 3 / 8)  # made: the file has none


def test_a_part_of_the_domain_is_not_periodic(tmp_path):
    path = save(simulation().isel(x=slice(0, 4)), tmp_path / "part.nc")
    ds = jax_cfd.open_dataset(Place(path))
    assert (ds.x.attrs["periodic"], ds.y.attrs["periodic"]) == (0, 1)
    assert ds.attrs["boundary_conditions"] == "periodic in y"


def test_an_offset_alone_is_evidence_but_says_nothing_of_the_domain(tmp_path):
    path = save(simulation(attrs={}), tmp_path / "plain.nc")
    assert recognize(path) == "jax_cfd"
    ds = jax_cfd.open_dataset(Place(path))
    assert (ds.x.attrs["periodic"], ds.attrs["boundary_conditions"]) == (0, "not stated")
    bare = jax_cfd.open_dataset(Place(save(simulation(attrs={}, coords=False), tmp_path / "bare.nc")))
    assert "x" not in bare.coords


def test_spectra_and_unknown_variables_stay(tmp_path):
    stored = simulation()
    stored["energy"] = (("sample", "time", "kx", "ky"), np.ones((2, 3, 8, 5)))
    stored["viscosity"] = ("sample", [0.1, 0.2])
    ds = jax_cfd.open_dataset(Place(save(stored, tmp_path / "spectra.nc")))
    assert ds.energy.dims == ("trajectory", "time", "kx", "ky")
    assert_array_equal(ds.viscosity, [0.1, 0.2])


def test_chunked_files_keep_their_chunks(tmp_path):
    encoding = {"u": {"chunksizes": (1, 2, 8, 8), "zlib": True}}
    path = save(simulation(), tmp_path / "chunked.nc", encoding=encoding)
    assert physml.open_dataset(path).u.chunks == ((1, 1), (2, 1), (8,), (8,))


@pytest.mark.parametrize("split_by", ["trajectory", "time"])
def test_training_reads_windows(tmp_path, split_by):
    stored = simulation(samples=4, times=8)
    path = save(stored, tmp_path / "train.nc")
    splits = DataConfig(str(path), split_by=split_by, train=(0, 2), valid=(2, 3), test=(3, 4)).open()
    spec = splits["train"].spec
    assert spec.names == ("u", "v")
    assert_allclose(spec.time_step, 8 * 0.007012483601762931, rtol=1e-6)
    assert [axis.periodic for axis in spec.grid.axes] == [True, True]
    window = splits["valid"].read(0, range(1))
    first = stored.u[2, 0] if split_by == "trajectory" else stored.u[0, 2]
    assert_array_equal(window.frames[0, ..., 0], first)


def test_a_url(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/jax_cfd/eval.nc", save(simulation(), tmp_path / "eval.nc").read_bytes())
    ds = physml.open_dataset("memory://jax_cfd/eval.nc")
    assert ds.attrs["format"] == "jax_cfd"
    assert_array_equal(ds.v, simulation().v)
    system.rm("/jax_cfd", recursive=True)


# --- TSM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.nc", "test.nc", "predict.nc"])
def test_files_of_tsm_are_plain_netcdf(tmp_path, name):
    stored = simulation(attrs={}, offsets=False)
    path = save(stored, tmp_path / name, encoding={"u": {"chunksizes": (1, 1, 8, 8)}})
    assert recognize(path) is None
    ds = physml.open_dataset(path)
    assert ds.u.dims == ("trajectory", "time", "x", "y")
    assert_array_equal(ds.v, stored.v)
    assert_allclose(ds.x, stored.x)
    dataset = DataConfig(str(path), periodic=("x", "y"), train=(0, 2), valid=(), test=()).open()["train"]
    assert_array_equal(dataset.read(1, range(2)).frames[1, ..., 0], stored.u[1, 1])


def test_shards_of_tsm_are_joined_along_trajectory(tmp_path):
    stored = simulation(samples=4, attrs={}, offsets=False)
    for i in range(2):
        shard = stored.isel(sample=slice(2 * i, 2 * i + 2))
        save(shard, tmp_path / f"train.nc.hdf5-{i:05}-of-00002", engine="h5netcdf")
    ds = physml.open_dataset(str(tmp_path / "train.nc.hdf5-*"))
    assert ds.sizes["trajectory"] == 4
    assert_array_equal(ds.u, stored.u)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_data_are_not_claimed(tmp_path):
    for path in list(SAMPLES.rglob("*.nc"))[:20] + list(SAMPLES.rglob("*.h5"))[:10] + [SAMPLES]:
        assert recognize(path) != "jax_cfd"
    plain = simulation(attrs={"domain_size": 1.0, "title": "plain"}, offsets=False)
    assert recognize(save(plain, tmp_path / "plain.nc")) is None
    plain.u.attrs["offset"] = 273.15  # of packed numbers, in some conventions
    assert recognize(save(plain, tmp_path / "packed.nc")) is None


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, "two", [1.0, 2.0, 3.0]])
def test_a_domain_must_have_a_length(tmp_path, size):
    path = save(simulation(attrs={**ATTRS, "domain_size": size}), tmp_path / "domain.nc")
    with pytest.raises(DataError, match="'domain_size' is .* Correct it") as error:
        jax_cfd.open_dataset(Place(path))
    assert str(path) in str(error.value)


def test_nan_in_fields_does_not_matter_to_opening(tmp_path):
    stored = simulation()
    stored.u[0, 0, 0, 0] = np.nan
    assert np.isnan(jax_cfd.open_dataset(Place(save(stored, tmp_path / "nan.nc"))).u[0, 0, 0, 0])


def test_missing_truncated_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="no file"):
        jax_cfd.open_dataset(Place(tmp_path / "none.nc"))
    path = save(simulation(), tmp_path / "cut.nc")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cut.nc"):
        jax_cfd.open_dataset(Place(path))


@SEEDS
@pytest.mark.parametrize("format", ["NETCDF4", "NETCDF3_64BIT"])
def test_damage_ends_in_a_typed_error(tmp_path, format, seeds):
    path = save(simulation(), tmp_path / "whole.nc", format=format)
    outcomes = {survives(damage(path, tmp_path / "damaged" / "sim.nc", seed), "jax_cfd") for seed in seeds}
    assert outcomes == {"opened", "DataError"}
