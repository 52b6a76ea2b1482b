"""A training in a process of its own: python worker.py FOLDER SIGNAL STEP CONFIG-JSON.

Sends itself SIGNAL as soon as STEP is reported; exits with the documented code when it is interrupted. Joins a
multi-process run when the environment describes one.
"""

import json
import os
import pathlib
import signal
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import problem  # noqa: E402

from physml.errors import Interrupted  # noqa: E402
from physml.parallel.mesh import Layout, start_distributed  # noqa: E402
from physml.training import fit  # noqa: E402


class Trap:
    def __init__(self, number, step):
        self.number, self.step = number, step

    def message(self, text):
        pass

    def update(self, done, total, **values):
        if done >= self.step:
            self.step = total + 1
            os.kill(os.getpid(), self.number)


if __name__ == "__main__":
    folder, name, step, fields = sys.argv[1:]
    start_distributed()
    trap = Trap(getattr(signal, name), int(step))
    try:
        fit(
            problem.build_stepper(), problem.datasets(), problem.OBJECTIVE, problem.config(**json.loads(fields)),
            Layout(), folder, progress=trap,
        )  # fmt: skip
    except Interrupted as stop:
        print(stop)
        sys.exit(stop.exit_code)
