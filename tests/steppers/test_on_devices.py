"""A batch over four devices: the loss and gradients of one device, and no sample leaves its own."""

import every_stepper
import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from physml.constraints import MassFixer
from physml.data import XarrayDataset
from physml.fields import stack
from physml.objectives import (
    OBJECTIVES,
    AllToAll,
    ConstraintPenalty,
    Curriculum,
    Denoising,
    Likelihood,
    NoisyInputs,
    OneStep,
    Penalized,
    Pushforward,
    RandomInterval,
    SpectralPower,
    Unrolled,
)
from physml.parallel.mesh import Layout
from physml.steppers import STEPPERS

OBJECTIVE = {"refiner": Denoising(), "gaussian": Likelihood(), "interval": RandomInterval((1, 2))}  # others: Unrolled
QUICK = ("corrected", "refiner", "stream_function")
LEARNED = [
    pytest.param(name, OBJECTIVE.get(name, Unrolled(steps=3)), marks=[] if name in QUICK else [pytest.mark.slow])
    for name in sorted(STEPPERS)
    if not hasattr(STEPPERS[name], "fit")
]
TRIED = {
    "all_to_all": AllToAll(snapshots=2, pairs=2),
    "curriculum": Curriculum(Unrolled(), steps=(1, 2), updates=(1,)),
    "noisy_inputs": NoisyInputs(OneStep(), std=0.1),
    "one_step": OneStep(),
    "penalized": Penalized(Unrolled(steps=2), (ConstraintPenalty(MassFixer(("u",))), SpectralPower())),
    "pushforward": Pushforward(),
}
OBJECTIVES_LEFT = [pytest.param("direct", objective, id=name) for name, objective in TRIED.items()]
assert {type(o) for o in (*TRIED.values(), *OBJECTIVE.values(), Unrolled())} == set(OBJECTIVES.values())


@pytest.mark.parametrize(("name", "objective"), LEARNED + OBJECTIVES_LEFT)
def test_training_over_devices_sends_gradients_alone(name, objective):
    stepper = every_stepper.stepper_of(name)
    data = XarrayDataset(every_stepper.data_of(name, trajectories=4), stepper.spec)
    window = stack([data.read(i, range(6)) for i in range(4)])
    graph, params, rest = nnx.split(stepper, nnx.Param, ...)

    @jax.jit
    def update(params, rest, window, key):
        def loss(params):
            return objective(nnx.merge(graph, params, rest), window, key)[0]

        return jax.value_and_grad(loss)(params)

    key, layout = jax.random.key(0), Layout(data=4)
    expected = update(params, rest, window, key)
    with layout.use():
        inputs = layout.replicate((params, rest)) + (layout.place(window), layout.replicate(key))
        compiled = update.lower(*inputs).compile()
        found = compiled(*inputs)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(float(np.abs(theirs).max()), 1e-3))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]))
    program = compiled.as_text()
    assert "all-reduce" in program
    for message in ("all-gather", "all-to-all", "collective-permute"):
        assert message not in program
