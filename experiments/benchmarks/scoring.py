"""How fast are forecasts scored, beside a plain read of the same bytes?

python experiments/benchmarks/scoring.py [--starts 60] [--rounds 3]
1 min on 2 cores; files in a temporary folder.

Forecasts and truth are zarr stores. The plain read takes every chunk of both once, with as many threads as the scoring,
and does nothing with it. `turns.py` says how the clocks are read; the ratio is of elapsed times within one run.
"""

import argparse
import pathlib
import tempfile

from turns import THREADS, compare, markdown


def stores(folder: pathlib.Path, starts: int, leads: int, members: int):
    """A forecast, an ensemble and the truth on two levels at 2 degrees, chunked by start; opened lazily."""
    import numpy as np
    import xarray as xr

    rng, hour = np.random.default_rng(0), np.timedelta64(3600, "s").astype("timedelta64[ns]")
    time = np.datetime64("2020-01-01", "ns") + 6 * hour * np.arange(starts + leads)
    space = {
        "level": ("level", [500.0, 850.0], {"units": "hPa"}),
        "latitude": ("latitude", np.linspace(-89, 89, 90), {"units": "degrees_north"}),
        "longitude": ("longitude", np.arange(180) * 2.0, {"units": "degrees_east"}),
    }
    dims, shape = ("level", "latitude", "longitude"), (2, 90, 180)

    def field(lead_dims, sizes):
        return (*lead_dims, *dims), rng.standard_normal((*sizes, *shape)).astype(np.float32), {"units": "K"}

    labels = {"init_time": time[:starts], "prediction_timedelta": 6 * hour * np.arange(1, leads + 1), **space}
    frames = ("init_time", "prediction_timedelta")
    made = {
        "truth": (xr.Dataset({"t": field(("time",), (starts + leads,))}, {"time": time, **space}), {"time": 8}),
        "forecast": (xr.Dataset({"t": field(frames, (starts, leads))}, labels), {"init_time": 1}),
        "ensemble": (
            xr.Dataset({"t": field((*frames, "number"), (starts // members, leads, members))},
                       {**labels, "init_time": time[: starts // members]}),
            {"init_time": 1},
        ),
    }  # fmt: skip
    for name, (ds, chunks) in made.items():
        ds.chunk(chunks).to_zarr(folder / f"{name}.zarr", zarr_format=3, consolidated=False)
    return {name: xr.open_zarr(folder / f"{name}.zarr", consolidated=False) for name in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=60)
    parser.add_argument("--leads", type=int, default=20)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import dask
    import numpy as np
    import xarray as xr

    from physml.evaluate import evaluate

    dask.config.set(num_workers=THREADS)
    with tempfile.TemporaryDirectory() as name:
        data = stores(pathlib.Path(name), options.starts, options.leads, options.members)
        truth = data["truth"]
        season = {"hour": [0, 6, 12, 18], "dayofyear": np.arange(1, 367)}
        climatology = truth.isel(time=0, drop=True).load().expand_dims(season)
        climatology = xr.Dataset({"t": climatology["t"].assign_attrs(units="K")})

        def read(*names):
            def run():
                blocks = [block for n in names for block in data[n]["t"].data.to_delayed().ravel()]
                dask.compute(*[dask.delayed(np.shape)(block) for block in blocks], scheduler="threads")

            return run

        def score(which, metrics, **more):
            return lambda: evaluate(data[which], truth, metrics=metrics, draws=20, **more)

        deterministic, probabilistic = read("forecast", "truth"), read("ensemble", "truth")
        size = {n: ds.nbytes / 2**20 for n, ds in data.items()}
        cases = {
            f"forecast, {size['forecast'] + size['truth']:.0f} MiB": {
                "plain read": deterministic,
                "rmse, mae, bias": score("forecast", ("rmse", "mae", "bias")),
                "and acc": score("forecast", ("rmse", "mae", "bias", "acc"), climatology=climatology),
            },
            f"ensemble, {size['ensemble'] + size['truth']:.0f} MiB": {
                "plain read": probabilistic,
                "crps, spread, rmse": score("ensemble", ("crps", "spread", "rmse")),
            },
        }
        print(markdown(compare(cases, options.rounds, base="plain read")))


if __name__ == "__main__":
    main()
