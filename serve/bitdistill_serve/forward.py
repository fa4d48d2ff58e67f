"""One HTTP request over a deployment handle: what a router asks of the replica that has the model, and its answer.

Everything that the replica's routes have sent since the last message travels in one, so a slow reader costs the replica
no message for each token.  When the asking side goes away, the route is cancelled, as at a client that hangs up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request, whole."""

    method: str
    path: str
    headers: Headers
    body: bytes
    client: tuple[str, int] | None


async def answers(app: ASGIApp, request: Forwarded) -> AsyncIterator[list[Message]]:
    """The ASGI messages with which `app` answers, as they come."""
    sent: list[Message] = []
    more = asyncio.Event()
    bodies = [request.body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await asyncio.Event().wait()  # a hang-up arrives as the end of this generator
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)
        more.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": request.headers,
        "client": request.client,
        "server": None,
    }
    route = asyncio.ensure_future(app(scope, receive, send))
    route.add_done_callback(lambda _: more.set())
    try:
        while not (route.done() and not sent):
            await more.wait()
            more.clear()
            messages, sent[:] = list(sent), []
            if messages:
                yield messages
        await route
    finally:
        route.cancel()
        with suppress(asyncio.CancelledError):
            await route
