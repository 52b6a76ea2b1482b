"""The training problem of PDE-Refiner. Lippe et al. 2023, arXiv:2308.05732."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

from physml.errors import ConfigError
from physml.fields import ArrayLike, Window
from physml.metrics.losses import MSE
from physml.objectives.scoring import averages, check_window
from physml.steppers.refiner import Refiner


@dataclass(frozen=True)
class Denoising:
    """The error of the velocity at one step of the refinement, drawn uniformly from 0 .. K for every sample.

    At step K the network sees nothing but noise in place of the increment: that is the one-step problem. The other
    steps show it the true increment with ever less noise, so that small scales count as much as large ones. One call of
    the network per update, whatever K. The other objectives train a refiner through its sampler, at K + 1 calls a step.

    Score the moving average of the weights, as published: `training.average=0.995` makes it what is validated,
    returned and saved.
    """

    def frames(self, history: int) -> int:
        return history + 1

    def __call__(self, stepper, window: Window, key) -> tuple[Float[ArrayLike, ""], dict[str, jax.Array]]:
        """The loss, summed over channels, and {"channel": (channels,) errors}, all of normalized velocities.

        Raises ConfigError for a stepper that is no refiner and without a key, SpecError for a window that is too short.
        """
        if not isinstance(stepper, Refiner):
            raise ConfigError(
                f"The objective `denoising` trains a refiner, but the stepper is a {type(stepper).__name__}. "
                "Set the stepper to RefinerConfig() (stepper=refiner), or choose the objective `one_step`."
            )
        if key is None:
            raise ConfigError("The objective `denoising` draws noise, but key is None. Pass key=jax.random.key(0).")
        history = stepper.history
        check_window(window, self.frames(history), f"{history} (history) + 1")
        of_step, of_noise, of_model = jax.random.split(key, 3)
        context = window.context(0, history, of_model)
        state = stepper.encode(jnp.asarray(window.frames[:, :history]), context)
        frame = jnp.asarray(window.frames[:, history])
        step = jax.random.randint(of_step, frame.shape[:1], 0, stepper.config.refinements + 1)
        noise = jax.random.normal(of_noise, frame.shape, jnp.promote_types(frame.dtype, jnp.float32))
        problem = stepper.problem(state, frame, context, step, noise)
        errors = MSE().errors(problem.prediction[:, None], problem.target[:, None], window.spec, window.mask)
        parts = averages(errors, window.mask)
        return errors.mean((0, 1)).sum(), {name: part for name, part in parts.items() if name != "lead"}
