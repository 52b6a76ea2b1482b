"""F-FNO at sizes and options that are not among the recorded cases, against float64 numpy written from the paper."""

import numpy as np
import pytest

from physml.convert import FAMILIES
from physml.errors import ConversionError

FAMILY = FAMILIES["ffno"]


def kwargs_of(**changes):
    parts = {f"n_{way}_{kind}_components": 1 for way in ("input", "output") for kind in ("scalar", "vector")}
    small = {"time_history": 2, "time_future": 1, "activation": "gelu", "modes": 4, "width": 6, "n_layers": 3}
    return {**parts, **small, **changes}


def channels(kwargs, way):
    return kwargs[f"n_{way}_scalar_components"] + 2 * kwargs[f"n_{way}_vector_components"]


def weights_of(kwargs, seed=0):
    """Random tensors under the names of the source; shared ones are repeated, as in its state dict."""
    random = np.random.default_rng(seed)
    width, depth, norm = kwargs["width"], kwargs["n_layers"], kwargs.get("ff_weight_norm", False)
    tensors = {"_float": np.zeros(1, np.float32)}

    def linear(name, inputs, outputs):
        weight, bias = random.standard_normal((outputs, inputs)) / np.sqrt(inputs), random.standard_normal(outputs)
        tensors[f"{name}.bias"] = bias
        if norm:
            tensors[f"{name}.weight_g"], tensors[f"{name}.weight_v"] = random.uniform(0.5, 1.5, (outputs, 1)), weight
        else:
            tensors[f"{name}.weight"] = weight

    def feedforward(name):
        count, hidden = kwargs.get("n_ff_layers", 2), width * kwargs.get("factor", 2)
        for j in range(count):
            linear(f"{name}.layers.{j}.0", width if j == 0 else hidden, width if j == count - 1 else hidden)
        if kwargs.get("layer_norm"):
            for part in ("weight", "bias"):
                tensors[f"{name}.layers.{count - 1}.3.{part}"] = random.standard_normal(width)

    def fourier(name):
        for i in range(2):
            tensors[f"{name}.fourier_weight.{i}"] = 0.5 * random.standard_normal((width, width, kwargs["modes"], 2))

    def repeat(part):
        for name in [name for name in tensors if name.startswith(f"conv.{part}")]:
            for i in range(depth):
                tensors[name.replace("conv.", f"conv.spectral_layers.{i}.", 1)] = tensors[name]

    inputs = kwargs["time_history"] * channels(kwargs, "input") + 2 * kwargs.get("use_position", True)
    linear("conv.in_proj", inputs, width)
    for shared, part, make in (
        (kwargs.get("share_weight"), "fourier_weight", fourier), (kwargs.get("share_fork"), "backcast_ff", feedforward)
    ):  # fmt: skip
        suffix = ".backcast_ff" if part == "backcast_ff" else ""
        for place in ["conv"] if shared else [f"conv.spectral_layers.{i}" for i in range(depth)]:
            make(f"{place}{suffix}")
        if shared:
            repeat(part)
    linear("conv.out.0", width, 128)
    linear("conv.out.1", 128, kwargs["time_future"] * channels(kwargs, "output"))
    size, count = channels(kwargs, "input"), 50.0
    mean, deviation = random.standard_normal(size), random.uniform(0.5, 2, size)
    tensors |= {
        "normalizer.max_accumulations": np.array(1000), "normalizer.count": np.array(count),
        "normalizer.n_accumulations": np.array(5.0), "normalizer.sum": mean * count,
        "normalizer.sum_squared": (deviation**2 + mean**2) * count, "normalizer.one": np.array(1.0),
        "normalizer.std_epsilon": np.full(size, 1e-8),
    }  # fmt: skip
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def reference(kwargs, tensors, x):
    """(batch, time, channel, rows, columns) -> (batch, 1, channel, rows, columns)."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    batch, _, size, rows, columns = x.shape
    mean = w["normalizer.sum"] / w["normalizer.count"]
    deviation = np.sqrt(w["normalizer.sum_squared"] / w["normalizer.count"] - mean**2)
    normalize = kwargs.get("should_normalize", True)
    if normalize:
        x = (x - mean[:, None, None]) / deviation[:, None, None]
    h = np.moveaxis(x.reshape(batch, -1, rows, columns), 1, -1)
    if kwargs.get("use_position", True):
        lines = [np.linspace(kwargs.get("low", 0), kwargs.get("high", 1), n) for n in (rows, columns)]
        p = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)
        flat = p.reshape(-1, 2)
        p = (p - flat.mean(0)) / flat.std(0, ddof=1)
        h = np.concatenate([h, np.broadcast_to(p, (batch, *p.shape))], axis=-1)

    def linear(name, h):
        if f"{name}.weight" in w:
            return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        v = w[f"{name}.weight_v"]
        return h @ (w[f"{name}.weight_g"] * v / np.linalg.norm(v, axis=1, keepdims=True)).T + w[f"{name}.bias"]

    h = linear("conv.in_proj", h)
    for layer in range(kwargs["n_layers"]):
        place = f"conv.spectral_layers.{layer}"
        b = mix(kwargs.get("mode", "full"), kwargs["modes"], w, place, h)
        count = kwargs.get("n_ff_layers", 2)
        for j in range(count):
            b = linear(f"{place}.backcast_ff.layers.{j}.0", b)
            b = b if j == count - 1 else np.maximum(b, 0)
        if kwargs.get("layer_norm"):
            b = (b - b.mean(-1, keepdims=True)) / np.sqrt(b.var(-1, keepdims=True) + 1e-5)
            name = f"{place}.backcast_ff.layers.{count - 1}.3"
            b = b * w[f"{name}.weight"] + w[f"{name}.bias"]
        h = h + b
    y = np.moveaxis(linear("conv.out.1", linear("conv.out.0", b)), -1, 1)
    y = y * deviation[:, None, None] + mean[:, None, None] if normalize else y
    return y[:, None]


def mix(mode, modes, w, place, h):
    if mode == "no-fourier":
        return h
    total = 0
    for weight, axis in ((0, 2), (1, 1)):
        spectrum = np.moveaxis(np.fft.rfft(h, axis=axis, norm="ortho"), axis, 0)
        kept = spectrum[:modes]
        if mode == "full":
            pair = w[f"{place}.fourier_weight.{weight}"]
            kept = np.einsum("kbxi,iok->kbxo", kept, pair[..., 0] + 1j * pair[..., 1])
        out = np.zeros_like(spectrum)
        out[:modes] = kept
        total = total + np.fft.irfft(np.moveaxis(out, 0, axis), n=h.shape[axis], axis=axis, norm="ortho")
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {
            "share_weight": True,
            "share_fork": True,
            "ff_weight_norm": True,
            "layer_norm": True,
            "factor": 3,
            "n_layers": 9,
        },
        pytest.param({"mode": "low-pass", "n_ff_layers": 1, "layer_norm": True}, marks=pytest.mark.slow),
        {"mode": "no-fourier", "n_ff_layers": 3, "use_position": False, "share_fork": True},
        {
            "should_normalize": False,
            "time_future": 2,
            "low": -1,
            "high": 1,
            "share_weight": True,
            "ff_weight_norm": True,
        },
        pytest.param(
            {"n_input_vector_components": 0, "time_future": 2, "n_output_vector_components": 0, "time_history": 1},
            marks=pytest.mark.slow,
        ),
        {"modes": 5},
    ],
    ids=["shared", "low-pass", "no-fourier", "two-frames", "one-channel", "all-modes"],
)
def test_other_sizes_and_options_are_the_formulas(changes):
    kwargs = kwargs_of(**changes)
    tensors = weights_of(kwargs)
    x = np.random.default_rng(1).standard_normal((2, kwargs["time_history"], channels(kwargs, "input"), 9, 8))
    config = {"kwargs": kwargs, "input_shape": x.shape, "tensors": {"io": {"out.y": ()}}}
    got = FAMILY.replay(FAMILY.build(config, tensors), config, {"in.x": x})["out.y"]
    expected = reference(kwargs, tensors, x.astype(np.float32).astype(float))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_shared_weights_are_one_and_copies_must_agree():
    kwargs = kwargs_of(share_weight=True, share_fork=True)
    tensors = weights_of(kwargs)
    FAMILY.build(kwargs, tensors)
    once = {name: value for name, value in tensors.items() if ".spectral_layers." not in name}
    FAMILY.build(kwargs, once)  # safetensors may hold shared weights once
    for name in ("conv.spectral_layers.1.fourier_weight.0", "conv.spectral_layers.2.backcast_ff.layers.1.0.bias"):
        with pytest.raises(ConversionError, match="differ from layer to layer"):
            FAMILY.build(kwargs, {**tensors, name: tensors[name] + 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "high-pass"}, "mode='high-pass'"),
        ({"use_fourier_position": True}, "source itself fails"),
        ({"low": 1, "high": 0}, "low below high"),
        ({"time_future": 2}, "source itself fails"),
        ({"depth": 3}, "does not know: .'depth'"),
    ],
)
def test_what_cannot_be_converted_is_named(changes, message):
    with pytest.raises(ConversionError, match=message):
        FAMILY.build({"kwargs": kwargs_of(**changes)}, {})
