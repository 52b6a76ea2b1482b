"""Checkpoints: exact, atomic, the newest and the best, and readable after damage."""

import logging
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

from physml.errors import CheckpointError
from physml.parallel.mesh import Layout
from physml.training.checkpoint import Checkpoints, check_fits, fingerprints


def tree(value=0.0, dtype=jnp.float32):
    params = {
        "noise": jnp.asarray(np.random.default_rng(0).standard_normal((60, 50)), jnp.float32),  # does not compress
        "layers": {"0": jnp.full((4, 3), value, dtype), "1": jnp.full(3, value, jnp.float32)},
        "none": jnp.zeros(0),
    }
    return {
        "params": params, "optimizer": optax.adam(1e-3).init(params), "average": None,
        "key": jax.random.key_data(jax.random.key(3)), "step": jnp.int32(value),
    }  # fmt: skip


def placed(value=0.0, layout=None):
    return (layout or Layout()).replicate(tree(value))


@pytest.fixture
def saved(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, placed(step), {"loader": {"step": step}, "best": {"value": 0.5}})
    return tmp_path


def files(folder, pattern="*"):
    return [path for path in folder.rglob(pattern) if path.is_file()]


def test_everything_comes_back(saved):
    with Checkpoints(saved) as checkpoints:
        arrays, data = checkpoints.restore(placed())
    assert data["loader"] == {"step": 3}
    assert data["best"] == {"value": 0.5}
    assert jax.tree.structure(arrays) == jax.tree.structure(tree())  # optax's own containers, None, empty arrays
    for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(tree(3)), strict=True):
        assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("layout", [Layout(data=1), Layout(data=2), Layout(data=2, space=2)])
def test_onto_any_layout(saved, layout):
    with Checkpoints(saved) as checkpoints:
        arrays, _ = checkpoints.restore(placed(layout=layout))
    kernel = arrays["params"]["layers"]["0"]
    assert kernel.sharding == layout.replicated()
    assert_array_equal(kernel, 3)


def test_the_newest_and_the_best_stay(tmp_path):
    for mode, best in (("min", 1), ("max", 3)):
        with Checkpoints(tmp_path / mode, keep=2, mode=mode) as checkpoints:
            for step, score in enumerate([5.0, 1.0, 7.0, 9.0, None, None, 6.0]):
                checkpoints.save(step, placed(step), {}, score if step != 3 or mode == "max" else None)
            checkpoints.wait()
            assert checkpoints.steps == [best, 5, 6]


def test_no_checkpoint_is_no_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(placed()) is None
        with pytest.raises(CheckpointError, match="no complete checkpoint 4. There are none"):
            checkpoints.restore(placed(), 4)


def test_saving_does_not_wait_and_arrays_may_be_overwritten(tmp_path):
    """The state is donated to the next update while the checkpoint is being written."""
    layout = Layout()
    grow = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=layout.replicated())
    state = layout.replicate(jnp.zeros((1500, 1000)))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 4):
            state = grow(state)
            checkpoints.save(step, {"a": state}, {})
            for _ in range(3):
                state = grow(state)
        checkpoints.wait()
        for step in range(1, 4):
            arrays, _ = checkpoints.restore({"a": state}, step)
            assert_array_equal(np.unique(arrays["a"]), [4 * (step - 1) + 1])


def damage_truncate(folder):
    for path in files(folder / "state" / "d") + files(folder / "state", "d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_remove_arrays(folder):
    for path in files(folder / "state", "manifest.ocdbt"):
        path.unlink()


def damage_metadata(folder):
    (folder / "_CHECKPOINT_METADATA").write_text("{")


def damage_tree(folder):
    (folder / "state" / "_METADATA").write_text("")


def damage_one_bit(folder):
    """Of an array that is large enough to be stored by itself."""
    path = max(files(folder / "state"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES = [damage_truncate, damage_remove_arrays, damage_metadata, damage_tree, damage_one_bit]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(saved, damage, caplog):
    damage(saved / "3")
    with caplog.at_level(logging.WARNING), Checkpoints(saved) as checkpoints:
        arrays, data = checkpoints.restore(placed())
        assert data["loader"] == {"step": 2}
        assert_array_equal(arrays["params"]["layers"]["1"], 2)
        checkpoints.save(3, placed(30), {"loader": {"step": 3}})  # the damaged one gives way
        checkpoints.wait()
        assert_array_equal(checkpoints.restore(placed())[0]["params"]["layers"]["1"], 30)
    assert re.search(r"/3 is damaged and is passed over: \S+", caplog.text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_fingerprints_see_every_bit_and_no_layout(dtype):
    random = np.random.default_rng(2)
    array = jnp.asarray(random.integers(0, 2, (8, 6))).astype(dtype)
    before = fingerprints({"a": array})
    for index in np.ndindex(8, 6):
        changed = array.at[index].set((1 - array[index].astype("int32")).astype(dtype))
        assert fingerprints({"a": changed}) != before
    split = jax.device_put(array, Layout(data=4).window_sharding())
    assert fingerprints({"a": split}) == before
    assert fingerprints({"a": array[::-1]}) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_large_and_small_arrays_share_one_fingerprint(dtype):
    from physml.training.checkpoint import _sum_on_device

    array = jnp.asarray(np.random.default_rng(1).integers(0, 100, (7, 5))).astype(dtype)
    assert fingerprints({"a": array})["a"] == int(_sum_on_device(array))


def test_nothing_but_damage_is_an_error(saved):
    for step in ("2", "3"):
        damage_truncate(saved / step)
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match="No checkpoint in .* can be read"):
        checkpoints.restore(placed())


def test_an_unfinished_checkpoint_does_not_count(saved):
    """What a process killed while saving leaves behind: a temporary folder, or no mark of completion."""
    leftover = saved / "4.orbax-checkpoint-tmp"
    (leftover / "state").mkdir(parents=True)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps == [2, 3]
        assert checkpoints.restore(placed())[1]["loader"] == {"step": 3}


@pytest.mark.parametrize("own", [True, False])
def test_what_others_are_writing_stays(saved, own):
    """Orbax removes what a killed process left in the background."""
    unfinished = saved / "4.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    with Checkpoints(saved, own=own):
        for _ in range(100 if own else 10):
            if not unfinished.exists():
                break
            time.sleep(0.1)
    assert unfinished.exists() != own


def test_mismatches_are_a_short_table(saved):
    other = placed()
    other["params"]["layers"] = {"0": jnp.zeros((4, 5)), "2": jnp.zeros(3)}
    other["step"] = jnp.zeros((), jnp.float32)
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(Layout().replicate(other))
    text = str(caught.value)
    assert "missing     params/layers/2 (3,) float32" in text
    assert "unexpected  params/layers/1 (3,) float32" in text
    assert "differs     params/layers/0 saved (4, 3) float32, expected (4, 5) float32" in text
    assert "differs     step saved () int32, expected () float32" in text  # Orbax alone would cast silently
    many = {f"a{i}": ((1,), "float32") for i in range(30)}
    with pytest.raises(CheckpointError, match="and 20 more") as caught:
        check_fits({}, many, "x")
    assert len(str(caught.value).splitlines()) == 13


def test_a_later_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr("physml.training.checkpoint.FORMAT", 2)
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match="format 1, but this version reads 2"):
        checkpoints.restore(placed())


def test_rewinding_deletes_later_ones(saved):
    with Checkpoints(saved) as checkpoints:
        checkpoints.discard_after(2)
        assert checkpoints.steps == [2]
