"""What the README shows works as it stands there, at a size that suits a test."""

import re
from pathlib import Path

import numpy as np
import pytest

import physml
from physml import solvers
from physml.constraints import CONSTRAINTS
from physml.data.generate import generate
from physml.fields import Axis, Channel, Grid, Spec
from physml.models import MODELS
from physml.models.conv_net import ConvNetConfig
from physml.normalize import Normalizer
from physml.objectives import OBJECTIVES
from physml.solvers import SOLVERS, make_solver
from physml.steppers import FLOORS, STEPPERS, ResidualConfig
from physml.steppers.describe import build_stepper

ROOT = Path(__file__).parents[1]
SMALL = {"solver_points": 32, "substeps": 4, "warmup": 0.0, "precision": "float32"}
OVERRIDES = [
    "data.points=16", "data.trajectories={train: 2, valid: 1, test: 1}", "data.steps=6", "data.test_steps=8",
    f"data.options={SMALL}", "model.width=4", "model.modes=[8]", "training.steps=2", "training.batch=4",
    "evaluation.steps=3", "evaluation.starts=1",
]  # fmt: skip


def test_the_python_example_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    replacements = {
        '"experiments/demo.py"': repr(str(ROOT / "experiments/demo.py")),
        '["training.steps=500"]': repr(OVERRIDES),
        "steps=200": "steps=3",
    }
    for old, new in replacements.items():
        assert old in block, f"{old} is gone from the README: adapt this test"
        block = block.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHYSML_CACHE", str(tmp_path / "cache"))
    generate(make_solver("kolmogorov", points=16, time_step=0.2, **SMALL), tmp_path / "kolmogorov.nc", 1, steps=5)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "report.html").is_file()
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "scores-train.nc").is_file()


def test_the_yaml_example_trains(tmp_path, monkeypatch):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    generate(make_solver("kolmogorov", points=16, time_step=0.2, **SMALL), tmp_path / "kolmogorov.nc", 1, steps=30)
    (tmp_path / "flow.yaml").write_text(block)
    small = ["model.width=4", "model.modes=[4]", "model.depth=1", "training.steps=1", "training.batch=4"]
    run = physml.train("flow.yaml", [*small, "evaluation.steps=2", "evaluation.starts=1"])
    assert run.folder.name == "flow"
    assert set(run.scores["model"].values) == {"flow", "persistence"}


def test_the_strategies_of_the_docs_can_be_built():
    """And no objective or trained stepper is left out."""
    text, names = (ROOT / "docs/training.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/training.md", "exec"), names)
    registered = {*OBJECTIVES.values(), *STEPPERS.values()} - set(FLOORS.values())
    assert {kind.__name__ for kind in registered} <= set(re.findall(r"\w+", text))


def test_the_laws_of_the_docs_can_be_built():
    """And no constraint is left out."""
    text, names = (ROOT / "docs/conservation.md").read_text(), {}
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "stepper" not in block]
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "docs/conservation.md", "exec"), names)
    assert {kind.__name__ for kind in CONSTRAINTS.values()} <= set(re.findall(r"\w+", text))
    np.testing.assert_allclose(np.trapezoid(names["mean"], np.linspace(0, 1, 201)), 0.8, rtol=1e-6)


def test_the_derivatives_of_the_docs():
    """Of a rollout of convolutions, whose tangents have the gradient as their adjoint."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/rollouts.md").read_text(), re.DOTALL)
    spec = Spec(Grid((Axis.uniform("x", 12),)), (Channel("u"),))
    stepper = build_stepper(ResidualConfig(), ConvNetConfig(width=4, depth=1), spec, Normalizer.identity(spec))
    random = np.random.default_rng(0)
    shapes = {"frames": (1, 1, 12, 1), "error": (1, 1, 12, 1), "weights": (1, 20, 12, 1)}
    names = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names["stepper"] = stepper
    exec(compile(block, "docs/rollouts.md", "exec"), names)
    forward, backward = (np.vdot(names[a], names[b]) for a, b in (("weights", "change"), ("sensitivity", "error")))
    np.testing.assert_allclose(forward, backward, rtol=1e-4)
    assert names["curvature"].shape == names["frames"].shape
    assert np.any(names["curvature"])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()))))
def test_links_lead_somewhere(link):
    assert "://" in link or (ROOT / link).exists()


def test_every_model_and_solver_is_named():
    named = set(re.findall(r"`(\w+)`", (ROOT / "README.md").read_text()))
    assert {*MODELS, *SOLVERS} <= named
    assert {config.__name__ for config in SOLVERS.values()} <= set(solvers.__all__)


def test_commands_of_the_readme_exist():
    from physml import cli

    words = re.findall(r"^physml (\w+)(?: (\w+))?", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert words
    for verb, second in words:
        assert verb in cli.VERBS or (verb == "data" and second in cli.DATA_VERBS)
