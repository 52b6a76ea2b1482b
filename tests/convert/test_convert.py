"""Conversion is complete or it fails with a list; what is written opens again and computes the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from physml import saving
from physml.convert import FAMILIES, convert
from physml.convert.apply import parameters
from physml.errors import ConversionError

GOLDEN = Path(__file__).parents[1] / "golden"
FNO, TFNO, CFD = GOLDEN / "fno" / "fno2d", GOLDEN / "fno" / "tfno2d", GOLDEN / "cfdbench" / "fno2d"


def read(case):
    return json.loads((case / "config.json").read_text()), load_file(case / "weights.safetensors")


@pytest.mark.parametrize("case", [FNO, TFNO, CFD], ids=lambda case: case.name)
def test_every_tensor_lands_in_a_parameter(case):
    """No weight is lost or invented: sizes add up, and no two models of different weights are equal."""
    config, tensors = read(case)
    model = FAMILIES[case.parent.name].build(config, tensors)
    found = parameters(model)
    assert sum(v.size for v in found.values()) == sum(t.size for t in tensors.values())
    for name in tensors:
        changed = {**tensors, name: tensors[name] + 1}
        other = parameters(FAMILIES[case.parent.name].build(config, changed))
        assert any(not np.array_equal(found[key][...], other[key][...]) for key in found), name


def test_bare_arguments_do_as_config():
    config, tensors = read(FNO)
    kwargs = {key: value for key, value in config["kwargs"].items() if key != "activation"}
    model = FAMILIES["fno"].build(
        {**kwargs, "non_linearity": "gelu"}, {**tensors, "_metadata": tensors["lifting.fcs.0.bias"]}
    )
    assert model.config.width == 10


def test_leftovers_gaps_and_shapes_are_listed():
    config, tensors = read(FNO)
    del tensors["lifting.fcs.0.bias"]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors["projection.fcs.1.bias"] = np.zeros(5, np.float32)
    tensors["fno_blocks.norm.0.weight"] = np.full(10, np.nan, np.float32)
    with pytest.raises(ConversionError) as caught:
        FAMILIES["fno"].build(config, tensors)
    for row in (
        "missing: lifting.fcs.0.bias",
        "unexpected: extra.weight (3,)",
        "shape: projection.fcs.1.bias (5,)",
        "not finite: fno_blocks.norm.0.weight",
    ):
        assert row in str(caught.value)


def test_long_lists_are_cut_at_ten_rows():
    config, tensors = read(FNO)
    few = dict(list(tensors.items())[30:])
    with pytest.raises(ConversionError, match=r"(?s)30 differences.*and 20 more") as caught:
        FAMILIES["fno"].build(config, few)
    assert str(caught.value).count("missing: ") == 10


def test_complex_tensors_are_taken_as_well_as_pairs():
    config, tensors = read(TFNO)
    pairs = FAMILIES["fno"].build(config, tensors)
    for name in tensors:
        if ".weight.core" in name or ".factors." in name:
            tensors[name] = tensors[name][..., 0] + 1j * tensors[name][..., 1]
    for a, b in zip(
        parameters(pairs).values(), parameters(FAMILIES["fno"].build(config, tensors)).values(), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separable": True}, "separable=True is not supported"),
        ({"factorization": "CP"}, "only dense and Tucker"),
        ({"norm": "batch_norm"}, "norm is 'batch_norm'"),
        ({"n_mode": 3}, "does not know: .*n_mode"),
        ({"fno_skip": "dense"}, "fno_skip='dense' is not supported"),
        ({"domain_padding": "wide"}, "no model that can be built"),
    ],
)
def test_options_without_counterpart_are_named(changes, message):
    config, tensors = read(FNO)
    with pytest.raises(ConversionError, match=message):
        FAMILIES["fno"].build({**config, "kwargs": {**config["kwargs"], **changes}}, tensors)


def test_cfdbench_classes_are_named_or_told_from_their_arguments():
    config, tensors = read(CFD)
    assert FAMILIES["cfdbench"].build(config["kwargs"], tensors).config.depth == config["kwargs"]["num_layers"]
    with pytest.raises(ConversionError, match="Did you mean 'UNet'"):
        FAMILIES["cfdbench"].build({**config, "upstream_class": "Unet"}, tensors)
    with pytest.raises(ConversionError, match='Set "upstream_class"'):
        FAMILIES["cfdbench"].build({"kwargs": {"width": 3}}, tensors)


def test_replay_needs_its_inputs_and_knows_its_outputs():
    config, tensors = read(FNO)
    model = FAMILIES["fno"].build(config, tensors)
    with pytest.raises(ConversionError, match="lack .'in.x'"):
        FAMILIES["fno"].replay(model, config, {})
    io = load_file(FNO / "io.safetensors")
    with pytest.raises(ConversionError, match="mid.attention"):
        FAMILIES["fno"].replay(model, config, {"in.x": io["in.x"], "mid.attention": io["in.x"]})


def test_converted_folder_opens_and_computes_the_same(tmp_path):
    report = convert("cfdbench", CFD / "config.json", CFD / "weights.safetensors", tmp_path / "model")
    assert report["written"]
    model, (config, _) = saving.load(tmp_path / "model"), read(CFD)
    io = load_file(CFD / "io.safetensors")
    outputs = FAMILIES["cfdbench"].replay(model, config, io)
    np.testing.assert_allclose(outputs["out.y"], io["out.y"], atol=2e-5)


def test_dry_run_checks_but_writes_nothing(tmp_path):
    assert not convert("fno", FNO / "config.json", FNO / "weights.safetensors", tmp_path / "m", dry_run=True)["written"]
    assert not (tmp_path / "m").exists()


def test_bad_arguments_are_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ConversionError, match="Did you mean 'fno'"):
        convert("fna", FNO / "config.json", FNO / "weights.safetensors", tmp_path / "m")
    with pytest.raises(ConversionError, match="Cannot read the config"):
        convert("fno", tmp_path / "absent.json", FNO / "weights.safetensors", tmp_path / "m")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConversionError, match="is not JSON"):
        convert("fno", tmp_path / "bad.json", FNO / "weights.safetensors", tmp_path / "m")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConversionError, match=r"wrong.safetensors with .*config.json: The weights do not fit"):
        convert("fno", FNO / "config.json", tmp_path / "wrong.safetensors", tmp_path / "m")
    assert not (tmp_path / "m").exists()
