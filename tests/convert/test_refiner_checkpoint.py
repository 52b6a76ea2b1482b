"""A Lightning checkpoint of PDE-Refiner: averaged weights, or the raw ones, from one file with settings in it.

Written by torch 2.13 with `files/make_refiner.py`: averaged weights are all 0.25, raw ones all 1.
"""

import dataclasses
import json
import pickle
import shutil
import zipfile
from pathlib import Path, PurePosixPath

import jax
import numpy as np
import pytest
from flax import nnx

import physml
from physml import saving
from physml.convert import FAMILIES, convert
from physml.convert.pderefiner import config_of
from physml.convert.torch_file import read_tensors, state_dict
from physml.errors import ConversionError
from physml.models.named import NAMED, Named

FILES = Path(__file__).parent / "files"
CONFIG = json.loads((FILES / "refiner.json").read_text())


def numbers_of(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_averaged_weights_come_first(tmp_path):
    report = convert("pderefiner", FILES / "refiner.json", FILES / "refiner.ckpt", tmp_path / "refiner")
    assert report["written"]
    numbers = numbers_of(saving.load(tmp_path / "refiner"))
    assert sum(array.size for array in numbers) == report["parameters"]
    assert all(np.all(array == 0.25) for array in numbers)


def test_raw_weights_have_the_prefix_of_lightning():
    tensors = read_tensors(FILES / "refiner.ckpt")
    assert all(name.startswith("model.") for name in tensors)
    assert all(np.all(array == 1) for array in numbers_of(FAMILIES["pderefiner"].build(CONFIG, tensors)))


def test_a_checkpoint_without_averages_gives_the_raw_weights():
    tree = {"ema": {}, "state_dict": {"a": np.ones(2)}}
    assert list(state_dict(tree, prefer=("ema",))) == ["a"]


def test_settings_in_a_checkpoint_are_never_built(tmp_path):
    """Harmless classes of the standard library may be named; anything that acts may not."""
    inert = {"state_dict": {}, "folder": PurePosixPath("x"), "kind": int}
    path = tmp_path / "a.ckpt"
    for extra, message in ((None, "holds no tensors"), (shutil.rmtree, "rmtree.*Nothing of it was run")):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps({**inert, "extra": extra}, protocol=2))
        with pytest.raises(ConversionError, match=message):
            read_tensors(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": None, "name": "FNO-128"}, "Unetmod-1d-64"),
        ({"param_conditioning": "vector"}, "scalar_N"),
        ({"param_conditioning": "scalar_3"}, "missing: pde_emb.2.0.weight"),
        ({"padding_mode": "same"}, "only .*circular"),
        ({"depth": 3}, "does not know: .*depth"),
        ({"net": {**CONFIG["net"], "width": 3}}, "does not know: .*width"),
        ({"net": {**CONFIG["net"], "n_dims": 2}}, "n_dims is not 1"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    tensors = read_tensors(FILES / "refiner.ckpt", ("ema",))
    with pytest.raises(ConversionError, match=message):
        FAMILIES["pderefiner"].build({**CONFIG, **change}, tensors)


def test_a_checkpoint_without_config_is_loaded_by_name(monkeypatch):
    """The name tells the network, the weights the numbers of inputs and outputs; averaged weights come first."""
    config, signature = config_of(CONFIG)
    other = dataclasses.replace(signature, inputs=7, outputs=5)
    monkeypatch.setitem(NAMED, "tiny-refiner", Named(config, other, config.parameters(signature), "pderefiner"))
    model = physml.load("tiny-refiner", weights=FILES / "refiner.ckpt")
    assert model.signature == signature
    assert all(np.all(array == 0.25) for array in numbers_of(model))
    with pytest.raises(ConversionError, match="another network"):
        FAMILIES["pderefiner"].adopt(config, signature, {"weight": np.ones(2)})
