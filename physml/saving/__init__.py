"""Models on disk: one folder per model, written whole or not at all, read without executing anything."""

from physml.saving.folder import load, save, save_model
from physml.saving.partial import LoadReport, StartFrom, load_into
from physml.steppers.describe import build_stepper

__all__ = ["LoadReport", "StartFrom", "build_stepper", "load", "load_into", "save", "save_model"]
