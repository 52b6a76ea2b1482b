"""The work of scoring forecasts in blocks: each reads a piece of the forecasts and of the truth and sums it up.

A block is some channels, starts, leads and cells. Its sums add to those of the others, so the scores do not depend on
how the data were cut; what is in memory at a time is a few blocks, whatever the length of the data.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from physml.errors import ConfigError, DataError, DependencyError
from physml.evaluate.labels import MEMBER
from physml.evaluate.sources import Categories, Climatology, Source, Tile, tiles
from physml.evaluate.statistics import field_statistics, pair_statistics
from physml.fields import Spec
from physml.metrics import Measure, Metric
from physml.metrics.moments import pair_sums

BLOCK = 2**25  # bytes of a forecast in a block
LOCAL = ("threads", "synchronous", "processes")
PATIENCE = 20  # s to reach a cluster
PERSISTENCE, CLIMATOLOGY = "persistence", "climatology"


@dataclass(frozen=True)
class Block:
    """Channels of the spec, positions among the scored starts and leads, and cells."""

    channels: tuple[int, ...]
    starts: slice
    leads: slice
    tile: Tile


@dataclass(frozen=True)
class Work:
    """What every block needs; pickled once for each worker.

    Attributes:
        forecasts: by name, `floors` beside them; deviations: standard deviations of those that have them.
        starts, leads: positions in the forecasts of what is scored.
        trajectories: `(start,)` positions in the truth.
        truth_index: `(start, lead)` positions in the truth, -1 where it lacks the time. seasons: of the climatology,
            `(start, lead, season)`.
        last_input: `(start,)` positions in the truth, for persistence.
        shift: `(channel,)` typical values of the truth.
        whole: metrics of whole frames, and the leads of which spectra are kept; with them, blocks have all cells.
    """

    spec: Spec
    forecasts: dict[str, Source]
    truth: Source
    starts: np.ndarray
    leads: np.ndarray
    trajectories: np.ndarray
    truth_index: np.ndarray
    shift: np.ndarray
    floors: tuple[str, ...] = ()
    last_input: np.ndarray | None = None
    climatology: Climatology | None = None
    seasons: np.ndarray | None = None
    categories: Categories | None = None
    category_seasons: np.ndarray | None = None
    whole: dict[str, Metric] = field(default_factory=dict)
    spectrum_leads: tuple[int, ...] = ()  # counted from 1 among the scored leads
    masked: bool = False
    deviations: dict[str, Source] = field(default_factory=dict)

    @property
    def frames(self) -> bool:
        return bool(self.whole or self.spectrum_leads)


def plan(work: Work, joint: bool, batch: int | None = None) -> list[Block]:
    """Blocks of about `BLOCK` bytes that follow the pieces in which the first forecast is stored.

    `joint`: all channels in one block, for metrics that need them together. `batch`: starts in a block at most.
    """
    source, spec = next(iter(work.forecasts.values())), work.spec
    every = tuple(range(len(spec.channels)))
    groups = [every] if joint else [tuple(sorted(f.positions)) for f in source.fields]
    blocks = []
    for channels in groups:
        length = _lengths(work, source, channels, joint)
        cells = tiles(spec.grid.shape, tuple(length[axis.name] for axis in spec.grid.axes))
        for starts in _cuts(len(work.starts), min(length["trajectory"], batch or len(work.starts))):
            for leads in _cuts(len(work.leads), length["time"]):
                for part in _cuts(len(channels), length["entry"]):
                    blocks += [Block(channels[part], starts, leads, tile) for tile in cells]
    return blocks


def _lengths(work: Work, source: Source, channels: tuple[int, ...], joint: bool) -> dict[str, int]:
    """Role -> length of a block."""
    space = [axis.name for axis in work.spec.grid.axes]
    size = dict(zip(space, work.spec.grid.shape))
    size |= {"trajectory": len(work.starts), "time": len(work.leads), "entry": len(channels)}
    default = {**size, "trajectory": 1, "time": 1, "entry": 1}
    length = {role: min(size[role], source.chunk(channels[0]).get(role, default[role])) for role in size}
    length |= {name: size[name] for name in space} if work.frames else {}
    length["entry"] = size["entry"] if joint else length["entry"]
    variable = source.variables[source.fields[0].variable]
    budget = BLOCK // (variable.dtype.itemsize * variable.sizes.get(MEMBER, 1))
    shrinkable = ["trajectory", "time", *([] if joint else ["entry"]), *([] if work.frames else space)]
    for role in shrinkable:
        excess = math.prod(length.values()) / budget
        length[role] = max(1, int(length[role] / excess)) if excess > 1 else length[role]
    for role in (*space, "time", "entry", "trajectory"):
        room = max(1, int(budget // math.prod(length.values())))
        length[role] = min(size[role], length[role] * room)
    return length


def _cuts(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def sum_block(work: Work, block: Block) -> tuple[Block, dict[str, dict[str, np.ndarray]], dict]:
    """(block, sums of cells by model and name `(start, lead, channel)`, parts of whole frames by model)."""
    index = work.truth_index[block.starts, block.leads]
    shape = index.shape
    unique, back = np.unique(index, return_inverse=True)
    back = back.reshape(shape)
    truth, rows = _read_truth(work, block, np.maximum(unique, 0), back)
    normal, normal_rows = _read_climatology(work, block)
    area = np.broadcast_to(work.spec.grid.weights(), work.spec.grid.shape)[block.tile].astype(np.float64)
    models = dict(_read_models(work, block, normal, normal_rows))
    at = {"trajectory": work.starts[block.starts], "time": work.leads[block.leads]}
    stds = {name: source.read(block.channels, block.tile, **at) for name, source in work.deviations.items()}
    sums: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    for i, channel in enumerate(block.channels):
        _check_infinite(truth[i], work, block, channel)
        true = truth[i].reshape(truth.shape[1], -1)[rows.ravel()]
        climate = None if normal is None else normal[i].reshape(normal.shape[1], -1)[normal_rows.ravel()]
        categories = _categories(work, block, channel)
        for name, values in models.items():
            flat = values[i].reshape(values.shape[1], -1, area.size)
            std = stds[name][i].reshape(-1, area.size) if name in stds else None
            found = pair_sums(flat, true, area.ravel(), work.shift[channel], climate, categories, std)
            for key, value in found.items():
                sums[name].setdefault(key, np.full((*shape, len(block.channels)), np.nan))[..., i] = value.reshape(
                    shape
                )
    return block, sums, _frame_statistics(work, block, models, truth, rows, normal, normal_rows)


def _read_truth(work: Work, block: Block, times: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct frames `(channel, frame, *tile)` and which of them each pair `(start, lead)` needs."""
    chosen, which = np.unique(work.trajectories[block.starts], return_inverse=True)
    frames = work.truth.read(block.channels, block.tile, trajectory=chosen, time=times)
    return frames.reshape(len(frames), -1, *frames.shape[3:]), which[:, None] * len(times) + back


def _read_climatology(work: Work, block: Block) -> tuple[np.ndarray | None, np.ndarray | None]:
    if work.climatology is None:
        return None, None
    seasons, rows = _distinct(work.seasons[block.starts, block.leads])
    return work.climatology.read(block.channels, block.tile, seasons), rows


def _distinct(seasons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct entries `(entry, season)` and which of them each pair `(start, lead)` needs."""
    if not seasons.shape[-1]:  # one state for all seasons, which `unique` does not take
        return seasons[:1, 0], np.zeros(seasons.shape[:2], int)
    unique, back = np.unique(seasons.reshape(-1, seasons.shape[-1]), axis=0, return_inverse=True)
    return unique, back.reshape(seasons.shape[:2])


def _categories(work: Work, block: Block, channel: int):
    if work.categories is None or channel not in work.categories.channels:
        return None
    seasons, rows = _distinct(work.category_seasons[block.starts, block.leads])
    threshold, dry = work.categories.read(channel, block.tile, seasons)
    return threshold.reshape(len(threshold), -1)[rows.ravel()], dry.ravel()


def _read_models(work: Work, block: Block, normal, normal_rows) -> Iterator[tuple[str, np.ndarray]]:
    """Name, `(channel, member, start, lead, *tile)` of every forecast and floor."""
    starts, leads = work.starts[block.starts], work.leads[block.leads]
    for name, source in work.forecasts.items():
        members = np.arange(max(v.sizes.get(MEMBER, 1) for v in source.variables.values()))
        yield name, source.read(block.channels, block.tile, member=members, trajectory=starts, time=leads)
    if PERSISTENCE in work.floors:
        times, back = np.unique(work.last_input[block.starts], return_inverse=True)
        frames, rows = _read_truth(work, block, times, back.reshape(-1, 1))
        yield PERSISTENCE, frames[:, np.broadcast_to(rows, (len(starts), len(leads)))][:, None]
    if CLIMATOLOGY in work.floors:
        yield CLIMATOLOGY, normal[:, normal_rows][:, None]


def _check_infinite(true: np.ndarray, work: Work, block: Block, channel: int) -> None:
    if np.isinf(true).any():
        raise DataError(
            f"{work.truth.name}: {work.spec.names[channel]!r} is infinite at a valid time of the starts "
            f"{block.starts.start}..{block.starts.stop - 1}. Mask or fill it."
        )


def _frame_statistics(work: Work, block: Block, models, truth, rows, normal, normal_rows) -> dict:
    """Parts of the metrics of whole frames, and spectra, by model ("" for the truth)."""
    if not work.frames:
        return {}
    import jax

    true = _channels_last(truth[:, rows])
    climate = None if normal is None else _channels_last(normal[:, normal_rows])
    mask = np.isfinite(true)
    mask = None if mask.all() and not work.masked else mask
    first = block.leads.start + 1
    kept = tuple(lead - first + 1 for lead in work.spectrum_leads if first <= lead < first + rows.shape[1])
    measured = _measured(work.spec, block.channels, tuple(work.whole.items()), kept, work.masked)
    found = {}
    for name, values in models.items():
        frames = _channels_last(values.mean(1, dtype=np.float32) if values.shape[1] > 1 else values[:, 0])
        found[name] = jax.device_get(measured(frames, true, climate, mask))
    alone = _measured(work.spec, block.channels, (), kept, work.masked)
    found[""] = jax.device_get(alone(true, true, None, mask))
    return found


def _channels_last(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 0, -1).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _measured(spec: Spec, channels: tuple[int, ...], metrics: tuple, kept: tuple[int, ...], masked: bool):
    """The jitted statistics of whole frames `(start, lead, *space, channel)`."""
    import jax
    import jax.numpy as jnp

    own = dataclasses.replace(spec, channels=tuple(spec.channels[i] for i in channels))

    @jax.jit
    def statistics(frames, truth, climatology, mask):
        measure = Measure.of(own, None, climatology)
        if mask is not None:
            measure = Measure(measure.weights * mask, climatology, own.grid, masked)
            truth = jnp.where(mask, truth, 0)
        parts = pair_statistics(frames, truth, measure, dict(metrics))[0]
        return parts | ({"spectrum": field_statistics(frames, measure, kept)["spectrum"]} if kept else {})

    return statistics


def check_scheduler(scheduler: str | None) -> str:
    """The scheduler by name or address. Raises ConfigError for what is neither."""
    scheduler = scheduler or "threads"
    if not isinstance(scheduler, str) or (scheduler not in LOCAL and "://" not in scheduler):
        raise ConfigError(
            f"scheduler is {scheduler!r}, but one of {', '.join(LOCAL)} or the address of a dask.distributed "
            "scheduler, such as tcp://127.0.0.1:8786, was expected."
        )
    return scheduler


def run(work: Work, blocks: list[Block], scheduler: str) -> Iterator[tuple]:
    """`sum_block` of every block, as they come. Raises DependencyError without dask.distributed where it is needed,
    ConfigError when no scheduler answers."""
    import dask

    if scheduler in LOCAL:
        tasks = [dask.delayed(functools.partial(sum_block, work), pure=False)(block) for block in blocks]
        yield from dask.compute(*tasks, scheduler=scheduler, traverse=False)
        return
    try:
        import distributed
    except ImportError as error:
        raise DependencyError(
            f"The scheduler {scheduler} needs dask.distributed, which is not installed. Run "
            "`pip install 'dask[distributed]'`."
        ) from error
    try:
        client = distributed.Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"No dask.distributed scheduler answers at {scheduler} ({type(error).__name__}). Start one with "
            "`dask scheduler`, or leave `scheduler` out to use threads."
        ) from error
    with client, client.as_current():
        shared = client.scatter(work, broadcast=True, hash=False)
        futures = [client.submit(sum_block, shared, block, pure=False) for block in blocks]
        for future, result in distributed.as_completed(futures, with_results=True):
            yield result
            future.release()
