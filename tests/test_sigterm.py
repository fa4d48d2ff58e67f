"""Real SIGTERMs to this process: the first is a request, the second an end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from bitdistill_ray.sigterm import Terminated, sigterm_calls, terminable


def test_sigterm_is_an_interrupt_while_the_block_runs() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="told to stop"), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def python_hears_sigint() -> Iterator[None]:
    """Whatever an earlier test in this process left there: Ray Train's own handler stays after a `fit`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.default_int_handler)


@pytest.mark.usefixtures("python_hears_sigint")
def test_what_interrupted_a_wait_for_ray_is_told_apart() -> None:
    """Ray's waiting calls swallow the handler's exception and raise one of their own."""

    def wait(number: int) -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Terminated), terminable():
        wait(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, terminable():
        wait(signal.SIGINT)
    assert not isinstance(caught.value, Terminated)


def test_the_first_one_asks_and_the_second_ends() -> None:
    called = threading.Event()
    with terminable():
        for _ in range(2):  # each block listens anew
            called.clear()
            with pytest.raises(Terminated), sigterm_calls(called.set):  # noqa: PT012
                os.kill(os.getpid(), signal.SIGTERM)
                assert called.wait(60)
                os.kill(os.getpid(), signal.SIGTERM)


def test_other_threads_leave_the_handler_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        with terminable(), sigterm_calls(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
