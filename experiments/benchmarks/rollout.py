"""What does a rollout cost beside the network itself, and does its memory grow with its length?

python experiments/benchmarks/rollout.py        about 3 minutes on 2 cores; expect ratios of at most 1.05 and 1.2

Time: the same FNO (64 x 64, width 32, 16 modes, 4 layers) called again and again with nothing around it, rolled out in
one scan, rolled out in chunks with ledger and watchdog, and streamed to zarr with labels. They take turns of 100 steps
in one process, 10 rounds after a warm-up, so that a busy machine burdens them alike; medians of the ratios to the bare
calls of the same round are printed, of elapsed time and of processor time.
Memory: peak resident size of two fresh processes that stream 100 and 10000 steps of a small FNO to zarr.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from flax import nnx

from physml.data import spec_of, to_window
from physml.forecast import forecast
from physml.models.fno import FNOConfig
from physml.normalize import Normalizer
from physml.rollout import rollout, rollout_chunks
from physml.saving import build_stepper
from physml.steppers import ResidualConfig


def start(points: int, batch: int) -> xr.Dataset:
    """Smooth random fields on a periodic square."""
    wavenumber = np.hypot(*np.meshgrid(*[np.arange(points)] * 2))
    noise = np.random.default_rng(0).standard_normal((batch, points, points))
    field = np.fft.ifft2(noise * np.exp(-0.1 * wavenumber)).real
    field = (field / field.std()).astype(np.float32)
    axis = np.arange(points) / points
    data = xr.Dataset({"u": (("trajectory", "time", "x", "y"), field[:, None])}, {"time": [0.0], "x": axis, "y": axis})
    return data.assign_attrs(periodic="x y")


def fno_stepper(data: xr.Dataset, width: int, modes: int, depth: int):
    """A residual stepper whose increments are small, so that any number of steps stays finite."""
    spec = spec_of(data)
    normalizer = Normalizer(spec, [0.0], [1.0], [1e-4])
    return build_stepper(ResidualConfig(), FNOConfig(width=width, modes=(modes, modes), depth=depth), spec, normalizer)


def timed(function) -> np.ndarray:
    """Elapsed and processor seconds."""
    begin = np.array([time.perf_counter(), time.process_time()])
    function()
    return np.array([time.perf_counter(), time.process_time()]) - begin


def times(rounds: int, steps: int, chunk: int, batch: int) -> dict[str, float]:
    """Median time per step of each way, and median ratios to the bare calls of the same round."""
    data = start(64, batch)
    stepper = fno_stepper(data, 32, 16, 4)
    window = jax.tree.map(jax.numpy.asarray, to_window(data, stepper.spec))
    graph, numbers = nnx.split(stepper.model)
    stepper_graph, stepper_numbers = nnx.split(stepper)
    call = jax.jit(lambda n, fields, scalars: nnx.merge(graph, n)(fields, scalars))
    scan = jax.jit(lambda n, w: rollout(nnx.merge(stepper_graph, n), w, steps)[:, -1])
    fields, scalars = window.frames[:, 0], jax.numpy.zeros((batch, 0))
    folder = tempfile.TemporaryDirectory()

    def bare():
        for _ in range(steps):
            result = call(numbers, fields, scalars)
        result.block_until_ready()

    ways = {
        "bare": bare,
        "scan": lambda: scan(stepper_numbers, window).block_until_ready(),
        "chunks": lambda: [piece.ledger for piece in rollout_chunks(stepper, window, steps, chunk)],
        "stream": lambda: forecast(
            stepper, data, steps, out=Path(folder.name) / "forecast.zarr", chunk=chunk, overwrite=True
        ),
    }
    for function in ways.values():
        function()
    measured = {name: [] for name in ways}
    for _ in range(rounds):
        for name, function in ways.items():
            measured[name].append(timed(function))
    folder.cleanup()
    result = {f"{name}_ms": 1e3 * float(np.median(values, 0)[0]) / steps for name, values in measured.items()}
    for name in list(ways)[1:]:
        elapsed, processor = np.median(np.array(measured[name]) / np.array(measured["bare"]), 0)
        result |= {f"{name}_over_bare": float(elapsed), f"{name}_over_bare_processor": float(processor)}
    return result


def peak(steps: int) -> float:
    """Peak resident size in MiB of a fresh process that streams `steps`."""
    command = [sys.executable, __file__, "--child", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
    return float(done.stdout.split()[-1])


def child(steps: int) -> None:
    data = start(64, 1)
    stepper = fno_stepper(data, 8, 8, 2)
    with tempfile.TemporaryDirectory() as folder:
        result = forecast(stepper, data, steps, out=Path(folder) / "forecast.zarr", chunk=50)
        assert result.sizes["lead"] == steps
        assert result.ledger_finite_u.values.all()
    # Not getrusage: its maximum begins at the size of the parent process.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="steps of one turn")
    parser.add_argument("--chunk", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--child", type=int, help="internal: stream so many steps and print the peak memory")
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    result = times(options.rounds, options.steps, options.chunk, options.batch)
    result |= {"peak_100_mib": peak(100), "peak_10000_mib": peak(10_000)}
    result["peak_ratio"] = result["peak_10000_mib"] / result["peak_100_mib"]
    result |= {"device": str(jax.devices()[0]), "jax": jax.__version__, **vars(options)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
