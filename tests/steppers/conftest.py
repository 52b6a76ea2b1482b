"""Helpers of the tests of steppers with a solver inside."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from physml.fields import Channel, Spec
from physml.rollout import rollout


@pytest.fixture
def hybrid():
    """`hybrid.roll(...)`, `.silent(...)`, `.spec_of(...)`, `.frames_of(...)`, `.train(...)`."""
    return SimpleNamespace(roll=roll, silent=silent, spec_of=spec_of, frames_of=frames_of, train=train)


def roll(stepper, window, steps):
    return jax.jit(lambda window: rollout(stepper, window, steps))(window)


def silent(stepper):
    """The stepper, with all parameters of its network zero."""
    nnx.update(stepper.model, jax.tree.map(jnp.zeros_like, nnx.state(stepper.model, nnx.Param)))
    return stepper


def spec_of(solver, *parameters):
    """The spec of the solver's frames, with `parameters` beside them."""
    groups = {"parameters": tuple(map(Channel, parameters))}
    return Spec(solver.grid, solver.channels, **groups, time_step=solver.time_step)


def frames_of(solver, steps, batch=2, dtype=jnp.float32, **parameters):
    """Trajectories `(batch, steps + 1, *space, channel)` of the solver itself."""

    @jax.jit
    @jax.vmap
    def run(key):
        state = jax.tree.map(lambda x: x.astype(dtype), solver.initial(key, **parameters))
        step = solver.stepper(**parameters)
        later = jax.lax.scan(lambda s, _: (step(s), solver.observe(step(s))), state, length=steps)[1]
        return jnp.concatenate([solver.observe(state)[None], later])

    return run(jax.random.split(jax.random.key(0), batch))


def train(stepper, window, objective, updates, rate=3e-3):
    """Losses of Adam on one window."""
    import optax

    graph, params, rest = nnx.split(stepper, nnx.Param, ...)
    window = window.slice(0, objective.frames(stepper.history))
    rule = optax.adam(rate)

    @jax.jit
    def update(params, state):
        loss, slope = jax.value_and_grad(lambda p: objective(nnx.merge(graph, p, rest), window, None)[0])(params)
        change, state = rule.update(slope, state)
        return optax.apply_updates(params, change), state, loss

    state, losses = rule.init(params), []
    for _ in range(updates):
        params, state, loss = update(params, state)
        losses.append(float(loss))
    return losses
