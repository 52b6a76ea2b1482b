"""Published folders, opened by name."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import physml
from physml.convert.poseidon_scot import build, config_of
from physml.errors import ConfigError, ConversionError
from physml.models import named
from physml.models.named import NAMED, Named

RECORDED = Path(__file__).parent.parent / "golden" / "poseidon_scot" / "conditioned"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small model as it would lie on the hub, under the name "tiny"."""
    config = json.loads((RECORDED / "config.json").read_text())["hyperparameters"]
    built, signature = config_of(config)
    monkeypatch.setattr(named, "NAMED", NAMED)
    monkeypatch.setitem(NAMED, "tiny", Named(built, signature, built.parameters(signature), "poseidon_scot"))
    path = tmp_path / "hub"
    path.mkdir()
    remarks = {"architectures": ["ScOT"], "model_type": "swinv2", "transformers_version": "4.29.2"}
    (path / "config.json").write_text(json.dumps({**config, **remarks}))
    shutil.copy(RECORDED / "weights.safetensors", path / "model.safetensors")
    return path


def numbers(model):
    from physml.convert.apply import parameters

    return {name: np.asarray(variable[...]) for name, variable in parameters(model).items()}


def test_one_line_opens_a_published_folder(folder):
    model = physml.load("tiny", weights=folder)
    again = build(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))
    for name, value in numbers(model).items():
        np.testing.assert_array_equal(value, numbers(again)[name])
    by_family = physml.load("poseidon_scot", weights=folder / "model.safetensors")
    assert by_family.config == model.config


def test_weights_in_several_files_and_buffers(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layers.0.blocks.0.attention.self.relative_position_index"] = np.zeros((25, 25), np.int64)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    physml.load("tiny", weights=folder)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="outside"):
        physml.load("tiny", weights=folder)


def test_errors_name_the_remedy(folder):
    with pytest.raises(ConfigError, match="weights="):
        physml.load("poseidon-t")
    with pytest.raises(ConfigError, match="Did you mean 'poseidon-t'"):
        physml.load("poseidon-tt", weights=folder)
    with pytest.raises(ConversionError, match="no folder"):
        physml.load("tiny", weights=folder / "nothing")
    with pytest.raises(ConversionError, match=r"is no poseidon-t: .*width is 12.*load that name"):
        physml.load("poseidon-t", weights=folder)
    tensors = load_file(folder / "model.safetensors")
    removed = "patch_recovery.mixup.weight"
    save_file({name: value for name, value in tensors.items() if name != removed}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=removed):
        physml.load("tiny", weights=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="pytorch_model.bin"):
        physml.load("tiny", weights=folder)


@pytest.mark.peers
def test_pytorch_files_are_read(folder):
    import torch

    tensors, expected = load_file(folder / "model.safetensors"), nnx.state(physml.load("tiny", weights=folder))
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "pytorch_model.bin")
    got = nnx.state(physml.load("tiny", weights=folder))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
