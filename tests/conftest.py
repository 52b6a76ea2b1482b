"""Every test session sees four virtual CPU devices, a compilation cache, and small helpers."""

import contextlib
import importlib
import os
import pathlib
import tempfile

# Before jax is imported: the flags are read once, when its backends start. Compiling is most of a cold run; the last
# three take two thirds off it. Those given are left: XLA_FLAGS="--xla_backend_optimization_level=3
# --xla_cpu_use_fusion_emitters=true" compiles as users do.
for _flag in (
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parent.parent
_cache = pathlib.Path(os.environ.get("PHYSML_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "physml-test-xla"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # workers share even the smallest programs

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from physml.fields import Axis, Channel, Grid, Spec, Window  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drops compiled programs between modules once a worker has gathered a lot of them."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 2 * 2**30:
        import ctypes
        import gc

        import jax

        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # else the freed memory stays, and every module clears again
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data (`PHYSML_SHARED_DATA`, or ../shared/data beside the repository); skips without one."""
    folder = pathlib.Path(os.environ.get("PHYSML_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set PHYSML_SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture
def spec() -> Spec:
    """Two channels on a periodic 8 x 6 grid."""
    return tiny_spec()


@pytest.fixture
def window(spec) -> Window:
    """Four frames of three samples of smooth random waves."""
    return tiny_window(spec)


@pytest.fixture
def chunk_traces(monkeypatch) -> dict[str, int]:
    """How often `rollout_chunks` has traced its "start" and its "loop" since the test began."""
    chunks, counts = importlib.import_module("physml.rollout.chunks"), {"start": 0, "loop": 0}

    def counted(name, real):
        def run(*arguments):
            counts[name] += 1
            return real(*arguments)

        return run

    for name in counts:
        monkeypatch.setattr(chunks, f"_{name}", counted(name, getattr(chunks, f"_{name}")))
    return counts


@pytest.fixture
def users_environment() -> dict[str, str]:
    """For a process that compiles as users do: without the flags of tests."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


@pytest.fixture
def tiny():
    """The helpers `tiny.spec(...)`, `tiny.window(...)`, `tiny.model(...)`, for tests that need other sizes."""
    return _Tiny


def tiny_spec(shape=(8, 6), channels=("u", "v"), periodic=True, **fields) -> Spec:
    """A spec on a unit box; `fields` may hold forcing, static and parameters as tuples of names."""
    axes = tuple(Axis.uniform(name, n, periodic=periodic) for name, n in zip("xyz", shape, strict=False))
    groups = {key: tuple(Channel(name) for name in names) for key, names in fields.items() if key != "time_step"}
    return Spec(Grid(axes), tuple(Channel(name) for name in channels), **groups, time_step=fields.get("time_step", 1.0))


def tiny_window(spec: Spec, batch=3, frames=4, seed=0, **fields) -> Window:
    """Traveling waves of random phase and amplitude, so that every frame differs and nothing is singular."""
    random = np.random.default_rng(seed)
    waves = np.zeros((batch, frames, *spec.grid.shape, len(spec.channels)), np.float32)
    time = np.arange(frames).reshape(1, frames, *[1] * (spec.grid.ndim + 1))
    for axis, grid_axis in enumerate(spec.grid.axes):
        x = np.asarray(grid_axis.centers) / grid_axis.length
        x = x.reshape(1, 1, *[-1 if i == axis else 1 for i in range(spec.grid.ndim)], 1)
        shape = (batch, 1, *[1] * spec.grid.ndim, len(spec.channels))
        waves += random.uniform(0.5, 1.5, shape) * np.sin(2 * np.pi * (x - 0.1 * time) + random.uniform(0, 6, shape))
    return Window.of(waves.astype(np.float32), spec, **fields)


def tiny_model(inputs: int, outputs: int, hidden: int = 8, seed: int = 0):
    """A pointwise network with one hidden layer: fields and scalars in, fields out."""
    import jax.numpy as jnp
    from flax import nnx

    class Pointwise(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(inputs, hidden, rngs=rngs)
            self.last = nnx.Linear(hidden, outputs, rngs=rngs)

        def __call__(self, fields, scalars):
            space = fields.shape[1:-1]
            spread = jnp.broadcast_to(
                scalars.reshape(scalars.shape[0], *[1] * len(space), scalars.shape[-1]),
                (scalars.shape[0], *space, scalars.shape[-1]),
            )
            return self.last(jnp.tanh(self.first(jnp.concatenate([fields, spread], -1))))

    return Pointwise(nnx.Rngs(seed))


class _Tiny:
    spec = staticmethod(tiny_spec)
    window = staticmethod(tiny_window)
    model = staticmethod(tiny_model)
