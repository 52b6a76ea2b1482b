"""Steppers, objectives and data that do not suit each other are refused; options of the wrong kind are named."""

import dataclasses

import jax
import numpy as np
import pytest

from physml import api, coding
from physml.constraints import MassFixer
from physml.data import SyntheticConfig
from physml.errors import ConfigError, SpecError
from physml.experiment import Experiment
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.metrics.losses import H1, MSE
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.objectives import (
    OBJECTIVES,
    AllToAll,
    Curriculum,
    Denoising,
    Likelihood,
    NoisyInputs,
    OneStep,
    Penalized,
    RandomInterval,
    SpectralPower,
    Unrolled,
)
from physml.parallel.mesh import Layout
from physml.steppers import DirectConfig, GaussianConfig, IntervalConfig, RefinerConfig, ResidualConfig
from physml.steppers.describe import build_stepper
from physml.training import TrainingConfig, fit, fit_members
from physml.training.loop import check_parts

SPEC = Spec(Grid((Axis.uniform("x", 8),)), (Channel("u"),), time_step=0.5)
FORCED = dataclasses.replace(SPEC, forcing=(Channel("f"),))
MODEL = FNOConfig(modes=(2,), width=4, depth=1)
TOLD = DirectConfig(lead=True, longest_lead=4)


class Data:
    """Trajectories of 6 frames in memory."""

    lengths = (6, 6)

    def __init__(self, spec=SPEC):
        self.spec = spec

    def read(self, trajectory, frames):
        values = np.ones((1, len(frames), 8, len(self.spec.channels)), "f4")
        return jax.tree.map(lambda array: array[0], Window.of(values, self.spec))


def stepper(config=None, spec=SPEC, seed=0, model=MODEL):
    config = config or ResidualConfig()
    intervals = getattr(config, "intervals", ())
    normalizer = Normalizer.identity(spec, intervals=intervals)
    return build_stepper(config, model, spec, normalizer, seed=seed)


def prepare(config, objective, **fields):
    data = SyntheticConfig("burgers", points=16)
    return api.prepare(Experiment(data=data, stepper=config, objective=objective, **{"model": MODEL, **fields}))


def trainings(folder, objective=None, data=None, one=None, **training):
    """By `fit` and by `fit_members`."""
    training = TrainingConfig(steps=1, batch=2, **training)
    data, objective, one = {"train": Data()} if data is None else data, objective or OneStep(), one or stepper()
    rest = data, objective, training
    return (
        lambda: fit(one, *rest, Layout(data=1), folder / "one"),
        lambda: fit_members([one, one], *rest, Layout(data=1, member=1), folder / "two", seeds=(0, 1)),
    )


@pytest.mark.parametrize(
    ("config", "objective", "message"),
    [
        (TOLD, OneStep(), "up to 4 time steps, but OneStep trains up to 1. Set longest_lead=1, or .*snapshots=5"),
        (TOLD, NoisyInputs(AllToAll(3), 0.1), "AllToAll trains up to 2"),
        (IntervalConfig((1, 2, 4)), RandomInterval((1, 2)), r"never shows it \[4\]"),
        (IntervalConfig((1, 2)), Curriculum(Unrolled(), (1, 2)), r"Unrolled never shows it \[2\]"),
        (GaussianConfig(), OneStep(), "would stay random. Use the objective Likelihood"),
        (GaussianConfig(), Penalized(Unrolled(), (SpectralPower(),)), "Unrolled does not train"),
    ],
)
def test_what_a_new_stepper_would_never_learn_is_refused(config, objective, message):
    with pytest.raises(ConfigError, match=message):
        prepare(config, objective)


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (TOLD, AllToAll(5)),
        (TOLD, AllToAll(3, stride=2)),
        (IntervalConfig((1, 2)), RandomInterval((1, 2))),
        (IntervalConfig((1,)), Unrolled()),
        (GaussianConfig(), Curriculum(Likelihood(), (1, 2))),
        (GaussianConfig(sample=True), OneStep()),
        (ResidualConfig(lead=True), OneStep()),
    ],
)
def test_what_it_learns_is_not(config, objective):
    assert prepare(config, objective)[0].objective == objective


@pytest.mark.parametrize(
    ("config", "formats", "warned"),
    [
        (RefinerConfig(), ("bfloat16", "float32"), True),
        (RefinerConfig(), ("float32", "bfloat16"), True),
        (RefinerConfig(), ("float32", None), False),
        (RefinerConfig(minimum=2e-5), ("bfloat16", "bfloat16"), False),
        (ResidualConfig(), ("bfloat16", "bfloat16"), False),
    ],
)
def test_noise_that_a_network_cannot_read_is_named(tmp_path, caplog, config, formats, warned):
    data, training = {"train": Data()}, TrainingConfig(precision=formats[0])
    model = dataclasses.replace(MODEL, dtype=formats[1]) if formats[1] else MODEL
    with caplog.at_level("WARNING", "physml.training"):
        check_parts(stepper(config, model=model), data, OneStep(), training)
    assert ("noise of 6.3e-04" in caplog.text and "stepper.minimum=2e-5" in caplog.text) == warned


def test_a_trained_stepper_may_be_tuned_on_fewer_leads(tmp_path):
    from physml import saving
    from physml.saving import StartFrom

    saving.save(stepper(TOLD), tmp_path / "model")
    start = StartFrom(str(tmp_path / "model"))
    assert prepare(TOLD, AllToAll(3), start_from=start)[0].objective == AllToAll(3)


def test_training_refuses_what_does_not_fit_its_stepper(tmp_path):
    swapped = dataclasses.replace(SPEC, channels=(Channel("v"),))
    late = dataclasses.replace(SPEC, time_step=9.0)
    for wrong, error, message in (
        ({"objective": OneStep}, ConfigError, r"the class OneStep: write OneStep\(\)"),
        ({"objective": "one_step"}, ConfigError, "'one_step', which is no objective"),
        ({"data": Data()}, ConfigError, "are a Data, but splits were expected"),
        ({"data": {"train": Data(swapped)}}, SpecError, r"channels \['u'\], but the split 'train' has \['v'\]"),
        ({"data": {"train": Data(), "valid": Data(late)}}, SpecError, "frames of the split 'valid' are 9"),
        ({"one": stepper(GaussianConfig())}, ConfigError, "would stay random"),
    ):
        for start in trainings(tmp_path, **wrong):
            with pytest.raises(error, match=message):
                start()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Curriculum(updates=100), "updates is 100.*a list was expected"),
        (lambda: Curriculum(steps=8), "steps is 8"),
        (lambda: Curriculum(rates=0.5), "rates is 0.5"),
        (lambda: Curriculum(Unrolled), "the class Unrolled"),
        (lambda: NoisyInputs(OneStep), "the class OneStep"),
        (lambda: NoisyInputs(std=(0.1, 0.2)), "std is"),
        (lambda: Penalized(OneStep(), SpectralPower()), "one or more in a tuple"),
        (lambda: Penalized(OneStep(), ("spectral_power",)), "no penalty. Write SpectralPower"),
        (lambda: Penalized(OneStep(), (SpectralPower,)), "no penalty"),
        (lambda: Penalized(OneStep(), (MassFixer("u"),)), "Put it into ConstraintPenalty"),
        (lambda: RandomInterval(4), "intervals is 4"),
        (lambda: Unrolled(steps="4"), "steps is '4'"),
        (lambda: Unrolled(steps=4.0), r"an integer \(4\) was expected"),
        (lambda: Unrolled(weights=2.0), "weights is 2.0"),
        (lambda: AllToAll(pairs=1.5), "pairs is 1.5"),
        (lambda: Likelihood(beta="a"), "beta is 'a'"),
        (lambda: SpectralPower(cut="a"), "cut is 'a'"),
        (lambda: OneStep(space="log"), "space is 'log'"),
        (lambda: OneStep(loss=MSE), "is not a loss"),
        (lambda: MSE(channels={"u": 1.0}), "channels is .*dict"),
        (lambda: H1(spacing="even"), "spacing is 'even'"),
    ],
)
def test_options_of_another_kind_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_lists_ranges_and_arrays_are_as_good_as_tuples():
    assert Curriculum(steps=range(3, 8, 2), updates=[10]) == Curriculum(steps=(3, 5, 7), updates=(10,))
    assert Unrolled(np.int64(2), weights=np.ones(2)) == Unrolled(2, weights=(1.0, 1.0))
    assert hash(RandomInterval([1, 2])) == hash(RandomInterval((1, 2)))
    penalized = Penalized(OneStep(), [SpectralPower()])
    assert coding.from_dict(OBJECTIVES, coding.to_dict(penalized, OBJECTIVES)) == penalized


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (ResidualConfig(), Unrolled(3)),
        (TOLD, AllToAll(4, pairs=0)),
        (IntervalConfig((1, 3)), RandomInterval((1, 3))),
    ],
)
def test_forcing_that_ends_too_early_is_refused(config, objective):
    one, frames = stepper(config, FORCED), np.ones((2, 4, 8, 1), "f4")
    whole = Window.of(frames, FORCED, forcing=np.ones((2, 4, 8, 1), "f4"))
    short = dataclasses.replace(whole, forcing=whole.forcing[:, :3])
    key = jax.random.key(0)
    jax.eval_shape(lambda: objective(one, whole, key)[0])
    with pytest.raises(SpecError, match=r"Forcing \['f'\] is given for 3 frames, but (1|the 4)"):
        jax.eval_shape(lambda: objective(one, short, key)[0])


@pytest.mark.parametrize("objective", [OneStep(), Denoising(), AllToAll(3), RandomInterval((1, 2))])
def test_windows_without_a_batch_axis_are_refused(objective):
    config = {Denoising: RefinerConfig(), AllToAll: TOLD, RandomInterval: IntervalConfig((1, 2))}.get(type(objective))
    with pytest.raises(SpecError, match=r"\(batch, time, \*space, channel\) was expected"):
        jax.eval_shape(lambda: objective(stepper(config), Data().read(0, range(5)), jax.random.key(0))[0])
