"""Converted models reproduce what the authors' code computed, tensor by tensor."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from physml.convert import FAMILIES

CASES = sorted(path.parent for path in Path(__file__).parent.glob("*/*/config.json"))
# float32 runs of the authors' own code differ from their float64 runs by up to 1e-6 of the output range.
TOLERANCE = 1e-5
# Tests compile without optimization, whose plain sums are less exact. Attention by cosines times 100 shows it: errors
# of up to 1.8e-5 on some processors, where the program that users run has 6e-6. It is replayed as they run it.
OPTIMIZED = {"poseidon_scot/unconditioned"}
SLOW = {  # another case of the architecture is quick
    "poseidon_scot/unconditioned", "sinenet/sinenet2_cond_adagn", "sinenet/sinenet3_zeros", "fno/fno2d_nopos_preact",
    "modern_unet/unetmod2d_midattn", "pderefiner/refiner2d",
}  # fmt: skip


def named(case):
    name = f"{case.parent.name}/{case.name}"
    return pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW))


def replay(case: Path) -> dict[str, np.ndarray]:
    family, config = FAMILIES[case.parent.name], json.loads((case / "config.json").read_text())
    model = family.build(config, load_file(case / "weights.safetensors"))
    return family.replay(model, config, load_file(case / "io.safetensors"))


def replay_in(environment: dict[str, str], case: Path, folder: Path) -> dict[str, np.ndarray]:
    """`replay` in a process of its own."""
    command = [sys.executable, __file__, str(case), str(folder / "outputs.safetensors")]
    subprocess.run(command, check=True, env=environment, timeout=300)
    return load_file(folder / "outputs.safetensors")


@pytest.mark.parametrize("case", map(named, CASES))
def test_replay_reproduces_every_recorded_tensor(case, tmp_path, users_environment):
    family, io = FAMILIES[case.parent.name], load_file(case / "io.safetensors")
    optimized = f"{case.parent.name}/{case.name}" in OPTIMIZED
    outputs = replay_in(users_environment, case, tmp_path) if optimized else replay(case)
    expected = {name: value for name, value in io.items() if not name.startswith("in.") and name not in family.inputs}
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert outputs[name].shape == value.shape
        error = np.abs(outputs[name] - value).max() / np.abs(value).max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


def test_all_cases_are_here():
    assert len(CASES) >= 7


if __name__ == "__main__":
    save_file({name: np.array(value) for name, value in replay(Path(sys.argv[1])).items()}, sys.argv[2])
