"""Small labelled datasets whose every value tells where it belongs."""

import types

import numpy as np
import pytest
import xarray as xr


def weather(days=12, start="2001-02-20", hours=24, lat=5, lon=6, dtype="f4", **attrs) -> xr.Dataset:
    """Two fields on latitude x longitude with CF metadata: value = 1000 * day + 10 * latitude + longitude index."""
    time = np.datetime64(start, "ns") + np.arange(days) * np.timedelta64(hours, "h").astype("timedelta64[ns]")
    latitude, longitude = np.linspace(30, 50, lat), np.linspace(-20, 5, lon)
    value = 1000.0 * np.arange(days)[:, None, None] + 10 * np.arange(lat)[:, None] + np.arange(lon)
    coords = {
        "time": ("time", time, {"standard_name": "time"}),
        "latitude": ("latitude", latitude, {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": ("longitude", longitude, {"units": "degrees_east", "standard_name": "longitude"}),
    }
    dims = ("time", "latitude", "longitude")
    fields = {
        "slp": (dims, value.astype(dtype), {"units": "Pa", "long_name": "pressure"}),
        "t2m": (dims, (value / 10 + 250).astype(dtype), {"units": "K"}),
    }
    return xr.Dataset(fields, coords, {"title": "made up", **attrs})


def waves(trajectories=4, frames=7, x=8, y=6, dtype="f4", step=0.25) -> xr.Dataset:
    """Nondimensional trajectories with a static field and a parameter."""
    random = np.random.default_rng(0)
    return xr.Dataset(
        {
            "u": (("trajectory", "time", "x", "y"), random.normal(size=(trajectories, frames, x, y)).astype(dtype)),
            "a": (("trajectory", "x", "y"), random.normal(size=(trajectories, x, y)).astype(dtype)),
            "wind": (("time", "x", "y"), random.normal(size=(frames, x, y)).astype(dtype)),
            "viscosity": (("trajectory",), np.linspace(0.1, 0.4, trajectories).astype(dtype)),
        },
        {
            "time": np.arange(frames) * step,
            "x": ("x", np.arange(x) / x, {"periodic": 1}),
            "y": ("y", np.arange(y) / y),
        },
    )


@pytest.fixture
def make():
    """`make.weather(...)` and `make.waves(...)`."""
    return types.SimpleNamespace(weather=weather, waves=waves)
