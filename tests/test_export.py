"""Exported programs give what the stepper gives, without physml, for any batch; what cannot be exported says why."""

import json
import os
import re
import subprocess
import sys
import warnings

import every_stepper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from physml import cli, saving
from physml.errors import CheckpointError, ConfigError
from physml.fields import Signature, Window
from physml.models import FNOConfig
from physml.normalize import Normalizer
from physml.rollout import rollout
from physml.saving.exported import export, load_exported
from physml.steppers import DirectConfig, ResidualConfig, averaged, stack_members
from physml.steppers.describe import build_stepper

ALONE = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        others = "physml flax optax orbax xarray netCDF4 h5py zarr dask pandas matplotlib safetensors tyro jaxtyping"
        if name.split(".")[0] in others.split():
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""


def trained(tiny, config=None, **groups):
    """An FNO with a normalizer that is not the identity, on a grid of 16 x 12."""
    spec = tiny.spec((16, 12), **groups, time_step=0.5)
    random = np.random.default_rng(1)
    scaled = {
        name: (random.random(len(names)), 1 + random.random(len(names)))
        for name, names in groups.items()
        if name in ("forcing", "static", "parameters")
    }
    normalizer = Normalizer(spec, [1.0, -2.0], [2.0, 3.0], [0.1, 0.2], **scaled)
    model = FNOConfig(width=6, modes=(4, 4), depth=2)
    return build_stepper(config or ResidualConfig(), model, spec, normalizer)


def arguments_of(stepper, window, steps, names, key=None):
    """What the program takes, from a window."""
    batch, history, step = window.frames.shape[0], stepper.history, stepper.spec.time_step
    found = {
        "frames": window.frames[:, :history],
        "time": np.full(batch, history * step, np.float32),
        "lead": np.full(batch, step, np.float32),
        "calendar": np.zeros((batch, steps, 2), np.float32),
        "parameters": window.parameters,
        "forcing": window.forcing[:, history : history + steps],
        "static": window.static,
        "key": None if key is None else jax.random.key_data(key),
    }
    return {name: found[name] for name in names}


def reference(stepper, window, steps, key=None):
    graph, state = nnx.split(stepper)
    return jax.jit(lambda s, w: rollout(nnx.merge(graph, s), w, steps, key))(state, window)


@pytest.mark.parametrize("name", every_stepper.names())
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_stepper_is_exported(tmp_path, name, steps):
    stepper, key = every_stepper.stepper_of(name), jax.random.key(5)
    program = load_exported(export(stepper, tmp_path / "e", steps=steps, platforms=("cpu",)))
    names = [entry["name"] for entry in program.signature["inputs"]]
    assert ("key" in names) == (name == "refiner")
    assert ("lead" in names) == (name in ("direct", "flux", "interval"))
    assert "time" not in names
    assert "forcing" not in names
    for batch in (1, 5):
        data = every_stepper.data_of(name, trajectories=batch)
        frames = np.stack([data[channel].values for channel in stepper.spec.names], -1)
        window = Window.of(frames, stepper.spec)
        found = program(**arguments_of(stepper, window, steps, names, key))
        expected = reference(stepper, window, steps, key)
        assert found.shape == expected.shape
        assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # float32; the same operations, compiled apart


def test_only_what_is_used_is_asked_for_and_it_matters(tiny, tmp_path):
    groups = {"forcing": ("sun",), "static": ("land",), "parameters": ("viscosity",)}
    stepper = trained(tiny, DirectConfig(history=2, calendar=True), **groups)
    program = load_exported(export(stepper, tmp_path / "e", steps=2, platforms=("cpu",)))
    names = [entry["name"] for entry in program.signature["inputs"]]
    assert names == ["frames", "calendar", "parameters", "forcing", "static"]
    random = np.random.default_rng(0)
    window = tiny.window(
        stepper.spec,
        frames=6,
        calendar=random.random((3, 6, 2)).astype("f4"),
        forcing=random.random((3, 6, 16, 12, 1)).astype("f4"),
        static=random.random((3, 16, 12, 1)).astype("f4"),
        parameters=random.random((3, 1)).astype("f4"),
    )
    given = arguments_of(stepper, window, 2, names) | {"calendar": window.calendar[:, 2:4]}
    whole = program(**given)
    assert_allclose(whole, reference(stepper, window, 2), rtol=1e-5, atol=1e-6)
    for name in names:
        assert abs(program(**{**given, name: given[name] + np.float32(0.3)}) - whole).max() > 1e-4, name
    described = {entry["name"]: entry for entry in program.signature["inputs"]}
    assert described["frames"]["shape"] == ["batch", 2, 16, 12, 2]
    assert described["frames"]["axes"] == ["batch", "history", "x", "y", "channel"]
    assert described["forcing"]["channels"] == [{"name": "sun", "unit": ""}]
    assert program.signature["output"]["shape"] == ["batch", 2, 16, 12, 2]
    assert [axis["name"] for axis in program.signature["grid"]] == ["x", "y"]


def test_constraints_and_masks_are_inside(tiny, tmp_path):
    spec = tiny.spec((8, 6))
    window = tiny.window(spec)
    mask = np.ones((3, 8, 6, 2), np.float32)
    mask[:, :2] = 0
    window = Window.of(window.frames * mask[:, None], spec, mask=mask)

    class KeepsSum(nnx.Module):
        def project(self, frame, previous, context):
            missing = (previous - frame).sum((1, 2), keepdims=True) / context.mask.sum((1, 2), keepdims=True)
            return frame + missing * context.mask

    normalizer = Normalizer(spec, [0.5, 0.1], [1.0, 2.0], [0.3, 0.4], masked=True)
    stepper = ResidualConfig().build(spec, tiny.model(2, 2), normalizer, (KeepsSum(),))
    program = load_exported(export(stepper, tmp_path / "e", platforms=("cpu",)))
    assert [entry["name"] for entry in program.signature["inputs"]] == ["frames", "mask"]
    found = program(frames=window.frames[:, :1], mask=mask)
    assert_allclose(found, reference(stepper, window, 1), rtol=1e-5, atol=1e-6)
    assert_allclose(found[:, 0, ..., 0].sum((1, 2)), window.frames[:, 0, ..., 0].sum((1, 2)), rtol=1e-4)
    assert not np.asarray(found)[:, :, :2].any()


def test_the_clock_goes_on_over_the_steps(tiny, tmp_path):
    spec = tiny.spec((8, 6), time_step=0.5)

    class ShowsTime(nnx.Module):
        def project(self, frame, previous, context):
            return jnp.zeros_like(frame) + context.time[:, None, None, None]

    stepper = ResidualConfig().build(spec, tiny.model(2, 2), Normalizer.identity(spec), (ShowsTime(),))
    program = load_exported(export(stepper, tmp_path / "e", steps=3, platforms=("cpu",)))
    names = [entry["name"] for entry in program.signature["inputs"]]
    assert "time" in names
    window = tiny.window(spec, times=np.float32(0.5) * np.arange(4, dtype=np.float32)[None].repeat(3, 0))
    found = program(**arguments_of(stepper, window, 3, names))
    assert_allclose(found[:, :, 0, 0, 0], np.tile([0.5, 1.0, 1.5], (3, 1)), rtol=1e-6)
    assert_allclose(found, reference(stepper, window, 3), rtol=1e-6)


@pytest.mark.parametrize("name", ["bundled", "interval", "members", "gaussian", "residual", "persistence"])
def test_programs_that_cannot_be_called_in_a_row_say_so(tmp_path, name):
    """Calls of one step, each from what the last one gave, are a rollout exactly where the signature says so."""
    stepper = every_stepper.stepper_of("residual" if name == "members" else name)
    if name == "interval":
        stepper = averaged(stepper)
    if name == "members":
        graph, numbers = nnx.split(stepper)
        stepper = stack_members([stepper, nnx.merge(graph, jax.tree.map(lambda a: a * 1.5, numbers))])
    data = every_stepper.data_of("residual" if name == "members" else name)
    window = Window.of(np.stack([data[channel].values for channel in stepper.spec.names], -1), stepper.spec)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        program = load_exported(export(stepper, tmp_path / "e", platforms=("cpu",)))
    frames = np.asarray(window.frames[:, : stepper.history])
    for _ in range(4):
        frames = np.concatenate([frames, program(frames=frames[:, -stepper.history :])], axis=1)
    continues = np.allclose(frames[:, stepper.history :], reference(stepper, window, 4), rtol=1e-4, atol=1e-5)
    assert continues == (name in ("gaussian", "residual", "persistence"))
    assert program.signature["continues"] == continues
    said = "call the program once, exported with --steps N"
    assert (said in (tmp_path / "e/README.md").read_text()) == (not continues)
    assert any(said in str(warning.message) for warning in told) == (not continues)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(stepper, tmp_path / "several", steps=2, platforms=("cpu",))


def test_it_runs_without_physml(tiny, tmp_path):
    """The lines of the README, then batches of 1 and 5, in a process that cannot import physml."""
    stepper = trained(tiny, ResidualConfig(history=2), parameters=("viscosity",))
    folder = export(stepper, tmp_path / "e", steps=3)
    assert sorted(os.listdir(folder)) == ["README.md", "signature.json", "step.stablehlo"]
    assert "pip install jax flatbuffers" in (folder / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in lines.splitlines() if line]) == 6
    expected = {}
    for batch in (1, 5):
        parameters = np.random.default_rng(batch).random((batch, 1)).astype("f4")
        window = tiny.window(stepper.spec, batch=batch, parameters=parameters)
        np.savez(tmp_path / f"{batch}.npz", frames=window.frames[:, :2], parameters=parameters)
        expected[batch] = reference(stepper, window, 3)
    program = f"""{ALONE}
import os
os.chdir({str(folder)!r})
{lines}
assert prediction.shape == (1, 3, 16, 12, 2)
for batch in (1, 5):
    given = np.load(f"../{{batch}}.npz")
    np.save(f"../{{batch}}.npy", program.call(given["frames"], given["parameters"]))
try:
    import physml
except ImportError:
    print("alone")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alone"
    for batch, frames in expected.items():
        assert_allclose(np.load(tmp_path / f"{batch}.npy"), frames, rtol=1e-5, atol=1e-6)


class Part(nnx.Module):
    """A stepper around any function of frames."""

    def __init__(self, spec, function):
        self.spec, self.history, self.function = spec, 1, function

    def encode(self, frames, context):
        return frames[:, -1]

    def advance(self, state, context):
        return self.function(state)

    def decode(self, state):
        return state


class Drawing(Part):
    """Draws in `encode` too, and drops numbers when it is trained."""

    def __init__(self, spec, history=1):
        super().__init__(spec, None)
        self.history, self.dropout = history, nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def encode(self, frames, context):
        shape = (context.time.shape[0], *self.spec.grid.shape, 2)
        return jax.random.normal(context.key, shape) + (frames[:, -1] if self.history else 0)

    def advance(self, state, context):
        return self.dropout(state) + jax.random.normal(context.key, state.shape)


def test_programs_draw_in_every_step_and_drop_nothing(tmp_path, spec, window):
    stepper, key = Drawing(spec), jax.random.key(3)
    stepper.train()
    program = load_exported(export(stepper, tmp_path / "e", steps=2, platforms=("cpu",)))
    assert not stepper.dropout.deterministic  # that of the caller is left as it was
    found = program(frames=window.frames[:, :1], key=key)
    stepper.eval()
    assert_allclose(found, reference(stepper, window, 2, key), rtol=1e-6)


def test_a_program_that_reads_nothing_is_told_the_batch(tmp_path, spec):
    program = load_exported(export(Drawing(spec, history=0), tmp_path / "e", platforms=("cpu",)))
    first, key = [entry["name"] for entry in program.signature["inputs"]]
    assert key == "key"
    assert program(**{first: np.zeros(3), key: jax.random.key(0)}).shape == (3, 1, *spec.grid.shape, 2)


def test_what_cannot_be_exported_says_why(tiny, tmp_path, spec, window):
    def by_halves(state):  # code that counts the batch
        half = max(len(range(state.shape[0])) // 2, 1)
        return jnp.concatenate([2 * state[:half], state[half:]])

    with pytest.raises(ConfigError, match=r"Part cannot be exported for a batch of any size.*batch=4 \(--batch 4\)"):
        export(Part(spec, by_halves), tmp_path / "e")
    program = load_exported(export(Part(spec, by_halves), tmp_path / "four", batch=4, platforms=("cpu",)))
    frames = np.ones((4, 1, 8, 6, 2), np.float32)
    assert_array_equal(program(frames=frames)[:, 0, 0, 0, 0], [2, 2, 1, 1])
    with pytest.raises(ConfigError, match=r"frames has shape \(3, .*but \(4, 1, 8, 6, 2\) was expected"):
        program(frames=frames[:3])

    def by_python(state):
        shape = jax.ShapeDtypeStruct(state.shape, state.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) * 2, shape, state)

    with pytest.raises(ConfigError, match="Part cannot be exported.*callback into Python|cannot be exported"):
        export(Part(spec, by_python), tmp_path / "e", batch=2, platforms=("cpu",))

    def by_library(state):
        shape = jax.ShapeDtypeStruct(state.shape, state.dtype)
        return jax.ffi.ffi_call("someones_kernel", shape)(state)

    with pytest.raises(ConfigError, match="calls a library that is not part of the program"):
        export(Part(spec, by_library), tmp_path / "e", batch=2, platforms=("cpu",))
    plain = Part(spec, lambda state: 2 * state)
    for options, match in (
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch 0"),
        ({"batch": "any"}, "batch 'any'"),
        ({"platforms": ("gpu",)}, "platforms are .*rocm"),
        ({"platforms": ()}, "platforms are"),
        ({"platforms": "gpu"}, r"platforms are \('gpu',\)"),
        ({"steps": "3"}, "steps is '3'"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"batch": True}, "batch True"),
        ({"batch": "4"}, "batch '4'"),
        ({"batch": 4.0}, "batch 4.0"),
    ):
        with pytest.raises(ConfigError, match=match):
            export(plain, tmp_path / "e", **options)
    assert sorted(os.listdir(tmp_path)) == ["four"]


def test_whole_numbers_of_any_kind(spec, tmp_path):
    plain = Part(spec, lambda state: 2 * state)
    program = load_exported(export(plain, tmp_path / "e", steps=np.int32(2), batch=np.int64(2), platforms="cpu"))
    about = program.signature
    assert (about["steps"], about["batch"], about["platforms"]) == (2, 2, ["cpu"])
    assert program(frames=np.ones((2, 1, 8, 6, 2))).shape == (2, 2, 8, 6, 2)


def test_only_steppers_are_exported(tiny, spec, tmp_path):
    for other in (tiny.model(2, 2), ResidualConfig(), ResidualConfig, None):
        with pytest.raises(ConfigError, match="is no stepper.*physml.load"):
            export(other, tmp_path / "e")
    assert not os.listdir(tmp_path)


def test_keys_of_either_kind(tmp_path):
    """Typed keys and their words draw the same."""
    stepper = every_stepper.stepper_of("refiner")
    program = load_exported(export(stepper, tmp_path / "e", platforms=("cpu",)))
    given = {entry["name"]: np.ones([2 if s == "batch" else s for s in entry["shape"]], entry["dtype"])
             for entry in program.signature["inputs"]}  # fmt: skip
    key = jax.random.key(3)
    typed = program(**given | {"key": key})
    assert_array_equal(typed, program(**given | {"key": jax.random.key_data(key)}))
    assert_array_equal(jax.jit(lambda key: program(**given | {"key": key}))(key).shape, typed.shape)
    with pytest.raises(ConfigError, match="key is 0, but|key has shape"):
        program(**given | {"key": 0})
    with pytest.raises(ConfigError, match="key has shape"):
        program(**given | {"key": jax.random.key(0, impl="rbg")})
    with pytest.raises(ConfigError, match="frames is a random key, but numbers"):
        program(**given | {"frames": key})


def test_the_loader_refuses_what_is_damaged(spec, tmp_path):
    stepper = Part(spec, lambda state: 2 * state)
    folder = export(stepper, tmp_path / "e", platforms=("cpu",))
    with pytest.raises(CheckpointError, match="exists.*overwrite=True"):
        export(stepper, folder)
    export(stepper, folder, platforms=("cpu",), overwrite=True)
    assert os.listdir(tmp_path) == ["e"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="holds no export"):
        export(stepper, tmp_path / "mine", overwrite=True)
    program = load_exported(folder)
    for given, match in (
        ({}, r"takes \['frames'\], but \[\]"),
        ({"frames": np.ones((2, 1, 8, 6, 2)), "time": 0}, "'time'"),
        ({"frames": np.ones((2, 1, 8, 7, 2))}, r"shape \(2, 1, 8, 7, 2\), but \(2, 1, 8, 6, 2\)"),
        ({"frames": np.float32(1)}, "frames has shape"),
        ({"frames": np.ones((0, 1, 8, 6, 2))}, "frames has shape .*at least one sample"),
        ({"frames": "abc"}, "frames is a str, but numbers"),
        ({"frames": [[1.0], [1.0, 2.0]]}, "frames is a list, but numbers"),
    ):
        with pytest.raises(ConfigError, match=match):
            program(**given)
    content, about = (folder / "step.stablehlo").read_bytes(), json.loads((folder / "signature.json").read_text())
    import hashlib

    for damaged in (content[: len(content) // 2], b"", os.urandom(100)):
        (folder / "step.stablehlo").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated, damaged or exchanged"):
            load_exported(folder)
        matching = {**about, "sha256": hashlib.sha256(damaged).hexdigest()}  # so that jax itself meets it
        (folder / "signature.json").write_text(json.dumps(matching))
        with pytest.raises(CheckpointError, match="cannot be read with jax"):
            load_exported(folder)
        (folder / "signature.json").write_text(json.dumps(about))
    (folder / "signature.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not of format 1"):
        load_exported(folder)
    (folder / "signature.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no exported model"):
        load_exported(folder)
    with pytest.raises(CheckpointError, match="is no exported model"):
        load_exported(tmp_path / "absent")


def test_an_export_that_cannot_be_finished_leaves_the_old_one(spec, tmp_path, monkeypatch):
    folder, rename = export(Part(spec, lambda state: 2 * state), tmp_path / "e", platforms=("cpu",)), os.replace
    window = np.ones((2, 1, 8, 6, 2), np.float32)

    def fail(source, target):
        if os.fspath(target) == os.fspath(folder) and ".partial" in os.fspath(source):
            raise OSError("no space")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            export(Part(spec, lambda state: 3 * state), folder, platforms=("cpu",), overwrite=True)
    assert os.listdir(tmp_path) == ["e"]
    assert_allclose(load_exported(folder)(frames=window), 2 * window)
    export(Part(spec, lambda state: 3 * state), folder, platforms=("cpu",), overwrite=True)
    assert_allclose(load_exported(folder)(frames=window), 3 * window)


def test_what_is_bigger_than_a_file_is_refused(tiny, tmp_path, monkeypatch):
    from physml.saving import exported

    stepper = trained(tiny)
    monkeypatch.setattr(exported, "LARGEST", 1000)
    with pytest.raises(ConfigError, match="at most 2 GiB.*physml.save"):
        export(stepper, tmp_path / "e")


def test_the_verb(capsys, tiny, tmp_path):
    saving.save(trained(tiny), tmp_path / "model")

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", str(tmp_path / "model"), *words])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    assert call("--dry-run")[0] == 0
    assert not (tmp_path / "model/exported").exists()
    code, out, err = call("--platforms", "cpu", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["inputs"] == {"frames": "('batch', 1, 16, 12, 2)"}
    assert load_exported(told["program"]).signature["batch"] == "symbolic"
    assert call("--platforms", "cpu")[0] == 2  # exists
    for words in ([], ["--overwrite", "--steps", "0"], ["--overwrite", "--platforms", "gpu"]):
        assert call("--dry-run", *words)[0] == 2
    assert call("--dry-run", "--overwrite")[0] == 0
    code, _, err = call("--batch", "4", "--steps", "2", "--overwrite", "--out", str(tmp_path / "model/exported"))
    assert code == 0, err
    assert load_exported(tmp_path / "model/exported").signature["platforms"] == ["cpu", "cuda", "tpu"]
    for words, said in ((["--batch", "many"], "--batch is 'many'"), (["--platforms", "gpu"], "platforms are")):
        code, _, err = call(*words, "--out", str(tmp_path / "new"))
        assert code == 2
        assert said in err
    assert saving.load(tmp_path / "model") is not None  # a folder inside it does no harm
    config, signature = FNOConfig(modes=(2, 2), width=4, depth=1), Signature(tiny.spec().grid, 2, 0, 2)
    saving.save_model(config.build(signature, nnx.Rngs(0)), config, signature, tmp_path / "model", overwrite=True)
    assert "FNO is no stepper" in call("--dry-run", "--overwrite")[2]
