"""Quadratic invariants: exact factors, what else stays, and thousands of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from physml.constraints import DivergenceFree, MassFixer, QuadraticInvariant
from physml.constraints.text import from_text
from physml.errors import ConfigError, SpecError
from physml.fields import Axis, Channel, Grid, Spec, Window

SQUARE = Grid((Axis.uniform("y", 16, 2 * np.pi), Axis.uniform("x", 16, 2 * np.pi)))
SPHERE = Grid(
    (
        Axis("latitude", tuple(np.linspace(-80, 80, 9)), tuple(np.cos(np.deg2rad(np.linspace(-80, 80, 9))))),
        Axis.uniform("longitude", 12, 360.0),
    )
)
NAMES = ("h", "u", "v")


def around(grid=SQUARE, **fields):
    spec = Spec(grid, tuple(map(Channel, NAMES)), static=(Channel("depth"),))
    depth = 1 + np.random.default_rng(9).random((2, *grid.shape, 1)).astype(np.float32)
    return Window.of(np.zeros((2, 2, *grid.shape, 3), np.float32), spec, static=depth, **fields).context(0, 1)


def noise(grid=SQUARE, seed=0):
    h, u, v = np.random.default_rng(seed).normal(size=(3, 2, *grid.shape))
    return np.stack([3 + 0.5 * h, u + 0.3, v], -1).astype(np.float32)


def energy(frame, grid, weights=1.0, channels=(1, 2)):
    values = np.asarray(frame, float)[..., list(channels)]
    return (grid.weights()[..., None].astype(float) * weights * values**2).sum((1, 2, 3))


def test_energy_is_restored_by_one_factor():
    frame, previous = noise(SPHERE), noise(SPHERE, 1)
    law = QuadraticInvariant(("u", "v")).build(around(SPHERE).spec)
    fixed = law.project(frame, previous, around(SPHERE))
    factor = np.sqrt(energy(previous, SPHERE) / energy(frame, SPHERE)).reshape(2, 1, 1, 1)
    assert_allclose(fixed[..., 1:], factor * frame[..., 1:], rtol=1e-6)
    assert_array_equal(fixed[..., 0], frame[..., 0])
    assert_allclose(energy(fixed, SPHERE), energy(previous, SPHERE), rtol=1e-7)  # sums lose nothing to rounding


@pytest.mark.parametrize("density", ["depth", "h"])
def test_kinetic_energy_and_momentum_hold_together(density):
    context, frame, previous = around(SPHERE), noise(SPHERE), noise(SPHERE, 1)
    law = QuadraticInvariant(("u", "v"), density=density, keep_mean=True).build(context.spec)
    fixed = law.project(frame, previous, context)
    after, before = (
        (np.asarray(context.static, float),) * 2
        if density == "depth"
        else (
            frame[..., :1].astype(float),
            previous[..., :1].astype(float),
        )
    )
    assert_allclose(energy(fixed, SPHERE, after), energy(previous, SPHERE, before), rtol=3e-7)
    momentum = [
        (SPHERE.weights()[..., None] * after * np.asarray(f, float)[..., 1:]).sum((1, 2)) for f in (fixed, frame)
    ]
    assert_allclose(momentum[0], momentum[1], atol=1e-4)  # of some 300
    assert np.abs(np.asarray(fixed) - frame).max() > 1e-3


def test_a_decaying_flow_may_lose_but_not_gain():
    context, frame = around(), noise()
    law = QuadraticInvariant(("u", "v"), at_most=True).build(context.spec)
    assert_array_equal(law.project(0.9 * frame, frame, context), 0.9 * frame)
    assert float(law.violation(0.9 * frame, frame, context).max()) == 0
    assert_allclose(energy(law.project(1.1 * frame, frame, context), SQUARE), energy(frame, SQUARE), rtol=1e-7)


def spectral_vorticity(frame):
    k = 1j * np.fft.fftfreq(16, 1 / 16)
    k[8] = 0
    u, v = (np.fft.fft2(np.asarray(frame, float)[..., i], axes=(1, 2)) for i in (1, 2))
    return np.fft.ifft2(k * v - k[:, None] * u).real


def test_enstrophy_of_a_velocity_by_its_curl_changes_small_scales_most():
    x = np.asarray(SQUARE.axes[1].centers)

    def shear(amplitude):
        v = np.broadcast_to(np.sin(x) + amplitude * np.sin(5 * x), (2, 16, 16))
        return np.stack([np.ones_like(v), 0.7 + 0 * v, v], -1).astype(np.float32)

    context, previous = around(), shear(0.2)
    law = QuadraticInvariant(("u", "v"), "enstrophy").build(context.spec)
    fixed = np.asarray(law.project(shear(0.1), previous, context))
    enstrophy = [np.square(spectral_vorticity(frame)).mean((1, 2)) for frame in (fixed, previous)]
    assert_allclose(enstrophy[1], (1 + 25 * 0.04) / 2, rtol=1e-6)
    assert_allclose(enstrophy[0], enstrophy[1], rtol=1e-6)
    waves = 2 * np.abs(np.fft.fft(fixed[0, 0, :, 2]))[[1, 5]] / 16
    # Along the gradient, waves grow by 1 + t k^2 with (1 + t)^2 + (25 / 100) (1 + 25 t)^2 = 2; a factor would be 1.26.
    t = (-14.5 + np.sqrt(14.5**2 + 4 * 157.25 * 0.75)) / (2 * 157.25)
    assert_allclose(waves, [1 + t, 0.1 * (1 + 25 * t)], rtol=1e-5)
    assert_allclose(fixed[..., 1], 0.7, atol=1e-6)
    solenoidal = DivergenceFree().build(context.spec)
    assert float(solenoidal.violation(fixed, fixed, context).max()) < 1e-6


def test_enstrophy_of_a_vorticity_is_its_square():
    context, frame, previous = around(), noise(), noise(seed=1)
    law = QuadraticInvariant("h", "enstrophy").build(context.spec)
    fixed = law.project(frame, previous, context)
    assert_allclose(energy(fixed, SQUARE, channels=(0,)), energy(previous, SQUARE, channels=(0,)), rtol=1e-7)


def test_what_cannot_be_had_is_left_finite():
    context, frame = around(), noise()
    nothing = np.zeros_like(frame)
    law = QuadraticInvariant(("u", "v")).build(context.spec)
    assert_array_equal(law.project(nothing, frame, context), nothing)  # no direction to gain energy in
    assert_allclose(law.violation(nothing, frame, context), -1, rtol=1e-6)
    assert_array_equal(np.asarray(law.project(frame, nothing, context))[..., 1:], 0)
    for start in (nothing, frame):
        slope = jax.grad(lambda f, start=start: jnp.sum(law.project(f, start, context) ** 2))(nothing)
        assert bool(jnp.isfinite(slope).all())
    # The mean alone has more energy than there may be: the field becomes as uniform as it can.
    mean = QuadraticInvariant("h", keep_mean=True).build(context.spec)
    fixed = np.asarray(mean.project(frame, frame / 2, context))
    assert_allclose(
        fixed[..., 0], np.broadcast_to(frame[..., 0].mean((1, 2), keepdims=True), frame.shape[:-1]), rtol=1e-5
    )
    curl = QuadraticInvariant(("u", "v"), "enstrophy").build(context.spec)
    assert bool(jnp.isfinite(curl.project(nothing, frame, context)).all())


@pytest.mark.parametrize(
    "laws",
    [
        (QuadraticInvariant(("u", "v")),),
        (MassFixer("h"), QuadraticInvariant("h", keep_mean=True)),
        (DivergenceFree(), QuadraticInvariant(("u", "v"), "enstrophy")),
    ],
    ids=["energy", "mass and energy", "enstrophy"],
)
def test_a_thousand_steps_do_not_drift(laws):
    context, start = around(), noise()
    laws = [law.build(context.spec) for law in laws]
    start = laws[0].project(start, start, context)

    def step(frame, key):
        moved = frame * (1 - 1e-3) + 1e-2 * jax.random.normal(key, frame.shape)
        for law in laws:
            moved = law.project(moved, frame, context)
        return moved, None

    frame = jax.jit(lambda f: jax.lax.scan(step, f, jax.random.split(jax.random.key(0), 1000))[0])(start)
    if laws[-1].kind == "enstrophy":
        sums = [np.square(spectral_vorticity(f)).sum((1, 2)) for f in (frame, start)]
    else:
        places = [NAMES.index(name) for name in laws[-1].channels]
        sums = [energy(f, SQUARE, channels=places) for f in (frame, start)]
    assert_allclose(sums[0], sums[1], rtol=1e-6)
    if isinstance(laws[0], MassFixer):
        assert_allclose(*[np.asarray(f, float)[..., 0].mean((1, 2)) for f in (frame, start)], rtol=1e-6)
    assert np.abs(np.asarray(frame - start)).max() > 0.3


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"channels": "w"}, SQUARE, "no channel 'w'"),
        ({"channels": "u", "density": "rho"}, SQUARE, "no field 'rho'"),
        ({"channels": "u", "density": "u"}, SQUARE, "its own density"),
        ({"channels": ("u", "v"), "kind": "enstrophy"}, SPHERE, "lacks"),
        ({"channels": ("u", "v"), "kind": "enstrophy", "axes": ("longitude", "latitude")}, SPHERE, "sphere"),
    ],
)
def test_data_that_do_not_fit(options, grid, message):
    with pytest.raises(SpecError, match=message):
        QuadraticInvariant(**options).build(around(grid).spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, "is empty"),
        ({"channels": "u", "kind": "helicity"}, "energy"),
        ({"channels": "u", "kind": "enstrophy", "density": "h"}, "no density"),
        ({"channels": ("a", "b", "c", "d"), "kind": "enstrophy"}, "1 or 2 or 3"),
        ({"channels": ("u", "v"), "axes": ("x", "y")}, "enstrophy"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ConfigError, match=message):
        QuadraticInvariant(**options)


def test_text():
    assert from_text("quadratic:u,v:at_most=true") == QuadraticInvariant(("u", "v"), at_most=True)
