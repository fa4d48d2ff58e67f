"""How much a client may ask in a minute: token buckets, which allow a burst of one minute's worth and then the rate.

The tokens of a prompt are paid when it is taken, those of its answer when it ends; an answer may leave a debt, which
the next request waits for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bitdistill_serve.errors import ApiError, ErrorType
from bitdistill_serve.keys import ApiKey

Clock = Callable[[], float]


class Bucket:
    """`per_minute` units, full at first; None: any number."""

    def __init__(self, per_minute: int | None, clock: Clock = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._level, self._at_s = float(per_minute or 0), clock()

    def wait_s(self, units: int) -> float:
        """Seconds until `units` may be taken (a full bucket, where they are more than it holds); 0: now."""
        if self._per_minute is None:
            return 0.0
        return max(0.0, min(units, self._per_minute) - self._filled()) * 60 / self._per_minute

    def take(self, units: int) -> None:
        """Take them, into debt if need be."""
        if self._per_minute is not None:
            self._level, self._at_s = self._filled() - units, self._clock()

    def _filled(self) -> float:
        rate = (self._per_minute or 0) / 60
        return min(float(self._per_minute or 0), self._level + (self._clock() - self._at_s) * rate)


@dataclass(slots=True)
class Client:
    """Who asks: its turn in the queue goes by `name`."""

    name: str
    requests: Bucket = field(default_factory=lambda: Bucket(None))
    tokens: Bucket = field(default_factory=lambda: Bucket(None))

    @classmethod
    def of(cls, key: ApiKey) -> Client:
        """The client that a key stands for."""
        return cls(f"key {key.name}", Bucket(key.requests_per_minute), Bucket(key.tokens_per_minute))

    def ask(self) -> None:
        """One request.  Raises ApiError when there were too many."""
        self._take(self.requests, 1, "requests")

    def spend(self, tokens: int) -> None:
        """The tokens of prompts.  Raises ApiError when there were too many."""
        self._take(self.tokens, tokens, "tokens")

    def _take(self, bucket: Bucket, units: int, what: str) -> None:
        if wait_s := bucket.wait_s(units):
            raise ApiError(
                429,
                f"This key's {what} of the minute are used up",
                type=ErrorType.OVERLOADED,
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
            )
        bucket.take(units)
