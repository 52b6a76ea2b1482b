"""Networks of `gpme.py`, Gaussian at every point, and the loop that trains them.

Both give mean and standard deviation of u at points (t, x), scaled to the unit square:

    attentive neural process    from 100 observed values of the function (Kim et al. 2019, arXiv:1901.05761)
    member of a deep ensemble   from the parameter of the equation (Lakshminarayanan et al. 2017, arXiv:1612.01474)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from physml.errors import DivergedError
from physml.layers.dense import MLP, Dense
from physml.layers.perceptron import Activation, Perceptron

LEAST = 1e-3  # of the standard deviations, as in Hansen et al. 2023
STRIDE = 9  # of the targets that a penalty sees: 12 of 10 x 10, all of other times, for second derivatives are dear


class Functions(NamedTuple):
    """Functions observed at some points (context) and wanted at others (target); points are (t, x) in [0, 1].

    Attributes:
        parameter: `(function,)`, of the equation, scaled so that training has -1 to 1.
        context, context_u: `(function, point, 2)`, `(function, point)`.
        target, target_u: as for the context.
    """

    parameter: Float[Array, " function"]
    context: Float[Array, "function context 2"]
    context_u: Float[Array, "function context"]
    target: Float[Array, "function target 2"]
    target_u: Float[Array, "function target"]


class Normal(NamedTuple):
    """Independent normal distributions."""

    mean: Float[Array, "*any"]
    std: Float[Array, "*any"]

    def log_density(self, u: Float[Array, "*any"]) -> Float[Array, "*any"]:
        return jax.scipy.stats.norm.logpdf(u, self.mean, self.std)


def gaussian(outputs: Float[Array, "*any 2"]) -> Normal:
    """Mean and standard deviation from the two numbers that a network gives for a point."""
    return Normal(outputs[..., 0], LEAST + jax.nn.softplus(outputs[..., 1]))


class Attend(nnx.Module):
    """Multi-head attention, then an MLP, both added to the queries; `keys` and `values` are of the same points."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm, self.key_norm, self.value_norm, self.hidden_norm = (
            nnx.LayerNorm(width, rngs=rngs) for _ in range(4)
        )
        self.query, self.key, self.value, self.mix = (Dense(width, width, rngs=rngs) for _ in range(4))
        self.mlp = MLP(width, width, width, rngs=rngs)

    def __call__(self, queries, keys, values):
        def split(x):
            return x.reshape(*x.shape[:-1], self.heads, -1)

        mixed = jax.nn.dot_product_attention(
            split(self.query(self.norm(queries))),
            split(self.key(self.key_norm(keys))),
            split(self.value(self.value_norm(values))),
        )
        hidden = queries + self.mix(mixed.reshape(queries.shape))
        return hidden + self.mlp(self.hidden_norm(hidden))


class AttentiveNeuralProcess(nnx.Module):
    """A path of cross-attention from the context to each target, and one normal latent variable for the function.

    The order of the context does not matter, and each target is predicted without the others. Departs from Hansen et
    al. in the blocks, which normalize first and have an MLP each, and in that nothing is dropped out.
    """

    def __init__(
        self,
        extent: tuple[float, float] | None = None,
        width: int = 128,
        heads: int = 4,
        depth: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        """Points enter as (t, x) times `extent`, None: as 2 (t, x) - 1. `depth` blocks of self-attention for the
        context in either path, and as many of cross-attention."""
        self.extent = extent
        self.embed = MLP(2, width, width, rngs=rngs)
        self.observe, self.latent_observe = (MLP(3, width, width, rngs=rngs) for _ in range(2))
        self.self_attend, self.latent_attend, self.cross_attend = (
            nnx.List([Attend(width, heads, rngs=rngs) for _ in range(depth)]) for _ in range(3)
        )
        self.latent_readout = MLP(width, width, 2 * width, rngs=rngs)
        self.decode = Perceptron([2 + 2 * width, 2 * width, width, width, 2], Activation("gelu"), rngs=rngs)

    def place(self, points: Float[Array, "b n 2"]) -> Float[Array, "b n 2"]:
        return 2 * points - 1 if self.extent is None else points * jnp.asarray(self.extent, points.dtype)

    def latent(self, points: Float[Array, "b n 2"], u: Float[Array, "b n"]) -> Normal:
        """Distribution of the latent variable `(b, width)` given values at points."""
        hidden = self.latent_observe(jnp.concatenate([self.place(points), u[..., None]], -1))
        for attend in self.latent_attend:
            hidden = attend(hidden, hidden, hidden)
        mean, raw = jnp.split(self.latent_readout(hidden.mean(1)), 2, -1)
        return Normal(mean, 0.1 + 0.9 * jax.nn.sigmoid(raw))

    def path(self, context: Float[Array, "b n 2"], u: Float[Array, "b n"]) -> Callable:
        """The function (targets `(b, m, 2)`, latent `(b, width)`) -> `Normal` `(b, m)` for a context."""
        context = self.place(context)
        values, keys = self.observe(jnp.concatenate([context, u[..., None]], -1)), self.embed(context)
        for attend in self.self_attend:
            values = attend(values, values, values)

        def predict(targets, latent):
            targets = self.place(targets)
            hidden = self.embed(targets)
            for attend in self.cross_attend:
                hidden = attend(hidden, keys, values)
            shared = jnp.broadcast_to(latent[:, None], (*hidden.shape[:2], latent.shape[-1]))
            return gaussian(self.decode(jnp.concatenate([targets, hidden, shared], -1)))

        return predict

    def draws(self, functions: Functions, targets: Float[Array, "b m 2"], key: jax.Array, count: int) -> Normal:
        """Predictions `(draw, b, m)`, one for each draw of the latent variable given the context."""
        latent = self.latent(functions.context, functions.context_u)
        predict = self.path(functions.context, functions.context_u)
        noise = jax.random.normal(key, (count, *latent.mean.shape))
        return jax.lax.map(lambda z: predict(targets, z), latent.mean + latent.std * noise)


class Member(nnx.Module):
    """A perceptron of (t, x, parameter): it is told the parameter and never sees the context."""

    def __init__(self, width: int = 128, depth: int = 4, *, rngs: nnx.Rngs):
        self.network = Perceptron([3, *[width] * depth, 2], Activation("gelu"), rngs=rngs)

    def predict(self, parameter: Float[Array, " b"], points: Float[Array, " b m 2"]) -> Normal:
        parameter = jnp.broadcast_to(parameter[:, None, None], (*points.shape[:2], 1))
        return gaussian(self.network(jnp.concatenate([2 * points - 1, parameter], -1)))


def elbo_loss(penalty: Callable | None = None, weight: float = 0.0) -> Callable:
    """Minus the evidence lower bound per target, plus `weight` times the mean of `penalty`.

    The latent variable is drawn given the targets, and its distribution pulled towards the one given the context.
    `penalty(u, points, parameter)`, of a function u(points) and its arguments, gives a number for each point; it sees
    every ninth target.
    """

    def loss(model: AttentiveNeuralProcess, functions: Functions, key: jax.Array) -> jax.Array:
        prior = model.latent(functions.context, functions.context_u)
        posterior = model.latent(functions.target, functions.target_u)
        latent = posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape)
        predict = model.path(functions.context, functions.context_u)
        likely = predict(functions.target, latent).log_density(functions.target_u).sum(-1)
        bound = likely - divergence(posterior, prior)
        value = -bound.mean() / functions.target.shape[1]
        if penalty is None or not weight:
            return value
        points = functions.target[:, ::STRIDE]
        residual = penalty(lambda points: predict(points, latent).mean, points, functions.parameter)
        return value + weight * residual.mean()

    return loss


def likelihood_loss(model: Member, functions: Functions, key: jax.Array) -> jax.Array:
    """Minus the mean log-likelihood of the targets."""
    return -model.predict(functions.parameter, functions.target).log_density(functions.target_u).mean()


def divergence(p: Normal, q: Normal) -> Float[Array, " b"]:
    """The Kullback-Leibler divergence of p from q, summed over the last axis."""
    ratio = jnp.square(p.std / q.std)
    return 0.5 * (ratio + jnp.square((p.mean - q.mean) / q.std) - 1 - jnp.log(ratio)).sum(-1)


def fit(
    build: Callable[[nnx.Rngs], nnx.Module],
    loss: Callable,
    functions: Functions,
    *,
    updates: int,
    batch: int,
    rate: float,
    seed: int,
    count: int = 1,
    final: float = 0.0,
) -> tuple[list[nnx.Module], np.ndarray]:
    """Trains `count` models from other starts and batches, in one compiled program.

    Adam, its rate falling from `rate` to `final * rate` along a cosine after a linear rise over 5 % of the updates;
    gradients are cut at norm 1. `loss(model, functions, key)` gets `batch` of the functions at a time.

    Returns:
        the models, and the loss of every update `(count, updates)`.

    Raises:
        DivergedError: a loss is not finite.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(updates // 20, 1), max(updates, 2), final * rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def run(key, functions):
        start, key = jax.random.split(key)
        _, state = nnx.split(build(nnx.Rngs(start)))

        def update(carry, key):
            state, moments = carry
            choice, noise = jax.random.split(key)
            chosen = jax.random.randint(choice, (batch,), 0, len(functions.parameter))
            some = jax.tree.map(lambda a: a[chosen], functions)
            value, gradient = jax.value_and_grad(lambda state: loss(nnx.merge(graph, state), some, noise))(state)
            change, moments = optimizer.update(gradient, moments, state)
            return (optax.apply_updates(state, change), moments), value

        (state, _), values = jax.lax.scan(update, (state, optimizer.init(state)), jax.random.split(key, updates))
        return state, values

    models, losses = [], []
    for key in jax.random.split(jax.random.key(seed), count):
        state, values = run(key, functions)
        models.append(nnx.merge(graph, state))
        losses.append(np.asarray(values))
    if not np.isfinite(losses).all():
        first = int(np.argmin(np.isfinite(losses).all(0)))
        raise DivergedError(f"The loss is not finite at update {first + 1} of {updates}. Lower the rate ({rate:g}).")
    return models, np.stack(losses)
