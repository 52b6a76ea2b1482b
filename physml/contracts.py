"""The protocols of physml; the first file to read.

A *model* maps arrays to arrays. A *stepper* holds a model and knows what the arrays mean. A *constraint* knows physics.
An *objective* turns a stepper and a window of data into a loss. Registries of their configs are plain dicts:
`physml.models.MODELS`, `physml.steppers.STEPPERS`, `physml.constraints.CONSTRAINTS`, `physml.data.FORMATS`,
`physml.metrics.METRICS`, `physml.objectives.OBJECTIVES`.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Float

from physml.fields import ArrayLike, Context, Signature, Spec, Window

Key = jax.Array  # typed PRNG key of jax.random.key
Frame = Any  # (batch, *space, channel), physical units
State = Any  # any pytree: recent frames, a Gaussian, latent vectors, ...


@runtime_checkable
class Model(Protocol):
    """An nnx.Module from normalized fields to normalized fields.

    A model with an attribute `dropout` above zero is also given `key=` (the step's PRNG key, or None); it draws from it
    between `train()` and `eval()` only.
    """

    def __call__(
        self, fields: Float[ArrayLike, "batch *space inputs"], scalars: Float[ArrayLike, "batch scalars"]
    ) -> Float[ArrayLike, "batch *space outputs"]: ...


class ModelConfig(Protocol):
    """A frozen dataclass of an architecture's choices; the signature gives the shapes."""

    def build(self, signature: Signature, rngs: Any) -> Model: ...


@runtime_checkable
class Constraint(Protocol):
    """Physics of a frame, in physical units. Projecting twice is projecting once; after it `violation` vanishes.

    Optional: `condition(mean, variance, previous, context) -> (mean, variance)` of a frame whose numbers are normal and
    independent, which Gaussian steppers call in place of `project`.
    """

    def violation(self, frame: Frame, previous: Frame, context: Context) -> Float[ArrayLike, "batch laws"]: ...

    def project(self, frame: Frame, previous: Frame, context: Context) -> Frame: ...


@runtime_checkable
class Stepper(Protocol):
    """An nnx.Module that holds model, normalizer and constraints: physical units in, physical units out.

    `history` frames go in (zero for operator learning, where only static fields and parameters are given). Optional:
    `distribution(state) -> physml.fields.Gaussian`, whose mean is the frame of `decode`, of steppers that know how sure
    they are; `physml.steppers.Distribution` decodes to it.
    """

    history: int
    spec: Spec

    def encode(self, frames: Float[ArrayLike, "batch history *space channel"], context: Context) -> State: ...

    def advance(self, state: State, context: Context) -> State:
        """One step; the body of the scan. `context` belongs to the frame to be predicted."""
        ...

    def decode(self, state: State) -> Frame: ...


class StepperConfig(Protocol):
    """A frozen dataclass. `signature` says what model the stepper needs (None: it needs none)."""

    def signature(self, spec: Spec) -> Signature | None: ...

    def build(
        self, spec: Spec, model: Model | None, normalizer: Any, constraints: tuple[Constraint, ...]
    ) -> Stepper: ...


class Objective(Protocol):
    """A training strategy: a frozen dataclass, pure, usable in a notebook.

    Optional: an attribute `validation`, the objective by which validation is done in its place (without noise, without
    penalties, of fixed length), so that its values can be compared. Objectives of rollouts come in two halves, so that
    others can add to them: `predict(stepper, window, key)` gives a `physml.objectives.scoring.Prediction`, whose last
    frame is the last of the window, and `score(stepper, window, prediction)` what the call itself gives.

    The second part of the result may hold "channel" (channels,), "lead" (leads,) and "part" {name: number}; training
    records "channel" and "part". With a mask it may also hold "present" (channels,): the share of samples that have the
    channel, over which "channel" is the mean, and "weight" (): what the loss counts in a mean over batches of one size.
    """

    def frames(self, history: int) -> int:
        """Length of the window that the loader must cut."""
        ...

    def __call__(
        self, stepper: Stepper, window: Window, key: Key
    ) -> tuple[Float[ArrayLike, ""], dict[str, jax.Array]]: ...


@runtime_checkable
class Schedule(Protocol):
    """An objective that changes while training goes on; its own call is that of the last stage.

    Training compiles one update per stage, and cuts windows to the length of that stage's objective.
    """

    def stages(self, total: int, batch: int, unit: int = 1) -> tuple[Any, ...]:
        """`physml.objectives.curriculum.Stage`s that cover updates 0 to `total`; batches are multiples of `unit`."""
        ...


@runtime_checkable
class Dataset(Protocol):
    """One split: random access, stateless, numpy, physical units, no batch axis.

    `read` is all that training, statistics and scores need. Optional, for speed, as `physml.data.XarrayDataset` has
    them: `windows(chunk)` for one streaming pass, `read_batch` and `prepare` for batches.
    """

    spec: Spec
    lengths: tuple[int, ...]  # frames per trajectory

    def read(self, trajectory: int, frames: range) -> Window: ...
