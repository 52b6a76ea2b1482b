"""Weights of other libraries. `FAMILIES` maps the name of a source to how its models are built and checked."""

import json
from pathlib import Path
from typing import Any

from physml import saving
from physml.convert.apply import parameters
from physml.convert.cfdbench import CFDBENCH_FAMILY
from physml.convert.families import Family
from physml.convert.ffno import FFNO_FAMILY
from physml.convert.fno import FNO_FAMILY
from physml.convert.ifactformer import IFACTFORMER_FAMILY
from physml.convert.modern_unet import MODERN_UNET_FAMILY
from physml.convert.pderefiner import PDEREFINER_FAMILY
from physml.convert.poseidon_scot import POSEIDON_SCOT_FAMILY
from physml.convert.sinenet import SINENET_FAMILY
from physml.convert.torch_file import read_tensors
from physml.errors import ConversionError, suggest

FAMILIES: dict[str, Family] = {
    "cfdbench": CFDBENCH_FAMILY,
    "ffno": FFNO_FAMILY,
    "fno": FNO_FAMILY,
    "ifactformer": IFACTFORMER_FAMILY,
    "modern_unet": MODERN_UNET_FAMILY,
    "pderefiner": PDEREFINER_FAMILY,
    "poseidon_scot": POSEIDON_SCOT_FAMILY,
    "sinenet": SINENET_FAMILY,
}


def convert(
    family: str,
    config: str | Path,
    weights: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes foreign weights as a physml model that `physml.load(out)` opens; returns what was done.

    `config` is a JSON file with the constructor's arguments (alone, or under "kwargs"); `weights` a .safetensors or
    PyTorch file, of which nothing is run. `dry_run` builds and checks everything but writes nothing. Raises
    ConversionError when config and weights do not fit each other, CheckpointError when `out` exists.
    """
    if family not in FAMILIES:
        raise ConversionError(f"There is no family {family!r} of foreign models." + suggest(family, FAMILIES))
    settings, tensors = read_config(config), read_tensors(weights, FAMILIES[family].prefer)
    try:
        model = FAMILIES[family].build(settings, tensors)
    except ConversionError as error:
        raise ConversionError(f"{weights} with {config}: {error}") from error
    found = parameters(model)
    report = {
        "family": family,
        "model": type(model).__name__,
        "tensors": len(tensors),
        "parameters": sum(variable.size for variable in found.values()),
        "out": str(out),
    }
    if dry_run:
        return {**report, "written": False}
    extra = {"converted from": family, "weights file": Path(weights).name}
    saving.save_model(model, model.config, model.signature, out, extra=extra, overwrite=overwrite)
    return {**report, "written": True}


def read_config(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConversionError when there is none."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"Cannot read the config {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"The config {path} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"The config {path} holds a {type(settings).__name__}, but an object was expected.")
    return settings
