"""SIGTERM announces that the machine will be taken away: save the run, then end.

A command that ends with code `PREEMPTED` has saved and should be started again.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the same command may succeed later.
PREEMPTED = 75


class Preempted(Exception):
    """The run has saved all it needs and ends early."""


class Preemption:
    """Tells when a run should save and end; use as a context manager around the steps.

    With one process SIGTERM is noted here. With several, JAX's coordination service notes it on any
    host and picks a step after which all of them stop.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step; call it once after every step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def __enter__(self) -> "Preemption":
        # Python lets only the main thread listen; the service of several processes does itself.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
