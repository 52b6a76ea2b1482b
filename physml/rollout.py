"""Many steps of any stepper in one `lax.scan`."""

import jax
import jax.numpy as jnp

from physml.fields import Window


def rollout(stepper, window: Window, steps: int, key=None, *, remat: bool = False):
    """Predicts `steps` frames after the first `stepper.history` frames of `window`.

    Returns what `stepper.decode` returns with axes `(batch, lead, ...)`. Pure and jittable.
    """
    history = stepper.history

    def body(state, step):
        step_key = None if key is None else jax.random.fold_in(key, step)
        state = stepper.advance(state, window.context(step, history, step_key))
        return state, stepper.decode(state)

    body = jax.checkpoint(body) if remat else body
    state = stepper.encode(window.frames[:, :history], window.context(0, history, key))
    _, frames = jax.lax.scan(body, state, jnp.arange(steps))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), frames)
