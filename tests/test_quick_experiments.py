"""Experiments run from end to end at a size that says nothing about their results."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NUMBER = r"([-+]?\d[-+0-9.e]*)"

# Arguments, and how lines of what is printed begin; each ends with a number.
RUNS = {
    "all_to_all": (
        "--quick",
        rf"small eddies neighbors, 20 updates / all pairs: {NUMBER}", rf"scOT, pretrained.*AG {NUMBER}",
    ),
    "averaged_intervals": ("--quick", rf"At lead \d+, averaged / fixed interval 1: {NUMBER}"),
    "drift": ("--quick --models FNO --out out", rf"\| FNO \| height \| {NUMBER} \|"),
    "invariance": ("--quick --out out", rf"solver, finite volumes +{NUMBER}", rf"the same, 64 bits +{NUMBER}"),
    "ks_refiner": (
        "--arms mse refiner --updates 8 --batch 4 --trajectories 2 --tests 4 --leads 4 --members 2 --true-from 8 "
        "--out out",
        rf"\nmse +{NUMBER}", rf"\nrefiner .* {NUMBER}\n", rf"time_true_from_8={NUMBER}",
    ),
    "sinenet": ("--quick --arms periodic zero --folder out", rf"zero / periodic +{NUMBER}"),
    "temporal_stencil": ("--quick --folder out", rf"temporal stencil / learned interpolation: {NUMBER}"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_a_quick_run_ends_with_its_figures(name, tmp_path):
    arguments, *lines = RUNS[name]
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in lines:
        found = re.search(line, done.stdout)
        assert found, f"no line like {line!r} in\n{done.stdout[-3000:]}"
        assert math.isfinite(float(found[1]))
