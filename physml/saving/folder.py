"""Models on disk: a folder with model.safetensors, config.json, spec.json and a README card. Nothing in it is executed.

config.json holds a format number, the registry names and fields of every config, and the checksum of the weights.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from physml.coding import from_dict, to_dict
from physml.constraints import CONSTRAINTS
from physml.errors import CheckpointError, ConfigError, PhysmlError, SpecError
from physml.fields import Axis, Grid, Signature, Spec
from physml.files import whole
from physml.layers.lora import describe_lora, restore_lora
from physml.models import MODELS
from physml.normalize import Normalizer
from physml.saving.weights import fill, read_weights, serialize
from physml.steppers import STEPPERS, stack_members
from physml.steppers.describe import build_stepper, configs, parameter_count

FORMAT = 1
WEIGHTS, CONFIG, SPEC, CARD = "model.safetensors", "config.json", "spec.json", "README.md"


def save(stepper, folder: str | Path, *, extra: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes model, normalizer and constraints into `folder`, which appears complete or not at all.

    `extra` (JSON-able: scores, data, license, command) is kept in config.json and shown on the card. Raises
    CheckpointError when the folder exists and `overwrite` is not set, ConfigError when a part is not in a registry.
    """
    parts = {"kind": "stepper", **configs(stepper)}
    return _write(folder, stepper, parts, stepper.spec, extra, overwrite)


def save_model(
    model,
    config,
    signature: Signature,
    folder: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """The same for a bare model without names and units; `load` returns the model."""
    parts = {"kind": "model", "model": to_dict(config, MODELS, "model"), "signature": to_dict(signature)}
    return _write(folder, model, parts, None, extra, overwrite)


def load(folder: str | Path, grid: Grid | tuple[int, ...] | None = None):
    """The stepper (or bare model) that was saved in `folder`, or in `folder/model` of a run; the same bits.

    With `grid` (a Grid, or a shape that divides the same extent) the weights are used at another resolution, where the
    architecture allows it. Raises CheckpointError for anything missing, damaged, of a newer format or that does not
    fit, with a table of the differences; SpecError when the model does not go with the grid.
    """
    folder = _find(Path(folder))
    config = _read_json(folder / CONFIG)
    _check_format(config, folder)
    arrays = _masked_by_channel(read_weights(folder / WEIGHTS, config.get("sha256")))
    try:
        if config["kind"] == "model":
            build, moved = _model_builder(config, grid)
        else:
            spec = _read_spec(folder)
            wanted = spec if grid is None else spec.on(_grid_of(grid, spec.grid))
            build, moved = _stepper_builder(config, wanted), wanted != spec
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} is incomplete or damaged: {error!r}. Save the model again."
        ) from error
    if config.get("lora"):
        plain, description = build, config["lora"]

        def build():
            return restore_lora(plain(), description)

    return fill(build, arrays, str(folder / WEIGHTS), moved)


def _masked_by_channel(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Older files have one `masked` for all channels of a normalizer (of each member of an ensemble)."""
    older = {}
    for name in (name for name in arrays if name.endswith("normalizer.masked")):
        center = arrays.get(name.removesuffix("masked") + "frames.center")
        if center is not None and arrays[name].ndim < center.ndim:
            older[name] = np.broadcast_to(arrays[name][..., None], center.shape)
    return {**arrays, **older}


# Writing


def _write(folder, module, parts: dict, spec: Spec | None, extra, overwrite: bool) -> Path:
    from physml import __version__

    folder = Path(folder)
    _check_target(folder, overwrite)
    weights = serialize(module)
    config = {
        "format": FORMAT,
        "physml": __version__,
        **parts,
        **({"lora": lora} if (lora := describe_lora(module)) else {}),
        "parameters": parameter_count(module),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(config, indent=1)
    except TypeError as error:
        raise ConfigError(
            f"`extra` holds something that JSON cannot: {error}. Use numbers, text, lists, tables."
        ) from error
    with whole(folder) as partial:
        partial.mkdir()
        (partial / WEIGHTS).write_bytes(weights)
        (partial / CONFIG).write_text(text, encoding="utf-8")
        if spec is not None:
            (partial / SPEC).write_text(json.dumps(spec.to_dict()), encoding="utf-8")
        (partial / CARD).write_text(_card(folder.name, config, spec), encoding="utf-8")
    return folder


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file. Choose the name of a new folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists. Choose another folder, or pass overwrite=True.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds other files and no saved model, so it is not overwritten. Choose another."
        )


def _card(name: str, config: dict, spec: Spec | None) -> str:
    model = (config["model"] or {}).get("name", "none")
    lines = [
        "---", "library_name: physml", "tags: [physml, surrogate, pde]", "---", f"# {name}", "",
        f"A physml {config['kind']} saved by physml {config['physml']}.", "",
        "| | |", "|---|---|", f"| architecture | {model} |",
    ]  # fmt: skip
    if config["kind"] == "stepper":
        lines.append(f"| stepper | {config['stepper']['name']} |")
    lines.append(f"| parameters | {config['parameters']:,} |")
    if spec is not None:
        lines += _spec_rows(spec)
    for constraint in config.get("constraints", ()):
        lines.append(f"| constraint | {json.dumps(constraint)} |")
    lines += [
        f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |"
        for key, value in config["extra"].items()
    ]
    use = "model = physml.load(FOLDER)" if config["kind"] == "model" else (
        "stepper = physml.load(FOLDER)\nprediction = physml.forecast(stepper, initial, steps=10)"
    )  # fmt: skip
    lines += ["", "```python", "import physml", use, "```", ""]
    return "\n".join(lines)


def _spec_rows(spec: Spec) -> list[str]:
    def names(channels):
        return ", ".join(f"{c.name} ({c.unit})" if c.unit else c.name for c in channels)

    rows = [f"| variables | {names(spec.channels)} |"]
    for group in ("forcing", "static", "parameters"):
        if getattr(spec, group):
            rows.append(f"| {group} | {names(getattr(spec, group))} |")
    for axis in spec.grid.axes:
        extent = f"{axis.centers[0]:g} to {axis.centers[-1]:g} {axis.unit}".strip()
        rows.append(f"| {axis.name} | {len(axis)} points, {extent}{', periodic' if axis.periodic else ''} |")
    return [*rows, f"| time step | {spec.time_step:g} {spec.time_unit or '(nondimensional)'} |"]


# Reading


def _find(folder: Path) -> Path:
    for place in (folder, folder / "model"):
        if (place / CONFIG).is_file():
            return place
    if not folder.exists():
        raise CheckpointError(
            f"There is no folder {str(folder)!r}. Give a run (runs/NAME) or a folder made by physml.save."
        )
    if (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"The run {folder} has no saved model yet. Finish it with: physml train ... --resume auto."
        )
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "a file"
    raise CheckpointError(f"{folder} is no saved model: it lacks {CONFIG} (found {found}). Save one with physml.save.")


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} lacks {path.name}. Copy the whole folder, or save the model again."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}. Save the model again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, but a table was expected. Save the model again.")
    return data


def _check_format(config: dict, folder: Path) -> None:
    number = config.get("format")
    if not isinstance(number, int) or "kind" not in config:
        raise CheckpointError(f"{folder / CONFIG} is not written by physml.save: it has no format number.")
    if number > FORMAT:
        raise CheckpointError(
            f"{folder} has format {number}, written by physml {config.get('physml')}, but this version reads formats "
            f"up to {FORMAT}. Upgrade physml."
        )
    if config["kind"] not in ("stepper", "model"):
        raise CheckpointError(f"{folder / CONFIG} holds a {config['kind']!r}, but a stepper or a model was expected.")


def _read_spec(folder: Path) -> Spec:
    data = _read_json(folder / SPEC)
    try:
        return Spec.from_dict(data)
    except (KeyError, TypeError, PhysmlError) as error:
        raise CheckpointError(f"{folder / SPEC} is damaged: {error!r}. Save the model again.") from error


def _stepper_builder(config: dict, spec: Spec):
    stepper_config = from_dict(STEPPERS, config["stepper"], "stepper")
    model_config = None if config["model"] is None else from_dict(MODELS, config["model"], "model")
    constraints = [from_dict(CONSTRAINTS, item, "constraints") for item in config["constraints"]]
    intervals = getattr(stepper_config, "intervals", ())

    def build():
        normalizer = Normalizer.identity(spec, intervals=intervals)
        return build_stepper(stepper_config, model_config, spec, normalizer, constraints)

    members = config.get("members")
    return (lambda: stack_members([build()] * members)) if members else build


def _model_builder(config: dict, grid):
    model_config = from_dict(MODELS, config["model"], "model")
    signature = from_dict(Signature, config["signature"], "signature")
    wanted = signature.grid if grid is None else _grid_of(grid, signature.grid)
    moved = wanted != signature.grid
    signature = Signature(wanted, signature.inputs, signature.scalars, signature.outputs)
    return (lambda: model_config.build(signature, nnx.Rngs(0))), moved


def _grid_of(grid: Grid | tuple[int, ...], old: Grid) -> Grid:
    if isinstance(grid, Grid):
        return grid
    if len(grid) != old.ndim:
        raise SpecError(f"The shape {tuple(grid)} has {len(grid)} axes, but the model's grid has {old.shape}.")
    axes = []
    for axis, points in zip(old.axes, grid, strict=True):
        centers = axis.centers[0] + np.arange(points) * axis.length / points
        weights = np.interp(centers, axis.centers, axis.weights) if axis.weights else np.zeros(0)
        axes.append(Axis(axis.name, tuple(centers.tolist()), tuple(weights.tolist()), axis.periodic, axis.unit))
    return old if tuple(axes) == old.axes else Grid(tuple(axes))
