"""How much a client may ask in a minute: token buckets, which allow a burst of one minute's worth and then the rate.

The tokens of a prompt are paid when it is taken, those of its answer when it ends; an answer may leave a debt, which
the next request waits for.  A `Budget` is a bucket of this process (`Own`), or the share that this replica has in one
of all replicas (`shares.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from bitdistill_serve.errors import ApiError, ErrorType

Clock = Callable[[], float]


class Bucket:
    """`per_minute` units, full at first; None: any number."""

    def __init__(self, per_minute: int | None, clock: Clock = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._level, self._at_s = float(per_minute or 0), clock()

    @property
    def left(self) -> int:
        """Whole units that may be taken now."""
        return max(0, math.floor(self._filled()))

    def wait_s(self, units: int) -> float:
        """Seconds until `units` may be taken (a full bucket, where they are more than it holds); 0: now."""
        if self._per_minute is None:
            return 0.0
        return max(0.0, min(units, self._per_minute) - self._filled()) * 60 / self._per_minute

    def take(self, units: int) -> None:
        """Take them, into debt if need be."""
        if self._per_minute is not None:
            self._level, self._at_s = self._filled() - units, self._clock()

    def put_back(self, units: int) -> None:
        """Return what was taken and not used."""
        self.take(-units)

    def _filled(self) -> float:
        rate = (self._per_minute or 0) / 60
        return min(float(self._per_minute or 0), self._level + (self._clock() - self._at_s) * rate)


class Budget(Protocol):
    """What a client may still spend."""

    async def take(self, units: int) -> float:
        """Take them, and return 0; or take none, and return in how many seconds they will be there."""
        ...

    def charge(self, units: int) -> None:
        """Take them, into debt if need be."""
        ...


class Own:
    """A bucket of this process alone."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def take(self, units: int) -> float:
        if not (wait_s := self._bucket.wait_s(units)):
            self._bucket.take(units)
        return wait_s

    def charge(self, units: int) -> None:
        self._bucket.take(units)


def _unlimited() -> Own:
    return Own(Bucket(None))


@dataclass(slots=True)
class Client:
    """Who asks: its turn in the queue goes by `name`."""

    name: str
    requests: Budget = field(default_factory=_unlimited)
    tokens: Budget = field(default_factory=_unlimited)

    async def ask(self) -> None:
        """One request.  Raises ApiError when there were too many."""
        await self._take(self.requests, 1, "requests")

    async def spend(self, tokens: int) -> None:
        """The tokens of prompts.  Raises ApiError when there were too many."""
        await self._take(self.tokens, tokens, "tokens")

    def charge(self, tokens: int) -> None:
        """The tokens of answers, which nobody knew before they came."""
        self.tokens.charge(tokens)

    async def _take(self, budget: Budget, units: int, what: str) -> None:
        if wait_s := await budget.take(units):
            raise ApiError(
                429,
                f"This key's {what} of the minute are used up",
                type=ErrorType.OVERLOADED,
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
            )
