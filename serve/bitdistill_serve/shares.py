"""One rate over all replicas: a ledger holds the bucket, and each replica has a share of it on loan.

A request that finds its units in the replica's share waits for nobody.  Otherwise the replica draws them from the
ledger, and with them what the rate allows in `LOAN_S`, for the requests that follow; a key that may ask less often than
that is looked up each time.  What a replica has not spent `LOAN_S` later goes back.  So a loan is never spent later
than `LOAN_S` after it left the bucket, and however many replicas there are, a key gets in T seconds at most what one
bucket would give it in T + `LOAN_S`.

Answers are charged when they end and nobody waits for that.  A replica that dies takes its loans with it, at most what
the rate allows in `LOAN_S`.  While the ledger is away each replica counts for itself.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from bitdistill_serve.errors import LedgerAwayError
from bitdistill_serve.keys import ApiKey
from bitdistill_serve.rates import Bucket, Budget, Client, Clock, Own

LOAN_S = 1.0


class What(StrEnum):
    """What a rate counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Rate:
    """Whose rate it is (a key's hash), and of what.  Another `per_minute` is another bucket."""

    holder: str
    what: What
    per_minute: int

    @property
    def loan(self) -> int:
        """Units that a replica may have on loan."""
        return math.floor(self.per_minute * LOAN_S / 60)


class Drawn(NamedTuple):
    """The answer to a draw: units beyond those asked for; or none, and the seconds until those will be there."""

    loan: int
    wait_s: float


class SharedLedger(Protocol):
    """What a replica sees of the ledger.  Each call raises LedgerAwayError, soon, when it cannot be reached."""

    async def draw(self, rate: Rate, units: int, most: int) -> Drawn:
        """Take `units`, and up to `most` more as a loan."""
        ...

    async def charge(self, rate: Rate, units: int) -> None:
        """Take `units`, into debt if need be."""
        ...

    async def put_back(self, rate: Rate, units: int) -> None:
        """Return a part of a loan."""
        ...


class Ledger:
    """The buckets that all replicas draw from."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[Rate, Bucket] = {}

    async def draw(self, rate: Rate, units: int, most: int) -> Drawn:
        bucket = self._bucket(rate)
        if wait_s := bucket.wait_s(units):
            return Drawn(0, wait_s)
        bucket.take(units)
        loan = min(most, bucket.left)
        bucket.take(loan)
        return Drawn(loan, 0.0)

    async def charge(self, rate: Rate, units: int) -> None:
        self._bucket(rate).take(units)

    async def put_back(self, rate: Rate, units: int) -> None:
        self._bucket(rate).put_back(units)

    def _bucket(self, rate: Rate) -> Bucket:
        if rate not in self._buckets:
            self._buckets[rate] = Bucket(rate.per_minute, self._clock)
        return self._buckets[rate]


class Share:
    """A replica's side of one rate; a `Budget`.  All methods belong to one event loop."""

    def __init__(self, rate: Rate, ledger: SharedLedger, clock: Clock = time.monotonic) -> None:
        self._rate, self._ledger = rate, ledger
        self._loan = 0
        self._draws = 0  # under way: one of them brings a loan
        self._alone = Own(Bucket(rate.per_minute, clock))
        self._returning: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, units: int) -> float:
        if units <= self._loan:
            self._loan -= units
            return 0.0
        self._draws += 1
        try:
            loan, wait_s = await self._ledger.draw(self._rate, units, self._rate.loan if self._draws == 1 else 0)
        except LedgerAwayError:
            return await self._alone.take(units)
        finally:
            self._draws -= 1
        if loan:
            self._loan += loan
            if self._returning is None:
                self._returning = asyncio.get_running_loop().call_later(LOAN_S, self.return_loan)
        return wait_s

    def charge(self, units: int) -> None:
        own = min(units, self._loan)
        self._loan -= own
        if units > own:
            self._in_background(self._charge(units - own))

    def return_loan(self) -> None:
        """Give back what is on loan now."""
        loan, self._loan = self._loan, 0
        if self._returning is not None:
            self._returning.cancel()
            self._returning = None
        if loan:
            self._in_background(self._put_back(loan))

    async def settled(self) -> None:
        """Wait until the ledger knows what it was told."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def _charge(self, units: int) -> None:
        try:
            await self._ledger.charge(self._rate, units)
        except LedgerAwayError:
            self._alone.charge(units)

    async def _put_back(self, units: int) -> None:
        with suppress(LedgerAwayError):  # a new ledger begins with full buckets
            await self._ledger.put_back(self._rate, units)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def client_of(key: ApiKey, ledger: SharedLedger | None) -> Client:
    """The client that a key stands for; without a ledger this process is the only one that counts."""

    def budget(what: What, per_minute: int | None) -> Budget:
        if per_minute is None or ledger is None:
            return Own(Bucket(per_minute))
        return Share(Rate(key.sha256, what, per_minute), ledger)

    return Client(f"key {key.name}", budget(What.REQUESTS, key.requests_per_minute),
                  budget(What.TOKENS, key.tokens_per_minute))  # fmt: skip
