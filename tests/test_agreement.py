"""Until when the members of a labelled forecast agree: the numbers of the array functions, under labels."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import physml
from physml.data import open_dataset, spec_of
from physml.errors import ConfigError, SpecError
from physml.evaluate import agreement, predictability
from physml.metrics import Measure
from physml.metrics.ensemble import variance
from physml.metrics.predictability import decorrelation_time, member_correlation

HOUR = np.timedelta64(3_600_000_000_000, "ns")


@pytest.fixture
def ensemble():
    """Four members of two trajectories that part with lead, the second one never far; latitude descending."""
    random, leads = np.random.default_rng(0), np.arange(1, 7)
    noise = (
        random.standard_normal((4, 2, 6, 5, 8)) * (leads / 5)[:, None, None] * np.array([1, 0.1]).reshape(2, 1, 1, 1)
    )
    values = (random.standard_normal((2, 1, 5, 8)) + noise).astype(np.float32)
    return xr.Dataset(
        {"u": (("member", "trajectory", "lead", "latitude", "longitude"), values, {"units": "m s-1"})},
        {
            "trajectory": [10, 20], "lead": leads * 6 * HOUR,
            "time": ("lead", np.datetime64("2001-01-01", "ns") + leads * 6 * HOUR),
            "latitude": ("latitude", np.linspace(80, -80, 5), {"units": "degrees_north"}),
            "longitude": ("longitude", np.arange(8) * 45.0, {"units": "degrees_east"}),
        },
    )  # fmt: skip


def arrays(ds):
    """`(member, batch, lead, *space, channel)` in the order of the spec, and the spec."""
    spec = spec_of(ds.isel(member=0, trajectory=0).drop_vars("lead").rename(lead="step").swap_dims(step="time"))
    return ds["u"].sortby("latitude").values[..., None], spec


def test_a_forecast_says_from_when_on_it_is_likely_inaccurate(ensemble, tmp_path, monkeypatch):
    found, (members, spec) = predictability(ensemble, 0.7), arrays(ensemble)
    times, capped = decorrelation_time(members, spec, 0.7)
    assert_allclose(found["inaccurate_from_u"] / np.timedelta64(1, "s"), times[:, 0])
    assert_array_equal(found["inaccurate_from_u_capped"], capped[:, 0])
    assert_array_equal(capped[:, 0], [False, True])
    assert_allclose(found["correlation_u"], member_correlation(members, spec)[..., 0], rtol=1e-5)
    spread = np.sqrt(Measure.of(spec).mean(variance(members)))
    assert_allclose(found["spread_u"], spread[..., 0], rtol=1e-5)
    assert found["spread_u"].dims == ("trajectory", "lead")
    assert found["spread_u"].attrs["units"] == "m s-1"
    assert found["trajectory"].values.tolist() == [10, 20]
    assert (found.attrs["threshold"], found.attrs["members"]) == (0.7, 4)
    # Read in pieces, from a file, in another order of dimensions and of members, or one trajectory alone: the same.
    ensemble.transpose("trajectory", "longitude", "lead", ...).to_zarr(tmp_path / "ahead.zarr", consolidated=False)
    monkeypatch.setattr(agreement, "BLOCK", 2000)
    xr.testing.assert_allclose(predictability(open_dataset(tmp_path / "ahead.zarr"), 0.7), found)
    other = predictability(ensemble.isel(member=[2, 0, 3, 1]).rename(member="number"), 0.7)
    xr.testing.assert_allclose(other, found)
    alone = predictability(ensemble.isel(trajectory=1), 0.7)
    xr.testing.assert_allclose(alone, found.isel(trajectory=1))


def test_cells_without_values_do_not_count(ensemble):
    holed = ensemble.where(ensemble["longitude"] > 100)
    found, (members, spec) = predictability(holed), arrays(ensemble)
    mask = np.isfinite(arrays(holed)[0][0, 0, 0])
    assert_allclose(found["correlation_u"], member_correlation(members, spec, mask)[..., 0], rtol=1e-5)
    failed = ensemble.copy(deep=True)
    failed["u"][1, 1, 3:] = np.nan  # a member that diverged agrees with none
    found = predictability(failed)
    assert found["inaccurate_from_u"].values[1] == 4 * 6 * HOUR
    assert not found["inaccurate_from_u_capped"].values[1]


def test_leads_that_are_numbers_and_fields_on_levels(ensemble):
    plain = ensemble.assign_coords(
        lead=("lead", np.arange(1, 7) * 0.5, {"units": "days"}), time=("lead", np.arange(6.0))
    )
    found = predictability(plain.expand_dims(level=[500, 850], axis=-1).assign(v=plain["u"]))
    assert {"inaccurate_from_u_500", "inaccurate_from_u_850", "inaccurate_from_v"} <= set(found.data_vars)
    assert found["inaccurate_from_u_850"].values[1] == 3.0
    assert found["inaccurate_from_v"].attrs["units"] == "days"


def test_what_holds_no_ensemble_is_refused(ensemble):
    for single in (ensemble.isel(member=0), ensemble.isel(member=[0])):
        with pytest.raises(ConfigError, match="two or more along 'member' are needed"):
            predictability(single)
    with pytest.raises(SpecError, match="correlated over cells"):
        predictability(ensemble.isel(latitude=0, longitude=0, drop=True))
    with pytest.raises(ConfigError, match="correlations were expected"):
        predictability(ensemble, "high")
    with pytest.raises(ConfigError, match=r"physml.predictability\(forecast\)"):
        physml.metrics.predictability.decorrelation_time(ensemble, None)
