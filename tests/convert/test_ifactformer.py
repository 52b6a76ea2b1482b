"""IFactFormer at sizes and options that are not among the recorded cases, against float64 numpy written from the paper.

The reference multiplies kernels out as the formulas say: one einsum per axis, means after the linear map, norms apart.
"""

import numpy as np
import pytest
from scipy.special import erf

from physml.convert import FAMILIES
from physml.convert.ifactformer import grid_of, on_grid
from physml.errors import ConversionError

FAMILY = FAMILIES["ifactformer"]


def kwargs_of(**changes):
    small = {
        "in_dim": 2,
        "out_dim": 3,
        "in_time_window": 1,
        "dim": 8,
        "heads": 2,
        "depth": 1,
        "dim_head": 4,
        "n_layer": 2,
    }
    return {**small, "model": "IFactFormer_m", **changes}


def weights_of(kwargs, seed=0):
    """Random tensors under the names of the authors' code."""
    random = np.random.default_rng(seed)
    d, h, e, t, c = (kwargs[name] for name in ("dim", "heads", "dim_head", "in_time_window", "in_dim"))
    wide = h * e * kwargs.get("kernel_multiplier", 3)
    mixed = 3 * h * e if kwargs["model"] == "IFactFormer_m" else h * e
    shapes = {
        "to_in.0.weight": (d // 2, 1, 1, 1), "to_in.0.bias": (d // 2,), "to_in.2.weight": (d, d // 2, t, 1),
        "simple_to_out.1.weight": (d // 2, d, 1), "simple_to_out.3.weight": (kwargs["out_dim"], d // 2, 1),
        "simple_to_out.3.bias": (kwargs["out_dim"],),
    }  # fmt: skip
    for layer in range(kwargs["depth"]):
        place = f"encoder.layers.{layer}"
        shapes |= {
            f"{place}.0.0._B": (3, d // 2), f"{place}.0.1.weight": (d, d), f"{place}.0.1.bias": (d,),
            f"{place}.1.in_norm.weight": (d,), f"{place}.1.in_norm.bias": (d,), f"{place}.1.to_v.weight": (h * e, d),
            f"{place}.1.to_in.weight": (d, d), f"{place}.1.to_out.2.weight": (d, mixed),
            f"{place}.1.to_out.4.weight": (d, d),
        }  # fmt: skip
        for axis, i in zip("xyz", (0, 1, 1)):
            pool, low = f"{place}.1.to_{axis}.{i}", f"{place}.1.low_rank_kernel_{axis}"
            shapes |= {
                f"{pool}.to_in.weight": (d, d), f"{pool}.out_ffn.norm.weight": (d,), f"{pool}.out_ffn.norm.bias": (d,),
                f"{pool}.out_ffn.fn.net.0.weight": (2 * d, d), f"{pool}.out_ffn.fn.net.0.bias": (2 * d,),
                f"{pool}.out_ffn.fn.net.3.weight": (d, d), f"{pool}.out_ffn.fn.net.3.bias": (d,),
                f"{low}.to_q.weight": (wide, d), f"{low}.to_k.weight": (wide, d),
            }  # fmt: skip
            if kwargs.get("use_rope", True):
                shapes[f"{low}.pos_emb.inv_freq"] = (wide // h // 2,)
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.0 if "inv_freq" in name else 0.3 if len(shape) == 1 else 1.5 / np.sqrt(np.prod(shape[1:]))
        tensors[name] = (scale * random.standard_normal(shape)).astype(np.float32)
    return tensors


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def standardize(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def reference(kwargs, tensors, u, positions):
    """(batch, time, x, y, z, channel) -> (batch, x, y, z, channel)."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    d, h, c = kwargs["dim"], kwargs["heads"], kwargs["in_dim"]
    per = d // 2 // c
    a = gelu(np.repeat(u, per, axis=-1) * w["to_in.0.weight"].ravel() + w["to_in.0.bias"])
    x = np.einsum("cktq,btxyzk->bxyzc", w["to_in.2.weight"], a)
    points = np.stack(np.meshgrid(*positions, indexing="ij"), axis=-1)
    for layer in range(kwargs["depth"]):
        place = f"encoder.layers.{layer}"
        z = 2 * np.pi * points @ w[f"{place}.0.0._B"]
        features = np.concatenate([np.sin(z), np.cos(z)], axis=-1)
        x = x + features @ w[f"{place}.0.1.weight"].T + w[f"{place}.0.1.bias"]
        for _ in range(kwargs["n_layer"]):
            x = x + block(kwargs, w, f"{place}.1", x, positions, h) / kwargs["n_layer"]
    return (
        gelu(x @ w["simple_to_out.1.weight"][..., 0].T) @ w["simple_to_out.3.weight"][..., 0].T
        + w["simple_to_out.3.bias"]
    )


def block(kwargs, w, place, x, positions, h):
    n = standardize(x, (-1,)) * w[f"{place}.in_norm.weight"] + w[f"{place}.in_norm.bias"]
    v = n @ w[f"{place}.to_v.weight"].T
    v = v.reshape(*v.shape[:-1], h, -1)
    field, kernels = n @ w[f"{place}.to_in.weight"].T, []
    for i, axis in enumerate("xyz"):
        pool, low = f"{place}.to_{axis}.{min(i, 1)}", f"{place}.low_rank_kernel_{axis}"
        g = (field @ w[f"{pool}.to_in.weight"].T).mean(tuple(k for k in (1, 2, 3) if k != i + 1))
        g = standardize(g, (-1,)) * w[f"{pool}.out_ffn.norm.weight"] + w[f"{pool}.out_ffn.norm.bias"]
        g = g @ w[f"{pool}.out_ffn.fn.net.0.weight"].T + w[f"{pool}.out_ffn.fn.net.0.bias"]
        g = gelu(g[..., : kwargs["dim"]]) * g[..., kwargs["dim"] :]
        g = g @ w[f"{pool}.out_ffn.fn.net.3.weight"].T + w[f"{pool}.out_ffn.fn.net.3.bias"]
        q, k = (np.moveaxis((g @ w[f"{low}.to_{p}.weight"].T).reshape(*g.shape[:2], h, -1), 2, 1) for p in "qk")
        if f"{low}.pos_emb.inv_freq" in w:
            angle = np.tile(64 * positions[i][:, None] * w[f"{low}.pos_emb.inv_freq"], 2)
            q, k = (
                y * np.cos(angle) + np.concatenate(np.split(y, 2, -1)[::-1], -1) * np.sin(angle) * sign(y)
                for y in (q, k)
            )
        wide = q.shape[-1]
        scale = 1 / np.sqrt(wide) if kwargs.get("kernel_multiplier", 3) > 4 else kwargs.get("scaling_factor", 1.0)
        kernels.append(scale * q @ np.swapaxes(k, -1, -2))
    rules = ("bhij,bjyzhc->biyzhc", "bhij,bxjzhc->bxizhc", "bhij,bxyjhc->bxyihc")
    if kwargs["model"] == "IFactFormer_m":
        phi = np.concatenate([np.einsum(rule, kernel, v) for rule, kernel in zip(rules, kernels)], axis=-1)
    else:
        phi = v
        for rule, kernel in zip(rules, kernels):
            phi = np.einsum(rule, kernel, phi)
    phi = standardize(phi.reshape(*phi.shape[:4], -1), (1, 2, 3))
    return gelu(phi @ w[f"{place}.to_out.2.weight"].T) @ w[f"{place}.to_out.4.weight"].T


def sign(y):
    """-1 on the first half of the channels: rot([a, b]) = [-b, a]."""
    return np.where(np.arange(y.shape[-1]) < y.shape[-1] // 2, -1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"depth": 2, "in_time_window": 3}, marks=pytest.mark.slow),
        pytest.param(
            {"depth": 2, "in_time_window": 2, "model": "IFactFormer_o", "heads": 3, "dim_head": 2},
            marks=pytest.mark.slow,
        ),
        {"kernel_multiplier": 6},
        {"kernel_multiplier": 1, "use_rope": False, "scaling_factor": 0.3, "in_dim": 4, "out_dim": 1},
    ],
    ids=["depth-history", "chained", "wide-kernels", "no-rotary"],
)
def test_other_sizes_and_options_are_the_formulas(changes):
    kwargs = kwargs_of(**changes)
    tensors = weights_of(kwargs)
    random = np.random.default_rng(1)
    positions = [np.sort(random.uniform(0, length, n)) for n, length in ((5, 12.0), (4, 2.0), (3, 4.0))]
    u = random.standard_normal((2, kwargs["in_time_window"], 5, 4, 3, kwargs["in_dim"]))
    io = {"in.u": u, **{f"in.pos_{axis}": x[:, None] for axis, x in zip("xyz", positions)}}
    model = FAMILY.build({"kwargs": kwargs}, tensors)
    got = FAMILY.replay(model, {"tensors": {"io": {"out.y": ()}}}, io)["out.y"]
    expected = reference(kwargs, tensors, u.astype(np.float32).astype(float), positions)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_weights_do_not_depend_on_the_grid():
    kwargs = kwargs_of()
    model = FAMILY.build(kwargs, weights_of(kwargs))  # on the authors' channel
    assert model.signature.grid.shape == (32, 33, 16)
    small = on_grid(model, grid_of([np.arange(3.0), np.arange(4.0), np.arange(2.0)]))
    assert small(np.zeros((1, 3, 4, 2, 2), np.float32), np.zeros((1, 0), np.float32)).shape == (1, 3, 4, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "IFactFormer_x"}, "IFactFormer_x"),
        ({"in_dim": 3}, "multiple of in_dim=3"),
        ({"window": 3}, "does not know: .'window'"),
        ({"dim": 7}, "must be even"),
    ],
)
def test_what_cannot_be_converted_is_named(changes, message):
    with pytest.raises(ConversionError, match=message):
        FAMILY.build({"kwargs": kwargs_of(**changes)}, {})
