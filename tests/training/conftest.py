"""Lets the tests import problem.py, which they share with the processes they start."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
