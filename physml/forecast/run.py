"""`forecast`: from labelled initial states to labelled predictions, watched, in chunks, to memory or to a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import xarray as xr
from flax import nnx

from physml.data.labelled import from_frames
from physml.errors import ConfigError, DivergedError
from physml.fields import Window
from physml.forecast.start import Start, start_of
from physml.forecast.stores import open_store
from physml.rollout import Bounds, Watchdog, rollout_chunks
from physml.steppers.describe import provenance

QUANTITIES = {
    "finite": "every number of the frame is finite",
    "mean": "area-weighted mean",
    "energy": "area-weighted mean square",
    "variance": "area-weighted variance",
    "minimum": "minimum over the cells",
    "maximum": "maximum over the cells",
}
SQUARED = ("energy", "variance")
CHUNK_BYTES = 2**25


def forecast(
    stepper,
    initial: xr.Dataset,
    steps: int,
    *,
    out: str | Path | None = None,
    chunk: int | None = None,
    key=None,
    members: int | None = None,
    forcing: xr.Dataset | None = None,
    on_divergence: Literal["raise", "stop", "flag"] = "raise",
    limit: float | None = 100.0,
    masked: bool | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Predicts `steps` frames after the last one of `initial`.

    Returns the variables of the stepper with dimensions `(trajectory, lead, *space)` in the names, order, direction,
    units and attributes of `initial`; `lead` is the time since the start, `time` the instant a frame is valid at.
    Beside them the ledger, `ledger_QUANTITY_VARIABLE (trajectory, lead)` (finite, mean, energy, variance, minimum,
    maximum; initial value and training range as attributes), and `steps_completed (trajectory)`, the steps before a
    divergence. Attributes name the model, its config hash and the version.

    Args:
        stepper: what `physml.load` gives.
        initial: one frame when the stepper's history is 1, else at least `history` frames, of which the last are taken;
            one or several trajectories.
        out: a .zarr or .nc path to stream to; memory then does not grow with `steps`, and the result is opened lazily.
        chunk: frames computed between two looks at the ledger, and per storage chunk.
        key: typed PRNG key of a stochastic stepper. members: with it, so many realizations along dimension `member`.
        forcing: prescribed fields at every valid time, when the stepper has forcing.
        on_divergence: "raise" a DivergedError that names step, variable and place, leaving nothing behind; "stop" a bad
            trajectory there (NaN from then on), and everything when none is left, keeping the good part; "flag" only.
        limit: standard deviations beyond the training data and the initial state that count as diverged; None: only
            numbers that are not finite do.
        masked: whether NaN in the initial state mean cells without a field; None: as in the training data.
        overwrite: replace `out` if it exists.
        progress: called with (steps done, steps).

    Raises SpecError and DataError for data that does not fit the stepper, before anything is computed.
    """
    _check_options(steps, chunk, key, members, on_divergence)
    start = start_of(stepper, initial, steps, forcing, masked)
    stepper = _for_inference(stepper)
    window, names = _with_members(start.window, members), _member_names(start, members)
    chunk = min(chunk or _default_chunk(window), steps)
    store = open_store(out, _labels(start, stepper.spec, members), _lead_coordinates(start), overwrite)
    read = start.forcing and (lambda first, last: _tiled(start.forcing(first, last), members))
    try:
        pieces = rollout_chunks(stepper, window, steps, chunk, key, forcing=read)
        watch, ledgers, leads = _run(pieces, store, stepper, names, on_divergence, limit, steps, progress)
        extra = _extra_variables(stepper.spec, ledgers, watch, leads, members)
        attrs = {**_attributes(stepper, watch, leads, steps), "stopped_early": int(leads < steps)}
        return store.finish(leads, extra, attrs)
    except BaseException:
        store.abort()
        raise


def _check_options(steps, chunk, key, members, on_divergence) -> None:
    if on_divergence not in ("raise", "stop", "flag"):
        raise ConfigError(f"on_divergence is {on_divergence!r}, but raise, stop or flag was expected.")
    if steps < 1 or (chunk is not None and chunk < 1) or (members is not None and members < 1):
        raise ConfigError(f"steps={steps}, chunk={chunk} and members={members} count things: at least 1.")
    if members is not None and key is None:
        raise ConfigError(
            "members needs a key: without random numbers all members are the same. Pass jax.random.key(0)."
        )


def _for_inference(stepper):
    """The same numbers with dropout off; the caller's object keeps its mode."""
    stepper = nnx.merge(*nnx.split(stepper))
    stepper.eval()
    return stepper


def _default_chunk(window: Window) -> int:
    frame = 4 * window.frames.shape[0] * int(np.prod(window.frames.shape[2:]))
    return int(np.clip(CHUNK_BYTES // max(frame, 1), 1, 256))


def _with_members(window: Window, members: int | None) -> Window:
    """Members are repetitions along the batch, each with random numbers of its own."""
    if members is None:
        return window
    return jax.tree.map(lambda array: _tiled(array, members), window)


def _tiled(array, members: int | None) -> np.ndarray:
    return array if members is None else np.tile(array, (members, *[1] * (np.ndim(array) - 1)))


def _member_names(start: Start, members: int | None) -> tuple[str, ...]:
    batch = start.window.frames.shape[0]
    names = start.names or tuple(str(i) for i in range(batch))
    return names if members is None else tuple(f"{name}, member {m}" for m in range(members) for name in names)


def _labels(start: Start, spec, members: int | None):
    """`(frames, first step) -> dataset`: names, coordinates and attributes put back on, masked cells NaN again."""
    mask = None if start.window.mask is None else np.asarray(start.window.mask)[:, None] == 0

    def one(frames: np.ndarray, first: int) -> xr.Dataset:
        if mask is not None:
            frames = np.where(mask, np.nan, frames)
        times = start.valid[first - 1 : first - 1 + frames.shape[1]]
        return from_frames(frames, spec, start.like, times, first=first)

    if members is None:
        return one

    def several(frames: np.ndarray, first: int) -> xr.Dataset:
        parts = [one(part, first) for part in np.split(frames, members)]
        coordinate = xr.Variable(("member",), np.arange(members), {"long_name": "ensemble member"})
        return xr.concat(parts, "member", data_vars="all", coords="minimal", compat="override").assign_coords(
            member=coordinate
        )

    return several


def _lead_coordinates(start: Start) -> dict[str, xr.Variable]:
    time = {"standard_name": "time", "long_name": "valid time"}
    return {
        "lead": xr.Variable(("lead",), start.leads, {"long_name": "lead time"}),
        "time": xr.Variable(("lead",), start.valid, time),
    }


def _run(pieces, store, stepper, names, on_divergence: str, limit, steps: int, progress):
    """Writes every chunk; returns the watchdog, the ledgers (initial first) and the number of leads that were kept."""
    watch, ledgers = None, []
    for piece in pieces:
        if watch is None:
            watch = Watchdog(stepper.spec, Bounds.of(stepper, piece.initial, limit), names)
            ledgers.append(piece.initial)
        found, count = watch.read(piece.start, piece.frames, piece.ledger), piece.frames.shape[1]
        frames = piece.frames
        if on_divergence == "raise":
            watch.raise_first(found)
        if on_divergence == "stop" and watch.events:
            frames = np.array(frames)
            for sample in watch.events:
                frames[sample, max(watch.good[sample] - piece.start, 0) :] = np.nan
            if watch.everything_failed:
                count = _last_good(watch) - piece.start
        ledgers.append(piece.ledger)
        if count:
            store.write(piece.start + 1, frames[:, :count])
        if progress:
            progress(piece.start + count, steps)
        if on_divergence == "stop" and watch.everything_failed:
            return watch, ledgers, piece.start + count
    return watch, ledgers, steps


def _last_good(watch: Watchdog) -> int:
    last = int(watch.good.max())
    if not last:
        raise DivergedError(f"Nothing can be kept. {next(iter(watch.events.values())).message}")
    return last


def _extra_variables(spec, ledgers, watch: Watchdog, leads: int, members: int | None) -> xr.Dataset:
    """The ledger and the steps that each trajectory completed."""
    start, *rest = ledgers
    ledger = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[:, :leads], *rest)
    dims = ("trajectory",) if members is None else ("member", "trajectory")

    def fold(array):
        return array if members is None else array.reshape(members, -1, *array.shape[1:])

    variables = {}
    for quantity, meaning in QUANTITIES.items():
        values, initial = (np.asarray(getattr(x, quantity)) for x in (ledger, start))
        for i, channel in enumerate(spec.channels):
            attrs: dict[str, Any] = {"long_name": f"{meaning}: {channel.name}"}
            column = fold(values[..., i])
            if quantity == "finite":
                column = column.astype(np.int8)
            else:
                unit = channel.unit and (f"({channel.unit})2" if quantity in SQUARED else channel.unit)
                attrs |= {"units": unit} if unit else {}
                attrs |= {"initial": initial[:, i].astype(np.float64)}
                if watch.bounds.scale is not None:
                    attrs |= {"training_center": float(watch.bounds.center[i])}
                    attrs |= {"training_scale": float(watch.bounds.scale[i])}
            variables[f"ledger_{quantity}_{channel.name}"] = ((*dims, "lead"), column, attrs)
    attrs = {"long_name": "steps before the trajectory diverged (all of them if it did not)"}
    variables["steps_completed"] = (dims, fold(watch.good.astype(np.int32)), attrs)
    return xr.Dataset(variables)


def _attributes(stepper, watch: Watchdog, leads: int, steps: int) -> dict[str, str]:
    events = sorted(watch.events.values(), key=lambda event: event.step)
    text = " | ".join(event.message for event in events[:10])
    more = f" | and {len(events) - 10} more" if len(events) > 10 else ""
    return {**provenance(stepper), "divergence": text + more or "none", "steps_asked": str(steps)}
