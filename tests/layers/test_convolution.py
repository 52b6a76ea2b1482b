"""Convolutions: what lies beyond the edge, and gradients that are right however they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from physml.errors import ConfigError
from physml.layers import convolution, products


@pytest.mark.parametrize(("boundary", "mode"), [("periodic", "wrap"), ("zero", "constant"), ("replicate", "edge")])
def test_the_field_beyond_the_edge(boundary, mode):
    """A mean over three points sees the padding that numpy makes."""
    layer = convolution.Convolution(1, 1, 3, [boundary], rngs=nnx.Rngs(0))
    layer.weight[...] = jnp.ones((3, 1, 1)) / 3
    layer.bias[...] = jnp.zeros(1)
    x = np.arange(5.0, dtype=np.float32)
    padded = np.pad(x, 1, mode=mode)
    expected = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    np.testing.assert_allclose(layer(jnp.asarray(x)[None, :, None])[0, :, 0], expected, rtol=1e-6)


def test_periodic_convolution_commutes_with_shifts():
    layer = convolution.Convolution(2, 3, 3, ["periodic", "periodic"], dilation=2, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (1, 8, 6, 2))
    shifted = jnp.roll(layer(x), (3, -2), (1, 2))
    np.testing.assert_allclose(layer(jnp.roll(x, (3, -2), (1, 2))), shifted, atol=1e-6)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("dilation", "kernel", "padding"), [(1, 3, (1, 1)), (2, 3, (2, 2)), (1, 5, (0, 0)), (2, 3, (1, 3))]
)
def test_convolve_has_the_gradients_of_the_plain_convolution(ndim, dilation, kernel, padding):
    shape = (9, 7, 8)[:ndim]
    keys = jax.random.split(jax.random.key(ndim))
    x = jax.random.normal(keys[0], (2, *shape, 3))
    weight = jax.random.normal(keys[1], (*(kernel,) * ndim, 3, 4))
    pads = (padding,) * ndim
    space = "DHW"[3 - ndim :]

    def plain(x, weight):
        return jax.lax.conv_general_dilated(
            x, weight, (1,) * ndim, pads, rhs_dilation=(dilation,) * ndim,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        )  # fmt: skip

    expected, *theirs = pulled(plain, x, weight)
    value, *ours = pulled(lambda x, w: convolution.convolve(x, w, pads, dilation), x, weight)
    np.testing.assert_array_equal(value, expected)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("boundary", ["periodic", "zero", "replicate"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3},
        {"kernel": 5, "dilation": 2},
        {"kernel": 3, "bias": False},
        {"kernel": 4, "padding": 1, "stride": 2},
        {"kernel": 3, "padding": 0},
        {"kernel": 3, "padding": 3},
        {"kernel": 2, "padding": 1, "stride": 3},
        {"kernel": 7, "dilation": 4},  # 12 cells beyond an axis of 10
        {"kernel": 7, "dilation": 2, "padding": 0},  # more than the axis has: no place
    ],
    ids=str,
)
def test_products_are_the_plain_convolution(boundary, options):
    """Narrow layers along one axis; numpy pads, and the gradients are those of the plain convolution."""
    layer = convolution.Convolution(3, 5, boundaries=[boundary], rngs=nnx.Rngs(1), **options)
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, 10, 3))
    assert products.suits(x, layer.weight[...])
    (pads,) = layer.padding
    mode = convolution.BOUNDARIES[boundary]

    def plain(params, x):
        layer = nnx.merge(graph, params)
        y = jax.lax.conv_general_dilated(
            jnp.pad(x, [(0, 0), pads, (0, 0)], mode=mode), layer.weight[...], layer.stride, [(0, 0)],
            rhs_dilation=(layer.dilation,), dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        return y if layer.bias is None else y + layer.bias[...]

    ours = pulled(lambda params, x: nnx.merge(graph, params)(x), params, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(pulled(plain, params, x)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max(initial=0)))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_members_of_products_equal_members_one_by_one(axes):
    graph, params = nnx.split(convolution.Convolution(2, 3, 3, ["periodic"], rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((3, 2, 9, 2)).astype(np.float32)
    x = x if axes[1] == 0 else x[0]
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, p + 1]), params) if axes[0] == 0 else params
    graded = jax.value_and_grad(lambda params, x: jnp.sin(nnx.merge(graph, params)(x)).sum(), (0, 1))
    together = jax.jit(jax.vmap(graded, axes))(params, x)
    for i in range(3):
        own = [jax.tree.map(lambda a: a[i], part) if axis == 0 else part for part, axis in zip((params, x), axes)]  # noqa: B023
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(graded(*own)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def test_one_program_of_a_product_for_batches_of_any_size():
    """As exported models have it; and batches of no sample, with their gradients."""
    graph, params = nnx.split(convolution.Convolution(2, 3, 3, ["periodic"], rngs=nnx.Rngs(0)))

    def layer(params, x):
        return nnx.merge(graph, params)(x)

    shape = jax.export.symbolic_shape("batch, 9, 2")
    program = jax.export.export(jax.jit(layer))(params, jax.ShapeDtypeStruct(shape, jnp.float32))
    for batch in (1, 4):
        x = jax.random.normal(jax.random.key(batch), (batch, 9, 2))
        np.testing.assert_array_equal(program.call(params, x), jax.jit(layer)(params, x))
    value, *gradients = pulled(layer, params, jnp.zeros((0, 9, 2)))
    assert value.shape == (0, 9, 3)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_are_for_cpus_alone(platform):
    graph, params = nnx.split(convolution.Convolution(2, 3, 3, ["periodic"], rngs=nnx.Rngs(0)))
    graded = jax.jit(jax.grad(lambda params, x: jnp.sin(nnx.merge(graph, params)(x)).sum(), (0, 1)))
    text = jax.export.export(graded, platforms=[platform])(params, jnp.zeros((2, 9, 2))).mlir_module()
    assert text.count("stablehlo.convolution") == 3
    assert "stablehlo.dot_general" not in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="products are for CPUs")
@pytest.mark.parametrize(
    ("width", "points", "dtype", "product"),
    [
        (20, 32, "float32", True), (24, 32, "float32", True), (34, 32, "float32", True), (32, 32, "float32", False),
        (50, 32, "float32", False), (20, 10_000, "float32", True), (20, 11_000, "float32", False),
        (20, 32, "bfloat16", False),
    ],
)  # fmt: skip
def test_what_is_a_product(width, points, dtype, product):
    """Narrow layers, of moderate batches: whether their gradients hold a convolution."""
    graph, params = nnx.split(convolution.Convolution(width, width, 3, ["periodic"], rngs=nnx.Rngs(0)))

    def loss(params, x):
        layer = nnx.merge(graph, params)
        return jnp.square(layer(jax.nn.relu(layer(jax.nn.relu(layer(x)))))).sum()

    x = jnp.zeros((1, points, width), dtype)
    program = jax.jit(jax.grad(loss)).lower(params, x).compile().as_text()
    assert (" convolution(" not in program) == product


def pulled(function, *operands):
    """The value, and what a random cotangent of it pulls back to each operand."""

    @jax.jit
    def compiled(*operands):
        value, pull = jax.vjp(function, *operands)
        return value, *pull(jax.random.normal(jax.random.key(7), value.shape))

    return compiled(*operands)


def plain(x, weight, padding, dilation, stride, groups):
    """The same convolution, differentiated by JAX."""
    ndim = x.ndim - 2
    space = "DHW"[3 - ndim :]
    return jax.lax.conv_general_dilated(
        x, weight, convolution.per_axis(stride, ndim), padding, rhs_dilation=(dilation,) * ndim,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"), feature_group_count=groups,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "kernel", "padding", "dilation", "stride", "groups"),
    [
        ((9,), (3,), ((1, 1),), 1, 2, 1),
        ((10, 7), (3, 4), ((1, 1), (2, 1)), 1, (2, 3), 1),
        ((8, 9), (2, 3), ((0, 2), (3, 0)), 2, 2, 1),
        ((8, 9), (4, 4), ((0, 0), (0, 0)), 1, 4, 1),
        ((5, 6, 7), (3, 3, 3), ((1, 1),) * 3, 1, 2, 1),
        ((8, 9), (3, 3), ((1, 1),) * 2, 1, 1, 3),
        ((8, 9), (3, 3), ((1, 1),) * 2, 1, 2, 3),
        ((8, 9), (7, 5), ((3, 3), (2, 2)), 1, 1, 6),
        ((9,), (3,), ((2, 2),), 2, 1, 6),
        ((4, 5, 6), (3, 1, 3), ((1, 1), (0, 0), (1, 1)), 1, 1, 6),
        ((8, 9), (1, 1), ((0, 0),) * 2, 1, 1, 1),
    ],
)
def test_strides_and_groups_have_the_values_and_gradients_of_the_plain_convolution(
    shape, kernel, padding, dilation, stride, groups
):
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (2, *shape, 6))
    weight = jax.random.normal(keys[1], (*kernel, 6 // groups, 6))
    options = (padding, dilation, stride, groups)
    theirs = pulled(lambda x, w: plain(x, w, *options), x, weight)
    ours = pulled(lambda x, w: convolution.convolve(x, w, *options), x, weight)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 2, 1), (3, 2, 1), (2, 2, 0), (5, 3, 2), (2, 3, 0)])
@pytest.mark.parametrize("shape", [pytest.param((5,), marks=pytest.mark.slow), (3, 4), (2, 3, 2)], ids=str)
def test_transposed_convolution_is_the_adjoint_of_the_strided_one(shape, kernel, stride, padding):
    ndim = len(shape)
    layer = convolution.TransposedConvolution(3, 2, kernel, stride, padding, ndim, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    fine = tuple((n - 1) * stride + kernel - 2 * padding for n in shape)
    forward = lambda y: plain(y, jnp.swapaxes(layer.weight[...], -1, -2), ((padding, padding),) * ndim, 1, stride, 1)  # noqa: E731
    expected = jax.jit(jax.linear_transpose(forward, jnp.zeros((2, *fine, 2))))(x)[0] + layer.bias[...]
    np.testing.assert_allclose(nnx.jit(layer)(x), expected, atol=1e-5)


def test_gradients_in_a_loop_are_those_outside_of_it():
    layer = convolution.Convolution(3, 3, 3, ["periodic"] * 2, groups=3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))

    def once(state, x):
        return jnp.tanh(nnx.merge(graph, state)(x))

    looped = jax.grad(lambda s: jnp.sum(jax.lax.scan(lambda x, _: (once(s, x), None), x, None, length=3)[0] ** 2))
    unrolled = jax.grad(lambda s: jnp.sum(once(s, once(s, once(s, x))) ** 2))
    for a, b in zip(jax.tree.leaves(jax.jit(looped)(state)), jax.tree.leaves(unrolled(state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 4}, "Use kernel 3 or 5"),
        ({"kernel": (3, 3, 3)}, "3 numbers for 2 axes"),
        ({"groups": 3}, "must divide the 2 inputs"),
        ({"stride": 0}, "must be positive"),
    ],
)
def test_layers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        convolution.Convolution(2, 2, **{"kernel": 3, **options}, boundaries=["zero"] * 2, rngs=nnx.Rngs(0))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("boundary", "mode"),
    [("periodic", "circular"), ("zero", "zeros"), ("replicate", "replicate"), ("reflect", "reflect")],
)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 3}, {"dilation": 2, "padding": 2}], ids=str)
def test_convolution_is_pytorchs(boundary, mode, options):
    import torch

    padding = options.get("padding", 1)
    theirs = torch.nn.Conv2d(3, 6, 3, padding_mode=mode, **{**options, "padding": padding})
    ours = convolution.Convolution(3, 6, 3, [boundary] * 2, **options, rngs=nnx.Rngs(0))
    ours.weight[...] = jnp.asarray(theirs.weight.detach().permute(2, 3, 1, 0).numpy())
    ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    x = torch.randn(2, 3, 7, 10)
    expected = theirs(x).detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours(x.permute(0, 2, 3, 1).numpy()), expected, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_transposed_convolution_is_pytorchs(ndim):
    import torch

    theirs = getattr(torch.nn, f"ConvTranspose{ndim}d")(3, 5, 4, 2, 1)
    ours = convolution.TransposedConvolution(3, 5, 4, 2, 1, ndim, rngs=nnx.Rngs(0))
    # Both start from a uniform law, whose bound the largest of so many numbers nearly reaches.
    np.testing.assert_allclose(jnp.abs(ours.weight[...]).max(), theirs.weight.detach().abs().max(), rtol=0.1)
    ours.weight[...] = jnp.asarray(theirs.weight.detach().permute(*range(2, ndim + 2), 0, 1).numpy())
    ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    x = torch.randn(2, 3, *(4, 5, 6)[:ndim])
    expected = theirs(x).detach().permute(0, *range(2, ndim + 2), 1).numpy()
    np.testing.assert_allclose(ours(x.permute(0, *range(2, ndim + 2), 1).numpy()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "stride", "axes"),
    [(1, 1, (0, 0)), (1, 2, (0, 0)), (2, 1, (0, 0)), (4, 1, (0, 0)), (1, 1, (0, None)), (1, 1, (None, 0))],
)
def test_members_by_vmap_equal_members_one_by_one(groups, stride, axes):
    """Value and gradients, with a kernel, fields or both for each member."""
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 2, 9, 4) if axes[0] == 0 else (2, 9, 4)).astype(np.float32)
    w = random.standard_normal((3, 3, 4 // groups, 4) if axes[1] == 0 else (3, 4 // groups, 4)).astype(np.float32)

    def loss(x, w):
        return jnp.sin(convolution.convolve(x, w, ((1, 1),), 1, stride, groups)).sum()

    graded = jax.value_and_grad(loss, (0, 1))
    together = jax.jit(jax.vmap(graded, axes))(x, w)
    one = jax.jit(graded)
    for i in range(3):
        alone = one(*(a if axis is None else a[i] for a, axis in zip((x, w), axes, strict=True)))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)
