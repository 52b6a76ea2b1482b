"""Models by name, with the weights that their authors publish."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from physml import saving
from physml.convert.families import Family
from physml.convert.torch_file import read_tensors
from physml.errors import ConfigError, ConversionError, suggest
from physml.models.named import NAMED, Named

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
# Choices that a network of the same size may make otherwise: for training only, or for another grid.
FREE = ("boundary", "deviation", "drop_path", "dropout", "attention_dropout", "dtype", "image_size", "remat",
        "residual", "scale_start")  # fmt: skip


def load(source: str | Path, grid=None, *, weights: str | Path | None = None):
    """A model or stepper: from a folder of physml's own, or by name with published weights.

    Args:
        source: a run or saved folder (see `physml.saving.load`), or with `weights` a name of
            `physml.models.named.NAMED` or of `physml.convert.FAMILIES` (then of whatever size config.json says).
        grid: for folders: another resolution.
        weights: for names: the folder that was downloaded from the hub, with config.json and model.safetensors or
            pytorch_model.bin; or one of these weights files, with config.json beside it. Weights of families that are
            published without a config (SineNet, U-Nets, PDE-Refiner) do without. Nothing in it is executed.

    Returns the model itself for names: `model(fields, scalars)`. Raises CheckpointError for folders, see
    `physml.saving.load`; ConfigError for an unknown name or a name without weights; ConversionError when files are
    missing, damaged, or hold another network.
    """
    if weights is None:
        if str(source) in NAMED and not Path(source).exists():
            raise ConfigError(
                f"{source!r} is the name of an architecture, whose weights its authors publish. Give the downloaded "
                f"folder as weights=..., or take physml.models.named.NAMED[{str(source)!r}].build(rngs) untrained."
            )
        return saving.load(source, grid)
    from physml.convert import FAMILIES

    if source not in NAMED and source not in FAMILIES:
        raise ConfigError(f"There is no named model {str(source)!r}." + suggest(str(source), [*NAMED, *FAMILIES]))
    if grid is not None:
        raise ConfigError("`grid` goes with folders. Named models take fields on any grid they can resample.")
    return load_published(str(source), weights)


def load_published(name: str, weights: str | Path):
    """The model that authors published, by a name of `NAMED` or of `FAMILIES`, see `load`."""
    from physml.convert import FAMILIES, read_config

    named = NAMED.get(name)
    family: Family = FAMILIES[named.family if named else name]
    folder, tensors = _read(Path(weights), family.prefer)
    try:
        if named and family.adopt and not (folder / CONFIG).is_file():
            return family.adopt(named.config, named.signature, tensors)
        model = family.build(read_config(folder / CONFIG), tensors)
    except ConversionError as error:
        raise ConversionError(f"{weights} as {name}: {error}") from error
    if named:
        _check_size(name, named, model, weights)
    return model


def _check_size(name: str, named: Named, model, weights) -> None:
    wanted, got = dataclasses.asdict(named.config), dataclasses.asdict(model.config)
    rows = [
        f"{key} is {got[key]}, but {name} has {value}"
        for key, value in wanted.items()
        if key not in FREE and got.get(key) != value
    ]
    if model.signature.scalars != named.signature.scalars:
        rows.append(f"it has {model.signature.scalars} scalars, but {name} has {named.signature.scalars}")
    if rows:
        same = [other for other, entry in NAMED.items() if _shape(entry.config) == _shape(model.config)]
        hint = f" These are the choices of {same[0]!r}: load that name." if same else ""
        raise ConversionError(f"{weights} is no {name}: " + "; ".join(rows) + "." + hint)


def _shape(config) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}


def _read(path: Path, prefer: tuple[str, ...]) -> tuple[Path, Mapping[str, np.ndarray]]:
    """The folder with config.json, and the tensors."""
    if path.is_file():
        return path.parent, read_tensors(path, prefer)
    if not path.is_dir():
        raise ConversionError(f"There is no folder {path}. Download the model from the hub and give its folder.")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path, read_tensors(path / name, prefer)
        if (path / f"{name}.index.json").is_file():
            return path, _read_parts(path, path / f"{name}.index.json", prefer)
    found = sorted(entry.name for entry in path.iterdir())[:10]
    raise ConversionError(f"{path} holds none of {', '.join(WEIGHTS)}; it holds {found}. Download the weights too.")


def _read_parts(folder: Path, index: Path, prefer: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Weights in several files, as the index says."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is damaged: {error!r}. Download it again.") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ConversionError(f"{index} names files outside of its folder: {outside}.")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= read_tensors(folder / name, prefer)
    return tensors
