"""Models on disk: one folder per model, written whole or not at all, read without executing anything."""

from physml.saving.folder import load, save, save_model, write_text
from physml.steppers.describe import build_stepper

__all__ = ["build_stepper", "load", "save", "save_model", "write_text"]
