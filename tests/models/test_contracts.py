"""What every architecture promises. A new entry of `MODELS` needs a line in `SMALL` and gets all of these checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.contracts import Model
from physml.fields import Axis, Grid, Signature
from physml.layers.spectral import ComplexParam
from physml.models import MODELS
from physml.parallel.mesh import Layout

SMALL = {
    "classic_fno": {"width": 6, "modes": (3,), "depth": 2, "projection": 8},
    "fno": {"width": 6, "modes": (4,), "depth": 2},
    "resnet": {"width": 6, "depth": 2, "dilations": (1, 2)},
}
VARIANTS = {
    "fno": {
        "fno_tucker": {"factorization": "tucker", "rank": 0.4},
        "fno_preactivation": {"preactivation": True, "norm": "group_norm", "stabilizer": "tanh"},
        "fno_padded": {"domain_padding": (0.2,), "norm": "instance_norm", "lifting_ratio": 0.0},
        "fno_bare": {"skip": "none", "channel_mlp_expansion": 0.0, "positions": False},
    },
    "resnet": {"resnet_norm": {"norm": "group_norm", "positions": True, "boundary": "reflect"}},
}
CASES = [pytest.param(name, {}, id=name) for name in MODELS] + [
    pytest.param(name, options, id=case) for name, cases in VARIANTS.items() for case, options in cases.items()
]
SHAPE, INPUTS, SCALARS, OUTPUTS = (9, 12), 3, 2, 2


def signature(shape=SHAPE):
    axes = tuple(Axis.uniform(name, n, periodic=name != "y") for name, n in zip("xyz", shape))
    return Signature(Grid(axes), INPUTS, SCALARS, OUTPUTS)


def config_of(name, **options):
    return MODELS[name](**{**SMALL[name], **options})


def inputs_of(shape=SHAPE, batch=2, seed=0):
    random = np.random.default_rng(seed)
    fields = random.standard_normal((batch, *shape, INPUTS)).astype(np.float32)
    return fields, random.standard_normal((batch, SCALARS)).astype(np.float32)


def build(name, options, shape=SHAPE, seed=0):
    return config_of(name, **options).build(signature(shape), nnx.Rngs(seed))


def run(model, *inputs):
    return np.asarray(nnx.jit(lambda m, f, s: m(f, s))(model, *inputs))


def test_every_entry_is_small_here():
    assert SMALL.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(11,), (9, 12), (6, 5, 7)], ids=str)
def test_shapes_count_of_parameters_and_other_grids(name, shape):
    model = build(name, {"modes": (2,)} if "fno" in name else {}, shape)
    assert isinstance(model, Model)
    assert run(model, *inputs_of(shape)).shape == (2, *shape, OUTPUTS)
    finer = tuple(2 * n for n in shape)
    assert run(model, *inputs_of(finer, batch=1)).shape == (1, *finer, OUTPUTS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameter_count_is_that_of_the_config(name, options):
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(build(name, options), nnx.Param)))
    assert count == config_of(name, **options).parameters(signature())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradient_reaches_every_parameter_and_input(name, options):
    model, (fields, scalars) = build(name, options), inputs_of()
    weights = np.random.default_rng(1).standard_normal((*fields.shape[:-1], OUTPUTS)).astype(np.float32)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params, fields, scalars):
        def loss(params, fields, scalars):
            return jnp.sum(weights * nnx.merge(graph, params, rest)(fields, scalars) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(params, fields, scalars)

    by_params, by_fields, by_scalars = gradient(params, fields, scalars)
    silent = [path for path, leaf in nnx.to_flat_state(by_params) if not np.any(leaf[...])]
    assert not silent
    assert np.all(np.any(by_fields, axis=(0, 1, 2)))
    assert np.all(np.any(by_scalars, axis=0))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_jit_is_eager_and_batch_members_are_independent(name, options):
    model, (fields, scalars) = build(name, options), inputs_of(batch=3)
    compiled = run(model, fields, scalars)
    np.testing.assert_allclose(compiled, model(fields, scalars), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(compiled[1:2], run(model, fields[1:2], scalars[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_starts_sane_and_the_same_from_the_same_seed(name, options):
    inputs = inputs_of(batch=4)
    first, again, other = (run(build(name, options, seed=seed), *inputs) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert 1e-3 < first.std() < 10


@pytest.mark.parametrize(("name", "options"), CASES)
def test_bfloat16_stays_near_float32(name, options):
    """bfloat16 keeps 8 bits: each of the about ten roundings in a row costs 0.4% at most."""
    model, half = build(name, options), build(name, {**options, "dtype": "bfloat16"})
    inputs = inputs_of()
    wide, narrow = run(model, *inputs), run(half, *inputs)
    assert narrow.dtype == np.float32
    assert np.abs(wide - narrow).max() < 0.04 * np.abs(wide).max()
    assert not np.array_equal(wide, narrow)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_recomputing_blocks_changes_no_gradient(name, options):
    inputs = inputs_of()

    def gradient(model):
        loss = nnx.jit(nnx.grad(lambda m, f, s: jnp.mean(m(f, s) ** 2)))
        return jax.tree.leaves(loss(model, *inputs))

    for a, b in zip(gradient(build(name, options)), gradient(build(name, {**options, "remat": True})), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("classic_fno", {}), ("fno", {"spectral": "fft"}), ("fno", {"spectral": "matmul"}), ("resnet", {})],
    ids=["classic_fno", "fno-fft", "fno-matmul", "resnet"],
)
def test_training_on_a_split_batch_gathers_nothing(name, options):
    """Data parallelism that gathers activations is none; one all-reduce of the gradient is all that may be sent."""
    graph, params, rest = nnx.split(build(name, options), nnx.Param, ...)
    inputs = inputs_of(batch=8)

    @jax.jit
    def step(params, rest, fields, scalars):
        def loss(params):
            return jnp.mean(nnx.merge(graph, params, rest)(fields, scalars) ** 2)

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
    for name in MODELS:
        leaves = jax.tree.leaves(nnx.state(build(name, {}), nnx.Param))
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert jax.tree.leaves(nnx.state(build("fno", {}), ComplexParam))


def test_configs_are_hashable_and_replaceable():
    for name in MODELS:
        config = config_of(name)
        assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_in_a_loop_are_blocks_in_turn(name):
    """Evaluation runs equal blocks in a loop, differentiation does not: both must be one function."""
    model, (fields, scalars) = build(name, {"depth": 4}), inputs_of()
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
