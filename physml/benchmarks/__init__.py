"""The field's benchmarks under their own protocols: `physml.benchmark("cfdbench")`."""

from physml.benchmarks.contenders import CONTENDERS
from physml.benchmarks.run import benchmark
from physml.benchmarks.suites import BENCHMARKS

__all__ = ["BENCHMARKS", "CONTENDERS", "benchmark"]
