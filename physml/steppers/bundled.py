"""Temporal bundling: a network that predicts several frames at once, which are handed out one by one."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import Context, Signature, Spec
from physml.normalize import Normalizer
from physml.steppers.packing import count
from physml.steppers.plain import Direct, check_fits


@dataclass(frozen=True)
class BundledConfig:
    """The network predicts the next `bundle` frames from the last `history`, and is called once for all of them.

    Long rollouts need fewer calls, and errors are fed back less often. Brandstetter et al. 2022, arXiv:2202.03376,
    section 3.1. Forcing, calendar and lead are those of the first frame of a bundle. Train it with rollouts of at least
    `bundle` steps, `Unrolled(steps=bundle)`.

    Attributes:
        bundle: frames per call.
        history: frames that go in.
        residual: outputs are increments: frame k of a bundle is the last known frame plus k times the k-th output in
            units of the increments' scale; else outputs are the frames themselves.
        calendar: give the network the time of year and of day.
        lead: give the network the length of the step.
    """

    bundle: int = 4
    history: int = 1
    residual: bool = True
    calendar: bool = False
    lead: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.bundle < 1 or self.history < 1:
            raise ConfigError(f"bundle is {self.bundle} and history {self.history}, but both must be at least 1.")

    def signature(self, spec: Spec) -> Signature:
        """Shapes of the network that this stepper needs: outputs are the channels of each frame of a bundle in turn."""
        inputs, scalars = count(spec, self.history, self.calendar, self.lead)
        return Signature(spec.grid, inputs, scalars, self.bundle * len(spec.channels))

    def build(self, spec: Spec, model, normalizer: Normalizer, constraints=()) -> "Bundled":
        """Raises SpecError when the model or the normalizer does not have the shapes of `signature(spec)`, ConfigError
        when there is none."""
        check_fits(self, spec, model, normalizer)
        return Bundled(self, spec, model, normalizer, constraints)


class Bundle(NamedTuple):
    """State of a rollout.

    Attributes:
        recent: the last `history` frames, `(batch, history, *space, channel)`.
        queue: frames of the last call, `(batch, bundle, *space, channel)`, before masks and constraints.
        used: how many of them are handed out; all of them when the network has to be called.
    """

    recent: Any
    queue: Any
    used: Any


class Bundled(Direct):
    """State: a `Bundle`, in physical units. Under a `vmap` that maps `used` too the network is called at every step."""

    @property
    def bundle(self) -> int:
        return self.config.bundle

    def encode(self, frames, context: Context) -> Bundle:
        frames = jnp.asarray(frames)
        queue = jnp.zeros((frames.shape[0], self.bundle, *frames.shape[2:]), frames.dtype)
        return Bundle(frames, queue, jnp.int32(self.bundle))

    def advance(self, state: Bundle, context: Context, call: bool | None = None) -> Bundle:
        """`call`: what the caller knows about whether the queue is used up; None: it is looked up."""
        graph, running, others = nnx.split(self.model, nnx.BatchStat, ...)

        def predict(running):
            model = nnx.merge(graph, running, others)  # what a branch changes has to leave it as a result
            return self._predict_bundle(model, state.recent, context), nnx.state(model, nnx.BatchStat)

        def keep(running):
            return state.queue, running

        if call is None:
            empty = state.used == self.bundle
            queue, running = jax.lax.cond(empty, predict, keep, running)
        else:
            empty = call
            queue, running = (predict if call else keep)(running)
        if jax.tree.leaves(running):
            nnx.update(self.model, running)
        used = jnp.where(empty, 0, state.used)
        previous = state.recent[:, -1]
        frame = jax.lax.dynamic_index_in_dim(queue, used, axis=1, keepdims=False)
        frame = self.finish(frame, previous, context)
        return Bundle(jnp.concatenate([state.recent[:, 1:], frame[:, None]], axis=1), queue, used + 1)

    def _predict_bundle(self, model, recent, context: Context):
        config = self.config
        fields, scalars = self.inputs(recent, context)
        random = {"key": context.key} if getattr(model, "dropout", 0) else {}
        output = model(fields, scalars, **random)
        output = jnp.moveaxis(output.reshape(*output.shape[:-1], self.bundle, -1), -2, 1)
        if not config.residual:
            return self.normalizer.denormalize(output).astype(recent.dtype)
        ahead = jnp.arange(1, self.bundle + 1, dtype=output.dtype).reshape(-1, *(1,) * (output.ndim - 2))
        return (recent[:, -1:] + self.normalizer.increment(ahead * output)).astype(recent.dtype)

    def decode(self, state: Bundle):
        return state.recent[:, -1]


def scan_bundles(advance, carry, steps: Int[Array, " steps"], bundle: int):
    """`jax.lax.scan` over steps of a bundled stepper that begin with a call of its network.

    Known calls instead of `jax.lax.cond`, whose gradient stores the activations of a call at every step.

    Args:
        advance: `advance(call=)` gives `(carry, step) -> (carry, result)`, with what is known for `Bundled.advance`.
    """

    def one(carry, steps):
        carry, first = advance(call=True)(carry, steps[0])
        carry, others = jax.lax.scan(advance(call=False), carry, steps[1:])
        return carry, jax.tree.map(lambda a, later: jnp.concatenate([a[None], later]), first, others)

    whole = len(steps) // bundle * bundle
    carry, results = jax.lax.scan(one, carry, steps[:whole].reshape(-1, bundle))
    results = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), results)
    if whole == len(steps):
        return carry, results
    carry, rest = one(carry, steps[whole:])
    return carry, jax.tree.map(lambda a, later: jnp.concatenate([a, later]), results, rest)
