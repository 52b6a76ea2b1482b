"""Cells without a field, told by NaN or by a variable: the same in training, rollouts and scores."""

import dataclasses

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml import api, cli, saving
from physml.data import DataConfig, Mixture, XarrayDataset, fit_normalizer, spec_of
from physml.errors import DataError
from physml.evaluate import evaluate
from physml.experiment import Evaluation, Experiment
from physml.fields import stack
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.saving import folder as folders
from physml.saving.weights import serialize
from physml.steppers import DirectConfig, ResidualConfig, stack_members
from physml.steppers.describe import build_stepper
from physml.training import TrainingConfig

MODEL = FNOConfig(modes=(3,), width=4, depth=1)
EXISTS = np.ones(16, "f4")
EXISTS[3:6] = 0


@pytest.fixture(scope="module")
def filled():
    """Two fields with numbers also where `fluid` is 0, as codes of fluid flow write them."""
    random = np.random.default_rng(0)
    fields = {n: (("trajectory", "time", "x"), 3 + random.standard_normal((2, 9, 16)).astype("f4")) for n in "uv"}
    return xr.Dataset({**fields, "fluid": ("x", EXISTS)}, {"x": np.arange(16) / 16, "time": np.arange(9.0)})


@pytest.fixture(scope="module")
def empty(filled):
    """The same with NaN there, and no variable that tells."""
    return filled.where(filled.fluid != 0).drop_vars("fluid")


def stepper_of(data, mask=None):
    dataset = XarrayDataset(data, spec_of(data, ("u", "v"), mask=mask))
    return build_stepper(ResidualConfig(), MODEL, dataset.spec, fit_normalizer(dataset, "zscore"), seed=0)


def test_numbers_under_a_mask_have_no_influence(filled, empty):
    stepper, other = stepper_of(filled, "fluid"), stepper_of(empty)
    assert_array_equal(stepper.normalizer.frames.center[...], other.normalizer.frames.center[...])
    found, expected = (physml.forecast(s, d.isel(time=[0]), 4) for s, d in ((stepper, filled), (other, empty)))
    assert np.isnan(found.u.values[..., EXISTS == 0]).all()
    for name in ("u", "v", "ledger_mean_u", "ledger_energy_v"):
        assert_array_equal(found[name], expected[name], err_msg=name)
    assert "ledger_spectrum_u" not in physml.forecast(stepper, filled.isel(time=[0]), 4, spectrum_every="auto")
    on = physml.forecast(stepper, found.isel(lead=[-1]), 2)  # its NaN tell where there is no field
    assert_allclose(on.u, physml.forecast(stepper, filled.isel(time=[0]), 6).u[:, 4:], rtol=1e-5)


def test_forecasts_are_scored_where_they_exist(filled, empty):
    found = physml.forecast(stepper_of(filled, "fluid"), filled.isel(time=[0]), 4)
    scores, expected = (evaluate(found, truth, metrics=("rmse", "mae")).score for truth in (filled, empty))
    assert np.isfinite(scores).all()
    assert_array_equal(scores, expected)
    rolled = evaluate(stepper_of(filled, "fluid"), filled, leads=4, starts=1, metrics=("rmse",)).score
    assert_allclose(rolled.sel(metric="rmse"), scores.sel(metric="rmse"), rtol=1e-5)


def test_a_mask_that_is_not_there_is_asked_for(filled, empty):
    stepper, start = stepper_of(filled, "fluid"), filled.drop_vars("fluid").isel(time=[0])
    with pytest.raises(DataError, match="whose variable 'fluid' is 0.*has neither 'fluid' nor NaN.*masked=False"):
        physml.forecast(stepper, start, 2)
    assert np.isfinite(physml.forecast(stepper, start, 2, masked=False).u).all()
    assert np.isnan(physml.forecast(stepper, empty.isel(time=[0]), 2).u[..., EXISTS == 0]).all()


def test_gaps_are_known_by_channel(filled):
    land = filled.drop_vars("fluid").assign(u=filled.u.where(filled.fluid != 0))
    stepper = stepper_of(land)
    assert_array_equal(stepper.normalizer.masked[...], [1, 0])
    start = land.isel(time=[0]).copy(deep=True)
    assert np.isfinite(physml.forecast(stepper, start, 2).v).all()
    start.v[0, 0, 9] = np.nan
    with pytest.raises(DataError, match=r"'v', trajectory 0, 1 cells, first at index \(9,\).*without gaps there"):
        physml.forecast(stepper, start, 2)
    assert np.isnan(physml.forecast(stepper, start, 2, masked=True).v[0, :, 9]).all()


def test_a_model_of_a_mixture_starts_from_any_of_its_parts(filled, tmp_path):
    whole = filled.drop_vars("fluid").isel(x=slice(None, None, -1))
    levels = xr.concat([whole.v, whole.v + 1], "level").assign_coords(level=[500, 850])
    datasets = {"both": whole.assign(z=levels), "part": whole.drop_vars("v").assign(z=levels.isel(level=[0]))}
    parts = {
        name: XarrayDataset(data, spec_of(data, [*({"u", "v"} & set(data)), "z"], flatten="level"))
        for name, data in datasets.items()
    }
    mixture = Mixture(parts)
    assert set(mixture.spec.names) == {"u", "v", "z_500", "z_850"}
    stepper = build_stepper(ResidualConfig(), MODEL, mixture.spec, fit_normalizer(mixture, "zscore"), seed=0)
    start = datasets["part"].isel(time=[0])
    with pytest.raises(DataError, match="(no variable 'v'|850 is missing).*parts of a mixture.*--masked yes"):
        physml.forecast(stepper, start, 4)
    found = physml.forecast(stepper, start, 4, masked=True, out=tmp_path / "f.nc", chunk=2)
    assert {str(name) for name in found.data_vars if "ledger" not in str(name)} == {"u", "z", "steps_completed"}
    assert {str(name) for name in found.data_vars if "ledger_mean" in str(name)} == {
        "ledger_mean_u",
        "ledger_mean_z_500",
    }
    assert found.level.values.tolist() == [500]
    frames = physml.rollout(stepper, stack([mixture.read(2, range(1))]), 4)  # the first trajectory of the part
    order = [mixture.spec.names.index(name) for name in ("u", "z_500")]
    assert_allclose(found.u[0, :, ::-1], frames[0, ..., order[0]], atol=1e-5)
    assert_allclose(found.z[0, :, 0, ::-1], frames[0, ..., order[1]], atol=1e-5)
    on = physml.forecast(stepper, found.isel(lead=[1]), 2, masked=True)
    assert_allclose(on.u, found.u[:, 2:], atol=1e-5)
    with pytest.raises(DataError, match="no variable") as raised:
        physml.forecast(stepper, start.rename(u="w").drop_vars("z"), 4, masked=True)
    assert "mixture" not in str(raised.value)
    with pytest.raises(DataError, match="no variable 'v'") as raised:
        physml.forecast(stepper_of(filled.drop_vars("fluid")), filled.drop_vars("v"), 4)
    assert "mixture" not in str(raised.value)


@pytest.mark.parametrize("members", [0, 3])
def test_older_files_with_one_flag_for_all_channels_load(filled, tmp_path, monkeypatch, members):
    stepper = stepper_of(filled, "fluid")
    if members:
        stepper = stack_members([stepper] * members)
    flag = (stepper.stacked if members else stepper).normalizer.masked
    flag.set_value(flag[..., 0])
    assert flag.shape == ((members,) if members else ())
    monkeypatch.setattr(folders, "serialize", lambda module: serialize(stepper))
    saving.save(stepper, tmp_path / "old")
    assert_array_equal(saving.load(tmp_path / "old").normalizer.masked[...], [1, 1])
    spec = saving.load(tmp_path / "old").spec
    assert spec.mask == "fluid"
    written = spec.to_dict()
    del written["mask"]
    assert type(spec).from_dict(written) == dataclasses.replace(spec, mask=None)


def test_a_run_rolls_out_with_its_mask(filled, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled.to_netcdf("flow.nc")
    data = DataConfig("flow.nc", variables=("u", "v"), mask="fluid", split_by="trajectory", train=(0, 1), valid=(),
                      test=(1, 2))  # fmt: skip
    experiment = Experiment(
        data=data, model=MODEL, training=TrainingConfig(steps=1, batch=4),
        evaluation=Evaluation(steps=3, starts=1, floors=()),
    )  # fmt: skip
    run = api.train(experiment, folder=tmp_path / "runs")
    with pytest.raises(SystemExit):
        cli.main(["rollout", str(run.folder), "--steps", "3", "--out", "f.zarr", "--json"])
    with physml.open_dataset("f.zarr") as found, xr.open_dataset(run.folder / "sample.nc") as sample:
        assert np.isnan(found.u.values[..., EXISTS == 0]).all()
        assert_allclose(found.u[0], sample.u_forecast, rtol=1e-5)


def test_a_stepper_without_history_reads_its_mask(filled):
    still = filled.isel(time=0, drop=True)
    spec = spec_of(still.rename(v="a").isel(trajectory=0), ("u",), static=("a",), mask="fluid")
    stepper = build_stepper(DirectConfig(history=0), MODEL, spec, Normalizer.identity(spec), seed=0)
    found = physml.forecast(stepper, still.rename(v="a").isel(trajectory=0), 1)
    assert_array_equal(np.isnan(found.u.values.ravel()), EXISTS == 0)


def test_the_command_line_says_whether_cells_are_missing(filled, tmp_path, capsys):
    saving.save(stepper_of(filled, "fluid"), tmp_path / "model")
    filled.drop_vars("fluid").isel(time=[0]).to_netcdf(tmp_path / "start.nc")
    words = ["rollout", tmp_path / "model", "--initial", tmp_path / "start.nc"]
    words += ["--steps", 2, "--out", tmp_path / "f.nc"]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, words), *more])
        assert stop.value.code == 2
        assert "--masked no" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, words), *more, "--masked", "no", "--overwrite"])
        assert not stop.value.code, capsys.readouterr().err
    with xr.open_dataset(tmp_path / "f.nc", decode_timedelta=True) as forecast:
        assert np.isfinite(forecast.u).all()
