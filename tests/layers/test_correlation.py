"""The convolution's primitive: derivatives of every order, mapped, in loops and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from physml.layers.correlation import Moves, correlate

MOVES = {
    "plain": (Moves(((1, 2), (1, 1)), (1, 1), (1, 1)), (7, 6), (3, 2), 4),
    "strides": (Moves(((1, 0), (2, 1)), (2, 3), (1, 1)), (7, 6), (3, 2), 4),
    "dilated": (Moves(((2, 1), (0, 3)), (1, 1), (2, 2)), (7, 6), (3, 2), 4),
    "groups": (Moves(((1, 2), (1, 1)), (2, 1), (1, 2), 2), (7, 6), (3, 2), 4),
    "every channel alone": (Moves(((1, 2), (1, 1)), (1, 1), (2, 1), 4), (7, 6), (3, 2), 4),
    "products": (Moves(((1, 2),), (1,), (1,), product=True), (9,), (3,), 4),
    "products that wrap": (Moves(((2, 2),), (1,), (2,), product=True, wraps=True), (9,), (3,), 5),
    "products in strides": (Moves(((1, 2),), (3,), (2,), product=True, wraps=True), (9,), (3,), 5),
}
each = pytest.mark.parametrize("name", MOVES)


def drawn(name, *lead, seed=0):
    """Moves, a field and a kernel, with `lead` axes before both."""
    moves, space, taps, outputs = MOVES[name]
    keys = jax.random.split(jax.random.key(seed))
    field = jax.random.normal(keys[0], (*lead, 2, *space, 4))
    return moves, field, jax.random.normal(keys[1], (*lead, *taps, 4 // moves.groups, outputs))


def xla(moves):
    """The same with the operations that jax differentiates itself."""

    def convolution(field, kernel):
        padding = moves.padding
        if moves.wraps:
            field, padding = jnp.pad(field, [(0, 0), *padding, (0, 0)], mode="wrap"), [(0, 0)]
        space = "DHW"[3 - len(padding) :]
        return jax.lax.conv_general_dilated(
            field, kernel, moves.stride, padding, rhs_dilation=moves.dilation, feature_group_count=moves.groups,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        )  # fmt: skip

    return convolution


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max(initial=0)))


def both(moves, compute, *operands):
    """What `compute` makes of the convolution here and of XLA's."""
    ours, theirs = (jax.jit(lambda *o: compute(f, *o)) for f in (lambda x, w: correlate(x, w, moves), xla(moves)))  # noqa: B023
    assert_close(ours(*operands), theirs(*operands))


def curved(convolution):
    """A loss whose derivatives do not vanish."""
    return lambda field, kernel: jnp.sum(jnp.sin(convolution(field, kernel)) ** 3)


@each
def test_tangents(name):
    moves, *pair = drawn(name)
    _, *tangents = drawn(name, seed=1)
    both(moves, lambda f, x, w, dx, dw: jax.jvp(f, (x, w), (dx, dw)), *pair, *tangents)


@each
def test_second_derivatives_forward_over_backward_and_backward_over_backward(name):
    moves, *pair = drawn(name)
    _, *tangents = drawn(name, seed=1)

    def products_of_the_hessian(f, x, w, dx, dw):
        slope = jax.grad(curved(f), (0, 1))
        forward = jax.jvp(slope, (x, w), (dx, dw))[1]
        along = lambda x, w: sum(jnp.vdot(a, b) for a, b in zip(slope(x, w), (dx, dw), strict=True))  # noqa: E731
        return forward, jax.grad(along, (0, 1))(x, w)

    both(moves, products_of_the_hessian, *pair, *tangents)


@each
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_members_of_gradients_and_tangents(name, axes):
    """Mapped once and twice."""
    moves, *pair = drawn(name, 3)
    pair = [array if axis == 0 else array[0] for array, axis in zip(pair, axes, strict=True)]

    def mapped(f, x, w):
        graded = jax.grad(curved(f), (0, 1))
        tangent = lambda x, w: jax.jvp(f, (x, w), (x, w))[1]  # noqa: E731
        twice = jax.vmap(lambda scale: jax.vmap(lambda x, w: graded(scale * x, w), axes)(x, w))
        return jax.vmap(graded, axes)(x, w), jax.vmap(tangent, axes)(x, w), twice(jnp.asarray([1.0, 2.0]))

    both(moves, mapped, *pair)


@pytest.mark.parametrize("name", ["plain", "products that wrap"])
def test_last_axis_of_members(name):
    moves, x, w = drawn(name, 3)
    back = jnp.moveaxis(w, 0, -1)
    found = jax.vmap(lambda x, w: correlate(x, w, moves), (0, -1), -1)(x, back)
    assert_close(found, jnp.stack([xla(moves)(*pair) for pair in zip(x, w, strict=True)], -1))


@pytest.mark.parametrize("name", ["plain", "every channel alone", "products that wrap"])
@pytest.mark.parametrize("split", [(True, False), (False, True), (True, True)], ids=str)
def test_in_a_shard_map_that_tracks_what_varies(name, split):
    """Sums of gradients over devices are jax's to add, as for its own operations."""
    moves, *pair = drawn(name, 2)
    mesh = Mesh(np.asarray(jax.devices()[:2]), "device")
    pair = [array if own else array[:1] for array, own in zip(pair, split, strict=True)]
    places = tuple(PartitionSpec("device") if own else PartitionSpec() for own in split)

    def over_devices(f, x, w):
        one = lambda x, w: jax.lax.psum(curved(f)(x[0], w[0]), "device")  # noqa: E731
        return jax.grad(jax.shard_map(one, mesh=mesh, in_specs=places, out_specs=PartitionSpec()), (0, 1))(x, w)

    both(moves, over_devices, *pair)


@each
def test_half_precision_and_no_samples(name):
    moves, x, w = drawn(name)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    value, pull = jax.vjp(lambda x, w: correlate(x, w, moves), x, w)
    assert {array.dtype for array in (value, *pull(value))} == {jnp.dtype(jnp.bfloat16)}
    value, pull = jax.vjp(lambda x, w: correlate(x, w, moves), x[:0], w)
    assert value.shape[0] == 0
    assert not pull(value)[1].any()


@each
def test_without_jit_and_recomputed(name):
    """`jax.disable_jit`, for those who debug, and `jax.checkpoint`."""
    moves, *pair = drawn(name)
    expected = jax.jit(jax.grad(curved(xla(moves)), (0, 1)))(*pair)
    with jax.disable_jit():
        assert_close(jax.grad(curved(lambda x, w: correlate(x, w, moves)), (0, 1))(*pair), expected)
    recomputed = jax.checkpoint(lambda x, w: correlate(x, w, moves))
    assert_close(jax.jit(jax.grad(curved(recomputed), (0, 1)))(*pair), expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@each
def test_accelerators_get_their_own_convolutions(name, platform):
    """Value, gradients and tangents lowered for them: convolutions alone, mapped over members too."""
    moves, x, w = drawn(name, 3)

    def compute(x, w):
        f = lambda x, w: correlate(x, w, moves)  # noqa: E731
        return jax.vmap(jax.grad(curved(f), (0, 1)))(x, w), jax.vmap(lambda x, w: jax.jvp(f, (x, w), (x, w)))(x, w)

    text = jax.export.export(jax.jit(compute), platforms=[platform])(x, w).mlir_module()
    assert text.count("stablehlo.convolution") >= 4
    assert "stablehlo.dot_general" not in text
