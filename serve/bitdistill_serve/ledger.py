"""The ledger of rates (`shares.py`) as a small deployment of the application, and its handle in a replica.

Serve starts it with the application, restarts it where it dies and takes it away at the end; it needs no CPU of its own
and reads no model.  It is there only where keys are asked for and more than one replica counts their rates.  One that
died comes back with full buckets; its replicas count for themselves meanwhile, and look for it every `AWAY_S`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from bitdistill_serve.errors import LedgerAwayError
from bitdistill_serve.shares import Drawn, Ledger, Rate

logger = logging.getLogger(__name__)

DEPLOYMENT = "rates"
AT_ONCE = 4096  # draws, each of which takes microseconds
ANSWER_S = 1.0  # a draw takes milliseconds; a request does not wait longer for its rate to be counted
AWAY_S = 5.0


def ledger_application() -> Application:
    """To be bound to each replica."""
    made = serve.deployment(Ledger, name=DEPLOYMENT, max_ongoing_requests=AT_ONCE, ray_actor_options={"num_cpus": 0})
    return made.bind()


class LedgerOverHandle:
    """A `SharedLedger` in another process."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._away_until_s = -math.inf

    async def draw(self, rate: Rate, units: int, most: int) -> Drawn:
        drawn: Drawn = await self._ask("draw", rate, units, most)
        return drawn

    async def charge(self, rate: Rate, units: int) -> None:
        await self._ask("charge", rate, units)

    async def put_back(self, rate: Rate, units: int) -> None:
        await self._ask("put_back", rate, units)

    async def _ask(self, method: str, *arguments: object) -> Any:
        if time.monotonic() < self._away_until_s:
            raise LedgerAwayError("the ledger of rates", "is away", "Serve restarts it")
        try:
            async with asyncio.timeout(ANSWER_S):
                return await getattr(self._handle, method).remote(*arguments)
        except (RayError, RayServeException, TimeoutError) as error:
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            logger.warning("the ledger of rates: %s; for %g s this replica counts alone", what, AWAY_S)
            self._away_until_s = time.monotonic() + AWAY_S
            raise LedgerAwayError("the ledger of rates", what, "Serve restarts it") from error
