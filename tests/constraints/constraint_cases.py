"""Instances of every constraint, and the frames they are tried on."""

import dataclasses
from typing import Any

import numpy as np

from physml.constraints import (
    CONSTRAINTS,
    Boundary,
    DivergenceFree,
    Linear,
    MassFixer,
    Positivity,
    QuadraticInvariant,
)
from physml.fields import Axis, Channel, Context, Grid, Spec, Window


@dataclasses.dataclass(frozen=True)
class Case:
    """A constraint on a grid; `fields` are further arguments of `context`."""

    constraint: Any
    grid: str = "periodic"
    fields: tuple[tuple[str, Any], ...] = ()


GRIDS = {
    "line": Grid((Axis.cells("x", 37),)),
    "periodic": Grid((Axis.uniform("x", 12), Axis.uniform("y", 16))),
    "walls": Grid((Axis.cells("x", 12), Axis.cells("y", 10))),
    "sphere": Grid(
        (
            Axis("latitude", tuple(np.linspace(-84, 84, 13)), tuple(np.cos(np.deg2rad(np.linspace(-84, 84, 13))))),
            Axis.uniform("longitude", 18, 360.0),
        )
    ),
    "columns": Grid((Axis("level", (1.0, 2.0, 4.0), (0.5, 1.0, 1.5)), Axis.cells("x", 7), Axis.uniform("y", 6))),
}
NAMES = ("rho", "q", "u", "v")


def context(grid: Grid, *, batch: int = 2, mask: bool = False, seed: int = 0, **fields) -> Context:
    """The context of a step of 0.5 with forcing `source`, `air`, static `depth` and the parameter `mean`."""
    random = np.random.default_rng(seed)
    spec = Spec(
        grid, tuple(map(Channel, NAMES)), (Channel("source"), Channel("air")), (Channel("depth"),), (Channel("mean"),),
        time_step=0.5,
    )  # fmt: skip
    shape = (batch, 3, *grid.shape)
    given = {
        "forcing": np.stack([random.normal(size=shape), 1 + random.random(shape)], -1).astype(np.float32),
        "static": (1 + random.random((batch, *grid.shape, 1))).astype(np.float32),
        "parameters": np.full((batch, 1), 0.7, np.float32),
    }
    if mask:
        exists = (random.random((batch, *grid.shape, 1)) > 0.3).astype(np.float32)
        given["mask"] = np.broadcast_to(exists, (batch, *grid.shape, len(NAMES))).copy()
    window = Window.of(np.zeros((batch, 3, *grid.shape, len(NAMES)), np.float32), spec, **{**given, **fields})
    return window.context(1, 1)


def frames(grid: Grid, *, batch: int = 2, mask=None, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A frame and the previous one: rho and q mostly positive, u and v of both signs, means far from each other."""
    random = np.random.default_rng(seed)
    shape = (batch, *grid.shape, len(NAMES))
    offset = np.array([3.0, 0.8, 0.2, -0.4])
    both = [(random.normal(size=shape) + offset * scale).astype(np.float32) for scale in (1.1, 1.0)]
    return tuple(field if mask is None else field * mask for field in both)


def rows(count: int, length: int) -> tuple[tuple[float, ...], ...]:
    """Independent rows of both signs."""
    return tuple(map(tuple, np.random.default_rng(5).normal(size=(count, length)).round(3)))


# Every seventh cell is an obstacle.
DEPTH = (("static", np.where(np.arange(120).reshape(1, 12, 10, 1) % 7 == 3, 0, 1).repeat(2, 0).astype(np.float32)),)

CASES = {
    "linear: cells": Case(Linear(("rho", "u")), "sphere"),
    "linear: trapezoid": Case(Linear("v", "trapezoid", 0.3), "walls"),
    "linear: right rule": Case(Linear(("q", "v"), "right", ("mean", -0.2), "depth"), "columns"),
    "linear: one row": Case(Linear("u", rows(1, 37)), "line"),
    "linear: three rows": Case(Linear(("rho", "u"), rows(3, 74), ("mean", 0.5, -1)), "line"),
    "linear: rows by variance": Case(Linear("v", rows(4, 37), variance=tuple(np.linspace(0, 2, 37))), "line"),
    "mass: additive": Case(MassFixer(("rho", "u"))),
    "mass: one name": Case(MassFixer("rho"), "line"),
    "mass: multiplicative": Case(MassFixer(("rho", "v"), "multiplicative"), "sphere"),
    "mass: gradient": Case(MassFixer(("rho", "u"), "gradient"), "walls"),
    "mass: predicted density": Case(MassFixer("q", density="rho"), "sphere"),
    "mass: air": Case(MassFixer("q", "multiplicative", density="air"), "columns"),
    "mass: depth": Case(MassFixer("q", density="depth"), "walls"),
    "mass: sources": Case(MassFixer(("rho", "q"), sources="source"), "sphere"),
    "mass: own sources": Case(MassFixer(("rho", "q"), sources=("source", "air")), "periodic"),
    "mass: per level": Case(MassFixer(("rho", "q"), separately="level"), "columns"),
    "mass: together": Case(MassFixer(("rho", "q"), "multiplicative", together=True), "periodic"),
    "mass: prescribed": Case(MassFixer("rho", total="mean"), "walls"),
    "mass: positive": Case(MassFixer(("rho", "q"), positive=True), "sphere"),
    "mass: positive in proportion": Case(MassFixer("q", "multiplicative", positive=True), "columns"),
    "positivity": Case(Positivity(("rho", "q")), "sphere"),
    "positivity: floor": Case(Positivity("q", floor=0.25), "walls"),
    "boundary: walls": Case(Boundary(("u", "q"), ("y low", "y high"), ("previous", "source")), "walls"),
    "boundary: obstacle": Case(Boundary(("u", "rho"), "x high", (0.0, 2.0), obstacle="depth"), "walls", DEPTH),
    "divergence_free: series": Case(DivergenceFree()),
    "divergence_free: walls": Case(DivergenceFree(), "walls"),
    "divergence_free: obstacle": Case(DivergenceFree(obstacle="depth", open="x high"), "walls", DEPTH),
    "quadratic: energy": Case(QuadraticInvariant(("u", "v"), at_most=True), "sphere"),
    "quadratic: density": Case(QuadraticInvariant(("u", "v"), density="rho", keep_mean=True), "columns"),
    "quadratic: enstrophy": Case(QuadraticInvariant(("u", "v"), "enstrophy"), "periodic"),
}

assert {type(case.constraint) for case in CASES.values()} == set(CONSTRAINTS.values()), "a constraint has no case"
