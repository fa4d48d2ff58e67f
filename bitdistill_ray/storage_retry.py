"""Patience with an object store that is overloaded or away for a while.

An S3 server that answers 500 or 503, drops the connection or lets a request time out is asked again, each time after a
longer pause, until the patience of the configuration is used up; each pause is printed, since nothing waits silently.
What waiting cannot mend (no such bucket, access denied, no such host) is raised at once.  Whole-file writes and reads
may be repeated, so everything in `storage.py` may.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from bitdistill_ray.errors import StorageError

Result = TypeVar("Result")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
DROPPED = (ConnectTimeoutError, ReadTimeoutError, ConnectionClosedError, ResponseStreamingError)
TRANSIENT_CODES = frozenset(
    {"500", "502", "503", "504", "slowdown", "serviceunavailable", "internalerror", "internal error",
     "requesttimeout", "requesttimeexception", "throttling", "throttlingexception", "toomanyrequests"}
)  # fmt: skip
TRANSIENT_WORDS = ("slow_down", "slow down", "reduce your request rate", "service unavailable", "internal error",
                   "gateway timeout", "bad gateway", "connection reset", "server disconnected", "read timeout",
                   "connect timeout", "network_connection", "request_timeout", "service_unavailable",
                   "internal_failure", "throttling",
                   *(f"http status {code}" for code in (500, 502, 503, 504)))  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """True where the same request may well succeed a little later; s3fs hides the S3 error behind an OSError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (*DROPPED, TimeoutError, ConnectionResetError, BrokenPipeError)):
            return True
        if isinstance(cause, ClientError):
            response = cause.response
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status >= 500 or str(response.get("Error", {}).get("Code", "")).lower() in TRANSIENT_CODES
        cause = cause.__cause__
    return any(word in str(error).lower() for word in TRANSIENT_WORDS)


class Patience:
    """What is left of `patience_s` for one operation; `pause` waits the given seconds."""

    def __init__(
        self,
        patience_s: float,
        *,
        say: Callable[[str], None] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.deadline, self.wait = time.monotonic() + patience_s, FIRST_PAUSE_S
        self.say, self.pause = say or _to_stderr, pause

    def bears(self, error: BaseException, where: str) -> bool:
        """True after a pause, which is told; False where waiting cannot mend it, or no pause fits in any more."""
        left = self.deadline - time.monotonic()
        if not is_transient(error) or left < self.wait:
            return False
        words = error.what if isinstance(error, StorageError) else error  # its remedy is being tried
        self.say(f"{where}: {words}; again in {self.wait:.1f} s, for at most {left:.0f} s")
        self.pause(self.wait)
        self.wait = min(2 * self.wait, LONGEST_PAUSE_S)
        return True


def patiently(
    action: Callable[[], Result],
    where: str,
    *,
    patience_s: float,
    say: Callable[[str], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Result:
    """`action()`, again after a transient failure, until it succeeds or no pause fits into `patience_s` any more.

    Raises what the last attempt raised.
    """
    patience = Patience(patience_s, say=say, pause=pause)
    while True:
        try:
            return action()
        except (OSError, BotoCoreError, ClientError, StorageError) as error:
            if not patience.bears(error, where):
                raise


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
