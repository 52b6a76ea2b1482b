"""SIGTERM and SIGINT ask a long loop to save and stop at the next boundary; a second signal acts as usual."""

import signal
import threading

import jax
import numpy as np


class Signals:
    """Context manager; `received` is the name of the first signal, or empty.

    The second signal finds the handlers that were there before, so that a user who insists gets out at once.
    Outside the main thread Python delivers no signals, and nothing is installed.
    """

    def __init__(self):
        self.received = ""
        self._before = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _handle(self, number, _frame) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: installed from C (a cluster's preemption notice), which Python cannot put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def agreed(self) -> bool:
        """Whether any process was asked to stop. With several processes it is a collective: all of them call it."""
        if jax.process_count() == 1:
            return bool(self.received)
        from jax.experimental import multihost_utils

        flags = multihost_utils.process_allgather(np.asarray([bool(self.received)], np.int32))
        return bool(np.asarray(flags).any())
