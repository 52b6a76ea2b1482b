"""Exponential time differencing, fourth order, for spectra with any linear symbol, real or complex."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Complex, Inexact

CONTOUR = 32  # points on a circle of radius one around each symbol


def build_step(
    symbol: Inexact[Array, "*modes"],
    nonlinear: Callable[[Complex[Array, "*modes"]], Complex[Array, "*modes"]],
    time_step: float | Array,
) -> Callable[[Complex[Array, "*modes"]], Complex[Array, "*modes"]]:
    """One step of v_t = symbol v + nonlinear(v) by ETDRK4 (Cox & Matthews 2002, doi:10.1006/jcph.2002.6995, eq. 26-29).

    The coefficients, differences of nearly equal numbers where the symbol is small, are means over a circle (Kassam &
    Trefethen 2005, doi:10.1137/S1064827502410633). The means are kept complex: their real part alone, right for the
    real symbols of diffusion, is first order in time for the imaginary ones of dispersion and advection.
    """
    z = jnp.asarray(symbol * time_step)
    turn = jnp.exp(2j * jnp.pi * (jnp.arange(CONTOUR) + 0.5) / CONTOUR).astype(jnp.result_type(z.dtype, jnp.complex64))
    near = z[..., None] + turn
    growth, half = jnp.exp(near), jnp.exp(near / 2)

    def mean(values):
        return time_step * values.mean(-1)

    middle = mean((half - 1) / near)
    first = mean((-4 - near + growth * (4 - 3 * near + near**2)) / near**3)
    inner = mean((2 + near + growth * (near - 2)) / near**3)
    last = mean((-4 - 3 * near - near**2 + growth * (4 - near)) / near**3)
    whole, halfway = jnp.exp(z), jnp.exp(z / 2)

    def step(v):
        at_v = nonlinear(v)
        a = halfway * v + middle * at_v
        at_a = nonlinear(a)
        b = halfway * v + middle * at_a
        at_b = nonlinear(b)
        c = halfway * a + middle * (2 * at_b - at_v)
        return whole * v + first * at_v + 2 * inner * (at_a + at_b) + last * nonlinear(c)

    return step
