"""SIGTERM, and a node that is about to be taken away: save at the next step boundary, all ranks together.

A worker that is told to go raises a flag; the flag travels with the counts that the ranks add up in every step anyway,
so that all of them see it in the same step and save together.  A driver that is told to go tells the monitor, and rank
0 hears of it in the reply to its next row.  Ray learns of draining nodes by itself and tells the ranks in a barrier,
which is asked every so many steps.

Python runs signal handlers on the main thread only, and Ray Train runs a worker's loop on another one, so the handler
is set by a pending call, which the interpreter makes on the main thread.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError

from bitdistill_ray.errors import BitdistillError


class PreemptedError(Exception):
    """This attempt saved and ended because one of its workers was told to; the next one goes on from there."""


def preempted(error: BaseException, where: str) -> BitdistillError | None:
    """What to say of a stage that ended because a worker was told to go, None of any other failure."""
    if PreemptedError.__name__ not in str(error):
        return None
    return BitdistillError(where, "a worker was told to stop (SIGTERM) and no restart is left (student.max_failures)",
                           "Give the same command again; it goes on from the step that was saved")  # fmt: skip


class Notice:
    """Whether this rank was told to go.  One object in each process."""

    def __init__(self, *, check_every: int) -> None:
        self.check_every = check_every
        self.told, self.listening = threading.Event(), threading.Event()
        self.drain_seen = False
        self._reply: Any = None
        self._keep: Callable[..., int] | None = None  # ctypes does not

    def listen(self) -> None:
        """Take SIGTERM from now on; Ray's own handler would end the process in the middle of a step."""

        def install(_: object) -> int:
            signal.signal(signal.SIGTERM, self._heard)
            self.listening.set()
            return 0

        if threading.current_thread() is threading.main_thread():
            install(None)
            return
        self._keep = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(install)
        ctypes.pythonapi.Py_AddPendingCall(self._keep, None)

    def hear(self, reply: Any) -> None:
        """`reply`, a reference, will say whether the run is to stop; of several on their way the oldest counts."""
        self._reply = self._reply or reply

    def is_told(self) -> bool:
        """Whether this rank was told to go, or the driver, as far as a reply has come; waits for nothing."""
        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            with suppress(RayError):  # a row that could not be written is the next checkpoint's matter
                if ray.get(self._reply):
                    self.told.set()
            self._reply = None
        return self.told.is_set()

    def draining(self, step: int) -> bool:
        """True once, when Ray says that a node of this attempt is about to go; collective in the steps it asks."""
        if self.drain_seen or (step + 1) % self.check_every:
            return False
        self.drain_seen = ray.train.get_preemption_info() is not None
        return self.drain_seen

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        self.told.set()
