"""Where arrays live: a mesh over all devices of all processes, windows split along it, parameters replicated."""

import functools
import math
import os
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from physml.errors import ConfigError
from physml.fields import Window


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
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), window)

    def replicate(self, tree):
        """The same numbers on every device."""
        return jax.device_put(tree, self.replicated())


@functools.lru_cache(maxsize=8)
def _mesh(sizes: tuple[int, int, int]) -> Mesh:
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, ("member", "data", "space"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def start_distributed() -> None:
    """Joins a multi-process run when PHYSML_COORDINATOR (host:port), PHYSML_PROCESSES and PHYSML_PROCESS are set, or when
    a cluster that jax knows (Slurm, Cloud TPU, ...) is asked for with PHYSML_DISTRIBUTED=auto. Call it before any array is made.
    """
    coordinator = os.environ.get("PHYSML_COORDINATOR")
    if coordinator:
        missing = [name for name in ("PHYSML_PROCESSES", "PHYSML_PROCESS") if name not in os.environ]
        if missing:
            raise ConfigError(f"PHYSML_COORDINATOR is set, but {missing} are not: give the process count and number too.")
        jax.distributed.initialize(
            coordinator,
            int(os.environ["PHYSML_PROCESSES"]),
            int(os.environ["PHYSML_PROCESS"]),
            initialization_timeout=int(os.environ.get("PHYSML_TIMEOUT", "300")),
        )
    elif os.environ.get("PHYSML_DISTRIBUTED") == "auto":
        jax.distributed.initialize()
