"""CFDBench networks at sizes and options that are not among the recorded cases, against formulas written out."""

import numpy as np
import pytest
from scipy.special import erf

from physml.convert import FAMILIES
from physml.errors import ConversionError

FAMILY = FAMILIES["cfdbench"]
ROWS, COLUMNS, CASES = 5, 7, 3
ACT = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "swish": lambda x: x / (1 + np.exp(-x)),
}


def perceptron_weights(random, name, widths):
    pairs = list(zip(widths, widths[1:]))
    tensors = {
        f"{name}.layers.{2 * i}.weight": random.standard_normal((b, a)) / np.sqrt(a) for i, (a, b) in enumerate(pairs)
    }
    return tensors | {f"{name}.layers.{2 * i}.bias": random.standard_normal(b) for i, (_, b) in enumerate(pairs)}


def perceptron(w, name, x, act, norm=False, last=False):
    maps = sorted(int(key.split(".")[-2]) for key in w if key.startswith(f"{name}.layers.") and key.endswith("weight"))
    for i in maps:
        x = x @ w[f"{name}.layers.{i}.weight"].T + w[f"{name}.layers.{i}.bias"]
        if i != maps[-1] or last:
            mean, spread = (x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)) if norm else (0, 1)
            x = ACT[act]((x - mean) / spread) * spread + mean
    return x


def case(channels=2, batch=3):
    random = np.random.default_rng(1)
    io = {
        "in.inputs": random.standard_normal((batch, channels, ROWS, COLUMNS)),
        "in.case_params": random.standard_normal((batch, CASES)),
        "in.mask": (random.uniform(size=(batch, ROWS, COLUMNS)) > 0.3).astype(float),
        "in.label": random.standard_normal((batch, channels, ROWS, COLUMNS)),
    }
    return {name: value.astype(np.float32) for name, value in io.items()}


def replayed(kind, kwargs, tensors, io, names=("out.y",), **more):
    recorded = {"in.inputs": io["in.inputs"].shape, **dict.fromkeys(names, ())}
    config = {"upstream_class": kind, "kwargs": kwargs, "tensors": {"io": recorded}, **more}
    tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    return FAMILY.replay(FAMILY.build(config, tensors), config, io)


def wide(tensors):
    return {name: np.asarray(value, np.float32).astype(float) for name, value in tensors.items()}


def close(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


POINTS = np.stack(np.meshgrid(range(ROWS), range(COLUMNS), indexing="ij"), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("enhanced", [False, True], ids=["joint", "enhanced"])
@pytest.mark.parametrize(
    "options",
    [
        {"act_name": "swish", "branch_depth": 2},
        {"act_name": "gelu", "act_norm": True, "act_on_output": True, "trunk_depth": 1},
    ],
    ids=["plain", "standardized"],
)
def test_deeponets_are_the_formulas(enhanced, options):
    random, size = np.random.default_rng(0), ROWS * COLUMNS
    kwargs = {"trunk_dim": 2, "width": 6, "branch_depth": 3, "trunk_depth": 2, "num_label_samples": 10, **options}
    branches = {"branch1": size, "branch2": CASES} if enhanced else {"branch_net": size + CASES}
    if enhanced:
        kind, kwargs = "AutoEDeepONet", {**kwargs, "dim_branch1": size, "dim_branch2": CASES}
    else:
        kind, kwargs = "AutoDeepONet", {**kwargs, "branch_dim": size + CASES}
    tensors = {"bias": random.standard_normal(1)}
    for name, inputs in branches.items():
        tensors |= perceptron_weights(random, name, [inputs] + [6] * kwargs["branch_depth"])
    tensors |= perceptron_weights(random, "trunk_net", [2] + [6] * kwargs["trunk_depth"])

    io, w = case(), wide(tensors)
    u, scalars = wide(io)["in.inputs"][:, 0].reshape(3, -1), wide(io)["in.case_params"]
    act, norm, last = (kwargs.get(name, False) for name in ("act_name", "act_norm", "act_on_output"))
    seen = [u, scalars] if enhanced else [np.concatenate([u, scalars], axis=1)]
    branch = np.prod([perceptron(w, name, x, act, norm, last) for name, x in zip(branches, seen)], axis=0)
    trunk = perceptron(w, "trunk_net", (POINTS - 50) / 100, act, norm)
    y = branch @ trunk.T + w["bias"] + u

    got = replayed(kind, kwargs, tensors, io, ("out.y", "mid.branch", "mid.trunk", "out.loss.nmse"))
    close(got["mid.branch"], branch)
    close(got["mid.trunk"], trunk)
    close(got["out.y"], y if enhanced else y.reshape(3, 1, ROWS, COLUMNS))
    label = wide(io)["in.label"][:, 0].reshape(3, -1)
    np.testing.assert_allclose(got["out.loss.nmse"], np.mean((y - label) ** 2) / np.mean(label**2), rtol=1e-5)


@pytest.mark.parametrize("mix", [False, True], ids=["own", "mixed"])
def test_ffn_rows_are_read_by_their_own_sample_or_as_published(mix):
    random, size = np.random.default_rng(0), ROWS * COLUMNS
    kwargs = {"input_field_dim": size, "num_case_params": CASES, "query_dim": 2, "depth": 2, "width": 6}
    kwargs |= {"act_name": "tanh", "act_norm": True}
    tensors = perceptron_weights(random, "ffn", [size + CASES + 2, 6, 6, 1])
    io, w = case(batch=4), wide(tensors)
    u, scalars = wide(io)["in.inputs"][:, 0].reshape(4, -1), wide(io)["in.case_params"]
    sample, points = np.concatenate([u, scalars], axis=1), POINTS.astype(float)
    if mix:
        rows = np.concatenate([np.tile(sample, (size, 1)), np.tile(points, (4, 1))], axis=1)
    else:
        rows = np.concatenate([np.repeat(sample, size, axis=0), np.tile(points, (4, 1))], axis=1)
    change = perceptron(w, "ffn", rows, "tanh", norm=True)
    expected = (change.reshape(4, size) + u).reshape(4, 1, ROWS, COLUMNS)
    if mix:
        close(replayed("AutoFfn", kwargs, tensors, io)["out.y"], expected)
    config = {"kwargs": kwargs, "grid": [ROWS, COLUMNS], "mix_batch": mix}
    model = FAMILY.build(config, {name: np.asarray(value, np.float32) for name, value in tensors.items()})
    got = model(np.moveaxis(io["in.inputs"][:, :1], 1, -1), io["in.case_params"])
    close(np.moveaxis(np.asarray(got), -1, 1), expected)


def test_a_grid_that_is_not_named_must_be_a_published_one():
    kwargs = {"branch_dim": 64 * 64 + 8, "trunk_dim": 2, "width": 4, "branch_depth": 1, "trunk_depth": 1}
    random = np.random.default_rng(0)
    tensors = {"bias": np.zeros(1), **perceptron_weights(random, "branch_net", [64 * 64 + 8, 4])}
    tensors |= perceptron_weights(random, "trunk_net", [2, 4])
    model = FAMILY.build(kwargs, tensors)
    assert (model.signature.grid.shape, model.signature.scalars) == ((64, 64), 8)
    with pytest.raises(ConversionError, match="Name the grid in the config"):
        FAMILY.build({**kwargs, "branch_dim": 77}, tensors)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("UNet", {"bilinear": True, "insert_case_params_at": "hidden"}, "source itself fails"),
        ("UNet", {"insert_case_params_at": "middle"}, "'middle'"),
        ("ResNet", {"kernel_size": 5}, r"2 \* padding \+ 1"),
        ("ResNet", {"stride": 2}, "stride 1"),
        ("ResNet", {"blocks": 2}, "does not know: .'blocks'"),
        ("AutoDeepONet", {"branch_dim": 4101, "act_name": "elu"}, "act_name='elu'"),
        ("AutoDeepONet", {"branch_dim": 4101, "trunk_dim": 3}, "row and column"),
    ],
)
def test_what_cannot_be_converted_is_named(kind, changes, message):
    grid = {"in_chan": 2, "out_chan": 2, "n_case_params": 5}
    kwargs = {**({"trunk_dim": 2} if kind == "AutoDeepONet" else grid), **changes}
    with pytest.raises(ConversionError, match=message):
        FAMILY.build({"upstream_class": kind, "kwargs": kwargs}, {})


def convolution_weights(random, name, inputs, outputs, kernel):
    scale = 1 / np.sqrt(inputs * kernel**2)
    return {
        f"{name}.weight": scale * random.standard_normal((outputs, inputs, kernel, kernel)),
        f"{name}.bias": random.standard_normal(outputs),
    }


def norm_weights(random, name, channels):
    return {
        f"{name}.weight": random.uniform(0.5, 1.5, channels), f"{name}.bias": random.standard_normal(channels),
        f"{name}.running_mean": random.standard_normal(channels), f"{name}.num_batches_tracked": np.array(7),
        f"{name}.running_var": random.uniform(0.5, 1.5, channels),
    }  # fmt: skip


def torch_convolution(w, name, x, padding=0):
    from torch.nn import functional

    x = functional.pad(x, [padding] * 4, mode="replicate") if padding else x
    return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"])


@pytest.mark.peers
@pytest.mark.parametrize(("bilinear", "insertion"), [(False, "hidden"), (False, "input"), (True, "input")])
def test_unet_is_its_torch_layers(bilinear, insertion):
    import torch

    functional, random, dim = torch.nn.functional, np.random.default_rng(0), 2
    half = 2 if bilinear else 1
    tensors = convolution_weights(random, "out_conv.conv", dim, 1, 1)

    def pair(name, inputs, inner, outputs):
        for i, (a, b) in enumerate(((inputs, inner), (inner, outputs)), start=1):
            tensors.update(convolution_weights(random, f"{name}.conv{i}.0", a, b, 3))
            tensors.update(norm_weights(random, f"{name}.conv{i}.1", b))

    pair("in_conv", 2 + 1 + (CASES if insertion == "input" else 0), dim, dim)
    for i in range(1, 5):
        outputs = dim * 2**i // (half if i == 4 else 1)
        pair(f"down{i}.maxpool_conv.1", dim * 2 ** (i - 1), outputs, outputs)
        inputs, outputs = dim * 2 ** (5 - i), dim * 2 ** (4 - i) // (half if i < 4 else 1)
        pair(f"up{i}.conv", inputs, inputs // 2 if bilinear else outputs, outputs)
        if not bilinear:
            weight = random.standard_normal((inputs, inputs // 2, 2, 2)) / np.sqrt(inputs)
            tensors |= {f"up{i}.up.weight": weight, f"up{i}.up.bias": random.standard_normal(inputs // 2)}
    if insertion == "hidden":
        tensors |= {"case_params_fc.weight": random.standard_normal((16 * dim, CASES))}
        tensors |= {"case_params_fc.bias": random.standard_normal(16 * dim)}

    w = {name: torch.tensor(value).double() for name, value in wide(tensors).items()}
    io = case()
    for name in ("in.inputs", "in.label"):
        io[name] = np.random.default_rng(2).standard_normal((3, 2, 19, 35)).astype(np.float32)
    io["in.mask"] = np.random.default_rng(3).integers(0, 2, (3, 19, 35)).astype(np.float32)
    inputs, scalars, mask = (torch.tensor(io[f"in.{name}"]).double() for name in ("inputs", "case_params", "mask"))

    def apply(name, x):
        for i in (1, 2):
            place = f"{name}.conv{i}"
            x = torch_convolution(w, f"{place}.0", x, 1)
            statistics = (w[f"{place}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            x = functional.relu(functional.batch_norm(x, *statistics, eps=1e-5))
        return x

    x = torch.cat([inputs, mask[:, None]], dim=1)
    if insertion == "input":
        x = torch.cat([x, scalars[..., None, None].expand(-1, -1, 19, 35)], dim=1)
    states = [apply("in_conv", x)]
    for i in range(1, 5):
        states.append(apply(f"down{i}.maxpool_conv.1", functional.max_pool2d(states[-1], 2)))
    x = states.pop()
    if insertion == "hidden":
        x = x + functional.linear(scalars, w["case_params_fc.weight"], w["case_params_fc.bias"])[..., None, None]
    for i in range(1, 5):
        if bilinear:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            x = functional.conv_transpose2d(x, w[f"up{i}.up.weight"], w[f"up{i}.up.bias"], stride=2)
        beside = states.pop()
        rows, columns = (beside.shape[k] - x.shape[k] for k in (2, 3))
        x = functional.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        x = apply(f"up{i}.conv", torch.cat([beside, x], dim=1))
    expected = (torch_convolution(w, "out_conv.conv", x) + inputs[:, :1]) * mask[:, None]

    kwargs = {"in_chan": 2, "out_chan": 1, "n_case_params": CASES, "dim": dim, "bilinear": bilinear}
    close(replayed("UNet", {**kwargs, "insert_case_params_at": insertion}, tensors, io)["out.y"], expected.numpy())


@pytest.mark.peers
def test_resnet_is_its_torch_layers():
    import torch

    random, tensors = np.random.default_rng(0), {}
    kwargs = {"in_chan": 2, "out_chan": 1, "n_case_params": CASES, "hidden_chan": 6, "num_blocks": 2}
    channels = [2 + 1 + CASES, 6, 6, 6, 1]
    for i, (a, b) in enumerate(zip(channels, channels[1:])):
        tensors |= convolution_weights(random, f"blocks.{i}.conv1", a, 64, 3)
        tensors |= convolution_weights(random, f"blocks.{i}.conv2", 64, b, 3)
        tensors |= norm_weights(random, f"blocks.{i}.bn1", 64) | norm_weights(random, f"blocks.{i}.bn2", b)
        if i in (0, 3):
            tensors |= convolution_weights(random, f"blocks.{i}.res_conv", a, b, 1)
    w, io = {name: torch.tensor(value).double() for name, value in wide(tensors).items()}, case()
    inputs, scalars, mask = (torch.tensor(io[f"in.{name}"]).double() for name in ("inputs", "case_params", "mask"))
    x = torch.cat([inputs, mask[:, None], scalars[..., None, None].expand(-1, -1, ROWS, COLUMNS)], dim=1)
    for i in range(4):
        beside = torch_convolution(w, f"blocks.{i}.res_conv", x) if i in (0, 3) else x
        hidden = torch.nn.functional.gelu(torch_convolution(w, f"blocks.{i}.conv1", x, 1))
        x = torch_convolution(w, f"blocks.{i}.conv2", hidden, 1) + beside
    expected = (x + inputs[:, :1]) * mask[:, None]
    got = replayed("ResNet", {**kwargs, "kernel_size": 3, "padding": 1}, tensors, io)
    close(got["out.y"], expected.numpy())
