"""`forecast`: from labelled initial states to labelled predictions, watched, in chunks, to memory or to a file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import xarray as xr
from flax import nnx

from physml.coding import whole_number
from physml.data import axes as ax
from physml.data.channels import base_of
from physml.data.labelled import MASKED_BY, from_frames
from physml.errors import ConfigError, DivergedError, SpecError
from physml.fields import Window
from physml.forecast import resume as resuming
from physml.forecast.ledgers import SPECTRUM_STEP, spectrum_coordinates
from physml.forecast.loop import Loop
from physml.forecast.start import Start, members_of, start_of
from physml.forecast.stores import LEAD, check_out, open_store
from physml.rollout import Watchdog, check_limit, check_spectrum, check_stored, perturbed, rollout_chunks
from physml.steppers import Distribution, Members
from physml.steppers.describe import provenance
from physml.steppers.members import drawn

CHUNK_BYTES = 2**25
PERTURBATION = 2**32 - 1  # folded into the key for initial states; steps count from 0
STD = "_std"  # behind the name of a variable whose standard deviation it is


def forecast(
    stepper,
    initial: xr.Dataset,
    steps: int,
    *,
    out: str | Path | None = None,
    chunk: int | None = None,
    key=None,
    members: int | None = None,
    perturb: float | None = None,
    perturb_kind: Literal["smooth", "white"] = "smooth",
    forcing: xr.Dataset | None = None,
    on_divergence: Literal["raise", "stop", "flag"] = "raise",
    limit: float | None = 100.0,
    masked: bool | None = None,
    overwrite: bool = False,
    resume: Literal["never", "auto"] = "never",
    store_every: int = 1,
    spectrum_every: int | Literal["auto"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Predicts `steps` frames after the last one of `initial`.

    Returns the variables of the stepper with dimensions `(trajectory, lead, *space)` in the names, order, direction,
    units and attributes of `initial`; `lead` is the time since the start, `time` the instant a frame is valid at.
    Beside them the ledger, `ledger_QUANTITY_VARIABLE (trajectory, lead)` (finite, mean, energy, variance, minimum,
    maximum; training range as attributes), that of the initial state, `ledger_initial_QUANTITY_VARIABLE (trajectory)`,
    the lead time of one step, `ledger_time_step`, and `steps_completed (trajectory)`, the steps before a divergence.
    Static fields, parameters and the mask that the stepper read are coordinates, so that another forecast can go on
    from this one. Attributes name the model, its config hash and the version. A Gaussian stepper alone also gives
    standard deviations, `VARIABLE_std`; when `members` are asked for, of an ensemble of them too, it is drawn from.

    With `out` the state is saved beside it, in `OUT.partial`, every few chunks and when SIGTERM or SIGINT asks to stop;
    the same call with `resume="auto"` then gives bit for bit what an uninterrupted one gives.

    Args:
        stepper: what `physml.load` gives.
        initial: one frame when the stepper's history is 1, else at least `history` frames, of which the last are taken;
            one or several trajectories. Where its variable `frames` counts those of each trajectory, from the first
            one of `initial` on, padding behind them is not read. Along a dimension `member` are the states of an
            ensemble, each of which goes on.
        out: a .zarr or .nc path to stream to; memory then does not grow with `steps`, and the result is opened lazily.
        chunk: frames computed between two looks at the ledger, and per storage chunk; with `store_every` a multiple of
            it, or the next one is taken.
        key: typed PRNG key of a stochastic stepper, jax.random.key(0) if not given.
        members: an ensemble of so many along dimension `member`. An ensemble of steppers (`Experiment.seeds`,
            `physml.stack_members`) gives its own members without being asked, or the same number of each; one stepper
            needs a key and random numbers: its own, or `perturb`. No two of them may be the same. An `initial` with
            members gives these without being asked.
        perturb: standard deviation of random fields that are added to the initial state of every member, in units of
            the scale of the training data; for other sizes see `physml.perturbed`.
        perturb_kind: "smooth" fields, with a correlation length of a tenth of each axis, or "white" ones.
        forcing: prescribed fields at every valid time, when the stepper has forcing: one for all trajectories, or of
            each, found by label where `initial` and `forcing` have unique ones, else by position.
        on_divergence: "raise" a DivergedError that names step, variable and place, leaving nothing behind; "stop" a bad
            trajectory there (NaN from then on), and everything when none is left, keeping the good part; "flag" only.
        limit: standard deviations beyond the training data and the initial state that count as diverged; None or inf:
            only numbers that are not finite do.
        masked: whether NaN in the initial state, and zeros of the variable that `mask` named in training, mean cells
            without a field; None: as in the training data. True also lets `initial` lack variables, for a model of
            several datasets of which not all had them: they are masked everywhere, and not predicted.
        overwrite: replace `out` if it exists.
        resume: "auto" continues an unfinished rollout to `out`, if there is one, and opens a finished one; "never"
            refuses to touch either.
        store_every: steps from one frame (and its entry in the ledger) that is kept to the next; all are watched. It
            must divide `steps`.
        spectrum_every: also keep `ledger_spectrum_VARIABLE (trajectory, spectrum_step, wavenumber)`, the energy by
            wavenumber shell (`physml.metrics.spectra`) of the initial state and of every so many steps, which
            `store_every` divides; "auto": of fifty to a hundred stored steps (of all, where there are fewer), where the
            fields have a spectrum.
        progress: called with (steps done, steps).

    Raises SpecError and DataError for data that does not fit the stepper, before anything is computed; CheckpointError
    for an unfinished rollout that was begun with anything else; DataError while another process writes `out`;
    Interrupted after SIGTERM or SIGINT (with `out`).
    """
    steps, chunk, members = _whole("steps", steps), _whole("chunk", chunk), _whole("members", members)
    check_limit(limit)
    store_every = _whole("store_every", store_every)
    own = members_of(initial, stepper)
    _check_options(stepper, steps, chunk, key, members, own, perturb, perturb_kind, on_divergence, out, resume)
    key = jax.random.key(0) if key is None else key
    start = start_of(stepper, initial, steps, forcing, masked)
    model = provenance(stepper)
    stepper, members = _for_inference(_as_asked(stepper, members)), _count(stepper, members, own)
    window = start.window if own else _with_members(start.window, members)
    labels = np.arange(members or 0) if start.members is None else start.members
    names = _member_names(start, labels)
    if perturb is not None:
        window = _perturbed(window, start.window, stepper, key, 1 if own else members, perturb, perturb_kind)
    spectrum_every = _spectrum_every(spectrum_every, window, steps, store_every)
    chunk = chunk or _default_chunk(window, store_every)
    stored = _lead_coordinates(start, store_every)
    coords = stored | spectrum_coordinates(start.leads, spectrum_every)
    options = {"steps": steps, "chunk": min(chunk, steps), "members": members, "on_divergence": on_divergence}
    options |= {"limit": limit, "store_every": store_every, "spectrum_every": spectrum_every}
    owner = {}
    if out is not None:
        forced = start.forcing.digest() if start.forcing else "none"
        owner = resuming.identity(model, window, start.valid[0], key, forced, **options)
    if resume == "auto" and not overwrite and (done := resuming.finished(out, owner)) is not None:
        return done
    store = open_store(out, _labels(start, stored, window.mask, stepper.spec, labels), coords, overwrite, resume)
    with store.alone():
        saved = resuming.load(store.folder, owner) if resume == "auto" else None
        loop = Loop(
            store, stepper.spec, stepper, names, members, owner, saved, on_divergence, limit, steps, store_every,
            spectrum_every, start.held, distinct=not own,
        )  # fmt: skip
        try:
            store.begin(saved.names if saved else [])
            pieces = rollout_chunks(
                stepper, window, steps, chunk, key, forcing=start.forcing, store_every=store_every,
                spectrum_every=spectrum_every, resume=saved and (saved.step, saved.arrays),
            )  # fmt: skip
            reached = loop(pieces, progress)
            sizes = {LEAD: reached // store_every}
            sizes |= {SPECTRUM_STEP: reached // spectrum_every + 1} if spectrum_every else {}
            attrs = {**model, **_divergences(loop.watch)}
            attrs |= {"steps_asked": str(steps), "stopped_early": int(reached < steps)}
            attrs |= {resuming.MARK: resuming.mark(owner)} if owner else {}
            attrs |= {MASKED_BY: stepper.spec.mask} if window.mask is not None and stepper.spec.mask else {}
            return store.finish(sizes, loop.labels.summary(loop.watch.good, start.leads[0]), attrs)
        except BaseException as error:
            store.abort(keep=loop.saved and not isinstance(error, DivergedError))
            raise


def check_forecast(
    stepper, initial: xr.Dataset, steps: int, *, out: str | Path, forcing: xr.Dataset | None, chunk: int | None, key,
    members: int | None, perturb: float | None, perturb_kind: str, on_divergence: str, limit: float | None,
    masked: bool | None, overwrite: bool, resume: str, store_every: int, spectrum_every: int | Literal["auto"] | None,
) -> None:  # fmt: skip
    """What `forecast` checks before it computes; raises what it raises."""
    check_limit(limit)
    own = members_of(initial, stepper)
    _check_options(stepper, steps, chunk, key, members, own, perturb, perturb_kind, on_divergence, out, resume)
    start = start_of(stepper, initial, steps, forcing, masked)
    _spectrum_every(spectrum_every, start.window, steps, store_every)
    if not (resume == "auto" and Path(out).exists()):
        check_out(out, overwrite, resume)


def _whole(name: str, value) -> int | None:
    return None if value is None else whole_number(name, value)


def _check_number(name: str, value) -> None:
    if value is not None and (np.ndim(value) or np.asarray(value).dtype.kind not in "iuf"):
        raise ConfigError(f"{name} is {value!r}, but a number was expected.")


def _count(stepper, members: int | None, own: int | None) -> int | None:
    """How many members there will be: those asked for, else those of the initial state or of the stepper."""
    return members or own or (stepper.count if isinstance(stepper, Members) else None)


def _check_options(stepper, steps, chunk, key, members, own, perturb, perturb_kind, on_divergence, out, resume) -> None:
    """`own` counts the members of the initial state."""
    if not hasattr(stepper, "advance"):
        raise ConfigError(
            f"{type(stepper).__name__} has no names and units, so it cannot forecast. Give a stepper, as physml.load "
            "and DirectConfig().build(spec, model, normalizer) make them."
        )
    if resume not in ("never", "auto") or (resume == "auto" and out is None):
        raise ConfigError(
            f"resume is {resume!r} and out {out}, but an unfinished rollout is continued with resume='auto' and the "
            "path of its output."
        )
    if on_divergence not in ("raise", "stop", "flag"):
        raise ConfigError(f"on_divergence is {on_divergence!r}, but raise, stop or flag was expected.")
    if steps < 1 or (chunk is not None and chunk < 1) or (members is not None and members < 1):
        raise ConfigError(f"steps={steps}, chunk={chunk} and members={members} count things: at least 1.")
    _check_key(key)
    if own and members not in (None, own):
        raise ConfigError(
            f"members is {members}, but initial has {own}, each of which goes on from its own state. Leave members "
            "out, or give one of them: initial.isel(member=0)."
        )
    steppers = stepper.count if isinstance(stepper, Members) else None
    random = members is not None and drawn(stepper) is not stepper
    members = _count(stepper, members, own)
    if steppers and members % steppers:
        raise ConfigError(
            f"members is {members}, but the stepper is an ensemble of {steppers} that forecast equally often. Use a "
            f"multiple of {steppers}, or leave members out."
        )
    given = members in (own, steppers)
    if members is not None and key is None and (not given or random or perturb is not None):
        raise ConfigError(
            "members needs a key: without random numbers all members are the same. Pass jax.random.key(0)."
        )
    _check_number("perturb", perturb)
    if perturb is not None and (members is None or not 0 < perturb < np.inf):
        raise ConfigError(
            f"perturb is {perturb} and members {members}, but perturbations have a size above 0 and make members: say "
            "how many."
        )
    if perturb is None and perturb_kind != "smooth":
        raise ConfigError(
            f"perturb_kind is {perturb_kind!r}, but nothing is perturbed. Give the size too, e.g. perturb=0.01 "
            "(--perturb 0.01), or leave it out."
        )


def _check_key(key) -> None:
    try:
        single = key is None or np.ndim(jax.random.key_data(key)) == 1
    except TypeError:
        single = False
    if not single:
        raise ConfigError(f"key is {key!r}, but one key of random numbers was expected: jax.random.key(0).")


def _spectrum_every(asked, window: Window, steps: int, store_every: int) -> int | None:
    """Raises ConfigError for distances of spectra and of stored frames that do not go together or into `steps`."""
    asked = asked if asked in ("auto", None) else _whole("spectrum_every", asked)
    if asked not in ("auto", None) and asked < 1:
        raise ConfigError(f"spectrum_every is {asked!r}, but it counts steps: at least 1, 'auto', or None for none.")
    check_stored(steps, store_every, None if asked == "auto" else asked)
    if asked is None:
        return None
    try:
        check_spectrum(window.spec, window.mask)
    except SpecError:
        if asked == "auto":
            return None
        raise
    # Powers of two: every other distance is another program.
    return store_every << (max(1, steps // store_every // 50).bit_length() - 1) if asked == "auto" else asked


def _as_asked(stepper, members: int | None):
    """An ensemble member by member. A Gaussian stepper drawn from for `members` that were asked for, else with its
    variance, unless its config says that it is drawn.
    """
    if isinstance(stepper, Members):
        return (stepper if members is None else drawn(stepper)).apart()
    if not hasattr(stepper, "distribution"):
        return stepper
    if members is not None:
        return drawn(stepper)
    return stepper if stepper.config.sample else Distribution(stepper)


def _for_inference(stepper):
    """The same numbers with dropout off; the caller's object keeps its mode."""
    stepper = nnx.merge(*nnx.split(stepper))
    stepper.eval()
    return stepper


def _default_chunk(window: Window, store_every: int) -> int:
    frame = 4 * window.frames.shape[0] * int(np.prod(window.frames.shape[2:]))
    return store_every * int(np.clip(CHUNK_BYTES // max(frame, 1), 1, max(256 // store_every, 1)))


def _with_members(window: Window, members: int | None) -> Window:
    """Members are repetitions along the batch, each with random numbers of its own."""
    if members is None:
        return window
    return jax.tree.map(lambda array: np.tile(array, (members, *[1] * (np.ndim(array) - 1))), window)


def _perturbed(tiled: Window, window: Window, stepper, key, members: int, size: float, kind: str) -> Window:
    """`tiled` with an initial state for each member. Raises ConfigError for a stepper that knows no scale."""
    frames = getattr(getattr(stepper, "normalizer", None), "frames", None)
    if frames is None:
        raise ConfigError(
            f"{type(stepper).__name__} has no normalizer, so perturb={size} has no unit. Perturb the initial states "
            "yourself, see physml.perturbed."
        )
    own_key = jax.random.fold_in(key, PERTURBATION)
    states = perturbed(window, own_key, members, size * np.asarray(frames.scale[...]), kind=kind).frames
    return replace(tiled, frames=np.asarray(states.reshape(-1, *states.shape[2:])))


def _member_names(start: Start, labels: np.ndarray) -> tuple[str, ...]:
    names = start.names or tuple(str(i) for i in range(start.batch))
    return tuple(f"{name}, member {m}" for m in labels for name in names) if len(labels) else names


def _labels(start: Start, stored: dict[str, xr.Variable], mask, spec, labels: np.ndarray):
    """`(frames, number of the first) -> dataset`: names, coordinates, attributes put back on, masked cells NaN again.

    Further channels behind those of `spec` are their standard deviations. `stored` are the coordinates of all frames
    that are kept, `labels` those of the members, if any.
    """
    missing = None if mask is None else np.asarray(mask)[:, None] == 0
    conditions, held = _conditions(start.like, spec), list(start.held)

    def named(frames: np.ndarray, first: int) -> xr.Dataset:
        frames = frames if len(held) == frames.shape[-1] else frames[..., held]
        leads, times = (stored[name].values[first - 1 : first - 1 + frames.shape[1]] for name in (LEAD, "time"))
        return from_frames(frames, start.own, start.like, times, leads=leads).assign_coords(conditions)

    def one(frames: np.ndarray, first: int) -> xr.Dataset:
        result = named(frames[..., : len(spec.channels)], first)
        if frames.shape[-1] == len(spec.channels):
            return result
        for name, std in named(frames[..., len(spec.channels) :], first).data_vars.items():
            units = {key: value for key, value in std.attrs.items() if key == "units"}
            result[f"{name}{STD}"] = (std.dims, std.values, {"long_name": f"standard deviation of {name}", **units})
        return result

    def every(frames: np.ndarray, first: int) -> xr.Dataset:
        if missing is not None:
            frames = np.where(np.tile(missing, frames.shape[-1] // len(spec.channels)), np.nan, frames)
        if not len(labels):
            return one(frames, first)
        parts = [one(part, first) for part in np.split(frames, len(labels))]
        coordinate = xr.Variable(("member",), labels, {"long_name": "ensemble member"})
        return xr.concat(parts, "member", data_vars="all", coords="minimal", compat="override").assign_coords(
            member=coordinate
        )

    return every


def _conditions(like: xr.Dataset, spec) -> dict[str, xr.Variable]:
    """Static fields, parameters and the mask, as coordinates: another rollout can go on from the forecast alone."""
    names = [channel.name for channel in (*spec.static, *spec.parameters)] + [spec.mask] * (spec.mask is not None)
    bases = {base_of(like, name) for name in names} - {None, *(base_of(like, name) for name in spec.names)}
    found = {}
    for base in sorted(bases):
        fixed = like.variables[base].isel({dim: 0 for dim in like.variables[base].dims if ax.role(like, dim) == "time"})
        dims = ["trajectory" if ax.role(like, dim) == "trajectory" else dim for dim in fixed.dims]
        found[base] = xr.Variable(dims, fixed.values, fixed.attrs)
    return found


def _lead_coordinates(start: Start, every: int) -> dict[str, xr.Variable]:
    """Of the frames that are kept."""
    return {
        LEAD: xr.Variable((LEAD,), start.leads[every - 1 :: every], {"long_name": "lead time"}),
        "time": xr.Variable((LEAD,), start.valid[every - 1 :: every], start.valid_attrs),
    }


def _divergences(watch: Watchdog) -> dict[str, str]:
    events = sorted(watch.events.values(), key=lambda event: event.step)
    text = " | ".join(event.message for event in events[:10])
    more = f" | and {len(events) - 10} more" if len(events) > 10 else ""
    return {"divergence": text + more or "none"}
