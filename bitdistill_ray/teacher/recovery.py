"""Telling a teacher that takes calls from one that Ray is starting again.

A call to an actor that is being restarted fails at once: whoever asks again without waiting has used up all attempts
before the process is there.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

PAUSE_S = 0.2


def is_ready(handle: Any, timeout_s: float) -> bool:
    """True as soon as the actor takes calls (after those it already has); False, after a pause, where it is lost."""
    try:
        ray.get(handle.__ray_ready__.remote(), timeout=timeout_s)
    except RayActorError:
        time.sleep(PAUSE_S)
        return False
    except GetTimeoutError:
        return False
    return True
