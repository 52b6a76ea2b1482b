"""Where arrays live: a mesh over all devices of all processes, windows split along it, parameters replicated."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from physml import errors
from physml.coding import check_fields
from physml.errors import ConfigError
from physml.fields import Window, is_key


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; at most one is -1 and takes the devices that are left.

    Attributes:
        member: independent ensemble members.
        data: batch.
        space: first spatial axis (declared here; spatial sharding of a model comes with the layers that support it).
    """

    member: int = 1
    data: int = -1
    space: int = 1

    def __post_init__(self):
        check_fields(self)

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Axis sizes for a number of devices. Raises ConfigError when they do not fit."""
        sizes = [self.member, self.data, self.space]
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ConfigError(f"{self}: axes are positive, and at most one is -1 (the rest of the devices).")
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            if devices % fixed:
                raise ConfigError(f"{self} needs a multiple of {fixed} devices, but there are {devices}.")
            sizes[sizes.index(-1)] = devices // fixed
        elif fixed > devices:
            raise ConfigError(f"{self} needs {fixed} devices, but there are {devices}. Lower an axis or set one to -1.")
        return tuple(sizes)

    @property
    def mesh(self) -> Mesh:
        return _mesh(self.sizes(len(jax.devices())))

    def use(self):
        """Context manager under which jitted functions see this mesh (layers ask for it, see `parallel.fft`)."""
        return jax.set_mesh(self.mesh)

    def window_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def check_batch(self, batch: int) -> None:
        """Raises ConfigError when a global batch does not divide over the data axis."""
        size = self.mesh.shape["data"]
        if batch % size:
            lower, upper = batch // size * size, (batch // size + 1) * size
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise ConfigError(
                f"A batch of {batch} does not divide over {size} devices of the data axis. Use {nearest}, "
                f"or Layout(data=n) with n dividing {batch}."
            )

    def place(self, window: Window) -> Window:
        """This process's share of a batch becomes a global window, split along its batch axis."""
        sharding = self.window_sharding()
        if jax.process_count() == 1:
            return jax.device_put(window, sharding)  # one call for all arrays: several times cheaper
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), window)

    def replicate(self, tree):
        """The same numbers on every device. With several processes each must hold the same numbers already."""
        sharding = self.replicated()
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: _replicate(leaf, sharding), tree)


def over_members(function: Callable, in_axes: tuple) -> Callable:
    """`jax.vmap(function, in_axes)` whose results all have a leading member axis; in_axes are 0 or None.

    Where the mesh spreads members, every device maps over its own and nothing is sent. Left to the compiler, what the
    rules of `vmap` make of some operations, convolutions above all, would gather all members on each device. A CPU
    takes one member after the other: its caches hold one, and one is compiled in half the time.
    """
    mapped = (_in_turn if jax.default_backend() == "cpu" else jax.vmap)(function, in_axes)

    def each(*arguments):
        if jax.sharding.get_abstract_mesh().shape.get("member", 1) == 1:
            return mapped(*arguments)
        places = jax.tree.map(
            lambda axis: PartitionSpec() if axis is None else PartitionSpec("member"),
            in_axes,
            is_leaf=lambda a: a is None,
        )
        # Unchecked: the check cannot lower convolutions, whose rule of `vmap` is their own.
        return jax.shard_map(
            mapped, in_specs=places, out_specs=PartitionSpec("member"), axis_names={"member"}, check_vma=False
        )(*arguments)

    return each


def _in_turn(function: Callable, in_axes: tuple) -> Callable:
    """`jax.vmap(function, in_axes)`, as a loop."""

    def each(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        mapped = jax.tree.map(lambda axis: axis is not None, in_axes, is_leaf=lambda axis: axis is None)
        mapped = jax.tree.leaves(jax.tree.broadcast(mapped, arguments))

        def one(own):
            own = iter(own)
            mine = [next(own) if moves else leaf for leaf, moves in zip(leaves, mapped, strict=True)]
            return function(*jax.tree.unflatten(structure, mine))

        return jax.lax.map(one, [leaf for leaf, moves in zip(leaves, mapped, strict=True) if moves])

    return each


def over_batch(function: Callable, axis: int = 0) -> Callable:
    """`function` of arrays, or trees of them, with a batch along `axis`, of results that have it there too.

    Where the mesh splits batches, every device calls it on its own samples, of which it must treat each by itself, and
    nothing is sent: for operations that the compiler would gather, such as transforms. Where the batch does not divide
    over the devices, or there is one only, this is `function`.
    """

    def each(*arguments):
        mesh = jax.sharding.get_abstract_mesh()
        devices = mesh.shape.get("data", 1)
        if devices == 1 or any(leaf.shape[axis] % devices for leaf in jax.tree.leaves(arguments)):
            return function(*arguments)
        types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        free = {name for name in mesh.axis_names if types[name] != AxisType.Manual}
        if "data" not in free:  # inside somebody's shard_map over it: the arguments are the local part already
            return function(*arguments)
        split = PartitionSpec(*(None,) * axis, "data")
        # Unchecked: the check refuses loops whose first state is a constant.
        return jax.shard_map(function, in_specs=split, out_specs=split, axis_names=free, check_vma=False)(*arguments)

    return each


def _replicate(leaf, sharding: NamedSharding):
    """Through the host, because one process cannot move an array onto devices of another."""
    if is_key(leaf):
        data = jax.device_put(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(np.asarray(leaf), sharding)


@functools.lru_cache(maxsize=8)
def _mesh(sizes: tuple[int, int, int]) -> Mesh:
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, ("member", "data", "space"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def start_distributed() -> None:
    """Joins a multi-process run; call it before any array is made. Does nothing when no such run is asked for.

    PHYSML_COORDINATOR (host:port of process 0), PHYSML_PROCESSES and PHYSML_PROCESS describe the run; where a cluster
    that jax knows (Slurm, Cloud TPU, ...) describes it, PHYSML_DISTRIBUTED=auto is enough. PHYSML_TIMEOUT is how many
    seconds to wait for the others (300). Raises ConfigError when the description is incomplete or nobody answers.
    """
    coordinator = os.environ.get("PHYSML_COORDINATOR")
    if jax.distributed.is_initialized():
        return
    if coordinator:
        count, number = _whole("PHYSML_PROCESSES"), _whole("PHYSML_PROCESS")
        if not 0 <= number < count:
            raise ConfigError(f"PHYSML_PROCESS is {number}, but processes are numbered 0 to {count - 1}.")
        timeout = _whole("PHYSML_TIMEOUT", "300")
        try:
            jax.distributed.initialize(coordinator, count, number, initialization_timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Process {number} of {count} could not join at {coordinator} within {timeout} s: {error} "
                "Start all processes, and let PHYSML_COORDINATOR be an address of process 0 that the others reach."
            ) from error
    elif os.environ.get("PHYSML_DISTRIBUTED") == "auto":
        jax.distributed.initialize()


def on_first_process(function: Callable[[], None]) -> None:
    """Calls `function` on process 0; every process must call this, and waits for it.

    Raises what `function` raised, on every process: the others would wait for a process 0 that has given up.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            function()
        except Exception as error:
            failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        text = f"{type(failure).__name__}\n{failure}".encode()[:4096] if failure else b""
        told = np.frombuffer(text.ljust(4096, b"\0"), np.uint8)  # of one size on every process
        told = np.asarray(multihost_utils.broadcast_one_to_all(told)).tobytes().rstrip(b"\0")
        if told and failure is None:
            name, message = told.decode(errors="replace").split("\n", 1)
            failure = getattr(errors, name, errors.PhysmlError)(message)
    if failure:
        raise failure


def _whole(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal():
        raise ConfigError(f"PHYSML_COORDINATOR is set, so {name} must be a whole number, but it is {text!r}.")
    return int(text)
