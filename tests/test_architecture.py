"""The layer table of the design, held as data: a module imports only from rows below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (  # lowest first; names on one row never import each other
    ("errors", "fields", "interrupt", "progress"),
    ("contracts", "coding", "files"),
    ("parallel",),
    ("layers", "solvers", "normalize"),
    ("models", "constraints", "metrics", "data"),
    ("steppers", "rollout"),
    ("objectives", "saving"),
    ("forecast",),
    ("training", "evaluate", "report", "convert"),
    ("experiment",),
    ("runs",),
    ("api",),
    ("benchmarks",),
    ("verbs",),
    ("cli",),
    ("__main__",),
)
SAME_ROW = {("fields", "errors")}  # the only step sideways: typed errors for specs
ROW = {name: i for i, row in enumerate(ROWS) for name in row}


def modules():
    for path in sorted((ROOT / "physml").rglob("*.py")):
        parts = path.relative_to(ROOT / "physml").with_suffix("").parts
        if parts != ("__init__",):
            yield pytest.param(path, parts[0], id="/".join(parts))


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import, line {node.lineno}")
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"physml.{a.name}" for a in node.names] if node.module == "physml" else [node.module]
        for name in names:
            if name.startswith("physml."):
                yield node.lineno, name.split(".")


@pytest.mark.parametrize(("path", "package"), modules())
def test_imports_point_down(path, package):
    assert package in ROW, f"{package} is in no row of the layer table"
    for line, target in imports(path):
        other = target[1]
        if other in ("__version__", package):
            continue
        lower = ROW[other] < ROW[package]
        assert lower or (package, other) in SAME_ROW, f"{path}:{line}: {package} (row {ROW[package]}) imports {other}"


def test_no_model_imports_a_model():
    names = {path.stem for path in (ROOT / "physml/models").glob("*.py")} - {"__init__", "named"}  # registries
    for name in names:
        for line, target in imports(ROOT / f"physml/models/{name}.py"):
            assert target[1:2] != ["models"], f"models/{name}.py:{line} imports {'.'.join(target)}"


def test_help_loads_nothing_heavy():
    """`physml --help` answers in under a second because no numerical package is loaded for it."""
    code = (
        "import sys; sys.argv = ['physml', '--help']\n"
        "from physml.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'jax', 'flax', 'xarray', 'matplotlib', 'orbax', 'grain', 'scipy', 'netCDF4'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
