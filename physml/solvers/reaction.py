"""Patterns of two substances that react and diffuse: the Gray-Scott model in a periodic square.

Space is spectral and time is ETDRK4, both from exponax, as in `periodic`. States are `(y, x, 2)`, nondimensional.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import exponax
import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.fields import ArrayLike, Channel
from physml.solvers import fourier
from physml.solvers.fourier import Spectral
from physml.solvers.solver import Range, Step, adopt, require

# Feed and kill rates of the Well (Ohana et al. 2024, arXiv:2412.00568), named after what grows with them.
PATTERNS = {
    "bubbles": {"feed_rate": 0.098, "kill_rate": 0.057},
    "gliders": {"feed_rate": 0.014, "kill_rate": 0.054},
    "maze": {"feed_rate": 0.029, "kill_rate": 0.057},
    "spirals": {"feed_rate": 0.018, "kill_rate": 0.051},
    "spots": {"feed_rate": 0.03, "kill_rate": 0.062},
    "worms": {"feed_rate": 0.058, "kill_rate": 0.065},
}
RATES = tuple((rates["feed_rate"], rates["kill_rate"]) for rates in PATTERNS.values())
SPAN = {name: (min(values), max(values)) for name, values in zip(("feed_rate", "kill_rate"), zip(*RATES))}


@dataclass(frozen=True)
class GrayScott(Spectral):
    """a_t = diffusivity_a laplace(a) - a b^2 + feed_rate (1 - a), b_t = diffusivity_b laplace(b) + a b^2 - (feed_rate +
    kill_rate) b on [0, length)^2. Gray & Scott 1984; Pearson 1993, doi:10.1126/science.261.5118.189.

    Concentrations lie in [0, 1] and a = 1, b = 0 is at rest. Fronts are about 0.02 wide with the usual diffusivities:
    192 points on a length of 1 keep the undershoot of the spectral method below 3e-4, a third of them (as on the grid
    of the Well) near 1e-2. Keep length / solver_points at 0.005.

    Attributes:
        pattern: takes both rates from `PATTERNS`; "all" gives trajectory i those of pattern i modulo 6.
        feed_rate: number, or (low, high) to draw one per trajectory, where `pattern` is not given.
        kill_rate: likewise.
        diffusivity_a: likewise, also with a pattern.
        diffusivity_b: likewise.
        points: stored points per axis.
        solver_points: points of the solver per axis.
        length: period of both axes.
        time_step: time between stored frames.
        substeps: solver steps per stored frame.
        warmup: time dropped before the first stored frame.
        initial_modes: highest wavenumber (cycles per period and axis) of the random field that places the seeds.
        initial_share: part of the square that is seeded with b.
        downsampling: "stride" takes every nth point and so keeps the range; "fourier" truncates the spectrum.
        precision: of the computation. Files hold float32.
    """

    pattern: Literal["all", "bubbles", "gliders", "maze", "spirals", "spots", "worms"] | None = None
    feed_rate: Range = 0.029
    kill_rate: Range = 0.057
    diffusivity_a: Range = 2e-5
    diffusivity_b: Range = 1e-5
    points: int = 96
    solver_points: int = 192
    length: float = 1.0
    time_step: float = 50.0
    substeps: int = 100
    warmup: float = 0.0
    initial_modes: int = 8
    initial_share: float = 0.25
    downsampling: Literal["fourier", "stride"] = "stride"
    precision: Literal["float32", "float64"] = "float64"

    axes: ClassVar[tuple[str, ...]] = ("y", "x")
    usual_steps: ClassVar[int] = 100
    parameters: ClassVar[tuple[str, ...]] = ("feed_rate", "kill_rate", "diffusivity_a", "diffusivity_b")
    equation: ClassVar[str] = (
        "a_t = diffusivity_a laplace(a) - a b^2 + feed_rate (1 - a), "
        "b_t = diffusivity_b laplace(b) + a b^2 - (feed_rate + kill_rate) b"
    )
    scheme: ClassVar[str] = "Fourier pseudo-spectral, half of the modes kept, ETDRK4"
    meanings: ClassVar[dict[str, str]] = {"a": "concentration of the food", "b": "concentration of the catalyst"}
    channels: ClassVar[tuple[Channel, ...]] = (Channel("a"), Channel("b"))

    def __post_init__(self):
        adopt(self, self.pattern, {**PATTERNS, "all": SPAN}, "pattern")
        super().__post_init__()
        require(0 < self.initial_share < 1, "initial_share", self.initial_share, "between 0 and 1")

    def draw(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """Rates of a pattern where it is "all", uniform numbers otherwise."""
        drawn = super().draw(key, index)
        if self.pattern == "all":
            feed, kill = jnp.asarray(RATES, float)[index % len(RATES)]
            drawn |= {"feed_rate": feed, "kill_rate": kill}
        return drawn

    def initial(self, key: jax.Array, **parameters: Any) -> Float[ArrayLike, "y x 2"]:
        """Smooth random patches of a = b = 0.4 in a = 1, b = 0; the same field at every `solver_points`."""
        field = fourier.smooth_field(key, self.initial_modes, self.solver_points)
        # The field is nearly normal. A patch ends within half of its standard deviation, which the grid resolves.
        level = jax.scipy.stats.norm.ppf(1 - self.initial_share)
        seeded = jax.nn.sigmoid((field - level) / 0.1)
        return jnp.concatenate([1 - 0.6 * seeded, 0.4 * seeded], axis=-1)

    def stepper(self, **parameters: Any) -> Step:
        """One stored step. The four parameters, `length` and `time_step` may be given, also traced."""
        given = self.values(parameters, *self.parameters, "length", "time_step")
        solver = exponax.stepper.reaction.GrayScott(
            2, given["length"], self.solver_points, given["time_step"] / self.substeps,
            diffusivity_1=given["diffusivity_a"], diffusivity_2=given["diffusivity_b"],
            feed_rate=given["feed_rate"], kill_rate=given["kill_rate"], order=4,
        )  # fmt: skip
        return fourier.repeated(solver, self.substeps)
