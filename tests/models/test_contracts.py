"""What every architecture promises. A new entry of `MODELS` needs a line in `SMALL` and gets all of these checks."""

import collections
import dataclasses
import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml import saving
from physml.contracts import Model
from physml.errors import PhysmlError
from physml.fields import Axis, Grid, Signature
from physml.layers.spectral import ComplexParam
from physml.layers.stack import Stack
from physml.models import MODELS
from physml.parallel.mesh import Layout
from physml.training.optimizers import is_matrix


@dataclass(frozen=True)
class Row:
    """How one architecture, in one choice of options, is tried here.

    Attributes:
        model: entry of `MODELS`.
        options: of its config, small.
        shape: the grid of most checks; odd and not square where the architecture allows it.
        shapes: further grids that it can be built for, with the options that these need.
        refused: grids that it refuses, with a piece of the message.
        finer: whether weights built for one grid apply to another.
        scalars: numbers that condition it.
        deep: options that make several equal blocks.
        silent: parameters (end of the dotted path) that no gradient reaches, with the reason.
        still: why the output of a new network is zero; empty where it is not.
        half: largest error in bfloat16, relative to the largest output.
    """

    model: str
    options: dict
    shape: tuple[int, ...] = (9, 12)
    shapes: dict[tuple[int, ...], dict] = field(default_factory=dict)
    refused: dict[tuple[int, ...], str] = field(default_factory=dict)
    finer: bool = True
    scalars: int = 2
    deep: dict = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    still: str = ""
    half: float = 0.04

    def but(self, options: dict, **changes) -> "Row":
        return dataclasses.replace(self, options={**self.options, **options}, **changes)

    def config(self, **options):
        return MODELS[self.model](**{**self.options, **options})

    def signature(self, shape=None) -> Signature:
        axes = tuple(Axis.uniform(name, n, periodic=name != "y") for name, n in zip("xyz", shape or self.shape))
        return Signature(Grid(axes), INPUTS, self.scalars, OUTPUTS)

    def build(self, shape=None, seed=0, **options):
        return self.config(**options).build(self.signature(shape), nnx.Rngs(seed))

    def inputs(self, shape=None, batch=2, seed=0):
        random = np.random.default_rng(seed)
        fields = random.standard_normal((batch, *(shape or self.shape), INPUTS)).astype(np.float32)
        return fields, random.standard_normal((batch, self.scalars)).astype(np.float32)


INPUTS, OUTPUTS = 3, 2
ANY = {(11,): {}, (6, 5, 7): {}}
FEW_MODES = {(11,): {"modes": (2,)}, (6, 5, 7): {"modes": (2,)}}

# One row for every entry of MODELS ...
ROWS = {
    "auto_deeponet": Row(
        "auto_deeponet",
        {"width": 8, "branch_depth": 2, "trunk_depth": 3, "activation": "tanh"},
        shapes=ANY,
        finer=False,  # reads every point of its grid
    ),
    "auto_ffn": Row(
        "auto_ffn",
        {"width": 8, "depth": 2, "activation": "silu"},
        shapes=ANY,
        finer=False,  # reads every point of its grid
    ),
    "cfdbench_resnet": Row(
        "cfdbench_resnet", {"width": 4, "inner": 6, "depth": 1, "kernel": 3}, shapes=ANY, deep={"depth": 4}
    ),
    "classic_unet": Row(
        "classic_unet",
        {"width": 4, "levels": 2},
        shapes={(11,): {}, (4, 3, 5): {"levels": 1, "width": 2}},
        refused={(3, 12): "Lower levels to at most 1"},
    ),
    "classic_fno": Row(
        "classic_fno", {"width": 6, "modes": (3,), "depth": 2, "projection": 8}, shapes=FEW_MODES, deep={"depth": 4}
    ),
    "conv_net": Row(
        "conv_net",
        {"width": 6, "depth": 2, "dilations": (1, 2), "activation": "tanh"},
        shapes=ANY,
        deep={"depth": 4},
    ),
    "ffno": Row(
        "ffno",
        {"width": 6, "modes": (3,), "depth": 2, "expansion": 2, "projection": 8},
        shapes=FEW_MODES,
        refused={(3, 12): "Lower modes to at most"},
        deep={"depth": 8, "share_fourier": True},
    ),
    "fno": Row("fno", {"width": 6, "modes": (4,), "depth": 2}, shapes=FEW_MODES, deep={"depth": 4}),
    "ifactformer": Row(
        "ifactformer",
        {"width": 12, "heads": 2, "head_width": 4, "iterations": 2},
        shapes=ANY,
        finer=False,  # predicts from the coordinates of its grid
        deep={"depth": 4},
    ),
    "modern_unet": Row(
        "modern_unet",
        {"width": 8, "multipliers": (1, 2), "blocks": 1},
        shape=(6, 8),
        shapes={(10,): {}, (4, 2, 6): {}},
        refused={(9, 12): "multiple of 2 points"},
        deep={"blocks": 2},
        still="its last convolution starts from zero, as published",
    ),
    "poseidon_scot": Row(
        "poseidon_scot",
        {"width": 8, "depths": (2, 1), "heads": (2, 1), "skip_blocks": (1, 1), "patch": 3, "window": 2},
        shapes={(15, 15): {"window": 3}, (8, 7): {"patch": 1, "window": 4}},
        refused={
            (11,): "two spatial axes",
            (6, 5, 7): "two spatial axes",
            (10, 12): "patch=3 does not divide",
            (3, 12): r"at least 6 points .* image_size=\(6, 12\)",
        },
        deep={"depths": (9, 1)},
    ),
    "resnet": Row("resnet", {"width": 6, "depth": 2, "dilations": (1, 2)}, shapes=ANY, deep={"depth": 4}),
    "sinenet": Row(
        "sinenet",
        {"width": 4, "growth": 1.0, "waves": 1},
        shape=(32, 16),
        shapes={(32,): {}, (16, 16, 16): {"boundary": "zero"}},
        refused={(9, 12): "multiple of 16", (16, 16): r"at least \(32, 16\)"},
        deep={"waves": 8},
    ),
}
# ... and one for every variant with parts of its own.
VARIANTS = {
    "auto_edeeponet": ROWS["auto_deeponet"].but(
        {"branches": "separate", "standardize": True, "activate_output": True, "frame": None, "mask": 2}
    ),
    "classic_unet_hidden": ROWS["classic_unet"].but(
        {"conditioning": "hidden", "mask": 2, "boundary": "zero", "levels": 1}, refused={}
    ),
    "classic_unet_bilinear": ROWS["classic_unet"].but({"upsampling": "bilinear", "frame": None}),
    "classic_unet_group": ROWS["classic_unet"].but(
        {"norm": "group", "downsampling": "strided", "upsampling": "overlapping", "frame": None}
    ),
    "classic_fno_bare": ROWS["classic_fno"].but({"projection": 0, "positions": False, "activation": "gelu_tanh"}),
    "conv_net_linear": ROWS["conv_net"].but({"depth": 0, "boundary": "zero"}, shapes={}),
    "ffno_shared": ROWS["ffno"].but(
        {
            "share_fourier": True,
            "share_feedforward": True,
            "weight_norm": False,
            "layer_norm": True,
            "spectral": "matmul",
        }
    ),
    "ffno_low_pass": ROWS["ffno"].but({"mixing": "low-pass", "positions": False, "normalize": True, "spectral": "fft"}),
    "fno_tucker": ROWS["fno"].but({"factorization": "tucker", "rank": 0.4}),
    "fno_preactivation": ROWS["fno"].but({"preactivation": True, "norm": "group_norm", "stabilizer": "tanh"}),
    "fno_padded": ROWS["fno"].but({"domain_padding": (0.2,), "norm": "instance_norm", "lifting_ratio": 0.0}),
    "fno_bare": ROWS["fno"].but({"skip": "none", "channel_mlp_expansion": 0.0, "positions": False}),
    "fno_matmul": ROWS["fno"].but({"spectral": "matmul"}),
    "fno_fft": ROWS["fno"].but({"spectral": "fft"}),
    "ifactformer_chained": ROWS["ifactformer"].but(
        {"form": "chained", "rotary": False, "history": 2, "frame_channels": 1, "whole_waves": True, "depth": 2}
    ),
    "modern_unet_plain": ROWS["modern_unet"].but({"norm": False, "boundary": "reflect"}, scalars=0, still=""),
    "modern_unet_attention": ROWS["modern_unet"].but(
        {"attention": (False, True), "middle_attention": True, "modulation": "scale_shift", "pointwise_ends": True}
    ),
    "poseidon_scot_plain": ROWS["poseidon_scot"].but(
        {"position_embedding": True, "boundary": "zero", "image_size": (12, 6), "attention_bias": False},
        scalars=0,
        refused={},  # fields on every grid are resampled
    ),
    "poseidon_scot_resnet": ROWS["poseidon_scot"].but(
        {"skip": "resnet", "residual": True, "mask_token": True, "depths": (3,), "heads": (2,), "skip_blocks": (2,)},
        silent={"mask_token": "no token is masked here"},
        shapes={},
        refused={},
    ),
    "resnet_postactivation": ROWS["resnet"].but({"preactivation": False, "pointwise_ends": True, "activation": "relu"}),
    "resnet_norm": ROWS["resnet"].but({"norm": "group_norm", "positions": True, "boundary": "reflect"}),
    "sinenet_tangled": ROWS["sinenet"].but(
        {"disentangled": False, "blocks": 2, "pool": "max", "interpolation": "bilinear"}, shapes={}, scalars=0
    ),
    "sinenet_scaled": ROWS["sinenet"].but(
        {"modulation": "scale_shift", "boundary": "periodic"}, shape=(32, 32), shapes={}, refused={}
    ),
}
CASES = {**ROWS, **VARIANTS}
HEAVY = {"modern_unet", "sinenet", "ifactformer", "poseidon_scot", "classic_unet", "cfdbench_resnet"}


def over(cases, slow=()):
    """A test for each; those in `slow` compile for long and run with the slow tests."""
    rows = [pytest.param(row, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, row in cases.items()]
    return pytest.mark.parametrize("row", rows)


every_model, few_models = over(ROWS), over(ROWS, HEAVY)
every_case, few_cases = over(CASES, VARIANTS), over(CASES, {*VARIANTS, *HEAVY})


def run(model, *inputs):
    return np.asarray(_compiled(nnx.graphdef(model))(nnx.state(model), *inputs))


@functools.cache
def _compiled(graph):
    return jax.jit(lambda state, fields, scalars: nnx.merge(graph, state)(fields, scalars))


def shaken(model, seed=3):
    """The model with a little noise on every parameter, so that none is zero by construction."""
    random = np.random.default_rng(seed)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    noisy = jax.tree.map(lambda leaf: leaf + 0.05 * random.standard_normal(leaf.shape).astype(leaf.dtype), params)
    return nnx.merge(graph, noisy, rest)


def test_every_entry_has_a_row():
    assert ROWS.keys() == MODELS.keys()
    assert all(name == row.model for name, row in ROWS.items())


@few_cases
def test_shapes_and_other_grids(row):
    for shape, options in {row.shape: {}, **row.shapes}.items():
        model = row.build(shape, **options)
        assert isinstance(model, Model)
        assert run(model, *row.inputs(shape)).shape == (2, *shape, OUTPUTS)
        finer = tuple(2 * n for n in shape)
        if row.finer:
            assert run(model, *row.inputs(finer, batch=1)).shape == (1, *finer, OUTPUTS)
        else:
            with pytest.raises(PhysmlError, match=str(finer[0])):
                model(*row.inputs(finer, batch=1))


@every_case
def test_grids_that_do_not_fit_are_refused(row):
    for shape, message in row.refused.items():
        with pytest.raises(PhysmlError, match=message):
            row.build(shape)(*row.inputs(shape))


@every_case
def test_parameter_count_is_that_of_the_config(row):
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(row.build(), nnx.Param)))
    assert count == row.config().parameters(row.signature())


@every_case
def test_gradient_reaches_every_parameter_and_input(row):
    fields, scalars = row.inputs()
    weights = np.random.default_rng(1).standard_normal((*fields.shape[:-1], OUTPUTS)).astype(np.float32)
    graph, params, rest = nnx.split(shaken(row.build()), nnx.Param, ...)

    @jax.jit
    def gradient(params, fields, scalars):
        def loss(params, fields, scalars):
            return jnp.sum(weights * nnx.merge(graph, params, rest)(fields, scalars) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(params, fields, scalars)

    by_params, by_fields, by_scalars = gradient(params, fields, scalars)
    paths = {".".join(map(str, path)): np.any(leaf[...]) for path, leaf in nnx.to_flat_state(by_params)}
    silent = {path for path, reached in paths.items() if not reached}
    assert silent == {path for path in paths if path.endswith(tuple(row.silent))}
    assert np.all(np.any(by_fields, axis=tuple(range(fields.ndim - 1))))
    assert np.all(np.any(by_scalars, axis=0))


@few_models
def test_jit_is_eager(row):
    model, inputs = row.build(), row.inputs()
    np.testing.assert_allclose(run(model, *inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@few_cases
def test_batch_members_are_independent(row):
    model, (fields, scalars) = row.build(), row.inputs(batch=3)
    compiled = run(model, fields, scalars)
    np.testing.assert_allclose(compiled[1:2], run(model, fields[1:2], scalars[1:2]), rtol=1e-4, atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda f, s: model(f[None], s[None])[0]))(fields, scalars)
    np.testing.assert_allclose(compiled, mapped, rtol=1e-4, atol=1e-5)


@every_case
def test_starts_sane_and_the_same_from_the_same_seed(row):
    inputs = row.inputs(batch=4)
    first, again, other = (row.build(seed=seed) for seed in (0, 0, 1))
    for a, b in zip(jax.tree.leaves(nnx.state(first)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a, b)
    if row.still:
        assert not np.any(run(first, *inputs))
        first, other = shaken(first), shaken(other, seed=4)
    assert not np.allclose(run(first, *inputs), run(other, *inputs))
    assert 1e-3 < run(first, *inputs).std() < 10


@every_case
def test_saved_and_loaded_is_the_same(row, tmp_path):
    model, inputs = shaken(row.build()), row.inputs()
    saving.save_model(model, row.config(), row.signature(), tmp_path / "model")
    np.testing.assert_array_equal(run(saving.load(tmp_path / "model"), *inputs), run(model, *inputs))


@every_case
def test_a_batch_of_any_size_is_exported(row):
    graph, state = nnx.split(row.build())
    batch = jax.export.symbolic_shape("batch")[0]
    inputs = (jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype) for array in row.inputs())
    program = jax.export.export(jax.jit(lambda *given: nnx.merge(graph, state)(*given)))(*inputs)
    assert program.out_avals[0].shape == (batch, *row.shape, OUTPUTS)


@every_case
def test_bfloat16_stays_near_float32(row):
    """bfloat16 keeps 8 bits: each of the about ten roundings in a row costs 0.4% at most."""
    model, half, inputs = row.build(), row.build(dtype="bfloat16"), row.inputs()
    if row.still:
        model, half = shaken(model), shaken(half)
    wide, narrow = run(model, *inputs), run(half, *inputs)
    assert narrow.dtype == np.float32
    assert np.abs(wide - narrow).max() < row.half * np.abs(wide).max()
    assert not np.array_equal(wide, narrow)


@few_cases
def test_recomputing_blocks_changes_no_gradient(row):
    inputs = row.inputs()

    def gradient(model):
        loss = nnx.jit(nnx.grad(lambda m, f, s: jnp.mean(m(f, s) ** 2)))
        return jax.tree.leaves(loss(shaken(model), *inputs))

    for a, b in zip(gradient(row.build()), gradient(row.build(remat=True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(a).max()))


@few_cases
def test_training_on_a_split_batch_gathers_nothing(row):
    """Data parallelism that gathers activations is none; one all-reduce of the gradient is all that may be sent."""
    graph, params, rest = nnx.split(row.build(), nnx.Param, ...)
    inputs = row.inputs(batch=8)

    @jax.jit
    def step(params, rest, fields, scalars):
        def loss(params):
            return jnp.mean((nnx.merge(graph, params, rest)(fields, scalars) - 1) ** 2)

        return jax.value_and_grad(loss)(params)

    expected = step(params, rest, *inputs)
    layout = Layout(data=4)
    with layout.use():
        split = jax.device_put(inputs, layout.window_sharding())
        state = layout.replicate((params, rest))
        text = step.lower(*state, *split).compile().as_text()
        got = step(*state, *split)
    assert "all-gather" not in text
    assert "all-reduce" in text
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_no_parameter_is_complex():
    for row in ROWS.values():
        leaves = jax.tree.leaves(nnx.state(row.build(), nnx.Param))
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert jax.tree.leaves(nnx.state(ROWS["fno"].build(), ComplexParam))


@every_model
def test_configs_are_hashable_and_replaceable(row):
    """Also those whose tuples were given as lists."""
    config = row.config()
    lists = {name: list(value) for name, value in vars(config).items() if isinstance(value, tuple)}
    assert hash(config) == hash(dataclasses.replace(config)) == hash(dataclasses.replace(config, **lists))


@few_models
def test_what_is_evaluated_is_what_is_differentiated(row):
    """Evaluation may run equal blocks in a loop where differentiation does not: both must be one function."""
    model, (fields, scalars) = shaken(row.build(**row.deep)), row.inputs()
    value = run(model, fields, scalars)
    weights = np.random.default_rng(1).standard_normal(value.shape).astype(np.float32)

    @nnx.jit
    def derive(model, fields, scalars):
        differentiated, pullback = jax.vjp(lambda fields: model(fields, scalars), fields)
        return differentiated, pullback(weights)[0]

    differentiated, gradient = derive(model, fields, scalars)
    np.testing.assert_allclose(value, differentiated, rtol=1e-4, atol=1e-5)
    direction, step = np.random.default_rng(2).standard_normal(fields.shape).astype(np.float32), 1e-2
    ahead, behind = (run(model, fields + sign * step * direction, scalars) for sign in (1, -1))
    secant = np.sum(weights * (ahead - behind)) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), secant, rtol=0.02)


@few_cases
def test_tangents_and_second_derivatives(row):
    """What tangent-linear models and Newton's methods need, by parameters, fields and scalars together: the tangent is
    the adjoint of the gradient, and the Hessian is symmetric and the same forward and backward over backward."""
    fields, scalars = row.inputs()
    weights = np.random.default_rng(1).standard_normal((*fields.shape[:-1], OUTPUTS)).astype(np.float32)
    graph, params, rest = nnx.split(shaken(row.build()), nnx.Param, ...)
    at = (params, fields, scalars)
    first, second = (_random_like(at, seed) for seed in (2, 3))

    def predict(at):
        return nnx.merge(graph, at[0], rest)(*at[1:])

    def slope(at):
        return jax.grad(lambda at: jnp.sum(weights * predict(at) ** 2))(at)

    @jax.jit
    def derive(at, first, second):
        tangent = jax.jvp(predict, (at,), (first,))[1]
        pulled = jax.vjp(predict, at)[1](jnp.asarray(weights))[0]
        forward = [jax.jvp(slope, (at,), (direction,))[1] for direction in (first, second)]
        backward = jax.grad(lambda at: _dot(slope(at), first))(at)
        lengths = jnp.sqrt(_dot(forward[0], forward[0]) * _dot(second, second))
        return (
            (jnp.vdot(weights, tangent), _dot(pulled, first)),
            (_dot(forward[0], second), _dot(forward[1], first), _dot(backward, second)),
            jnp.linalg.norm(weights) * jnp.linalg.norm(tangent), lengths,
        )  # fmt: skip

    paired, curvatures, of_tangent, of_curvature = derive(at, first, second)
    assert of_tangent > 0
    assert of_curvature > 0
    np.testing.assert_allclose(paired[1], paired[0], atol=1e-5 * float(of_tangent))
    np.testing.assert_allclose(curvatures[1:], curvatures[0], atol=1e-4 * float(of_curvature))


def _random_like(tree, seed: int):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(leaf.dtype), tree)


def _dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@over(ROWS | VARIANTS)
def test_decay_of_matrices_spares_vectors(row):
    """Those of equal blocks too, which have a leading axis, one more for every `Stack` that they are in."""
    model, axes = nnx.eval_shape(row.build), collections.Counter()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Stack):
            axes.update((*path, "blocks", *inner) for inner, _ in nnx.to_flat_state(nnx.state(module.blocks)))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if leaf.ndim - axes[path] < 2:
            assert not is_matrix(".".join(map(str, path)), leaf), path
