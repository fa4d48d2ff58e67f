"""Waiting for a teacher that Ray starts again.

A call to an actor that is being restarted fails at once: whoever asks again without waiting has used up all attempts
before the process is there.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

PAUSE_S = 0.2


def await_restart(handle: Any, timeout_s: float) -> bool:
    """Return True as soon as the actor takes calls (after those it already has), False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            ray.get(handle.__ray_ready__.remote(), timeout=left)
        except RayActorError:
            time.sleep(PAUSE_S)
        except GetTimeoutError:
            return False
        else:
            return True
    return False
