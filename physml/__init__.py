"""physml: neural surrogates for PDEs and climate in JAX.

Names are loaded when they are first used, so that `import physml` and `physml --help` stay quick.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

_HOME = {
    "Axis": "physml.fields",
    "Channel": "physml.fields",
    "Context": "physml.fields",
    "Grid": "physml.fields",
    "Signature": "physml.fields",
    "Spec": "physml.fields",
    "Window": "physml.fields",
    "Normalizer": "physml.normalize",
    "Layout": "physml.parallel.mesh",
    "DataConfig": "physml.data",
    "SyntheticConfig": "physml.data",
    "from_array": "physml.data",
    "open_dataset": "physml.data",
    "perturbed": "physml.rollout",
    "rollout": "physml.rollout",
    "stack_members": "physml.steppers",
    "constrain": "physml.steppers.constrained",
    "MassFixer": "physml.constraints",
    "Positivity": "physml.constraints",
    "forecast": "physml.forecast",
    "load": "physml.convert.named",
    "save": "physml.saving",
    "export": "physml.saving.exported",
    "load_exported": "physml.saving.exported",
    "evaluate": "physml.evaluate",
    "predictability": "physml.evaluate",
    "report": "physml.report",
    "Evaluation": "physml.experiment",
    "Experiment": "physml.experiment",
    "load_experiment": "physml.experiment",
    "TrainingConfig": "physml.training",
    "OptimizerConfig": "physml.training",
    "OneStep": "physml.objectives",
    "Unrolled": "physml.objectives",
    "Run": "physml.runs",
    "open_run": "physml.runs",
    "train": "physml.api",
    "score": "physml.api",
    "benchmark": "physml.benchmarks",
}
_MODULES = (
    "benchmarks",
    "constraints",
    "convert",
    "data",
    "errors",
    "metrics",
    "models",
    "objectives",
    "solvers",
    "steppers",
    "training",
)

__all__ = [*sorted(_HOME), *_MODULES, "__version__"]


class _Face(types.ModuleType):
    """Keeps `physml.rollout` the verb: importing the module of the same name would bind the module there."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name):
        if name in _HOME:
            value = getattr(importlib.import_module(_HOME[name]), name)
            setattr(self, name, value)
            return value
        if name in _MODULES:
            return importlib.import_module(f"physml.{name}")
        raise AttributeError(f"module 'physml' has no attribute {name!r}")

    def __dir__(self):
        return __all__


sys.modules[__name__].__class__ = _Face
