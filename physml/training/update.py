"""The pure update: loss, gradient, optimizer, moving average; several updates in one compiled call."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from physml.errors import ConfigError
from physml.fields import Window
from physml.layers.lora import is_frozen, parameters
from physml.parallel.mesh import over_members
from physml.training.optimizers import OptimizerConfig, TrainingConfig

Statistics = dict[tuple[str, ...], jax.Array]  # by path


@dataclass(frozen=True)
class Parts:
    """A stepper without its numbers. The numbers are plain nested dicts, which jit handles several times faster."""

    graphdef: Any
    params: Any  # nnx.State of the same structure; its values are placeholders
    rest: Any
    running: tuple[tuple[str, ...], ...] = ()  # where in `rest` the running statistics of batch normalization are

    def merge(self, params: dict, rest: dict, dtype: Any = None):
        """The stepper as it predicts, without dropout; its model computes in `dtype` if given."""
        if dtype is not None:
            running = self.statistics(rest)  # small numbers are added to them many times: they stay in float32
            params, rest = ({**tree, "model": _cast(tree.get("model", {}), dtype)} for tree in (params, rest))
            params, rest = ({k: v for k, v in tree.items() if k != "model" or v} for tree in (params, rest))
            rest = with_statistics(rest, running)
        stepper = nnx.merge(self.graphdef, _fill(self.params, params), _fill(self.rest, rest))
        if dtype is not None:
            stepper.model = _InPrecision(stepper.model, dtype)
        stepper.eval()
        return stepper

    def statistics(self, rest: dict) -> Statistics:
        """The running statistics in `rest`."""
        return {path: functools.reduce(lambda tree, key: tree[key], path, rest) for path in self.running}

    def moved_statistics(self, stepper) -> Statistics:
        """The same of a stepper that `merge` made and an objective has used."""
        if not self.running:
            return {}
        if isinstance(stepper.model, _InPrecision):
            stepper.model = stepper.model.model
        return self.statistics(_text_keys(nnx.to_pure_dict(nnx.state(stepper, nnx.BatchStat))))


def with_statistics(rest: dict, statistics: Statistics) -> dict:
    """`rest` with other running statistics."""
    for path, leaf in statistics.items():
        rest = _put(rest, path, leaf)
    return rest


def _put(tree: dict, path: tuple[str, ...], leaf) -> dict:
    first, *others = path
    return {**tree, first: _put(tree[first], tuple(others), leaf) if others else leaf}


def split(stepper, optimizer: OptimizerConfig | None = None) -> tuple[Parts, dict, dict]:
    """(parts, parameters, everything else). Parameters that are frozen, by a group of `optimizer` whose rate is 0 or
    by LoRA, are among everything else: they get no gradient, no optimizer state, no decay and no moving average.

    Raises ConfigError when there is nothing to train, and for a group that no parameter is in.
    """
    groups = optimizer or OptimizerConfig()
    groups.check_groups(parameters(stepper))

    def trained(path, variable):
        frozen = isinstance(variable, nnx.Variable) and is_frozen(variable)
        return isinstance(variable, nnx.Param) and not frozen and not groups.freezes(".".join(map(str, path)))

    graphdef, params, rest = nnx.split(stepper, trained, ...)
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(stepper, nnx.Param)))
        if count:
            raise ConfigError(
                f"All {count:,} parameters of {type(stepper).__name__} are frozen: nothing would be learned. Give one "
                "of optimizer.groups a learning rate above 0, or narrow the pattern of a group whose rate is 0."
            )
        raise ConfigError(
            f"{type(stepper).__name__} has no trainable parameters. Give it a network, or score it without training."
        )
    running = tuple(tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(stepper, nnx.BatchStat)))
    plain = _text_keys(nnx.to_pure_dict(params)), _text_keys(nnx.to_pure_dict(rest))
    return Parts(graphdef, *jax.tree.map(lambda leaf: 0, (params, rest)), running), *plain


def initial_state(
    params: dict, transform: optax.GradientTransformation, config: TrainingConfig, statistics: Statistics | None = None
) -> dict:
    """What the update carries. Every array is a copy: the update consumes its input, the caller's stepper must stay."""
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return {
        "params": params,
        "average": jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params) if config.average else None,
        "optimizer": transform.init(params),
        "statistics": jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), statistics or {}),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "alive": jnp.ones((), bool),
    }


def build_update(
    objective, parts: Parts, config: TrainingConfig, steps: int, sharding=None, *, members: bool = False
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer of a run of `steps` updates, and `update(state, rest, key, windows, count) -> (state, metrics)`.

    `update` is jitted, donates `state`, and leaves its results in `sharding` (where XLA likes, if None).

    `windows` is a tuple of batches, one per update. The first `count` of them are used, so that the end of a run needs
    no program of its own. Metrics have one row per update: loss, gradient (global norm), good (whether both were
    finite), skipped (total so far), learning_rate and the objective's own. An update whose loss or gradient is not
    finite changes nothing; with nonfinite="stop" nothing changes after it. Running statistics of batch normalization
    are part of `state`; those in `rest` are not used.

    With `members` everything but `count` has a leading member axis (metrics: after the row), and each member is updated
    as it would be alone.
    """
    compute = jnp.bfloat16 if config.precision == "bfloat16" else None
    transform, rate = config.optimizer.build(steps), config.optimizer.rate(steps)

    def loss(params, rest, window, key):
        stepper = parts.merge(params, rest, compute)
        stepper.train()  # dropout on, batch normalization by the batch at hand
        value, aux = objective(stepper, window, key)
        return value, (_summable(aux), parts.moved_statistics(stepper))

    gradient = functools.partial(_gradient, jax.value_and_grad(loss, has_aux=True), config.accumulate)

    def one(state, call, rest, key):
        window, used = call
        key = jax.random.fold_in(key, state["step"])
        rest = with_statistics(rest, state["statistics"])
        (value, (aux, statistics)), gradients = gradient(state["params"], rest, window, key)
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        accept = good & used & state["alive"]
        changes, optimizer = transform.update(gradients, state["optimizer"], state["params"])
        new = {"params": optax.apply_updates(state["params"], changes), "optimizer": optimizer}
        new["statistics"] = statistics
        new["average"] = _averaged(state["average"], new["params"], state["step"], config.average)
        old = {name: state[name] for name in new}
        new = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
        new["step"] = state["step"] + used
        new["skipped"] = state["skipped"] + (used & ~good)
        new["alive"] = state["alive"] & (good | ~used) if config.nonfinite == "stop" else state["alive"]
        metrics = {"loss": value, "gradient": norm, "good": good, "skipped": new["skipped"]}
        metrics["learning_rate"] = jnp.asarray(rate(state["step"] - state["skipped"]), jnp.float32)
        return new, {**metrics, **_per_sample(aux)}

    each = over_members(one, (0, (0, None), 0, 0)) if members else one

    def update(state, rest, key, windows, count):
        def body(state, call):
            return each(state, call, rest, key)

        if len(windows) == 1:
            state, metrics = body(state, (windows[0], count > 0))
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *windows)
        return jax.lax.scan(body, state, (stacked, jnp.arange(len(windows)) < count))

    return transform, jax.jit(update, donate_argnums=0, out_shardings=sharding)


def build_loss(objective, parts: Parts, config: TrainingConfig, *, members: bool = False) -> Callable:
    """`loss(params, rest, window, key) -> (loss, aux)`, jitted, in the precision of training.

    A loss that sums over samples is scaled to those of a batch of training, however many the window holds. With
    `members` everything but the window has a leading member axis.
    """
    compute = jnp.bfloat16 if config.precision == "bfloat16" else None
    summed = getattr(getattr(objective, "loss", None), "reduction", "mean") == "sum"

    def loss(params, rest, window, key):
        value, aux = objective(parts.merge(params, rest, compute), window, key)
        return value * config.batch / window.frames.shape[0] if summed else value, aux

    return jax.jit(over_members(loss, (0, 0, None, 0)) if members else loss)


class _InPrecision(nnx.Module):
    """A model that computes in another number format; its callers see their own.

    Scalars are handed on as they are: bfloat16 would make a refiner's step 333.33 to 334, whose sine is another one.
    The model takes what it makes of them to the format of its fields.
    """

    def __init__(self, model, dtype):
        self.model = model
        self.dtype = dtype
        self.dropout = getattr(model, "dropout", 0.0)

    def __call__(self, fields, scalars, **options):
        return self.model(fields.astype(self.dtype), scalars, **options).astype(fields.dtype)


def _gradient(value_and_grad, parts: int, params, rest, window: Window, key):
    """Mean loss, gradient and running statistics over `parts` equal shares of the batch, one after the other."""
    if parts == 1:
        return value_and_grad(params, rest, window, key)

    # Sample i goes to share i % parts, so that every device holds a piece of every share and nothing moves.
    def deal(leaf):
        return jnp.moveaxis(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 1, 0)

    def body(total, share):
        number, piece = share
        result = value_and_grad(params, rest, piece, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, result), None

    shares = jax.tree.map(deal, window)
    shape = jax.eval_shape(value_and_grad, params, rest, jax.tree.map(lambda leaf: leaf[0], shares), key)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    total, _ = jax.lax.scan(body, zero, (jnp.arange(parts), shares))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def _summable(aux: dict) -> dict:
    """Channel errors as sums over the samples that have the channel: those of parts of a batch may be averaged."""
    return {**aux, "channel": aux["channel"] * aux["present"]} if "present" in aux else aux


def _per_sample(aux: dict) -> dict:
    """The inverse of `_summable`; NaN for a channel that no sample of the batch has."""
    return {**aux, "channel": aux["channel"] / aux["present"]} if "present" in aux else aux


def _averaged(average, params, step, decay: float):
    if average is None:
        return None
    weight = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - weight).astype(a.dtype) * (p - a), average, params)


def _cast(tree, dtype):
    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _text_keys(tree):
    """nnx.List numbers its entries; saved trees want text keys."""
    return {str(key): _text_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _fill(template, values: dict):
    state = jax.tree.map(lambda leaf: leaf, template)
    nnx.replace_by_pure_dict(state, values)
    return state
