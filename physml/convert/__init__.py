"""Weights of other libraries. `FAMILIES` maps the name of a source to how its models are built and checked."""

from physml.convert.cfdbench import CFDBENCH_FAMILY
from physml.convert.families import Family
from physml.convert.fno import FNO_FAMILY

FAMILIES: dict[str, Family] = {"cfdbench": CFDBENCH_FAMILY, "fno": FNO_FAMILY}
