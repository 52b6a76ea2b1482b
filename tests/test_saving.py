"""Saved models come back bit for bit, and everything that can be wrong with a folder is said."""

import dataclasses
import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from physml.constraints import CONSTRAINTS
from physml.errors import CheckpointError, ConfigError, SpecError
from physml.fields import Axis, Grid, Signature, stack
from physml.models import MODELS
from physml.normalize import Normalizer
from physml.rollout import rollout
from physml.saving import build_stepper, load, save, save_model
from physml.steppers import FLOORS, DirectConfig, ResidualConfig


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """A model with every kind of state: parameters, statistics, a half-precision array, random keys, a plain array."""

    width: int = 4
    sizes: tuple[int, ...] = (1, 2)
    constant: bool = False

    def build(self, signature, rngs):
        return Plain(self, signature, rngs)


class Plain(nnx.Module):
    def __init__(self, config, signature, rngs):
        self.config = config
        self.first = nnx.Linear(signature.inputs + signature.scalars, config.width, rngs=rngs)
        self.norm = nnx.BatchNorm(config.width, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.half = nnx.Param(jax.random.normal(rngs.params(), (config.width,)).astype(jnp.bfloat16))
        self.last = nnx.List([nnx.Linear(config.width, signature.outputs, rngs=rngs)])
        self.table = jnp.arange(3.0) if config.constant else None

    def __call__(self, fields, scalars):
        hidden = self.drop(self.norm(jnp.tanh(self.first(fields)))) * self.half[...].astype(jnp.float32)
        return self.last[0](hidden)


@dataclasses.dataclass(frozen=True)
class CenteredConfig:
    channel: str = "u"

    def build(self, spec):
        return Centered(self, spec.index(self.channel))


class Centered(nnx.Module):
    def __init__(self, config, index):
        self.config, self.index = config, index

    def project(self, frame, previous, context):
        channel = frame[..., self.index]
        return frame.at[..., self.index].add(-channel.mean(axis=(1, 2), keepdims=True))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS, "plain", PlainConfig)
    monkeypatch.setitem(CONSTRAINTS, "centered", CenteredConfig)


def make(spec, config=PlainConfig(), stepper=ResidualConfig(history=2), constraints=()):  # noqa: B008
    normalizer = Normalizer(spec, [1.0, 2.0], [3.0, 4.0], [0.1, 0.2])
    return build_stepper(stepper, config, spec, normalizer, constraints, seed=3)


def equal(a, b):
    left, right = nnx.split(a), nnx.split(b)
    assert left[0] == right[0]
    for x, y in zip(jax.tree.leaves(left[1]), jax.tree.leaves(right[1]), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("constant", [False, True])
def test_round_trip_is_bit_for_bit(spec, window, tmp_path, constant):
    stepper = make(spec, PlainConfig(constant=constant), constraints=[CenteredConfig("v")])
    stepper.model.first.kernel[...] += jnp.float32(np.pi)  # not what the seed gives
    back = load(save(stepper, tmp_path / "a"))
    equal(stepper, back)
    assert_array_equal(rollout(back, window, 3), rollout(stepper, window, 3))
    assert np.abs(np.asarray(rollout(back, window, 3))[..., 1].mean((2, 3))).max() < 1e-6  # the constraint came along
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", "config.json", "model.safetensors", "spec.json"]
    save(back, tmp_path / "b")
    same = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert same[0] == same[1]
    assert os.listdir(tmp_path) in (["a", "b"], ["b", "a"])  # no partial folders remain


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_floors_round_trip(tiny, tmp_path, name):
    spec = dataclasses.replace(tiny.spec((16,), ("u",)), time_unit="s", time_step=3600.0)
    hours = np.arange(200)
    calendar = np.broadcast_to(np.stack([hours / 8760 % 1, hours / 24 % 1], -1), (3, 200, 2)).astype(np.float32)
    windows = tiny.window(spec, frames=200, calendar=calendar)

    class Data:
        lengths = (200,) * 3

        def read(self, trajectory, frames):
            window = windows.slice(frames.start, frames.stop)
            return jax.tree.map(lambda a: np.asarray(a)[trajectory], window)

    data = Data()
    data.spec = spec
    config = FLOORS[name](modes=2) if name == "linear_inverse" else FLOORS[name]()
    stepper = config.fit(data)
    back = load(save(stepper, tmp_path / "floor"))
    equal(stepper, back)
    start = stack([data.read(t, range(5)) for t in range(3)])
    assert_array_equal(rollout(back, start, 3), rollout(stepper, start, 3))


def test_shipped_models_round_trip(spec, window, tmp_path):
    from physml.models.fno import FNOConfig

    stepper = make(spec, FNOConfig(width=4, modes=(2, 2), depth=1))
    back = load(save(stepper, tmp_path / "fno"))
    equal(stepper, back)
    finer = load(tmp_path / "fno", grid=(16, 12))
    assert finer.spec.grid.shape == (16, 12)
    assert finer.spec.grid.axes[0].centers[2] == spec.grid.axes[0].centers[1]
    for x, y in zip(jax.tree.leaves(nnx.state(finer)), jax.tree.leaves(nnx.state(back)), strict=True):
        assert_array_equal(x, y)


def test_other_resolutions_keep_the_weights(tiny, spec, tmp_path):
    stepper = make(spec, PlainConfig(constant=True))
    save(stepper, tmp_path / "m")
    grid = Grid((Axis.uniform("x", 4), Axis.uniform("y", 5)))
    moved = load(tmp_path / "m", grid=grid)
    assert moved.spec == spec.on(grid)
    equal(moved.model, stepper.model)
    window = tiny.window(tiny.spec((4, 5)))
    assert rollout(moved, window, 2).shape == (3, 2, 4, 5, 2)
    with pytest.raises(SpecError, match="has 3 axes"):
        load(tmp_path / "m", grid=(4, 5, 6))


def test_a_bare_model_comes_back_as_one(spec, tmp_path):
    signature = Signature(spec.grid, 3, 1, 2)
    config = PlainConfig(width=5)
    model = config.build(Signature(spec.grid, 2, 1, 2), nnx.Rngs(0))
    save_model(model, config, Signature(spec.grid, 2, 1, 2), tmp_path / "m")
    equal(load(tmp_path / "m"), model)
    save_model(model, config, signature, tmp_path / "wrong")
    with pytest.raises(CheckpointError, match=r"first.kernel +shape +float32 \(4, 5\) +float32 \(3, 5\)"):
        load(tmp_path / "wrong")


def test_the_card_tells_what_it_is(spec, tmp_path):
    folder = save(make(spec, constraints=[CenteredConfig()]), tmp_path / "m", extra={"license": "CC0", "rmse": [1.5]})
    card = (folder / "README.md").read_text()
    for part in ("plain", "residual", "| variables | u, v |", "8 points", "periodic", "time step | 1", "CC0", "[1.5]",
                 "physml.load", "centered"):  # fmt: skip
        assert part in card, part
    config = json.loads((folder / "config.json").read_text())
    assert config["parameters"] == sum(x.size for x in jax.tree.leaves(nnx.state(load(folder), nnx.Param)))
    assert stat.S_IMODE(os.stat(folder).st_mode) & stat.S_IRUSR


def test_nothing_is_overwritten_unasked(spec, tmp_path):
    folder = save(make(spec), tmp_path / "m")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(make(spec), folder)
    other = make(spec, PlainConfig(width=6))
    equal(load(save(other, folder, overwrite=True)), other)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(other, tmp_path / "data", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        save(other, tmp_path / "data" / "precious", overwrite=True)
    with pytest.raises(ConfigError, match="`extra`"):
        save(other, tmp_path / "new", extra={"x": np.zeros(2)})
    assert sorted(os.listdir(tmp_path)) == ["data", "m"]


def test_a_failed_save_leaves_the_old_model(spec, tmp_path, monkeypatch):
    stepper = make(spec)
    folder = save(stepper, tmp_path / "m")
    monkeypatch.setattr("physml.saving.folder._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(make(spec, PlainConfig(width=6)), folder, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    equal(load(folder), stepper)


def test_a_run_folder_is_accepted(spec, tmp_path):
    stepper = make(spec)
    save(stepper, tmp_path / "run" / "model")
    equal(load(tmp_path / "run"), stepper)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="no saved model yet"):
        load(tmp_path / "unfinished")
    with pytest.raises(CheckpointError, match="There is no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="lacks config.json"):
        load(tmp_path)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "spec.json").unlink(), "lacks spec.json"),
        (lambda f: os.truncate(f / "model.safetensors", 300), "truncated or damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 3), "truncated or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 500), "truncated or damaged"),
        (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "a table was expected"),
        (lambda f: (f / "config.json").write_text("{}"), "no format number"),
        (lambda f: (f / "spec.json").write_text("{}"), "spec.json is damaged"),
        (lambda f: edit(f, format=99), "format 99.*Upgrade physml"),
        (lambda f: edit(f, kind="thing"), "'thing'"),
        (lambda f: edit(f, model={"name": "plian"}), "model.name is 'plian'.*Did you mean 'plain'"),
        (lambda f: edit(f, model={"name": "plain", "with": 3}), "model.with.*Did you mean 'width'"),
        (lambda f: edit(f, stepper={"name": "residual", "history": "x"}), "stepper.history"),
        (lambda f: edit(f, stepper=None), "stepper is None"),
        (lambda f: edit(f, model={"name": "plain", "width": 6}), r"first.kernel +shape +float32 \(4, 6\) +float32"),
    ],
)  # fmt: skip
def test_damage_is_named(spec, tmp_path, damage, message):
    folder = save(make(spec), tmp_path / "m")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_flipped_bits_are_noticed(spec, tmp_path):
    folder = save(make(spec), tmp_path / "m")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load(folder)


def test_the_table_of_differences_has_at_most_ten_rows(spec, tmp_path):
    folder = save(make(spec), tmp_path / "m")
    other = save(make(spec, stepper=DirectConfig(), config=PlainConfig(width=9)), tmp_path / "n")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    edit(folder, sha256=json.loads((other / "config.json").read_text())["sha256"])
    with pytest.raises(CheckpointError) as error:
        load(folder)
    rows = [line for line in str(error.value).splitlines() if " shape " in line]
    assert 5 < len(rows) <= 10


def test_parts_that_could_not_be_read_back_are_refused(tiny, spec, tmp_path):
    stepper = DirectConfig().build(spec, tiny.model(2, 2), Normalizer.identity(spec))
    with pytest.raises(ConfigError, match="keeps no `config`"):
        save(stepper, tmp_path / "m")
    stepper = make(spec)
    del MODELS["plain"]
    with pytest.raises(ConfigError, match="not registered"):
        save(stepper, tmp_path / "m")
    with pytest.raises(ConfigError, match="takes no model"):
        build_stepper(FLOORS["persistence"](), PlainConfig(), spec, None)
    with pytest.raises(ConfigError, match="needs a model"):
        build_stepper(ResidualConfig(), None, spec, None)
