"""Velocities without divergence: exact flows, the divergence that is meant, and what projections leave alone."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from physml.constraints import DivergenceFree
from physml.constraints.text import from_text
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window

ODD = Grid((Axis.uniform("y", 15, 2.0), Axis.uniform("x", 12, 3.0)))
BOX = Grid((Axis.cells("x", 16), Axis.cells("y", 16)))
UNEVEN = Grid((Axis("x", tuple(range(14)), tuple(1 + 0.5 * np.sin(np.arange(14)))), Axis.uniform("y", 9, 9.0)))


def around(grid, velocity=("u", "v"), static=(), static_fields=None, **fields):
    """The context of a step on `grid`."""
    spec = Spec(grid, tuple(map(Channel, (*velocity, "tracer"))), static=tuple(map(Channel, static)))
    if static_fields is not None:
        fields["static"] = np.broadcast_to(static_fields[..., None], (2, *grid.shape, 1))
    return Window.of(np.zeros((2, 2, *grid.shape, len(velocity) + 1), np.float32), spec, **fields).context(0, 1)


def noise(grid, components=2, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1, (2, *grid.shape, components + 1)).astype(np.float32)


def places(grid):
    """Coordinates of the points, by name of the axis."""
    return dict(
        zip([axis.name for axis in grid.axes], np.meshgrid(*[a.centers for a in grid.axes], indexing="ij"), strict=True)
    )


def framed(*fields):
    return np.broadcast_to(np.stack([*fields, np.ones_like(fields[0])], -1), (2, *fields[0].shape, len(fields) + 1))


def cylinder(grid):
    at = places(grid)
    return ((at["x"] - 0.4) ** 2 + (at["y"] - 0.5) ** 2 > 0.2**2).astype(np.float32)


@pytest.mark.parametrize("grid", [ODD, Grid((Axis.uniform("x", 16, 2.0), Axis.uniform("y", 16, 1.0)))])
def test_taylor_green_plus_a_gradient_is_taylor_green(grid):
    """Axes in any order, of any length, with odd and even numbers of points; names say which component is which."""
    at = places(grid)
    kx, ky = (2 * np.pi / axis.length for axis in sorted(grid.axes, key=lambda axis: axis.name))
    flow = [0.7 + ky * np.sin(kx * at["x"]) * np.cos(ky * at["y"]), -kx * np.cos(kx * at["x"]) * np.sin(ky * at["y"])]
    wave = np.cos(3 * kx * at["x"] + ky * at["y"])
    potential = [3 * wave, wave * ky / kx]
    context = around(grid)
    law = DivergenceFree().build(context.spec)
    start = framed(*flow).astype(np.float32)
    mixed = framed(flow[0] + potential[0], flow[1] + potential[1]).astype(np.float32)
    assert_allclose(law.project(mixed, start, context), start, atol=3e-6)  # values up to 10 in float32
    assert_allclose(law.project(start, start, context), start, atol=1e-6 * np.abs(start).max())
    assert float(law.violation(start, start, context).max()) < 1e-6
    assert float(law.violation(mixed, start, context).max()) > 0.1


def test_taylor_green_in_three_dimensions():
    grid = Grid((Axis.uniform("z", 6), Axis.uniform("y", 8), Axis.uniform("x", 9)))
    at = places(grid)
    x, y, z = (2 * np.pi * at[name] for name in "xyz")
    flow = [np.sin(x) * np.cos(y) * np.cos(z), -np.cos(x) * np.sin(y) * np.cos(z), np.zeros_like(x)]
    slope = np.cos(x + 2 * y - z)
    context = around(grid, ("u", "v", "w"))
    law = DivergenceFree(("u", "v", "w")).build(context.spec)
    mixed = framed(*(part + k * slope for part, k in zip(flow, (1, 2, -1), strict=True))).astype(np.float32)
    assert_allclose(law.project(mixed, mixed, context)[..., :3], framed(*flow)[..., :3], atol=2e-6)


@pytest.mark.parametrize("method", ["spectral", "poisson"])
@pytest.mark.parametrize("shape", [(12, 16), (9, 15), (8, 5)])
def test_noise_without_divergence_is_left_alone(method, shape):
    """Nyquist modes included; and a second projection finds nothing."""
    grid = Grid((Axis.uniform("x", shape[0], 2.0), Axis.uniform("y", shape[1], 0.7)))
    context = around(grid)
    law = DivergenceFree(method=method).build(context.spec)
    once = np.asarray(law.project(noise(grid), noise(grid), context))
    assert float(law.violation(once, once, context).max()) <= 1e-6
    assert_allclose(law.project(once, once, context), once, atol=1e-6)
    assert_allclose(once.mean((1, 2)), noise(grid).mean((1, 2)), atol=1e-7)
    assert_allclose(once[..., 2], noise(grid)[..., 2], atol=0)
    assert np.abs(once - noise(grid)).max() > 0.1


def test_the_spectral_divergence_is_that_of_the_fourier_series():
    context = around(ODD)
    law = DivergenceFree().build(context.spec)
    fixed = np.asarray(law.project(noise(ODD), noise(ODD), context), np.float64)
    ky, kx = (2 * np.pi * np.fft.fftfreq(len(axis), axis.spacing) for axis in ODD.axes)
    kx[6] = 0  # the Nyquist mode of 12 points

    def divergence(frame):
        u, v = np.fft.fft2(frame[..., 0], axes=(1, 2)), np.fft.fft2(frame[..., 1], axes=(1, 2))
        return np.fft.ifft2(1j * (kx * u + ky[:, None] * v)).real

    assert np.abs(divergence(noise(ODD).astype(float))).max() > 10
    assert np.abs(divergence(fixed)).max() < 3e-5  # k / 2 of some 10, values of some 3, float32


def net_outflow(velocity, fluid, periodic):
    """By loops over faces, in float64: what leaves each cell of a square box with n cells along each axis."""
    outflow = np.zeros(fluid.shape)
    for axis in (0, 1):
        field, exists, leaves = (np.moveaxis(array, axis, 0) for array in (velocity[..., axis], fluid, outflow))
        count = len(field)
        for here in range(count if periodic[axis] else count - 1):
            there = (here + 1) % count
            flow = np.where(exists[here] * exists[there] > 0, (field[here] + field[there]) / 2, 0.0) * count
            leaves[here] += flow
            leaves[there] -= flow
    return outflow


@pytest.mark.parametrize("periodic", [(False, False), (True, False)])
@pytest.mark.parametrize("obstacle", [False, True])
def test_nothing_leaves_any_cell_nor_enters_walls(periodic, obstacle):
    grid = Grid(tuple(Axis.cells(name, 16, periodic=wraps) for name, wraps in zip("xy", periodic, strict=True)))
    fluid = cylinder(grid) if obstacle else np.ones(grid.shape, np.float32)
    context = around(grid, static=("fluid",), static_fields=fluid)
    law = DivergenceFree(obstacle="fluid" if obstacle else "").build(context.spec)
    frame = noise(grid)
    fixed = np.asarray(law.project(frame, frame, context))
    assert np.abs(net_outflow(frame[0].astype(float), fluid, periodic)).max() > 10
    assert np.abs(net_outflow(fixed[0].astype(float), fluid, periodic)).max() < 1e-6 * 16 * np.abs(frame).max()
    assert_allclose(fixed[:, fluid == 0], frame[:, fluid == 0], atol=0)


def test_a_flow_between_walls_is_left_alone():
    """sin(pi x) cos(pi y) and its partner: free slip at four walls."""
    at = places(BOX)
    x, y = np.pi * at["x"], np.pi * at["y"]
    flow = framed(np.sin(x) * np.cos(y), -np.cos(x) * np.sin(y)).astype(np.float32)
    context = around(BOX)
    law = DivergenceFree().build(context.spec)
    assert_allclose(law.project(flow, flow, context), flow, atol=3e-7)
    # The discrete gradient of cos(2 pi x) cos(pi y) is the continuous one but for the sizes of its components.
    mixed = np.array(flow)
    mixed[..., 0] += np.sin(2 * np.pi / 16) * np.sin(2 * x) * np.cos(y)
    mixed[..., 1] += np.sin(np.pi / 16) * np.cos(2 * x) * np.sin(y)
    assert_allclose(law.project(mixed, flow, context), flow, atol=1e-6)


def test_a_stream_through_open_sides_stays():
    at = places(BOX)
    stream = framed(np.ones_like(at["x"]), np.zeros_like(at["x"])).astype(np.float32)
    context = around(BOX)
    through = DivergenceFree(open=("x low", "x high")).build(context.spec)
    assert_allclose(through.project(stream, stream, context), stream, atol=1e-6)
    closed = DivergenceFree().build(context.spec).project(stream, stream, context)
    assert np.abs(np.asarray(closed)[..., :2].mean((1, 2))).max() < 0.05  # walls let no mean flow through


@pytest.mark.parametrize("law", [DivergenceFree(), DivergenceFree(open="x low")])
def test_projections_are_orthogonal_under_the_cell_sizes(law):
    """(a, P b) = (P a, b), on cells of unequal size: the correction is the smallest that there is."""
    context = around(UNEVEN)
    law, cells = law.build(context.spec), UNEVEN.weights()[..., None].astype(float)
    a, b = noise(UNEVEN, seed=1), noise(UNEVEN, seed=2)
    fixed = [np.asarray(law.project(field, field, context), float)[..., :2] for field in (a, b)]
    a, b = a[..., :2], b[..., :2]
    assert float(law.violation(np.concatenate([fixed[0], b[..., :1]], -1), a, context).max()) <= 1e-6
    first, second = (cells * a * fixed[1]).sum(), (cells * fixed[0] * b).sum()
    assert abs(first - second) < 1e-5 * (cells * a**2).sum()
    assert abs((cells * (a - fixed[0]) * fixed[0]).sum()) < 1e-5 * (cells * a**2).sum()


def test_the_iteration_finds_what_transforms_find():
    """An obstacle field without obstacles makes it iterate; and derivatives run forward as backward."""
    context = around(BOX, static=("fluid",), static_fields=np.ones(BOX.shape, np.float32))
    direct, iterated = (DivergenceFree(obstacle=name).build(context.spec) for name in ("", "fluid"))
    frame, tangent = noise(BOX), noise(BOX, seed=5)
    assert_allclose(direct.project(frame, frame, context), iterated.project(frame, frame, context), atol=3e-6)
    moved = jax.jvp(lambda f: iterated.project(f, frame, context), (frame,), (1e-4 * tangent,))[1]
    assert_allclose(moved, 1e-4 * direct.project(tangent, frame, context), atol=1e-9)  # however small it is


def test_one_sample_spoils_no_other():
    context = around(BOX, static=("fluid",), static_fields=cylinder(BOX))
    law = DivergenceFree(obstacle="fluid").build(context.spec)
    frame = noise(BOX)
    broken = np.array(frame)
    broken[1, 4, 4, 0] = np.nan
    assert_allclose(law.project(broken, frame, context)[0], law.project(frame, frame, context)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"velocity": ("u", "w")}, BOX, "no channel 'w'"),
        ({}, Grid((Axis.uniform("a", 8), Axis.uniform("b", 8))), r"lacks \['x', 'y'\].*`axes`"),
        ({}, Grid((Axis.uniform("x", 4), Axis.uniform("y", 4), Axis.uniform("z", 4))), "only the components"),
        (
            {"axes": ("longitude", "latitude")},
            Grid((Axis.cells("latitude", 8), Axis.uniform("longitude", 8))),
            "sphere",
        ),
        ({"method": "spectral"}, BOX, "needs periodic axes"),
        ({"open": "x low"}, ODD, "is periodic"),
        ({"obstacle": "rock"}, BOX, "no forcing or static field 'rock'"),
        ({}, Grid((Axis("x", (0.0, 1.0, 3.0, 4.0)), Axis.uniform("y", 8))), "unevenly spaced"),
    ],
)
def test_data_that_do_not_fit(options, grid, message):
    with pytest.raises(SpecError, match=message):
        DivergenceFree(**options).build(Spec(grid, (Channel("u"), Channel("v"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "u"}, "2 or 3 different channels"),
        ({"velocity": ("u", "u")}, "different channels"),
        ({"axes": ("x",)}, "an axis of its own"),
        ({"method": "spectral", "obstacle": "rock"}, "neither obstacles nor sides"),
        ({"method": "helmholtz"}, "poisson"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ConfigError, match=message):
        DivergenceFree(**options)


def test_series_know_no_masks():
    context = around(ODD, mask=np.ones((2, *ODD.shape, 3), np.float32))
    with pytest.raises(SpecError, match="no mask"):
        DivergenceFree(method="spectral").build(context.spec).project(noise(ODD), noise(ODD), context)


def test_text():
    assert from_text("divergence_free:u,v:method=poisson") == DivergenceFree(("u", "v"), "poisson")
    assert from_text("divergence_free") == DivergenceFree()
