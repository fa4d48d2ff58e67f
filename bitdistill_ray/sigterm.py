"""SIGTERM to the command itself: a job that is stopped, or a node that takes its driver along.

Everywhere it ends the command as Ctrl-C does, in one line; while workers train, it first lets them save.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process was told to go."""

    def __init__(self) -> None:
        super().__init__("told to stop (SIGTERM)")


@contextmanager
def terminable() -> Iterator[None]:
    """While the block runs, SIGTERM raises Terminated in the main thread.

    A main thread that waits for Ray gets Ray's own KeyboardInterrupt instead, whichever signal came: told apart here.
    """
    told = threading.Event()

    def heard(*_: object) -> None:
        told.set()
        raise Terminated

    with _handled_by(heard):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if told.is_set() and not isinstance(interrupt, Terminated):
                raise Terminated from None
            raise


@contextmanager
def sigterm_calls(act: Callable[[], object]) -> Iterator[None]:
    """While the block runs, the first SIGTERM calls `act()` in a thread; the next does what it did before the block."""

    def heard(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        threading.Thread(target=act, name="sigterm").start()

    with _handled_by(heard) as before:
        yield


@contextmanager
def _handled_by(handler: Callable[..., None]) -> Iterator[Any]:
    """Yields the handler before this one; other threads than the main one can set none and change nothing."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: set by something other than Python
    if threading.current_thread() is not threading.main_thread():
        yield before
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield before
    finally:
        signal.signal(signal.SIGTERM, before)
