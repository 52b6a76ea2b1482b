"""Steppers as one compiled-language program (StableHLO, by `jax.export`) that runs with jax and flatbuffers alone.

A folder with step.stablehlo (what `jax.export` serializes: the program with all weights, the normalizer and the
constraints inside), signature.json (what goes in and comes out, in order, with units) and a README with the lines that
call it. It belongs to the jax versions that read it (jax promises six months); the saved model is what lasts.
"""

import hashlib
import json
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.errors import CheckpointError, ConfigError, first_line
from physml.fields import Context, Gaussian, Spec, Window, is_key
from physml.files import whole
from physml.steppers.describe import provenance

PROGRAM, SIGNATURE, CARD, FORMAT = "step.stablehlo", "signature.json", "README.md", 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LARGEST = 2**31 - 2**24  # bytes of weights: the file format addresses 2 GiB
STARTS_ANEW = (
    "More than frames goes from step to step: call the program once, exported with --steps N for N frames; calling it "
    "again with what it predicted starts anew."
)
MEANINGS = {
    "frames": "the last frames before the prediction, oldest first",
    "time": "time of the first predicted frame since the rollout began",
    "lead": "length of every step",
    "calendar": "fraction of the year and of the day, each in [0, 1), of every predicted frame",
    "parameters": "scalars of the trajectory",
    "forcing": "prescribed fields valid at every predicted frame",
    "static": "prescribed fields that do not change",
    "mask": "1 where the field exists, 0 elsewhere (frames hold 0 there)",
    "key": "random numbers: jax.random.key_data(jax.random.key(seed)), another one for every call",
}


def export(
    stepper,
    folder: str | Path,
    *,
    steps: int = 1,
    batch: int | Literal["symbolic"] = "symbolic",
    platforms: str | Sequence[str] = ("cpu", "cuda", "tpu"),
    overwrite: bool = False,
) -> Path:
    """Writes a program that predicts `steps` frames, `(batch, steps, *space, channel)`, into `folder`.

    Its arguments, float32 in physical units, are those of the following that the stepper uses, in this order; shapes
    start with the batch:
    frames `(history, *space, channel)`, time `()`, lead `()`, calendar `(steps, 2)`, parameters `(parameter,)`,
    forcing `(steps, *space, forcing)`, static `(*space, static)`, mask `(*space, channel)` (steppers of masked data),
    and key `(2,)` uint32, without batch (stochastic steppers).

    Args:
        batch: "symbolic": any; or the only one that the program takes.
        platforms: of `PLATFORMS`, what the program may run on.
        overwrite: replace what an earlier export left in `folder`.

    Raises ConfigError for options that cannot work and for a stepper that cannot be exported, with the way out;
    CheckpointError when the folder exists. Warns about a program of one step that forecasts something else when it is
    called again with what it predicted: that of a stepper that carries more than frames from step to step.
    """
    folder = check_export(stepper, folder, steps, batch, platforms, overwrite)
    steps, batch, platforms = _options(steps, batch, platforms)
    graph, numbers = nnx.split(stepper)
    stepper = nnx.merge(graph, numbers)
    stepper.eval()
    weights = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(numbers))
    if weights > LARGEST:
        raise ConfigError(
            f"The model holds {weights / 2**30:.1f} GiB of numbers, but an exported program at most 2 GiB. Share it "
            "as a folder made by physml.save."
        )
    size = jax.export.symbolic_shape("batch")[0] if batch == "symbolic" else batch
    shapes = _shapes(stepper, steps, size)
    used = _used(stepper, steps, _shapes(stepper, steps, 2 if batch == "symbolic" else batch))
    shapes = {name: shape for name, shape in shapes.items() if name in used}
    exported = _export(stepper, steps, shapes, platforms, batch)
    content = _serialize(exported, stepper)
    about = _signature(stepper, steps, batch, platforms, shapes, exported, content)
    if steps == 1 and not about["continues"]:
        warnings.warn(f"{type(stepper).__name__}: {STARTS_ANEW}", stacklevel=2)
    with whole(folder) as partial:
        partial.mkdir()
        (partial / PROGRAM).write_bytes(content)
        (partial / SIGNATURE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        (partial / CARD).write_text(_card(folder.name, about), encoding="utf-8")
    return folder


def check_export(
    stepper, folder: str | Path, steps: int, batch, platforms: str | Sequence[str], overwrite: bool
) -> Path:
    """Raises what `export` raises for its options, for what is no stepper, and for the folder, which it returns."""
    if isinstance(stepper, type) or not hasattr(stepper, "advance"):
        raise ConfigError(
            f"{getattr(stepper, '__name__', type(stepper).__name__)} is no stepper. Pass what physml.load gives, or "
            "the stepper around a model, with names, units and a normalizer: config.build(spec, model, normalizer)."
        )
    _options(steps, batch, platforms)
    folder = Path(folder)
    if folder.exists():
        if not (folder / SIGNATURE).is_file():
            raise CheckpointError(f"{folder} exists and holds no export: it is not replaced. Choose another.")
        if not overwrite:
            raise CheckpointError(f"{folder} exists. Choose another, or pass overwrite=True (--overwrite).")
    return folder


def _options(steps, batch, platforms) -> tuple[int, int | Literal["symbolic"], tuple[str, ...]]:
    """The same as plain numbers and names. Raises ConfigError for what they cannot be."""
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ConfigError(f"platforms are {platforms}, but some of {', '.join(PLATFORMS)} were expected.")
    numbers = [_whole(steps), "symbolic" if isinstance(batch, str) and batch == "symbolic" else _whole(batch)]
    if None in numbers:
        raise ConfigError(
            f"steps is {steps!r} and batch {batch!r}, but whole numbers of at least 1 (or batch='symbolic') were "
            "expected."
        )
    return *numbers, platforms


def _whole(value) -> int | None:
    """A number of at least 1 as int, None for anything else."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return number if number >= 1 else None


def _continues(stepper) -> bool:
    """Whether frames are all that goes from step to step, so that calls one after another are a rollout."""
    spec: Spec = stepper.spec
    if not stepper.history:
        return True
    frames = np.broadcast_to(np.float32(0), (1, stepper.history, *spec.grid.shape, len(spec.channels)))
    window = Window.of(frames, spec, mask=frames[:, 0] if _masked(stepper) else None)

    def begin(window):
        return stepper.encode(window.frames, window.context(0, stepper.history, jax.random.key(0)))

    state = jax.eval_shape(begin, window)
    state = state.mean if isinstance(state, Gaussian) else state  # its variance leaves the mean alone
    alone = [frames.shape, frames[:, -1].shape] if stepper.history == 1 else [frames.shape]
    return getattr(state, "shape", None) in alone


def _shapes(stepper, steps: int, batch) -> dict[str, jax.ShapeDtypeStruct]:
    """Every argument that a stepper may have."""
    spec: Spec = stepper.spec
    space = spec.grid.shape
    shapes = {
        "frames": (stepper.history, *space, len(spec.channels)) if stepper.history else None,
        "time": (),
        "lead": (),
        "calendar": (steps, 2),
        "parameters": (len(spec.parameters),) if spec.parameters else None,
        "forcing": (steps, *space, len(spec.forcing)) if spec.forcing else None,
        "static": (*space, len(spec.static)) if spec.static else None,
        "mask": (*space, len(spec.channels)) if _masked(stepper) else None,
    }
    found = {n: jax.ShapeDtypeStruct((batch, *s), jnp.float32) for n, s in shapes.items() if s is not None}
    return {**found, "key": jax.ShapeDtypeStruct((2,), jnp.uint32)}


def _masked(stepper) -> bool:
    masked = getattr(getattr(stepper, "normalizer", None), "masked", None)
    return masked is not None and bool(masked[...].any())


def _program(stepper, steps: int, names: Sequence[str]):
    """The function of the arguments `names`; what is not among them is what a stepper without it sees."""
    spec: Spec = stepper.spec

    def run(*arguments):
        given = dict(zip(names, arguments, strict=True))
        batch = next((a.shape[0] for name, a in given.items() if name != "key"), 1)

        def take(name, *shape):
            return given[name] if name in given else jnp.zeros((batch, *shape), jnp.float32)

        space = spec.grid.shape
        lead = given.get("lead", jnp.full((batch,), spec.time_step, jnp.float32))
        time = given.get("time", jnp.full((batch,), stepper.history * spec.time_step, jnp.float32))
        calendar, forcing = take("calendar", steps, 2), take("forcing", steps, *space, len(spec.forcing))
        fixed = (take("parameters", len(spec.parameters)), take("static", *space, len(spec.static)), given.get("mask"))
        key = jax.random.wrap_key_data(given["key"], impl="threefry2x32") if "key" in given else None

        def context(i, key) -> Context:
            now = (jax.lax.dynamic_index_in_dim(array, i, 1, keepdims=False) for array in (calendar, forcing))
            calendar_now, forcing_now = now
            return Context(time + i * lead, lead, calendar_now, fixed[0], forcing_now, fixed[1], fixed[2], key, spec)

        def advance(state, i):
            state = stepper.advance(state, context(i, None if key is None else jax.random.fold_in(key, i)))
            decoded = stepper.decode(state)
            return state, decoded if isinstance(decoded, jax.Array) else decoded.mean

        frames = take("frames", 1, *space, len(spec.channels))[:, : stepper.history]
        state = stepper.encode(frames, context(0, key))
        if steps == 1:
            return advance(state, 0)[1][:, None]
        return jnp.moveaxis(jax.lax.scan(advance, state, jnp.arange(steps))[1], 0, 1)

    return run


def _used(stepper, steps: int, shapes) -> set[str]:
    """The arguments that the result depends on; the first stays where none tells the batch."""
    names = list(shapes)
    exported = _export(stepper, steps, shapes, ("cpu",), shapes[names[0]].shape[0])
    used = {names[i] for i in exported.module_kept_var_idx}
    return used if used - {"key"} else used | {names[0]}


def _export(stepper, steps: int, shapes, platforms, batch):
    program = jax.jit(_program(stepper, steps, list(shapes)))
    try:
        return jax.export.export(program, platforms=tuple(platforms))(*shapes.values())
    except Exception as error:  # whatever the code of a model raises for an abstract batch, or jax for its operations
        what = type(getattr(stepper, "model", None) or stepper).__name__
        raise ConfigError(_reason(what, error, batch, platforms)) from error


def _reason(what: str, error: Exception, batch, platforms) -> str:
    first = first_line(error).rstrip(". ")
    if "custom call" in str(error).lower():
        return (
            f"{what} cannot be exported: it calls a library that is not part of the program ({first}). Leave that part "
            "out (a constraint or layer), or share the model as a folder made by physml.save."
        )
    if batch == "symbolic":
        return (
            f"{what} cannot be exported for a batch of any size: {type(error).__name__}: {first}. "
            "Choose the size: batch=4 (--batch 4)."
        )
    return (
        f"{what} cannot be exported for {', '.join(platforms)}: {type(error).__name__}: {first}. "
        "Try platforms=('cpu',), or share the model as a folder made by physml.save."
    )


def _serialize(exported, stepper) -> bytes:
    try:
        return bytes(exported.serialize())
    except Exception as error:
        what = type(getattr(stepper, "model", None) or stepper).__name__
        raise ConfigError(
            f"{what} cannot be exported: its program holds a part that no file can ({type(error).__name__}: "
            f"{first_line(error)}), such as a callback into Python. Leave that part out, or share the model as a "
            "folder made by physml.save."
        ) from error


def _signature(stepper, steps, batch, platforms, shapes, exported, content: bytes) -> dict[str, Any]:
    spec: Spec = stepper.spec
    names = {"frames": spec.channels, "mask": spec.channels, "forcing": spec.forcing, "static": spec.static}
    names |= {"parameters": spec.parameters}
    space = [axis.name for axis in spec.grid.axes]
    axes = {
        "frames": ["batch", "history", *space, "channel"], "time": ["batch"], "lead": ["batch"],
        "calendar": ["batch", "step", "year and day"], "parameters": ["batch", "channel"],
        "forcing": ["batch", "step", *space, "channel"], "static": ["batch", *space, "channel"],
        "mask": ["batch", *space, "channel"], "key": ["word"],
    }  # fmt: skip

    def channels(group):
        return [{"name": channel.name, "unit": channel.unit} for channel in group]

    def entry(name, shape) -> dict[str, Any]:
        sizes = [size if isinstance(size, int) else "batch" for size in shape.shape]
        entry = {"name": name, "meaning": MEANINGS[name], "shape": sizes, "axes": axes[name], "dtype": str(shape.dtype)}
        if name in names:
            entry["channels"] = channels(names[name])
        if name in ("time", "lead"):
            entry |= {"unit": spec.time_unit} | ({"usual": spec.time_step} if name == "lead" else {})
        return entry

    first = next((shape.shape[0] for name, shape in shapes.items() if name != "key"), 1)
    return {
        "format": FORMAT,
        **provenance(stepper),
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "platforms": list(platforms),
        "steps": steps,
        "batch": batch,
        "continues": _continues(stepper),
        "inputs": [entry(name, shape) for name, shape in shapes.items()],
        "output": {
            "meaning": "the predicted frames",
            "shape": [first if isinstance(first, int) else "batch", steps, *spec.grid.shape, len(spec.channels)],
            "axes": ["batch", "step", *space, "channel"],
            "dtype": str(exported.out_avals[0].dtype),
            "channels": channels(spec.channels),
        },
        "time_step": spec.time_step,
        "time_unit": spec.time_unit,
        "grid": [
            {"name": axis.name, "unit": axis.unit, "periodic": axis.periodic, "centers": list(axis.centers)}
            for axis in spec.grid.axes
        ],
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _card(name: str, about: dict[str, Any]) -> str:
    def zeros(entry) -> str:
        shape = tuple(1 if size == "batch" else size for size in entry["shape"])
        return f"np.zeros({shape}, np.{entry['dtype']})"

    rows = [
        f"| {e['name']} | {e['dtype']} {tuple(e['shape'])} | {e['meaning']}"
        + (": " + ", ".join(f"{c['name']} {c['unit']}".strip() for c in e["channels"]) if e.get("channels") else "")
        + (f" ({e['unit'] or 'nondimensional'})" if "unit" in e else "") + " |"
        for e in about["inputs"]
    ]  # fmt: skip
    step = f"{about['time_step']:g} {about['time_unit']}".strip()
    lines = [
        f"# {name}", "",
        f"{about['model_id']}, exported by physml {about['physml_version']} with jax {about['jax']} for "
        f"{', '.join(about['platforms'])}. Predicts {about['steps']} frame(s), {step} apart, in physical units: "
        f"{about['output']['dtype']} {tuple(about['output']['shape'])}. physml is not needed, "
        "`pip install jax flatbuffers` is enough:", "",
        "```python", "import jax.export", "import numpy as np", "",
        f'program = jax.export.deserialize(bytearray(open("{PROGRAM}", "rb").read()))',
        *(f"{e['name']} = {zeros(e)}" for e in about["inputs"]),
        f"prediction = program.call({', '.join(e['name'] for e in about['inputs'])})", "```", "",
        *([] if about["continues"] else [STARTS_ANEW, ""]),
        "| input | shape | |", "|---|---|---|", *rows, "",
        "Everything else about them is in signature.json. Reading the program runs nothing that it holds; calling it",
        "compiles and runs it in XLA, which reaches neither files nor network, but may use much time and memory.", "",
    ]  # fmt: skip
    return "\n".join(lines)


@dataclass(frozen=True)
class Program:
    """An exported stepper: `program(frames=..., ...)` gives `(batch, steps, *space, channel)`.

    Attributes:
        signature: content of signature.json.
        exported: the `jax.export.Exported`.
    """

    signature: dict[str, Any]
    exported: Any

    def __call__(self, **inputs):
        """Raises ConfigError when inputs are missing, superfluous, no numbers, or of another shape."""
        names = [entry["name"] for entry in self.signature["inputs"]]
        if set(inputs) != set(names):
            raise ConfigError(f"The program takes {names}, but {sorted(inputs)} were given. Pass each by its name.")
        batch = self.signature["batch"]
        arrays = []
        for entry in self.signature["inputs"]:
            array = _numbers(entry, inputs[entry["name"]])
            if batch == "symbolic" and "batch" in entry["shape"] and array.ndim:
                batch = array.shape[0]
            expected = tuple(batch if size == "batch" else size for size in entry["shape"])
            if array.shape != expected:
                raise ConfigError(
                    f"{entry['name']} has shape {array.shape}, but {expected} was expected: {entry['axes']}."
                )
            if not array.size:
                raise ConfigError(f"{entry['name']} has shape {array.shape}, but at least one sample was expected.")
            arrays.append(array)
        return self.exported.call(*arrays)


def _numbers(entry: dict[str, Any], value) -> jax.Array:
    """What is given for an input, as the program takes it; of typed random keys their words."""
    typed = is_key(value)
    if typed and entry["name"] == "key":
        return jax.random.key_data(value)
    try:
        return jnp.asarray(value, entry["dtype"])
    except (TypeError, ValueError, OverflowError) as error:
        what = "random key" if typed else type(value).__name__
        raise ConfigError(f"{entry['name']} is a {what}, but numbers were expected: {entry['axes']}.") from error


def load_exported(folder: str | Path) -> Program:
    """Reads what `export` wrote.

    Nothing in the folder is executed by reading it: the file is a flatbuffer, without pickles. Calling the result
    compiles and runs its program, which can compute but reaches no files; from a stranger it may still take all time
    and memory. Raises CheckpointError for files that are missing, damaged, or of a jax that this one cannot read.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
        content = (folder / PROGRAM).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no exported model: {error}. Make one with `physml export`.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or "inputs" not in about:
        raise CheckpointError(f"{folder / SIGNATURE} is not of format {FORMAT}. Export the model again.")
    if hashlib.sha256(content).hexdigest() != about.get("sha256"):
        raise CheckpointError(
            f"{folder / PROGRAM} does not have the checksum in {SIGNATURE}: it is truncated, damaged or exchanged. "
            "Copy the whole folder again, or export again."
        )
    try:
        return Program(about, jax.export.deserialize(bytearray(content)))
    except Exception as error:  # flatbuffers, StableHLO and jax have errors of their own
        raise CheckpointError(
            f"{folder / PROGRAM}, written with jax {about.get('jax')}, cannot be read with jax {jax.__version__}: "
            f"{first_line(error)} Export the model again."
        ) from error
