"""How fast are windows read from disk, against plain reading of the same bytes, The Well's loader, and memory?

python experiments/benchmarks/loading.py                 all parts, five minutes; expect reading zarr above 0.9 and
                                                         netCDF4 above 0.8 of raw, five times The Well's loader,
                                                         training from disk within 1.05 of memory, 1000 files in 5 s
python experiments/benchmarks/loading.py --part raw      one of raw, well, training, opening: a minute or two
python experiments/benchmarks/loading.py --part well --well-python VENV/bin/python
                                                         a Python that has `the-well` (its fsspec is older than ours)

Ways take turns, every time with files opened anew, so that only the system keeps what was read before. Loaders are
timed from the ninth batch on, for an epoch of batches: what they read ahead before and after is the same.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns  # before jax, which it gives two threads

POINTS, CHUNK = 64, 16  # per axis, and frames per chunk: 256 KiB, as physml writes them
BATCH, WARM_UP = 16, 8


def smooth(trajectories: int, frames: int, names: tuple[str, ...]):
    """Waves with noise of 1e-3 on 64 x 64 points; they compress to 60% as netCDF (shuffled), to 90% as zarr."""
    import numpy as np
    import xarray as xr

    random = np.random.default_rng(0)
    x = np.arange(POINTS, dtype=np.float32) / POINTS
    phase = np.arange(frames, dtype=np.float32)[:, None, None] / 40
    fields = {}
    for wave, name in enumerate(names, 2):
        values = np.empty((trajectories, frames, POINTS, POINTS), np.float32)
        for trajectory in values:
            trajectory[:] = np.sin(2 * np.pi * (wave * x[:, None] + x - phase - random.random(dtype=np.float32)))
            trajectory += 1e-3 * random.standard_normal(trajectory.shape, np.float32)
        fields[name] = (("trajectory", "time", "x", "y"), values)
    coords = {"time": np.arange(frames) / 8, "x": ("x", x, {"periodic": 1}), "y": ("y", x, {"periodic": 1})}
    return xr.Dataset(fields, coords)


# --- against plain reading --------------------------------------------------------------------------------------------


def raw_zarr(path: Path, chunks: int):
    import zarr

    group = zarr.open_group(path, mode="r")

    def read():
        for name in ("u", "v"):
            for start in range(0, group[name].shape[0], chunks * CHUNK):
                group[name][start : start + chunks * CHUNK]

    return read


def raw_tensorstore(path: Path, chunks: int):
    """The library by which physml decodes zarr."""
    import tensorstore

    specs = [{"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}} for name in ("u", "v")]
    arrays = [tensorstore.open(spec, read=True, open=True).result() for spec in specs]

    def read():
        for array in arrays:
            for start in range(0, array.shape[0], chunks * CHUNK):
                array[start : min(start + chunks * CHUNK, array.shape[0])].read().result()

    return read


def raw_netcdf(path: Path, chunks: int):
    """Without masks and scales."""
    import netCDF4
    from xarray.backends.netCDF4_ import NETCDF4_PYTHON_LOCK  # the library is not safe in threads

    file = netCDF4.Dataset(path)
    file.set_auto_maskandscale(False)

    def read():
        for name in ("u", "v"):
            for start in range(0, file[name].shape[0], chunks * CHUNK):
                with NETCDF4_PYTHON_LOCK:
                    file[name][start : start + chunks * CHUNK]

    return read


def epoch(
    path: Path, memory: int, *, frames: int, every: int = 1, in_memory: bool = False, options: dict | None = None
):
    """An epoch of shuffled windows out of a newly opened file."""
    from physml.data import DataConfig, Loader

    data = DataConfig(str(path), train=(0.0, 1.0), valid=(), test=(), **(options or {})).open()["train"]
    loader = Loader(data, frames, BATCH, seed=0, memory=memory, every=every)
    assert (data._stream is None) == in_memory
    for _ in range(WARM_UP):
        next(loader)

    def read():
        for _ in range(len(loader)):
            next(loader)

    return read


def raw(folder: Path, megabytes: int, rounds: int) -> list[dict]:
    """Shuffled windows of three frames that do not overlap, so that as many bytes come out as lie in the file."""
    from physml.data.export import save_dataset

    ds = smooth(1, megabytes * 10**6 // (2 * 4 * POINTS**2) // CHUNK * CHUNK, ("u", "v")).isel(trajectory=0)
    ds = ds.chunk({"time": CHUNK})
    zarr, netcdf = (save_dataset(ds, folder / name) for name in ("a.zarr", "a.nc"))
    return [
        _compare_raw(zarr, "zarr", raw_zarr, ds.nbytes, rounds),
        _compare_raw(zarr, "zarr by TensorStore", raw_tensorstore, ds.nbytes, rounds),
        _compare_raw(netcdf, "netCDF4", raw_netcdf, ds.nbytes, rounds),
    ]


def _compare_raw(path: Path, kind: str, plain, size: int, rounds: int) -> dict:
    sizes = (1, 8, 32, 128)  # the fastest of them is compared
    best = min(sizes, key=lambda n: min(_timed(lambda: plain(path, n))["cpu"] for _ in range(2)))
    ways = {"raw": lambda: plain(path, best), "loader": lambda: epoch(path, size // 2, frames=3, every=3)}
    what = f"shuffled windows of {size / 1e6:.0f} MB, {kind}; raw: {best} chunks at once"
    return _row(what, _take_turns(ways, rounds), "raw", "loader")


# --- against The Well's own loader ------------------------------------------------------------------------------------

WELL = """
import json, resource, sys, time
import torch
from torch.utils.data import DataLoader
from the_well.data import WellDataset
torch.set_num_threads(1)
path, batch, workers, warm_up = sys.argv[1], *map(int, sys.argv[2:])
data = WellDataset(path=path, n_steps_input=1, n_steps_output=1, use_normalization=False, return_grid=False)
loader = DataLoader(data, batch, shuffle=True, num_workers=workers, drop_last=True)

def used():
    return sum(map(sum, [resource.getrusage(who)[:2] for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]))

batches = iter(loader)
if not workers:  # processes are counted as a whole when they have ended
    for _ in range(warm_up): next(batches)
wall, cpu, count = time.perf_counter(), used(), 0
for window in batches: count += len(window["input_fields"])
wall = time.perf_counter() - wall
del batches
print(json.dumps({"wall": wall, "cpu": used() - cpu, "windows": count, "of": len(data)}))
"""


def well(folder: Path, megabytes: int, rounds: int, python: str | None) -> list[dict]:
    """Shuffled windows of two frames, each as often as it is there, of data in the layout of The Well."""
    from physml.data.export import save_dataset

    frames = 100
    names = ("pressure", "tracer", "velocity_x", "velocity_y")
    ds = smooth(max(2, megabytes * 10**6 // (4 * len(names) * POINTS**2 * frames)), frames, names)
    path = save_dataset(ds, folder / "well", to="the_well")
    options = {"split_by": "trajectory"}
    ways = {
        "streamed": lambda: epoch(path, ds.nbytes // 2, frames=2, options=options),
        "memory": lambda: epoch(path, 2 * ds.nbytes, frames=2, in_memory=True, options=options),
    }
    times: dict[str, list[dict]] = {name: [] for name in (*ways, "well", "well, 2 workers")}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_timed(way))
        for name, workers in (("well", 0), ("well, 2 workers", 2)) if python else ():
            times[name].append(_well(python, path / "data" / "train", workers))
    what = f"shuffled windows of {ds.nbytes / 1e6:.0f} MB, The Well"
    found = {name: values for name, values in times.items() if values}
    rows = [_row(what, found, other, own) for other in found if "well" in other for own in ways]
    return rows or [_row(what, found, "memory", "streamed")]


def _well(python: str, path: Path, workers: int) -> dict:
    """Seconds of an epoch, scaled to all of its windows."""
    command = [python, "-c", WELL, str(path), str(BATCH), str(workers), str(WARM_UP)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {clock: found[clock] * found["of"] / found["windows"] for clock in ("wall", "cpu")}


# --- training ---------------------------------------------------------------------------------------------------------


def training(folder: Path, megabytes: int, rounds: int, steps: int = 10) -> list[dict]:
    """Updates of an FNO on windows from memory and from disk, after compilation."""
    import jax
    from flax import nnx

    from physml.data import DataConfig, Loader
    from physml.data.export import save_dataset
    from physml.models import FNOConfig
    from physml.normalize import Normalizer
    from physml.objectives import OneStep
    from physml.steppers import ResidualConfig
    from physml.training.optimizers import TrainingConfig
    from physml.training.update import build_update, initial_state, split

    ds = smooth(1, megabytes * 10**6 // (2 * 4 * POINTS**2) // CHUNK * CHUNK, ("u", "v")).isel(trajectory=0)
    path = save_dataset(ds.chunk({"time": CHUNK}), folder / "training.zarr")

    def updates(memory: int):
        data = DataConfig(str(path), train=(0.0, 1.0), valid=(), test=()).open()["train"]
        config, options = ResidualConfig(), TrainingConfig(batch=BATCH, steps=10**6)
        model = FNOConfig(width=32, modes=(16, 16), depth=4).build(config.signature(data.spec), nnx.Rngs(0))
        parts, params, rest = split(config.build(data.spec, model, Normalizer.identity(data.spec), ()))
        transform, update = build_update(OneStep(), parts, options, 10**6)
        state = {"now": initial_state(params, transform, options)}
        loader, key = Loader(data, 2, BATCH, seed=0, memory=memory), jax.random.key(0)

        def run():
            for _ in range(steps):
                state["now"], metrics = update(state["now"], rest, key, (next(loader),), 1)
            jax.block_until_ready(metrics)

        run()  # compiles
        return lambda: run

    ways = {"disk": updates(ds.nbytes // 2), "memory": updates(2 * ds.nbytes)}
    what = f"{steps} updates of an FNO 64 x 64, {ds.nbytes / 1e6:.0f} MB of zarr"
    return [_row(what, _take_turns(ways, rounds), "disk", "memory")]


# --- many files -------------------------------------------------------------------------------------------------------

OPEN = """
import sys, time
import physml.data
from physml.data import DataConfig
wall, cpu = time.perf_counter(), time.process_time()
data = DataConfig(sys.argv[1], train=(0.0, 1.0), valid=(), test=()).open()["train"]
print(time.perf_counter() - wall, time.process_time() - cpu)
frames = sum(data.lengths)
data.read(0, range(3))
wall, cpu = time.perf_counter(), time.process_time()
for i in range(50):
    start = 101 * i % (frames - 3)
    data.read(0, range(start, start + 3))
print((time.perf_counter() - wall) / 50, (time.process_time() - cpu) / 50)
"""


def opening(folder: Path, files: int, rounds: int) -> list[dict]:
    """A folder of netCDF files of one trajectory, opened by new processes, and windows of it."""
    import netCDF4
    import numpy as np

    many = folder / "many"
    many.mkdir()
    x = np.arange(32) / 32
    for i in range(files):
        with netCDF4.Dataset(many / f"{i:05d}.nc", "w") as file:
            for dim, values in {"time": np.arange(8.0) + 8 * i, "x": x, "y": x}.items():
                file.createDimension(dim, len(values))
                file.createVariable(dim, "f8", (dim,))[:] = values
            file.createVariable("u", "f4", ("time", "x", "y"))[:] = np.random.default_rng(i).random((8, 32, 32))
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-c", OPEN, str(many)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-2:]
        found.append([[1e3 * float(number) for number in line.split()] for line in lines])
    rows = []
    for which, what in enumerate((f"opening {files} netCDF files", "a window of them")):
        wall, cpu = (statistics.median(one[which][clock] for one in found) for clock in (0, 1))
        rows.append({"what": what, "ways": "physml", "wall_ms": round(wall, 1), "cpu_ms": round(cpu, 1)})
    return rows


# --- time -------------------------------------------------------------------------------------------------------------


def _timed(make) -> dict:
    """Seconds of the function that `make` returns; its threads have come to rest before and after."""
    run = make()
    gc.collect()
    time.sleep(0.3)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    del run
    gc.collect()
    time.sleep(0.3)
    return result


def _take_turns(ways: dict, rounds: int) -> dict[str, list[dict]]:
    times: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            times[name].append(_timed(make))
    return times


def _row(what: str, times: dict[str, list[dict]], top: str, bottom: str) -> dict:
    """Median milliseconds of both, and the median of the ratios `top` over `bottom` within one round."""
    row = {"what": what, "ways": f"{top} / {bottom}"}
    for clock in ("wall", "cpu"):
        a, b = ([one[clock] for one in times[name]] for name in (top, bottom))
        row[f"{clock}_ms"] = f"{1e3 * statistics.median(a):.0f} / {1e3 * statistics.median(b):.0f}"
        row[f"{clock}_ratio"] = round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 2)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["raw", "well", "training", "opening"], action="append")
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--well-python", help="a Python that has `the-well`; without it ours is timed alone")
    options = parser.parse_args()
    parts = {
        "raw": lambda folder: raw(folder, options.megabytes, options.rounds),
        "well": lambda folder: well(folder, options.megabytes, min(options.rounds, 2), options.well_python),
        "training": lambda folder: training(folder, options.megabytes, options.rounds),
        "opening": lambda folder: opening(folder, options.files, min(options.rounds, 3)),
    }
    for name in options.part or parts:
        before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            rows = parts[name](Path(folder))
        print(
            f"\n{name} (load {before:.1f} before, {os.getloadavg()[0]:.1f} after)\n\n{turns.markdown(rows)}", flush=True
        )


if __name__ == "__main__":
    main()
