"""One teacher as the registry sees it: where it stands in its life, and what it did lately."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bitdistill_ray.teacher.request import Load


class State(StrEnum):
    """STARTING loads its model, LIVE takes questions, DRAINING answers those it has and then ends."""

    STARTING = "starting"
    LIVE = "live"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """A line of `bitdistill teacher status`.  Rates and shares are of the last seconds; None: not measured yet."""

    number: int
    state: State
    requests: int
    tokens: int
    tokens_per_s: float | None
    idle_share: float | None
    queue: int  # questions that clients have with it


@dataclass(slots=True)
class Member:
    """A teacher of the pool.  `left_at` is the version of the first membership without it."""

    number: int
    handle: Any
    state: State = State.STARTING
    description: str = ""
    left_at: int = 0
    ending: bool = False
    load: Load | None = None  # the newest
    before: Load | None = None  # the one before it
    mark: Load | None = None  # the one at the start of the window

    def measure(self, load: Load) -> None:
        """Note what the teacher says of itself."""
        self.before, self.load = self.load, load

    def take_idle_share(self) -> float | None:
        """The part of the time since the last call in which the teacher computed nothing."""
        mark, self.mark = self.mark, self.load
        return _idle_share(mark, self.load)

    def status(self, queue: int) -> MemberStatus:
        """The line about this teacher."""
        load, before = self.load, self.before
        return MemberStatus(
            number=self.number,
            state=self.state,
            requests=load.requests if load else 0,
            tokens=load.tokens if load else 0,
            tokens_per_s=_tokens_per_s(before, load),
            idle_share=_idle_share(before, load),
            queue=queue,
        )


def _tokens_per_s(since: Load | None, until: Load | None) -> float | None:
    if since is None or until is None or until.up_s <= since.up_s:
        return None
    return (until.tokens - since.tokens) / (until.up_s - since.up_s)


def _idle_share(since: Load | None, until: Load | None) -> float | None:
    """None where nothing was measured, or where the teacher was started again in between."""
    if since is None or until is None or until.up_s <= since.up_s:
        return None
    return max(0.0, 1 - (until.busy_s - since.busy_s) / (until.up_s - since.up_s))
