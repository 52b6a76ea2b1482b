"""The benchmark of the generalized porous medium equation: its networks, its data, its table."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import gpme  # noqa: E402
from gpme_networks import AttentiveNeuralProcess, Member, Normal, divergence, elbo_loss, fit, likelihood_loss  # noqa: E402

STEFAN = gpme.FAMILIES["stefan"]


def process(rngs):
    return AttentiveNeuralProcess(width=8, heads=2, depth=1, rngs=rngs)


@pytest.fixture(scope="module")
def functions():
    every = gpme.training_functions(STEFAN, 8, seed=0)
    few = np.arange(0, 100, 4)
    return every._replace(context=every.context[:, few], context_u=10 * every.context_u[:, few])


@nnx.jit(static_argnames="count")
def draws_of(model, functions, targets, count=2):
    return model.draws(functions, targets, jax.random.key(1), count)


def test_the_order_of_the_context_does_not_matter(functions):
    model, order = process(nnx.Rngs(0)), np.random.default_rng(0).permutation(25)
    shuffled = functions._replace(context=functions.context[:, order], context_u=functions.context_u[:, order])
    expected, found = (draws_of(model, f, f.target) for f in (functions, shuffled))
    assert_allclose(found.mean, expected.mean, atol=1e-5)  # sums of 25 float32 numbers, in another order
    assert_allclose(found.std, expected.std, atol=1e-5)
    other = functions._replace(context_u=functions.context_u[:, order])  # values of other points: not the same data
    assert np.abs(draws_of(model, other, other.target).mean - expected.mean).max() > 1e-4


def test_targets_are_predicted_one_by_one(functions):
    model, order = process(nnx.Rngs(0)), np.random.default_rng(0).permutation(100)[:7]
    whole = draws_of(model, functions, functions.target)
    some = draws_of(model, functions, functions.target[:, order])
    assert_allclose(some.mean, whole.mean[..., order], atol=1e-5)
    assert_allclose(some.std, whole.std[..., order], atol=1e-5)


def test_divergence_is_that_of_normal_distributions():
    p, q = Normal(jnp.array([[0.3, -1.0]]), jnp.array([[0.5, 1.5]])), Normal(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    draws = 0.3 + 0.5 * np.random.default_rng(0).standard_normal(200_000)
    one = Normal(p.mean[:, :1], p.std[:, :1])
    estimate = (one.log_density(draws) - Normal(0.0, 1.0).log_density(draws)).mean()
    assert_allclose(divergence(one, Normal(jnp.zeros((1, 1)), jnp.ones((1, 1))))[0], estimate, atol=0.01)  # 4 errors
    assert divergence(p, q)[0] > 0
    assert_allclose(divergence(p, p), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "loss"),
    [
        pytest.param(process, elbo_loss(), marks=pytest.mark.slow),
        (lambda rngs: Member(width=16, depth=2, rngs=rngs), likelihood_loss),
    ],
    ids=["anp", "ensemble"],
)
def test_training_raises_the_likelihood(build, loss, functions):
    models, losses = fit(build, loss, functions, updates=60, batch=4, rate=1e-2, seed=0, count=1 + (build != process))
    assert losses.shape == (len(models), 60)
    assert (losses[:, -5:].mean(1) < losses[:, :5].mean(1) - 0.2).all()
    if len(models) > 1:
        first, second = (model.predict(functions.parameter, functions.target).mean for model in models)
        assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("name", ["diffusion", "pme"])
def test_the_penalty_vanishes_on_exact_solutions_only(name):
    family = gpme.FAMILIES[name]
    parameter, scaled = jnp.array([2.0, 3.0]), family.scaled(jnp.array([2.0, 3.0]))
    # Away from the front of the porous medium, where the derivatives have no bound.
    points = jnp.stack(jnp.meshgrid(jnp.linspace(0.5, 0.9, 4), jnp.linspace(0.05, 0.3, 5)), -1).reshape(1, -1, 2)
    points = jnp.broadcast_to(points, (2, *points.shape[1:]))

    def exact(points):
        return jax.vmap(family.exact)(points, parameter)

    assert_allclose(family.residual(exact, points, scaled), 0, atol=1e-5)
    assert family.residual(lambda points: 1.1 * exact(points) ** 2, points, scaled).mean() > 1e-3


def test_softc_adds_its_penalty_by_weight(functions):
    model = process(nnx.Rngs(0))

    def penalty(u, points, parameter):
        return jnp.square(u(points)) + parameter[:, None]

    plain, once, twice = (
        nnx.jit(elbo_loss(penalty, weight))(model, functions, jax.random.key(0)) for weight in (0.0, 1.0, 2.0)
    )
    assert once > plain + 1e-3
    assert_allclose(twice - plain, 2 * (once - plain), rtol=1e-4)


@pytest.mark.parametrize("how", ["hardc", "probconserv", "diff"])
@pytest.mark.parametrize("name", ["diffusion", "stefan"])
def test_updates_reach_the_mass(how, name):
    family = gpme.FAMILIES[name]
    x, u, mass = gpme.truth(family, family.inside)
    random = np.random.default_rng(0)
    means = (u + 0.05 + 0.02 * random.standard_normal((2, 3, len(x)))).astype(np.float32)
    draws = Normal(means, np.full_like(means, 0.1))
    before, after = (gpme.scores(gpme.mixture(d), x, u, mass) for d in (draws, gpme.update(how, draws, x, mass)))
    assert (before[0] > 0.04).all()
    assert np.abs(after[0]).max() < 1e-6
    assert (after[2] < before[2]).all()


def test_scores_are_those_of_numpy():
    x, u, mass = gpme.truth(STEFAN, 0.6)
    predicted = Normal(np.stack([u + 0.1, u - 0.2]), np.full((2, len(x)), 0.5))
    error, likelihood, square = gpme.scores(predicted, x, u, mass)
    assert_allclose(error, np.trapezoid(predicted.mean, x) - mass, rtol=1e-5)
    assert_allclose(square, [0.01, 0.04], rtol=1e-5)
    expected = -np.array([0.01, 0.04]) / (2 * 0.25) - np.log(0.5 * np.sqrt(2 * np.pi))
    assert_allclose(likelihood, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_run_writes_table_and_figure(tmp_path, capsys):
    words = (
        "--families stefan --methods anp probconserv --updates 2 --functions 8 --batch 2 --draws 2 --seeds 2 --width 8"
    )
    text = gpme.run(
        gpme.parse([*words.split(), "--seeds", "2", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    )
    assert (tmp_path / "out" / "results.md").read_text() == text
    assert (tmp_path / "out" / "profiles.png").read_bytes()[:4] == b"\x89PNG"
    assert "u_star = 0.5 (generated test functions)" in text
    row = next(line for line in text.splitlines() if line.startswith("| ProbConserv-ANP |"))
    assert row.split("|")[2].strip() == "0"
    assert "- met: CE of every updated prediction" in text


def test_generated_functions_are_the_authors_protocol(shared_data):
    data = shared_data / "probconserv"
    for name, parameter in (("pme", 3.0), ("stefan", 0.6)):
        theirs, source = gpme.test_functions(name, gpme.FAMILIES[name], parameter, data)
        ours, generated = gpme.test_functions(name, gpme.FAMILIES[name], parameter, None)
        assert (source, generated) == ("the authors'", "generated")
        for a, b in zip(theirs, ours):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert_allclose(a.mean(), b.mean(), atol=0.08)  # of uniform points, 500 a side
        exact = jax.vmap(gpme.FAMILIES[name].exact)(theirs.context, jnp.full(50, parameter))
        # Near the front of Stefan's problem rounding decides on which side a point is.
        assert (np.abs(exact - theirs.context_u) < 1e-4).mean() > 0.999


RELEASED = {
    "anp": "anp/raw/mixture of per-draw updates",
    "softc": "softc/raw/mixture of per-draw updates",
    "hardc": "anp/hardc/mix16",
    "probconserv": "anp/probconserv/mix16",
    "diff": "anp/probconserv_diff/mix16",
}


@pytest.mark.parametrize("case", [("pme", 1.0, "m=1"), ("stefan", 0.6, "u_star=0.6")], ids=["pme", "stefan"])
@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if m == "diff" else m for m in RELEASED])
def test_released_networks_reproduce_the_published_figures(method, case, shared_data):
    (name, parameter, label), data = case, shared_data / "probconserv"
    noted = json.loads((data / "metrics.json").read_text())[name]
    found = gpme.released(name, gpme.FAMILIES[name], parameter, data, [method])
    if (name, method) == ("stefan", "softc"):
        assert not found  # was not released
        return
    for score, ours in zip(("CE", "LL", "MSE"), found[method]):
        value, error = noted[RELEASED[method]][label][score]
        # The mass of the smoothed Stefan profiles is off by 5e-6 in the published figures, which allow it a tolerance.
        assert abs(ours.mean() - value) <= error + (1e-5 if score == "CE" else 0), score


def test_the_paper_is_quoted_in_the_units_of_the_table(shared_data):
    noted = json.loads((shared_data / "probconserv" / "metrics.json").read_text())["paper"]
    labels = {label: method for method, (label, *_) in gpme.METHODS.items()}
    cases = {
        ("pme", 1.0): ("pme m=1 (CE x1e-3, LL, MSE x1e-4)", 1),
        ("stefan", 0.6): ("stefan u*=0.6 (CE x1e-2, LL, MSE x1e-3)", 10),
    }
    for case, (key, factor) in cases.items():
        assert {labels[label] for label in noted[key]} == set(gpme.PAPER[case])
        for label, values in noted[key].items():
            for ours, theirs, scale in zip(gpme.PAPER[case][labels[label]], values, (factor, 1, factor)):
                assert_allclose(float(ours.split()[0]), scale * float(theirs.split()[0]))
