"""SineNet and the modern U-Net against plain PyTorch networks, in options and sizes that no recorded output has."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from physml.convert import FAMILIES

pytestmark = pytest.mark.peers
PEERS = Path(__file__).parents[2] / "experiments" / "benchmarks" / "torch_unets.py"
PUBLISHED = {
    "n_input_scalar_components": 1, "n_input_vector_components": 1, "n_output_scalar_components": 0,
    "n_output_vector_components": 1, "time_history": 2, "time_future": 1,
}  # fmt: skip
INPUTS, OUTPUTS = 2 * (1 + 2), 2


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("torch_unets", PEERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(family, network, kwargs, shape, scalars):
    """Largest error of the converted network, relative to the largest output."""
    import torch

    torch.manual_seed(0)
    for parameter in network.parameters():  # also those that start from zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, conditions = torch.randn(2, INPUTS, *shape), 5 * torch.rand(2, scalars)
    given = [conditions[:, 0]] if scalars else []
    if scalars > 1:
        given.append(conditions[:, 1] if family == "sinenet" else conditions[:, 1:])
    with torch.inference_mode():
        expected = np.moveaxis(network(x, *given).numpy(), 1, -1)
    weights = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    config = {"kwargs": {**PUBLISHED, **kwargs}, "input_shape": (2, 2, 3, *shape)}
    model = FAMILIES[family].build(config, weights)
    fields = np.moveaxis(x.numpy(), 1, -1)
    found = nnx.jit(lambda m, f, s: m(f, s))(model, fields, conditions.numpy())
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "shape", "scalars"),
    [
        ({"disentangle": False, "num_waves": 1, "num_blocks": 3}, (16, 48), 0),
        ({"avg_pool": False, "interpolation_mode": "bilinear", "norm": False, "activation": "silu"}, (32, 16), 0),
        ({"wave_residual": False, "residual": False, "padding_mode": "replicate", "activation": "relu"}, (32, 32), 0),
        ({"padding_mode": "reflect", "mult": 1.3, "interpolation_mode": "nearest"}, (32, 48), 0),
        ({"padding_mode": "circular", "hidden_channels": 7, "num_blocks": 2}, (48, 32), 1),
        ({"use_scale_shift_norm": True, "padding_mode": "circular"}, (32, 32), 2),
    ],
    ids=["tangled", "max", "bare", "reflect", "odd", "scaled"],
)
def test_sinenet(peers, options, shape, scalars):
    kwargs = {"hidden_channels": 6, "mult": 1.25, "num_waves": 2, "padding_mode": "zeros", **options}
    network = peers.SineNet(INPUTS, OUTPUTS, scalars=scalars, **kwargs)
    if scalars:
        kwargs |= {"param_conditioning": "scalar" if scalars > 1 else None}
    assert compare("sinenet", network, kwargs, shape, scalars) < 1e-5


@pytest.mark.parametrize(
    ("options", "shape", "scalars"),
    [
        ({"ch_mults": (2, 1, 3), "n_blocks": 1, "norm": True, "use1x1": True}, (12, 20), 0),
        ({"ch_mults": (1, 2), "n_blocks": 3, "activation": "silu", "hidden_channels": 5}, (6, 10), 0),
        ({"ch_mults": (1, 2), "is_attn": (True, True), "mid_attn": True, "norm": True}, (64,), 3),
        ({"ch_mults": (1, 2, 2, 1), "padding_mode": "circular", "norm": True}, (40,), 1),
        ({"ch_mults": (1, 1), "n_blocks": 1, "use_scale_shift_norm": True, "activation": "relu"}, (4, 6, 8), 2),
    ],
    ids=["pointwise", "bare", "attention_1d", "circular_1d", "scaled_3d"],
)
def test_modern_unet(peers, options, shape, scalars):
    kwargs = {"hidden_channels": 8, "activation": "gelu", **options}
    network = peers.ModernUNet(INPUTS, OUTPUTS, ndim=len(shape), scalars=scalars, numbered=scalars > 1, **kwargs)
    if scalars:
        kwargs |= {"param_conditioning": f"scalar_{scalars - 1}" if scalars > 1 else None}
    assert compare("modern_unet", network, {**kwargs, "n_dims": len(shape)}, shape, scalars) < 1e-5
