"""When a teacher pool grows and when it shrinks: a pure function of what was measured, with its reason in words.

Two shares decide.  *Wait*: the part of the slowest student's time that it spent waiting for teachers; if it is `w`, the
students could take `1 / (1 - w)` times as many answers, so that many times as many teachers are wanted.  *Idle*: the
part of the teachers' time in which they computed nothing.  Students that wait while teachers idle are waiting for
something else (the corpus, the wire, too small a window of requests), which more teachers would not mend.

A pool must not swing back and forth: the threshold for growing lies far from the one for shrinking, a change needs
`PATIENCE` windows in a row that ask for it, and the history is begun anew after each change (the cooldown).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GROW_WAIT = 0.10  # share of a student's time: a step costs more than 1.1 x the step that waits for nothing
SHRINK_WAIT = 0.02
BUSY_ENOUGH = 0.70  # how busy the others may become by one that goes
IDLE_TOO_MUCH = 0.50
PATIENCE = 2
FASTEST = 2  # times as many teachers in one change


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many teachers there may be, both ends included."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One window.  `wait_share` is None while no student is there, `idle_share` while no teacher has been measured."""

    teachers: int
    wait_share: float | None
    idle_share: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """How many teachers there should be, and why."""

    teachers: int
    reason: str


def decide(history: Sequence[Observation], bounds: Bounds) -> Decision | None:
    """A change for the pool whose windows since the last change are `history` (oldest first), or None."""
    if not history:
        return None
    now, recent = history[-1], history[-PATIENCE:]
    if not bounds.least <= now.teachers <= bounds.most:
        wanted = min(max(now.teachers, bounds.least), bounds.most)
        return Decision(wanted, f"{now.teachers} are outside {bounds.least} to {bounds.most}")
    if len(recent) < PATIENCE:
        return None
    if now.teachers < bounds.most and all(map(_short, recent)):
        wait = min(o.wait_share or 0.0 for o in recent)
        wanted = min(math.ceil(now.teachers / (1 - min(wait, 0.99))), FASTEST * now.teachers, bounds.most)
        return Decision(wanted, f"students waited {wait:.0%} of their time or more, teachers idled "
                        f"{_percent(now.idle_share)}")  # fmt: skip
    if now.teachers > bounds.least and all(map(_spare, recent)):
        return Decision(now.teachers - 1, f"teachers idled {_percent(now.idle_share)} of their time, students waited "
                        f"{_percent(now.wait_share)}")  # fmt: skip
    return None


def _short(seen: Observation) -> bool:
    waits = seen.wait_share is not None and seen.wait_share > GROW_WAIT
    return waits and (seen.idle_share is None or seen.idle_share < IDLE_TOO_MUCH)


def _spare(seen: Observation) -> bool:
    """Whether one teacher fewer would leave the others at most `BUSY_ENOUGH` busy."""
    if seen.idle_share is None or seen.teachers < 2 or (seen.wait_share or 0.0) > SHRINK_WAIT:
        return False
    return (1 - seen.idle_share) * seen.teachers / (seen.teachers - 1) <= BUSY_ENOUGH


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.0%}"
